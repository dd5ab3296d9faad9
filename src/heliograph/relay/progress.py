"""What is known of leased batches, and of the lanes that they are in."""

from __future__ import annotations

import math
import random
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import structlog
from msgspec.structs import replace

from heliograph import crash, policy
from heliograph.model import (
    NO_ANSWER,
    Answered,
    Batch,
    Detail,
    DeviceToken,
    Headers,
    Lane,
    Lease,
    LeaseEnd,
    NotProcessed,
    Outcome,
    Outcomes,
    Quarantine,
    Removal,
    State,
    Unknown,
)
from heliograph.ports import Report
from heliograph.telemetry import LaneMeter, Summary

_log = structlog.get_logger("heliograph.relay")

_MANY_BAD = 20
"""Device tokens that Apple did not know: where more than these and than half of all, it is not they that are wrong."""

_ALARM_S = 60.0
"""Between two log lines about the same trouble of a lane."""

_TOGETHER_S = 0.05
"""What of a batch is to be sent again for the same reason within this time is sent again together: a lease for all."""
_ELSEWHERE_S = 1.0
_ELSEWHERE_MAX_S = 30.0
"""Pauses before what came back unprocessed twice is tried again: then it is not the one connection that is at fault."""

_CLOCK_TOLERANCE_S = 60.0
"""By so much clocks are set back in passing."""

_NOT_ENDED = (State.QUEUED, State.SENT)
_GIVEN_UP = (State.BURIED, State.EXPIRED)

_LITTLE = array("H", (1,)).tobytes() == b"\1\0"
"""Whether this machine's integers must be turned round for the wire's order."""


class Moment(NamedTuple):
    """Now, by two clocks, in UNIX seconds."""

    wall: float
    """For expirations and receipts. It may be set."""
    steady: float
    """Counts on from the start, whatever is set: for pauses, and all that is measured."""


class LaneState:
    """What is known of an app in an environment: how its notifications fare."""

    __slots__ = ("_later", "_name", "alarmed_at", "bad", "crowd", "given_up", "good", "meter", "proved")

    def __init__(self, name: Lane, meter: LaneMeter, later: Callable[[float, Callable[[], None]], object]) -> None:
        """`later` is a loop's `call_later`."""
        self._name = name
        self._later = later
        self.meter = meter
        self.proved = False
        """Apple took something of it, since the start."""
        self.given_up: dict[str, Summary] = {}
        """What is told of those that were given up on, by reason."""
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

    def prove(self) -> None:
        """Apple took something."""
        if not self.proved:
            self.proved = True
            app, environment = self._name
            _log.info("first_accepted", app=app, environment=environment.value)

    def give_up(self, reason: str, state: State, count: int = 1) -> None:
        """So many are not tried any more, though Apple did not say no for good."""
        summary = self.given_up.get(reason)
        if summary is None:
            app, environment = self._name

            def tell(number: int) -> None:
                _log.warning(
                    "gave_up",
                    app=app,
                    environment=environment.value,
                    reason=reason,
                    state=state.name.lower(),
                    count=number,
                )

            summary = self.given_up[reason] = Summary(tell, self._later)
        summary.add(count)

    @property
    def doubtful(self) -> bool:
        """So many device tokens are unknown that the environment is more likely to be wrong than they are."""
        return self.bad > max(_MANY_BAD, self.good)


