"""Builds everything from the configuration, starts it in one TaskGroup, stops it in order.

Stopping: no new requests, those in hand are answered; no new leases; the carrier lets open streams be answered; what
was learnt is recorded; the store is closed. Whatever is left waiting is in the store, for the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import structlog
import uvicorn
from msgspec import Struct
from starlette.types import ASGIApp

from heliograph.carriers.apns import ApnsCarrier, Endpoint, Route
from heliograph.config import ApiSettings, AppSettings, Config, read_secret, secret_path
from heliograph.doors.api import Api
from heliograph.doors.web import make_app
from heliograph.errors import ConfigError
from heliograph.model import Access, App, Environment, SigningKey
from heliograph.net.tls import client_context
from heliograph.protocols.provider_token import key_id_from_filename, parse_signing_key
from heliograph.relay import Relay
from heliograph.stores.sqlite import SqliteStore
from heliograph.telemetry import Telemetry

KEY_FILE = "api-key"
"""In the data folder: the API key that was made on the first start."""

KEY_PREFIX = "hg_"
"""How our API keys begin, so that people and scanners of leaked secrets know them."""

_APPLE = {
    Environment.PRODUCTION: "api.push.apple.com",
    Environment.DEVELOPMENT: "api.sandbox.push.apple.com",
}
_ANSWERING_S = 10
"""How long requests in hand may take when the server stops."""

_log = structlog.get_logger("heliograph.service")


class Running(Struct, frozen=True):
    """A server that takes requests."""

    url: str
    """Of the HTTP API, without a slash at its end."""
    key: str
    """The API key."""
    relay: Relay
    stop: asyncio.Event
    """Set: `run` comes to an end."""

    def __repr__(self) -> str:
        return f"<server at {self.url}>"


_SWITCH_S = 0.0005

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


def configure_logging(*, json: bool = False, quiet: bool = False) -> None:
    """One line an event on stderr, key=value or JSON; what other libraries log as well. Call it once.

    `quiet`: warnings and errors only.
    """
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    shared: list[structlog.typing.Processor] = [structlog.processors.add_log_level, stamp]
    # Plain tracebacks: the others show local variables, and so device tokens and payloads.
    final: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if json
        else [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback, pad_event_to=0
            )
        ]
    )
    structlog.configure(
        processors=[*shared, *final],
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING if quiet else logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)


async def run(config: Config, *, started: Callable[[Running], Awaitable[None]] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, or until `Running.stop` is set. `started` is awaited beside, once all runs.

    Raises ConfigError, StoreError, and an ExceptionGroup where something failed later on.
    """
    # A loop that is never idle keeps the interpreter's lock for a whole switch interval whenever the store's thread
    # asks for it, which it does with each call of SQLite. With CPython's 5 ms, single commits could take seconds.
    sys.setswitchinterval(_SWITCH_S)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    signals = (signal.SIGTERM, signal.SIGINT)

    def on_signal() -> None:
        # Who sends a second one does not want to wait for an orderly end.
        for each in signals:
            loop.remove_signal_handler(each)
        stop.set()

    for each in signals:
        loop.add_signal_handler(each, on_signal)
    try:
        async with serving(config, stop) as running, asyncio.TaskGroup() as group:
            beside = group.create_task(_beside(started, running))
            await stop.wait()
            beside.cancel()
    finally:
        for each in signals:
            loop.remove_signal_handler(each)


async def _beside(started: Callable[[Running], Awaitable[None]] | None, running: Running) -> None:
    if started is not None:
        await started(running)


