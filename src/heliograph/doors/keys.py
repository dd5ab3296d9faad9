"""API keys over HTTP: who has which, new ones, and their end.

A new key is in the answer that made it, and never again. What a key may do, it can pass on, and nothing else: not
another scope, nor another app, nor a longer life. Of keys that are for other apps than its own it learns nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from typing import Annotated

import msgspec
import structlog
from msgspec import Meta, Struct

from heliograph.complaints import closest, dissect, shown
from heliograph.doors.answers import Removed
from heliograph.doors.api import Call, Route, Routes
from heliograph.doors.exchange import Answer, Problem
from heliograph.errors import Refused
from heliograph.keys import Caller, Keyring
from heliograph.model import ApiKey, Scope

PATH = "/v1/keys"

MAX_BODY_BYTES = 64 * 1024
"""Octets of a request's body, at most."""

MAX_NAME = 64
"""Characters of a name, at most."""

MAX_DAYS = 36_500
"""How long a key may last that is given an end, at most."""

_DAY_S = 86400.0
_OWN = "the server's own"
_NO_STORE = (b"cache-control", b"no-store")

_log = structlog.get_logger("heliograph.keys")
_encode = msgspec.json.encode


class NewKey(Struct, forbid_unknown_fields=True):
    """The body of a POST. Null is the same as nothing."""

    name: str
    """What the key is for, such as the server that has it."""
    scopes: tuple[Scope, ...] | None = None
    """What it may do. Default: `send`."""
    apps: tuple[str, ...] | None = None
    """The apps that it is for. Default: those that yours is for."""
    expires_at: Annotated[datetime, Meta(tz=True)] | None = None
    """When it ends. Default: when yours does."""
    expires_in_days: float | None = None
    """The same, counted from now."""


class KeyBody(Struct):
    """A key as JSON, without what opens anything. Times are in whole seconds, in UTC."""

    id: str | None
    """What stands between `hg_` and the next `_` of the key; null: it is the server's own."""
    name: str
    """What people call it."""
    scopes: Sequence[Scope]
    """What it may do."""
    apps: Sequence[str] | None
    """The apps that it is for; null: all."""
    created_at: datetime | None
    """When it was made."""
    expires_at: datetime | None
    """When it ends; null: never."""


class KeysBody(Struct):
    """API keys."""

    keys: Sequence[KeyBody]
    """Oldest first."""


class MadeKeyBody(KeyBody):
    """A key as JSON, this once with the key itself."""

    key: str
    """The key itself. It is shown this once: put it where its user finds it."""


_decode = msgspec.json.Decoder(NewKey).decode


class KeysPart:
    """The part of the API."""

    def __init__(self, keyring: Keyring, apps: Collection[str], *, clock: Callable[[], float]) -> None:
        """`apps` are the names of all apps, and may change; `clock` gives UNIX seconds."""
        self._keyring = keyring
        self._apps = apps
        self._clock = clock
        manage = frozenset({Scope.MANAGE})
        get_all, get, get_own = Route(self._list, manage), Route(self._get, manage), Route(self._own, frozenset(Scope))
        self._of_all: Routes = {"GET": get_all, "HEAD": get_all, "POST": Route(self._post, manage)}
        self._of_one: Routes = {"GET": get, "HEAD": get, "DELETE": Route(self._delete, manage)}
        self._of_own: Routes = {"GET": get_own, "HEAD": get_own}

    def find(self, path: str) -> Routes | None:
        """As `Part` has it."""
        if path == PATH:
            return self._of_all
        start, _, key_id = path.rpartition("/")
        if start != PATH or not key_id:
            return None
        return self._of_own if key_id == "self" else self._of_one

    async def _list(self, call: Call) -> Answer:
        return Answer(200, _encode(KeysBody([_show(key) for key in self._keyring.all() if _may_see(call.caller, key)])))

    async def _get(self, call: Call) -> Answer:
        return Answer(200, _encode(_show(self._visible(call))))

    async def _own(self, call: Call) -> Answer:
        key_id = call.caller.id
        if not key_id:
            return Answer(200, _encode(KeyBody(None, _OWN, tuple(Scope), None, None, None)))
        key = self._keyring.get(key_id)
        if key is None:
            raise _unknown()
        return Answer(200, _encode(_show(key)))

    async def _post(self, call: Call) -> Answer:
        async def make(body: bytes) -> Answer:
            return await self._make(call.caller, _parse(body))

        return await call.read(make, MAX_BODY_BYTES)

    async def _make(self, caller: Caller, post: NewKey) -> Answer:
        name = _checked_name(post.name)
        scopes = _checked_scopes(caller, post.scopes)
        apps = self._checked_apps(caller, post.apps)
        expires_at = self._checked_end(caller, post)
        key, whole = await self._keyring.make(name, scopes, apps, expires_at)
        _log.info(
            "key_added", id=key.id, name=name, scopes=[each.value for each in scopes], apps=apps, by=caller.id or _OWN
        )
        made = MadeKeyBody(**msgspec.structs.asdict(_show(key)), key=whole)
        return Answer(201, _encode(made), ((b"location", f"{PATH}/{key.id}".encode()), _NO_STORE))

    async def _delete(self, call: Call) -> Answer:
        key = self._visible(call)
        if not await self._keyring.remove(key.id):
            raise _unknown()
        _log.info("key_removed", id=key.id, name=key.name, by=call.caller.id or _OWN)
        return Answer(200, _encode(Removed(key.id)))

    def _visible(self, call: Call) -> ApiKey:
        """The key that the path names. Raises Problem."""
        key_id = call.exchange.path.rpartition("/")[2]
        key = self._keyring.get(key_id)
        if key is None or not _may_see(call.caller, key):
            raise _unknown()
        return key

    def _checked_apps(self, caller: Caller, wanted: Sequence[str] | None) -> Sequence[str] | None:
        """What is not said is what the caller has. Raises Problem, Refused."""
        if wanted is None:
            return None if caller.apps is None else sorted(caller.apps)
        if not wanted:
            raise Refused("BadKey", "apps is empty: name one, or leave apps out for all of yours.", field="apps")
        for app in wanted:
            if not caller.may_use(app):
                text = f"A key can pass on only what it has: yours is not for the app {shown(app)!r}."
                raise Problem(403, "AppNotAllowed", text)
            if app not in self._apps:
                known = ", ".join(sorted(filter(caller.may_use, self._apps))) or "none"
                raise Refused("UnknownApp", f"There is no app {shown(app)!r}. Known apps: {known}.", field="apps")
        return sorted(set(wanted))

    def _checked_end(self, caller: Caller, post: NewKey) -> float | None:
        """What is not said is the caller's. Raises Problem, Refused."""
        days = post.expires_in_days
        now = self._clock()
        if post.expires_at is None and days is None:
            return caller.expires_at
        if days is None:
            assert post.expires_at is not None
            field, expires_at = "expires_at", post.expires_at.timestamp()
        elif post.expires_at is None:
            field, expires_at = "expires_in_days", now + days * _DAY_S
        else:
            text = "Send expires_at or expires_in_days, not both."
            raise Refused("AmbiguousRequest", text, field="expires_in_days")
        if not now < expires_at <= now + MAX_DAYS * _DAY_S:
            text = f"{field} must be in the future, {MAX_DAYS} days ahead at most: leave it out for a key without end."
            raise Refused("BadKey", text, field=field)
        if caller.expires_at is not None and expires_at > caller.expires_at:
            text = f"A key can pass on only what it has: yours ends at {_time(caller.expires_at):%Y-%m-%dT%H:%M:%SZ}."
            raise Problem(403, "OutlivesYourKey", text)
        return math.ceil(expires_at)


