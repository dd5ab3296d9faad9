"""Rules that make the simulator misbehave: which requests or connections, how often, what becomes of them. Pure.

A rule is for requests, and matches them by device token, app, connection, stream, time, count or chance, or matches
everything; or it is for connections as they open. The first rule that matches decides; a rule that has been used up is
gone. Rules are plain data (`Rule`), which JSON can say as well.

A simulator has up to three doors: HTTP/2, and the binary gateway and the feedback service of old. Frames of the gateway
are requests like others. A rule looks at the doors that can do as its action says, or at the one that it names.

    apple.rejects(token, "Unregistered", since=1_700_000_000_000)
    apple.delays(0.02)
    apple.resets(token, ErrorCode.INTERNAL_ERROR)
    apple.hangs_up_after(3)
    apple.says_goodbye("Shutdown")
    apple.misbehaves(Delay(1.0, then=Answer(503, "Shutdown", retry_after_s=5)), app="com.example.app", times=2)
    apple.misbehaves(Reset(ErrorCode.CANCEL), share=0.1)
    apple.rejects(None, "InternalServerError", until=time.time() + 10)
    apple.misbehaves(StreamLimit(1), connection=2)
    apple.misbehaves(StopReading(), after=10, times=1)
    apple.misbehaves(Handshake("expired"), times=2)
    apple.misbehaves(GoAway("Shutdown"), opening=True)
    apple.misbehaves(ErrorPacket(Status.INVALID_TOKEN), after=2, times=1)
    apple.misbehaves(Trickle(1, 0.05), door="feedback", opening=True)
    apple.add_rule(msgspec.json.decode(b'{"action": {"kind": "trickle"}, "opening": true}', type=Rule))
"""

from __future__ import annotations

import math
import random
from typing import Literal, get_args

import msgspec
from msgspec import Struct

from heliograph import reasons
from heliograph.errors import Refused
from heliograph.model import PushType
from heliograph.protocols import apns
from heliograph.simulator.devices import check_topic

_MAX_REASON_CHARS = 1000
"""A GOAWAY is one frame."""

Door = Literal["http2", "legacy", "feedback"]


class _Action(Struct, frozen=True, tag_field="kind", forbid_unknown_fields=True, omit_defaults=True):
    pass


class Answer(_Action, frozen=True, tag="answer"):
    """Say this where a 200 would have been due: what is wrong with a request is still found first.

    The binary gateway says it as it used to: a 410 by the feedback service only, others by the reason's error packet.
    """

    status: int
    reason: str
    since: int | None = None
    """UNIX milliseconds, with 410."""
    retry_after_s: int | None = None

    def __post_init__(self) -> None:
        if not 200 <= self.status <= 599:
            raise ValueError("`status` is from 200 to 599")
        _check_not_negative(retry_after_s=self.retry_after_s, since=self.since)


class Withhold(_Action, frozen=True, tag="withhold"):
    """Act on the request, show it on the device, and never answer."""


class Reset(_Action, frozen=True, tag="reset"):
    """End the stream with RST_STREAM."""

    code: int
    acted: bool = False
    """Act on the request first, as if it got its answer; otherwise it is not looked at."""

    def __post_init__(self) -> None:
        _check_code(self.code)


class GoAway(_Action, frozen=True, tag="goaway"):
    """Say GOAWAY, answer what is open up to `last_stream_id`, then close.

    None is the last stream that came, so the request itself is answered. What is above is not acted on.
    """

    reason: str | None = None
    """Goes into the debug data as JSON, as Apple does; None: no debug data."""
    last_stream_id: int | None = None
    code: int = 0
    newest: int = 0
    """Instead of `last_stream_id`: leave out so many of the newest streams, but none that was acted on."""

    def __post_init__(self) -> None:
        _check_code(self.code)
        _check_not_negative(last_stream_id=self.last_stream_id, newest=self.newest)
        _check_fits(last_stream_id=self.last_stream_id, newest=self.newest)
        if self.reason is not None and len(self.reason) > _MAX_REASON_CHARS:
            raise ValueError(f"`reason` has {_MAX_REASON_CHARS} characters at most")


class Close(_Action, frozen=True, tag="close"):
    """Answer what came before, then close the connection without a word and without looking at the request.

    The feedback service closes without its list, which it keeps.
    """


class Cut(_Action, frozen=True, tag="cut"):
    """Act on the request, then break the connection off at once, without an answer: as networks fail.

    The gateway and the feedback service reset it.
    """


