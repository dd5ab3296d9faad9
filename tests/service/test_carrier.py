"""The carrier to Apple by itself: how it spreads, what it does when Apple cannot be reached."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import ssl
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import pytest
import structlog
from msgspec.structs import replace

from heliograph import crash
from heliograph.batches import make_batches, new_batch_id
from heliograph.carriers.apns import LANE, ApnsCarrier, Endpoint, PoolSettings, Route
from heliograph.carriers.apns.backlog import TURN
from heliograph.carriers.apns.connection import Connection
from heliograph.carriers.apns.credentials import TokenSource
from heliograph.carriers.apns.pool import LIMITS, Pool
from heliograph.model import (
    ACCEPTED,
    Answered,
    Batch,
    ClientCertificate,
    Environment,
    Headers,
    NotProcessed,
    Outcome,
    State,
    Unknown,
)
from heliograph.net.tls import client_context, server_context, throwaway_identity
from heliograph.protocols.provider_token import FUTURE_TOLERANCE_S, GRID_S, issue_time
from heliograph.simulator.server import Simulator, new_signing_key
from tests.certificates import authority, push_certificate
from tests.service.house import PATIENCE_S, PAYLOAD, TOPIC, open_house, token

EXPIRED = Answered(403, "ExpiredProviderToken")


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


def batch_of(count: int, first: int = 0, *, app: str = "app", headers: Sequence[Headers] = (Headers(TOPIC),)) -> Batch:
    (batch,) = make_batches(
        lambda: new_batch_id(time.time(), random.randbytes(8)),
        app,
        Environment.PRODUCTION,
        time.time(),
        headers,
        [token(first + number).encode() for number in range(count)],
        [PAYLOAD],
    )
    return batch


def route_to(apple: Simulator, certificate: ClientCertificate | None = None) -> Route:
    endpoint = Endpoint("localhost", apple.port, client_context(apple.ca_pem, certificate))
    return Route(endpoint, apple.signing_key if certificate is None else None)


@asynccontextmanager
async def carrier_by(
    find_route: Callable[[str, Environment, str], Route | None],
    settings: PoolSettings | None = None,
    clock: Callable[[], float] = time.time,
) -> AsyncIterator[ApnsCarrier]:
    carrier = ApnsCarrier(find_route, settings=settings, clock=clock)
    try:
        yield carrier
    finally:
        await carrier.aclose()


@asynccontextmanager
async def carrier_to(
    apple: Simulator, settings: PoolSettings | None = None, *, ca: bytes | None = None
) -> AsyncIterator[ApnsCarrier]:
    route = Route(Endpoint("localhost", apple.port, client_context(ca or apple.ca_pem)), apple.signing_key)
    async with carrier_by(lambda *_: route, settings) as carrier:
        yield carrier


def carried(carrier: ApnsCarrier, batch: Batch) -> Ledger:
    ledger = Ledger(batch)
    carrier.carry(batch, range(len(batch)), ledger.report)
    return ledger


async def until(condition: Callable[[], object]) -> None:
    """Wait for what there is no event for."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def pools(carrier: ApnsCarrier) -> list[Pool]:
    return list(carrier._pools.values())


def connections(carrier: ApnsCarrier) -> list[Connection]:
    return [connection for pool in pools(carrier) for connection in pool._connections]


def why(outcomes: Sequence[Outcome]) -> str:
    (one,) = set(outcomes)
    assert isinstance(one, NotProcessed)
    return one.why


def logged(logs: Sequence[Any], event: str) -> list[Any]:
    return [each for each in logs if each["event"] == event]


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
    assert first.why == f"there are no credentials for the topic {TOPIC} of the app app in production"


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


async def test_a_carrier_that_was_closed_takes_nothing_more(apple: Simulator) -> None:
    async with carrier_to(apple) as carrier:
        pass
    assert why(await carried(carrier, batch_of(3)).settled()) == "the server is stopping"
    assert not apple.connections


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


