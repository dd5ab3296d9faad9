"""The command line on a real terminal: completion in real shells, bars, colours, Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from heliograph import __version__
from tests.certificates import push_certificate
from tests.service.test_cli import ALIVE, PATIENCE_S, PROGRAM, environment, run, serving, unused_port
from tests.service.test_cli_many import tokens, wayward

BIN = Path(sys.executable).parent


class Terminal:
    """A program on a terminal of 80 columns."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self.process = process
        self._descriptor = descriptor
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def wait_for(self, words: str) -> str:
        """All that was shown, once these words were."""
        return self._read_until(lambda: re.search(words, self.shown) is not None)

    def end(self) -> str:
        """All that was shown, until the program ended."""
        self._read_until(lambda: False)
        self.process.wait(PATIENCE_S)
        return self.shown

    def _read_until(self, done: Callable[[], bool]) -> str:
        until = time.monotonic() + PATIENCE_S
        while not done():
            ready, _, _ = select.select([self._descriptor], [], [], max(until - time.monotonic(), 0))
            assert ready, f"nothing more came after:\n{self.shown}"
            try:
                octets = os.read(self._descriptor, 65_536)
            except OSError:  # the last who had it has closed it
                octets = b""
            if not octets:
                break
            self.shown += octets.decode("utf-8", "replace")
        return self.shown


