"""The files that certificates and keys are kept in: what is in them, and all of it opened.

Sources: RFC 7468 (PEM), RFC 1421 (its traditional encryption).
"""

from __future__ import annotations

import binascii
import codecs
import re
from collections.abc import Iterator
from contextlib import suppress
from enum import Enum
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from heliograph.errors import ConfigError
from heliograph.protocols.certificate.der import BIT_STRING, EXPLICIT_0, INTEGER, OCTET_STRING, OID, SEQUENCE, Tlv
from heliograph.protocols.certificate.opening import (
    UNKNOWN_ENCRYPTION,
    Key,
    Rounds,
    open_certificate,
    open_key,
    open_locked_key,
)
from heliograph.protocols.certificate.pkcs12 import open_p12

MAX_BYTES = 64 * 1024
"""No file of one certificate, its chain and its key is longer."""

_MAX_KEYS = 8
_MAX_ITEMS = 64


class Sort(Enum):
    """What a piece of a file is."""

    CERTIFICATE = "certificate"
    KEY = "private key"
    LOCKED_KEY = "private key under a passphrase"
    P12 = "PKCS#12 bundle"
    REQUEST = "certificate signing request"
    PUBLIC_KEY = "public key"
    SIGNED = "signed document"
    """CMS: a provisioning profile, or a bundle of certificates."""
    OTHER = "other"


class Item(NamedTuple):
    """A piece of a file: a block of PEM, or all of a DER file."""

    sort: Sort
    der: bytes
    pem: bytes = b""
    """The block as it stands, where it is encrypted the traditional way ("Proc-Type: 4,ENCRYPTED")."""

    def __repr__(self) -> str:
        return f"<{self.sort.value}>"


class Bundle(NamedTuple):
    """What a file holds, opened."""

    certificates: tuple[x509.Certificate, ...]
    keys: tuple[Key, ...]
    sorts: frozenset[Sort]


def items(content: bytes) -> list[Item]:
    """The pieces of a file, unopened: blocks of PEM amid any text, or one of DER, which may stand there as base64.

    Raises ConfigError.
    """
    if len(content) > MAX_BYTES:
        raise ConfigError(f"The file is longer than {MAX_BYTES} octets, so no certificate: name another file")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        # As PowerShell writes what a program prints.
        content = content.decode("utf-16", "replace").encode("ascii", "replace")
    found = list(_blocks(content))
    if len(found) > _MAX_ITEMS:
        raise ConfigError(f"There are more than {_MAX_ITEMS} certificates and keys in the file: leave one pair in it")
    if found:
        return found
    if _is_base64(content.strip()):
        with suppress(binascii.Error):
            content = binascii.a2b_base64(content)
    # A SEQUENCE of more than 127 octets, of indefinite length, or of just this one; texts begin with a 0 as well.
    if content[:1] == b"\x30" and (content[1:2] >= b"\x80" or [*content[1:2]] == [len(content) - 2]):
        der = Tlv.of(content).raw
        return [Item(_sort_of(der), der)]
    return []


def unpack(content: bytes, *, key: bytes | None = None, passphrase: bytes | None = None) -> Bundle:
    """All certificates and private keys of a file or two. A passphrase that nothing needs is not looked at.

    Raises ConfigError.
    """
    if passphrase is not None and b"\0" in passphrase:
        raise ConfigError("The passphrase has a NUL in it, as from a file in UTF-16: write it again as UTF-8")
    certificates: list[x509.Certificate] = []
    keys: list[Key] = []
    rounds = Rounds()
    pieces = items(content) + items(key or b"")
    for piece in pieces:
        for found in _open(piece, passphrase, rounds):
            if isinstance(found, x509.Certificate):
                certificates.append(found)
            else:
                keys.append(found)
            if len(keys) > _MAX_KEYS:
                raise ConfigError(f"There are more than {_MAX_KEYS} private keys in the file: leave one in it")
    unique = {certificate.fingerprint(SHA256()): certificate for certificate in certificates}
    return Bundle(tuple(unique.values()), tuple(keys), frozenset(piece.sort for piece in pieces))


def _open(item: Item, passphrase: bytes | None, rounds: Rounds) -> Iterator[x509.Certificate | Key]:
    if item.sort is Sort.CERTIFICATE:
        yield open_certificate(item.der)
    elif item.sort is Sort.KEY:
        yield open_key(item.der)
    elif item.sort is Sort.LOCKED_KEY:
        yield open_locked_key(item.der, item.pem, passphrase, rounds)
    elif item.sort is Sort.P12:
        yield from open_p12(item.der, passphrase, rounds)


