"""What a file of credentials is, what it opens and until when; for people who look into a drawer.

Sources: Apple, "Establishing a token-based connection to APNs" and "Establishing a certificate-based connection to
APNs".
"""

from __future__ import annotations

import re
from enum import StrEnum

from cryptography.hazmat.primitives.asymmetric import ec
from msgspec import Struct

from heliograph.errors import ConfigError
from heliograph.model import ClientCertificate, Credentials, Environment, PushType
from heliograph.protocols import certificate
from heliograph.protocols.apns import topic_for
from heliograph.protocols.certificate import Particulars
from heliograph.protocols.certificate.files import Bundle, Sort, items, unpack
from heliograph.protocols.provider_token import key_id_from_filename

WARNING_DAYS = (30, 14, 7, 1, 0)
"""Before its end a certificate is warned of when fewer days than these are left; 0: it has ended."""

_DAY_S = 86400


class Kind(StrEnum):
    """What a file is."""

    SIGNING_KEY = "signing key"
    CLIENT_CERTIFICATE = "certificate with private key"
    CERTIFICATE = "certificate without private key"
    PRIVATE_KEY = "private key"
    PUBLIC_KEY = "public key"
    REQUEST = "certificate signing request"
    PROVISIONING_PROFILE = "provisioning profile"
    LOCKED = "file under a passphrase"
    EMPTY = "empty file"
    UNKNOWN = "unknown file"


class Description(Struct, frozen=True, omit_defaults=True):
    """What is known of a file; nothing in it is secret."""

    kind: Kind
    usable: bool = False
    """It can be configured as it is, with what was given beside it."""
    name: str | None = None
    """A certificate's common name."""
    issuer: str | None = None
    key_id: str | None = None
    team_id: str | None = None
    topics: tuple[str, ...] | None = None
    """With suffixes; None: every topic of the team (a signing key), or not known."""
    environments: tuple[Environment, ...] = ()
    push_types: tuple[PushType, ...] = ()
    starts_at: int | None = None
    """UNIX seconds, as the next; None: without end, or not known."""
    ends_at: int | None = None
    days_left: int | None = None
    """Whole days; negative: it has ended."""
    fingerprint: str | None = None
    """SHA-256 of the certificate, as lower-case hex."""
    problems: tuple[str, ...] = ()
    """What is in the way and what to do, a sentence each."""


def describe(
    content: bytes, *, filename: str = "", key: bytes | None = None, passphrase: bytes | None = None, now: float
) -> Description:
    """What a file is. `key`: the second file of a pair. Raises nothing: what is wrong is in `problems`."""
    if not content.strip():
        return _problem(Kind.EMPTY, "The file is empty: copy it again")
    try:
        found = {item.sort for item in items(content) + items(key or b"")}
    except ConfigError as error:
        return _problem(Kind.UNKNOWN, str(error))
    try:
        bundle = unpack(content, key=key, passphrase=passphrase)
    except ConfigError as error:
        return _problem(Kind.LOCKED if found & {Sort.P12, Sort.LOCKED_KEY} else Kind.UNKNOWN, str(error))
    if bundle.certificates:
        return _of_certificate(bundle, now)
    if bundle.keys:
        return _of_key(bundle.keys[0], filename.replace("\\", "/").rpartition("/")[2])
    return _of_something_else(bundle, content)


def ends_at(credentials: Credentials) -> int | None:
    """UNIX seconds; None: they have no end, as a signing key."""
    return credentials.not_after if isinstance(credentials, ClientCertificate) else None


def days_left(credentials: Credentials, now: float) -> int | None:
    """Whole days, negative when they have ended; None: without end."""
    end = ends_at(credentials)
    return None if end is None else _days(end, now)


def warning_due(days: int, warned: int | None) -> int | None:
    """Which of `WARNING_DAYS` is newly reached with so many whole days left; `warned`: the one that was told last.

    A certificate that was replaced by a fresh one starts again with None.
    """
    reached = min((each for each in WARNING_DAYS if days < each), default=None)
    return reached if reached is not None and (warned is None or reached < warned) else None


