"""One connection to Apple: turns what the core tells into reports, a group at a time."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from typing import Protocol

from heliograph import crash, reasons
from heliograph.carriers.apns.credentials import Authorization
from heliograph.model import ACCEPTED, Outcome
from heliograph.model import Answered as Answer
from heliograph.model import NotProcessed as CertainlyNot
from heliograph.model import Unknown as Perhaps
from heliograph.net.http2 import Link
from heliograph.protocols import apns
from heliograph.protocols.http2 import (
    Accepted,
    Answered,
    ClientConnection,
    ErrorCode,
    Event,
    Failed,
    GoAway,
    NotProcessed,
    Requests,
    SettingsChanged,
    Unknown,
)
from heliograph.reasons import FollowUp, Reason

NEW_S = 2.0
"""How long a connection counts as new at most: several round trips to anywhere."""

_MAY_CRASH = crash.VARIABLE in os.environ


class Owner(Protocol):
    """Who a connection belongs to."""

    def settle(self, keys: list[int], outcome: Outcome) -> None: ...

    def refused(self, connection: Connection, reason: Reason) -> None:
        """Apple's no that is about the connection or its credentials, before it is settled."""
        ...

    def proved(self) -> None:
        """A connection brought its first answer that does not speak against it."""
        ...

    def pump(self) -> None: ...

    def lost(self, connection: Connection) -> None: ...


class Connection:
    """A session of `net.http2` on behalf of a pool."""

    def __init__(self, link: Link[ClientConnection], owner: Owner, loop: asyncio.AbstractEventLoop) -> None:
        self._link = link
        self._core = link.core
        self._owner = owner
        self._loop = loop
        self._clock = loop.time
        self._opened_at = self.used_at = self._clock()
        """`used_at`: when it was last given a request."""
        self.greeted: asyncio.Future[bool] = loop.create_future()
        """Whether the server's first SETTINGS came, once that is known."""
        self.answered = False
        """Whether it ever brought an answer that does not speak against it."""
        self.dismissed = False
        """We ended it, for no fault of the server's."""
        self.authorization: Authorization | None = None
        """What its requests carry; None before the first, and with a client certificate."""
        self.authorized_at = 0.0
        """Since when."""
        self._goodbye: str | None = None
        self.end = "closed"
        """Why it ended, as a word out of a small set: our own reason for ending it, GOAWAY with Apple's known reasons,
        reset, silent, protocol error, closed."""

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

    @property
    def goodbye(self) -> str:
        """Why it ended, or Apple's reason for its GOAWAY."""
        return self._goodbye or "without a word"

    def submit(self, requests: Requests) -> int:
        self.used_at = self._clock()
        taken = self._core.submit(requests, self.used_at)
        if taken:
            self._link.flush()
            if _MAY_CRASH:  # the link writes in the next turn of the loop, and some loops hand that on at its end
                self._loop.call_soon(self._loop.call_soon, crash.point, "sent")
        return taken

    def finish(self, why: str) -> None:
        """Say GOAWAY, let what is open be answered, close. `why` is a word for `end`."""
        self.dismissed = True
        if self._goodbye is None:
            self.end = why
        self._core.goodbye()
        self._link.finish()

    def abort(self) -> None:
        """Close at once."""
        self._link.abort()

    @property
    def closed(self) -> asyncio.Future[None]:
        return self._link.closed

    # -- net.http2 calls these -----------------------------------------------------------------------------------

    def on_events(self, events: Sequence[Event]) -> None:
        settle = self._owner.settle
        answers: dict[Answer, list[int]] = {}
        for event in events:
            if isinstance(event, Accepted):
                if not self.answered:
                    self._prove()
                settle(event.keys, ACCEPTED)
            elif isinstance(event, Answered):
                answers.setdefault(self._read(event), []).append(event.key)
            elif isinstance(event, NotProcessed):
                settle(event.keys, CertainlyNot(self._goodbye or event.why))
            elif isinstance(event, Unknown):
                settle(event.keys, Perhaps(event.why))
            elif isinstance(event, GoAway):
                self._goodbye_from(event)
            elif isinstance(event, Failed):
                self._fail(event)
            elif isinstance(event, SettingsChanged) and not self.greeted.done():
                self.greeted.set_result(True)
        for answer, keys in answers.items():
            settle(keys, answer)
        self._owner.pump()

    def on_writable(self) -> None:
        self._owner.pump()

    def on_close(self) -> None:
        if not self.greeted.done():
            self.greeted.set_result(False)
        self._owner.lost(self)

    # -- inside --------------------------------------------------------------------------------------------------

    def _read(self, event: Answered) -> Answer:
        answer = apns.answer(event.status, event.fields, event.body)
        reason = None if answer.status == 200 else reasons.find(answer.reason, answer.status)
        if reason is not None and speaks_against_us(reason):
            self._owner.refused(self, reason)
        elif not self.answered:
            self._prove()
        return answer

    def _prove(self) -> None:
        self.answered = True
        self._owner.proved()

    def _fail(self, event: Failed) -> None:
        error = self._link.error
        if self._goodbye is None:
            self._goodbye = event.why if error is None else str(error)
            if not self.dismissed:
                ours = "silent" if event.code == ErrorCode.NO_ERROR else "protocol error"
                self.end = "reset" if error is not None else ours if event.ours else "closed"

    def _goodbye_from(self, event: GoAway) -> None:
        word = _goaway_reason(event)
        self._goodbye = f"GOAWAY {word or event.code}"
        reason = None if word is None else reasons.TABLE.get(word)
        if not self.dismissed:
            self.end = "GOAWAY" if reason is None else f"GOAWAY {reason.word}"
        if reason is not None and reason.status == 403:
            self._owner.refused(self, reason)
        self._link.finish()


def speaks_against_us(reason: Reason) -> bool:
    """Whether this no is about the connection or its credentials, and not about the notification."""
    return (
        reason.status == 403
        or reason.follow_up is FollowUp.NEW_CONNECTION
        or reason is reasons.TOO_MANY_PROVIDER_TOKEN_UPDATES
    )


def _goaway_reason(event: GoAway) -> str | None:
    """Apple's word from the debug data (Apple, "Sending notification requests to APNs")."""
    try:
        reason = json.loads(event.debug)["reason"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return reason if isinstance(reason, str) and reason.isalnum() else None
