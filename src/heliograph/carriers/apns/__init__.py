"""The carrier to Apple: one pool of connections per route, behind one `carry`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from heliograph.carriers.apns.pool import Endpoint, Pool, PoolSettings, Route
from heliograph.model import Batch, Environment, Lane, NotProcessed
from heliograph.ports import Report

__all__ = ["ApnsCarrier", "Endpoint", "PoolSettings", "Route"]

_BACKLOG = 20_000
"""Notifications that wait for a stream, over all pools, before `ready` holds back: some 50 ms of work."""


class ApnsCarrier:
    """Takes batches to Apple (`ports.Carrier`)."""

    def __init__(
        self,
        find_route: Callable[[str, Environment, str], Route | None],
        *,
        settings: PoolSettings | None = None,
        clock: Callable[[], float],
    ) -> None:
        """`find_route`: the way for an app, environment and topic (with its suffix).

        `clock` gives UNIX seconds, for provider tokens.
        """
        self._find_route = find_route
        self._settings = settings or PoolSettings()
        self._clock = clock
        self._pools: dict[Route, Pool] = {}
        self._room = asyncio.Event()

    def carry(self, batch: Batch, indices: Sequence[int], report: Report) -> None:
        """See `ports.Carrier.carry`."""
        route = self._find_route(batch.app, batch.environment, batch.headers[0].topic)
        if route is None:  # it was there when the batch was taken in
            report(indices, NotProcessed(f"there are no credentials for the app {batch.app} in {batch.environment}"))
            return
        pool = self._pools.get(route)
        if pool is None:
            pool = self._pools[route] = Pool(route, self._settings, self._clock, self._room.set)
        pool.put(batch, indices, report)

    async def ready(self, full: frozenset[Lane] | None = None) -> frozenset[Lane]:  # noqa: ARG002
        """See `ports.Carrier.ready`."""
        while sum(pool.waiting for pool in self._pools.values()) >= _BACKLOG:
            self._room.clear()
            await self._room.wait()
        return frozenset()

    async def aclose(self) -> None:
        """See `ports.Carrier.aclose`."""
        await asyncio.gather(*[pool.aclose() for pool in self._pools.values()])
