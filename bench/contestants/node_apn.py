"""node-apn: the Node library for APNs, as Parse maintains it."""

from __future__ import annotations

from collections.abc import Sequence

from bench.building import BENCH, BUILD, build, copy_sources, need
from bench.rounds import Contestant


def prepare() -> Sequence[str]:
    npm = need("npm", "apt-get install npm")
    node = need("node", "apt-get install nodejs")
    source, target = BENCH / "peers" / "node_apn", BUILD / "node_apn"
    copy_sources(source, target)
    install = [npm, "install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"]
    build(target / "node_modules", [source / "package.json"], [install], target)
    return [node, str(target / "bench.js")]


CONTESTANTS = (Contestant("node-apn", "sender", prepare, share=0.05, warm=60_000),)
