"""One connection to the binary gateway that the simulator plays: frames in, and nothing out while all is well.

A frame stands for a request of the modern kind, with a client certificate for the simulator's topic, and is judged as
such; then it is said as the gateway said it (Apple, "Binary Provider API"; "Legacy Notification Format"). A device
token whose app is gone is taken in silence and told by the feedback service. Anything else that is wrong with a frame
draws an error packet and the end of the connection: what came before it is taken, what is behind it is not.

- A priority of 10 for a payload that has `content-available` and nothing to show or play is an error, as Apple's page
  says; which, it does not say. Commands 0 and 1 name no priority, and are not held to that.
- The push type is that of the topic's suffix, else background for such a payload, else alert: the protocol has none.
- When the simulator ends it says status 10 with the identifier of the last frame that was taken.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from msgspec import Struct

from heliograph import reasons
from heliograph.net.streams import Stream
from heliograph.protocols import apns
from heliograph.protocols.binary import FrameReader, Status, error_packet
from heliograph.protocols.http2 import Field, Request
from heliograph.simulator.apple import Verdict, Visit
from heliograph.simulator.faults import (
    Action,
    Answer,
    Close,
    Cut,
    Delay,
    ErrorPacket,
    Immediate,
    Setup,
    StopReading,
    Trickle,
)
from heliograph.simulator.journal import Journal, Judged, line_of

if TYPE_CHECKING:
    from heliograph.simulator.server import Simulator

LINGER_S = 10.0
"""How long a client that is still writing may take to read why we close."""

_RECORD_OCTETS = 16_000
"""At most, of one TLS record."""


class Voice:
    """Says things on a stream; in pieces, where a rule wants that."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.manner: Trickle | None = None
        self._timer: asyncio.TimerHandle | None = None

    def say(self, octets: bytes, then: Callable[[], None]) -> None:
        """These, and then call this. To be called once only."""
        if self.manner is None:
            for at in range(0, len(octets), _RECORD_OCTETS):
                self._stream.write(octets[at : at + _RECORD_OCTETS])
            then()
        else:
            self._say_piece(self.manner, octets, then)

    def _say_piece(self, manner: Trickle, octets: bytes, then: Callable[[], None]) -> None:
        size = min(manner.octets, _RECORD_OCTETS)
        if octets:
            self._stream.write(octets[:size])
        if len(octets) <= size:
            then()
        else:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(manner.seconds, self._say_piece, manner, octets[size:], then)

    def fall_silent(self) -> None:
        """Say nothing more."""
        if self._timer is not None:
            self._timer.cancel()


class _Arrived(Struct, frozen=True):
    """A frame that waits for its turn."""

    request: Request
    """What it stands for; of a bad frame only its place."""
    identifier: int
    bad: int | None
    """The status that the codec has for it; None: it is sound."""
    at: float
    """Loop time."""


