"""The HTTP API: JSON in, ids and receipts out.

The way of a request: what cannot be taken now is refused before its body is read; `Exchange.read` reads it within
bounds, `decoding` turns it into the columns that `Relay.admit` takes, `receipts` shows what became of it.
"""

from __future__ import annotations

import asyncio
import hmac
import math
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Protocol, TypeVar
from urllib.parse import parse_qs

from msgspec.json import encode

from heliograph.doors import decoding
from heliograph.doors.exchange import (
    MAX_BODY_BYTES,
    Answer,
    Exchange,
    Gone,
    Problem,
    shown,
)
from heliograph.doors.receipts import PLACES, ids_body, receipt_body
from heliograph.errors import Overloaded, Refused, StoreError
from heliograph.model import Batch, Receipt, State
from heliograph.relay import Relay

T = TypeVar("T")

PATH = "/v1/notifications"
BURIED_PATH = "/v1/buried"
REPLAY_PATH = "/v1/buried/replay"

MAX_WAIT_S = 30.0
"""How long a caller may have its answer held back until the outcome is known."""

MAX_REQUESTS = 2000
"""Requests in hand, at most; those that wait for an outcome are not counted."""

MAX_WAITS = 10_000
"""Callers that wait for an outcome, at most; who is above is answered at once with what is known."""

MAX_HELD_BYTES = 32 * 1024 * 1024
"""Octets of bodies in hand, at most, announced or read; several times `MAX_BODY_BYTES`, so one alone always fits."""

MAX_PAGE = 1000
"""Receipts in one answer, at most."""

MAX_REPLAY = 1000
"""Ids to replay in one request, at most."""

_RETRY_S = 5
"""When to try again where the store is full or fails; where only too many came at once, `_BUSY_S`."""
_BUSY_S = 1


class Read(Protocol):
    """Reads a request's body, of `most` octets at most, which count as in hand until `use` is through with it."""

    async def __call__(
        self, exchange: Exchange, use: Callable[[Exchange, bytes], Awaitable[T]], most: int = MAX_BODY_BYTES, /
    ) -> T:
        """What `use` makes of it. Raises Problem, Gone, and what `use` raises."""
        ...


Handlers = Mapping[str, Callable[[Exchange, Read], Awaitable[Answer]]]
"""What answers at a path, by method."""


