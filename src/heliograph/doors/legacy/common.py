"""What the connections of a listener for old scripts share."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import structlog
from msgspec import Struct

from heliograph.config import LegacySettings
from heliograph.doors.legacy.admittance import Admittance
from heliograph.doors.legacy.trail import Sent
from heliograph.errors import ConfigError
from heliograph.model import App
from heliograph.net import streams
from heliograph.relay import Relay
from heliograph.telemetry import LegacyMeter

if TYPE_CHECKING:
    from heliograph.doors.legacy.connection import Connection

MOST_OCTETS = 256 * 1024
"""Of all connections together that were read and are not stored: four reads from a socket. With more, none that
brings some is read from, so that it stays a matter of milliseconds until what was read is stored."""
STAGGER_S = 0.005
"""Between two connections that are read from again."""

_LINES = 30
"""Log lines of a kind in a minute; of more there is a count."""

_TRUSTS_US_NOT = ("unknown ca", "certificate unknown", "bad certificate", "certificate expired")
"""What clients say of a certificate that they do not trust."""
_OLD_TLS = (
    'give old clients a listener of their own with minimum_tls = "1.0", in a network that you trust: TLS below 1.2 can '
    "be read and changed on the way"
)

_log = structlog.get_logger("heliograph.legacy")


def advise(why: str, name: str, settings: LegacySettings) -> str | None:
    """What to do about a client that `[legacy.NAME]` did not let in, by what `streams.Refuse` was told."""
    trust = f"give the client doors-ca.pem of the data folder to trust, or set certificate in [legacy.{name}]"
    if why.startswith(streams.NO_CERTIFICATE):
        return f"give the client one (heliograph legacy certificate), or set app or names in [legacy.{name}]"
    if why.startswith(streams.NOT_REGISTERED):
        register = "register it (heliograph callers add), or give the client one that is"
        if settings.app or settings.names:
            return f"{register}, or have it show none: what is shown must be registered, in spite of app or names"
        return register
    if why.startswith(streams.TOO_OLD):
        return _OLD_TLS
    if why.startswith(streams.OWN_TLS_REFUSED):
        return "the client's machine allows no TLS version that the client knows: see its OPENSSL_CONF, or renew it"
    if why.startswith(streams.NO_TLS):
        return "have the client connect with TLS, as it did to Apple"
    if why.startswith(streams.HUNG_UP):
        return f"if it comes again, the client may not trust our certificate: {trust}"
    if why.startswith(streams.CLIENT_REFUSED) and why.endswith(_TRUSTS_US_NOT):
        return f"the client does not trust our certificate: {trust}"
    return None


def with_hint(hint: str | None) -> dict[str, str]:
    """What a log line says of it."""
    return {} if hint is None else {"hint": hint}


def cannot_listen(name: str, setting: str, host: str, port: int, error: OSError) -> ConfigError:
    """What to tell of `[legacy.NAME]`, whose `setting` names this port."""
    number = error.errno or 0
    # asyncio has words of its own before the system's; numbers of `gaierror` are others.
    plain = number > 0 and not isinstance(error, socket.gaierror)
    why = os.strerror(number) if plain else error.strerror or str(error)
    if plain and number == errno.EADDRINUSE:
        advice = f"stop whatever is there, or set another {setting} in [legacy.{name}]"
    elif plain and number in (errno.EACCES, errno.EPERM):
        advice = f"set {setting} in [legacy.{name}] above 1023, or let heliograph have such ports"
    else:
        advice = f"host in [legacy.{name}] is no address of this machine: write 127.0.0.1, 0.0.0.0 or one of its own"
    return ConfigError(f"legacy.{name} cannot listen on {host}:{port} ({why}): {advice}")


class Intake:
    """What all connections together have read and not stored yet."""

    def __init__(self, later: Callable[[float, Callable[[], None]], object]) -> None:
        """`later` is a loop's `call_later`."""
        self._later = later
        self._octets = 0
        self._waiting: dict[Connection, None] = {}
        self._going_on = False

    @property
    def full(self) -> bool:
        return self._octets >= MOST_OCTETS

    def add(self, octets: int) -> None:
        self._octets += octets

    def wait(self, connection: Connection) -> None:
        """Have it read on once there is room."""
        self._waiting[connection] = None

    def release(self, octets: int) -> None:
        """So much of it is stored, or thrown away."""
        self._octets -= octets
        if not self._going_on:
            self._let_one_in()

    def _let_one_in(self) -> None:
        """One after the other: nobody knows how much they bring."""
        self._going_on = False
        if self._waiting and not self.full:
            connection = next(iter(self._waiting))
            del self._waiting[connection]
            connection.read_on()
            if self._waiting:
                self._going_on = True
                self._later(STAGGER_S, self._let_one_in)


class Lines:
    """Keeps log lines of a kind from becoming too many."""

    def __init__(self, listener: str) -> None:
        self._listener = listener
        self._counts: dict[str, int] = {}
        self._last: dict[str, str] = {}

    def allow(self, event: str, whose: str) -> bool:
        """Whether there were not too many of this kind lately; otherwise they are counted, and the last is known."""
        self._counts[event] = count = self._counts.get(event, 0) + 1
        self._last[event] = whose
        return count <= _LINES

    def begin_anew(self) -> None:
        """Another minute: tell how many were left out of the last one."""
        for event, count in self._counts.items():
            if count > _LINES:
                left_out, last = count - _LINES, self._last[event]
                _log.warning("legacy_more", listener=self._listener, kind=event, count=left_out, last=last)
        self._counts.clear()
        self._last.clear()


class Common(Struct, frozen=True, eq=False):
    """What the connections of a listener share."""

    name: str
    """The listener's."""
    settings: LegacySettings
    relay: Relay
    apps: Mapping[str, App]
    admittance: Admittance
    meter: LegacyMeter
    clock: Callable[[], float]
    """UNIX seconds."""
    loop: asyncio.AbstractEventLoop
    sent: Sent
    intake: Intake
    lines: Lines
    connections: set[Connection]
    tasks: set[asyncio.Task[None]]
    """Work in hand; some is that of clients that are gone."""