@contextmanager
def terminal(folder: Path, command: Sequence[str], **more: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    plain = {"TERM": "xterm", "COLUMNS": "80", "LINES": "24", "HOME": str(folder)}
    process = subprocess.Popen(
        [sys.executable, "-c", _TAKE_TERMINAL, *command],
        cwd=folder,
        env=environment(folder, **{**plain, **more}),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        os.close(ours)


_TAKE_TERMINAL = """\
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C comes from it
os.execvp(sys.argv[1], sys.argv[1:])
"""


# -- completion ------------------------------------------------------------------------------------------------------

SHELLS = {
    "bash": (["--norc", "--noprofile", "-i"], 'eval "$(heliograph completion bash)"'),
    "zsh": (["-f", "-i"], 'autoload -U compinit && compinit -u -D && eval "$(heliograph completion zsh)"'),
    "fish": (["--private", "-i"], "heliograph completion fish | source"),
}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_commands_options_and_choices(tmp_path: Path, shell: str) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is absent: apt-get install {shell}")
    arguments, setup = SHELLS[shell]
    path = f"{BIN}:{os.environ['PATH']}"
    with terminal(tmp_path, [program, *arguments], PATH=path) as it:
        # What the shell shows while it completes is full of its own codes: what it then runs is plain. The quotes keep
        # what is typed apart from what it prints.
        it.type(f"{setup}; echo rea''dy\n")
        it.wait_for("ready")
        it.type("heliograph --vers\t\n")
        it.wait_for(f"heliograph {re.escape(__version__)}")
        it.type("heliograph conf\t--he\t\n")
        it.wait_for("Show the settings that count")
        it.type("heliograph completion fi\t\n")
        it.wait_for("complete --no-files --command heliograph")
        it.type("heliograph send --push-type backg\t; echo rea''dy again\n")
        it.wait_for("ready again")
        it.type("heliograph app rem\t--he\t\n")
        it.wait_for("Remove an app that was added")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_for_a_shell_is_printed_whole(tmp_path: Path, shell: str) -> None:
    done = run(tmp_path, "completion", shell)
    assert done.returncode == 0
    assert "_HELIOGRAPH_COMPLETE" in done.stdout


def test_an_unknown_shell_is_told(tmp_path: Path) -> None:
    done = run(tmp_path, "completion", "tcsh")
    assert done.returncode == 2
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in done.stderr


# -- what is shown ---------------------------------------------------------------------------------------------------


def test_long_work_shows_a_bar_on_a_terminal_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(tokens(100_000))
    with wayward(most=3) as server:
        command = [*PROGRAM, "send", "--title", "x", "--tokens-file", "tokens"]
        with terminal(tmp_path, command, **server.variables) as it:
            it.wait_for(r"Sending  \[[#-]+\]  3000/100000")
            it.type("\x03")
            said = it.end()
    assert it.process.returncode == 130
    assert "3,000 of 100,000 were dealt with; the rest begins at line 3,001" in said
    assert "Traceback" not in said


def test_long_work_says_so_now_and_then_where_there_is_no_terminal(tmp_path: Path) -> None:
    code = (
        "from heliograph.commands import telling; telling._LINE_S = 0\n"
        "with telling.progress(3000, 'Sending') as advance:\n    advance(1000); advance(2000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == "Sending: 1,000 of 3,000\nSending: 3,000 of 3,000\n"


def test_colours_are_for_terminals_that_want_them(tmp_path: Path) -> None:
    command = [*PROGRAM, "send", "--title", "x", "--url", "http://127.0.0.1:1", ALIVE]
    plain = {"HELIOGRAPH_KEY": "hg_x"}
    for more, coloured in (({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
        with terminal(tmp_path, command, **plain, **more) as it:
            assert ("\x1b[31mError:" in it.end()) == coloured
        assert it.process.returncode == 3


def test_words_of_other_languages_do_not_break_a_plain_terminal(tmp_path: Path) -> None:
    for more in ({"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}):
        done = subprocess.run(
            [*PROGRAM, "credentials", "inspect", "schlüssel-λ.p8"],
            cwd=tmp_path,
            env=environment(tmp_path, **more),
            capture_output=True,
            check=False,
        )
        assert done.returncode == 2
        assert b"does not exist" in done.stderr
        assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["simulate", "demo", "serve"])
def test_ctrl_c_on_a_terminal_ends_what_runs_for_long(tmp_path: Path, command: str) -> None:
    port = f"{unused_port()}"
    arguments, words = {
        "simulate": (["--port", "0"], "Ctrl-C ends it"),
        "demo": (["--data", "kept", "--port", port], "Ctrl-C ends the demo"),
        "serve": (["--simulator"], "started"),
    }[command]
    with terminal(tmp_path, [*PROGRAM, command, *arguments], HELIOGRAPH_API__PORT="0") as it:
        it.wait_for(words)
        it.type("\x03")
        said = it.end()
    assert it.process.returncode in (0, 130)
    assert "Traceback" not in said


def test_a_command_that_reads_from_the_terminal_ends_on_ctrl_c(tmp_path: Path) -> None:
    key = push_certificate("com.example.shop").p12(b"tea")
    (tmp_path / "shop.p12").write_bytes(key)
    with terminal(tmp_path, [*PROGRAM, "credentials", "inspect", "shop.p12"]) as it:
        it.wait_for("Passphrase of shop.p12: ")
        it.type("\x03")
        said = it.end()
    assert it.process.returncode == 130
    assert "Traceback" not in said


def test_a_passphrase_is_asked_for_and_not_shown(tmp_path: Path) -> None:
    (tmp_path / "shop.p12").write_bytes(push_certificate("com.example.shop").p12(b"very_secret"))
    with terminal(tmp_path, [*PROGRAM, "credentials", "inspect", "shop.p12"]) as it:
        it.wait_for("Passphrase of shop.p12: ")
        it.type("very_secret\n")
        said = it.end()
    assert it.process.returncode == 0
    assert "certificate with private key" in said
    assert "very_secret" not in said


# -- errors as JSON --------------------------------------------------------------------------------------------------


def test_with_json_an_error_is_on_stdout_and_the_words_on_stderr(tmp_path: Path) -> None:
    cases = {
        ("send", "--json", "--title", "x", "--url", "http://127.0.0.1:1", ALIVE): (3, "Unreachable"),
        ("app", "list", "--json", "--url", "nonsense"): (2, "Config"),
        ("app", "list", "--jsn", "--json"): (2, "Usage"),
        ("config", "--json", "--config", "absent.toml"): (2, "Config"),
        ("credentials", "inspect", "--json", "absent"): (2, "Usage"),
    }
    for command, (code, name) in cases.items():
        done = run(tmp_path, *command, HELIOGRAPH_KEY="hg_x")
        problem = json.loads(done.stdout)["error"]
        assert (done.returncode, problem["code"]) == (code, name)
        assert problem["detail"] in done.stderr
    assert run(tmp_path, "app", "show", "--url", "nonsense", "--", "--json", HELIOGRAPH_KEY="hg_x").stdout == ""


def test_what_the_server_refuses_is_json_as_it_said_it(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        done = run(tmp_path, "app", "show", "absent", "--json", **server)
        assert done.returncode == 1
        problem = json.loads(done.stdout)["error"]
        assert (problem["code"], problem["status"], problem["title"]) == ("UnknownApp", 404, "Unknown app")
        wrong = run(tmp_path, "app", "list", "--json", **server, HELIOGRAPH_KEY="hg_wrong")
        assert wrong.returncode == 2
        assert json.loads(wrong.stdout)["error"]["code"] == "Unauthorized"
        gone = run(tmp_path, "app", "list", HELIOGRAPH_URL=f"{server['HELIOGRAPH_URL']}/elsewhere")
        assert gone.returncode == 2
        assert "There is nothing at /elsewhere/v1/apps" in gone.stderr
