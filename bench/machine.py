"""The machine under the figures: cores, what it is, what a process used."""

from __future__ import annotations

import os
import platform
import socket
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

CONTESTANT_CORE = 0
FAR_SIDE_CORE = 1
PROC = Path("/proc")


def pinning() -> str | None:
    """Why processes cannot be pinned to two cores here, as one sentence; None where they can."""
    if not hasattr(os, "sched_setaffinity"):
        return "not pinned: this system cannot bind processes to cores, so expect more noise"
    if not {CONTESTANT_CORE, FAR_SIDE_CORE} <= os.sched_getaffinity(0):
        return "not pinned: fewer than two cores, so both sides share one and the rates mean little"
    return None


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """What is started inside inherits this core; the caller itself moves back afterwards."""
    if pinning() is not None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def describe() -> dict[str, str]:
    """Facts without which a figure is an anecdote."""
    facts = {
        "machine": f"{platform.system()} {platform.release()}, {_processor()}, {os.cpu_count()} cores",
        "python": f"{platform.python_implementation()} {platform.python_version()}, {ssl.OPENSSL_VERSION}",
        "command": "python -m bench " + " ".join(sys.argv[1:]),
    }
    if hasattr(os, "getloadavg"):
        # other work on the machine shows here before it shows in the spread
        facts["load before"] = f"{os.getloadavg()[0]:.2f}"
    note = pinning()
    facts["cores"] = note or f"contestant on core {CONTESTANT_CORE}, far side on core {FAR_SIDE_CORE}"
    return facts


def _processor() -> str:
    info = PROC / "cpuinfo"
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def free_port() -> int:
    """A TCP port that was free a moment ago, for servers that cannot say which one they took."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cpu_of_tree(pid: int) -> float:
    """CPU seconds, user and system, of a process and all its living descendants (Linux only).

    Resolution is the kernel's clock tick (10 ms), so measure for a second or more.
    """
    ticks = 0
    for member in _tree(pid):
        # the name (second field) may hold spaces and brackets: count fields from the last bracket on
        fields = (PROC / str(member) / "stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class ThreadsCpu(NamedTuple):
    """CPU seconds of a process, by thread. Python 3.11 does not tell the system its threads' names."""

    loop: float
    """The main thread: the event loop."""
    writer: float
    """The busiest of the others: SQLite's writer, where something is stored."""
    rest: float

    @property
    def total(self) -> float:
        return self.loop + self.writer + self.rest

    def minus(self, before: ThreadsCpu) -> ThreadsCpu:
        return ThreadsCpu(*(now - then for now, then in zip(self, before, strict=True)))


def cpu_of_threads(pid: int) -> ThreadsCpu:
    """As `cpu_of_tree`, for one process by threads; those that ended are left out."""
    used = {}
    for thread in (PROC / str(pid) / "task").iterdir():
        fields = (thread / "stat").read_text().rpartition(")")[2].split()
        used[int(thread.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    loop = used.pop(pid)
    others = sorted(used.values(), reverse=True) or [0.0]
    return ThreadsCpu(loop, others[0], sum(others[1:]))


def memory_mb(pid: int) -> tuple[float, float]:
    """Resident memory of a process in MB: now, and the most since its start or `forget_peak`."""
    status = dict(line.split(":", 1) for line in (PROC / str(pid) / "status").read_text().splitlines())
    now, peak = (int(status[field].split()[0]) / 1024 for field in ("VmRSS", "VmHWM"))
    return now, peak


def forget_peak(pid: int) -> None:
    (PROC / str(pid) / "clear_refs").write_text("5")  # proc(5): sets the peak to what is resident now


def sync_ms(folder: Path) -> float:
    """How long a small durable write takes here: the floor under every commit."""
    times = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(50):
            began = time.perf_counter()
            os.write(file.fileno(), bytes(4096))
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


def rss_of_tree_mb(pid: int) -> float:
    """Resident memory of a process and its descendants, in MB, at its highest so far."""
    kb = 0
    for member in _tree(pid):
        for line in (PROC / str(member) / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                kb += int(line.split()[1])
    return kb / 1024


def _tree(pid: int) -> Iterator[int]:
    yield pid
    children = PROC / str(pid) / "task"
    for thread in children.iterdir():
        for child in (thread / "children").read_text().split():
            yield from _tree(int(child))
