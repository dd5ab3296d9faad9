"""heliograph's own sender, from a leased batch to a settled one, on a queue and a store that only count.

`heliograph` moves batches of 1,000: ids, deadlines, metrics and settlement are in it, durability is not (see the bench
`whole`). `heliograph-asyncio` is the same on the standard library's event loop. `heliograph-send` awaits
`Relay.send` for each notification.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import deque
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, cast

from bench.contract import Meter, Task, tell
from bench.pki import KEY_ID, TEAM_ID, TOPIC
from bench.rounds import Contestant
from heliograph import __version__
from heliograph.batches import make_batches, new_batch_id
from heliograph.carriers.apns import ApnsCarrier, Endpoint, PoolSettings, Route
from heliograph.model import (
    Access,
    Answered,
    App,
    Batch,
    Environment,
    Headers,
    Lane,
    Lease,
    LeaseEnd,
    Once,
    Outcome,
    Outcomes,
    Quarantine,
    Receipt,
    Removal,
    SigningKey,
    State,
)
from heliograph.net.tls import client_context
from heliograph.relay import Relay
from heliograph.telemetry import Telemetry

NAMES = ("heliograph", "heliograph-send", "heliograph-asyncio")
APP = "bench"
HEADERS = Headers(TOPIC, priority=10, expiration=0)


def prepare(name: str) -> Sequence[str]:
    return [sys.executable, "-m", "bench.contestants.heliograph_sender", name]


CONTESTANTS = tuple(Contestant(name, "sender", partial(prepare, name)) for name in NAMES)


class Memory:
    """Queue and Store (`heliograph.ports`) that keep nothing but counts."""

    def __init__(self) -> None:
        self.accepted = 0
        self._waiting: deque[Batch] = deque()
        self._unfinished = 0
        self._filled = asyncio.Event()
        self._empty = asyncio.Event()

    async def put(
        self,
        batches: Sequence[Batch],
        *,
        lease: bool = False,  # noqa: ARG002
        once: Once | None = None,  # noqa: ARG002
    ) -> Sequence[Lease]:
        self._waiting.extend(batches)
        self._unfinished += len(batches)
        self._empty.clear()
        self._filled.set()
        return ()

    async def take(self, limit: int, full: Collection[Lane] = ()) -> Sequence[Lease]:  # noqa: ARG002
        while not self._waiting:
            self._filled.clear()
            await self._filled.wait()
        return [Lease(self._waiting.popleft(), None, 1) for _ in range(min(limit, len(self._waiting)))]

    async def finish(self, ends: Sequence[LeaseEnd]) -> None:
        again = [end for end in ends if end.again_at is not None]
        if again:
            raise RuntimeError(f"{len(again)} batches were not answered whole")
        self._unfinished -= len(ends)
        if not self._unfinished:
            self._empty.set()

    async def emptied(self) -> None:
        await self._empty.wait()

    async def record(
        self,
        outcomes: Sequence[Outcomes],
        removals: Sequence[Removal],  # noqa: ARG002
        quarantines: Sequence[Quarantine] = (),  # noqa: ARG002
    ) -> Collection[str]:
        # a batch is recorded several times as its answers come; the last time it is complete
        for each in outcomes:
            if State.QUEUED not in each.states:
                self.accepted += each.states.count(State.ACCEPTED)
        return {each.batch_id for each in outcomes}

    async def find_receipts(self, ids: Sequence[str]) -> Sequence[Receipt | None]:
        return [None] * len(ids)

    async def held_among(self, app: str, environment: Environment, tokens: Collection[bytes]) -> dict[bytes, str]:  # noqa: ARG002
        return {}

    async def keep(self, finished: Sequence[tuple[Batch, Outcomes]], *_: object) -> None:
        pass

    async def aclose(self) -> None:
        pass


def new_id() -> str:
    return new_batch_id(time.time(), os.urandom(8))


async def send_batches(memory: Memory, tokens: Sequence[bytes], payload: bytes) -> int:
    """How many were accepted."""
    before = memory.accepted
    batches = make_batches(new_id, APP, Environment.PRODUCTION, time.time(), (HEADERS,), tokens, (payload,))
    await memory.put(list(batches))
    await memory.emptied()
    return memory.accepted - before


async def send_each(relay: Relay, tokens: Sequence[bytes], payload: bytes, workers: int) -> int:
    """How many were accepted."""
    loop = asyncio.get_running_loop()
    remaining = iter(tokens)
    accepted = 0

    def hear(futures: Sequence[asyncio.Future[Outcome]], _: Sequence[bytes], outcome: Outcome) -> None:
        for future in futures:
            future.set_result(outcome)

    courier = relay.courier(APP, Environment.PRODUCTION, hear)

    async def worker() -> None:
        nonlocal accepted
        for token in remaining:
            future: asyncio.Future[Outcome] = loop.create_future()
            courier.send(HEADERS, token, payload, None, future)
            answer = await future
            accepted += isinstance(answer, Answered) and answer.status == 200

    await asyncio.gather(*(worker() for _ in range(workers)))
    return accepted


async def main(name: str) -> None:
    task = Task.from_environment()
    endpoint = Endpoint("127.0.0.1", task.port, client_context(task.data / "ca.pem"))
    key = SigningKey(KEY_ID, TEAM_ID, (task.data / "AuthKey.p8").read_bytes())
    apps = {APP: App(APP, (TOPIC,), (Access(key, (Environment.PRODUCTION,)),))}
    route = Route(endpoint, key)
    settings = PoolSettings(connections=task.connections)
    carrier = ApnsCarrier(lambda *_: route, settings=settings, clock=time.time)
    memory = Memory()
    relay = Relay(cast("Any", memory), cast("Any", memory), carrier, apps, Telemetry(), clock=time.time)
    work, settle = asyncio.create_task(relay.work()), asyncio.create_task(relay.settle())

    async def send(count: int) -> tuple[int, Meter]:
        tokens = [token.encode() for token in task.device_tokens(count)]
        with Meter() as meter:
            if name == "heliograph-send":
                ok = await send_each(relay, tokens, task.payload(), task.streams * task.connections)
            else:
                ok = await send_batches(memory, tokens, task.payload())
        return ok, meter

    # a pool opens its connections one after the other, while more waits than those it has can take
    await send(task.warm if task.connections == 1 else task.warm * 4 * task.connections)
    ok, meter = await send(task.n)
    work.cancel()
    settle.cancel()
    await asyncio.gather(work, settle, return_exceptions=True)
    await carrier.aclose()
    tell(name, __version__, task, ok, meter)


if __name__ == "__main__":
    chosen = sys.argv[1]
    if chosen == "heliograph-asyncio":
        asyncio.run(main(chosen))
    else:
        import uvloop

        uvloop.run(main(chosen))
