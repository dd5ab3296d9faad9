"""What commands do on this machine: read the configuration, write files, run the loop."""

from __future__ import annotations

import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from heliograph.errors import ConfigError

if TYPE_CHECKING:
    from heliograph.config import Config

CONFIG_FILE = "heliograph.toml"
"""Read from the current folder where no other file is named."""

_PORTS = 20
"""How many ports are tried."""

config_option = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="HELIOGRAPH_CONFIG",
    show_envvar=True,
    help=f"The configuration, as TOML.  [default: {CONFIG_FILE}, if there is one here]",
)


def load_config(config: Path | None) -> Config:
    """The configuration from this file, else from the current folder's, if there is one. Raises ConfigError."""
    from heliograph.config import load

    return load(find_config(config))


def find_config(config: Path | None) -> Path | None:
    """This file, else the current folder's, if there is one."""
    if config is None and os.path.lexists(CONFIG_FILE):
        return Path(CONFIG_FILE)
    return config


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    import asyncio

    from heliograph.service import new_event_loop

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main)


def write_private(path: Path, content: bytes) -> Path:
    """Write a file that only its owner can read. Raises ConfigError."""
    make_folder(path.parent)
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(content)
    return path


def make_folder(folder: Path) -> None:
    """Make a folder that only we can look into, and so each that is missing above it. Raises ConfigError."""
    try:
        for each in (*reversed(folder.parents), folder):
            if not each.exists():
                each.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(exist_ok=True)  # complains where it is something else
    except OSError as error:
        raise ConfigError(f"The folder {folder} cannot be made ({error.strerror}): name another one") from None


def free_port(first: int) -> int:
    """The first port from there on that nobody listens on; for 0 any free one. Raises ConfigError."""
    import socket

    for port in range(first, min(first + _PORTS, 65536)):
        try:
            with socket.create_server(("127.0.0.1", port)) as taken:
                return int(taken.getsockname()[1])
        except OSError:
            continue
    raise ConfigError(f"None of the ports {first} to {first + _PORTS - 1} is free: name another --port")


def program() -> str:
    """What to type to run this program again, from the current folder."""
    import shutil

    if shutil.which("heliograph"):
        return "heliograph"
    here = Path(os.path.abspath(sys.argv[0]))  # noqa: PTH100 - takes .. out as well
    if here.name == "__main__.py":
        return f"{sys.executable} -m heliograph"
    if here.parent.parent.name == ".venv" and (here.parents[2] / "run").exists():
        here = here.parents[2] / "run"
    return f"./{here.relative_to(Path.cwd())}" if here.is_relative_to(Path.cwd()) else str(here)


def secret_from(file: Path, option: str) -> bytes:
    """The contents of a file that only we may read. Raises ConfigError."""
    from heliograph.config import read_secret

    return read_secret(f"file:{file}", option)
