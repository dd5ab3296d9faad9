"""The gateway for old scripts: what a frame costs, how long it is in memory only, what idle connections take.

| row | what |
|---|---|
| in process | frames through the parser, and through the parser and admission, which asks a store about each token |
| durable | the whole server: TLS in, SQLite (FULL), HTTP/2 out; beside the same number by the HTTP API |
| a second | single frames by a timetable: from the client's write until the frame is on Apple's wire |
| idle | resident memory before and after so many TLS connections with a client certificate |

A frame goes to Apple once it is on disk, so the time to Apple's wire is longer than the window in which a frame can be
lost. The window as the server measures it, from the reading of a frame until it is on disk, is in buckets: what is told
is the bound under which that share of frames stayed. It is a commit, so beside it stands what somebody else's durable
writes of 4 kB to the same disk took meanwhile.
"""

from __future__ import annotations

import datetime
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import apsw
import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from bench import admitting
from bench.building import BENCH, BUILD, Absent, Failed, last_words, say
from bench.far_side import sink
from bench.latency import spreads
from bench.load import percentile, waits_ms
from bench.machine import CONTESTANT_CORE, FAR_SIDE_CORE, PROC, cpu_of_tree, free_port, memory_mb, on_core, sync_ms
from bench.profiled import report_lines
from bench.rounds import Cell, Options, Report, Spread, header
from bench.script import SEQUENCE, Task, Written
from bench.serving import APP, Server, accepted, await_accepted, await_listening, heliograph, individual, post_all

ROUNDS = 3
NUMBER = 300_000
WARM = 20_000
CONNECTIONS = (1, 8)
RATE, SECONDS = 200, 20
IDLE = 5_000
REST_S = 2.0
BATCH = 1_000
PATIENCE_S = 120.0
ASK_S = 0.05
WATCH_S = 0.02

PARSED, ADMITTED = "in process: parsed", "in process: parsed and admitted"
HTTP = "durable: by HTTP, 1,000 a request"
STEADY = f"{RATE} a second, 1 connection"


class Run(msgspec.Struct, frozen=True):
    durable_s: float
    accepted_s: float
    cpu: float
    rss_mb: float
    disk_ms: list[float]
    """How long each durable write of 4 kB took that somebody else made meanwhile, sorted."""
    window: dict[float, float] | None = None
    """The share of frames that were on disk within so many seconds; None: not by the gateway."""


class Idle(msgspec.Struct, frozen=True):
    before_mb: float
    after_mb: float
    opening: float
    """CPU seconds of all the handshakes."""


