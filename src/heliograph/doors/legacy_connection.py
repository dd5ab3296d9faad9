"""One connection of the gateway for old scripts: takes frames in, hears what becomes of them, says the last words."""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections.abc import Callable, Mapping, Sequence

import structlog
from msgspec import Struct

from heliograph import reasons
from heliograph.config import LegacySettings
from heliograph.doors.admittance import Admittance, Guest, NotAdmitted
from heliograph.doors.legacy_columns import HeaderSets, append, empty_frames, pick
from heliograph.doors.legacy_trail import Entry, Place, Sent, Stretch, Trail, Whose, marks
from heliograph.doors.receipts import PLACES, SENT_BEFORE
from heliograph.errors import Overloaded, StoreError
from heliograph.model import App, Batch, Origin, Receipt, State
from heliograph.net.streams import Stream
from heliograph.protocols.binary import FrameReader, Frames, Status, error_packet
from heliograph.relay import Relay
from heliograph.telemetry import LegacyMeter

MOST_FRAMES = 1000
"""Of one connection that were read while others are being stored: one batch. With more, it is not read from."""
MOST_OCTETS = 512 * 1024
"""Of all connections together that were read and are not stored: two reads from a socket. With more, no connection that
brings some is read from, so that it stays a matter of milliseconds until what was read is stored."""
STAGGER_S = 0.005
"""Between two connections that are read from again."""

LINGER_S = 30.0
"""How long what a client still writes is thrown away after an error packet, so that it can read that."""
UNFINISHED_S = 60.0
"""How long a frame may take to arrive."""
ENDED_S = 5.0
"""How long Apple's answers are waited for where the client has ended its side."""
IN_FLIGHT_S = 10.0
"""How long Apple's answers to what was on the wire behind a bad frame are waited for before the client hears of it."""
GONE_S = 0.5
"""How long the machine of a client that is gone may take to say so."""

_LINES = 30
"""Log lines of a kind in a minute; of more there is a count."""

_log = structlog.get_logger("heliograph.legacy")


class _Bad(Struct, frozen=True):
    """A frame that Apple said no to."""

    place: Place
    status: int
    reason: str


class _Answer(Struct, frozen=True):
    """The last words to a client."""

    status: int
    identifier: int
    reason: str


class Intake:
    """What all connections together have read and not stored yet."""

    def __init__(self, later: Callable[[float, Callable[[], None]], object]) -> None:
        """`later` is a loop's `call_later`."""
        self._later = later
        self._octets = 0
        self._waiting: dict[Connection, None] = {}
        self._going_on = False

    @property
    def full(self) -> bool:
        return self._octets >= MOST_OCTETS

    def add(self, octets: int) -> None:
        self._octets += octets

    def wait(self, connection: Connection) -> None:
        """Have it read on once there is room."""
        self._waiting[connection] = None

    def release(self, octets: int) -> None:
        """So much of it is stored, or thrown away."""
        self._octets -= octets
        if not self._going_on:
            self._let_one_in()

    def _let_one_in(self) -> None:
        """One after the other: nobody knows how much they bring."""
        self._going_on = False
        if self._waiting and not self.full:
            connection = next(iter(self._waiting))
            del self._waiting[connection]
            connection.read_on()
            if self._waiting:
                self._going_on = True
                self._later(STAGGER_S, self._let_one_in)


class Lines:
    """Keeps log lines of a kind from becoming too many."""

    def __init__(self, listener: str) -> None:
        self._listener = listener
        self._counts: dict[str, int] = {}

    def allow(self, event: str) -> bool:
        """Whether there were not too many of this kind lately; otherwise they are counted."""
        self._counts[event] = count = self._counts.get(event, 0) + 1
        return count <= _LINES

    def begin_anew(self) -> None:
        """Another minute: tell how many were left out of the last one."""
        for event, count in self._counts.items():
            if count > _LINES:
                _log.warning("legacy_more", listener=self._listener, kind=event, count=count - _LINES)
        self._counts.clear()


class Common(Struct, frozen=True, eq=False):
    """What the connections of a listener share."""

    name: str
    """The listener's."""
    settings: LegacySettings
    relay: Relay
    apps: Mapping[str, App]
    admittance: Admittance
    meter: LegacyMeter
    clock: Callable[[], float]
    """UNIX seconds."""
    loop: asyncio.AbstractEventLoop
    sent: Sent
    intake: Intake
    lines: Lines
    connections: set[Connection]
    tasks: set[asyncio.Task[None]]
    """Work in hand; some is that of clients that are gone."""


