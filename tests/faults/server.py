"""`heliograph serve` as a process that can be stopped, killed and started again, and looked into from outside."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Collection, Mapping
from pathlib import Path

import apsw
from prometheus_client.parser import text_string_to_metric_families

from heliograph.crash import VARIABLE
from heliograph.model import Receipt
from heliograph.simulator.server import Simulator
from heliograph.stores.sqlite import SqliteStore

APP = "example"
TOPIC = "com.example.app"
START_S = 20.0
STOP_S = 30.0
"""Longer, and the promise of a clean stop is broken."""
_SAMPLE_S = 0.1
_SHOWN = 100
"""Lines of the log that are kept to be shown."""


class Server:
    """One data folder, and one process at a time on it."""

    def __init__(self, folder: Path, apple: Simulator, more: str = "") -> None:
        """`more` is added to the configuration."""
        self._folder = folder
        self.data = folder / "heliograph-data"
        (folder / "ca.pem").write_bytes(apple.ca_pem)
        key = folder / f"AuthKey_{apple.signing_key.key_id}.p8"
        key.touch(0o600)
        key.write_bytes(apple.signing_key.pem)
        (folder / "heliograph.toml").write_text(
            f'[api]\nport = 0\n[apps.{APP}]\ntopic = "{TOPIC}"\nkey = "{key.name}"\n'
            f'team_id = "{apple.signing_key.team_id}"\nhost = "localhost"\nport = {apple.port}\nca = "ca.pem"\n{more}'
        )
        self._process: asyncio.subprocess.Process | None = None
        self.url = ""
        self.up = asyncio.Event()
        """Set while a process takes requests, as far as we know."""
        self.spawned_at = 0.0
        """UNIX seconds at which the last process was started."""
        self.rss_bytes = 0
        self.descriptors = 0
        """The most that any process had so far."""
        self.log: deque[str] = deque(maxlen=_SHOWN)

    async def spawn(self, crash_at: str | None = None) -> None:
        """Start a process; `crash_at` is a named instant to die at (`heliograph.crash`)."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith("HELIOGRAPH_")}
        if crash_at is not None:
            environ[VARIABLE] = crash_at
        self.spawned_at = time.time()
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "heliograph", "serve", "--log-format", "json"),
            cwd=self._folder,
            env=environ,
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            limit=1024 * 1024,
        )
        self._reader = asyncio.create_task(self._read())
        self._watcher = asyncio.create_task(self._watch())

    async def start(self, crash_at: str | None = None) -> bool:
        """Start a process and wait until it takes requests. False where it was killed before, as was wanted."""
        await self.spawn(crash_at)
        return await self.started()

    async def started(self) -> bool:
        up = asyncio.create_task(self.up.wait())
        await asyncio.wait((up, self._reader), timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        up.cancel()
        assert self._process is not None
        assert self.up.is_set() or await self._process.wait() == -signal.SIGKILL, "\n".join(self.log)
        return self.up.is_set()

    def send_signal(self, how: signal.Signals) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(how)

    async def ended(self) -> int:
        """Wait for the end of the process: its exit code, or minus the signal that killed it."""
        try:
            await asyncio.shield(self._reader)  # others may wait for it too
            assert self._process is not None
            return await self._process.wait()
        finally:
            self.up.clear()
            self._watcher.cancel()

    async def end(self, how: signal.Signals) -> int:
        self.send_signal(how)
        async with asyncio.timeout(STOP_S):
            return await self.ended()

    async def kill(self) -> None:
        """End a process that may be there."""
        if self._process is not None and self._process.returncode is None:
            await self.end(signal.SIGKILL)

    @property
    def authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {(self.data / 'api-key').read_text().strip()}"}

    def unfinished(self) -> int:
        """Notifications in batches that are not finished, read from the file beside the running server."""
        with contextlib.closing(apsw.Connection(str(self.data / "heliograph.db"), apsw.SQLITE_OPEN_READONLY)) as db:
            db.set_busy_timeout(5000)
            return int(db.execute("SELECT total(size) FROM job WHERE due_at IS NOT NULL").get)

    async def export(self, ids: Collection[str]) -> dict[str, Receipt]:
        """The receipts as the files of a dead process have them; the files stay as they are."""
        with tempfile.TemporaryDirectory(dir=self._folder) as copied:
            for file in self.data.glob("heliograph.db*"):
                shutil.copy(file, copied)
            store = await SqliteStore.open(Path(copied) / "heliograph.db")
            try:
                found = await store.find_receipts(list(ids))
            finally:
                await store.aclose()
        return {receipt.id: receipt for receipt in found if receipt is not None}

    async def _read(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            self.log.append(line.decode(errors="replace").rstrip())
            if not self.up.is_set() and b'"url"' in line:
                self.url = json.loads(line)["url"]
                self.up.set()
        self.up.clear()

    async def _watch(self) -> None:
        assert self._process is not None
        process = Path("/proc", str(self._process.pid))
        with contextlib.suppress(OSError, ValueError, IndexError):  # it is gone
            while True:
                pages = int((process / "statm").read_text().split()[1])
                self.rss_bytes = max(self.rss_bytes, pages * os.sysconf("SC_PAGE_SIZE"))
                self.descriptors = max(self.descriptors, len(list((process / "fd").iterdir())))
                await asyncio.sleep(_SAMPLE_S)


def read_counters(metrics: str) -> tuple[int, Mapping[str, int]]:
    """How many were taken, and the answers by word, from the text of /metrics."""
    taken = 0
    answers: dict[str, int] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == "heliograph_taken_total":
                taken += int(sample.value)
            elif sample.name == "heliograph_answers_total":
                word = sample.labels["outcome"]
                answers[word] = answers.get(word, 0) + int(sample.value)
    return taken, answers
