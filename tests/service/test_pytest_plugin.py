"""The pytest plugin as another project uses it: its tests run in a process of their own."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from heliograph.errors import ConfigError, Refused
from heliograph.model import Environment
from heliograph.simulator.devices import KEEP
from heliograph.simulator.threaded import ThreadedSimulator
from tests.programs import need
from tests.service import pushing
from tests.service.pushing import push

PATIENCE_S = 50
ONE, TWO = "aa" * 32, "bb" * 32

SETTINGS = """
[pytest]
addopts = --strict-markers
filterwarnings = error
asyncio_default_fixture_loop_scope = function
"""

BEGINNING = """
import asyncio
import subprocess
import sys

import pytest

from client import push

ONE, TWO = "aa" * 32, "bb" * 32

def send(apple, token=ONE, **fields):
    return push(apple.port, apple.ca_pem, apple.provider_token(), token, **fields)
"""


def run(folder: Path, tests: str, *, client: bool = True) -> str:
    """Run these tests as somebody else's project. What pytest said."""
    (folder / "pytest.ini").write_text(SETTINGS)
    if client:
        (folder / "client.py").write_text(Path(pushing.__file__).read_text())
    (folder / "test_shop.py").write_text((BEGINNING if client else "") + textwrap.dedent(tests))
    plugins = ["-p", "heliograph.simulator.pytest_plugin", "-p", "pytest_asyncio.plugin", "-p", "no:cacheprovider"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins],
        cwd=folder,
        # So it is the same whether the plugin is registered as an entry point here or not.
        env={**plain, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return done.stdout + done.stderr


def outcome(said: str) -> str:
    """Such as `2 passed, 1 error`."""
    found = re.findall(r"^((?:\d+ \w+(?:, )?)+) in ", said, re.MULTILINE)
    assert found, said
    return str(found[-1])


def test_a_test_of_another_project_pushes_and_reads_what_arrived(tmp_path: Path) -> None:
    said = run(
        tmp_path,
        """
        def test_order_is_announced(apple):
            assert send(apple) == (200, None)
            (received,) = apple.wait_for(1)
            assert (received.token, received.payload) == (ONE, b'{"aps":{"alert":"Hello"}}')
            assert apple.received == [received]
            assert [shown.received for shown in apple.shown(ONE)] == [received]
            assert apple.shown(TWO) == []
            assert apple.url == f"https://{apple.host}:{apple.port}"
            assert apple.ca_file.read_bytes() == apple.ca_pem
            assert b"PRIVATE KEY" in apple.key_file.read_bytes()
            assert apple.key_file.name == f"AuthKey_{apple.key_id}.p8"

        def test_dead_devices_are_told_with_their_time(apple):
            apple.unregister(ONE, 1_700_000_000_000)
            assert send(apple) == (410, "Unregistered")
            apple.register(ONE)
            assert send(apple) == (200, None)

        def test_faults_can_be_ordered(apple):
            apple.rejects(ONE, "TooManyRequests", retry_after_s=1, times=1)
            apple.delays(0.001, token=TWO)
            assert send(apple) == (429, "TooManyRequests")
            assert send(apple) == send(apple, TWO) == (200, None)
            apple.hangs_up_after(0)
            with pytest.raises(ConnectionError):
                send(apple)

        def test_a_device_without_a_network_shows_it_later(apple):
            apple.go_offline(ONE)
            send(apple)
            assert (len(apple.wait_for(1)), apple.shown(ONE)) == (1, [])
            apple.come_online(ONE)
            assert len(apple.shown(ONE)) == 1

        def test_what_does_not_come_is_told(apple):
            send(apple)
            with pytest.raises(TimeoutError, match="1 of 2 notifications were received within 0.01 s"):
                apple.wait_for(2, timeout_s=0.01)
        """,
    )
    assert outcome(said) == "5 passed", said


def test_a_test_that_is_a_coroutine_waits_without_stopping_its_loop(tmp_path: Path) -> None:
    said = run(
        tmp_path,
        """
        @pytest.mark.asyncio
        async def test_order_is_announced(apple):
            pushing = asyncio.create_task(asyncio.to_thread(send, apple))
            (received,) = await apple.wait_for_async(1)
            assert received.token == ONE
            assert await pushing == (200, None)
            with pytest.raises(RuntimeError, match="await apple.wait_for_async"):
                apple.wait_for(1)
        """,
    )
    assert outcome(said) == "1 passed", said


@pytest.mark.peer("curl")
def test_curl_pushes_with_the_files_of_the_fixture(tmp_path: Path) -> None:
    if "HTTP2" not in subprocess.run([need("curl"), "--version"], capture_output=True, text=True, check=True).stdout:
        pytest.skip("this curl speaks no HTTP/2")
    said = run(
        tmp_path,
        """
        def test_curl(apple):
            done = subprocess.run(
                ["curl", "-sS", "--http2", "--cacert", apple.ca_file, "-w", "%{http_code}",
                 "-H", f"authorization: bearer {apple.provider_token()}", "-H", "apns-topic: com.example.shop",
                 "-d", '{"aps":{"alert":"Hello"}}', f"{apple.url}/3/device/{ONE}"],
                capture_output=True, text=True,
            )
            assert (done.stdout, done.stderr) == ("200", "")
            assert apple.wait_for(1)[0].topic == "com.example.shop"
        """,
    )
    assert outcome(said) == "1 passed", said


def test_what_a_test_did_is_undone_before_the_next(tmp_path: Path) -> None:
    said = run(
        tmp_path,
        """
        seen = set()

        @pytest.mark.parametrize("number", range(2))
        def test_it_is_as_new(apple, number):
            assert apple.received == apple.devices() == []
            assert apple.rules() == {}
            assert send(apple) == send(apple, TWO) == (200, None)
            apple.unregister(ONE, 1)
            apple.register(TWO, topic="com.example.other")
            apple.rejects(None, "InternalServerError")
            apple.add_app("com.example.other")
            seen.add((apple.port, apple.ca_pem, apple.key_file.read_bytes()))

        def test_clients_need_no_new_settings(apple):
            assert len(seen) == 1
        """,
    )
    assert outcome(said) == "3 passed", said


def test_a_marker_says_what_apple_is_like(tmp_path: Path) -> None:
    said = run(
        tmp_path,
        """
        @pytest.mark.apple(strict=True)
        def test_only_registered_devices(apple):
            assert send(apple) == (400, "BadDeviceToken")
            apple.register(ONE)
            assert send(apple) == (200, None)

        @pytest.mark.apple(environment="development")
        class TestSandbox:
            def test_other_environment(self, apple):
                assert (apple.environment, apple.strict) == ("development", False)

        def test_neither(apple):
            assert (apple.environment, apple.strict) == ("production", False)
            assert send(apple) == (200, None)
        """,
    )
    assert outcome(said) == "3 passed", said


@pytest.mark.parametrize("arguments", ["stict=True", "environment='sandbox'", "True"])
def test_a_marker_that_cannot_be_is_refused_with_what_there_is(tmp_path: Path, arguments: str) -> None:
    said = run(tmp_path, f"import pytest\n\n@pytest.mark.apple({arguments})\ndef test_it(apple): ...\n", client=False)
    assert outcome(said) == "1 error", said
    assert "@pytest.mark.apple takes strict=True or False and environment='production' or 'development'" in said


def test_projects_that_do_not_ask_for_apple_import_nothing_of_it(tmp_path: Path) -> None:
    said = run(
        tmp_path,
        """
        import sys

        def test_it():
            ours = {name for name in sys.modules if name.startswith("heliograph")}
            assert ours == {"heliograph", "heliograph.simulator", "heliograph.simulator.pytest_plugin"}
            assert not {"msgspec", "cryptography", "uvicorn", "starlette"} & sys.modules.keys()
        """,
        client=False,
    )
    assert outcome(said) == "1 passed", said


# -- without pytest --------------------------------------------------------------------------------------------------


def test_a_simulator_in_a_thread_ends_with_its_block() -> None:
    before = threading.active_count()
    with ThreadedSimulator(Environment.DEVELOPMENT) as apple:
        folder = apple.ca_file.parent
        assert push(apple.port, apple.ca_pem, apple.provider_token(), ONE) == (200, None)
        assert apple.connections == 1
    assert threading.active_count() == before
    assert not folder.exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", apple.port))


def test_a_taken_port_is_told_to_who_starts_it() -> None:
    before = threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"), ThreadedSimulator(port=port):
            pass
    assert threading.active_count() == before


def test_who_asks_a_simulator_that_ends_is_told_so_and_does_not_hang() -> None:
    told: list[str] = []
    asked = threading.Event()

    def ask_on() -> None:
        try:
            while True:
                assert apple.received == []
                asked.set()
        except RuntimeError as error:
            told.append(str(error))

    with ThreadedSimulator() as apple:
        asking = threading.Thread(target=ask_on, daemon=True)
        asking.start()
        assert asked.wait(PATIENCE_S)
    asking.join(PATIENCE_S)
    assert not asking.is_alive()
    assert told


def test_who_asks_a_simulator_that_does_not_listen_is_told_so() -> None:
    apple = ThreadedSimulator()
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        apple.wait_for(1)
    with apple:
        assert apple.received == []
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        apple.rejects(ONE, "Unregistered")


def test_an_app_that_is_removed_without_a_time_is_gone_from_now_on() -> None:
    with ThreadedSimulator() as apple:
        before = int(time.time() * 1000)
        apple.unregister(ONE)
        (device,) = apple.devices()
        assert device.since is not None
        assert before <= device.since <= time.time() * 1000
        apple.unregister(ONE, since=5)
        assert apple.devices()[0].since == 5


def test_mistakes_are_raised_where_they_were_made() -> None:
    with ThreadedSimulator() as apple:
        with pytest.raises(ValueError, match="Apple has no reason 'Tired'"):
            apple.rejects(ONE, "Tired")
        with pytest.raises(Refused):
            apple.register("no token")
        with pytest.raises(Refused, match="is no bundle id"):
            apple.add_app("bad id!")
        assert apple.devices() == []
        with pytest.raises(ValueError, match=f"Only the last {KEEP}"):
            apple.wait_for(KEEP + 1)
