"""What follows from an outcome: an end, or another try at a time. Pure, table-tested.

| outcome | what follows | counted |
|---|---|---|
| 2xx | accepted | |
| not processed | at once | no |
| unknown | the same ids from 1 s on, 30 s at most; at most once: ends as unknown | yes |
| 5xx, and what a new connection cures | two quick tries within 1 and 5 s, then from 15 minutes on, doubling | yes |
| 429 | from 30 s on, doubling to an hour | yes |
| ExpiredProviderToken | the first time at once, afterwards as 503 | yes |
| every other 403 about credentials | from 30 s on, doubling to 5 minutes: an operator will put them right | yes |
| 410 | rejected, and the device token is removed | |
| BadDeviceToken | rejected, and the device token is held back for a while | |
| every other 4xx | rejected | |

`Retry-After` replaces every pause. Tries after an answer queue up behind those that are planned already (`Crowd`), so
that they stay a small part of what is sent. No try is later than `deadline`; what would need one ends now.
Sources: Apple, "Handling notification responses from APNs" (15 minutes for 5xx, a pause for 429); the rest is ours.
"""

from __future__ import annotations

import math

from msgspec import Struct

from heliograph.model import Answered, NotProcessed, Outcome, State, Unknown
from heliograph.reasons import BAD_DEVICE_TOKEN, FollowUp, find

PATIENCE_S = 24 * 3600.0
"""How long a notification is tried when it has no earlier expiration."""

TRY_ONCE_S = 60.0
"""How long one with expiration 0 is tried: it would be worthless to its sender later."""

QUARANTINE_S = 3600
"""How long a device token is held back that Apple did not know."""

_QUICK_S = (1.0, 5.0)
"""Upper ends of the first pauses after Apple's own trouble; the real ones lie anywhere below (full jitter)."""
_SLOW_S = 900.0
"""Apple asks for 15 minutes before a 5xx is tried again."""
_PACED_S = 30.0
_PACED_MAX_S = 3600.0
_RETRY_SHARE = 0.1
_RETRY_FLOOR = 100.0
"""Tries after an answer that a lane may have each second, however little is new."""
_LATELY_S = 10.0
_CREDENTIALS_MAX_S = 300.0
"""Whoever has put the credentials right does not want to wait for long."""
_UNKNOWN_S = 1.0
_UNKNOWN_MAX_S = 30.0
"""Shorter than the minute after which nothing may be left waiting once a fault is over."""


class End(Struct, frozen=True):
    """There is nothing more to do for this notification."""

    state: State
    reason: str | None = None
    """Apple's word, or why it could not be asked."""
    removed_since: int | None = None
    """UNIX seconds from which the device token is dead; None: it is not removed."""
    quarantined_until: int | None = None
    """UNIX seconds until which the device token is held back; None: it is not."""


class Again(Struct, frozen=True):
    """It is to be sent again."""

    at: float
    """UNIX seconds, never before `now`, never after the deadline."""
    counted: bool
    """Whether this try counts: the next outcome is decided with `attempt + 1`."""
    reason: str | None = None
    """Why, in Apple's word or ours."""


Decision = End | Again


def deadline(created_at: float, expiration: int | None) -> float:
    """UNIX seconds after which a notification is not sent any more; `expiration` as in `model.Headers`."""
    if expiration is None:
        return created_at + PATIENCE_S
    if expiration == 0:
        return created_at + TRY_ONCE_S
    return min(float(expiration), created_at + PATIENCE_S)


def decide(
    outcome: Outcome,
    attempt: int,
    now: float,
    *,
    created_at: float,
    expiration: int | None,
    at_most_once: bool = False,
    crowd_s: float = 0.0,
    random: float,
) -> Decision:
    """What follows from `outcome`.

    `attempt` is the number of counted tries of this notification, this one included, from 1. `now`, `created_at`
    and `expiration` are UNIX seconds. `crowd_s` is `Crowd.wait_s`: after an answer it comes on top of the pause.
    `random` is drawn from [0, 1) and spreads the tries of many.
    """
    if isinstance(outcome, Answered) and 200 <= outcome.status < 300:
        return End(State.ACCEPTED)
    again = _again(outcome, attempt, now, crowd_s, at_most_once=at_most_once, random=random)
    if isinstance(again, End):
        return again
    last = deadline(created_at, expiration)
    if now <= last and again.at <= last:
        return again
    given_up = expiration is None or expiration > last
    return End(State.BURIED if given_up else State.EXPIRED, again.reason)