class Connection:
    """A client's. It is a `streams.User`, and a `relay.Watcher` of what the client sent."""

    def __init__(self, common: Common, stream: Stream, name: str) -> None:
        self.name = name
        self._common = common
        self._stream = stream
        settings = common.settings
        self._reader = FrameReader(max_payload=settings.max_payload, max_item_payload=settings.max_item_payload)
        self._guest: Guest | None = None
        self._sets: HeaderSets | None = None
        self._app: App | None = None
        """For which `_sets` are."""
        self._task: asyncio.Task[None] | None = None
        self._gathered = empty_frames()
        self._gathered_at = 0.0
        self._octets = 0
        self._paused = False
        self._next = 0
        """The position of the next frame that is stored."""
        self._last: int | None = None
        """The identifier of the last one that is; None: none is."""
        self._trail = Trail()
        self._answer: _Answer | None = None
        """To be said once all that was gathered is stored."""
        self._bad: _Bad | None = None
        """The lowest that Apple said no to."""
        self._deaf = False
        """Nothing more is taken."""
        self._told = False
        """The last words were said."""
        self._gone = False
        self._unfinished_since: float | None = None
        self._going: asyncio.TimerHandle | None = None
        self._expected: list[Entry] = []
        """What a client that ended its side may send again."""
        self._overdue = False
        """The client ended its side long ago."""
        self._hurried = asyncio.Event()
        """The client is gone, or the server stops: nothing is waited for."""

    def __repr__(self) -> str:
        return f"<legacy connection {self.name}>"

    # -- streams.User --------------------------------------------------------------------------------------------

    def on_open(self) -> None:
        common = self._common
        common.connections.add(self)
        common.meter.open += 1
        try:
            self._guest = guest = common.admittance.admit(self._stream)
        except NotAdmitted as error:
            self._deaf = self._told = True
            self._note_refusal(error)
            self._stream.close()
            return
        _log.debug(
            "legacy_opened",
            connection=self.name,
            address=self._stream.address,
            app=guest.app,
            environment=guest.environment.value,
            guest=guest.trace,
        )

    def on_data(self, data: bytes) -> None:
        if self._deaf:
            return
        frames, error = self._reader.receive(data)
        now = self._common.loop.time()
        if frames:
            if not self._gathered:
                self._gathered, self._gathered_at = frames, now
            else:
                append(self._gathered, frames)
            self._octets += len(data)
            self._common.intake.add(len(data))
            if len(self._gathered) >= MOST_FRAMES or self._common.intake.full:
                self._paused = True
                self._stream.pause()
        if not self._reader.held:
            self._unfinished_since = None
        elif frames or self._unfinished_since is None:
            self._unfinished_since = now
        if error is not None:
            self._say_last(_Answer(error.status, error.identifier, Status(error.status).name))
        elif frames:
            self._wake()

    def on_end(self) -> None:
        self._unfinished_since = None
        self._wake()
        self._close_when_done()
        if not self._told:
            self._going = self._common.loop.call_later(ENDED_S, self._on_overdue)

    def _on_overdue(self) -> None:
        self._overdue = True
        self._close_when_done()

    def on_close(self, error: Exception | None) -> None:
        self._gone = True
        self._unfinished_since = None
        self._hurried.set()
        if self._going is not None:
            self._going.cancel()
        common = self._common
        common.relay.unwatch(self._trail.open)
        common.connections.discard(self)
        common.meter.open -= 1
        if error is not None:
            common.sent.forget(self._expected)
        self._expected = []
        self._trail = Trail()
        _log.debug("legacy_closed", connection=self.name, why=None if error is None else str(error))

    # -- relay.Watcher -------------------------------------------------------------------------------------------

    def rejected(self, batch_id: str, indices: Sequence[int], reason: str) -> None:
        status = reasons.find(reason).legacy_status
        if status is None or self._told or self._gone:
            return
        for index in indices:
            place = self._trail.find(batch_id, index)
            if place is not None and (self._bad is None or place.position < self._bad.place.position):
                self._bad = _Bad(place, status, reason)
                self._trail.freeze()
                self._wake()

    def ended(self, batch_id: str) -> None:
        self._trail.end(batch_id)
        self._close_when_done()

    # -- for the gateway -----------------------------------------------------------------------------------------

    def shut(self) -> None:
        """Take nothing more, and say what was taken."""
        self._hurried.set()
        self._say_last(_Answer(Status.SHUTDOWN, 0, "Shutdown"))

    def too_slow(self, now: float) -> bool:
        """Whether a frame of its takes too long to arrive."""
        since = self._unfinished_since
        return since is not None and not self._paused and not self._deaf and now >= since + UNFINISHED_S

    def shed(self) -> None:
        """Close, as the client does not finish what it began."""
        if self._common.lines.allow("legacy_shed"):
            why = f"a frame did not arrive within {UNFINISHED_S:g} s"
            _log.warning("legacy_shed", connection=self.name, app=self._guest and self._guest.app, why=why)
        self._unfinished_since = None
        self._say_last(_Answer(Status.SHUTDOWN, 0, "Shed"))

    def admit_again(self) -> None:
        """Close where the client would not be let in as the same any more."""
        if self._deaf:
            return
        try:
            if self._common.admittance.admit(self._stream) == self._guest:
                return
        except NotAdmitted as error:
            self._note_refusal(error)
        self._say_last(_Answer(Status.SHUTDOWN, 0, "Changed"))

    # -- work ----------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if self._task is None and (self._gathered or self._answer is not None or self._bad is not None):
            common = self._common
            # It goes on where the client is gone before it is done.
            self._task = common.loop.create_task(self._work())
            common.tasks.add(self._task)
            self._task.add_done_callback(common.tasks.discard)

    async def _work(self) -> None:
        """Do what there is to do, one thing at a time."""
        try:
            while not self._told:
                ended = self._gone or self._stream.ended
                if self._gathered and (self._bad is None or ended):
                    await self._store()
                elif self._bad is not None and not self._gone:
                    await (self._tell_ended(self._bad) if ended else self._tell_late(self._bad))
                elif self._answer is not None and not self._gone:
                    self._tell(self._answer)
                else:
                    break
        except Exception:  # noqa: BLE001 - a client must not wait for ever, whatever went wrong here
            _log.exception("legacy_failed", connection=self.name)
            self._stream.abort()
        finally:
            self._task = None
            self._close_when_done()

    async def _store(self) -> None:
        """Make durable what was gathered, up to the first frame that is refused."""
        since = self._gathered_at
        frames, octets = self._take_gathered()
        try:
            stored = await self._store_those(frames)
        finally:
            self._common.intake.release(octets)
        meter = self._common.meter
        meter.frames += stored
        if stored:
            meter.window_s.observe(self._common.loop.time() - since, stored)

    async def _store_those(self, frames: Frames) -> int:
        """How many of them are durable now."""
        common, guest = self._common, self._guest
        assert guest is not None, "no frame of others is read"
        first, self._next = self._next, self._next + len(frames)
        every = marks(frames)
        now = common.loop.time()
        whose: Whose = (guest.id, guest.app, guest.environment)
        known = common.sent.take(whose, every, now)
        stop = len(frames)
        try:
            answer: _Answer | None = None
            if not known:
                stop, answer = await self._enqueue(frames, range(first, first + stop), every)
            elif rest := [index for index in range(stop) if index not in known]:
                those = array("q", [every[index] for index in rest])
                taken, answer = await self._enqueue(pick(frames, rest), [first + index for index in rest], those)
                stop = stop if answer is None else rest[taken]
        except (Overloaded, StoreError) as error:
            stop = 0
            answer = _Answer(Status.SHUTDOWN, 0, "Overloaded" if isinstance(error, Overloaded) else "StoreFails")
        finally:
            common.sent.remember(whose, [(each.mark, each.id) for at, each in known.items() if at >= stop], now)
        if answer is not None:
            self._answer, self._deaf = answer, True
            self._forget_gathered()
        if kept := {index: entry for index, entry in known.items() if index < stop}:
            await self._keep(frames, first, kept)
        if stop:
            self._last = frames.identifiers[stop - 1]
        return stop

    async def _enqueue(self, frames: Frames, positions: Sequence[int], every: array[int]) -> tuple[int, _Answer | None]:
        """How many of these were taken, and why not the next one. Raises Overloaded, StoreError."""
        common, guest = self._common, self._guest
        assert guest is not None
        identifiers = frames.identifiers
        ask_again: Sequence[bytes] = frames.tokens
        if common.settings.refuse_removed:
            # What names no frame could only end the connection, and the client would never know which token it was.
            ask_again = [token for token, own in zip(frames.tokens, identifiers, strict=True) if not own]
        headers = self._header_sets(guest).column(frames, common.clock())
        begun = await common.relay.admit_until_refused(
            guest.app,
            guest.environment,
            headers,
            frames.tokens,
            frames.payloads,
            self._origin(identifiers),
            ask_again=ask_again,
        )
        taken = sum(map(len, begun.batches))
        if begun.batches:
            watching = not self._gone
            if watching:
                self._watch(begun.batches, positions, identifiers, every)
            try:
                await common.relay.enqueue(begun.batches, watcher=self if watching else None)
            except BaseException:
                for batch in begun.batches:
                    self._trail.forget(batch.id)
                raise
            if watching and self._gone:
                common.relay.unwatch(batch.id for batch in begun.batches)
        if begun.refused is None:
            return taken, None
        reason = begun.refused.reason
        return taken, _Answer(_status_at_once(reason), identifiers[taken], reason)

    def _watch(
        self, batches: Sequence[Batch], positions: Sequence[int], identifiers: Sequence[int], every: array[int]
    ) -> None:
        at = self._common.loop.time()
        start = 0
        for batch in batches:
            stop = start + len(batch)
            own = array("I", identifiers[start:stop])
            gone = self._trail.add(Stretch(batch.id, positions[start:stop], own, every[start:stop], at))
            self._common.relay.unwatch(gone)
            start = stop

    async def _keep(self, frames: Frames, first: int, known: Mapping[int, Entry]) -> None:
        """Have it known what became of frames that are not sent, as they were before."""
        common, guest = self._common, self._guest
        assert guest is not None
        those = pick(frames, list(known))
        ids = [entry.id for entry in known.values()]
        if not self._gone:
            mine = array("q", [entry.mark for entry in known.values()])
            positions = [first + index for index in known]
            at = common.loop.time()
            self._trail.add(Stretch(None, positions, array("I", those.identifiers), mine, at, ids))
        try:
            await common.relay.keep(
                guest.app,
                guest.environment,
                self._header_sets(guest).column(those, common.clock()),
                those.tokens,
                those.payloads,
                self._origin(those.identifiers),
                reason=SENT_BEFORE,
                whys=[f"it was sent as {each}, and again by the client after an error packet" for each in ids],
            )
        except StoreError as error:  # they went out all the same; only nobody can look for them
            _log.error("cannot_keep", connection=self.name, count=len(ids), why=str(error))

    # -- a late no -----------------------------------------------------------------------------------------------

    async def _tell_late(self, bad: _Bad) -> None:
        """Have nothing sent that is behind a bad frame, remember what was, then tell the client."""
        self._deaf = True
        self._forget_gathered()
        until = self._common.loop.time() + IN_FLIGHT_S
        try:
            while True:
                found = await self._call_off(bad.place.position, until)
                if self._gone:
                    return
                assert self._bad is not None
                if self._bad is bad:
                    break
                bad = self._bad
        except StoreError as error:
            _log.error("cannot_cancel", connection=self.name, why=str(error))
            self._told = True
            self._stream.close()
            return
        self._remember(found)
        self._tell(_Answer(bad.status, bad.place.identifier, bad.reason))

    async def _call_off(self, position: int, until: float) -> list[tuple[int, str]]:
        """Cancel all behind a position; what of it had gone out, by mark and id. Raises StoreError."""
        relay, loop = self._common.relay, self._common.loop
        gone_out: list[tuple[int, str]] = []
        in_flight: dict[str, int] = {}
        for stretch, indices in self._trail.behind(position):
            if self._gone:
                break
            if stretch.batch_id is None:
                gone_out += [(stretch.marks[index], stretch.ids[index]) for index in indices]
                continue
            ids = [stretch.batch_id + PLACES[index] for index in indices]
            for index, receipt in zip(indices, await relay.cancel(ids), strict=True):
                if receipt is None:
                    continue
                if receipt.cancelling:
                    in_flight[receipt.id] = stretch.marks[index]
                elif _went_out(receipt):
                    gone_out.append((stretch.marks[index], receipt.id))
        while in_flight and not self._hurried.is_set() and (left := until - loop.time()) > 0:
            await self._receipt(next(iter(in_flight)), left)
            for receipt in await relay.receipts(list(in_flight)):
                if receipt is not None and receipt.state not in (State.QUEUED, State.SENT):
                    mark = in_flight.pop(receipt.id)
                    if _went_out(receipt):
                        gone_out.append((mark, receipt.id))
        return gone_out

    async def _receipt(self, id: str, timeout_s: float) -> None:
        """Wait until this has ended, or the client is gone."""
        ending = asyncio.ensure_future(self._common.relay.receipt(id, timeout_s))
        leaving = asyncio.ensure_future(self._hurried.wait())
        try:
            await asyncio.wait((ending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in (ending, leaving):
                each.cancel()
            await asyncio.wait((ending, leaving))

    async def _tell_ended(self, bad: _Bad) -> None:
        """Tell a client that may be there or not, and may send again all that is behind."""
        found: list[tuple[int, str]] = []
        for stretch, indices in self._trail.behind(bad.place.position):
            for index in indices:
                batch_id = stretch.batch_id
                went_as = stretch.ids[index] if batch_id is None else batch_id + PLACES[index]
                found.append((stretch.marks[index], went_as))
        self._remember(found)
        self._say(_Answer(bad.status, bad.place.identifier, bad.reason))
        if not self._gone:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GONE_S):
                    await self._hurried.wait()
            self._stream.end()

    def _remember(self, found: Sequence[tuple[int, str]]) -> None:
        common, guest = self._common, self._guest
        assert guest is not None
        whose: Whose = (guest.id, guest.app, guest.environment)
        entries = common.sent.remember(whose, found, common.loop.time())
        if self._stream.ended:
            self._expected = entries

    # -- last words ----------------------------------------------------------------------------------------------

    def _say_last(self, answer: _Answer) -> None:
        """Take nothing more; say this once all that was gathered is stored."""
        if not self._deaf:
            self._deaf = True
            self._answer = answer
            self._wake()

    def _tell(self, answer: _Answer) -> None:
        self._say(answer)
        self._stream.linger(LINGER_S)

    def _say(self, answer: _Answer) -> None:
        self._told = True
        self._common.relay.unwatch(self._trail.open)
        if self._going is not None:
            self._going.cancel()
        identifier: int | None = answer.identifier
        if answer.status == Status.SHUTDOWN:
            identifier = self._last
        if identifier is None:  # nothing of it was taken: there is nothing to say
            return
        self._stream.write(error_packet(answer.status, identifier))
        common, guest = self._common, self._guest
        assert guest is not None
        common.meter.answered(answer.status)
        if common.lines.allow("legacy_error_packet"):
            _log.info(
                "legacy_error_packet",
                connection=self.name,
                app=guest.app,
                environment=guest.environment.value,
                identifier=identifier,
                status=int(answer.status),
                reason=answer.reason,
            )

    def _note_refusal(self, error: NotAdmitted) -> None:
        common = self._common
        common.meter.refused += 1
        if common.lines.allow("legacy_refused"):
            address = self._stream.address
            _log.warning("legacy_refused", listener=common.name, address=address, why=str(error), hint=error.hint)

    def _close_when_done(self) -> None:
        """Close where the client has ended its side, and nothing is left that it could hear of."""
        if not self._stream.ended or self._told or self._gone or self._task is not None:
            return
        if self._trail.over or self._overdue:
            self._told = True
            self._common.relay.unwatch(self._trail.open)
            self._stream.close()

    # -- small things --------------------------------------------------------------------------------------------

    def _take_gathered(self) -> tuple[Frames, int]:
        """What was gathered, and how many octets of the intake it takes up."""
        frames, self._gathered = self._gathered, empty_frames()
        octets, self._octets = self._octets, 0
        self.read_on()
        return frames, octets

    def _forget_gathered(self) -> None:
        _, octets = self._take_gathered()
        self._common.intake.release(octets)

    def read_on(self) -> None:
        """Read from the client again, if nothing speaks against it."""
        if not self._paused or self._gathered or self._gone:
            return
        if self._common.intake.full:
            self._common.intake.wait(self)
            return
        self._paused = False
        if self._unfinished_since is not None:  # it was not the client that was slow
            self._unfinished_since = self._common.loop.time()
        self._stream.resume()

    def _header_sets(self, guest: Guest) -> HeaderSets:
        app = self._common.apps.get(guest.app)
        if self._sets is None or app is not self._app:
            self._app = app
            topics = () if app is None else app.topics
            # With several topics none is guessed, and admission says that it is missing.
            topic = guest.topic or (topics[0] if len(topics) == 1 else "")
            self._sets = HeaderSets(topic, topics)
        return self._sets

    def _origin(self, identifiers: Sequence[int]) -> Origin:
        if not any(identifiers):
            return Origin(self.name)
        return Origin(self.name, _big_endian(identifiers))


def _big_endian(identifiers: Sequence[int]) -> bytes:
    packed = array("I", identifiers)
    if _LITTLE:
        packed.byteswap()
    return packed.tobytes()


_LITTLE = array("I", (1,)).tobytes()[0] == 1


def _status_at_once(reason: str) -> int:
    """The status of what admission refuses: for our own words 1, and for a dead token what the frame is told of."""
    row = reasons.TABLE.get(reason)
    if row is None:
        return Status.PROCESSING_ERROR
    return Status.INVALID_TOKEN if row.legacy_status is None else row.legacy_status


def _went_out(receipt: Receipt) -> bool:
    """Whether Apple has it, or has said that the token is dead: that is for feedback."""
    if receipt.state is State.REJECTED:
        return reasons.find(receipt.reason, receipt.status).legacy_status is None
    return receipt.state is State.ACCEPTED
