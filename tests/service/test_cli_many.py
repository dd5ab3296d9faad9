"""Commands on many notifications: sent from a file, listed, cancelled, looked at, replayed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any, ClassVar, NamedTuple
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.service.test_cli import ALIVE, PATIENCE_S, PROGRAM, environment, run, serving, start


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A server for all tests of this file, and the folder in which commands find its key."""
    folder = tmp_path_factory.mktemp("server")
    with serving(folder) as found:
        yield folder, found


def tokens(count: int, first: int = 1) -> str:
    return "".join(f"{number:064x}\n" for number in range(first, first + count))


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# -- send --tokens-file ----------------------------------------------------------------------------------------------


def test_many_are_followed_until_apple_has_answered(shared: tuple[Path, dict[str, str]]) -> None:
    folder, server = shared
    (folder / "tokens").write_text(tokens(2500))
    done = run(folder, "send", "--title", "x", "--tokens-file", "tokens", "--wait", "30", **server)
    assert (done.returncode, done.stdout) == (0, "accepted  2,500\n"), done.stderr


def test_many_are_taken_without_waiting_unless_asked_to(shared: tuple[Path, dict[str, str]]) -> None:
    folder, server = shared
    done = run(folder, "send", "--title", "x", "--tokens-file", "-", text=tokens(3), **server)
    assert (done.returncode, done.stdout) == (0, "queued  3\n"), done.stderr


def test_what_is_refused_keeps_no_other_from_being_sent(shared: tuple[Path, dict[str, str]]) -> None:
    folder, server = shared
    text = f"{ALIVE}\n\nnonsense\n  <{ALIVE[:8]} {ALIVE[8:]}>\r\n"
    done = run(folder, "send", "--title", "x", "--tokens-file", "-", "--wait", "30", "--json", text=text, **server)
    assert done.returncode == 1
    assert "Blanks and <> were left out of a device token" in done.stderr
    *told, last = lines(done.stdout)
    assert last == {"summary": {"accepted": 2, "refused": 1}}
    by_line = {each["line"]: each for each in told}
    assert {line: each["state"] for line, each in by_line.items()} == {1: "accepted", 3: "refused", 4: "accepted"}
    assert (by_line[3]["reason"], by_line[3]["token"], by_line[3]["id"]) == ("BadDeviceToken", "nonsense", None)
    assert by_line[4]["token"] == ALIVE
    said = run(folder, "send", "--title", "x", "--tokens-file", "-", text=text, **server).stdout
    assert re.search(r"^refused  1  BadDeviceToken  line 3\n  The device token must be hex digits", said, re.MULTILINE)


def test_where_all_are_refused_each_is_told(shared: tuple[Path, dict[str, str]]) -> None:
    folder, server = shared
    text = "".join(f"nonsense{number}\n" for number in range(150))
    done = run(folder, "send", "--title", "x", "--tokens-file", "-", "--json", text=text, **server)
    assert done.returncode == 1
    assert len(lines(done.stdout)) == 151
    assert lines(done.stdout)[-1] == {"summary": {"refused": 150}}


def test_what_is_wrong_with_all_is_told_once(shared: tuple[Path, dict[str, str]]) -> None:
    folder, server = shared
    done = run(folder, "send", "--tokens-file", "-", "--json", text=tokens(2000), **server)
    assert done.returncode == 1
    assert done.stderr == "Error: There is nothing to send: add title or body, or a whole payload\n"
    (told,) = lines(done.stdout)
    assert told["error"]["code"] == "PayloadEmpty"


@pytest.mark.parametrize(
    "arguments, text, words",
    [
        (["--tokens-file", "-"], "\n\n", "there is no device token in it"),
        (["--tokens-file", "-"], "a" * 2000, "line 1 is too long: write one device token a line"),
        (["--tokens-file", "-", ALIVE], "", "There is a device token beside --tokens-file: leave one of them out"),
        (["--tokens-file", "-", "--payload", "-"], "", "cannot both be read from stdin: name a file for one"),
        (["--tokens-file", "absent"], "", "'absent' does not exist"),
        (["--tokens-file", "/dev/zero"], "", "line 1 is too long"),
    ],
)
def test_a_file_without_tokens_is_told(tmp_path: Path, arguments: list[str], text: str, words: str) -> None:
    done = run(tmp_path, "send", "--title", "x", *arguments, text=text, HELIOGRAPH_URL="http://127.0.0.1:1")
    assert done.returncode == 2
    assert words in done.stderr


class Asked(NamedTuple):
    tokens: Sequence[str]
    once: str | None


