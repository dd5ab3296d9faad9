"""TLS contexts for HTTP/2 and for the doors of old scripts, and certificates to throw away.

HTTP/2 has TLS 1.2 or later and ALPN `h2` (Apple, "Establishing a connection to APNs"; RFC 9113, section 9.2). A
client always verifies the server. A server asks for a client certificate where it is told whose to trust, and takes
those who have none as well, as Apple does: they may hold a provider token.
"""

from __future__ import annotations

import datetime
import os
import ssl
import sys
import warnings
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, TypeAlias

from msgspec import Struct

from heliograph.config import TlsVersion
from heliograph.errors import ConfigError
from heliograph.model import ClientCertificate

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

# What RFC 9113, appendix A, leaves of TLS 1.2's; those of TLS 1.3 are not concerned.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"

_NAMES = (
    *("localhost", "api.push.apple.com", "api.sandbox.push.apple.com", "api.development.push.apple.com"),
    *("gateway.push.apple.com", "gateway.sandbox.push.apple.com"),
    *("feedback.push.apple.com", "feedback.sandbox.push.apple.com"),
)
_ADDRESSES = ("127.0.0.1", "::1")
_OTHER_NAME = "other.example"
_SIMULATOR_CA = "heliograph simulator CA"
# macOS and iOS take no certificate of a hand-installed authority for longer than 825 days.
LIFETIME = datetime.timedelta(days=800)
BACKDATED = datetime.timedelta(hours=1)
"""Clocks differ."""


PrivateKey: TypeAlias = "rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey"

_VERSIONS = {
    TlsVersion.TLS_1_0: ssl.TLSVersion.TLSv1,
    TlsVersion.TLS_1_1: ssl.TLSVersion.TLSv1_1,
    TlsVersion.TLS_1_2: ssl.TLSVersion.TLSv1_2,
    TlsVersion.TLS_1_3: ssl.TLSVersion.TLSv1_3,
}
_ANCHOR_FLAGS = 0x10 | 0x80000 | 0x200000
"""X509_V_FLAG_IGNORE_CRITICAL, _PARTIAL_CHAIN and _NO_CHECK_TIME, of which Python names one (OpenSSL, x509_vfy.h)."""
_FOR_CLIENTS = bytes.fromhex("300c 300a 0608 2b06010505070302")
"""X509_CERT_AUX of OpenSSL: trusted as a client (the id of `clientAuth`), whatever the certificate says it is for."""


class Identity(Struct, frozen=True):
    """A server's certificate with its key, and the authority that vouches for it; all PEM."""

    ca_pem: bytes
    certificate_pem: bytes
    key_pem: bytes
    expired_pem: bytes = b""
    """A certificate like the first, of the same key, that has ended. Throwaway identities have one, as the next."""
    other_name_pem: bytes = b""
    """One for another host."""

    def __repr__(self) -> str:
        return "<TLS identity>"


def server_context(
    certificate: bytes | Path, key: bytes | Path, *, client_authorities: bytes | None = None
) -> ssl.SSLContext:
    """For a listener: the certificate (its chain behind it) and its key, as PEM or files of it.

    `client_authorities`: PEM of those whose client certificates are taken, or of these certificates themselves; None:
    no client is asked for one. What a client showed is in `ssl.SSLObject.getpeercert`.

    Raises ConfigError.
    """
    chain, key_pem = _pem(certificate, "certificate"), _pem(key, "key of the certificate")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        _load_pair(context, chain, key_pem)
    except ssl.SSLError as error:
        raise ConfigError(
            "The server's certificate and key cannot be used: give both as PEM, the key without a passphrase, "
            f"and see that they belong together (OpenSSL says {error.reason or 'nothing more'})"
        ) from None
    if client_authorities is not None:
        try:
            context.load_verify_locations(cadata=_authorities(client_authorities))
        except (ssl.SSLError, ValueError):
            raise ConfigError(
                "The authorities of clients are not PEM: give text that begins with BEGIN CERTIFICATE"
            ) from None
        context.verify_mode = ssl.CERT_OPTIONAL
        # A single certificate may be named without who issued it, and as its issuer made it.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return _for_http2(context)


