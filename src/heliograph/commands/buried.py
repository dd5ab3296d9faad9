"""`heliograph buried`: what was given up on."""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlencode

import click

from heliograph.commands.calling import Server, with_server
from heliograph.commands.listing import show_pages
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
@click.option("--cursor", metavar="ID", help="Go on there: an earlier list said where, when there was more.")
@click.option("--limit", type=click.IntRange(min=0), default=50, show_default=True, help="So many at most; 0: all.")
@with_server
def show_list(server: Server, app: str | None, cursor: str | None, limit: int) -> None:
    """List what was given up on, newest first.

    \b
    Examples:
      heliograph buried list --app shop --limit 10
      heliograph buried list --limit 0 --json

    With --json there is a line for each.
    """
    show_pages(server, _PATH, "buried", "before", limit, {"app": app, "before": cursor})


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
        query = {"app": app, "before": before, "limit": _MAX_PAGE}
        wanted = urlencode({name: value for name, value in query.items() if value is not None})
        found = server.ask("GET", f"{_PATH}?{wanted}")
        ids += [receipt["id"] for receipt in found["buried"]]
        before = found["next"]
        if before is None:
            return ids[::-1]
