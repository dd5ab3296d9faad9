"""The command line as people use it: the real program, real signals, the curl lines that it prints."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click import Command, Group
from click import Path as ClickPath
from click.testing import CliRunner
from click.types import BoolParamType

from heliograph import __version__
from heliograph.cli import cli
from heliograph.model import Environment
from tests.certificates import push_certificate
from tests.programs import need

PATIENCE_S = 30
ALIVE = "a1b2c3d4" * 8
PROGRAM = [sys.executable, "-m", "heliograph"]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Nothing of ours but what is named; data in the folder."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("HELIOGRAPH_")}
    return {**plain, "HELIOGRAPH_DATA": str(folder / "data"), **more}


def run(folder: Path, *arguments: str, text: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    """The program to its end; `text` is what it reads on stdin."""
    return subprocess.run(
        [*PROGRAM, *arguments],
        cwd=folder,
        env=environment(folder, **more),
        input=text,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


class Started:
    """The program, running. What it prints is read from a file, so that it never waits for a reader."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self.process = process
        self._output = output

    def said(self) -> str:
        return self._output.read_text()

    def wait_for(self, words: str) -> str:
        """All that was printed until these words were."""
        while words not in self.said():
            try:
                self.process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
            if words not in self.said():
                raise AssertionError(f"ended with {self.process.returncode} without {words!r}:\n{self.said()}")
        return self.said()

    def stop(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.process.wait(PATIENCE_S)


@contextmanager
def start(folder: Path, *arguments: str, **more: str) -> Iterator[Started]:
    output = folder / f"{arguments[0]}.out"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*PROGRAM, *arguments],
            cwd=folder,
            env=environment(folder, PYTHONUNBUFFERED="1", **more),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Started(process, output)
    finally:
        process.kill()
        process.wait(PATIENCE_S)


@contextmanager
def serving(folder: Path, *arguments: str, **more: str) -> Iterator[dict[str, str]]:
    """A server with the simulator behind it; the environment in which `send` finds it."""
    with start(folder, "serve", "--simulator", *arguments, HELIOGRAPH_API__PORT="0", **more) as started:
        found = re.search(r"url=(\S+)", started.wait_for("url="))
        assert found is not None
        yield {"HELIOGRAPH_URL": found[1]}
        assert started.stop(signal.SIGTERM) == 0
        assert "stopped" in started.said()
        assert "Traceback" not in started.said()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[dict[str, str]]:
    with serving(tmp_path) as found:
        yield found


def pasted(said: str, number: int) -> str:
    """The curl command with this number, as a person would mark and copy it."""
    return str(re.findall(r"^curl (?:.*\\\n)*.*(?:\n {7}\S.*)*$", said, re.MULTILINE)[number])


def paste(command: str, folder: Path) -> str:
    return subprocess.run(
        ["/bin/sh", "-c", command], cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S, check=True
    ).stdout


# -- help ------------------------------------------------------------------------------------------------------------


def all_commands() -> list[list[str]]:
    groups = {name: each for name, each in cli.commands.items() if isinstance(each, Group)}
    return [
        [],
        *([name] for name in cli.commands),
        *([name, sub] for name, each in groups.items() for sub in each.commands),
    ]


def find(path: list[str]) -> Command:
    command: Command = cli
    for name in path:
        assert isinstance(command, Group)
        command = command.commands[name]
    return command


def is_group(path: list[str]) -> bool:
    return isinstance(find(path), Group)


@pytest.mark.parametrize("command", all_commands(), ids=" ".join)
def test_help_shows_an_example_and_fits_the_screen(command: list[str]) -> None:
    said = CliRunner().invoke(cli, [*command, "--help"]).output
    assert re.search(r"Example.*:\n    ?(HELIOGRAPH_\S+ )?heliograph ", said)
    assert max(map(len, said.splitlines())) <= 80
    listed = said.partition("Commands:\n")[2]
    assert "..." not in listed


@pytest.mark.parametrize("command", [path for path in all_commands() if not is_group(path)], ids=" ".join)
def test_every_command_speaks_json_but_the_one_that_prints_a_script(command: list[str]) -> None:
    names = {name for param in find(command).params for name in param.opts}
    assert ("--json" in names) == (command != ["completion"])


def test_nothing_heavy_is_imported_to_show_help() -> None:
    code = "import sys; from heliograph.cli import main; sys.argv[1:] = ['--help']; main()"
    said = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True
    ).stderr
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in said.splitlines()}
    assert "click" in loaded
    heavy = {"asyncio", "ssl", "http", "msgspec", "structlog", "cryptography", "apsw", "uvloop", "uvicorn", "aiohttp"}
    assert not loaded & heavy


def test_options_for_secrets_take_files_only() -> None:
    found = set()
    for path in all_commands():
        for param in find(path).params:
            if (
                re.search("key|token|password|passphrase|secret|certificate|proxy", param.name or "")
                and param.opts[0][0] == "-"
            ):
                found |= {param.opts[0]}
                # A key's id and a device token open nothing, and a switch says nothing.
                harmless = param.opts[0] in ("--key-id", "--token") or isinstance(param.type, BoolParamType)
                assert harmless or isinstance(param.type, ClickPath), param.opts
    assert {"--key", "--key-file", "--certificate", "--passphrase-file", "--proxy-file"} <= found


def test_both_names_of_the_program_work(tmp_path: Path) -> None:
    installed = Path(sys.executable).with_name("heliograph")
    for program in ([str(installed)], PROGRAM):
        said = subprocess.run([*program, "--version"], capture_output=True, text=True, check=True).stdout
        assert said == f"heliograph {__version__}\n"


# -- demo ------------------------------------------------------------------------------------------------------------