class Api:
    """The door."""

    def __init__(
        self,
        relay: Relay,
        apps: Collection[str],
        key: bytes,
        beside: Callable[[str], Handlers | None] = lambda _: None,
    ) -> None:
        """`apps` are the names of all apps, and may change; `key` is what callers must show (RFC 6750).

        `beside` finds what answers at other paths, for callers with the key; None where there is nothing.
        """
        self._relay = relay
        self._apps = apps
        self._key = key
        self._waits: set[asyncio.Timeout] = set()
        self._hurrying = False
        self._requests = 0
        """In hand now."""
        self._held_bytes = 0
        """Octets of their bodies, announced or read."""
        self._beside = beside
        self._paths: dict[str, Handlers] = {
            PATH: {"POST": self._post},
            BURIED_PATH: {"GET": self._buried, "HEAD": self._buried},
            REPLAY_PATH: {"POST": self._replay},
        }
        self._receipt_path: Handlers = {"GET": self._get, "HEAD": self._get}

    def hurry(self) -> None:
        """Answer those who wait for an outcome with what is known: the server is stopping."""
        self._hurrying = True
        now = asyncio.get_running_loop().time()
        for wait in self._waits:
            if (wait.when() or now) > now:  # one that ran out already can no longer be moved
                wait.reschedule(now)

    async def serve(self, exchange: Exchange) -> None:
        """Answer one request, whatever it is. Raises what is our own fault, once that is told."""
        try:
            answer = await self._answer(exchange)
        except Refused as refused:
            answer = decoding.refusal([refused], None, 1).answer()
        except Problem as problem:
            answer = problem.answer()
        except Overloaded as error:
            answer = Problem(429, "Overloaded", str(error), headers=_retry_after(error.retry_after_s)).answer()
        except StoreError as error:
            answer = Problem(503, "StoreUnavailable", str(error), headers=_retry_after(_RETRY_S)).answer()
        except Gone:
            return
        except Exception:
            text = "Something failed here; the server's log says what."
            await exchange.answer(Problem(500, "InternalError", text).answer())
            raise
        await exchange.answer(answer)

    async def _answer(self, exchange: Exchange) -> Answer:
        handlers = self._paths.get(exchange.path) or self._find(exchange.path)
        if handlers is None:
            text = f"There is nothing at {exchange.path}. Notifications go to POST {PATH}."
            raise Problem(404, "NotFound", text)
        self._check_key(exchange)
        handler = handlers.get(exchange.method)
        if handler is None:
            allowed = ", ".join(handlers)
            headers = ((b"allow", allowed.encode()),)
            raise Problem(405, "MethodNotAllowed", f"This path takes {allowed} only.", headers=headers)
        if self._requests >= MAX_REQUESTS:
            raise _busy(f"{MAX_REQUESTS} requests are in hand already")
        self._requests += 1
        try:
            return await handler(exchange, self._read)
        finally:
            self._requests -= 1

    def _find(self, path: str) -> Handlers | None:
        start, _, name = path.rpartition("/")
        return self._receipt_path if start == PATH and name else self._beside(path)

    def _check_key(self, exchange: Exchange) -> None:
        scheme, _, shown = exchange.headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(shown.strip(), self._key):
            wrong = "is not the one of this server" if shown else "is missing"
            raise Problem(
                401,
                "Unauthorized",
                f"The API key {wrong}: send it as `Authorization: Bearer hg_...`. "
                "The server keeps it in the file api-key of its data folder, unless told otherwise.",
                headers=((b"www-authenticate", b"Bearer"),),
            )

    async def _post(self, exchange: Exchange, read: Read) -> Answer:
        if self._relay.room <= 0:
            raise Overloaded("As many notifications are waiting as are kept: try again later.", retry_after_s=_RETRY_S)
        batches, single, wait_s = await read(exchange, self._take)
        if not single:
            return Answer(202, ids_body(batches))
        notification_id = batches[0].id + PLACES[0]
        del batches  # it may be a long wait
        receipt = await self._outcome(notification_id, wait_s) if wait_s else None
        where = f"{PATH}/{notification_id}"
        headers = ((b"location", where.encode()),)
        if receipt is None:
            return Answer(202, encode({"id": notification_id, "receipt": where}), headers)
        return Answer(202 if receipt.state in _NOT_FINAL else 200, encode(receipt_body(receipt)), headers)

    async def _read(
        self, exchange: Exchange, use: Callable[[Exchange, bytes], Awaitable[T]], most: int = MAX_BODY_BYTES, /
    ) -> T:
        """As `Read` has it."""
        held = 0

        def hold(octets: int) -> None:
            nonlocal held
            if self._held_bytes - held + octets > MAX_HELD_BYTES:
                raise _busy("The requests in hand are as long as memory allows")
            self._held_bytes += octets - held
            held = octets

        try:
            return await use(exchange, await exchange.read(hold, most))
        finally:
            self._held_bytes -= held

    async def _take(self, exchange: Exchange, body: bytes) -> tuple[Sequence[Batch], bool, float]:
        """The batches, durable; whether one notification was sent by itself, and how long its sender waits."""
        post = decoding.parse(body, decoding.Post)
        wait_s = _wait_s(exchange, post)
        columns = decoding.columns(post)
        app = self._only_app() if post.app is None else post.app
        relay = self._relay
        admitted = await relay.admit(app, post.environment, columns.headers, columns.tokens, columns.payloads)
        if admitted.refused:
            raise decoding.refusal(admitted.refused, post, len(columns.tokens))
        await relay.enqueue(admitted.batches)
        return admitted.batches, post.token is not None, wait_s

    def _only_app(self) -> str:
        if len(self._apps) != 1:
            raise Refused("MissingApp", "Say which app: there is more than one here, or none yet.", field="app")
        return next(iter(self._apps))

    async def _outcome(self, notification_id: str, wait_s: float) -> Receipt | None:
        """The receipt as it is after the wait. None where it cannot be read: what was taken is taken all the same."""
        if len(self._waits) >= MAX_WAITS:
            return None
        wait = asyncio.timeout(0 if self._hurrying else wait_s)
        self._waits.add(wait)
        self._requests -= 1  # it costs next to nothing now, and must not keep others out
        try:
            try:
                async with wait:
                    return await self._relay.receipt(notification_id, wait_s)
            except TimeoutError:
                return (await self._relay.receipts([notification_id]))[0]
        except StoreError:
            return None
        finally:
            self._requests += 1
            self._waits.discard(wait)

    async def _get(self, exchange: Exchange, _: Read) -> Answer:
        (receipt,) = await self._relay.receipts([exchange.path.rpartition("/")[2]])
        if receipt is None:
            raise Problem(
                404,
                "UnknownNotification",
                "No notification with this id is known here: it never was, or its receipt was forgotten meanwhile.",
            )
        return Answer(200, encode(receipt_body(receipt)))

    async def _buried(self, exchange: Exchange, _: Read) -> Answer:
        query = _query(exchange, ("app", "before", "limit"))
        limit = query.get("limit", "100")
        if not (len(limit) <= 4 and limit.isascii() and limit.isdecimal() and 1 <= int(limit) <= MAX_PAGE):
            raise Refused("BadParameter", f"limit must be a whole number from 1 to {MAX_PAGE}.", field="limit")
        count = int(limit)
        try:
            found = await self._relay.buried(query.get("app"), query.get("before"), count + 1)
        except ValueError:
            text = "before must be the id of a notification, as the former page gave it in next."
            raise Refused("BadParameter", text, field="before") from None
        page = found[:count]
        more = page[-1].id if len(found) > count else None
        return Answer(200, encode({"buried": list(map(receipt_body, page)), "next": more}))

    async def _replay(self, exchange: Exchange, read: Read) -> Answer:
        return await read(exchange, self._replay_those)

    async def _replay_those(self, _: Exchange, body: bytes) -> Answer:
        ids = decoding.parse(body, decoding.Replay).ids
        decoding.check_count("ids", len(ids), MAX_REPLAY)
        return Answer(200, encode({"replayed": list(await self._relay.replay(ids))}))


