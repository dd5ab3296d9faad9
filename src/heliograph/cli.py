"""The command line: serve, demo, send, simulate. What is heavy is imported by the command that needs it.

Exit codes of every command: 0 done, 1 it did not work out, 2 something about the call or the configuration is wrong;
`send` has more.
"""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn

import click

from heliograph import __version__
from heliograph.errors import ConfigError, HeliographError

if TYPE_CHECKING:
    from heliograph.config import AppSettings, Config
    from heliograph.service import Running
    from heliograph.simulator.server import Simulator

CONFIG_FILE = "heliograph.toml"
"""Read from the current folder where no other file is named."""

_TOPIC = "com.example.demo"
_ALIVE = "a1b2c3d4" * 8
_BATCH = 1000
_PATIENCE_S = 20.0
_PORTS = 20
"""How many ports the demo tries."""


def main() -> NoReturn:
    """The program `heliograph`."""
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except (HeliographError, BrokenPipeError, ExceptionGroup) as error:
        cause = _expected(error)
        if cause is None:
            raise
        if isinstance(cause, BrokenPipeError):
            # Who read our output had enough of it; Python would complain when it flushes the rest.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        click.echo(f"{click.style('Error:', fg='red')} {cause}", err=True)
        sys.exit(2 if isinstance(cause, ConfigError) else 1)
    sys.exit(code if isinstance(code, int) else 0)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="heliograph %(version)s")
def cli() -> None:
    """Send notifications to Apple devices, and see what became of each.

    \b
    Example, with nothing set up and no Apple account:
      heliograph demo
    """


# -- serve -----------------------------------------------------------------------------------------------------------

_config_option = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="HELIOGRAPH_CONFIG",
    help=f"The configuration, as TOML.  [default: {CONFIG_FILE}, if there is one here]",
)


@cli.command()
@_config_option
@click.option("--simulator", is_flag=True, help="Send to a simulator in this process instead of to Apple.")
@click.option(
    "--log-format", type=click.Choice(["console", "json"]), default="console", show_default=True, help="On stderr."
)
def serve(config: Path | None, log_format: str, *, simulator: bool) -> None:
    """Run the server until Ctrl-C or SIGTERM.

    \b
    Examples:
      heliograph serve --config heliograph.toml
      HELIOGRAPH_API__PORT=9000 heliograph serve
      heliograph serve --simulator

    \b
    A heliograph.toml for one app:
      [apps.shop]
      topic = "com.example.shop"        # the bundle id
      key = "AuthKey_ABC123DEFG.p8"     # as Apple issued it
      team_id = "DEF123GHIJ"
      environment = "production"        # or development, or both
    """
    from heliograph import service

    settings = _load(config)
    service.configure_logging(json=log_format == "json")
    _run(_serve_simulated(settings) if simulator else service.run(settings))


async def _serve_simulated(config: Config) -> None:
    from msgspec.structs import replace

    from heliograph import service
    from heliograph.model import SigningKey
    from heliograph.simulator.server import Simulator

    async with Simulator() as apple:
        for app in service.load_apps(config.apps).values():
            for access in app.access:
                if isinstance(access.credentials, SigningKey):
                    apple.add_key(access.credentials)
                    for topic in app.topics:
                        apple.add_app(topic, access.credentials.team_id)
        folder = Path(config.data) / "simulator"
        apps = config.apps or {"demo": _demo_app(apple, folder)}
        ca = str(_write(folder / "ca.pem", apple.ca_pem))
        apps = {name: replace(app, host="127.0.0.1", port=apple.port, ca=ca) for name, app in apps.items()}
        await service.run(replace(config, apps=apps))


# -- demo ------------------------------------------------------------------------------------------------------------


