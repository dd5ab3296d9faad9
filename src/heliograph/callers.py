"""Who may come to the doors for old scripts and other people's libraries, which know no API keys.

A client shows a certificate in its TLS handshake, or a provider token, signed with a key of its own. Either opens our
door for one app, and nothing at Apple: there the app's own credentials are used. A certificate is known by its
fingerprint alone: who signed it and when it ended is not asked, as the scripts have certificates that ended years ago.
"""

from __future__ import annotations

import asyncio
from base64 import urlsafe_b64decode
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Generic, TypeVar

import msgspec
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from msgspec import Struct

from heliograph import reasons
from heliograph.errors import ConfigError, Refused, StoreError
from heliograph.model import App, KnownCaller, SigningKey
from heliograph.ports import Store
from heliograph.protocols import provider_token

_REMEMBERED = 1024
"""Provider tokens of each sort, good or bad, at most. A client has one at a time."""

_REFUSED_S = 10.0
"""How long the no to a provider token is repeated without another look: clients that got one ask again at once."""

_MAX_TOKEN_BYTES = 4096

_log = structlog.get_logger("heliograph.callers")

_T = TypeVar("_T")


def certificate_id(der: bytes) -> str:
    """What a caller with this certificate is known by."""
    return sha256(der).hexdigest()


def key_id(team_id: str, key_id: str) -> str:
    """What a caller with this signing key is known by."""
    return f"{team_id}.{key_id}"


class Callers:
    """All of them, in memory, as they are in the store."""

    def __init__(self, store: Store, apps: Mapping[str, App], *, clock: Callable[[], float]) -> None:
        """`apps` may change; `clock` gives UNIX seconds."""
        self.version = 0
        """Another one whenever the certificates are others than before."""
        self._store = store
        self._apps = apps
        self._clock = clock
        self._callers: dict[str, KnownCaller] = {}
        """By id, oldest first."""
        self._keys: dict[str, dict[str, ec.EllipticCurvePublicKey]] = {}
        """By key id and team id: several teams may have a key of the same id."""
        self._certificates: tuple[bytes, ...] = ()
        self._good = _Memory[KnownCaller]()
        self._bad = _Memory[tuple[str, str]]()
        self._busy = asyncio.Lock()
        """What is read while a caller is removed would bring it back."""

    async def load(self) -> None:
        """Read them from the store, where another process may have changed them. Raises StoreError."""
        async with self._busy:
            self._put({caller.id: caller for caller in await self._store.find_callers()})

    async def look(self) -> None:
        """As `load`; where the store cannot be read, what is known goes on."""
        try:
            await self.load()
        except StoreError as error:
            _log.warning("cannot_read_callers", why=str(error))

    def certificates(self) -> Sequence[bytes]:
        """The PEM of each that is known."""
        return self._certificates

    def by_certificate(self, der: bytes) -> KnownCaller | None:
        """Whose certificate it is; None where it is nobody's, or its app is gone."""
        return self._with_app(self._callers.get(certificate_id(der)))

    def by_provider_token(self, token: bytes, now: float) -> KnownCaller:
        """Who signed this provider token. Raises Refused: InvalidProviderToken, ExpiredProviderToken.

        What was verified once is remembered for as long as the token is good, and what was refused for a moment.
        """
        caller = self._good.find(token, now)
        if caller is None:
            refused = self._bad.find(token, now)
            if refused is not None:
                raise Refused(*refused)
            try:
                caller, until = self._verify(token, now)
            except Refused as error:
                if len(token) <= _MAX_TOKEN_BYTES:
                    self._bad.keep(token, (error.reason, error.detail), now + _REFUSED_S)
                raise
            self._good.keep(token, caller, until)
        if self._with_app(caller) is None:
            raise _refused("is signed with a key of an app that is gone")
        return caller

    def get(self, id: str) -> KnownCaller | None:
        """The caller with this id."""
        return self._callers.get(id)

    def all(self) -> Sequence[KnownCaller]:
        """Oldest first."""
        return list(self._callers.values())

    async def add(self, caller: KnownCaller) -> KnownCaller | None:
        """Have it known, durably, in place of a former one with its id; None: that is what it is.

        Where that one is another app's, nothing is changed, and that one is given back. Raises StoreError.
        """
        async with self._busy:
            former = self._callers.get(caller.id)
            if former is not None and former.app != caller.app:
                return former
            await self._store.save_caller(caller)
            self._put({**self._callers, caller.id: caller})
            return None

    async def remove(self, id: str) -> bool:
        """Whether there was one. It opens nothing any more once this returns. Raises StoreError."""
        async with self._busy:
            removed = await self._store.delete_caller(id)
            self._put({known: caller for known, caller in self._callers.items() if known != id})
            return removed

    def _put(self, callers: dict[str, KnownCaller]) -> None:
        if callers == self._callers:
            return
        # Whoever holds one may see by its identity whether it still holds.
        callers = {key: former if (former := self._callers.get(key)) == new else new for key, new in callers.items()}
        self._callers = callers
        self._keys = {}
        for caller in callers.values():
            if caller.public_key is not None:
                team, _, key = caller.id.partition(".")
                try:
                    public = provider_token.public_key(SigningKey(key, team, caller.public_key))
                except ConfigError as error:
                    _log.error("unusable_caller", id=caller.id, app=caller.app, why=str(error))
                else:
                    self._keys.setdefault(key, {})[team] = public
        self._good, self._bad = _Memory(), _Memory()
        certificates = tuple(each.certificate for each in callers.values() if each.certificate is not None)
        if certificates != self._certificates:
            self._certificates = certificates
            self.version += 1

    def _with_app(self, caller: KnownCaller | None) -> KnownCaller | None:
        return caller if caller is not None and caller.app in self._apps else None

    def _verify(self, token: bytes, now: float) -> tuple[KnownCaller, float]:
        """Who signed it, and until when it is good. Raises Refused."""
        team = _claimed_team(token)

        def find_key(key: str) -> ec.EllipticCurvePublicKey | None:
            teams = self._keys.get(key)
            if teams is not None and team not in teams:
                raise _refused("names a team id (iss) that its key was not registered with")
            return None if teams is None else teams[team]

        claims = provider_token.verify(token, find_key, now)
        caller = self._callers.get(key_id(claims.team_id, claims.key_id))
        if caller is None or claims.team_id != team:
            raise _refused("names a team id (iss) that its key was not registered with")
        return caller, claims.issued_at + provider_token.MAX_AGE_S


