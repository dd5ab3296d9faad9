"""What a query string asks for, as typed values; what it may not hold is refused, with what was probably meant."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple, TypeVar
from urllib.parse import parse_qs

from heliograph import reasons
from heliograph.complaints import closest, shown
from heliograph.doors.exchange import Exchange, Problem
from heliograph.doors.receipts import STATES
from heliograph.errors import Refused
from heliograph.keys import Caller
from heliograph.model import Environment, Filter, PushType, State
from heliograph.protocols.apns import check_token

_T = TypeVar("_T")

MAX_PAGE = 1000
"""Receipts in one answer, at most."""

_PAGE = 100
"""Unless the caller says how many."""

_MAX_DIGITS = 18
"""Of a number that SQLite can hold."""

_OWN_REASONS = ("NotProcessed", "NoAnswer", "SentBefore", "TooLate", "Unreadable")
_is_status = re.compile(r"Status[1-9][0-9]{2}").fullmatch
"""How a receipt names an answer of Apple's that had a status and no reason."""

_STATES = {name: state for state, name in STATES.items()}
_LAST_S = 1e11
"""UNIX seconds above which it is milliseconds that somebody sent; in the year 5138."""
_FIRST_S = 1e8
"""UNIX seconds below which it is a year or a date that somebody sent, unless it is 0; in March of 1973."""

_is_number = re.compile(r"[0-9]{1,20}(?:\.[0-9]{1,9})?").fullmatch
# The blank is a plus sign that was not escaped.
_is_time = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d(?:\.\d{1,9})?)(?:[Zz]|([+ -])(\d\d:\d\d))", re.ASCII
).fullmatch


class Listing(NamedTuple):
    """Which notifications, and how far."""

    wanted: Filter
    cursor: str | None
    limit: int


def listing(exchange: Exchange, caller: Caller, apps: Collection[str]) -> Listing:
    """The query of a listing. Raises Refused and Problem."""
    query = _Query(
        exchange,
        *("app", "environment", "state", "reason", "token", "topic", "push_type", "since", "until"),
        *("connection", "limit", "cursor"),
        many=("state",),
    )
    since, until = query.time("since"), query.time("until")
    if since is not None and until is not None and since >= until:
        raise _bad("until", "until must be later than since.")
    token = query.get("token")
    wanted = Filter(
        apps=query.apps(caller, apps),
        environment=query.one_of("environment", {each.value: each for each in Environment}),
        states=query.states(),
        reason=query.reason(),
        token=None if token is None else check_token(token),
        push_type=query.one_of("push_type", {each.value: each for each in PushType}),
        topic=query.get("topic"),
        since=since,
        until=until,
        connection=query.get("connection"),
    )
    return Listing(wanted, query.get("cursor"), query.limit())


class BuriedListing(NamedTuple):
    """What was given up on: of which apps, before which id, and how far."""

    apps: Collection[str] | None
    before: str | None
    limit: int


def buried(exchange: Exchange, caller: Caller, apps: Collection[str]) -> BuriedListing:
    """The query of a list of the buried. Raises Refused and Problem."""
    query = _Query(exchange, "app", "before", "limit")
    return BuriedListing(query.apps(caller, apps), query.get("before"), query.limit())


class RemovalListing(NamedTuple):
    """What was removed: of which app and environment (None: all of its), behind which number, and how far."""

    app: str
    environment: Environment | None
    after: int
    limit: int
    token: bytes | None
    """This device token alone."""


def removals(exchange: Exchange, caller: Caller, apps: Collection[str]) -> RemovalListing:
    """The query of a list of removals. Raises Refused and Problem."""
    query = _Query(exchange, "app", "environment", "token", "after", "limit")
    token = query.get("token")
    return RemovalListing(
        choose_app(caller, apps, query.get("app")),
        query.one_of("environment", {each.value: each for each in Environment}),
        query.number("after"),
        query.limit(),
        None if token is None else check_token(token),
    )


def replaced(exchange: Exchange) -> str | None:
    """The id in the query of what is to be replaced. Raises Refused."""
    return _Query(exchange, "replace").get("replace")


def wait(exchange: Exchange) -> str | None:
    """For how long the query asks to wait, as it stands there. Raises Refused."""
    return _Query(exchange, "wait").get("wait")