class Progress:
    """What is known of a leased batch, growing as the carrier reports."""

    __slots__ = (
        *("attempt", "batch", "details", "due_at", "ended", "fresh", "lane", "later", "open", "planned"),
        *("quarantines", "removals", "retried", "states", "times"),
    )

    def __init__(self, lease: Lease, lane: LaneState) -> None:
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
        self.ended: dict[State, int] = {}
        """How many came to an end, by the state that they ended in, that are not recorded yet."""
        self.open = 0
        """Notifications with the carrier, or about to be."""
        self.due_at: float | None = None
        """When the earliest deferred one is due, by the steady clock."""
        self.later: set[int] = set()
        """Queued, and not to be sent under this lease."""
        self.retried: set[int] = set()
        """Handed to the carrier a second time under this lease."""
        self.planned: dict[tuple[Outcome, int, Headers], tuple[float, policy.Again]] = {}
        """Recent decisions to send again, and until when they hold for others, by outcome, tries and headers."""

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
        if state not in _NOT_ENDED:
            self.ended[state] = self.ended.get(state, 0) + len(indices)
        if isinstance(indices, range) and len(indices) > 1:
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

    def count_ends(self, ended: Mapping[State, int], now: float) -> None:
        """Have the meter know of these, which are on record now."""
        way_s = now - self.batch.created_at
        for state, count in ended.items():
            self.lane.meter.ended(state, count, way_s)

    def outcomes(self) -> Outcomes:
        times = self.times
        if _LITTLE:
            times = array("I", times)
            times.byteswap()
        return Outcomes(self.batch.id, self.attempt, bytes(self.states), times.tobytes(), tuple(self.details.values()))

    def due(self, moment: Moment) -> Sequence[int]:
        """What is to be sent now. What came too late ends here."""
        now = moment.wall
        size = len(self.batch)
        indices: Sequence[int] = range(size)
        if any(self.states) or self.details:
            lost = [index for index in range(size) if self.states[index] == State.SENT]
            # Who cancelled these was told that they were being sent.
            lost += [index for index in range(size) if index in self.details and self.details[index].cancelled]
            for index in lost:
                why = "the server ended before the answer came"
                attempts = self._attempts(index)
                self.details[index] = Detail(index, reason=NO_ANSWER, why=why, attempts=attempts)
            self.set_state(lost, State.UNKNOWN, now)
            indices = [index for index in range(size) if self.states[index] == State.QUEUED]
            # What was made in the future was put off by a clock that was fast, and set right before we started.
            if self.batch.created_at <= moment.steady + _CLOCK_TOLERANCE_S:
                later = [index for index in indices if _due_at(self.details.get(index)) > moment.steady]
            else:
                later = []
            if later:
                self.put_off(min(_due_at(self.details.get(index)) for index in later))
                self.later.update(later)
                indices = [index for index in indices if index not in self.later]
        created_at = self.batch.created_at
        kinds = self.batch.headers
        if any(policy.deadline(created_at, each.expiration) < now for each in kinds):
            over = [
                index
                for index in indices
                if policy.deadline(self.patience_from(index), self.headers(index).expiration) < now
            ]
            for index in over:
                expiration = self.headers(index).expiration
                state = State.BURIED if expiration is None else State.EXPIRED
                attempts = self._attempts(index) - 1
                self.set_state((index,), state, now)
                self.details[index] = Detail(index, reason="TooLate", attempts=attempts)
                self.lane.give_up("TooLate", state)
            gone = set(over)
            indices = [index for index in indices if index not in gone]
        return indices

    def decide(self, indices: Sequence[int], outcome: Outcome, moment: Moment) -> list[int]:
        """Note what policy says of outcomes that are no plain 200; those to be sent again at once."""
        now = moment.wall
        again: list[int] = []
        for index in indices:
            attempts = self._attempts(index)
            before = self.details.get(index)
            decision = self._decision(index, outcome, attempts, moment)
            unanswered = isinstance(outcome, Unknown) or (before is not None and before.unanswered)
            if before is not None and before.cancelled:
                decision = _not_again(decision, outcome, unanswered=unanswered)
            detail = _detail(index, outcome, decision, attempts)
            if before is not None and decision == _CANCELLED:
                detail = replace(before, attempts=attempts - 1, due_at=None, cancelled=False)
            elif before is not None and before.again_from is not None:
                detail = replace(detail, again_from=before.again_from)
            if unanswered:
                detail = replace(detail, unanswered=True)
                if decision == _MAYBE and not isinstance(outcome, Unknown):
                    detail = detail.left_unanswered()
            if isinstance(decision, policy.End):
                self.set_state((index,), decision.state, now)
                if decision.state is State.BURIED:
                    crash.point("buried")
                if decision.state in _GIVEN_UP:
                    self.lane.give_up(detail.reason or "", decision.state)
                if decision.state is State.ACCEPTED:
                    self.lane.count(1, 0)
                    self.lane.prove()
                if decision.removed_since is not None:
                    self.removals.add(_removal(self.batch, index, decision.removed_since))
                if decision.quarantined_until is not None:
                    self._hold_back(index, decision.quarantined_until, moment.steady)
            elif decision.at <= now and index not in self.retried:
                self.retried.add(index)
                detail = replace(detail, attempts=attempts + decision.counted)
                again.append(index)
            else:
                pause = decision.at - now if decision.at > now else _elsewhere_s(now - self.batch.created_at)
                due_at = moment.steady + pause
                detail = replace(detail, attempts=attempts + decision.counted, due_at=due_at)
                if self.states[index] == State.SENT:  # it certainly was not acted on
                    self.set_state((index,), State.QUEUED, now)
                self.later.add(index)
                self.put_off(due_at)
            self.details[index] = detail
        return again

    def cancel(self, indices: Sequence[int], now: float) -> list[int]:
        """Have these not sent any more, of those that are queued; which of them the carrier has."""
        out: list[int] = []
        waiting: dict[State, list[int]] = {State.CANCELLED: [], State.UNKNOWN: []}
        for index in indices:
            if index >= len(self.states) or self.states[index] != State.QUEUED:
                continue
            detail = self.details.get(index)
            if index not in self.later:
                self.details[index] = replace(detail or Detail(index), cancelled=True)
                out.append(index)
                continue
            state = State.CANCELLED
            if detail is not None:
                detail = replace(detail, attempts=detail.attempts - 1, due_at=None)
                if detail.unanswered:  # as in `stores.outcomes.call_off`
                    state, detail = State.UNKNOWN, detail.left_unanswered()
                self.details[index] = detail
            waiting[state].append(index)
        for state, those in waiting.items():
            if those:
                self.set_state(those, state, now)
        return out

    def _decision(self, index: int, outcome: Outcome, attempts: int, moment: Moment) -> policy.Decision:
        """What follows; what of a batch is to be sent again for one reason shares a time, and so a lease."""
        headers = self.headers(index)
        reason = (outcome, attempts, headers)
        until, shared = self.planned.get(reason, (0.0, None))
        crowd = self.lane.crowd
        answered = isinstance(outcome, Answered)
        if shared is not None and moment.steady < until:
            if answered:
                crowd.plan()
            return shared
        decision = policy.decide(
            outcome,
            attempts,
            moment.wall,
            created_at=self.patience_from(index),
            expiration=headers.expiration,
            at_most_once=headers.at_most_once,
            crowd_s=crowd.wait_s(moment.steady),
            random=random.random(),  # noqa: S311 - spreads retries, guards nothing
        )
        if isinstance(decision, policy.Again) and decision.at > moment.wall:
            decision = replace(decision, at=decision.at + _TOGETHER_S)  # nobody's pause becomes shorter by sharing it
            self.planned[reason] = moment.steady + _TOGETHER_S, decision
            if answered:
                crowd.plan()
        return decision

    def _hold_back(self, index: int, until: int, now: float) -> None:
        """Quarantine a device token, unless nearly all are unknown to Apple: then it is not they that are wrong."""
        batch, lane = self.batch, self.lane
        lane.count(0, 1)
        if not lane.doubtful:
            token = DeviceToken(batch.tokens[index].decode())
            self.quarantines.add(Quarantine(batch.app, batch.environment, token, until))
        elif now > lane.alarmed_at + _ALARM_S:
            lane.alarmed_at = now
            hint = "most device tokens are of the other environment, or of another app: check environment and topic"
            _log.error("apple_knows_few_tokens", app=batch.app, environment=batch.environment.value, hint=hint)

    def put_off(self, due_at: float) -> None:
        """Something of it is due then, by the steady clock."""
        self.due_at = due_at if self.due_at is None else min(self.due_at, due_at)

    def end(self, moment: Moment) -> LeaseEnd:
        """How its lease ends, once nothing is open."""
        if State.QUEUED not in self.states:
            return LeaseEnd(self.batch.id, self.attempt)
        pause = 0.0 if self.due_at is None else self.due_at - moment.steady
        return LeaseEnd(self.batch.id, self.attempt, moment.wall + pause)

    def _attempts(self, index: int) -> int:
        detail = self.details.get(index)
        return 1 if detail is None else detail.attempts


