"""Foreign programs: built once into a cache beside this file, run with files and not pipes, ended whatever happens."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.programs import need

HERE = Path(__file__).parent
CACHE = HERE / ".cache"
GO_AT_LEAST = (1, 24)


def build_go(module: str, package: str) -> Path:
    """Build a package of a Go module of ours and return the program. Takes a second when nothing has changed.

    Modules come with their hashes (go.sum), through whatever proxy this machine is set up for, into the user's cache.
    """
    go = need("go")
    version = subprocess.run([go, "env", "GOVERSION"], check=True, capture_output=True, text=True).stdout
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < GO_AT_LEAST:
        pytest.skip(f"{version.strip()} is too old: install Go {'.'.join(map(str, GO_AT_LEAST))} or newer")
    CACHE.mkdir(exist_ok=True)
    program = CACHE / Path(package).name
    # Built aside and moved, because another process of the test run may be starting the program just now.
    fresh = program.with_suffix(f".{os.getpid()}")
    subprocess.run([go, "build", "-mod=readonly", "-o", fresh, package], check=True, cwd=HERE / module)
    fresh.replace(program)
    return program


async def run(*command: str | Path, timeout_s: float = 50.0) -> str:
    """Run a program to its end; its output, errors among it. Fails where it does not exit with 0."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(timeout_s):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    text = output.decode()
    assert process.returncode == 0, f"{command[0]} ended with {process.returncode}\n{text}"
    return text


@dataclass
class Ledger:
    """A foreign server of ours while it runs, and afterwards how often it acted on each apns-id."""

    port: int
    acted: dict[str, int]


@asynccontextmanager
async def serving(*command: str | Path) -> AsyncIterator[Ledger]:
    """Run a server that prints its port, and its ledger once its standard input ends."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(10):
            ledger = Ledger(int(await process.stdout.readline()), {})
        yield ledger
        process.stdin.close()
        async with asyncio.timeout(10):
            lines = (await process.stdout.read()).decode().splitlines()
        ledger.acted.update((id_, int(count)) for id_, count in map(str.split, lines))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def listening(command: Sequence[str | Path], port: int) -> AsyncIterator[None]:
    """Run a server that says nothing; ready once its port takes connections."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(10):
            while True:
                assert process.returncode is None, f"{command[0]} ended with {process.returncode}"
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.02)
                else:
                    writer.close()
                    break
        yield
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
