"""`heliograph list` and `heliograph cancel`: notifications that a server has."""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

import click

from heliograph.commands.calling import NOTIFICATIONS, Server, with_server
from heliograph.commands.status import complete_push_type, say_state
from heliograph.commands.telling import DONE, FAILED, progress, tell

STATES = ("queued", "sent", "accepted", "rejected", "expired", "cancelled", "buried", "unknown")

_MAX_PAGE = 1000
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_CANCELLED = {
    "cancelled": "cancelled",
    "cancelling": "is being sent: if Apple does not take it this time, it is not tried again",
    "too_late": "too late: heliograph status says what became of it",
    "unknown": "not known",
}


def _time(_: click.Context, __: click.Parameter, given: str | None) -> str | None:
    """As the server takes it; `2h` is two hours ago."""
    ago = re.fullmatch(r"(\d{1,9})([smhd])", given or "")
    return given if ago is None else f"{max(time.time() - int(ago[1]) * _UNITS_S[ago[2]], 0):.3f}"


@click.command("list")
@click.option("--app", help="Of this app.")
@click.option("--environment", type=click.Choice(["production", "development"]), help="Of this environment.")
@click.option("--state", multiple=True, type=click.Choice(STATES), help="In this state; again for several.")
@click.option("--reason", help="With this reason, as BadDeviceToken.")
@click.option("--token", help="To this device token.")
@click.option("--topic", help="With this topic.")
@click.option("--push-type", shell_complete=complete_push_type, help="Of this push type.")
@click.option("--connection", metavar="NAME", help="Brought by this connection, as main-9f31c2-17.")
@click.option("--since", metavar="TIME", callback=_time, help="Taken then or later: 2h (ago), 2026-11-21T12:00:00Z.")
@click.option("--until", metavar="TIME", callback=_time, help="Taken before.")
@click.option("--cursor", metavar="ID", help="Go on there: an earlier list said where, when there was more.")
@click.option("--limit", type=click.IntRange(min=0), default=50, show_default=True, help="So many at most; 0: all.")
@with_server
def show_list(server: Server, limit: int, **filters: Any) -> None:
    """List notifications, newest first.

    \b
    Examples:
      heliograph list --app shop --state rejected --since 2h
      heliograph list --reason BadDeviceToken --limit 0 --json

    With --json there is a line for each.
    """
    show_pages(server, NOTIFICATIONS, "notifications", "cursor", limit, filters)


def show_pages(server: Server, path: str, member: str, place: str, limit: int, filters: dict[str, Any]) -> None:
    """Show so many receipts (0: all) of a listing, which has them as `member` and goes on from the parameter `place`.

    Raises what `Server.ask` does.
    """
    wanted = {name: value for name, value in filters.items() if value}
    count, more = 0, True
    while more and (not limit or count < limit):
        size = min(limit - count, _MAX_PAGE) if limit else _MAX_PAGE
        page = server.ask("GET", f"{path}?{urlencode({**wanted, 'limit': size}, doseq=True)}")
        for receipt in page[member]:
            tell(receipt) if server.as_json else _say(receipt)
        count += len(page[member])
        wanted[place] = page["next"]
        more = page["next"] is not None
    if more:
        click.echo(f"There are more: --cursor {wanted[place]}", err=True)
    elif not count:
        click.echo("There are none.", err=True)


def _say(receipt: dict[str, Any]) -> None:
    reason = f"  {receipt['reason']}" if receipt["reason"] else ""
    taken = f"{receipt['created_at'][:19]}Z"
    click.echo(f"{receipt['id']}  {taken}  {receipt['app']}  {say_state(receipt['state'])}{reason}")


@click.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@with_server
def cancel(server: Server, ids: Sequence[str]) -> int:
    """Cancel notifications that Apple has not taken yet.

    \b
    Example:
      heliograph cancel 01a1b2c3-d4e5-7000-8000-000000000001

    With --json there is a line for each. Exit code: 1 where it was too late for one, or one is not known.
    """
    codes = []
    with progress(len(ids), "Cancelling") as advance:
        for start in range(0, len(ids), _MAX_PAGE):
            some = ids[start : start + _MAX_PAGE]
            found = server.ask("POST", f"{NOTIFICATIONS}/cancel", {"ids": list(some)})
            how = {each: name for name, those in found.items() for each in those}
            for each in some:
                _say_cancelled(each, how.get(each, "unknown"), as_json=server.as_json)
                codes.append(DONE if how.get(each) in ("cancelled", "cancelling") else FAILED)
            advance(len(some))
    return max(codes)


def _say_cancelled(id: str, how: str, *, as_json: bool) -> None:
    if as_json:
        tell({"id": id, "result": how})
    else:
        click.echo(f"{id}  {_CANCELLED.get(how, how)}")