def legacy_context(
    certificate: bytes, key: bytes, *, anchors: Sequence[bytes], minimum: TlsVersion, required: bool
) -> ssl.SSLContext:
    """For a listener whose clients are known by their certificates alone. All PEM.

    `anchors`: the certificates that are taken, each by itself: whoever issued it is not asked, and neither is the
    calendar. A client with another one is refused, and so is one with none where one is `required`. What an anchor has
    issued passes as well where its own extensions allow that: look at what was shown. How strong an anchor's key and
    its issuer's signature are is not asked either: OpenSSL's security level is 0 for this context, with the ciphers of
    level 2 from TLS 1.2 on. No session ticket comes after a handshake, see `streams`. An anchor that OpenSSL cannot
    read is left out.

    Raises ConfigError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        _load_pair(context, certificate, key)
    except ssl.SSLError as error:
        raise ConfigError(
            "The certificate and key of the listener cannot be used: give both as PEM, the key without a passphrase, "
            f"and see that they belong together (OpenSSL says {error.reason or 'nothing more'})"
        ) from None
    old = minimum in (TlsVersion.TLS_1_0, TlsVersion.TLS_1_1)
    if old:
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
    else:
        context.set_ciphers("DEFAULT:@SECLEVEL=2")
        context.set_ciphers(":".join([*(each["name"] for each in context.get_ciphers()), "@SECLEVEL=0"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = _VERSIONS[minimum]
    context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
    context.verify_flags |= _ANCHOR_FLAGS
    _take(context, anchors)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    # That of TLS 1.2 is part of the handshake, and stays: without it OpenSSL keeps 20,480 sessions, of 5 kB each.
    context.num_tickets = 0
    return context


def check_anchor(pem: bytes) -> None:
    """Whether `legacy_context` can take it. Raises ConfigError: OpenSSL does not read all that others do."""
    try:
        _trust(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), [pem])
    except ssl.SSLError as error:
        raise ConfigError(
            "No client can come with this certificate, as OpenSSL cannot read it: have another one made "
            f"({error.reason or 'OpenSSL says nothing more'})"
        ) from None


def _take(context: ssl.SSLContext, anchors: Sequence[bytes]) -> None:
    """Those that OpenSSL reads: one that it does not read any more must not shut out the others."""
    if not anchors:
        return
    try:
        _trust(context, anchors)
    except ssl.SSLError:
        half = len(anchors) // 2
        if half:
            _take(context, anchors[:half])
            _take(context, anchors[half:])


def _trust(context: ssl.SSLContext, anchors: Sequence[bytes]) -> None:
    """Raises ssl.SSLError."""
    with _file_of(b"".join(map(_trusted, anchors))) as name:
        context.load_verify_locations(name)


def client_context(ca: bytes | Path | None = None, certificate: ClientCertificate | None = None) -> ssl.SSLContext:
    """For a connection. `ca`: the authorities to trust, as PEM or a file of it; None: those of the system.

    `certificate`: what to show a server that asks; None: nothing.

    Raises ConfigError.
    """
    try:
        context = ssl.create_default_context(cadata=None if ca is None else _authorities(_pem(ca, "authority")))
    except (ssl.SSLError, ValueError):
        raise ConfigError("The authority to trust is not PEM: give a file that begins with BEGIN CERTIFICATE") from None
    if certificate is not None:
        try:
            _load_pair(context, certificate.certificate_pem, certificate.key_pem)
        except ssl.SSLError as error:
            raise ConfigError(
                f"The client certificate {certificate.name!r} cannot be shown in TLS: create one anew in the developer "
                f"account (OpenSSL says {error.reason or 'nothing more'})"
            ) from None
    return _for_http2(context)


def throwaway_identity(now: datetime.datetime) -> Identity:
    """An authority nobody else has, and what it signed for this machine and under Apple's names; it signs no more.

    For the simulator: clients trust `ca_pem` and may connect to localhost, or to a name of Apple's that is routed here.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = make_authority(_SIMULATOR_CA, ca_key, now, LIFETIME)

    def issue(name: str, now: datetime.datetime, alternatives: Sequence[str]) -> bytes:
        return issue_server(name, alternatives, key, _SIMULATOR_CA, ca_key, now).public_bytes(Encoding.PEM)

    names = (*_NAMES, *_ADDRESSES)
    return Identity(
        ca.public_bytes(Encoding.PEM),
        issue("localhost", now, names),
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        expired_pem=issue("localhost", now - LIFETIME - BACKDATED, names),
        other_name_pem=issue(_OTHER_NAME, now, [_OTHER_NAME]),
    )


