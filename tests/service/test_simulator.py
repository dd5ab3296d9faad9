from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from heliograph.errors import ConfigError
from heliograph.model import Environment
from heliograph.net.http2 import Link, connect
from heliograph.net.tls import client_context
from heliograph.protocols.http2 import (
    Accepted,
    Answered,
    ClientConnection,
    ErrorCode,
    Event,
    GoAway,
    Key,
    NotProcessed,
    Requests,
    SettingsChanged,
    Template,
    Unknown,
    frames,
)
from heliograph.protocols.provider_token import mint, parse_signing_key
from heliograph.simulator.faults import Answer, Cut, Delay, Reset, StreamLimit
from heliograph.simulator.server import KEY_ID, TEAM_ID, Judged, Simulator, new_signing_key, run
from tests.programs import need

ONE, TWO, THREE = "aa" * 32, "bb" * 32, "cc" * 32
TOPIC = "com.example.app"
PAYLOAD = b'{"aps":{"alert":"Hello"}}'
ID = "5b1c8f1e-0f4a-4b6e-8a53-2f0f6a3f"


class Client:
    """Our own client connection. Requests are called by their place, 0, 1, ...; `ends` says what became of each."""

    def __init__(self, link: Link[ClientConnection]) -> None:
        self.link = link
        self.jwt = ""
        self.sent = 0
        self.limits: list[int] = []
        self.goodbyes: list[GoAway] = []
        self.ends: dict[Key, Answered | type[Accepted | NotProcessed | Unknown]] = {}
        self.closed = False
        self._news = asyncio.Event()

    def on_events(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, SettingsChanged):
                self.limits.append(event.max_streams)
            elif isinstance(event, GoAway):
                self.goodbyes.append(event)
            elif isinstance(event, Answered):
                self.ends[event.key] = event
            elif isinstance(event, Accepted | NotProcessed | Unknown):
                self.ends |= dict.fromkeys(event.keys, type(event))
        self._news.set()

    def on_writable(self) -> None: ...

    def on_close(self) -> None:
        self.closed = True
        self._news.set()

    async def until(self, done: Callable[[], bool]) -> None:
        while not done():
            self._news.clear()
            await self._news.wait()

    def submit(self, *tokens: str, payload: bytes = PAYLOAD, topic: str = TOPIC) -> range:
        """Send to these device tokens, in one write."""
        template = Template(
            b"api.push.apple.com",
            b"/3/device/",
            ((b"apns-topic", topic.encode()), (b"authorization", b"bearer " + self.jwt.encode())),
            (b"apns-id",),
        )
        places = range(self.sent, self.sent + len(tokens))
        self.sent += len(tokens)
        requests = Requests(
            template,
            list(places),
            [token.encode() for token in tokens],
            [payload],
            prefixes=(ID.encode(),),
            suffixes=[b"%04x" % place for place in places],
        )
        assert self.link.core.submit(requests, asyncio.get_running_loop().time()) == len(tokens)
        self.link.flush()
        return places

    async def ask(
        self, *tokens: str, payload: bytes = PAYLOAD, topic: str = TOPIC
    ) -> list[Answered | type[Accepted | NotProcessed | Unknown]]:
        """Send, and wait until all of these have ended."""
        places = self.submit(*tokens, payload=payload, topic=topic)
        await self.until(lambda: all(place in self.ends for place in places))
        return [self.ends[place] for place in places]


@asynccontextmanager
async def client_of(apple: Simulator, jwt: str | None = None, *, greet: bool = True) -> AsyncIterator[Client]:
    """`greet`: send a first good push, so that the stream limit is up; it leaves no other trace."""
    link = await connect(Client, host="127.0.0.1", port=apple.port, tls=client_context(apple.ca_pem))
    client = link.session
    assert isinstance(client, Client)
    client.jwt = mint(apple.signing_key, time.time()) if jwt is None else jwt
    try:
        await client.until(lambda: bool(client.limits))
        if greet:
            await client.ask(THREE)
            await client.until(lambda: len(client.limits) == 2)
            apple.clear_received()
        yield client
    finally:
        link.abort()
        await link.closed


