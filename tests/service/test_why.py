"""`heliograph why`: the real command asks a real server, whose store holds what connections brought before."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from heliograph.batches import new_batch_id
from heliograph.model import (
    Batch,
    Detail,
    DeviceToken,
    Environment,
    Headers,
    Origin,
    Outcomes,
    Removal,
    State,
)
from heliograph.stores.sqlite import SqliteStore
from tests.service.test_cli import run, serving

NOW = float(int(time.time()) - 600)
HEADERS = (Headers("com.example.demo"),)
PAYLOAD = (b'{"aps":{"alert":"The kettle boils"}}',)
OWN_ID = "0e3f1a52-7c40-4a53-9b0f-7d0a5ac5ffff"
"""Whose last digits are no place in a batch of ours."""

DEAD, UNKNOWN, REVIVED, FORMER, ALIVE = (f"{number:064x}" for number in (0xDEAD, 0xBAD, 0xACE, 0xF00, 0xA11CE))
LONG_DEAD, BY_PROXY = f"{0xDEAD0:064x}", f"{0xBEEF:064x}"


def batch(number: int, tokens: Sequence[str], app: str = "demo", connection: str = "", first: int = 0) -> Batch:
    """`first`: what the client called the first one; it counts."""
    identifiers = b"".join((first + index).to_bytes(4, "big") for index in range(len(tokens))) if first else b""
    return Batch(
        new_batch_id(NOW + number, bytes([number] * 8)),
        app,
        Environment.PRODUCTION,
        NOW + number,
        HEADERS,
        [each.encode() for each in tokens],
        PAYLOAD,
        origin=Origin(connection, identifiers) if connection else None,
    )


def ended(batch: Batch, states: Sequence[State], *details: Detail) -> tuple[Batch, Outcomes]:
    times_ms = (250).to_bytes(4, "big") * len(batch)
    return batch, Outcomes(batch.id, 1, bytes(states), times_ms, details)


class Kept:
    """What the server's store holds."""

    plain = batch(1, [ALIVE])
    mixed = batch(2, [ALIVE, UNKNOWN, *[ALIVE] * 4], connection="main-9f31c2-17", first=41)
    behind = batch(3, [ALIVE] * 900, connection="main-9f31c2-17", first=47)
    far_behind = batch(10, [ALIVE] * 300, connection="main-9f31c2-17", first=947)
    again = batch(4, [ALIVE], connection="main-9f31c2-18", first=41)
    again_two = batch(12, [ALIVE, ALIVE], connection="main-9f31c2-23", first=41)
    dead = batch(5, [DEAD], connection="main-9f31c2-19", first=7)
    nameless = batch(6, [UNKNOWN], connection="main-9f31c2-20")
    revived = batch(7, [REVIVED, REVIVED])
    waiting = batch(8, [FORMER], app="former", connection="main-9f31c2-21", first=0xFFFFFFFF)
    late = batch(11, [ALIVE] * 4, connection="main-9f31c2-22")
    proxied = Batch(
        new_batch_id(NOW + 9, bytes([9] * 8)),
        "demo",
        Environment.PRODUCTION,
        NOW + 9,
        HEADERS,
        [ALIVE.encode()],
        PAYLOAD,
        apns_ids={0: OWN_ID},
        origin=Origin("apple_proxy.main"),
    )
    failed = batch(13, [BY_PROXY] * 7, connection="apple_proxy.main")
    durable = batch(14, [BY_PROXY] * 2, connection="apple_proxy.main.durable")
    short = batch(15, ["ab"])
    unknown = Detail(0, "BadDeviceToken", 400)
    gone = Detail(0, "Unregistered", 410, since=1_795_176_000_000)

    @classmethod
    async def fill(cls, file: Path) -> None:
        sent_before = Detail(
            0, "SentBefore", attempts=0, why=f"it was sent as {cls.mixed.id}0001, and again by the client"
        )
        two = [
            Detail(index, "SentBefore", attempts=0, why=f"it was sent as {cls.mixed.id}{place}, and again")
            for index, place in enumerate(("0001", "0003"))
        ]
        finished = [
            ended(cls.again_two, [State.CANCELLED] * 2, *two),
            ended(cls.plain, [State.ACCEPTED]),
            ended(cls.mixed, [State.ACCEPTED, State.REJECTED, *[State.ACCEPTED] * 4], Detail(1, "BadDeviceToken", 400)),
            ended(cls.behind, [State.CANCELLED] * 900),
            ended(cls.far_behind, [State.CANCELLED] * 300),
            ended(cls.again, [State.CANCELLED], sent_before),
            ended(cls.dead, [State.REJECTED], cls.gone),
            ended(cls.nameless, [State.REJECTED], cls.unknown),
            ended(cls.revived, [State.REJECTED, State.ACCEPTED], cls.gone),
            ended(
                cls.late,
                [State.EXPIRED, State.ACCEPTED, State.EXPIRED, State.EXPIRED],
                *(Detail(index, "TooLate", attempts=0) for index in (0, 2, 3)),
            ),
            ended(cls.proxied, [State.ACCEPTED]),
            ended(
                cls.failed,
                [*[State.REJECTED] * 4, State.CANCELLED, State.UNKNOWN, State.REJECTED],
                Detail(0, "TooManyRequests", 429),
                Detail(1, "InternalServerError", 500),
                Detail(2, "InvalidProviderToken", 403),
                Detail(3, "BadTopic", 400),
                Detail(4, "NotProcessed", why="Apple could not be reached"),
                Detail(5, "NoAnswer"),
                Detail(6, "Shutdown", 503),
            ),
            ended(cls.durable, [State.CANCELLED, State.UNKNOWN], Detail(0, attempts=0), Detail(1, "NoAnswer")),
            ended(cls.short, [State.ACCEPTED]),
        ]
        dead = DEAD, LONG_DEAD
        removals = [Removal("demo", Environment.PRODUCTION, DeviceToken(each), 1_795_176_000) for each in dead]
        store = await SqliteStore.open(file)
        await store.keep(finished, removals)
        await store.put([cls.waiting])
        await store.aclose()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A server for all tests of this file, and the folder in which commands find its key."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "data").mkdir()
    asyncio.run(Kept.fill(folder / "data" / "heliograph.db"))
    with serving(folder) as found:
        yield folder, found


