"""Apple in a box as a server: `Apple` behind HTTP/2 over TLS.

    async with Simulator() as apple:
        connect(..., port=apple.port, tls=client_context(apple.ca_pem))
        apple.rejects(token, "Unregistered", since=1_700_000_000_000)
        ...
        assert apple.received[-1].payload == payload

What happens on a connection is in `session`, how it comes about in `reception`.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from heliograph.model import Environment, SigningKey
from heliograph.net.clients import throwaway_client
from heliograph.net.http2 import Link
from heliograph.net.tls import Identity, server_context, throwaway_identity
from heliograph.protocols.http2 import Limits, ServerConnection
from heliograph.simulator.apple import KEEP, Apple
from heliograph.simulator.connection import AppleConnection
from heliograph.simulator.faults import Action, Door, Handshake, Rule
from heliograph.simulator.journal import Journal, Judged, open_private
from heliograph.simulator.legacy import Legacy, LegacyDoors
from heliograph.simulator.reception import Reception, Treatment, Welcome, bind, cannot_listen
from heliograph.simulator.session import Session

__all__ = ["IDLE_S", "KEY_ID", "STREAMS", "TEAM_ID", "Judged", "Simulator", "new_signing_key", "open_private"]

KEY_ID = "HELIOGRAPH"
TEAM_ID = "SIMULATION"
"""Of the signing key that a simulator makes for itself."""

STREAMS = 1000

IDLE_S = 3600.0
"""How long a connection may be idle. Apple leaves them open for hours."""

_HEADER_OCTETS = 8000
"""Of header fields, as Apple's SETTINGS say."""
_GRACE_S = 0.1
"""How long open streams and slow clients may take when the simulator ends."""