_NOT_FINAL = (State.QUEUED, State.SENT)


def _retry_after(seconds: float) -> tuple[tuple[bytes, bytes]]:
    return ((b"retry-after", b"%d" % math.ceil(seconds)),)


def _busy(why: str) -> Problem:
    return Problem(503, "Busy", f"{why}: nothing was taken, try again soon.", headers=_retry_after(_BUSY_S))


# -- the request -----------------------------------------------------------------------------------------------------


def _query(exchange: Exchange, names: Sequence[str]) -> dict[str, str]:
    """The query's parameters; of one that comes twice, the last."""
    if not exchange.query:
        return {}
    parameters = parse_qs(exchange.query.decode("ascii", "replace"), keep_blank_values=True)
    for name in parameters:
        if name not in names:
            text = f"The query may hold {', '.join(names)} only: there is {shown(name)!r}."
            raise Refused("UnknownParameter", text, field=shown(name))
    return {name: values[-1] for name, values in parameters.items()}


def _wait_s(exchange: Exchange, post: decoding.Post) -> float:
    """How long to hold the answer back; the query wins over the body."""
    wait_s = post.wait
    asked = _query(exchange, ("wait",)).get("wait")
    if asked is not None:
        try:
            wait_s = float(asked)
        except ValueError:
            wait_s = math.nan
    if wait_s is None or wait_s == 0:
        return 0.0
    if not 0 < wait_s <= MAX_WAIT_S:
        raise Refused("BadWait", f"wait must be seconds from 0 to {MAX_WAIT_S:.0f}.", field="wait")
    if post.token is None:
        raise Refused("BadWait", "wait goes with a single token: ask for the receipts of many later.", field="wait")
    return wait_s
