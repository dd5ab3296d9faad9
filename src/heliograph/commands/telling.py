"""How commands speak: JSON where it is asked for, errors, and how far long work has come.

Results go to stdout, all else to stderr. With `--json` stdout holds JSON only, and an error is told there too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from heliograph.errors import ConfigError, HeliographError

Command = TypeVar("Command", bound=Callable[..., object])

# Exit codes of all commands; `heliograph --help` says what they mean.
DONE, FAILED, WRONG, NOT_NOW, WAITING, INTERRUPTED = 0, 1, 2, 3, 4, 130

_WRONG_CALL = ("NotFound", "BadParameter", "UnknownParameter")
"""Codes of the server that are not about what was sent, but about how it was asked."""
_OTHER_KEY = (
    "name the file of another with --key-file, or set $HELIOGRAPH_KEY to one. The server keeps its own in the file "
    "api-key of its data folder, unless told otherwise; `heliograph keys add` makes others"
)
_LINE_S = 2.0
"""Between two lines on how far it has come, where there is no terminal for a bar."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class UnreachableError(HeliographError):
    """No server answered, or something else did. `in_doubt`: the request may have had its effect all the same."""

    def __init__(self, text: str, *, in_doubt: bool = False) -> None:
        super().__init__(text)
        self.in_doubt = in_doubt


class RefusedError(HeliographError):
    """The server said no; `problem` is its answer, with advice for the command line. `to_get`: to a GET."""

    def __init__(self, status: int, problem: dict[str, Any], *, to_get: bool = False) -> None:
        detail = str(problem.get("detail") or f"The server answered {status}")
        if status == 401 and problem.get("code") == "Unauthorized":  # whose advice is for those who speak HTTP
            detail = f"{detail.partition(':')[0]}: {_OTHER_KEY}."
        super().__init__(detail.removesuffix("."))
        self.status = status
        self.to_get = to_get
        self.problem = {"status": status, **problem, "detail": detail}

    @property
    def exit_code(self) -> int:
        if self.status == 429 or self.status >= 500:
            return NOT_NOW
        if self.status in (401, 403, 405) or self.problem.get("code") in _WRONG_CALL:
            return WRONG
        if self.status == 400 and self.to_get:  # which sends nothing, so it can only be how it was asked
            return WRONG
        return FAILED


def tell(value: object) -> None:
    """A result as one line of JSON."""
    import json

    click.echo(json.dumps(value))


def tell_error(error: HeliographError | click.ClickException, *, as_json: bool) -> int:
    """Say it, and as what to end."""
    if isinstance(error, click.ClickException):
        error.show()
        code, problem = error.exit_code, {"code": "Usage", "detail": error.format_message()}
    else:
        complain(f"{error}")
        name = type(error).__name__.removesuffix("Error")
        code, problem = exit_code(error), {"code": name, "detail": f"{error}"}
        if isinstance(error, RefusedError):
            problem = error.problem
    if as_json:
        tell({"error": problem})
    return code


def exit_code(error: HeliographError) -> int:
    if isinstance(error, RefusedError):
        return error.exit_code
    return WRONG if isinstance(error, ConfigError) else NOT_NOW if isinstance(error, UnreachableError) else FAILED


def complain(text: str) -> None:
    click.echo(f"{click.style('Error:', fg='red')} {text}", err=True, color=colours())


def colours() -> bool | None:
    """None: where it goes to a terminal (https://no-color.org)."""
    return False if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" else None


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether a call asks for JSON. What is wrong with it has to be told before click has read all of it."""
    return "--json" in (arguments[: arguments.index("--")] if "--" in arguments else arguments)


@contextmanager
def progress(total: int, doing: str) -> Iterator[Callable[[int], None]]:
    """Gives what to call with how many more are done: a bar on a terminal, else a line now and then, on stderr."""
    import time

    if sys.stderr.isatty():
        with click.progressbar(length=total, label=doing, show_pos=True, width=0, file=sys.stderr) as bar:
            yield bar.update
        return
    done, told_at = 0, time.monotonic()

    def tell_now_and_then(more: int) -> None:
        nonlocal done, told_at
        done += more
        if time.monotonic() >= told_at + _LINE_S:
            told_at = time.monotonic()
            click.echo(f"{doing}: {done:,} of {total:,}", err=True)

    yield tell_now_and_then
