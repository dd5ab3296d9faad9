"""Single notifications that are carried at once, for callers who wait for Apple's word and keep the responsibility.

The way of one: a `Courier` puts it into its open `Sheet`, which is a batch that still grows. What came in one turn of
the loop goes to the carrier together, and `Tell` gives the answers back as they come, in groups. A sheet is closed
after `_SHEET_S`; once all of it is answered it is kept in the store, with others, for people who ask later. So what is
written is some batches a second, however many notifications there are and however single they come, and nobody waits
for it.

What Apple certainly did not act on is carried again at once, a few times. Nothing else is: the caller hears it, and
decides.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import structlog
from msgspec import Struct

from heliograph import policy, reasons
from heliograph.batches import MAX_KINDS
from heliograph.errors import StoreError
from heliograph.model import (
    ACCEPTED,
    MAX_BATCH,
    NO_ANSWER,
    Answered,
    Batch,
    Detail,
    DeviceToken,
    Environment,
    Headers,
    Lane,
    Lease,
    NotProcessed,
    Origin,
    Outcome,
    Outcomes,
    Quarantine,
    Removal,
    State,
    Unknown,
)
from heliograph.ports import Carrier, Store
from heliograph.reasons import FollowUp
from heliograph.relay.progress import LaneState, Moment, Progress, counting
from heliograph.telemetry import Summary

_log = structlog.get_logger("heliograph.relay")

MOST = 50_000
"""With so many that are not answered no more are taken; of one lane, with a fifth of that."""
_SHEET_S = 0.05
"""So long a sheet takes more. Its notifications count as taken when it was begun."""
_KEEP_S = 0.01
"""What ends within this time is written together."""
_STORE_PAUSE_S = 1.0
"""Pause after the store failed."""
_MOST_UNKEPT = 200_000
"""With so many ends that are not written down, the store failing, what ended first is forgotten."""
_TRIES = 4
"""So often, at most, is carried what Apple did not act on."""
_ELSEWHERE_S = 5.0
"""Within this time."""

_PLACES = [b"%04x" % place for place in range(1, MAX_BATCH + 1)]
"""The last four digits of the ids in a batch, by index."""
_NOTHING = (b"",)
"""In place of payloads: what is kept is for reading, and nobody sends it again."""

Ticket = Any
"""What a caller knows one of its notifications by; never looked into."""
Tell = Callable[[Sequence[Ticket], Sequence[bytes], Outcome], None]
"""Called with tickets, the ids that they went out under, and the outcome that they share; on the loop's thread."""