def run(options: Options) -> Report:
    if not PROC.exists():
        raise Absent("the CPU of a server's processes is read from /proc, which this system does not have")
    number = -(-(options.number or NUMBER) // BATCH) * BATCH
    report = Report(
        "gateway",
        header(
            far_side="bench/sink.c, TLS 1.3, answers at once; it shares its core with the client, bench/script.py",
            rounds=options.rounds,
            frames=f"command 1, {number:,} a run, after {WARM:,} unmeasured; payload of 120 octets, each another",
            store=f"SQLite, synchronous=FULL; a write of 4 kB with fdatasync takes {sync_ms(BUILD):.2f} ms there",
        ),
    )
    _write_certificate(options.data)
    in_process: list[admitting.Admitted] = []
    durable: dict[str, list[Run]] = {}
    steady: list[tuple[list[float], Run, int]] = []
    idle: dict[str, list[Idle]] = {}
    for turn in range(options.rounds):
        said = f"round {turn + 1} of {options.rounds}:"
        in_process.append(_in_process(number, options))
        say(f"{said} in process {in_process[-1].all / number * 1e6:.2f} us")
        for connections in CONNECTIONS:
            name = _name(connections)
            durable.setdefault(name, []).append(_durable(number, connections, options))
            say(f"{said} {name} {_figures(number, durable[name][-1])}")
        durable.setdefault(HTTP, []).append(_by_http(number, options))
        say(f"{said} {HTTP} {_figures(number, durable[HTTP][-1])}")
        steady.append(_steady(options))
        p50, p99 = (percentile(steady[-1][0], share) for share in (0.5, 0.99))
        say(f"{said} {STEADY}: to Apple's wire p50 {p50:.2f} ms, p99 {p99:.2f} ms")
        for loop in ("uvloop", "asyncio"):
            idle.setdefault(loop, []).append(one := _idle(loop, options))
            say(f"{said} {IDLE:,} idle with {loop}: {one.before_mb:.0f} MB became {one.after_mb:.0f}")
    parsed, admitted = ([getattr(one, part) / one.number for one in in_process] for part in ("parsing", "all"))
    for name, costs in ((PARSED, parsed), (ADMITTED, admitted)):
        row: dict[str, Cell] = {"frames": name, "taken / s": Spread.of([1 / each for each in costs])}
        report.rows.append(row | {"CPU us / frame": Spread.of([each * 1e6 for each in costs])})
    for name, runs in durable.items():
        row = {
            "frames": name,
            "taken / s": Spread.of([number / one.durable_s for one in runs]),
            "accepted / s": Spread.of([number / one.accepted_s for one in runs]),
            "CPU us / frame": Spread.of([one.cpu / number * 1e6 for one in runs]),
        }
        report.rows.append(row | _windows(runs) | {"RSS MB": max(one.rss_mb for one in runs)})
    to_wire = spreads([waits for waits, _, _ in steady])
    row = {"frames": STEADY} | _windows([one for _, one, _ in steady])
    report.rows.append(row | {f"wire {title}": to_wire[title] for title in ("p50 ms", "p99 ms", "max ms")})
    for loop, found in idle.items():
        row = {"frames": f"{IDLE:,} idle connections, {loop}"}
        row["RSS MB"] = max(one.after_mb for one in found)
        row["more MB"] = Spread.of([one.after_mb - one.before_mb for one in found])
        row["kB / connection"] = Spread.of([(one.after_mb - one.before_mb) / IDLE * 1024 for one in found])
        report.rows.append(row)
    report.notes.append(
        "In process, `taken / s` is frames for each second of CPU. Every frame was on record once, and reached the far "
        f"side once. The client by the timetable was late by {max(late for *_, late in steady) / 1e6:.2f} ms at worst, "
        "which is not counted. A TLS handshake takes the server "
        f"{statistics.median(one.opening for one in idle['uvloop']) / IDLE * 1e3:.1f} ms of CPU."
    )
    most = CONNECTIONS[-1]
    cpu_us = statistics.median(one.cpu for one in durable[_name(most)]) / number * 1e6
    report.notes.append(f"Where the CPU time goes ({_name(most)}; shares of one more run, with a sampler in it):")
    report.notes += _where(number, most, options, cpu_us)
    return report


def _name(connections: int) -> str:
    return f"durable: {connections} connection{'s' if connections > 1 else ''}"


def _figures(number: int, one: Run) -> str:
    rates = f"{number / one.durable_s:,.0f}/s durable, {number / one.accepted_s:,.0f}/s accepted"
    return f"{one.cpu / number * 1e6:.2f} us, {rates}"


def _windows(runs: Sequence[Run]) -> dict[str, Cell]:
    windows = [one.window for one in runs if one.window is not None]
    if not windows:
        return {}

    def bound(share: float) -> str:
        worst = max(min(le for le, part in window.items() if part >= share) for window in windows)
        return f"<= {worst * 1000:g}"

    disk_ms = [(percentile(one.disk_ms, 0.99), one.disk_ms[-1]) for one in runs]
    return {
        "window ms, p50": bound(0.5),
        "p99": bound(0.99),
        "all": bound(1),
        "disk ms, p99": Spread.of([p99 for p99, _ in disk_ms]),
        "most": Spread.of([most for _, most in disk_ms]),
    }


@contextmanager
def _watching(folder: Path) -> Iterator[list[float]]:
    """How long a durable write of 4 kB takes there, again and again; sorted in the end, in ms."""
    found: list[float] = []
    over = threading.Event()

    def write() -> None:
        with (folder / "watched").open("wb") as file:
            while not over.wait(WATCH_S):
                began = time.perf_counter()
                os.pwrite(file.fileno(), bytes(4096), 0)
                os.fdatasync(file.fileno())
                found.append((time.perf_counter() - began) * 1000)

    with ThreadPoolExecutor(1) as threads, on_core(FAR_SIDE_CORE):
        writing = threads.submit(write)
        try:
            yield found
        finally:
            over.set()
            writing.result()
            found.sort()


# -- parts -------------------------------------------------------------------------------------------------------------


def _payload(options: Options) -> str:
    payload = msgspec.json.decode((options.data / "body.json").read_bytes()) | {"id": SEQUENCE.decode()}
    return msgspec.json.encode(payload).decode()


def _in_process(number: int, options: Options) -> admitting.Admitted:
    with tempfile.TemporaryDirectory(dir=BUILD) as folder, on_core(CONTESTANT_CORE):
        key = (options.data / "AuthKey.p8").read_text()
        task = admitting.Task(folder, str(options.tokens), key, _payload(options), number)
        command = [sys.executable, "-m", "bench.admitting", msgspec.json.encode(task).decode()]
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=BENCH.parent)
    if done.returncode:
        raise Failed(f"bench.admitting ended with {done.returncode}: {last_words(done.stderr)}")
    return msgspec.json.decode(done.stdout, type=admitting.Admitted)


