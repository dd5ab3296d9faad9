from __future__ import annotations

import asyncio
import hashlib
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from heliograph.errors import ConfigError
from heliograph.model import Environment
from heliograph.net.http2 import Link, connect
from heliograph.net.tls import Identity, client_context
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
from heliograph.simulator.connection import AppleConnection
from heliograph.simulator.faults import (
    Action,
    Answer,
    Close,
    Cut,
    Delay,
    Handshake,
    HoldWindows,
    Reset,
    StopReading,
    StreamLimit,
    Trickle,
    Withhold,
)
from heliograph.simulator.faults import (
    GoAway as SayGoAway,
)
from heliograph.simulator.running import running
from heliograph.simulator.server import KEY_ID, TEAM_ID, Judged, Simulator, new_signing_key
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
            await self.news()

    async def news(self) -> None:
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


# -- the stream limit after a rejection --------------------------------------------------------------------------


async def test_stream_limit_is_cut_after_a_rejection_until_the_next_good_push(apple: Simulator) -> None:
    async with client_of(apple) as client:
        await client.ask("abc")
        await client.until(lambda: client.limits == [1, 1000, 1])
        await client.ask("abc")
        await client.ask(ONE)
        await client.until(lambda: client.limits == [1, 1000, 1, 1000])


async def test_answers_that_are_no_rejections_leave_the_stream_limit_alone(apple: Simulator) -> None:
    apple.unregister(ONE, 1)
    apple.rejects(TWO, "ServiceUnavailable")
    async with client_of(apple) as client:
        await client.ask(ONE, TWO)
        await client.ask("abc")
        await client.ask(ONE)
        await client.ask(TWO)
        await client.ask(THREE)
        await client.until(lambda: client.limits[2:] == [1, 1000])


async def test_last_answer_of_those_that_go_out_together_decides(apple: Simulator) -> None:
    async with client_of(apple) as client:
        await client.ask("abc", ONE)
        await client.ask(ONE, "abc")
        await client.until(lambda: client.limits == [1, 1000, 1])


async def test_stream_limit_may_be_left_as_it_is() -> None:
    async with Simulator(cuts_limit=False) as apple, client_of(apple) as client:
        await client.ask("abc")
        await client.ask(ONE)
        assert client.limits == [1, 1000]


# -- faults that last ----------------------------------------------------------------------------------------------


async def test_what_comes_while_nothing_is_read_is_answered_afterwards(apple: Simulator) -> None:
    async with client_of(apple) as client:
        apple.misbehaves(StopReading(0.05), token=ONE, times=1)
        client.submit(TWO, ONE, TWO, THREE)
        await client.until(lambda: 2 in client.ends)
        assert set(client.ends) == {0, 1, 2}
        await client.ask(TWO)
        assert [client.ends[place] for place in range(6)] == [Accepted] * 6
    assert [received.token for received in apple.received] == [TWO, ONE, TWO, THREE, TWO]


async def test_connection_that_is_not_read_for_good_holds_up_no_other(apple: Simulator) -> None:
    async with client_of(apple) as client, client_of(apple) as other:
        apple.misbehaves(StopReading(then=Withhold()), token=ONE, times=1)
        came = asyncio.Event()
        apple.follow(lambda _: came.set())
        client.submit(ONE)
        await came.wait()
        client.submit(TWO, ONE)
        assert await other.ask(ONE, TWO) == [Accepted] * 2
        assert len(client.ends) == 1
    assert [received.token for received in apple.received] == [ONE, ONE, TWO]


async def test_what_the_client_cancelled_while_nothing_was_read_is_not_acted_on(apple: Simulator) -> None:
    async with client_of(apple) as client:
        apple.misbehaves(StopReading(0.05, then=Withhold()), token=ONE, times=1)
        apple.delays(0.01, token=TWO)
        client.submit(ONE, TWO)
        # The greeting had stream 1.
        client.link.core._out.append(frames.rst_stream(5, ErrorCode.CANCEL))
        assert await client.ask(THREE) == [Accepted]
        await client.ask(TWO)
    assert [received.id for received in apple.received] == [ID + "0001", ID + "0003", ID + "0004"]


async def test_body_never_comes_in_whole_where_its_window_stays_closed() -> None:
    async with Simulator(cuts_limit=False) as apple, client_of(apple) as client:
        apple.misbehaves(HoldWindows(10), times=1)
        await client.ask(ONE)
        client.submit(ONE)
        # Without a body it needs no window, and is answered behind the one that waits.
        assert reason((await client.ask(TWO, payload=b""))[0]) == (400, "PayloadEmpty")
        assert 2 not in client.ends
        assert await client.ask(TWO, payload=b"0123456789") == [Accepted]
        assert 2 not in client.ends
    assert [len(received.payload) for received in apple.received] == [len(PAYLOAD), 10]


