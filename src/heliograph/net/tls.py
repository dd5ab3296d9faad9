"""TLS contexts for HTTP/2, and certificates to throw away.

TLS 1.2 or later and ALPN `h2` (Apple, "Establishing a connection to APNs"; RFC 9113, section 9.2). A client always
verifies the server. A server asks for a client certificate where it is told whose to trust, and takes those who have
none as well, as Apple does: they may hold a provider token.
"""

from __future__ import annotations

import datetime
import os
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

from msgspec import Struct

from heliograph.errors import ConfigError
from heliograph.model import ClientCertificate

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

# What RFC 9113, appendix A, leaves of TLS 1.2's; those of TLS 1.3 are not concerned.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"

_NAMES = ("localhost", "api.push.apple.com", "api.sandbox.push.apple.com", "api.development.push.apple.com")
_ADDRESSES = ("127.0.0.1", "::1")
_OTHER_NAME = "other.example"
# macOS and iOS take no certificate of a hand-installed authority for longer than 825 days.
_LIFETIME = datetime.timedelta(days=800)
_BACKDATED = datetime.timedelta(hours=1)
"""Clocks differ."""


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
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import ExtendedKeyUsageOID

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = _signed(
        "heliograph simulator CA", ca_key, ca_key, now, [(x509.BasicConstraints(ca=True, path_length=0), True)]
    )

    def issue(name: str, now: datetime.datetime, alternatives: list[x509.GeneralName]) -> bytes:
        extensions: list[tuple[x509.ExtensionType, bool]] = [
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
            (x509.SubjectAlternativeName(alternatives), False),
        ]
        return _signed(name, key, ca_key, now, extensions).public_bytes(Encoding.PEM)

    names: list[x509.GeneralName] = [
        *(x509.DNSName(name) for name in _NAMES),
        *(x509.IPAddress(ip_address(address)) for address in _ADDRESSES),
    ]
    return Identity(
        ca.public_bytes(Encoding.PEM),
        issue("localhost", now, names),
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        expired_pem=issue("localhost", now - _LIFETIME - _BACKDATED, names),
        other_name_pem=issue(_OTHER_NAME, now, [x509.DNSName(_OTHER_NAME)]),
    )


def good_until(certificate_pem: bytes) -> datetime.datetime:
    """When a certificate ends. Raises ConfigError."""
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(certificate_pem).not_valid_after_utc
    except ValueError:
        raise ConfigError("The certificate is not PEM, or damaged: make it anew") from None


def _signed(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    ca_key: ec.EllipticCurvePrivateKey,
    now: datetime.datetime,
    extensions: list[tuple[x509.ExtensionType, bool]],
) -> x509.Certificate:
    from cryptography import x509
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
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named("heliograph simulator CA"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + _LIFETIME)
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
