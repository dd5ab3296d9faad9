"""The middle: admit, enqueue, send, work, settle.

The way of a batch: a door hands columns to `admit`, which refuses the hopeless, and the batches to `enqueue`, which
returns when they are durable. `work` leases batches, hands them to the carrier and keeps what it reports in a
`progress.Progress`, which has `policy` say what follows where the answer was no plain 200. Settling runs behind, always
in this order: record outcomes and removals in the store, then finish leases. Each step may be repeated, so a crash
between two of them repeats work and loses none. What is to be sent at most once is the exception: it is written down
as sent before it is, and whoever finds it like that later does not send it.

`cancel` has notifications not sent any more, wherever they wait: in the store, for their next try, in the carrier. What
is on the wire is written down as not to be sent again.

A `Courier` carries notifications at once, in this process, for callers who wait and keep the responsibility.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import structlog
from msgspec import Struct

from heliograph import admission, crash, reasons
from heliograph.batches import make_batches, new_batch_id, parse_id
from heliograph.errors import Refused, StoreError
from heliograph.model import (
    ACCEPTED,
    App,
    Batch,
    Detail,
    Environment,
    Filter,
    Headers,
    Lane,
    Lease,
    LeaseEnd,
    Once,
    Origin,
    Outcome,
    Outcomes,
    Page,
    Quarantine,
    Receipt,
    Removal,
    State,
)
from heliograph.ports import Carrier, Queue, Store
from heliograph.relay.progress import LaneState, Moment, Progress, counting
from heliograph.relay.sends import Courier, Sends, Tell, Tools
from heliograph.telemetry import Telemetry

_log = structlog.get_logger("heliograph.relay")

_LEASES = 64
"""Batches leased at a time; enough that single notifications share a lease's write, few enough to bound memory."""
_IN_HAND = 20_000
"""With so many at the carrier, what is enqueued waits its turn in the store."""
_SETTLE_S = 0.005
"""Pause between two rounds of settling: what is learnt meanwhile shares a write."""
_STORE_PAUSE_S = 1.0
"""Pause after the store failed; what was learnt is kept meanwhile."""
_CANCEL_S = 10.0
"""How long it may take until it is on record that something is cancelled."""
_NOT_ENDED = (State.QUEUED, State.SENT)


class Admitted(Struct, frozen=True):
    """What admission made of a request."""

    batches: tuple[Batch, ...]
    """Without what is refused, in order."""
    refused: tuple[Refused, ...]
    """In the order of their places."""


class Begun(Struct, frozen=True):
    """What admission made of columns of which nothing counts after the first that is refused."""

    batches: tuple[Batch, ...]
    """What stood before it, in order."""
    refused: Refused | None
    """The first that is refused; its index is None where all of them are."""


class Watcher(Protocol):
    """Who wants to hear of batches while they are worked on. Called on the loop's thread."""

    def rejected(self, batch_id: str, indices: Sequence[int], reason: str) -> None:
        """Apple said no to these for good, in this word. It is not on record yet."""
        ...

    def ended(self, batch_id: str) -> None:
        """Nothing is left to do for this one, and all of it is on record. That is the last that is heard of it."""
        ...


class StoreFailure(Struct, frozen=True):
    """The store fails."""

    since: float
    """UNIX seconds, as the next."""
    seen_at: float
    """When it failed last."""
    why: str


