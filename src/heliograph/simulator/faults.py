"""Rules that make the simulator misbehave: which requests, how often, and what becomes of them. Pure.

A rule matches by device token, app, connection, stream, time, count or chance, or everything. The first rule that
matches a request decides; a rule that has been used up is gone.

    apple.rejects(token, "Unregistered", since=1_700_000_000_000)
    apple.delays(0.02)
    apple.resets(token, ErrorCode.INTERNAL_ERROR)
    apple.hangs_up_after(3)
    apple.says_goodbye("Shutdown")
    apple.misbehaves(Delay(1.0, then=Answer(503, "Shutdown", retry_after_s=5)), app="com.example.app", times=2)
    apple.misbehaves(Reset(ErrorCode.CANCEL), share=0.1)
    apple.rejects(None, "InternalServerError", until=time.time() + 10)
    apple.misbehaves(StreamLimit(1), connection=2)
"""

from __future__ import annotations

import math
import random

from msgspec import Struct

from heliograph import reasons
from heliograph.model import PushType
from heliograph.protocols import apns


class Answer(Struct, frozen=True):
    """Say this where a 200 would have been due: what is wrong with a request is still found first."""

    status: int
    reason: str
    since: int | None = None
    """UNIX milliseconds, with 410."""
    retry_after_s: int | None = None


class Withhold(Struct, frozen=True):
    """Act on the request, show it on the device, and never answer."""


class Reset(Struct, frozen=True):
    """End the stream with RST_STREAM."""

    code: int
    acted: bool = False
    """Act on the request first, as if it got its answer; otherwise it is not looked at."""


class GoAway(Struct, frozen=True):
    """Say GOAWAY, answer what is open up to `last_stream_id`, then close.

    None is the last stream that came, so the request itself is answered. What is above is not acted on.
    """

    reason: str | None = None
    """Goes into the debug data as JSON, as Apple does; None: no debug data."""
    last_stream_id: int | None = None
    code: int = 0
    newest: int = 0
    """Instead of `last_stream_id`: leave out so many of the newest streams, but none that was acted on."""


class Close(Struct, frozen=True):
    """Answer what came before, then close the connection without GOAWAY and without looking at the request."""


class Cut(Struct, frozen=True):
    """Act on the request, then break the connection off at once, without an answer: as networks fail."""


class Delay(Struct, frozen=True):
    """Look at the request only after a while, and then do as `then` says.

    What the client cancels meanwhile, or what ends with its connection, is not acted on.
    """

    seconds: float
    then: Immediate | None = None
    """None: judge it as usual."""


class StreamLimit(Struct, frozen=True):
    """Allow the connection so many open streams by SETTINGS, unless it was told so already; then do as `then` says."""

    count: int
    then: Immediate | Delay | None = None
    """None: judge it as usual."""


Immediate = Answer | Withhold | Reset | GoAway | Close | Cut
Action = Immediate | Delay | StreamLimit


class _Rule(Struct):
    action: Action
    token: bytes | None
    topics: frozenset[bytes] | None
    connection: int | None
    stream: int | None
    start: float
    until: float
    share: float
    after: int
    """Matching requests to let pass first."""
    times: int | None
    """How often it is still to be used; None: for ever."""

    def takes(self, request: _Request, dice: random.Random) -> bool:
        if (
            self.token not in (None, request.token)
            or (self.topics is not None and request.topic not in self.topics)
            or self.connection not in (None, request.connection)
            or self.stream not in (None, request.stream)
            or not self.start <= request.at < self.until
        ):
            return False
        if self.share < 1.0 and dice.random() >= self.share:
            return False
        if self.after:
            self.after -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True


class _Request(Struct, frozen=True):
    """What rules look at."""

    token: bytes
    topic: bytes
    connection: int
    stream: int
    at: float


