"""Callers over HTTP: whose certificates and signing keys open the doors where clients have no API key.

Only the public half of anything comes here. Who has an API key for some apps sees and changes the callers of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec
import structlog
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from msgspec import Struct

from heliograph import callers
from heliograph.callers import Callers
from heliograph.doors.answers import Removed
from heliograph.doors.api import Call, Route, Routes
from heliograph.doors.bodies import check_environment, parse
from heliograph.doors.exchange import Answer, Problem
from heliograph.doors.queries import choose_app
from heliograph.errors import ConfigError, Refused
from heliograph.keys import Caller
from heliograph.model import App, Environment, KnownCaller, PushType, Scope, SigningKey
from heliograph.net.identity import made_here
from heliograph.net.tls import check_anchor
from heliograph.protocols import apns, provider_token
from heliograph.protocols.certificate import Particulars, particulars
from heliograph.protocols.certificate.files import Sort, items, unpack

PATH = "/v1/callers"

MAX_BODY_BYTES = 128 * 1024
"""Octets of a request's body, at most."""

MAX_NAME = 64
"""Characters of a name, at most."""

_PUBLIC = "-----BEGIN PUBLIC KEY-----"

_log = structlog.get_logger("heliograph.callers")
_encode = msgspec.json.encode


class NewCaller(Struct, forbid_unknown_fields=True):
    """The body of a POST: a certificate, or a public key with its two ids. Null is the same as nothing."""

    app: str | None = None
    """The app that it sends to. Default: the only one."""
    name: str | None = None
    """What people call it. Default: what the certificate says, or the key's id."""
    environment: Environment | None = None
    """Where it sends to. Default: what the certificate says where it says one; else that of the door it comes to."""
    topic: str | None = None
    """What it sends with where it does not say itself. Default: what the certificate says, or the app's only one."""
    certificate: str | None = None
    """PEM, without a private key. It may have ended."""
    public_key: str | None = None
    """PEM, on the curve P-256: what verifies the provider tokens that the caller signs."""
    key_id: str | None = None
    """With a public key: the 10 characters that its provider tokens have as `kid`."""
    team_id: str | None = None
    """With a public key: the 10 characters that its provider tokens have as `iss`."""


class CallerBody(Struct):
    """A caller as JSON. Times are in whole seconds, in UTC."""

    id: str
    """The certificate's SHA-256, or the signing key's team id and key id with a dot between."""
    kind: str
    """`certificate` or `signing key`."""
    name: str
    """What people call it."""
    app: str
    """The app that it sends to."""
    environment: Environment | None
    """Where it sends to; null: what the door says that it comes to, or the app's only one."""
    topic: str | None
    """What it sends with where it does not say itself; null: the app's only one."""
    ends_at: datetime | None
    """The end that the certificate names. It opens heliograph all the same."""
    created_at: datetime
    """When it was registered."""


class CallersBody(Struct):
    """Callers."""

    callers: Sequence[CallerBody]
    """Oldest first."""


class _Shown(NamedTuple):
    """What a caller will show, as it was sent."""

    id: str
    name: str
    facts: Particulars | None
    """Of a certificate."""
    certificate: bytes | None = None
    public_key: bytes | None = None