def test_demo_shows_what_became_of_each_first_push(tmp_path: Path) -> None:
    done = run(tmp_path, "demo", "--exit-after-first", "--port", str(unused_port()))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for words in (
        r"one notification +accepted +\d+ ms",
        r"deleted the app +rejected +Unregistered \(410\) +\d+ ms",
        r"octets of text +refused +PayloadTooLarge +\d+ ms",
        r"1,000 tokens +accepted +\d+ ms",
        r"1000 of 1000 accepted",
        r"Apple took it. Whether it reached the device, nobody is told.",
    ):
        assert re.search(words, done.stdout), done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    folder = re.search(r"data +(\S+)", done.stdout)
    assert folder is not None
    assert f"{folder[1]} is deleted" in done.stdout
    assert not Path(folder[1]).exists()


def test_demo_tells_json_what_became_of_each_first_push(tmp_path: Path) -> None:
    done = run(tmp_path, "demo", "--exit-after-first", "--json", "--port", str(unused_port()), "--data", "kept")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["well"]
    assert [each["state"] for each in told["pushes"]] == ["accepted", "rejected", "refused", "accepted"]
    assert Path(told["key_file"]).read_text().startswith("hg_")
    assert Path(told["simulator_journal"]).exists()


@pytest.mark.peer("curl")
def test_demo_prints_curl_lines_that_work_as_pasted_and_ends_on_ctrl_c(tmp_path: Path) -> None:
    with start(tmp_path, "demo", "--data", "kept", "--port", str(unused_port())) as demo:
        said = demo.wait_for("Ctrl-C ends the demo.")
        receipt = json.loads(paste(pasted(said, 0), tmp_path))
        assert receipt["state"] == "accepted"
        assert json.loads(paste(pasted(said, 1), tmp_path))["state"] == "accepted"
        journal = re.search(r"tail -f (\S+)", said)
        assert journal is not None
        assert receipt["id"] in Path(journal[1]).read_text()
        assert demo.stop(signal.SIGINT) == 0
        assert demo.said().endswith("Stopped.\n")
        assert "Traceback" not in demo.said()
    assert stat.S_IMODE((tmp_path / "kept" / "api-key").stat().st_mode) == 0o600


def test_demo_takes_the_next_port_where_one_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(tmp_path, "demo", "--exit-after-first", "--port", str(port))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Port {port} is taken, so the API listens on ")


def test_demo_runs_again_on_the_data_of_the_last_time(tmp_path: Path) -> None:
    for _ in range(2):
        done = run(tmp_path, "demo", "--exit-after-first", "--data", "kept", "--port", str(unused_port()))
        assert done.returncode == 0, done.stdout
        assert done.stdout.endswith("\nStopped.\n")


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


# -- serve and send --------------------------------------------------------------------------------------------------


def test_send_says_in_one_line_what_became_of_it(tmp_path: Path, server: dict[str, str]) -> None:
    done = run(tmp_path, "send", "--title", "Tea", "--body", "is ready", ALIVE, **server)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"accepted  [0-9a-f-]{36}  Apple took it\..*\n", done.stdout)


def test_send_takes_a_whole_payload_and_prints_json(tmp_path: Path, server: dict[str, str]) -> None:
    done = run(tmp_path, "send", "--payload", "-", "--json", ALIVE, text='{"aps": {"badge": 1}}', **server)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["state"] == "accepted"
    (tmp_path / "push.json").write_text('{"aps": {"badge": 1}')
    done = run(tmp_path, "send", "--payload", "push.json", ALIVE, **server)
    assert done.returncode == 2
    assert "push.json is not JSON" in done.stderr


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["--title", "x", "a1b2 wxyz"], 1, "refused  BadDeviceToken: The device token holds blanks"),
        (["--title", "x", "a1b2", "c3d4"], 2, "one device token: if yours has blanks in it, remove them"),
        (["--title", "x"], 2, "There is no device token: write it behind the options, or name a --tokens-file"),
        ([ALIVE], 1, "refused  PayloadEmpty: There is nothing to send"),
        (["--title", "x", "--app", "shop", ALIVE], 1, "refused  UnknownApp: There is no app 'shop'"),
        (["--title", "x", "--url", "http://127.0.0.1:1", ALIVE], 3, "There is no answer from http://127.0.0.1:1"),
        (["--title", "x", "--url", "127.0.0.1:8080", ALIVE], 2, "must be like http://127.0.0.1:8080"),
        (["--title", "x", "--url", "http://127.0.0.1:99999", ALIVE], 2, "must be like http://127.0.0.1:8080"),
        (["--title", "x", "--url", "http://[::1", ALIVE], 2, "must be like http://127.0.0.1:8080"),
        (["--title", "x", "--url", "http://me:word@127.0.0.1:8080", ALIVE], 2, "must be like http://127.0.0.1:8080"),
        (["--payload", "/dev/zero", ALIVE], 2, "--payload: /dev/zero is a device: name a file"),
        (["--titel", "x", ALIVE], 2, "No such option '--titel'"),
        (["--title", "x", "--wait", "99", ALIVE], 2, "Invalid value for '--wait'"),
    ],
)
def test_send_says_what_to_change_and_its_exit_code_tells(
    tmp_path: Path, server: dict[str, str], arguments: list[str], code: int, words: str
) -> None:
    done = run(tmp_path, "send", *arguments, **server)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_send_finds_its_key_in_a_file_a_variable_or_the_data_folder(tmp_path: Path, server: dict[str, str]) -> None:
    key = tmp_path / "data" / "api-key"
    own = {**server, "HELIOGRAPH_DATA": str(tmp_path / "elsewhere")}
    assert run(tmp_path, "send", "--title", "x", ALIVE, **own, HELIOGRAPH_KEY=key.read_text().strip()).returncode == 0
    assert run(tmp_path, "send", "--title", "x", "--key-file", str(key), ALIVE, **own).returncode == 0
    lost = run(tmp_path, "send", "--title", "x", ALIVE, **own)
    assert lost.returncode == 2
    assert "There is no API key at" in lost.stderr
    wrong = run(tmp_path, "send", "--title", "x", ALIVE, **own, HELIOGRAPH_KEY="hg_wrong")
    assert wrong.returncode == 2
    assert "The API key is not one of this server" in wrong.stderr
    assert run(tmp_path, "send", "--title", "x", ALIVE, **own, HELIOGRAPH_KEY="hg_w\u00f6rd").returncode == 2


