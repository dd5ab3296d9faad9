"""One connection to Apple: turns what the core tells into reports, a group at a time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Protocol

from heliograph.model import ACCEPTED, Outcome
from heliograph.model import NotProcessed as CertainlyNot
from heliograph.model import Unknown as Perhaps
from heliograph.net.http2 import Link
from heliograph.protocols import apns
from heliograph.protocols.http2 import (
    Accepted,
    Answered,
    ClientConnection,
    Event,
    Failed,
    GoAway,
    NotProcessed,
    Requests,
    Unknown,
)

NEW_S = 2.0
"""How long a connection counts as new at most: several round trips to anywhere."""


class Owner(Protocol):
    """Who a connection belongs to."""

    def settle(self, keys: list[int], outcome: Outcome) -> None: ...

    def pump(self) -> None: ...

    def lost(self, connection: Connection) -> None: ...


class Connection:
    """A session of `net.http2` on behalf of a pool."""

    def __init__(self, link: Link[ClientConnection], owner: Owner, clock: Callable[[], float]) -> None:
        self._link = link
        self._core = link.core
        self._owner = owner
        self._clock = clock
        self._opened_at = clock()
        self.answered = False
        """Whether it ever brought an answer."""
        self.goodbye: str | None = None
        """Apple's reason for its GOAWAY, or for the end of the connection."""

    @property
    def usable(self) -> bool:
        return self._core.usable

    @property
    def new(self) -> bool:
        """Nothing was answered yet, so Apple may still allow one stream only; but not for ever."""
        return not self.answered and self._clock() < self._opened_at + NEW_S

    @property
    def open_streams(self) -> int:
        return self._core.open_streams

    @property
    def capacity(self) -> int:
        return self._core.capacity if self._link.writable else 0

    def submit(self, requests: Requests) -> int:
        taken = self._core.submit(requests, self._clock())
        if taken:
            self._link.flush()
        return taken

    def finish(self) -> None:
        """Say GOAWAY, let what is open be answered, close."""
        self._core.goodbye()
        self._link.finish()

    @property
    def closed(self) -> asyncio.Future[None]:
        return self._link.closed

    # -- net.http2 calls these -----------------------------------------------------------------------------------

    def on_events(self, events: Sequence[Event]) -> None:
        settle = self._owner.settle
        for event in events:
            if isinstance(event, Accepted):
                self.answered = True
                settle(event.keys, ACCEPTED)
            elif isinstance(event, Answered):
                self.answered = True
                settle([event.key], apns.answer(event.status, event.fields, event.body))
            elif isinstance(event, NotProcessed):
                settle(event.keys, CertainlyNot(self.goodbye or event.why))
            elif isinstance(event, Unknown):
                settle(event.keys, Perhaps(event.why))
            elif isinstance(event, GoAway):
                self.goodbye = _goaway_reason(event)
                self._link.finish()
            elif isinstance(event, Failed):
                self.goodbye = self.goodbye or event.why
        self._owner.pump()

    def on_writable(self) -> None:
        self._owner.pump()

    def on_close(self) -> None:
        self._owner.lost(self)


def _goaway_reason(event: GoAway) -> str:
    """Apple's word from the debug data (Apple, "Sending notification requests to APNs"), or the error code."""
    try:
        reason = json.loads(event.debug)["reason"]
    except (ValueError, TypeError, KeyError, RecursionError):
        reason = None
    return f"GOAWAY {reason}" if isinstance(reason, str) and reason.isalnum() else f"GOAWAY {event.code}"
