"""One notification a request, durable: each is answered 202 after the commit that holds it.

Connections that are kept alive, each asking again as soon as it was answered: so the latency here is that of a server
at its limit. `latency` has it at a steady rate. Beside it, in the same round, an API that keeps nothing.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from bench.building import BUILD, Absent, Failed, say
from bench.far_side import sink
from bench.load import CONNECTIONS, Loaded, load, percentile
from bench.machine import PROC, ThreadsCpu, cpu_of_threads, cpu_of_tree, memory_mb, sync_ms
from bench.profiled import report_lines
from bench.rounds import Cell, Options, Report, Spread, header
from bench.serving import await_accepted, await_listening, bare, heliograph

NUMBER = 40_000
WARM = 5_000
ASK_S = 0.25
"""Between two looks at what Apple has accepted; when that was, the far side says."""
BARE = "bare API, keeps nothing"
DURABLE = "heliograph, durable"
ONCE = "heliograph, each with an Idempotency-Key"


class Run(msgspec.Struct, frozen=True):
    loaded: Loaded
    cpu: ThreadsCpu
    """Of the server, from the first request until all is settled."""
    settled_s: float | None
    """From the first request until Apple had accepted all."""
    far_core: float
    """The share of its core that client and far side took while the client asked."""
    rss_mb: float


def run(options: Options) -> Report:
    if not PROC.exists():
        raise Absent("the CPU of the server is read from /proc, which this system does not have")
    number = options.number or NUMBER
    report = Report(
        "single",
        header(
            far_side="bench/sink.c, TLS 1.3, answers at once; it shares its core with the client, bench/load.c",
            connections=f"{CONNECTIONS}, HTTP/1.1, kept alive, each asks again as soon as it was answered",
            rounds=options.rounds,
            notifications=f"{number:,} a run, after {WARM:,} unmeasured; a request each, payload of 120 octets",
            store=f"SQLite, synchronous=FULL; a write of 4 kB with fdatasync takes {sync_ms(BUILD):.2f} ms there",
        ),
    )
    runs: dict[str, list[Run]] = {DURABLE: [], ONCE: [], BARE: []}
    for turn in range(options.rounds):
        for name, take in ((DURABLE, _durable), (ONCE, _once), (BARE, _bare)):
            one = take(number, options)
            runs[name].append(one)
            rate, cpu_us = number / one.loaded.secs, one.cpu.total / number * 1e6
            say(f"round {turn + 1} of {options.rounds}: {name} {cpu_us:.0f} us, {rate:,.0f}/s")
    for name, each in runs.items():
        beside = [(one.cpu, bare_one.cpu.total) for one, bare_one in zip(each, runs[BARE], strict=True)]
        row: dict[str, Cell] = {
            "server": name,
            "answered / s": Spread.of([number / one.loaded.secs for one in each]),
            "settled / s": _over(each, lambda one: None if one.settled_s is None else number / one.settled_s),
        }
        for title, share in (("p50 ms", 0.5), ("p99 ms", 0.99), ("max ms", 1.0)):
            row[title] = Spread.of([percentile(one.loaded.answer_ms, share) for one in each])
        row["CPU us / request"] = Spread.of([one.cpu.total / number * 1e6 for one in each])
        row["of it SQLite's writer"] = (
            "-" if name == BARE else Spread.of([one.cpu.writer / number * 1e6 for one in each])
        )
        row["the rest"] = Spread.of([(cpu.loop + cpu.rest) / number * 1e6 for cpu, _ in beside])
        row["the rest x bare"] = Spread.of([(cpu.loop + cpu.rest) / least for cpu, least in beside])
        row["all x bare"] = Spread.of([cpu.total / least for cpu, least in beside])
        row["far core"] = Spread.of([one.far_core for one in each])
        row["RSS MB"] = max(one.rss_mb for one in each)
        report.rows.append(row)
    report.notes.append(
        "Latency is the answer's, from the request's hand-over to the kernel. Every notification reached the far side, "
        "once. Where `far core` is near 1, client and far side were the limit."
    )
    cpu_us = statistics.median(one.cpu.total for one in runs[DURABLE]) / number * 1e6
    report.notes.append("Where heliograph's CPU time goes (shares of one more run, with a sampler in it):")
    report.notes += _where(number, options, cpu_us)
    return report


def _over(runs: list[Run], figure: Callable[[Run], float | None]) -> Cell:
    values = [value for value in map(figure, runs) if value is not None]
    return Spread.of(values) if values else "-"


def _once(number: int, options: Options) -> Run:
    return _durable(number, options, once=True)


def _durable(number: int, options: Options, profile: Path | None = None, *, once: bool = False) -> Run:
    total = WARM + number
    with (
        sink(options.data, log=True) as apple,
        tempfile.TemporaryDirectory(dir=BUILD) as folder,
        heliograph(Path(folder), options.data, apple.port, profile) as server,
    ):
        await_listening(server)
        load(server, options.data, number=WARM, once=once)
        await_accepted(server, WARM, pause_s=ASK_S)
        before, far_before = cpu_of_threads(server.pid), cpu_of_tree(apple.pid)
        loaded = load(server, options.data, number=number, first=WARM, once=once)
        far_cpu = cpu_of_tree(apple.pid) - far_before + loaded.cpu
        await_accepted(server, total, pause_s=ASK_S)
        cpu = cpu_of_threads(server.pid).minus(before)
        rss_mb = memory_mb(server.pid)[1]
    apple.must_have(total)
    times = apple.times(range(total))
    settled_s = (max(times) - min(loaded.began_ns)) / 1e9
    return Run(loaded, cpu, settled_s, far_cpu / loaded.secs, rss_mb)


def _bare(number: int, options: Options) -> Run:
    with bare() as server:
        await_listening(server)
        load(server, options.data, number=WARM)
        before = cpu_of_threads(server.pid)
        loaded = load(server, options.data, number=number, first=WARM)
        cpu = cpu_of_threads(server.pid).minus(before)
        if len(loaded.began_ns) != number:
            raise Failed(f"the client asked {len(loaded.began_ns)} times and not {number}")
        return Run(loaded, cpu, None, loaded.cpu / loaded.secs, memory_mb(server.pid)[1])


def _where(number: int, options: Options, cpu_us: float) -> list[str]:
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        profile = Path(folder) / "profile.json"
        _durable(number, options, profile)
        return report_lines(profile, cpu_us, functions=options.profile)
