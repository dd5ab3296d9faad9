"""The carrier to Apple: one pool of connections per route, behind one `carry`.

What waits is bounded by lane, and here is said which lanes are full: one that has some 50 ms of work waiting; one whose
Apple cannot be reached as soon as anything waits, so that it ties up next to nothing; and where many lanes wait at
once, each sooner than that. So a lane that stands still never takes the room of another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence

from heliograph.carriers.apns.pool import Pool, PoolSettings
from heliograph.carriers.apns.route import Endpoint, Route
from heliograph.model import Batch, Environment, Lane, LaneView, NotProcessed
from heliograph.net.dial import LookUps
from heliograph.ports import Report
from heliograph.telemetry import Telemetry

__all__ = ["ApnsCarrier", "Endpoint", "PoolSettings", "Route"]

LANE = 10_000
"""A lane is full when more of its notifications wait for a stream."""
CROWD = 100_000
"""With so many waiting in all, a lane is full with a tenth of that. What is stuck beyond as many is handed back."""
MOST = 2 * CROWD
"""With so many waiting in lanes that move, nothing more is taken at all."""

_TIDY_S = 60.0
_NONE: frozenset[Lane] = frozenset()

Way = tuple[str, Environment, str]
"""App, environment and topic."""


class ApnsCarrier:
    """Takes batches to Apple (`ports.Carrier`)."""

    def __init__(
        self,
        find_route: Callable[[str, Environment, str], Route | None],
        *,
        settings: PoolSettings | None = None,
        telemetry: Telemetry | None = None,
        clock: Callable[[], float],
    ) -> None:
        """`find_route`: the way for an app, environment and topic (with its suffix).

        Its answer may change, but is the same or an equal one as long as endpoint and credentials are.
        `clock` gives UNIX seconds, for provider tokens.
        """
        self._find_route = find_route
        self._settings = settings or PoolSettings()
        self._telemetry = telemetry or Telemetry()
        self._clock = clock
        self._look_ups = LookUps()
        self._ways: dict[Way, Pool] = {}
        """Where each was last."""
        self._pools: dict[Route, Pool] = {}
        self._retired: list[Pool] = []
        """Those whose route nobody takes any more, until their last answers have come."""
        self._busy: set[Pool] = set()
        """Those in which anything may wait."""
        self._room = asyncio.Event()
        self._tidying: asyncio.TimerHandle | None = None
        self._closed = False

    # -- in ------------------------------------------------------------------------------------------------------

    def carry(self, batch: Batch, indices: Sequence[int], report: Report) -> None:
        """See `ports.Carrier.carry`."""
        if self._closed:
            report(indices, NotProcessed("the server is stopping"))
            return
        headers_of = batch.headers_of
        if headers_of is None:
            self._put(self._pool((batch.app, batch.environment, batch.headers[0].topic)), batch, indices, report)
            return
        topics = dict.fromkeys(headers.topic for headers in batch.headers)
        found = {topic: self._pool((batch.app, batch.environment, topic)) for topic in topics}
        pools = dict.fromkeys(found.values())
        if len(pools) == 1:
            self._put(next(iter(pools)), batch, indices, report)
            return
        taken = [found[headers.topic] for headers in batch.headers]
        for pool in pools:
            some = [index for index in indices if taken[headers_of[index]] is pool]
            if some:
                self._put(pool, batch, some, report)

    def withdraw(self, those: Mapping[str, Collection[int]]) -> None:
        """See `ports.Carrier.withdraw`."""
        wanted = {batch_id.encode(): frozenset(indices) for batch_id, indices in those.items()}
        for pool in list(self._busy):
            pool.withdraw(wanted)

    def _put(self, pool: Pool | None, batch: Batch, indices: Sequence[int], report: Report) -> None:
        if pool is None:  # there were some when the batch was taken in
            report(indices, NotProcessed(f"there are no credentials for {_what(batch, indices)}"))
            return
        if pool.trouble is not None and pool.waiting and self._stuck >= CROWD:
            report(indices, NotProcessed(pool.trouble))
            return
        self._busy.add(pool)
        pool.put(batch, indices, report)

    def _pool(self, way: Way) -> Pool | None:
        """The pool of the route to take; what waits in another one that nobody needs any more is handed back."""
        route, former = self._find_route(*way), self._ways.get(way)
        if former is not None and (route is former.route or route == former.route):
            return former
        pool = None
        if route is None:
            self._ways.pop(way, None)
        else:
            pool = self._ways[way] = self._pools.get(route) or self._open(route)
        if former is not None and former not in self._ways.values():
            del self._pools[former.route]
            self._retired.append(former)
            former.retire("the app's credentials were replaced")
        return pool

    def _open(self, route: Route) -> Pool:
        if self._tidying is None:
            self._tidy_later()
        pool = self._pools[route] = Pool(
            route, self._settings, self._clock, self._look_ups, self._room.set, self._telemetry
        )
        return pool

    # -- room ----------------------------------------------------------------------------------------------------

    async def ready(self, full: frozenset[Lane] | None = None) -> frozenset[Lane]:
        """See `ports.Carrier.ready`."""
        while True:
            answer = self.full()
            if answer is not None and answer != full:
                return answer
            self._room.clear()
            await self._room.wait()

    def full(self) -> frozenset[Lane] | None:
        """See `ports.Carrier.full`."""
        for pool in [pool for pool in self._busy if not pool.waiting]:
            self._busy.discard(pool)
        moving = [pool for pool in self._busy if pool.trouble is None]
        total = sum(pool.waiting for pool in moving)
        if total >= MOST:
            return None
        if total <= LANE and len(moving) == len(self._busy):
            return _NONE
        most = LANE if total < CROWD else LANE // 10
        lanes: dict[Lane, int] = {}
        for pool in moving:
            for lane, count in pool.lanes.items():
                lanes[lane] = lanes.get(lane, 0) + count
        full = {lane for lane, count in lanes.items() if count > most}
        for pool in self._busy:
            if pool.trouble is not None:
                full.update(pool.lanes)
        return frozenset(full)

    @property
    def _stuck(self) -> int:
        return sum(pool.waiting for pool in self._busy if pool.trouble is not None)

    def lanes(self) -> list[LaneView]:
        """See `ports.Carrier.lanes`."""
        lanes: dict[Pool, dict[Lane, None]] = {}
        for (app, environment, _), pool in self._ways.items():
            lanes.setdefault(pool, {})[app, environment] = None
        return [view for pool, those in lanes.items() for view in pool.view(those)]

    # -- ends ----------------------------------------------------------------------------------------------------

    def _tidy_later(self) -> None:
        pause = min(_TIDY_S, self._settings.spare_idle_s / 2, self._settings.idle_s / 2)
        self._tidying = asyncio.get_running_loop().call_later(pause, self._tidy)

    def _tidy(self) -> None:
        """Close what nobody uses, and forget it."""
        for route, pool in list(self._pools.items()):
            if pool.tidy():
                del self._pools[route]
                self._ways = {way: each for way, each in self._ways.items() if each is not pool}
        self._retired = [pool for pool in self._retired if not pool.ended]
        self._tidy_later()

    async def aclose(self) -> None:
        """See `ports.Carrier.aclose`."""
        self._closed = True
        if self._tidying is not None:
            self._tidying.cancel()
        await asyncio.gather(*[pool.aclose() for pool in [*self._pools.values(), *self._retired]])


def _what(batch: Batch, indices: Sequence[int]) -> str:
    """What there would have to be credentials for."""
    kinds = batch.headers if batch.headers_of is None else [batch.headers[batch.headers_of[index]] for index in indices]
    topics = ", ".join(dict.fromkeys(headers.topic for headers in kinds))
    return f"the topic {topics} of the app {batch.app} in {batch.environment}"