def test_send_says_when_the_outcome_is_still_to_come(tmp_path: Path) -> None:
    with start(tmp_path, "simulate", "--port", "0", "--folder", "apple") as simulate:
        said = simulate.wait_for("Ctrl-C ends it.")
        table = said[said.index("[apps.demo]") : said.index("Ctrl-C")]
        simulate.stop(signal.SIGINT)
    (tmp_path / "heliograph.toml").write_text(f"[api]\nport = 0\n{table}")
    with start(tmp_path, "serve") as serve:
        url = re.search(r"url=(\S+)", serve.wait_for("url="))
        assert url is not None
        done = run(tmp_path, "send", "--title", "x", "--wait", "0.1", ALIVE, HELIOGRAPH_URL=url[1])
        assert done.returncode == 4
        assert done.stdout.startswith("queued")


@pytest.mark.parametrize(
    "how,answer",
    [
        ([ALIVE], "OK"),
        ([ALIVE], "[]"),
        ([ALIVE], '{"state": "queued"}'),
        (["--json", ALIVE], "{}"),
        (["--tokens-file", "tokens.txt"], '{"status": "ok"}'),
    ],
)
def test_send_tells_a_stranger_from_heliograph(tmp_path: Path, how: list[str], answer: str) -> None:
    (tmp_path / "tokens.txt").write_text(ALIVE)
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        process = subprocess.Popen(
            [*PROGRAM, "send", "--title", "x", "--url", f"http://127.0.0.1:{stranger.getsockname()[1]}", *how],
            cwd=tmp_path,
            env=environment(tmp_path, HELIOGRAPH_KEY="hg_x"),
            stderr=subprocess.PIPE,
            text=True,
        )
        connection, _ = stranger.accept()
        with connection:
            connection.recv(65_536)
            connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(answer)}\r\n\r\n{answer}".encode())
            _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3
    assert "is not heliograph's API" in said
    assert "Traceback" not in said


def test_serve_reads_the_configuration_of_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "heliograph.toml").write_text("[api]\nport = 0\nprot = 1\n")
    done = run(tmp_path, "serve")
    assert done.returncode == 2
    assert done.stderr == "Error: heliograph.toml: api.prot is not a setting: did you mean port?\n"


def test_serve_on_a_taken_port_says_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(tmp_path, "serve", HELIOGRAPH_API__PORT=str(port))
    assert done.returncode == 2
    assert done.stderr == (
        f"Error: The port of the API, 127.0.0.1:{port}, is taken: stop what uses it, or set api.port\n"
    )


def test_serve_with_a_wrong_key_file_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "heliograph.toml").write_text(
        '[apps.shop]\ntopic = "com.example.shop"\nkey = "AuthKey_ABC123DEFG.p8"\nteam_id = "DEF123GHIJ"\n'
    )
    key = tmp_path / "AuthKey_ABC123DEFG.p8"
    key.write_text("-----BEGIN CERTIFICATE-----\n")
    key.chmod(0o644)
    done = run(tmp_path, "serve")
    assert done.returncode == 2
    assert f"run chmod 600 {key}" in done.stderr
    key.chmod(0o600)
    done = run(tmp_path, "serve")
    assert done.returncode == 2
    assert "The signing key is a certificate" in done.stderr


def test_serve_with_a_simulator_serves_apps_with_certificates_too(tmp_path: Path) -> None:
    private(tmp_path / "shop.pem", push_certificate("com.example.shop", environments=[Environment.PRODUCTION]).pem)
    (tmp_path / "heliograph.toml").write_text('[api]\nport = 0\n[apps.shop]\ncertificate = "shop.pem"\n')
    with start(tmp_path, "serve", "--simulator") as serve:
        done = run(tmp_path, "send", "--title", "x", ALIVE, **url_of(serve))
        assert done.returncode == 0, done.stderr


def test_a_simulator_leaves_the_data_folder_to_its_owner(tmp_path: Path) -> None:
    with serving(tmp_path):
        assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700


def test_the_log_has_a_level_by_option_and_by_variable(tmp_path: Path) -> None:
    with start(tmp_path, "serve", "--simulator", "--log-level", "debug", HELIOGRAPH_API__PORT="0") as serve:
        serve.wait_for("started")
        assert serve.stop(signal.SIGTERM) == 0
    (tmp_path / "heliograph.toml").write_text(f"[api]\nport = {unused_port()}\n")
    with start(tmp_path, "serve", "--json", HELIOGRAPH_LOG_LEVEL="warning") as serve:
        first = json.loads(serve.wait_for("\n").splitlines()[0])
        assert (first["level"], first["event"]) == ("warning", "no apps")
    wrong = run(tmp_path, "serve", HELIOGRAPH_LOG_LEVEL="loud")
    assert wrong.returncode == 2
    assert "'loud' is not one of 'debug', 'info', 'warning', 'error'" in wrong.stderr


def test_config_shows_what_counts_and_where_it_is_from(tmp_path: Path) -> None:
    (tmp_path / "heliograph.toml").write_text('[apps."shop.eu"]\ncertificate = "shop.p12"\n')
    done = run(tmp_path, "config", HELIOGRAPH_API__PORT="9000", HELIOGRAPH_APPS__SHOP_EU__PORT="2197")
    assert done.returncode == 0, done.stderr
    found = {line.partition("  #")[0].strip(): line.partition("# ")[2] for line in done.stdout.splitlines()}
    assert found["port = 9000"] == "HELIOGRAPH_API__PORT"
    assert found['host = "127.0.0.1"'] == "default"
    assert found[f'certificate = "file:{tmp_path}/shop.p12"'] == "heliograph.toml"
    assert '[apps."shop.eu"]' in found
    (tmp_path / "again.toml").write_text(done.stdout)
    again = run(tmp_path, "config", "--json", "--config", "again.toml")
    assert {"name": 'apps."shop.eu".port', "value": 2197, "from": "again.toml"} in json.loads(again.stdout)["settings"]
    wrong = run(tmp_path, "config", HELIOGRAPH_API_PORT="9000")
    assert wrong.returncode == 2
    assert wrong.stderr == "Error: HELIOGRAPH_API_PORT is not a setting: did you mean HELIOGRAPH_API__PORT?\n"