@cli.command()
@click.option("--port", type=click.IntRange(1, 65535), default=8080, show_default=True, help="Of the HTTP API.")
@click.option(
    "--data", type=click.Path(path_type=Path, file_okay=False), help="Keep the data there.  [default: a new folder]"
)
@click.option("--exit-after-first", is_flag=True, help="End after the first pushes; exit 1 if one went astray.")
def demo(port: int, data: Path | None, *, exit_after_first: bool) -> int:
    """See it work, without an Apple account.

    Starts a server and a simulator of Apple, sends first pushes, and says how to go on.

    \b
    Example:
      heliograph demo
    """
    import tempfile

    from heliograph import service

    service.configure_logging(quiet=True)
    free = _free_port(port)
    if free != port:
        click.echo(f"Port {port} is taken, so the API listens on {free}.\n")
    fresh = data is None
    folder = Path(tempfile.mkdtemp(prefix="heliograph-demo-")) if data is None else data.absolute()
    run = _Demo(folder, free, exit_after_first=exit_after_first)
    try:
        _run(run.run())
    finally:
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
    click.echo("Stopped." if not fresh else f"Stopped; {folder} is deleted.")
    return 0 if run.well else 1


class _Demo:
    """One run of the demo."""

    def __init__(self, folder: Path, port: int, *, exit_after_first: bool) -> None:
        self._folder = folder
        self._port = port
        self._exit_after_first = exit_after_first
        self._journal = folder / "simulator.jsonl"
        # Another one each time: with --data the server would remember it, and refuse it at the door.
        self._dead = "deadbeef" * 6 + os.urandom(8).hex()
        self.well = True
        """Everything became what it should."""

    async def run(self) -> None:
        from heliograph import service
        from heliograph.config import ApiSettings, Config
        from heliograph.simulator.server import Simulator

        _make_folder(self._folder)
        async with Simulator(journal=self._journal) as apple:
            apple.add_app(_TOPIC)
            apple.unregister(self._dead, since=1_700_000_000_000)
            config = Config(
                data=str(self._folder),
                api=ApiSettings(port=self._port),
                apps={"demo": _demo_app(apple, self._folder / "simulator")},
            )

            async def started(running: Running) -> None:
                _say_where(running, apple, self._folder)
                await self._first_pushes(running)
                if self._exit_after_first:
                    running.stop.set()
                else:
                    _say_next_steps(running, self._first_id, self._journal)

            await service.run(config, started=started)

    async def _first_pushes(self, running: Running) -> None:
        _say("First pushes: through the HTTP API, a queue on disk and HTTP/2 with TLS")
        whole = {"app": "demo", "title": "Hello", "body": "from the heliograph demo", "wait": 20}
        self._first_id = await self._push(running, "one notification", {**whole, "token": _ALIVE}, "accepted")
        await self._push(running, "to a device that deleted the app", {**whole, "token": self._dead}, "rejected")
        await self._push(running, "5,000 octets of text", {**whole, "token": _ALIVE, "body": "x" * 5000}, "refused")
        await self._push_many(running)

    async def _push(self, running: Running, what: str, content: dict[str, Any], expected: str) -> str:
        """Send one and show what became of it. Returns its id."""
        import asyncio

        loop = asyncio.get_running_loop()
        started = loop.time()
        reply = await asyncio.to_thread(_call, running.url, running.key, "POST", _PATH, content)
        took_ms = (loop.time() - started) * 1000
        body = reply.body
        state = body.get("state", "refused")
        reason = f"{body['reason']} ({body['status']})" if body.get("reason") else str(body.get("code", ""))
        self._show(what, state, reason, took_ms, well=state == expected)
        notification_id = str(body.get("id", ""))
        if notification_id:
            _say(f"      id {notification_id}")
        for line in _wrapped(str(body.get("meaning") or body.get("detail", ""))):
            _say(f"      {line}")
        return notification_id

    async def _push_many(self, running: Running) -> None:
        import asyncio

        from heliograph.model import State

        loop = asyncio.get_running_loop()
        content = {
            "app": "demo",
            "tokens": [f"{number:064x}" for number in range(1, _BATCH + 1)],
            "payload": {"aps": {"alert": "One payload for a thousand devices"}},
        }
        started = loop.time()
        reply = await asyncio.to_thread(_call, running.url, running.key, "POST", _PATH, content)
        durable_ms = (loop.time() - started) * 1000
        ids = reply.body.get("ids", [])
        accepted = 0
        while ids and loop.time() < started + _PATIENCE_S:
            receipts = await running.relay.receipts(ids)
            accepted = sum(receipt is not None and receipt.state is State.ACCEPTED for receipt in receipts)
            if accepted == len(ids):
                break
            await asyncio.sleep(0.005)
        took_ms = (loop.time() - started) * 1000
        self._show("one payload for 1,000 tokens", "accepted", "", took_ms, well=accepted == _BATCH)
        _say(f"      {accepted} of {_BATCH} accepted; on disk and answered with 202 after {durable_ms:.0f} ms")
        _say("")

    def _show(self, what: str, state: str, reason: str, took_ms: float, *, well: bool) -> None:
        self.well = self.well and well
        colour = {"accepted": "green", "rejected": "yellow", "refused": "yellow"}.get(state, "red")
        shown = click.style(f"{state:<9}", fg=colour if well else "red", bold=True)
        _say(f"  {what:<34}{shown} {reason:<26}{took_ms:>6.0f} ms")


