"""h2load (nghttp2): the yardstick.

It has no warm-up of its own for a fixed number of requests, so it runs twice: first with one request a connection,
which covers start, reading the URIs and TLS handshakes, then with the N. The difference is what the requests cost.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.building import need
from bench.contract import Meter, Task, cpu_used, peak_rss_mb, tell
from bench.pki import TOPIC
from bench.rounds import Contestant

URIS = 20_000


def prepare() -> Sequence[str]:
    need("h2load", "apt-get install nghttp2-client")
    return [sys.executable, "-m", "bench.contestants.h2load"]


CONTESTANTS = (Contestant("h2load", "sender", prepare),)


def h2load(task: Task, uris: Path, n: int) -> tuple[float, float, float]:
    """Wall seconds as h2load counts them (from the first connection on), CPU seconds of the process, RSS in MB."""
    # the number of URIs must not decide who gets which header: the constant ones are the same for all
    headers = {
        "apns-topic": TOPIC,
        "apns-push-type": "alert",
        "apns-priority": "10",
        "apns-expiration": "0",
        "authorization": "bearer " + (task.data / "jwt.txt").read_text(),
    }
    command = ["h2load", "-n", str(n), "-c", str(task.connections), "-m", str(task.streams), "-t", "1"]
    command += ["-d", str(task.data / "body.json"), "-i", str(uris)]
    command += [part for name, value in headers.items() for part in ("-H", f"{name}: {value}")]
    before = cpu_used()
    rss_mb, output = 0.0, ""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        while True:
            try:
                output = process.communicate(timeout=0.1)[0]
                break
            except subprocess.TimeoutExpired:
                # it keeps its memory to the end, so a look ten times a second sees the most of it
                rss_mb = max(rss_mb, peak_rss_mb(process.pid))
    cpu = cpu_used() - before
    statuses = re.search(r"status codes: (\d+) 2xx", output)
    finished = re.search(r"finished in ([\d.]+)(us|ms|s)", output)
    if statuses is None or finished is None or int(statuses[1]) != n:
        sys.exit(output)
    return float(finished[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[finished[2]], cpu, rss_mb


def main() -> None:
    task = Task.from_environment()
    version = subprocess.run(["h2load", "--version"], check=True, capture_output=True, text=True).stdout
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as uris:
        # one request a connection takes as many URIs as are there, so both runs read the same file
        uris.writelines(f"https://127.0.0.1:{task.port}/3/device/{token}\n" for token in task.device_tokens(URIS))
        uris.flush()
        idle_secs, idle_cpu, _ = h2load(task, Path(uris.name), task.connections)
        secs, cpu, rss_mb = h2load(task, Path(uris.name), task.connections + task.n)
    meter = Meter()
    meter.secs, meter.cpu = secs - idle_secs, cpu - idle_cpu
    tell("h2load", version.split("/")[-1].strip(), task, task.n, meter, rss_mb)


if __name__ == "__main__":
    main()
