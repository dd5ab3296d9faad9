"""sideshow/apns2: the Go library most used for APNs."""

from __future__ import annotations

from collections.abc import Sequence

from bench.building import BENCH, BUILD, build, need
from bench.rounds import Contestant


def prepare() -> Sequence[str]:
    go = need("go", "https://go.dev/dl, 1.26 or newer")
    source, product = BENCH / "peers" / "apns2", BUILD / "apns2"
    sources = [source / name for name in ("go.mod", "go.sum", "main.go")]
    build(product, sources, [[go, "build", "-o", str(product), "."]], source)
    return [str(product)]


CONTESTANTS = (Contestant("apns2", "sender", prepare, share=0.1, warm=10_000),)
