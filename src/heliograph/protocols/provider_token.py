"""The provider token: an ES256 JWT that says which team speaks. Mint and verify, as functions of (key, now).

All processes that hold a key mint the same token within the same half hour, without sharing anything: its issue time
lies on a grid, its JSON has fixed bytes, and the signature is deterministic (RFC 6979). Apple allows one token from
many servers, wants it renewed every 20 to 60 minutes, and calls it expired an hour after its `iat`.

Sources: Apple, "Establishing a token-based connection to APNs"; RFC 7515, RFC 7518 section 3.4.
"""

from __future__ import annotations

import re
from base64 import b64encode, urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from msgspec import Struct

from heliograph import reasons
from heliograph.errors import ConfigError, Refused
from heliograph.model import SigningKey

GRID_S = 1800
"""A token serves for half an hour."""

LEAD_S = 60
"""The grid is late by this much, so that a clock a little fast mints nothing from the future."""

MAX_AGE_S = 3600
"""Apple takes a token for an hour from its `iat`."""

FUTURE_TOLERANCE_S = 300
"""How far `iat` may lie ahead when we verify; Apple's own tolerance is not published."""

_MAX_TOKEN_BYTES = 4096
_KEY_ID = re.compile(r"[A-Z0-9]{10}")
_is_number = re.compile(r"[0-9]{1,12}").fullmatch
_FILE_NAME = re.compile(r"AuthKey_([A-Z0-9]{10})\.p8")
# 1.2.840.113549.1.7.1, which stands near the beginning of every PKCS#12 file (RFC 7292, section 4).
_PKCS7_DATA = bytes.fromhex("2a864886f70d010701")

_PUBLIC = b"-----BEGIN PUBLIC KEY-----"

_T = TypeVar("_T")


class Claims(Struct, frozen=True):
    """What a verified provider token says."""

    key_id: str
    team_id: str
    issued_at: int
    """UNIX seconds."""


def parse_signing_key(pem: bytes, *, key_id: str, team_id: str) -> SigningKey:
    """A signing key from the contents of Apple's .p8 file. Raises ConfigError that says what is wrong with it."""
    check_ids(key_id, team_id)
    _private_key(pem)
    return SigningKey(key_id, team_id, pem)


def check_ids(key_id: str, team_id: str) -> None:
    """Raises ConfigError where one of them is none of Apple's form."""
    if not _KEY_ID.fullmatch(key_id):
        raise ConfigError("The key id must be 10 capital letters and digits, as in the file's name AuthKey_<key id>.p8")
    if not _KEY_ID.fullmatch(team_id):
        raise ConfigError("The team id must be 10 capital letters and digits, as the developer account shows it")


def key_id_from_filename(name: str) -> str | None:
    """The key id in the name that Apple gives the file (`AuthKey_ABC123DEFG.p8`), None for another name."""
    match = _FILE_NAME.fullmatch(name)
    return match[1] if match else None


def public_key(key: SigningKey) -> ec.EllipticCurvePublicKey:
    """What verifies this key's tokens; its public half alone will do, as PEM. Raises ConfigError."""
    if _PUBLIC not in key.pem:
        return _private_key(key.pem).public_key()
    try:
        public = load_pem_public_key(key.pem)
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError("The public key is damaged PEM: write it out anew") from None
    if not (isinstance(public, ec.EllipticCurvePublicKey) and isinstance(public.curve, ec.SECP256R1)):
        raise ConfigError("The public key is no elliptic-curve key on P-256: Apple has no others")
    return public


def issue_time(now: float) -> int:
    """The `iat` of the token of this half hour, in UNIX seconds."""
    return int(now - LEAD_S) // GRID_S * GRID_S


def mint(key: SigningKey, now: float) -> str:
    """The provider token of this half hour; the same for everyone who asks within it. Raises ConfigError."""
    header = msgspec.json.encode({"alg": "ES256", "kid": key.key_id})
    claims = msgspec.json.encode({"iss": key.team_id, "iat": issue_time(now)})
    signed = _to_base64(header) + b"." + _to_base64(claims)
    signature = _private_key(key.pem).sign(signed, ec.ECDSA(SHA256(), deterministic_signing=True))
    r, s = decode_dss_signature(signature)
    return (signed + b"." + _to_base64(r.to_bytes(32, "big") + s.to_bytes(32, "big"))).decode()