class Sheet(Progress):
    """Notifications that came within a moment, and what is known of them: a batch that grows until it is closed."""

    __slots__ = ("apns_ids", "closed", "given", "kinds", "kinds_of", "last", "payloads", "tickets", "tokens")

    def __init__(self, batch_id: str, name: Lane, lane: LaneState, now: float, origin: Origin | None) -> None:
        self.tokens: list[bytes] = []
        super().__init__(Lease(Batch(batch_id, *name, now, (), self.tokens, _NOTHING, origin=origin), None, 1), lane)
        self.payloads: list[bytes] = []
        self.tickets: list[Ticket] = []
        self.apns_ids: dict[int, str] = {}
        self.kinds: dict[Headers, int] = {}
        self.kinds_of = bytearray()
        self.last: tuple[Headers | None, int] = None, 0
        """The headers that were added last, and their place in `kinds`."""
        self.given = 0
        """How many the carrier was given."""
        self.closed = False

    def whole(self, payloads: Sequence[bytes]) -> Batch:
        """What there is so far."""
        batch = self.batch
        return Batch(
            batch.id,
            batch.app,
            batch.environment,
            batch.created_at,
            tuple(self.kinds),
            self.tokens,
            payloads,
            bytes(self.kinds_of) if len(self.kinds) > 1 else None,
            origin=batch.origin,
            apns_ids=self.apns_ids,
        )

    def give(self) -> range:
        """The indices of those that the carrier was not given, from now on in hand."""
        new = range(self.given, len(self.tokens))
        self.given = new.stop
        self.open += len(new)
        self.states.extend(bytes(len(new)))
        self.times.extend(array("I", bytes(4 * len(new))))
        return new

    def take_back(self) -> tuple[list[Ticket], list[bytes]]:
        """Those that the carrier was not given, as if they never had been here: tickets and ids."""
        new = range(self.given, len(self.tokens))
        tickets, ids = self.tickets[self.given :], self.ids(new)
        for column in (self.tokens, self.payloads, self.tickets, self.kinds_of):
            del column[self.given :]
        for index in new:
            self.apns_ids.pop(index, None)
        return tickets, ids

    def ids(self, indices: Sequence[int]) -> list[bytes]:
        """What these go out under: their callers' own ids, or ours."""
        prefix, own = self.batch.id.encode(), self.apns_ids
        if not own:
            places = (
                _PLACES[indices.start : indices.stop]
                if isinstance(indices, range)
                else map(_PLACES.__getitem__, indices)
            )
            return [prefix + place for place in places]
        return [own[index].encode() if index in own else prefix + _PLACES[index] for index in indices]

    def end_with(self, indices: Sequence[int], outcome: Outcome, moment: Moment) -> None:
        """That is what became of these."""
        self.open -= len(indices)
        if isinstance(indices, range):
            self.payloads[indices.start : indices.stop] = [b""] * len(indices)
        else:
            for index in indices:
                self.payloads[index] = b""
        if outcome is ACCEPTED:
            self.set_state(indices, State.ACCEPTED, moment.wall)
            self.lane.count(len(indices), 0)
            self.lane.prove()
            return
        decision = policy.decide(
            outcome,
            1,
            moment.wall,
            created_at=self.batch.created_at,
            expiration=None,
            at_most_once=True,
            random=0.0,
        )
        # What would be tried again ends here: that is for the caller, who has the answer.
        state = _ENDS[type(outcome)] if isinstance(decision, policy.Again) else decision.state
        self.set_state(indices, state, moment.wall)
        if state is State.ACCEPTED:
            self.lane.count(len(indices), 0)
            self.lane.prove()
        for index in indices:
            self.details[index] = _detail(index, outcome, decision.reason)
        if isinstance(decision, policy.End):
            for index in indices if decision.removed_since is not None else ():
                token = DeviceToken(self.tokens[index].decode())
                assert decision.removed_since is not None
                self.removals.add(Removal(self.batch.app, self.batch.environment, token, decision.removed_since))
            for index in indices if decision.quarantined_until is not None else ():
                assert decision.quarantined_until is not None
                self._hold_back(index, decision.quarantined_until, moment.steady)


_ENDS: dict[type, State] = {Answered: State.REJECTED, NotProcessed: State.CANCELLED, Unknown: State.UNKNOWN}
"""How ends what the queue would have sent again. Cancelled: it certainly was not sent, and will not be."""


def _detail(index: int, outcome: Outcome, reason: str | None) -> Detail:
    if isinstance(outcome, Answered):
        return Detail(index, reason=reason, status=outcome.status, since=outcome.since, unique_id=outcome.unique_id)
    word = "NotProcessed" if isinstance(outcome, NotProcessed) else NO_ANSWER
    return Detail(index, reason=word, why=outcome.why)


class Tools(Struct, frozen=True):
    """What the relay lends."""

    carrier: Carrier
    store: Store
    now: Callable[[], Moment]
    new_id: Callable[[float], str]
    lane: Callable[[Lane], LaneState]
    kept: Callable[[Sequence[str]], None]
    """Called with the ids of batches that are on record now."""
    failed: Callable[[StoreError], None]