def _say_where(running: Running, apple: Simulator, folder: Path) -> None:
    _say(click.style("heliograph demo", bold=True))
    _say(f"  API        {running.url}")
    _say(f"  Apple      a simulator on 127.0.0.1:{apple.port}")
    _say(f"  app        demo, topic {_TOPIC}, signing key {apple.signing_key.key_id}")
    _say(f"  data       {folder}")
    _say("")


def _say_next_steps(running: Running, first_id: str, journal: Path) -> None:
    program = _program()
    say = _say
    say(click.style("Now you", bold=True))
    say("")
    say("Send one:")
    say("")
    say(f"curl -sS '{running.url}{_PATH}?wait=5' \\")
    say(f"  -H 'Authorization: Bearer {running.key}' \\")
    say("""  -d '{"title": "Hello",""")
    say(f"""       "token": "{_ALIVE}"}}'""")
    say("")
    say("See what became of one; this id is that of the first push above:")
    say("")
    say(f"curl -sS {running.url}{_PATH}/{first_id} \\")
    say(f"  -H 'Authorization: Bearer {running.key}'")
    say("")
    say("See what the simulator was sent, line by line:")
    say("")
    say(f"tail -f {journal}")
    say("")
    say("Send to Apple: write these lines to heliograph.toml, with what the developer account shows")
    say("under Keys, and put the key file beside it (chmod 600).")
    say("")
    say("[apps.shop]")
    say('topic = "com.example.shop"       # the bundle id')
    say('key = "AuthKey_ABC123DEFG.p8"    # as Apple issued it')
    say('team_id = "DEF123GHIJ"')
    say('environment = "production"       # or development, for apps run from Xcode')
    say("")
    say(f"{program} serve --config heliograph.toml")
    say(f"{program} send --app shop --title Hello DEVICE_TOKEN")
    say("")
    say("Ctrl-C ends the demo.")