@pytest.fixture
async def apple() -> AsyncIterator[Simulator]:
    async with Simulator() as apple:
        yield apple


def reason(end: object) -> tuple[int, str]:
    assert isinstance(end, Answered)
    body = msgspec.json.decode(end.body)
    assert dict(end.fields)[b"content-type"] == b"application/json"
    return end.status, body["reason"]


async def test_push_is_accepted_and_can_be_read_as_the_device_would_show_it(apple: Simulator) -> None:
    async with client_of(apple, greet=False) as client:
        assert await client.ask(ONE) == [Accepted]
    (received,) = apple.received
    assert (received.id, received.token, received.topic, received.payload) == (ID + "0000", ONE, TOPIC, PAYLOAD)


async def test_many_pushes_of_one_write_are_all_answered(apple: Simulator) -> None:
    async with client_of(apple) as client:
        tokens = [f"{number:064x}" for number in range(1000)]
        assert await client.ask(*tokens) == [Accepted] * 1000
    assert [received.token for received in apple.received] == tokens


async def test_first_stream_limit_is_one_until_a_good_provider_token_came(apple: Simulator) -> None:
    async with client_of(apple, "nonsense", greet=False) as client:
        assert reason((await client.ask(ONE))[0]) == (403, "InvalidProviderToken")
        assert client.limits == [1]
        client.jwt = mint(apple.signing_key, time.time())
        await client.ask(ONE)
        await client.until(lambda: client.limits == [1, 1000])


async def test_stream_limits_can_be_chosen() -> None:
    async with Simulator(first_streams=3, streams=5) as apple, client_of(apple) as client:
        assert client.limits == [3, 5]


async def test_refusals_come_with_reason_and_id(apple: Simulator) -> None:
    async with client_of(apple) as client:
        (end,) = await client.ask("abc")
        assert reason(end) == (400, "BadDeviceToken")
        assert isinstance(end, Answered)
        assert dict(end.fields)[b"apns-id"].decode() == ID + "0001"


async def test_unregistered_comes_with_its_time_in_milliseconds(apple: Simulator) -> None:
    apple.unregister(ONE, 1_700_000_000_123)
    async with client_of(apple) as client:
        first, second = await client.ask(ONE, TWO)
        assert isinstance(first, Answered)
        assert msgspec.json.decode(first.body) == {"reason": "Unregistered", "timestamp": 1_700_000_000_123}
        assert second is Accepted


async def test_payload_far_beyond_the_limit_is_answered_as_too_large(apple: Simulator) -> None:
    async with client_of(apple) as client:
        for octets in (4097, 50_000):
            assert reason((await client.ask(ONE, payload=b"x" * octets))[0]) == (413, "PayloadTooLarge")


async def test_app_without_a_team_belongs_to_the_simulators_own(apple: Simulator) -> None:
    apple.add_app(TOPIC)
    async with client_of(apple) as client:
        assert await client.ask(ONE) == [Accepted]
        assert reason((await client.ask(ONE, topic="org.example.other"))[0]) == (400, "TopicDisallowed")


async def test_development_environment_gives_unique_ids() -> None:
    async with Simulator(Environment.DEVELOPMENT) as apple:
        link = await connect(
            Client,
            host="127.0.0.1",
            port=apple.port,
            tls=client_context(apple.ca_pem),
            new_core=lambda now: ClientConnection(now, keep=frozenset((b"apns-unique-id",))),
        )
        client = link.session
        assert isinstance(client, Client)
        client.jwt = mint(apple.signing_key, time.time())
        await client.until(lambda: bool(client.limits))
        (end,) = await client.ask(ONE)
        assert isinstance(end, Answered)
        assert end.status == 200
        assert len(dict(end.fields)[b"apns-unique-id"]) == 36
        link.abort()
        await link.closed


# -- faults ------------------------------------------------------------------------------------------------------


