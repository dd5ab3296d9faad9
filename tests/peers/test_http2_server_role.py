"""Foreign HTTP/2 clients, and a conformance suite, against our server role over real sockets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from heliograph.net.http2 import Listener
from tests.peers.conftest import Pki
from tests.peers.foreign import HERE, build_go, run
from tests.programs import need

REQUESTS = 600
SIZES = (0, 118, 4096)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.peer("go")
@pytest.mark.parametrize("strict", [False, True], ids=["usual", "strict"])
async def test_h2spec_finds_nothing_to_complain_about(echo: Listener, strict: bool) -> None:
    h2spec = build_go("h2spec", "github.com/summerwind/h2spec/cmd/h2spec")
    options = ["--strict"] if strict else []
    output = await run(h2spec, "-t", "-k", "-h", "127.0.0.1", "-p", str(echo.port), *options, timeout_s=250)
    counts = re.search(r"(\d+) tests, (\d+) passed, (\d+) skipped, (\d+) failed", output)
    assert counts is not None, output
    tests, passed, skipped, failed = map(int, counts.groups())
    assert (failed, passed + skipped) == (0, tests), output
    assert skipped <= 1, output  # padding that is too long cannot be tried against a GET


@pytest.mark.peer("go")
async def test_every_request_of_gos_client_gets_its_own_answer(echo: Listener, pki: Pki) -> None:
    client = build_go("go", "./client")
    output = await run(client, f"https://127.0.0.1:{echo.port}", pki.authority, str(REQUESTS))
    assert output == f"{REQUESTS} answered over 1\n"


@pytest.mark.peer("node")
@pytest.mark.parametrize("padding", [(), ("padded",)], ids=["plain", "padded"])
async def test_every_request_of_nodes_client_gets_its_own_answer(
    echo: Listener, pki: Pki, padding: tuple[str, ...]
) -> None:
    script = HERE / "node" / "client.mjs"
    url = f"https://127.0.0.1:{echo.port}"
    output = await run(need("node"), script, url, pki.authority, str(REQUESTS), *padding)
    assert output == f"{REQUESTS} answered over 1\n"


@pytest.mark.peer("curl")
async def test_every_request_of_curl_gets_its_own_answer(echo: Listener, pki: Pki, tmp_path: Path) -> None:
    calls = [_Call(tmp_path, f"https://127.0.0.1:{echo.port}", i) for i in range(300)]
    for call in calls:
        call.options += ["http2", f'cacert = "{pki.authority}"']
    connections = await _curl(tmp_path, calls, "--parallel", "--parallel-max", "200")
    assert connections < len(calls)


@pytest.mark.peer("curl")
async def test_curl_with_prior_knowledge_needs_no_tls(plain_echo: Listener, tmp_path: Path) -> None:
    # A call at a time: with prior knowledge, curl 7.88 fails when it uses a connection again, with nghttpd as well.
    for i in range(0, 60, 7):
        call = _Call(tmp_path, f"http://127.0.0.1:{plain_echo.port}", i)
        call.options += ["http2-prior-knowledge"]
        assert await _curl(tmp_path, [call]) == 1


class _Call:
    """One transfer of curl: its own field, its own body, a long field now and then, a file for the answer."""

    def __init__(self, folder: Path, url: str, i: int) -> None:
        self.i = i
        self.body = b"%d" % (i % 10) * SIZES[i % len(SIZES)]
        self.answer = folder / f"{i}.answer"
        (folder / f"{i}.body").write_bytes(self.body)
        self.options = [
            f'url = "{url}/{i}"',
            f'data-binary = "@{folder / f"{i}.body"}"',
            f'header = "x-echo: {i}"',
            f'output = "{self.answer}"',
            f'write-out = "{i} %{{http_code}} %{{http_version}} %header{{x-echo}} %{{num_connects}}\\n"',
        ]
        if i % 10 == 9:
            self.options.append(f'header = "x-long: {"<&>" * 7_000}"')


async def _curl(folder: Path, calls: list[_Call], *options: str) -> int:
    """Make the calls, check every answer, and return how many connections they took."""
    config = folder / "config"
    config.write_text("\nnext\n".join("\n".join(call.options) for call in calls))
    output = await run(need("curl"), "--no-progress-meter", *options, "--config", config)
    lines = [line.split() for line in output.splitlines()]
    expected = {(str(call.i), "200", "2", str(call.i)) for call in calls}
    assert {tuple(line[:4]) for line in lines} == expected
    assert len(lines) == len(calls)
    for call in calls:
        assert (call.answer.read_bytes() if call.body else b"") == call.body
    return sum(int(line[4]) for line in lines)


@pytest.mark.peer("nghttp")
@pytest.mark.parametrize("size", [0, 100, 65_536])
async def test_nghttp_is_answered_whatever_header_table_it_allows(echo: Listener, size: int) -> None:
    # nghttp2 insists on RFC 7541, section 4.2: the first block after a change of the table's size says so.
    urls = [f"https://127.0.0.1:{echo.port}/{i}" for i in range(20)]
    output = await run(need("nghttp"), "--no-verify-peer", "--stat", "-n", f"--header-table-size={size}", *urls)
    assert len(re.findall(r" 200 +\d+ /\d+$", output, re.MULTILINE)) == len(urls), output
