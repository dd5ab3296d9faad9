"""The neutral far side, `sink.c`: built on first use, started once for each contestant's run.

Once for each, so that every contestant meets the same fresh process and what the sink counted (bad requests, CPU) is
one contestant's doing. It costs 10 ms and falls outside the measured time.
"""

from __future__ import annotations

import signal
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec

from bench.building import Failed, c_program
from bench.machine import FAR_SIDE_CORE, on_core

_ARRIVAL = struct.Struct("=QQ")  # as in sink.c


class Seen(msgspec.Struct, frozen=True):
    """What the sink saw, for good once it has ended."""

    requests: int
    bad: int
    connections: int
    most_open: int
    header_octets: int
    first_ns: int
    """time.monotonic_ns() of the first request; 0: there was none."""
    cpu: float
    fault: str


class Sink:
    """A running far side. `seen` is there once the `with` is left."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.pid = process.pid
        self.port = port
        self.seen: Seen | None = None
        self.arrivals: list[tuple[int, int]] = []
        """Sequence number and time.monotonic_ns() of each request that had one, in the order in which they came."""

    def must_have(self, requests: int) -> Seen:
        """What was seen, if it is so many sound requests. Raises Failed."""
        seen = self.seen
        assert seen is not None
        if seen.bad or seen.fault or seen.requests != requests:
            raise Failed(
                f"the far side saw {seen.requests} requests and not {requests}, {seen.bad} of them bad: {seen.fault}"
            )
        return seen

    def times(self, sequences: range) -> list[int]:
        """When each came, in ns. Raises Failed unless each of them came once."""
        came = dict(self.arrivals)
        missing = sum(1 for one in sequences if one not in came)
        if missing or len(came) < len(self.arrivals):
            again = len(self.arrivals) - len(came)
            raise Failed(f"of {len(sequences)} notifications {missing} never reached the far side, {again} came again")
        return [came[one] for one in sequences]


def program() -> Path:
    """The built sink. Raises Absent where compiler or headers are missing."""
    probe = "#include <nghttp2/nghttp2.h>\n#include <openssl/ssl.h>\n"
    # Debian's nghttp2 and newer ones name the inflate function differently; both still have this one
    return c_program("sink", probe, ["-Wno-deprecated-declarations"], ["-lssl", "-lcrypto", "-lnghttp2"])


@contextmanager
def sink(
    data: Path, *, latency_ms: int = 0, max_streams: int = 1000, port: int = 0, log: bool = False
) -> Iterator[Sink]:
    """A sink on the far side's core; `latency_ms` is how much later than the request an answer leaves.

    `port` 0: any free one. `log`: keep when each sequence number came.
    """
    command = [str(program()), "-c", str(data / "server.pem"), "-k", str(data / "server.key")]
    options = ["-l", str(latency_ms), "-m", str(max_streams), "-p", str(port)]
    with tempfile.NamedTemporaryFile(dir=data) as arrivals:
        if log:
            options += ["-o", arrivals.name]
        with on_core(FAR_SIDE_CORE):
            process = subprocess.Popen(
                [*command, *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
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
        running.arrivals = [(sequence, ns) for ns, sequence in _ARRIVAL.iter_unpack(Path(arrivals.name).read_bytes())]


def _port(process: subprocess.Popen[str], stdout: IO[str]) -> int:
    line = stdout.readline()
    if not line:
        raise Failed(f"the far side did not start: {process.communicate()[1]}")
    return int(msgspec.json.decode(line)["port"])
