"""`heliograph status`: what became of notifications."""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import click

from heliograph.commands.calling import NOTIFICATIONS, Server, with_server
from heliograph.commands.telling import DONE, FAILED, WAITING, RefusedError, tell

UNFINISHED = ("queued", "sent")
"""States that another one follows."""

_FACTS = {
    "app": "app",
    "environment": "environment",
    "topic": "topic",
    "push type": "push_type",
    "device token": "token",
    "collapse id": "collapse_id",
    "taken": "created_at",
    "last change": "updated_at",
    "attempts": "attempts",
    "next attempt": "next_attempt_at",
    "gone since": "unregistered_at",
    "unique id": "unique_id",
    "connection": "connection",
    "identifier": "identifier",
    "apns-id": "apns_id",
}
"""What is shown of a receipt, by what it is called for people."""

_COLOURS = {"accepted": "green", **dict.fromkeys(UNFINISHED, "yellow"), "cancelled": "yellow"}


@click.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@with_server
def status(server: Server, ids: Sequence[str]) -> int:
    """See what became of notifications.

    \b
    Example:
      heliograph status 01a1b2c3-d4e5-7000-8000-000000000001

    With --json there is a line for each, in the order of the ids.

    Exit code: 0 Apple accepted all of them, 1 one was rejected, given up on or is not known, 4 one still waits.
    """
    codes = [_show(server, each) for each in ids]
    return next((code for code in (FAILED, WAITING) if code in codes), DONE)


def exit_code_of(state: str | None) -> int:
    return DONE if state == "accepted" else WAITING if state in UNFINISHED else FAILED


def say_state(state: str) -> str:
    return click.style(state, fg=_COLOURS.get(state, "red"))


def complete_push_type(_: click.Context, __: click.Parameter, begun: str) -> list[str]:
    from heliograph.model import PushType

    return [each for each in PushType if each.startswith(begun)]


def _show(server: Server, id: str) -> int:
    try:
        receipt = server.ask("GET", f"{NOTIFICATIONS}/{quote(id, safe='')}")
    except RefusedError as error:
        if error.exit_code != FAILED:
            raise
        receipt = {"id": id, "error": error.problem}
        if not server.as_json:
            click.echo(f"{id}  {click.style('not known', fg='red')}  {error}.", err=True)
            return FAILED
    if server.as_json:
        tell(receipt)
    else:
        _say(receipt)
    return exit_code_of(receipt.get("state"))


def _say(receipt: dict[str, Any]) -> None:
    reason = f"  {receipt['status'] or ''} {receipt['reason']}".rstrip() if receipt["reason"] else ""
    click.echo(f"{click.style(receipt['id'], bold=True)}  {say_state(receipt['state'])}{reason}")
    click.echo(f"  {receipt['meaning']}")
    for name, member in _FACTS.items():
        if receipt.get(member) is not None:
            click.echo(f"  {name:<14}{receipt[member]}")