# -- send ------------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("token", nargs=-1, required=True)
@click.option("--app", help="Which app; not needed where there is one only.")
@click.option("--title", help="The alert's title.")
@click.option("--subtitle", help="The alert's subtitle.")
@click.option("--body", help="The alert's text.")
@click.option("--badge", type=int, help="The number on the app's icon; 0 takes it away.")
@click.option("--sound", help="The sound's file name, or default.")
@click.option("--payload", type=click.File("rb"), help="A file with the whole payload, - for stdin.")
@click.option("--topic", help="The topic, where the app has several.")
@click.option("--environment", type=click.Choice(["production", "development"]), help="Where the app has both.")
@click.option("--push-type", help="alert, background, voip, ...")
@click.option("--priority", type=int, help="10, 5 or 1.")
@click.option("--expiration", type=int, help="UNIX seconds; 0: Apple tries once.")
@click.option("--collapse-id", help="A later notification with the same id takes this one's place.")
@click.option("--wait", type=click.FloatRange(0, 30), default=10, show_default=True, help="Seconds for the outcome.")
@click.option("--url", envvar="HELIOGRAPH_URL", help="Of the server.  [default: as in the configuration]")
@click.option(
    "--key-file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="A file with the API key.  [default: $HELIOGRAPH_KEY, or the server's own]",
)
@_config_option
@click.option("--json", "as_json", is_flag=True, help="Print the server's answer as it is.")
def send(
    token: Sequence[str],
    wait: float,
    url: str | None,
    key_file: Path | None,
    config: Path | None,
    *,
    as_json: bool,
    **fields: Any,
) -> int:
    """Send one notification, see what became of it.

    It goes through a running server; its outcome is printed in one line.

    \b
    Examples:
      heliograph send --app shop --title Hello --body World a1b2c3d4...
      heliograph send --payload push.json --json a1b2c3d4...
      HELIOGRAPH_URL=http://push.internal:8080 heliograph send --key-file key --title Hi a1b2c3d4...

    Exit code: 0 Apple accepted it, 1 it was refused, rejected or given up, 2 the call is wrong, 3 the server cannot be
    reached or takes nothing now, 4 it is still waiting.
    """
    if len(token) > 1:
        raise click.UsageError("This takes one device token: if yours has blanks in it, remove them.")
    settings = _load(config)
    url = url or f"http://{settings.api.host}:{settings.api.port}"
    content = {name: value for name, value in fields.items() if value is not None and name != "payload"}
    body = json.dumps({**content, "token": token[0], "wait": wait}).encode()
    if fields["payload"] is not None:
        # As it stands: the server passes a payload on octet by octet.
        body = body[:-1] + b', "payload": ' + _read_payload(fields["payload"]) + b"}"
    try:
        reply = _call(url, _find_key(key_file, settings), "POST", _PATH, body)
    except _UnreachableError as error:
        click.echo(f"{click.style('Error:', fg='red')} {error}", err=True)
        return 3
    if as_json:
        click.echo(json.dumps(reply.body))
    else:
        _say_outcome(reply)
    return _exit_code(reply)


def _read_payload(file: BinaryIO) -> bytes:
    payload = file.read()
    try:
        json.loads(payload)
    except ValueError as error:
        raise click.BadParameter(f"{file.name} is not JSON: {error}.", param_hint="--payload") from None
    return payload


def _say_outcome(reply: _Reply) -> None:
    body = reply.body
    state = body.get("state")
    if state is None:
        colour, words = "red", f"{body.get('code', reply.status)}: {body.get('detail', '')}"
        click.echo(f"{click.style('refused', fg=colour)}  {words}", err=True)
        return
    colour = {"accepted": "green", "queued": "yellow"}.get(state, "red")
    reason = f"  {body['reason']}" if body.get("reason") else ""
    click.echo(f"{click.style(state, fg=colour)}{reason}  {body['id']}  {body['meaning']}")


def _exit_code(reply: _Reply) -> int:
    if reply.status in (429, 500, 502, 503, 504):
        return 3
    if reply.status in (401, 404, 405):
        return 2
    return {"accepted": 0, "queued": 4}.get(reply.body.get("state", "refused"), 1)


def _find_key(key_file: Path | None, settings: Config) -> str:
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


# -- simulate --------------------------------------------------------------------------------------------------------


@cli.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", type=click.IntRange(0, 65535), default=2197, show_default=True, help="0: any free one.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("heliograph-simulator"),
    show_default=True,
    help="Where clients find the certificate to trust and a signing key.",
)
@click.option("--journal", type=click.Path(path_type=Path, dir_okay=False), help="Write each request there, as JSON.")
def simulate(host: str, port: int, folder: Path, journal: Path | None) -> None:
    """Run a simulator of Apple's service.

    It is for clients in any language, and runs until Ctrl-C. It takes every device token and topic, if the provider
    token is made with its signing key.

    \b
    Example:
      heliograph simulate --port 2197
    """
    _run(_simulate(host, port or _free_port(0), folder, journal))


async def _simulate(host: str, port: int, folder: Path, journal: Path | None) -> None:
    import asyncio

    from heliograph.simulator import server

    listens = asyncio.Event()

    def say(line: str) -> None:
        click.echo(line)
        listens.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(server.run(host, port, folder, say, journal=journal))
        await listens.wait()
        _say_how_to_connect(port, folder)


