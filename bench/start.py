"""How long it takes until the first push is accepted after `serve` starts, and what an import costs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.building import BUILD, Failed, say
from bench.far_side import sink
from bench.machine import CONTESTANT_CORE, on_core
from bench.pki import PAYLOAD
from bench.rounds import Options, Report, Spread, header
from bench.serving import APP, await_listening, heliograph

IMPORTS = {
    "python -c pass": "pass",
    "python -c 'import heliograph'": "import heliograph",
    "python -c 'import heliograph.service'": "import heliograph.service",
}


def run(options: Options) -> Report:
    report = Report("start", header(far_side="bench/sink.c, TLS 1.3", rounds=options.rounds))
    found: dict[str, list[float]] = {}
    for turn in range(options.rounds):
        for name, code in IMPORTS.items():
            found.setdefault(name, []).append(_timed(lambda code=code: _python(code)))  # type: ignore[misc]
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            for name in ("a new data folder", "a data folder that is there"):
                listening, accepted = _first_push(Path(folder), options)
                found.setdefault(f"serve with {name}: listens", []).append(listening)
                found.setdefault(f"serve with {name}: first push accepted", []).append(accepted)
                say(f"round {turn + 1} of {options.rounds}: {accepted * 1000:.0f} ms to the first push with {name}")
    report.rows += ({"what": name, "ms": Spread.of([each * 1000 for each in times])} for name, times in found.items())
    report.notes.append(
        "From the start of the process, the far side is there already; accepted is what the receipt says."
    )
    return report


def _timed(what: Callable[[], object]) -> float:
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


def _python(code: str) -> None:
    with on_core(CONTESTANT_CORE):
        subprocess.run([sys.executable, "-c", code], check=True)


def _first_push(folder: Path, options: Options) -> tuple[float, float]:
    """Seconds until the API listens, and until the first push is accepted."""
    token = options.tokens.open().readline().strip()
    body = json.dumps({"app": APP, "token": token, "payload": PAYLOAD, "wait": 10}).encode()
    with sink(options.data) as apple:
        began = time.perf_counter()
        with heliograph(folder, options.data, apple.port) as server:
            await_listening(server)
            listening = time.perf_counter() - began
            connection = server.connect()
            receipt = server.post(connection, body)
            accepted = time.perf_counter() - began
            connection.close()
            if receipt.get("state") != "accepted":
                raise Failed(f"the first push is {receipt.get('state')}: {receipt.get('reason')}")
    return listening, accepted
