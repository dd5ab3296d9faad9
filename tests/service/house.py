"""A whole house without doors, for tests: the relay between a real SQLite file and a real simulator."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from heliograph.carriers.apns import ApnsCarrier, Endpoint, PoolSettings, Route
from heliograph.model import Access, App, Batch, Environment, Headers, Receipt, State
from heliograph.net.tls import client_context
from heliograph.relay import Relay
from heliograph.simulator.server import Simulator
from heliograph.stores.sqlite import SqliteStore
from heliograph.telemetry import Telemetry

TOPIC = "com.example.app"
APP = "example"
HEADERS = Headers(TOPIC)
PAYLOAD = b'{"aps":{"alert":"The kettle boils"}}'
PATIENCE_S = 20.0
"""After this a test gives up; on any machine that is not broken, nothing takes so long."""


def token(number: int) -> str:
    return f"{number:064x}"


class House:
    """What a test speaks to."""

    def __init__(self, relay: Relay, store: SqliteStore, carrier: ApnsCarrier, apple: Simulator) -> None:
        self.relay = relay
        self.store = store
        self.carrier = carrier
        self.apple = apple

    async def admit(
        self, tokens: Sequence[str], payloads: Sequence[bytes] = (PAYLOAD,), headers: Sequence[Headers] = (HEADERS,)
    ) -> tuple[Batch, ...]:
        admitted = await self.relay.admit(APP, None, headers, tokens, payloads)
        assert not admitted.refused, admitted.refused
        return admitted.batches

    async def push(
        self, tokens: Sequence[str], payloads: Sequence[bytes] = (PAYLOAD,), headers: Sequence[Headers] = (HEADERS,)
    ) -> list[str]:
        """Enqueue; the ids, in order."""
        batches = await self.admit(tokens, payloads, headers)
        await self.relay.enqueue(batches)
        return [f"{batch.id}{place:04x}" for batch in batches for place in range(1, len(batch) + 1)]

    async def receipts(
        self,
        ids: Sequence[str],
        until: Callable[[Receipt], bool] = lambda receipt: receipt.state not in (State.QUEUED, State.SENT),
    ) -> list[Receipt]:
        """The receipts, once all of them are as wanted."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = [receipt for receipt in await self.relay.receipts(ids) if receipt is not None]
                assert len(found) == len(ids)
                if all(map(until, found)):
                    return found
                await self.relay.receipt(next(r.id for r in found if not until(r)), 0.05)


@asynccontextmanager
async def open_house(
    folder: Path,
    apple: Simulator,
    *,
    settings: PoolSettings | None = None,
    working: bool = True,
    clock: Callable[[], float] = time.time,
) -> AsyncIterator[House]:
    """`working`: lease and send; otherwise what is enqueued stays where it is. `clock`: for provider tokens."""
    apple.add_app(TOPIC)
    app = App(APP, (TOPIC,), (Access(apple.signing_key, (Environment.PRODUCTION,)),))
    route = Route(Endpoint("localhost", apple.port, client_context(apple.ca_pem)), apple.signing_key)
    store = await SqliteStore.open(folder / "heliograph.db")
    carrier = ApnsCarrier(lambda *_: route, settings=settings, clock=clock)
    relay = Relay(store, store, carrier, {APP: app}, Telemetry(), clock=time.time)
    tasks = [asyncio.create_task(relay.work()), asyncio.create_task(relay.settle())] if working else []
    try:
        yield House(relay, store, carrier, apple)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await carrier.aclose()
        await relay.drain()
        await store.aclose()
