"""Requests to the HTTP API of a running server."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from heliograph.commands.local import config_option, load_config, program
from heliograph.commands.telling import Command, RefusedError, UnreachableError, json_option, tell
from heliograph.errors import ConfigError

if TYPE_CHECKING:
    from http.client import HTTPConnection

    from heliograph.config import Config

NOTIFICATIONS = "/v1/notifications"

_PATIENCE_S = 60.0


class Body(dict[str, Any]):
    """What the server answered. Whoever lacks in it what heliograph always says is told that it is another server."""

    def __init__(self, content: dict[str, Any], url: str) -> None:
        super().__init__(content)
        self._url = url

    def __missing__(self, name: str) -> Any:
        raise stranger(self._url)


class Reply(NamedTuple):
    """The server's answer."""

    status: int
    body: dict[str, Any]
    retry_after_s: float | None = None


def server_options(command: Command) -> Command:
    """`--url`, `--key-file`, `--config` and `--json`."""
    for option in (
        json_option,
        config_option,
        click.option(
            "--key-file",
            type=click.Path(path_type=Path, dir_okay=False, exists=True),
            envvar="HELIOGRAPH_KEY_FILE",
            show_envvar=True,
            help="A file with the API key.  [default: $HELIOGRAPH_KEY, or the server's own]",
        ),
        click.option(
            "--url",
            envvar="HELIOGRAPH_URL",
            show_envvar=True,
            help="Of the server.  [default: as in the configuration]",
        ),
    ):
        command = option(command)
    return command


