"""The neutral far side, `sink.c`: built on first use, started once for each contestant's run.

Once for each, so that every contestant meets the same fresh process and what the sink counted (bad requests, CPU) is
one contestant's doing. It costs 10 ms and falls outside the measured time.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec

from bench.building import BENCH, BUILD, Absent, Failed, build, need
from bench.machine import FAR_SIDE_CORE, on_core

GET_THEM = "apt-get install gcc libnghttp2-dev libssl-dev"


class Seen(msgspec.Struct, frozen=True):
    """What the sink saw, for good once it has ended."""

    requests: int
    bad: int
    connections: int
    most_open: int
    header_octets: int
    cpu: float
    fault: str


class Sink:
    """A running far side. `seen` is there once the `with` is left."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.pid = process.pid
        self.port = port
        self.seen: Seen | None = None


def program() -> Path:
    """The built sink. Raises Absent where compiler or headers are missing."""
    compiler = need("gcc", GET_THEM)
    probe = "#include <nghttp2/nghttp2.h>\n#include <openssl/ssl.h>\n"
    headers = subprocess.run([compiler, "-E", "-"], input=probe, check=False, capture_output=True, text=True)
    if headers.returncode:
        raise Absent(f"the headers of nghttp2 and OpenSSL are not on this machine: {GET_THEM}")
    product, source = BUILD / "sink", BENCH / "sink.c"
    # Debian's nghttp2 and newer ones name the inflate function differently; both still have this one
    flags = ["-O2", "-Wall", "-Wextra", "-Wno-deprecated-declarations"]
    libraries = ["-lssl", "-lcrypto", "-lnghttp2"]
    build(product, [source], [[compiler, *flags, "-o", str(product), str(source), *libraries]], BUILD)
    return product


@contextmanager
def sink(data: Path, *, latency_ms: int = 0, max_streams: int = 1000) -> Iterator[Sink]:
    """A sink on the far side's core; `latency_ms` is how much later than the request an answer leaves."""
    command = [str(program()), "-c", str(data / "server.pem"), "-k", str(data / "server.key")]
    options = ["-l", str(latency_ms), "-m", str(max_streams)]
    with on_core(FAR_SIDE_CORE):
        process = subprocess.Popen(
            [*command, *options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    assert process.stdout is not None
    running = Sink(process, _port(process, process.stdout))
    try:
        yield running
    finally:
        process.send_signal(signal.SIGTERM)
        rest, errors = process.communicate(timeout=10)
    if process.returncode:
        raise Failed(f"the far side ended with {process.returncode}: {errors}")
    running.seen = msgspec.json.decode(rest, type=Seen)


def _port(process: subprocess.Popen[str], stdout: IO[str]) -> int:
    line = stdout.readline()
    if not line:
        raise Failed(f"the far side did not start: {process.communicate()[1]}")
    return int(msgspec.json.decode(line)["port"])