class Wayward(ThreadingHTTPServer):
    """Answers as the server does, but as `misbehaviour` has it where that says anything: None is to hang up.

    So many answers at `most`: what is asked after that is not answered until the end.
    """

    def __init__(self, misbehaviour: list[int | None], most: int) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.misbehaviour = misbehaviour
        self.most = most
        self.ends = Event()
        self.asked: list[Asked] = []

    @property
    def variables(self) -> dict[str, str]:
        return {"HELIOGRAPH_URL": f"http://127.0.0.1:{self.server_address[1]}", "HELIOGRAPH_KEY": "hg_x"}


_NOT_NOW = {"type": "/docs/errors#overloaded", "code": "Overloaded", "detail": "Not now."}


class _Answers(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Wayward)
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server.asked.append(Asked(body["tokens"], self.headers["idempotency-key"]))
        if len(server.asked) > server.most:
            server.ends.wait(PATIENCE_S)
            return
        status = server.misbehaviour.pop(0) if server.misbehaviour else 202
        if status is None:
            return
        good = {"ids": [f"id-{token}" for token in body["tokens"]]}
        answer = json.dumps(good if status == 202 else _NOT_NOW).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(answer)))
        self.send_header("retry-after", "0")
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def wayward(*misbehaviour: int | None, most: int = 1_000_000) -> Iterator[Wayward]:
    with Wayward(list(misbehaviour), most) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.ends.set()
            server.shutdown()
            thread.join()


def test_a_server_that_takes_nothing_now_is_asked_again(tmp_path: Path) -> None:
    with wayward(429, 503) as server:
        done = run(tmp_path, "send", "--title", "x", "--tokens-file", "-", text=tokens(1500), **server.variables)
    assert (done.returncode, done.stdout) == (0, "queued  1,500\n"), done.stderr
    assert [len(each.tokens) for each in server.asked] == [1000, 1000, 1000, 500]


def test_a_request_whose_answer_is_lost_is_sent_again_and_counts_once(tmp_path: Path) -> None:
    with wayward(None) as server:
        done = run(tmp_path, "send", "--title", "x", "--tokens-file", "-", text=tokens(1500), **server.variables)
    assert (done.returncode, done.stdout) == (0, "queued  1,500\n"), done.stderr
    first, again, second = server.asked
    assert first == again
    assert first.once != second.once


def test_where_the_server_goes_away_it_is_told_how_far_it_came(tmp_path: Path) -> None:
    with wayward(202, None, None, None) as server:
        done = run(tmp_path, "send", "--title", "x", "--tokens-file", "-", text=tokens(2500), **server.variables)
    assert done.returncode == 3
    assert sorted(done.stdout.splitlines()) == ["not sent  1,500", "queued  1,000"]
    told = "1,000 of 2,500 were dealt with; the rest begins at line 1,001. Whether lines 1,001 to 2,000 were taken is"
    assert told in done.stderr
    assert "There is no answer from" in done.stderr


def test_ctrl_c_tells_how_many_were_taken(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(tokens(100_000))
    command = ["send", "--title", "x", "--tokens-file", "tokens"]
    with wayward(most=3) as server, start(tmp_path, *command, **server.variables) as it:
        while len(server.asked) < 4:
            assert it.process.poll() is None, it.said()
        assert it.stop(signal.SIGINT) == 130
    assert "queued  3,000\n" in it.said()
    assert "3,000 of 100,000 were dealt with; the rest begins at line 3,001. Whether lines 3,001 to 4,000" in it.said()
    assert "Traceback" not in it.said()


# -- list, status, cancel --------------------------------------------------------------------------------------------


def test_the_list_has_filters_and_goes_on_page_by_page(shared: tuple[Path, dict[str, str]]) -> None:
    folder, server = shared
    token = f"{77_777:064x}"
    assert run(folder, "send", "--title", "x", "--wait", "30", token, **server).returncode == 0
    text = tokens(1200, first=500_000)
    assert (
        run(folder, "send", "--title", "x", "--tokens-file", "-", "--wait", "30", text=text, **server).returncode == 0
    )
    (one,) = lines(run(folder, "list", "--token", token, "--json", **server).stdout)
    assert (one["state"], one["token"]) == ("accepted", token)
    said = run(folder, "list", "--token", token, **server).stdout
    assert re.fullmatch(rf"{one['id']}  \S+Z  demo  accepted\n", said)
    every = lines(run(folder, "list", "--limit", "0", "--since", "1h", "--json", **server).stdout)
    assert len({each["id"] for each in every}) == len(every) > 1200
    some = run(folder, "list", "--limit", "1100", "--json", **server)
    assert [each["id"] for each in lines(some.stdout)] == [each["id"] for each in every[:1100]]
    cursor = re.search(r"There are more: --cursor (\S+)", some.stderr)
    assert cursor is not None
    (following,) = lines(run(folder, "list", "--limit", "1", "--cursor", cursor[1], "--json", **server).stdout)
    assert following["id"] == every[1100]["id"]
    none = run(folder, "list", "--state", "buried", "--state", "unknown", **server)
    assert (none.returncode, none.stdout, none.stderr) == (0, "", "There are none.\n")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--state", "lost"], "'lost' is not one of 'queued', 'sent'"),
        (["--since", "yesterday"], "since must be a time like"),
        (["--cursor", "x"], "cursor must be what the former page gave"),
        (["--limit", "-1"], "-1 is not in the range"),
    ],
)
def test_a_filter_that_makes_no_sense_is_told(
    shared: tuple[Path, dict[str, str]], arguments: list[str], words: str
) -> None:
    folder, server = shared
    done = run(folder, "list", *arguments, **server)
    assert done.returncode == 2
    assert words in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["list", "--app", "absent"],
        ["list", "--token", "nonsense"],
        ["list", "--since", "2026"],
        ["buried", "list", "--app", "absent"],
        ["buried", "list", "--cursor", "nonsense"],
    ],
    ids=" ".join,
)
def test_a_listing_that_the_server_refuses_is_a_wrong_call(
    shared: tuple[Path, dict[str, str]], arguments: list[str]
) -> None:
    folder, server = shared
    done = run(folder, *arguments, "--json", **server)
    assert (done.returncode, json.loads(done.stdout)["error"]["status"]) == (2, 400)


