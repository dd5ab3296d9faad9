"""The listeners of the configuration beside the HTTP API: gateways with their feedback, and Apple-shaped proxies.

Who configures none does not pay for what they need: `service` imports this only where there is one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import structlog

from heliograph.callers import Callers
from heliograph.config import Config
from heliograph.doors.apple import AppleProxy
from heliograph.doors.legacy import Feedback, Gateway, Turns
from heliograph.keys import Keyring
from heliograph.model import App
from heliograph.net.identity import server_identity
from heliograph.ports import Store
from heliograph.relay import Relay
from heliograph.telemetry import Telemetry

_log = structlog.get_logger("heliograph.service")


class _Door(Protocol):
    @property
    def port(self) -> int: ...

    async def start(self) -> None: ...

    async def aclose(self) -> None: ...


class Listeners:
    """All of them."""

    def __init__(
        self,
        config: Config,
        *,
        relay: Relay,
        store: Store,
        apps: Mapping[str, App],
        keyring: Keyring,
        callers: Callers,
        telemetry: Telemetry,
    ) -> None:
        self._config = config
        self._relay = relay
        self._store = store
        self._apps = apps
        self._keyring = keyring
        self._callers = callers
        self._telemetry = telemetry
        self._doors: list[_Door] = []
        self.ports: dict[tuple[str, ...], int] = {}
        """Where each listens, by the way to the port's setting: `("legacy", "main", "feedback_port")`."""

    async def start(self) -> None:
        """Have all of them listen, or none. Raises ConfigError."""
        try:
            await self._start()
        except BaseException:
            await self.aclose()
            raise

    async def _start(self) -> None:
        config, turns = self._config, Turns()
        data = Path(config.data)
        for name, legacy in config.legacy.items():
            identity = await asyncio.to_thread(
                server_identity, data, legacy.certificate, legacy.certificate_key, table=f"legacy.{name}"
            )
            gateway = Gateway(
                name,
                legacy,
                relay=self._relay,
                apps=self._apps,
                callers=self._callers,
                identity=identity,
                telemetry=self._telemetry,
                clock=time.time,
            )
            feedback = Feedback(
                name,
                legacy,
                store=self._store,
                apps=self._apps,
                callers=self._callers,
                identity=identity,
                turns=turns,
            )
            await self._open(gateway, legacy.host, "legacy", name, "port")
            await self._open(feedback, legacy.host, "legacy", name, "feedback_port")
        for name, settings in config.apple_proxy.items():
            identity = await asyncio.to_thread(
                server_identity, data, settings.certificate, settings.certificate_key, table=f"apple_proxy.{name}"
            )
            proxy = AppleProxy(
                name,
                settings,
                relay=self._relay,
                store=self._store,
                apps=self._apps,
                keyring=self._keyring,
                callers=self._callers,
                identity=identity,
                telemetry=self._telemetry,
                clock=time.time,
            )
            await self._open(proxy, settings.host, "apple_proxy", name, "port")

    async def _open(self, door: _Door, host: str, *way: str) -> None:
        await door.start()
        self._doors.append(door)
        self.ports[way] = door.port
        service = _SERVICES[way[0], way[2]]
        _log.info("listening", listener=".".join(way[:2]), service=service, host=host, port=door.port)

    async def aclose(self) -> None:
        """Take nothing more, answer what is to be answered, and close; while the relay still works."""
        await asyncio.gather(*(door.aclose() for door in self._doors))
        self._doors.clear()


_SERVICES = {
    ("legacy", "port"): "gateway",
    ("legacy", "feedback_port"): "feedback",
    ("apple_proxy", "port"): "proxy",
}