def _durable(number: int, connections: int, options: Options, profile: Path | None = None) -> Run:
    with (
        sink(options.data, log=True) as apple,
        tempfile.TemporaryDirectory(dir=BUILD) as folder,
        _gateway(Path(folder), options, apple.port, profile) as (server, port),
    ):
        _warm_up(server, port, options)
        with _script(_task(options, port, connections, number, WARM)) as script, _watching(Path(folder)) as disk_ms:
            asking = server.connect()
            shares, before = _window(server), cpu_of_tree(server.pid)
            _begin(script)
            began = time.monotonic()
            while _frames(server) < WARM + number:
                _look(began)
            durable_s = time.monotonic() - began
            while accepted(server, asking) < WARM + number:
                _look(began)
            accepted_s = time.monotonic() - began
            asking.close()
            cpu = cpu_of_tree(server.pid) - before
            window = _shares(shares, _window(server))
            _written(script)
            rss_mb = memory_mb(server.pid)[1]
        on_record = _on_record(Path(folder))
    if on_record != WARM + number:
        raise Failed(f"{on_record} frames are on record, and {WARM + number} were written")
    apple.must_have(WARM + number)
    apple.times(range(WARM + number))
    return Run(durable_s, accepted_s, cpu, rss_mb, disk_ms, window)


