"""The pages for old scripts and other people's libraries, played as they stand there, against a real server.

Blocks of the language `console` are commands, each after a `$`, with what they print. Any other block is a file where
the line before it names one. `...` stands for anything: alone on its line for any lines. Ids, names of connections,
times and the like differ from run to run; those that were printed may be used by later commands.

What needs a package of some registry is not played here: such clients are in `tests/peers`.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.certificates import key_pem, push_certificate, rsa_key
from tests.programs import need
from tests.service.test_cli import PATIENCE_S, unused_port

PAGES = Path(__file__).parents[2] / "docs" / "migrating"
INDEX = "README.md"
PLAYED = {
    INDEX: ("openssl", "curl"),
    "php.md": ("openssl", "php"),
    "node.md": ("openssl", "node"),
    "python.md": ("openssl",),
    "go.md": ("openssl", "go"),
    "shell.md": ("openssl",),
    "anything.md": ("openssl",),
    "http2.md": ("openssl", "curl"),
}
"""With what each needs on this machine."""
INSTALLS = ("pip install", "npm install", "mvn ", "go get", "[patch.crates-io]")
"""What a section that is not played has in it."""

BUILDING_S = 150
"""As long as `go build` may take, the first time."""

VOLATILE = {
    "id": r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "connection": r"main-[0-9a-f]{6}-\d+",
    "fingerprint": r"\b[0-9a-f]{16,32}\b",
    "moment": r"20\d\d-\d\d-\d\dT[0-9:.]+Z",
    "date": r"20\d\d-\d\d-\d\d",
    "clock": r"\d\d:\d\d:\d\d",
    "anything": r"\.\.\.",
}
NAMES = ("id", "connection", "fingerprint")
"""Those that later commands may use."""
_volatile = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in VOLATILE.items()))
_block = re.compile(r"(?:^(?P<before>[^\n]*):\n\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_file = re.compile(r"`(\w+\.(?:py|js|php|go|sh|toml|cnf|java))`")


class Block(NamedTuple):
    language: str
    text: str
    file: str | None


def sections(page: str) -> Iterator[str]:
    yield from re.split(r"(?=^##+ )", (PAGES / page).read_text(), flags=re.MULTILINE)


def blocks(section: str) -> Iterator[Block]:
    for found in _block.finditer(section):
        named = _file.findall(found["before"] or "")
        yield Block(found["language"], found["text"], named[-1] if named else None)


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Each command of a block, and what it prints."""
    for each in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        (command,) = re.findall(r"\A(?:.*(?:\\|\|)\n)*.*\n", each)
        yield command, each.removeprefix(command)


def two_unused_ports() -> int:
    """The first of two that follow each other."""
    while True:
        first = unused_port()
        with socket.socket() as second:
            try:
                second.bind(("127.0.0.1", first + 1))
            except OSError:
                continue
            return first