async def test_window_of_the_connection_is_not_opened_again(apple: Simulator) -> None:
    async with client_of(apple) as client:
        apple.misbehaves(HoldWindows(65_535), times=1)
        await client.ask(ONE)
        assert await client.ask(*[ONE] * 255, payload=b"x" * 4096) == [Accepted] * 255
        assert client.link.core._send_window == 2**20 - 255 * 4096 - 2 * len(PAYLOAD)


async def test_answers_come_in_pieces_and_are_whole(apple: Simulator) -> None:
    async with client_of(apple) as client:
        apple.misbehaves(Trickle(7, 0.0005), times=1)
        apple.unregister(TWO, 1_700_000_000_123)
        first, second, third = await client.ask(ONE, TWO, THREE)
        assert (first, third) == (Accepted, Accepted)
        assert reason(second) == (410, "Unregistered")


async def test_pieces_are_as_long_as_was_ordered() -> None:
    core = AppleConnection(0.0, max_streams=1, limits=Simulator()._limits)
    whole = core.data_to_send()
    core = AppleConnection(0.0, max_streams=1, limits=Simulator()._limits)
    core.speak_in_pieces()
    said = [core.data_to_send()]
    while b"".join(said) != whole:
        core.say_more(4)
        said += [core.data_to_send(), core.data_to_send()]
    assert {len(piece) for piece in said[1:-2:2]} == {4}
    assert set(said[::2]) == {b""}


async def test_goodbye_ends_the_pieces(apple: Simulator) -> None:
    async with client_of(apple) as client:
        apple.misbehaves(Trickle(1, 3600.0), times=1)
        apple.says_goodbye("Shutdown")
        client.submit(ONE)
        assert await client.ask(TWO) == [Accepted]
        assert client.ends[1] is Accepted
        await client.until(lambda: client.closed)
        assert len(client.goodbyes) == 1


# -- connections that suffer as they open --------------------------------------------------------------------------


async def opened(apple: Simulator) -> Client:
    link = await connect(Client, host="localhost", port=apple.port, tls=client_context(apple.ca_pem))
    assert isinstance(link.session, Client)
    return link.session


@pytest.mark.parametrize(
    "how, error, words",
    [
        ("expired", ssl.SSLCertVerificationError, "certificate has expired"),
        ("other-name", ssl.SSLCertVerificationError, "(?i)hostname mismatch"),
        ("untrusted", ssl.SSLCertVerificationError, "unable to get local issuer"),
        ("alert", ssl.SSLError, "(?i)handshake.failure"),
        ("closed", OSError, None),
    ],
)
async def test_handshake_fails_as_ordered_and_the_next_one_does_not(
    apple: Simulator, how: Any, error: type[Exception], words: str | None
) -> None:
    apple.misbehaves(Handshake(how), times=1)
    with pytest.raises(error, match=words):
        await opened(apple)
    async with client_of(apple) as client:
        assert await client.ask(ONE) == [Accepted]
    assert apple.connections == 2


async def test_unanswered_handshake_holds_up_no_other_and_ends_with_the_simulator() -> None:
    async with Simulator() as apple:
        apple.misbehaves(Handshake("silent"), connection=1)
        waiting = asyncio.create_task(opened(apple))
        while not apple.connections:  # noqa: ASYNC110 - the simulator has no event for it
            await asyncio.sleep(0)
        async with client_of(apple) as client:
            assert await client.ask(ONE) == [Accepted]
        assert not waiting.done()
    with pytest.raises(OSError):
        await waiting


async def test_client_that_gives_an_unanswered_handshake_up_is_let_go(apple: Simulator) -> None:
    apple.misbehaves(Handshake("silent"))
    reader, writer = await asyncio.open_connection("127.0.0.1", apple.port)
    writer.write(b"hello")
    writer.write_eof()
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


async def test_identity_that_was_given_makes_the_faulty_certificates_untrusted_ones() -> None:
    whole = Simulator().identity
    given = Identity(whole.ca_pem, whole.certificate_pem, whole.key_pem)
    async with Simulator(identity=given) as apple:
        apple.misbehaves(Handshake("expired"))
        with pytest.raises(ssl.SSLCertVerificationError):
            await opened(apple)


@pytest.mark.parametrize("action", [Close(), Cut()])
async def test_connection_ends_right_after_its_handshake(apple: Simulator, action: Action) -> None:
    apple.misbehaves(action, opening=True, times=1)
    client = await opened(apple)
    await client.until(lambda: client.closed)
    assert client.goodbyes == []
    async with client_of(apple) as other:
        assert await other.ask(ONE) == [Accepted]


