"""`heliograph simulate`."""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

import os
import select
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from heliograph.commands.demo import ALIVE, TOPIC
from heliograph.commands.local import free_port, run_loop
from heliograph.commands.telling import colours, tell

if TYPE_CHECKING:
    import asyncio

    from heliograph.simulator.devices import Shown
    from heliograph.simulator.running import Running

_UNPRINTED = 10_000
"""Notifications that wait for a slow terminal or reader, at most."""
_LAST_WORDS_S = 0.2
"""How long a reader that takes nothing may hold up the end."""

_COLOURS = {"alert": "green", "background": "blue", "voip": "magenta", "liveactivity": "cyan"}


@click.command()
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Where to listen; the control API listens there too."
)
@click.option("--port", type=click.IntRange(0, 65535), default=2197, show_default=True, help="0: any free one.")
@click.option(
    "--control-port",
    type=click.IntRange(0, 65535),
    help="Of the control API, plain HTTP.  [default: the first free one after --port]",
)
@click.option(
    "--environment",
    type=click.Choice(["production", "development"]),
    default="production",
    show_default=True,
    help="Which of Apple's two it is; device tokens and keys belong to one.",
)
@click.option("--strict", is_flag=True, help="Take no device token but those that were registered.")
@click.option(
    "--client-ca",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Take client certificates of these authorities, PEM, in place of provider tokens.",
)
@click.option(
    "--faults",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A fault script, JSON or TOML: how to misbehave from the start.",
)
@click.option("--watch", is_flag=True, help="Print each notification as its device shows it.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON lines; the first says where it listens.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("heliograph-simulator"),
    show_default=True,
    help="Where clients find the certificate to trust and a signing key.",
)
@click.option(
    "--legacy", is_flag=True, help="Play Apple's binary gateway and feedback service too, as they were until 2021."
)
@click.option(
    "--legacy-port",
    type=click.IntRange(0, 65535),
    default=2195,
    show_default=True,
    help="Of the binary gateway. 0: any free one.",
)
@click.option(
    "--feedback-port",
    type=click.IntRange(0, 65535),
    default=2196,
    show_default=True,
    help="Of the feedback service. 0: any free one.",
)
@click.option(
    "--legacy-topic", default=TOPIC, show_default=True, help="The app that clients of the binary gateway send to."
)
@click.option(
    "--legacy-payload",
    type=click.IntRange(1, 5120),
    default=2048,
    show_default=True,
    help="Octets that a payload may have there; until 2014 it was 256.",
)
@click.option(
    "--require-certificate", is_flag=True, help="Let in no client there that does not show the one in the folder."
)
@click.option("--journal", type=click.Path(path_type=Path, dir_okay=False), help="Write each request there, as JSON.")
def simulate(
    host: str,
    port: int,
    control_port: int | None,
    environment: str,
    client_ca: Path | None,
    faults: Path | None,
    folder: Path,
    journal: Path | None,
    legacy_port: int,
    feedback_port: int,
    legacy_topic: str,
    legacy_payload: int,
    *,
    legacy: bool,
    require_certificate: bool,
    strict: bool,
    watch: bool,
    as_json: bool,
) -> None:
    """Run a simulator of Apple's service.

    It is for clients in any language, and runs until Ctrl-C. It takes every device token and topic, if the provider
    token is made with its signing key; what it should do otherwise, its control API is told.

    \b
    Examples:
      heliograph simulate --watch
      heliograph simulate --strict --environment development
      heliograph simulate --port 0 --json --faults faults.toml
      heliograph simulate --legacy --watch
    """
    from heliograph.errors import Refused
    from heliograph.model import Environment
    from heliograph.simulator.legacy import Legacy
    from heliograph.simulator.reading import load_rules, read_file
    from heliograph.simulator.running import running

    if not legacy:
        _refuse_without_legacy()
    try:
        old_apple = Legacy(
            port=legacy_port,
            feedback_port=feedback_port,
            topic=legacy_topic,
            max_payload=legacy_payload,
            required=require_certificate,
        )
    except Refused as no:
        raise click.UsageError(f"--legacy-topic: {no.detail}") from None
    rules = [] if faults is None else load_rules(faults)
    authorities = None if client_ca is None else read_file(client_ca, "The authorities of clients")
    if control_port is None:
        control_port = free_port(port + 1) if 0 < port < 65535 else 0
    run_loop(
        _simulate(
            running(
                folder,
                host=host,
                port=port,
                control_port=control_port,
                environment=Environment(environment),
                strict=strict,
                journal=journal,
                client_authorities=authorities,
                rules=rules,
                legacy=old_apple if legacy else None,
            ),
            watch=watch or as_json,
            as_json=as_json,
        )
    )


