"""PKCS#12 bundles, which people know as .p12 and .pfx.

A bundle is not handed to OpenSSL as it is. Its parts are taken out, what each key derivation costs is read, and then
each key is opened alone, and each encrypted part with a key in front of it that needs no opening, so that nothing is
derived that was not counted before: OpenSSL decrypts the first key it meets, and a part may hide one that costs hours.

Source: RFC 7292.
"""

from __future__ import annotations

import hashlib
import hmac
import warnings
from collections.abc import Iterator

from cryptography import x509
from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, pkcs12

from heliograph.errors import ConfigError
from heliograph.protocols.certificate.der import (
    EXPLICIT_0,
    INTEGER,
    MAX_DEPTH,
    NULL,
    OCTET_STRING,
    OID,
    SEQUENCE,
    Tlv,
    tlv,
)
from heliograph.protocols.certificate.opening import (
    PBMAC1,
    UNKNOWN_ENCRYPTION,
    Key,
    Rounds,
    check_key_size,
    open_certificate,
    open_key,
    rounds_of,
    usable_key,
    wants_passphrase,
    wrong_passphrase,
)

_PKCS7 = bytes.fromhex("2a864886f70d0107")
_DATA, _ENCRYPTED_DATA = _PKCS7 + b"\x01", _PKCS7 + b"\x06"
_BAGS = bytes.fromhex("2a864886f70d010c0a01")
_KEY_BAG, _LOCKED_KEY_BAG, _CERTIFICATE_BAG, _NESTED_BAG = (_BAGS + bytes([last]) for last in (1, 2, 3, 6))
_X509_CERTIFICATE = bytes.fromhex("2a864886f70d01091601")
_SHA256_OID = bytes.fromhex("608648016503040201")


def open_p12(der: bytes, passphrase: bytes | None, rounds: Rounds) -> Iterator[x509.Certificate | Key]:
    """All that a bundle holds, but for keys in a part that is encrypted itself, where programs put none.

    Raises ConfigError.
    """
    try:
        password = (passphrase or b"").decode()
    except UnicodeDecodeError:
        raise ConfigError("The passphrase is not UTF-8: write it again as UTF-8") from None
    tries = len(_endings(password))
    pfx = Tlv.of(der)
    locked_keys, locked_safes = [], []
    for info in Tlv.of(_contents(pfx.part(1, SEQUENCE))).children():
        kind = info.part(0, OID).content
        if kind == _DATA:
            for bag_kind, bag in _bags(Tlv.of(_contents(info)), MAX_DEPTH):
                value = bag.part(1, EXPLICIT_0).only()
                if bag_kind == _KEY_BAG:
                    yield open_key(value.raw)
                elif bag_kind == _LOCKED_KEY_BAG:
                    rounds.add(tries * rounds_of(value.part(0, SEQUENCE)))
                    check_key_size(value.part(1, OCTET_STRING).content)
                    locked_keys.append(_data_info(tlv(SEQUENCE, bag.raw)))
                elif bag_kind == _CERTIFICATE_BAG and value.part(0, OID).content == _X509_CERTIFICATE:
                    yield open_certificate(value.part(1, EXPLICIT_0).only().octets())
        elif kind == _ENCRYPTED_DATA:
            encrypted = info.part(1, EXPLICIT_0).only().part(1, SEQUENCE)
            rounds.add(tries * rounds_of(encrypted.part(1, SEQUENCE)))
            locked_safes.append(_spare_key() + info.raw)
        else:
            raise ConfigError("The .p12 is encrypted for a key, not with a passphrase: export it with a passphrase")
    if len(pfx.children()) > 2:
        rounds.add(_mac_rounds(pfx.part(2, SEQUENCE)))
    for safe in locked_safes:
        opened = _open_part(safe, password)
        yield from (each.certificate for each in (opened.cert, *opened.additional_certs) if each)
    for safe in locked_keys:
        yield usable_key(_open_part(safe, password).key)


def _contents(info: Tlv) -> bytes:
    """What a ContentInfo of plain data carries."""
    if info.part(0, OID).content != _DATA:
        raise ConfigError("The .p12 is signed, not made with a passphrase: export it with a passphrase")
    return info.part(1, EXPLICIT_0).only().octets()


def _bags(safe: Tlv, depth: int) -> Iterator[tuple[bytes, Tlv]]:
    """The bags of a SafeContents with their kinds, those of nested ones too."""
    for bag in safe.children():
        kind = bag.part(0, OID).content
        if kind == _NESTED_BAG and depth:
            yield from _bags(bag.part(1, EXPLICIT_0).only(), depth - 1)
        else:
            yield kind, bag


def _mac_rounds(mac: Tlv) -> int:
    """What verifying the MAC would cost. We do not verify it, but a file that asks for too much is not to be kept."""
    children = mac.children()
    algorithm = mac.part(0, SEQUENCE).part(0, SEQUENCE)
    if algorithm.part(0, OID).content == PBMAC1:
        return rounds_of(algorithm)
    return children[2].number() if len(children) > 2 else 1


def _open_part(safes: bytes, password: str) -> pkcs12.PKCS12KeyAndCertificates:
    """What OpenSSL finds in these ContentInfos. Raises ConfigError."""
    authenticated = tlv(SEQUENCE, safes)
    for ending in _endings(password):
        secret = password.encode("utf-16-be") + ending
        pfx = tlv(SEQUENCE, tlv(INTEGER, b"\3"), _data_info(authenticated), _mac(authenticated, secret))
        try:
            return _load(pfx, password)
        except ValueError:
            continue
        except (UnsupportedAlgorithm, InternalError):
            raise ConfigError(UNKNOWN_ENCRYPTION) from None
    raise wrong_passphrase(".p12") if password else wants_passphrase(".p12")


def _endings(password: str) -> tuple[bytes, ...]:
    """What may stand behind a passphrase; each is a try.

    No passphrase is either no octet or a NUL of UTF-16, and OpenSSL goes by which of them the MAC was made with.
    """
    return (b"\0\0",) if password else (b"\0\0", b"")


def _load(pfx: bytes, password: str) -> pkcs12.PKCS12KeyAndCertificates:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pkcs12.load_pkcs12(pfx, password.encode())


def _mac(authenticated: bytes, secret: bytes) -> bytes:
    """MacData with one round, whose key is then a single hash (RFC 7292, appendix B.2)."""
    salt = bytes(8)
    filled = (secret * 64)[: -(-len(secret) // 64) * 64]
    key = hashlib.sha256(b"\3" * 64 + salt * 8 + filled).digest()
    digest = hmac.digest(key, authenticated, "sha256")
    algorithm = tlv(SEQUENCE, tlv(OID, _SHA256_OID), tlv(NULL))
    return tlv(SEQUENCE, tlv(SEQUENCE, algorithm, tlv(OCTET_STRING, digest)), tlv(OCTET_STRING, salt))


def _data_info(content: bytes) -> bytes:
    return tlv(SEQUENCE, tlv(OID, _DATA), tlv(EXPLICIT_0, tlv(OCTET_STRING, content)))


def _spare_key() -> bytes:
    """A ContentInfo with a key that opens nothing: with it in front, OpenSSL looks for no other."""
    key = ec.derive_private_key(1, ec.SECP256R1()).private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    return _data_info(tlv(SEQUENCE, tlv(SEQUENCE, tlv(OID, _KEY_BAG), tlv(EXPLICIT_0, key))))