def test_a_list_of_longer_than_there_is_time_is_one_of_all(shared: tuple[Path, dict[str, str]]) -> None:
    folder, server = shared
    assert run(folder, "list", "--since", "99999d", **server).returncode == 0


def test_the_states_of_the_list_are_those_of_the_model() -> None:
    from heliograph.commands.listing import STATES
    from heliograph.model import State

    assert {each.name.lower() for each in State} == set(STATES)


def test_status_says_what_became_of_each(shared: tuple[Path, dict[str, str]]) -> None:
    folder, server = shared
    sent = json.loads(run(folder, "send", "--title", "x", "--json", ALIVE, **server).stdout)["id"]
    done = run(folder, "status", sent, **server)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{sent}  accepted\n  Apple took it.")
    assert re.search(r"^  attempts +1$", done.stdout, re.MULTILINE)
    lost = run(folder, "status", sent, "01a1b2c3-d4e5-7000-8000-000000000001", "--json", **server)
    assert lost.returncode == 1
    first, second = lines(lost.stdout)
    assert (first["id"], first["state"], second["error"]["code"]) == (sent, "accepted", "UnknownNotification")
    assert "not known  No notification" in run(folder, "status", "nonsense", **server).stderr
    assert run(folder, "status", "a/b", **server).returncode == 2


def test_cancel_says_for_which_it_was_too_late(shared: tuple[Path, dict[str, str]]) -> None:
    folder, server = shared
    sent = json.loads(run(folder, "send", "--title", "x", "--json", ALIVE, **server).stdout)["id"]
    done = run(folder, "cancel", sent, "nonsense", **server)
    assert done.returncode == 1
    assert done.stdout == f"{sent}  too late: heliograph status says what became of it\nnonsense  not known\n"
    told = lines(run(folder, "cancel", sent, "--json", **server).stdout)
    assert told == [{"id": sent, "result": "too_late"}]


# -- what waits and what was given up on -----------------------------------------------------------------------------