def _refuse_without_legacy() -> None:
    """Options of the old Apple mean nothing without it. Raises UsageError."""
    context = click.get_current_context()
    for name in ("legacy_port", "feedback_port", "legacy_topic", "legacy_payload", "require_certificate"):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} is for the binary gateway: add --legacy")


async def _simulate(running: AbstractAsyncContextManager[Running], *, watch: bool, as_json: bool) -> None:
    import asyncio
    import signal

    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with running as simulator, asyncio.TaskGroup() as group:
        simulator.apple.on_refused = _say_who_failed
        tell(simulator.control.describe()) if as_json else _say_how_to_connect(simulator, watch=watch)
        if watch:
            group.create_task(_Printer(as_json=as_json).run(simulator, stop))
        await stop.wait()


def _say_who_failed(door: str, address: str, why: str) -> None:
    name = "legacy gateway" if door == "legacy" else "feedback service"
    click.echo(f"A client at {address} could not connect to the {name}: {why}.", err=True)


class _Printer:
    """Prints what devices show. A slow terminal or reader holds up nobody: where too much waits, some is left out."""

    def __init__(self, *, as_json: bool) -> None:
        from heliograph.simulator.watching import Watcher

        self._as_json = as_json
        self._watcher = Watcher()
        self._waiting: deque[tuple[int, Shown]] = deque(maxlen=_UNPRINTED)
        self._printed = 0
        """The number of the last one."""
        self._ending = threading.Event()

    async def run(self, simulator: Running, stop: asyncio.Event) -> None:
        """Until `stop` is set and all is printed."""
        import asyncio

        news = asyncio.Event()

        def on_shown(number: int, shown: Shown) -> None:
            self._waiting.append((number, shown))
            news.set()

        unfollow = simulator.control.follow(on_shown)
        stopping = asyncio.create_task(stop.wait())
        stopping.add_done_callback(lambda _: self._ending.set())
        stopping.add_done_callback(lambda _: news.set())
        try:
            while self._waiting or not stop.is_set():
                await news.wait()
                news.clear()
                lines = [line for number, shown in self._take() for line in self._lines(number, shown)]
                if lines:
                    await asyncio.to_thread(_write, "\n".join(lines) + "\n", self._ending)
        finally:
            self._ending.set()
            stopping.cancel()
            unfollow()

    def _take(self) -> Iterator[tuple[int, Shown]]:
        while self._waiting:
            yield self._waiting.popleft()

    def _lines(self, number: int, shown: Shown) -> Iterator[str]:
        from heliograph.simulator.watching import as_json

        missed = number - self._printed - 1
        self._printed = number
        if self._as_json:
            yield as_json(shown, number).decode()
            return
        if missed:
            yield f"... {missed} more that could not be printed in time"
        line = self._watcher.line(shown)
        kind = click.style(f"{line.push_type:<12}", fg=_COLOURS.get(line.push_type, "yellow"))
        note = click.style(f"  ({line.note})", dim=True) if line.note else ""
        yield f"{click.style(line.at, dim=True)}  {line.token}  {kind}  {line.text}{note}"


