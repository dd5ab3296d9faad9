"""`heliograph buried`: what was given up on."""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlencode

import click

from heliograph.commands.calling import Where, server_options

_PATH = "/v1/buried"


@click.group()
def buried() -> None:
    """See what was given up on, and have it sent again.

    \b
    Example:
      heliograph buried list --app shop
    """


@buried.command("list")
@click.option("--app", help="Of one app only.")
@click.option("--before", metavar="ID", help="Those before this one: the last id of an earlier list.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="So many at most.")
@server_options
def show_list(
    app: str | None,
    before: str | None,
    limit: int,
    url: str | None,
    key_file: Path | None,
    config: Path | None,
    *,
    as_json: bool,
) -> None:
    """List what was given up on, newest first.

    \b
    Example:
      heliograph buried list --app shop --limit 10
    """
    query = {"app": app, "before": before, "limit": limit}
    asked = urlencode({name: value for name, value in query.items() if value is not None})
    found = Where(url, key_file, config).ask("GET", f"{_PATH}?{asked}")
    if as_json:
        click.echo(json.dumps(found))
        return
    for receipt in found["buried"]:
        reason = f"  {receipt['reason']}" if receipt.get("reason") else ""
        click.echo(f"{receipt['id']}  {receipt['app']}  {receipt['created_at']}{reason}")
    if not found["buried"]:
        click.echo("Nothing was given up on.")
    if found["next"]:
        click.echo(f"There are more: --before {found['next']}")


@buried.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@server_options
def replay(ids: Sequence[str], url: str | None, key_file: Path | None, config: Path | None, *, as_json: bool) -> int:
    """Have these sent again, under the same ids.

    \b
    Example:
      heliograph buried replay 01a1b2c3-d4e5-7000-8000-000000000001

    Exit code: 1 where one of them is not among what was given up on.
    """
    found = Where(url, key_file, config).ask("POST", f"{_PATH}/replay", {"ids": list(ids)})
    replayed = found["replayed"]
    if as_json:
        click.echo(json.dumps(found))
    else:
        for each in ids:
            click.echo(f"{each}  {'waits to be sent' if each in replayed else 'is not among what was given up on'}")
    return 0 if set(ids) <= set(replayed) else 1
