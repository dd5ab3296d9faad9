"""The middle: admit, enqueue, send, work, settle.

The way of a batch: a door hands columns to `admit`, which refuses the hopeless, and the batches to `enqueue`, which
returns when they are durable. `work` leases batches, hands them to the carrier and keeps what it reports in a
`_Progress`; `policy` says what follows where the answer was no plain 200. Settling runs behind, always in this order:
record outcomes and removals in the store, then finish leases. Each step may be repeated, so a crash between two of them
repeats work and loses none. What is to be sent at most once is the exception: it is written down as sent before it is,
and whoever finds it like that later does not send it.

`send` carries one notification at once, in this process, for callers who wait and keep the responsibility.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence

import structlog
from msgspec import Struct
from msgspec.structs import replace

from heliograph import admission, crash, policy
from heliograph.batches import make_batches, new_batch_id, parse_id
from heliograph.errors import NotConnected, Refused, StoreError
from heliograph.model import (
    ACCEPTED,
    Answered,
    App,
    Batch,
    Detail,
    DeviceToken,
    Environment,
    Headers,
    Lane,
    Lease,
    LeaseEnd,
    NotProcessed,
    Outcome,
    Outcomes,
    Quarantine,
    Receipt,
    Removal,
    State,
)
from heliograph.ports import Carrier, Queue, Store
from heliograph.telemetry import Telemetry

_log = structlog.get_logger("heliograph.relay")

_LEASES = 64
"""Batches leased at a time; enough that single notifications share a lease's write, few enough to bound memory."""
_SETTLE_S = 0.005
"""Pause between two rounds of settling: what is learnt meanwhile shares a write."""
_STORE_PAUSE_S = 1.0
"""Pause after the store failed; what was learnt is kept meanwhile."""
_ELSEWHERE_S = 1.0
_ELSEWHERE_MAX_S = 30.0
"""Pauses before what came back unprocessed twice is tried again: then it is not the one connection that is at fault."""
_TOGETHER_S = 0.05
"""What of a batch is to be sent again for the same reason within this time is sent again together: a lease for all."""
_MANY_BAD = 20
"""Device tokens that Apple did not know: where more than these and than half of all, it is not they that are wrong."""
_ALARM_S = 60.0
"""Between two log lines about the same trouble of a lane."""
_NOT_ENDED = (State.QUEUED, State.SENT)


class Admitted(Struct, frozen=True):
    """What admission made of a request: batches, or what is wrong with it. All or nothing."""

    batches: tuple[Batch, ...]
    refused: tuple[Refused, ...]


