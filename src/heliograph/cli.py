"""The command line. Each command is a module of `commands`, and imports what is heavy when it runs.

Exit codes of every command: 0 done, 1 it did not work out, 2 something about the call or the configuration is wrong;
`send` has more.
"""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from heliograph import __version__
from heliograph.commands.apps import app
from heliograph.commands.buried import buried
from heliograph.commands.credentials import credentials
from heliograph.commands.demo import demo
from heliograph.commands.doctor import doctor
from heliograph.commands.send import send
from heliograph.commands.serve import serve
from heliograph.commands.simulate import simulate
from heliograph.errors import ConfigError, HeliographError


def main() -> NoReturn:
    """The program `heliograph`."""
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except (HeliographError, BrokenPipeError, ExceptionGroup) as error:
        cause = _expected(error)
        if cause is None:
            raise
        if isinstance(cause, BrokenPipeError):
            # Who read our output had enough of it; Python would complain when it flushes the rest.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        click.echo(f"{click.style('Error:', fg='red')} {cause}", err=True)
        sys.exit(2 if isinstance(cause, ConfigError) else 1)
    sys.exit(code if isinstance(code, int) else 0)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="heliograph %(version)s")
def cli() -> None:
    """Send notifications to Apple devices, and see what became of each.

    \b
    Example, with nothing set up and no Apple account:
      heliograph demo
    """


for _command in (serve, demo, send, simulate, app, credentials, buried, doctor):
    cli.add_command(_command)


def _expected(error: BaseException) -> HeliographError | BrokenPipeError | None:
    """The first error in it, where people can do something about all that is in it."""
    if isinstance(error, BaseExceptionGroup):
        found = [_expected(each) for each in error.exceptions]
        return None if None in found else found[0]
    return error if isinstance(error, HeliographError | BrokenPipeError) else None
