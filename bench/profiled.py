"""`heliograph serve` with a sampler in it: which part of the program its CPU time went into.

`python -m bench.profiled CONFIG OUTPUT`. A timer interrupts the event loop's thread for each millisecond that it works,
or as often as the system's clock ticks. What that thread used since the last time, by its CPU clock, is booked to the
innermost frame that belongs to a known part: so waiting costs nothing, and the sum is exact. Other threads do one thing
each and are booked by name. The same is booked by function: to the innermost one, and to all that are on the stack.
"""

from __future__ import annotations

import asyncio
import ctypes
import signal
import sys
import threading
import time
from collections import defaultdict
from operator import itemgetter
from pathlib import Path
from types import FrameType

import msgspec

INTERVAL_S = 0.001
PARTS = (
    # part of the file's path, name of the function where that narrows it down
    ("/heliograph/net/http1.py", "", "HTTP server"),
    ("/heliograph/net/http2.py", "_write", "Apple's wire: TLS and sockets, out"),
    ("/heliograph/net/http2.py", "", "Apple's wire: driving"),
    ("/heliograph/protocols/http2/", "", "Apple's wire: HTTP/2 and HPACK"),
    ("/heliograph/carriers/", "", "carrier: backlog and connections"),
    ("/heliograph/doors/apple", "", "proxy: requests and answers"),
    ("/heliograph/net/streams.py", "", "scripts' wire: TLS and sockets"),
    ("/heliograph/protocols/binary.py", "", "scripts' wire: frames"),
    ("/heliograph/doors/legacy", "", "gateway"),
    ("/heliograph/doors/", "", "API: JSON and columns"),
    ("/heliograph/payload/", "", "admission: payloads"),
    ("/heliograph/protocols/apns.py", "", "admission: tokens and headers"),
    ("/heliograph/relay/", "", "relay: admission, progress, settling"),
    ("/heliograph/batches.py", "", "relay: admission, progress, settling"),
    ("/heliograph/policy.py", "", "relay: admission, progress, settling"),
    ("/heliograph/telemetry.py", "", "metrics"),
    ("/heliograph/stores/", "", "store: rows of batches and outcomes"),
    ("/uvicorn/", "", "HTTP server"),
    ("/starlette/", "", "HTTP server"),
)
_libc = ctypes.CDLL(None, use_errno=True)
REST = "event loop: TLS and sockets, in; scheduling"


TOP = 20


class Profile(msgspec.Struct, frozen=True):
    """CPU seconds."""

    parts: dict[str, float]
    own: dict[str, float]
    """By function, in itself and in the C that it calls."""
    within: dict[str, float]
    """By function, in it and in all that it calls."""


class Sampler:
    def __init__(self) -> None:
        self.cpu: defaultdict[str, float] = defaultdict(float)
        self.own: defaultdict[str, float] = defaultdict(float)
        self.within: defaultdict[str, float] = defaultdict(float)
        self._clocks: dict[int, float] = {}
        self._timer = ctypes.c_void_p()

    def start(self) -> None:
        signal.signal(signal.SIGALRM, self._sample)
        # By the thread's CPU clock, which Python's own timers do not offer. By the wall's, signals would come up while
        # the thread waits for the interpreter's lock, and whatever gave that up would be booked what others had used.
        event = (ctypes.c_int * 16)(0, 0, signal.SIGALRM)  # struct sigevent; a 0 behind the signal is SIGEV_SIGNAL
        if _libc.timer_create(time.CLOCK_THREAD_CPUTIME_ID, event, ctypes.byref(self._timer)):
            raise OSError(ctypes.get_errno(), "timer_create")
        self._set_timer(INTERVAL_S)

    def end(self) -> None:
        self._set_timer(0)

    def _set_timer(self, interval_s: float) -> None:
        nanoseconds = int(interval_s * 1e9)
        times = (ctypes.c_long * 4)(0, nanoseconds, 0, nanoseconds)  # struct itimerspec
        if _libc.timer_settime(self._timer, 0, times, None):
            raise OSError(ctypes.get_errno(), "timer_settime")

    def _sample(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signal's number
        others = sys._current_frames()  # noqa: SLF001 - the only way to see where other threads are
        for thread in threading.enumerate():
            if thread.ident is None:
                continue
            used = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
            spent = used - self._clocks.get(thread.ident, used)
            self._clocks[thread.ident] = used
            if thread is threading.main_thread():
                part = part_of(frame)
                self._book(frame if not _interrupted_loop(frame) else frame and frame.f_back, spent)
            else:
                part = f"thread {thread.name}"
                self._book(others.get(thread.ident), spent)
            self.cpu[part] += spent

    def _book(self, frame: FrameType | None, spent: float) -> None:
        if frame is not None:
            self.own[_function(frame)] += spent
        seen = set()
        while frame is not None:
            seen.add(_function(frame))
            frame = frame.f_back
        for name in seen:
            self.within[name] += spent


def part_of(frame: FrameType | None) -> str:
    if _interrupted_loop(frame):
        return REST
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        for path, name, part in PARTS:
            if path in file and (not name or name == function):
                return part
        frame = frame.f_back
    return REST


def _interrupted_loop(frame: FrameType | None) -> bool:
    """Whether a function is on its first instruction (what stands before it makes its cells) that the loop has called.

    Then the signal came while the loop, which is C, was at work: signals wait for Python code.
    """
    return frame is not None and _is_loop(frame.f_back) and frame.f_lasti <= 2 * (len(frame.f_code.co_cellvars) + 1)


def _function(frame: FrameType) -> str:
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])} {frame.f_code.co_qualname}"


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
    output.write_bytes(msgspec.json.encode(Profile(sampler.cpu, sampler.own, sampler.within)))


def report_lines(output: Path, cpu_us: float, *, functions: bool) -> list[str]:
    """What a profile says, as shares of `cpu_us`, which a notification costs where no sampler runs."""
    profile = msgspec.json.decode(output.read_bytes(), type=Profile)
    total = sum(profile.parts.values())

    def line(what: str, cpu: float, more: str = "") -> str:
        return f"  {cpu / total:4.0%}  {cpu / total * cpu_us:6.2f} us  {more}{what}"

    lines = [line(part, cpu) for part, cpu in _most(profile.parts) if cpu >= 0.01 * total]
    if functions:
        lines.append(
            f"The {TOP} functions that take most themselves, with the C that they call; in brackets, with all:"
        )
        for name, cpu in _most(profile.own)[:TOP]:
            lines.append(line(name, cpu, f"({profile.within[name] / total * cpu_us:6.2f})  "))
        lines.append(f"The {2 * TOP} functions that take most with all that they call:")
        lines += (line(name, cpu) for name, cpu in _most(profile.within)[: 2 * TOP])
    return lines


def _most(booked: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(booked.items(), key=itemgetter(1), reverse=True)


if __name__ == "__main__":
    main()