def _may_see(caller: Caller, key: ApiKey) -> bool:
    return caller.may_use_all(key.apps)


def _checked_name(name: str) -> str:
    if not (1 <= len(name) <= MAX_NAME and name.isprintable() and name.strip() == name):
        text = f"name must be 1 to {MAX_NAME} printable characters, without blanks at either end."
        raise Refused("BadKey", text, field="name")
    return name


def _checked_scopes(caller: Caller, wanted: Sequence[Scope] | None) -> Sequence[Scope]:
    """Raises Problem, Refused."""
    if wanted is None:
        wanted = (Scope.SEND,)
    if not wanted:
        text = f"scopes is empty: name one of {', '.join(Scope)}, or leave scopes out for {Scope.SEND}."
        raise Refused("BadKey", text, field="scopes")
    lacking = sorted(set(wanted) - caller.scopes)
    if lacking:
        has = ", ".join(sorted(caller.scopes))
        text = f"A key can pass on only what it has: yours has {has}, not {', '.join(lacking)}."
        raise Problem(403, "MissingScope", text)
    return [each for each in Scope if each in wanted]


def _parse(body: bytes) -> NewKey:
    try:
        return _decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Problem(400, "InvalidJson", "The body is not JSON in UTF-8: send a JSON object.") from None


def _invalid(error: msgspec.ValidationError) -> Refused:
    """The words of msgspec in ours, which never repeat a value."""
    dislike = dissect(error)
    if dislike.unknown is not None:
        known = NewKey.__struct_fields__
        name = shown(dislike.unknown)
        close = closest(dislike.unknown, known)
        hint = f"Did you mean {close}?" if close else f"Known here are {', '.join(known)}."
        return Refused("UnknownField", f"There is no field {name!r} here. {hint}", field=name)
    field = dislike.place or None
    if dislike.words.startswith("Invalid enum value"):
        return Refused("BadKey", f"{field} must be one of {', '.join(Scope)}.", field=field)
    if "required field" in dislike.words:
        return Refused(
            "BadKey", "name is missing: say what the key is for, such as the server that has it.", field="name"
        )
    if field == "expires_at":
        text = "expires_at must be a time with its offset, such as 2027-01-31T12:00:00Z; or send expires_in_days."
        return Refused("BadType", text, field=field)
    plain = dislike.words.replace("`", "")
    return Refused("BadType", f"{field or 'The body'}: {plain[:1].lower()}{plain[1:]}.", field=field)


def _unknown() -> Problem:
    # Its word is not repeated: some will say the whole key where its id is wanted.
    text = f"There is no API key with this id here: GET {PATH} or `heliograph keys list` lists those that there are."
    return Problem(404, "UnknownKey", text)


def _show(key: ApiKey) -> KeyBody:
    ends = None if key.expires_at is None else _time(key.expires_at)
    return KeyBody(key.id, key.name, key.scopes, key.apps, _time(key.created_at), ends)


def _time(at: float) -> datetime:
    return datetime.fromtimestamp(int(at), UTC)