def test_serve_twice_on_one_data_folder_is_refused(tmp_path: Path, server: dict[str, str]) -> None:
    done = run(tmp_path, "serve", HELIOGRAPH_API__PORT="0")
    assert done.returncode == 1
    assert "in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_serve_twice_with_one_configuration_names_the_first(tmp_path: Path) -> None:
    (tmp_path / "heliograph.toml").write_text(f"[api]\nport = {unused_port()}\n")
    with start(tmp_path, "serve") as first:
        url_of(first)
        done = run(tmp_path, "serve")
    assert done.returncode == 1
    assert f"is in use by process {first.process.pid}." in done.stderr


def test_logs_are_json_where_asked_for_and_tell_no_secret(tmp_path: Path) -> None:
    with start(tmp_path, "serve", "--simulator", "--log-format", "json", HELIOGRAPH_API__PORT="0") as serve:
        first = json.loads(serve.wait_for("\n").splitlines()[0])
        assert (first["event"], first["level"], first["apps"]) == ("started", "info", ["demo"])
        assert run(tmp_path, "send", "--title", "x", ALIVE, HELIOGRAPH_URL=first["url"]).returncode == 0
        assert serve.stop(signal.SIGINT) == 0
        said = serve.said()
    assert [json.loads(line)["event"] for line in said.splitlines()] == [
        "started",
        "first_accepted",
        "stopping",
        "stopped",
    ]
    assert ALIVE not in said
    assert (tmp_path / "data" / "api-key").read_text().strip() not in said


# -- simulate --------------------------------------------------------------------------------------------------------


@pytest.mark.peer("curl")
def test_simulate_prints_a_curl_line_that_works_as_pasted(tmp_path: Path) -> None:
    if "HTTP2" not in subprocess.run([need("curl"), "--version"], capture_output=True, text=True, check=True).stdout:
        pytest.skip("this curl speaks no HTTP/2")
    with start(tmp_path, "simulate", "--port", "0", "--folder", "apple", "--journal", "journal") as simulate:
        said = simulate.wait_for("Ctrl-C ends it.")
        assert paste(pasted(said, 0), tmp_path).startswith("HTTP/2 200")
        assert json.loads((tmp_path / "journal").read_text())["token"] == ALIVE
        assert simulate.stop(signal.SIGINT) == 130
        assert "Traceback" not in simulate.said()
    assert stat.S_IMODE((tmp_path / "apple" / "AuthKey_HELIOGRAPH.p8").stat().st_mode) == 0o600


def test_simulate_and_serve_work_together_as_the_printed_configuration_says(tmp_path: Path) -> None:
    with start(tmp_path, "simulate", "--port", "0", "--folder", "apple") as simulate:
        said = simulate.wait_for("Ctrl-C ends it.")
        table = said[said.index("[apps.demo]") : said.index("Ctrl-C")]
        (tmp_path / "heliograph.toml").write_text(f"[api]\nport = 0\n{table}")
        with start(tmp_path, "serve") as serve:
            url = re.search(r"url=(\S+)", serve.wait_for("url="))
            assert url is not None
            assert run(tmp_path, "send", "--title", "x", ALIVE, HELIOGRAPH_URL=url[1]).returncode == 0


