"""Instants at which a test may have this process die as by kill -9.

`HELIOGRAPH_CRASH_AT=settled:3` kills it the third time it comes by `settled`. Without the variable, a point costs one
look at an empty dict. The names:

| name | when |
|---|---|
| `before-commit`, `after-commit` | a transaction that changes something is about to be, or was, committed |
| `taken` | a request is durable, and its 2xx not yet sent |
| `leased` | batches are leased, and nothing of them sent |
| `sent` | requests were handed to the socket |
| `answered` | Apple answered, and nothing of it is recorded |
| `recorded` | outcomes are recorded, their leases not ended |
| `finished` | leases are ended |
| `buried` | something was given up on, and that is not recorded |
| `checkpoint` | the log is about to be folded into the file |
| `purge` | between two steps of a purge |
| `stopping` | the server stops in order, and has closed the carrier |
"""

from __future__ import annotations

import os
import signal

VARIABLE = "HELIOGRAPH_CRASH_AT"


def _read(text: str) -> dict[str, int]:
    name, _, times = text.partition(":")
    return {name: int(times or 1)} if name else {}


_left = _read(os.environ.get(VARIABLE, ""))


def point(name: str) -> None:
    """Die here, if that is what is wanted."""
    if _left and name in _left:
        _left[name] -= 1
        if not _left[name]:
            os.kill(os.getpid(), signal.SIGKILL)
