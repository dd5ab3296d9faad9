"""One connection of the gateway for old scripts: takes frames in, hears what becomes of them, says the last words."""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections.abc import Mapping, Sequence

import structlog
from msgspec import Struct

from heliograph import reasons
from heliograph.doors.legacy.admittance import Guest, NotAdmitted
from heliograph.doors.legacy.columns import HeaderSets, append, empty_frames, pick
from heliograph.doors.legacy.common import Common
from heliograph.doors.legacy.trail import Entry, Stretch, Trail, Whose, marks
from heliograph.doors.receipts import SENT_BEFORE
from heliograph.errors import Overloaded, StoreError
from heliograph.model import MAX_BATCH, App, Batch, Origin, Receipt, State
from heliograph.net.streams import Stream
from heliograph.protocols.binary import FrameReader, Frames, Status, error_packet

MOST_FRAMES = 500
"""Of one connection that were read while others are being stored. With more, it is not read from."""
LINGER_S = 30.0
"""How long what a client still writes is thrown away after an error packet, so that it can read that."""
UNFINISHED_S = 60.0
"""How long a frame may take to arrive."""
ENDED_S = 5.0
"""How long Apple's answers are waited for where the client has ended its side."""
IN_FLIGHT_S = 3.0
"""How long Apple's answers to what was on the wire behind a bad frame are waited for before the client hears of it. Old
clients wait for seconds at most."""
GONE_S = 0.5
"""How long the machine of a client that is gone may take to say so."""

_NOT_ENDED = (State.QUEUED, State.SENT)
_log = structlog.get_logger("heliograph.legacy")


class _Answer(Struct, frozen=True):
    """The last words to a client."""

    status: int
    identifier: int
    reason: str


class _Bad(Struct, frozen=True):
    """A frame that Apple said no to."""

    position: int
    answer: _Answer


