"""Go's own HTTP/2 client, net/http: what a Go program without a library does; also a client of the server bench."""

from __future__ import annotations

from collections.abc import Sequence

from bench.building import BENCH, BUILD, build, need
from bench.rounds import Contestant


def prepare() -> Sequence[str]:
    go = need("go", "https://go.dev/dl, 1.26 or newer")
    source, product = BENCH / "peers" / "gohttp", BUILD / "gohttp"
    build(product, [source / "go.mod", source / "main.go"], [[go, "build", "-o", str(product), "."]], source)
    return [str(product)]


CONTESTANTS = (Contestant("gohttp", "sender", prepare, share=0.1, warm=10_000),)