def counting(meter: LaneMeter, batch: Batch, report: Report) -> Report:
    """`report`, with what it is told of counted first."""
    kinds_of, only = batch.headers_of, batch.headers[0].push_type
    if kinds_of is None or all(each.push_type is only for each in batch.headers):

        def count_and_report(indices: Sequence[int], outcome: Outcome) -> None:
            meter.answered(only, outcome, len(indices))
            report(indices, outcome)

        return count_and_report

    kinds = [each.push_type for each in batch.headers]

    def count_each_and_report(indices: Sequence[int], outcome: Outcome) -> None:
        for kind, count in Counter([kinds[kinds_of[index]] for index in indices]).items():
            meter.answered(kind, outcome, count)
        report(indices, outcome)

    return count_each_and_report


_CANCELLED = policy.End(State.CANCELLED)
"""Apple did not see it this time."""


_MAYBE = policy.End(State.UNKNOWN, NO_ANSWER)
"""Apple may have seen it, this time or before."""


def _not_again(decision: policy.Decision, outcome: Outcome, *, unanswered: bool) -> policy.Decision:
    """What follows instead, as it was cancelled meanwhile."""
    if isinstance(decision, policy.End) and decision.state in (State.ACCEPTED, State.REJECTED):
        return decision
    if unanswered:
        return _MAYBE
    return _CANCELLED if isinstance(outcome, NotProcessed) else policy.End(State.CANCELLED, decision.reason)


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
    word = "NotProcessed" if isinstance(outcome, NotProcessed) else NO_ANSWER
    return Detail(index, reason=word, why=outcome.why, attempts=attempts)


def _elsewhere_s(age_s: float) -> float:
    """The pause before what came back unprocessed is tried again: longer for what has waited for long already."""
    return min(max(age_s / 10, _ELSEWHERE_S), _ELSEWHERE_MAX_S)


def _due_at(detail: Detail | None) -> float:
    return 0.0 if detail is None or detail.due_at is None else detail.due_at


def _removal(batch: Batch, index: int, since: int) -> Removal:
    token = DeviceToken(batch.tokens[index].decode())
    return Removal(batch.app, batch.environment, token, since)
