"""The HTTP API's other half: which apps there are, with what credentials, and apps that come and go without a restart.

No answer shows a secret. What the configuration names is shown like the rest, and changed in its file only. A caller
whose API key is for some apps hears of no other.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec
from msgspec import Struct

from heliograph.complaints import closest, dissect, sandbox_hint, shown
from heliograph.config import (
    AppContent,
    AppSettings,
    CredentialContent,
    CredentialSettings,
    Environments,
    Port,
    check_credentials,
    check_proxy,
)
from heliograph.doors.answers import Removed
from heliograph.doors.api import Call, Route, Routes
from heliograph.doors.exchange import Answer, Problem
from heliograph.doors.queries import app_not_allowed, replaced
from heliograph.errors import ConfigError
from heliograph.model import Scope

PATH = "/v1/apps"

MAX_BODY_BYTES = 512 * 1024
"""Octets of a request's body, at most; an app is a few files of a few kilobytes."""

_NAME = PATH.count("/") + 1
"""Where in the path an app's name is."""

_encode = msgspec.json.encode


class Apps(Protocol):
    """What the door needs of a directory of apps."""

    @property
    def apps(self) -> Mapping[str, object]: ...

    def show(self, name: str) -> dict[str, Any] | None:
        """An app as JSON, without secrets."""
        ...

    def is_configured(self, name: str) -> bool: ...

    async def put(self, name: str, content: AppContent) -> bool:
        """Whether it is a new one. Raises ConfigError, StoreError."""
        ...

    async def remove(self, name: str) -> bool:
        """Whether there was one. Raises ConfigError, StoreError."""
        ...

    async def add_credentials(self, name: str, given: CredentialContent, instead_of: str | None) -> str | None:
        """Their id; None: there is no such app, or it has none with the id `instead_of`.

        Raises ConfigError, StoreError.
        """
        ...

    async def remove_credentials(self, name: str, gone: str) -> bool:
        """Whether there were such. Raises StoreError, and ConfigError where the app cannot be without them."""
        ...


class NewCredentials(Struct, forbid_unknown_fields=True):
    """A member of `credentials`. Null is the same as nothing."""

    key: str | None = None
    """A signing key: the contents of the .p8 file."""
    key_id: str | None = None
    """Its id, where the name of the file does not tell it: the 10 characters that the developer account shows."""
    team_id: str | None = None
    """The 10 characters that the developer account shows as Team ID."""
    certificate: str | None = None
    """In place of a key: a client certificate, as PEM, or a .p12 or .cer file as base64."""
    certificate_key: str | None = None
    """The certificate's key, where it is a file of its own."""
    passphrase: str | None = None
    """What opens the key or the certificate."""
    environment: Environments | None = None
    """Which environments it is used for. Default: both with a key; with a certificate those that it is good for."""

    def __repr__(self) -> str:
        return "<what a caller has an app made of>"


class NewApp(NewCredentials):
    """The body of a PUT: what `[apps.NAME]` has, with contents in place of files."""

    topic: str | None = None
    """The bundle id. A certificate names it itself."""
    topics: tuple[str, ...] | None = None
    """Several bundle ids."""
    credentials: tuple[NewCredentials, ...] | None = None
    """Several keys and certificates."""
    host: str | None = None
    """Send there in place of Apple."""
    port: Port | None = None
    """Of that host. Default: 443."""
    ca: str | None = None
    """The certificates to trust there, as PEM."""
    proxy: str | None = None
    """An HTTP proxy to go through, as `http://HOST:PORT`."""


_T = TypeVar("_T", bound=NewCredentials)


