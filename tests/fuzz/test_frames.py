"""The frame reader under input that is led by coverage, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ATHERIS = ROOT / "tests" / "peers" / ".cache" / "atheris"

whole = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("seconds", [5, pytest.param(600, marks=whole)], ids=["short", "whole"])
def test_the_frame_reader_takes_any_octets_as_apples_pages_say_however_they_arrive(seconds: int) -> None:
    run(seconds, ROOT, [])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_another_fuzzer_finds_nothing_either(tmp_path: Path) -> None:
    if not (ATHERIS / "atheris").exists():
        get = ["pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
        got = subprocess.run([sys.executable, "-m", *get, "--target", ATHERIS, "atheris>=3.0"], check=False)
        if got.returncode:
            pytest.skip("atheris is not to be had for this Python on this machine")
    run(600, tmp_path, ["--atheris"])


def run(seconds: int, folder: Path, how: list[str]) -> None:
    """Without tracers of ours in it; what breaks the reader is in what it prints."""
    seed = ["--seed", os.environ["SEED"]] if "SEED" in os.environ else []
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.frames", "--seconds", str(seconds), *seed, *how],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ATHERIS}"},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=seconds + 300,
    )
    print(done.stdout[-4000:])  # noqa: T201 - what was found, and how to find it again
    assert done.returncode == 0, done.stdout[-4000:]
