"""`heliograph keys`: API keys of a running server."""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from heliograph.commands.calling import Server, with_server
from heliograph.commands.telling import tell
from heliograph.errors import ConfigError

PATH = "/v1/keys"


@click.group()
def keys() -> None:
    """See who has a key to the API, hand out and take back keys.

    \b
    Example:
      heliograph keys add web --app shop --out web.key
    """


@keys.command("list")
@with_server
def show_list(server: Server) -> None:
    """List the API keys, oldest first. The server's own is not among them.

    \b
    Example:
      heliograph keys list
    """

    def say(found: dict[str, Any]) -> None:
        for each in found["keys"]:
            click.echo(f"{each['id']}  {each['name']}  {', '.join(each['scopes'])}  {_apps(each)}  {_end(each)}")
        if not found["keys"]:
            click.echo("There are no API keys but the server's own.")

    server.show("GET", PATH, say)


@keys.command()
@click.argument("key_id", metavar="ID")
@with_server
def show(server: Server, key_id: str) -> None:
    """Show what an API key may do.

    With `self` in place of an ID it is the key that is used to ask.

    \b
    Example:
      heliograph keys show 0b5cfe52
    """
    server.show("GET", _path(key_id), _say)


@keys.command()
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["send", "read", "manage"]),
    help="What it may do; again for several.  [default: send]",
)
@click.option("--app", "apps", multiple=True, help="What app it is for; again for several.  [default: all]")
@click.option(
    "--expires-in",
    type=click.FloatRange(0, min_open=True),
    metavar="DAYS",
    help="How long it lasts.  [default: for ever]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A new file for the key, which only you can read.  [default: stdout]",
)
@with_server
def add(
    server: Server, name: str, scopes: Sequence[str], apps: Sequence[str], expires_in: float | None, out: Path | None
) -> None:
    """Make an API key; NAME says whose it is.

    The key stands alone on stdout, this once; what else there is to say goes to stderr.

    \b
    send    send notifications, see what became of one, cancel it
    read    look for notifications, see what was given up on
    manage  change apps, credentials, keys, callers; replay what was given up on

    \b
    Examples:
      heliograph keys add web --app shop --out web.key
      heliograph keys add ci --scope send --scope read --expires-in 30
    """
    given = {"scopes": scopes, "apps": apps, "expires_in_days": expires_in}
    wanted = {"name": name, **{field: value for field, value in given.items() if value}}
    made = server.ask("POST", PATH, wanted) if out is None else _ask_into(out, server, wanted)
    if server.as_json:
        tell(made)
        return
    if out is None:
        click.echo(made["key"])
    kept = "It is not shown again: keep it." if out is None else f"It is in {out}."
    told = f"The key {made['id']} ({made['name']}) may {', '.join(made['scopes'])} for {_apps(made)}, {_end(made)}."
    click.echo(f"{told} {kept}", err=True)


@keys.command()
@click.argument("key_id", metavar="ID")
@with_server
def remove(server: Server, key_id: str) -> None:
    """Remove an API key: it opens nothing any more.

    \b
    Example:
      heliograph keys remove 0b5cfe52
    """
    server.show("DELETE", _path(key_id), lambda found: click.echo(f"{found['removed']} is removed."))


def _ask_into(out: Path, server: Server, wanted: dict[str, Any]) -> dict[str, Any]:
    """The server's answer without the key, which is in the file then. Raises ConfigError, and what `ask` does."""
    try:
        # Made before there is a key that could get lost. What is there already may be a key, or readable by others.
        file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(f"--out: there is a file {out} already: name a new one") from None
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be written ({error.strerror}): name another file") from None
    with os.fdopen(file, "w") as opened:
        try:
            made = server.ask("POST", PATH, wanted)
        except BaseException:
            out.unlink()
            raise
        opened.write(f"{made.pop('key')}\n")
    return made


def _say(shown: dict[str, Any]) -> None:
    click.echo(click.style(shown["name"], bold=True))
    click.echo(f"  id     {shown['id'] or 'none: it is in no list'}")
    click.echo(f"  may    {', '.join(shown['scopes'])}")
    click.echo(f"  for    {_apps(shown)}")
    click.echo(f"  since  {shown['created_at'] or 'the first start'}")
    click.echo(f"  lasts  {_end(shown)}")


def _apps(shown: dict[str, Any]) -> str:
    return "all apps" if shown["apps"] is None else ", ".join(shown["apps"])


def _end(shown: dict[str, Any]) -> str:
    from datetime import UTC, datetime

    ends = shown["expires_at"]
    if ends is None:
        return "without end"
    over = datetime.fromisoformat(ends) <= datetime.now(UTC)
    return click.style(f"ended {ends}", fg="red") if over else f"until {ends}"


def _path(key_id: str) -> str:
    return f"{PATH}/{quote(key_id, safe='')}"
