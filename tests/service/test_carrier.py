"""The carrier to Apple by itself: how it spreads, what it does when Apple cannot be reached."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest

from heliograph.batches import make_batches, new_batch_id
from heliograph.carriers.apns import ApnsCarrier, Endpoint, PoolSettings, Route
from heliograph.carriers.apns.credentials import TokenSource
from heliograph.model import ACCEPTED, Answered, Batch, Environment, Headers, NotProcessed, Outcome
from heliograph.net.tls import client_context, server_context, throwaway_identity
from heliograph.protocols.provider_token import GRID_S
from heliograph.simulator.server import Simulator, new_signing_key
from tests.service.house import PATIENCE_S, PAYLOAD, TOPIC, token


class Ledger:
    """Who reported what, each index once."""

    def __init__(self, batch: Batch) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self._left = set(range(len(batch)))
        self._done = asyncio.Event()

    def report(self, indices: Sequence[int], outcome: Outcome) -> None:
        assert self._left >= set(indices), "reported twice"
        self._left -= set(indices)
        self.outcomes |= dict.fromkeys(indices, outcome)
        if not self._left:
            self._done.set()

    async def settled(self) -> list[Outcome]:
        async with asyncio.timeout(PATIENCE_S):
            await self._done.wait()
        return [self.outcomes[index] for index in sorted(self.outcomes)]


def batch_of(count: int, first: int = 0) -> Batch:
    (batch,) = make_batches(
        lambda: new_batch_id(time.time(), first.to_bytes(8, "big")),
        "app",
        Environment.PRODUCTION,
        time.time(),
        [Headers(TOPIC)],
        [token(first + number).encode() for number in range(count)],
        [PAYLOAD],
    )
    return batch


@asynccontextmanager
async def carrier_to(
    apple: Simulator, settings: PoolSettings | None = None, *, ca: bytes | None = None
) -> AsyncIterator[ApnsCarrier]:
    route = Route(Endpoint("localhost", apple.port, client_context(ca or apple.ca_pem)), apple.signing_key)
    carrier = ApnsCarrier(lambda *_: route, settings=settings, clock=time.time)
    try:
        yield carrier
    finally:
        await carrier.aclose()


@pytest.fixture
async def apple() -> AsyncIterator[Simulator]:
    async with Simulator(keep=10_000) as apple:
        yield apple


async def test_few_notifications_share_one_connection(apple: Simulator) -> None:
    async with carrier_to(apple) as carrier:
        for first in range(0, 500, 50):
            batch = batch_of(50, first)
            ledger = Ledger(batch)
            carrier.carry(batch, range(50), ledger.report)
            assert await ledger.settled() == [ACCEPTED] * 50
    assert apple.connections == 1


async def test_more_connections_are_opened_when_those_there_are_full(apple: Simulator) -> None:
    apple.delays(0.3)
    async with carrier_to(apple, PoolSettings(connections=3)) as carrier:
        batches = [batch_of(1000, 1000 * number) for number in range(6)]
        ledgers = [Ledger(batch) for batch in batches]
        for batch, ledger in zip(batches, ledgers, strict=True):
            carrier.carry(batch, range(1000), ledger.report)
        for ledger in ledgers:
            assert await ledger.settled() == [ACCEPTED] * 1000
    assert apple.connections == 3


async def test_some_places_of_a_batch_can_be_carried_alone(apple: Simulator) -> None:
    async with carrier_to(apple) as carrier:
        batch = batch_of(10)
        ledger = Ledger(batch)
        carrier.carry(batch, [7, 2], ledger.report)
        carrier.carry(batch, [0, 1, 3, 4, 5, 6, 8, 9], ledger.report)
        assert await ledger.settled() == [ACCEPTED] * 10
    assert sorted(each.token for each in apple.received) == [token(number) for number in range(10)]


async def test_a_server_that_nobody_vouches_for_is_sent_nothing(apple: Simulator) -> None:
    stranger = throwaway_identity(datetime.now(UTC))
    async with carrier_to(apple, PoolSettings(patience_s=0.3, backoff_s=0.1), ca=stranger.ca_pem) as carrier:
        batch = batch_of(3)
        ledger = Ledger(batch)
        carrier.carry(batch, range(3), ledger.report)
        outcomes = await ledger.settled()
    assert all(isinstance(outcome, NotProcessed) and "certificate" in outcome.why for outcome in outcomes)
    assert not apple.received


async def test_what_waits_too_long_is_handed_back_unprocessed() -> None:
    async with Simulator() as gone:
        pass
    async with carrier_to(gone, PoolSettings(patience_s=0.2, backoff_s=0.1)) as carrier:
        batch = batch_of(5)
        ledger = Ledger(batch)
        carrier.carry(batch, range(5), ledger.report)
        outcomes = await ledger.settled()
    assert all(isinstance(outcome, NotProcessed) and "cannot connect" in outcome.why for outcome in outcomes)


async def test_connects_go_on_until_the_server_is_back() -> None:
    async with Simulator() as apple:
        port, identity, key = apple.port, apple.identity, apple.signing_key
    async with carrier_to(apple, PoolSettings(backoff_s=0.1)) as carrier:
        batch = batch_of(5)
        ledger = Ledger(batch)
        carrier.carry(batch, range(5), ledger.report)
        async with Simulator(port=port, identity=identity, signing_key=key):
            assert await ledger.settled() == [ACCEPTED] * 5


async def test_a_server_that_ends_each_connection_at_once_is_not_stormed() -> None:
    identity = throwaway_identity(datetime.now(UTC))
    connections = 0

    def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        writer.close()

    tls = server_context(identity.certificate_pem, identity.key_pem)
    server = await asyncio.start_server(hang_up, "127.0.0.1", 0, ssl=tls)
    key = new_signing_key()
    route = Route(Endpoint("localhost", server.sockets[0].getsockname()[1], client_context(identity.ca_pem)), key)
    carrier = ApnsCarrier(lambda *_: route, settings=PoolSettings(patience_s=2.0), clock=time.time)
    batch = batch_of(5)
    ledger = Ledger(batch)
    carrier.carry(batch, range(5), ledger.report)
    outcomes = await ledger.settled()
    await carrier.aclose()
    server.close()
    assert all(isinstance(outcome, NotProcessed) and "ended a new connection" in outcome.why for outcome in outcomes)
    # Without pauses there would be hundreds; with full jitter, pauses that double make this many all but impossible.
    assert 1 <= connections < 40


async def test_an_app_without_credentials_gets_its_notifications_back() -> None:
    carrier = ApnsCarrier(lambda *_: None, clock=time.time)
    batch = batch_of(2)
    ledger = Ledger(batch)
    carrier.carry(batch, range(2), ledger.report)
    (first, _) = await ledger.settled()
    assert isinstance(first, NotProcessed)
    assert "no credentials for the app app" in first.why


async def test_closing_lets_open_streams_be_answered(apple: Simulator) -> None:
    apple.delays(0.2)
    async with carrier_to(apple) as carrier:
        batch = batch_of(100)
        ledger = Ledger(batch)
        carrier.carry(batch, range(100), ledger.report)
        async with asyncio.timeout(PATIENCE_S):
            while not apple.received:  # noqa: ASYNC110 - the simulator has no event for it
                await asyncio.sleep(0.01)
    outcomes = await ledger.settled()
    accepted = outcomes.count(ACCEPTED)
    assert accepted >= 1
    assert all(outcome is ACCEPTED or isinstance(outcome, NotProcessed) for outcome in outcomes)
    assert len(apple.received) == accepted


async def test_the_sandboxs_unique_id_is_kept() -> None:
    async with Simulator(Environment.DEVELOPMENT) as apple:
        route = Route(
            Endpoint("localhost", apple.port, client_context(apple.ca_pem), unique_ids=True), apple.signing_key
        )
        carrier = ApnsCarrier(lambda *_: route, clock=time.time)
        batch = batch_of(20)
        ledger = Ledger(batch)
        carrier.carry(batch, range(20), ledger.report)
        outcomes = await ledger.settled()
        await carrier.aclose()
    unique_ids = {outcome.unique_id for outcome in outcomes if isinstance(outcome, Answered)}
    assert len(unique_ids) == 20
    assert None not in unique_ids


def test_one_provider_token_serves_half_an_hour() -> None:
    source = TokenSource(new_signing_key())
    start = 1_700_000_000 // GRID_S * GRID_S + 60.0
    fields = [source.field(start + seconds) for seconds in (0, 1, GRID_S - 1)]
    assert all(field is fields[0] for field in fields)
    assert source.field(start + GRID_S) != fields[0]
    assert fields[0][1].startswith(b"bearer ")
