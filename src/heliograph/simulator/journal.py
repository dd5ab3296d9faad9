"""The journal: a file with a line for each request, written before it is answered."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from heliograph.errors import ConfigError
from heliograph.protocols.http2 import Request
from heliograph.simulator.apple import Verdict, addressed_to


class Judged(Struct, frozen=True, omit_defaults=True):
    """A line of the journal: one request, and what it was answered."""

    at: float
    """UNIX seconds."""
    connection: int
    """Counted from 1."""
    stream: int
    token: str
    sha256: str
    """Of the body, as hex."""
    apns_id: str | None = None
    """The client's, or the one that it was answered with."""
    collapse_id: str | None = None
    status: int | None = None
    """None where the request was not judged."""
    reason: str | None = None
    fault: str | None = None
    """`withheld`, `cut`: judged, not answered. `closed`, `error-packet`: not judged. `reset`: `status` says which."""
    code: int | None = None
    """Of the reset, or the status in the error packet that a frame of the binary gateway drew."""
    topic: str = ""
    identifier: int | None = None
    """As in `Received`. Then `stream` is the frame's place on its connection, counted from 1."""


class Journal:
    """A file of `Judged` lines. What was written survives the end of this process."""

    def __init__(self, path: Path) -> None:
        try:
            self._file: int | None = open_private(path, os.O_APPEND)
        except OSError as error:
            raise ConfigError(f"The journal {path} cannot be written ({error.strerror}): name another file") from None

    def write(self, lines: Sequence[Judged]) -> None:
        if self._file is not None:  # a connection may outlive the simulator by a turn of the loop
            os.write(self._file, b"".join([msgspec.json.encode(line) + b"\n" for line in lines]))

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def line_of(
    now: float,
    connection: int,
    request: Request,
    verdict: Verdict | None,
    fault: str | None,
    code: int | None,
    identifier: int | None = None,
) -> Judged:
    """A request as the journal tells of it; `verdict` is None where it was not judged."""
    fields = dict(request.fields)
    token, topic = addressed_to(request.fields)
    apns_id = fields.get(b"apns-id") if verdict is None else verdict.apns_id
    collapse_id = fields.get(b"apns-collapse-id")
    return Judged(
        now,
        connection,
        request.stream_id,
        token.decode("ascii", "replace"),
        hashlib.sha256(request.body).hexdigest(),
        None if apns_id is None else apns_id.decode("ascii", "replace"),
        None if collapse_id is None else collapse_id.decode("utf-8", "replace"),
        None if verdict is None else verdict.status,
        None if verdict is None else verdict.reason,
        fault,
        code,
        topic.decode("utf-8", "replace"),
        identifier,
    )


def open_private(path: Path, how: int) -> int:
    """A file that only its owner can read, opened for writing; `how` is `os.O_APPEND` or `os.O_TRUNC`."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | how, 0o600)