def _by_http(number: int, options: Options) -> Run:
    tokens = (options.tokens.read_text().split() * (-(-(number + WARM) // 100_000)))[: number + WARM]
    payload = (options.data / "body.json").read_bytes()
    with (
        sink(options.data) as apple,
        tempfile.TemporaryDirectory(dir=BUILD) as folder,
        heliograph(Path(folder), options.data, apple.port) as server,
        on_core(FAR_SIDE_CORE),
    ):
        await_listening(server)
        bodies = [individual(tokens[at : at + BATCH], payload) for at in range(0, len(tokens), BATCH)]
        post_all(server, bodies[: WARM // BATCH])
        await_accepted(server, WARM)
        before, began = cpu_of_tree(server.pid), time.monotonic()
        with _watching(Path(folder)) as disk_ms:
            post_all(server, bodies[WARM // BATCH :])
            durable_s = time.monotonic() - began
            await_accepted(server, WARM + number, pause_s=ASK_S)
        accepted_s = time.monotonic() - began
        cpu = cpu_of_tree(server.pid) - before
        rss_mb = memory_mb(server.pid)[1]
    apple.must_have(WARM + number)
    return Run(durable_s, accepted_s, cpu, rss_mb, disk_ms)


def _steady(options: Options) -> tuple[list[float], Run, int]:
    """Sorted, from write to Apple's wire in ms; and how late the client was, in ns."""
    number = RATE * SECONDS
    with (
        sink(options.data, log=True) as apple,
        tempfile.TemporaryDirectory(dir=BUILD) as folder,
        _gateway(Path(folder), options, apple.port) as (server, port),
    ):
        _warm_up(server, port, options)
        with _script(_task(options, port, 1, number, WARM, RATE)) as script, _watching(Path(folder)) as disk_ms:
            shares, before = _window(server), cpu_of_tree(server.pid)
            _begin(script)
            written = _written(script)
            await_accepted(server, WARM + number, pause_s=ASK_S)
            cpu = cpu_of_tree(server.pid) - before
            window = _shares(shares, _window(server))
            rss_mb = memory_mb(server.pid)[1]
    apple.must_have(WARM + number)
    arrived = apple.times(range(WARM + number))[WARM:]
    return waits_ms(written.began_ns, arrived), Run(SECONDS, SECONDS, cpu, rss_mb, disk_ms, window), written.late_ns


def _idle(loop: str, options: Options) -> Idle:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = IDLE + 500
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise Absent(f"{IDLE:,} connections need {wanted:,} open files, and this system allows {hard:,} (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        with (
            tempfile.TemporaryDirectory(dir=BUILD) as folder,
            _gateway(Path(folder), options, free_port(), uvloop=loop == "uvloop") as (server, port),
        ):
            with _script(_task(options, port, 100, 0, 0)):  # whoever comes first has more made than its connection
                pass
            time.sleep(REST_S)
            before_mb, before = memory_mb(server.pid)[0], cpu_of_tree(server.pid)
            with _script(_task(options, port, IDLE, 0, 0)):
                opening = cpu_of_tree(server.pid) - before
                time.sleep(REST_S)
                after_mb = memory_mb(server.pid)[0]
                if _metric(server, "legacy_connections") != IDLE:
                    raise Failed(f"of {IDLE} connections {_metric(server, 'legacy_connections')} are open")
        return Idle(before_mb, after_mb, opening)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _where(number: int, connections: int, options: Options, cpu_us: float) -> list[str]:
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        profile = Path(folder) / "profile.json"
        _durable(number, connections, options, profile)
        return report_lines(profile, cpu_us, functions=options.profile)


# -- the server and the script -----------------------------------------------------------------------------------------


@contextmanager
def _gateway(
    folder: Path, options: Options, apple_port: int, profile: Path | None = None, *, uvloop: bool = True
) -> Iterator[tuple[Server, int]]:
    """A server whose gateway knows the script's certificate, and the gateway's port."""
    port, feedback_port = free_port(), free_port()
    more = f"[legacy.bench]\nport = {port}\nfeedback_port = {feedback_port}\n"
    with heliograph(folder, options.data, apple_port, profile, more=more, uvloop=uvloop) as server:
        await_listening(server)
        certificate = (options.data / "script.pem").read_text().partition("-----BEGIN PRIVATE")[0]
        connection = server.connect()
        body = msgspec.json.encode({"app": APP, "certificate": certificate})
        server.ask(connection, "POST", "/v1/callers", body)
        connection.close()
        yield server, port


def _task(options: Options, port: int, connections: int, number: int, first: int, per_second: float = 0) -> Task:
    certificate, tokens = str(options.data / "script.pem"), str(options.tokens)
    return Task(port, certificate, tokens, _payload(options), connections, number, first, per_second)


@contextmanager
def _script(task: Task) -> Iterator[subprocess.Popen[str]]:
    """A script whose connections stand. Raises Failed."""
    with on_core(FAR_SIDE_CORE):
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.script", msgspec.json.encode(task).decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=BENCH.parent,
        )
    with process:
        assert process.stdout is not None
        if process.stdout.readline() != "open\n":
            raise Failed("the script could not open its connections")
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.stdout.read()


def _begin(script: subprocess.Popen[str]) -> None:
    assert script.stdin is not None
    script.stdin.write("\n")
    script.stdin.flush()


def _written(script: subprocess.Popen[str]) -> Written:
    assert script.stdout is not None
    return msgspec.json.decode(script.stdout.readline(), type=Written)


def _warm_up(server: Server, port: int, options: Options) -> None:
    with _script(_task(options, port, 1, WARM, 0)) as script:
        _begin(script)
        _written(script)
        await_accepted(server, WARM)


def _look(began: float) -> None:
    """Wait until it is time to ask the server again."""
    if time.monotonic() > began + PATIENCE_S:
        raise Failed(f"not everything was done after {PATIENCE_S:.0f} s")
    time.sleep(ASK_S)


def _metrics(server: Server) -> str:
    connection = server.connect()
    try:
        return server.ask(connection, "GET", "/metrics").decode()
    finally:
        connection.close()


def _metric(server: Server, name: str) -> int:
    found = re.search(rf"^heliograph_{name}\{{.*\}} (\S+)$", _metrics(server), re.MULTILINE)
    return 0 if found is None else int(float(found[1]))


def _frames(server: Server) -> int:
    return _metric(server, "legacy_frames_total")


def _window(server: Server) -> dict[float, float]:
    """How many frames were on disk within so many seconds."""
    buckets = re.findall(
        r'^heliograph_legacy_window_seconds_bucket\{.*le="([^"]+)".*\} (\S+)$', _metrics(server), re.MULTILINE
    )
    return {float(le): float(count) for le, count in buckets}


def _shares(before: dict[float, float], after: dict[float, float]) -> dict[float, float]:
    counts = {le: count - before[le] for le, count in after.items()}
    return {le: count / max(counts.values()) for le, count in counts.items()}


def _on_record(folder: Path) -> int:
    database = apsw.Connection(str(folder / "data" / "heliograph.db"), apsw.SQLITE_OPEN_READONLY)
    try:
        return int(database.execute("SELECT total(size) FROM batch").get)
    finally:
        database.close()


def _write_certificate(data: Path) -> None:
    """A client's certificate and key, as old scripts have them: RSA, and long expired."""
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "bench script")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(2012, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(2013, 1, 1, tzinfo=datetime.UTC))
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (data / "script.pem").write_bytes(made.public_bytes(Encoding.PEM) + pem)
