"""`heliograph removals`: device tokens that Apple calls dead."""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

from urllib.parse import urlencode

import click

from heliograph.commands.calling import Server, with_server
from heliograph.commands.telling import tell

_PATH = "/v1/removals"
_MAX_PAGE = 1000


@click.command()
@click.argument("app", required=False)
@click.option("--environment", type=click.Choice(["production", "development"]), help="Of this environment.")
@click.option(
    "--after", type=click.IntRange(min=0), metavar="NUMBER", help="Go on there: what came later than this number."
)
@click.option("--limit", type=click.IntRange(min=0), default=0, help="So many at most.  [default: all]")
@with_server
def removals(server: Server, app: str | None, environment: str | None, after: int | None, limit: int) -> None:
    """List the device tokens that Apple called dead.

    They are those of APP, in the order in which that came to be known. Each has a number. Reading consumes nothing:
    keep the last number, and name it with --after the next time. APP may be left out where there is one only.

    \b
    Examples:
      heliograph removals shop
      heliograph removals shop --after 4711 --json

    With --json there is a line for each.
    """
    wanted = {"app": app, "environment": environment, "after": after}
    count = 0
    while True:
        size = min(limit - count, _MAX_PAGE) if limit else _MAX_PAGE
        query = {name: value for name, value in {**wanted, "limit": size}.items() if value is not None}
        page = server.ask("GET", f"{_PATH}?{urlencode(query)}")
        for each in page["removals"]:
            if server.as_json:
                tell(each)
            else:
                click.echo(f"{each['number']}  {each['since']}  {each['environment']}  {each['token']}")
        count += len(page["removals"])
        wanted["after"] = page["next"]
        if len(page["removals"]) < size or count == limit:
            break
    if count:
        click.echo(f"For what comes later: --after {wanted['after']}", err=True)
    else:
        click.echo("There are none.", err=True)
