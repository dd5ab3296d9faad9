"""`python -m bench NAME [--json] [--rounds N]`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import msgspec

from bench import pki
from bench.building import BUILD, Absent, Failed
from bench.rounds import ROUNDS, Options, Report

BENCHES = {
    "sender": "CPU for each notification of the bare sender, beside h2load and other libraries",
    "rtt": "rate under 20 ms round trip with 1, 4 and 10 connections",
    "server": "requests a second and CPU for each of the simulator, beside granian and hypercorn",
    "start": "time from `serve` to the first push, and of `import heliograph`",
    "single": "one notification a request, durable: rate, latency of the answer, CPU, beside a bare API",
    "latency": "from the request to Apple's wire at a steady rate, the commit included",
    "memory": "resident memory with 1,000,000 queued, while they drain, and the time to the first send",
    "fairness": "one app's latency while another has 200,000 queued",
    "gateway": "the gateway for old scripts: frames a second, how soon they are durable, idle connections",
    "proxy": "the Apple-shaped proxy: rate, CPU and added latency, beside nghttpx",
    "whole": "through the HTTP API in batches of 1,000, durable, and where the time goes",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:8} {what}" for name, what in BENCHES.items()),
    )
    parser.add_argument("bench", choices=BENCHES, metavar="NAME", help="one of those below")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 5; memory: 1)")
    parser.add_argument("--number", type=int, help="notifications or requests of a run")
    parser.add_argument("--only", default="", help="contestants to take, with commas between")
    parser.add_argument("--mixed-tokens", action="store_true", help="each tenth device token of another length")
    parser.add_argument(
        "--profile", action="store_true", help="whole, single, proxy, gateway: the functions that take time, too"
    )
    given = parser.parse_args()
    if any(count is not None and count < 1 for count in (given.rounds, given.number)):
        parser.error("--rounds and --number are 1 or more")
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        data = Path(folder)
        pki.make(data)
        only = frozenset(filter(None, given.only.split(",")))
        bench = import_module(f"bench.{given.bench}")
        rounds = given.rounds or getattr(bench, "ROUNDS", ROUNDS)
        options = Options(data, rounds, given.number, only, given.mixed_tokens, given.profile)
        try:
            report: Report = bench.run(options)
        except (Absent, Failed) as why:
            print(f"bench {given.bench}: {why}", file=sys.stderr)
            return 1
    print(msgspec.json.format(msgspec.json.encode(report)).decode() if given.json else report.text())
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
