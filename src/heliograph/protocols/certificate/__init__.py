"""Apple's push certificates: from whatever file they are kept in to what a TLS handshake shows, and what they open.

Sources: Apple, "Establishing a certificate-based connection to APNs" and "Communicating with APNs" (archived), for the
extensions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from msgspec import Struct

from heliograph.errors import ConfigError
from heliograph.model import ClientCertificate, Environment, PushType
from heliograph.protocols.apns import topic_for
from heliograph.protocols.certificate.der import SEQUENCE, UTF8_STRING, Tlv, read_all
from heliograph.protocols.certificate.files import Bundle, Sort, unpack
from heliograph.protocols.certificate.opening import UNREADABLE, Key, guarded


class Particulars(Struct, frozen=True):
    """What a certificate says of itself."""

    name: str
    issuer: str
    uid: str | None
    team_id: str | None
    topics: tuple[str, ...]
    """With the suffixes of push types; empty: it is not one of Apple's for pushing."""
    environments: tuple[Environment, ...]
    not_before: int
    not_after: int
    fingerprint: str


def load(content: bytes, *, key: bytes | None = None, passphrase: bytes | None = None) -> ClientCertificate:
    """A push certificate with its key: from a .p12, from PEM with both, or from two files (PEM or DER).

    Where there are several certificates that a key fits, it is the push certificate that ends last. One that has
    expired, or is not valid yet, is loaded like any other: look at `not_after`.

    Raises ConfigError that says what is wrong and what to do.
    """
    return choose(unpack(content, key=key, passphrase=passphrase))


def choose(bundle: Bundle) -> ClientCertificate:
    """The push certificate among what was unpacked. Raises ConfigError, as `load` does."""
    if not bundle.certificates:
        if bundle.keys:
            raise ConfigError(
                "There is a private key in the file but no certificate: give the certificate's file as well, or, where "
                "the file is Apple's AuthKey_<key id>.p8, configure it as a signing key with key id and team id"
            )
        raise ConfigError(nothing_in(bundle.sorts))
    if not bundle.keys:
        raise ConfigError(
            "There is a certificate in the file but no private key: in Keychain Access open the certificate, select "
            "certificate and key together and export both as .p12, or give the key's file as well"
        )
    pairs = [
        (certificate, key, facts)
        for certificate in bundle.certificates
        for key in bundle.keys
        if fits(certificate, key)
        for facts in [particulars(certificate)]
    ]
    if not pairs:
        raise ConfigError(
            "The private key belongs to none of the certificates: give the key that the certificate's signing request "
            "was made with"
        )
    pushing = [pair for pair in pairs if pair[2].topics]
    if not pushing:
        name = pairs[0][2].name
        raise ConfigError(
            f"The certificate {name!r} is not one for pushing, as it names no topic: create one of the kind Apple Push "
            "Notification service in the developer account"
        )
    leaf, private, facts = max(pushing, key=lambda pair: pair[2].not_after)
    chain = guarded(lambda: list(_chain(leaf, bundle.certificates)), UNREADABLE)
    return ClientCertificate(
        name=facts.name,
        certificate_pem=b"".join(each.public_bytes(Encoding.PEM) for each in chain),
        key_pem=private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        topics=facts.topics,
        environments=facts.environments,
        not_before=facts.not_before,
        not_after=facts.not_after,
        fingerprint=facts.fingerprint,
    )


def fits(certificate: x509.Certificate, key: Key) -> bool:
    """Whether the key is the certificate's."""
    return guarded(lambda: certificate.public_key() == key.public_key(), "a certificate in it has a damaged key")


def particulars(certificate: x509.Certificate) -> Particulars:
    """What a certificate says of itself. Raises ConfigError."""
    return guarded(lambda: _particulars(certificate), UNREADABLE)


_APNS = "1.2.840.113635.100.6.3."
_DEVELOPMENT, _PRODUCTION = x509.ObjectIdentifier(_APNS + "1"), x509.ObjectIdentifier(_APNS + "2")
_VOIP_TOPICS, _TOPICS = x509.ObjectIdentifier(_APNS + "4"), x509.ObjectIdentifier(_APNS + "6")
_PUSHING = re.compile(r"(Push|VoIP|WatchKit) Services: |(Pass Type ID|Website Push ID): |^APSP:")
_is_topic = re.compile(r"[!-~]{1,255}").fullmatch
_KINDS = {"voip": PushType.VOIP, "complication": PushType.COMPLICATION}


