"""`heliograph send`."""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import click

from heliograph.commands.calling import NOTIFICATIONS, Reply, UnreachableError, call, find_key, server_options
from heliograph.commands.local import load_config


@click.command()
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
@server_options
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
    settings = load_config(config)
    url = url or f"http://{settings.api.host}:{settings.api.port}"
    content = {name: value for name, value in fields.items() if value is not None and name != "payload"}
    body = json.dumps({**content, "token": token[0], "wait": wait}).encode()
    if fields["payload"] is not None:
        # As it stands: the server passes a payload on octet by octet.
        body = body[:-1] + b', "payload": ' + _read_payload(fields["payload"]) + b"}"
    try:
        reply = call(url, find_key(key_file, settings), "POST", NOTIFICATIONS, body)
    except UnreachableError as error:
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


def _say_outcome(reply: Reply) -> None:
    body = reply.body
    state = body.get("state")
    if state is None:
        colour, words = "red", f"{body.get('code', reply.status)}: {body.get('detail', '')}"
        click.echo(f"{click.style('refused', fg=colour)}  {words}", err=True)
        return
    colour = {"accepted": "green", "queued": "yellow"}.get(state, "red")
    reason = f"  {body['reason']}" if body.get("reason") else ""
    click.echo(f"{click.style(state, fg=colour)}{reason}  {body['id']}  {body['meaning']}")


def _exit_code(reply: Reply) -> int:
    if reply.status in (429, 500, 502, 503, 504):
        return 3
    if reply.status in (401, 404, 405):
        return 2
    return {"accepted": 0, "queued": 4}.get(reply.body.get("state", "refused"), 1)
