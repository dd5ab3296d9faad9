"""What the Apple-shaped proxy costs beside a dumb one: in front of the same far side, with the same client.

Three ways to the far side: without anything between; through nghttpx, which only passes on what it reads; and through
`heliograph serve`, which knows the caller by its provider token, checks each request, replaces the credentials, and
keeps a receipt of each on disk. TLS on both sides of a proxy.

At the limit (`push.c` has as many requests open as there are streams) CPU is what counts. By a timetable it is how much
later an answer comes than without a proxy: a difference of percentiles, taken inside a round.
"""

from __future__ import annotations

import socket
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from bench.building import BUILD, Absent, Failed, c_program, last_words, need, say
from bench.contestants import pushy
from bench.contract import Answer, Task
from bench.far_side import Sink, sink
from bench.load import SEQUENCE, Loaded, percentile
from bench.machine import CONTESTANT_CORE, FAR_SIDE_CORE, PROC, cpu_of_tree, free_port, on_core
from bench.pki import KEY_ID, TEAM_ID, TOPIC
from bench.profiled import report_lines
from bench.rounds import Cell, Contestant, Options, Report, Spread, header, prepare, run_sender
from bench.serving import APP, await_listening, heliograph

ROUNDS = 3
NUMBER = 200_000
CONNECTIONS, STREAMS = 8, 100
RATE = 2_000
SECONDS = 10
WARM = 20_000
PUSHY_NUMBER = 200_000
START_S = 20
REST_S = 0.3
"""Before a proxy's CPU is read: what it does behind the last answers belongs to them."""

DIRECT, DUMB, OURS = "nothing", "nghttpx", "heliograph"
_ENTRY = struct.Struct("=QQQII")  # as in push.c


class Run(msgspec.Struct, frozen=True):
    loaded: Loaded
    cpu: float
    """CPU seconds of the proxy; 0 where there is none."""
    client_and_far: float
    """CPU seconds of the client and the far side, which share a core."""

    @property
    def cpu_us(self) -> float:
        return self.cpu / len(self.loaded.began_ns) * 1e6

    @property
    def rate(self) -> float:
        return len(self.loaded.began_ns) / self.loaded.secs


class Way(msgspec.Struct, frozen=True):
    """What stands in front of the far side: which port it listens on, and its process."""

    port: int
    pid: int | None


Open = Callable[[Options, Path, Sink], AbstractContextManager[Way]]


def run(options: Options) -> Report:
    if not PROC.exists():
        raise Absent("the CPU of a server's processes is read from /proc, which this system does not have")
    number = options.number or NUMBER
    report = Report(
        "proxy",
        header(
            far_side="bench/sink.c, TLS 1.3, answers at once; it shares its core with the client, bench/push.c",
            connections=f"{CONNECTIONS}, {STREAMS} streams each",
            rounds=options.rounds,
            requests=f"{number:,} at the limit, {RATE * SECONDS:,} by a timetable, {WARM:,} before; of 120 octets",
        ),
    )
    ways: dict[str, Open] = {DIRECT: _direct}
    if _wanted(options, DUMB):
        try:
            need("nghttpx", "apt-get install nghttp2-proxy")
            ways[DUMB] = _nghttpx
        except Absent as why:
            report.notes.append(f"without {DUMB}: {why}")
    if _wanted(options, OURS):
        ways[OURS] = _heliograph
    client = prepare(pushy.CONTESTANTS if _wanted(options, "pushy") else (), report)
    found = _Found(ways)
    for turn in range(options.rounds):
        _take_turn(f"round {turn + 1} of {options.rounds}:", options, ways, client, number, found)
    _tell(report, found)
    if OURS in ways:
        report.notes.append("`Apple's wire` is the callers' wire as well:")
        _explain(report, options, "at the limit", found.limit[OURS], number, 0)
        _explain(report, options, f"at {RATE:,} a second", found.steady[OURS], 2 * RATE * SECONDS, RATE)
    return report


class _Found:
    """What was measured, by what stood between."""

    def __init__(self, ways: Iterable[str]) -> None:
        self.limit: dict[str, list[Run]] = {name: [] for name in ways}
        self.steady: dict[str, list[Run]] = {name: [] for name in ways}
        self.pushy: dict[str, list[tuple[Answer, float]]] = {name: [] for name in ways if name != DUMB}
        """With the proxy's CPU microseconds a request."""


