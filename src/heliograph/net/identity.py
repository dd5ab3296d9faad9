"""The certificate of the doors for old scripts and other people's libraries: a configured one, or one made here.

What is made here is signed by an authority that nobody else has. Its certificate, `doors-ca.pem` in the data folder, is
for clients that verify whom they talk to. All keys are RSA: programs of 2010 know no others.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from heliograph.config import read_file, secret_path
from heliograph.errors import ConfigError
from heliograph.net.tls import LIFETIME, issue_server, make_authority, server_context

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import rsa

AUTHORITY = "doors-ca.pem"
"""In the data folder: the authority's certificate, for clients that verify."""
AUTHORITY_KEY = "doors-ca-key.pem"
"""The same with its private key."""
SERVER = "doors.pem"
"""The same folder: the server's certificate with its private key."""
_LOCK = "doors.lock"
_AUTHORITY_NAME = "heliograph CA"

_OURS = ("localhost", "127.0.0.1", "::1")
_APPLES = (
    "gateway.push.apple.com",
    "gateway.sandbox.push.apple.com",
    "feedback.push.apple.com",
    "feedback.sandbox.push.apple.com",
    "api.push.apple.com",
    "api.sandbox.push.apple.com",
    "api.development.push.apple.com",
)
"""For clients whose Apple is led here by the name service or by a hosts file."""

_NEAR_END = datetime.timedelta(days=60)
"""A certificate with less left is made anew."""
_AUTHORITY_LIFETIME = datetime.timedelta(days=7300)

_is_ours = re.compile(rf"{_AUTHORITY_NAME} [0-9a-f]{{8}}").fullmatch
_is_dns_name = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})*").fullmatch


def server_identity(
    data: Path,
    certificate: str | None,
    certificate_key: str | None,
    *,
    table: str = "",
    now: datetime.datetime | None = None,
) -> tuple[bytes, bytes]:
    """The certificate with its chain, and its private key, both PEM.

    The references are to the files of the operator, the key None where it is in the certificate's file; with no
    certificate it is the one in the folder `data`, made where it is not there, is near its end, or is for other names
    than this host's. `table` has the settings, as `legacy.main`, and is for the texts of errors. `now`: None for this
    moment. Raises ConfigError.
    """
    if certificate is not None:
        return _configured(certificate, certificate_key, f"{table}." if table else "")
    if certificate_key is not None:
        raise ConfigError("There is a certificate_key without a certificate: add certificate, or remove it")
    now = now or datetime.datetime.now(datetime.UTC)
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone(data):
            return _made(data, now)
    except OSError as error:
        raise ConfigError(
            f"The certificate of the doors cannot be kept in {data} ({error.strerror}): let heliograph write there, or "
            "configure a certificate"
        ) from None


def made_here(certificate: x509.Certificate) -> bool:
    """Whether it is an authority as `server_identity` makes them, or signed by one: nothing that a client shows."""
    from cryptography.x509.oid import NameOID

    return any(_is_ours(str(name.value)) for name in certificate.issuer.get_attributes_for_oid(NameOID.COMMON_NAME))


def _configured(certificate: str, certificate_key: str | None, front: str) -> tuple[bytes, bytes]:
    alone, setting = certificate_key is None, f"{front}certificate"
    path = secret_path(certificate, setting)

    def check_key_in(content: bytes) -> None:
        if alone and b"PRIVATE KEY-----" not in content:
            raise ConfigError(
                f"{setting}: the file has no private key in it: name the key's file as {front}certificate_key"
            )

    if path.is_file():  # not a pipe, which can be read once only
        check_key_in(read_file(path, setting))  # a public file may have any mode
    chain = read_file(path, setting, secret=alone)
    check_key_in(chain)
    if certificate_key is None:
        key = chain
    else:
        key_setting = f"{front}certificate_key"
        key = read_file(secret_path(certificate_key, key_setting), key_setting, secret=True)
    try:
        server_context(chain, key)
    except ConfigError as error:
        raise ConfigError(f"{setting}: {error}") from None
    return chain, key


def _made(data: Path, now: datetime.datetime) -> tuple[bytes, bytes]:
    authority, authority_key = _read(data / AUTHORITY_KEY) or (None, None)
    if authority is None or authority_key is None or authority.not_valid_after_utc < now + LIFETIME:
        authority_key = _new_key()
        # A client that has an older one of the same name would look no further.
        name = f"{_AUTHORITY_NAME} {os.urandom(4).hex()}"
        authority = make_authority(name, authority_key, now, _AUTHORITY_LIFETIME)
        _write(data / AUTHORITY_KEY, _pem(authority) + _key_pem(authority_key))
    if _content(data / AUTHORITY) != _pem(authority):
        _write(data / AUTHORITY, _pem(authority))
    certificate, key = _read(data / SERVER) or (None, None)
    if certificate is None or key is None or not _is_good(certificate, authority, now):
        key = _new_key()
        certificate = issue_server("heliograph", _names(), key, _common_name(authority), authority_key, now)
        _write(data / SERVER, _pem(certificate) + _key_pem(key))
    return _pem(certificate) + _pem(authority), _key_pem(key)


def _is_good(certificate: x509.Certificate, authority: x509.Certificate, now: datetime.datetime) -> bool:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    there = {str(name.value) for name in names}
    return there.issuperset(_names()) and certificate.not_valid_after_utc >= now + _NEAR_END


def _names() -> list[str]:
    host = socket.gethostname().rstrip(".").lower()
    return [*dict.fromkeys([*_OURS, *([host] if _is_dns_name(host) else []), *_APPLES])]


def _common_name(certificate: x509.Certificate) -> str:
    from cryptography.x509.oid import NameOID

    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def _new_key() -> rsa.RSAPrivateKey:
    from cryptography.hazmat.primitives.asymmetric import rsa

    return rsa.generate_private_key(65537, 2048)


def _pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _key_pem(key: rsa.RSAPrivateKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _read(path: Path) -> tuple[x509.Certificate, rsa.RSAPrivateKey] | None:
    """What `_write` put there; None where nothing is. Raises ConfigError, OSError."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = _content(path)
    if content is None:
        return None
    try:
        certificate = x509.load_pem_x509_certificate(content)
        key = load_pem_private_key(content, None)
    except (ValueError, TypeError):
        certificate, key = None, None
    if certificate is None or not isinstance(key, rsa.RSAPrivateKey) or certificate.public_key() != key.public_key():
        raise ConfigError(f"{path} is damaged: put it back as it was, or remove it, and it is made anew")
    return certificate, key


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing, and for us alone."""
    new = path.with_suffix(".new")
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(file, "wb") as opened:
        os.fchmod(file, 0o600)  # it may have been there
        opened.write(content)
        opened.flush()
        os.fsync(file)
    new.replace(path)


@contextlib.contextmanager
def _alone(data: Path) -> Iterator[None]:
    """No other process makes one meanwhile; its kernel ends that however it ends."""
    file = os.open(data / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
