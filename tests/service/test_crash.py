"""The promise: what got a 202 is not lost, and is sent with the same id, whatever kills the server."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path

import aiohttp
import pytest

from heliograph.simulator.server import Simulator
from tests.service.house import PATIENCE_S, TOPIC, token

STREAMS = 1000 * 4
"""What may be in flight at a kill: connections times streams."""
UNRECORDED = 2000
"""Answered, but not recorded yet."""


class Server:
    """`heliograph serve` as a process that can be killed and started again."""

    def __init__(self, folder: Path, apple: Simulator) -> None:
        self._folder = folder
        (folder / "ca.pem").write_bytes(apple.ca_pem)
        key = folder / f"AuthKey_{apple.signing_key.key_id}.p8"
        key.touch(0o600)
        key.write_bytes(apple.signing_key.pem)
        (folder / "heliograph.toml").write_text(
            f'[api]\nport = 0\n[apps.example]\ntopic = "{TOPIC}"\nkey = "{key.name}"\n'
            f'team_id = "{apple.signing_key.team_id}"\nhost = "localhost"\nport = {apple.port}\nca = "ca.pem"\n'
        )
        self.url = ""

    async def start(self) -> None:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("HELIOGRAPH_")}
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "heliograph", "serve", "--log-format", "json"),
            cwd=self._folder,
            env=plain,
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        assert self._process.stderr is not None
        line = b""
        async with asyncio.timeout(PATIENCE_S):
            while b'"url"' not in line:
                line = await self._process.stderr.readline()
        self.url = json.loads(line)["url"]
        self._reader = asyncio.create_task(self._process.stderr.read())

    async def end(self, how: signal.Signals) -> int:
        self._process.send_signal(how)
        await self._reader
        return await self._process.wait()

    @property
    def authorization(self) -> dict[str, str]:
        key = (self._folder / "heliograph-data" / "api-key").read_text().strip()
        return {"Authorization": f"Bearer {key}"}


async def push_until_it_dies(server: Server, first: int, taken: dict[str, str]) -> int:
    """Post batches until the server is gone; notes the ids that got a 202. Returns the next free number."""
    async with aiohttp.ClientSession(headers=server.authorization) as session:
        while True:
            tokens = [token(number) for number in range(first, first + 500)]
            first += 500
            body = {"tokens": tokens, "payload": {"aps": {"alert": f"from {first}"}}}
            try:
                async with session.post(f"{server.url}/v1/notifications", json=body) as response:
                    assert response.status == 202
                    ids = (await response.json())["ids"]
            except (aiohttp.ClientError, ConnectionError):
                return first
            taken |= zip(ids, tokens, strict=True)


async def outcome_of(session: aiohttp.ClientSession, url: str) -> dict[str, object]:
    async with session.get(url) as response:
        assert response.status == 200, url
        return dict(await response.json())


@pytest.mark.parametrize(
    "kills", [3, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(900)])], ids=["few", "many"]
)
async def test_a_killed_server_loses_nothing_that_had_its_202(tmp_path: Path, kills: int) -> None:
    seed = int(os.environ.get("SEED") or random.randrange(2**32))
    print(f"again with SEED={seed}")  # noqa: T201 - shown where the test fails
    chance = random.Random(seed)
    taken: dict[str, str] = {}
    async with Simulator(keep=10_000_000) as apple:
        apple.add_app(TOPIC)
        server = Server(tmp_path, apple)
        first = 0
        for _ in range(kills):
            await server.start()
            pushing = asyncio.create_task(push_until_it_dies(server, first, taken))
            await asyncio.sleep(chance.uniform(0.0, 0.5))
            assert await server.end(signal.SIGKILL) == -signal.SIGKILL
            first = await pushing
        await server.start()
        async with aiohttp.ClientSession(headers=server.authorization) as session, asyncio.timeout(PATIENCE_S * 2):
            missing = set(taken)
            while missing:
                await asyncio.sleep(0.05)
                missing -= {received.id for received in apple.received}
            for notification_id in chance.sample(sorted(taken), min(50, len(taken))):
                url = f"{server.url}/v1/notifications/{notification_id}"
                while (receipt := await outcome_of(session, url))["state"] == "queued":  # noqa: ASYNC110 - over HTTP
                    await asyncio.sleep(0.05)
                assert receipt["state"] == "accepted"
        assert await server.end(signal.SIGTERM) == 0
        sent = Counter(received.id for received in apple.received)
        tokens = {received.id: received.token for received in apple.received}
    assert taken, "nothing was taken before the kills: the test proved nothing"
    assert {notification_id: tokens[notification_id] for notification_id in taken} == taken
    assert sum(sent.values()) - len(sent) <= kills * (STREAMS + UNRECORDED)