# -- lanes -------------------------------------------------------------------------------------------------------


async def test_a_carrier_with_little_to_do_has_room_for_everyone(apple: Simulator) -> None:
    async with carrier_to(apple) as carrier:
        assert await carrier.ready() == frozenset()
        ledger = carried(carrier, batch_of(1000))
        assert await carrier.ready() == frozenset()
        await ledger.settled()


async def test_a_lane_with_much_waiting_is_full_until_enough_of_it_is_sent(apple: Simulator) -> None:
    async with carrier_to(apple) as carrier:
        ledgers = [carried(carrier, batch_of(1000, 1000 * number)) for number in range(LANE // 1000 + 1)]
        other = carried(carrier, batch_of(1, app="other"))
        full = await carrier.ready()
        assert full == {("app", Environment.PRODUCTION)}
        async with asyncio.timeout(PATIENCE_S):
            assert await carrier.ready(full) == frozenset()
        for ledger in (*ledgers, other):
            assert set(await ledger.settled()) == {ACCEPTED}


async def test_a_lane_that_cannot_connect_is_full_with_one_batch_and_others_are_not(apple: Simulator) -> None:
    gone = Route(Endpoint("localhost", 1, client_context(apple.ca_pem)), apple.signing_key)
    here = route_to(apple)
    async with carrier_by(lambda app, *_: gone if app == "gone" else here, PoolSettings(patience_s=2.0)) as carrier:
        stuck = carried(carrier, batch_of(1, app="gone"))
        async with asyncio.timeout(PATIENCE_S):
            full = await carrier.ready(frozenset())
        assert full == {("gone", Environment.PRODUCTION)}
        for number in range(20):
            assert await carried(carrier, batch_of(500, 500 * number)).settled() == [ACCEPTED] * 500
        assert "cannot connect" in why(await stuck.settled())
        assert await carrier.ready(full) == frozenset()  # the next batch finds out whether it is still so


async def test_lanes_that_wait_together_fill_up_sooner_each(apple: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heliograph.carriers.apns.CROWD", 3 * LANE)
    async with carrier_to(apple) as carrier:
        ledgers = [
            carried(carrier, batch_of(1000, 1000 * number, app=f"app-{number % 20}"))
            for number in range(3 * LANE // 1000)
        ]
        full = await carrier.ready()
        assert {app for app, _ in full} == {f"app-{number}" for number in range(10)}  # those with two batches
        for ledger in ledgers:
            await ledger.settled()


async def test_what_is_stuck_beyond_all_bounds_is_handed_back(
    apple: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heliograph.carriers.apns.CROWD", 1500)
    gone = Route(Endpoint("localhost", 1, client_context(apple.ca_pem)), apple.signing_key)
    async with carrier_by(lambda *_: gone) as carrier:
        first = carried(carrier, batch_of(1000))
        await carrier.ready(frozenset())
        second = carried(carrier, batch_of(1000, app="other"))
        third = carried(carrier, batch_of(1000, app="third"))
        assert "cannot connect" in why(await third.settled())
        assert not first.outcomes
        assert not second.outcomes
    assert why(await first.settled()) == why(await second.settled()) == "the server is stopping"


async def test_fifty_thousand_of_one_app_delay_another_apps_push_by_a_turn(apple: Simulator) -> None:
    async with carrier_to(apple) as carrier:
        ledgers = [carried(carrier, batch_of(1000, 1000 * number, app="crowd")) for number in range(50)]
        ledgers.append(carried(carrier, batch_of(1, 999_999, app="single")))
        await until(lambda: ledgers[-1].outcomes)
        place = [str(each.token) for each in apple.received].index(token(999_999))
        assert place <= TURN + 1  # and one for the stream that Apple allows first
        for ledger in ledgers:
            await ledger.settled()


# -- routes ------------------------------------------------------------------------------------------------------


async def test_topics_of_one_batch_may_have_different_credentials_or_none() -> None:
    voip = f"{TOPIC}.voip"
    async with Simulator() as first, Simulator() as second:
        routes = {TOPIC: route_to(first), voip: route_to(second)}
        kinds = [Headers(TOPIC), Headers(voip), Headers("com.example.unknown")]
        async with carrier_by(lambda _app, _environment, topic: routes.get(topic)) as carrier:
            outcomes = await carried(carrier, batch_of(9, headers=[kinds[n % 3] for n in range(9)])).settled()
        assert [each.token for each in first.received] == [token(number) for number in (0, 3, 6)]
        assert [each.topic for each in second.received] == [voip] * 3
    assert outcomes[0::3] == outcomes[1::3] == [ACCEPTED] * 3
    assert "there are no credentials for the topic com.example.unknown of the app app" in why(outcomes[2::3])


async def test_topics_that_share_a_route_share_a_connection(apple: Simulator) -> None:
    async with carrier_to(apple) as carrier:
        kinds = [Headers(TOPIC), Headers(f"{TOPIC}.voip")]
        outcomes = await carried(carrier, batch_of(10, headers=[kinds[n % 2] for n in range(10)])).settled()
    assert outcomes == [ACCEPTED] * 10
    assert apple.connections == 1


async def test_a_client_certificate_speaks_for_itself() -> None:
    shown = push_certificate(TOPIC).loaded()
    async with Simulator(client_authorities=authority().certificate_pem) as apple:
        apple._keys.clear()  # no provider token is good here
        route = route_to(apple, shown)
        async with carrier_by(lambda *_: route) as carrier:
            assert await carried(carrier, batch_of(500)).settled() == [ACCEPTED] * 500
            (pool,) = pools(carrier)
            (template,) = pool._templates.values()
            assert b"authorization" not in dict(template.fields)
            no = await carried(carrier, batch_of(1, headers=[Headers("com.example.other")])).settled()
    assert no == [Answered(400, "TopicDisallowed")]
    assert apple.connections == 1


async def test_a_certificate_of_the_other_environment_is_an_alarm_and_nothing_is_rejected() -> None:
    shown = push_certificate(TOPIC, environments=[Environment.DEVELOPMENT]).loaded()
    async with Simulator(client_authorities=authority().certificate_pem) as apple:
        route = route_to(apple, shown)
        with structlog.testing.capture_logs() as logs:
            async with carrier_by(lambda *_: route, PoolSettings(patience_s=0.5, backoff_s=0.1)) as carrier:
                outcomes = await carried(carrier, batch_of(3)).settled()
    assert "BadCertificateEnvironment" in why(outcomes)
    (alarm,) = logged(logs, "credentials_refused")
    assert alarm["reason"] == "BadCertificateEnvironment"
    assert alarm["apps"] == ["app"]
    assert "use the one made for this one" in alarm["hint"]


@pytest.mark.parametrize("kind", ["expired", "unknown"])
async def test_a_certificate_that_the_simulator_does_not_take_opens_nothing(kind: str) -> None:
    old = datetime.now(UTC) - timedelta(days=400)
    shown = push_certificate(TOPIC, now=old if kind == "expired" else None).loaded()
    trusted = authority().certificate_pem if kind == "expired" else throwaway_identity(datetime.now(UTC)).ca_pem
    async with Simulator(client_authorities=trusted) as apple:
        route = route_to(apple, shown)
        async with carrier_by(lambda *_: route, PoolSettings(patience_s=0.3, backoff_s=0.1)) as carrier:
            outcomes = await carried(carrier, batch_of(3)).settled()
    assert "localhost ended a new connection" in why(outcomes)
    assert not apple.received


async def test_the_tls_alert_with_which_a_certificate_is_refused_is_told() -> None:
    # The loop's own servers send no alert, so this one is served from a thread.
    identity = throwaway_identity(datetime.now(UTC))
    tls = server_context(identity.certificate_pem, identity.key_pem)
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.load_verify_locations(cadata=authority().certificate_pem.decode())
    listening = socket.create_server(("127.0.0.1", 0))

    def refuse() -> None:
        connected, _ = listening.accept()
        with pytest.raises(ssl.SSLError):
            tls.wrap_socket(connected, server_side=True)
        connected.close()

    shown = push_certificate(TOPIC, now=datetime.now(UTC) - timedelta(days=400)).loaded()
    endpoint = Endpoint("127.0.0.1", listening.getsockname()[1], client_context(identity.ca_pem, shown))
    with structlog.testing.capture_logs() as logs:
        async with carrier_by(lambda *_: Route(endpoint, None)) as carrier:
            served = asyncio.create_task(asyncio.to_thread(refuse))
            carried(carrier, batch_of(1))
            async with asyncio.timeout(PATIENCE_S):
                await carrier.ready(frozenset())
                await served
            (pool,) = pools(carrier)
            trouble = str(pool.trouble)
    listening.close()
    assert "expired" in trouble
    assert logged(logs, "apns_connect_failed")[0]["log_level"] == "error"


async def test_replaced_credentials_are_used_at_once_and_the_old_connections_end(apple: Simulator) -> None:
    other = new_signing_key("OTHERKEY01", apple.signing_key.team_id)
    apple.add_key(other)
    endpoint = route_to(apple).endpoint
    route = Route(endpoint, apple.signing_key)
    async with carrier_by(lambda *_: route) as carrier:
        await carried(carrier, batch_of(3)).settled()
        (old,) = connections(carrier)
        route = Route(endpoint, other)
        assert await carried(carrier, batch_of(3)).settled() == [ACCEPTED] * 3
        async with asyncio.timeout(PATIENCE_S):
            await old.closed
        (pool,) = pools(carrier)
        assert pool._key == other
    assert apple.connections == 2


async def test_what_waits_when_its_credentials_are_replaced_is_handed_back(apple: Simulator) -> None:
    gone = Route(Endpoint("localhost", 1, client_context(apple.ca_pem)), apple.signing_key)
    route: Route | None = gone
    async with carrier_by(lambda *_: route) as carrier:
        waiting = carried(carrier, batch_of(3))
        route = route_to(apple)
        assert await carried(carrier, batch_of(3)).settled() == [ACCEPTED] * 3
        assert why(await waiting.settled()) == "the app's credentials were replaced"
        route = None
        assert "no credentials" in why(await carried(carrier, batch_of(3)).settled())
        assert not pools(carrier)


# -- provider tokens ---------------------------------------------------------------------------------------------


class Clock:
    """This machine's clock, and how far it is off."""

    def __init__(self, off: float = 0.0) -> None:
        self.off = off

    def __call__(self) -> float:
        return time.time() + self.off


def another_half_hour() -> float:
    """How far the clock has to be off for a provider token of another half hour that Apple takes all the same."""
    now = time.time()
    return float(-GRID_S if now - issue_time(now) < GRID_S - FUTURE_TOLERANCE_S else GRID_S)


async def test_five_hundred_that_draw_expired_renew_the_token_once() -> None:
    clock = Clock(-7200.0)
    async with Simulator(first_streams=1000) as apple:
        route = route_to(apple)
        with structlog.testing.capture_logs() as logs:
            async with carrier_by(lambda *_: route, PoolSettings(connections=1), clock) as carrier:
                ledger = carried(carrier, batch_of(500))
                while not any(connection.open_streams for connection in connections(carrier)):  # noqa: ASYNC110
                    await asyncio.sleep(0)
                clock.off = 0.0  # before an answer can have come
                assert await ledger.settled() == [EXPIRED] * 500
                assert await carried(carrier, batch_of(500)).settled() == [ACCEPTED] * 500
                assert [pool.trouble for pool in pools(carrier)] == [None]
    assert apple.connections == 2
    assert len(logged(logs, "provider_token_renewed")) == 1
    assert not logged(logs, "clock_wrong")


async def test_what_drew_expired_is_sent_again_and_accepted(tmp_path: Path) -> None:
    clock = Clock(-7200.0)
    async with Simulator(first_streams=1000) as apple, open_house(tmp_path, apple, clock=clock) as house:
        ids = await house.push([token(number) for number in range(500)])
        while not any(connection.open_streams for connection in connections(house.carrier)):  # noqa: ASYNC110
            await asyncio.sleep(0)
        clock.off = 0.0
        receipts = await house.receipts(ids)
        assert {receipt.state for receipt in receipts} == {State.ACCEPTED}
        assert {receipt.attempts for receipt in receipts} == {2}
        assert len(apple.received) == 500
        assert apple.connections == 2


async def test_a_wrong_clock_is_an_alarm_and_no_loop_and_all_is_well_once_it_is_right() -> None:
    clock = Clock(-7200.0)
    async with Simulator(first_streams=1000) as apple:
        route = route_to(apple)
        with structlog.testing.capture_logs() as logs:
            async with carrier_by(lambda *_: route, clock=clock) as carrier:
                assert await carried(carrier, batch_of(500)).settled() == [EXPIRED] * 500
                again = carried(carrier, batch_of(500))  # as the relay would at once
                assert await carrier.ready(frozenset()) == {("app", Environment.PRODUCTION)}
                (pool,) = pools(carrier)
                assert "clock is wrong" in str(pool.trouble)
                async with asyncio.timeout(PATIENCE_S):
                    while connections(carrier):  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                assert not again.outcomes
                assert apple.connections == 1
                clock.off = 0.0
                assert await again.settled() == [ACCEPTED] * 500
                assert pool.trouble is None
    (alarm,) = logged(logs, "clock_wrong")
    assert alarm["log_level"] == "error"
    assert alarm["credentials"] == f"signing key {apple.signing_key.key_id} of team {apple.signing_key.team_id}"
    behind = datetime.now(UTC) - datetime.fromisoformat(alarm["machine_time"])
    assert timedelta(hours=1.9) < behind < timedelta(hours=2.1)
    assert "set this machine's clock" in alarm["hint"]
    assert apple.connections == 2


async def test_a_connection_keeps_its_provider_token_for_twenty_minutes(apple: Simulator) -> None:
    clock = Clock()
    async with carrier_to(apple) as carrier:
        carrier._clock = clock
        await carried(carrier, batch_of(3)).settled()
        (first,) = connections(carrier)
        clock.off = another_half_hour()  # while the connection is young
        assert await carried(carrier, batch_of(3)).settled() == [ACCEPTED] * 3
        async with asyncio.timeout(PATIENCE_S):
            await first.closed
        (second,) = connections(carrier)
        second.authorized_at -= 1201.0
        before = second.authorization
        clock.off = 0.0
        await carried(carrier, batch_of(3)).settled()
        assert connections(carrier) == [second]
        assert second.authorization != before
    assert apple.connections == 2


async def test_all_connections_of_a_pool_carry_the_same_provider_token(apple: Simulator) -> None:
    apple.delays(0.3)
    async with carrier_to(apple, PoolSettings(connections=3)) as carrier:
        ledgers = [carried(carrier, batch_of(1000, 1000 * number)) for number in range(6)]
        for ledger in ledgers:
            await ledger.settled()
        carry = {connection.authorization for connection in connections(carrier)}
    assert apple.connections == 3
    assert len(carry) == 1


async def test_a_key_that_apple_does_not_know_is_one_alarm_and_no_more_is_sent_with_it_for_a_while(
    apple: Simulator,
) -> None:
    stranger = new_signing_key("STRANGER01", "TEAMTEAM01")
    route = Route(route_to(apple).endpoint, stranger)
    with structlog.testing.capture_logs() as logs:
        async with carrier_by(lambda *_: route, PoolSettings(patience_s=0.3)) as carrier:
            outcomes = await carried(carrier, batch_of(20, app="shop")).settled()
            (pool,) = pools(carrier)
            assert pool.trouble == "Apple refuses the credentials: InvalidProviderToken"
            assert pool._authorization is not None
            secret = pool._authorization[1].decode().removeprefix("bearer ")
    trouble = NotProcessed("Apple refuses the credentials: InvalidProviderToken")
    assert outcomes == [Answered(403, "InvalidProviderToken"), *[trouble] * 19]
    (alarm,) = logged(logs, "credentials_refused")
    assert alarm["credentials"] == "signing key STRANGER01 of team TEAMTEAM01"
    assert (alarm["apps"], alarm["log_level"]) == (["shop"], "error")
    assert "check key, key id and team id" in alarm["hint"]
    assert secret not in str(logs)


async def test_too_many_updates_change_no_provider_token(apple: Simulator) -> None:
    async with carrier_to(apple) as carrier:
        await carried(carrier, batch_of(1)).settled()
        (connection,) = connections(carrier)
        before = connection.authorization
        apple.rejects(None, "TooManyProviderTokenUpdates", times=5)
        with structlog.testing.capture_logs() as logs:
            outcomes = await carried(carrier, batch_of(5)).settled()
        assert outcomes == [Answered(429, "TooManyProviderTokenUpdates")] * 5
        assert await carried(carrier, batch_of(5)).settled() == [ACCEPTED] * 5
        assert connections(carrier) == [connection]
        assert connection.authorization is before
    assert len(logged(logs, "credentials_refused")) == 1


@pytest.mark.parametrize("reason", ["Shutdown", "IdleTimeout", "UnrelatedKeyIdInToken"])
async def test_a_connection_that_apple_has_no_use_for_is_replaced(apple: Simulator, reason: str) -> None:
    async with carrier_to(apple) as carrier:
        await carried(carrier, batch_of(1)).settled()
        apple.rejects(None, reason, times=1)
        (no,) = await carried(carrier, batch_of(1)).settled()
        assert isinstance(no, Answered)
        assert no.reason == reason
        assert await carried(carrier, batch_of(5)).settled() == [ACCEPTED] * 5
    assert apple.connections == 2


async def test_equal_answers_of_one_read_are_reported_together() -> None:
    async with Simulator(cuts_limit=False) as apple, carrier_to(apple) as carrier:
        apple.rejects(None, "BadDeviceToken")
        await carried(carrier, batch_of(1)).settled()
        groups: list[Sequence[int]] = []
        batch = batch_of(500)
        ledger = Ledger(batch)

        def report(indices: Sequence[int], outcome: Outcome) -> None:
            groups.append(indices)
            ledger.report(indices, outcome)

        carrier.carry(batch, range(500), report)
        await ledger.settled()
    assert len(groups) < 500


# -- connections come and go -------------------------------------------------------------------------------------


async def test_connections_that_nobody_needs_are_closed_and_pools_forgotten(apple: Simulator) -> None:
    apple.delays(0.2)
    settings = PoolSettings(connections=3, spare_idle_s=0.1, idle_s=0.6)
    async with carrier_to(apple, settings) as carrier:
        ledgers = [carried(carrier, batch_of(1000, 1000 * number)) for number in range(6)]
        for ledger in ledgers:
            await ledger.settled()
        await until(lambda: len(connections(carrier)) == 1)
        await until(lambda: not connections(carrier))
        await until(lambda: not pools(carrier))
        assert not carrier._ways
        apple.behaves()
        assert await carried(carrier, batch_of(1)).settled() == [ACCEPTED]


async def test_a_server_that_accepts_and_stays_silent_is_found_out(apple: Simulator) -> None:
    gone: list[asyncio.Event] = []

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ended = asyncio.Event()
        gone.append(ended)
        await reader.read()
        ended.set()
        writer.close()

    for tls in (None, server_context(apple.identity.certificate_pem, apple.identity.key_pem)):
        gone.clear()
        server = await asyncio.start_server(silent, "127.0.0.1", 0, ssl=tls)
        port = server.sockets[0].getsockname()[1]
        dead = Route(Endpoint("127.0.0.1", port, client_context(apple.ca_pem)), apple.signing_key)
        here = route_to(apple)
        settings = PoolSettings(connect_s=0.3, patience_s=0.6, backoff_s=0.1)
        async with carrier_by(
            lambda app, *_, dead=dead, here=here: dead if app == "dead" else here, settings
        ) as carrier:
            stuck = carried(carrier, batch_of(5, app="dead"))
            assert await carried(carrier, batch_of(5)).settled() == [ACCEPTED] * 5
            assert f"cannot connect to 127.0.0.1:{port}: 127.0.0.1 did not answer in time" in why(await stuck.settled())
        async with asyncio.timeout(PATIENCE_S):
            for ended in gone:
                await ended.wait()
        server.close()


def resolver(monkeypatch: pytest.MonkeyPatch, names: dict[str, Callable[[], list[tuple[str, int]]]]) -> None:
    """Have these names looked up otherwise, in whatever thread asks."""
    real = socket.getaddrinfo

    def look_up(host: Any, port: Any, *arguments: Any, **more: Any) -> Any:
        if host in names:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in names[host]()]
        return real(host, port, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


NAME = "api.push.apple.com"
"""In the simulator's certificate."""


async def test_a_name_that_is_not_found_is_looked_up_again_until_it_is(
    apple: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[tuple[str, int]] = []
    asked = 0

    def find() -> list[tuple[str, int]]:
        nonlocal asked
        asked += 1
        if not known:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return known

    resolver(monkeypatch, {NAME: find})
    route = Route(Endpoint(NAME, 443, client_context(apple.ca_pem)), apple.signing_key)
    async with carrier_by(lambda *_: route, PoolSettings(patience_s=0.3, backoff_s=0.05)) as carrier:
        assert "Temporary failure in name resolution" in why(await carried(carrier, batch_of(5)).settled())
        assert asked >= 2
        known.append(("127.0.0.1", apple.port))
        assert await carried(carrier, batch_of(5)).settled() == [ACCEPTED] * 5


async def test_a_look_up_that_hangs_holds_up_nobody_else(apple: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    asked = 0

    def hang() -> list[tuple[str, int]]:
        nonlocal asked
        asked += 1
        release.wait(PATIENCE_S)
        return [("127.0.0.1", apple.port)]

    resolver(monkeypatch, {NAME: hang})
    slow = Endpoint(NAME, 443, client_context(apple.ca_pem))
    keys = [new_signing_key(f"KEYKEYKEY{number}") for number in range(9)]
    for key in keys:
        apple.add_key(key)
    here = route_to(apple)

    def find(app: str, *_: object) -> Route:
        return here if app == "app" else Route(slow, keys[int(app)])

    async with carrier_by(find, PoolSettings(look_up_s=0.1, patience_s=5.0, backoff_s=0.1)) as carrier:
        stuck = [carried(carrier, batch_of(1, app=str(number))) for number in range(9)]
        for number in range(10):
            assert await carried(carrier, batch_of(50, 50 * number)).settled() == [ACCEPTED] * 50
        await until(lambda: all(pool.trouble for pool in pools(carrier) if pool.waiting))
        assert "was not looked up in time" in str(pools(carrier)[0].trouble)
        assert asked == 1  # by all of them together
        release.set()
        for ledger in stuck:
            assert await ledger.settled() == [ACCEPTED]


async def test_the_next_address_is_tried_where_one_fails(apple: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    addresses = [("127.0.0.1", 1), silent.getsockname(), ("127.0.0.1", apple.port)]
    resolver(monkeypatch, {NAME: lambda: addresses})
    route = Route(Endpoint(NAME, 443, client_context(apple.ca_pem)), apple.signing_key)
    with structlog.testing.capture_logs() as logs:
        async with carrier_by(lambda *_: route, PoolSettings(connect_s=2.0)) as carrier:
            assert await carried(carrier, batch_of(5)).settled() == [ACCEPTED] * 5
    silent.close()
    assert not logged(logs, "apns_connect_failed")


async def test_further_connections_that_cannot_be_had_are_no_trouble_and_no_storm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = 0

    async with Simulator(streams=10) as apple:

        def find() -> list[tuple[str, int]]:
            nonlocal asked
            asked += 1
            return [("127.0.0.1", apple.port if asked == 1 else 1)]

        resolver(monkeypatch, {NAME: find})
        apple.delays(0.02)
        route = Route(Endpoint(NAME, 443, client_context(apple.ca_pem)), apple.signing_key)
        async with carrier_by(lambda *_: route) as carrier:
            ledger = carried(carrier, batch_of(500))
            await until(lambda: asked >= 3)
            assert [pool.trouble for pool in pools(carrier)] == [None]
            assert await ledger.settled() == [ACCEPTED] * 500
    # A second or more of failures: without pauses there would be hundreds.
    assert asked < 40


class Wire:
    """Between carrier and simulator: takes octets from one to the other until it is cut, which nobody notices."""

    def __init__(self, to: int) -> None:
        self._to = to
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Nothing more gets through on the connections that there are."""
        self._open.clear()  # those that there are keep this one
        self._open = asyncio.Event()
        self._open.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to)
        self._writers += [writer, far_writer]
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            self._tasks.add(asyncio.create_task(self._pump(source, sink, self._open)))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passing: asyncio.Event) -> None:
        while octets := await reader.read(65536):
            await passing.wait()
            writer.write(octets)
        writer.close()


async def test_a_connection_that_died_unnoticed_is_found_out_and_replaced(
    apple: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LIMITS.ping_after_s + LIMITS.ping_wait_s < 20.0
    monkeypatch.setattr("heliograph.carriers.apns.pool.LIMITS", replace(LIMITS, ping_after_s=0.2, ping_wait_s=0.2))
    async with Wire(apple.port) as wire:
        route = Route(Endpoint("localhost", wire.port, client_context(apple.ca_pem)), apple.signing_key)
        async with carrier_by(lambda *_: route) as carrier:
            assert await carried(carrier, batch_of(5)).settled() == [ACCEPTED] * 5
            wire.cut()
            (outcome,) = set(await carried(carrier, batch_of(5)).settled())
            assert isinstance(outcome, Unknown)
            assert outcome.why == "the server went silent"
            assert await carried(carrier, batch_of(5)).settled() == [ACCEPTED] * 5
    assert apple.connections == 2


# -- dying -------------------------------------------------------------------------------------------------------

_SENDER = """
import asyncio, sys, time
from pathlib import Path
from heliograph.carriers.apns import ApnsCarrier, Endpoint, Route
from heliograph.model import SigningKey
from heliograph.net.tls import client_context
from tests.service.test_carrier import batch_of

async def main():
    key = SigningKey(sys.argv[2], sys.argv[3], Path(sys.argv[4]).read_bytes())
    route = Route(Endpoint("localhost", int(sys.argv[1]), client_context(Path(sys.argv[5]))), key)
    carrier = ApnsCarrier(lambda *_: route, clock=time.time)
    carrier.carry(batch_of(10), range(10), lambda *_: None)
    await asyncio.sleep(60)

if sys.argv[6] == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_a_process_that_dies_once_requests_are_sent_has_sent_some(
    apple: Simulator, tmp_path: Path, loop: str
) -> None:
    key = apple.signing_key
    (tmp_path / "key.p8").write_bytes(key.pem)
    (tmp_path / "ca.pem").write_bytes(apple.ca_pem)
    arguments = [str(apple.port), key.key_id, key.team_id, str(tmp_path / "key.p8"), str(tmp_path / "ca.pem"), loop]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _SENDER,
        *arguments,
        env={**os.environ, crash.VARIABLE: "sent:1"},
        cwd=Path(__file__).parents[2],
    )
    async with asyncio.timeout(PATIENCE_S):
        assert await process.wait() == -9
    await until(lambda: apple.received)
