"""`heliograph completion`: has a shell complete commands and options."""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

import click

_SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what has a shell complete commands and options.

    \b
    Examples:
      heliograph completion bash >> ~/.bashrc
      heliograph completion zsh > ~/.zfunc/_heliograph    # a folder in $fpath
      heliograph completion fish > ~/.config/fish/completions/heliograph.fish

    In bash for one session only: eval "$(heliograph completion bash)". The shell has to find the program by its name,
    heliograph.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(context.find_root().command, {}, "heliograph", "_HELIOGRAPH_COMPLETE").source())
