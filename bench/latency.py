"""From a request to Apple's wire at a steady rate: HTTP in, the commit, HTTP/2 out.

The timetable stands before the first request. One that finds no connection free counts from when it was due, so that a
server that stands still is asked no less (no coordinated omission). The clock stops when the far side has read the
frames from its socket; both programs read CLOCK_MONOTONIC.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.building import BUILD, say
from bench.far_side import sink
from bench.load import CONNECTIONS, load, percentile, waits_ms
from bench.machine import sync_ms
from bench.rounds import Cell, Options, Report, Spread, header
from bench.serving import await_accepted, await_listening, heliograph

RATES = (200, 2_000)
"""Requests a second: hardly any work, and a steady load."""
SECONDS = 10
WARM_SECONDS = 2
SHARES = (("p50 ms", 0.5), ("p90 ms", 0.9), ("p99 ms", 0.99), ("p99.9 ms", 0.999), ("max ms", 1.0))
ANSWER, WIRE = "the answer, 202", "Apple's wire"


class Run(msgspec.Struct, frozen=True):
    waits_ms: dict[str, list[float]]
    """Sorted, by what was waited for."""
    late_ms: float


def run(options: Options) -> Report:
    amount = f"{SECONDS} s" if options.number is None else f"{options.number:,}"
    report = Report(
        "latency",
        header(
            far_side="bench/sink.c, TLS 1.3, answers at once; it shares its core with the client, bench/load.c",
            connections=f"{CONNECTIONS}, HTTP/1.1, kept alive; requests by a timetable",
            rounds=options.rounds,
            notifications=f"{amount} a run, after {WARM_SECONDS} s unmeasured; a request each, payload of 120 octets",
            store=f"SQLite, synchronous=FULL; a write of 4 kB with fdatasync takes {sync_ms(BUILD):.2f} ms there",
        ),
    )
    runs: dict[int, list[Run]] = {rate: [] for rate in RATES}
    for turn in range(options.rounds):
        for rate in RATES:
            one = _run_once(rate, options)
            runs[rate].append(one)
            wire = one.waits_ms[WIRE]
            figures = f"p50 {percentile(wire, 0.5):.2f} ms, p99 {percentile(wire, 0.99):.2f} ms"
            say(f"round {turn + 1} of {options.rounds}: {rate:,}/s to {WIRE}: {figures}")
    for rate, each in runs.items():
        for what in (ANSWER, WIRE):
            row: dict[str, Cell] = {"requests / s": rate, "until": what}
            report.rows.append(row | spreads([one.waits_ms[what] for one in each]))
    late_ms = max(one.late_ms for each in runs.values() for one in each)
    report.notes.append(
        f"Every notification reached the far side, once. The client was late by {late_ms:.2f} ms at worst. That is not "
        "counted, but requests that are late come in a heap; what the far side is late, on the same core, is counted."
    )
    return report


def spreads(runs: Sequence[Sequence[float]]) -> dict[str, Cell]:
    """Percentiles as cells of a row: each the median of the rounds' percentiles, with the lowest and the highest.

    `runs` are sorted each. What fewer than one of a run's values would lie above is left to `max`.
    """
    told = [(title, share) for title, share in SHARES if share == 1 or len(runs[0]) * (1 - share) >= 1]
    return {title: Spread.of([percentile(waits, share) for waits in runs]) for title, share in told}


def _run_once(rate: int, options: Options) -> Run:
    warm = rate * WARM_SECONDS
    number = options.number or rate * SECONDS
    with (
        sink(options.data, log=True) as apple,
        tempfile.TemporaryDirectory(dir=BUILD) as folder,
        heliograph(Path(folder), options.data, apple.port) as server,
    ):
        await_listening(server)
        load(server, options.data, number=warm, per_second=rate)
        loaded = load(server, options.data, number=number, first=warm, per_second=rate)
        await_accepted(server, warm + number)
    apple.must_have(warm + number)
    arrived_ns = apple.times(range(warm + number))[warm:]
    waits = {ANSWER: loaded.answer_ms, WIRE: waits_ms(loaded.began_ns, arrived_ns)}
    return Run(waits, loaded.late_ns / 1e6)
