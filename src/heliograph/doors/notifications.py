"""Notifications over HTTP: send them, look for them, see what became of them, cancel them, replay the buried.

`columns` turns a body into what `Relay.admit` takes, `taking` tells what was taken, and `receipts` what became of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Collection, Iterator
from functools import partial

from msgspec.json import encode

from heliograph.doors import columns, decoding, queries, taking
from heliograph.doors.answers import BuriedBody, Cancelled, NotificationsBody, OneTaken, Replayed
from heliograph.doors.api import RETRY_S, Call, Route, Routes, busy
from heliograph.doors.exchange import Answer, Exchange, Problem
from heliograph.doors.receipts import PLACES, STATES, meaning, receipt_body
from heliograph.doors.taking import Taken
from heliograph.errors import Overloaded, Refused, Repeated, StoreError
from heliograph.model import Once, Receipt, Scope, State
from heliograph.relay import Relay

PATH = "/v1/notifications"
CANCEL_PATH = "/v1/notifications/cancel"
BURIED_PATH = "/v1/buried"
REPLAY_PATH = "/v1/buried/replay"

MAX_WAIT_S = 30.0
"""How long a caller may have its answer held back until the outcome is known."""

MAX_WAITS = 10_000
"""Callers that wait for an outcome, at most; who is above is answered at once with what is known."""

MAX_LOOKS = 32
"""Listings in hand, at most. Each may take a tenth of a second, one after the other: whoever asks for more than that at
once must not take up the requests of those who send."""

MAX_IDS = 1000
"""Ids to replay or to cancel in one request, at most."""


class Notifications:
    """The part of the API."""

    def __init__(self, relay: Relay, apps: Collection[str]) -> None:
        """`apps` are the names of all apps, and may change."""
        self._relay = relay
        self._apps = apps
        self._waits: set[asyncio.Timeout] = set()
        self._hurrying = False
        self._looks = 0
        send, read = frozenset({Scope.SEND}), frozenset({Scope.READ})
        buried, get_all, get = Route(self._buried, read), Route(self._list, read), Route(self._get, send | read)
        self._paths: dict[str, Routes] = {
            PATH: {"GET": get_all, "HEAD": get_all, "POST": Route(self._post, send)},
            CANCEL_PATH: {"POST": Route(self._cancel_many, send)},
            BURIED_PATH: {"GET": buried, "HEAD": buried},
            REPLAY_PATH: {"POST": Route(self._replay, frozenset({Scope.MANAGE}))},
        }
        self._receipt_path: Routes = {"GET": get, "HEAD": get, "DELETE": Route(self._cancel, send)}

    def find(self, path: str) -> Routes | None:
        """As `Part` has it."""
        if routes := self._paths.get(path):
            return routes
        start, _, name = path.rpartition("/")
        return self._receipt_path if start == PATH and name else None

    def hurry(self) -> None:
        """Answer those who wait for an outcome with what is known: the server is stopping."""
        self._hurrying = True
        now = asyncio.get_running_loop().time()
        for wait in self._waits:
            if (wait.when() or now) > now:  # one that ran out already can no longer be moved
                wait.reschedule(now)

    async def _post(self, call: Call) -> Answer:
        word = call.exchange.headers.get(taking.HEADER)
        key = None if word is None else taking.once_key(word, call.caller.id)
        if self._relay.room <= 0 and (key is None or await self._relay.find_once(key) is None):
            raise Overloaded("As many notifications are waiting as are kept: try again later.", retry_after_s=RETRY_S)
        use = partial(self._take, call, None) if key is None else partial(self._take_once, call, key)
        taken, wait_s, again = await call.read(use)
        headers = _REPLAYED if again else ()
        if not taken.single:
            return Answer(202, taken.body(), headers)
        notification_id = taken.batches[0][0] + PLACES[0]
        receipt = await self._outcome(call, notification_id, wait_s) if wait_s else None
        where = f"{PATH}/{notification_id}"
        headers = ((b"location", where.encode()), *headers)
        if receipt is None:
            return Answer(202, encode(OneTaken(notification_id, where)), headers)
        return Answer(202 if receipt.state in _NOT_FINAL else 200, encode(receipt_body(receipt)), headers)

    async def _take_once(self, call: Call, key: bytes, body: bytes) -> _Answered:
        """What was taken, now or before.

        That of before is told whatever admission says to it now: a device token may be dead since. Most requests come
        once, so that it is only looked for where this one is not taken.
        """
        while True:
            try:
                return await self._take(call, key, body)
            except (Refused, Problem, Overloaded, Repeated) as no:
                kept = await self._relay.find_once(key)
                if kept is not None:
                    return _told_again(call, kept, body)
                if not isinstance(no, Repeated):  # else its time was over at this very moment
                    raise

    async def _take(self, call: Call, key: bytes | None, body: bytes) -> _Answered:
        request = columns.read(body)
        wait_s = _wait_s(call.exchange, request.post.wait, single=request.single)
        app = queries.choose_app(call.caller, self._apps, request.post.app)
        relay, wanted, some = self._relay, request.columns, bool(request.post.partial)
        admitted = await relay.admit(
            app, request.post.environment, wanted.headers, wanted.tokens, wanted.payloads, partial=some
        )
        if admitted.refused and not (some and admitted.batches):
            raise request.refusal(admitted.refused)
        wrong = request.complaints(admitted.refused) if some else None
        taken = taking.take_down(admitted.batches, single=request.single, wrong=wrong)
        await relay.enqueue(admitted.batches, None if key is None else taking.keep(key, body, taken))
        return taken, wait_s, False

    async def _outcome(self, call: Call, notification_id: str, wait_s: float) -> Receipt | None:
        """The receipt as it is after the wait. None where it cannot be read: what was taken is taken all the same."""
        if len(self._waits) >= MAX_WAITS:
            return None
        wait = asyncio.timeout(0 if self._hurrying else wait_s)
        self._waits.add(wait)
        call.budget.requests -= 1  # it costs next to nothing now, and must not keep others out
        try:
            try:
                async with wait:
                    return await self._relay.receipt(notification_id, wait_s)
            except TimeoutError:
                return (await self._relay.receipts([notification_id]))[0]
        except StoreError:
            return None
        finally:
            call.budget.requests += 1
            self._waits.discard(wait)

    async def _get(self, call: Call) -> Answer:
        (receipt,) = await self._relay.receipts([_named(call)], call.caller.apps)
        if receipt is None:
            raise _unknown()
        return Answer(200, encode(receipt_body(receipt)))

    @contextlib.contextmanager
    def _looking(self) -> Iterator[None]:
        """Raises Problem while too many look."""
        if self._looks >= MAX_LOOKS:
            raise busy(f"{MAX_LOOKS} listings are in hand already")
        self._looks += 1
        try:
            yield
        finally:
            self._looks -= 1

    async def _list(self, call: Call) -> Answer:
        wanted, cursor, limit = queries.listing(call.exchange, call.caller, self._apps)
        try:
            with self._looking():
                page = await self._relay.notifications(wanted, cursor, limit)
        except ValueError:
            raise _no_place("cursor") from None
        return Answer(200, encode(NotificationsBody(list(map(receipt_body, page.receipts)), page.next)))

    async def _cancel(self, call: Call) -> Answer:
        (receipt,) = await self._relay.cancel([_named(call)], call.caller.apps)
        if receipt is None:
            raise _unknown()
        if not (receipt.cancelling or receipt.state is State.CANCELLED):
            text = f"It is too late to cancel it: its state is {STATES[receipt.state]}. {meaning(receipt)}"
            raise Problem(409, "TooLate", text)
        return Answer(202 if receipt.cancelling else 200, encode(receipt_body(receipt)))

    async def _cancel_many(self, call: Call) -> Answer:
        async def cancel(body: bytes) -> Answer:
            ids = decoding.parse(body, decoding.Ids).ids
            decoding.check_count("ids", len(ids), MAX_IDS)
            found = dict(zip(ids, await self._relay.cancel(ids, call.caller.apps), strict=True))
            told: dict[str, list[str]] = {name: [] for name in ("cancelled", "cancelling", "too_late", "unknown")}
            for each, receipt in found.items():
                told[_how_cancelled(receipt)].append(each)
            return Answer(200, encode(Cancelled(**told)))

        return await call.read(cancel)

    async def _buried(self, call: Call) -> Answer:
        apps, before, limit = queries.buried(call.exchange, call.caller, self._apps)
        try:
            with self._looking():
                found = await self._relay.buried(apps, before, limit + 1)
        except ValueError:
            raise _no_place("before") from None
        page = found[:limit]
        more = page[-1].id if len(found) > limit else None
        return Answer(200, encode(BuriedBody(list(map(receipt_body, page)), more)))

    async def _replay(self, call: Call) -> Answer:
        async def replay(body: bytes) -> Answer:
            ids = decoding.parse(body, decoding.Ids).ids
            decoding.check_count("ids", len(ids), MAX_IDS)
            return Answer(200, encode(Replayed(list(await self._relay.replay(ids, call.caller.apps)))))

        return await call.read(replay)


_NOT_FINAL = (State.QUEUED, State.SENT)
_Answered = tuple[Taken, float, bool]
"""What was taken, and is durable; how long its sender waits; whether that was before, and is only told again."""
_REPLAYED = ((b"idempotency-replayed", b"true"),)


def _named(call: Call) -> str:
    """The id that the path names."""
    return call.exchange.path.rpartition("/")[2]


def _unknown() -> Problem:
    text = "No notification with this id is known here: it never was, or its receipt was forgotten meanwhile."
    return Problem(404, "UnknownNotification", text)


def _no_place(name: str) -> Refused:
    text = f"{name} must be what the former page gave in next, the id of a notification."
    return Refused("BadParameter", text, field=name)


def _how_cancelled(receipt: Receipt | None) -> str:
    if receipt is None:
        return "unknown"
    if receipt.cancelling:
        return "cancelling"
    return "cancelled" if receipt.state is State.CANCELLED else "too_late"


# -- the request -----------------------------------------------------------------------------------------------------


def _told_again(call: Call, kept: Once, body: bytes) -> _Answered:
    taken = taking.find_again(kept, body)
    if taken is None:
        text = (
            "This Idempotency-Key came with another request before: send a new one with each request, and the same one "
            "only with the same body."
        )
        raise Problem(422, "IdempotencyKeyReused", text)
    return taken, _wait_s(call.exchange, decoding.read_wait(body), single=taken.single), True


def _wait_s(exchange: Exchange, wait_s: float | None, *, single: bool) -> float:
    """How long to hold the answer back, where the body says `wait_s`; the query wins over it."""
    asked = queries.wait(exchange) if exchange.query else None
    if wait_s is None and asked is None:
        return 0.0
    _check_wait(wait_s or 0.0)
    if asked is not None:
        try:
            wait_s = float(asked)
        except ValueError:
            wait_s = math.nan
        _check_wait(wait_s)
    if not wait_s:
        return 0.0
    if not single:
        raise Refused("BadWait", "wait goes with a single token: ask for the receipts of many later.", field="wait")
    return wait_s


def _check_wait(wait_s: float) -> None:
    if not 0 <= wait_s <= MAX_WAIT_S:
        raise Refused("BadWait", f"wait must be seconds from 0 to {MAX_WAIT_S:.0f}.", field="wait")
