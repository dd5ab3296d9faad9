"""Servers that people would write an APNs stand-in with: granian (Rust) and hypercorn (h2), each with the same echo."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench.building import Absent
from bench.rounds import Contestant

APPLICATION = "bench.asgi_echo:app"


def prepare(package: str) -> Sequence[str]:
    if importlib.util.find_spec(package) is None:
        raise Absent(f"the Python package {package} is not installed: it is in the dependency group `bench`")
    return [sys.executable, "-m", "bench.contestants.asgi_echoes", package]


CONTESTANTS = (
    Contestant("granian-echo", "server", partial(prepare, "granian")),
    Contestant("hypercorn-echo", "server", partial(prepare, "hypercorn"), share=0.1),
)


def granian(port: int, data: Path) -> None:
    from granian.constants import HTTPModes, Interfaces, Loops
    from granian.http import HTTP2Settings
    from granian.server import Server

    Server(
        APPLICATION,
        address="127.0.0.1",
        port=port,
        interface=Interfaces.ASGI,
        workers=1,
        loop=Loops.uvloop,
        http=HTTPModes.http2,
        http2_settings=HTTP2Settings(max_concurrent_streams=1000),
        ssl_cert=data / "server.pem",
        ssl_key=data / "server.key",
        log_access=False,
    ).serve()


def hypercorn(port: int, data: Path) -> None:
    from hypercorn.config import Config
    from hypercorn.run import run

    config = Config()
    config.application_path = APPLICATION
    config.bind = [f"127.0.0.1:{port}"]
    config.certfile, config.keyfile = str(data / "server.pem"), str(data / "server.key")
    config.worker_class = "uvloop"
    config.workers = 1
    # its default: with 1,000 it stands still once their bodies have filled its connection window of 64 kB
    config.h2_max_concurrent_streams = 100
    config.keep_alive_max_requests = 1_000_000_000  # by default it hangs up after 1,000 requests
    run(config)


if __name__ == "__main__":
    {"granian": granian, "hypercorn": hypercorn}[sys.argv[1]](
        int(os.environ["BENCH_PORT"]), Path(os.environ["BENCH_DATA"])
    )