class Delay(_Action, frozen=True, tag="delay"):
    """Look at the request only after a while, and then do as `then` says.

    What the client cancels meanwhile, or what ends with its connection, is not acted on. Frames of the binary protocol
    stay in order: what came behind one waits for it.
    """

    seconds: float
    then: Immediate | None = None
    """None: judge it as usual."""

    def __post_init__(self) -> None:
        _check_not_negative(seconds=self.seconds)


class ErrorPacket(_Action, frozen=True, tag="error-packet"):
    """Say this, as Apple's binary gateway did, and close. Neither the frame nor what is behind it is taken."""

    status: int
    """One of `binary.Status`, or any other octet."""
    identifier: int | None = None
    """None: the frame's own; with status 10 (shutdown) that of the last one that was taken."""

    def __post_init__(self) -> None:
        if not 0 <= self.status <= 255:
            raise ValueError("`status` is from 0 to 255")
        if self.identifier is not None and not 0 <= self.identifier < 1 << 32:
            raise ValueError("`identifier` is from 0 to 4294967295")


class StreamLimit(_Action, frozen=True, tag="stream-limit"):
    """Allow the connection so many open streams by SETTINGS, unless it was told so already; then do as `then` says.

    From now on only rules change its limit.
    """

    count: int
    then: Immediate | Delay | None = None
    """None: judge it as usual."""

    def __post_init__(self) -> None:
        _check_not_negative(count=self.count)
        _check_fits(count=self.count)


class StopReading(_Action, frozen=True, tag="stop-reading"):
    """Read nothing more from the connection, for so many seconds or for good; then do with the request as `then` says.

    What the client sends meanwhile waits in the buffers of socket and TLS, which hold some 100 KiB. A client that goes
    away is not noticed. As a connection opens: its TLS handshake is done, and nothing is read after it.
    """

    seconds: float | None = None
    then: Immediate | Delay | None = None

    def __post_init__(self) -> None:
        _check_not_negative(seconds=self.seconds)


class HoldWindows(_Action, frozen=True, tag="hold-windows"):
    """Give the connection no flow-control window any more; then do with the request as `then` says.

    Each of its streams may carry `octets` of a body (by SETTINGS, as INITIAL_WINDOW_SIZE), all together about a MiB,
    and there is no WINDOW_UPDATE. Requests that are larger never come in whole.
    """

    octets: int = 0
    then: Immediate | Delay | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.octets < 65_536:
            raise ValueError("`octets` is from 0 to 65535")


class Trickle(_Action, frozen=True, tag="trickle"):
    """Say everything on the connection in pieces: `octets` at a time, every so many seconds.

    With the request itself it goes as `then` says.
    """

    octets: int = 1
    seconds: float = 0.01
    then: Immediate | Delay | None = None

    def __post_init__(self) -> None:
        if self.octets < 1 or not 0.0 < self.seconds < math.inf:
            raise ValueError("`octets` is 1 or more, `seconds` above 0")


class Handshake(_Action, frozen=True, tag="handshake"):
    """Fail the TLS handshake. Always as a connection opens.

    `silent`: what the client says is read, and nothing answered. `closed`: closed at once. `alert`: a handshake_failure
    alert. `expired` and `other-name`: a certificate of the right authority, which has ended or is for another host.
    `untrusted`: one of an authority that nobody knows.
    """

    how: Literal["silent", "closed", "alert", "expired", "other-name", "untrusted"]


Immediate = Answer | Withhold | Reset | GoAway | Close | Cut | ErrorPacket
Setup = StreamLimit | StopReading | HoldWindows | Trickle
"""What lasts as long as the connection."""
Action = Immediate | Delay | Setup | Handshake
Opening = GoAway | Close | Cut | ErrorPacket | Setup | Handshake
"""What can become of a connection as it opens, when there is no request yet."""

_ALL: frozenset[Door] = frozenset(get_args(Door))
_HTTP2: frozenset[Door] = frozenset(("http2",))
_DOORS: dict[type, frozenset[Door]] = {
    **dict.fromkeys((Withhold, Reset, GoAway, StreamLimit, HoldWindows), _HTTP2),
    ErrorPacket: frozenset(("legacy",)),
}
"""Where an action can be taken; others everywhere."""


