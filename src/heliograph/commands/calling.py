"""Requests to the HTTP API of a running server."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from heliograph.commands.local import config_option, load_config, program
from heliograph.errors import ConfigError, HeliographError

if TYPE_CHECKING:
    from heliograph.config import Config

NOTIFICATIONS = "/v1/notifications"


class Reply(NamedTuple):
    """The server's answer."""

    status: int
    body: dict[str, Any]


class UnreachableError(HeliographError):
    """No server answered, or something else did."""


class RefusedError(HeliographError):
    """The server said no."""


Command = TypeVar("Command", bound=Callable[..., object])


def server_options(command: Command) -> Command:
    """`--url`, `--key-file` and `--config`, which `ask` takes, and `--json`."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the server's answer as it is."),
        config_option,
        click.option(
            "--key-file",
            type=click.Path(path_type=Path, dir_okay=False, exists=True),
            help="A file with the API key.  [default: $HELIOGRAPH_KEY, or the server's own]",
        ),
        click.option("--url", envvar="HELIOGRAPH_URL", help="Of the server.  [default: as in the configuration]"),
    ):
        command = option(command)
    return command


class Where(NamedTuple):
    """Which server, and with which key."""

    url: str | None
    key_file: Path | None
    config: Path | None

    def ask(self, method: str, path: str, content: dict[str, Any] | None = None) -> dict[str, Any]:
        """What the server answers. Raises UnreachableError, RefusedError, ConfigError."""
        settings = load_config(self.config)
        url = self.url or f"http://{settings.api.host}:{settings.api.port}"
        reply = call(url, find_key(self.key_file, settings), method, path, b"" if content is None else content)
        if reply.status >= 400:
            raise RefusedError(str(reply.body.get("detail", f"The server answered {reply.status}")).removesuffix("."))
        return reply.body


def call(url: str, key: str, method: str, path: str, content: dict[str, Any] | bytes) -> Reply:
    """One request to the HTTP API. Raises UnreachableError, ConfigError."""
    from http.client import HTTPConnection, HTTPException, HTTPSConnection
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"The server's URL {url!r} must be like http://127.0.0.1:8080")
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    try:
        connection = kind(parts.hostname, parts.port, timeout=60)
        try:
            connection.request(method, parts.path.rstrip("/") + path, body, headers)
            response = connection.getresponse()
            status, answer = response.status, response.read()
        finally:
            connection.close()
    except (OSError, HTTPException) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreachableError(
            f"There is no answer from {url} ({why}): start a server with `{program()} serve`, or name another --url"
        ) from None
    try:
        value = json.loads(answer)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UnreachableError(f"What answers at {url} is not heliograph: name another --url")
    return Reply(status, value)


def find_key(key_file: Path | None, settings: Config) -> str:
    from heliograph.config import read_secret

    if key_file is None and os.environ.get("HELIOGRAPH_KEY"):
        return os.environ["HELIOGRAPH_KEY"]
    made = Path(settings.data) / "api-key"
    if key_file is not None:
        reference, setting = f"file:{key_file}", "--key-file"
    elif settings.api.key is not None:
        reference, setting = settings.api.key, "api.key"
    elif made.exists():
        reference, setting = f"file:{made}", "The API key"
    else:
        raise ConfigError(
            f"There is no API key at {made}: name the server's configuration with --config or its data folder with "
            "$HELIOGRAPH_DATA, or the key with --key-file or $HELIOGRAPH_KEY"
        )
    return read_secret(reference, setting).decode("ascii", "replace").strip()