class _Progress:
    """What is known of a leased batch, growing as the carrier reports."""

    __slots__ = (
        *("attempt", "batch", "details", "due_at", "fresh", "lane", "open", "planned"),
        *("quarantines", "removals", "retried", "states", "times"),
    )

    def __init__(self, lease: Lease, lane: _Lane) -> None:
        self.batch = lease.batch
        self.lane = lane
        self.attempt = lease.attempt
        self.fresh = lease.outcomes is None
        """Nothing of it was ever sent, as far as is known."""
        size = len(lease.batch)
        outcomes = lease.outcomes
        self.states = bytearray(size if outcomes is None else outcomes.states)
        self.times = array("I", bytes(4 * size) if outcomes is None else outcomes.times_ms)
        if outcomes is not None and _LITTLE:
            self.times.byteswap()
        self.details: dict[int, Detail] = {} if outcomes is None else {each.index: each for each in outcomes.details}
        self.removals: set[Removal] = set()
        self.quarantines: set[Quarantine] = set()
        self.open = 0
        """Notifications with the carrier, or about to be."""
        self.due_at: float | None = None
        """When the earliest deferred one is due."""
        self.retried: set[int] = set()
        """Handed to the carrier a second time under this lease."""
        self.planned: dict[tuple[Outcome, int, int | None], tuple[float, policy.Again]] = {}
        """Recent decisions to send again, and until when they hold for others, by outcome, tries and expiration."""

    def patience_from(self, index: int) -> float:
        """UNIX seconds from which it is counted how long a notification is tried."""
        detail = self.details.get(index)
        return self.batch.created_at if detail is None or detail.again_from is None else detail.again_from

    def headers(self, index: int) -> Headers:
        batch = self.batch
        return batch.headers[0 if batch.headers_of is None else batch.headers_of[index]]

    def milliseconds(self, now: float) -> int:
        return max(0, min(int((now - self.batch.created_at) * 1000), 2**32 - 1))

    def set_state(self, indices: Sequence[int], state: State, now: float) -> None:
        moment = self.milliseconds(now)
        if isinstance(indices, range):
            span = slice(indices.start, indices.stop)
            self.states[span] = bytes((state,)) * len(indices)
            self.times[span] = array("I", (moment,)) * len(indices)
            return
        states, times = self.states, self.times
        for index in indices:
            states[index] = state
            times[index] = moment

    def forget_trouble(self, indices: Sequence[int]) -> None:
        """Accepted in the end: of what went wrong before, only the number of tries is kept."""
        if self.details:
            for index in self.details.keys() & set(indices):
                self.details[index] = Detail(index, attempts=self.details[index].attempts)

    def outcomes(self) -> Outcomes:
        times = self.times
        if _LITTLE:
            times = array("I", times)
            times.byteswap()
        return Outcomes(self.batch.id, self.attempt, bytes(self.states), times.tobytes(), tuple(self.details.values()))


class _Lane:
    """What is known of an app in an environment: how its notifications fare."""

    __slots__ = ("alarmed_at", "bad", "crowd", "good")

    def __init__(self) -> None:
        self.crowd = policy.Crowd()
        self.good = 0
        self.bad = 0
        """Device tokens that Apple took, and that it did not know; old ones count for less and less."""
        self.alarmed_at = -math.inf

    def count(self, good: int, bad: int) -> None:
        self.good += good
        self.bad += bad
        if self.good + self.bad > 10_000:
            self.good //= 2
            self.bad //= 2

    @property
    def doubtful(self) -> bool:
        """So many device tokens are unknown that the environment is more likely to be wrong than they are."""
        return self.bad > max(_MANY_BAD, self.good)