async def test_ordered_rejection_reaches_its_token_only(apple: Simulator) -> None:
    apple.rejects(ONE, "TooManyRequests", retry_after_s=7, times=1)
    async with client_of(apple) as client:
        first, second = await client.ask(ONE, TWO)
        assert reason(first) == (429, "TooManyRequests")
        assert isinstance(first, Answered)
        assert dict(first.fields)[b"retry-after"] == b"7"
        assert second is Accepted
        assert await client.ask(ONE) == [Accepted]


async def test_delayed_answer_comes_after_those_that_were_asked_later(apple: Simulator) -> None:
    async with client_of(apple) as client:
        apple.delays(0.03, token=ONE)
        apple.delays(0.01, token=TWO)
        client.submit(ONE, TWO, THREE)
        await client.until(lambda: len(client.ends) == 4)
        assert list(client.ends) == [0, 3, 2, 1]
        assert [received.token for received in apple.received] == [THREE, TWO, ONE]


async def test_delay_may_end_in_another_fault(apple: Simulator) -> None:
    async with client_of(apple) as client:
        apple.misbehaves(Delay(0.001, then=Answer(500, "InternalServerError")))
        assert reason((await client.ask(ONE))[0]) == (500, "InternalServerError")


async def test_what_waits_when_the_client_leaves_is_not_acted_on(apple: Simulator) -> None:
    async with client_of(apple) as client:
        apple.delays(0.01, token=ONE)
        client.submit(ONE)
        await client.ask(TWO)
        client.link.abort()
    async with client_of(apple) as other:
        # It waits as long as the one before, and so comes after it.
        await other.ask(ONE)
    assert [received.id for received in apple.received] == [ID + "0001"]


async def test_what_the_client_cancels_while_it_waits_is_not_acted_on(apple: Simulator) -> None:
    async with client_of(apple) as client:
        apple.delays(0.01)
        client.submit(ONE, TWO)
        # The greeting had stream 1. One is cancelled in the write that brought it, the other in a later one.
        client.link.core._out.append(frames.rst_stream(3, ErrorCode.CANCEL))
        await asyncio.sleep(0)
        client.link.core._out.append(frames.rst_stream(5, ErrorCode.CANCEL))
        assert await client.ask(THREE) == [Accepted]
    assert [received.token for received in apple.received] == [THREE]


async def test_withheld_push_was_acted_on_and_is_never_answered(apple: Simulator) -> None:
    async with client_of(apple) as client:
        apple.withholds(ONE)
        client.submit(ONE)
        assert await client.ask(TWO) == [Accepted]
        assert 1 not in client.ends
        assert [received.token for received in apple.received] == [ONE, TWO]


@pytest.mark.parametrize("code, end", [(ErrorCode.REFUSED_STREAM, NotProcessed), (ErrorCode.INTERNAL_ERROR, Unknown)])
async def test_stream_is_reset_with_the_code_that_was_ordered(apple: Simulator, code: ErrorCode, end: type) -> None:
    apple.resets(ONE, code)
    async with client_of(apple) as client:
        assert await client.ask(ONE, TWO) == [end, Accepted]
        assert [received.token for received in apple.received] == [TWO]


async def test_simulator_hangs_up_without_a_word_after_so_many_requests(apple: Simulator) -> None:
    async with client_of(apple) as client:
        apple.hangs_up_after(2)
        assert await client.ask(ONE, TWO, THREE, ONE) == [Accepted, Accepted, Unknown, Unknown]
        await client.until(lambda: client.closed)
        assert client.goodbyes == []
    async with client_of(apple) as client:
        assert await client.ask(ONE) == [Accepted]


async def test_goodbye_gives_its_reason_answers_what_came_and_closes(apple: Simulator) -> None:
    async with client_of(apple) as client:
        apple.says_goodbye("Shutdown", after=1)
        assert await client.ask(ONE, TWO, THREE) == [Accepted] * 3
        await client.until(lambda: client.closed)
        assert [msgspec.json.decode(goodbye.debug) for goodbye in client.goodbyes] == [{"reason": "Shutdown"}]


