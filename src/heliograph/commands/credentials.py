"""`heliograph credentials`: what files are, and what a server sends with."""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from heliograph.commands.apps import PATH, credential_options, from_options, path_of, say_app, say_credentials
from heliograph.commands.calling import Server, with_server
from heliograph.commands.local import config_option, load_config, secret_from
from heliograph.commands.telling import json_option, tell
from heliograph.errors import ConfigError

if TYPE_CHECKING:
    from heliograph.credentials import Description

_file = click.Path(path_type=Path, dir_okay=False, exists=True)


@click.group()
def credentials() -> None:
    """Look into credential files, and change what a server uses.

    \b
    Example:
      heliograph credentials inspect AuthKey_ABC123DEFG.p8 shop.p12
    """


@credentials.command()
@click.argument("files", nargs=-1, required=True, type=_file, metavar="FILE...")
@click.option("--key", type=_file, help="The private key of a certificate, where it is a file of its own.")
@click.option("--passphrase-file", type=_file, help="A file with the passphrase.  [default: asked for on a terminal]")
@json_option
def inspect(files: Sequence[Path], key: Path | None, passphrase_file: Path | None, *, as_json: bool) -> int:
    """Say what a file is, and what is wrong with it.

    What it can send to is told too, and when it ends. Nothing is sent anywhere.

    \b
    Examples:
      heliograph credentials inspect AuthKey_ABC123DEFG.p8
      heliograph credentials inspect aps.cer --key aps.key
      heliograph credentials inspect --json --passphrase-file passphrase shop.p12

    Exit code: 1 where anything is wrong.
    """
    found = [(file, _describe(file, key, passphrase_file)) for file in files]
    if as_json:
        import msgspec

        told = [{"file": str(file), **msgspec.to_builtins(each)} for file, each in found]
        tell({"files": told})
    else:
        for file, each in found:
            _say(file, each)
    return 1 if any(each.problems for _, each in found) else 0


@credentials.command("list")
@with_server
def show_list(server: Server) -> None:
    """List what a server sends with, and until when.

    \b
    Example:
      heliograph credentials list
    """
    apps = server.ask("GET", PATH)["apps"]
    if server.as_json:
        tell({"credentials": [{"app": app["name"], **each} for app in apps for each in app["credentials"]]})
        return
    for app in apps:
        for each in app["credentials"]:
            click.echo(f"{app['name']}  {say_credentials(each)}")
    if not apps:
        click.echo("There are no apps.")


@credentials.command()
@click.argument("app")
@credential_options
@click.option("--replace", metavar="ID", help="Put it in the place of these credentials of the app.")
@with_server
def add(server: Server, app: str, replace: str | None, **given: Any) -> None:
    """Give an app more credentials, or new ones for old.

    APP is one that was added by `heliograph app add` or by the API. The first of its credentials that fits environment
    and topic is used, and what is added comes last; what is the same key or certificate is replaced.

    \b
    Examples:
      heliograph credentials add shop --team-id DEF123GHIJ \\
        --key AuthKey_HIJ456KLMN.p8 --environment development
      heliograph credentials add shop --team-id DEF123GHIJ \\
        --key AuthKey_HIJ456KLMN.p8 --replace ABC123DEFG
    """
    query = "" if replace is None else f"?replace={quote(replace, safe='')}"
    found = server.ask("POST", f"{path_of(app)}/credentials{query}", from_options(given))
    tell(found) if server.as_json else say_app(found)


@credentials.command()
@click.argument("app")
@click.argument("credential_id", metavar="ID")
@with_server
def remove(server: Server, app: str, credential_id: str) -> None:
    """Take credentials from an app.

    Their ID is a key's id, or what `heliograph credentials list` shows of a certificate.

    \b
    Example:
      heliograph credentials remove shop ABC123DEFG
    """

    def say(found: dict[str, Any]) -> None:
        click.echo(f"{found['removed']} is removed from {app}.")

    server.show("DELETE", f"{path_of(app)}/credentials/{quote(credential_id, safe='')}", say)


@credentials.command("rotate-master-key")
@config_option
@json_option
def rotate_master_key(config: Path | None, *, as_json: bool) -> None:
    """Make a new master key, which seals stored apps.

    A running server notices, and seals its apps anew; one that does not run does so when it starts. The former key
    stays in the file, as backups need it.

    \b
    Example:
      heliograph credentials rotate-master-key --config heliograph.toml
    """
    from heliograph import vault
    from heliograph.apps.directory import master_key_path

    path = master_key_path(load_config(config))
    if not path.exists():
        raise ConfigError(
            f"There is no master key at {path} yet, the server makes one when it first starts: name the server's "
            "configuration with --config, or its data folder with $HELIOGRAPH_DATA"
        )
    vault.rotate(path)
    if as_json:
        tell({"master_key": str(path)})
    else:
        click.echo(f"There is a new master key in {path}. Back the file up, apart from the database.")


def _describe(file: Path, key: Path | None, passphrase_file: Path | None) -> Description:
    import time

    from heliograph.config import read_file
    from heliograph.credentials import Description, Kind, describe

    try:
        content = read_file(file, "FILE")
    except ConfigError as error:
        return Description(Kind.UNKNOWN, problems=(str(error).removeprefix("FILE: "),))
    key_content = None if key is None else read_file(key, "--key")
    passphrase = None
    if passphrase_file is not None:
        passphrase = secret_from(passphrase_file, "--passphrase-file").rstrip(b"\r\n")

    def look() -> Description:
        return describe(content, filename=file.name, key=key_content, passphrase=passphrase, now=time.time())

    found = look()
    if found.kind is Kind.LOCKED and passphrase is None and sys.stdin.isatty():
        passphrase = click.prompt(f"Passphrase of {file.name}", hide_input=True, err=True).encode()
        found = look()
    return found


def _say(file: Path, found: Description) -> None:
    click.echo(f"{click.style(str(file), bold=True)}: {found.kind}")
    facts: dict[str, Any] = {
        "name": found.name,
        "issuer": found.issuer,
        "key id": found.key_id,
        "team id": found.team_id,
        "topics": ", ".join(found.topics or ()) or ("all of the team" if found.usable else None),
        "environments": ", ".join(found.environments),
        "push types": ", ".join(found.push_types),
        "ends": _end(found),
        "fingerprint": found.fingerprint,
    }
    for name, value in facts.items():
        if value:
            click.echo(f"  {name:<13}{value}")
    for problem in found.problems:
        click.echo(f"  {click.style('problem', fg='red')}      {problem}")


def _end(found: Description) -> str | None:
    from datetime import UTC, datetime

    if found.ends_at is None:
        return "never" if found.usable else None
    days = found.days_left or 0
    left = f"ended {-days} days ago" if days < 0 else f"{days} days left"
    return f"{datetime.fromtimestamp(found.ends_at, UTC):%Y-%m-%d}, {left}"
