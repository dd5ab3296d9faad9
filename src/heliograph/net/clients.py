"""Client certificates like Apple's own, for clients of old: some cannot start without one, some look for Apple's marks.

Each vouches for itself: whoever takes it knows it by its fingerprint.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

from heliograph.net.tls import BACKDATED, LIFETIME
from heliograph.protocols.certificate.der import NULL, SEQUENCE, UTF8_STRING, tlv

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import rsa

_OIDS = "1.2.840.113635.100.6.3."
_MARKS = ("1", "2")
"""The last numbers of what Apple marks the environments of a certificate with, development and production. Ours have
both: `apn` of Node takes whatever host is not Apple's for one of development, and refuses a certificate without it."""
_TOPICS = "6"
_KINDS = {".voip": "voip", ".complication": "complication"}
"""What Apple's list calls a topic with this suffix; others are of the kind `app`."""

_MAX_COMMON_NAME = 64
"""X.520, ub-common-name."""


def make_client(
    topic: str, now: datetime.datetime, lifetime: datetime.timedelta
) -> tuple[rsa.RSAPrivateKey, x509.Certificate]:
    """A certificate with its key. RSA, as old clients know nothing else."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = rsa.generate_private_key(65537, 2048)
    common_name = f"Apple Push Services: {topic}"[:_MAX_COMMON_NAME]
    name = x509.Name([x509.NameAttribute(NameOID.USER_ID, topic), x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    kind = next((kind for suffix, kind in _KINDS.items() if topic.endswith(suffix)), "app")
    listed = tlv(SEQUENCE, tlv(UTF8_STRING, topic.encode()), tlv(SEQUENCE, tlv(UTF8_STRING, kind.encode())))
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + lifetime)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    for last, der in (*((mark, tlv(NULL)) for mark in _MARKS), (_TOPICS, listed)):
        extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(_OIDS + last), der)
        builder = builder.add_extension(extension, critical=False)
    return key, builder.sign(key, SHA256())


def throwaway_client(topic: str, now: datetime.datetime) -> bytes:
    """One to throw away, as PEM, the key behind the certificate."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key, certificate = make_client(topic, now, LIFETIME)
    return certificate.public_bytes(Encoding.PEM) + key.private_bytes(
        Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()
    )
