"""Foreign programs: built once into a cache beside this file, run with files and not pipes, ended whatever happens."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.programs import need

HERE = Path(__file__).parent
CACHE = HERE / ".cache"


def build_go(module: str, package: str) -> Path:
    """Build a package of a Go module of ours and return the program. Takes a second when nothing has changed.

    Modules come with their hashes (go.sum), through whatever proxy this machine is set up for, into the user's cache.
    """
    go = need("go")
    version = subprocess.run([go, "env", "GOVERSION"], check=True, capture_output=True, text=True).stdout
    wanted = re.search(r"^go (\d+)\.(\d+)", (HERE / module / "go.mod").read_text(), re.MULTILINE)
    assert wanted is not None
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < tuple(map(int, wanted.groups())):
        pytest.skip(f"{version.strip()} is too old: install Go {'.'.join(wanted.groups())} or newer")
    CACHE.mkdir(exist_ok=True)
    program = CACHE / (Path(package).name or module.replace("/", "-"))
    # Built aside and moved, because another process of the test run may be starting the program just now.
    fresh = program.with_suffix(f".{os.getpid()}")
    subprocess.run([go, "build", "-mod=readonly", "-o", fresh, package], check=True, cwd=HERE / module)
    fresh.replace(program)
    return program


def build(name: str, steps: Sequence[Sequence[str]], change: Callable[[Path], None] | None = None) -> Path:
    """Copy the folder NAME into the cache, let `change` at it, and run the steps there, unless that was done before.

    Returns the folder: what package managers get they put beside the sources.
    """
    source, folder = HERE / name, CACHE / name.replace("/", "-")
    made = folder / "made"
    newest = max(file.stat().st_mtime for file in source.rglob("*"))
    CACHE.mkdir(exist_ok=True)
    with (CACHE / f"{folder.name}.lock").open("w") as lock:
        # Another process of the test run may want the same.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists() or made.stat().st_mtime < newest or made.read_text() != repr(steps):
            shutil.copytree(source, folder, dirs_exist_ok=True)
            if change is not None:
                change(folder)
            for step in steps:
                done = subprocess.run(step, cwd=folder, capture_output=True, text=True, check=False)
                assert done.returncode == 0, f"{' '.join(step)}\n{done.stdout}{done.stderr}"
            made.write_text(repr(steps))
    return folder


async def run(*command: str | Path, timeout_s: float = 50.0, more: dict[str, str] | None = None) -> str:
    """Run a program to its end; its output, errors among it. Fails where it does not exit with 0.

    `more`: what its environment has besides ours.
    """
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        env={**os.environ, **(more or {})},
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