_SHUTDOWN = _Answer(Status.SHUTDOWN, 0, "Shutdown")


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
            self._say_last(_Answer(error.status, error.identifier, _word(error.status)))
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
            if place is not None and (self._bad is None or place.position < self._bad.position):
                self._bad = _Bad(place.position, _Answer(status, place.identifier, reason))
                self._trail.freeze()
                self._wake()

    def ended(self, batch_id: str) -> None:
        self._trail.end(batch_id)
        self._close_when_done()

    # -- for the gateway -----------------------------------------------------------------------------------------

    def shut(self) -> None:
        """Take nothing more, and say what was taken."""
        self._hurried.set()
        self._say_last(_SHUTDOWN)

    def too_slow(self, now: float) -> bool:
        """Whether a frame of its takes too long to arrive."""
        since = self._unfinished_since
        return since is not None and not self._paused and not self._deaf and now >= since + UNFINISHED_S

    def shed(self) -> None:
        """Close, as the client does not finish what it began."""
        if self._common.lines.allow("legacy_shed", self.name):
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
        except asyncio.CancelledError:  # the server cannot wait any longer
            if not self._told and not self._gone:
                # What is behind a bad frame may be cancelled already.
                self._tell(_SHUTDOWN if self._bad is None else self._bad.answer)
            raise
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
            if known:
                known = await self._without_failed(known)
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
            common.sent.remember(whose, [(each.id, each.mark) for at, each in known.items() if at >= stop], now)
        if answer is not None:
            self._answer, self._deaf = answer, True
            self._forget_gathered()
        if kept := {index: entry for index, entry in known.items() if index < stop}:
            await self._keep_sent_before(frames, first, kept)
        if stop:
            self._last = frames.identifiers[stop - 1]
        return stop

    async def _without_failed(self, known: dict[int, Entry]) -> dict[int, Entry]:
        """Without those that did not go out after all: cancelled, refused, given up on. Raises StoreError."""
        receipts = await self._common.relay.receipts([entry.id for entry in known.values()])
        return {
            index: entry for (index, entry), receipt in zip(known.items(), receipts, strict=True) if _goes_out(receipt)
        }

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
        if guest.app in common.apps:
            await self._keep(pick(frames, [taken]), State.REJECTED, reason, [begun.refused.detail])
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

    async def _keep_sent_before(self, frames: Frames, first: int, known: Mapping[int, Entry]) -> None:
        """Have it known that these are not sent, as they were before."""
        those = pick(frames, list(known))
        ids = [entry.id for entry in known.values()]
        if not self._gone:
            mine = array("q", [entry.mark for entry in known.values()])
            positions = [first + index for index in known]
            at = self._common.loop.time()
            self._trail.add(Stretch(None, positions, array("I", those.identifiers), mine, at, ids))
        whys = [f"it was sent as {each}, and again by the client after an error packet" for each in ids]
        await self._keep(those, State.CANCELLED, SENT_BEFORE, whys)

    async def _keep(self, frames: Frames, state: State, reason: str, whys: Sequence[str]) -> None:
        """Have it known what became of frames that are not sent."""
        common, guest = self._common, self._guest
        assert guest is not None
        headers = self._header_sets(guest).column(frames, common.clock())
        origin = self._origin(frames.identifiers)
        try:
            await common.relay.keep(
                guest.app, guest.environment, headers, frames.tokens, origin, state=state, reason=reason, whys=whys
            )
        except StoreError as error:  # nothing hangs on it: only, nobody can look for them
            _log.error("cannot_keep", connection=self.name, count=len(frames), why=str(error))

    # -- a late no -----------------------------------------------------------------------------------------------

    async def _tell_late(self, bad: _Bad) -> None:
        """Have nothing sent that is behind a bad frame, remember what was, then tell the client."""
        self._deaf = True
        self._forget_gathered()
        until = self._common.loop.time() + IN_FLIGHT_S
        while True:
            behind = self._trail.behind(bad.position)
            try:
                await self._cancel(behind, until)
            except StoreError as error:  # what is not cancelled goes out by itself, and is known again
                _log.error("cannot_cancel", connection=self.name, why=str(error))
            if self._gone:
                return
            assert self._bad is not None
            if self._bad is bad:
                break
            bad = self._bad
        self._remember(behind)
        self._tell(bad.answer)

    async def _cancel(self, behind: dict[str, int], until: float) -> None:
        """Have these not sent any more, and take from `behind` those that are not.

        Returns when Apple has answered to what was on the wire, or it is late. Raises StoreError.
        """
        relay, loop = self._common.relay, self._common.loop
        ids, in_flight = list(behind), []
        for start in range(0, len(ids), MAX_BATCH):
            if self._gone:
                return
            some = ids[start : start + MAX_BATCH]
            for each, receipt in zip(some, await relay.cancel(some), strict=True):
                if receipt is not None and receipt.cancelling:
                    in_flight.append(each)
                elif not _goes_out(receipt):
                    del behind[each]
        while in_flight and not self._hurried.is_set() and (left := until - loop.time()) > 0:
            await self._receipt(in_flight[0], left)
            receipts = await relay.receipts(in_flight)
            in_flight = [each.id for each in receipts if each is not None and each.cancelling]

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
        self._remember(self._trail.behind(bad.position))
        self._say(bad.answer)
        if not self._gone:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GONE_S):
                    await self._hurried.wait()
            if not self._stream.broken:  # what is reset from here on has read the packet
                self._expected = []
            self._stream.end()

    def _remember(self, behind: Mapping[str, int]) -> None:
        """Have these known again; whether they did go out is looked up then."""
        common, guest = self._common, self._guest
        assert guest is not None
        whose: Whose = (guest.id, guest.app, guest.environment)
        entries = common.sent.remember(whose, behind.items(), common.loop.time())
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
        if common.lines.allow("legacy_error_packet", self.name):
            settings, limits = common.settings, {}
            if answer.reason == _TOO_LONG:
                limits = {"max_payload": settings.max_payload, "max_item_payload": settings.max_item_payload}
            _log.info(
                "legacy_error_packet",
                connection=self.name,
                app=guest.app,
                environment=guest.environment.value,
                identifier=identifier,
                status=int(answer.status),
                reason=answer.reason,
                **limits,
            )

    def _note_refusal(self, error: NotAdmitted) -> None:
        common = self._common
        common.meter.refused += 1
        address = self._stream.address
        if common.lines.allow("legacy_refused", address):
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


def _word(status: int) -> str:
    """Of a `Status`, in the form of Apple's reasons: InvalidPayloadSize."""
    return Status(status).name.title().replace("_", "")


_TOO_LONG = _word(Status.INVALID_PAYLOAD_SIZE)


def _status_at_once(reason: str) -> int:
    """The status of what admission refuses: for our own words 1, and for a dead token what the frame is told of."""
    row = reasons.TABLE.get(reason)
    if row is None:
        return Status.PROCESSING_ERROR
    return Status.INVALID_TOKEN if row.legacy_status is None else row.legacy_status


def _goes_out(receipt: Receipt | None) -> bool:
    """Whether Apple has it, or gets it, or has said that the token is dead: that is for feedback."""
    if receipt is None:
        return False
    if receipt.state is State.REJECTED:
        return reasons.find(receipt.reason, receipt.status).legacy_status is None
    return receipt.state is State.ACCEPTED or (receipt.state in _NOT_ENDED and not receipt.cancelling)
