"""What Apple's side of the wire may do while notifications are in flight, and what may come of it."""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from itertools import pairwise
from typing import Any

import aiohttp
import pytest

from heliograph.model import State
from heliograph.protocols.http2 import ErrorCode, ServerConnection
from heliograph.simulator.faults import Answer, Cut, Delay, GoAway, Reset, StreamLimit
from tests.faults.campaign import Apple, Campaign
from tests.faults.ledger import Bounds, Submitted

Opening = Callable[..., AbstractAsyncContextManager[Campaign]]

whole = [pytest.mark.slow, pytest.mark.timeout(900)]


async def send(case: Campaign, count: int) -> float:
    """Start the server and give it so much to send; when that was, in UNIX seconds."""
    since = time.time()
    await case.server.start()
    case.load.give(count)
    return since


# -- GOAWAY and resets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times, count", [(10, 1500), pytest.param(100, 10_000, marks=whole)], ids=["few", "many"])
async def test_goaway_with_streams_left_out(campaign: Opening, chance: random.Random, times: int, count: int) -> None:
    async with campaign() as case:
        # Each connection says goodbye at its 200th stream, and leaves out half of them: the delay keeps them in flight.
        case.apple.misbehaves(GoAway("Shutdown", newest=110), stream=399, times=times)
        case.apple.delays(0.05)
        since = await send(case, count)
        assert await case.finish(Bounds(duplicates=0), chance, counted_since=since) == []
        assert {receipt.state for receipt in case.receipts.values()} == {State.ACCEPTED}
        assert {receipt.attempts for receipt in case.receipts.values()} == {1}
        assert case.apple.connections > times, "not every goodbye was said"
        left_out = case.lives[0].answers["not processed"]
        assert left_out >= 100 * times
        case.figures.runs = 1
        case.figures.remark = f"{times} times GOAWAY, {left_out} streams left out"


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=whole)], ids=["few", "many"])
@pytest.mark.parametrize(
    "reset",
    [
        Reset(ErrorCode.REFUSED_STREAM),
        Reset(ErrorCode.INTERNAL_ERROR),
        Reset(ErrorCode.CANCEL),
        Reset(ErrorCode.INTERNAL_ERROR, acted=True),
    ],
    ids=["REFUSED_STREAM", "INTERNAL_ERROR", "CANCEL", "INTERNAL_ERROR after acting"],
)
async def test_a_tenth_of_streams_reset(campaign: Opening, chance: random.Random, reset: Reset, count: int) -> None:
    async with campaign() as case:
        case.apple.misbehaves(reset, share=0.1)
        since = await send(case, count)
        # One in ten is tried again, and one in ten of these.
        bound = count // 5 if reset.acted else 0
        assert await case.finish(Bounds(duplicates=bound), chance, counted_since=since) == []
        assert {receipt.state for receipt in case.receipts.values()} == {State.ACCEPTED}
        if reset.code == ErrorCode.REFUSED_STREAM:
            assert {receipt.attempts for receipt in case.receipts.values()} == {1}
        case.figures.runs = 1


# -- unknown outcomes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_most_once", [False, True], ids=["again", "at most once"])
@pytest.mark.parametrize("times, count", [(5, 1000), pytest.param(50, 10_000, marks=whole)], ids=["few", "many"])
async def test_connection_cut_before_the_answer(
    campaign: Opening, chance: random.Random, times: int, count: int, *, at_most_once: bool
) -> None:
    async with campaign() as case:
        case.load.at_most_once = at_most_once
        case.apple.misbehaves(Cut(), share=times / count, times=times)
        case.apple.delays(0.01)
        since = await send(case, count)
        bound = 0 if at_most_once else times
        assert await case.finish(Bounds(duplicates=bound), chance, counted_since=since) == []
        ends = {receipt.state for receipt in case.receipts.values()}
        assert ends == {State.ACCEPTED, State.UNKNOWN} if at_most_once else {State.ACCEPTED}
        case.figures.runs = 1


# -- limits ------------------------------------------------------------------------------------------------------


