"""`heliograph simulate` as people use it: the real program, the lines that it prints, curl and Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from heliograph.model import DeviceToken, PushType
from heliograph.protocols.binary import ErrorReader, ErrorResponse, Status, enhanced_frame
from heliograph.simulator.devices import KEEP, Received, Shown
from heliograph.simulator.watching import Watcher
from tests.certificates import authority, push_certificate
from tests.programs import need
from tests.service.pushing import TOPIC, push
from tests.service.test_cli import ALIVE, PATIENCE_S, PROGRAM, environment, paste, pasted, run, start

ONE = "aa" * 32
SIMULATE = ["simulate", "--port", "0", "--folder", "apple"]


class Simulating:
    """The program with `--json`: what it says, line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.first = self.line()

    def line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        told: dict[str, Any] = json.loads(self.process.stdout.readline())
        return told

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.first["control"] + path, timeout=PATIENCE_S) as answer:
            content: bytes = answer.read()
        return content

    def push(self, token: str = ONE, payload: bytes = b'{"aps":{"alert":"Hello"}}') -> tuple[int, Any]:
        return push(self.first["port"], self.get("/ca.pem"), self.get("/provider-token").decode(), token, payload)

    def stop(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.process.wait(PATIENCE_S)


@contextmanager
def simulating(folder: Path, *options: str) -> Iterator[Simulating]:
    with (folder / "errors").open("wb") as errors:
        process = subprocess.Popen(
            [*PROGRAM, *SIMULATE, "--json", *options],
            cwd=folder,
            env=environment(folder),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        yield Simulating(process)
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        assert process.stdout is not None
        process.stdout.close()
    assert (folder / "errors").read_text().strip() == ""  # Ctrl-C ends the line that it stands in


@pytest.fixture
def curl() -> None:
    if "HTTP2" not in subprocess.run([need("curl"), "--version"], capture_output=True, text=True, check=True).stdout:
        pytest.skip("this curl speaks no HTTP/2")


@pytest.mark.peer("curl")
@pytest.mark.usefixtures("curl")
def test_a_stranger_pastes_the_printed_lines_and_sees_the_push(tmp_path: Path) -> None:
    with start(tmp_path, *SIMULATE, "--watch") as simulate:
        said = simulate.wait_for("What devices show comes here:")
        assert paste(pasted(said, 0), tmp_path).startswith("HTTP/2 200")
        assert json.loads(paste(pasted(said, 1), tmp_path))["shown"][0]["payload"] == {"aps": {"alert": "Hello"}}
        said = simulate.wait_for("alert         Hello\n")
        assert re.search(r"^\d\d:\d\d:\d\d\.\d{3}  a1b2c3d4\.\.\.  alert         Hello$", said, re.MULTILINE)
        assert "\x1b" not in said
        assert simulate.stop(signal.SIGINT) == 130
        assert "Traceback" not in simulate.said()


@pytest.mark.peer("curl")
@pytest.mark.usefixtures("curl")
def test_a_strict_one_prints_how_to_register_first(tmp_path: Path) -> None:
    with start(tmp_path, *SIMULATE, "--strict", "--environment", "development") as simulate:
        said = simulate.wait_for("Ctrl-C ends it.")
        assert "(development, registered devices only)" in said
        assert 'environment = "development"' in said
        assert paste(pasted(said, 1), tmp_path).startswith("HTTP/2 400")
        assert json.loads(paste(pasted(said, 0), tmp_path))["state"] == "installed"
        assert paste(pasted(said, 1), tmp_path).startswith("HTTP/2 200")


def test_programs_read_json_lines_where_it_listens_first_then_what_is_shown(tmp_path: Path) -> None:
    with simulating(tmp_path) as simulate:
        assert simulate.first["url"] == f"https://127.0.0.1:{simulate.first['port']}"
        assert simulate.first["strict"] is False
        assert simulate.push() == (200, None)
        line = simulate.line()
        assert (line["number"], line["token"], line["payload"]) == (1, ONE, {"aps": {"alert": "Hello"}})
        assert simulate.stop(signal.SIGTERM) == 0


def test_the_control_port_is_the_next_free_one_or_the_one_that_was_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(tmp_path, *SIMULATE, "--control-port", str(port))
        assert done.returncode == 2
        assert f"The control API cannot listen on 127.0.0.1:{port}" in done.stderr
        assert "name another port" in done.stderr
    with simulating(tmp_path, "--control-port", str(port)) as simulate:
        assert simulate.first["control"] == f"http://127.0.0.1:{port}"
        with socket.create_server(("127.0.0.1", 0)) as other:
            free = other.getsockname()[1]
        with start(tmp_path, "simulate", "--port", str(free)) as second:
            found = re.search(r"control +http://127.0.0.1:(\d+)", second.wait_for("control"))
            assert found is not None
            assert free < int(found[1]) <= free + 20
            assert int(found[1]) != port


def test_a_fault_script_is_in_force_from_the_start(tmp_path: Path) -> None:
    (tmp_path / "faults.toml").write_text(
        '[[rules]]\naction = {kind = "answer", status = 503, reason = "Shutdown"}\ntimes = 1\n'
    )
    with simulating(tmp_path, "--faults", "faults.toml") as simulate:
        assert simulate.push() == (503, "Shutdown")
        assert simulate.push() == (200, None)


@pytest.mark.parametrize(
    "name, script",
    [
        ("empty.toml", ""),
        ("singular.toml", '[[rule]]\naction = {kind = "close"}'),
        ("empty.json", "{}"),
        ("bare.json", '{"kind": "close"}'),
    ],
)
def test_a_fault_script_without_rules_is_told_how_they_begin(tmp_path: Path, name: str, script: str) -> None:
    (tmp_path / name).write_text(script)
    done = run(tmp_path, *SIMULATE, "--faults", name)
    assert done.returncode == 2
    assert f"{name}: There are no rules in it: in TOML each begins with [[rules]]" in done.stderr


def test_a_host_that_is_not_here_is_not_called_a_matter_of_the_port(tmp_path: Path) -> None:
    done = run(tmp_path, *SIMULATE, "--host", "192.0.2.1")
    assert done.returncode == 2
    assert re.search(r"cannot listen on 192\.0\.2\.1:0 \(.+\): name an address of this machine\n$", done.stderr)


def test_a_fault_script_with_a_mistake_is_told_before_anything_listens(tmp_path: Path) -> None:
    (tmp_path / "faults.json").write_text('[{"action": {"kind": "clsoe"}}]')
    done = run(tmp_path, *SIMULATE, "--faults", "faults.json")
    assert done.returncode == 2
    assert done.stderr.endswith("faults.json: Rule 1: action.kind: there is no action 'clsoe': did you mean close?\n")
    assert not (tmp_path / "apple").exists()


def test_client_certificates_of_a_named_authority_are_taken(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(authority().pem)
    (tmp_path / "client.pem").write_bytes(push_certificate(TOPIC, uid=TOPIC).pem)
    with simulating(tmp_path, "--client-ca", "ca.pem") as simulate:
        ca = simulate.get("/ca.pem")
        assert push(simulate.first["port"], ca, tmp_path / "client.pem", ONE) == (200, None)
        assert push(simulate.first["port"], ca, tmp_path / "client.pem", ONE, apns_topic="x.y")[1] == "TopicDisallowed"
        assert simulate.push() == (200, None)
    done = run(tmp_path, *SIMULATE, "--client-ca", "absent.pem")
    assert done.returncode == 2
    assert "authorities of clients in absent.pem cannot be read" in done.stderr


def test_it_ends_when_its_reader_had_enough(tmp_path: Path) -> None:
    with simulating(tmp_path) as simulate:
        assert simulate.process.stdout is not None
        simulate.process.stdout.close()
        simulate.push()
        assert simulate.process.wait(PATIENCE_S) == 1


def test_it_works_and_ends_where_its_stdout_is_closed(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        port, control = one.getsockname()[1], two.getsockname()[1]
    ports = ["--port", f"{port}", "--control-port", f"{control}"]
    process = subprocess.Popen(
        ["sh", "-c", 'exec "$0" "$@" >&-', *PROGRAM, *SIMULATE, *ports, "--watch"],
        cwd=tmp_path,
        env=environment(tmp_path),
        stderr=subprocess.PIPE,
    )
    token = ""
    try:
        while not token and process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{control}/provider-token") as answer:
                token = answer.read().decode()
        assert push(port, (tmp_path / "apple" / "ca.pem").read_bytes(), token, ONE) == (200, None)
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (0, b"")


@pytest.mark.parametrize("how, code", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_it_ends_though_its_reader_takes_nothing_more(tmp_path: Path, how: signal.Signals, code: int) -> None:
    with simulating(tmp_path) as simulate:
        payload = b'{"aps":{"alert":"%b"}}' % (b"x" * 4000)
        for _ in range(40):  # more than a pipe holds
            assert simulate.push(payload=payload) == (200, None)
        assert simulate.stop(how) == code


@contextmanager
def on_a_terminal(folder: Path, *arguments: str, no_color: str = "") -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The program, and what to read its terminal from."""
    ours, theirs = os.openpty()
    settings = environment(folder, TERM="xterm", NO_COLOR=no_color)
    process = subprocess.Popen(
        [*PROGRAM, *arguments], cwd=folder, env=settings, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        os.close(ours)


@pytest.mark.parametrize("no_color, expected", [("", "\x1b[32malert"), ("1", "  alert         Hello")])
def test_a_terminal_gets_colours_unless_they_are_unwanted(tmp_path: Path, no_color: str, expected: str) -> None:
    with on_a_terminal(tmp_path, *SIMULATE, "--watch", no_color=no_color) as (process, terminal):
        said = ""

        def wait_for(words: str) -> None:
            nonlocal said
            while words not in said:
                said += os.read(terminal, 65_536).decode()

        wait_for("What devices show comes here:")
        found, control = re.search(r"https://127.0.0.1:(\d+)", said), re.search(r"http://127.0.0.1:\d+", said)
        assert found is not None
        assert control is not None
        with urllib.request.urlopen(f"{control[0]}/provider-token", timeout=PATIENCE_S) as answer:
            token = answer.read().decode()
        push(int(found[1]), (tmp_path / "apple" / "ca.pem").read_bytes(), token, ONE)
        wait_for("Hello\r\n")
        assert expected in said
        assert ("\x1b" in said) is not bool(no_color)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130


# -- the old Apple ---------------------------------------------------------------------------------------------------

LEGACY = ["--legacy", "--legacy-port", "0", "--feedback-port", "0"]


def old_lines(said: str) -> list[str]:
    """The commands that play a client of old, as a person would mark and copy them."""
    return re.findall(r"^(?:printf|openssl) .*(?:\n  .*)*", said, re.MULTILINE)


@pytest.mark.peer("openssl")
@pytest.mark.parametrize("options", [[], ["--require-certificate"], ["--strict", "--legacy-topic", TOPIC]])
def test_a_stranger_pastes_what_old_clients_do_and_sees_the_push(tmp_path: Path, options: list[str]) -> None:
    need("openssl")
    with start(tmp_path, *SIMULATE, *LEGACY, "--watch", *options) as simulate:
        said = simulate.wait_for("What devices show comes here:")
        push_line, feedback_line = old_lines(said)
        control = re.search(r"http://127.0.0.1:\d+", said)
        assert control is not None
        device = f"{control[0]}/devices/{ALIVE}"
        for method in ("PUT", "DELETE"):
            with urllib.request.urlopen(urllib.request.Request(device, method=method)):
                paste(push_line, tmp_path)
        simulate.wait_for("alert         Hello  (legacy)\n")
        told = ""
        while not told:  # the program that pushed did not wait until it was taken
            told = paste(feedback_line, tmp_path).replace(" ", "").replace("\n", "")
        assert told[8:] == "0020" + ALIVE
        assert paste(feedback_line, tmp_path) == ""
        assert simulate.stop(signal.SIGINT) == 130


@contextmanager
def connecting(folder: Path, port: int) -> Iterator[ssl.SSLSocket]:
    """A client with the files that the simulator made."""
    context = ssl.create_default_context(cafile=folder / "apple" / "ca.pem")
    context.load_cert_chain(folder / "apple" / "client.pem")
    with (
        socket.create_connection(("127.0.0.1", port), PATIENCE_S) as connected,
        context.wrap_socket(connected, server_hostname="localhost") as tls,
    ):
        yield tls


def test_programs_read_where_the_old_apple_listens_and_what_came_there(tmp_path: Path) -> None:
    with simulating(tmp_path, *LEGACY, "--legacy-topic", "com.example.shop") as simulate:
        assert simulate.first["topic"] == "com.example.shop"
        assert simulate.first["feedback_port"] > 0
        with connecting(tmp_path, simulate.first["legacy_port"]) as tls:
            tls.sendall(enhanced_frame(ONE.encode(), b'{"aps":{"alert":"Hello"}}', 7, 0))
            line = simulate.line()
            assert (line["door"], line["identifier"], line["topic"]) == ("legacy", 7, "com.example.shop")
            assert simulate.stop(signal.SIGTERM) == 0
            assert ErrorReader().receive(tls.recv(6)) == ErrorResponse(Status.SHUTDOWN, 7)


def test_the_client_certificate_in_the_folder_stays_whatever_it_is(tmp_path: Path) -> None:
    def made() -> bytes:
        with simulating(tmp_path, *LEGACY):
            return (tmp_path / "apple" / "client.pem").read_bytes()

    assert made() == made()
    for content, words in (
        (push_certificate(TOPIC).pem, f"client.pem is for {TOPIC}, not for com.example.demo: name another"),
        (b"not PEM", "client.pem: There is no certificate in the file: "),
    ):
        (tmp_path / "apple" / "client.pem").write_bytes(content)
        done = run(tmp_path, *SIMULATE, *LEGACY)
        assert done.returncode == 2
        assert words in done.stderr
        assert (tmp_path / "apple" / "client.pem").read_bytes() == content


def test_an_expired_certificate_of_apples_may_be_the_required_one(tmp_path: Path) -> None:
    (tmp_path / "apple").mkdir()
    pem = push_certificate(TOPIC, now=datetime.now(UTC) - timedelta(days=3000)).pem
    (tmp_path / "apple" / "client.pem").write_bytes(pem)
    with (
        simulating(tmp_path, *LEGACY, "--legacy-topic", TOPIC, "--require-certificate") as simulate,
        connecting(tmp_path, simulate.first["legacy_port"]) as tls,
    ):
        tls.sendall(enhanced_frame(ONE.encode(), b"{}", 1, 0))
        assert simulate.line()["topic"] == TOPIC


@pytest.mark.parametrize("option", ["--legacy-port=0", "--feedback-port=0", "--legacy-payload=256", "--legacy-topic=x"])
def test_options_of_the_old_apple_are_refused_where_it_is_not_played(tmp_path: Path, option: str) -> None:
    done = run(tmp_path, *SIMULATE, option)
    assert done.returncode == 2
    assert f"{option.partition('=')[0]} is for the binary gateway: add --legacy" in done.stderr


@pytest.mark.parametrize(
    "option, words", [("--legacy-port", "The legacy gateway"), ("--feedback-port", "The feedback service")]
)
def test_a_taken_port_of_the_old_apple_is_told(tmp_path: Path, option: str, words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(tmp_path, *SIMULATE, *LEGACY, option, str(port))
    assert done.returncode == 2
    assert f"{words} cannot listen on 127.0.0.1:{port}" in done.stderr
    assert done.stderr.endswith("name another port\n")


def test_a_topic_that_is_none_is_told(tmp_path: Path) -> None:
    done = run(tmp_path, *SIMULATE, *LEGACY, "--legacy-topic", "späti")
    assert done.returncode == 2
    assert "is no bundle id" in done.stderr


def test_who_speaks_no_tls_to_the_gateway_is_named(tmp_path: Path) -> None:
    with start(tmp_path, *SIMULATE, *LEGACY) as simulate:
        found = re.search(r"legacy +127.0.0.1:(\d+)", simulate.wait_for("Ctrl-C ends it."))
        assert found is not None
        with socket.create_connection(("127.0.0.1", int(found[1])), PATIENCE_S) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            simulate.wait_for(
                "A client at 127.0.0.1 could not connect to the legacy gateway: the client does not speak TLS.\n"
            )
        assert simulate.stop(signal.SIGTERM) == 0


# -- the lines -------------------------------------------------------------------------------------------------------


def shown(payload: bytes, collapse_id: str | None = None, token: str = ALIVE, kind: PushType = PushType.ALERT) -> Shown:
    return Shown(Received("id", DeviceToken(token), "com.example.shop", kind, payload, collapse_id), 1_700_000_000.25)


@pytest.mark.parametrize(
    "payload, text",
    [
        (b'{"aps":{"alert":"Hello"}}', "Hello"),
        (b'{"aps":{"alert":{"title":"Score","subtitle":"final","body":"2:0"}}}', "Score (final): 2:0"),
        (b'{"aps":{"alert":{"subtitle":"final"}}}', "final"),
        (b'{"aps":{"alert":{"title-loc-key":"T","loc-key":"B","loc-args":["Anna"]}}}', '<T>: <B ["Anna"]>'),
        (b'{"aps":{"alert":"a","badge":3,"sound":"default"},"order":7}', 'a  [badge 3, sound default]  {"order":7}'),
        (b'{"aps":{"content-available":1}}', "[content available]"),
        (b'{"aps":{"alert":"a","mutable-content":1}}', "a  [mutable]"),
        (b'{"aps":{"event":"update","content-state":{"home":1}}}', 'update {"home":1}'),
        (b'{"aps":{}}', "nothing to show"),
        (b'{"mdm":"X"}', 'no aps: {"mdm":"X"}'),
        (b"[1]", "[1]"),
        (b"\xff\xfe", "2 octets that are not JSON"),
        (b'{"aps":{"alert":"\\u001b[31m\\n\\u202e"}}', "\\x1b[31m\\n\\u202e"),
        ('{"aps":{"alert":"👩\u200d🚀 Grüße"}}'.encode(), "👩\u200d🚀 Grüße"),
        (b'{"aps":{"alert":"%b"}}' % (b"x" * 500), "x" * 157 + "..."),
        (b'{"aps":{"alert":{"title":5,"body":["x"]}}}', "nothing to show"),
    ],
)
def test_a_line_has_what_people_want_to_know_and_nothing_that_steers_a_terminal(payload: bytes, text: str) -> None:
    assert Watcher().line(shown(payload)).text == text


def test_a_line_says_which_notification_replaces_another() -> None:
    watcher = Watcher()
    notes = [
        watcher.line(shown(b"{}", collapse, token)).note for collapse, token in (("a", ALIVE), ("a", ONE), ("b", ONE))
    ]
    assert notes == ["", "", ""]
    assert watcher.line(shown(b"{}", "a")).note == "replaces the last with collapse id a"
    for number in range(KEEP):
        watcher.line(shown(b"{}", f"{number}"))
    assert watcher.line(shown(b"{}", "a")).note == ""


def test_a_line_shortens_the_device_token() -> None:
    line = Watcher().line(shown(b'{"aps":{"alert":"Hello"}}', "x", kind=PushType.VOIP))
    assert str(line)[8:] == ".250  a1b2c3d4...  voip          Hello"
