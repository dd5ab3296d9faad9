"""The whole way: JSON in by HTTP, durable in SQLite (FULL), out by Apple's wire, receipts durable.

The server has a core; the client that posts and the far side share the other. The clock stops when the metrics say that
all are answered and the receipts of the last batch, and of a sample of all, say accepted.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from bench.building import BUILD, Absent, Failed, say
from bench.far_side import sink
from bench.machine import FAR_SIDE_CORE, PROC, cpu_of_tree, on_core, rss_of_tree_mb, sync_ms
from bench.profiled import report_lines
from bench.rounds import Options, Report, Spread, header
from bench.serving import Server, await_accepted, await_listening, heliograph, individual, post_all, shared_payload

NUMBER = 300_000
WARM = 10_000
BATCH = 1000
POSTERS = 4
"""Requests in hand at a time."""
SAMPLE = 200
"""Receipts that are read at the end."""
PATIENCE_S = 120
SHAPES: dict[str, Callable[[Sequence[str], bytes], bytes]] = {
    "one payload, 1,000 tokens": shared_payload,
    "1,000 notifications": individual,
}


class Run(msgspec.Struct, frozen=True):
    accepted_in_s: float
    """Until every request was answered, so durable."""
    secs: float
    """Until every receipt was durable."""
    cpu: float
    rss_mb: float


def run(options: Options) -> Report:
    if not PROC.exists():
        raise Absent("the CPU of the server is read from /proc, which this system does not have")
    number = -(-(options.number or NUMBER) // BATCH) * BATCH
    report = Report(
        "whole",
        header(
            far_side="bench/sink.c, TLS 1.3, answers at once; it shares its core with the client",
            batches=f"{BATCH:,} notifications a request, {POSTERS} requests at a time, HTTP/1.1, 118 octets each",
            rounds=options.rounds,
            notifications=f"{number:,} a run, after {WARM:,} unmeasured",
            store=f"SQLite, synchronous=FULL; a write of 4 kB with fdatasync takes {sync_ms(BUILD):.2f} ms there",
        ),
    )
    runs: dict[str, list[Run]] = {shape: [] for shape in SHAPES}
    for turn in range(options.rounds):
        for shape in SHAPES:
            one = _run_once(shape, number, options)
            runs[shape].append(one)
            progress = f"round {turn + 1} of {options.rounds}: {shape}"
            say(f"{progress} {one.cpu / number * 1e6:.2f} us, {number / one.secs:,.0f}/s")
    for shape, each in runs.items():
        report.rows.append(
            {
                "a request": shape,
                "CPU us / notification": Spread.of([one.cpu / number * 1e6 for one in each]),
                "taken durably / s": Spread.of([number / one.accepted_in_s for one in each]),
                "settled / s": Spread.of([number / one.secs for one in each]),
                "RSS MB": max(one.rss_mb for one in each),
            }
        )
    for shape, each in runs.items():
        cpu_us = statistics.median(one.cpu for one in each) / number * 1e6
        report.notes.append(f"Where the CPU time goes ({shape}; shares of one more run, with a sampler in it):")
        report.notes += _where(shape, number, options, cpu_us)
    return report


def _run_once(shape: str, number: int, options: Options, profile: Path | None = None) -> Run:
    tokens = options.tokens.read_text().split()
    with (
        tempfile.TemporaryDirectory(dir=BUILD) as folder,
        sink(options.data) as apple,
        heliograph(Path(folder), options.data, apple.port, profile) as server,
        on_core(FAR_SIDE_CORE),
    ):
        await_listening(server)
        payload = (options.data / "body.json").read_bytes()
        warm_up, measured = (
            [SHAPES[shape](part, payload) for part in _parts(tokens, count)] for count in (WARM, number)
        )
        _post_and_settle(server, warm_up, WARM)
        before, began = cpu_of_tree(server.pid), time.perf_counter()
        taken = _post_and_settle(server, measured, WARM + number)
        secs = time.perf_counter() - began
        cpu = cpu_of_tree(server.pid) - before
        found = Run(taken - began, secs, cpu, rss_of_tree_mb(server.pid))
    apple.must_have(WARM + number)
    return found


def _parts(tokens: Sequence[str], count: int) -> list[list[str]]:
    endless = itertools.cycle(tokens)
    return [list(itertools.islice(endless, BATCH)) for _ in range(count // BATCH)]


def _post_and_settle(server: Server, bodies: Sequence[bytes], total: int) -> float:
    """Post all, wait until all receipts say accepted. When the last request was answered.

    `total` is how many this server has been given since it started.
    """
    ids = post_all(server, bodies, POSTERS)
    taken = time.perf_counter()
    await_accepted(server, total, patience_s=PATIENCE_S)
    connection = server.connect()
    deadline = taken + PATIENCE_S
    # the last ones to be answered are the last to be recorded, and among them every place of a batch occurs
    for one in [*ids[-BATCH :: BATCH // 10], *random.sample(ids, min(SAMPLE, len(ids)))]:
        while json.loads(server.ask(connection, "GET", f"/v1/notifications/{one}"))["state"] != "accepted":
            if time.perf_counter() > deadline:
                raise Failed(f"after {PATIENCE_S} s, a notification that Apple accepted has no receipt that says so")
    connection.close()
    return taken


def _where(shape: str, number: int, options: Options, cpu_us: float) -> list[str]:
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        profile = Path(folder) / "profile.json"
        _run_once(shape, number, options, profile)
        return report_lines(profile, cpu_us, functions=options.profile)
