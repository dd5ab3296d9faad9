"""Opening single certificates and private keys, within limits: nobody's file keeps us busy for minutes.

Sources: RFC 5958 (PKCS#8); RFC 8018 (PBES1, PBES2); RFC 7914 (scrypt).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_der_private_key, load_pem_private_key

from heliograph.errors import ConfigError
from heliograph.protocols.certificate.der import INTEGER, OID, SEQUENCE, Tlv

MAX_ROUNDS = 2_000_000
"""What the key derivations of a file may take together. Keychain uses 2,048, a careful tool of today 600,000
for each of key, certificates and MAC. It is a second or so, in which the interpreter may do nothing else."""

_MAX_SCRYPT = 2**20
"""N times r times p; OpenSSL's default is an eighth of it."""

_MAX_KEY_BYTES = 2560
"""An RSA key of 4,096 bits fits, twice Apple's. Checking a longer one takes seconds."""

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey

UNREADABLE = "a certificate in it cannot be read"

T = TypeVar("T")


def guarded(read: Callable[[], T], complaint: str) -> T:
    """What `read` gives; ConfigError for whatever `cryptography` says to a damaged file, and none of its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read()
        except (
            ValueError,
            TypeError,
            UnsupportedAlgorithm,
            InternalError,
            x509.InvalidVersion,
            x509.DuplicateExtension,
            x509.UnsupportedGeneralNameType,
        ):
            raise ConfigError(f"The file is damaged, {complaint}: export it again") from None


def open_certificate(der: bytes) -> x509.Certificate:
    return guarded(lambda: x509.load_der_x509_certificate(der), UNREADABLE)


def open_key(der: bytes) -> Key:
    check_key_size(der)
    return usable_key(guarded(lambda: load_der_private_key(der, None), "the private key in it cannot be read"))


def usable_key(key: object) -> Key:
    if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
        raise ConfigError(
            "The private key is neither RSA nor of an elliptic curve, as those of Apple's certificates are: "
            "give the key that the certificate's signing request was made with"
        )
    return key


def check_key_size(octets: bytes) -> None:
    if len(octets) > _MAX_KEY_BYTES:
        raise ConfigError("The private key is longer than one of 4,096 bits: give a certificate with a shorter key")


def open_locked_key(der: bytes, pem: bytes, passphrase: bytes | None, rounds: Rounds) -> Key:
    """A key under a passphrase: PKCS#8 as DER, or else PEM with traditional encryption. Raises ConfigError."""
    if not pem:
        algorithm = Tlv.of(der).part(0, SEQUENCE)
        rounds.add(rounds_of(algorithm))
        check_key_size(der)
    else:
        check_key_size(pem[: len(pem) * 3 // 4])
    if not passphrase:
        raise wants_passphrase("private key")

    def read() -> object:
        try:
            if pem:
                return load_pem_private_key(pem, passphrase)
            return load_der_private_key(der, passphrase)
        except (ValueError, TypeError):
            raise wrong_passphrase("private key") from None
        except (UnsupportedAlgorithm, InternalError):
            raise ConfigError(UNKNOWN_ENCRYPTION) from None

    return usable_key(guarded(read, "the private key in it cannot be read"))


def wants_passphrase(what: str) -> ConfigError:
    return ConfigError(f"The {what} is under a passphrase: give the one that was chosen when it was exported")


def wrong_passphrase(what: str) -> ConfigError:
    return ConfigError(
        f"The passphrase does not open the {what}: give the one chosen when it was exported, or export it again"
    )


class Rounds:
    """What the key derivations of a file cost together."""

    def __init__(self) -> None:
        self._total = 0

    def add(self, rounds: int) -> None:
        """Raises ConfigError."""
        self._total += rounds
        if self._total > MAX_ROUNDS:
            raise ConfigError(
                f"The file wants {self._total:,} rounds of key derivation, more than any usual file does: export it "
                "again, with a program's usual settings"
            )


UNKNOWN_ENCRYPTION = (
    "The file is encrypted in a way that is not known here, or has a key of an unknown kind: export it again, with a "
    "program's usual settings"
)
_PKCS5 = bytes.fromhex("2a864886f70d0105")
_PBES2, _PBKDF2, PBMAC1 = (_PKCS5 + last for last in (b"\x0d", b"\x0c", b"\x0e"))
_PBES1 = tuple(_PKCS5 + bytes([last]) for last in (1, 3, 4, 6, 10, 11))
_PKCS12_PBE = bytes.fromhex("2a864886f70d010c01")
_SCRYPT = bytes.fromhex("2b06010401da47040b")


def rounds_of(algorithm: Tlv) -> int:
    """The rounds that an AlgorithmIdentifier of encryption by passphrase asks for. Raises ConfigError."""
    oid, parameters = algorithm.part(0, OID).content, algorithm.part(1, SEQUENCE)
    if oid in (_PBES2, PBMAC1):
        inner = parameters.part(0, SEQUENCE)
        if inner.part(0, OID).content in (_PBKDF2, _SCRYPT):
            return rounds_of(inner)
    elif oid == _SCRYPT:
        cost = 1
        for place in (1, 2, 3):
            cost *= parameters.part(place, INTEGER).number()
        # Scaled, so that the most that scrypt may take is the most that the others may.
        return cost * MAX_ROUNDS // _MAX_SCRYPT
    elif oid == _PBKDF2 or oid in _PBES1 or oid.startswith(_PKCS12_PBE):
        return parameters.part(1, INTEGER).number()
    raise ConfigError(UNKNOWN_ENCRYPTION)
