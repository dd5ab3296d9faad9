"""A whole heliograph for a bench: its configuration, the process, and a client of its HTTP API."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.building import BENCH, Failed, last_words
from bench.machine import CONTESTANT_CORE, free_port, on_core
from bench.pki import KEY_ID, TEAM_ID, TOPIC

APP = "bench"
START_S = 20


class Server:
    """A running server."""

    def __init__(self, pid: int, port: int, key: str) -> None:
        self.pid = pid
        self.port = port
        self._headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}

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


def write_config(folder: Path, data: Path, apple_port: int) -> tuple[Path, int, str]:
    """A configuration whose Apple is the far side: the file, the API's port, the API key."""
    port, key = free_port(), "hg_" + os.urandom(24).hex()
    key_file = folder / "bench-api-key"
    key_file.touch(mode=0o600)
    key_file.write_text(key)
    config = folder / "heliograph.toml"
    config.write_text(
        f"""data = "{folder / "data"}"
[api]
port = {port}
key = "file:{key_file}"
[apps.{APP}]
key = "{data / "AuthKey.p8"}"
key_id = "{KEY_ID}"
team_id = "{TEAM_ID}"
topic = "{TOPIC}"
host = "127.0.0.1"
port = {apple_port}
ca = "{data / "ca.pem"}"
"""
    )
    return config, port, key


@contextmanager
def heliograph(folder: Path, data: Path, apple_port: int, profile: Path | None = None) -> Iterator[Server]:
    """`heliograph serve` on the contestant's core, with its data in `folder`. It may not listen yet.

    With `profile`, what CPU time went into is written there as the server ends (see `profiled.py`).
    """
    config, port, key = write_config(folder, data, apple_port)
    if profile is None:
        command = [str(Path(sys.executable).parent / "heliograph"), "serve", "--config", str(config)]
    else:
        command = [sys.executable, "-m", "bench.profiled", str(config), str(profile)]
    with tempfile.TemporaryFile("w+") as log:
        with on_core(CONTESTANT_CORE):
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=BENCH.parent)
        try:
            yield Server(process.pid, port, key)
        except (OSError, Failed) as why:
            log.seek(0)
            raise Failed(f"heliograph serve: {why}\n{last_words(log.read())}") from None
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


def shared_payload(tokens: Sequence[str], payload: bytes) -> bytes:
    """A request that sends one payload to many device tokens."""
    return b'{"app":"%s","tokens":%s,"payload":%s}' % (APP.encode(), json.dumps(tokens).encode(), payload)


def individual(tokens: Sequence[str], payload: bytes) -> bytes:
    """A request of many notifications, each with its own payload."""
    each = b",".join(b'{"token":"%s","payload":%s}' % (token.encode(), payload) for token in tokens)
    return b'{"app":"%s","notifications":[%s]}' % (APP.encode(), each)
