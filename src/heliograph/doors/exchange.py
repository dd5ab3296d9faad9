"""One HTTP request and its answer, as ASGI has it: bodies within bounds, problems in one form, a clean end.

A request may be refused before its body was read. Its sender is still sending then, and a connection that is closed
over unread octets is reset, which can take the answer with it. So the answer goes out at once, what still comes is
thrown away for a while, and only then the connection is closed.

Problems are told as problem+json (RFC 9457), `errors` beside it with one entry for each thing that is wrong.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

import msgspec
from msgspec import UNSET, Struct, UnsetType
from starlette.types import Receive, Scope, Send

from heliograph.doors import problems
from heliograph.net.http1 import BODY_IS_THERE

MAX_BODY_BYTES = 8 * 1024 * 1024
"""Octets of a request's body, at most."""

BODY_S = 30.0
"""How long a body may take to come."""

_SHORT = 65_536
"""A body of so many octets is soon there, so that its connection can be kept."""
_SHORT_S = 0.25
_LINGER_S = 5.0
"""How long, at most, what comes after an answer is thrown away."""

_encode = msgspec.json.encode


class ErrorItem(Struct, omit_defaults=True):
    """One thing that is wrong."""

    code: str
    """A word of `/docs/errors`."""
    detail: str
    """What is wrong, and what to do."""
    index: int | None = None
    """Its place in the list that was sent, from 0; not there where no list was."""
    field: str | None = None
    """The field at fault, such as `sound.volume`."""


class ProblemBody(Struct):
    """What is wrong, and what to do (RFC 9457)."""

    type: str
    """Where the code is explained."""
    title: str
    """The code in words."""
    status: int
    """The HTTP status."""
    detail: str
    """What is wrong here, and what to do."""
    code: str
    """A word of `/docs/errors`, which stays."""
    errors: Sequence[ErrorItem] | UnsetType = UNSET
    """One entry for each thing that is wrong in what was sent, the first 100; not always there."""


class Problem(Exception):
    """An answer that says what is wrong."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        errors: Sequence[ErrorItem] = (),
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = errors
        self.headers = headers

    def answer(self) -> Answer:
        where = f"/docs/errors#{problems.slug(self.code)}"
        body = ProblemBody(where, problems.title(self.code), self.status, self.detail, self.code, self.errors or UNSET)
        return Answer(self.status, _encode(body), self.headers, b"application/problem+json", self.code)


class Answer(Struct):
    """What goes back."""

    status: int
    body: bytes
    headers: Sequence[tuple[bytes, bytes]] = ()
    content_type: bytes = b"application/json"
    code: str = ""
    """Of the problem that it tells of."""


class Gone(Exception):
    """The caller hung up before its request was whole: nobody is there for an answer."""


class Exchange:
    """A request, and the way to answer it."""

    __slots__ = ("_receive", "_send", "_there", "_whole", "announced", "answered", "headers", "method", "path", "query")

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope["query_string"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        """Names in lower case; of those that come twice, the last."""
        self.announced = self._read_announced()
        """Octets of the body, as the caller says; None: it does not say, and they come in chunks."""
        self.answered: Answer | None = None
        """What went back."""
        self._receive = receive
        self._send = send
        self._whole = self.announced == 0
        self._there = BODY_IS_THERE in scope.get("extensions", ())

    def _read_announced(self) -> int | None:
        length = self.headers.get(b"content-length")
        if length is None:
            return None if b"transfer-encoding" in self.headers else 0
        return int(length[:20]) if length.isdigit() else None

    async def read(self, hold: Callable[[int], None], most: int = MAX_BODY_BYTES) -> bytes:
        """The body, of so many octets at most.

        `hold` is told how many octets there are to be, before any is read and whenever there are more; what it raises
        ends the reading. Raises Problem, Gone.
        """
        if self.headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise Problem(415, "UnsupportedEncoding", "Send the body as it is, without Content-Encoding.")
        held = self.announced or 0
        if held > most:
            raise _too_long(most)
        hold(held)
        if self._whole:
            return b""
        if self._there and self.announced is not None:
            return await self._next()
        # As asyncio.timeout does it, which takes 6 us where this takes half of one.
        task = asyncio.current_task()
        assert task is not None
        late = False

        def expire() -> None:
            nonlocal late
            late = True
            task.cancel()

        timer = task.get_loop().call_later(BODY_S, expire)
        try:
            body = await self._next()
            if self._whole and len(body) <= held:
                return body
            chunks = [body]
            size = len(body)
            while True:
                if size > most:
                    raise _too_long(most)
                if size > held:
                    held = size
                    hold(held)
                if self._whole:
                    return b"".join(chunks)
                chunks.append(await self._next())
                size += len(chunks[-1])
        except asyncio.CancelledError:
            if not late or task.uncancel():
                raise
            raise Problem(408, "RequestTimeout", f"The body did not come within {BODY_S:.0f} s.") from None
        finally:
            timer.cancel()

    async def answer(self, answer: Answer) -> None:
        """Send it. Returns when there is nothing more to do for the request."""
        self.answered = answer
        headers = [
            (b"content-length", b"%d" % len(answer.body)),
            (b"content-type", answer.content_type),
            *answer.headers,
        ]
        whole = self._whole or await self._soon_whole()
        if not whole:
            headers.append((b"connection", b"close"))
        await self._send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": answer.body, "more_body": not whole})
        if not whole:
            await self._throw_away(_LINGER_S)
            await self._send({"type": "http.response.body", "body": b""})

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise Gone
        self._whole = not message.get("more_body", False)
        body: bytes = message.get("body", b"")
        return body

    async def _soon_whole(self) -> bool:
        if self.announced is not None and self.announced <= _SHORT:
            await self._throw_away(_SHORT_S)
        return self._whole

    async def _throw_away(self, seconds: float) -> None:
        size = 0
        try:
            async with asyncio.timeout(seconds):
                while not self._whole and size <= MAX_BODY_BYTES:
                    size += len(await self._next())
        except (TimeoutError, Gone):
            pass


def _too_long(most: int) -> Problem:
    text = f"The body is longer than {most} octets, the most that this path takes: send several requests, or less."
    return Problem(413, "RequestTooLarge", text)


def retry_after(seconds: float) -> tuple[tuple[bytes, bytes]]:
    """The header that says when to come again."""
    return ((b"retry-after", b"%d" % math.ceil(seconds)),)
