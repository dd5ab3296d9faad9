"""API keys: who may do what, for which apps.

A key is `hg_<id>_<secret>`. The id is public and names the key in lists and logs; of the whole only a digest is kept.
The secret has 256 random bits, so a plain SHA-256 keeps it: there is nothing to guess that a slow hash would slow down.

The key of the configuration, or the one in the data folder, may do everything and is in no list.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256

import structlog
from msgspec import Struct

from heliograph.errors import StoreError
from heliograph.model import ApiKey, Scope
from heliograph.ports import Store

PREFIX = "hg_"
"""How our API keys begin, so that people and scanners of leaked secrets know them."""

_ID_OCTETS = 4
_SECRET_OCTETS = 32

_id_of = re.compile(rb"hg_([a-z0-9]{8})_").match
_log = structlog.get_logger("heliograph.keys")


class Caller(Struct, frozen=True):
    """Who is asking, by the API key that was shown."""

    id: str
    """The key's; empty for the server's own."""
    scopes: frozenset[Scope]
    apps: frozenset[str] | None
    """None: all."""
    expires_at: float | None = None
    """UNIX seconds; None: never."""

    def may_use(self, app: str) -> bool:
        """Whether this app is any of the caller's business."""
        return self.apps is None or app in self.apps

    def may_use_all(self, apps: Iterable[str] | None) -> bool:
        """Whether each of these is. None is all apps, those to come too."""
        return self.apps is None or (apps is not None and self.apps.issuperset(apps))


class Keyring:
    """All API keys of the server, in memory, as they are in the store."""

    def __init__(self, own: bytes, store: Store, *, clock: Callable[[], float]) -> None:
        """`own` is the server's own key, `clock` gives UNIX seconds."""
        self._own = sha256(own).digest()
        self._owner = Caller("", frozenset(Scope), None)
        self._store = store
        self._clock = clock
        self._keys: dict[bytes, tuple[ApiKey, Caller]] = {}
        """By id, oldest first."""
        self._busy = asyncio.Lock()
        """What is read while a key is removed would bring it back."""

    async def load(self) -> None:
        """Read them from the store, where another process may have changed them. Raises StoreError."""
        async with self._busy:
            found = await self._store.find_keys()
            self._keys = {key.id.encode(): (key, _caller(key)) for key in found}

    async def look(self) -> None:
        """As `load`; where the store cannot be read, what is known goes on."""
        try:
            await self.load()
        except StoreError as error:
            _log.warning("cannot_read_keys", why=str(error))

    def find(self, shown: bytes) -> Caller | None:
        """Whose key it is; None where it is nobody's, or its time is over."""
        digest = sha256(shown).digest()
        if named := _id_of(shown):
            known = self._keys.get(named[1])
            if known is not None and hmac.compare_digest(known[0].digest, digest):
                key, caller = known
                return caller if key.expires_at is None or self._clock() < key.expires_at else None
        return self._owner if hmac.compare_digest(self._own, digest) else None

    def find_ended(self, shown: bytes) -> ApiKey | None:
        """The key whose time is over; only who shows the whole of it is told."""
        named = _id_of(shown)
        known = self._keys.get(named[1]) if named else None
        if known is None or not hmac.compare_digest(known[0].digest, sha256(shown).digest()):
            return None
        key, _ = known
        return key if key.expires_at is not None and self._clock() >= key.expires_at else None

    def get(self, id: str) -> ApiKey | None:
        """The key with this id."""
        known = self._keys.get(id.encode())
        return None if known is None else known[0]

    def all(self) -> Sequence[ApiKey]:
        """Oldest first."""
        return [key for key, _ in self._keys.values()]

    async def make(
        self, name: str, scopes: Sequence[Scope], apps: Sequence[str] | None, expires_at: float | None = None
    ) -> tuple[ApiKey, str]:
        """A new key, durable, and the key itself, which nobody can show again. Raises StoreError."""
        async with self._busy:
            while (key_id := secrets.token_hex(_ID_OCTETS)).encode() in self._keys:
                pass  # to be kept under a known id would end the other key
            whole = f"{PREFIX}{key_id}_{secrets.token_urlsafe(_SECRET_OCTETS)}"
            digest = sha256(whole.encode()).digest()
            only = None if apps is None else tuple(apps)
            key = ApiKey(key_id, name, digest, tuple(scopes), only, self._clock(), expires_at)
            await self._store.save_key(key)
            self._keys[key_id.encode()] = key, _caller(key)
            return key, whole

    async def remove(self, id: str) -> bool:
        """Whether there was one. It opens nothing any more once this returns. Raises StoreError."""
        async with self._busy:
            removed = await self._store.delete_key(id)
            self._keys.pop(id.encode(), None)
            return removed


def _caller(key: ApiKey) -> Caller:
    apps = None if key.apps is None else frozenset(key.apps)
    return Caller(key.id, frozenset(key.scopes), apps, key.expires_at)
