"""What is ours in the way HTTP/1.1 is served: answers in one write, and callers who take their time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from heliograph.net import asgi, http1

PATIENCE_S = 20.0


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with what it was sent; paths ask for other ways of doing that."""
    body = b""
    more = True
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    headers = [(b"content-type", b"text/plain")]
    if scope["path"] != "/follow":
        headers.append((b"content-length", b"%d" % len(body)))
    if scope["path"] == "/close":
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": 202, "headers": headers})
    if scope["path"] == "/fail":
        raise ValueError("meant")
    if scope["path"] == "/follow":
        await scope["state"]["go"].wait()
    if scope["path"] == "/parts":
        for octet in body:
            await send({"type": "http.response.body", "body": bytes((octet,)), "more_body": True})
        body = b""
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def served(go: asyncio.Event | None = None) -> AsyncIterator[tuple[str, int]]:
    async def with_state(scope: Any, receive: Any, send: Any) -> None:
        await app(scope | {"state": {"go": go}}, receive, send)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        async with asyncio.timeout(PATIENCE_S), asgi.serving(with_state, listening, answering_s=1):
            yield listening.getsockname()


def post(path: str, body: bytes, *, method: str = "POST") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def read_head(reader: asyncio.StreamReader) -> tuple[bytes, dict[bytes, bytes]]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[:-2]
    fields = dict(line.split(b": ", 1) for line in lines)
    return first, fields


@pytest.mark.parametrize("path", ["/", "/parts"])
async def test_answers_follow_one_another_on_one_connection(path: str) -> None:
    async with served() as place:
        reader, writer = await asyncio.open_connection(*place)
        for body in (b"first", b"", b"third"):
            writer.write(post(path, body))
            first, fields = await read_head(reader)
            assert (first, fields[b"content-length"]) == (b"HTTP/1.1 202 Accepted", b"%d" % len(body))
            assert b"date" in fields
            assert await reader.readexactly(len(body)) == body
        writer.close()


async def test_requests_that_come_together_are_answered_in_their_order() -> None:
    async with served() as place:
        reader, writer = await asyncio.open_connection(*place)
        writer.write(b"".join(post("/", b"%d" % number) for number in range(5)))
        for number in range(5):
            await read_head(reader)
            assert await reader.readexactly(1) == b"%d" % number
        writer.close()


async def test_an_answer_to_head_has_no_body() -> None:
    async with served() as place:
        reader, writer = await asyncio.open_connection(*place)
        writer.write(post("/", b"much", method="HEAD") + post("/", b"more"))
        assert (await read_head(reader))[1][b"content-length"] == b"4"
        assert (await read_head(reader))[1][b"content-length"] == b"4"
        assert await reader.readexactly(4) == b"more"
        writer.close()


async def test_an_answer_without_a_length_begins_before_its_body_is_known() -> None:
    go = asyncio.Event()
    async with served(go) as place:
        reader, writer = await asyncio.open_connection(*place)
        writer.write(post("/follow", b"later"))
        assert (await read_head(reader))[1][b"transfer-encoding"] == b"chunked"
        go.set()
        assert await reader.readuntil(b"0\r\n\r\n") == b"5\r\nlater\r\n0\r\n\r\n"
        writer.close()


async def test_who_says_close_closes() -> None:
    async with served() as place:
        reader, writer = await asyncio.open_connection(*place)
        writer.write(post("/close", b"last"))
        assert (await read_head(reader))[1][b"connection"] == b"close"
        assert await reader.read() == b"last"
        writer.close()


async def test_who_asks_for_close_or_speaks_http_1_0_is_closed() -> None:
    async with served() as place:
        for head in (b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n", b"GET / HTTP/1.0\r\n\r\n"):
            reader, writer = await asyncio.open_connection(*place)
            writer.write(head)
            assert (await read_head(reader))[1][b"connection"] == b"close"
            assert await reader.read() == b""
            writer.close()


@pytest.mark.filterwarnings("ignore")
async def test_what_fails_after_its_head_is_told_as_a_failure_and_closed() -> None:
    async with served() as place:
        reader, writer = await asyncio.open_connection(*place)
        writer.write(post("/fail", b"x"))
        first, fields = await read_head(reader)
        assert first == b"HTTP/1.1 500 Internal Server Error"
        assert fields[b"connection"] == b"close"
        assert await reader.read() == b"Internal Server Error"
        writer.close()


@pytest.mark.parametrize("begun", [b"", b"POST / HTTP/1.1\r\nHost: he"])
@pytest.mark.parametrize("before", [False, True])
async def test_a_head_that_does_not_come_ends_the_connection(
    begun: bytes, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served() as place:
        reader, writer = await asyncio.open_connection(*place)
        if before:
            writer.write(post("/", b"x"))
            await read_head(reader)
            assert await reader.readexactly(1) == b"x"
        writer.write(begun)
        monkeypatch.setattr(http1, "HEAD_S", 0.0)
        assert await reader.read() == b""
        writer.close()


async def test_a_head_without_an_end_is_refused_and_the_connection_closed() -> None:
    async with served() as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"POST / HTTP/1.1\r\nHost: here\r\nX-Long: ")
        with contextlib.suppress(ConnectionError):
            for _ in range(64):
                writer.write(b"x" * 16_384)
                await writer.drain()
        with contextlib.suppress(ConnectionError):
            assert (await reader.readline()).startswith(b"HTTP/1.1 431 ")
            await reader.read()
        assert reader.at_eof() or reader.exception() is not None
        writer.close()


async def test_a_long_body_is_no_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "MAX_HEAD_BYTES", 1000)
    async with served() as address:
        reader, writer = await asyncio.open_connection(*address)
        for _ in range(2):
            writer.write(post("/", b"x" * 500_000))
            head, fields = await read_head(reader)
            assert head == b"HTTP/1.1 202 Accepted"
            assert await reader.readexactly(int(fields[b"content-length"])) == b"x" * 500_000
        writer.close()


async def test_a_request_in_hand_is_no_head_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    go = asyncio.Event()
    async with served(go) as place:
        reader, writer = await asyncio.open_connection(*place)
        idle, idle_writer = await asyncio.open_connection(*place)
        writer.write(post("/follow", b"later"))
        await read_head(reader)
        monkeypatch.setattr(http1, "HEAD_S", 0.0)
        assert await idle.read() == b""  # so there was a look at all of them
        monkeypatch.undo()
        go.set()
        assert await reader.readuntil(b"later\r\n") == b"5\r\nlater\r\n"
        for each in (writer, idle_writer):
            each.close()


async def test_there_are_no_more_connections_than_files_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "_most_connections", lambda: 1)
    async with served() as place:
        reader, writer = await asyncio.open_connection(*place)
        writer.write(post("/", b"x"))
        await read_head(reader)
        second, second_writer = await asyncio.open_connection(*place)
        assert await second.read() == b""
        writer.write(post("/", b"y"))
        assert await reader.readexactly(1) == b"x"
        await read_head(reader)
        assert await reader.readexactly(1) == b"y"
        for each in (writer, second_writer):
            each.close()
