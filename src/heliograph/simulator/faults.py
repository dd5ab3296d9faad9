"""Rules that make the simulator misbehave: which requests, how often, and what becomes of them. Pure.

A rule matches by device token, by app, by count, or everything. The first rule that matches a request decides; a rule
that has been used up is gone.

    apple.rejects(token, "Unregistered", since=1_700_000_000_000)
    apple.delays(0.02)
    apple.resets(token, ErrorCode.INTERNAL_ERROR)
    apple.hangs_up_after(3)
    apple.says_goodbye("Shutdown")
    apple.misbehaves(Delay(1.0, then=Answer(503, "Shutdown", retry_after_s=5)), app="com.example.app", times=2)
"""

from __future__ import annotations

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
    """End the stream with RST_STREAM, without having looked at the request."""

    code: int


class GoAway(Struct, frozen=True):
    """Say GOAWAY, answer what is open up to `last_stream_id`, then close.

    None is the last stream that came, so the request itself is answered. What is above is not acted on.
    """

    reason: str | None = None
    """Goes into the debug data as JSON, as Apple does; None: no debug data."""
    last_stream_id: int | None = None
    code: int = 0


class Close(Struct, frozen=True):
    """Answer what came before, then close the connection without GOAWAY and without looking at the request."""


class Delay(Struct, frozen=True):
    """Look at the request only after a while, and then do as `then` says.

    What the client cancels meanwhile, or what ends with its connection, is not acted on.
    """

    seconds: float
    then: Immediate | None = None
    """None: judge it as usual."""


Immediate = Answer | Withhold | Reset | GoAway | Close
Action = Immediate | Delay


class _Rule:
    __slots__ = ("action", "after", "times", "token", "topics")

    def __init__(
        self, action: Action, token: bytes | None, topics: frozenset[bytes] | None, after: int, times: int | None
    ) -> None:
        self.action = action
        self.token = token
        self.topics = topics
        self.after = after
        """Matching requests to let pass first."""
        self.times = times
        """How often it is still to be used; None: for ever."""

    def takes(self, token: bytes, topic: bytes) -> bool:
        if self.token not in (None, token) or (self.topics is not None and topic not in self.topics):
            return False
        if self.after:
            self.after -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True


class Faults:
    """The rules, in the order in which they were given, and words to give them in."""

    def __init__(self) -> None:
        self._rules: list[_Rule] = []

    def misbehaves(
        self,
        action: Action,
        *,
        token: str | None = None,
        app: str | None = None,
        after: int = 0,
        times: int | None = None,
    ) -> None:
        """Add a rule for requests to this device token and this app (a bundle id); None is any.

        It lets `after` such requests pass, and is used `times` times; None is for ever.
        """
        if after < 0 or (times is not None and times < 1):
            raise ValueError("`after` is 0 or more, `times` 1 or more")
        wanted = None if token is None else apns.check_token(token)
        topics = None if app is None else frozenset(apns.topic_for(app, kind).encode() for kind in PushType)
        self._rules.append(_Rule(action, wanted, topics, after, times))

    def behaves(self) -> None:
        """Forget all rules; what is delayed stays delayed."""
        self._rules.clear()

    @property
    def misbehaving(self) -> bool:
        """Whether there are rules at all."""
        return bool(self._rules)

    def find_fault(self, token: bytes, topic: bytes) -> Action | None:
        """What to do with this request, counted as done; None: nothing special. `token` is lower-case hex."""
        for place, rule in enumerate(self._rules):
            if rule.takes(token, topic):
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
        times: int | None = None,
    ) -> None:
        """Answer with one of Apple's reasons and its status. `since`: UNIX milliseconds, with 410."""
        if reason not in reasons.TABLE:
            raise ValueError(f"Apple has no reason {reason!r}; for one of your own, use misbehaves(Answer(...))")
        answer = Answer(reasons.TABLE[reason].status, reason, since, retry_after_s)
        self.misbehaves(answer, token=token, app=app, times=times)

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

    def says_goodbye(self, reason: str | None = None, *, last_stream_id: int | None = None, after: int = 0) -> None:
        """Say GOAWAY on the connection that brings the next request (after that many), once."""
        self.misbehaves(GoAway(reason, last_stream_id), after=after, times=1)
