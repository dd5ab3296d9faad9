"""The README's tutorial, played as it stands there: every command, and what it prints.

Blocks of the language `console` are commands, each after a `$`, with what they print; one without commands is what the
simulator goes on to print. A block of `toml` is heliograph.toml. `...` stands for anything: alone on its line for any
lines. Ids, times and the like differ from run to run; an id that was printed may be used by later commands.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from heliograph.config import load
from tests.programs import need
from tests.service.test_cli import PATIENCE_S, unused_port

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SECTIONS = ("See it work", "A first push of your own")

VOLATILE = {
    "id": r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "moment": r"20\d\d-\d\d-\d\dT[0-9:.]+Z",
    "clock": r"\d\d:\d\d:\d\d\.\d{3}",
    "took": r" +\d+ ms",
    "anything": r"\.\.\.",
}
_volatile = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in VOLATILE.items()))


def blocks() -> Iterator[tuple[str, str]]:
    """Language and text of each block of the tutorial."""
    for title in SECTIONS:
        (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## )", README, re.MULTILINE | re.DOTALL)
        yield from re.findall(r"^```(\w+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Each command of a block, and what it prints."""
    for each in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        (command,) = re.findall(r"\A(?:.*\\\n)*.*\n", each)
        yield command, each.removeprefix(command)


class Player:
    """Plays blocks in a folder of its own, where `./run` starts the program with ports that are free."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._ids: dict[str, str] = {}
        """As the README has them, and what they are here."""
        self._ports = {"2197": str(unused_port()), "8080": str(unused_port())}
        self._simulator: tuple[Path, int] | None = None
        """What it prints, and how much of that was looked at."""
        run = folder / "run"
        options = f"simulate) set -- $@ --port {self._ports['2197']} ;; demo) set -- $@ --port {unused_port()} ;;"
        run.write_text(f'#!/bin/sh\ncase $1 in {options} esac\nexec {sys.executable} -m heliograph "$@"\n')
        run.chmod(0o700)
        (folder / "tmp").mkdir()
        plain = {name: value for name, value in os.environ.items() if not name.startswith("HELIOGRAPH_")}
        own = {"HELIOGRAPH_API__PORT": self._ports["8080"], "PYTHONUNBUFFERED": "1", "TMPDIR": str(folder / "tmp")}
        self._environment = {**plain, **own}

    def _here(self, text: str) -> str:
        for there, here in (self._ports | self._ids).items():
            text = text.replace(there, here)
        return text

    def configure(self, text: str) -> None:
        (self._folder / "heliograph.toml").write_text(self._here(text))

    def play(self, command: str, printed: str) -> None:
        """One that ends."""
        done = subprocess.run(
            ["/bin/sh", "-c", self._here(command)],
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        said = done.stdout if done.stdout.endswith("\n") else done.stdout + "\n"
        found = re.fullmatch(self._pattern(printed), said)
        assert found, f"{command}printed\n{said}"
        self._learn(printed, found)

    def begin(self, command: str, printed: str) -> None:
        """One that goes on until Ctrl-C: the demo for this block, others to the end."""
        name = command.split()[1]
        output = self._folder / f"{name}.out"
        process = self._stack.enter_context(self._started(command, output))
        found = self._wait_for(process, output, 0, printed)
        if name == "simulate":
            self._simulator = output, found.end()
            self._watched = process
        if name == "demo":
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE_S) == 0

    def watch(self, printed: str) -> None:
        """What the simulator goes on to print."""
        assert self._simulator is not None
        output, seen = self._simulator
        self._wait_for(self._watched, output, seen, printed)

    @contextmanager
    def _started(self, command: str, output: Path) -> Iterator[subprocess.Popen[bytes]]:
        with output.open("wb") as file:
            process = subprocess.Popen(
                ["/bin/sh", "-c", f"exec {command}"],
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait(PATIENCE_S)

    def _wait_for(self, process: subprocess.Popen[bytes], output: Path, seen: int, printed: str) -> re.Match[str]:
        pattern = re.compile(r"\s*" + self._pattern(printed))
        until = time.monotonic() + PATIENCE_S
        while process.poll() is None and time.monotonic() < until:
            if found := pattern.match(output.read_text(), seen):
                return found
            time.sleep(0.02)
        raise AssertionError(f"these lines are not among what it prints:\n{printed}\nbut:\n{output.read_text()}")

    def _pattern(self, printed: str) -> str:
        return "".join(
            r"(?:.*\n)*?" if line == "..." else self._line(line) + r"\n" for line in self._here(printed).splitlines()
        )

    def _line(self, line: str) -> str:
        parts, end = [], 0
        for each in _volatile.finditer(line):
            kind = str(each.lastgroup)
            known = each[0] in self._ids.values()
            parts.append(re.escape(line[end : each.start()]))
            parts.append(re.escape(each[0]) if known else ".*" if kind == "anything" else f"({VOLATILE[kind]})")
            end = each.end()
        return "".join(parts) + re.escape(line[end:])

    def _learn(self, printed: str, found: re.Match[str]) -> None:
        groups = [
            each
            for each in _volatile.finditer(self._here(printed))
            if each.lastgroup != "anything" and each[0] not in self._ids.values()
        ]
        for each, value in zip(groups, found.groups(), strict=True):
            if each.lastgroup == "id":
                self._ids[each[0]] = value


@pytest.mark.peer("curl")
def test_the_tutorial_in_the_readme_works_as_it_is_printed(tmp_path: Path) -> None:
    need("curl")
    with ExitStack() as stack:
        player = Player(tmp_path, stack)
        played = []
        for language, text in blocks():
            if language == "toml":
                player.configure(text)
            elif not text.startswith("$ "):
                player.watch(text)
            for command, printed in commands(text) if language == "console" else ():
                played.append(command.split()[1])
                goes_on = command.startswith("./run ") and played[-1] in ("demo", "simulate", "serve")
                (player.begin if goes_on else player.play)(command, printed)
        assert {"demo", "simulate", "serve", "send", "status"} <= set(played)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_tutorials_configurations_are_short_and_good(tmp_path: Path) -> None:
    ours, apples = (text for language, text in blocks() if language == "toml")
    assert len(ours.splitlines()) <= 8
    (tmp_path / "heliograph.toml").write_text(apples)
    (settings,) = load(tmp_path / "heliograph.toml").apps.values()
    assert settings.host is None
    ((_, app),) = tomllib.loads(apples)["apps"].items()
    assert len(app) == 3


def test_run_knows_each_command_of_the_tutorial() -> None:
    known = set("|".join(re.findall(r"^([a-z|]+)\) #", (ROOT / "run").read_text(), re.MULTILINE)).split("|"))
    assert set(re.findall(r"\./run (\w+)", README)) <= known