def _particulars(certificate: x509.Certificate) -> Particulars:
    extensions = {extension.oid: extension.value for extension in certificate.extensions}
    name, uid = (_attribute(certificate.subject, oid) for oid in (NameOID.COMMON_NAME, NameOID.USER_ID))
    topics: dict[str, None] = {}
    for oid in (_TOPICS, _VOIP_TOPICS):
        value = extensions.get(oid)
        if isinstance(value, x509.UnrecognizedExtension):
            topics |= dict.fromkeys(_listed_topics(value.value, "voip" if oid == _VOIP_TOPICS else "app"))
    marked = any(oid.dotted_string.startswith(_APNS) for oid in extensions) or _PUSHING.search(name or "")
    # Certificates for signing code have a UID too, which is no topic.
    if uid and _is_topic(uid) and not topics and (marked or uid.startswith("com.apple.mgmt.")):
        topics[uid] = None
    marks = ((Environment.PRODUCTION, _PRODUCTION), (Environment.DEVELOPMENT, _DEVELOPMENT))
    environments = tuple(environment for environment, oid in marks if oid in extensions)
    return Particulars(
        name=name or certificate.subject.rfc4514_string(),
        issuer=_attribute(certificate.issuer, NameOID.COMMON_NAME) or certificate.issuer.rfc4514_string(),
        uid=uid,
        team_id=_attribute(certificate.subject, NameOID.ORGANIZATIONAL_UNIT_NAME),
        topics=tuple(topics),
        # Those without a mark are of kinds that have no sandbox: device management, passes, websites.
        environments=environments or ((Environment.PRODUCTION,) if topics else ()),
        not_before=int(certificate.not_valid_before_utc.timestamp()),
        not_after=int(certificate.not_valid_after_utc.timestamp()),
        fingerprint=certificate.fingerprint(SHA256()).hex(),
    )


def _attribute(name: x509.Name, oid: x509.ObjectIdentifier) -> str | None:
    """As it may be shown on a terminal or in a log."""
    found = name.get_attributes_for_oid(oid)
    if not found or not isinstance(found[0].value, str):
        return None
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in found[0].value[:200])


def _listed_topics(der: bytes, kind: str) -> Iterator[str]:
    """SEQUENCE of UTF8String topic, each with a SEQUENCE of UTF8String kinds behind it; `kind` where none follow.

    A kind's suffix is put behind a topic that lacks it.
    """
    (outer,) = read_all(der)
    pieces = [outer] if outer.tag == UTF8_STRING else outer.children()
    topic = ""
    kinds: list[str] = []
    for piece in (*pieces, Tlv(UTF8_STRING, b"", b"")):
        if piece.tag == SEQUENCE:
            kinds = [each.content.decode() for each in piece.children()]
        elif piece.tag == UTF8_STRING:
            for each in (kinds or [kind]) if _is_topic(topic) else ():
                suffix = topic_for("", _KINDS[each]) if each in _KINDS else ""
                yield topic if topic.endswith(suffix) else topic + suffix
            topic, kinds = piece.content.decode(), []


def _chain(leaf: x509.Certificate, certificates: tuple[x509.Certificate, ...]) -> Iterator[x509.Certificate]:
    """The leaf and who vouches for it, as far as they are there; what has nothing to do with it is left out."""
    left = [certificate for certificate in certificates if certificate != leaf]
    while True:
        yield leaf
        above = next((each for each in left if each.subject == leaf.issuer), None)
        if above is None or leaf.subject == leaf.issuer:
            return
        left.remove(above)
        leaf = above


def nothing_in(sorts: frozenset[Sort]) -> str:
    """What to say of a file without a certificate and a key."""
    if Sort.REQUEST in sorts:
        return (
            "The file is a certificate signing request: upload it to the developer account, and use the certificate "
            "that Apple makes of it, together with its private key"
        )
    if Sort.PUBLIC_KEY in sorts:
        return "The file is a public key: give a certificate with its private key, as .p12 or .pem"
    if Sort.P12 in sorts:
        return "There is neither certificate nor private key in the .p12: export certificate and key together again"
    if Sort.SIGNED in sorts:
        return (
            "The file is a signed document, as a provisioning profile is, and has no private key: give a certificate "
            "with its private key, as .p12 or .pem"
        )
    return "There is no certificate in the file: give a .p12, or PEM text that begins with -----BEGIN CERTIFICATE-----"