def _write(text: str, ending: threading.Event) -> None:
    """To stdout, as fast as its reader takes it; once it is `ending`, only as long as that takes anything.

    Whoever waits in a write itself cannot be told to end, and Python waits for its threads.
    """
    if sys.stdout is None:  # closed by who started us
        return
    plain = colours() is False or not sys.stdout.isatty()
    octets = (click.unstyle(text) if plain else text).encode(sys.stdout.encoding, "backslashreplace")
    file = sys.stdout.fileno()
    while octets:
        # Whoever can be written to takes so many octets at once (POSIX, of pipes).
        if select.select((), (file,), (), _LAST_WORDS_S)[1]:
            octets = octets[os.write(file, octets[: select.PIPE_BUF]) :]
        elif ending.is_set():
            return


def _say_how_to_connect(simulator: Running, *, watch: bool) -> None:
    apple, control = simulator.apple, simulator.control.url
    key = apple.signing_key
    here = "localhost" if apple.host in ("127.0.0.1", "::1", "0.0.0.0", "::") else apple.host  # noqa: S104
    url = apple.url if here == apple.host else f"https://{here}:{apple.port}"
    devices = ", registered devices only" if apple.strict else ""
    say = click.echo
    say(f"Apple's simulator listens on {apple.url} ({apple.environment}{devices})")
    say(f"  trust        {simulator.ca_file}")
    say(f"  signing key  {simulator.key_file}  (key id {key.key_id}, team id {key.team_id})")
    say(f"  control      {control}  (devices, what they show, faults)")
    if apple.topic is not None:
        say(f"  legacy       {_at(apple.host, apple.legacy_port)}  (binary gateway, for {apple.topic})")
        say(f"  feedback     {_at(apple.host, apple.feedback_port)}")
        need = "clients have to show it" if simulator.certificate_required else "for clients that cannot do without one"
        say(f"  certificate  {simulator.client_file}  (with its key; {need})")
    say("")
    if apple.strict:
        say("Register a device:")
        say("")
        say(f"curl -sS -X PUT {control}/devices/{ALIVE}")
        say("")
    say("Send to it:")
    say("")
    say(f"curl -i --http2 --cacert {simulator.ca_file} \\")
    say(f'  -H "authorization: bearer $(curl -sS {control}/provider-token)" \\')
    say(f"  -H 'apns-topic: {TOPIC}' -H 'apns-push-type: alert' \\")
    say('  -d \'{"aps": {"alert": "Hello"}}\' \\')
    say(f"  {url}/3/device/{ALIVE}")
    say("")
    say("See what it shows:")
    say("")
    say(f"curl -sS {control}/devices/{ALIVE}/shown")
    say("")
    if apple.topic is not None:
        _say_how_to_speak_legacy(simulator, here)
    say("With heliograph, in heliograph.toml:")
    say("")
    say("[apps.demo]")
    say(f'topic = "{TOPIC}"')
    say(f'key = "{simulator.key_file}"')
    say(f'team_id = "{key.team_id}"')
    if apple.environment != "production":
        say(f'environment = "{apple.environment}"')
    say(f'host = "{here}"')
    say(f"port = {apple.port}")
    say(f'ca = "{simulator.ca_file}"')
    say("")
    say("Ctrl-C ends it." if not watch else "Ctrl-C ends it. What devices show comes here:")
    say("")


def _say_how_to_speak_legacy(simulator: Running, here: str) -> None:
    """Lines to paste, and what to point a script at."""
    apple, say = simulator.apple, click.echo
    payload = '{"aps": {"alert": "Hello"}}'
    octal = "".join(f"\\{octet:o}" for octet in bytes.fromhex(ALIVE))
    show = f" -cert {simulator.client_file}" if simulator.certificate_required else ""
    say("Send to it as old scripts did:")
    say("")
    say(f"printf '\\0\\0\\40{octal}\\0\\{len(payload):o}{payload}' |")
    say(f"  openssl s_client -quiet -no_ign_eof -CAfile {simulator.ca_file}{show} \\")
    say(f"    -connect {_at(here, apple.legacy_port)}")
    say("")
    say("Read the feedback service:")
    say("")
    say(f"openssl s_client -quiet -CAfile {simulator.ca_file}{show} \\")
    say(f"  -connect {_at(here, apple.feedback_port)} </dev/null | od -An -tx1")
    say("")


def _at(host: str, port: int | None) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