def _again(
    outcome: Outcome, attempt: int, now: float, crowd_s: float, *, at_most_once: bool, random: float
) -> Decision:
    match outcome:
        case NotProcessed(why):
            return Again(now, counted=False, reason=why)
        case Unknown(why):
            if at_most_once:
                return End(State.UNKNOWN, why)
            # The first time exactly 1 s; afterwards anywhere from there to a limit that doubles.
            longest = min(_UNKNOWN_MAX_S, _doubled(_UNKNOWN_S, attempt - 1))
            pause = _UNKNOWN_S + random * (longest - _UNKNOWN_S)
            return Again(now + pause, counted=True, reason=why)
        case Answered():
            return _answered(outcome, attempt, now, crowd_s, random)


def _answered(answer: Answered, attempt: int, now: float, crowd_s: float, random: float) -> Decision:
    reason = find(answer.reason, answer.status)
    match reason.follow_up:
        case FollowUp.RENEW_PROVIDER_TOKEN if attempt == 1:
            return Again(now, counted=True, reason=reason.word)
        case FollowUp.RETRY_SOON | FollowUp.NEW_CONNECTION | FollowUp.RENEW_PROVIDER_TOKEN:
            pause = _after_trouble(attempt, random)
        case FollowUp.RETRY_TOKEN_LATER | FollowUp.RETRY_LATER:
            pause = min(_PACED_MAX_S, _doubled(_PACED_S, attempt - 1)) * (1 + random)
        case FollowUp.FIX_CREDENTIALS if reason.status == 403:
            pause = min(_CREDENTIALS_MAX_S, _doubled(_PACED_S, attempt - 1)) * (1 + random)
        case FollowUp.REMOVE_TOKEN:
            return End(State.REJECTED, reason.word, removed_since=_died_at(answer.since, now))
        case FollowUp.QUARANTINE if reason is BAD_DEVICE_TOKEN:
            return End(State.REJECTED, reason.word, quarantined_until=int(now) + QUARANTINE_S)
        case _:
            return End(State.REJECTED, reason.word)
    if answer.retry_after_s is not None:
        pause = max(0.0, answer.retry_after_s)
    return Again(now + pause + crowd_s, counted=True, reason=reason.word)


class Crowd:
    """How many tries after an answer are planned in a lane, so that Apple's trouble is not answered with a storm.

    They get a tenth of the rate at which new notifications went out lately, and a floor that no small sender notices.
    """

    __slots__ = ("_at", "_fresh", "_planned")

    def __init__(self) -> None:
        self._at = 0.0
        self._fresh = 0.0
        """New notifications in the last `_LATELY_S`, older ones fading."""
        self._planned = 0.0

    def sent(self, count: int, now: float) -> None:
        """So many new notifications went out; `now` is in seconds from anywhere."""
        self._move(now)
        self._fresh += count

    def wait_s(self, now: float) -> float:
        """How long it takes until those that are planned are through."""
        self._move(now)
        return self._planned / self._rate

    def plan(self) -> None:
        """One more is planned."""
        self._planned += 1

    @property
    def _rate(self) -> float:
        return max(_RETRY_FLOOR, _RETRY_SHARE * self._fresh / _LATELY_S)

    def _move(self, now: float) -> None:
        passed = now - self._at
        if passed > 0:
            self._at = now
            self._planned = max(0.0, self._planned - passed * self._rate)
            self._fresh *= math.exp(-passed / _LATELY_S)


def _after_trouble(attempt: int, random: float) -> float:
    if attempt <= len(_QUICK_S):
        return random * _QUICK_S[attempt - 1]
    # Apple's 15 minutes are a lower bound, so the jitter goes on top.
    return _doubled(_SLOW_S, attempt - len(_QUICK_S) - 1) * (1 + random)


def _doubled(seconds: float, times: int) -> float:
    return seconds * 2.0 ** min(times, 20)


def _died_at(since_ms: int | None, now: float) -> int:
    # Rounded down: a registration in the same second is newer more often than not, and one more 410 costs little.
    # A time to come would outlive every honest registration, so it counts as now.
    return int(now) if since_ms is None else max(0, min(since_ms // 1000, int(now)))
