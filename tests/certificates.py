"""Makers of certificates to throw away that look like Apple's, and of the files that people keep them in."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    pkcs12,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from heliograph.model import ClientCertificate, Environment
from heliograph.protocols.certificate import load

BOTH = (Environment.PRODUCTION, Environment.DEVELOPMENT)
TEAM_ID = "TEAM123456"
TOPIC = "com.example.shop"

_APPLE = "1.2.840.113635.100.6.3."
_MARKS = {Environment.DEVELOPMENT: "1", Environment.PRODUCTION: "2"}

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


class Issued(NamedTuple):
    """A certificate with its key, and who vouches for it."""

    certificate: x509.Certificate
    key: PrivateKey
    chain: tuple[x509.Certificate, ...]

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def certificate_der(self) -> bytes:
        """As Apple's .cer file."""
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def chain_pem(self) -> bytes:
        return b"".join(each.public_bytes(Encoding.PEM) for each in self.chain)

    @property
    def key_pem(self) -> bytes:
        return key_pem(self.key)

    @property
    def pem(self) -> bytes:
        """Certificate and key in one file, as `openssl pkcs12 -nodes` writes them."""
        return self.certificate_pem + self.key_pem

    def p12(self, passphrase: bytes = b"", encryption: KeySerializationEncryption | None = None) -> bytes:
        """A bundle as a program of today exports it; without passphrase it is not encrypted."""
        return pkcs12.serialize_key_and_certificates(
            b"push",
            self.key,
            self.certificate,
            self.chain,
            encryption or (BestAvailableEncryption(passphrase) if passphrase else NoEncryption()),
        )

    def loaded(self) -> ClientCertificate:
        return load(self.pem)


def push_certificate(
    *topics: str | tuple[str, str],
    environments: Iterable[Environment] = BOTH,
    now: datetime | None = None,
    days: float = 365,
    name: str | None = None,
    uid: str | None = TOPIC,
    extensions: Iterable[tuple[str, bytes]] = (),
    key: PrivateKey | None = None,
) -> Issued:
    """One of Apple's kind, good for so many days from `now` (None: today).

    `topics`: what extension .6 lists, each with its kind (`app` unless told); none: there is no such extension.
    `extensions`: others by the last number of their identifier, with their DER.
    """
    key = key or ec_key()
    start = now or datetime.now(UTC)
    subject = [(NameOID.USER_ID, uid), (NameOID.COMMON_NAME, name or f"Apple Push Services: {uid}")]
    subject += [(NameOID.ORGANIZATIONAL_UNIT_NAME, TEAM_ID), (NameOID.COUNTRY_NAME, "US")]
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(oid, value) for oid, value in subject if value]))
        .issuer_name(authority().certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - timedelta(hours=1))
        .not_valid_after(start + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
    )
    own = [(_MARKS[environment], b"\5\0") for environment in environments]
    if topics:
        pairs = [(each, "app") if isinstance(each, str) else each for each in topics]
        own.append(("6", topic_list(*pairs)))
    for last, der in (*own, *extensions):
        oid = x509.ObjectIdentifier(_APPLE + last)
        builder = builder.add_extension(x509.UnrecognizedExtension(oid, der), critical=False)
    certificate = builder.sign(authority().key, SHA256())
    return Issued(certificate, key, (authority().certificate,))


def topic_list(*pairs: tuple[str, str]) -> bytes:
    """Each topic with the one kind of notification that it is for."""
    return tlv(0x30, *(tlv(0x0C, topic.encode()) + tlv(0x30, tlv(0x0C, kind.encode())) for topic, kind in pairs))


def tlv(tag: int, *contents: bytes) -> bytes:
    """DER (X.690) of a tag and what it holds."""
    content = b"".join(contents)
    size = len(content)
    if size < 128:
        return bytes((tag, size)) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + content


@cache
def authority() -> Issued:
    """The issuer of them all; nobody else trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "A certification authority for tests")])
    start = datetime.now(UTC) - timedelta(days=3650)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=7300))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, SHA256())
    )
    return Issued(certificate, key, ())


@cache
def ec_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@cache
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def key_pem(key: Any, form: PrivateFormat = PrivateFormat.PKCS8, passphrase: bytes = b"") -> bytes:
    encryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    pem: bytes = key.private_bytes(Encoding.PEM, form, encryption)
    return pem
