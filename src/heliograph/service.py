"""Builds everything from the configuration, starts it in one TaskGroup, stops it in order.

Stopping: no new requests, those in hand are answered; no new leases; the carrier lets open streams be answered; what
was learnt is recorded; the store is closed. Whatever is left waiting is in the store, for the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from msgspec import Struct

from heliograph import crash
from heliograph.apps import Directory, Instead
from heliograph.callers import Callers
from heliograph.carriers.apns import ApnsCarrier
from heliograph.config import ApiSettings, Config, read_secret
from heliograph.doors.api import Api
from heliograph.doors.apps import AppsPart
from heliograph.doors.callers import CallersPart
from heliograph.doors.keys import KeysPart
from heliograph.doors.notifications import Notifications
from heliograph.doors.operations import Operations
from heliograph.doors.removals import RemovalsPart
from heliograph.doors.web import make_app
from heliograph.errors import ConfigError, StoreError
from heliograph.keys import PREFIX, Keyring
from heliograph.model import App
from heliograph.net.asgi import Server
from heliograph.relay import Relay
from heliograph.stores.sqlite import SqliteStore
from heliograph.stores.sqlite_file import locked
from heliograph.telemetry import Telemetry

if TYPE_CHECKING:
    from heliograph.listeners import Listeners

DATABASE = "heliograph.db"
"""In the data folder."""

KEY_FILE = "api-key"
"""In the data folder: the API key that was made on the first start."""

_ANSWERING_S = 10
"""How long requests in hand may take when the server stops."""

_LOOK_S = 5.0
"""Between two looks at credential files and API keys."""
_HOUR_S = 3600.0
_FIRST_PURGE_S = 60.0
"""After a start there is more urgent work."""
_DAY_S = 86400

_log = structlog.get_logger("heliograph.service")


class Running(Struct, frozen=True):
    """A server that takes requests."""

    url: str
    """Of the HTTP API, without a slash at its end."""
    key: str
    """The API key."""
    relay: Relay
    apps: Directory
    stop: asyncio.Event
    """Set: `run` comes to an end."""
    ports: Mapping[tuple[str, ...], int]
    """Of the other listeners, by the way to the setting: `("legacy", "main", "feedback_port")`."""

    def __repr__(self) -> str:
        return f"<server at {self.url}>"


_SWITCH_S = 0.0005
"""After so long a thread that waits for the interpreter's lock gets it. A loop that is never idle keeps the lock for
all this time whenever the store's thread asks for it, which it does with each call of SQLite: with CPython's 5 ms,
single commits could take seconds."""

_YOUNG = 10_000
"""Objects that came about, less those that are gone by themselves, before the garbage collector looks at them. By
itself it begins at 700, which is less than the requests in hand have, and takes a tenth of all CPU time."""

LEASE_S = 150.0
"""Longer than a batch can be out: twice in the carrier's backlog (`PoolSettings.patience_s`), then on the wire
(`Limits.message_s`), with room for a slow settling."""


def new_event_loop() -> asyncio.AbstractEventLoop:
    """That of uvloop where it can be imported, else asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