class CallersPart:
    """The part of the API."""

    def __init__(self, known: Callers, apps: Mapping[str, App], *, clock: Callable[[], float]) -> None:
        """`apps` may change; `clock` gives UNIX seconds."""
        self._callers = known
        self._apps = apps
        self._clock = clock
        manage = frozenset({Scope.MANAGE})
        get_all = Route(self._list, manage)
        self._of_all: Routes = {"GET": get_all, "HEAD": get_all, "POST": Route(self._post, manage)}
        self._of_one: Routes = {"DELETE": Route(self._delete, manage)}

    def find(self, path: str) -> Routes | None:
        """As `Part` has it."""
        if path == PATH:
            return self._of_all
        start, _, caller_id = path.rpartition("/")
        return self._of_one if start == PATH and caller_id else None

    async def _list(self, call: Call) -> Answer:
        seen = [_show(each) for each in self._callers.all() if call.caller.may_use(each.app)]
        return Answer(200, _encode(CallersBody(seen)))

    async def _post(self, call: Call) -> Answer:
        async def add(body: bytes) -> Answer:
            return await self._add(call.caller, parse(body, NewCaller))

        return await call.read(add, MAX_BODY_BYTES)

    async def _add(self, asking: Caller, post: NewCaller) -> Answer:
        app = self._apps[choose_app(asking, self._apps, post.app)]
        shown = _shown(post)
        check_environment(app, post.environment)
        caller = KnownCaller(
            id=shown.id,
            name=_checked_name(post.name, shown.name),
            app=app.name,
            environment=post.environment or _environment(app, shown.facts),
            topic=_topic(app, post.topic, shown.facts),
            certificate=shown.certificate,
            public_key=shown.public_key,
            not_after=None if shown.facts is None else shown.facts.not_after,
            created_at=self._clock(),
        )
        is_new = self._callers.get(caller.id) is None
        other = await self._callers.add(caller)
        if other is not None:
            # Whose it is, is no business of who is not for that app.
            whose = f"the app {other.app!r}" if asking.may_use(other.app) else "another app"
            text = f"This {_kind(caller)} is known already, and opens {whose}: remove it there first, or take another."
            raise Problem(409, "CallerTaken", text)
        _log.info("caller_added", id=caller.id, name=caller.name, app=caller.app, by=asking.id or "the server's own")
        where = ((b"location", f"{PATH}/{caller.id}".encode()),)
        return Answer(201 if is_new else 200, _encode(_show(caller)), where)

    async def _delete(self, call: Call) -> Answer:
        caller = self._callers.get(call.exchange.path.rpartition("/")[2])
        if caller is None or not call.caller.may_use(caller.app) or not await self._callers.remove(caller.id):
            text = f"There is no caller with this id here: GET {PATH} or `heliograph callers list` shows all."
            raise Problem(404, "UnknownCaller", text)
        by = call.caller.id or "the server's own"
        _log.info("caller_removed", id=caller.id, name=caller.name, app=caller.app, by=by)
        return Answer(200, _encode(Removed(caller.id)))


def _shown(post: NewCaller) -> _Shown:
    """Raises Refused."""
    if post.certificate is not None and post.public_key is not None:
        text = "Send certificate or public_key, not both: a caller that has both is registered twice."
        raise Refused("AmbiguousRequest", text, field="public_key")
    if post.certificate is not None:
        stray = "key_id" if post.key_id is not None else "team_id" if post.team_id is not None else None
        if stray is not None:
            raise Refused("BadCaller", f"{stray} goes with a public_key: leave it out.", field=stray)
        return _shown_certificate(post.certificate)
    if post.public_key is not None:
        return _shown_key(post.public_key, post.key_id, post.team_id)
    text = "Send what the caller shows: its certificate, or a public_key with key_id and team_id."
    raise Refused("BadCaller", text, field="certificate")


def _shown_certificate(pem: str) -> _Shown:
    content = pem.encode()
    try:
        if {each.sort for each in items(content)} & {Sort.KEY, Sort.LOCKED_KEY, Sort.P12}:
            text = (
                "certificate has a private key in it, which nobody but its owner should have: send only what stands "
                "from BEGIN CERTIFICATE to END CERTIFICATE."
            )
            raise Refused("BadCaller", text, field="certificate")
        leaf = callers.leaf_of(unpack(content).certificates)
        if made_here(leaf):
            text = (
                "certificate is heliograph's own, by which clients know the server: send the one that the client "
                "shows, or make one with `heliograph legacy certificate`."
            )
            raise Refused("BadCaller", text, field="certificate")
        facts = particulars(leaf)
        shown = leaf.public_bytes(Encoding.PEM)
        check_anchor(shown)
    except ConfigError as error:
        raise Refused("BadCaller", f"certificate: {error}.", field="certificate") from None
    return _Shown(facts.fingerprint, facts.name, facts, certificate=shown)