def with_server(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the `Server` that its options name, before all else."""

    @functools.wraps(command)
    def call_it(
        *args: Any, url: str | None, key_file: Path | None, config: Path | None, as_json: bool, **rest: Any
    ) -> Any:
        return command(Server(url, key_file, config, as_json=as_json), *args, **rest)

    return server_options(call_it)


class Server:
    """The server that a command talks to. The configuration is read when it is first needed."""

    def __init__(self, url: str | None, key_file: Path | None, config: Path | None, *, as_json: bool = False) -> None:
        self._url = url
        self._key_file = key_file
        self._config = config
        self.as_json = as_json
        """Whether its answers are to be shown as they are."""

    @functools.cached_property
    def client(self) -> Client:
        """Raises ConfigError."""
        key = given_key(self._key_file)
        if self._url and key:
            return Client(self._url, key)
        settings = load_config(self._config)
        return Client(self._url or own_url(settings), key or _own_key(settings))

    def ask(self, method: str, path: str, content: dict[str, Any] | bytes = b"") -> dict[str, Any]:
        """What the server answers. Raises UnreachableError, RefusedError, ConfigError."""
        reply = self.client.ask(method, path, content)
        if reply.status >= 400:
            raise RefusedError(reply.status, reply.body, to_get=method == "GET")
        return reply.body

    def show(self, method: str, path: str, say: Callable[[dict[str, Any]], None]) -> None:
        """Ask, and show the answer: `say` does it for people. Raises as `ask`."""
        found = self.ask(method, path)
        tell(found) if self.as_json else say(found)


class Client:
    """A connection to the HTTP API, which is kept from request to request."""

    def __init__(self, url: str, key: str) -> None:
        """Raises ConfigError."""
        from urllib.parse import urlsplit

        try:
            parts = urlsplit(url)
            self._target = parts.hostname or "", parts.port
        except ValueError:  # of brackets and ports
            parts, self._target = urlsplit(""), ("", None)
        superfluous = parts.query or parts.fragment or "@" in parts.netloc or not re.fullmatch("[!-~]+", url)
        if parts.scheme not in ("http", "https") or not parts.hostname or superfluous:
            raise ConfigError("The server's URL must be like http://127.0.0.1:8080: correct --url or $HELIOGRAPH_URL")
        if not (key.isascii() and key.isprintable()):
            raise ConfigError("The API key must be one line of printable ASCII, like hg_...: see where it is from")
        self.url = url
        self._is_tls = parts.scheme == "https"
        self._path = parts.path.rstrip("/")
        self._headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        self._kept: HTTPConnection | None = None

    def ask(self, method: str, path: str, content: dict[str, Any] | bytes = b"", *, once: str | None = None) -> Reply:
        """One request. Raises UnreachableError.

        `once` is a word for this request: asked twice under it, it has its effect once.
        """
        import json
        from http.client import HTTPException

        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        try:
            headers = self._headers if once is None else {**self._headers, "idempotency-key": once}
            answer = self._ask(method, self._path + path, body, headers)
        except (OSError, HTTPException) as error:
            self.close()
            raise UnreachableError(self._what_to_do(error), in_doubt=True) from None
        except BaseException:  # an interrupted one is of no more use
            self.close()
            raise
        if answer is None:
            raise stranger(self.url)
        return answer._replace(body=Body(answer.body, self.url))

    def close(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def _ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Reply | None:
        from http.client import HTTPConnection, HTTPSConnection, RemoteDisconnected

        reused = self._kept
        if method != "GET":  # only a GET can be sent again, should the kept connection be gone
            self.close()
            reused = None
        if self._kept is None:
            self._kept = (HTTPSConnection if self._is_tls else HTTPConnection)(*self._target, timeout=_PATIENCE_S)
            try:
                self._kept.connect()
            except OSError as error:
                raise UnreachableError(self._what_to_do(error)) from None
        try:
            self._kept.request(method, path, body, headers)
            response = self._kept.getresponse()
        except (BrokenPipeError, ConnectionResetError, RemoteDisconnected):
            if reused is None:
                raise
            self.close()
            return self._ask(method, path, body, headers)
        return _reply(response.status, response.getheader("retry-after"), response.read())

    def _what_to_do(self, error: Exception) -> str:
        import ssl

        if isinstance(error, ssl.SSLCertVerificationError):
            return (
                f"The certificate of {self.url} is not trusted here ({error.verify_message}): correct --url, or name "
                "the authority's PEM file in $SSL_CERT_FILE"
            )
        if isinstance(error, ssl.SSLError) and error.reason == "WRONG_VERSION_NUMBER":
            return f"What answers at {self.url} speaks no TLS: write http:// in --url or $HELIOGRAPH_URL"
        if isinstance(error, TimeoutError):
            return (
                f"{self.url} has not answered within {_PATIENCE_S:.0f} s: see whether the server is well, or try again"
            )
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        todo = f"start a server with `{program()} serve`, or name another --url"
        return f"There is no answer from {self.url} ({why}): {todo}"


def stranger(url: str) -> UnreachableError:
    """What answers there is another server."""
    text = f"What answers at {url} is not heliograph's API: name another --url or $HELIOGRAPH_URL"
    return UnreachableError(text, in_doubt=True)


def _reply(status: int, retry_after: str | None, content: bytes) -> Reply | None:
    """None: it is not heliograph's."""
    import json

    try:
        value = json.loads(content)
    except ValueError:
        return None
    # What is no success is a problem that our documents explain, or what /healthz says.
    if not isinstance(value, dict) or (
        status >= 400 and "lanes" not in value and not str(value.get("type")).startswith("/docs/errors#")
    ):
        return None
    seconds = float(retry_after) if retry_after is not None and retry_after.isdecimal() else None
    return Reply(status, value, seconds)


def call(url: str, key: str, method: str, path: str, content: dict[str, Any] | bytes) -> Reply:
    """One request to the HTTP API. Raises UnreachableError, ConfigError."""
    client = Client(url, key)
    try:
        return client.ask(method, path, content)
    finally:
        client.close()


def own_url(settings: Config) -> str:
    """Where the server of this configuration is, seen from its own machine. Raises ConfigError."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.api.host, settings.api.host)  # noqa: S104 - is not bound
    if settings.api.port == 0:
        raise ConfigError("api.port is 0, any free one: name the server's address with --url or $HELIOGRAPH_URL")
    return f"http://[{host}]:{settings.api.port}" if ":" in host else f"http://{host}:{settings.api.port}"


def find_key(key_file: Path | None, settings: Config) -> str:
    """The API key to show. Raises ConfigError."""
    return given_key(key_file) or _own_key(settings)


def given_key(key_file: Path | None) -> str | None:
    """The API key of the call. Raises ConfigError."""
    if key_file is not None:
        return _read_key(f"file:{key_file}", "--key-file")
    return os.environ.get("HELIOGRAPH_KEY", "").strip() or None


def _own_key(settings: Config) -> str:
    if settings.api.key is not None:
        return _read_key(settings.api.key, "api.key")
    made = Path(settings.data) / "api-key"
    try:
        made.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"There is no API key at {made}: name the server's configuration with --config or its data folder with "
            "$HELIOGRAPH_DATA, or the key with --key-file or $HELIOGRAPH_KEY"
        ) from None
    except OSError:
        pass  # reading says what is wrong
    return _read_key(f"file:{made}", "The API key")


def _read_key(reference: str, setting: str) -> str:
    from heliograph.config import read_secret

    key = read_secret(reference, setting).decode("utf-8", "replace").strip()
    if not key:
        raise ConfigError(f"{setting}: the file has no key in it: write it there, or name another one")
    return key


def with_payload(content: dict[str, Any], payload: bytes | None) -> bytes:
    """A request's body, with a whole payload where there is one."""
    body = json.dumps(content).encode()
    # As it stands: the server passes a payload on octet by octet.
    return body if payload is None else body[:-1] + b', "payload": ' + payload + b"}"
