"""What a request to the Apple-shaped proxy says: who sends it, for which app, with which headers.

Most of a request is what its connection says in all others too. `Reader.read` looks at that once; what may differ from
one to the next is looked at each time (`Common.headers_for`). Nothing is refused that Apple would take, but for what
the caller has no right to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Protocol

from msgspec import Struct
from msgspec.structs import replace

from heliograph import payload, reasons
from heliograph.callers import Callers
from heliograph.config import AppleProxySettings
from heliograph.errors import Refused
from heliograph.keys import Caller, Keyring
from heliograph.model import ApiKey, App, Environment, Headers, KnownCaller, PushType, Scope
from heliograph.protocols import apns
from heliograph.protocols.http2 import Field

_KINDS = {kind.encode(): kind for kind in PushType}
_PRIORITIES = {b"1": 1, b"5": 5, b"10": 10}
_SANDBOX = (b"sandbox", b"development")
"""What is in the names of Apple's hosts for development."""
_REMEMBERED = 128
"""Pairs of expiration and collapse id, for one set of the other fields of a connection."""

_NOT_YET = b"/1/apps/", b"/4/broadcasts"
"""Where Apple has channels and broadcasts, with methods of their own."""

_ONCE = frozenset((b"apns-id", b"apns-expiration", b"apns-collapse-id"))
"""What is among the fields that requests share only where it came a second time."""

_is_expiration = re.compile(rb"[0-9]{1,10}").fullmatch


class Access(Protocol):
    """What somebody showed, and what that opens."""

    @property
    def apps(self) -> Iterable[str] | None:
        """None: all."""
        ...

    @property
    def environment(self) -> Environment | None: ...

    @property
    def topic(self) -> str | None: ...

    @property
    def who(self) -> str:
        """For the log."""
        ...

    def holds(self, now: float) -> bool:
        """Whether it still opens the same."""
        ...


class _ByKey(Struct, frozen=True):
    """An API key."""

    apps: frozenset[str] | None
    find: Callable[[str], ApiKey | None]
    caller: Caller
    key: ApiKey | None
    """None: the server's own."""
    environment: Environment | None = None
    topic: str | None = None

    @property
    def who(self) -> str:
        return "the server's own API key" if self.key is None else f"the API key {self.key.id}"

    def holds(self, now: float) -> bool:
        until = self.caller.expires_at
        return (until is None or now < until) and (self.key is None or self.find(self.key.id) is self.key)


class _ByCertificate(Struct, frozen=True):
    """A client certificate."""

    apps: tuple[str, ...]
    environment: Environment | None
    topic: str | None
    callers: Callers
    certificate: bytes
    caller: KnownCaller

    @property
    def who(self) -> str:
        return f"the caller {self.caller.id}"

    def holds(self, now: float) -> bool:  # noqa: ARG002 - the same shape as the others
        return self.callers.by_certificate(self.certificate) is self.caller


class _ByToken(Struct, frozen=True):
    """A provider token."""

    apps: tuple[str, ...]
    environment: Environment | None
    topic: str | None
    callers: Callers
    token: bytes
    caller: KnownCaller

    @property
    def who(self) -> str:
        return f"the caller {self.caller.id}"

    def holds(self, now: float) -> bool:
        try:
            return self.callers.by_provider_token(self.token, now) is self.caller
        except Refused:
            return False


class Common:
    """What requests have in common that differ in path, id, expiration, collapse id and payload only."""

    __slots__ = ("_variants", "access", "app", "environment", "headers", "max_payload", "open_kind")

    def __init__(
        self, access: Access, app: App, environment: Environment, headers: Headers, *, open_kind: bool
    ) -> None:
        self.access = access
        self.app = app
        self.environment = environment
        self.headers = headers
        """Without expiration and collapse id."""
        self.open_kind = open_kind
        """No push type was named: the payload may make it a background push."""
        self.max_payload = payload.limit(headers.push_type)
        self._variants: dict[tuple[bytes | None, bytes | None, bool], Headers] = {}

    def headers_for(self, expiration: bytes | None, collapse_id: bytes | None, body: bytes) -> Headers:
        """The headers of one; the same object for the same. Raises Refused."""
        background = self.open_kind and apns.is_background(body)
        key = expiration, collapse_id, background
        found = self._variants.get(key)
        if found is None:
            at, collapse = _read_expiration(expiration), _read_collapse_id(collapse_id)
            found = replace(self.headers, expiration=at, collapse_id=collapse)
            if background:  # the client may have named another priority, as one could when there were no push types
                found = replace(found, push_type=PushType.BACKGROUND, priority=None)
            apns.check_headers(found)
            if len(self._variants) >= _REMEMBERED:
                self._variants.clear()
            found = self._variants[key] = _one_object(found)
        return found


