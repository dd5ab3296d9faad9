"""The middle: admit, enqueue, send, work, settle.

The way of a batch: a door hands columns to `admit`, which refuses the hopeless, and the batches to `enqueue`, which
returns when they are durable. `work` leases batches, hands them to the carrier and keeps what it reports in a
`Progress`; `policy` says what follows where the answer was no plain 200. Settling runs behind, always in this order:
record outcomes and removals in the store, then finish leases. Each step may be repeated, so a crash between two of
them repeats work and loses none.

`send` carries one notification at once, in this process, for callers who wait and keep the responsibility.
"""

from __future__ import annotations

import asyncio
import os
import random
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence

import structlog
from msgspec import Struct
from msgspec.structs import replace

from heliograph import admission, policy
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
    Lease,
    LeaseEnd,
    NotProcessed,
    Outcome,
    Outcomes,
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
"""Pause before what came back unprocessed twice is tried again: then it is not the one connection that is at fault."""


class Admitted(Struct, frozen=True):
    """What admission made of a request: batches, or what is wrong with it. All or nothing."""

    batches: tuple[Batch, ...]
    refused: tuple[Refused, ...]


class _Progress:
    """What is known of a leased batch, growing as the carrier reports."""

    __slots__ = ("attempt", "batch", "details", "due_at", "open", "removals", "retried", "states", "times")

    def __init__(self, lease: Lease) -> None:
        self.batch = lease.batch
        self.attempt = lease.attempt
        size = len(lease.batch)
        outcomes = lease.outcomes
        self.states = bytearray(size if outcomes is None else outcomes.states)
        self.times = array("I", bytes(4 * size) if outcomes is None else outcomes.times_ms)
        if outcomes is not None and _LITTLE:
            self.times.byteswap()
        self.details: dict[int, Detail] = {} if outcomes is None else {each.index: each for each in outcomes.details}
        self.removals: set[Removal] = set()
        self.open = 0
        """Notifications with the carrier."""
        self.due_at: float | None = None
        """When the earliest deferred one is due."""
        self.retried: set[int] = set()
        """Handed to the carrier a second time under this lease."""

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
        self._news = asyncio.Event()
        self._waiters: dict[str, set[asyncio.Event]] = {}
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
                    if found is None or found.state is not State.QUEUED:
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

        A store that fails lends nothing, so nothing is sent whose outcome could not be recorded.
        """
        while True:
            full = await self._carrier.ready()
            try:
                leases = await self._queue.take(_LEASES, full)
            except StoreError as error:
                _log.error("cannot_lease", why=str(error))
                await asyncio.sleep(_STORE_PAUSE_S)
                continue
            for lease in leases:
                self._begin(lease)

    def _begin(self, lease: Lease) -> None:
        progress = _Progress(lease)
        now = self._clock()
        indices = self._due(progress, now)
        if indices:
            self._carry(progress, indices)
        else:
            self._note(progress)

    def _due(self, progress: _Progress, now: float) -> Sequence[int]:
        """What of a batch is to be sent now. What came too late ends here."""
        size = len(progress.batch)
        indices: Sequence[int] = range(size)
        if any(progress.states) or progress.details:
            indices = [index for index in range(size) if progress.states[index] == State.QUEUED]
            later = [index for index in indices if _due_at(progress.details.get(index)) > now]
            if later:
                progress.due_at = min(_due_at(progress.details.get(index)) for index in later)
                waiting = set(later)
                indices = [index for index in indices if index not in waiting]
        created_at = progress.batch.created_at
        kinds = progress.batch.headers
        if any(policy.deadline(created_at, each.expiration) < now for each in kinds):
            over = [index for index in indices if policy.deadline(created_at, progress.headers(index).expiration) < now]
            for index in over:
                expiration = progress.headers(index).expiration
                state = State.BURIED if expiration is None else State.EXPIRED
                attempts = _attempts(progress.details.get(index)) - 1
                progress.set_state((index,), state, now)
                progress.details[index] = Detail(index, reason="TooLate", attempts=attempts)
            gone = set(over)
            indices = [index for index in indices if index not in gone]
        return indices

    def _carry(self, progress: _Progress, indices: Sequence[int]) -> None:
        progress.open += len(indices)

        def report(done: Sequence[int], outcome: Outcome) -> None:
            progress.open -= len(done)
            self._telemetry.answered(progress.batch.app, outcome, len(done))
            if outcome is ACCEPTED:
                progress.set_state(done, State.ACCEPTED, self._clock())
                progress.forget_trouble(done)
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
            decision = policy.decide(
                outcome,
                attempts,
                now,
                created_at=progress.batch.created_at,
                expiration=progress.headers(index).expiration,
                random=random.random(),  # noqa: S311 - spreads retries, guards nothing
            )
            detail = _detail(index, outcome, decision, attempts)
            if isinstance(decision, policy.End):
                progress.set_state((index,), decision.state, now)
                if decision.removed_since is not None:
                    progress.removals.add(_removal(progress.batch, index, decision.removed_since))
            elif decision.at <= now and index not in progress.retried:
                progress.retried.add(index)
                detail = replace(detail, attempts=attempts + decision.counted)
                again.append(index)
            else:
                due_at = max(decision.at, now + _ELSEWHERE_S)
                detail = replace(detail, attempts=attempts + decision.counted, due_at=due_at)
                progress.due_at = due_at if progress.due_at is None else min(progress.due_at, due_at)
            progress.details[index] = detail
        if again:
            self._carry(progress, again)

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
            except StoreError as error:
                _log.error("cannot_record", why=str(error), batches=len(self._dirty))
                await asyncio.sleep(_STORE_PAUSE_S)
                self._news.set()
            await asyncio.sleep(_SETTLE_S)

    async def _settle_once(self) -> None:
        self._news.clear()
        dirty, self._dirty = self._dirty, {}
        try:
            await self._settle_these(dirty)
        except BaseException:  # cancelled, or the store failed: it stays to be done, and may be done twice
            self._dirty = {**dirty, **self._dirty}
            raise

    async def _settle_these(self, dirty: dict[str, _Progress]) -> None:
        if not dirty:
            return
        ends = [LeaseEnd(each.batch.id, each.attempt, _again_at(each)) for each in dirty.values() if not each.open]
        removals = {removal for each in dirty.values() for removal in each.removals}
        await self._store.record([each.outcomes() for each in dirty.values()], tuple(removals))
        for each in dirty.values():
            each.removals -= removals
        for batch_id in dirty:
            for changed in self._waiters.get(batch_id, ()):
                changed.set()
        if ends:
            await self._queue.finish(ends)

    async def drain(self) -> None:
        """After `work` and `settle` were stopped and the carrier closed: record and finish all that is known."""
        while self._dirty:
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


def _due_at(detail: Detail | None) -> float:
    return 0.0 if detail is None or detail.due_at is None else detail.due_at


def _attempts(detail: Detail | None) -> int:
    return 1 if detail is None else detail.attempts


def _again_at(progress: _Progress) -> float | None:
    return None if State.QUEUED not in progress.states else progress.due_at or 0.0


def _removal(batch: Batch, index: int, since: int) -> Removal:
    token = DeviceToken(batch.tokens[index].decode())
    return Removal(batch.app, batch.environment, token, since)
