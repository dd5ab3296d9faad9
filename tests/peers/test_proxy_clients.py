"""Foreign APNs clients at the Apple-shaped proxy, as they are at Apple: only what they are told of Apple is another."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from random import randrange
from typing import Any, NamedTuple

import pytest

from bench.contestants import a2
from heliograph.protocols.provider_token import public_key, verify
from heliograph.simulator.server import new_signing_key
from tests.peers.apple import curl
from tests.peers.apple.contract import DEAD, GOOD, TOPIC, Push, check_told
from tests.peers.foreign import HERE, build, build_go, run
from tests.peers.proxy.house import ODD, SECOND, House, open_house, the_pushes
from tests.programs import need

APPLE = HERE / "apple"
STATES = {200: "accepted", 400: "rejected", 410: "rejected"}


class Command(NamedTuple):
    line: Sequence[str | Path]
    more: dict[str, str]


class Kind(NamedTuple):
    """A sort of client."""

    name: str
    programs: tuple[str, ...]
    """What it needs on this machine."""
    start: Callable[[dict[str, str], Path], Awaitable[Command]]
    """From what it is told, and a folder for files."""
    shows: tuple[str, ...]
    """What it can show of itself."""
    shows_id: bool = True
    """It lets its user see the answer's apns-id."""
    slow: bool = False


async def with_curl(told: dict[str, str], folder: Path) -> Command:
    if "HTTP2" not in await run(need("curl"), "--version"):
        pytest.skip("this curl speaks no HTTP/2")
    (folder / "config").write_text(curl.config(told))
    return Command([need("curl"), "--no-progress-meter", "--config", folder / "config"], {})


async def with_go(client: str, told: dict[str, str], folder: Path) -> Command:
    return Command([build_go(f"apple/{client}", ".")], {})


async def with_node(told: dict[str, str], folder: Path) -> Command:
    return Command([need("node"), APPLE / "node" / "http2.mjs"], {})


async def with_node_apn(told: dict[str, str], folder: Path) -> Command:
    install = ["install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"]
    return Command([need("node"), build("apple/node", [[need("npm"), *install]]) / "node_apn.mjs"], {})


async def with_pushy(told: dict[str, str], folder: Path) -> Command:
    copy = ["dependency:copy-dependencies", "-DoutputDirectory=lib"]
    built = build("apple/pushy", [[need("mvn"), "--quiet", "--batch-mode", *copy]])
    return Command([need("java"), "-cp", built / "lib" / "*", built / "Client.java"], {})


async def with_a2(told: dict[str, str], folder: Path) -> Command:
    # It knows the public authorities only, and has them built in: changed as for the benchmarks.
    def change(target: Path) -> None:
        a2._change_a2(need("cargo"), target)

    built = build("apple/a2", [[need("cargo"), "build", "--quiet"]], change)
    shutil.copy(told["APPLE_CA"], folder / "ca.pem")
    place = {"BENCH_PORT": told["APPLE_PORT"], "BENCH_DATA": str(folder)}
    return Command([built / "target" / "debug" / "apple-peer"], place)


async def with_python(name: str, told: dict[str, str], folder: Path) -> Command:
    packages = {"httpx": ("httpx", "h2"), "aioapns": ("aioapns",)}[name]
    if not all(map(importlib.util.find_spec, packages)):
        pytest.skip(f"the Python package {name} is absent")
    return Command([sys.executable, APPLE / f"with_{name}.py"], {})


KINDS = (
    Kind("curl", ("curl",), with_curl, ("api_key", "certificate")),
    Kind("httpx", (), partial(with_python, "httpx"), ("api_key", "key")),
    Kind("nethttp", ("go",), partial(with_go, "nethttp"), ("api_key",)),
    Kind("node", ("node",), with_node, ("api_key",)),
    Kind("aioapns", (), partial(with_python, "aioapns"), ("key",)),
    Kind("apns2", ("go",), partial(with_go, "apns2"), ("key", "certificate")),
    Kind("node_apn", ("node", "npm"), with_node_apn, ("key", "certificate"), shows_id=False),
    Kind("pushy", ("java", "mvn"), with_pushy, ("key", "certificate")),
    Kind("a2", ("cargo", "gcc"), with_a2, ("key",), slow=True),
)


def _parameter(kind: Kind, *more: str) -> Any:
    marks = [pytest.mark.peer(*kind.programs), *([pytest.mark.slow, pytest.mark.timeout(300)] if kind.slow else [])]
    return pytest.param(kind, *more, id="-".join((kind.name, *more)), marks=marks)


