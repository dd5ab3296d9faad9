"""Records encrypted at rest: what the store keeps of an app's credentials opens with the master key only.

Each record has a key of its own (AES-256-GCM), and that key is wrapped by the master key (AES-256-GCM as well). The
record's name is bound into both, so that a record put in another's place does not open. The master key stands in a file
of its own, apart from the database: a backup of the database alone tells nothing.

A sealed record, version 1, in octets: the version (1) · which master key wrapped it (8) · nonce of the wrapping (12) ·
the wrapped key with its tag (48) · the ciphertext with its tag. The record's key encrypts once only, under a nonce of
zeros (NIST SP 800-38D, section 8, asks that no pair of key and nonce comes twice).

To change the master key: `rotate` writes a new one in front. At the next start or reload the records that are not
`is_current` are sealed anew; when all are current, the old lines may be taken out of the file.
"""

from __future__ import annotations

import binascii
import contextlib
import fcntl
import hmac
import os
import secrets
import stat
import tempfile
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from heliograph.config import read_secret
from heliograph.errors import ConfigError, StoreError

KEY_BYTES = 32

_VERSION = 1
_ID_BYTES = 8
_NONCE_BYTES = 12
_TAG_BYTES = 16
_HEAD_BYTES = 1 + _ID_BYTES
_WRAPPED = slice(_HEAD_BYTES + _NONCE_BYTES, _HEAD_BYTES + _NONCE_BYTES + KEY_BYTES + _TAG_BYTES)
_ONLY_NONCE = bytes(_NONCE_BYTES)


class Vault:
    """Seals with the newest master key, and opens with each that it has."""

    __slots__ = ("_keys", "_newest")

    def __init__(self, keys: Sequence[bytes]) -> None:
        """`keys`: master keys of 32 octets, the newest first. Raises ConfigError."""
        if not keys or any(len(key) != KEY_BYTES for key in keys):
            raise ConfigError(f"A master key must have {KEY_BYTES} octets, and there must be one at least")
        self._keys = {_id_of(key): AESGCM(key) for key in keys}
        self._newest = _id_of(keys[0])

    def __repr__(self) -> str:
        return f"<vault with {len(self._keys)} master keys>"

    def seal(self, name: str, plaintext: bytes) -> bytes:
        """A record that opens under this name only, which should say what kind of record it is as well."""
        head = bytes([_VERSION]) + self._newest
        bound = head + name.encode()
        key, nonce = secrets.token_bytes(KEY_BYTES), secrets.token_bytes(_NONCE_BYTES)
        wrapped = self._keys[self._newest].encrypt(nonce, key, bound)
        return head + nonce + wrapped + AESGCM(key).encrypt(_ONLY_NONCE, plaintext, bound)

    def open(self, name: str, sealed: bytes) -> bytes:
        """What was sealed under this name. Raises StoreError."""
        if len(sealed) < _WRAPPED.stop + _TAG_BYTES:
            raise StoreError(f"The record of {name} is cut short: put the database back from a backup, or save it anew")
        if sealed[0] != _VERSION:
            raise StoreError(
                f"The record of {name} is of version {sealed[0]}, which this heliograph does not know: run the one "
                "that wrote it, or save it anew"
            )
        head = sealed[:_HEAD_BYTES]
        master = self._keys.get(head[1:])
        if master is None:
            raise StoreError(
                f"The record of {name} was sealed with a master key that is not here: put its line back into the file "
                "of master keys"
            )
        bound = head + name.encode()
        try:
            key = master.decrypt(sealed[_HEAD_BYTES : _WRAPPED.start], sealed[_WRAPPED], bound)
            return AESGCM(key).decrypt(_ONLY_NONCE, sealed[_WRAPPED.stop :], bound)
        except InvalidTag:
            raise StoreError(
                f"The record of {name} was changed, or is another's: put the database back from a backup, or save it "
                "anew"
            ) from None

    def is_current(self, sealed: bytes) -> bool:
        """Whether the newest master key wrapped it; what is not should be sealed anew."""
        return sealed[:_HEAD_BYTES] == bytes([_VERSION]) + self._newest


def load_or_make(path: Path) -> Vault:
    """The vault of a file of master keys: base64, one a line, the newest first. The file is made where there is none.

    Raises ConfigError, also where other users of the machine could read the file.
    """
    if not path.exists():
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write(path, [secrets.token_bytes(KEY_BYTES)], anew=True)
        except FileExistsError:
            pass  # another process was first: its key is the key
        except OSError as error:
            raise ConfigError(
                f"The master key cannot be written to {path} ({error.strerror}): name another file, or correct the "
                "folder's mode"
            ) from None
    return Vault(_read(path))


def rotate(path: Path) -> Vault:
    """Write a new master key in front of the others; all at once, or not at all. Raises ConfigError."""
    try:
        with _alone_in(path.parent):
            keys = [secrets.token_bytes(KEY_BYTES), *_read(path)]
            _write(path, keys, anew=False)
    except OSError as error:
        raise ConfigError(f"The master keys cannot be written to {path} ({error.strerror}): correct its mode") from None
    return Vault(keys)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One at a time: of two that read the same keys, the second would write over the key of the first.

    It is the folder that is locked, as the file is another one afterwards. Raises OSError.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _id_of(key: bytes) -> bytes:
    """Which key this is, without telling anything of it."""
    return hmac.digest(key, b"heliograph master key", "sha256")[:_ID_BYTES]


def _read(path: Path) -> list[bytes]:
    lines = read_secret(f"file:{path}", "The master key").split()
    try:
        keys = [b64decode(line, validate=True) for line in lines]
    except binascii.Error:
        keys = []
    if not keys or any(len(key) != KEY_BYTES for key in keys):
        raise ConfigError(
            f"The file of master keys {path} is damaged, it must have {KEY_BYTES} octets as base64 on each line: put "
            "it back from a backup (without it what is sealed cannot be opened)"
        )
    return keys


def _write(path: Path, keys: Sequence[bytes], *, anew: bool) -> None:
    """The whole file, on the disk when this returns. Raises OSError; FileExistsError if `anew` and there is one."""
    # mkstemp makes it with O_EXCL and mode 0600. A crash leaves this aside, and never half a file of keys.
    descriptor, name = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    aside = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(b"".join(b64encode(key) + b"\n" for key in keys))
            file.flush()
            if not anew:
                # Whoever rotates, root for one, must not lock the service out.
                was = path.stat()
                if (was.st_uid, was.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(file.fileno(), was.st_uid, was.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(was.st_mode))
            os.fsync(file.fileno())
        if anew:
            os.link(aside, path)  # unlike a rename, it replaces nothing
        else:
            aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
