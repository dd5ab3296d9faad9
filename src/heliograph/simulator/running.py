"""The simulator as a program: with its control API, and with files that clients can be given."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from msgspec import Struct, structs

from heliograph.errors import ConfigError
from heliograph.model import Environment, SigningKey
from heliograph.net.clients import throwaway_client
from heliograph.net.tls import Identity, good_until, throwaway_identity
from heliograph.protocols.certificate import load
from heliograph.protocols.provider_token import parse_signing_key
from heliograph.simulator.control import Control, controlled
from heliograph.simulator.faults import Rule
from heliograph.simulator.legacy import Legacy
from heliograph.simulator.reading import add_rules
from heliograph.simulator.server import KEY_ID, TEAM_ID, Simulator, new_signing_key, open_private

_LEAST_LIFETIME = timedelta(days=1)


class Running(Struct, frozen=True):
    """A simulator that listens."""

    apple: Simulator
    control: Control
    ca_file: Path
    key_file: Path
    client_file: Path | None
    """A client certificate with its key, where there is a binary gateway."""
    certificate_required: bool
    """Whether clients of the gateway have to show that."""


@asynccontextmanager
async def running(
    folder: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    control_port: int = 0,
    environment: Environment = Environment.PRODUCTION,
    strict: bool = False,
    journal: Path | None = None,
    client_authorities: bytes | None = None,
    rules: Sequence[Rule] = (),
    legacy: Legacy | None = None,
) -> AsyncIterator[Running]:
    """A simulator and its control API for as long as the block runs. Port 0 is any free one.

    `client_authorities` and `legacy`: see `Simulator`. `rules`: how it misbehaves from the start. What clients need is
    written into `folder`, or taken from there if it is there already. Raises ConfigError where the folder, a port or a
    rule cannot be used.
    """
    identity, key = _settle(folder)
    client_file = None if legacy is None else folder / "client.pem"
    if legacy is not None and client_file is not None:
        legacy = structs.replace(legacy, client_pem=_settle_client(client_file, legacy.topic))
    simulator = Simulator(
        environment,
        strict=strict,
        host=host,
        port=port,
        identity=identity,
        signing_key=key,
        journal=journal,
        client_authorities=client_authorities,
        legacy=legacy,
    )
    async with simulator, controlled(simulator, control_port) as control:
        add_rules(simulator, rules)
        yield Running(
            simulator,
            control,
            folder / "ca.pem",
            folder / _key_name(),
            client_file,
            legacy is not None and legacy.required,
        )


def _key_name() -> str:
    return f"AuthKey_{KEY_ID}.p8"


def _settle(folder: Path) -> tuple[Identity, SigningKey]:
    """The identity and signing key in `folder`, made where they are not there or about to expire."""
    names = ("ca.pem", "server.pem", "server.key", "expired.pem", "other-name.pem")
    paths = [folder / name for name in names]
    key_path = folder / _key_name()
    now = datetime.now(UTC)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if all(path.exists() for path in paths) and good_until(paths[1].read_bytes()) > now + _LEAST_LIFETIME:
            identity = Identity(*(path.read_bytes() for path in paths))
        else:
            identity = throwaway_identity(now)
            for path, pem in zip(paths, structs.astuple(identity), strict=True):
                _write_private(path, pem)
        if key_path.exists():
            key = parse_signing_key(key_path.read_bytes(), key_id=KEY_ID, team_id=TEAM_ID)
        else:
            key = new_signing_key()
            _write_private(key_path, key.pem)
    except OSError as error:
        raise ConfigError(f"The folder {folder} cannot be used ({error.strerror}): name another one") from None
    return identity, key


def _settle_client(path: Path, topic: str) -> bytes:
    """The client certificate with its key in that file, made where it is not there. Raises ConfigError."""
    try:
        if not path.exists():
            _write_private(path, throwaway_client(topic, datetime.now(UTC)))
        pem = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"The file {path} cannot be used ({error.strerror}): name another folder") from None
    try:
        topics = load(pem).topics
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; or remove it, and another is made") from None
    if topic not in topics:
        raise ConfigError(f"{path} is for {', '.join(topics)}, not for {topic}: name another folder, or remove it")
    return pem


def _write_private(path: Path, content: bytes) -> None:
    file = open_private(path, os.O_TRUNC)
    try:
        os.write(file, content)
    finally:
        os.close(file)