def _days(end: int, now: float) -> int:
    return int((end - now) // _DAY_S)


def _problem(kind: Kind, problem: str) -> Description:
    return Description(kind, problems=(problem,))


def _of_certificate(bundle: Bundle, now: float) -> Description:
    problems = []
    usable = False
    try:
        loaded = certificate.choose(bundle)
        usable = True
        chosen = loaded.fingerprint
    except ConfigError as error:
        problems.append(str(error))
        chosen = None
    try:
        several = [certificate.particulars(each) for each in bundle.certificates]
    except ConfigError as error:
        return _problem(Kind.CERTIFICATE, str(error))
    facts = next(
        (each for each in several if each.fingerprint == chosen), max(several, key=lambda each: bool(each.topics))
    )
    problems += _complaints_of_time(facts, now)
    return Description(
        Kind.CLIENT_CERTIFICATE if bundle.keys else Kind.CERTIFICATE,
        usable=usable and facts.not_before <= now < facts.not_after,
        name=facts.name,
        issuer=facts.issuer,
        team_id=facts.team_id,
        topics=facts.topics,
        environments=facts.environments,
        push_types=push_types(facts.topics),
        starts_at=facts.not_before,
        ends_at=facts.not_after,
        days_left=_days(facts.not_after, now),
        fingerprint=facts.fingerprint,
        problems=tuple(problems),
    )


def push_types(topics: tuple[str, ...]) -> tuple[PushType, ...]:
    """What a certificate with these topics can send.

    Location, Live Activities, widgets and controls take a provider token only (Apple, "Sending notification requests to
    APNs").
    """
    return tuple(kind for kind in PushType if any(_can_send(topic, kind) for topic in topics))


_SUFFIXES = tuple(filter(None, {topic_for("", kind) for kind in PushType}))
_TOKEN_ONLY = (PushType.LOCATION, PushType.LIVEACTIVITY, PushType.WIDGETS, PushType.CONTROLS)


def _can_send(topic: str, kind: PushType) -> bool:
    managing = topic.startswith("com.apple.mgmt.")
    if kind in _TOKEN_ONLY or managing != (kind is PushType.MDM):
        return False
    suffix = topic_for("", kind)
    return topic.endswith(suffix) if suffix else not topic.endswith(_SUFFIXES)


def _complaints_of_time(facts: Particulars, now: float) -> list[str]:
    if facts.not_after <= now:
        return ["The certificate has ended: create a new one in the developer account"]
    if facts.not_before > now:
        return ["The certificate is not valid yet: correct the clock of this machine"]
    return []


_OTHER_KEYS = re.compile(r"(ApiKey|SubscriptionKey)_", re.IGNORECASE)


def _of_key(key: object, filename: str) -> Description:
    if not (isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1)):
        return _problem(
            Kind.PRIVATE_KEY,
            "The file is a private key alone, and not one that Apple issues as .p8: give the certificate that belongs "
            "to it as well",
        )
    problems = []
    if _OTHER_KEYS.match(filename):
        problems.append(
            "The file's name is that of a key for the App Store's interface: download the key that has Apple Push "
            "Notifications service enabled, whose name begins with AuthKey_"
        )
    key_id = key_id_from_filename(filename)
    if key_id is None:
        problems.append(
            "The file's name does not tell the key id: write it into key_id, as the developer account shows it beside "
            "the key"
        )
    return Description(
        Kind.SIGNING_KEY,
        usable=True,
        key_id=key_id,
        # A key may be limited to one environment or to some topics, which only Apple knows.
        environments=tuple(Environment),
        push_types=tuple(PushType),
        problems=tuple(problems),
    )


def _of_something_else(bundle: Bundle, content: bytes) -> Description:
    if Sort.REQUEST in bundle.sorts:
        kind = Kind.REQUEST
    elif Sort.PUBLIC_KEY in bundle.sorts:
        kind = Kind.PUBLIC_KEY
    elif Sort.SIGNED in bundle.sorts and b"<plist" in content:
        kind = Kind.PROVISIONING_PROFILE
    else:
        kind = Kind.UNKNOWN
    return _problem(kind, certificate.nothing_in(bundle.sorts))