class Player:
    """Plays pages in a folder of its own, where the ports that they name are free ones."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._ports: dict[str, str] = {}
        self._names: dict[str, str] = {}
        """As the pages have them, and what they are here."""
        own = {"PYTHONUNBUFFERED": "1", "NODE_NO_WARNINGS": "1"}
        settings = ("LEGACY__MAIN__PORT", "LEGACY__MAIN__FEEDBACK_PORT", "APPLE_PROXY__MAIN__PORT", "API__PORT")
        for printed, setting in zip(("2195", "2196", "2197", "8080"), settings, strict=True):
            self._ports[printed] = own[f"HELIOGRAPH_{setting}"] = str(unused_port())
        for printed in ("12195", "12196", "22195", "22196", "32195", "32196"):
            self._ports[printed] = str(unused_port())
        simulator = two_unused_ports()
        self._ports |= {"2199": str(simulator), "2200": str(simulator + 1)}
        programs = folder / "programs"
        programs.mkdir()
        for name, line in (("heliograph", "-m heliograph "), ("python3", "")):
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec {sys.executable} {line}"$@"\n')
            program.chmod(0o700)
        plain = {name: value for name, value in os.environ.items() if not name.startswith("HELIOGRAPH_")}
        self._environment = {**plain, **own, "PATH": f"{programs}:{os.environ['PATH']}"}

    def play(self, section: str) -> None:
        for block in blocks(section):
            if block.language == "console":
                for command, printed in commands(block.text):
                    self._type(command, printed)
            elif block.file is not None:
                (self._folder / block.file).write_text(self._translated(block.text))

    def _type(self, command: str, printed: str) -> None:
        name, _, rest = command.partition(" ")
        task = rest.split()[0] if rest else ""
        if name == "heliograph" and task in ("serve", "simulate"):
            self._begin(task, command, printed)
            return
        # What came in may take a moment until it is known: a person is slower than that.
        until = time.monotonic() + (PATIENCE_S if name == "heliograph" and task in ("list", "why", "removals") else 0)
        while True:
            done = subprocess.run(
                ["/bin/sh", "-c", self._translated(command)],
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=BUILDING_S,
                check=False,
            )
            said = "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())
            found = re.fullmatch(self._pattern(printed), said)
            if found and done.returncode == 0:
                self._learn(printed, found)
                return
            assert time.monotonic() < until, f"{command}ended with {done.returncode} and printed\n{said}{done.stderr}"
            time.sleep(0.05)

    def _begin(self, task: str, command: str, printed: str) -> None:
        """One that goes on; in place of one that was begun before."""
        if before := self._running.get(task):
            before.terminate()
            before.wait(PATIENCE_S)
        output = self._folder / f"{task}.out"
        with output.open("wb") as file:
            process = self._running[task] = subprocess.Popen(
                ["/bin/sh", "-c", f"exec {self._translated(command)}"],
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._stack.callback(process.wait, PATIENCE_S)
        self._stack.callback(process.kill)
        pattern = re.compile(self._pattern(printed))
        until = time.monotonic() + PATIENCE_S
        while not pattern.match(output.read_text()):
            waiting = process.poll() is None and time.monotonic() < until
            assert waiting, f"{command}printed\n{output.read_text()}"
            time.sleep(0.02)

    def _translated(self, text: str) -> str:
        here = self._ports | self._names
        return _any_of(here).sub(lambda each: here[each[0]], text)

    def _pattern(self, printed: str) -> str:
        lines = (line.rstrip() for line in printed.splitlines())
        return "".join(r"(?:.*\n)*?" if line == "..." else self._line(line) + r"\n" for line in lines)

    def _line(self, line: str) -> str:
        parts, end = [], 0
        for each in _volatile.finditer(line):
            parts.append(self._literal(line[end : each.start()]))
            if each.lastgroup == "anything":
                parts.append(".*")
            else:
                known = self._names.get(each[0])
                parts.append(f"({VOLATILE[str(each.lastgroup)] if known is None else re.escape(known)})")
            end = each.end()
        return "".join(parts) + self._literal(line[end:])

    def _literal(self, text: str) -> str:
        """A port is the one that it is here, or where a program only speaks of what is usual, the printed one.

        How wide a column is does not matter.
        """
        here = _any_of(self._ports).sub(lambda each: f"(?:{each[0]}|{self._ports[each[0]]})", re.escape(text))
        return re.sub(r"(?:\\ ){2,}", " {2,}", here)

    def _learn(self, printed: str, found: re.Match[str]) -> None:
        groups = [each for each in _volatile.finditer(printed) if each.lastgroup != "anything"]
        for each, value in zip(groups, found.groups(), strict=True):
            if each.lastgroup in NAMES:
                self._names[each[0]] = value


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(rf"\b{re.escape(each)}\b" for each in words))


def playable(page: str) -> Iterator[str]:
    yield from (each for each in sections(page) if not any(word in each for word in INSTALLS))


@pytest.mark.timeout(180)  # a first build
@pytest.mark.parametrize("page", [pytest.param(each, marks=pytest.mark.peer(*PLAYED[each])) for each in PLAYED])
def test_a_page_for_old_scripts_works_as_it_is_printed(page: str, tmp_path: Path) -> None:
    for program in PLAYED[page]:
        need(program)
    was = push_certificate(key=rsa_key(), now=datetime(2018, 3, 2, tzinfo=UTC))
    (tmp_path / "apns-prod.pem").write_bytes(was.certificate_pem + key_pem(was.key))
    with ExitStack() as stack:
        player = Player(tmp_path, stack)
        for section in playable(INDEX):
            if page == INDEX:
                player.play(section)
            elif section.startswith(("## 1.", "## 2.")):
                player.play(_with_more(section, page).partition("**The one that it has**")[0])
        for section in playable(page) if page != INDEX else ():
            player.play(section)


def _with_more(section: str, page: str) -> str:
    """The section that sets the server up, with the listeners that a page adds, and a frame to send."""
    if page != "anything.md" or not section.startswith("## 1."):
        return section
    more = "".join(block.text for each in sections(page) for block in blocks(each) if block.language == "toml")
    frame = '```console\n$ printf \'\\0\\0\\1a\\0\\33{"aps": {"alert": "Hello"}}\' >frame\n```\n'
    return section.replace("[apple_proxy.main]", f"{more}\n[apple_proxy.main]", 1) + frame


def test_every_page_is_in_the_index_and_leads_back_to_it() -> None:
    index = (PAGES / INDEX).read_text()
    for page in PAGES.glob("*.md"):
        if page.name != INDEX:
            assert f"({page.name})" in index
            assert f"({INDEX}#" in page.read_text()


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in PAGES.glob("*.md"):
        text = _block.sub("", page.read_text())
        for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text):
            file = (page.parent / target) if target else page
            assert file.exists(), f"{page.name}: {target}"
            titles = re.findall(r"^##+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert not anchor or anchor in anchors, f"{page.name}: {target}#{anchor}"
