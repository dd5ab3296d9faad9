"""What a long queue costs: resident memory while Apple is away and while the queue drains, and the time to a start.

Twice for each way of asking. First, Apple comes back to the process that took everything. Then, everything is taken
once more and a new process finds it, with Apple there.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from bench.building import BUILD, Absent, say
from bench.far_side import sink
from bench.load import load
from bench.machine import FAR_SIDE_CORE, PROC, forget_peak, free_port, memory_mb, on_core
from bench.rounds import Cell, Options, Report, Spread, header
from bench.serving import Server, await_accepted, await_listening, heliograph, individual, post_all, shared_payload

ROUNDS = 1
"""By default: a round takes minutes, and memory varies little."""
NUMBER = 1_000_000
BATCH = 1000
SINGLES = 0.2
"""Of the number, where each is a request of its own."""
REST_S = 1.0
"""How long the server is left alone before its memory is read."""
PATIENCE_S = 600.0
POLL_S = 0.05

Body = Callable[[Sequence[str], bytes], bytes]


class Shape(msgspec.Struct, frozen=True):
    name: str
    share: float
    body: Body | None
    """Makes a request of a batch; None: a request for each."""


SHAPES = (
    Shape("1,000 notifications a request", 1.0, individual),
    Shape("one payload, 1,000 tokens a request", 1.0, shared_payload),
    Shape("one notification a request", SINGLES, None),
)


class Run(msgspec.Struct, frozen=True):
    """Memory in MB, times in seconds."""

    idle_mb: float
    taking_mb: float
    """The most while all were taken."""
    queued_mb: float
    draining_mb: float
    """The most while they were sent."""
    drained_mb: float
    first_s: float
    """From Apple's return to its first request."""
    drain_s: float
    """From its first request until the last was accepted."""
    start_s: float
    """From the start of a process that found all of them to the first request that Apple got."""
    started_mb: float
    """The most that this process had until all were sent."""


def run(options: Options) -> Report:
    if not PROC.exists():
        raise Absent("the server's memory is read from /proc, which this system does not have")
    number = options.number or NUMBER
    report = Report(
        "memory",
        header(
            far_side="bench/sink.c, TLS 1.3, answers at once; nothing listens while Apple is away",
            rounds=options.rounds,
            notifications=f"{number:,}; where each is a request of its own {int(number * SINGLES):,}; 120 octets each",
        ),
    )
    for shape in SHAPES:
        count = _count(shape, number)
        runs = []
        for turn in range(options.rounds):
            one = _run_once(shape, count, options)
            runs.append(one)
            figures = f"queued {one.queued_mb:.0f} MB, draining {one.draining_mb:.0f} MB, start {one.start_s:.1f} s"
            say(f"round {turn + 1} of {options.rounds}: {shape.name}: {figures}")
        row: dict[str, Cell] = {"queued as": shape.name, "queued": count}
        columns: dict[str, Callable[[Run], float]] = {
            "idle MB": lambda one: one.idle_mb,
            "most, taking": lambda one: one.taking_mb,
            "queued MB": lambda one: one.queued_mb,
            "most, draining": lambda one: one.draining_mb,
            "drained MB": lambda one: one.drained_mb,
            "drained / s": lambda one, count=count: count / one.drain_s,  # type: ignore[misc]
            "Apple is back: first sent s": lambda one: one.first_s,
            "new process: first sent s": lambda one: one.start_s,
            "most, new process": lambda one: one.started_mb,
        }
        report.rows.append(row | {title: Spread.of([figure(one) for one in runs]) for title, figure in columns.items()})
    report.notes.append(
        "Resident memory as the system counts it; each process is a fresh one with a fresh data folder."
    )
    return report


def _count(shape: Shape, number: int) -> int:
    """Full batches only."""
    count = int(number * shape.share)
    return max(1, count) if shape.body is None else max(1, count // BATCH) * BATCH


def _run_once(shape: Shape, count: int, options: Options) -> Run:
    port = free_port()
    with tempfile.TemporaryDirectory(dir=BUILD) as folder, heliograph(Path(folder), options.data, port) as server:
        await_listening(server)
        time.sleep(REST_S)
        idle_mb = memory_mb(server.pid)[0]
        _enqueue(server, shape, count, options)
        time.sleep(REST_S)
        queued_mb, taking_mb = memory_mb(server.pid)
        forget_peak(server.pid)
        with sink(options.data, port=port) as apple:
            back_ns = time.monotonic_ns()
            await_accepted(server, count, patience_s=PATIENCE_S, pause_s=POLL_S)
            drained_ns = time.monotonic_ns()
        draining_mb = memory_mb(server.pid)[1]
        time.sleep(REST_S)
        drained_mb = memory_mb(server.pid)[0]
    first_ns = apple.must_have(count).first_ns
    start_s, started_mb = _restarted(shape, count, options)
    return Run(
        idle_mb,
        taking_mb,
        queued_mb,
        draining_mb,
        drained_mb,
        (first_ns - back_ns) / 1e9,
        (drained_ns - first_ns) / 1e9,
        start_s,
        started_mb,
    )


def _restarted(shape: Shape, count: int, options: Options) -> tuple[float, float]:
    """Seconds from a process's start to its first request to Apple, and its most memory until all were sent."""
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        with heliograph(Path(folder), options.data, free_port()) as server:
            await_listening(server)
            _enqueue(server, shape, count, options)
        with sink(options.data) as apple:
            began_ns = time.monotonic_ns()
            with heliograph(Path(folder), options.data, apple.port) as server:
                await_listening(server)
                await_accepted(server, count, patience_s=PATIENCE_S, pause_s=POLL_S)
                most_mb = memory_mb(server.pid)[1]
    return (apple.must_have(count).first_ns - began_ns) / 1e9, most_mb


def _enqueue(server: Server, shape: Shape, count: int, options: Options) -> None:
    if shape.body is None:
        load(server, options.data, number=count)
        return
    with on_core(FAR_SIDE_CORE):
        post_all(server, _bodies(shape.body, count, options))


def _bodies(body: Body, count: int, options: Options) -> Iterator[bytes]:
    tokens = itertools.cycle(options.tokens.read_text().split())
    payload = (options.data / "body.json").read_bytes()
    for _ in range(count // BATCH):
        yield body(list(itertools.islice(tokens, BATCH)), payload)
