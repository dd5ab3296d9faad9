"""Foreign APNs clients against the simulator: what each says of an answer is what it would say of Apple's."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.contestants import a2
from heliograph.simulator.threaded import ThreadedSimulator
from tests.peers.apple import curl
from tests.peers.apple.contract import check, environment, prepare
from tests.peers.foreign import HERE, build, build_go, run
from tests.programs import need

APPLE = HERE / "apple"


@pytest.fixture
def apple() -> Iterator[ThreadedSimulator]:
    with ThreadedSimulator() as simulator:
        yield simulator


async def converse(
    apple: ThreadedSimulator,
    folder: Path,
    *command: str | Path,
    shows_id: bool = True,
    more: dict[str, str] | None = None,
) -> None:
    pushes = prepare(apple, folder)
    output = await run(*command, more={**environment(apple, pushes), **(more or {})})
    check(apple, pushes, [json.loads(line) for line in output.splitlines() if line.startswith("{")], shows_id=shows_id)


@pytest.mark.peer("curl")
async def test_curl_sees_what_it_would_see_at_apple(apple: ThreadedSimulator, tmp_path: Path) -> None:
    if "HTTP2" not in await run(need("curl"), "--version"):
        pytest.skip("this curl speaks no HTTP/2")
    pushes = prepare(apple, tmp_path)
    (tmp_path / "config").write_text(curl.config(environment(apple, pushes)))
    output = await run(need("curl"), "--no-progress-meter", "--config", tmp_path / "config")
    check(apple, pushes, curl.read(output), shows_id=True)


@pytest.mark.timeout(180)  # a first build
@pytest.mark.peer("go")
@pytest.mark.parametrize("client", ["nethttp", "apns2"])
async def test_clients_in_go_see_what_they_would_see_at_apple(
    client: str, apple: ThreadedSimulator, tmp_path: Path
) -> None:
    await converse(apple, tmp_path, build_go(f"apple/{client}", "."))


@pytest.mark.peer("node")
async def test_nodes_own_client_sees_what_it_would_see_at_apple(apple: ThreadedSimulator, tmp_path: Path) -> None:
    await converse(apple, tmp_path, need("node"), APPLE / "node" / "http2.mjs")


@pytest.mark.timeout(180)
@pytest.mark.peer("node", "npm")
async def test_node_apn_sees_what_it_would_see_at_apple(apple: ThreadedSimulator, tmp_path: Path) -> None:
    install = ["install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"]
    folder = build("apple/node", [[need("npm"), *install]])
    await converse(apple, tmp_path, need("node"), folder / "node_apn.mjs", shows_id=False)


@pytest.mark.timeout(180)
@pytest.mark.peer("java", "mvn")
async def test_pushy_sees_what_it_would_see_at_apple(apple: ThreadedSimulator, tmp_path: Path) -> None:
    copy = ["dependency:copy-dependencies", "-DoutputDirectory=lib"]
    folder = build("apple/pushy", [[need("mvn"), "--quiet", "--batch-mode", *copy]])
    # Java compiles a lone source file by itself.
    await converse(apple, tmp_path, need("java"), "-cp", folder / "lib" / "*", folder / "Client.java")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.peer("cargo", "gcc")
async def test_a2_sees_what_it_would_see_at_apple(apple: ThreadedSimulator, tmp_path: Path) -> None:
    # Changed as for the benchmarks: it knows Apple's two addresses and the public authorities only.
    def change(folder: Path) -> None:
        a2._change_a2(need("cargo"), folder)

    folder = build("apple/a2", [[need("cargo"), "build", "--quiet"]], change)
    place = {"BENCH_PORT": str(apple.port), "BENCH_DATA": str(apple.ca_file.parent)}
    await converse(apple, tmp_path, folder / "target" / "debug" / "apple-peer", more=place)


@pytest.mark.parametrize("client, packages", [("httpx", ("httpx", "h2")), ("aioapns", ("aioapns",))])
async def test_clients_in_python_see_what_they_would_see_at_apple(
    client: str, packages: tuple[str, ...], apple: ThreadedSimulator, tmp_path: Path
) -> None:
    if not all(map(importlib.util.find_spec, packages)):
        pytest.skip(f"the Python package {client} is absent")
    await converse(apple, tmp_path, sys.executable, APPLE / f"with_{client}.py")
