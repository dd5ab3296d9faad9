"""An old script, as a program of its own: writes frames that were made beforehand, or keeps connections open.

`python -m bench.script TASK`, with a `Task` as JSON. Once its connections stand it prints a line. It begins at a line
on its standard input, prints `Written` as JSON, and ends its connections when its standard input ends.
"""

from __future__ import annotations

import itertools
import socket
import ssl
import sys
import threading
import time
from pathlib import Path

import msgspec

from heliograph.protocols.binary import enhanced_frame

PIECE = 16 * 1024
"""Octets handed over at once: what a TLS record holds."""
SEQUENCE = b"0" * 10
"""Where a sequence number goes in the payload; the far side looks for it behind `"id":"`."""
EXPIRES = 2**31 - 1
SHAKING = 4
"""Connections that are opened at a time."""


class Task(msgspec.Struct, frozen=True):
    port: int
    certificate: str
    """A path: certificate and key, as PEM."""
    tokens: str
    """A path: device tokens, a line each."""
    payload: str
    """JSON with `SEQUENCE` in it."""
    connections: int
    number: int
    """Frames, shared out evenly."""
    first: int = 0
    """The first sequence number, and identifier."""
    per_second: float = 0
    """By a timetable, each in a write of its own; 0: as fast as they are taken."""


class Written(msgspec.Struct, frozen=True):
    """Times are time.monotonic_ns()."""

    began_ns: list[int]
    """Right before the write of each frame, in the order of their numbers; without a timetable of the first."""
    ended_ns: int
    late_ns: int
    """How late a frame was written after it was due, at most."""
    cpu: float


def main() -> None:
    task = msgspec.json.decode(sys.argv[1], type=Task)
    frames = _frames(task)
    connections = _open(task)
    print("open", flush=True)
    if not sys.stdin.readline():
        return
    before = time.process_time()
    began, late = [time.monotonic_ns()], 0
    if task.per_second:
        began, late = _by_timetable(connections[0], frames, task.per_second)
    else:
        share = -(-len(frames) // task.connections)
        parts = [b"".join(frames[at : at + share]) for at in range(0, len(frames), share)]
        began = [time.monotonic_ns()]
        writing = [threading.Thread(target=_write, args=pair) for pair in zip(connections, parts, strict=False)]
        for each in writing:
            each.start()
        for each in writing:
            each.join()
    written = Written(began, time.monotonic_ns(), late, time.process_time() - before)
    print(msgspec.json.encode(written).decode(), flush=True)
    sys.stdin.read()
    for connection in connections:
        connection.close()


def _frames(task: Task) -> list[bytes]:
    tokens = itertools.cycle(Path(task.tokens).read_bytes().split())
    before, after = task.payload.encode().split(SEQUENCE)
    return [
        enhanced_frame(token, b"%b%010d%b" % (before, number, after), number, EXPIRES)
        for number, token in zip(range(task.first, task.first + task.number), tokens, strict=False)
    ]


def _open(task: Task) -> list[ssl.SSLSocket]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(task.certificate)
    opened: list[ssl.SSLSocket] = []

    def work(count: int) -> None:
        for _ in range(count):
            plain = socket.create_connection(("127.0.0.1", task.port), 30)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            opened.append(context.wrap_socket(plain, server_hostname="localhost"))

    workers = min(SHAKING, task.connections)
    counts = [len(range(at, task.connections, workers)) for at in range(workers)]
    working = [threading.Thread(target=work, args=(count,)) for count in counts]
    for each in working:
        each.start()
    for each in working:
        each.join()
    if len(opened) < task.connections:
        sys.exit(f"{len(opened)} of {task.connections} connections could be opened")
    return opened


def _write(connection: ssl.SSLSocket, octets: bytes) -> None:
    view = memoryview(octets)
    for at in range(0, len(octets), PIECE):
        connection.sendall(view[at : at + PIECE])


def _by_timetable(connection: ssl.SSLSocket, frames: list[bytes], per_second: float) -> tuple[list[int], int]:
    began: list[int] = []
    late = 0
    start = time.monotonic_ns() + 10_000_000
    for number, frame in enumerate(frames):
        due = start + int(number / per_second * 1e9)
        while (left := due - time.monotonic_ns()) > 0:
            time.sleep(left / 1e9)
        began.append(time.monotonic_ns())
        late = max(late, began[-1] - due)
        connection.sendall(frame)
    return began, late


if __name__ == "__main__":
    main()