_LITTLE = array("H", (1,)).tobytes() == b"\1\0"
"""Whether this machine's integers must be turned round for the wire's order."""


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
    ) -> None:
        """`clock` gives UNIX seconds."""
        self._queue = queue
        self._store = store
        self._carrier = carrier
        self._apps = apps
        self._telemetry = telemetry
        self._clock = clock
        self._dirty: dict[str, _Progress] = {}
        """Batches with news that are not recorded yet."""
        self._ended: list[LeaseEnd] = []
        """Ends of leases all of whose outcomes are recorded."""
        self._news = asyncio.Event()
        self._waiters: dict[str, set[asyncio.Event]] = {}
        self._lanes: dict[Lane, _Lane] = {}
        self._recording = asyncio.Event()
        """Set while outcomes can be recorded; nothing is sent otherwise."""
        self._recording.set()
        self._cautious: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._sends = _Sends()

    # -- admission -----------------------------------------------------------------------------------------------

    async def admit(
        self,
        app_name: str,
        environment: Environment | None,
        headers: Sequence[Headers],
        tokens: Sequence[str],
        payloads: Sequence[bytes],
    ) -> Admitted:
        """Turn columns into batches, or say what is wrong with each entry that cannot succeed.

        `headers` and `payloads` have one entry for all or one each. An empty topic means the app's only one;
        `environment` None means the app's only one. Raises Refused for what concerns all of it.
        """
        app = self._apps.get(app_name)
        if app is None:
            known = ", ".join(sorted(self._apps)) or "none"
            raise Refused("UnknownApp", f"There is no app {app_name!r}. Known apps: {known}.", field="app")
        environment = admission.choose_environment(app, environment)
        now = self._clock()
        checked = admission.check(app, now, headers, tokens, payloads)
        refused = checked.refused
        held = await self._store.held_among(app_name, environment, checked.tokens)
        if held:
            refused += admission.refuse_held(checked.tokens, held)
        if refused:
            return Admitted((), tuple(sorted(refused, key=lambda each: each.index or 0)))
        batches = make_batches(self._new_id, app_name, environment, now, checked.headers, checked.tokens, payloads)
        return Admitted(tuple(batches), ())

    def _new_id(self) -> str:
        return new_batch_id(self._clock(), os.urandom(8))

    # -- enqueue, and what became of it --------------------------------------------------------------------------

    async def enqueue(self, batches: Sequence[Batch]) -> None:
        """Durable on return, all or nothing. Raises Overloaded, StoreError."""
        await self._queue.put(batches)
        self._telemetry.taken(batches[0].app, sum(map(len, batches)))
        crash.point("taken")

    @property
    def room(self) -> int:
        """How many more notifications `enqueue` would take."""
        return self._queue.room

    async def buried(self, app: str | None, before: str | None, limit: int) -> Sequence[Receipt]:
        """What was given up on, newest first: of one app or of all, and before the one with the id `before`."""
        return await self._store.find_buried(app, before, limit)

    async def replay(self, ids: Sequence[str]) -> Sequence[str]:
        """Have buried notifications sent again, under the same ids; which of these that are."""
        return await self._store.replay(ids)

    async def receipts(self, ids: Sequence[str]) -> Sequence[Receipt | None]:
        """The last known state of each; None where no such notification was taken."""
        return await self._store.find_receipts(ids)

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

    # -- send ----------------------------------------------------------------------------------------------------

    async def send(
        self, app: str, environment: Environment, headers: Headers, token: bytes, payload: bytes
    ) -> Answered:
        """Carry one notification now and return Apple's answer. What is sent in one turn of the loop shares batches.

        The caller keeps the responsibility: nothing is stored. Raises NotConnected where Apple gave no answer.
        """
        future: asyncio.Future[Outcome] = self._loop.create_future()
        if not self._sends.futures:
            self._loop.call_soon(self._flush_sends)
        self._sends.add(app, environment, headers, token, payload, future)
        outcome = await future
        if isinstance(outcome, Answered):
            return outcome
        raise NotConnected(outcome.why, unknown=not isinstance(outcome, NotProcessed))

    def _flush_sends(self) -> None:
        sends, self._sends = self._sends, _Sends()
        for app, environment, group in sends.groups():
            made = make_batches(
                self._new_id, app, environment, self._clock(), group.headers, group.tokens, group.payloads
            )
            start = 0
            for batch in made:
                stop = start + len(batch)
                self._carrier.carry(batch, range(len(batch)), _resolve(group.futures[start:stop]))
                start = stop

    # -- work ----------------------------------------------------------------------------------------------------

    async def work(self) -> None:
        """Lease and carry until cancelled. One task runs it.

        A store that fails lends nothing, and while outcomes cannot be recorded nothing more is lent either.
        """
        while True:
            await self._recording.wait()
            full = await self._carrier.ready()
            try:
                leases = await self._take(full)
            except StoreError as error:
                _log.error("cannot_lease", why=str(error))
                await asyncio.sleep(_STORE_PAUSE_S)
                continue
            if leases:
                crash.point("leased")
            for lease in leases:
                self._begin(lease)

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

    def _begin(self, lease: Lease) -> None:
        name = lease.batch.app, lease.batch.environment
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = _Lane()
        progress = _Progress(lease, lane)
        now = self._clock()
        indices = self._due(progress, now)
        if progress.fresh:
            lane.crowd.sent(len(indices), now)
        if any(each.at_most_once for each in progress.batch.headers):
            once = [index for index in indices if progress.headers(index).at_most_once]
            if once:
                indices = [index for index in indices if not progress.headers(index).at_most_once]
                progress.open += len(once)
                task = self._loop.create_task(self._carry_once(progress, once))
                self._cautious.add(task)
                task.add_done_callback(self._cautious.discard)
        if indices:
            self._carry(progress, indices)
        elif not progress.open:
            self._note(progress)

    def _due(self, progress: _Progress, now: float) -> Sequence[int]:
        """What of a batch is to be sent now. What came too late ends here."""
        size = len(progress.batch)
        indices: Sequence[int] = range(size)
        if any(progress.states) or progress.details:
            lost = [index for index in range(size) if progress.states[index] == State.SENT]
            for index in lost:
                why = "the server ended before the answer came"
                attempts = _attempts(progress.details.get(index))
                progress.details[index] = Detail(index, reason="NoAnswer", why=why, attempts=attempts)
            progress.set_state(lost, State.UNKNOWN, now)
            indices = [index for index in range(size) if progress.states[index] == State.QUEUED]
            later = [index for index in indices if _due_at(progress.details.get(index)) > now]
            if later:
                progress.due_at = min(_due_at(progress.details.get(index)) for index in later)
                waiting = set(later)
                indices = [index for index in indices if index not in waiting]
        created_at = progress.batch.created_at
        kinds = progress.batch.headers
        if any(policy.deadline(created_at, each.expiration) < now for each in kinds):
            over = [
                index
                for index in indices
                if policy.deadline(progress.patience_from(index), progress.headers(index).expiration) < now
            ]
            for index in over:
                expiration = progress.headers(index).expiration
                state = State.BURIED if expiration is None else State.EXPIRED
                attempts = _attempts(progress.details.get(index)) - 1
                progress.set_state((index,), state, now)
                progress.details[index] = Detail(index, reason="TooLate", attempts=attempts)
            gone = set(over)
            indices = [index for index in indices if index not in gone]
        return indices

    async def _carry_once(self, progress: _Progress, indices: Sequence[int]) -> None:
        """Carry these after it is durable that they are being sent: no crash has them sent a second time."""
        progress.set_state(indices, State.SENT, self._clock())
        try:
            await self._store.record([progress.outcomes()], ())
        except StoreError as error:
            _log.error("cannot_record", why=str(error), batches=1)
            progress.open -= len(indices)
            progress.set_state(indices, State.QUEUED, self._clock())
            self._put_off(progress, self._clock() + _STORE_PAUSE_S)
            self._note(progress)
            return
        progress.open -= len(indices)
        self._carry(progress, indices)

    def _carry(self, progress: _Progress, indices: Sequence[int]) -> None:
        progress.open += len(indices)

        def report(done: Sequence[int], outcome: Outcome) -> None:
            progress.open -= len(done)
            crash.point("answered")
            self._telemetry.answered(progress.batch.app, outcome, len(done))
            if outcome is ACCEPTED:
                progress.set_state(done, State.ACCEPTED, self._clock())
                progress.forget_trouble(done)
                progress.lane.count(len(done), 0)
            else:
                self._decide(progress, done, outcome)
            self._note(progress)

        self._carrier.carry(progress.batch, indices, report)

    def _decide(self, progress: _Progress, indices: Sequence[int], outcome: Outcome) -> None:
        """Note what policy says of outcomes that are no plain 200."""
        now = self._clock()
        again: list[int] = []
        for index in indices:
            attempts = _attempts(progress.details.get(index))
            decision = self._decision(progress, index, outcome, attempts, now)
            detail = _detail(index, outcome, decision, attempts)
            before = progress.details.get(index)
            if before is not None and before.again_from is not None:
                detail = replace(detail, again_from=before.again_from)
            if isinstance(decision, policy.End):
                progress.set_state((index,), decision.state, now)
                if decision.state is State.BURIED:
                    crash.point("buried")
                if decision.state is State.ACCEPTED:
                    progress.lane.count(1, 0)
                if decision.removed_since is not None:
                    progress.removals.add(_removal(progress.batch, index, decision.removed_since))
                if decision.quarantined_until is not None:
                    self._hold_back(progress, index, decision.quarantined_until)
            elif decision.at <= now and index not in progress.retried:
                progress.retried.add(index)
                detail = replace(detail, attempts=attempts + decision.counted)
                again.append(index)
            else:
                due_at = decision.at if decision.at > now else now + _elsewhere_s(now - progress.batch.created_at)
                detail = replace(detail, attempts=attempts + decision.counted, due_at=due_at)
                if progress.states[index] == State.SENT:  # it certainly was not acted on
                    progress.set_state((index,), State.QUEUED, now)
                self._put_off(progress, due_at)
            progress.details[index] = detail
        if again:
            self._carry(progress, again)

    def _decision(
        self, progress: _Progress, index: int, outcome: Outcome, attempts: int, now: float
    ) -> policy.Decision:
        """What follows; what of a batch is to be sent again for one reason shares a time, and so a lease."""
        headers = progress.headers(index)
        reason = (outcome, attempts, headers.expiration)
        until, shared = progress.planned.get(reason, (0.0, None))
        crowd = progress.lane.crowd
        answered = isinstance(outcome, Answered)
        if shared is not None and now < until:
            if answered:
                crowd.plan()
            return shared
        decision = policy.decide(
            outcome,
            attempts,
            now,
            created_at=progress.patience_from(index),
            expiration=headers.expiration,
            at_most_once=headers.at_most_once,
            crowd_s=crowd.wait_s(now),
            random=random.random(),  # noqa: S311 - spreads retries, guards nothing
        )
        if isinstance(decision, policy.Again) and decision.at > now:
            decision = replace(decision, at=decision.at + _TOGETHER_S)  # nobody's pause becomes shorter by sharing it
            progress.planned[reason] = now + _TOGETHER_S, decision
            if answered:
                crowd.plan()
        return decision

    def _hold_back(self, progress: _Progress, index: int, until: int) -> None:
        """Quarantine a device token, unless nearly all are unknown to Apple: then it is not they that are wrong."""
        batch, lane = progress.batch, progress.lane
        lane.count(0, 1)
        if not lane.doubtful:
            token = DeviceToken(batch.tokens[index].decode())
            progress.quarantines.add(Quarantine(batch.app, batch.environment, token, until))
        elif self._loop.time() > lane.alarmed_at + _ALARM_S:
            lane.alarmed_at = self._loop.time()
            hint = "most device tokens are of the other environment, or of another app: check environment and topic"
            _log.error("apple_knows_few_tokens", app=batch.app, environment=batch.environment.value, hint=hint)

    @staticmethod
    def _put_off(progress: _Progress, due_at: float) -> None:
        progress.due_at = due_at if progress.due_at is None else min(progress.due_at, due_at)

    # -- settle --------------------------------------------------------------------------------------------------

    def _note(self, progress: _Progress) -> None:
        self._dirty[progress.batch.id] = progress
        self._news.set()

    async def settle(self) -> None:
        """Record what is learnt, then end leases that are complete, until cancelled. One task runs it."""
        while True:
            await self._news.wait()
            try:
                await self._settle_once()
                self._recording.set()
            except StoreError as error:
                self._recording.clear()
                _log.error("cannot_record", why=str(error), batches=len(self._dirty))
                await asyncio.sleep(_STORE_PAUSE_S)
                self._news.set()
            await asyncio.sleep(_SETTLE_S)

    async def _settle_once(self) -> None:
        self._news.clear()
        dirty, self._dirty = self._dirty, {}
        ended, self._ended = self._ended, []
        try:
            # Both at once share a commit. What is ended here was recorded by the round before.
            await asyncio.gather(self._finish(ended), self._record(dirty))
        except BaseException:  # cancelled, or the store failed: it stays to be done, and may be done twice
            self._dirty = {**dirty, **self._dirty}
            self._ended += ended
            raise

    async def _finish(self, ends: Sequence[LeaseEnd]) -> None:
        if ends:
            await self._queue.finish(ends)
            crash.point("finished")

    async def _record(self, dirty: dict[str, _Progress]) -> None:
        if not dirty:
            return
        ends = [LeaseEnd(each.batch.id, each.attempt, _again_at(each)) for each in dirty.values() if not each.open]
        removals = {removal for each in dirty.values() for removal in each.removals}
        quarantines = {quarantine for each in dirty.values() for quarantine in each.quarantines}
        await self._store.record([each.outcomes() for each in dirty.values()], tuple(removals), tuple(quarantines))
        crash.point("recorded")
        for each in dirty.values():
            each.removals -= removals
            each.quarantines -= quarantines
        for batch_id in dirty:
            for changed in self._waiters.get(batch_id, ()):
                changed.set()
        if ends:
            self._ended += ends
            self._news.set()

    async def drain(self) -> None:
        """After `work` and `settle` were stopped and the carrier closed: record and finish all that is known."""
        while self._cautious:
            await asyncio.wait(set(self._cautious))
        while self._dirty or self._ended:
            await self._settle_once()


