"""One app's latency while another has a long queue, beside its latency when the server has nothing else to do.

The far side answers late and takes few requests at a time, as Apple does when it is the limit: so the queue lasts. How
long the far side takes to answer does not count; the clock stops when it has read the request.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.building import BUILD, Failed, say
from bench.far_side import sink
from bench.latency import spreads
from bench.load import load, waits_ms
from bench.machine import FAR_SIDE_CORE, on_core
from bench.rounds import Cell, Options, Report, header
from bench.serving import APP, Server, accepted, await_accepted, await_listening, heliograph, individual, post_all

QUEUED = 200_000
BATCH = 1000
OTHER = "other"
PER_SECOND = 20
NUMBER = 200
LATENCY_MS = 50
STREAMS = 100
CONNECTIONS = 4
"""Few, so that none is idle for so long that the server hangs up."""
WARM = 20
PATIENCE_S = 300.0
IDLE, BUSY = "nothing", f"{QUEUED:,} of another app"


def run(options: Options) -> Report:
    number = options.number or NUMBER
    report = Report(
        "fairness",
        header(
            far_side=f"bench/sink.c, TLS 1.3, answers {LATENCY_MS} ms later, {STREAMS} streams a connection",
            connections=f"{CONNECTIONS}, HTTP/1.1, kept alive; {PER_SECOND} requests a second by a timetable",
            rounds=options.rounds,
            notifications=f"{number:,} of the app that is measured, a request each",
        ),
    )
    waits: dict[str, list[list[float]]] = {IDLE: [], BUSY: []}
    for turn in range(options.rounds):
        idle, busy = _run_once(number, options)
        waits[IDLE].append(idle)
        waits[BUSY].append(busy)
        say(f"round {turn + 1} of {options.rounds}: at worst {idle[-1]:.1f} ms idle, {busy[-1]:.1f} ms busy")
    for what, each in waits.items():
        row: dict[str, Cell] = {"also queued": what, "until": "Apple's wire"}
        report.rows.append(row | spreads(each))
    report.notes.append("The other app's queue outlasted each run; in the end all was accepted.")
    return report


def _run_once(number: int, options: Options) -> tuple[list[float], list[float]]:
    """Milliseconds to Apple's wire, sorted: idle, and with a queue."""
    tokens = itertools.cycle(options.tokens.read_text().split())
    payload = (options.data / "body.json").read_bytes()
    singles = WARM + 2 * number
    with (
        sink(options.data, latency_ms=LATENCY_MS, max_streams=STREAMS, log=True) as apple,
        tempfile.TemporaryDirectory(dir=BUILD) as folder,
        heliograph(Path(folder), options.data, apple.port, apps=(APP, OTHER)) as server,
    ):
        await_listening(server)
        _ask(server, options, WARM, 0)
        idle_ns = _ask(server, options, number, WARM)
        with on_core(FAR_SIDE_CORE):
            parts = (list(itertools.islice(tokens, BATCH)) for _ in range(QUEUED // BATCH))
            post_all(server, (individual(part, payload) for part in parts))
        busy_ns = _ask(server, options, number, WARM + number)
        connection = server.connect()
        if accepted(server, connection, APP) == QUEUED:
            raise Failed(f"the {QUEUED:,} of one app were sent before the {number:,} of the other: ask for fewer")
        connection.close()
        await_accepted(server, QUEUED + singles, patience_s=PATIENCE_S)
    apple.must_have(QUEUED + singles)
    came_ns = apple.times(range(singles))
    return waits_ms(idle_ns, came_ns[WARM : WARM + number]), waits_ms(busy_ns, came_ns[WARM + number :])


def _ask(server: Server, options: Options, number: int, first: int) -> Sequence[int]:
    """Post single notifications of the app that is measured; when each began, in ns."""
    loaded = load(
        server,
        options.data,
        number=number,
        first=first,
        per_second=PER_SECOND,
        connections=CONNECTIONS,
        app=OTHER,
    )
    return loaded.began_ns
