"""`heliograph legacy`: what old scripts need to come to heliograph in place of Apple."""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from heliograph.commands.apps import path_of
from heliograph.commands.callers import PATH, end_of, passphrase_from
from heliograph.commands.calling import Server, with_server
from heliograph.commands.local import make_folder
from heliograph.commands.telling import tell
from heliograph.errors import ConfigError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import rsa


class _Files(NamedTuple):
    """What a script is given."""

    pem: Path
    p12: Path


@click.group()
def legacy() -> None:
    """Have old scripts speak to heliograph, not to Apple.

    \b
    Example:
      heliograph legacy certificate shop
    """


@legacy.command()
@click.argument("app")
@click.option(
    "--environment", type=click.Choice(["production", "development"]), help="Send there only.  [default: the app's]"
)
@click.option("--topic", help="The bundle id, where the app has several.")
@click.option("--days", type=click.IntRange(1, 36_500), default=3650, show_default=True, help="How long it lasts.")
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="PREFIX", help="Of the files' names.  [default: as APP]"
)
@click.option(
    "--passphrase-file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="A file with the passphrase to put the private key under.  [default: none]",
)
@click.option("--force", is_flag=True, help="Write over files that are there. The certificate in them stays known.")
@with_server
def certificate(
    server: Server,
    app: str,
    environment: str | None,
    topic: str | None,
    days: int,
    output: Path | None,
    passphrase_file: Path | None,
    *,
    force: bool,
) -> None:
    """Make a certificate with which an old script sends for APP.

    It comes in two files for the same use, APP.pem and APP.p12: give the script the one that it had from Apple. The
    private key is made here, and stays here: the server gets the certificate only. It opens nothing at Apple.

    Without a passphrase the .p12 has the empty one, which PHP, Java, Node, Python and openssl open. Programs that
    insist on one, as keytool does when it asks for it, need --passphrase-file.

    \b
    Examples:
      heliograph legacy certificate shop
      heliograph legacy certificate shop --environment development --output dev
      heliograph legacy certificate shop --passphrase-file passphrase --force
    """
    prefix = str(output or app)
    files = _Files(Path(f"{prefix}.pem"), Path(f"{prefix}.p12"))
    passphrase = None if passphrase_file is None else passphrase_from(passphrase_file)
    shown = server.ask("GET", path_of(app))
    topic = _chosen_topic(shown, topic)
    environments = _chosen_environments(shown, environment)
    from datetime import UTC, datetime, timedelta

    from heliograph.net.clients import make_client

    key, made = make_client(topic, datetime.now(UTC), timedelta(days=days))
    with _written(files, _contents(key, made, topic, passphrase), force=force):
        caller = server.ask(
            "POST",
            PATH,
            {"app": app, "environment": environment, "topic": topic, "certificate": _pem(made).decode()},
        )
    if server.as_json:
        tell({"caller": caller, "pem": str(files.pem), "p12": str(files.p12)})
        return
    where = " and ".join(environments)
    click.echo(f"{caller['id'][:16]} sends for {app} ({topic}, {where}), {end_of(caller)}. Change in the script:")
    click.echo(f"  host  {_host(server)}, in place of gateway.push.apple.com or gateway.sandbox.push.apple.com")
    click.echo("  port  2195 as before (feedback: 2196), unless the server's configuration names others")
    click.echo(f"  file  {files.pem} or {files.p12}, in place of the one from Apple")
    if len(environments) > 1:
        click.echo("Which of the two environments the port says: environment below the server's [legacy.NAME].")
        click.echo(
            "Where it says none, make a certificate for one of them: --environment, and --force for these files."
        )


def _chosen_topic(shown: dict[str, Any], topic: str | None) -> str:
    topics = shown["topics"]
    if topic is None and len(topics) == 1:
        return str(topics[0])
    if topic is None:
        raise ConfigError(f"The app has several topics: name one with --topic, {' or '.join(topics)}")
    return topic


def _chosen_environments(shown: dict[str, Any], environment: str | None) -> Sequence[str]:
    there = shown["environments"]
    if environment is None:
        return list(there)
    if environment not in there:
        raise ConfigError(f"--environment: the app {shown['name']} is set up for {there[0]} only: leave it out")
    return [environment]


def _contents(key: rsa.RSAPrivateKey, made: x509.Certificate, topic: str, passphrase: bytes | None) -> Sequence[bytes]:
    """Of the .pem, and of the .p12."""
    from cryptography.hazmat.primitives.hashes import SHA1
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        NoEncryption,
        PrivateFormat,
    )
    from cryptography.hazmat.primitives.serialization.pkcs12 import PBES, serialize_key_and_certificates

    if passphrase is None:
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    else:
        # The only form that all of OpenSSL's versions open.
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, BestAvailableEncryption(passphrase))
    # What came later than 3DES and SHA-1, Java 8 and OpenSSL 1.0 do not open; what is older, OpenSSL 3 does not.
    # `cryptography` takes no empty passphrase. That of a NUL leads to the same keys, as RFC 7292, appendix B.2, repeats
    # a passphrase with the NUL behind it until a block is full.
    encryption = (
        PrivateFormat.PKCS12.encryption_builder()
        .kdf_rounds(2048)
        .key_cert_algorithm(PBES.PBESv1SHA1And3KeyTripleDESCBC)
        .hmac_hash(SHA1())  # noqa: S303 - a MAC, and the only one that they know
        .build(passphrase or b"\0")
    )
    p12 = serialize_key_and_certificates(f"Apple Push Services: {topic}".encode(), key, made, None, encryption)
    return _pem(made) + pem, p12


def _pem(made: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return made.public_bytes(Encoding.PEM)


@contextmanager
def _written(files: _Files, contents: Sequence[bytes], *, force: bool) -> Iterator[None]:
    """The files get their names if the block succeeds; otherwise all is as it was. Raises ConfigError."""
    for path in files:
        if os.path.lexists(path) and (not force or path.is_dir()):
            raise ConfigError(f"There is a file {path} already: name another --output, or write over it with --force")
    make_folder(files.pem.parent)
    new = [path.with_name(f".{path.name}.{os.getpid()}.new") for path in files]
    try:
        try:
            for path, content in zip(new, contents, strict=True):
                with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                    file.write(content)
        except OSError as error:
            raise ConfigError(f"--output: {files.pem} cannot be written ({error.strerror}): name another one") from None
        yield
        for path, final in zip(new, files, strict=True):
            path.replace(final)
    finally:
        for path in new:
            path.unlink(missing_ok=True)


def _host(server: Server) -> str:
    """Where the server is, as seen from here. Raises ConfigError."""
    from urllib.parse import urlsplit

    return urlsplit(server.client.url).hostname or ""
