"""`heliograph serve` with a sampler in it: which part of the program its CPU time went into.

`python -m bench.profiled CONFIG OUTPUT`. A timer interrupts the event loop's thread each millisecond. What that thread
used since the last time, by its CPU clock, is booked to the innermost frame that belongs to a known part: so waiting
costs nothing, and the sum is exact. Other threads do one thing each and are booked by name.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import threading
import time
from collections import defaultdict
from operator import itemgetter
from pathlib import Path
from types import FrameType

INTERVAL_S = 0.001
PARTS = (
    # part of the file's path, name of the function where that narrows it down
    ("/heliograph/net/http2.py", "_write", "Apple's wire: TLS and sockets, out"),
    ("/heliograph/net/http2.py", "", "Apple's wire: driving"),
    ("/heliograph/protocols/http2/", "", "Apple's wire: HTTP/2 and HPACK"),
    ("/heliograph/carriers/", "", "carrier: backlog and connections"),
    ("/heliograph/doors/", "", "API: JSON and columns"),
    ("/heliograph/payload.py", "", "admission: payloads"),
    ("/heliograph/protocols/apns.py", "", "admission: tokens and headers"),
    ("/heliograph/relay.py", "", "relay: admission, progress, settling"),
    ("/heliograph/batches.py", "", "relay: admission, progress, settling"),
    ("/heliograph/policy.py", "", "relay: admission, progress, settling"),
    ("/heliograph/telemetry.py", "", "metrics"),
    ("/heliograph/stores/", "", "store: rows of batches and outcomes"),
    ("/uvicorn/", "", "HTTP server"),
    ("/starlette/", "", "HTTP server"),
)
REST = "event loop: TLS and sockets, in; scheduling"


class Sampler:
    def __init__(self) -> None:
        self.cpu: defaultdict[str, float] = defaultdict(float)
        self._clocks: dict[int, float] = {}

    def start(self) -> None:
        signal.signal(signal.SIGALRM, self._sample)
        signal.setitimer(signal.ITIMER_REAL, INTERVAL_S, INTERVAL_S)

    def end(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _sample(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signal's number
        for thread in threading.enumerate():
            if thread.ident is None:
                continue
            used = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
            part = part_of(frame) if thread is threading.main_thread() else f"thread {thread.name}"
            self.cpu[part] += used - self._clocks.get(thread.ident, used)
            self._clocks[thread.ident] = used


def part_of(frame: FrameType | None) -> str:
    if frame is not None and _is_loop(frame.f_back) and frame.f_lasti <= 2 * (len(frame.f_code.co_cellvars) + 1):
        # On a function's first instruction (what stands before it makes its cells): the signal came while the loop,
        # which is C, was at work, and signals wait for Python code.
        return REST
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        for path, name, part in PARTS:
            if path in file and (not name or name == function):
                return part
        frame = frame.f_back
    return REST


def _is_loop(frame: FrameType | None) -> bool:
    return frame is not None and "/asyncio/" in frame.f_code.co_filename


def main() -> None:
    from heliograph import service
    from heliograph.config import load

    config, output = load(Path(sys.argv[1])), Path(sys.argv[2])
    sampler = Sampler()
    sampler.start()
    with asyncio.Runner(loop_factory=service.new_event_loop) as runner:
        runner.run(service.run(config))
    sampler.end()
    output.write_text(json.dumps(sorted(sampler.cpu.items(), key=itemgetter(1), reverse=True)))


if __name__ == "__main__":
    main()