def _say_how_to_connect(port: int, folder: Path) -> None:
    import time

    from heliograph.protocols.provider_token import mint, parse_signing_key
    from heliograph.simulator.server import KEY_ID, TEAM_ID

    key_path = folder / f"AuthKey_{KEY_ID}.p8"
    key = parse_signing_key(key_path.read_bytes(), key_id=KEY_ID, team_id=TEAM_ID)
    say = _say
    say("")
    say("Try it; the provider token in this line is good for half an hour at least:")
    say("")
    say(f"curl -i --http2 --cacert {folder / 'ca.pem'} \\")
    say(f"  -H 'authorization: bearer {mint(key, time.time())}' \\")
    say(f"  -H 'apns-topic: {_TOPIC}' -H 'apns-push-type: alert' \\")
    say('  -d \'{"aps": {"alert": "Hello"}}\' \\')
    say(f"  https://localhost:{port}/3/device/{_ALIVE}")
    say("")
    say("With heliograph, in heliograph.toml:")
    say("")
    say("[apps.demo]")
    say(f'topic = "{_TOPIC}"')
    say(f'key = "{key_path}"')
    say(f'team_id = "{TEAM_ID}"')
    say('host = "localhost"')
    say(f"port = {port}")
    say(f'ca = "{folder / "ca.pem"}"')
    say("")
    say("Ctrl-C ends it.")


# -- what the commands share -----------------------------------------------------------------------------------------

_PATH = "/v1/notifications"


class _Reply(NamedTuple):
    """The server's answer."""

    status: int
    body: dict[str, Any]


class _UnreachableError(Exception):
    pass


def _call(url: str, key: str, method: str, path: str, content: dict[str, Any] | bytes) -> _Reply:
    """One request to the HTTP API. Raises _UnreachableError, ConfigError."""
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
        raise _UnreachableError(
            f"There is no answer from {url} ({why}): start a server with `{_program()} serve`, or name another --url"
        ) from None
    try:
        value = json.loads(answer)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise _UnreachableError(f"What answers at {url} is not heliograph: name another --url")
    return _Reply(status, value)


def _load(config: Path | None) -> Config:
    from heliograph.config import load

    if config is None and Path(CONFIG_FILE).exists():
        config = Path(CONFIG_FILE)
    return load(config)


def _run(main: Coroutine[Any, Any, None]) -> None:
    import asyncio

    from heliograph.service import new_event_loop

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main)


def _demo_app(apple: Simulator, folder: Path) -> AppSettings:
    """The app `demo`, whose key only `apple` knows, with its files in `folder`."""
    from heliograph.config import AppSettings

    key = _write(folder / f"AuthKey_{apple.signing_key.key_id}.p8", apple.signing_key.pem)
    return AppSettings(
        key=f"file:{key}",
        team_id=apple.signing_key.team_id,
        topic=_TOPIC,
        host="127.0.0.1",
        port=apple.port,
        ca=str(_write(folder / "ca.pem", apple.ca_pem)),
    )


def _write(path: Path, content: bytes) -> Path:
    """Write a file that only its owner can read. Raises ConfigError."""
    _make_folder(path.parent)
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(content)
    return path


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The folder {folder} cannot be made ({error.strerror}): name another one") from None


def _free_port(first: int) -> int:
    """The first port from there on that nobody listens on; for 0 any free one. Raises ConfigError."""
    import socket

    for port in range(first, min(first + _PORTS, 65536)):
        try:
            with socket.create_server(("127.0.0.1", port)) as taken:
                return int(taken.getsockname()[1])
        except OSError:
            continue
    raise ConfigError(f"None of the ports {first} to {first + _PORTS - 1} is free: name another --port")


def _program() -> str:
    """What to type to run this program again, from the current folder."""
    if shutil.which("heliograph"):
        return "heliograph"
    here = Path(sys.argv[0]).absolute()
    if here.name == "__main__.py":
        return f"{sys.executable} -m heliograph"
    if here.parent.parent.name == ".venv" and (here.parents[2] / "run").exists():
        here = here.parents[2] / "run"
    return f"./{here.relative_to(Path.cwd())}" if here.is_relative_to(Path.cwd()) else str(here)


def _expected(error: BaseException) -> HeliographError | BrokenPipeError | None:
    """The first error in it, where people can do something about all that is in it."""
    if isinstance(error, BaseExceptionGroup):
        found = [_expected(each) for each in error.exceptions]
        return None if None in found else found[0]
    return error if isinstance(error, HeliographError | BrokenPipeError) else None


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 74)


_say: Callable[[str], None] = click.echo