class GatewaySession:
    """One connection: hands frames to Apple, and does what the faults say."""

    def __init__(
        self,
        apple: Simulator,
        stream: Stream,
        visit: Visit,
        topic: bytes,
        reader: FrameReader,
        number: int,
        journal: Journal | None,
        opening: Action | None,
        *,
        left: Callable[[GatewaySession], None],
    ) -> None:
        """`topic`: what frames are for. `left` is called when the connection is gone."""
        self._apple = apple
        self._stream = stream
        self._visit = visit
        self._topic = topic
        self._reader = reader
        self._number = number
        self._journal = journal
        self._opening = opening
        self._left = left
        self._voice = Voice(stream)
        self._frames = 0
        self._taken = 0
        """The identifier of the last frame that was taken."""
        self._arrived: deque[_Arrived] = deque()
        self._lines: list[Judged] = []
        self._over = False
        """Nothing more is taken."""
        self._ended = False
        """The client is done."""
        self._waits = False
        """A rule has the frames wait: the first is delayed."""
        self._unread = False
        """A rule has us read nothing more, nor look at what was read already."""
        self._timer: asyncio.TimerHandle | None = None
        self._reading_on: asyncio.TimerHandle | None = None

    # -- the stream calls these ----------------------------------------------------------------------------------

    def on_open(self) -> None:
        action = self._opening
        if isinstance(action, Close):
            self._over = True
            self._stream.close()
        elif isinstance(action, Cut):
            self._over = True
            self._stream.reset()
        elif isinstance(action, ErrorPacket):
            self._refuse(action.status, action.identifier or 0)
        elif isinstance(action, Setup):
            self._set_up(action)

    def on_data(self, data: bytes) -> None:
        if self._over:
            return
        frames, error = self._reader.receive(data)
        at = asyncio.get_running_loop().time()
        for token, payload, identifier, expiration, priority in zip(
            frames.tokens, frames.payloads, frames.identifiers, frames.expirations, frames.priorities, strict=True
        ):
            self._frames += 1
            fields = as_fields(self._topic, token, payload, expiration, priority)
            self._arrived.append(_Arrived(Request(self._frames, fields, payload), identifier, None, at))
        if error is not None:
            self._frames += 1
            self._arrived.append(_Arrived(Request(self._frames, [], b""), error.identifier, error.status, at))
        self._go_on()

    def on_end(self) -> None:
        self._ended = True
        self._go_on()

    def on_close(self, error: Exception | None) -> None:  # noqa: ARG002 - they may go as they like
        self._over = True
        self._arrived.clear()
        self._voice.fall_silent()
        for timer in (self._timer, self._reading_on):
            if timer is not None:
                timer.cancel()
        self._left(self)

    # -- the door calls this -------------------------------------------------------------------------------------

    def shut_down(self) -> None:
        """Say that the gateway goes away, and how far it came."""
        if not self._over:
            self._refuse(Status.SHUTDOWN, self._taken)

    # -- inside --------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Treat what has arrived, as far as no rule holds it up."""
        apple, now = self._apple, time.time()
        special = apple.misbehaving
        while self._arrived and not (self._over or self._waits or self._unread):
            frame = self._arrived.popleft()
            action = None
            if special:
                token = b"" if frame.bad is not None else _token_of(frame.request)
                action = apple.find_fault(token, self._topic, self._number, frame.request.stream_id, now, "legacy")
            if isinstance(action, Setup):
                self._set_up(action)
                action = action.then
            if isinstance(action, Delay):
                self._delay(frame, action)
            else:
                assert action is None or isinstance(action, Immediate)
                self._treat(frame, action, now)
        self._write_lines()
        if self._ended and not (self._over or self._arrived or self._waits):
            self._over = True
            self._stream.close()

    def _delay(self, frame: _Arrived, delay: Delay) -> None:
        loop = asyncio.get_running_loop()
        due = frame.at + delay.seconds
        if due > loop.time():
            self._waits = True
            self._timer = loop.call_at(due, self._release, frame, delay.then)
        else:
            self._treat(frame, delay.then, time.time())

    def _release(self, frame: _Arrived, action: Immediate | None) -> None:
        self._waits = False
        if not self._over:
            self._treat(frame, action, time.time())
            self._go_on()

    def _set_up(self, action: Setup) -> None:
        """Do what lasts."""
        if isinstance(action, Trickle):
            self._voice.manner = action
        elif isinstance(action, StopReading):
            self._unread = True
            self._stream.pause()
            if self._reading_on is not None:
                self._reading_on.cancel()
            if action.seconds is not None:
                self._reading_on = asyncio.get_running_loop().call_later(action.seconds, self._read_on)

    def _read_on(self) -> None:
        self._unread = False
        self._stream.resume()
        self._go_on()

    def _treat(self, frame: _Arrived, action: Immediate | None, now: float) -> None:
        """Do with a frame what `action` says, now."""
        if isinstance(action, Close):
            self._note(frame, now, None, "closed", None)
            self._over = True
            self._write_lines()
            self._stream.close()
        elif isinstance(action, ErrorPacket):
            self._note(frame, now, None, "error-packet", action.status)
            of_last = action.status == Status.SHUTDOWN
            identifier = self._taken if of_last else frame.identifier
            self._refuse(action.status, identifier if action.identifier is None else action.identifier)
        elif frame.bad is not None and not isinstance(action, Cut):
            self._note(frame, now, None, None, frame.bad)
            self._refuse(frame.bad, frame.identifier)
        else:
            self._take(frame, action, now)

    def _take(self, frame: _Arrived, action: Immediate | None, now: float) -> None:
        verdict = status = None
        if frame.bad is None:
            instead = action if isinstance(action, Answer) else None
            request = frame.request
            verdict = self._apple.judge(self._visit, request.fields, request.body, now, instead, frame.identifier)
            status = status_for(verdict)
            if verdict.status == 410:
                since = int(now) if verdict.since is None else verdict.since // 1000
                self._apple.add_feedback((_token_of(request).decode(),), since)
        if isinstance(action, Cut):
            self._note(frame, now, verdict, "cut", None)
            self._over = True
            self._write_lines()
            self._stream.reset()
            return
        self._note(frame, now, verdict, None, status)
        if status is None:
            self._taken = frame.identifier
        else:
            self._refuse(status, frame.identifier)

    def _refuse(self, status: int, identifier: int) -> None:
        self._over = True
        self._arrived.clear()
        self._write_lines()
        self._voice.say(error_packet(status, identifier), lambda: self._stream.linger(LINGER_S))

    def _note(
        self, frame: _Arrived, now: float, verdict: Verdict | None, fault: str | None, status: int | None
    ) -> None:
        if self._journal is not None:
            line = line_of(now, self._number, frame.request, verdict, fault, status, frame.identifier)
            self._lines.append(line)

    def _write_lines(self) -> None:
        if self._journal is not None and self._lines:
            self._journal.write(self._lines)
            self._lines = []


def as_fields(topic: bytes, token: bytes, payload: bytes, expiration: int | None, priority: int | None) -> list[Field]:
    """The request that a frame stands for."""
    fields: list[Field] = [(b":method", b"POST"), (b":path", apns.PATH_PREFIX + token), (b"apns-topic", topic)]
    if expiration is not None:
        fields.append((b"apns-expiration", b"%d" % expiration))
    if priority is not None:
        fields.append((b"apns-priority", b"%d" % priority))
    if apns.is_background(payload):
        fields.append((b"apns-push-type", b"background"))
    return fields


def status_for(verdict: Verdict) -> int | None:
    """The status of the error packet that an answer comes to; None: the gateway keeps silent."""
    if verdict.status in (200, 410):
        return None
    known = reasons.TABLE.get(verdict.reason or "")
    return Status.PROCESSING_ERROR if known is None or known.legacy_status is None else known.legacy_status


def _token_of(request: Request) -> bytes:
    return request.fields[1][1][len(apns.PATH_PREFIX) :]