def _shown_key(pem: str, key_id: str | None, team_id: str | None) -> _Shown:
    if "PRIVATE KEY-----" in pem:
        text = (
            "public_key is a private key, which nobody but its owner should have: send its public half, as "
            "`openssl pkey -in FILE -pubout` writes it."
        )
        raise Refused("BadCaller", text, field="public_key")
    if _PUBLIC not in pem:
        text = f"public_key must be PEM, the text that begins with {_PUBLIC}."
        raise Refused("BadCaller", text, field="public_key")
    for field, value in (("key_id", key_id), ("team_id", team_id)):
        if value is None:
            text = f"{field} is missing: send the 10 characters that the caller's provider tokens have in it."
            raise Refused("BadCaller", text, field=field)
    key_id, team_id = key_id or "", team_id or ""
    try:
        provider_token.check_ids(key_id, team_id)
    except ConfigError as error:
        field = "key_id" if "key id" in str(error) else "team_id"
        raise Refused("BadCaller", f"{error}.", field=field) from None
    try:
        key = provider_token.public_key(SigningKey(key_id, team_id, pem.encode()))
    except ConfigError as error:
        raise Refused("BadCaller", f"{error}.", field="public_key") from None
    plain = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return _Shown(callers.key_id(team_id, key_id), key_id, None, public_key=plain)


def _environment(app: App, facts: Particulars | None) -> Environment | None:
    """What the certificate says, where it says one. Raises Refused."""
    if facts is None or len(facts.environments) != 1:
        return None
    (environment,) = facts.environments
    if environment not in app.environments:
        text = (
            f"The certificate is for {environment}, and the app {app.name!r} for {app.environments[0]}: if its bearer "
            f"is to send there, say so with environment {app.environments[0]}."
        )
        raise Refused("UnknownEnvironment", text, field="environment")
    return environment


def _topic(app: App, wanted: str | None, facts: Particulars | None) -> str | None:
    """What the caller sends with; a client with a key says itself. Raises Refused."""
    if wanted is not None:
        if _is_topic_of(app, wanted):
            return wanted
        text = f"The topic is not the app's: send {' or '.join(app.topics)}, with a push type's suffix or without."
        raise Refused("TopicDisallowed", text, field="topic")
    if facts is None:
        return None
    fit = [topic for topic in facts.topics if _is_topic_of(app, topic)]
    if fit:
        return facts.uid if facts.uid in fit else fit[0]
    if facts.topics:
        text = (
            f"The certificate is for {facts.topics[0]}, which is no topic of the app {app.name!r}: name another app, "
            f"or, if its bearer is to send to this one, a topic, {' or '.join(app.topics)}."
        )
        raise Refused("TopicDisallowed", text, field="topic")
    if len(app.topics) > 1:
        text = f"The app has several topics: name one of {', '.join(app.topics)}."
        raise Refused("MissingTopic", text, field="topic")
    return None


def _is_topic_of(app: App, topic: str) -> bool:
    return any(apns.allowed_topic(topic, push_type, app.topics) for push_type in PushType)


def _checked_name(wanted: str | None, default: str) -> str:
    if wanted is None:
        return default[:MAX_NAME].strip() or "a certificate without a name"
    if not (1 <= len(wanted) <= MAX_NAME and wanted.isprintable() and wanted.strip() == wanted):
        text = f"name must be 1 to {MAX_NAME} printable characters, without blanks at either end."
        raise Refused("BadCaller", text, field="name")
    return wanted


def _kind(caller: KnownCaller) -> str:
    return "signing key" if caller.certificate is None else "certificate"


def _show(caller: KnownCaller) -> CallerBody:
    return CallerBody(
        caller.id,
        _kind(caller),
        caller.name,
        caller.app,
        caller.environment,
        caller.topic,
        None if caller.not_after is None else datetime.fromtimestamp(caller.not_after, UTC),
        datetime.fromtimestamp(int(caller.created_at), UTC),
    )
