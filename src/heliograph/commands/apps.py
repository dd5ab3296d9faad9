"""`heliograph app`: apps of a running server."""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from heliograph.commands.calling import Where, server_options
from heliograph.commands.local import secret_from

PATH = "/v1/apps"

_MAX_CA_BYTES = 512 * 1024
"""The server takes no longer request."""
_file = click.Path(path_type=Path, dir_okay=False, exists=True)


@click.group()
def app() -> None:
    """See the apps of a running server, add and remove them without a restart.

    \b
    Example:
      heliograph app add shop --topic com.shop --key AuthKey_ABC123DEFG.p8 --team-id DEF123GHIJ
    """


@app.command("list")
@server_options
def show_list(url: str | None, key_file: Path | None, config: Path | None, *, as_json: bool) -> None:
    """List the apps.

    \b
    Example:
      heliograph app list
    """
    found = Where(url, key_file, config).ask("GET", PATH)
    if as_json:
        click.echo(json.dumps(found))
        return
    for each in found["apps"]:
        click.echo(f"{each['name']}  {', '.join(each['topics'])}  {', '.join(each['environments'])}  {each['source']}")
    if not found["apps"]:
        click.echo("There are no apps.")


@app.command()
@click.argument("name")
@server_options
def show(name: str, url: str | None, key_file: Path | None, config: Path | None, *, as_json: bool) -> None:
    """Show an app, its credentials and until when they last.

    \b
    Example:
      heliograph app show shop
    """
    found = Where(url, key_file, config).ask("GET", _path(name))
    if as_json:
        click.echo(json.dumps(found))
    else:
        _say(found)


@app.command()
@click.argument("name")
@click.option("--topic", "topics", multiple=True, help="The bundle id; again for several.")
@click.option("--key", type=_file, help="The .p8 file that Apple issued.")
@click.option("--key-id", help="[default: as in the name of the file, AuthKey_<key id>.p8]")
@click.option("--team-id", help="As the developer account shows it, with --key.")
@click.option("--certificate", type=_file, help="A .p12 or .pem file, in place of --key.")
@click.option("--certificate-key", type=_file, help="Its private key, where that is a file of its own.")
@click.option("--passphrase-file", type=_file, help="A file with the passphrase of certificate or key.")
@click.option("--environment", type=click.Choice(["production", "development", "both"]), help="[default: production]")
@click.option("--host", help="Send there and not to Apple.")
@click.option("--port", type=click.IntRange(1, 65535), help="Of Apple 443 or 2197.  [default: 443]")
@click.option("--ca", type=_file, help="PEM with the certificates to trust on --host.")
@click.option("--proxy-file", type=_file, help="A file with http://[USER:PASSWORD@]HOST:PORT of a proxy.")
@server_options
def add(
    name: str,
    topics: Sequence[str],
    key: Path | None,
    key_id: str | None,
    certificate: Path | None,
    certificate_key: Path | None,
    passphrase_file: Path | None,
    ca: Path | None,
    proxy_file: Path | None,
    url: str | None,
    key_file: Path | None,
    config: Path | None,
    *,
    as_json: bool,
    **fields: Any,
) -> None:
    """Add an app, or put new credentials in place of its old ones.

    The server keeps it in its database, sealed with its master key.

    \b
    Examples:
      heliograph app add shop --topic com.shop --key AuthKey_ABC123DEFG.p8 --team-id DEF123GHIJ
      heliograph app add shop --certificate shop.p12 --passphrase-file passphrase
    """
    from heliograph.config import read_file
    from heliograph.protocols.provider_token import key_id_from_filename

    if key is not None and key_id is None:
        key_id = key_id_from_filename(key.name)
        if key_id is None:
            raise click.UsageError(f"The name of {key.name} does not tell the key id: add --key-id.")
    content = {
        **fields,
        "topics": list(topics) or None,
        "key": None if key is None else secret_from(key, "--key").decode("ascii", "replace"),
        "key_id": key_id,
        "certificate": _octets(certificate, "--certificate"),
        "certificate_key": _octets(certificate_key, "--certificate-key"),
        "passphrase": None if passphrase_file is None else _line(passphrase_file, "--passphrase-file"),
        "ca": None if ca is None else read_file(ca, "--ca", most=_MAX_CA_BYTES).decode("ascii", "replace"),
        "proxy": None if proxy_file is None else _line(proxy_file, "--proxy-file"),
    }
    content = {field: value for field, value in content.items() if value is not None}
    found = Where(url, key_file, config).ask("PUT", _path(name), content)
    if as_json:
        click.echo(json.dumps(found))
    else:
        _say(found)


@app.command()
@click.argument("name")
@server_options
def remove(name: str, url: str | None, key_file: Path | None, config: Path | None, *, as_json: bool) -> None:
    """Remove an app that was added.

    What waits for it goes on waiting. It is sent if within a day an app of this name comes back with credentials for
    its topic, and is given up on else.

    \b
    Example:
      heliograph app remove shop
    """
    found = Where(url, key_file, config).ask("DELETE", _path(name))
    click.echo(json.dumps(found) if as_json else f"{found['removed']} is removed.")


def say_credentials(each: dict[str, Any]) -> str:
    """One line about credentials as the API shows them."""
    days = each["days_left"]
    left = "no end" if days is None else f"ended {-days} days ago" if days < 0 else f"{days} days left"
    colour = "red" if days is not None and days < 7 else "yellow" if days is not None and days < 30 else None
    what = f" for {', '.join(each['topics'])}" if each["topics"] else ""
    return f"{each['kind']} {each['name']}  {', '.join(each['environments'])}{what}  {click.style(left, fg=colour)}"


def _say(shown: dict[str, Any]) -> None:
    click.echo(click.style(shown["name"], bold=True))
    click.echo(f"  topics       {', '.join(shown['topics'])}")
    for each in shown["credentials"]:
        click.echo(f"  credentials  {say_credentials(each)}")
    if shown["host"]:
        click.echo(f"  sent to      {shown['host']}:{shown['port']}")
    if shown["proxy"]:
        click.echo(f"  proxy        {shown['proxy']}")
    click.echo(f"  from         the {'API' if shown['source'] == 'api' else 'configuration'}")


def _path(name: str) -> str:
    return f"{PATH}/{quote(name, safe='')}"


def _octets(file: Path | None, option: str) -> str | None:
    return None if file is None else b64encode(secret_from(file, option)).decode()


def _line(file: Path, option: str) -> str:
    return secret_from(file, option).decode("utf-8", "replace").rstrip("\r\n")
