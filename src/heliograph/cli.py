"""The command line. Each command is a module of `commands`, and imports what is heavy when it runs.

Exit codes are those of `commands.telling`.
"""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

import errno
import io
import os
import sys
from typing import NoReturn

import click

from heliograph import __version__
from heliograph.commands.apps import app
from heliograph.commands.buried import buried
from heliograph.commands.callers import callers
from heliograph.commands.completion import completion
from heliograph.commands.configuration import config
from heliograph.commands.credentials import credentials
from heliograph.commands.demo import demo
from heliograph.commands.doctor import doctor
from heliograph.commands.keys import keys
from heliograph.commands.legacy import legacy
from heliograph.commands.listing import cancel, show_list
from heliograph.commands.removals import removals
from heliograph.commands.send import send
from heliograph.commands.serve import serve
from heliograph.commands.simulate import simulate
from heliograph.commands.status import status
from heliograph.commands.telling import FAILED, INTERRUPTED, colours, complain, tell_error, wants_json
from heliograph.commands.why import why
from heliograph.errors import HeliographError


def main() -> NoReturn:
    """The program `heliograph`."""
    _fill_gaps()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character
    try:
        sys.exit(_run())
    except (KeyboardInterrupt, click.Abort):
        sys.exit(INTERRUPTED)


def _fill_gaps() -> None:
    """Stdin, stdout and stderr that were closed: what is opened next would take their place, and libuv ends by that."""
    while (file := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(file)


def _run() -> int:
    as_json = wants_json(sys.argv[1:])
    try:
        code = cli.main(prog_name="heliograph", standalone_mode=False, color=colours())
    except click.Abort:
        raise
    except click.ClickException as error:
        return tell_error(error, as_json=as_json)
    except (HeliographError, OSError, ExceptionGroup) as error:
        cause = _expected(error)
        if cause is None:
            raise
        if isinstance(cause, HeliographError):
            return tell_error(cause, as_json=as_json)
        # Who read our output had enough of it, or it has no room: Python would complain when it flushes the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if cause.errno != errno.EPIPE:
            complain(f"The output cannot be written ({cause.strerror}): make room, or send it elsewhere")
        return FAILED
    return code if isinstance(code, int) else 0


class _InOrder(click.Group):
    """Lists its commands as they were added: what people need first comes first."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="heliograph %(version)s")
def cli() -> None:
    """Send notifications to Apple devices, and see what became of each.

    \b
    Example, with nothing set up and no Apple account:
      heliograph demo

    Results go to stdout, all else to stderr. With --json stdout holds JSON only, errors too: {"error": {"code": ...,
    "detail": ...}}.

    \b
    Exit codes of all commands:
      0    done
      1    it did not work out: refused, rejected, or found to be wrong
      2    the call, the configuration or the API key is wrong
      3    the server cannot be reached, or takes nothing now: try later
      4    the outcome is still to come (send, status)
      130  Ctrl-C
    """


for _command in (
    serve,
    demo,
    send,
    status,
    why,
    show_list,
    cancel,
    simulate,
    app,
    credentials,
    keys,
    legacy,
    callers,
    removals,
    buried,
    config,
    doctor,
    completion,
):
    cli.add_command(_command)


def _expected(error: BaseException) -> HeliographError | OSError | None:
    """The first error in it, where people can do something about all that is in it."""
    if isinstance(error, BaseExceptionGroup):
        found = [_expected(each) for each in error.exceptions]
        return None if None in found else found[0]
    if isinstance(error, HeliographError):
        return error
    return error if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC) else None