class _Sends:
    """What was given to `send` in this turn of the loop, as columns."""

    __slots__ = ("apps", "environments", "futures", "headers", "payloads", "tokens")

    def __init__(self) -> None:
        self.apps: list[str] = []
        self.environments: list[Environment] = []
        self.headers: list[Headers] = []
        self.tokens: list[bytes] = []
        self.payloads: list[bytes] = []
        self.futures: list[asyncio.Future[Outcome]] = []

    def add(
        self,
        app: str,
        environment: Environment,
        headers: Headers,
        token: bytes,
        payload: bytes,
        future: asyncio.Future[Outcome],
    ) -> None:
        self.apps.append(app)
        self.environments.append(environment)
        self.headers.append(headers)
        self.tokens.append(token)
        self.payloads.append(payload)
        self.futures.append(future)

    def groups(self) -> Iterator[tuple[str, Environment, _Sends]]:
        """By app and environment; mostly there is one of each."""
        app, environment, size = self.apps[0], self.environments[0], len(self.apps)
        if self.apps.count(app) == size and self.environments.count(environment) == size:
            yield app, environment, self
            return
        groups: dict[tuple[str, Environment], _Sends] = {}
        columns = (self.apps, self.environments, self.headers, self.tokens, self.payloads, self.futures)
        for row in zip(*columns, strict=True):
            groups.setdefault((row[0], row[1]), _Sends()).add(*row)
        for (app, environment), group in groups.items():
            yield app, environment, group