async def test_what_is_above_the_last_stream_of_a_goodbye_is_not_acted_on(apple: Simulator) -> None:
    async with client_of(apple) as client:
        apple.delays(0.01, token=ONE)
        apple.says_goodbye(last_stream_id=5, after=1)
        # The greeting had stream 1.
        assert await client.ask(ONE, TWO, THREE, ONE) == [Accepted, Accepted, NotProcessed, NotProcessed]
        await client.until(lambda: client.closed)
        assert [(goodbye.last_stream_id, goodbye.debug) for goodbye in client.goodbyes] == [(5, b"")]
    assert [received.token for received in apple.received] == [TWO, ONE]


async def test_goodbye_may_leave_out_the_newest_but_nothing_that_was_acted_on(apple: Simulator) -> None:
    async with client_of(apple) as client:
        apple.says_goodbye(newest=3, after=4)
        apple.delays(0.01, token=TWO)
        # The greeting had stream 1. Stream 5 was acted on: those after it are left out, the last one included.
        assert await client.ask(TWO, ONE, TWO, TWO, ONE) == [Accepted, Accepted, *[NotProcessed] * 3]
        await client.until(lambda: client.closed)
        assert [goodbye.last_stream_id for goodbye in client.goodbyes] == [5]
    assert [received.token for received in apple.received] == [ONE, TWO]


async def test_stream_may_be_reset_after_it_was_acted_on(apple: Simulator) -> None:
    apple.misbehaves(Reset(ErrorCode.CANCEL, acted=True), token=ONE)
    async with client_of(apple) as client:
        assert await client.ask(ONE, TWO) == [Unknown, Accepted]
        assert [received.token for received in apple.received] == [ONE, TWO]


async def test_cut_connection_was_acted_on_and_brings_no_answer(apple: Simulator) -> None:
    async with client_of(apple) as client:
        apple.misbehaves(Cut(), times=1)
        assert await client.ask(ONE) == [Unknown]
        await client.until(lambda: client.closed)
        assert client.goodbyes == []
        assert [received.token for received in apple.received] == [ONE]
    async with client_of(apple) as client:
        assert await client.ask(ONE) == [Accepted]


async def test_stream_limit_changes_once_for_each_order(apple: Simulator) -> None:
    async with client_of(apple) as client:
        apple.misbehaves(StreamLimit(1), times=2)
        apple.misbehaves(StreamLimit(500, then=Delay(0.001)))
        assert await client.ask(ONE, TWO) == [Accepted] * 2
        assert await client.ask(THREE) == [Accepted]
        await client.until(lambda: client.limits == [1, 1000, 1, 500])
        assert len(apple.received) == 3


# -- the journal -------------------------------------------------------------------------------------------------


async def test_journal_has_a_line_for_each_request_before_its_answer(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    async with Simulator(journal=path) as apple, client_of(apple) as client:
        apple.withholds(TWO)
        apple.resets(THREE, ErrorCode.INTERNAL_ERROR)
        await client.ask("abc")
        client.submit(TWO)
        await client.ask(THREE)
        lines = [msgspec.json.decode(line, type=Judged) for line in path.read_bytes().splitlines()]
    assert path.stat().st_mode & 0o777 == 0o600
    assert [line.stream for line in lines] == [1, 3, 5, 7]
    assert [line.apns_id for line in lines] == [f"{ID}{place:04x}" for place in range(4)]
    assert [(line.token, line.status, line.reason, line.fault) for line in lines] == [
        (THREE, 200, None, None),
        ("abc", 400, "BadDeviceToken", None),
        (TWO, 200, None, "withheld"),
        (THREE, None, None, "reset"),
    ]
    assert [line.code for line in lines] == [None, None, None, ErrorCode.INTERNAL_ERROR]
    assert {line.sha256 for line in lines} == {hashlib.sha256(PAYLOAD).hexdigest()}
    assert {line.topic for line in lines} == {TOPIC}
    assert {line.connection for line in lines} == {1}


async def test_journal_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"journal .* cannot be written"):
        await Simulator(journal=tmp_path / "no" / "journal").__aenter__()