FREE = ("{", "device token", "01a")
"""How lines begin that may be long: JSON, and those with a device token or an id."""


def ask(shared: tuple[Path, dict[str, str]], *arguments: str) -> subprocess.CompletedProcess[str]:
    folder, server = shared
    done = run(folder, *arguments, **server)
    if arguments[0] == "why":
        assert [each for each in done.stdout.splitlines() if len(each) > 80 and not each.startswith(FREE)] == []
    return done


def flat(text: str) -> str:
    """Without line breaks, which are where they fit."""
    return " ".join(text.split())


def at(seconds: float) -> str:
    return time.strftime("%Y-%m-%d at %H:%M:%S UTC", time.gmtime(seconds))


# -- a notification --------------------------------------------------------------------------------------------------


def test_a_frame_that_apple_refused_is_told_with_its_way_and_what_followed(
    shared: tuple[Path, dict[str, str]],
) -> None:
    done = ask(shared, "why", f"{Kept.mixed.id}0002")
    assert done.returncode == 1
    assert done.stdout.startswith(f"{Kept.mixed.id}0002  rejected  400 BadDeviceToken\n")
    said = flat(done.stdout)
    way = "by the connection main-9f31c2-17, whose client gave it the identifier 42."
    for words in (
        f"It came on {at(NOW + 2)} for the app demo in production, {way}",
        "Apple said no for good. The device token is malformed or belongs to the other environment",
        f"It was sent once, and rejected on {at(NOW + 2)}.",
        f"Nothing goes to its device token until {at(NOW + 3602)}, as Apple did not know it.",
        "Its client was sent an error packet with status 8 and identifier 42, if its connection was still open.",
        f"device token {UNKNOWN}",
    ):
        assert words in said


def test_a_frame_without_identifier_has_that_of_the_packet_that_told_of_it(
    shared: tuple[Path, dict[str, str]],
) -> None:
    said = flat(ask(shared, "why", f"{Kept.nameless.id}0001").stdout)
    assert "by the connection main-9f31c2-20." in said
    assert "status 8 and identifier 0, if" in said


def test_a_dead_device_token_is_told_by_feedback_and_since_when(shared: tuple[Path, dict[str, str]]) -> None:
    done = ask(shared, "why", f"{Kept.dead.id}0001")
    assert done.returncode == 1
    said = flat(done.stdout)
    assert "rejected 410 Unregistered It came on" in said
    assert "Its device token is dead, as Apple says: since 2026-11-20 at 12:00:00 UTC. New ones to it are ref" in said
    assert "Its client is told by the feedback service" in said
    assert "error packet" not in said


def test_what_was_cancelled_behind_a_bad_frame_names_that_one(shared: tuple[Path, dict[str, str]]) -> None:
    done = ask(shared, "why", f"{Kept.behind.id}0001")
    assert done.returncode == 1
    said = flat(done.stdout)
    assert "whose client gave it the identifier 47." in said
    assert "It was cancelled before Apple took it" in said
    assert (
        "On this connection Apple refused the notification with identifier 42: 400 BadDeviceToken. What was behind it "
        f"and had not gone out was cancelled. That one's id is {Kept.mixed.id}0002." in said
    )


