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
from bench.rounds import Options, Report

BENCHES = {
    "sender": "CPU for each notification of the bare sender, beside h2load and other libraries",
    "rtt": "rate under 20 ms round trip with 1, 4 and 10 connections",
    "server": "requests a second and CPU for each of the simulator, beside granian and hypercorn",
    "start": "time from `serve` to the first push, and of `import heliograph`",
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
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--number", type=int, help="notifications or requests of a run")
    parser.add_argument("--only", default="", help="contestants to take, with commas between")
    parser.add_argument("--mixed-tokens", action="store_true", help="each tenth device token of another length")
    given = parser.parse_args()
    if given.rounds < 1 or (given.number is not None and given.number < 1):
        parser.error("--rounds and --number are 1 or more")
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        data = Path(folder)
        pki.make(data)
        only = frozenset(filter(None, given.only.split(",")))
        options = Options(data, given.rounds, given.number, only, given.mixed_tokens)
        try:
            report: Report = import_module(f"bench.{given.bench}").run(options)
        except (Absent, Failed) as why:
            print(f"bench {given.bench}: {why}", file=sys.stderr)
            return 1
    print(msgspec.json.format(msgspec.json.encode(report)).decode() if given.json else report.text())
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
