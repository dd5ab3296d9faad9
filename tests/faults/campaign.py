"""A case: Apple's simulator, a server process, a client and the ledger of the three, from start to verdict."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from msgspec import Struct

from heliograph.model import Receipt
from heliograph.protocols.http2 import Field
from heliograph.simulator.apple import Verdict, Visit
from heliograph.simulator.faults import Answer
from heliograph.simulator.server import Judged, Simulator
from tests.faults.ledger import (
    ENDS,
    Bounds,
    ClientFile,
    Ledger,
    Life,
    Settled,
    Violation,
    check,
    duplicates,
    lost,
    read_journal,
)
from tests.faults.load import Load
from tests.faults.server import TOPIC, Server, read_counters

CONNECTIONS = 4
STREAMS = 1000
UNRECORDED = 500
"""Receipts that may be on their way to the disk when a process dies."""
BOUND = CONNECTIONS * STREAMS + UNRECORDED
"""Duplicates that one death may cost."""
PATIENCE_S = 60.0
"""So long after the last fault, nothing may be left waiting."""
_ASKED = 50
"""Receipts that are asked for over the API as well."""


class Figures(Struct):
    """A line of the table that is printed at the end."""

    case: str
    seed: int
    runs: int = 0
    kills: int = 0
    notifications: int = 0
    lost: int = 0
    duplicates: int = 0
    most: int = 0
    """Duplicates that one kill cost, as the next."""
    bound: int = 0
    recovery_s: float = 0.0
    """From the worst start of a process, or end of a fault, to the next push."""
    remark: str = ""


class Apple(Simulator):
    """A simulator that tells when the first request comes after a moment."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.judged = asyncio.Event()

    def judge(
        self,
        visit: Visit,
        fields: Sequence[Field],
        body: bytes,
        now: float,
        instead: Answer | None = None,
        identifier: int | None = None,
    ) -> Verdict:
        self.judged.set()
        return super().judge(visit, fields, body, now, instead, identifier)


class Campaign:
    def __init__(
        self, apple: Apple, server: Server, load: Load, file: ClientFile, journal: Path, figures: Figures
    ) -> None:
        self.apple = apple
        self.server = server
        self.load = load
        self.figures = figures
        self._file = file
        self._journal = journal
        self.lives: list[Life] = []
        """The counters of processes that came to an end in order."""
        self._settled: set[str] = set()
        self._deaths: list[float] = []
        self.receipts: dict[str, Receipt] = {}
        """After `finish`: the server's last word."""
        self.judged: list[Judged] = []
        """After `finish`: what Apple saw."""

    async def first_push(self, since: float) -> None:
        """Wait until Apple gets a request; how long that took since then counts as a recovery."""
        self.apple.judged.clear()
        async with asyncio.timeout(PATIENCE_S):
            await self.apple.judged.wait()
        self.figures.recovery_s = max(self.figures.recovery_s, time.time() - since)

    async def look(self, *, killed: bool = False) -> None:
        """Note, between two processes, which receipts on the disk have an end: none of these may be sent again."""
        if killed:
            self.figures.kills += 1
            self._deaths.append(time.time())
        receipts = await self.server.export(self.load.taken.keys() - self._settled)
        now = time.time()
        new = [receipt.id for receipt in receipts.values() if receipt.state in ENDS]
        self._settled.update(new)
        self._file.write([Settled(each, now) for each in new])

    async def settle(self, *, counted_since: float | None = None) -> int:
        """Wait until nothing is waiting, for `PATIENCE_S` at most; how many still do.

        `counted_since`: the counters of this process are held against what was seen from then on.
        """
        await self.load.done()
        until = time.monotonic() + PATIENCE_S
        while (left := self.server.unfinished()) and time.monotonic() < until:  # noqa: ASYNC110 - in another process
            await asyncio.sleep(0.05)
        if counted_since is not None:
            async with aiohttp.ClientSession() as session, session.get(f"{self.server.url}/metrics") as response:
                taken, answers = read_counters(await response.text())
            self.lives.append(Life(counted_since, time.time(), taken, answers))
        return left

    async def ask(self, session: aiohttp.ClientSession, id: str) -> str | None:
        """The state of a notification as the API tells it; None where it knows of none."""
        url = f"{self.server.url}/v1/notifications/{id}"
        async with session.get(url, headers=self.server.authorization) as response:
            assert response.status in (200, 404), url
            return str((await response.json())["state"]) if response.status == 200 else None

    async def finish(
        self, bounds: Bounds, chance: random.Random, *, counted_since: float | None = None, purged: bool = False
    ) -> list[Violation]:
        """Wait for the end of everything, stop the server, and compare what was written down.

        `purged`: receipts that were seen with an end may be gone.
        """
        left = await self.settle(counted_since=counted_since)
        names = sorted(self.load.taken.keys() - self._settled if purged else self.load.taken)
        asked = chance.sample(names, min(_ASKED, len(names)))
        async with aiohttp.ClientSession() as session:
            told = {each: await self.ask(session, each) for each in asked}
        assert await self.server.end(signal.SIGTERM) == 0, "\n".join(self.server.log)
        submitted, taken, settled = self._file.read()
        self.judged = judged = read_journal(self._journal)
        ids = {str(line.apns_id) for line in judged} | {each.apns_id for each in taken}
        self.receipts = await self.server.export(ids)
        known = {each: receipt.state.name.lower() for each, receipt in self.receipts.items()}
        assert {each: known.get(each) for each in asked} == told
        ledger = Ledger(
            submitted,
            taken,
            settled,
            judged,
            self.receipts,
            self.lives,
            left,
            self.server.rss_bytes,
            self.server.descriptors,
            purged,
            self._deaths,
        )
        figures = self.figures
        figures.notifications = len(taken)
        figures.lost = lost(ledger)
        figures.duplicates = sum(duplicates(ledger))
        figures.most = max(duplicates(ledger))
        figures.bound = bounds.duplicates
        assert self.load.refused == []
        assert taken, "nothing was taken: the case proved nothing"
        return check(ledger, bounds)


@asynccontextmanager
async def open_campaign(
    folder: Path, figures: Figures, chance: random.Random, *, configuration: str = "", **settings: Any
) -> AsyncIterator[Campaign]:
    """All parts but a running process; `settings` are the simulator's."""
    journal = folder / "journal"
    with ClientFile(folder / "client") as file:
        async with Apple(journal=journal, keep=0, **settings) as apple:
            apple.add_app(TOPIC)
            apple.dice.seed(chance.random())
            server = Server(folder, apple, configuration)
            try:
                async with Load(server, file, chance) as load:
                    yield Campaign(apple, server, load, file, journal, figures)
            finally:
                await server.kill()
