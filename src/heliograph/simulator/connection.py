"""The server's end of an HTTP/2 connection, with what Apple does and with what connections suffer. Pure."""

from __future__ import annotations

from math import inf

import msgspec

from heliograph import reasons
from heliograph.protocols import apns
from heliograph.protocols.http2 import ErrorCode, Event, Failed, Limits, ServerConnection, frames


class AppleConnection(ServerConnection):
    """Says why it closes when it was idle for too long; can hold windows back and speak in pieces."""

    def __init__(self, now: float, *, max_streams: int, limits: Limits) -> None:
        super().__init__(now, max_streams=max_streams, limits=limits)
        self._told_streams = max_streams
        self._in_pieces = False
        self._unsaid = b""
        """What is to go out in pieces."""
        self._allowance = 0
        """How much of it may go out now, in octets."""

    def tick(self, now: float) -> list[Event]:
        idle_s = self.limits.idle_s
        if (
            idle_s is None
            or now < self._heard + idle_s
            or self._streams
            or not self._settled
            or self._block is not None
            or self.over
        ):
            return super().tick(now)
        self.goaway(ErrorCode.NO_ERROR, apns.answer_body(reasons.IDLE_TIMEOUT.word))
        events: list[Event] = []
        self._end(Failed(ErrorCode.NO_ERROR, "idle for too long", ours=True), events)
        return events

    def set_max_streams(self, count: int) -> None:
        self._told_streams = count
        super().set_max_streams(count)

    def hold_windows(self, octets: int) -> None:
        """Let every stream carry so many octets of a body, and open no window any more, for as long as it takes."""
        self._RECV_WINDOW = 0  # it is opened again below half of this, where it cannot get
        self.limits = msgspec.structs.replace(self.limits, message_s=inf)
        values = {frames.MAX_CONCURRENT_STREAMS: self._told_streams, frames.INITIAL_WINDOW_SIZE: octets}
        self._acks_due.append(values)
        self._out.append(frames.settings(values))

    def speak_in_pieces(self) -> None:
        """From now on, have only as much to send as `say_more` allows, until a GOAWAY or the end."""
        self._in_pieces = True

    def say_more(self, octets: int) -> None:
        """Have so many octets to send, if there are any; what is not needed now is not kept for later."""
        self._allowance = octets

    def goaway(self, code: int = 0, debug: bytes = b"", last_stream_id: int | None = None) -> None:
        self._in_pieces = False
        super().goaway(code, debug, last_stream_id)

    def data_to_send(self) -> bytes:
        if not self._in_pieces and not self._unsaid:
            return super().data_to_send()
        data = self._unsaid + super().data_to_send()
        size = self._allowance if self._in_pieces and not self.over else len(data)
        self._unsaid = data[size:]
        self._allowance = 0
        return data[:size]