class _Memory(Generic[_T]):
    """What is known of some provider tokens, each for a while; the oldest goes where there are too many."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[_T, float]] = {}

    def find(self, token: bytes, now: float) -> _T | None:
        found = self._known.get(token)
        if found is None:
            return None
        value, until = found
        if now <= until:
            return value
        del self._known[token]
        return None

    def keep(self, token: bytes, value: _T, until: float) -> None:
        if len(self._known) >= _REMEMBERED:
            del self._known[next(iter(self._known))]
        self._known[token] = value, until


class _Issuer(Struct):
    iss: str


_decode_issuer = msgspec.json.Decoder(_Issuer).decode


def _claimed_team(token: bytes) -> str:
    """The team id that a token names before its signature was looked at; empty where it names none."""
    parts = token.split(b".", 3) if len(token) <= _MAX_TOKEN_BYTES else []
    if len(parts) != 3:
        return ""
    try:
        return _decode_issuer(urlsafe_b64decode(parts[1] + b"=" * (-len(parts[1]) % 4))).iss
    except (ValueError, msgspec.DecodeError, RecursionError):
        return ""


def _refused(what: str) -> Refused:
    return Refused(reasons.INVALID_PROVIDER_TOKEN.word, f"The provider token {what}.")


def leaf_of(certificates: Sequence[x509.Certificate]) -> x509.Certificate:
    """The one among them that a client shows as its own; the others vouch for it. Raises ConfigError."""
    if not certificates:
        raise ConfigError(
            "There is no certificate in the file: give PEM text that begins with -----BEGIN CERTIFICATE-----"
        )
    # One that signed itself may call itself an authority, as those of `openssl req -x509` do.
    own = [each for each in certificates if not _is_authority(each)] or [*certificates]
    if len(own) > 1:
        raise ConfigError(f"There are {len(own)} certificates of clients in the file: give them one by one")
    return own[0]


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return False