class AppsPart:
    """The part of the API."""

    def __init__(self, apps: Apps) -> None:
        self._apps = apps
        manage = frozenset({Scope.MANAGE})
        get_all, get = Route(self._list, manage), Route(self._get, manage)
        self._of_all: Routes = {"GET": get_all, "HEAD": get_all}
        self._of_one: Routes = {
            "GET": get,
            "HEAD": get,
            "PUT": Route(self._put, manage),
            "DELETE": Route(self._delete, manage),
        }
        self._of_credentials: Routes = {"POST": Route(self._post_credentials, manage)}
        self._of_one_of_them: Routes = {"DELETE": Route(self._delete_credentials, manage)}

    def find(self, path: str) -> Routes | None:
        """As `Part` has it."""
        if path == PATH:
            return self._of_all
        if not path.startswith(f"{PATH}/"):
            return None
        match path.split("/")[_NAME:]:
            case [name] if name:
                return self._of_one
            case [name, "credentials"] if name:
                return self._of_credentials
            case [name, "credentials", each] if name and each:
                return self._of_one_of_them
        return None

    async def _list(self, call: Call) -> Answer:
        return Answer(200, _encode({"apps": [self._apps.show(name) for name in self._names(call)]}))

    async def _get(self, call: Call) -> Answer:
        name = _name(call)
        app = self._apps.show(name)
        if app is None:
            raise self._unknown(call, name)
        return Answer(200, _encode(app))

    async def _put(self, call: Call) -> Answer:
        name = _name(call)
        self._refuse_configured(name)
        return await call.read(partial(self._put_that, name), MAX_BODY_BYTES)

    async def _put_that(self, name: str, body: bytes) -> Answer:
        content = _content(_parse(body, NewApp))
        try:
            is_new = await self._apps.put(name, content)
        except ConfigError as error:
            raise Problem(400, "BadApp", f"{error}.") from None
        where = ((b"location", f"{PATH}/{name}".encode()),)
        return Answer(201 if is_new else 200, _encode(self._apps.show(name)), where)

    async def _delete(self, call: Call) -> Answer:
        name = _name(call)
        self._refuse_configured(name)
        if not await self._apps.remove(name):
            raise self._unknown(call, name)
        return Answer(200, _encode(Removed(name)))

    async def _post_credentials(self, call: Call) -> Answer:
        name = _name(call)
        self._refuse_configured(name)
        if self._apps.show(name) is None:
            raise self._unknown(call, name)
        return await call.read(partial(self._post_those, call), MAX_BODY_BYTES)

    async def _post_those(self, call: Call, body: bytes) -> Answer:
        name, instead_of = _name(call), replaced(call.exchange)
        given = CredentialSettings(**_given(_parse(body, NewCredentials)))
        try:
            check_credentials(given)
        except ValueError as error:
            raise Problem(400, "BadApp", f"What was sent {error}.") from None
        try:
            added = await self._apps.add_credentials(name, _credentials(given), instead_of)
        except ConfigError as error:
            raise Problem(400, "BadApp", f"{error}.") from None
        if added is None:
            raise self._unknown_credentials(call, instead_of or "")
        where = ((b"location", f"{PATH}/{name}/credentials/{added}".encode()),)
        return Answer(201, _encode(self._apps.show(name)), where)

    async def _delete_credentials(self, call: Call) -> Answer:
        name, gone = _name(call), call.exchange.path.rpartition("/")[2]
        self._refuse_configured(name)
        try:
            if not await self._apps.remove_credentials(name, gone):
                raise self._unknown_credentials(call, gone)
        except ConfigError as error:
            raise Problem(409, "CredentialNeeded", f"{error}.") from None
        return Answer(200, _encode(Removed(gone)))

    def _unknown_credentials(self, call: Call, wanted: str) -> Problem:
        name = _name(call)
        app = self._apps.show(name)
        if app is None:
            return self._unknown(call, name)
        known = ", ".join(each["id"] for each in app["credentials"])
        text = f"The app {name!r} has no credentials with the id {shown(wanted)!r}. Known ids: {known}."
        return Problem(404, "UnknownCredential", text)

    def _refuse_configured(self, name: str) -> None:
        if self._apps.is_configured(name):
            text = f"The app {name!r} is in the server's configuration file: change it there, then send SIGHUP."
            raise Problem(409, "ConfiguredApp", text)

    def _names(self, call: Call) -> list[str]:
        return sorted(filter(call.caller.may_use, self._apps.apps))

    def _unknown(self, call: Call, name: str) -> Problem:
        known = ", ".join(self._names(call)) or "none"
        return Problem(404, "UnknownApp", f"There is no app {shown(name)!r}. Known apps: {known}.")


def _name(call: Call) -> str:
    """The app that the path names. Raises Problem."""
    name = call.exchange.path.split("/")[_NAME]
    if not call.caller.may_use(name):
        raise app_not_allowed(name)
    return name


def _parse(body: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(error, kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Problem(400, "InvalidJson", "The body is not JSON in UTF-8: send a JSON object.") from None


def _invalid(error: msgspec.ValidationError, kind: type[NewCredentials]) -> Problem:
    """The words of msgspec in ours, which never repeat a value."""
    dislike = dissect(error)
    if dislike.unknown is not None:
        known = (NewCredentials if dislike.place else kind).__struct_fields__
        close = closest(dislike.unknown, known)
        hint = f"Did you mean {close}?" if close else f"Known here are {', '.join(known)}."
        return Problem(400, "UnknownField", f"There is no field {shown(dislike.unknown)!r} here. {hint}")
    field = dislike.place or "The body"
    if dislike.words.startswith("Invalid enum value"):
        text = f"{field} must be one of {', '.join(Environments)}.{sandbox_hint(dislike)}"
        return Problem(400, "BadEnvironment", text)
    plain = dislike.words.replace("`", "")
    return Problem(400, "BadType", f"{field}: {plain[:1].lower()}{plain[1:]}.")


def _content(put: NewApp) -> AppContent:
    """What the app is made of. Raises Problem."""
    try:
        # As for a file; what is a reference there is the contents here.
        settings = AppSettings(
            **_given(put),
            topic=put.topic,
            topics=put.topics or (),
            credentials=tuple(CredentialSettings(**_given(each)) for each in put.credentials or ()),
            host=put.host,
            port=443 if put.port is None else put.port,
            ca=put.ca,
        )
        if put.proxy is not None:
            check_proxy(put.proxy, secret=True)
    except ValueError as error:
        raise Problem(400, "BadApp", f"The app {error}.") from None
    return AppContent(
        topics=settings.bundle_ids,
        credentials=tuple(map(_credentials, settings.each_credentials())),
        host=settings.host,
        port=settings.port,
        ca=None if put.ca is None else put.ca.encode(),
        proxy=put.proxy,
    )


def _given(put: NewCredentials) -> dict[str, Any]:
    return {name: getattr(put, name) for name in CredentialSettings.__struct_fields__}


def _credentials(given: CredentialSettings) -> CredentialContent:
    return CredentialContent(
        key=None if given.key is None else given.key.encode(),
        key_id=given.key_id,
        team_id=given.team_id,
        certificate=None if given.certificate is None else _octets(given.certificate, "certificate"),
        certificate_key=None if given.certificate_key is None else _octets(given.certificate_key, "certificate_key"),
        passphrase=None if given.passphrase is None else given.passphrase.encode(),
        environment=given.environment,
    )


def _octets(text: str, field: str) -> bytes:
    """PEM as it is, other files from base64."""
    if "-----BEGIN " in text:
        return text.encode()
    try:
        return b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise Problem(400, "BadApp", f"{field} must be PEM text, or a file as base64.") from None