def _resolve(futures: Sequence[asyncio.Future[Outcome]]) -> Callable[[Sequence[int], Outcome], None]:
    def report(indices: Sequence[int], outcome: Outcome) -> None:
        for index in indices:
            future = futures[index]
            if not future.done():  # its caller may have gone
                future.set_result(outcome)

    return report


def _detail(index: int, outcome: Outcome, decision: policy.Decision, attempts: int) -> Detail:
    if isinstance(outcome, Answered):
        return Detail(
            index,
            reason=decision.reason,
            status=outcome.status,
            since=outcome.since,
            unique_id=outcome.unique_id,
            attempts=attempts,
        )
    word = "NotProcessed" if isinstance(outcome, NotProcessed) else "NoAnswer"
    return Detail(index, reason=word, why=outcome.why, attempts=attempts)


def _elsewhere_s(age_s: float) -> float:
    """The pause before what came back unprocessed is tried again: longer for what has waited for long already."""
    return min(max(age_s / 10, _ELSEWHERE_S), _ELSEWHERE_MAX_S)


def _due_at(detail: Detail | None) -> float:
    return 0.0 if detail is None or detail.due_at is None else detail.due_at


def _attempts(detail: Detail | None) -> int:
    return 1 if detail is None else detail.attempts


def _again_at(progress: _Progress) -> float | None:
    return None if State.QUEUED not in progress.states else progress.due_at or 0.0


def _removal(batch: Batch, index: int, since: int) -> Removal:
    token = DeviceToken(batch.tokens[index].decode())
    return Removal(batch.app, batch.environment, token, since)
