"""`heliograph buried`: what was given up on."""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

import click

from heliograph.commands.calling import Server, with_server
from heliograph.commands.telling import DONE, FAILED, progress, tell

_PATH = "/v1/buried"
_MAX_PAGE = 1000


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
@click.option("--limit", type=click.IntRange(1, _MAX_PAGE), default=50, show_default=True, help="So many at most.")
@with_server
def show_list(server: Server, app: str | None, before: str | None, limit: int) -> None:
    """List what was given up on, newest first.

    \b
    Example:
      heliograph buried list --app shop --limit 10
    """

    def say(found: dict[str, Any]) -> None:
        for receipt in found["buried"]:
            reason = f"  {receipt['reason']}" if receipt.get("reason") else ""
            click.echo(f"{receipt['id']}  {receipt['app']}  {receipt['created_at']}{reason}")
        if not found["buried"]:
            click.echo("Nothing was given up on.")
        if found["next"]:
            click.echo(f"There are more: --before {found['next']}")

    server.show("GET", _page(app, before, limit), say)


@buried.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "replay_all", is_flag=True, help="All that there are, the oldest first.")
@click.option("--app", help="With --all: of one app only.")
@with_server
def replay(server: Server, ids: Sequence[str], app: str | None, *, replay_all: bool) -> int:
    """Have these sent again, under the same ids.

    \b
    Examples:
      heliograph buried replay 01a1b2c3-d4e5-7000-8000-000000000001
      heliograph buried replay --all --app shop

    Exit code: 1 where one of them is not among what was given up on.
    """
    if replay_all == bool(ids) or (app and not replay_all):
        raise click.UsageError("Name the ids, or say --all (and then perhaps --app).")
    wanted = _find_all(server, app) if replay_all else ids
    replayed: list[str] = []
    try:
        with progress(len(wanted), "Replaying") as advance:
            for start in range(0, len(wanted), _MAX_PAGE):
                some = wanted[start : start + _MAX_PAGE]
                replayed += server.ask("POST", f"{_PATH}/replay", {"ids": list(some)})["replayed"]
                advance(len(some))
    except BaseException:
        if replayed:
            click.echo(f"{len(replayed):,} of {len(wanted):,} wait to be sent again; the rest is as it was.", err=True)
        raise
    there = set(replayed)
    if server.as_json:
        tell({"replayed": replayed})
    elif replay_all:
        click.echo(f"{len(replayed):,} wait to be sent again." if wanted else "Nothing was given up on.")
    else:
        for each in ids:
            click.echo(f"{each}  {'waits to be sent' if each in there else 'is not among what was given up on'}")
    return DONE if replay_all or there.issuperset(ids) else FAILED


def _find_all(server: Server, app: str | None) -> list[str]:
    """The ids of what was given up on, the oldest first."""
    ids: list[str] = []
    before = None
    while True:
        found = server.ask("GET", _page(app, before, _MAX_PAGE))
        ids += [receipt["id"] for receipt in found["buried"]]
        before = found["next"]
        if before is None:
            return ids[::-1]


def _page(app: str | None, before: str | None, limit: int) -> str:
    query = {"app": app, "before": before, "limit": limit}
    return f"{_PATH}?{urlencode({name: value for name, value in query.items() if value is not None})}"