def _take_turn(
    said: str,
    options: Options,
    ways: Mapping[str, Open],
    client: Mapping[Contestant, Sequence[str]],
    number: int,
    found: _Found,
) -> None:
    for name, way in ways.items():
        at_limit, by_timetable = _push(options, way, number)
        found.limit[name].append(at_limit)
        found.steady[name].append(by_timetable)
        p50, p99 = (percentile(by_timetable.loaded.answer_ms, share) for share in (0.5, 0.99))
        say(f"{said} through {name} {at_limit.rate:,.0f}/s, {at_limit.cpu_us:.1f} us; {p50:.2f} ms, {p99:.2f} ms")
    for one, command in client.items():
        for name, answers in found.pushy.items():
            with _running(options, ways[name]) as opened:
                task = Task(opened.port, PUSHY_NUMBER, one.warm, 1, 1000, options.data, options.tokens)
                before = _cpu(opened.pid)
                # with the far side, so that it has as much of a core in either case
                answer = run_sender(one.name, command, task, FAR_SIDE_CORE)
                cpu_us = (_cpu(opened.pid) - before) / (task.n + task.warm) * 1e6
            answers.append((answer, cpu_us))
            say(f"{said} Pushy through {name} {answer.n / answer.secs:,.0f}/s, {cpu_us:.1f} us")


def _tell(report: Report, found: _Found) -> None:
    for name, runs in found.limit.items():
        report.rows.append(_row(f"{name}, at the limit", runs, found.limit.get(DUMB)))
    for name, runs in found.steady.items():
        row = _row(f"{name}, {RATE:,} a second", runs, found.steady.get(DUMB))
        report.rows.append(row | _waits(runs, None if name == DIRECT else found.steady[DIRECT]))
    straight = [answer.n / answer.secs for answer, _ in found.pushy[DIRECT]]
    for name, answers in found.pushy.items():
        if answers:
            rates = [answer.n / answer.secs for answer, _ in answers]
            row = {"between": f"{name}, with Pushy", "requests / s": Spread.of(rates)}
            if name != DIRECT:
                row["CPU us / request"] = Spread.of([cpu_us for _, cpu_us in answers])
                row["x nothing"] = Spread.of([rate / most for rate, most in zip(rates, straight, strict=True)])
            report.rows.append(row)
    late_ms = max(one.loaded.late_ns for each in found.steady.values() for one in each) / 1e6
    report.notes.append(
        f"All that push.c sent reached the far side, once. It was late by {late_ms:.2f} ms at worst, which is "
        "not counted. Where `far core` is near 1, client and far side were the limit."
    )


def _wanted(options: Options, name: str) -> bool:
    return not options.only or name in options.only


def _row(title: str, runs: list[Run], yardstick: list[Run] | None) -> dict[str, Cell]:
    row: dict[str, Cell] = {"between": title, "requests / s": Spread.of([one.rate for one in runs])}
    if runs[0].cpu:
        row["CPU us / request"] = Spread.of([one.cpu_us for one in runs])
        if yardstick is not None:
            ratios = [one.cpu_us / other.cpu_us for one, other in zip(runs, yardstick, strict=True)]
            row["x nghttpx"] = Spread.of(ratios)
    row["far core"] = Spread.of([one.client_and_far / one.loaded.secs for one in runs])
    return row


def _waits(runs: list[Run], without: list[Run] | None) -> dict[str, Cell]:
    row: dict[str, Cell] = {}
    for title, share in (("p50 ms", 0.5), ("p99 ms", 0.99)):
        waits = [percentile(one.loaded.answer_ms, share) for one in runs]
        row[title] = Spread.of(waits)
        if without is not None:
            bare = [percentile(one.loaded.answer_ms, share) for one in without]
            row[f"added {title}"] = Spread.of([wait - least for wait, least in zip(waits, bare, strict=True)])
    return row


# -- who stands between ------------------------------------------------------------------------------------------------


@contextmanager
def _running(options: Options, way: Open) -> Iterator[Way]:
    with (
        sink(options.data) as apple,
        tempfile.TemporaryDirectory(dir=BUILD) as folder,
        way(options, Path(folder), apple) as opened,
    ):
        yield opened


@contextmanager
def _direct(options: Options, folder: Path, apple: Sink) -> Iterator[Way]:  # noqa: ARG001 - the others' shape
    yield Way(apple.port, None)


@contextmanager
def _nghttpx(options: Options, folder: Path, apple: Sink) -> Iterator[Way]:  # noqa: ARG001 - as above
    port, data = free_port(), options.data
    command = [
        *("nghttpx", "--conf=/dev/null", "--workers=1", "--single-process", "--no-ocsp", "--no-via"),
        *("--no-add-x-forwarded-proto", "--log-level=ERROR", f"--cacert={data / 'ca.pem'}"),
        *(f"--frontend=127.0.0.1,{port}", f"--backend=127.0.0.1,{apple.port};;proto=h2;tls;sni=localhost"),
        # what heliograph allows, and room for it
        *("--frontend-http2-max-concurrent-streams=1000", "--frontend-http2-connection-window-size=16777216"),
        *(str(data / "server.key"), str(data / "server.pem")),
    ]
    with tempfile.TemporaryFile("w+") as log:
        with on_core(CONTESTANT_CORE):
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            _await(port)
            yield Way(port, process.pid)
        except Failed as why:
            log.seek(0)
            raise Failed(f"nghttpx: {why}\n{last_words(log.read())}") from None
        finally:
            process.kill()
            process.wait()


