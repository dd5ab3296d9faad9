"""The carrier to Apple: one pool of connections per signing key, team and environment, behind one `carry`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from heliograph.carriers.apns.pool import Endpoint, Pool, PoolSettings
from heliograph.model import App, Batch, NotProcessed
from heliograph.ports import Report

__all__ = ["ApnsCarrier", "Endpoint", "PoolSettings"]

_BACKLOG = 20_000
"""Notifications that wait for a stream, over all pools, before `ready` holds back: some 50 ms of work."""


class ApnsCarrier:
    """Takes batches to Apple (`ports.Carrier`)."""

    def __init__(
        self,
        find_app: Callable[[str], App | None],
        find_endpoint: Callable[[App, Batch], Endpoint | None],
        *,
        settings: PoolSettings | None = None,
        clock: Callable[[], float],
    ) -> None:
        """`clock` gives UNIX seconds, for provider tokens."""
        self._find_app = find_app
        self._find_endpoint = find_endpoint
        self._settings = settings or PoolSettings()
        self._clock = clock
        self._pools: dict[tuple[str, str, Endpoint], Pool] = {}
        self._room = asyncio.Event()

    def carry(self, batch: Batch, indices: Sequence[int], report: Report) -> None:
        """See `ports.Carrier.carry`."""
        app = self._find_app(batch.app)
        endpoint = None if app is None else self._find_endpoint(app, batch)
        if app is None or endpoint is None:  # it was there when the batch was taken in
            report(indices, NotProcessed(f"there are no credentials for the app {batch.app} in {batch.environment}"))
            return
        name = (app.key.team_id, app.key.key_id, endpoint)
        pool = self._pools.get(name)
        if pool is None:
            pool = self._pools[name] = Pool(endpoint, app.key, self._settings, self._clock, self._room.set)
        pool.put(batch, indices, report)

    async def ready(self) -> int:
        """See `ports.Carrier.ready`."""
        while (room := _BACKLOG - sum(pool.waiting for pool in self._pools.values())) <= 0:
            self._room.clear()
            await self._room.wait()
        return room

    async def aclose(self) -> None:
        """See `ports.Carrier.aclose`."""
        await asyncio.gather(*[pool.aclose() for pool in self._pools.values()])
