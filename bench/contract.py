"""What a contestant is told and what it tells: the same for a program in any language.

A contestant is a command line. Its task comes in the environment:

| variable | meaning |
|---|---|
| `BENCH_PORT` | the far side listens on 127.0.0.1 here: TLS, ALPN h2 |
| `BENCH_N` | notifications to send and to measure; each must be answered 200 |
| `BENCH_WARM` | notifications to send before, unmeasured |
| `BENCH_CONNECTIONS`, `BENCH_STREAMS` | connections, and requests in flight on each |
| `BENCH_DATA` | the folder described in `pki.py`: CA, signing key, payload |
| `BENCH_TOKENS` | the file of device tokens; start over when it ends |

It prints one line of JSON: `name`, `version`, `n`, `ok` (answers with status 200), `secs` and `cpu` (wall and CPU
seconds of the measured N only, user and system, its own and its children's), `rss_mb` (highest resident memory). It
ends with a status other than 0 when an answer was not 200. Reading tokens and making what is to be sent may happen
before the clock starts, in the form in which the contestant's library takes it; turning that into bytes is measured.
"""

from __future__ import annotations

import itertools
import os
import resource
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec


class Task(msgspec.Struct, frozen=True):
    port: int
    n: int
    warm: int
    connections: int
    streams: int
    data: Path
    tokens: Path

    def environment(self) -> dict[str, str]:
        return {f"BENCH_{name.upper()}": str(getattr(self, name)) for name in self.__struct_fields__}

    @classmethod
    def from_environment(cls) -> Task:
        given = {name: os.environ[f"BENCH_{name.upper()}"] for name in cls.__struct_fields__}
        return msgspec.convert(given, cls, strict=False, dec_hook=lambda kind, value: kind(value))

    def device_tokens(self, count: int) -> list[str]:
        return list(itertools.islice(itertools.cycle(self.tokens.read_text().split()), count))

    def payload(self) -> bytes:
        return (self.data / "body.json").read_bytes()


class Answer(msgspec.Struct, frozen=True):
    name: str
    n: int
    ok: int
    secs: float
    cpu: float
    rss_mb: float
    version: str = ""


class Meter:
    """Wall and CPU time of a `with` block."""

    secs = 0.0
    cpu = 0.0

    def __enter__(self) -> Self:
        self._cpu, self._wall = cpu_used(), time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.secs, self.cpu = time.perf_counter() - self._wall, cpu_used() - self._cpu


def cpu_used() -> float:
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, who))


def peak_rss_mb(pid: int | str = "self") -> float:
    """Highest resident memory of a living process so far.

    Not from getrusage, which on Linux starts with that of the process that started this one.
    """
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0


def tell(name: str, version: str, task: Task, ok: int, meter: Meter, rss_mb: float | None = None) -> None:
    """Print the answer and end the program."""
    if rss_mb is None:
        rss_mb = peak_rss_mb()
    answer = Answer(name, task.n, ok, meter.secs, meter.cpu, rss_mb, version)
    print(msgspec.json.encode(answer).decode(), flush=True)
    sys.exit(0 if ok == task.n else 1)
