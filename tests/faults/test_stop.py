"""SIGTERM: what is in hand is answered, nothing is lost, nothing is sent twice."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import aiohttp
import msgspec
import pytest

from tests.faults.campaign import Campaign
from tests.faults.ledger import Bounds
from tests.faults.server import STOP_S

Opening = Callable[..., AbstractAsyncContextManager[Campaign]]


@pytest.mark.parametrize(
    "runs", [3, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])], ids=["few", "many"]
)
async def test_stopped_under_load(campaign: Opening, chance: random.Random, runs: int) -> None:
    async with campaign() as case:
        case.apple.delays(0.02)
        worst = 0.0
        for _ in range(runs):
            await case.server.start()
            pushed = asyncio.create_task(case.first_push(time.time()))
            case.load.give(1000)
            await asyncio.sleep(chance.uniform(0.0, 0.3))
            stopping_at = time.monotonic()
            assert await case.server.end(signal.SIGTERM) == 0, "\n".join(case.server.log)
            worst = max(worst, time.monotonic() - stopping_at)
            pushed.cancel()
            # What is known to be over stays over, after a stop as after a kill.
            await case.look()
        case.figures.runs = runs
        case.figures.remark = f"slowest stop {worst:.2f} s"
        assert worst < STOP_S
        await case.server.start()
        assert await case.finish(Bounds(duplicates=0), chance) == []


@pytest.mark.slow  # it takes what the deadlines of streams take
@pytest.mark.timeout(180)
async def test_stopped_while_nobody_answers(campaign: Opening, chance: random.Random) -> None:
    """Apple answers nothing, so all that was sent is open when the signal comes, and stays so."""
    async with campaign() as case:
        case.apple.withholds()
        await case.server.start()
        case.load.give(500)
        await case.load.done()
        stopping_at = time.monotonic()
        assert await case.server.end(signal.SIGTERM) == 0, "\n".join(case.server.log)
        case.figures.remark = f"stopped in {time.monotonic() - stopping_at:.2f} s"
        case.apple.behaves()
        case.figures.runs = 1
        await case.server.start()
        # These were acted on and never answered: there is nothing to know it by.
        assert await case.finish(Bounds(duplicates=500), chance) == []


async def test_stopped_while_a_request_is_half_here(campaign: Opening, chance: random.Random) -> None:
    async with campaign() as case:
        await case.server.start()
        body, wanted = case.load.make_one()
        case.load.note(wanted)
        host, port = case.server.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        authorization = case.server.authorization["Authorization"]
        head = (
            f"POST /v1/notifications HTTP/1.1\r\nHost: {host}\r\nAuthorization: {authorization}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body[:10])
        await writer.drain()
        # An answer on a second connection shows that the first half was read as well.
        async with aiohttp.ClientSession() as session, session.get(f"{case.server.url}/healthz") as response:
            assert response.status == 200
        case.server.send_signal(signal.SIGTERM)
        while not any('"stopping"' in line for line in case.server.log):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.01)
        writer.write(body[10:])
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 202 "), answer[:100]
        case.load.note_taken(wanted, [msgspec.json.decode(answer.partition(b"\r\n\r\n")[2])["id"]])
        assert await case.server.ended() == 0
        writer.close()
        case.figures.runs = 1
        await case.server.start()
        assert await case.finish(Bounds(duplicates=0), chance) == []


async def test_stopped_while_a_caller_waits_for_the_outcome(campaign: Opening, chance: random.Random) -> None:
    async with campaign() as case:
        case.apple.delays(1.0)
        await case.server.start()
        body, wanted = case.load.make_one()
        case.load.note(wanted)
        pushed = asyncio.create_task(case.first_push(time.time()))
        async with aiohttp.ClientSession(headers=case.server.authorization) as session:
            asking = asyncio.create_task(session.post(f"{case.server.url}/v1/notifications?wait=30", data=body))
            while not case.server.unfinished():  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.01)
            case.server.send_signal(signal.SIGTERM)
            response = await asking
            assert response.status in (200, 202)
            case.load.note_taken(wanted, [(await response.json())["id"]])
        assert await case.server.ended() == 0
        await pushed
        case.figures.runs = 1
        await case.server.start()
        assert await case.finish(Bounds(duplicates=0), chance) == []
