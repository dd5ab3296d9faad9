"""Which apps there are and the way of each to Apple: from the configuration's files, and from the store.

What a `Directory` learns anew is swapped in app by app, while notifications are under way; what cannot be used is told
and leaves the former credentials in place. A route stays equal as long as its key, certificate and target do, so that
connections go on being shared.

Stored apps are sealed: their record is `AppContent` as JSON, under the app's name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import structlog

from heliograph import credentials, vault
from heliograph.apps.building import (
    Contexts,
    Entry,
    Instead,
    build,
    credential_id,
    ended,
    files_of,
    kind_and_name,
    read_content,
    show_entry,
    suffixed,
    with_credentials,
    without_credentials,
)
from heliograph.carriers.apns import Route
from heliograph.config import AppContent, AppSettings, Config, CredentialContent, is_app_name, secret_path
from heliograph.errors import ConfigError, HeliographError, StoreError
from heliograph.model import App, ClientCertificate, Credentials, Environment
from heliograph.ports import Store

MASTER_KEY_FILE = "master-key"
"""In the data folder, unless `[store] master_key` names another file."""

_Stamp = tuple[int, int, int] | None
"""Of a file: another one once it or its mode was changed, or another took its place; None: it is not there."""

_log = structlog.get_logger("heliograph.apps")
_encode = msgspec.json.encode
_decode_content = msgspec.json.Decoder(AppContent).decode


class Directory:
    """All apps by name. `start` reads those of the configuration, `open` those of the store."""

    def __init__(
        self,
        config: Config,
        *,
        clock: Callable[[], float],
        reread: Callable[[], Config] | None = None,
        instead: Instead | None = None,
    ) -> None:
        """`clock` gives UNIX seconds. `reread` reads the configuration again; None: it does not change."""
        self._settings: Mapping[str, AppSettings] = config.apps
        self._master_key = master_key_path(config)
        self._clock = clock
        self._reread = reread
        self._instead = instead
        self._store: Store | None = None
        self._vault: vault.Vault | None = None
        self._contexts = Contexts()
        self._configured: dict[str, Entry] = {}
        self._stored: dict[str, Entry] = {}
        self._entries: dict[str, Entry] = {}
        self._apps: dict[str, App] = {}
        self.apps: Mapping[str, App] = MappingProxyType(self._apps)
        """A live view."""
        self._busy = asyncio.Lock()
        """Reading, opening and saving happen in other threads; two of them at once could undo one another."""
        self._warned: dict[tuple[str, str], int] = {}
        self._stamps: dict[Path, _Stamp] = {}
        self._moving: dict[Path, _Stamp] = {}

    async def start(self) -> None:
        """Read the apps of the configuration. Raises ConfigError."""
        self._stamps = self._look()
        for name, settings in self._settings.items():
            self._configured[name] = await asyncio.to_thread(self._from_files, name, settings)
        self._swap(quiet=True)

    async def open(self, store: Store) -> None:
        """Read the stored apps. Raises ConfigError and StoreError, also where the master key does not open them.

        Without its apps a server must not start: what waits for them would come to its end.
        """
        records = await store.find_apps()
        if records and not self._master_key.exists():
            raise ConfigError(
                f"The master key {self._master_key} is gone, and the store has apps that only it opens "
                f"({', '.join(sorted(records))}): put it back"
            )
        self._vault = await asyncio.to_thread(vault.load_or_make, self._master_key)
        self._store = store
        self._stamps = self._look()
        for name, record in records.items():
            hidden = name in self._configured
            try:
                self._stored[name] = await asyncio.to_thread(self._from_record, name, record)
            except ConfigError as error:
                if not hidden:
                    raise ConfigError(f"{error}; an [apps.{name}] in the configuration would take its place") from None
            if hidden:
                _log.warning("app_hidden", app=name, hint="the configuration has one of this name, which is used")
        await self._seal_anew(self._vault, records)
        self._swap(quiet=True)

    # -- what the relay and the carrier ask --------------------------------------------------------------------------

    def find_route(self, name: str, environment: Environment, topic: str) -> Route | None:
        """The way for what has this topic, with its suffix; None where there is none (any more)."""
        entry = self._entries.get(name)
        found = None if entry is None else entry.app.credentials_for(environment, topic)
        return None if entry is None or found is None else entry.routes[environment, found]

    # -- what people ask ---------------------------------------------------------------------------------------------

    def show(self, name: str) -> dict[str, Any] | None:
        """An app as JSON, without secrets; None where there is none."""
        entry = self._entries.get(name)
        return None if entry is None else show_entry(entry, self._clock())

    def days_left(self) -> Iterator[tuple[str, str, str, str, int]]:
        """App, environment, kind, name and days left of all credentials that have an end."""
        now = self._clock()
        for name, entry in self._entries.items():
            for access in entry.app.access:
                days = credentials.days_left(access.credentials, now)
                if days is not None:
                    for environment in access.environments:
                        yield (name, environment.value, *kind_and_name(access.credentials), days)

    def warn(self) -> None:
        """Log what ends soon or has ended: once for each of `credentials.WARNING_DAYS`."""
        now = self._clock()
        for name, entry in self._entries.items():
            for access in entry.app.access:
                found = access.credentials
                days = credentials.days_left(found, now)
                if days is None or not isinstance(found, ClientCertificate):
                    continue
                about = (name, found.fingerprint)
                due = credentials.warning_due(days, self._warned.get(about))
                if due is None:
                    continue
                self._warned[about] = due
                if days < 0:
                    hint = "Apple takes nothing with it: put a new one in its place"
                    _log.error("certificate_ended", app=name, name=found.name, days_left=days, hint=hint)
                else:
                    hint = "make a new one in the developer account, and put it in its place"
                    _log.warning("certificate_ends_soon", app=name, name=found.name, days_left=days, hint=hint)

    # -- changes -----------------------------------------------------------------------------------------------------

    async def reload(self) -> bool:
        """Read configuration and credential files again; whether the configuration could be read.

        What cannot be used is logged, and the former stays.
        """
        async with self._busy:
            settings, read = self._settings, True
            if self._reread is not None:
                try:
                    settings = (await asyncio.to_thread(self._reread)).apps
                except ConfigError as error:
                    read = False
                    _log.error("configuration_kept", why=str(error), hint="the former apps go on; correct it")
            await self._renew(settings)
            return read

    async def look(self) -> None:
        """Renew what is made of files that have changed since they were read, once they stay the same for two looks."""
        async with self._busy:
            stamps = await asyncio.to_thread(self._look)
            if stamps == self._stamps:
                return
            if stamps != self._moving:
                self._moving = stamps
                return
            await self._renew(self._settings)

    async def put(self, name: str, content: AppContent) -> bool:
        """Keep an app, in place of a former one; whether it is a new one. Durable on return.

        Raises ConfigError and StoreError.
        """
        if not is_app_name(name):
            raise ConfigError("An app's name must be letters, digits, dots, hyphens and underscores, 64 at most")
        async with self._busy:
            self._refuse_configured(name)
            entry = await asyncio.to_thread(self._build, name, content, "", stored=True)
            for each in ended(entry, self._clock()):
                raise _ended(each)
            is_new = name not in self._stored
            await self._keep(name, entry)
            return is_new

    async def add_credentials(self, name: str, given: CredentialContent, instead_of: str | None = None) -> str | None:
        """Give a stored app more credentials, or others in the place of those with an id; their id. Durable on return.

        What has the same id is replaced anyway. None: there is no such app, or it has none with the id `instead_of`.
        Raises ConfigError and StoreError.
        """
        async with self._busy:
            self._refuse_configured(name)
            former = self._stored.get(name)
            if former is None:
                return None
            content, added = await asyncio.to_thread(with_credentials, former, given, instead_of)
            if instead_of is not None and not {instead_of, credential_id(added)} & _ids(former):
                return None
            entry = await asyncio.to_thread(self._build, name, content, "", stored=True)
            if added in ended(entry, self._clock()):
                raise _ended(added)
            await self._keep(name, entry)
            return credential_id(added)

    async def remove_credentials(self, name: str, gone: str) -> bool:
        """Take the credentials with this id from a stored app; whether there were such. Durable on return.

        Raises StoreError, and ConfigError where the app cannot be without them.
        """
        async with self._busy:
            self._refuse_configured(name)
            former = self._stored.get(name)
            if former is None or gone not in _ids(former):
                return False
            content = without_credentials(former, gone)
            if not content.credentials:
                raise ConfigError(f"{gone} is all that the app {name!r} has: remove the app, or add others first")
            await self._keep(name, await asyncio.to_thread(self._build, name, content, "", stored=True))
            return True

    async def _keep(self, name: str, entry: Entry) -> None:
        """Have a stored app be this, on disk and at once."""
        assert self._store is not None
        assert self._vault is not None
        await self._store.save_app(name, self._vault.seal(sealed_name(name), _encode(entry.content)))
        self._stored[name] = entry
        self._swap()

    async def remove(self, name: str) -> bool:
        """Forget a stored app; whether there was one. Raises ConfigError, StoreError."""
        store = self._store
        assert store is not None
        async with self._busy:
            self._refuse_configured(name)
            there = await store.delete_app(name)
            self._stored.pop(name, None)
            self._swap()
            return there

    def is_configured(self, name: str) -> bool:
        """It is in the configuration, and so not for the API to change."""
        # Whether it could be used or not: a name is the API's to take only where the configuration has none such.
        return name in self._settings

    def _refuse_configured(self, name: str) -> None:
        if self.is_configured(name):
            raise ConfigError(f"The app {name!r} is in the server's configuration file: change it there")

    async def _renew(self, settings: Mapping[str, AppSettings]) -> None:
        self._settings = settings
        # Looked at before it is read: what changes in between is seen the next time.
        self._stamps = self._moving = await asyncio.to_thread(self._look)
        configured = {}
        for name, each in settings.items():
            former = self._configured.get(name)
            try:
                fresh = await asyncio.to_thread(self._from_files, name, each)
                if former is not None:
                    self._check_ends(former, fresh, f"apps.{name}")
                configured[name] = fresh
            except ConfigError as error:
                if former is None:
                    _log.error("app_left_out", app=name, why=str(error), hint="correct it, then send SIGHUP")
                else:
                    configured[name] = former
                    _log.error("app_kept", app=name, why=str(error), hint="the former credentials go on; correct it")
        self._configured = configured
        self._swap()
        if self._store is not None:
            await self._renew_vault(self._store)

    def _check_ends(self, former: Entry, fresh: Entry, where: str) -> None:
        """Raises ConfigError where a certificate that has ended would come in the place of what still is good."""
        now = self._clock()
        before = ended(former, now)
        new = [each for each in ended(fresh, now) if each not in before]
        if new and len(ended(fresh, now)) > len(before):
            raise ConfigError(f"{where}: {_told(new[0])}: make a new one in the developer account, and put it there")

    async def _renew_vault(self, store: Store) -> None:
        try:
            if not self._master_key.exists():  # none is made in its place: the next start could open nothing
                raise ConfigError(f"The master key {self._master_key} is gone")
            fresh = await asyncio.to_thread(vault.load_or_make, self._master_key)
            await self._seal_anew(fresh, await store.find_apps())
        except HeliographError as error:
            _log.error("master_key_kept", why=str(error), hint="the former goes on until the next start; put it back")
        else:
            self._vault = fresh

    async def _seal_anew(self, fresh: vault.Vault, records: Mapping[str, bytes]) -> None:
        """Seal what is not sealed under the newest master key; the vault that we have opens it."""
        assert self._vault is not None
        assert self._store is not None
        stale = [name for name, record in records.items() if not fresh.is_current(record)]
        for name in stale:
            content = self._vault.open(sealed_name(name), records[name])
            await self._store.save_app(name, fresh.seal(sealed_name(name), content))
        if stale:
            _log.info("sealed_anew", apps=sorted(stale))

    def _swap(self, *, quiet: bool = False) -> None:
        """Have all that was learnt count, at once. `quiet`: the server is starting, and will say what it has."""
        before, self._entries = self._entries, {**self._stored, **self._configured}
        for name in before.keys() - self._entries.keys():
            del self._apps[name]
            _log.info("app_removed", app=name)
        for name, entry in self._entries.items():
            former = before.get(name)
            if former is not None and (former.app, former.routes) == (entry.app, entry.routes):
                continue
            self._apps[name] = entry.app
            if self._instead is not None:
                self._instead.learn(entry.app)
            certified = (topic for access in entry.app.access for topic in access.topics or ())
            for topic in suffixed(entry.app.topics, certified):
                hint = "it looks like a topic with the suffix of a push type: write the bundle id, the suffix is added"
                _log.warning("topic_with_suffix", app=name, topic=topic, hint=hint)
            if not quiet:
                _log.info("app_added" if former is None else "app_changed", app=name)
        self._contexts.keep(route.endpoint.tls for entry in self._entries.values() for route in entry.routes.values())
        self.warn()

    def _look(self) -> dict[Path, _Stamp]:
        files = {path for each in self._settings.values() for path in files_of(each)}
        return {path: _stamp(path) for path in (*files, self._master_key)}

    # These run in other threads.

    def _from_files(self, name: str, settings: AppSettings) -> Entry:
        return self._build(name, read_content(name, settings), f"apps.{name}", stored=False)

    def _from_record(self, name: str, record: bytes) -> Entry:
        assert self._vault is not None
        opened = self._vault.open(sealed_name(name), record)
        try:
            content = _decode_content(opened)
        except msgspec.DecodeError:
            raise StoreError(
                f"The record of the app {name} is not of this version of heliograph: start the one that wrote it"
            ) from None
        return self._build(name, content, f"The stored app {name}", stored=True)

    def _build(self, name: str, content: AppContent, where: str, *, stored: bool) -> Entry:
        return build(name, content, where, self._contexts, stored=stored, instead=self._instead)


def master_key_path(config: Config) -> Path:
    """Raises ConfigError."""
    reference = config.store.master_key
    return Path(config.data) / MASTER_KEY_FILE if reference is None else secret_path(reference, "store.master_key")


def _stamp(path: Path) -> _Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_ctime_ns, found.st_ino, found.st_size)


def _ids(entry: Entry) -> set[str]:
    return {credential_id(access.credentials) for access in entry.app.access}


def _ended(found: Credentials) -> ConfigError:
    assert isinstance(found, ClientCertificate)
    return ConfigError(f"{_told(found)}: make a new one in the developer account, and give that")


def _told(certificate: ClientCertificate) -> str:
    return f"The certificate {certificate.name} ended on {datetime.fromtimestamp(certificate.not_after, UTC):%Y-%m-%d}"


def sealed_name(name: str) -> str:
    """What an app's record is sealed under."""
    return f"app {name}"
