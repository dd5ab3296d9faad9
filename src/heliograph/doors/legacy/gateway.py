"""The gateway of Apple's binary interface, for scripts of 2009 to 2021 (`protocols.binary` has the frames).

Frames go in durably as they come, and out by the queue as everything else. The protocol acknowledges nothing, so a
frame that was read and not yet stored is lost where this process dies. That is one commit: while one is under way what
comes meanwhile gathers, and goes in with the next. `heliograph_legacy_window_seconds` shows it.

What a client hears is what Apple's gateway said: nothing while all is well; one error packet and the end where a frame
is bad. Everything before that frame is taken, everything behind it is not. Whether a frame is bad is known at once, or
when Apple says so while the connection is still open. Then what is behind it and has not gone out is cancelled first,
durably, and what has gone out is remembered, as the client will send it again (`legacy_trail`). A client that has ended
its side may be one that reads on, or one that is gone, and nobody can tell: nothing of it is cancelled, and all that is
behind the bad frame is remembered, unless writing to it shows that it is gone. See docs/decisions/0024-*.md.

Where nothing can be taken, as the store fails or is full, no frame is at fault: the client gets status 10 with the last
identifier that is safe here, so that it sends what follows again on a new connection. Where nothing of the connection
was taken it is closed without a packet.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping

import structlog

from heliograph.callers import Callers
from heliograph.config import LegacySettings
from heliograph.doors.legacy.admittance import Admittance
from heliograph.doors.legacy.common import Common, Intake, Lines, advise, cannot_listen, with_hint
from heliograph.doors.legacy.connection import Connection
from heliograph.doors.legacy.trail import Sent
from heliograph.model import App
from heliograph.net.streams import Stream, StreamListener, listen
from heliograph.relay import Relay
from heliograph.telemetry import Telemetry

STOP_S = 3.0
"""How long everything may take that is to be done when the server stops."""
LAST_READ_S = 1.0
"""How long clients have then to read what they are told."""

_SWEEP_S = 5.0
_SWEEPS_A_MINUTE = 12

_log = structlog.get_logger("heliograph.legacy")


class Gateway:
    """One listener. `start`, then `aclose` while the relay still works."""

    def __init__(
        self,
        name: str,
        settings: LegacySettings,
        *,
        relay: Relay,
        apps: Mapping[str, App],
        callers: Callers,
        identity: tuple[bytes, bytes],
        telemetry: Telemetry,
        clock: Callable[[], float],
    ) -> None:
        """`name`: as in `[legacy.NAME]`. `identity`: certificate chain and key as PEM. `clock` gives UNIX seconds."""
        self._name = name
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._admittance = Admittance(name, settings, callers, apps, identity)
        self._common = Common(
            name=name,
            settings=settings,
            relay=relay,
            apps=apps,
            admittance=self._admittance,
            meter=telemetry.legacy(name),
            clock=clock,
            loop=self._loop,
            sent=Sent(),
            intake=Intake(self._loop.call_later),
            lines=Lines(name),
            connections=set(),
            tasks=set(),
        )
        self._start = os.urandom(3).hex()
        self._opened = 0
        self._listener: StreamListener | None = None
        self._sweeping: asyncio.TimerHandle | None = None
        self._sweeps = 0
        self._admitted_version = self._admittance.version

    async def start(self) -> None:
        """Take connections. Raises ConfigError."""
        self._admittance.context()
        host, port = self._settings.host, self._settings.port
        try:
            self._listener = await listen(
                self._new_connection,
                context=self._admittance.context,
                host=host,
                port=port,
                max_connections=self._settings.max_connections,
                refused=self._on_refused,
            )
        except OSError as error:
            raise cannot_listen(self._name, "port", host, port, error) from None
        self._sweeping = self._loop.call_later(_SWEEP_S, self._sweep)

    @property
    def port(self) -> int:
        """Where it listens."""
        return 0 if self._listener is None else self._listener.port

    async def aclose(self) -> None:
        """Take nothing more, tell every client what is the last that is safe, and close."""
        if self._listener is None:
            return
        self._listener.stop()
        if self._sweeping is not None:
            self._sweeping.cancel()
        for connection in tuple(self._common.connections):
            connection.shut()
        if self._common.tasks:
            _, late = await asyncio.wait(set(self._common.tasks), timeout=STOP_S)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
        await self._listener.aclose(LAST_READ_S)
        self._common.lines.begin_anew()

    def _new_connection(self, stream: Stream) -> Connection:
        self._opened += 1
        return Connection(self._common, stream, f"{self._name}-{self._start}-{self._opened}")

    def _on_refused(self, address: str, why: str) -> None:
        self._common.meter.refused += 1
        if self._common.lines.allow("legacy_refused", address):
            hint = with_hint(advise(why, self._name, self._settings))
            _log.warning("legacy_refused", listener=self._name, address=address, why=why, **hint)

    def _sweep(self) -> None:
        """Shed those that take too long over a frame, and those that may not be here any more."""
        self._sweeping = self._loop.call_later(_SWEEP_S, self._sweep)
        now = self._loop.time()
        version = self._admittance.version
        for connection in tuple(self._common.connections):
            if connection.too_slow(now):
                connection.shed()
            elif version != self._admitted_version:
                connection.admit_again()
        self._admitted_version = version
        self._sweeps += 1
        if self._sweeps % _SWEEPS_A_MINUTE == 0:
            self._common.lines.begin_anew()