def verify(token: bytes, find_key: Callable[[str], ec.EllipticCurvePublicKey | None], now: float) -> Claims:
    """What a provider token says, once its signature holds. It costs a signature check: remember the answer.

    `find_key` gives the P-256 public key of a key id, None for an unknown one. Whether the key belongs to
    `Claims.team_id` is for the caller to compare. The signature may be r and s side by side, as RFC 7518 wants, or
    DER, as some clients send and Apple takes; and `iat` may have a fraction or be a string of digits.

    Raises Refused: InvalidProviderToken, ExpiredProviderToken.
    """
    parts = token.split(b".") if len(token) <= _MAX_TOKEN_BYTES else []
    if len(parts) != 3:
        _invalid("is not a JWT of three parts")
    header = _decode(parts[0], _decode_header)
    if header.alg != "ES256":
        _invalid("must be signed with ES256")
    if header.crit is not msgspec.UNSET:
        _invalid("names critical extensions, and there are none")
    key = find_key(header.kid)
    if key is None:
        _invalid("names a key id that is not known here")
    signature = _from_base64(parts[2])
    if len(signature) == 64:
        signature = encode_dss_signature(int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big"))
    try:
        key.verify(signature, parts[0] + b"." + parts[1], ec.ECDSA(SHA256()))
    except InvalidSignature:
        _invalid("has a signature that does not fit")
    claims = _decode(parts[1], _decode_claims)
    issued_at = _seconds(claims.iat)
    if issued_at > now + FUTURE_TOLERANCE_S:
        _invalid("is from the future: correct the clock of its maker")
    if issued_at < now - MAX_AGE_S:
        raise Refused(reasons.EXPIRED_PROVIDER_TOKEN.word, "The provider token is older than an hour: renew it.")
    return Claims(header.kid, claims.iss, issued_at)


class _Header(Struct):
    alg: str
    kid: str
    crit: Any = msgspec.UNSET


class _Claims(Struct):
    iss: str
    iat: int | float | str


_decode_header = msgspec.json.Decoder(_Header).decode
_decode_claims = msgspec.json.Decoder(_Claims).decode


def _seconds(iat: float | str) -> int:
    """Whole UNIX seconds."""
    if isinstance(iat, str) and not _is_number(iat):
        _invalid("has an iat that is no number of seconds")
    return int(iat)


def _decode(part: bytes, decode: Callable[[bytes], _T]) -> _T:
    try:
        return decode(_from_base64(part))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        _invalid("holds JSON without alg and kid, or without iss and iat")


def _from_base64(part: bytes) -> bytes:
    """RFC 7515, section 2: no padding, no other alphabet, no stray bits; or base64 with all of its padding.

    Apple takes the latter too: the Rust library a2, which has been in use for years, makes no other.
    """
    try:
        octets = urlsafe_b64decode(part + b"=" * (-len(part) % 4))
    except ValueError:
        octets = b""
    # Python's decoder skips what it does not know; what comes back the same had nothing to skip.
    if not octets or part not in (_to_base64(octets), b64encode(octets)):
        _invalid("is not base64url without padding")
    return octets


def _to_base64(octets: bytes) -> bytes:
    return urlsafe_b64encode(octets).rstrip(b"=")


def _invalid(what: str) -> NoReturn:
    raise Refused(reasons.INVALID_PROVIDER_TOKEN.word, f"The provider token {what}.") from None


def _private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError:
        raise ConfigError(
            "The signing key is encrypted: give the .p8 file as Apple issued it, or decrypt it first"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"The signing key {_complaint(pem)}: give the .p8 file as Apple issued it") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError("The signing key is no elliptic-curve key: Apple's .p8 files hold one on the curve P-256")
    if not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(f"The signing key is on the curve {key.curve.name}: Apple's .p8 files hold one on P-256")
    return key


def _complaint(pem: bytes) -> str:
    if not pem.strip():
        return "is empty"
    if b"BEGIN CERTIFICATE" in pem:
        return "is a certificate"
    if b"PUBLIC KEY-----" in pem:
        return "is a public key, which cannot sign"
    if _PKCS7_DATA in pem[:64]:
        return "is a .p12, which holds a certificate"
    if b"-----BEGIN " not in pem:
        return "is not PEM, the text that begins with -----BEGIN PRIVATE KEY-----"
    return "is damaged PEM"
