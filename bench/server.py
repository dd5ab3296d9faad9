"""What one request costs a server: ours beside granian's and hypercorn's echo, under h2load and under Go's client.

CPU is the server's, all its processes, between the first measured request and the last answer. The client has the
other core.
"""

from __future__ import annotations

import os
import signal
import socket
import ssl
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from bench.building import BENCH, Absent, Failed, last_words, say
from bench.contract import Task
from bench.machine import CONTESTANT_CORE, FAR_SIDE_CORE, PROC, cpu_of_tree, free_port, on_core, rss_of_tree_mb
from bench.rounds import Contestant, Options, Report, Spread, contestants, header, prepare, run_sender

NUMBER = 50_000
WARM = 5_000
CLIENTS = {"h2load": 1.0, "gohttp": 0.5}
"""Those who ask, and their share of the requests."""
YARDSTICK = "granian-echo"
START_S = 15


class Run(msgspec.Struct, frozen=True):
    cpu_us: float
    rate: float
    rss_mb: float


def run(options: Options) -> Report:
    if not PROC.exists():
        raise Absent("the CPU of a server's processes is read from /proc, which this system does not have")
    number = options.number or NUMBER
    report = Report(
        "server",
        header(
            clients=", ".join(CLIENTS) + ", on the core of the far side",
            connections=1,
            streams="1000 in flight, as far as the server allows",
            rounds=options.rounds,
            requests=f"{number:,} a run (slow ones fewer), POST of 118 octets, TLS",
        ),
    )
    servers = prepare(contestants("server", options.only), report)
    clients = prepare(contestants("sender", CLIENTS), report)
    found: dict[tuple[str, str], list[Run]] = {}
    out: set[str] = set()
    for turn in range(options.rounds):
        for server, serve in servers.items():
            for client, command in clients.items():
                if server.name in out:
                    continue
                n = max(1000, int(number * server.share * CLIENTS[client.name]))
                task = Task(0, n, 1, 1, 1000, options.data, options.tokens)
                try:
                    one = _run_once(server, serve, client.name, command, task)
                except Failed as why:
                    out.add(server.name)
                    report.failures.append(str(why))
                    continue
                found.setdefault((client.name, server.name), []).append(one)
                progress = f"round {turn + 1} of {options.rounds}: {server.name} under {client.name}"
                say(f"{progress} {one.cpu_us:.1f} us, {one.rate:,.0f}/s")
    for (client_name, server_name), runs in sorted(
        found.items(), key=lambda item: (item[0][0], statistics.median(one.cpu_us for one in item[1]))
    ):
        if server_name in out:
            continue
        yardstick = found.get((client_name, YARDSTICK))
        report.rows.append(
            {
                "client": client_name,
                "server": server_name,
                "CPU us / request": Spread.of([one.cpu_us for one in runs]),
                f"x {YARDSTICK}": Spread.of([a.cpu_us / b.cpu_us for a, b in zip(runs, yardstick, strict=True)])
                if yardstick and YARDSTICK not in out
                else "-",
                "rate / s": Spread.of([one.rate for one in runs]),
                "RSS MB": max(one.rss_mb for one in runs),
            }
        )
    return report


def _run_once(server: Contestant, serve: Sequence[str], client: str, command: Sequence[str], task: Task) -> Run:
    with running(server.name, serve, task.data) as (pid, port):
        task = msgspec.structs.replace(task, port=port)
        warm_up = msgspec.structs.replace(task, n=max(1000, int(WARM * server.share)))
        label = f"{client} against {server.name}"
        run_sender(label, command, warm_up, core=FAR_SIDE_CORE)
        before = cpu_of_tree(pid)
        answer = run_sender(label, command, task, core=FAR_SIDE_CORE)
        cpu = cpu_of_tree(pid) - before
        return Run(cpu / task.n * 1e6, answer.n / answer.secs, rss_of_tree_mb(pid))


@contextmanager
def running(name: str, command: Sequence[str], data: Path) -> Iterator[tuple[int, int]]:
    """A server on the contestant's core that listens: its pid and port. Stopped at the end, with what it started.

    It is told `BENCH_PORT` and `BENCH_DATA` and listens on 127.0.0.1 with TLS until SIGTERM.
    """
    port = free_port()
    with tempfile.TemporaryFile("w+") as log:
        with on_core(CONTESTANT_CORE):
            process = subprocess.Popen(
                command,
                env=os.environ | {"BENCH_PORT": str(port), "BENCH_DATA": str(data)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=BENCH.parent,
                start_new_session=True,
            )
        try:
            if not _listens(process, port, data):
                log.seek(0)
                raise Failed(f"{name} did not listen within {START_S} s: {last_words(log.read())}")
            yield process.pid, port
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _listens(process: subprocess.Popen[bytes], port: int, data: Path) -> bool:
    tls = ssl.create_default_context(cafile=data / "ca.pem")
    tls.set_alpn_protocols(["h2"])
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with (
                socket.create_connection(("127.0.0.1", port), timeout=1) as plain,
                tls.wrap_socket(plain, server_hostname="127.0.0.1") as shaken,
            ):
                return shaken.selected_alpn_protocol() == "h2"
        except OSError:
            time.sleep(0.05)
    return False