def good_until(certificate_pem: bytes) -> datetime.datetime:
    """When a certificate ends. Raises ConfigError."""
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(certificate_pem).not_valid_after_utc
    except ValueError:
        raise ConfigError("The certificate is not PEM, or damaged: make it anew") from None


def make_authority(
    name: str, key: PrivateKey, now: datetime.datetime, lifetime: datetime.timedelta
) -> x509.Certificate:
    """One that signs for itself, and for servers."""
    from cryptography import x509

    return _signed(name, key, name, key, now, lifetime, [(x509.BasicConstraints(ca=True, path_length=0), True)])


def issue_server(
    name: str, alternatives: Sequence[str], key: PrivateKey, issuer: str, ca_key: PrivateKey, now: datetime.datetime
) -> x509.Certificate:
    """A server's certificate by the authority `issuer`; `alternatives` are host names and IP addresses."""
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    def named(host: str) -> x509.GeneralName:
        try:
            return x509.IPAddress(ip_address(host))
        except ValueError:
            return x509.DNSName(host)

    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.SubjectAlternativeName([named(each) for each in alternatives]), False),
    ]
    return _signed(name, key, issuer, ca_key, now, LIFETIME, extensions)


def _signed(
    name: str,
    key: PrivateKey,
    issuer: str,
    ca_key: PrivateKey,
    now: datetime.datetime,
    lifetime: datetime.timedelta,
    extensions: Sequence[tuple[x509.ExtensionType, bool]],
) -> x509.Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.x509.oid import NameOID

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    is_ca = key is ca_key
    # CPython 3.13 verifies strictly (VERIFY_X509_STRICT): it wants the key usage of an authority, and both identifiers.
    usage = x509.KeyUsage(
        digital_signature=not is_ca,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        content_commitment=False,
        # Clients that know no elliptic curves encrypt with the key itself (RFC 5246, section 7.4.2).
        key_encipherment=not is_ca and isinstance(key, rsa.RSAPrivateKey),
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + lifetime)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(ca_key, SHA256())


def _load_pair(context: ssl.SSLContext, chain: bytes, key: bytes) -> None:
    """Have the context show this chain. Raises ssl.SSLError."""
    with _file_of(chain + b"\n" + key) as name:
        context.load_cert_chain(name, password=b"")  # a password, so that nobody is asked for one


@contextmanager
def _file_of(content: bytes) -> Iterator[str]:
    """The name of a file with a secret, which is gone afterwards: OpenSSL reads a key from files only."""
    if sys.platform == "linux" and Path("/proc/self/fd").exists():
        with os.fdopen(os.memfd_create("heliograph"), "wb") as file:  # never on a disk
            file.write(content)
            file.flush()
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        with NamedTemporaryFile(suffix=".pem") as file:  # mode 0600
            file.write(content)
            file.flush()
            yield file.name


def _trusted(pem: bytes) -> bytes:
    """The certificate as OpenSSL's TRUSTED CERTIFICATE (openssl-x509, `-trustout`)."""
    body = b64encode(ssl.PEM_cert_to_DER_cert(pem.decode("ascii")) + _FOR_CLIENTS)
    lines = [body[at : at + 64] for at in range(0, len(body), 64)]
    return b"\n".join((b"-----BEGIN TRUSTED CERTIFICATE-----", *lines, b"-----END TRUSTED CERTIFICATE-----", b""))


def _authorities(pem: bytes) -> str:
    """As `ssl` wants it. Raises ValueError."""
    # An empty text would be no text to Python, which then trusts the system's.
    return pem.decode("ascii") or "nothing"


def _for_http2(context: ssl.SSLContext) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    # RFC 9113, section 9.2.1: neither compression nor renegotiation.
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["h2"])
    return context


def _pem(source: bytes | Path, what: str) -> bytes:
    if isinstance(source, bytes):
        return source
    try:
        return source.read_bytes()
    except OSError as error:
        raise ConfigError(f"The {what} cannot be read from {source}: {error.strerror}") from None