class _Query:
    """The parameters, each of which is there at most once, unless it may come many times."""

    def __init__(self, exchange: Exchange, *names: str, many: Sequence[str] = ()) -> None:
        self._given = parse_qs(exchange.query.decode("ascii", "replace"), keep_blank_values=True)
        for name, values in self._given.items():
            if name not in names:
                close = closest(name, names)
                hint = f"Did you mean {close}?" if close else f"There may be {', '.join(names)}."
                text = f"There is no parameter {shown(name)!r} here. {hint}"
                raise Refused("UnknownParameter", text, field=shown(name))
            if len(values) > 1 and name not in many:
                raise _bad(name, f"{name} may come once: it is there {len(values)} times.")
            if not all(values):
                raise _bad(name, f"{name} is empty: give it a value, or leave it out.")

    def get(self, name: str) -> str | None:
        values = self._given.get(name)
        return None if values is None else values[0]

    def one_of(self, name: str, known: Mapping[str, _T]) -> _T | None:
        value = self.get(name)
        return None if value is None else _known(name, value, known)

    def states(self) -> frozenset[State] | None:
        values = self._given.get("state")
        if values is None:
            return None
        return frozenset(_known("state", each.strip(), _STATES) for value in values for each in value.split(","))

    def reason(self) -> str | None:
        value = self.get("reason")
        if value is None or _is_status(value):
            return value
        return _known("reason", value, {each: each for each in (*reasons.TABLE, *_OWN_REASONS)})

    def apps(self, caller: Caller, apps: Collection[str]) -> frozenset[str] | None:
        """Those that are asked for and that the caller may see; None: all."""
        app = self.get("app")
        if app is None:
            return caller.apps
        if not caller.may_use(app):
            raise app_not_allowed(app)
        if app not in apps:
            close = closest(app, filter(caller.may_use, apps))
            hint = f"Did you mean {close}?" if close else "Without it those of all apps are listed, former ones too."
            raise Refused("UnknownApp", f"There is no app {shown(app)!r}. {hint}", field="app")
        return frozenset((app,))

    def limit(self) -> int:
        value = self.get("limit")
        if value is None:
            return _PAGE
        if not (len(value) <= 4 and value.isascii() and value.isdecimal() and 1 <= int(value) <= MAX_PAGE):
            raise _bad("limit", f"limit must be a whole number from 1 to {MAX_PAGE}.")
        return int(value)

    def number(self, name: str) -> int:
        """What a former page gave; 0 where there was none."""
        value = self.get(name) or "0"
        if not (len(value) <= _MAX_DIGITS and value.isascii() and value.isdecimal()):
            raise _bad(name, f"{name} must be what the former answer gave in next, or 0 for all from the beginning.")
        return int(value)

    def time(self, name: str) -> float | None:
        """UNIX seconds."""
        value = self.get(name)
        if value is None:
            return None
        if _is_number(value):
            seconds = float(value)
            if seconds > _LAST_S:
                raise _bad(name, f"{name} must be UNIX seconds: {shown(value)} are rather milliseconds.")
            if 0 < seconds < _FIRST_S:
                raise _bad(name, _date_in_digits(value, seconds))
            return seconds
        parts = _is_time(value)
        seconds = math.nan
        if parts is not None:
            day, clock, sign, away = parts.groups()
            offset = "+00:00" if sign is None else f"{sign.replace(' ', '+')}{away}"
            with contextlib.suppress(ValueError, OverflowError):
                seconds = datetime.fromisoformat(f"{day}T{clock}{offset}").timestamp()
        if not seconds >= 0:
            wanted = "a time like 2026-11-21T12:00:00Z (RFC 3339), or UNIX seconds"
            raise _bad(name, f"{name} must be {wanted}: {shown(value)!r} is neither.")
        return seconds


def _known(name: str, value: str, known: Mapping[str, _T]) -> _T:
    found = known.get(value)
    if found is None:
        close = closest(value, known)
        hint = f"Did you mean {close}?" if close else f"It is one of {', '.join(known)}."
        raise _bad(name, f"There is no {name.replace('_', ' ')} {shown(value)!r}. {hint}")
    return found


def _date_in_digits(value: str, seconds: float) -> str:
    """What to write in place of a year, or of something else that is much too little."""
    example = f"{value}-01-01T00:00:00Z" if re.fullmatch("(?:19|20)[0-9]{2}", value) else "2026-11-21T12:00:00Z"
    year = datetime.fromtimestamp(seconds, UTC).year
    return f"{shown(value)} would be UNIX seconds in {year}: write {example}."


def _bad(name: str, detail: str) -> Refused:
    return Refused("BadParameter", detail, field=name)


def choose_app(caller: Caller, apps: Collection[str], named: str | None) -> str:
    """The app that is meant; None: the only one that the caller may use. Raises Refused and Problem."""
    if named is None:
        known = [app for app in apps if caller.may_use(app)]
        if len(known) != 1:
            raise Refused("MissingApp", _which(known, caller.apps), field="app")
        return known[0]
    if not caller.may_use(named):
        raise app_not_allowed(named)
    if named not in apps:
        names = ", ".join(sorted(filter(caller.may_use, apps))) or "none"
        raise Refused("UnknownApp", f"There is no app {shown(named)!r}. Known apps: {names}.", field="app")
    return named


def _which(known: Sequence[str], allowed: Collection[str] | None) -> str:
    """What to do where no app was named; `known` are those that the caller may use, `allowed` those its key names."""
    if known:
        return f"Say which app: there are {', '.join(sorted(known))}."
    none = "no app yet" if allowed is None else "none yet of the apps that this API key is for"
    return f"There is {none}: add an [apps.NAME] to the server's configuration, or use `heliograph app add`."


def app_not_allowed(app: str) -> Problem:
    """The caller is not for this app."""
    return Problem(403, "AppNotAllowed", f"This API key is not for the app {shown(app)!r}: use one that is.")