# -- foreign clients ---------------------------------------------------------------------------------------------


async def curl(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        need("curl"), "-sS", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    return output.decode()


@pytest.mark.peer("curl")
async def test_curl_sees_what_it_would_see_at_apple(apple: Simulator, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(apple.ca_pem)
    url = f"https://api.push.apple.com:{apple.port}/3/device/"
    jwt = mint(apple.signing_key, time.time())
    common = [
        "--http2",
        "--cacert",
        str(tmp_path / "ca.pem"),
        "--resolve",
        f"api.push.apple.com:{apple.port}:127.0.0.1",
        "-w",
        " %{http_version} %{http_code}",
        "-H",
        f"apns-topic: {TOPIC}",
        "-d",
        PAYLOAD.decode(),
    ]
    signed = ["-H", f"authorization: bearer {jwt}"]
    assert await curl(*common, *signed, url + ONE) == " 2 200"
    assert await curl(*common, url + ONE) == '{"reason":"MissingProviderToken"} 2 403'
    assert await curl(*common, *signed, url + ONE, url + "xyz", url + TWO) == (
        ' 2 200{"reason":"BadDeviceToken"} 2 400 2 200'
    )
    assert [received.token for received in apple.received] == [ONE, ONE, TWO]


@pytest.mark.peer("curl")
async def test_client_that_speaks_only_http_1_is_not_served(apple: Simulator, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(apple.ca_pem)
    ca = ["--cacert", str(tmp_path / "ca.pem")]
    answer = await curl("--http1.1", *ca, "-w", "%{http_code}", f"https://localhost:{apple.port}/3/device/{ONE}")
    assert "200" not in answer
    async with client_of(apple) as client:
        assert await client.ask(ONE) == [Accepted]


# -- for the command line ----------------------------------------------------------------------------------------


@asynccontextmanager
async def running(folder: Path, port: int = 0) -> AsyncIterator[list[str]]:
    said: list[str] = []
    complete = asyncio.Event()

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 3:
            complete.set()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(run("127.0.0.1", port, folder, say))
        group.create_task(complete.wait())
        await complete.wait()
        yield said
        task.cancel()


async def test_run_says_where_the_files_are_and_makes_them_once(tmp_path: Path) -> None:
    folder = tmp_path / "apple"
    contents = []
    for _ in range(2):
        async with running(folder) as said:
            assert str(folder / "ca.pem") in said[1]
            assert KEY_ID in said[2]
            assert TEAM_ID in said[2]
            contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1]
    assert contents[0].keys() == {"ca.pem", "server.pem", "server.key", f"AuthKey_{KEY_ID}.p8"}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


async def test_client_with_the_files_of_run_is_served(tmp_path: Path) -> None:
    async with running(tmp_path) as said:
        port = int(said[0].split(":")[-1].split()[0])
        pem = (tmp_path / f"AuthKey_{KEY_ID}.p8").read_bytes()
        key = parse_signing_key(pem, key_id=KEY_ID, team_id=TEAM_ID)
        link = await connect(Client, host="localhost", port=port, tls=client_context(tmp_path / "ca.pem"))
        client = link.session
        assert isinstance(client, Client)
        client.jwt = mint(key, time.time())
        await client.until(lambda: bool(client.limits))
        assert await client.ask(ONE) == [Accepted]
        link.abort()
        await link.closed


async def test_taken_port_and_unusable_folder_are_named(apple: Simulator, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"127.0.0.1:{apple.port}"):
        await run("127.0.0.1", apple.port, tmp_path, lambda _: None)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"folder .* cannot be used"):
        await run("127.0.0.1", 0, tmp_path / "file", lambda _: None)


def test_new_signing_keys_differ() -> None:
    assert new_signing_key() != new_signing_key()
    assert "PRIVATE" not in repr(new_signing_key())