def test_who_may_not_look_for_others_is_told_of_the_one_alone(shared: tuple[Path, dict[str, str]]) -> None:
    folder, server = shared
    made = run(folder, "keys", "add", "sender", "--scope", "send", "--json", **server)
    key = json.loads(made.stdout)["key"]
    done = run(folder, "why", f"{Kept.behind.id}0001", HELIOGRAPH_KEY=key, **server)
    assert (done.returncode, done.stderr) == (1, "")
    assert "It was cancelled before Apple took it" in flat(done.stdout)
    assert "On this connection" not in done.stdout
    done = run(folder, "why", "main-9f31c2-17", HELIOGRAPH_KEY=key, **server)
    assert (done.returncode, done.stdout) == (2, "")
    assert "scope" in done.stderr


def test_what_was_sent_again_leads_to_what_it_had_gone_out_as(shared: tuple[Path, dict[str, str]]) -> None:
    done = ask(shared, "why", f"{Kept.again.id}0001")
    assert done.returncode == 0
    said = flat(done.stdout)
    assert said.startswith(f"{Kept.again.id}0001 cancelled SentBefore It came on")
    assert f"It had gone out before as {Kept.mixed.id}0001, and its client sent it again" in said
    assert "It was never sent, and cancelled on" in said
    assert f" {Kept.mixed.id}0001 accepted It came on" in said
    (first, second) = (
        json.loads(line) for line in ask(shared, "why", "--json", f"{Kept.again.id}0001").stdout.splitlines()
    )
    assert (first["reason"], second["id"], second["state"]) == ("SentBefore", f"{Kept.mixed.id}0001", "accepted")


def test_the_apns_id_of_its_sender_finds_a_notification(shared: tuple[Path, dict[str, str]]) -> None:
    for each in (OWN_ID, OWN_ID.upper(), f"{Kept.proxied.id}0001"):
        done = ask(shared, "why", each)
        assert done.returncode == 0
        assert done.stdout.startswith(f"{Kept.proxied.id}0001  accepted\n")
        way = f"by the Apple-shaped proxy main. Its sender gave it the apns-id {OWN_ID}."
        assert way in flat(done.stdout)


@pytest.mark.parametrize(
    "place, words",
    [
        (1, "Its sender was given Apple's answer, 429 TooManyRequests, and decides whether to send it again: nothing"),
        (2, "Its sender was given Apple's answer, 500 InternalServerError, and decides"),
        (3, "Apple answered 403 InvalidProviderToken, which is not its sender's fault: that one was answered 503"),
        (4, "Apple said no for good."),
        (5, "did not act on it (Apple could not be reached). Its sender was answered 503 ServiceUnavailable, and deci"),
        (6, "Its sender was answered 500 InternalServerError, and decides whether to send it again"),
        (7, "Apple answered 503 Shutdown, which is not its sender's fault: that one was answered 503 ServiceUnavail"),
    ],
)
def test_of_what_the_proxy_carried_is_told_what_its_sender_was_answered(
    shared: tuple[Path, dict[str, str]], place: int, words: str
) -> None:
    done = ask(shared, "why", f"{Kept.failed.id}000{place}")
    assert done.returncode == 1
    said = flat(done.stdout)
    assert "by the Apple-shaped proxy main." in said
    assert words in said
    for wrong in (
        "it is sent again",
        "as was asked for",
        "error packet",
        "It was cancelled before",
        "and cancelled on",
    ):
        assert wrong not in said


def test_of_what_the_proxy_gave_to_the_queue_is_told_what_the_queue_did(shared: tuple[Path, dict[str, str]]) -> None:
    said = flat(ask(shared, "why", f"{Kept.durable.id}0001").stdout)
    assert "by the Apple-shaped proxy main." in said
    assert "send it anew if it should be sent after all. It was never sent, and cancelled on" in said
    assert "It is not sent again, as was asked for" in flat(ask(shared, "why", f"{Kept.durable.id}0002").stdout)


def test_what_the_proxy_brought_can_be_listed(shared: tuple[Path, dict[str, str]]) -> None:
    listed = ask(shared, "list", "--connection", "apple_proxy.main").stdout
    assert len(listed.splitlines()) == 8
    assert Kept.failed.id in listed
    assert Kept.proxied.id in listed