class Reader:
    """Reads for one listener."""

    def __init__(
        self, settings: AppleProxySettings, apps: Mapping[str, App], keyring: Keyring, callers: Callers
    ) -> None:
        """`apps` may change."""
        self._settings = settings
        self._apps = apps
        self._keyring = keyring
        self._callers = callers

    def read(self, shared: Sequence[Field], path: bytes, certificate: bytes | None, now: float) -> Common:
        """What these fields say; `certificate` is what the client showed in the TLS handshake, as DER.

        They are without the first apns-id, apns-expiration and apns-collapse-id. Raises Refused.
        """
        values: dict[bytes, bytes] = {}
        duplicate = False
        for name, value in shared:
            if name in _ONCE or (name in values and (name == b"authorization" or name.startswith(b"apns-"))):
                duplicate = True
            values[name] = value
        if values.get(b":method") != b"POST":
            if path.startswith(_NOT_YET):
                check_path(path)
            raise _no(reasons.METHOD_NOT_ALLOWED, "The method is not POST.")
        check_path(path)
        if duplicate:
            raise _no(reasons.DUPLICATE_HEADERS, "A header came twice.")
        access = self._let_in(values.get(b"authorization"), certificate, now)
        try:
            return self._choose(access, values)
        except Refused as error:
            raise _no(reasons.find(error.reason), f"{error.detail} It came from {access.who}.") from None

    def _let_in(self, authorization: bytes | None, certificate: bytes | None, now: float) -> Access:
        """Who it is. Raises Refused."""
        if certificate is not None:
            known = self._callers.by_certificate(certificate)
            if known is None:
                raise _no(reasons.BAD_CERTIFICATE, "The client certificate is not registered any more.")
            return _ByCertificate((known.app,), known.environment, known.topic, self._callers, certificate, known)
        scheme, _, shown = (authorization or b"").partition(b" ")
        shown = shown.strip()
        if scheme.lower() != b"bearer" or not shown:
            text = "There is neither an API key nor a provider token (authorization: bearer ...) nor a certificate."
            raise _no(reasons.MISSING_PROVIDER_TOKEN, text)
        caller = self._keyring.find(shown)
        if caller is None:
            if shown.count(b".") != 2:
                text = "What was shown is neither an API key that is known here nor a provider token."
                raise _no(reasons.INVALID_PROVIDER_TOKEN, text)
            known = self._callers.by_provider_token(shown, now)
            return _ByToken((known.app,), known.environment, known.topic, self._callers, shown, known)
        if Scope.SEND not in caller.scopes:
            raise _no(reasons.INVALID_PROVIDER_TOKEN, f"The API key {caller.id} has no scope to send.")
        return _ByKey(caller.apps, self._keyring.get, caller, self._keyring.get(caller.id) if caller.id else None)

    def _choose(self, access: Access, values: Mapping[bytes, bytes]) -> Common:
        """App, environment and headers. Raises Refused, in the order in which Apple's answers were seen."""
        named, priority = values.get(b"apns-push-type"), values.get(b"apns-priority")
        if priority is not None and (
            priority not in _PRIORITIES or (named == b"background" and _PRIORITIES[priority] != 5)
        ):
            raise _no(reasons.BAD_PRIORITY, "The priority must be 1, 5 or 10, and 5 with a background push.")
        if named is not None and named not in _KINDS:
            raise _no(reasons.INVALID_PUSH_TYPE, "There is no such push type.")
        given = values.get(b"apns-topic", b"")
        try:
            topic = given.decode() or access.topic or ""
        except UnicodeDecodeError:
            raise _no(reasons.BAD_TOPIC, "The topic is not UTF-8.") from None
        names = self._apps if access.apps is None else access.apps
        known = {name: self._apps[name] for name in names if name in self._apps}
        if named is not None:
            kinds: tuple[PushType, ...] = (_KINDS[named],)
        else:
            kinds = (apns.implied_push_type(topic) or PushType.ALERT, PushType.ALERT)
        app, kind, topic = _find(known.values(), topic, kinds)
        environment = self._environment(access, app, values.get(b":authority", values.get(b"host", b"")))
        if app.credentials_for(environment, topic) is None:
            text = f"The app {app.name!r} has no credentials for the topic {topic!r} in {environment}."
            raise _no(reasons.TOPIC_DISALLOWED, text)
        # What is sent at once gets no collapse id of ours: nobody but the caller sends it a second time.
        own = None if app.name in self._settings.durable else False
        level = None if priority is None else _PRIORITIES[priority]
        headers = _one_object(Headers(topic, kind, level, collapse_on_id=own))
        apns.check_headers(headers)
        open_kind = named is None and kind is PushType.ALERT
        return Common(access, app, environment, headers, open_kind=open_kind)

    def _environment(self, access: Access, app: App, authority: bytes) -> Environment:
        environment = access.environment or self._settings.environment
        if environment is None and len(app.environments) == 1:
            return app.environments[0]
        if environment is None:
            sandbox = any(word in authority.lower() for word in _SANDBOX)
            environment = Environment.DEVELOPMENT if sandbox else Environment.PRODUCTION
        if environment not in app.environments:
            raise _no(reasons.TOPIC_DISALLOWED, f"The app {app.name!r} is not set up for {environment}.")
        return environment