@pytest.fixture
def far_from_apple(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A server whose simulator has gone: what it takes waits."""
    with start(tmp_path, "simulate", "--port", "0", "--folder", "apple") as simulate:
        said = simulate.wait_for("Ctrl-C ends it.")
        table = said[said.index("[apps.demo]") : said.index("Ctrl-C")]
        simulate.stop(signal.SIGINT)
    (tmp_path / "heliograph.toml").write_text(f"[api]\nport = 0\n{table}")
    with start(tmp_path, "serve") as serve:
        found = re.search(r"url=(\S+)", serve.wait_for("url="))
        assert found is not None
        yield {"HELIOGRAPH_URL": found[1]}


def test_what_waits_is_told_as_such_and_can_be_cancelled(tmp_path: Path, far_from_apple: dict[str, str]) -> None:
    sent = run(
        tmp_path, "send", "--title", "x", "--tokens-file", "-", "--wait", "0.1", text=tokens(3), **far_from_apple
    )
    assert (sent.returncode, sent.stdout) == (4, "queued  3\n"), sent.stderr
    listed = lines(run(tmp_path, "list", "--state", "queued", "--json", **far_from_apple).stdout)
    ids = [each["id"] for each in listed]
    assert len(ids) == 3
    assert run(tmp_path, "status", *ids, **far_from_apple).returncode == 4
    done = run(tmp_path, "cancel", *ids, "--json", **far_from_apple)
    assert done.returncode == 0
    assert Counter(each["result"] for each in lines(done.stdout)).keys() <= {"cancelled", "cancelling"}


def test_where_nothing_was_given_up_on_nothing_is_replayed(shared: tuple[Path, dict[str, str]]) -> None:
    folder, server = shared
    done = run(folder, "buried", "replay", "--all", **server)
    assert (done.returncode, done.stdout) == (0, "Nothing was given up on.\n")
    for wrong in (["--all", "x"], [], ["--app", "demo", "x"]):
        assert run(folder, "buried", "replay", *wrong, **server).returncode == 2


class _Cemetery(BaseHTTPRequestHandler):
    """Answers as a server that gave up on so many: nothing short of a day makes a real one do so."""

    count = 2500
    replayed: ClassVar[list[str]] = []
    paths: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.paths.append(self.path)
        query = parse_qs(urlsplit(self.path).query)
        newest = int(query.get("before", [f"{self.count + 1}"])[0]) - 1
        page = range(newest, max(newest - int(query["limit"][0]), 0), -1)
        rest = {"app": "shop", "created_at": "2026-11-21T12:00:00.000Z", "state": "buried", "reason": "NotProcessed"}
        buried = [{"id": f"{n}", **rest} for n in page]
        self._answer({"buried": buried, "next": f"{page[-1]}" if page[-1] > 1 else None})

    def do_POST(self) -> None:
        ids = json.loads(self.rfile.read(int(self.headers["content-length"])))["ids"]
        self.replayed.extend(ids)
        self._answer({"replayed": ids})

    def _answer(self, value: object) -> None:
        answer = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-length", f"{len(answer)}")
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def cemetery() -> Iterator[dict[str, str]]:
    """The environment in which commands find one."""
    _Cemetery.replayed.clear()
    _Cemetery.paths.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Cemetery) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield {"HELIOGRAPH_URL": f"http://127.0.0.1:{server.server_address[1]}", "HELIOGRAPH_KEY": "hg_x"}
        server.shutdown()
        thread.join()


def test_what_was_given_up_on_is_listed_page_by_page(tmp_path: Path, cemetery: dict[str, str]) -> None:
    every = run(tmp_path, "buried", "list", "--limit", "0", "--json", **cemetery)
    assert [each["id"] for each in lines(every.stdout)] == [f"{n}" for n in range(_Cemetery.count, 0, -1)]
    assert every.stderr == ""
    some = run(tmp_path, "buried", "list", "--app", "shop", "--limit", "2", **cemetery)
    assert some.stdout.splitlines()[0] == "2500  2026-11-21T12:00:00Z  shop  buried  NotProcessed"
    assert some.stderr == "There are more: --cursor 2499\n"
    (following,) = lines(
        run(tmp_path, "buried", "list", "--limit", "1", "--cursor", "2499", "--json", **cemetery).stdout
    )
    assert following["id"] == "2498"


def test_all_that_was_given_up_on_is_replayed_the_oldest_first(tmp_path: Path, cemetery: dict[str, str]) -> None:
    done = run(tmp_path, "buried", "replay", "--all", "--app", "shop", **cemetery)
    assert (done.returncode, done.stdout) == (0, "2,500 wait to be sent again.\n"), done.stderr
    assert _Cemetery.replayed == [f"{n}" for n in range(1, _Cemetery.count + 1)]
    assert [path.partition("?")[2] for path in _Cemetery.paths] == [
        "app=shop&limit=1000",
        "app=shop&before=1501&limit=1000",
        "app=shop&before=501&limit=1000",
    ]


def test_a_reader_that_has_enough_ends_it_quietly(shared: tuple[Path, dict[str, str]]) -> None:
    folder, server = shared
    text = tokens(3000, first=900_000)
    assert run(folder, "send", "--title", "x", "--tokens-file", "-", text=text, **server).returncode == 0
    command = [*PROGRAM, "list", "--limit", "0", "--json"]
    with subprocess.Popen(
        command, cwd=folder, env=environment(folder, **server), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(PATIENCE_S) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_output_that_cannot_be_written_is_told(shared: tuple[Path, dict[str, str]]) -> None:
    folder, server = shared
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "heliograph", "app", "list"],
            env=environment(folder, **server),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: The output cannot be written (No space left on device)")