async def test_connection_is_said_goodbye_to_before_any_request(apple: Simulator) -> None:
    apple.misbehaves(SayGoAway("Shutdown"), opening=True, times=1)
    client = await opened(apple)
    await client.until(lambda: client.closed)
    assert [(each.last_stream_id, msgspec.json.decode(each.debug)) for each in client.goodbyes] == [
        (0, {"reason": "Shutdown"})
    ]


async def test_connection_begins_with_another_stream_limit(apple: Simulator) -> None:
    apple.misbehaves(StreamLimit(7), opening=True)
    async with client_of(apple, greet=False) as client:
        await client.until(lambda: client.limits == [1, 7])
        assert await client.ask(ONE, TWO) == [Accepted] * 2
        assert client.limits == [1, 7]


async def test_connection_is_not_read_from_the_beginning_for_a_while(apple: Simulator) -> None:
    apple.misbehaves(StopReading(0.02), opening=True, connection=1)
    async with client_of(apple, greet=False) as client, client_of(apple) as other:
        assert await client.ask(ONE) == [Accepted]
        assert await other.ask(TWO) == [Accepted]


async def test_nothing_is_left_when_the_simulator_ends_amid_all_faults() -> None:
    before = asyncio.all_tasks()
    async with Simulator() as apple:
        lasting: list[Action] = [
            StopReading(),
            StopReading(3600.0),
            HoldWindows(),
            Trickle(1, 3600.0),
            Delay(3600.0),
            Withhold(),
        ]
        clients = []
        for action in lasting:
            apple.misbehaves(action, times=1)
            client = await opened(apple)
            client.jwt = mint(apple.signing_key, time.time())
            while not client.limits:
                await client.news()
            client.submit(ONE)
            clients.append(client)
            while apple.misbehaving:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0)
        apple.misbehaves(Handshake("silent"))
        halves = [await asyncio.open_connection("127.0.0.1", apple.port) for _ in range(2)]
        apple.behaves()
        halves.append(await asyncio.open_connection("127.0.0.1", apple.port))
        while apple.connections < len(clients) + len(halves):  # noqa: ASYNC110 - as above
            await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
    for client in clients:
        client.link.abort()
        await client.link.closed
    for _, writer in halves:
        writer.transport.abort()


async def test_simulator_listens_on_every_address_of_its_host() -> None:
    async with Simulator(host="localhost") as apple:
        for *_, address in socket.getaddrinfo("localhost", apple.port, type=socket.SOCK_STREAM):
            _, writer = await asyncio.open_connection(str(address[0]), apple.port)
            writer.close()
            await writer.wait_closed()


# -- the journal -------------------------------------------------------------------------------------------------


async def test_journal_has_a_line_for_each_request_before_its_answer(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    async with Simulator(journal=path, cuts_limit=False) as apple, client_of(apple) as client:
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


# -- as a program ------------------------------------------------------------------------------------------------


async def test_files_for_clients_are_made_once(tmp_path: Path) -> None:
    folder = tmp_path / "apple"
    contents = []
    for _ in range(2):
        async with running(folder) as run:
            assert (run.ca_file, run.key_file) == (folder / "ca.pem", folder / f"AuthKey_{KEY_ID}.p8")
            contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1]
    server = {"server.pem", "server.key", "expired.pem", "other-name.pem"}
    assert contents[0].keys() == {"ca.pem", f"AuthKey_{KEY_ID}.p8", *server}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


async def test_client_with_these_files_is_served(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        key = parse_signing_key(run.key_file.read_bytes(), key_id=KEY_ID, team_id=TEAM_ID)
        link = await connect(Client, host="localhost", port=run.apple.port, tls=client_context(run.ca_file))
        client = link.session
        assert isinstance(client, Client)
        client.jwt = mint(key, time.time())
        await client.until(lambda: bool(client.limits))
        assert await client.ask(ONE) == [Accepted]
        link.abort()
        await link.closed
    async with running(tmp_path) as run:
        run.apple.misbehaves(Handshake("expired"))
        with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
            await opened(run.apple)


async def test_taken_port_and_unusable_folder_are_named(apple: Simulator, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"127.0.0.1:{apple.port}"):
        await running(tmp_path, port=apple.port).__aenter__()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"folder .* cannot be used"):
        await running(tmp_path / "file").__aenter__()


def test_new_signing_keys_differ() -> None:
    assert new_signing_key() != new_signing_key()
    assert "PRIVATE" not in repr(new_signing_key())


@pytest.mark.parametrize("host, url", [("127.0.0.1", "https://127.0.0.1:2197"), ("::1", "https://[::1]:2197")])
def test_url_has_an_ipv6_address_in_brackets(host: str, url: str) -> None:
    assert Simulator(host=host, port=2197).url == url
