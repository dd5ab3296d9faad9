"""What Apple would say: the keys, apps and devices it knows, and its judgement of a request. Pure.

Devices are lenient: every well-formed device token is one of this environment and of the topic it is used with, until
`register` or `unregister` says otherwise; in the strict mode there are only those that were registered. So are teams:
one without an app listed may send to every topic. What becomes of an accepted notification is told in `devices`.

The order of the checks. Apple publishes none; whatever is wrong first is answered.

1. Certificate: one of the other environment (BadCertificateEnvironment) or not for pushing (BadCertificate) is told by
   GOAWAY, before any request. Seen from outside: sideshow/apns2, issue 93.
2. Method. Seen from outside: a HEAD with useless credentials draws 405 (appleboy/gorush, issue 568).
3. Path: BadPath, then MissingDeviceToken. From here on the order is our choice, but for what Apple's "Sending
   notification requests to APNs" says of authentication: it comes before the device token.
4. DuplicateHeaders, for `authorization` and `apns-*`.
5. The provider token: missing; invalid (form, algorithm, key id, signature, `iat` in the future); expired; of another
   team than its key; made with a key of the other environment; of a key that has nothing to do with the connection's
   first; renewed within 20 minutes. After an expired one a connection takes no other (jchambers/pushy,
   TokenAuthenticationApnsClientHandler). With a client certificate none of this is looked at. Of the key's environment
   Apple's table says BadEnvironmentKeyIdInToken; its servers were seen to say BadEnvironmentKeyInToken
   (swift-server-community/APNSwift, pull request 229), as we do.
6. Fields: `apns-id`, `apns-expiration`, `apns-collapse-id`, `apns-priority`, `apns-push-type`.
7. The topic: missing, malformed or with a suffix that the push type does not have, of another team or certificate, or
   not one that its topic-specific key was made for (TopicDisallowed; Apple does not say which reason that has).
8. The payload: empty, too large. What it says is not judged.
9. The device token: malformed, of the other environment or not registered in the strict mode, of another topic,
   unregistered.
10. Too many in a second for this device token, where there is a limit. Apple publishes none.

Sources: Apple, "Sending notification requests to APNs", "Handling notification responses from APNs" and "Establishing
a token-based connection to APNs" (team-scoped and topic-specific keys, related keys, one connection a team).
"""

from __future__ import annotations

import re
from binascii import unhexlify
from collections.abc import Collection, Sequence
from math import inf
from uuid import uuid4

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from msgspec import Struct

from heliograph import reasons
from heliograph.errors import Refused
from heliograph.model import Environment, PushType, SigningKey
from heliograph.protocols import apns
from heliograph.protocols.certificate import Particulars
from heliograph.protocols.http2 import Field
from heliograph.protocols.provider_token import MAX_AGE_S, Claims, public_key, verify
from heliograph.reasons import Reason
from heliograph.simulator.devices import KEEP, Device, Devices, Received, Shown, check_topic, is_topic
from heliograph.simulator.faults import Answer, Faults

__all__ = ["KEEP", "Apple", "Device", "Received", "Shown", "Verdict", "Visit", "addressed_to"]

MAX_PAYLOAD_BYTES = 4096
MAX_VOIP_PAYLOAD_BYTES = 5120

_VARYING = frozenset((b":path", b"apns-id", b"apns-expiration", b"apns-collapse-id", b"content-length"))
"""Fields that may differ from request to request; what a client says in all others is judged once a connection."""
LEAST_AGE_S = 20 * 60
"""How long a connection has to keep a provider token."""
_REMEMBERED = 64
"""Sets of the other fields that a connection is remembered for, and provider tokens that were verified."""
_MAX_EXPIRATION = 2**32 - 1

_uuid = re.compile(rb"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}").fullmatch
_PUSH_TYPES = {kind.encode(): kind for kind in PushType}
_PRIORITIES = frozenset((b"1", b"5", b"10"))


class Verdict(Struct, frozen=True, gc=False):
    """The answer to one request."""

    status: int
    apns_id: bytes
    reason: str | None = None
    since: int | None = None
    """UNIX milliseconds, with 410."""
    retry_after_s: int | None = None
    unique_id: bytes | None = None
    """`apns-unique-id`, which Apple gives in the development environment."""


class Visit:
    """What Apple remembers of one connection."""

    __slots__ = ("authorization", "certificate", "epoch", "expired", "in_use", "key_id", "memo")

    def __init__(self, certificate: Particulars | None = None) -> None:
        self.certificate = certificate
        """What the client showed in the TLS handshake."""
        self.key_id: str | None = None
        """The key of the first good provider token; None while there was none."""
        self.authorization = b""
        """The provider token that was used last, with its scheme."""
        self.in_use: dict[str, tuple[bytes, float]] = {}
        """The provider token in use of each key, and since when, in UNIX seconds."""
        self.expired = False
        """One of its provider tokens was."""
        self.memo: dict[tuple[Field, ...], _Common] = {}
        self.epoch = 0


