"""`heliograph config`: which settings count, and where each is from."""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from heliograph.commands.local import config_option, find_config
from heliograph.commands.telling import json_option, tell

if TYPE_CHECKING:
    from heliograph.config import Setting


@click.command()
@config_option
@json_option
def config(config: Path | None, *, as_json: bool) -> None:
    """Show the settings that count, and where each is from.

    They are checked as when the server starts. The files that they name are not read: heliograph doctor does that. No
    secret is shown, as none is in the configuration.

    \b
    Examples:
      heliograph config --config heliograph.toml
      HELIOGRAPH_API__PORT=9000 heliograph config --json
    """
    from heliograph.config import explain

    settings = explain(find_config(config))
    if as_json:
        tell({"settings": [{"name": _toml(each.way), "value": each.value, "from": each.origin} for each in settings]})
        return
    for line in _as_toml(settings):
        click.echo(line)


def _as_toml(settings: Sequence[Setting]) -> Iterator[str]:
    table: tuple[str, ...] = ()
    for each in settings:
        *above, name = each.way
        if tuple(above) != table:
            table = tuple(above)
            header = _toml(table)
            yield ""
            yield f"[[{header.rpartition('[')[0]}]]" if header.endswith("]") else f"[{header}]"
        line = f"{_toml([name])} = {json.dumps(each.value)}"
        yield f"{line:<50}  # {each.origin}"


def _toml(way: Sequence[str]) -> str:
    return ".".join(f'"{part}"' if "." in part else part for part in way)
