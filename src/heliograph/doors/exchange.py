"""One HTTP request and its answer, as ASGI has it: bodies within bounds, problems in one form, a clean end.

A request may be refused before its body was read. Its sender is still sending then, and a connection that is closed
over unread octets is reset, which can take the answer with it. So the answer goes out at once, what still comes is
thrown away for a while, and only then the connection is closed.

Problems are told as problem+json (RFC 9457), `errors` beside it with one entry for each thing that is wrong.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches

import msgspec
from msgspec import Struct
from starlette.types import Receive, Scope, Send

MAX_BODY_BYTES = 8 * 1024 * 1024
"""Octets of a request's body, at most."""

BODY_S = 30.0
"""How long a body may take to come."""

_SHORT = 65_536
"""A body of so many octets is soon there, so that its connection can be kept."""
_SHORT_S = 0.25
_LINGER_S = 5.0
"""How long, at most, what comes after an answer is thrown away."""

_SHOWN = 64
"""Characters of a caller's own word that an answer repeats."""

_encode = msgspec.json.encode
_word = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


class ErrorItem(Struct, omit_defaults=True):
    """One thing that is wrong."""

    code: str
    detail: str
    index: int | None = None
    """Its place in the caller's list."""
    field: str | None = None


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
        body = {
            "type": f"/docs/errors#{_word.sub('-', self.code).lower()}",
            "title": _word.sub(" ", self.code).capitalize(),
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
        }
        if self.errors:
            body["errors"] = self.errors
        return Answer(self.status, _encode(body), self.headers, b"application/problem+json")


class Answer(Struct):
    """What goes back."""

    status: int
    body: bytes
    headers: Sequence[tuple[bytes, bytes]] = ()
    content_type: bytes = b"application/json"


class Gone(Exception):
    """The caller hung up before its request was whole: nobody is there for an answer."""


class Exchange:
    """A request, and the way to answer it."""

    __slots__ = ("_receive", "_send", "_whole", "announced", "headers", "method", "path", "query")

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope["query_string"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        """Names in lower case; of those that come twice, the last."""
        self.announced = self._read_announced()
        """Octets of the body, as the caller says; None: it does not say, and they come in chunks."""
        self._receive = receive
        self._send = send
        self._whole = self.announced == 0

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


# -- what a typed decode disliked ------------------------------------------------------------------------------------

_UNKNOWN = "Object contains unknown field `"
_AT = " - at `$"
_PLACE_CHARS = 200
"""No place in a body of ours is longer."""
_is_place = re.compile(r"[a-z0-9_.\[\]]*").fullmatch


class Dislike(Struct, frozen=True):
    """A complaint of msgspec in its parts."""

    words: str
    """Empty for an unknown field. They hold a value of the caller's for an enum, and never otherwise."""
    place: str
    """Such as `notifications[0].sound`; empty: the whole."""
    unknown: str | None = None
    """The name of a field that there is not; its beginning where it is long."""


def dissect(error: msgspec.ValidationError) -> Dislike:
    """In time and memory that hardly grow with what the caller named."""
    text = str(error)
    if text.startswith(_UNKNOWN):
        # First of all, as a name may look like anything, and like a place behind it too.
        begin = len(_UNKNOWN)
        end = text.rfind("`" + _AT, max(begin, len(text) - _PLACE_CHARS))
        place = text[end + 1 + len(_AT) : -1]
        if end < 0 or not _is_place(place):
            end, place = len(text) - 1, ""
        return Dislike("", place.removeprefix(".")[:_SHOWN], text[begin : min(end, begin + _SHOWN + 1)])
    words, at, place = text.rpartition(_AT)
    if not at:
        return Dislike(text, "")
    return Dislike(words, place.removesuffix("`").removeprefix(".")[:_SHOWN])


def closest(name: str, known: Iterable[str]) -> str | None:
    """Which of the known names may have been meant."""
    return next(iter(get_close_matches(name[:_SHOWN].lower(), list(known), n=1)), None)


def shown(name: str) -> str:
    """A word of the caller's as an answer repeats it."""
    return name if len(name) <= _SHOWN else f"{name[: _SHOWN - 3]}..."
