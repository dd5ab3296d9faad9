"""Writes the reference of the command line from the texts that `--help` shows.

python docs/generate.py > docs/cli.md
"""

# ruff: noqa: INP001 - docs is no package

from __future__ import annotations

import sys
from collections.abc import Iterator
from inspect import cleandoc

import click

from heliograph.cli import cli

_NOTE = "<!-- Made by docs/generate.py: change what --help says, and run that again. -->"


def reference() -> str:
    """The page."""
    lines = [_NOTE, "", "# The command line", "", *_of_command(click.Context(cli, info_name="heliograph"), 1)]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def _of_command(context: click.Context, level: int) -> Iterator[str]:
    command = context.command
    if level > 1:
        yield f"{'#' * level} {context.command_path}"
        yield ""
    yield "```"
    yield " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield "```"
    yield ""
    for paragraph in cleandoc(command.help or "").split("\n\n"):
        yield from _of_paragraph(paragraph)
        yield ""
    for names, text in filter(None, (each.get_help_record(context) for each in command.params)):
        if not text:
            continue
        yield f"- `{names}`: {' '.join(text.split()).replace('<', '&lt;')}"
    yield ""
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.commands[name]
            yield from _of_command(click.Context(inner, info_name=name, parent=context), level + 1)


def _of_paragraph(paragraph: str) -> Iterator[str]:
    if not paragraph.startswith("\b\n"):
        yield " ".join(paragraph.split()).replace("<", "&lt;")
        return
    first, *rest = paragraph.removeprefix("\b\n").splitlines()
    if first.endswith(":"):
        yield first
        yield ""
    else:
        rest = [first, *rest]
    yield "```"
    yield from (line.removeprefix("  ") for line in rest)
    yield "```"


if __name__ == "__main__":
    sys.stdout.write(reference())
