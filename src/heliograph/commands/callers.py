"""`heliograph callers`: who may come to the doors where clients have no API key."""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from heliograph.commands.calling import Server, with_server
from heliograph.commands.local import secret_from
from heliograph.commands.telling import tell
from heliograph.errors import ConfigError

if TYPE_CHECKING:
    from cryptography import x509

PATH = "/v1/callers"

_SHOWN = 16
"""Digits of a certificate's id that people see; all of it is in the JSON."""
_file = click.Path(path_type=Path, dir_okay=False, exists=True)


@click.group()
def callers() -> None:
    """See, add and remove those who have no API key.

    Old scripts show a certificate instead, and other people's libraries sign provider tokens. Apple needs to know
    neither, and nothing of them is shown to Apple.

    \b
    Example:
      heliograph callers add shop old-shop.pem
    """


@callers.command()
@click.argument("app")
@click.argument("file", type=_file, metavar="FILE")
@click.option("--key-id", help="Of a signing key.  [default: as in the name of the file, AuthKey_<key id>.p8]")
@click.option("--team-id", help="Of a signing key: what the client has as team id.")
@click.option(
    "--environment",
    type=click.Choice(["production", "development"]),
    help="It sends there only.  [default: as the certificate says]",
)
@click.option("--topic", help="It sends with this topic.  [default: as the certificate says, or the app's]")
@click.option("--name", help="What people call it.  [default: what the certificate says, or the key's id]")
@click.option("--passphrase-file", type=_file, help="A file with FILE's passphrase.  [default: asked on a terminal]")
@with_server
def add(
    server: Server,
    app: str,
    file: Path,
    key_id: str | None,
    team_id: str | None,
    passphrase_file: Path | None,
    **given: str | None,
) -> None:
    """Let in who has this certificate or signing key, for APP.

    FILE is what the client has: a .pem, .p12, .cer or .crt with a certificate, ended or not, or a .p8 with a key that
    signs provider tokens. The public half alone goes to the server, and FILE stays as it is.

    \b
    Examples:
      heliograph callers add shop old-shop.pem
      heliograph callers add shop old-shop.p12 --passphrase-file passphrase
      heliograph callers add shop AuthKey_HIJ456KLMN.p8 --team-id DEF123GHIJ
    """
    from heliograph.config import read_file

    content = {"app": app, **{name: value for name, value in given.items() if value is not None}}
    passphrase = None if passphrase_file is None else passphrase_from(passphrase_file)
    found_there = read_file(file, "FILE")
    try:
        content |= _public_half(file, found_there, key_id, team_id, passphrase)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    found = server.ask("POST", PATH, content)
    if server.as_json:
        tell(found)
        return
    click.echo(f"{click.style(found['name'], bold=True)} may come to {app}.")
    click.echo(f"  id           {_short(found['id'])}")
    click.echo(f"  sends to     {found['environment'] or 'the environment of the port that it comes to'}")
    click.echo(f"  topic        {found['topic'] or 'the one that it names, or the only one of the app'}")
    if found["ends_at"] is not None:
        click.echo(f"  certificate  {end_of(found)}")


@callers.command("list")
@with_server
def show_list(server: Server) -> None:
    """List who may come, oldest first.

    \b
    Example:
      heliograph callers list
    """

    def say(found: dict[str, Any]) -> None:
        for each in found["callers"]:
            where = "  ".join(filter(None, (each["app"], each["environment"], each["topic"])))
            ends = "" if each["ends_at"] is None else f"  {end_of(each)}"
            click.echo(f"{_short(each['id']):<21}  {each['kind']}  {each['name']}  {where}{ends}")
        if not found["callers"]:
            click.echo("There are none.")

    server.show("GET", PATH, say)


@callers.command()
@click.argument("caller_id", metavar="ID")
@with_server
def remove(server: Server, caller_id: str) -> None:
    """Let this one in no more. The beginning of an ID is enough, as `heliograph callers list` shows it.

    \b
    Example:
      heliograph callers remove 9a41c07be2d85f13
    """
    if not caller_id:
        raise ConfigError("The ID is empty: write one, or its beginning, as `heliograph callers list` shows it")
    known = [str(each["id"]) for each in server.ask("GET", PATH)["callers"]]
    fit = [each for each in known if each.startswith(caller_id)]
    if len(fit) > 1 and caller_id not in fit:
        raise ConfigError(f"{len(fit)} callers have an ID that begins with {caller_id}: write more of it")
    whole = fit[0] if len(fit) == 1 else caller_id
    path = f"{PATH}/{quote(whole, safe='')}"
    server.show("DELETE", path, lambda found: click.echo(f"{_short(found['removed'])} is removed."))


