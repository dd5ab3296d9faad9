"""heliograph's simulator: provider token, topic, device token and payload are checked.

It allows 1,000 streams from the start, as the echoes do, and not one until a good provider token came, as Apple does:
h2load opens a hundred before it reads anybody's SETTINGS, and counts those that are refused as failed.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.pki import KEY_ID, TEAM_ID, TOPIC
from bench.rounds import Contestant
from heliograph.model import SigningKey
from heliograph.net.tls import Identity
from heliograph.simulator.server import STREAMS, Simulator


def prepare() -> Sequence[str]:
    return [sys.executable, "-m", "bench.contestants.heliograph_server"]


CONTESTANTS = (Contestant("heliograph", "server", prepare),)


async def main() -> None:
    data = Path(os.environ["BENCH_DATA"])
    ca, certificate, key = ((data / name).read_bytes() for name in ("ca.pem", "server.pem", "server.key"))
    simulator = Simulator(
        port=int(os.environ["BENCH_PORT"]),
        identity=Identity(ca, certificate, key),
        first_streams=STREAMS,
        signing_key=SigningKey(KEY_ID, TEAM_ID, (data / "AuthKey.p8").read_bytes()),
    )
    simulator.add_app(TOPIC)
    async with simulator:
        await asyncio.Event().wait()


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
