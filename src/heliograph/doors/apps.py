"""The HTTP API's other half: which apps there are, with what credentials, and apps that come and go without a restart.

No answer shows a secret. What the configuration names is shown like the rest, and changed in its file only.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Mapping
from typing import Any, Protocol

import msgspec
from msgspec import Struct

from heliograph.config import (
    AppContent,
    AppSettings,
    CredentialContent,
    CredentialSettings,
    Environments,
    Port,
    check_proxy,
)
from heliograph.doors.api import Handlers, Read
from heliograph.doors.exchange import Answer, Exchange, Problem, closest, dissect, shown
from heliograph.errors import ConfigError

PATH = "/v1/apps"

MAX_BODY_BYTES = 512 * 1024
"""Octets of a request's body, at most; an app is a few files of a few kilobytes."""

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


class _Credentials(Struct, forbid_unknown_fields=True):
    """A member of `credentials`. Null is the same as nothing."""

    key: str | None = None
    key_id: str | None = None
    team_id: str | None = None
    certificate: str | None = None
    certificate_key: str | None = None
    passphrase: str | None = None
    environment: Environments | None = None

    def __repr__(self) -> str:
        return "<what a caller has an app made of>"


class _Put(_Credentials):
    """The body of a PUT: what `[apps.NAME]` has, with contents in place of files."""

    topic: str | None = None
    topics: tuple[str, ...] | None = None
    credentials: tuple[_Credentials, ...] | None = None
    host: str | None = None
    port: Port | None = None
    ca: str | None = None
    proxy: str | None = None


_decode = msgspec.json.Decoder(_Put).decode


class AppsDoor:
    """The door."""

    def __init__(self, apps: Apps) -> None:
        self._apps = apps
        self._of_all: Handlers = {"GET": self._list, "HEAD": self._list}
        self._of_one: Handlers = {"GET": self._get, "HEAD": self._get, "PUT": self._put, "DELETE": self._delete}

    def find(self, path: str) -> Handlers | None:
        """The handlers of a path by method; None where it is not of this door. Whether callers may, is asked before."""
        if path == PATH:
            return self._of_all
        start, _, name = path.rpartition("/")
        return self._of_one if start == PATH and name else None

    async def _list(self, _: Exchange, __: Read) -> Answer:
        return Answer(200, _encode({"apps": [self._apps.show(name) for name in sorted(self._apps.apps)]}))

    async def _get(self, exchange: Exchange, _: Read) -> Answer:
        name = _name(exchange)
        shown = self._apps.show(name)
        if shown is None:
            raise self._unknown(name)
        return Answer(200, _encode(shown))

    async def _put(self, exchange: Exchange, read: Read) -> Answer:
        self._refuse_configured(_name(exchange))
        return await read(exchange, self._put_that, MAX_BODY_BYTES)

    async def _put_that(self, exchange: Exchange, body: bytes) -> Answer:
        name = _name(exchange)
        content = _content(_parse(body))
        try:
            is_new = await self._apps.put(name, content)
        except ConfigError as error:
            raise Problem(400, "BadApp", f"{error}.") from None
        where = ((b"location", f"{PATH}/{name}".encode()),)
        return Answer(201 if is_new else 200, _encode(self._apps.show(name)), where)

    async def _delete(self, exchange: Exchange, _: Read) -> Answer:
        name = _name(exchange)
        self._refuse_configured(name)
        if not await self._apps.remove(name):
            raise self._unknown(name)
        return Answer(200, _encode({"removed": name}))

    def _refuse_configured(self, name: str) -> None:
        if self._apps.is_configured(name):
            text = f"The app {name!r} is in the server's configuration file: change it there, then send SIGHUP."
            raise Problem(409, "ConfiguredApp", text)

    def _unknown(self, name: str) -> Problem:
        known = ", ".join(sorted(self._apps.apps)) or "none"
        return Problem(404, "UnknownApp", f"There is no app {name!r}. Known apps: {known}.")


def _name(exchange: Exchange) -> str:
    return exchange.path.rpartition("/")[2]


def _parse(body: bytes) -> _Put:
    try:
        return _decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Problem(400, "InvalidJson", "The body is not JSON in UTF-8: send a JSON object.") from None


def _invalid(error: msgspec.ValidationError) -> Problem:
    """The words of msgspec in ours, which never repeat a value."""
    dislike = dissect(error)
    if dislike.unknown is not None:
        known = (_Credentials if dislike.place else _Put).__struct_fields__
        close = closest(dislike.unknown, known)
        hint = f"Did you mean {close}?" if close else f"Known here are {', '.join(known)}."
        return Problem(400, "UnknownField", f"There is no field {shown(dislike.unknown)!r} here. {hint}")
    field = dislike.place or "The body"
    if dislike.words.startswith("Invalid enum value"):
        return Problem(400, "BadEnvironment", f"{field} must be one of {', '.join(Environments)}.")
    plain = dislike.words.replace("`", "")
    return Problem(400, "BadType", f"{field}: {plain[:1].lower()}{plain[1:]}.")


def _content(put: _Put) -> AppContent:
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


def _given(put: _Credentials) -> dict[str, Any]:
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
