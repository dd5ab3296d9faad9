"""Single notifications, each a request, from `load.c`: on the far side's core, and cheap enough to share it."""

from __future__ import annotations

import math
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.building import BUILD, Failed, c_program, last_words
from bench.machine import FAR_SIDE_CORE, on_core
from bench.serving import APP, Server

CONNECTIONS = 64
SEQUENCE = b"0" * 10
"""Where a sequence number goes; the far side looks for it behind `"id":"`."""
_KEY = "0192f3b2-6f0e-7c51-9a3d-"
"""With a sequence number behind it an idempotency key about as long as people send."""
_ENTRY = struct.Struct("=QQQII")  # as in load.c


class Loaded(msgspec.Struct, frozen=True):
    """What became of the requests, in order of their sequence numbers. Times are time.monotonic_ns()."""

    began_ns: Sequence[int]
    """Right before the request went to the kernel; where it was held up as no connection was free, when it was due."""
    answered_ns: Sequence[int]
    late_ns: int
    """How late the client itself was, at worst. It counts in nothing else."""
    cpu: float
    """CPU seconds of the client."""

    @property
    def secs(self) -> float:
        return (max(self.answered_ns) - min(self.began_ns)) / 1e9

    @property
    def answer_ms(self) -> list[float]:
        return waits_ms(self.began_ns, self.answered_ns)


def load(
    server: Server,
    data: Path,
    *,
    number: int,
    first: int = 0,
    per_second: float = 0,
    connections: int = CONNECTIONS,
    app: str = APP,
    once: bool = False,
) -> Loaded:
    """Post `number` single notifications with the sequence numbers from `first` on; each must be answered 2xx.

    `per_second` 0: each connection sends as soon as it was answered. `once`: each with an `Idempotency-Key` of its own.
    Raises Absent and Failed.
    """
    program = c_program("load", "#include <sys/timerfd.h>\n")
    tokens = data / "tokens.txt"
    with tokens.open() as file:
        token = file.readline().strip().encode()
    payload = msgspec.json.decode((data / "body.json").read_bytes()) | {"id": SEQUENCE.decode()}
    body = b'{"app":"%s","token":"%s","payload":%s}' % (app.encode(), token, msgspec.json.encode(payload))
    request = server.http_post(body, {"idempotency-key": _KEY + SEQUENCE.decode()} if once else {})
    with tempfile.NamedTemporaryFile(dir=BUILD) as given, tempfile.NamedTemporaryFile(dir=BUILD) as log:
        given.write(request)
        given.flush()
        where = ["-s", request.index(b'"id":"' + SEQUENCE) + 6, "-t", request.index(token)]
        if once:
            where += ["-s", request.index(_KEY.encode() + SEQUENCE) + len(_KEY)]
        amount = ["-n", number, "-f", first, "-r", per_second, "-c", connections]
        command = [program, "-p", server.port, "-q", given.name, "-d", tokens, "-o", log.name, *where, *amount]
        with on_core(FAR_SIDE_CORE):
            done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"the client ended with {done.returncode}: {last_words(done.stderr)}")
        began, answered, late, _, _ = zip(*_ENTRY.iter_unpack(Path(log.name).read_bytes()), strict=True)
    return Loaded(began, answered, max(late), float(msgspec.json.decode(done.stdout)["cpu"]))


def waits_ms(began_ns: Sequence[int], ended_ns: Sequence[int]) -> list[float]:
    """Sorted, in milliseconds."""
    return sorted((ended - began) / 1e6 for began, ended in zip(began_ns, ended_ns, strict=True))


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all does not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