@contextlib.asynccontextmanager
async def serving(config: Config, stop: asyncio.Event | None = None) -> AsyncIterator[Running]:
    """A server for as long as the block runs. Raises ConfigError, StoreError."""
    data = Path(config.data)
    apps = load_apps(config.apps)
    endpoints = _endpoints(config.apps)
    telemetry = Telemetry()
    with contextlib.closing(_listen(config.api)) as listening:
        key = load_api_key(config)
        store = await SqliteStore.open(data / "heliograph.db", lease_s=LEASE_S)
        try:
            carrier = ApnsCarrier(_find_route(apps, endpoints), clock=time.time)
            relay = Relay(store, store, carrier, apps, telemetry, clock=time.time)
            door = Api(relay, apps, key)
            server = _Server(make_app(door, telemetry.registry))
            async with asyncio.TaskGroup() as group:
                working = group.create_task(relay.work())
                settling = group.create_task(relay.settle())
                web = group.create_task(server.serve([listening]))
                await server.ready.wait()
                url = _url(listening)
                _log.info("started", url=url, data=str(data), apps=sorted(apps))
                if not apps:
                    _log.warning(
                        "no apps", hint="every notification is refused: add an [apps.NAME] to the configuration"
                    )
                try:
                    yield Running(url, key.decode(), relay, stop or asyncio.Event())
                finally:
                    _log.info("stopping")
                    door.hurry()
                    server.should_exit = True
                    await asyncio.wait([web])
                    working.cancel()
                    await asyncio.wait([working])
                    await carrier.aclose()
                    settling.cancel()
                    await asyncio.wait([settling])
                    await relay.drain()
        finally:
            await store.aclose()
            _log.info("stopped")


def load_apps(settings: Mapping[str, AppSettings]) -> dict[str, App]:
    """The apps with their signing keys. Raises ConfigError."""
    return {name: _load_app(name, each) for name, each in settings.items()}


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
    key = (KEY_PREFIX + secrets.token_urlsafe(32)).encode()
    with os.fdopen(file, "wb") as opened:
        opened.write(key + b"\n")
    return key


class _Server(uvicorn.Server):
    """uvicorn as a task among ours: it leaves signals alone, and tells when it takes requests."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            uvicorn.Config(
                cast("Any", app),  # starlette and uvicorn type ASGI in different words
                loop="none",
                http="httptools",
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                log_level="warning",
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=_ANSWERING_S,
            )
        )
        self.ready = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


def _listen(settings: ApiSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"The port of the API, {where}, is taken: stop what uses it, or set api.port") from None
        if error.errno == errno.EACCES:
            raise ConfigError(f"The port of the API, {where}, is not for us: set api.port above 1023") from None
        raise ConfigError(f"The API cannot listen on {where}: set api.host to an address of this machine") from None


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _endpoints(settings: Mapping[str, AppSettings]) -> dict[tuple[str, Environment], Endpoint]:
    """Where each app's notifications go, by environment."""
    endpoints = {}
    to_apple = None
    for name, app in settings.items():
        if app.host is None or app.ca is None:
            tls = to_apple = to_apple or client_context()
        else:
            try:
                tls = client_context(Path(app.ca))
            except ConfigError as error:
                raise ConfigError(f"apps.{name}.ca: {error}") from None
        for environment in app.environment.each():
            endpoints[name, environment] = Endpoint(
                app.host or _APPLE[environment], app.port, tls, unique_ids=environment is Environment.DEVELOPMENT
            )
    return endpoints


def _find_route(
    apps: Mapping[str, App], endpoints: Mapping[tuple[str, Environment], Endpoint]
) -> Callable[[str, Environment, str], Route | None]:
    def find(name: str, environment: Environment, topic: str) -> Route | None:
        app, endpoint = apps.get(name), endpoints.get((name, environment))
        key = None if app is None else app.credentials_for(environment, topic)
        return Route(endpoint, key) if endpoint is not None and isinstance(key, SigningKey) else None

    return find


def _load_app(name: str, settings: AppSettings) -> App:
    where = f"apps.{name}.key"
    pem = read_secret(settings.key, where)
    path = secret_path(settings.key, where)
    key_id = settings.key_id or key_id_from_filename(path.name)
    if key_id is None:
        raise ConfigError(
            f"apps.{name}.key_id is missing, and the file's name {path.name} does not say it as AuthKey_<key id>.p8 "
            "would: add key_id"
        )
    try:
        key = parse_signing_key(pem, key_id=key_id, team_id=settings.team_id)
    except ConfigError as error:
        raise ConfigError(f"apps.{name} ({path}): {error}") from None
    topics = settings.topics if settings.topic is None else (settings.topic,)
    return App(name, topics, (Access(key, settings.environment.each()),))


def _checked_key(content: bytes, setting: str) -> bytes:
    key = content.strip()
    if len(key) < 16 or not key.isascii() or not key.decode("ascii").isprintable() or b" " in key:
        raise ConfigError(f"{setting} must be one line of 16 or more printable ASCII characters without blanks")
    return key
