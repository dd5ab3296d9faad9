"""`heliograph send`."""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from heliograph.commands.calling import NOTIFICATIONS, Server, with_payload, with_server
from heliograph.commands.status import complete_push_type, exit_code_of, say_state
from heliograph.commands.telling import FAILED, RefusedError, tell
from heliograph.errors import ConfigError

_MAX_PAYLOAD_BYTES = 1024 * 1024
"""Far more than Apple takes: the server says so better."""
_MAX_LINE = 1000
_MAX_WAIT_S = 30.0
"""The server holds no answer back for longer."""
_WAIT_S = 10.0
_STDIN = Path("-")
_file = click.Path(path_type=Path, dir_okay=False, exists=True, allow_dash=True)


@click.command()
@click.argument("token", nargs=-1, metavar="[TOKEN]")
@click.option("--tokens-file", type=_file, help="A file with a device token on each line instead, - for stdin.")
@click.option("--app", help="Which app; not needed where there is one only.")
@click.option("--title", help="The alert's title.")
@click.option("--subtitle", help="The alert's subtitle.")
@click.option("--body", help="The alert's text.")
@click.option("--badge", type=int, help="The number on the app's icon; 0 takes it away.")
@click.option("--sound", help="The sound's file name, or default.")
@click.option("--payload", type=_file, help="A file with the whole payload, - for stdin.")
@click.option("--topic", help="The topic, where the app has several.")
@click.option("--environment", type=click.Choice(["production", "development"]), help="Where the app has both.")
@click.option("--push-type", shell_complete=complete_push_type, help="alert, background, voip, ...")
@click.option("--priority", type=int, help="10, 5 or 1.")
@click.option("--expiration", type=int, help="UNIX seconds; 0: Apple tries once.")
@click.option("--collapse-id", help="A later notification with the same id takes this one's place.")
@click.option(
    "--wait",
    type=click.FloatRange(0, 86_400),
    help="Seconds for the outcome, 30 at most for one.  [default: 10; with --tokens-file 0]",
)
@with_server
def send(
    server: Server,
    token: Sequence[str],
    tokens_file: Path | None,
    payload: Path | None,
    wait: float | None,
    **fields: Any,
) -> int:
    """Send one notification or many, see what became of them.

    They go through a running server. The outcome of one is printed in one line. Many are one to each device token of a
    file: their numbers are printed, and --wait has them followed until Apple has answered. Blanks and <> in a device
    token, as Xcode shows it, are left out.

    \b
    Examples:
      heliograph send --app shop --title Hello --body World a1b2c3d4...
      heliograph send --payload push.json --json a1b2c3d4...
      heliograph send --title Hello --tokens-file tokens.txt --wait 60
      heliograph send --url http://push:8080 --key-file key --title Hi a1b2c3d4...

    With --json and --tokens-file there is a line for each token, and a summary at the end.

    Exit code: 0 Apple accepted it (of many without --wait: the server took all), 1 one was refused, rejected or given
    up, 4 one still waits.
    """
    if tokens_file is None and len(token) != 1:
        raise click.UsageError(
            "This takes one device token: if yours has blanks in it, remove them. For several name a --tokens-file."
            if token
            else "There is no device token: write it behind the options, or name a --tokens-file."
        )
    if tokens_file is not None and token:
        raise click.UsageError("There is a device token beside --tokens-file: leave one of them out.")
    if tokens_file == payload == _STDIN:
        raise click.UsageError("--tokens-file and --payload cannot both be read from stdin: name a file for one.")
    content = {name: value for name, value in fields.items() if value is not None}
    whole = None if payload is None else _read_payload(payload)
    if tokens_file is not None:
        from heliograph.commands.sending import send_many

        return send_many(server, content, whole, _read_tokens(tokens_file), wait or 0)
    if wait is not None and wait > _MAX_WAIT_S:
        raise click.BadParameter(f"{wait:g} is over {_MAX_WAIT_S:.0f}, the most for one.", param_hint="'--wait'")
    content |= {"token": _clean(token[0]), "wait": _WAIT_S if wait is None else wait}
    return _send_one(server, with_payload(content, whole))


def _send_one(server: Server, body: bytes) -> int:
    try:
        answer = server.ask("POST", NOTIFICATIONS, body)
    except RefusedError as error:
        if error.exit_code != FAILED:  # nothing is wrong with the notification
            raise
        if server.as_json:
            tell({"error": error.problem})
        for code, detail in _wrongs(error.problem):
            click.echo(f"{click.style('refused', fg='red')}  {code}: {detail}", err=True)
        return error.exit_code
    notification_id, state = answer["id"], answer.get("state", "queued")
    if server.as_json:
        tell(answer)
    else:
        reason = f"  {answer['reason']}" if answer.get("reason") else ""
        meaning = answer.get("meaning", "It is waiting to be sent.")
        click.echo(f"{say_state(state)}{reason}  {notification_id}  {meaning}")
    return exit_code_of(state)


def _wrongs(problem: dict[str, Any]) -> list[tuple[str, str]]:
    """Code and detail of each thing that is wrong."""
    found = problem.get("errors") or [problem]
    return list(dict.fromkeys((each.get("code", problem["status"]), each.get("detail", "")) for each in found))


def _clean(token: str) -> str:
    bare = _bare(token)
    if bare != token:
        _say_cleaned()
    return bare


def _bare(token: str) -> str:
    """Without the blanks and <> that Xcode's log shows; what is no device token all the same stays as it is."""
    if token.isalnum():
        return token
    bare = re.sub(r"[<>\s]", "", token)
    return bare if re.fullmatch("[0-9a-fA-F]+", bare) else token


def _say_cleaned() -> None:
    text = "Blanks and <> were left out of a device token. The API refuses them: keep tokens as hex digits only."
    click.echo(text, err=True)


def _read_payload(file: Path) -> bytes:
    from heliograph.config import read_file

    if file == _STDIN:
        payload = sys.stdin.buffer.read(_MAX_PAYLOAD_BYTES)
    else:
        payload = read_file(file, "--payload", most=_MAX_PAYLOAD_BYTES)
    try:
        json.loads(payload)
    except (ValueError, RecursionError) as error:
        name = "stdin" if file == _STDIN else file
        raise click.BadParameter(f"{name} is not JSON: {error}.", param_hint="'--payload'") from None
    return payload


def _read_tokens(file: Path) -> dict[int, str]:
    """The device tokens by the number of their line. Raises ConfigError."""
    tokens, cleaned = {}, False
    try:
        with click.open_file(str(file), "rb") as opened:
            for number, line in enumerate(iter(lambda: opened.readline(_MAX_LINE + 1), b""), 1):
                if len(line) > _MAX_LINE:
                    raise ConfigError(f"--tokens-file: line {number} is too long: write one device token a line")
                if text := line.decode("utf-8", "backslashreplace").strip():
                    tokens[number] = _bare(text)
                    cleaned |= tokens[number] != text
    except OSError as error:
        raise ConfigError(f"--tokens-file: {file} cannot be read ({error.strerror}): name another file") from None
    if not tokens:
        raise ConfigError("--tokens-file: there is no device token in it: write one a line")
    if cleaned:
        _say_cleaned()
    return tokens
