"""Calls of `take` that found nothing due: how they wait, on whatever event loop, and are woken by another thread."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Collection


class Takers:
    """Calls of `take` that found nothing due, on any event loop."""

    def __init__(self) -> None:
        self.changes = 0
        self._waiters: dict[asyncio.Future[None], Collection[int]] = {}
        self._gate = threading.Lock()  # the writer's thread wakes, the loops' threads wait

    def wake(self, lanes: Collection[int] | None) -> None:
        """Something was added to these lanes; None: wake all."""
        with self._gate:
            self.changes += 1
            waiters = [
                waiter
                for waiter, shut in self._waiters.items()
                if lanes is None or any(each not in shut for each in lanes)
            ]
            for waiter in waiters:
                del self._waiters[waiter]
        for waiter in waiters:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                waiter.get_loop().call_soon_threadsafe(_ring, waiter)

    async def wait(self, seen: int, shut: Collection[int], seconds: float) -> None:
        """Return after `seconds`, when something is added to a lane not `shut`, or if `changes` is no longer `seen`."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        with self._gate:
            if self.changes != seen:
                return
            self._waiters[waiter] = shut
        # A loop's timer may ring early by the loop's resolution: a millisecond keeps that from becoming a spin.
        timer = loop.call_later(max(seconds, 0.001), _ring, waiter) if seconds < math.inf else None
        try:
            await waiter
        finally:
            if timer is not None:
                timer.cancel()
            with self._gate:
                self._waiters.pop(waiter, None)


def _ring(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