@lru_cache(1024)
def _one_object(headers: Headers) -> Headers:
    """The same object for the same headers on every connection: they are told apart faster so."""
    return headers


def check_path(path: bytes) -> None:
    """Whether a notification is sent there. Raises Refused."""
    if not path.startswith(apns.PATH_PREFIX):
        raise _no(reasons.BAD_PATH, "There is nothing at this path.")
    if len(path) == len(apns.PATH_PREFIX):
        raise _no(reasons.MISSING_DEVICE_TOKEN, "There is no device token in the path.")


def _find(apps: Iterable[App], topic: str, kinds: Sequence[PushType]) -> tuple[App, PushType, str]:
    """The app that a topic is of, the push type that it goes with, and the topic with its suffix. Raises Refused."""
    apps = list(apps)
    if not topic:
        if len(apps) != 1 or len(apps[0].topics) != 1:
            raise _no(reasons.MISSING_TOPIC, "There is no topic, and more than one that could be meant.")
        return apps[0], kinds[-1], apns.topic_for(apps[0].topics[0], kinds[-1])
    for kind in kinds:
        for app in apps:
            if apns.allowed_topic(topic, kind, app.topics):
                return app, kind, topic
    if any(apns.allowed_topic(topic, kind, app.topics) for kind in PushType for app in apps):
        raise _no(reasons.BAD_TOPIC, f"The topic {topic!r} has not the suffix of its push type.")
    raise _no(reasons.TOPIC_DISALLOWED, f"The topic {topic!r} is of no app that this caller may use.")


def _read_expiration(value: bytes | None) -> int | None:
    if value is None:
        return None
    if not _is_expiration(value):
        raise _no(reasons.BAD_EXPIRATION_DATE, "The expiration is no whole number of UNIX seconds.")
    return int(value)


def _read_collapse_id(value: bytes | None) -> str | None:
    try:
        return value.decode() or None if value is not None else None
    except UnicodeDecodeError:
        raise _no(reasons.BAD_COLLAPSE_ID, "The collapse id is not UTF-8.") from None


def _no(reason: reasons.Reason, detail: str) -> Refused:
    return Refused(reason.word, detail)