class Rule(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What to do, and to which requests; or, where `opening` is set, to which connections as they open.

    It takes a `share` of those that match by chance, lets `after` of them pass, and is used `times` times.
    Raises ValueError where it could never be used.
    """

    action: Action
    token: str | None = None
    """A device token, as hex; None: any, as in the next three."""
    app: str | None = None
    """A bundle id; it covers all its topics."""
    connection: int | None = None
    """Counted from 1."""
    stream: int | None = None
    start: float | None = None
    """UNIX seconds: the first of the time."""
    until: float | None = None
    """The first after it."""
    share: float = 1.0
    after: int = 0
    times: int | None = None
    """None: for ever."""
    opening: bool = False
    """Implied by an action that is for connections only."""
    door: Door | None = None
    """None: wherever the action is possible."""

    def __post_init__(self) -> None:
        try:
            if self.token is not None:
                apns.check_token(self.token)
            if self.app is not None:
                check_topic(self.app)
        except Refused as no:
            raise ValueError(no.detail) from None
        if self.after < 0 or (self.times is not None and self.times < 1):
            raise ValueError("`after` is 0 or more, `times` 1 or more")
        if not 0.0 < self.share <= 1.0:
            raise ValueError("`share` is above 0 and at most 1")
        if self.for_connections:
            if not isinstance(self.action, Opening):
                raise ValueError("this action needs a request: leave `opening` out")
            if isinstance(self.action, Setup) and self.action.then is not None:
                raise ValueError("`then` needs a request: leave it or `opening` out")
            if self.token is not None or self.app is not None or self.stream is not None:
                raise ValueError("a connection that opens has no `token`, `app` or `stream` yet: leave them out")
        elif self.door == "feedback":
            raise ValueError("nobody asks the feedback service for anything: add `opening`")
        if not self.doors:
            raise ValueError(
                "this action and its `then` have no door in common"
                if self.door is None
                else f"this action, or `stream`, means nothing at the door {self.door}: leave `door` out"
            )

    def __repr__(self) -> str:
        return f"<rule: {self.action}>"

    @property
    def for_connections(self) -> bool:
        """Whether it looks at connections as they open, not at requests."""
        return self.opening or isinstance(self.action, Handshake)

    @property
    def doors(self) -> frozenset[Door]:
        """Where it looks."""
        doors = _ALL if self.door is None else frozenset((self.door,))
        if self.stream is not None:
            doors &= _HTTP2
        action: Action | None = self.action
        while action is not None:
            doors &= _DOORS.get(type(action), _ALL)
            action = action.then if isinstance(action, Delay | Setup) else None
        return doors


class _Active:
    """A rule in use."""

    __slots__ = ("after", "doors", "id", "rule", "start", "times", "token", "topics", "until")

    def __init__(self, id: int, rule: Rule) -> None:
        self.id = id
        self.rule = rule
        self.token = None if rule.token is None else apns.check_token(rule.token)
        self.doors = rule.doors
        app = rule.app
        self.topics = None if app is None else frozenset(apns.topic_for(app, kind).encode() for kind in PushType)
        self.start = -math.inf if rule.start is None else rule.start
        self.until = math.inf if rule.until is None else rule.until
        self.after = rule.after
        """Matching requests that are still to pass first."""
        self.times = rule.times
        """How often it is still to be used."""

    def takes(self, seen: _Seen, dice: random.Random) -> bool:
        rule = self.rule
        if (
            seen.door not in self.doors
            or self.token not in (None, seen.token)
            or (self.topics is not None and seen.topic not in self.topics)
            or rule.connection not in (None, seen.connection)
            or rule.stream not in (None, seen.stream)
            or not self.start <= seen.at < self.until
        ):
            return False
        if rule.share < 1.0 and dice.random() >= rule.share:
            return False
        if self.after:
            self.after -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True


class _Seen(Struct, frozen=True):
    """What rules look at: a request, or a connection that opens."""

    token: bytes
    topic: bytes
    connection: int
    stream: int
    at: float
    door: Door


class Faults:
    """The rules, in the order in which they were given, and words to give them in."""

    def __init__(self) -> None:
        self._rules: list[_Active] = []
        """For requests."""
        self._openings: list[_Active] = []
        """For connections."""
        self._rule_ids = 0
        self.dice = random.Random(0)  # noqa: S311 - picks requests, guards nothing
        """What rules with a `share` throw; the same each time, or seeded otherwise."""

    def add_rule(self, rule: Rule) -> int:
        """Add a rule behind those that there are; its id. Raises ValueError where something is of a wrong type."""
        try:
            msgspec.convert(msgspec.to_builtins(rule, enc_hook=str), Rule)  # building it in Python checks no types
        except msgspec.ValidationError as error:
            raise ValueError(f"This is no rule: {error}") from None
        self._rule_ids += 1
        active = _Active(self._rule_ids, rule)
        (self._openings if rule.for_connections else self._rules).append(active)
        return active.id

    def remove_rule(self, id: int) -> bool:
        """Forget a rule. Whether there was one: those that have been used up are gone."""
        for rules in (self._rules, self._openings):
            for place, active in enumerate(rules):
                if active.id == id:
                    del rules[place]
                    return True
        return False

    def rules(self) -> dict[int, Rule]:
        """The rules by their ids, in order, each with what is left of its `after` and `times`."""
        active = sorted([*self._rules, *self._openings], key=lambda each: each.id)
        return {each.id: msgspec.structs.replace(each.rule, after=each.after, times=each.times) for each in active}

    def misbehaves(
        self,
        action: Action,
        *,
        token: str | None = None,
        app: str | None = None,
        connection: int | None = None,
        stream: int | None = None,
        start: float | None = None,
        until: float | None = None,
        share: float = 1.0,
        after: int = 0,
        times: int | None = None,
        opening: bool = False,
        door: Door | None = None,
    ) -> int:
        """Add a rule; what its fields mean is said at `Rule`. Its id. Raises ValueError."""
        return self.add_rule(
            Rule(action, token, app, connection, stream, start, until, share, after, times, opening, door),
        )

    def behaves(self) -> None:
        """Forget all rules; what is delayed stays delayed, and what was done to a connection stays done."""
        self._rules.clear()
        self._openings.clear()

    @property
    def misbehaving(self) -> bool:
        """Whether there are rules for requests at all."""
        return bool(self._rules)

    def find_fault(
        self, token: bytes, topic: bytes, connection: int, stream: int, now: float, door: Door = "http2"
    ) -> Action | None:
        """What to do with this request, counted as done; None: nothing special.

        `token` is lower-case hex, `now` UNIX seconds.
        """
        if not self._rules:
            return None
        return self._find_fault(self._rules, _Seen(token, topic, connection, stream, now, door))

    def find_opening_fault(self, connection: int, now: float, door: Door = "http2") -> Action | None:
        """What to do with a connection that opens, counted as done; one of `Opening`. None: nothing special."""
        if not self._openings:
            return None
        return self._find_fault(self._openings, _Seen(b"", b"", connection, 0, now, door))

    def _find_fault(self, rules: list[_Active], seen: _Seen) -> Action | None:
        for place, active in enumerate(rules):
            if active.takes(seen, self.dice):
                if active.times == 0:
                    del rules[place]
                return active.rule.action
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
        until: float | None = None,
        times: int | None = None,
    ) -> int:
        """Answer with one of Apple's reasons and its status. `since`: UNIX milliseconds, with 410."""
        if reason not in reasons.TABLE:
            raise ValueError(f"Apple has no reason {reason!r}; for one of your own, use misbehaves(Answer(...))")
        answer = Answer(reasons.TABLE[reason].status, reason, since, retry_after_s)
        return self.misbehaves(answer, token=token, app=app, until=until, times=times)

    def delays(self, seconds: float, *, token: str | None = None, app: str | None = None) -> int:
        """Answer everything that much later."""
        return self.misbehaves(Delay(seconds), token=token, app=app)

    def withholds(self, token: str | None = None, *, times: int | None = None) -> int:
        """Act on requests and never answer them."""
        return self.misbehaves(Withhold(), token=token, times=times)

    def resets(self, token: str | None, code: int, *, times: int | None = None) -> int:
        """End streams with RST_STREAM and this code (RFC 9113, section 7)."""
        return self.misbehaves(Reset(code), token=token, times=times)

    def hangs_up_after(self, requests: int) -> int:
        """Close the connection that brings the next request after that many, once, without a word."""
        return self.misbehaves(Close(), after=requests, times=1)

    def says_goodbye(
        self, reason: str | None = None, *, last_stream_id: int | None = None, newest: int = 0, after: int = 0
    ) -> int:
        """Say GOAWAY on the connection that brings the next request (after that many), once."""
        return self.misbehaves(GoAway(reason, last_stream_id, newest=newest), after=after, times=1)


def _check_not_negative(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"`{name}` is 0 or more")


def _check_fits(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value >= 1 << 31:
            raise ValueError(f"`{name}` is below 2147483648")


def _check_code(code: int) -> None:
    if not 0 <= code < 1 << 32:
        raise ValueError("`code` is an error code of 32 bits (RFC 9113, section 7)")