class _Key(Struct, frozen=True):
    """A signing key as Apple knows it."""

    team_id: str
    public: EllipticCurvePublicKey
    environment: Environment | None
    topics: frozenset[str] | None
    related: str | None


class _Common(Struct, frozen=True):
    """What the fields say that a client repeats in request after request, by the checks in the module's list."""

    method: Reason | None
    duplicate: bool
    authorization: bytes
    key_id: str
    provider_token: Reason | None
    good_until: float
    """UNIX seconds at which the provider token expires."""
    late: Reason | None
    """What is wrong with priority, push type or topic."""
    topic: str
    topic_octets: bytes
    push_type: PushType
    max_payload_bytes: int


class Apple(Faults, Devices):
    """Judges requests; can be told what there is (`add_app`, `Devices`) and how to misbehave (`Faults`)."""

    def __init__(
        self,
        environment: Environment = Environment.PRODUCTION,
        *,
        strict: bool = False,
        device_limit: int | None = None,
        keep: int = KEEP,
    ) -> None:
        """`strict`: there are no devices but those that were registered.

        `device_limit`: how many notifications a second one device token may get; None: as many as there are.
        `keep`: how many accepted notifications stay readable; 0 for a benchmark.
        """
        Faults.__init__(self)
        Devices.__init__(self, strict=strict, keep=keep)
        self.environment = environment
        self.device_limit = device_limit
        self._keeps = keep > 0
        self._keys: dict[str, _Key] = {}
        self._apps: dict[str, set[str]] = {}
        """Bundle ids of each team that has any."""
        self._claims: dict[bytes, Claims] = {}
        """Provider tokens that were verified: the signature costs some 100 us."""
        self._epoch = 0
        """Grows when what connections remember may have become wrong."""
        self._second = 0
        self._counts: dict[bytes, int] = {}
        """Notifications of this second by device token, where there is a limit."""
        # Ids that we make share their beginning with no other simulator, and end in a number.
        self._id_prefix = str(uuid4())[:24]
        self._ids = 0

    # -- what there is -------------------------------------------------------------------------------------------

    def add_key(
        self,
        key: SigningKey,
        *,
        environment: Environment | None = None,
        topics: Collection[str] | None = None,
        related: str | None = None,
    ) -> None:
        """Take provider tokens made with this key. Raises ConfigError where it is none, Refused where a topic is none.

        `environment`: the only one that it is for, as of a team-scoped key. `topics`: the bundle ids that a
        topic-specific key is for. `related`: the id of the key whose provider tokens may use the same connections.
        """
        scope = None if topics is None else frozenset(map(check_topic, topics))
        self._keys[key.key_id] = _Key(key.team_id, public_key(key), environment, scope, related)
        self._forget_verified()

    def add_app(self, bundle_id: str, team_id: str) -> None:
        """This app is of this team, whose keys may send to its topics; from now on, to those of listed apps only.

        Raises Refused where the bundle id is none.
        """
        self._apps.setdefault(team_id, set()).add(check_topic(bundle_id))
        self._forget_verified()

    def keys(self) -> list[tuple[str, str]]:
        """Key id and team id of every key."""
        return [(key_id, key.team_id) for key_id, key in self._keys.items()]

    def apps(self) -> list[tuple[str, str]]:
        """Bundle id and team id of every app that is listed."""
        return [(app, team_id) for team_id, apps in self._apps.items() for app in sorted(apps)]

    def reset(self) -> None:
        """Forget devices, what they got, keys, apps and rules. Who follows still does, and connections stay open."""
        self.behaves()
        self.dice.seed(0)
        self._forget_devices()
        self._keys.clear()
        self._apps.clear()
        self._counts.clear()
        self._forget_verified()

    def _forget_verified(self) -> None:
        self._claims.clear()
        self._epoch += 1

    # -- the judgement -------------------------------------------------------------------------------------------

    def judge(
        self,
        visit: Visit,
        fields: Sequence[Field],
        body: bytes,
        now: float,
        instead: Answer | None = None,
        identifier: int | None = None,
    ) -> Verdict:
        """The answer to a request, which is from then on received if that is 200.

        `now` is UNIX seconds, `instead` what to say where 200 was due. A body longer than any limit may be cut short.
        `identifier`: see `Received`.
        """
        varying: dict[bytes, bytes] = {}
        shared = []
        for field in fields:
            name = field[0]
            if name in _VARYING:
                varying[name] = field[1]
            else:
                shared.append(field)
        if visit.epoch != self._epoch:
            visit.epoch = self._epoch
            visit.memo.clear()
        key = tuple(shared)
        common = visit.memo.get(key)
        if common is None:
            common = self._read(visit, key, now)

        apns_id = varying.get(b"apns-id")
        known_id = apns_id if apns_id is not None and _uuid(apns_id) else self._new_id()
        path = varying.get(b":path", b"")
        token = path[len(apns.PATH_PREFIX) :].lower()
        expiration = varying.get(b"apns-expiration")
        collapse_id = varying.get(b"apns-collapse-id")
        device = self._known.get(token)

        if common.method is not None:
            no = common.method
        elif not path.startswith(apns.PATH_PREFIX):
            no = reasons.BAD_PATH
        elif not token:
            no = reasons.MISSING_DEVICE_TOKEN
        elif common.duplicate or len(varying) + len(key) != len(fields):
            no = reasons.DUPLICATE_HEADERS
        elif common.provider_token is not None:
            no = common.provider_token
        elif now > common.good_until or visit.expired:
            no = reasons.EXPIRED_PROVIDER_TOKEN
        elif common.authorization != visit.authorization and not _change(visit, common, now):
            no = reasons.TOO_MANY_PROVIDER_TOKEN_UPDATES
        elif known_id is not apns_id and apns_id is not None:
            no = reasons.BAD_MESSAGE_ID
        elif expiration is not None and not _is_expiration(expiration):
            no = reasons.BAD_EXPIRATION_DATE
        elif collapse_id is not None and len(collapse_id) > apns.MAX_COLLAPSE_ID_BYTES:
            no = reasons.BAD_COLLAPSE_ID
        elif common.late is not None:
            no = common.late
        elif not body:
            no = reasons.PAYLOAD_EMPTY
        elif len(body) > common.max_payload_bytes:
            no = reasons.PAYLOAD_TOO_LARGE
        elif not _is_token(token) or (
            self.strict if device is None else device.environment not in (None, self.environment)
        ):
            no = reasons.BAD_DEVICE_TOKEN
        elif device is not None and device.topic not in (None, common.topic_octets):
            no = reasons.DEVICE_TOKEN_NOT_FOR_TOPIC
        elif device is not None and device.since is not None:
            return Verdict(410, known_id, reasons.UNREGISTERED.word, device.since)
        elif self.device_limit is not None and self._is_too_much(token, now):
            no = reasons.TOO_MANY_REQUESTS
        elif instead is not None:
            return Verdict(instead.status, known_id, instead.reason, instead.since, instead.retry_after_s)
        else:
            if self._keeps or self._followers or device is not None:
                entry = (known_id, token, common.topic, common.push_type, body, collapse_id, identifier, now)
                if self._followers or device is not None:
                    self._take(entry, device, expiration)
                else:  # as that would do, for speed
                    self._accepted.append(entry)
                    self._arrived.append(entry)
            if self.environment is Environment.DEVELOPMENT:
                return Verdict(200, known_id, unique_id=self._new_id())
            return Verdict(200, known_id)
        if no is reasons.EXPIRED_PROVIDER_TOKEN:
            visit.expired = True
        return Verdict(no.status, known_id, no.word)

    def _new_id(self) -> bytes:
        self._ids += 1
        return f"{self._id_prefix}{self._ids:012x}".encode()

    def _is_too_much(self, token: bytes, now: float) -> bool:
        if int(now) != self._second:
            self._second = int(now)
            self._counts.clear()
        count = self._counts[token] = self._counts.get(token, 0) + 1
        return self.device_limit is not None and count > self.device_limit

    def _read(self, visit: Visit, shared: tuple[Field, ...], now: float) -> _Common:
        values: dict[bytes, bytes] = {}
        duplicate = False
        for name, value in shared:
            if name in values and (name == b"authorization" or name.startswith(b"apns-")):
                duplicate = True
            values[name] = value
        push_type, topic = values.get(b"apns-push-type"), values.get(b"apns-topic", b"")
        kind = _implied(topic) if push_type is None else _PUSH_TYPES.get(push_type)
        priority = values.get(b"apns-priority")
        authorization = values.get(b"authorization", b"")
        certificate = visit.certificate
        refusal, claims = None, None
        if certificate is not None:
            authorization = b""
            if not topic and len(certificate.topics) == 1:
                topic = certificate.topics[0].encode()
        elif not duplicate:
            try:
                claims = self._authenticate(visit, authorization, now)
            except Refused as no:
                refusal = reasons.find(no.reason)
        if priority is not None and (priority not in _PRIORITIES or (kind is PushType.BACKGROUND and priority != b"5")):
            late: Reason | None = reasons.BAD_PRIORITY
        elif kind is None:
            late = reasons.INVALID_PUSH_TYPE
        elif not topic:
            late = reasons.MISSING_TOPIC
        elif not is_topic(topic):
            late = reasons.BAD_TOPIC
        elif certificate is not None:
            late = None if topic.decode() in certificate.topics else reasons.TOPIC_DISALLOWED
        elif claims is not None:
            late = self._judge_topic(topic.decode(), kind, claims)
        else:
            late = None
        common = _Common(
            None if values.get(b":method") == b"POST" else reasons.METHOD_NOT_ALLOWED,
            duplicate,
            authorization,
            "" if claims is None else claims.key_id,
            refusal,
            inf if claims is None else claims.issued_at + MAX_AGE_S,
            late,
            topic.decode("utf-8", "replace"),
            topic,
            kind or PushType.ALERT,
            MAX_VOIP_PAYLOAD_BYTES if kind is PushType.VOIP else MAX_PAYLOAD_BYTES,
        )
        # A refusal may be right now and wrong later (a token from the future), so it is not remembered.
        if claims is not None or certificate is not None:
            if len(visit.memo) >= _REMEMBERED:
                visit.memo.clear()
            visit.memo[shared] = common
        return common

    def _authenticate(self, visit: Visit, authorization: bytes, now: float) -> Claims:
        """Whose provider token it is. Raises Refused with Apple's reason."""
        scheme, _, token = authorization.partition(b" ")
        if scheme.lower() != b"bearer" or not token:
            raise Refused(reasons.MISSING_PROVIDER_TOKEN.word, "There is no provider token.")
        claims = self._claims.get(token)
        if claims is None:
            claims = verify(token, self._find_key, now)
            if claims.team_id != self._keys[claims.key_id].team_id:
                raise Refused(reasons.INVALID_PROVIDER_TOKEN.word, "The signing key is of another team.")
            if self._keys[claims.key_id].environment not in (None, self.environment):
                raise Refused(
                    reasons.BAD_ENVIRONMENT_KEY_IN_TOKEN.word, "The signing key is for the other environment."
                )
            if len(self._claims) >= _REMEMBERED:
                self._claims.clear()
            self._claims[token] = claims
        if now > claims.issued_at + MAX_AGE_S:
            raise Refused(reasons.EXPIRED_PROVIDER_TOKEN.word, "The provider token is older than an hour.")
        if visit.key_id is None:
            visit.key_id = claims.key_id
        elif not self._are_related(visit.key_id, claims.key_id):
            raise Refused(reasons.UNRELATED_KEY_ID_IN_TOKEN.word, "The connection began with another key.")
        return claims

    def _find_key(self, key_id: str) -> EllipticCurvePublicKey | None:
        known = self._keys.get(key_id)
        return None if known is None else known.public

    def _are_related(self, first: str, other: str) -> bool:
        if first == other:
            return True
        one, two = self._keys.get(first), self._keys[other]
        return one is not None and one.team_id == two.team_id and (one.related == other or two.related == first)

    def _judge_topic(self, topic: str, kind: PushType, claims: Claims) -> Reason | None:
        apps = self._apps.get(claims.team_id)
        scope = self._keys[claims.key_id].topics
        if scope is not None:
            apps = set(scope) if apps is None else apps & scope
        if apps is None:
            return None if topic.endswith(apns.topic_for("", kind)) else reasons.BAD_TOPIC
        if apns.allowed_topic(topic, kind, apps):
            return None
        ours = any(topic == apns.topic_for(app, other) for app in apps for other in PushType)
        return reasons.BAD_TOPIC if ours else reasons.TOPIC_DISALLOWED