def _short(id: str) -> str:
    return id if "." in id else id[:_SHOWN]


def end_of(caller: dict[str, Any]) -> str:
    """Until when its certificate says that it is good."""
    from datetime import UTC, datetime

    ends = datetime.fromisoformat(caller["ends_at"])
    if ends <= datetime.now(UTC):
        return f"ended {ends:%Y-%m-%d}: it opens heliograph all the same"
    return f"good until {ends:%Y-%m-%d}"


def passphrase_from(file: Path) -> bytes:
    """What is in the file of `--passphrase-file`. Raises ConfigError."""
    passphrase = secret_from(file, "--passphrase-file").rstrip(b"\r\n")
    try:
        is_good = bool(passphrase) and "\0" not in passphrase.decode()
    except UnicodeDecodeError:
        is_good = False
    if not is_good:
        raise ConfigError("--passphrase-file: write the passphrase into the file, on one line, as UTF-8")
    return passphrase


def _public_half(
    file: Path, content: bytes, key_id: str | None, team_id: str | None, passphrase: bytes | None
) -> dict[str, str]:
    """What the server is told of a certificate or a key. Raises ConfigError."""
    from heliograph.protocols.certificate import nothing_in
    from heliograph.protocols.certificate.files import Sort, items

    sorts = frozenset(piece.sort for piece in items(content))
    if sorts & {Sort.CERTIFICATE, Sort.P12}:
        if key_id is not None or team_id is not None:
            raise ConfigError("it is a certificate, and --key-id and --team-id go with a signing key: leave them out")
        return {"certificate": _pem(_certificate(file, content, passphrase))}
    if sorts & {Sort.KEY, Sort.LOCKED_KEY, Sort.PUBLIC_KEY}:
        return _signing_key(file, content, key_id, team_id, passphrase)
    raise ConfigError(nothing_in(sorts))


def _certificate(file: Path, content: bytes, passphrase: bytes | None) -> x509.Certificate:
    """The client's own. Its private key is opened only where it hides the certificate. Raises ConfigError."""
    from heliograph.callers import leaf_of
    from heliograph.protocols.certificate import fits
    from heliograph.protocols.certificate.files import Sort, items
    from heliograph.protocols.certificate.opening import open_certificate

    pieces = items(content)
    if any(piece.sort is Sort.P12 for piece in pieces):
        bundle = _unpacked(file, content, passphrase)
        mated = [each for each in bundle.certificates if any(fits(each, key) for key in bundle.keys)]
        return leaf_of(mated or bundle.certificates)
    unique = {piece.der: open_certificate(piece.der) for piece in pieces if piece.sort is Sort.CERTIFICATE}
    return leaf_of([*unique.values()])


def _signing_key(
    file: Path, content: bytes, key_id: str | None, team_id: str | None, passphrase: bytes | None
) -> dict[str, str]:
    """Raises ConfigError."""
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    from heliograph.model import SigningKey
    from heliograph.protocols.provider_token import check_ids, key_id_from_filename, public_key

    keys = _unpacked(file, content, passphrase).keys
    if keys and isinstance(keys[0], rsa.RSAPrivateKey):
        raise ConfigError(
            "there is the private key of a certificate in the file, and no certificate: name the file that has it"
        )
    key_id = key_id or key_id_from_filename(file.name)
    if key_id is None or team_id is None:
        lacking = "--key-id" if key_id is None else "--team-id"
        raise ConfigError(f"it is a signing key: write with {lacking} what the client has been told")
    check_ids(key_id, team_id)
    public = keys[0].public_key() if keys else None
    pem = content if public is None else public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    whole = public_key(SigningKey(key_id, team_id, pem))
    shown = whole.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return {"public_key": shown.decode(), "key_id": key_id, "team_id": team_id}


def _unpacked(file: Path, content: bytes, passphrase: bytes | None) -> Any:
    """All that is in the file; on a terminal its passphrase is asked for where it has one. Raises ConfigError."""
    from heliograph.protocols.certificate.files import unpack

    try:
        return unpack(content, passphrase=passphrase)
    except ConfigError as error:
        if passphrase is not None or "under a passphrase" not in str(error):
            raise
        if not sys.stdin.isatty():
            raise ConfigError(f"{error}, in a file that --passphrase-file names") from None
    asked = click.prompt(f"Passphrase of {file.name}", hide_input=True, err=True).encode()
    return unpack(content, passphrase=asked)


def _pem(certificate: x509.Certificate) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM).decode()
