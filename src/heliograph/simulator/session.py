"""One connection to the simulator: what Apple's judgement and the faults make of it.

All requests that one read brings are judged together and answered in one write; delayed answers share one timer.

A connection may open one stream at a time until a good provider token came, then a thousand (Apple, "Sending
notification requests to APNs"); with a client certificate a thousand at once. After a rejection (4xx, but not 410) it
is one again until the next 200: Apple says that it may lower the limit ("Handling notification responses from APNs"),
and this is what was seen (lionheart/openradar-mirror, issue 15649; jchambers/pushy, issue 732).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from heapq import heappop, heappush
from math import inf
from typing import TYPE_CHECKING

import msgspec
from cryptography.x509 import load_der_x509_certificate

from heliograph import reasons
from heliograph.net.http2 import Link
from heliograph.protocols import apns, http2
from heliograph.protocols.certificate import Particulars, particulars
from heliograph.protocols.http2 import Cancelled, Event, Field, Request, ServerConnection
from heliograph.simulator.apple import Verdict, Visit, addressed_to
from heliograph.simulator.connection import AppleConnection
from heliograph.simulator.faults import (
    Action,
    Answer,
    Close,
    Cut,
    Delay,
    GoAway,
    Handshake,
    HoldWindows,
    Immediate,
    Reset,
    Setup,
    StopReading,
    StreamLimit,
    Trickle,
    Withhold,
)
from heliograph.simulator.journal import Journal, Judged, line_of

if TYPE_CHECKING:
    from heliograph.simulator.server import Simulator


class Session:
    """One connection: hands requests to Apple, and does what the faults say."""

    def __init__(
        self,
        apple: Simulator,
        link: Link[ServerConnection],
        number: int,
        journal: Journal | None,
        opening: Action | None,
    ) -> None:
        self._apple = apple
        self._journal = journal
        self._link = link
        self._core = link.core
        self._number = number
        self._visit = Visit()
        self._steered = False
        """A rule sets the stream limit."""
        self._rejected = False
        """The last answer that says so was a no."""
        self._allowed = apple.first_streams
        """The stream limit that the client was told last."""
        self._acted = 0
        """The highest stream that was acted on."""
        self._last_served: int | None = None
        """After a GOAWAY that named one: the last stream that is acted on."""
        self._leaving = False
        """We said GOAWAY."""
        self._closed = False
        self._waiting: list[tuple[float, int, list[Request], Immediate | None]] = []
        """Delayed requests as a heap: loop time, a number that keeps their order, what to do with them."""
        self._waits = 0
        self._cancelled: set[int] = set()
        """Streams that were cancelled while requests were waiting."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        """Loop time. A handle does not tell it everywhere: uvloop gives a plain one for what is due at once."""
        self._unread: list[Event] | None = None
        """Nothing is read any more: what had been, after the request that ordered this."""
        self._reading_on: asyncio.TimerHandle | None = None
        self._speaking: asyncio.TimerHandle | None = None
        certificate = link.peer_certificate
        if certificate is not None:
            self._receive(particulars(load_der_x509_certificate(certificate)))
        if opening is not None:
            self._open(opening)

    def _receive(self, shown: Particulars) -> None:
        """The client showed a certificate: there is no need to wait for a provider token, and none is looked at."""
        if self._apple.environment not in shown.environments:
            no = reasons.BAD_CERTIFICATE_ENVIRONMENT if shown.environments else reasons.BAD_CERTIFICATE
            self._core.goaway(0, apns.answer_body(no.word), 0)
            self._leaving = True
            self._last_served = 0
            return
        self._visit.certificate = shown
        self._allow(self._apple.streams)

    def _open(self, action: Action) -> None:
        """Do what a rule has for the whole connection. It has no requests yet."""
        loop = asyncio.get_running_loop()
        if isinstance(action, GoAway):  # it is closed once the client has spoken: a close might overtake the words
            self._say_goodbye(action, 0)
        elif isinstance(action, Close):
            loop.call_soon(self._link.close)
        elif isinstance(action, Cut):
            loop.call_soon(self._link.abort)
        elif isinstance(action, Setup):
            self._set_up(action)

    # -- the link calls these ------------------------------------------------------------------------------------

    def on_events(self, events: Sequence[Event]) -> None:
        apple, judge, visit = self._apple, self._apple.judge, self._visit
        if self._unread is not None:
            self._unread.extend(events)
            return
        now = time.time()
        answers: list[http2.Answer] = []
        special = apple.misbehaving or self._journal is not None or self._last_served is not None
        lines: list[Judged] = []
        delayed: dict[Delay, list[Request]] = {}
        for place, event in enumerate(events):
            if self._closed:
                return
            if type(event) is Request:
                if not special:
                    answers.append(_answer(event.stream_id, judge(visit, event.fields, event.body, now)))
                    continue
                action = apple.find_fault(*addressed_to(event.fields), self._number, event.stream_id, now)
                if isinstance(action, Setup):
                    self._set_up(action)
                    action = action.then
                if isinstance(action, Delay):
                    delayed.setdefault(action, []).append(event)
                else:
                    assert not isinstance(action, Handshake)
                    self._treat(event, action, now, answers, lines)
                if self._unread is not None:
                    self._unread.extend(events[place + 1 :])
                    break
            elif type(event) is Cancelled and (self._waiting or delayed):
                self._cancelled.add(event.stream_id)
        for delay, requests in delayed.items():
            self._wait(delay, requests)
        if answers:
            self._acted = max(self._acted, answers[-1].stream_id)
        self._answer(answers, lines)

    def on_writable(self) -> None:
        """Answers are small: nothing waits for this."""

    def on_close(self) -> None:
        self._closed = True
        self._waiting.clear()
        for timer in (self._timer, self._reading_on, self._speaking):
            if timer is not None:
                timer.cancel()

    # -- inside --------------------------------------------------------------------------------------------------

    def _set_up(self, action: Setup) -> None:
        """Do what lasts."""
        if isinstance(action, StreamLimit):
            self._steered = True
            self._allow(action.count)
        elif isinstance(action, StopReading):
            if self._unread is None:
                self._unread = []
                self._link.stop_reading()
                # Of a request that is in half it must not find out that it takes too long.
                self._core.limits = msgspec.structs.replace(self._core.limits, message_s=inf)
            if self._reading_on is not None:
                self._reading_on.cancel()
            if action.seconds is not None:
                self._reading_on = asyncio.get_running_loop().call_later(action.seconds, self._read_on)
        elif not isinstance(self._core, AppleConnection):
            raise TypeError("this needs a connection of the simulator's own")
        elif isinstance(action, HoldWindows):
            self._core.hold_windows(action.octets)
        else:
            self._core.speak_in_pieces()
            if self._speaking is not None:
                self._speaking.cancel()
            self._say_more(self._core, action)

    def _read_on(self) -> None:
        unread, self._unread = self._unread, None
        if unread and not self._closed:
            self.on_events(unread)
            self._link.flush()
        if self._unread is None:
            self._link.read_on()

    def _say_more(self, core: AppleConnection, how: Trickle) -> None:
        core.say_more(how.octets)
        self._link.flush()
        self._speaking = asyncio.get_running_loop().call_later(how.seconds, self._say_more, core, how)

    def _treat(
        self, request: Request, action: Immediate | None, now: float, answers: list[http2.Answer], lines: list[Judged]
    ) -> None:
        """Do with a request what `action` says, now; adds to `answers` and `lines`."""
        stream_id = request.stream_id
        if isinstance(action, GoAway):
            self._say_goodbye(action, stream_id)
        if self._last_served is not None and stream_id > self._last_served:
            return
        verdict: Verdict | None = None
        fault = _FAULTS.get(type(action))
        if not (isinstance(action, Close) or (isinstance(action, Reset) and not action.acted)):
            instead = action if isinstance(action, Answer) else None
            verdict = self._apple.judge(self._visit, request.fields, request.body, now, instead)
            self._acted = max(self._acted, stream_id)
        if self._journal is not None:
            code = action.code if isinstance(action, Reset) else None
            lines.append(line_of(now, self._number, request, verdict, fault, code))
        if fault is None:
            assert verdict is not None
            answers.append(_answer(stream_id, verdict))
        elif isinstance(action, Reset):
            self._core.reset((stream_id,), action.code)
        elif isinstance(action, Close | Cut):
            self._answer(answers, lines)
            self._closed = True
            if isinstance(action, Close):
                self._link.close()
            else:
                self._link.abort()

    def _say_goodbye(self, action: GoAway, stream_id: int) -> None:
        last = action.last_stream_id
        if not stream_id:
            last = last or 0
        elif action.newest:
            last = max(self._acted, stream_id - 2 * action.newest)
        self._core.goaway(action.code, b"" if action.reason is None else apns.answer_body(action.reason), last)
        self._leaving = True
        if last is not None:
            self._last_served = last if self._last_served is None else min(last, self._last_served)

    def _allow(self, streams: int) -> None:
        if streams != self._allowed and not self._core.over:
            self._allowed = streams
            self._core.set_max_streams(streams)

    def _answer(self, answers: list[http2.Answer], lines: list[Judged]) -> None:
        if self._closed:
            return
        if self._journal is not None and lines:
            self._journal.write(lines)
        self._core.respond(answers)
        if not self._steered:
            self._adjust_limit(answers)
        if self._leaving and not self._core.open_streams:
            self._closed = True
            self._link.close()

    def _adjust_limit(self, answers: Sequence[http2.Answer]) -> None:
        for answer in reversed(answers):
            if answer.status == 200:
                self._rejected = False
                break
            if 400 <= answer.status < 500 and answer.status != 410:
                self._rejected = self._apple.cuts_limit
                break
        trusted = self._visit.key_id is not None or self._visit.certificate is not None
        self._allow(self._apple.streams if trusted and not self._rejected else self._apple.first_streams)

    def _wait(self, delay: Delay, requests: list[Request]) -> None:
        self._waits += 1
        due = asyncio.get_running_loop().time() + delay.seconds
        heappush(self._waiting, (due, self._waits, requests, delay.then))
        self._set_timer()

    def _set_timer(self) -> None:
        due = self._waiting[0][0]
        if self._timer is not None:
            if self._timer_due <= due:
                return
            self._timer.cancel()
        self._timer_due = due
        self._timer = asyncio.get_running_loop().call_at(due, self._release)

    def _release(self) -> None:
        """Treat what is due."""
        self._timer = None
        now, until = time.time(), asyncio.get_running_loop().time()
        answers: list[http2.Answer] = []
        lines: list[Judged] = []
        while self._waiting and self._waiting[0][0] <= until:
            _, _, requests, action = heappop(self._waiting)
            for request in requests:
                if request.stream_id in self._cancelled:
                    continue
                self._treat(request, action, now, answers, lines)
                if self._closed:
                    return
        self._answer(answers, lines)
        self._link.flush()
        if self._waiting:
            self._set_timer()
        else:
            self._cancelled.clear()


_FAULTS: dict[type, str] = {Withhold: "withheld", Reset: "reset", Close: "closed", Cut: "cut"}
"""What the journal calls those that leave a request without an answer."""


def _answer(stream_id: int, verdict: Verdict) -> http2.Answer:
    if verdict.reason is None and verdict.unique_id is None:
        return http2.Answer(stream_id, verdict.status, ((b"apns-id", verdict.apns_id),))
    fields: list[Field] = [(b"apns-id", verdict.apns_id)]
    if verdict.unique_id is not None:
        fields.append((b"apns-unique-id", verdict.unique_id))
    if verdict.reason is None:
        return http2.Answer(stream_id, verdict.status, tuple(fields))
    fields.append((b"content-type", b"application/json"))
    if verdict.retry_after_s is not None:
        fields.append((b"retry-after", b"%d" % verdict.retry_after_s))
    return http2.Answer(stream_id, verdict.status, tuple(fields), apns.answer_body(verdict.reason, verdict.since))