class Strict(ServerConnection):
    """Notes what came above a limit that the client had acknowledged."""

    def __init__(self, *arguments: Any, above: list[int], **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._above = above

    def _refuse(self, stream_id: int) -> None:
        self._above.append(stream_id)
        super()._refuse(stream_id)


def watch(apple: Apple, above: list[int]) -> None:
    """Have every new connection note in `above` what came above its limit."""
    make = apple._new_core

    def new_core(now: float) -> ServerConnection:
        plain = make(now)
        return Strict(now, max_streams=apple.first_streams, limits=plain.limits, above=above)

    apple._new_core = new_core  # type: ignore[method-assign]


@pytest.mark.parametrize("count", [500, pytest.param(5000, marks=whole)], ids=["few", "many"])
async def test_one_stream_at_a_time(campaign: Opening, chance: random.Random, count: int) -> None:
    above: list[int] = []
    async with campaign(streams=1) as case:
        watch(case.apple, above)
        since = await send(case, count)
        assert await case.finish(Bounds(), chance, counted_since=since) == []
        case.figures.runs = 1
    assert above == []


@pytest.mark.parametrize("count", [2000, pytest.param(20_000, marks=whole)], ids=["few", "many"])
async def test_stream_limit_that_falls_to_one_and_rises(campaign: Opening, chance: random.Random, count: int) -> None:
    above: list[int] = []
    async with campaign() as case:
        watch(case.apple, above)
        answer = Delay(0.005)
        case.apple.delays(0.005)
        since = await send(case, count)
        await case.first_push(since)
        case.apple.behaves()
        case.apple.misbehaves(StreamLimit(1, then=answer), times=100)
        case.apple.misbehaves(StreamLimit(500, then=answer))
        assert await case.finish(Bounds(), chance, counted_since=since) == []
        case.figures.runs = 1
    assert above == []


# -- refusals ----------------------------------------------------------------------------------------------------


async def test_only_the_token_that_had_too_many_requests_waits(campaign: Opening, chance: random.Random) -> None:
    async with campaign() as case:
        busy = "ab" * 32
        case.apple.rejects(busy, "TooManyRequests", retry_after_s=2, times=15)
        since = await send(case, 0)
        async with aiohttp.ClientSession() as session:
            for _ in range(10):
                assert await case.load.post(session, *case.load.make_one(busy))
        case.load.give(2000)
        assert await case.finish(Bounds(), chance, counted_since=since) == []
        tries: dict[str | None, list[float]] = defaultdict(list)
        for line in case.judged:
            tries[line.apns_id].append(line.at)
            assert line.status == 200 or line.token == busy
        for times in tries.values():
            assert all(later - sooner >= 2.0 for sooner, later in pairwise(times))
        assert sum(line.status == 429 for line in case.judged) == 15
        case.figures.runs = 1


@pytest.mark.parametrize(
    "seconds, count, share",
    [(2.0, 500, 1.0), pytest.param(10.0, 20_000, 0.2, marks=whole)],
    ids=["short", "long"],
)
@pytest.mark.parametrize("status, reason", [(500, "InternalServerError"), (503, "ServiceUnavailable")])
async def test_storm_of_apples_own_trouble(
    campaign: Opening, chance: random.Random, status: int, reason: str, seconds: float, count: int, share: float
) -> None:
    async with campaign() as case:
        await case.server.start()
        since = time.time()
        until = since + seconds
        case.apple.misbehaves(Answer(status, reason, retry_after_s=1), share=share, until=until)
        for _ in range(10):
            case.load.give(count // 10)
            await asyncio.sleep(seconds / 10)
        case.load.give(100)
        await case.first_push(until)
        assert await case.finish(Bounds(retries_per_s=100.0), chance, counted_since=since) == []
        assert {receipt.state for receipt in case.receipts.values()} == {State.ACCEPTED}
        case.figures.runs = 1
        case.figures.remark = f"{len(case.judged) - len(case.receipts)} retries"


async def test_poison_among_good_ones(campaign: Opening, chance: random.Random) -> None:
    async with campaign() as case:
        bad, large = "ba" * 32, "1a" * 32
        case.apple.rejects(bad, "BadDeviceToken")
        case.apple.rejects(large, "PayloadTooLarge")
        since = await send(case, 500)
        poison: list[Submitted] = []
        async with aiohttp.ClientSession() as session:
            for token in (bad, large):
                body, wanted = case.load.make_one(token)
                assert await case.load.post(session, body, wanted)
                poison += wanted
        assert await case.finish(Bounds(), chance, counted_since=since) == []
        poisoned = {name for name, what in case.load.taken.items() if what in poison}
        for name, receipt in case.receipts.items():
            assert receipt.state is (State.REJECTED if name in poisoned else State.ACCEPTED)
            assert receipt.attempts == 1
        case.figures.runs = 1