def test_simulate_on_a_taken_port_says_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run(tmp_path, "simulate", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert "name another port" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["heliograph", "-m heliograph"])
def test_ctrl_c_while_the_program_is_imported_ends_it_without_a_word(tmp_path: Path, name: str) -> None:
    (tmp_path / "click.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit(9)\n")
    program = [str(Path(sys.executable).with_name(name))] if name == "heliograph" else PROGRAM
    done = subprocess.run(
        [*program, "app", "list"],
        env=environment(tmp_path, PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


# -- apps and credentials --------------------------------------------------------------------------------------------


def private(path: Path, content: bytes) -> Path:
    path.touch(0o600)
    path.write_bytes(content)
    return path


@pytest.fixture
def far_side(tmp_path: Path) -> Iterator[str]:
    """A simulator; the lines of a configuration that lead to it."""
    with start(tmp_path, "simulate", "--port", "0", "--folder", "apple") as simulate:
        said = simulate.wait_for("Ctrl-C ends it.")
        yield said[said.index("[apps.demo]") : said.index("Ctrl-C")]


def url_of(started: Started) -> dict[str, str]:
    found = re.search(r"url=(\S+)", started.wait_for("url="))
    assert found is not None
    return {"HELIOGRAPH_URL": found[1]}


def test_sighup_reads_the_apps_of_the_configuration_again(tmp_path: Path, far_side: str) -> None:
    config = tmp_path / "heliograph.toml"
    config.write_text(f"[api]\nport = 0\n{far_side}")
    with start(tmp_path, "serve") as serve:
        url = url_of(serve)
        config.write_text(f"[api]\nport = 0\n{far_side}{far_side.replace('apps.demo', 'apps.shop')}")
        serve.process.send_signal(signal.SIGHUP)
        serve.wait_for("reloaded")
        done = run(tmp_path, "send", "--app", "shop", "--title", "x", ALIVE, **url)
        assert done.returncode == 0, done.stderr
        config.write_text("[apps.shop]\nprot = 1\n")
        serve.process.send_signal(signal.SIGHUP)
        assert "apps.shop.prot is not a setting" in serve.wait_for("configuration_kept")
        assert serve.said().count("reloaded") == 1
        (tmp_path / "own.toml").touch()
        done = run(tmp_path, "send", "--config", "own.toml", "--app", "shop", "--title", "x", ALIVE, **url)
        assert done.returncode == 0, done.stderr
        assert serve.stop(signal.SIGTERM) == 0


def test_an_app_is_added_shown_and_removed_while_the_server_runs(tmp_path: Path, far_side: str) -> None:
    values = dict(re.findall(r'^(\w+) = "?([^"\n]*)"?$', far_side, re.MULTILINE))
    with start(tmp_path, "serve", HELIOGRAPH_API__PORT="0") as serve:
        url = url_of(serve)
        add = ["app", "add", "till", "--key", values["key"], "--team-id", values["team_id"], "--topic", values["topic"]]
        to = ["--host", values["host"], "--port", values["port"], "--ca", values["ca"]]
        done = run(tmp_path, *add, *to, **url)
        assert done.returncode == 0, done.stderr
        assert "credentials  HELIOGRAPH  signing key  production  no end" in done.stdout
        assert run(tmp_path, "send", "--title", "x", ALIVE, **url).returncode == 0
        assert run(tmp_path, "app", "list", **url).stdout == "till  com.example.demo  production  api\n"
        assert json.loads(run(tmp_path, "app", "show", "till", "--json", **url).stdout)["name"] == "till"
        said = run(tmp_path, "credentials", "list", **url).stdout
        assert said == "till  HELIOGRAPH  signing key  production  no end\n"
        assert run(tmp_path, "app", "remove", "till", **url).stdout == "till is removed.\n"
        lost = run(tmp_path, "app", "remove", "till", **url)
        assert (lost.returncode, lost.stderr) == (1, "Error: There is no app 'till'. Known apps: none\n")
        wrong = run(tmp_path, *add, "--port", "80", **url)
        assert wrong.returncode == 1
        assert "Apple listens on 443 and 2197" in wrong.stderr
        assert "BEGIN PRIVATE KEY" not in serve.said()


def test_an_app_with_several_credentials_is_added_from_a_configuration(tmp_path: Path, far_side: str) -> None:
    values = dict(re.findall(r'^(\w+) = "?([^"\n]*)"?$', far_side, re.MULTILINE))
    topic = values["topic"]
    issued = push_certificate(topic, environments=[Environment.DEVELOPMENT])
    private(tmp_path / "till.p12", issued.p12(b"tea"))
    private(tmp_path / "word", b"tea\n")
    (tmp_path / "till.toml").write_text(
        f'[apps.till]\ntopic = "{topic}"\nhost = "localhost"\nport = {values["port"]}\nca = "{values["ca"]}"\n'
        f'[[apps.till.credentials]]\nkey = "{values["key"]}"\nteam_id = "{values["team_id"]}"\n'
        'environment = "production"\n'
        '[[apps.till.credentials]]\ncertificate = "till.p12"\npassphrase = "file:word"\n'
    )
    with start(tmp_path, "serve", HELIOGRAPH_API__PORT="0") as serve:
        url = url_of(serve)
        done = run(tmp_path, "app", "add", "till", "--from", "till.toml", **url)
        assert done.returncode == 0, done.stderr
        said = run(tmp_path, "credentials", "list", **url).stdout.splitlines()
        assert [line.split("  ")[:4] for line in said] == [
            ["till", "HELIOGRAPH", "signing key", "production"],
            [
                "till",
                issued.loaded().fingerprint[:16],
                "certificate Apple Push Services: com.example.shop",
                f"development for {topic}",
            ],
        ]
        sent = run(tmp_path, "send", "--title", "x", "--environment", "production", ALIVE, **url)
        assert sent.returncode == 0, sent.stderr
        for arguments, words in (
            (["shop", "--from", "till.toml"], "till.toml has no [apps.shop]: it has till"),
            (["till", "--from", "till.toml", "--topic", "x"], "--from says all there is to say of the app"),
            (["till", "--from", "absent"], "'absent' does not exist"),
        ):
            wrong = run(tmp_path, "app", "add", *arguments, **url)
            assert wrong.returncode == 2
            assert words in wrong.stderr


def test_credentials_of_an_app_are_added_replaced_and_removed_one_by_one(tmp_path: Path, far_side: str) -> None:
    values = dict(re.findall(r'^(\w+) = "?([^"\n]*)"?$', far_side, re.MULTILINE))
    team = ["--team-id", values["team_id"]]
    first = ["--key", values["key"], *team, "--topic", values["topic"]]
    to = ["--host", values["host"], "--port", values["port"], "--ca", values["ca"]]
    private(tmp_path / "AuthKey_NEWKEYNEWK.p8", Path(tmp_path / values["key"]).read_bytes())
    issued = push_certificate(values["topic"], environments=[Environment.DEVELOPMENT])
    private(tmp_path / "till.p12", issued.p12(b"tea"))
    private(tmp_path / "word", b"tea\n")
    with start(tmp_path, "serve", HELIOGRAPH_API__PORT="0") as serve:
        url = url_of(serve)
        assert run(tmp_path, "app", "add", "till", *first, *to, **url).returncode == 0

        def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
            return run(tmp_path, "credentials", *arguments, **url)

        done = ask("add", "till", "--certificate", "till.p12", "--passphrase-file", "word")
        assert done.returncode == 0, done.stderr
        its = issued.loaded().fingerprint[:16]
        assert f"credentials  {its}  certificate Apple Push Services" in done.stdout
        new = ["add", "till", "--key", "AuthKey_NEWKEYNEWK.p8", *team]
        refused = ask(*new)
        assert refused.returncode == 1
        assert "as HELIOGRAPH stands before it and opens the same: have it replace HELIOGRAPH" in refused.stderr
        shown = json.loads(ask(*new, "--replace", "HELIOGRAPH", "--json").stdout)
        assert [each["id"] for each in shown["credentials"]] == ["NEWKEYNEWK", its]
        removed = ask("remove", "till", its)
        assert (removed.returncode, removed.stdout) == (0, f"{its} is removed from till.\n")
        assert json.loads(ask("remove", "till", its, "--json").stdout)["error"]["code"] == "UnknownCredential"
        last = ask("remove", "till", "NEWKEYNEWK")
        assert (last.returncode, "remove the app" in last.stderr) == (1, True)
        assert ask("list").stdout == "till  NEWKEYNEWK  signing key  production  no end\n"
        for command in (["credentials", "add"], ["app", "add"]):
            teamless = run(tmp_path, *command, "till", "--key", "AuthKey_NEWKEYNEWK.p8", **url)
            assert (teamless.returncode, "shows it: add --team-id." in teamless.stderr) == (2, True)
        nothing = ask("add", "till")
        assert (nothing.returncode, "What was sent has no credentials: add key" in nothing.stderr) == (1, True)
        assert "BEGIN PRIVATE KEY" not in serve.said()


def test_what_was_given_up_on_is_listed_and_replayed(tmp_path: Path, server: dict[str, str]) -> None:
    none = run(tmp_path, "buried", "list", **server)
    assert (none.returncode, none.stdout, none.stderr) == (0, "", "There are none.\n")
    done = run(tmp_path, "buried", "replay", "01a1b2c3-d4e5-7000-8000-000000000001", **server)
    assert done.returncode == 1
    assert "is not among what was given up on" in done.stdout


def test_inspect_says_what_a_file_is_and_until_when(tmp_path: Path) -> None:
    issued = push_certificate("com.example.shop")
    file = private(tmp_path / "shop.p12", issued.p12(b"tea"))
    word = private(tmp_path / "word", b"tea\n")
    done = run(tmp_path, "credentials", "inspect", str(file), "--passphrase-file", str(word))
    assert done.returncode == 0, done.stdout
    assert "certificate with private key" in done.stdout
    assert "topics       com.example.shop" in done.stdout
    assert "364 days left" in done.stdout
    locked = run(tmp_path, "credentials", "inspect", str(file), "--json")
    assert locked.returncode == 1
    (told,) = json.loads(locked.stdout)["files"]
    assert told["kind"] == "file under a passphrase"
    assert "passphrase" in told["problems"][0]


def test_inspect_takes_the_key_of_a_certificate_from_a_file_of_its_own(tmp_path: Path) -> None:
    issued = push_certificate("com.example.shop", now=datetime.now(UTC) - timedelta(days=400))
    file = private(tmp_path / "aps.cer", issued.certificate_der)
    key = private(tmp_path / "aps.key", issued.key_pem)
    alone = run(tmp_path, "credentials", "inspect", str(file))
    assert "certificate without private key" in alone.stdout
    done = run(tmp_path, "credentials", "inspect", str(file), "--key", str(key))
    assert done.returncode == 1
    assert re.search(r"ends +20\d\d-\d\d-\d\d, ended \d+ days ago", done.stdout)
    assert "problem      The certificate has ended" in done.stdout


def test_inspect_reads_no_device_and_no_end_of_a_file(tmp_path: Path) -> None:
    private(tmp_path / "long", bytes(70_000))
    done = run(tmp_path, "credentials", "inspect", "/dev/zero", "long")
    assert done.returncode == 1
    assert done.stderr == ""
    for said in ("/dev/zero is a device: name a file", "long is longer than"):
        assert f"problem      {said}" in done.stdout


def test_the_master_key_is_rotated(tmp_path: Path, server: dict[str, str]) -> None:
    path = tmp_path / "data" / "master-key"
    before = path.read_text()
    done = run(tmp_path, "credentials", "rotate-master-key")
    assert done.returncode == 0, done.stderr
    assert path.read_text().endswith(before)
    assert path.read_text() != before
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    told = run(tmp_path, "credentials", "rotate-master-key", "--json")
    assert json.loads(told.stdout) == {"master_key": str(path)}
    lost = run(tmp_path, "credentials", "rotate-master-key", HELIOGRAPH_DATA=str(tmp_path / "elsewhere"))
    assert lost.returncode == 2
    assert "There is no master key at" in lost.stderr


# -- doctor ----------------------------------------------------------------------------------------------------------


def examine(folder: Path, *arguments: str, **more: str) -> tuple[int, dict[str, list[tuple[str, str]]]]:
    """Its exit code, and level and text by what was looked at."""
    done = run(folder, "doctor", "--json", *arguments, **more)
    assert done.stderr == ""
    told = json.loads(done.stdout)
    assert told["well"] == (done.returncode == 0)
    found: dict[str, list[tuple[str, str]]] = {}
    for each in told["findings"]:
        found.setdefault(each["about"], []).append((each["level"], each["text"]))
    return done.returncode, found


def test_doctor_finds_all_well_and_proves_the_credentials(tmp_path: Path, far_side: str) -> None:
    (tmp_path / "heliograph.toml").write_text(f"[api]\nport = 0\n{far_side}")
    with start(tmp_path, "serve") as serve:
        url_of(serve)
        code, found = examine(tmp_path, "--send")
        assert code == 0, found
        assert {level for each in found.values() for level, _ in each} == {"ok"}
        assert found["database lock"] == [("ok", f"held by process {serve.process.pid}")]
        assert found["database"][0][1].startswith("sound, ")
        assert found["app demo"] == [("ok", "signing key HELIOGRAPH of team SIMULATION, for production")]
        assert found["app demo, production"] == [("ok", "the signing key HELIOGRAPH is taken for com.example.demo")]
        (place,) = (about for about in found if about.startswith("localhost:"))
        assert found[place] == [("ok", "reached, TLSv1.3 and HTTP/2, its certificate is good")]
    said = run(tmp_path, "doctor", "--offline")
    assert said.returncode == 0
    assert "ok        database lock: free: no server runs on it\n" in said.stdout
    assert "localhost:" not in said.stdout


def test_doctor_sees_the_apps_that_a_running_server_was_given(tmp_path: Path) -> None:
    (tmp_path / "heliograph.toml").write_text(f"[api]\nport = {unused_port()}\n")
    file = private(tmp_path / "shop.pem", push_certificate("com.example.shop", days=20).pem)
    with start(tmp_path, "serve") as serve:
        serve.wait_for("url=")
        added = run(tmp_path, "app", "add", "shop", "--certificate", str(file))
        assert added.returncode == 0, added.stderr
        code, found = examine(tmp_path, "--offline")
        assert code == 0
        assert found["port of the API"][0][1].startswith("the server answers on ")
        ((level, text),) = found["app shop"]
        assert level == "warning"
        assert "added by the API: 19 days left" in text
        assert "apps" not in found
        assert found["API key"] == [("ok", "the server's own, may send, read, manage for all apps")]
        found = examine(tmp_path, "--offline", HELIOGRAPH_KEY="hg_wrong")[1]
        assert found["apps"][0][0] == "warning"
        assert "API key" not in found
        key = run(tmp_path, "keys", "add", "web", "--app", "shop").stdout.strip()
        found = examine(tmp_path, "--offline", HELIOGRAPH_KEY=key)[1]
        assert found["API key"] == [("ok", "web, may send for shop")]
        assert "the scope manage: yours has send" in found["apps"][0][1]


def test_doctor_sees_the_demo_app_of_a_server_with_a_simulator(tmp_path: Path) -> None:
    (tmp_path / "heliograph.toml").write_text(f"[api]\nport = {unused_port()}\n")
    with start(tmp_path, "serve", "--simulator") as serve:
        serve.wait_for("url=")
        found = examine(tmp_path, "--offline")[1]
        assert "apps" not in found
        ((level, text),) = found["app demo"]
        assert (level, text.endswith("from the running server's own configuration")) == ("ok", True)
    assert "every notification is refused" in examine(tmp_path, "--offline")[1]["apps"][0][1]


def test_doctor_tries_the_master_key_on_stored_apps(tmp_path: Path) -> None:
    file = private(tmp_path / "shop.pem", push_certificate("com.example.shop").pem)
    with start(tmp_path, "serve", HELIOGRAPH_API__PORT="0") as serve:
        added = run(tmp_path, "app", "add", "shop", "--certificate", str(file), **url_of(serve))
        assert added.returncode == 0, added.stderr
        assert serve.stop(signal.SIGTERM) == 0
    key = tmp_path / "data" / "master-key"
    without_port = {"HELIOGRAPH_API__PORT": "0"}
    code, found = examine(tmp_path, "--offline", **without_port)
    assert code == 0, found
    assert found["master key"] == [("ok", f"{key}, opens 1 stored app")]
    assert "apps" not in found
    key.rename(tmp_path / "kept")
    code, found = examine(tmp_path, "--offline", **without_port)
    assert code == 1
    assert found["master key"][0][1].startswith(f"{key} is gone, and the database has apps that only it opens (shop)")
    assert not key.exists()
    private(key, b64encode(bytes(32)))
    ((level, text),) = examine(tmp_path, "--offline", **without_port)[1]["master key"]
    assert level == "problem"
    assert "sealed with a master key that is not here" in text


def test_doctor_does_not_advise_a_backup_where_the_folder_cannot_be_written(tmp_path: Path) -> None:
    with start(tmp_path, "serve", HELIOGRAPH_API__PORT="0") as serve:
        url_of(serve)
        assert serve.stop(signal.SIGTERM) == 0
    # SQLite cannot make its shared memory, as in a folder that is read-only; modes alone do not stop root.
    (tmp_path / "data" / "heliograph.db-shm").symlink_to(tmp_path / "nowhere" / "file")
    code, found = examine(tmp_path, "--offline", HELIOGRAPH_API__PORT="0")
    assert code == 1
    ((level, text),) = found["database"]
    assert level == "problem"
    assert "cannot be written by this user" in text
    assert "backup" not in text


def test_doctor_names_credentials_that_apple_does_not_take(tmp_path: Path, far_side: str) -> None:
    (tmp_path / "heliograph.toml").write_text(far_side.replace("SIMULATION", "OTHERTEAM1"))
    code, found = examine(tmp_path, "--send")
    assert code == 1
    ((level, text),) = found["app demo, production"]
    assert level == "problem"
    assert text.startswith("the answer to the signing key HELIOGRAPH is 403 InvalidProviderToken: ")


def test_doctor_tells_what_is_wrong_on_this_machine(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir(0o700)
    data.chmod(0o755)
    (data / "heliograph.db").write_bytes(b"no database" * 100)
    (data / "heliograph.db").chmod(0o644)
    private(data / "master-key", b"damaged")
    os.utime(data / "master-key", (time.time() + 86_400,) * 2)
    ended = push_certificate("com.example.shop", now=datetime.now(UTC) - timedelta(days=400))
    soon = push_certificate("com.example.till", uid="com.example.till", days=10)
    apps = {"shop": private(tmp_path / "shop.pem", ended.pem), "till": private(tmp_path / "till.pem", soon.pem)}
    apps["lost"] = tmp_path / "absent.p12"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        tables = "".join(f'[apps.{name}]\ncertificate = "{file}"\n' for name, file in apps.items())
        (tmp_path / "heliograph.toml").write_text(f"[api]\nport = {port}\n{tables}")
        done = subprocess.Popen(
            [*PROGRAM, "doctor", "--offline", "--json"],
            cwd=tmp_path,
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            text=True,
        )
        said, _ = done.communicate(timeout=PATIENCE_S)
    assert done.returncode == 1
    found: dict[str, list[Any]] = {}
    for each in json.loads(said)["findings"]:
        found.setdefault(each["about"], []).append((each["level"], each["text"]))
    assert found["clock"][0][0] == "problem"
    assert found["data folder"] == [
        ("warning", f"every user of this machine can look into {data}: run chmod 700 {data}")
    ]
    assert found["heliograph.db"][0][1].endswith(f"run chmod 600 {data / 'heliograph.db'}")
    assert found["master key"][0][0] == "problem"
    assert "put it back from a backup" in found["database"][0][1]
    assert found["port of the API"] == [
        ("problem", f"another program listens on 127.0.0.1:{port}: stop it, or set api.port")
    ]
    assert re.search("it ended [0-9]+ days ago, make a new one", found["app shop"][0][1])
    assert found["app till"][0][0] == "warning"
    assert "9 days left" in found["app till"][0][1]
    assert "there is no file" in found["app lost"][0][1]


def listener(**settings: str | int) -> str:
    lines = {"port": 0, "feedback_port": 0, **settings}
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in lines.items())


def test_doctor_looks_at_the_listeners_of_a_server_that_runs(tmp_path: Path) -> None:
    tables = f"[legacy.main]\n{listener()}[apple_proxy.main]\nport = 0\n"
    (tmp_path / "heliograph.toml").write_text(f"[api]\nport = 0\n{tables}")
    _, found = examine(tmp_path, "--offline")
    assert found["legacy.main"] == [("ok", "its certificate is made on the first start")]
    assert not (tmp_path / "data" / "doors.pem").exists()
    with start(tmp_path, "serve") as serve:
        url_of(serve)
        _, found = examine(tmp_path, "--offline")
    for name in ("legacy.main", "apple_proxy.main"):
        ((level, text),) = found[name]
        assert level == "ok"
        assert re.fullmatch(r"its certificate, made by heliograph, .*doors-ca\.pem: 79[0-9] days left", text)
    (tmp_path / "data" / "doors-ca-key.pem").chmod(0o644)
    assert examine(tmp_path, "--offline")[1]["doors-ca-key.pem"][0][1].startswith("every user of this machine can read")


def test_doctor_tells_what_is_wrong_and_what_is_dangerous_of_listeners(tmp_path: Path) -> None:
    ended = push_certificate("com.example.shop", now=datetime.now(UTC) - timedelta(days=400))
    soon = push_certificate("com.example.till", days=10)
    ended_file = private(tmp_path / "ended.pem", ended.pem)
    soon_file = private(tmp_path / "soon.pem", soon.pem)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (tmp_path / "heliograph.toml").write_text(
            f"[api]\nport = 0\n"
            f"[legacy.ended]\n{listener(port=port, certificate=str(ended_file))}"
            f"[legacy.open]\n{listener(host='0.0.0.0', app='shop', minimum_tls='1.0')}"
            f"[legacy.own]\n{listener(app='shop', minimum_tls='1.3')}"
            f"[legacy.unclear]\n{listener(app='twofold')}"
            f"[apple_proxy.soon]\nport = 0\ncertificate = {json.dumps(str(soon_file))}\n"
            f"[apple_proxy.lost]\nport = 0\ncertificate = 'lost.pem'\n"
            f"[apple_proxy.bare]\nport = 0\ntls = false\n"
            "[apps.twofold]\nkey = 'AuthKey_ABC123DEFG.p8'\nteam_id = 'DEF123GHIJ'\n"
            "topic = 'com.example.twofold'\nenvironment = 'both'\n"
        )
        code, found = examine(tmp_path, "--offline")
    assert code == 1
    advice = "stop what is there, or set another host or port"
    assert found["legacy.ended.port"] == [
        ("problem", f"127.0.0.1:{port} cannot be listened on (Address already in use): {advice}")
    ]
    ((level, text),) = found["legacy.ended"]
    assert (level, bool(re.search("it ended [0-9]+ days ago, put a new one there", text))) == ("problem", True)
    (_, (level, text), (other, minimum)) = found["legacy.open"]
    assert (level, other) == ("warning", "warning")
    assert text.startswith("whoever reaches 0.0.0.0 may send for shop without a certificate")
    assert minimum.startswith('minimum_tls = "1.0": whoever is on the way can read along')
    assert [level for level, _ in found["legacy.own"]] == ["ok"]
    assert found["legacy.unclear"][1] == (
        "problem",
        "the app twofold has both environments, so its clients are refused: set environment",
    )
    assert found["apple_proxy.soon"] == [
        ("warning", "its certificate: 9 days left, put a new one there, and restart the server")
    ]
    assert found["apple_proxy.lost"][0][0] == "problem"
    assert "there is no file" in found["apple_proxy.lost"][0][1]
    assert found["apple_proxy.bare"] == [("ok", "without TLS, for programs on this machine")]


def refuse(proxy: socket.socket) -> None:
    proxy.settimeout(PATIENCE_S)
    accepted, _ = proxy.accept()
    with accepted:
        accepted.recv(4096)
        accepted.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")


def test_doctor_tells_where_the_way_to_apple_ends(tmp_path: Path, far_side: str) -> None:
    def there(lines: str) -> str:
        (tmp_path / "heliograph.toml").write_text(lines)
        code, found = examine(tmp_path)
        assert code == 1
        (text,) = (each[0][1] for about, each in found.items() if ":" in about)
        return text

    gone = re.sub("port = [0-9]+", f"port = {unused_port()}", far_side)
    assert "cannot be reached" in there(gone)
    assert "is not known here" in there(far_side.replace('host = "localhost"', 'host = "nowhere.invalid"'))
    assert "of an authority that is not trusted here" in there(re.sub('ca = ".*"', "", far_side))
    through = there(far_side + f'proxy = "http://127.0.0.1:{unused_port()}"\n')
    assert "the proxy 127.0.0.1:" in through
    with socket.create_server(("127.0.0.1", 0)) as proxy, ThreadPoolExecutor(1) as beside:
        said_no = beside.submit(refuse, proxy)
        refused = there(far_side + f'proxy = "http://127.0.0.1:{proxy.getsockname()[1]}"\n')
        said_no.result()
    assert "wants credentials (HTTP/1.1 407 " in refused
    assert "cannot be reached" not in refused
    with socket.create_server(("127.0.0.1", 0)) as silent:
        (tmp_path / "heliograph.toml").write_text(
            re.sub("port = [0-9]+", f"port = {silent.getsockname()[1]}", far_side)
        )
        process = subprocess.Popen(
            [*PROGRAM, "doctor"], cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, text=True
        )
        accepted, _ = silent.accept()
        accepted.close()
        said, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "the TLS handshake failed" in said


def test_doctor_reads_a_configuration_that_cannot_be_read_no_further(tmp_path: Path) -> None:
    (tmp_path / "heliograph.toml").write_text("prot = 1\n")
    done = run(tmp_path, "doctor")
    assert done.returncode == 1
    assert done.stdout.startswith("problem   configuration: heliograph.toml: prot is not a setting")
    assert run(tmp_path, "doctor", "--offline", "--send").returncode == 2