class Simulator(Apple):
    """An `Apple` that listens, from `async with` on."""

    def __init__(
        self,
        environment: Environment = Environment.PRODUCTION,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        identity: Identity | None = None,
        signing_key: SigningKey | None = None,
        first_streams: int = 1,
        streams: int = STREAMS,
        cuts_limit: bool = True,
        idle_s: float = IDLE_S,
        strict: bool = False,
        device_limit: int | None = None,
        keep: int = KEEP,
        journal: Path | None = None,
        client_authorities: bytes | None = None,
        legacy: Legacy | None = None,
    ) -> None:
        """Port 0 is any free one. `identity` and `signing_key` are made where they are not given.

        `first_streams`: what a connection may open at once before it brought a good provider token; `streams`: after.
        `cuts_limit`: whether it is as at first again after a rejection, until the next 200. `idle_s`: how long it may
        be idle. `strict`, `device_limit` and `keep`: see `Apple`.
        `journal`: a file that gets a JSON line (`Judged`) for each request, before it is answered.
        `client_authorities`: PEM. A client may show a certificate of theirs in place of provider tokens, and no other.
        `legacy`: play the binary gateway and the feedback service as well.

        Raises ConfigError where key, identity, authorities, port or journal cannot be used: here, or from `async with`.
        """
        super().__init__(environment, strict=strict, device_limit=device_limit, keep=keep)
        self.host = host
        self.port = port
        """Where it listens; the real one once it does."""
        self.identity = identity or throwaway_identity(datetime.now(UTC))
        self.signing_key = signing_key or new_signing_key()
        """Its provider tokens are good here."""
        self.add_key(self.signing_key)
        self.first_streams = first_streams
        self.streams = streams
        self.cuts_limit = cuts_limit
        self.connections = 0
        """How many there have been, at all doors, those that never got through the TLS handshake included."""
        self.on_refused: Callable[[Door, str, str], None] = _ignore
        """Told of clients that fail the TLS handshake of the gateway or the feedback service: address, and why."""
        self._limits = Limits(idle_s=idle_s, header_octets=_HEADER_OCTETS)
        self._client_authorities = client_authorities
        self._journal_path = journal
        self._journal: Journal | None = None
        self._reception: Reception | None = None
        self._legacy_options = legacy
        self._legacy: LegacyDoors | None = None
        self._tls: dict[str, ssl.SSLContext] = {}
        """By what is wrong with the certificate; "" is the right one."""

    @property
    def url(self) -> str:
        """`https://HOST:PORT`, where it is reached; a push goes to `/3/device/TOKEN` there."""
        host = reached_at(self.host)
        return f"https://[{host}]:{self.port}" if ":" in host else f"https://{host}:{self.port}"

    @property
    def ca_pem(self) -> bytes:
        """The authority that clients have to trust."""
        return self.identity.ca_pem

    @property
    def legacy_port(self) -> int | None:
        """Of the binary gateway; None: there is none."""
        return None if self._legacy is None else self._legacy.port

    @property
    def feedback_port(self) -> int | None:
        """Of the feedback service; None: there is none."""
        return None if self._legacy is None else self._legacy.feedback_port

    @property
    def topic(self) -> str | None:
        """What clients of the binary gateway send to; None: there is none."""
        return None if self._legacy_options is None else self._legacy_options.topic

    @cached_property
    def client_pem(self) -> bytes:
        """A certificate with its key for clients of the binary gateway, most of which cannot start without one."""
        options = self._legacy_options or Legacy()
        return options.client_pem or throwaway_client(options.topic, datetime.now(UTC))

    def add_app(self, bundle_id: str, team_id: str | None = None) -> None:
        """As `Apple.add_app`; the team is that of `signing_key` where none is named."""
        super().add_app(bundle_id, team_id or self.signing_key.team_id)

    def add_rule(self, rule: Rule) -> int:
        number = super().add_rule(rule)
        if isinstance(rule.action, Handshake) and rule.action.how not in ("silent", "closed", "alert"):
            self._faulty_tls(rule.action.how)  # made now, not while a client waits
        return number

    def reset(self) -> None:
        super().reset()
        self.add_key(self.signing_key)

    async def __aenter__(self) -> Self:
        self._tls[""] = server_context(
            self.identity.certificate_pem, self.identity.key_pem, client_authorities=self._client_authorities
        )
        if self._journal_path is not None:
            self._journal = Journal(self._journal_path)
        try:
            self._reception = Reception(await bind(self.host, self.port), self._receive)
        except OSError as error:
            self._close_journal()
            raise cannot_listen("The simulator", self.host, self.port, error) from None
        self.port = self._reception.port
        if self._legacy_options is not None:
            try:
                self._legacy = LegacyDoors(self, self._legacy_options, self._journal)
                await self._legacy.start()
            except BaseException:
                await self._end()
                raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._end()

    async def _end(self) -> None:
        assert self._reception is not None
        if self._legacy is not None:
            await self._legacy.aclose(_GRACE_S)
        await self._reception.aclose(_GRACE_S)
        self._close_journal()

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _receive(self) -> Welcome | Treatment:
        """What to do with the next connection."""
        number, action = self.count_connection("http2")
        tls = self._tls[""]
        if isinstance(action, Handshake):
            match action.how:
                case "silent" | "closed" | "alert" as treatment:
                    return treatment
                case how:
                    tls, action = self._faulty_tls(how), None

        def new_session(link: Link[ServerConnection]) -> Session:
            assert self._reception is not None
            self._reception.enter(link)
            return Session(self, link, number, self._journal, action)

        return Welcome(tls, lambda: Link(new_session, self._new_core))

    def count_connection(self, door: Door) -> tuple[int, Action | None]:
        """A connection came: its number, and what is to become of it."""
        self.connections += 1
        return self.connections, self.find_opening_fault(self.connections, time.time(), door)

    def faulty_identity(self, how: str) -> tuple[bytes, bytes]:
        """PEM of a certificate with this fault, and of its key."""
        identity = self.identity
        pem = _faulty_certificate(identity, how)
        if not pem:  # it was given without: what another authority made is at least as wrong
            identity = throwaway_identity(datetime.now(UTC))
            pem = _faulty_certificate(identity, how) or identity.certificate_pem
        return pem, identity.key_pem

    def _faulty_tls(self, how: str) -> ssl.SSLContext:
        if how not in self._tls:
            self._tls[how] = server_context(*self.faulty_identity(how))
        return self._tls[how]

    def _new_core(self, now: float) -> ServerConnection:
        return AppleConnection(now, max_streams=self.first_streams, limits=self._limits)


def _ignore(door: Door, address: str, why: str) -> None:
    """Nobody wants to know."""


def _faulty_certificate(identity: Identity, how: str) -> bytes:
    return {"expired": identity.expired_pem, "other-name": identity.other_name_pem}.get(how, b"")


def reached_at(host: str) -> str:
    """What to call from this machine what listens on `host`, by a name that the certificate has."""
    return "localhost" if host in ("0.0.0.0", "::") else host  # noqa: S104 - is not bound


def new_signing_key(key_id: str = KEY_ID, team_id: str = TEAM_ID) -> SigningKey:
    """A signing key as Apple hands them out, made here."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = ec.generate_private_key(ec.SECP256R1())
    return SigningKey(key_id, team_id, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