class Sends:
    """All couriers' sheets: how many are in hand, and what is to be kept."""

    def __init__(self, tools: Tools) -> None:
        self.tools = tools
        self._loop = asyncio.get_running_loop()
        self.in_hand = 0
        """Notifications that are not answered."""
        self.unkept: dict[str, Sheet] = {}
        """Sheets that are not on record, by batch, in the order in which they were begun."""
        self._ended: list[Sheet] = []
        self._ends = 0
        """Notifications in these."""
        self._removals: set[Removal] = set()
        self._quarantines: set[Quarantine] = set()
        """What was learnt of device tokens and is not on record. It does not wait for what else is in a sheet."""
        self._keeping: asyncio.Task[None] | None = None
        self._forgotten = Summary(_tell_forgotten, self._loop.call_later)

    def begin(self, name: Lane, origin: Origin | None) -> Sheet:
        moment = self.tools.now()
        sheet = Sheet(self.tools.new_id(moment.wall), name, self.tools.lane(name), moment.wall, origin)
        self.unkept[sheet.batch.id] = sheet
        return sheet

    def end(self, sheet: Sheet) -> None:
        """A sheet that is closed, all of which is answered."""
        if not sheet.tokens:  # it was taken back
            del self.unkept[sheet.batch.id]
            return
        self._ended.append(sheet)
        self._ends += len(sheet.tokens)
        self._keep_soon()

    def learn(self, sheet: Sheet) -> None:
        """What the last answers said of device tokens."""
        self._removals |= sheet.removals
        self._quarantines |= sheet.quarantines
        sheet.removals.clear()
        sheet.quarantines.clear()
        self._keep_soon()

    def _keep_soon(self) -> None:
        if self._keeping is None:
            self._keeping = self._loop.create_task(self._keep())

    @property
    def _unwritten(self) -> bool:
        return bool(self._ended or self._removals or self._quarantines)

    async def _keep(self) -> None:
        """Write down what there is, until there is no more of it."""
        pause_s = _KEEP_S
        while self._unwritten:
            await asyncio.sleep(pause_s)
            try:
                await self.keep_all()
                pause_s = _KEEP_S
            except StoreError:
                pause_s = _STORE_PAUSE_S
        self._keeping = None

    async def keep_all(self) -> None:
        """Write down what ended so far. Raises StoreError; it stays to be done then, unless it is too much."""
        while self._unwritten:
            ended, self._ended, self._ends = self._ended, [], 0
            removals, self._removals = self._removals, set()
            quarantines, self._quarantines = self._quarantines, set()
            finished: list[tuple[Batch, Outcomes]] = [(each.whole(_NOTHING), each.outcomes()) for each in ended]
            try:
                await self.tools.store.keep(finished, tuple(removals), tuple(quarantines))
            except BaseException as error:  # it may be on record all the same: to keep it twice changes nothing
                self._ended = [*ended, *self._ended]
                self._ends = sum(len(each.tokens) for each in self._ended)
                self._removals |= removals
                self._quarantines |= quarantines
                if isinstance(error, StoreError):
                    _log.error("cannot_keep", why=str(error), batches=len(ended))
                    self._forget_oldest()
                    self.tools.failed(error)
                raise
            now = self.tools.now().wall
            for each in ended:
                each.count_ends(each.ended, now)
                del self.unkept[each.batch.id]
            self.tools.kept([each.batch.id for each in ended])

    def _forget_oldest(self) -> None:
        while self._ends > _MOST_UNKEPT:
            sheet = self._ended.pop(0)
            self._ends -= len(sheet.tokens)
            del self.unkept[sheet.batch.id]
            self._forgotten.add(len(sheet.tokens))
        for learnt in (self._removals, self._quarantines):  # Apple will tell it again
            while len(learnt) > _MOST_UNKEPT:
                learnt.pop()

    async def drain(self) -> None:
        """Write down all that is left, once everything was answered. Raises StoreError."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
        for sheet in list(self.unkept.values()):
            if not (sheet.closed or sheet.open):
                sheet.closed = True
                self.end(sheet)
        if self._keeping is not None:
            self._keeping.cancel()
        await self.keep_all()


def _tell_forgotten(number: int) -> None:
    _log.error("forgot_ends", count=number, hint="the store fails: what became of these is on record nowhere")


class Courier:
    """Carries for an app in an environment. What one turn of the loop brings goes together."""

    __slots__ = ("_due", "_in_hand", "_lane", "_loop", "_origin", "_sends", "_sheet", "_tell")

    def __init__(self, sends: Sends, app: str, environment: Environment, tell: Tell, origin: Origin | None) -> None:
        self._sends = sends
        self._lane: Lane = app, environment
        self._tell = tell
        self._origin = origin
        self._loop = asyncio.get_running_loop()
        self._sheet: Sheet | None = None
        self._due = False
        self._in_hand = 0

    def send(self, headers: Headers, token: bytes, payload: bytes, apns_id: str | None, ticket: Ticket) -> None:
        """Carry a notification now; `tell` is called with the ticket once, in this turn of the loop at the earliest.

        `token` is lower-case hex; `apns_id` a canonical UUID to send it under in place of ours. NotProcessed is the
        outcome where there is too much in hand already, Apple cannot be reached, or Apple did not act on it.
        """
        sheet = self._sheet
        if sheet is None:
            sheet = self._begin()
        last, kind = sheet.last
        if headers is not last:
            kind = sheet.kinds.setdefault(headers, len(sheet.kinds))
            if kind == MAX_KINDS:
                del sheet.kinds[headers]
                self._close(sheet)
                self.send(headers, token, payload, apns_id, ticket)
                return
            sheet.last = headers, kind
        place = len(sheet.tokens)
        sheet.tokens.append(token)
        sheet.payloads.append(payload)
        sheet.tickets.append(ticket)
        sheet.kinds_of.append(kind)
        if apns_id is not None:
            sheet.apns_ids[place] = apns_id
        if place == MAX_BATCH - 1:
            self._close(sheet)
        elif not self._due:
            self._due = True
            self._loop.call_soon(self._flush)

    def _begin(self) -> Sheet:
        sheet = self._sheet = self._sends.begin(self._lane, self._origin)
        self._loop.call_later(_SHEET_S, self._close, sheet)
        return sheet

    def _close(self, sheet: Sheet) -> None:
        """It takes no more."""
        if sheet.closed:
            return
        if sheet is self._sheet:
            self._flush()
            self._sheet = None
        sheet.closed = True
        if not sheet.open:
            self._sends.end(sheet)

    def _flush(self) -> None:
        self._due = False
        sheet = self._sheet
        if sheet is None or sheet.given == len(sheet.tokens):
            return
        why = self._full()
        if why is not None:
            self._tell(*sheet.take_back(), NotProcessed(why))
            return
        new = sheet.give()
        self._in_hand += len(new)
        self._sends.in_hand += len(new)
        self._carry(sheet, new, 1, self._loop.time() + _ELSEWHERE_S)

    def _full(self) -> str | None:
        """Why nothing more is taken now."""
        if self._sends.in_hand >= MOST or self._in_hand >= MOST // 5:
            return "too many notifications wait for Apple's answers"
        full = self._sends.tools.carrier.full()
        if full is None or self._lane in full:
            return "enough notifications wait to be sent"
        return None

    def _carry(self, sheet: Sheet, indices: Sequence[int], tries: int, until: float) -> None:
        batch = sheet.whole(sheet.payloads)

        def report(done: Sequence[int], outcome: Outcome) -> None:
            if outcome is not ACCEPTED and tries < _TRIES and _is_free(outcome, tries) and self._loop.time() < until:
                self._carry(sheet, done, tries + 1, until)
                return
            sends = self._sends
            all_tickets = sheet.tickets
            if isinstance(done, range):
                tickets = all_tickets[done.start : done.stop]
            else:
                tickets = [all_tickets[index] for index in done]
            ids = sheet.ids(done)
            sheet.end_with(done, outcome, sends.tools.now())
            if sheet.removals or sheet.quarantines:
                sends.learn(sheet)
            sends.in_hand -= len(done)
            self._in_hand -= len(done)
            if sheet.closed and not sheet.open:
                sends.end(sheet)
            self._tell(tickets, ids, outcome)

        self._sends.tools.carrier.carry(batch, indices, counting(sheet.lane.meter, batch, report))


def _is_free(outcome: Outcome, tries: int) -> bool:
    """Whether to carry it once more costs nobody anything: Apple did not act on it, and a new connection may help."""
    if isinstance(outcome, Answered):
        reason = reasons.find(outcome.reason, outcome.status)
        return tries == 1 and reason.follow_up in (FollowUp.RENEW_PROVIDER_TOKEN, FollowUp.NEW_CONNECTION)
    return isinstance(outcome, NotProcessed)