class Relay:
    """The one path between doors and carriers."""

    def __init__(
        self,
        queue: Queue,
        store: Store,
        carrier: Carrier,
        apps: Mapping[str, App],
        telemetry: Telemetry,
        *,
        clock: Callable[[], float],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock` gives UNIX seconds, `monotonic` seconds from anywhere."""
        self._queue = queue
        self._store = store
        self._carrier = carrier
        self._apps = apps
        self._telemetry = telemetry
        self._clock = clock
        self._monotonic = monotonic
        self._started_at = clock() - monotonic()
        self._dirty: dict[tuple[str, int], Progress] = {}
        """Batches with news that are not recorded yet."""
        self._ended: list[LeaseEnd] = []
        """Ends of leases all of whose outcomes are recorded."""
        self._news = asyncio.Event()
        self._awaited: list[asyncio.Future[None]] = []
        """Who wants to know that what is learnt by now is recorded."""
        self._held: dict[str, Progress] = {}
        """What is leased, by batch, until the end of the lease is certain."""
        self._waiters: dict[str, set[asyncio.Event]] = {}
        self._watchers: dict[str, Watcher] = {}
        """By batch."""
        self._lanes: dict[Lane, LaneState] = {}
        self._in_hand = 0
        """Notifications with the carrier."""
        self._idle = False
        """`work` waits: nothing is due in lanes that are not `_full`."""
        self._full: frozenset[Lane] = frozenset()
        self._recording = asyncio.Event()
        """Set while outcomes can be recorded; nothing is sent otherwise."""
        self._recording.set()
        self._cautious: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._random = _draw()
        self._sends = Sends(
            Tools(carrier, store, self._now, self._new_id, self._lane, self._note_kept, self._note_failure)
        )
        self.store_failure: StoreFailure | None = None
        """None once it has worked again."""

    # -- admission -----------------------------------------------------------------------------------------------

    async def admit(
        self,
        app_name: str,
        environment: Environment | None,
        headers: Sequence[Headers],
        tokens: Sequence[str],
        payloads: Sequence[bytes],
        *,
        partial: bool = False,
    ) -> Admitted:
        """Turn columns into batches, or say what is wrong with each entry that cannot succeed.

        `headers` and `payloads` have one entry for all or one each. An empty topic means the app's only one;
        `environment` None means the app's only one. All or nothing, unless `partial`: then batches of what is good.
        Raises Refused for what concerns all of it.
        """
        app = self._apps.get(app_name)
        if app is None:
            known = ", ".join(sorted(self._apps)) or "none"
            raise Refused("UnknownApp", f"There is no app {app_name!r}. Known apps: {known}.", field="app")
        environment = admission.choose_environment(app, environment)
        now = self._clock()
        checked = admission.check(app, environment, now, headers, tokens, payloads)
        held = await self._store.held_among(app_name, environment, checked.tokens)
        if held:
            checked.refused.extend(admission.refuse_held(checked.tokens, held))
        refused: tuple[Refused, ...] = ()
        if checked.refused:
            refused = tuple(sorted(checked.refused, key=lambda each: each.index or 0))
            for each in refused:
                self._telemetry.refused(app_name, each.reason)
            if not partial:
                return Admitted((), refused)
            checked = admission.leave_out(checked)
        new_id = functools.partial(self._new_id, now)  # ids are looked for by the time that receipts tell
        batches = make_batches(new_id, app_name, environment, now, checked.headers, checked.tokens, checked.payloads)
        return Admitted(tuple(batches), refused)

    async def admit_until_refused(
        self,
        app_name: str,
        environment: Environment,
        headers: Sequence[Headers],
        tokens: Sequence[bytes],
        payloads: Sequence[bytes],
        origin: Origin,
        *,
        ask_again: Collection[bytes] = (),
    ) -> Begun:
        """Turn columns into batches up to the first entry that cannot succeed, for doors whose protocol has it so.

        `tokens` are lower-case hex. `ask_again`: those that are sent to also where Apple said that they are dead.
        Otherwise as `admit`. Raises StoreError.
        """
        app = self._apps.get(app_name)
        if app is None or environment not in app.environments:
            text = f"There is no app {app_name!r} in {environment} any more."
            return Begun((), Refused("UnknownApp", text, field="app"))
        now = self._clock()
        checked = admission.check(app, environment, now, headers, tokens, payloads)
        held = await self._store.held_among(app_name, environment, tokens)
        if held:
            for each in ask_again:
                if held.get(each) == reasons.UNREGISTERED.word:
                    del held[each]
            checked.refused.extend(admission.refuse_held(tokens, held))
        first: Refused | None = None
        size = len(tokens)
        if checked.refused:
            first = min(checked.refused, key=lambda each: -1 if each.index is None else each.index)
            self._telemetry.refused(app_name, first.reason)
            size = first.index or 0
        if not size:
            return Begun((), first)
        final = checked.headers[:size] if len(checked.headers) > 1 else checked.headers
        bodies = payloads[:size] if len(payloads) > 1 else payloads
        new_id = functools.partial(self._new_id, now)
        batches = make_batches(new_id, app_name, environment, now, final, tokens[:size], bodies, origin.part(0, size))
        return Begun(tuple(batches), first)

    def _new_id(self, now: float) -> str:
        return new_batch_id(now, next(self._random))

    def _now(self) -> Moment:
        return Moment(self._clock(), self._started_at + self._monotonic())

    # -- enqueue, and what became of it --------------------------------------------------------------------------

    async def enqueue(self, batches: Sequence[Batch], once: Once | None = None, watcher: Watcher | None = None) -> None:
        """Durable on return, all or nothing, and `once` with it. Raises Overloaded, Repeated, StoreError.

        `watcher` hears of these batches until they end, as far as this process works on them.
        """
        if watcher is not None:
            self._watchers.update((batch.id, watcher) for batch in batches)
        lane = batches[0].app, batches[0].environment
        # Where nothing waits in front of it, it goes on from here, and not through another turn of the store.
        at_once = self._idle and self._recording.is_set() and self._in_hand < _IN_HAND and lane not in self._full
        try:
            leases = await self._queue.put(batches, lease=at_once, once=once)
        except BaseException as error:
            self.unwatch(batch.id for batch in batches)
            if isinstance(error, StoreError):
                self._note_failure(error)
            raise
        self._note_success()
        self._telemetry.taken(batches[0].app, sum(map(len, batches)))
        crash.point("taken")
        self._begin_all(leases)

    async def keep(
        self,
        app: str,
        environment: Environment,
        headers: Sequence[Headers],
        tokens: Sequence[bytes],
        origin: Origin,
        *,
        state: State,
        reason: str,
        whys: Sequence[str],
    ) -> None:
        """Have it on record that these came and are not sent: how they ended, for this reason, and each why.

        Durable on return. Columns as in `admit_until_refused`; nothing is checked. Payloads are not kept, as nobody
        will send them. Raises StoreError.
        """
        now = self._clock()
        new_id = functools.partial(self._new_id, now)
        finished: list[tuple[Batch, Outcomes]] = []
        start = 0
        for batch in make_batches(new_id, app, environment, now, headers, tokens, (b"",), origin):
            size = len(batch)
            own = enumerate(whys[start : start + size])
            details = tuple([Detail(index, reason, attempts=0, why=why) for index, why in own])
            finished.append((batch, Outcomes(batch.id, 1, bytes((state,)) * size, bytes(4 * size), details)))
            start += size
        await self._store.keep(finished)
        self._telemetry.lane(app, environment).ended(state, len(tokens))

    def unwatch(self, batch_ids: Iterable[str]) -> None:
        """Tell nobody of these any more."""
        for batch_id in batch_ids:
            self._watchers.pop(batch_id, None)

    @property
    def room(self) -> int:
        """How many more notifications `enqueue` would take."""
        return self._queue.room

    async def find_once(self, key: bytes) -> Once | None:
        """What was enqueued once under this key, while that is kept."""
        return await self._store.find_once(key)

    async def buried(self, apps: Collection[str] | None, before: str | None, limit: int) -> Sequence[Receipt]:
        """What was given up on, newest first: of these apps or of all, and before the one with the id `before`."""
        return await self._store.find_buried(apps, before, limit)

    async def replay(self, ids: Sequence[str], apps: Collection[str] | None = None) -> Sequence[str]:
        """Have buried notifications, of these apps or of all, sent again, under the same ids; which of these that are.

        Durable on return. Raises StoreError.
        """
        asked: dict[str, list[str]] = {}
        ids = list(dict.fromkeys(ids))
        for each, receipt in zip(ids, await self._store.find_receipts(ids, apps), strict=True):
            if receipt is not None:  # under our id, though it be asked for by its caller's
                asked.setdefault(receipt.id, []).append(each)
        return [each for replayed in await self._store.replay(list(asked)) for each in asked[replayed]]

    async def notifications(self, wanted: Filter, before: str | None, limit: int) -> Page:
        """As `Store.find_notifications`. Raises StoreError, and ValueError if `before` is no id."""
        return await self._store.find_notifications(wanted, before, limit)

    async def receipts(self, ids: Sequence[str], apps: Collection[str] | None = None) -> Sequence[Receipt | None]:
        """The last known state of each; None where no such notification was taken for these apps, or for any."""
        return await self._store.find_receipts(ids, apps)

    async def receipt(self, notification_id: str, timeout_s: float) -> Receipt | None:
        """The receipt as soon as its state is final, or as it is after `timeout_s`."""
        place = parse_id(notification_id)
        if place is None:
            return None
        changed = asyncio.Event()
        waiters = self._waiters.setdefault(place[0], set())
        waiters.add(changed)
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    changed.clear()
                    if not self._is_open(*place):
                        (found,) = await self._store.find_receipts([notification_id])
                        if found is None or found.state not in _NOT_ENDED:
                            return found
                    await changed.wait()
        except TimeoutError:
            (found,) = await self._store.find_receipts([notification_id])
            return found
        finally:
            waiters.discard(changed)
            if not waiters:
                self._waiters.pop(place[0], None)

    def _wake_waiters(self, batch_ids: Iterable[str]) -> None:
        """Something new is on record of these."""
        for batch_id in batch_ids:
            for changed in self._waiters.get(batch_id, ()):
                changed.set()

    def _is_open(self, batch_id: str, index: int) -> bool:
        """It is in our hands and has not ended, or not on record: there is nothing to be read of it."""
        if batch_id in self._sends.unkept:
            return True
        progress = self._held.get(batch_id)
        return progress is not None and index < len(progress.states) and progress.states[index] in _NOT_ENDED

    # -- cancel --------------------------------------------------------------------------------------------------

    async def cancel(self, ids: Sequence[str], apps: Collection[str] | None = None) -> Sequence[Receipt | None]:
        """Have these not sent any more; what is on record of each then, or None where these apps have no such one.

        What waited is cancelled, or unknown where nobody knows whether Apple took it when it was last tried. What is
        being sent is cancelled if Apple does not take it this time (`cancelling`).
        Everything else is left as it was: it was too late. Raises StoreError.
        """
        try:
            async with asyncio.timeout(_CANCEL_S):
                while True:
                    found = await self._store.find_receipts(ids, apps)
                    waiting = {each.id: each for each in found if each is not None and _may_be_sent(each)}
                    if not waiting:
                        return found
                    await self._cancel(waiting)
        except TimeoutError:
            text = "It could not be written down in time that these are cancelled: try again."
            raise StoreError(text) from None

    async def _cancel(self, waiting: Mapping[str, Receipt]) -> None:
        """Try once. It may be in vain for a batch that is being leased, or whose lease is ending, at this moment."""
        places: dict[str, list[int]] = {}
        elsewhere: list[str] = []
        for each in waiting:
            batch_id, index = each[:-4], int(each[-4:], 16) - 1
            if batch_id in self._held:
                places.setdefault(batch_id, []).append(index)
            else:
                elsewhere.append(each)
        now = self._clock()
        held = {batch_id: self._held[batch_id] for batch_id in places}
        out = {batch_id: progress.cancel(places[batch_id], now) for batch_id, progress in held.items()}
        if out := {batch_id: indices for batch_id, indices in out.items() if indices}:
            self._carrier.withdraw(out)
        for progress in held.values():
            self._note(progress)
        if places:
            recorded = self._loop.create_future()
            self._awaited.append(recorded)
            await recorded
        cancelled = await self._store.cancel(elsewhere) if elsewhere else ()
        self._wake_waiters({each[:-4] for each in cancelled})
        for ended in await self._store.find_receipts(cancelled) if cancelled else ():
            if ended is not None and ended.environment is not None:
                self._telemetry.lane(ended.app, ended.environment).ended(ended.state, 1)
        if not cancelled and not places:
            await asyncio.sleep(_SETTLE_S)

    # -- send ----------------------------------------------------------------------------------------------------

    def courier(self, app: str, environment: Environment, tell: Tell, origin: Origin | None = None) -> Courier:
        """What carries at once for an app in an environment, past admission and the queue; keep it, and use it often.

        The caller keeps the responsibility. What became of it is kept for those who ask later, behind the answer;
        `origin` is what they are told of where it came from.
        """
        return Courier(self._sends, app, environment, tell, origin)

    # -- work ----------------------------------------------------------------------------------------------------

    async def work(self) -> None:
        """Lease and carry until cancelled. One task runs it.

        A store that fails lends nothing, and while outcomes cannot be recorded nothing more is lent either.
        """
        while True:
            await self._recording.wait()
            self._full = await self._carrier.ready()
            self._idle = True
            try:
                leases = await self._take(self._full)
            except StoreError as error:
                self._note_failure(error)
                _log.error("cannot_lease", why=str(error))
                await asyncio.sleep(_STORE_PAUSE_S)
                continue
            finally:
                self._idle = False
            if leases:
                self._note_success()
            self._begin_all(leases)

    async def _take(self, full: frozenset[Lane]) -> Sequence[Lease]:
        """Leases of lanes that are not full; none as soon as other lanes are."""
        if not full:
            return await self._queue.take(_LEASES)
        taking = asyncio.ensure_future(self._queue.take(_LEASES, full))
        changing = asyncio.ensure_future(self._carrier.ready(full))
        try:
            await asyncio.wait((taking, changing), return_when=asyncio.FIRST_COMPLETED)
            return taking.result() if taking.done() else ()
        finally:
            for each in (taking, changing):
                each.cancel()

    def _begin_all(self, leases: Sequence[Lease]) -> None:
        if not leases:
            return
        crash.point("leased")
        if self._recording.is_set():
            for lease in leases:
                self._begin(lease)
        else:  # back they go, as soon as the store is well
            now = self._clock()
            self._ended += [LeaseEnd(lease.batch.id, lease.attempt, now) for lease in leases]
            self._news.set()

    def _begin(self, lease: Lease) -> None:
        lane = self._lane((lease.batch.app, lease.batch.environment))
        progress = self._held[lease.batch.id] = Progress(lease, lane)
        moment = self._now()
        indices = progress.due(moment)
        if progress.fresh:
            lane.crowd.sent(len(indices), moment.steady)
            lane.meter.wait_s.observe(moment.wall - progress.batch.created_at, len(indices))
        if any(each.at_most_once for each in progress.batch.headers):
            once = [index for index in indices if progress.headers(index).at_most_once]
            if once:
                indices = [index for index in indices if not progress.headers(index).at_most_once]
                progress.open += len(once)
                progress.set_state(once, State.SENT, moment.wall)  # from now on whatever is recorded says so
                task = self._loop.create_task(self._carry_once(progress, once))
                self._cautious.add(task)
                task.add_done_callback(self._cautious.discard)
        if indices:
            self._carry(progress, indices)
        elif not progress.open:
            self._note(progress)

    def _lane(self, name: Lane) -> LaneState:
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = LaneState(name, self._telemetry.lane(*name), self._loop.call_later)
        return lane

    async def _carry_once(self, progress: Progress, indices: Sequence[int]) -> None:
        """Carry these after it is durable that they are being sent: no crash has them sent a second time."""
        try:
            recorded = await self._store.record([progress.outcomes()], ())
        except StoreError as error:
            _log.error("cannot_record", why=str(error), batches=1)
            progress.set_state(indices, State.QUEUED, self._clock())
            progress.later.update(indices)
            progress.put_off(self._now().steady + _STORE_PAUSE_S)
            progress.open -= len(indices)
            self._note(progress)
            return
        progress.open -= len(indices)
        if progress.batch.id in recorded:  # else the lease ran out meanwhile, and who has the next one sends it
            self._carry(progress, indices)

    def _carry(self, progress: Progress, indices: Sequence[int]) -> None:
        progress.open += len(indices)
        self._in_hand += len(indices)

        def report(done: Sequence[int], outcome: Outcome) -> None:
            progress.open -= len(done)
            self._in_hand -= len(done)
            crash.point("answered")
            if outcome is ACCEPTED:
                progress.set_state(done, State.ACCEPTED, self._clock())
                progress.forget_trouble(done)
                progress.lane.count(len(done), 0)
                progress.lane.prove()
            else:
                again = progress.decide(done, outcome, self._now())
                if again:
                    self._carry(progress, again)
                watcher = self._watchers.get(progress.batch.id)
                if watcher is not None:
                    _tell_rejected(watcher, progress, done)
            self._note(progress)

        self._carrier.carry(progress.batch, indices, counting(progress.lane.meter, progress.batch, report))

    # -- settle --------------------------------------------------------------------------------------------------

    def _note(self, progress: Progress) -> None:
        self._dirty[progress.batch.id, progress.attempt] = progress
        self._news.set()

    async def settle(self) -> None:
        """Record what is learnt, then end leases that are complete, until cancelled. One task runs it."""
        while True:
            await self._news.wait()
            try:
                await self._settle_once()
                self._recording.set()
                self._note_success()
            except StoreError as error:
                self._recording.clear()
                self._note_failure(error)
                _log.error("cannot_record", why=str(error), batches=len(self._dirty))
                await asyncio.sleep(_STORE_PAUSE_S)
                self._news.set()
            await asyncio.sleep(_SETTLE_S)

    async def _settle_once(self) -> None:
        self._news.clear()
        dirty, self._dirty = self._dirty, {}
        ended, self._ended = self._ended, []
        # All of it is taken down here: what is learnt while the store works belongs to the next round.
        outcomes = [each.outcomes() for each in dirty.values()]
        removals = {removal for each in dirty.values() for removal in each.removals}
        quarantines = {quarantine for each in dirty.values() for quarantine in each.quarantines}
        ended_now = [(each, each.ended) for each in dirty.values() if each.ended]
        for each, _ in ended_now:
            each.ended = {}
        now = self._now()
        ending = [each for each in dirty.values() if not each.open]
        ends = [each.end(now) for each in ending]
        for each in ending:  # what is learnt of it from now on would come too late for its end
            if self._held.get(each.batch.id) is each:
                del self._held[each.batch.id]
        awaited, self._awaited = self._awaited, []
        try:
            # Both at once share a commit. What is ended here was recorded by the round before.
            _, recorded = await asyncio.gather(self._finish(ended), self._record(outcomes, removals, quarantines))
        except BaseException:  # cancelled, or the store failed: it stays to be done, and may be done twice
            self._dirty = {**dirty, **self._dirty}
            self._ended += ended
            self._awaited += awaited
            for each, counts in ended_now:
                each.ended = dict(Counter(each.ended) + Counter(counts))
            raise
        for future in awaited:
            if not future.done():  # its caller may have gone
                future.set_result(None)
        for each in dirty.values():
            each.removals -= removals
            each.quarantines -= quarantines
        recorded_at = self._clock()
        for each, counts in ended_now:
            if each.batch.id in recorded:  # else its lease ran out: who has the next one tells how it ended
                each.count_ends(counts, recorded_at)
        self._wake_waiters(batch_id for batch_id, _ in dirty)
        if self._watchers:
            for end in ends:
                if end.again_at is None and (watcher := self._watchers.pop(end.batch_id, None)):
                    watcher.ended(end.batch_id)
        if ends:
            self._ended += ends
            self._news.set()

    @property
    def unrecorded(self) -> int:
        """Batches of which something was learnt that is not recorded yet."""
        return len(self._dirty)

    def _note_failure(self, error: StoreError) -> None:
        now, former = self._clock(), self.store_failure
        self.store_failure = StoreFailure(now if former is None else former.since, now, str(error))

    def _note_success(self) -> None:
        failure = self.store_failure
        if failure is not None:
            self.store_failure = None
            _log.info("store_recovered", failed_for_s=round(self._clock() - failure.since, 1))

    def _note_kept(self, batch_ids: Sequence[str]) -> None:
        self._note_success()
        self._wake_waiters(batch_ids)

    async def _finish(self, ends: Sequence[LeaseEnd]) -> None:
        if ends:
            await self._queue.finish(ends)
            crash.point("finished")

    async def _record(
        self, outcomes: Sequence[Outcomes], removals: Collection[Removal], quarantines: Collection[Quarantine]
    ) -> Collection[str]:
        """The batches of which the outcomes are on record now."""
        if not outcomes:
            return ()
        recorded = await self._store.record(outcomes, tuple(removals), tuple(quarantines))
        crash.point("recorded")
        return recorded

    async def drain(self) -> None:
        """After `work` and `settle` were stopped and the carrier closed: record and finish all that is known."""
        while self._cautious:
            await asyncio.wait(set(self._cautious))
        while self._dirty or self._ended:
            await self._settle_once()
        await self._sends.drain()
        for lane in self._lanes.values():
            for summary in lane.given_up.values():
                summary.flush()


def _draw() -> Iterator[bytes]:
    """Eight random octets at a time. Each call of the system hands the interpreter's lock to the store's thread."""
    while True:
        octets = os.urandom(4096)
        yield from (octets[start : start + 8] for start in range(0, 4096, 8))


def _tell_rejected(watcher: Watcher, progress: Progress, done: Sequence[int]) -> None:
    rejected: dict[str, list[int]] = {}
    for index in done:
        if progress.states[index] == State.REJECTED:
            rejected.setdefault(progress.details[index].reason or "", []).append(index)
    for reason, indices in rejected.items():
        watcher.rejected(progress.batch.id, indices, reason)


def _may_be_sent(receipt: Receipt) -> bool:
    """It is, unless somebody cancels it."""
    return receipt.state is State.QUEUED and not receipt.cancelling
