"""Device tokens that Apple calls dead, for an app's own database to follow, and those that were registered again.

Reading consumes nothing. Each removal has a number, and who says up to which it has read gets what came since: a
device token that died again after it was registered anew has a new number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from heliograph.doors.api import Call, Route, Routes
from heliograph.doors.bodies import check_environment, parse
from heliograph.doors.decoding import problem
from heliograph.doors.exchange import Answer, ErrorItem, Problem
from heliograph.doors.queries import choose_app, removals
from heliograph.errors import Refused
from heliograph.model import App, Environment, Listed, Scope
from heliograph.ports import Store
from heliograph.protocols.apns import check_token

PATH = "/v1/removals"
REGISTRATIONS_PATH = "/v1/registrations"

MAX_TOKENS = 1000
"""Device tokens in a request, at most."""

_MAX_BODY_BYTES = 1024 * 1024
_CLOCKS_S = 60.0
"""So much a caller's clock may be fast."""

_encode = msgspec.json.encode


class RemovalBody(Struct):
    """A device token that Apple called dead."""

    token: str
    """The device token, in lower-case hex."""
    app: str
    """The app that it was of."""
    environment: Environment
    """Where it was sent to."""
    since: datetime
    """Since when Apple knows. If the app registered it later, it lives: say so with `POST /v1/registrations`."""
    number: int
    """Higher than those of all that were removed before."""


class RemovalsBody(Struct):
    """A page of removals."""

    removals: Sequence[RemovalBody]
    """In the order of their numbers."""
    next: str
    """What to send as `after` for more, now or later; also where the page is empty."""


class NewRegistrations(Struct, forbid_unknown_fields=True):
    """The body of a POST: device tokens that an app registered. Null is the same as nothing."""

    tokens: tuple[str, ...]
    """Device tokens, in hex."""
    app: str | None = None
    """The app that they are of. Default: the only one."""
    environment: Environment | None = None
    """Where they belong. Default: wherever the app is sent to."""
    at: Annotated[datetime, Meta(tz=True)] | None = None
    """When they were registered: what Apple said of them later still holds. Default: now."""


class Revived(Struct):
    """What registrations changed."""

    revived: int
    """How many of the device tokens were held back, and are sent to again."""


class RemovalsPart:
    """The part of the API."""

    def __init__(self, store: Store, apps: Mapping[str, App], *, clock: Callable[[], float]) -> None:
        """`apps` may change; `clock` gives UNIX seconds."""
        self._store = store
        self._apps = apps
        self._clock = clock
        get = Route(self._list, frozenset({Scope.READ}))
        self._paths: dict[str, Routes] = {
            PATH: {"GET": get, "HEAD": get},
            REGISTRATIONS_PATH: {"POST": Route(self._post, frozenset({Scope.SEND}))},
        }

    def find(self, path: str) -> Routes | None:
        """As `Part` has it."""
        return self._paths.get(path)

    async def _list(self, call: Call) -> Answer:
        wanted = removals(call.exchange, call.caller, self._apps)
        found = await self._store.find_removals(*wanted)
        last = found[-1].number if found else wanted.after
        return Answer(200, _encode(RemovalsBody([_show(each) for each in found], str(last))))

    async def _post(self, call: Call) -> Answer:
        async def revive(body: bytes) -> Answer:
            post = parse(body, NewRegistrations)
            app = self._apps[choose_app(call.caller, self._apps, post.app)]
            check_environment(app, post.environment)
            tokens, at = _checked_tokens(post.tokens), self._checked_time(post.at)
            environments = app.environments if post.environment is None else (post.environment,)
            revived = [await self._store.revive(app.name, each, tokens, at) for each in environments]
            return Answer(200, _encode(Revived(sum(revived))))

        return await call.read(revive, _MAX_BODY_BYTES)

    def _checked_time(self, at: datetime | None) -> float:
        """UNIX seconds. Raises Refused."""
        now = self._clock()
        if at is None:
            return now
        if at.timestamp() > now + _CLOCKS_S:
            text = "at is in the future: send when the device token was registered, or leave it out for now."
            raise Refused("BadRegistration", text, field="at")
        return min(at.timestamp(), now)


def _checked_tokens(tokens: Sequence[str]) -> list[bytes]:
    """Raises Refused, Problem."""
    if not tokens:
        text = "tokens is empty: send the device tokens that were registered."
        raise Refused("BadRegistration", text, field="tokens")
    if len(tokens) > MAX_TOKENS:
        text = f"One request takes {MAX_TOKENS} device tokens at most: these are {len(tokens)}."
        raise Problem(413, "TooManyNotifications", text)
    checked, wrong = [], []
    for index, token in enumerate(tokens):
        try:
            checked.append(check_token(token))
        except Refused as error:
            wrong.append(ErrorItem(error.reason, error.detail, index, "tokens"))
    if wrong:
        raise problem(wrong, None)
    return checked


def _show(listed: Listed) -> RemovalBody:
    removal = listed.removal
    since = datetime.fromtimestamp(removal.since, UTC)
    return RemovalBody(str(removal.token), removal.app, removal.environment, since, listed.number)