class Faults:
    """The rules, in the order in which they were given, and words to give them in."""

    def __init__(self) -> None:
        self._rules: list[_Rule] = []
        self.dice = random.Random(0)  # noqa: S311 - picks requests, guards nothing
        """What rules with a `share` throw; the same each time, or seeded otherwise."""

    def misbehaves(
        self,
        action: Action,
        *,
        token: str | None = None,
        app: str | None = None,
        connection: int | None = None,
        stream: int | None = None,
        start: float = 0.0,
        until: float = math.inf,
        share: float = 1.0,
        after: int = 0,
        times: int | None = None,
    ) -> None:
        """Add a rule for requests to this device token and this app (a bundle id); None is any, as in the next two.

        `connection` is its number, counted from 1, `stream` the stream's id. `start` and `until` are UNIX seconds, the
        first of the time and the first after it. The rule takes that `share` of these requests by chance, lets `after`
        of them pass, and is used `times` times; None is for ever.
        """
        if after < 0 or (times is not None and times < 1):
            raise ValueError("`after` is 0 or more, `times` 1 or more")
        if not 0.0 < share <= 1.0:
            raise ValueError("`share` is above 0 and at most 1")
        wanted = None if token is None else apns.check_token(token)
        topics = None if app is None else frozenset(apns.topic_for(app, kind).encode() for kind in PushType)
        self._rules.append(
            _Rule(action, wanted, topics, connection, stream, start, until, share, after, times),
        )

    def behaves(self) -> None:
        """Forget all rules; what is delayed stays delayed."""
        self._rules.clear()

    @property
    def misbehaving(self) -> bool:
        """Whether there are rules at all."""
        return bool(self._rules)

    def find_fault(self, token: bytes, topic: bytes, connection: int, stream: int, now: float) -> Action | None:
        """What to do with this request, counted as done; None: nothing special.

        `token` is lower-case hex, `now` UNIX seconds.
        """
        if not self._rules:
            return None
        request = _Request(token, topic, connection, stream, now)
        for place, rule in enumerate(self._rules):
            if rule.takes(request, self.dice):
                if rule.times == 0:
                    del self._rules[place]
                return rule.action
        return None

    # -- the common ones, in words -------------------------------------------------------------------------------

    def rejects(
        self,
        token: str | None,
        reason: str,
        *,
        since: int | None = None,
        retry_after_s: int | None = None,
        app: str | None = None,
        until: float = math.inf,
        times: int | None = None,
    ) -> None:
        """Answer with one of Apple's reasons and its status. `since`: UNIX milliseconds, with 410."""
        if reason not in reasons.TABLE:
            raise ValueError(f"Apple has no reason {reason!r}; for one of your own, use misbehaves(Answer(...))")
        answer = Answer(reasons.TABLE[reason].status, reason, since, retry_after_s)
        self.misbehaves(answer, token=token, app=app, until=until, times=times)

    def delays(self, seconds: float, *, token: str | None = None, app: str | None = None) -> None:
        """Answer everything that much later."""
        self.misbehaves(Delay(seconds), token=token, app=app)

    def withholds(self, token: str | None = None, *, times: int | None = None) -> None:
        """Act on requests and never answer them."""
        self.misbehaves(Withhold(), token=token, times=times)

    def resets(self, token: str | None, code: int, *, times: int | None = None) -> None:
        """End streams with RST_STREAM and this code (RFC 9113, section 7)."""
        self.misbehaves(Reset(code), token=token, times=times)

    def hangs_up_after(self, requests: int) -> None:
        """Close the connection that brings the next request after that many, once, without a word."""
        self.misbehaves(Close(), after=requests, times=1)

    def says_goodbye(
        self, reason: str | None = None, *, last_stream_id: int | None = None, newest: int = 0, after: int = 0
    ) -> None:
        """Say GOAWAY on the connection that brings the next request (after that many), once."""
        self.misbehaves(GoAway(reason, last_stream_id, newest=newest), after=after, times=1)
