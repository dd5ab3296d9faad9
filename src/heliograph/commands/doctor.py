"""`heliograph doctor`: looks at everything that a server needs, and says what to do about what is wrong."""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from heliograph.commands.local import config_option, load_config
from heliograph.commands.telling import json_option, tell
from heliograph.errors import ConfigError

if TYPE_CHECKING:
    from heliograph.commands.findings import Finding

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


@click.command()
@config_option
@click.option("--offline", is_flag=True, help="Connect to nothing outside this machine.")
@click.option(
    "--send", is_flag=True, help="Send a notification to a device token that nobody has, to prove the credentials."
)
@json_option
def doctor(config: Path | None, *, offline: bool, send: bool, as_json: bool) -> int:
    """Look for what is wrong, from configuration to Apple.

    Changes nothing, and may run beside the server. Apps that were added by the API are seen while it runs.

    \b
    Examples:
      heliograph doctor --config heliograph.toml
      heliograph doctor --offline --json

    Exit code: 1 where there is a problem.
    """
    if offline and send:
        raise click.UsageError("--send goes to Apple: leave --offline out.")
    findings = []
    for finding in _look(config, offline=offline, send=send):
        findings.append(finding)
        if not as_json:
            level = click.style(f"{finding.level:<8}", fg=_COLOURS[finding.level])
            click.echo(f"{level}  {finding.about}: {finding.text}")
    well = all(each.level != "problem" for each in findings)
    if as_json:
        tell({"well": well, "findings": [each._asdict() for each in findings]})
    return 0 if well else 1


def _look(path: Path | None, *, offline: bool, send: bool) -> Iterator[Finding]:
    import logging

    import structlog

    from heliograph.commands import findings, reaching

    try:
        config = load_config(path)
    except ConfigError as error:
        yield findings.problem("configuration", str(error))
        return
    yield findings.ok("configuration", f"readable, with {len(config.apps)} app{'' if len(config.apps) == 1 else 's'}")
    yield from findings.of_machine(config)
    if config.legacy or config.apple_proxy:
        from heliograph.commands import listeners

        yield from listeners.of_listeners(config)
    entries = []
    for entry, found in findings.of_apps(config):
        yield from found
        entries += [] if entry is None else [entry]
    if not offline:
        yield from reaching.of_endpoints(entries)
        if send:
            # What the carrier would log is in the findings.
            structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
            yield from reaching.of_sending(entries)
