"""A whole heliograph for a bench: its configuration, the process, and a client of its HTTP API."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bench.building import BENCH, Failed, last_words
from bench.machine import CONTESTANT_CORE, free_port, on_core
from bench.pki import KEY_ID, TEAM_ID, TOPIC

APP = "bench"
START_S = 20
_WITHOUT_UVLOOP = "import sys; sys.modules['uvloop'] = None; from heliograph.__main__ import main; main()"


class Server:
    """A running server."""

    def __init__(self, pid: int, port: int, key: str) -> None:
        self.pid = pid
        self.port = port
        self._headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}

    def http_post(self, body: bytes, headers: Mapping[str, str] = MappingProxyType({})) -> bytes:
        """A whole HTTP/1.1 request that posts notifications, with these headers beside those that it needs."""
        head = f"POST /v1/notifications HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\ncontent-length: {len(body)}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in {**self._headers, **headers}.items())
        return head.encode() + b"\r\n" + body

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None) -> bytes:
        """The body of a 2xx answer. Raises Failed for any other."""
        connection.request(method, path, body, self._headers)
        answer = connection.getresponse()
        content = answer.read()
        if not 200 <= answer.status < 300:
            raise Failed(f"{method} {path} was answered {answer.status}: {content[:500]!r}")
        return content

    def post(self, connection: http.client.HTTPConnection, body: bytes) -> Any:
        return json.loads(self.ask(connection, "POST", "/v1/notifications", body))


def write_config(
    folder: Path, data: Path, apple_port: int, apps: Sequence[str], more: str = ""
) -> tuple[Path, int, str]:
    """A configuration whose Apple is the far side, with `more` tables: the file, the API's port, the API key."""
    port, key = free_port(), "hg_" + os.urandom(24).hex()
    key_file = folder / "bench-api-key"
    key_file.touch(mode=0o600)
    key_file.write_text(key)
    text = f"""data = "{folder / "data"}"
[api]
port = {port}
key = "file:{key_file}"
"""
    for app in apps:
        text += f"""[apps.{app}]
key = "{data / "AuthKey.p8"}"
key_id = "{KEY_ID}"
team_id = "{TEAM_ID}"
topic = "{TOPIC}"
host = "127.0.0.1"
port = {apple_port}
ca = "{data / "ca.pem"}"
"""
    config = folder / "heliograph.toml"
    config.write_text(text + more)
    return config, port, key


@contextmanager
def heliograph(
    folder: Path,
    data: Path,
    apple_port: int,
    profile: Path | None = None,
    apps: Sequence[str] = (APP,),
    more: str = "",
    *,
    uvloop: bool = True,
) -> Iterator[Server]:
    """`heliograph serve` on the contestant's core, with its data in `folder`. It may not listen yet.

    `more` goes into its configuration. With `profile`, what CPU time went into is written there as the server ends (see
    `profiled.py`).
    """
    config, port, key = write_config(folder, data, apple_port, apps, more)
    if profile is None:
        program = (
            [str(Path(sys.executable).parent / "heliograph")] if uvloop else [sys.executable, "-c", _WITHOUT_UVLOOP]
        )
        command = [*program, "serve", "--config", str(config)]
    else:
        command = [sys.executable, "-m", "bench.profiled", str(config), str(profile)]
    with _running("heliograph serve", command, port, key) as server:
        yield server


@contextmanager
def bare() -> Iterator[Server]:
    """The least that such a server can do (see `bare_api.py`), in heliograph's place. It may not listen yet."""
    port = free_port()
    with _running("bench.bare_api", [sys.executable, "-m", "bench.bare_api", str(port)], port, "none") as server:
        yield server


@contextmanager
def _running(name: str, command: Sequence[str], port: int, key: str) -> Iterator[Server]:
    with tempfile.TemporaryFile("w+") as log:
        with on_core(CONTESTANT_CORE):
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=BENCH.parent)
        try:
            yield Server(process.pid, port, key)
        except (OSError, Failed) as why:
            log.seek(0)
            raise Failed(f"{name}: {why}\n{last_words(log.read())}") from None
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def await_listening(server: Server) -> None:
    """Return as soon as the API takes connections. Raises Failed."""
    deadline = time.perf_counter() + START_S
    while time.perf_counter() < deadline:
        connection = server.connect()
        try:
            connection.connect()
        except OSError:
            time.sleep(0.002)
        else:
            connection.close()
            return
    raise Failed(f"the API did not listen within {START_S} s")


def post_all(server: Server, bodies: Iterable[bytes], posters: int = 4) -> list[str]:
    """Post all, `posters` requests at a time, and return the ids of the notifications. Raises Failed."""
    waiting = iter(bodies)
    gate = threading.Lock()

    def poster() -> list[str]:
        connection = server.connect()
        ids: list[str] = []
        try:
            while True:
                with gate:  # generators are not for several threads at once
                    body = next(waiting, None)
                if body is None:
                    return ids
                ids += server.post(connection, body)["ids"]
        finally:
            connection.close()

    with concurrent.futures.ThreadPoolExecutor(posters) as pool:
        return [one for ids in pool.map(lambda _: poster(), range(posters)) for one in ids]


def accepted(server: Server, connection: http.client.HTTPConnection, app: str | None = None) -> int:
    """How many notifications of an app, or of all, Apple has accepted since the server started, as its metrics say."""
    metrics = server.ask(connection, "GET", "/metrics").decode()
    series = re.findall(r"^heliograph_answers_total\{(.*)\} (\S+)$", metrics, re.MULTILINE)
    wanted = {'outcome="accepted"'} if app is None else {'outcome="accepted"', f'app="{app}"'}
    return sum(int(float(value)) for labels, value in series if wanted <= set(labels.split(",")))


def await_accepted(server: Server, total: int, *, patience_s: float = 120, pause_s: float = 0.02) -> None:
    """Return when Apple has accepted so many since the server started. Raises Failed.

    To ask costs the server a millisecond: where its CPU is what is measured, ask seldom.
    """
    connection = server.connect()
    deadline = time.perf_counter() + patience_s
    while (count := accepted(server, connection)) < total:
        if time.perf_counter() > deadline:
            raise Failed(f"after {patience_s:.0f} s, {count} of {total} notifications are accepted")
        time.sleep(pause_s)
    connection.close()


def shared_payload(tokens: Sequence[str], payload: bytes) -> bytes:
    """A request that sends one payload to many device tokens."""
    return b'{"app":"%s","tokens":%s,"payload":%s}' % (APP.encode(), json.dumps(tokens).encode(), payload)


def individual(tokens: Sequence[str], payload: bytes) -> bytes:
    """A request of many notifications, each with its own payload."""
    each = b",".join(b'{"token":"%s","payload":%s}' % (token.encode(), payload) for token in tokens)
    return b'{"app":"%s","notifications":[%s]}' % (APP.encode(), each)
