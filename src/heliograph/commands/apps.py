"""`heliograph app`: apps of a running server."""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from heliograph.commands.calling import Server, with_server
from heliograph.commands.local import secret_from
from heliograph.commands.telling import Command, tell
from heliograph.errors import ConfigError

PATH = "/v1/apps"

_MAX_CA_BYTES = 512 * 1024
"""The server takes no longer request."""
_file = click.Path(path_type=Path, dir_okay=False, exists=True)


def credential_options(command: Command) -> Command:
    """A signing key or a certificate, and what it is for."""
    environments = click.Choice(["production", "development", "both"])
    for option in (
        click.option("--environment", type=environments, help="[default: production; of a certificate, all its own]"),
        click.option("--passphrase-file", type=_file, help="A file with the passphrase of certificate or key."),
        click.option("--certificate-key", type=_file, help="Its private key, where that is a file of its own."),
        click.option("--certificate", type=_file, help="A .p12 or .pem file, in place of --key."),
        click.option("--team-id", help="As the developer account shows it, with --key."),
        click.option("--key-id", help="[default: as in the name of the file, AuthKey_<key id>.p8]"),
        click.option("--key", type=_file, help="The .p8 file that Apple issued."),
    ):
        command = option(command)
    return command


@click.group()
def app() -> None:
    """See, add and remove the apps of a running server.

    \b
    Example:
      heliograph app add shop --topic com.shop --team-id DEF123GHIJ \\
        --key AuthKey_ABC123DEFG.p8
    """


@app.command("list")
@with_server
def show_list(server: Server) -> None:
    """List the apps.

    \b
    Example:
      heliograph app list
    """

    def say(found: dict[str, Any]) -> None:
        for each in found["apps"]:
            where = ", ".join(each["environments"])
            click.echo(f"{each['name']}  {', '.join(each['topics'])}  {where}  {each['source']}")
        if not found["apps"]:
            click.echo("There are no apps.")

    server.show("GET", PATH, say)


@app.command()
@click.argument("name")
@with_server
def show(server: Server, name: str) -> None:
    """Show an app, its credentials and until when they last.

    \b
    Example:
      heliograph app show shop
    """
    server.show("GET", path_of(name), say_app)


@app.command()
@click.argument("name")
@click.option("--topic", "topics", multiple=True, help="The bundle id; again for several.")
@credential_options
@click.option("--host", help="Send there and not to Apple.")
@click.option("--port", type=click.IntRange(1, 65535), help="Of Apple 443 or 2197.  [default: 443]")
@click.option("--ca", type=_file, help="PEM with the certificates to trust on --host.")
@click.option("--proxy-file", type=_file, help="A file with http://[USER:PASSWORD@]HOST:PORT of a proxy.")
@click.option("--from", "source", type=_file, help="A configuration: its [apps.NAME] in place of all these options.")
@with_server
def add(server: Server, name: str, topics: Sequence[str], source: Path | None, **given: Any) -> None:
    """Add an app, or give one new credentials for its old ones.

    The server keeps it in its database, sealed with its master key. An app with several keys or certificates is
    described in a file as for the server, with [[apps.NAME.credentials]] tables, and added with --from; or it gets them
    one by one with `heliograph credentials add`.

    \b
    Examples:
      heliograph app add shop --topic com.shop --team-id DEF123GHIJ \\
        --key AuthKey_ABC123DEFG.p8
      heliograph app add shop --certificate shop.p12 --passphrase-file passphrase
      heliograph app add shop --from heliograph.toml
    """
    if source is not None and (topics or _given(given)):
        raise click.UsageError("--from says all there is to say of the app: leave the other options out.")
    app = from_options(given) if source is None else _from_configuration(name, source)
    found = server.ask("PUT", path_of(name), {"topics": topics, **app} if topics else app)
    tell(found) if server.as_json else say_app(found)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {option: value for option, value in options.items() if value is not None}


def from_options(options: dict[str, Any]) -> dict[str, Any]:
    """What the server makes an app or credentials of, with contents in place of files. Raises ConfigError."""
    from heliograph.config import read_file
    from heliograph.protocols.provider_token import key_id_from_filename

    given = _given(options)
    if "key" in given and "key_id" not in given:
        given["key_id"] = key_id_from_filename(given["key"].name)
        if given["key_id"] is None:
            raise click.UsageError(f"The name of {given['key'].name} does not tell the key id: add --key-id.")
    if "key" in given and not {"team_id", "certificate"} & given.keys():
        raise click.UsageError(
            "A key is used together with its team id, as the developer account shows it: add --team-id."
        )

    def content(option: str, file: Path) -> str:
        if option == "ca":
            return read_file(file, "--ca", most=_MAX_CA_BYTES).decode("ascii", "replace")
        octets = secret_from(file, f"--{option.replace('_', '-')}")
        return str(_text(option, octets)).rstrip("\r\n")

    return {
        option.removesuffix("_file"): content(option, value) if isinstance(value, Path) else value
        for option, value in given.items()
    }


def _from_configuration(name: str, source: Path) -> dict[str, Any]:
    """As `from_options`. Raises ConfigError."""
    from msgspec import to_builtins

    from heliograph.apps.building import read_content
    from heliograph.config import load

    apps = load(source, {}).apps
    if name not in apps:
        raise ConfigError(f"{source} has no [apps.{name}]: it has {', '.join(apps) or 'no app'}")
    content = read_content(name, apps[name])
    app: dict[str, Any] = to_builtins(content, builtin_types=(bytes,))
    app["credentials"] = [
        {member: _text(member, value) for member, value in each.items() if member != "file"}
        for each in app["credentials"]
    ]
    return {member: _text(member, value) for member, value in app.items()}


def _text(member: str, value: Any) -> Any:
    """As JSON has it: what may be no text as base64."""
    from base64 import b64encode

    if not isinstance(value, bytes):
        return value
    return b64encode(value).decode() if member.startswith("certificate") else value.decode("utf-8", "replace")


@app.command()
@click.argument("name")
@with_server
def remove(server: Server, name: str) -> None:
    """Remove an app that was added.

    What waits for it goes on waiting. It is sent if within a day an app of this name comes back with credentials for
    its topic, and is given up on else.

    \b
    Example:
      heliograph app remove shop
    """
    server.show("DELETE", path_of(name), lambda found: click.echo(f"{found['removed']} is removed."))


def say_credentials(each: dict[str, Any]) -> str:
    """One line about credentials as the API shows them."""
    days = each["days_left"]
    left = "no end" if days is None else f"ended {-days} days ago" if days < 0 else f"{days} days left"
    colour = "red" if days is not None and days < 7 else "yellow" if days is not None and days < 30 else None
    what = f" for {', '.join(each['topics'])}" if each["topics"] else ""
    called = each["kind"] if each["name"] == each["id"] else f"{each['kind']} {each['name']}"
    where = ", ".join(each["environments"])
    return f"{each['id']}  {called}  {where}{what}  {click.style(left, fg=colour)}"


def say_app(shown: dict[str, Any]) -> None:
    click.echo(click.style(shown["name"], bold=True))
    click.echo(f"  topics       {', '.join(shown['topics'])}")
    for each in shown["credentials"]:
        click.echo(f"  credentials  {say_credentials(each)}")
    if shown["host"]:
        click.echo(f"  sent to      {shown['host']}:{shown['port']}")
    if shown["proxy"]:
        click.echo(f"  proxy        {shown['proxy']}")
    click.echo(f"  from         the {'API' if shown['source'] == 'api' else 'configuration'}")


def path_of(name: str) -> str:
    """Where the server has an app."""
    return f"{PATH}/{quote(name, safe='')}"