async def run(
    config: Config,
    *,
    started: Callable[[Running], Awaitable[None]] | None = None,
    reread: Callable[[], Config] | None = None,
    instead: Instead | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, or until `Running.stop` is set. `started` is awaited beside, once all runs.

    `reread` gives the configuration again; where it is given, SIGHUP has the apps read anew. `instead`: where to send
    instead of to Apple. Raises ConfigError, StoreError, and an ExceptionGroup where something failed later on.
    """
    sys.setswitchinterval(_SWITCH_S)
    # What was imported stays: to walk over it again and again would stop everything for 10 ms each time.
    gc.freeze()
    gc.set_threshold(_YOUNG)
    loop = asyncio.get_running_loop()
    stop, hangup = asyncio.Event(), asyncio.Event()
    signals = (signal.SIGTERM, signal.SIGINT)

    def on_signal() -> None:
        # Who sends a second one does not want to wait for an orderly end.
        for each in signals:
            loop.remove_signal_handler(each)
        stop.set()

    for each in signals:
        loop.add_signal_handler(each, on_signal)
    if reread is not None:
        loop.add_signal_handler(signal.SIGHUP, hangup.set)
    try:
        async with (
            serving(config, stop, reread=reread, instead=instead) as running,
            asyncio.TaskGroup() as group,
        ):
            beside = [
                group.create_task(_beside(started, running)),
                group.create_task(_reload_on(hangup, running.apps)),
            ]
            await stop.wait()
            for task in beside:
                task.cancel()
    finally:
        for each in (*signals, signal.SIGHUP):
            loop.remove_signal_handler(each)


async def _beside(started: Callable[[Running], Awaitable[None]] | None, running: Running) -> None:
    if started is not None:
        await started(running)


async def _reload_on(hangup: asyncio.Event, apps: Directory) -> None:
    while True:
        await hangup.wait()
        hangup.clear()
        if await apps.reload():
            _log.info("reloaded", apps=sorted(apps.apps))


@contextlib.asynccontextmanager
async def serving(
    config: Config,
    stop: asyncio.Event | None = None,
    *,
    reread: Callable[[], Config] | None = None,
    instead: Instead | None = None,
    look_s: float = _LOOK_S,
) -> AsyncIterator[Running]:
    """A server for as long as the block runs; see `run`. `look_s`: between two looks at credential files and API keys.

    Raises ConfigError, StoreError.
    """
    data = Path(config.data)
    directory = Directory(config, clock=time.time, reread=reread, instead=instead)
    await directory.start()
    apps = directory.apps
    telemetry = Telemetry()
    telemetry.show_days_left(directory.days_left)
    try:
        listening = _listen(config.api)
    except ConfigError:
        _refuse_second(data / DATABASE)
        raise
    with contextlib.closing(listening):
        key = load_api_key(config)
        store = await SqliteStore.open(data / DATABASE, lease_s=LEASE_S, max_waiting=config.store.max_waiting)
        try:
            await directory.open(store)
            telemetry.show_commits(store.commit_s)
            carrier = ApnsCarrier(directory.find_route, telemetry=telemetry, clock=time.time)
            relay = Relay(store, store, carrier, apps, telemetry, clock=time.time)
            keyring = Keyring(key, store, clock=time.time)
            await keyring.load()
            callers = Callers(store, apps, clock=time.time)
            await callers.load()
            notifications = Notifications(relay, apps)
            keys = KeysPart(keyring, apps, clock=time.time)
            parts = (
                notifications,
                AppsPart(directory),
                keys,
                CallersPart(callers, apps, clock=time.time),
                RemovalsPart(store, apps, clock=time.time),
            )
            door = Api(parts, keyring)
            operations = Operations(relay, store, carrier, apps, telemetry, clock=time.time)
            server = Server(make_app(door, operations), answering_s=_ANSWERING_S)
            listeners = None
            if config.legacy or config.apple_proxy:
                listeners = _listeners(config, relay, store, apps, keyring, callers, telemetry)
                await listeners.start()
            async with asyncio.TaskGroup() as group:
                working = group.create_task(relay.work())
                settling = group.create_task(relay.settle())
                now_and_then = [
                    group.create_task(_every(look_s, directory.look)),
                    group.create_task(_every(look_s, keyring.look)),
                    group.create_task(_every(look_s, callers.look)),
                    group.create_task(_every(_HOUR_S, directory.warn)),
                    group.create_task(_purge(store, config.store.receipts_days)),
                ]
                web = group.create_task(server.serve([listening]))
                await server.ready.wait()
                url = _url(listening)
                _log.info("started", url=url, data=str(data), apps=sorted(apps))
                if not apps:
                    _log.warning(
                        "no apps",
                        hint="every notification is refused: add an [apps.NAME] to the configuration, or an app by the "
                        "API",
                    )
                try:
                    ports = {} if listeners is None else listeners.ports
                    yield Running(url, key.decode(), relay, directory, stop or asyncio.Event(), ports)
                finally:
                    _log.info("stopping")
                    operations.stopping = True
                    if listeners is not None:
                        await listeners.aclose()
                    notifications.hurry()
                    server.should_exit = True
                    await asyncio.wait([web])
                    for task in (working, *now_and_then):
                        task.cancel()
                    await asyncio.wait([working, *now_and_then])
                    await carrier.aclose()
                    crash.point("stopping")
                    settling.cancel()
                    await asyncio.wait([settling])
                    await relay.drain()
        finally:
            await store.aclose()
            _log.info("stopped")


def _listeners(
    config: Config,
    relay: Relay,
    store: SqliteStore,
    apps: Mapping[str, App],
    keyring: Keyring,
    callers: Callers,
    telemetry: Telemetry,
) -> Listeners:
    # Most have none, and need not wait for what they are made of.
    from heliograph.listeners import Listeners

    return Listeners(config, relay=relay, store=store, apps=apps, keyring=keyring, callers=callers, telemetry=telemetry)


async def _every(seconds: float, do: Callable[[], Awaitable[None] | None]) -> None:
    while True:
        await asyncio.sleep(seconds)
        done = do()
        if done is not None:
            await done


async def _purge(store: SqliteStore, days: int) -> None:
    """Forget what is older, again and again."""
    pause_s = _FIRST_PURGE_S
    while True:
        await asyncio.sleep(pause_s)
        pause_s = _HOUR_S
        try:
            count = await store.purge(time.time() - days * _DAY_S)
        except StoreError as error:
            _log.error("cannot_purge", why=str(error))
        else:
            if count:
                _log.info("purged", batches=count)


def load_api_key(config: Config) -> bytes:
    """The API key that is configured, or the one in the data folder, made where it is not there. Raises ConfigError."""
    if config.api.key is not None:
        return _checked_key(read_secret(config.api.key, "api.key"), "api.key")
    path = Path(config.data) / KEY_FILE
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _checked_key(read_secret(f"file:{path}", "api-key"), f"The API key in {path}")
    except OSError as error:
        raise ConfigError(f"data: {path.parent} cannot be written ({error.strerror}): name another folder") from None
    key = (PREFIX + secrets.token_urlsafe(32)).encode()
    with os.fdopen(file, "wb") as opened:
        opened.write(key + b"\n")
    return key


def _listen(settings: ApiSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listening = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
        # Connections have it from here. uvloop sets it by itself, and asyncio not on this kind of socket: each answer
        # would wait 40 ms for the caller's acknowledgement of its head.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"The port of the API, {where}, is taken: stop what uses it, or set api.port") from None
        if error.errno == errno.EACCES:
            raise ConfigError(f"The port of the API, {where}, is not for us: set api.port above 1023") from None
        raise ConfigError(f"The API cannot listen on {where}: set api.host to an address of this machine") from None


def _refuse_second(database: Path) -> None:
    """Raises StoreBusy where a server has this database: the port is probably that one's, and it can be named."""
    if Path(f"{database}.lock").exists():
        with contextlib.suppress(OSError), locked(database.resolve()):
            pass


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _checked_key(content: bytes, setting: str) -> bytes:
    key = content.strip()
    if len(key) < 16 or not key.isascii() or not key.decode("ascii").isprintable() or b" " in key:
        raise ConfigError(f"{setting} must be one line of 16 or more printable ASCII characters without blanks")
    return key