def addressed_to(fields: Sequence[Field]) -> tuple[bytes, bytes]:
    """The device token (lower case) and topic of a request, unjudged; empty where it names none."""
    path = topic = b""
    for name, value in fields:
        if name == b":path":
            path = value
        elif name == b"apns-topic":
            topic = value
    return path[len(apns.PATH_PREFIX) :].lower() if path.startswith(apns.PATH_PREFIX) else b"", topic


def _change(visit: Visit, common: _Common, now: float) -> bool:
    """Whether the connection may use another provider token than the last; from now on it does.

    Those of related keys may alternate. A key's own may change once in a while only.
    """
    before = visit.in_use.get(common.key_id)
    if before is None or before[0] != common.authorization:
        if before is not None and now < before[1] + LEAST_AGE_S:
            return False
        visit.in_use[common.key_id] = common.authorization, now
    visit.authorization = common.authorization
    return True


def _implied(topic: bytes) -> PushType:
    """The push type of a request that names none: old clients leave it to the topic."""
    for kind in PushType:
        suffix = apns.topic_for("", kind).encode()
        if suffix and topic.endswith(suffix):
            return kind
    return PushType.ALERT


def _is_expiration(value: bytes) -> bool:
    return value.isdigit() and len(value) <= 10 and int(value) <= _MAX_EXPIRATION


def _is_token(token: bytes) -> bool:
    try:
        return len(unhexlify(token)) <= apns.MAX_TOKEN_BYTES
    except ValueError:
        return False