async def converse(kind: Kind, told: dict[str, str], folder: Path) -> list[dict[str, Any]]:
    command = await kind.start(told, folder)
    output = await run(*command.line, more={**told, **command.more})
    if kind.name == "curl":
        return curl.read(output)
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def check_apples_side(house: House, pushes: Sequence[Push]) -> None:
    """Apple was asked once for each that it answered, by heliograph and nobody else."""
    asked = house.apple.asked
    theirs = (each for each in pushes if each.answer["status"] in STATES and each.topic == TOPIC)
    reached = [each.token for each in theirs if each.token != ODD]
    assert Counter(each.token for each in asked) == Counter(reached)
    own = {each.id for each in pushes if each.id is not None}
    assert len(own & {each.id for each in asked}) == len(reached) - 1
    for each in asked:
        assert not each.showed_certificate
        scheme, _, token = each.authorization.partition(" ")
        assert scheme == "bearer"
        key = house.apple.signing_key
        assert verify(token.encode(), {key.key_id: public_key(key)}.get, time.time()).key_id == key.key_id
    assert Counter(each.token for each in house.apple.received) == Counter([SECOND, GOOD])


async def check_receipts(house: House, pushes: Sequence[Push], told: Sequence[dict[str, Any]]) -> None:
    """What became of each that Apple was asked for can be looked up by the id that the client knows it by."""
    asked = {each.id for each in house.apple.asked}
    for push, said in zip(pushes, told, strict=True):
        if (id_ := push.id or said.get("id")) in asked:
            receipt = await house.ask("GET", f"/v1/notifications/{id_}", patient=True)
            assert receipt["state"] == STATES[push.answer["status"]]
            assert (receipt["token"], receipt["reason"]) == (push.token, push.answer.get("reason"))
            # A library may have made one up.
            assert receipt["apns_id"] == push.id or (push.id is None and receipt["apns_id"] == id_)
            if push.token == DEAD:
                assert receipt["unregistered_at"] is not None


@pytest.mark.timeout(180)  # a first build
@pytest.mark.parametrize("kind, shows", [_parameter(kind, shows) for kind in KINDS for shows in kind.shows])
async def test_a_client_gets_apples_answers_and_apple_gets_heliographs_credentials(
    kind: Kind, shows: str, tmp_path: Path
) -> None:
    async with open_house(tmp_path) as house:
        pushes = the_pushes(tmp_path)
        told = await converse(kind, await getattr(house, f"with_{shows}")(pushes), tmp_path)
        check_told(pushes, told, shows_id=kind.shows_id)
        check_apples_side(house, pushes)
        await check_receipts(house, pushes, told)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("kind", [_parameter(kind) for kind in KINDS if "key" in kind.shows])
async def test_a_client_whose_key_nobody_registered_hears_so_and_apple_hears_nothing(
    kind: Kind, tmp_path: Path
) -> None:
    async with open_house(tmp_path) as house:
        answer = {"status": 403, "reason": "InvalidProviderToken"}
        pushes = [the_pushes(tmp_path)[1]._replace(answer=answer)]
        told = await converse(kind, house.told(pushes, new_signing_key("STRANGERS1", "STRANGERST")), tmp_path)
        check_told(pushes, told, shows_id=kind.shows_id)
        assert not house.apple.asked


async def test_a_client_that_knows_apples_address_only_is_led_here_by_its_hosts_file(tmp_path: Path) -> None:
    """aioapns, without any setting of its own: Apple's name, Apple's port, the system's authorities, no ALPN."""
    # As good as certainly nobody else's: tests run beside each other.
    address = f"127.{randrange(1, 255)}.{randrange(256)}.{randrange(1, 255)}"
    alone = _mount_namespace(address)
    async with open_house(tmp_path, host=address, port=443) as house:
        pushes = the_pushes(tmp_path)
        told = await house.with_key(pushes)
        command = await with_python("aioapns", told, tmp_path)
        hosts = tmp_path / "hosts"
        hosts.write_text(f"127.0.0.1 localhost\n{address} api.push.apple.com\n")
        more = {**told, "SSL_CERT_FILE": told["APPLE_CA"]}
        output = await run(
            *alone, "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', hosts, *command.line, more=more
        )
        said = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        check_told(pushes, said, shows_id=True)
        check_apples_side(house, pushes)


def _mount_namespace(address: str) -> Sequence[str]:
    """The command that gives another its own view of files; skips where there can be none, or no port below 1024."""
    unshare = shutil.which("unshare")
    command = [str(unshare), "--mount"]
    if unshare is None or subprocess.run([*command, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here, so no hosts entry: run as root to have this one")
    try:
        with socket.create_server((address, 443)):
            return command
    except OSError as error:
        pytest.skip(f"port 443 of {address} cannot be had ({error.strerror}): run as root to have this one")