def test_what_came_by_the_api_and_what_waits_say_so(shared: tuple[Path, dict[str, str]]) -> None:
    done = ask(shared, "why", f"{Kept.plain.id}0001")
    assert done.returncode == 0
    assert "for the app demo in production, by the HTTP API." in flat(done.stdout)
    done = ask(shared, "why", f"{Kept.waiting.id}0001")
    assert done.returncode == 4
    assert "It was not sent yet" in flat(done.stdout)
    assert "the identifier 4294967295." in flat(done.stdout)


def test_an_id_that_is_not_known_is_told_and_the_others_all_the_same(shared: tuple[Path, dict[str, str]]) -> None:
    absent = "01a1fdfa-4600-7d52-9e31-5a4cf08b0001"
    done = ask(shared, "why", absent, f"{Kept.plain.id}0001")
    assert done.returncode == 1
    assert f"{absent}  not known\n  No notification with this id was ever taken" in done.stderr
    assert done.stdout.startswith(f"{Kept.plain.id}0001  accepted\n")
    done = ask(shared, "why", absent, "--json")
    assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (1, "UnknownNotification")


# -- a connection ----------------------------------------------------------------------------------------------------


def test_a_connection_is_summed_up(shared: tuple[Path, dict[str, str]]) -> None:
    done = ask(shared, "why", "main-9f31c2-17")
    assert done.returncode == 1
    said = done.stdout
    assert said.startswith("main-9f31c2-17  1,206 notifications\n")
    assert f"They came from {at(NOW + 2)} to {at(NOW + 10)} for the app demo." in flat(said)
    assert "\n      1,200  cancelled\n          5  accepted\n          1  rejected\n" in said
    assert "\nrejected  400 BadDeviceToken  identifier 42\n  Apple said no for good." in said
    assert "\ncancelled  identifiers 47 to 1246\n" in said
    assert said.endswith("\nMore on the first of these: heliograph why main-9f31c2-17 --identifier 42\n")
    assert len(said.splitlines()) < 25


def test_a_connection_of_one_notification_is_told_as_that_one_is(shared: tuple[Path, dict[str, str]]) -> None:
    assert ask(shared, "why", "main-9f31c2-19").stdout == ask(shared, "why", f"{Kept.dead.id}0001").stdout


def test_what_was_sent_again_is_one_kind_whatever_it_had_gone_out_as(shared: tuple[Path, dict[str, str]]) -> None:
    done = ask(shared, "why", "main-9f31c2-23")
    assert done.returncode == 0
    assert "\ncancelled  SentBefore  identifiers 41 to 42\n  It had gone out before, and its client" in done.stdout


def test_of_notifications_without_identifiers_some_ids_are_shown(shared: tuple[Path, dict[str, str]]) -> None:
    done = ask(shared, "why", "main-9f31c2-22")
    assert done.returncode == 1
    assert f"\nexpired  TooLate  {Kept.late.id}0001 and 2 more\n" in done.stdout
    assert done.stdout.endswith(f"heliograph why {Kept.late.id}0001\n")


def test_an_identifier_finds_a_frame_of_a_connection(shared: tuple[Path, dict[str, str]]) -> None:
    done = ask(shared, "why", "main-9f31c2-17", "--identifier", "41")
    assert done.returncode == 0
    assert done.stdout.startswith(f"{Kept.mixed.id}0001  accepted\n")
    assert done.stdout.count("It came on") == 1


def test_a_connection_of_which_nothing_is_known_leads_to_the_log(shared: tuple[Path, dict[str, str]]) -> None:
    done = ask(shared, "why", "main-9f31c2-99")
    assert (done.returncode, done.stdout) == (1, "")
    assert "look for legacy_error_packet with the name of the connection" in flat(done.stderr)
    done = ask(shared, "why", "main-9f31c2-99", "--identifier", "9")
    assert (done.returncode, done.stdout) == (1, "")
    assert "came by main-9f31c2-99 with the identifier 9: it was not taken" in flat(done.stderr)


def test_json_has_a_line_for_each_notification_of_a_connection(shared: tuple[Path, dict[str, str]]) -> None:
    done = ask(shared, "why", "main-9f31c2-17", "--json")
    found: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted(each["identifier"] for each in found) == list(range(41, 1247))
    assert {each["connection"] for each in found} == {"main-9f31c2-17"}


# -- a device token --------------------------------------------------------------------------------------------------


def test_a_removed_device_token_is_told_to_be_dead_since_when(shared: tuple[Path, dict[str, str]]) -> None:
    for given in (DEAD, DEAD.upper(), f"<{DEAD[:8]} {DEAD[8:]}>"):
        done = ask(shared, "why", given, "--app", "demo")
        assert done.returncode == 1
        assert done.stdout.startswith(f"device token {DEAD}\n")
        said = flat(done.stdout)
        assert "It is removed: Apple says that it is dead since 2026-11-20 at 12:00:00 UTC (app demo, product" in said
        assert f"{Kept.dead.id}0001" in said


