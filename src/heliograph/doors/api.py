"""The HTTP API: who may do what, how much at once, and how things that go wrong are told.

The way of a request: its path is found in one of the parts (`notifications`, `apps`, `keys`), its API key says whose it
is, and what cannot be taken now is refused before its body is read. The part answers; what it raises is told in one
form.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple, Protocol, TypeVar

from heliograph.complaints import shown
from heliograph.doors import decoding
from heliograph.doors.exchange import MAX_BODY_BYTES, Answer, Exchange, Gone, Problem, retry_after
from heliograph.errors import Overloaded, Refused, StoreError
from heliograph.keys import Caller, Keyring
from heliograph.model import Scope

T = TypeVar("T")

MAX_REQUESTS = 2000
"""Requests in hand, at most; those that wait for an outcome are not counted."""

MAX_HELD_BYTES = 32 * 1024 * 1024
"""Octets of bodies in hand, at most, announced or read; several times `MAX_BODY_BYTES`, so one alone always fits."""

RETRY_S = 5
"""When to try again where the store is full or fails; where only too many came at once, `_BUSY_S`."""
_BUSY_S = 1


class Budget:
    """What is in hand now."""

    def __init__(self) -> None:
        self.requests = 0
        self.held_bytes = 0
        """Octets of bodies, announced or read."""


class Call(NamedTuple):
    """A request of a caller who may make it."""

    exchange: Exchange
    caller: Caller
    budget: Budget

    async def read(self, use: Callable[[bytes], Awaitable[T]], most: int = MAX_BODY_BYTES) -> T:
        """What `use` makes of the body, of `most` octets at most, which count as in hand until it is through with it.

        Raises Problem, Gone, and what `use` raises.
        """
        held = 0
        budget = self.budget

        def hold(octets: int) -> None:
            nonlocal held
            if budget.held_bytes - held + octets > MAX_HELD_BYTES:
                raise busy("The requests in hand are as long as memory allows")
            budget.held_bytes += octets - held
            held = octets

        try:
            return await use(await self.exchange.read(hold, most))
        finally:
            budget.held_bytes -= held


class Route(NamedTuple):
    """What answers, and what a caller must be allowed for it: one of these."""

    answer: Callable[[Call], Awaitable[Answer]]
    scopes: frozenset[Scope]


Routes = Mapping[str, Route]
"""What answers at a path, by method."""


class Part(Protocol):
    """Some paths of the API."""

    def find(self, path: str) -> Routes | None:
        """What answers there; None where it is no path of this part."""
        ...


class Api:
    """The door."""

    def __init__(self, parts: Sequence[Part], keyring: Keyring) -> None:
        self._parts = parts
        self._keyring = keyring
        self._budget = Budget()

    async def serve(self, exchange: Exchange) -> None:
        """Answer one request, whatever it is. Raises what is our own fault, once that is told."""
        try:
            answer = await self._answer(exchange)
        except Refused as refused:
            answer = decoding.refusal(refused).answer()
        except Problem as problem:
            answer = problem.answer()
        except Overloaded as error:
            answer = Problem(429, "Overloaded", str(error), headers=retry_after(error.retry_after_s)).answer()
        except StoreError as error:
            answer = Problem(503, "StoreUnavailable", str(error), headers=retry_after(RETRY_S)).answer()
        except Gone:
            return
        except Exception:
            text = "Something failed here; the server's log says what."
            await exchange.answer(Problem(500, "InternalError", text).answer())
            raise
        await exchange.answer(answer)

    def identify(self, exchange: Exchange) -> Caller | None:
        """Whose API key the request shows; None: nobody's."""
        key = _shown_key(exchange)
        return None if key is None else self._keyring.find(key)

    async def _answer(self, exchange: Exchange) -> Answer:
        routes = self._find(exchange.path)
        if routes is None:
            path = shown(exchange.path)
            text = f"There is nothing at {path}. Notifications go to POST /v1/notifications; /docs has the rest."
            raise Problem(404, "NotFound", text)
        caller = self.identify(exchange)
        if caller is None:
            raise self._unauthorized(exchange)
        route = routes.get(exchange.method)
        if route is None:
            allowed = ", ".join(routes)
            headers = ((b"allow", allowed.encode()),)
            raise Problem(405, "MethodNotAllowed", f"This path takes {allowed} only.", headers=headers)
        if not route.scopes & caller.scopes:
            wanted = " or ".join(sorted(route.scopes))
            has = ", ".join(sorted(caller.scopes))
            text = f"This takes an API key with the scope {wanted}: yours has {has}."
            raise Problem(403, "MissingScope", text, headers=_challenge("insufficient_scope"))
        budget = self._budget
        if budget.requests >= MAX_REQUESTS:
            raise busy(f"{MAX_REQUESTS} requests are in hand already")
        budget.requests += 1
        try:
            return await route.answer(Call(exchange, caller, budget))
        finally:
            budget.requests -= 1

    def _unauthorized(self, exchange: Exchange) -> Problem:
        key = _shown_key(exchange)
        if key is None:
            what = "holds no API key" if b"authorization" in exchange.headers else "is missing"
            return Problem(401, "Unauthorized", f"The Authorization header {what}: {_HOW}", headers=_challenge())
        ended = self._keyring.find_ended(key)
        if ended is None or ended.expires_at is None:
            text = f"The API key is not one of this server, or was removed: {_HOW}"
            return Problem(401, "Unauthorized", text, headers=_challenge("invalid_token"))
        when = datetime.fromtimestamp(ended.expires_at, UTC)
        text = (
            f"The API key {ended.id} ({ended.name}) ended at {when:%Y-%m-%dT%H:%M:%SZ}: "
            "make a new one with `heliograph keys add`."
        )
        return Problem(401, "ExpiredKey", text, headers=_challenge("invalid_token"))

    def _find(self, path: str) -> Routes | None:
        for part in self._parts:
            if routes := part.find(path):
                return routes
        return None


_HOW = (
    "send a key as `Authorization: Bearer hg_...`. The server keeps its own in the file api-key of its data folder, "
    "unless told otherwise; `heliograph keys add` makes others."
)


def _shown_key(exchange: Exchange) -> bytes | None:
    """The API key that the request shows (RFC 6750, section 2.1); None where it shows none."""
    scheme, _, key = exchange.headers.get(b"authorization", b"").partition(b" ")
    return key.strip() or None if scheme.lower() == b"bearer" else None


def _challenge(error: str | None = None) -> tuple[tuple[bytes, bytes]]:
    """The header that says which key is wanted (RFC 6750, section 3)."""
    return ((b"www-authenticate", b"Bearer" if error is None else f'Bearer error="{error}"'.encode()),)


def busy(why: str) -> Problem:
    """Too many came at once. `why` is the beginning of a sentence."""
    return Problem(503, "Busy", f"{why}: nothing was taken, try again soon.", headers=retry_after(_BUSY_S))
