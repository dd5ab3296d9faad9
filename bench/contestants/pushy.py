"""Pushy: the Java library for APNs (Netty)."""

from __future__ import annotations

import os
from collections.abc import Sequence

from bench.building import BENCH, BUILD, build, copy_sources, need
from bench.rounds import Contestant


def prepare() -> Sequence[str]:
    maven = need("mvn", "apt-get install maven")
    java = need("java", "apt-get install default-jdk-headless")
    source, target = BENCH / "peers" / "pushy", BUILD / "pushy"
    sources = [file for file in source.rglob("*") if file.is_file()]
    copy_sources(source, target)
    product = target / "target" / "pushy-bench-0.jar"
    build(product, sources, [[maven, "--quiet", "--batch-mode", "package"]], target)
    return [java, "-cp", os.pathsep.join([str(product), str(target / "target" / "lib" / "*")]), "bench.Bench"]


# The warm-up is long because the JVM compiles what runs often: before that it is several times as slow.
CONTESTANTS = (Contestant("pushy", "sender", prepare, share=0.5, warm=300_000),)