def test_a_removed_device_token_is_told_to_be_dead_also_when_no_receipt_is_left(
    shared: tuple[Path, dict[str, str]],
) -> None:
    done = ask(shared, "why", LONG_DEAD)
    assert done.returncode == 1
    said = flat(done.stdout)
    assert "It is removed: Apple says that it is dead since 2026-11-20 at 12:00:00 UTC (app demo, product" in said
    assert "No notification to it is known here" in said


def test_a_device_token_that_apple_did_not_know_is_told_to_be_held_back(shared: tuple[Path, dict[str, str]]) -> None:
    said = flat(ask(shared, "why", UNKNOWN).stdout)
    assert f"Apple did not know it, so that it is held back until {at(NOW + 3606)}" in said
    assert said.index(f"{Kept.nameless.id}0001") < said.index(f"{Kept.mixed.id}0002")


def test_a_device_token_that_lives_again_is_not_told_to_be_removed(shared: tuple[Path, dict[str, str]]) -> None:
    done = ask(shared, "why", REVIVED)
    assert done.returncode == 0
    said = flat(done.stdout)
    assert "Apple called it dead before. It was registered again since, or that is long ago." in said
    assert "removed" not in said
    assert "The last of them: Apple took it." in said


def test_a_device_token_of_an_app_that_is_gone_is_told_all_the_same(shared: tuple[Path, dict[str, str]]) -> None:
    done = ask(shared, "why", FORMER)
    assert done.returncode == 4
    assert "What went to it: It is waiting to be sent." in flat(done.stdout)
    assert f"{Kept.waiting.id}0001" in done.stdout


def test_only_the_last_of_many_to_a_device_token_are_shown(shared: tuple[Path, dict[str, str]]) -> None:
    done = ask(shared, "why", ALIVE, "--app", "demo")
    assert done.returncode == 1
    assert done.stdout.count("\n01a") == 10
    assert "The last of them: It had gone out before as" in flat(done.stdout)
    done = ask(shared, "why", ALIVE, "--app", "demo", "--json")
    assert len(done.stdout.splitlines()) == 10


def test_a_device_token_of_one_octet_is_one(shared: tuple[Path, dict[str, str]]) -> None:
    done = ask(shared, "why", "AB")
    assert done.returncode == 0
    assert f"{Kept.short.id}0001 " in done.stdout


def test_a_device_token_of_which_nothing_is_known_is_told(shared: tuple[Path, dict[str, str]]) -> None:
    done = ask(shared, "why", "00" * 32)
    assert done.returncode == 1
    assert "No notification to it is known here" in flat(done.stdout)
    done = ask(shared, "why", "00" * 32, "--json")
    assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (1, "UnknownNotification")


# -- what is none of these -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nonsense"], "is neither the id of a notification, nor a connection's name"),
        (["a1b"], "is neither the id of a notification"),
        (["ab" * 201], "is neither the id of a notification"),
        (
            ["01a1fdfa-4600-7d52-9e31-5a4cf08b0001", "--identifier", "1"],
            "--identifier goes with the name of a connection",
        ),
        (["main-9f31c2-17", "--identifier", "-1"], "is not in the range"),
        ([DEAD, "--app", "dmo"], "Did you mean demo?"),
    ],
)
def test_what_cannot_be_looked_for_is_told(
    shared: tuple[Path, dict[str, str]], arguments: list[str], words: str
) -> None:
    done = ask(shared, "why", *arguments)
    assert done.returncode == 2
    assert words in done.stderr


# -- the same, by other commands -------------------------------------------------------------------------------------


def test_status_and_list_show_connections(shared: tuple[Path, dict[str, str]]) -> None:
    said = ask(shared, "status", f"{Kept.mixed.id}0002").stdout
    assert "  connection    main-9f31c2-17\n  identifier    42\n" in said
    assert f"  apns-id       {OWN_ID}\n" in ask(shared, "status", OWN_ID).stdout
    listed = ask(shared, "list", "--connection", "main-9f31c2-19").stdout
    assert listed.startswith(f"{Kept.dead.id}0001 ")
    assert len(listed.splitlines()) == 1
    listed = ask(shared, "list", "--reason", "SentBefore").stdout
    assert [each.split()[0] for each in listed.splitlines()] == [
        f"{Kept.again_two.id}0002",
        f"{Kept.again_two.id}0001",
        f"{Kept.again.id}0001",
    ]