_LABELS = {
    b"CERTIFICATE": Sort.CERTIFICATE,
    b"X509 CERTIFICATE": Sort.CERTIFICATE,
    b"TRUSTED CERTIFICATE": Sort.CERTIFICATE,
    b"PRIVATE KEY": Sort.KEY,
    b"RSA PRIVATE KEY": Sort.KEY,
    b"EC PRIVATE KEY": Sort.KEY,
    b"ENCRYPTED PRIVATE KEY": Sort.LOCKED_KEY,
    b"CERTIFICATE REQUEST": Sort.REQUEST,
    b"NEW CERTIFICATE REQUEST": Sort.REQUEST,
    b"PUBLIC KEY": Sort.PUBLIC_KEY,
    b"RSA PUBLIC KEY": Sort.PUBLIC_KEY,
    b"PKCS7": Sort.SIGNED,
    b"CMS": Sort.SIGNED,
    b"PKCS12": Sort.P12,
}
_is_base64 = re.compile(rb"MI[A-Za-z0-9+/\s]{98,}+=*+").fullmatch  # so begins a SEQUENCE of more than 127 octets
_find_begin = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----").finditer


def _blocks(content: bytes) -> Iterator[Item]:
    end = 0
    for begin in _find_begin(content):
        if begin.start() < end:
            continue
        label = begin[1]
        closing = b"-----END " + label + b"-----"
        at = content.find(closing, begin.end())
        if at < 0:
            raise ConfigError(f"The PEM block {label.decode()} has no end: give the whole file, to its last line")
        end = at + len(closing)
        text = content[begin.end() : at]
        sort = _LABELS.get(label, Sort.OTHER)
        if b"-----" in text:  # a block within the block, which another reader would take for the block
            raise ConfigError(f"The PEM block {label.decode()} has another in it: give the file as it was exported")
        if b"ENCRYPTED" in text and sort is Sort.KEY:
            yield Item(Sort.LOCKED_KEY, b"", _traditional(label, text))
            continue
        der = _from_base64(label, text) if sort is not Sort.OTHER else b""
        if label == b"TRUSTED CERTIFICATE":  # OpenSSL's, with its own remarks behind
            der = Tlv.of(der).raw
        yield Item(sort, der)


_IV_BYTES = {b"DES-EDE3-CBC": 8, b"AES-128-CBC": 16, b"AES-192-CBC": 16, b"AES-256-CBC": 16}
_find_cipher = re.compile(rb"DEK-Info: *([A-Z0-9-]+),([0-9A-Fa-f]+)").search


def _traditional(label: bytes, text: bytes) -> bytes:
    """A block encrypted the traditional way (RFC 1421), written anew with what was checked and nothing else.

    A short initialisation vector, and more, `cryptography` answers with a panic.
    """
    cipher = _find_cipher(text)
    if cipher is None or len(cipher[2]) != 2 * _IV_BYTES.get(cipher[1], 0):
        raise ConfigError(UNKNOWN_ENCRYPTION)
    secret = _from_base64(label, text[cipher.end() :])
    head = b"-----BEGIN %b-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: %b,%b\n\n" % (label, cipher[1], cipher[2])
    return head + binascii.b2a_base64(secret) + b"-----END %b-----\n" % label


def _from_base64(label: bytes, text: bytes) -> bytes:
    try:
        return binascii.a2b_base64(text)
    except binascii.Error:
        raise ConfigError(f"The PEM block {label.decode()} is damaged: give the file as it was exported") from None


def _sort_of(der: bytes) -> Sort:
    """What a piece of DER is, by the outermost tags of its parts."""
    parts = Tlv.of(der).children()
    tags = [part.tag for part in parts]
    if tags[:2] == [INTEGER, SEQUENCE]:
        return Sort.KEY if tags[2:3] == [OCTET_STRING] else Sort.P12
    if tags[:2] in ([INTEGER, INTEGER], [INTEGER, OCTET_STRING]):
        return Sort.KEY
    if tags == [SEQUENCE, OCTET_STRING]:
        return Sort.LOCKED_KEY
    if tags == [SEQUENCE, BIT_STRING]:
        return Sort.PUBLIC_KEY
    if tags[:2] == [OID, EXPLICIT_0]:
        return Sort.SIGNED
    if tags == [SEQUENCE, SEQUENCE, BIT_STRING]:
        inner = [part.tag for part in parts[0].children()]
        return Sort.REQUEST if inner[:3] == [INTEGER, SEQUENCE, SEQUENCE] and len(inner) < 5 else Sort.CERTIFICATE
    return Sort.OTHER
