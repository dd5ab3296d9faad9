"""Where things are built, and what is said when a toolchain is not there.

Everything made lands in `bench/.build/`, which git ignores; deleting it costs nothing but time.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

BENCH = Path(__file__).parent
BUILD = BENCH / ".build"
C_TOOLS = "apt-get install gcc libnghttp2-dev libssl-dev"


class Absent(Exception):
    """Something outside the project is not on this machine; the text is one sentence that says how to get it."""


class Failed(Exception):
    """A build, a contestant or the far side went wrong; the text says which and shows its last words."""


def need(program: str, how: str) -> str:
    """The path of a program, or Absent with the way to get it."""
    found = shutil.which(program)
    if found is None:
        raise Absent(f"`{program}` is not on this machine: {how}")
    return found


def say(text: str) -> None:
    """Progress, on standard error: standard output is for the figures."""
    print(text, file=sys.stderr, flush=True)


def build(product: Path, sources: Iterable[Path], steps: Sequence[Sequence[str]], cwd: Path) -> None:
    """Run the steps in `cwd` unless `product` is newer than all its sources."""
    if product.exists() and all(source.stat().st_mtime <= product.stat().st_mtime for source in sources):
        return
    cwd.mkdir(parents=True, exist_ok=True)
    say(f"building {product.name} ...")
    for step in steps:
        done = subprocess.run(step, cwd=cwd, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise Failed(f"`{' '.join(step)}` failed:\n{last_words(done.stdout + done.stderr)}")
    product.touch()


def c_program(name: str, probe: str, flags: Sequence[str] = (), libraries: Sequence[str] = ()) -> Path:
    """The program built from `bench/NAME.c`. Raises Absent where the compiler or a header in `probe` is missing."""
    compiler = need("gcc", C_TOOLS)
    headers = subprocess.run([compiler, "-E", "-"], input=probe, check=False, capture_output=True, text=True)
    if headers.returncode:
        raise Absent(f"headers that bench/{name}.c needs are not on this machine: {C_TOOLS}")
    product, source = BUILD / name, BENCH / f"{name}.c"
    command = [compiler, "-O2", "-Wall", "-Wextra", *flags, "-o", str(product), str(source), *libraries]
    build(product, [source], [command], BUILD)
    return product


def copy_sources(source: Path, target: Path) -> None:
    """Copy a peer's sources to where it is built: its package manager writes beside them."""
    shutil.copytree(source, target, dirs_exist_ok=True)


def last_words(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-15:])
