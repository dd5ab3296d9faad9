"""`heliograph simulate`."""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from heliograph.commands.demo import ALIVE, TOPIC
from heliograph.commands.local import free_port, run_loop


@click.command()
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
    run_loop(_simulate(host, port or free_port(0), folder, journal))


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
    say(f"  -H 'apns-topic: {TOPIC}' -H 'apns-push-type: alert' \\")
    say('  -d \'{"aps": {"alert": "Hello"}}\' \\')
    say(f"  https://localhost:{port}/3/device/{ALIVE}")
    say("")
    say("With heliograph, in heliograph.toml:")
    say("")
    say("[apps.demo]")
    say(f'topic = "{TOPIC}"')
    say(f'key = "{key_path}"')
    say(f'team_id = "{TEAM_ID}"')
    say('host = "localhost"')
    say(f"port = {port}")
    say(f'ca = "{folder / "ca.pem"}"')
    say("")
    say("Ctrl-C ends it.")


_say: Callable[[str], None] = click.echo
