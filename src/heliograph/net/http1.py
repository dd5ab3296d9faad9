"""HTTP/1.1 as uvicorn speaks it, with answers that go out in one write, and an end to patience.

`HEAD_S` is what a caller has for the head of each request, from the end of the answer before: uvicorn alone waits for
the rest of a head for ever, and takes one of any length. How long a body may take is the application's affair.
"""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

HEAD_S = 10.0
"""How long a connection may take to bring the head of a request; looked at once a second."""

MAX_HEAD_BYTES = 65_536
"""Octets of a request's head, about: looked at after each read."""

_TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"

BODY_IS_THERE = "heliograph.body_is_there"
"""An ASGI extension: all of the body has come, so that to receive it takes no time."""

_CLOSE = (b"connection", b"close")


class _Cycle(RequestResponseCycle):
    """A request and its answer."""

    _start: Any = None
    """The beginning of an answer of known length, which waits for the body."""

    async def run_asgi(self, app: Any) -> None:
        if not self.more_body:
            self.scope["extensions"] = {BODY_IS_THERE: {}}
        await super().run_asgi(app)

    async def send(self, message: Any) -> None:
        """As uvicorn's, but that what is whole is one write: each takes as long as to read the request."""
        if message["type"] == "http.response.start" and b"content-length" in dict(message["headers"]):
            self._start = message
            return
        start = self._start
        if start is not None:
            self._start = None
            more = message.get("more_body") or _CLOSE in start["headers"]
            if self.keep_alive and not (more or self.flow.write_paused or self.disconnected):
                self._answer(start, message.get("body", b""))
                return
            await super().send(start)
        await super().send(message)

    def _answer(self, start: Any, body: bytes) -> None:
        parts = [STATUS_LINE[start["status"]]]
        for name, value in (*self.default_headers, *start["headers"]):
            parts += (name, b": ", value, b"\r\n")
        parts.append(b"\r\n")
        if self.scope["method"] != "HEAD":
            parts.append(body)
        self.response_started = self.response_complete = True
        self.transport.write(b"".join(parts))
        self.message_event.set()
        self.on_response()


class Protocol(HttpToolsProtocol):
    """A connection."""

    waits_since: float | None = None
    """For the head of a request, by the loop's clock; None: a request is in hand."""
    _head_bytes = 0
    """Of the head that is not complete yet."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.waits_since = self.loop.time()
        if self.limit_concurrency is not None and len(self.connections) > self.limit_concurrency:
            transport.close()

    def look(self, now: float) -> None:
        """Close it if its caller takes too long."""
        if self.waits_since is not None and now > self.waits_since + HEAD_S:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        """As uvicorn's, but that a head has an end."""
        super().data_received(data)
        if self.waits_since is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.transport.write(_TOO_LONG)
                self.transport.close()

    def on_headers_complete(self) -> None:
        """As uvicorn's, without what is not used here."""
        self.waits_since = None
        self._head_bytes = 0
        parser, scope = self.parser, self.scope
        version = scope["http_version"] = parser.get_http_version()
        scope["method"] = parser.get_method().decode("ascii")
        url = httptools.parse_url(self.url)
        path = url.path.decode("ascii")
        scope["path"] = unquote(path) if "%" in path else path
        scope["raw_path"] = url.path
        scope["query_string"] = url.query or b""
        before: RequestResponseCycle | None = self.cycle
        self.cycle = _Cycle(
            scope,
            self.transport,
            self.flow,
            self.logger,
            self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=version != "1.0" and parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        if before is None or before.response_complete:
            self._start_asgi_task(self.cycle, self.app)
        else:  # it came before the answer to the one before
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def on_response_complete(self) -> None:
        """As uvicorn's, but that no timer is set for each answer."""
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self.waits_since = self.loop.time()