@contextmanager
def _heliograph(options: Options, folder: Path, apple: Sink, profile: Path | None = None) -> Iterator[Way]:
    port, data = free_port(), options.data
    identity = folder / "identity.pem"
    identity.touch(mode=0o600)
    identity.write_bytes((data / "server.pem").read_bytes() + (data / "server.key").read_bytes())
    more = f"""[apple_proxy.bench]
port = {port}
certificate = "{identity}"
"""
    with heliograph(folder, data, apple.port, profile, more=more) as server:
        await_listening(server)
        key = load_pem_private_key((data / "AuthKey.p8").read_bytes(), None).public_key()
        public = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        caller = {"app": APP, "public_key": public, "key_id": KEY_ID, "team_id": TEAM_ID}
        connection = server.connect()
        server.ask(connection, "POST", "/v1/callers", msgspec.json.encode(caller))
        connection.close()
        _await(port)
        yield Way(port, server.pid)


def _await(port: int) -> None:
    """Return as soon as something listens there. Raises Failed."""
    deadline = time.perf_counter() + START_S
    while time.perf_counter() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.01)
        else:
            return
    raise Failed(f"nothing listened within {START_S} s")


# -- the client --------------------------------------------------------------------------------------------------------


def _push(options: Options, way: Open, number: int) -> tuple[Run, Run]:
    """At the limit, then by the timetable."""
    with (
        sink(options.data, log=True) as apple,
        tempfile.TemporaryDirectory(dir=BUILD) as folder,
        way(options, Path(folder), apple) as opened,
    ):
        _load(options, opened.port, number=WARM)
        at_limit = _measured(options, opened, apple, first=WARM, number=number)
        by_timetable = _measured(options, opened, apple, first=WARM + number, number=RATE * SECONDS, per_second=RATE)
    total = WARM + number + RATE * SECONDS
    apple.must_have(total)
    if way is not _nghttpx:  # which now and then makes two frames of a payload, and the far side's log wants one
        apple.times(range(total))
    return at_limit, by_timetable


def _measured(options: Options, opened: Way, apple: Sink, *, first: int, number: int, per_second: float = 0) -> Run:
    before, far_before = _cpu(opened.pid), cpu_of_tree(apple.pid)
    loaded = _load(options, opened.port, first=first, number=number, per_second=per_second)
    far = cpu_of_tree(apple.pid) - far_before + loaded.cpu
    time.sleep(REST_S)
    return Run(loaded, _cpu(opened.pid) - before, far)


def _cpu(pid: int | None) -> float:
    return 0.0 if pid is None else cpu_of_tree(pid)


def _load(options: Options, port: int, *, first: int = 0, number: int, per_second: float = 0) -> Loaded:
    """Push `number` with the sequence numbers from `first` on; each must be answered 200. Raises Absent and Failed."""
    probe = "#include <nghttp2/nghttp2.h>\n#include <openssl/ssl.h>\n#include <sys/timerfd.h>\n"
    program = c_program("push", probe, ["-Wno-deprecated-declarations"], ["-lssl", "-lcrypto", "-lnghttp2"])
    data = options.data
    payload = msgspec.json.decode((data / "body.json").read_bytes()) | {"id": SEQUENCE.decode()}
    body = msgspec.json.encode(payload)
    with tempfile.NamedTemporaryFile(dir=BUILD) as given, tempfile.NamedTemporaryFile(dir=BUILD) as log:
        given.write(body)
        given.flush()
        who = ["-a", data / "ca.pem", "-j", data / "jwt.txt", "-t", TOPIC, "-d", options.tokens]
        what = ["-b", given.name, "-s", body.index(b'"id":"' + SEQUENCE) + 6, "-o", log.name]
        amount = ["-n", number, "-f", first, "-r", per_second, "-c", CONNECTIONS, "-m", STREAMS]
        with on_core(FAR_SIDE_CORE):
            command = list(map(str, [program, "-p", port, *who, *what, *amount]))
            done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"the client ended with {done.returncode}: {last_words(done.stderr)}")
        began, answered, late, _, _ = zip(*_ENTRY.iter_unpack(Path(log.name).read_bytes()), strict=True)
    return Loaded(began, answered, max(late), float(msgspec.json.decode(done.stdout)["cpu"]))


def _explain(report: Report, options: Options, when: str, runs: list[Run], number: int, per_second: float) -> None:
    report.notes.append(f"Where heliograph's CPU time goes {when} (shares of one more run, with a sampler in it):")
    with tempfile.TemporaryDirectory(dir=BUILD) as profiled:
        profile = Path(profiled) / "profile.json"
        with (
            sink(options.data) as apple,
            tempfile.TemporaryDirectory(dir=BUILD) as folder,
            _heliograph(options, Path(folder), apple, profile) as opened,
        ):
            _load(options, opened.port, number=number, per_second=per_second)
        cpu_us = statistics.median(one.cpu_us for one in runs)
        report.notes += report_lines(profile, cpu_us, functions=options.profile)
