"""What receipts tell people, whatever became of a notification."""

from __future__ import annotations

import re

import msgspec
import pytest

from heliograph import reasons
from heliograph.doors.receipts import meaning, receipt_body
from heliograph.model import DeviceToken, Environment, PushType, Receipt, State

OWN = (None, "NotProcessed", "NoAnswer", "SentBefore", "TooLate", "Unreadable")
WHY = "cannot connect to api.push.apple.com:443: timed out"
ID = "01a1fdfa-4600-7d52-9e31-5a4cf08b0001"
NOW = 1_795_262_400.0


def receipt(state: State, reason: str | None = None, status: int | None = None, **more: object) -> Receipt:
    return msgspec.structs.replace(Receipt("x", "shop", state, NOW, reason=reason, status=status), **more)


def possible(state: State) -> list[Receipt]:
    """With each reason, whether or not it has ever led there."""
    words = [*((each.word, each.status) for each in reasons.TABLE.values()), ("BadNewWord", 418), ("Status502", 502)]
    found = [receipt(state, reason, why=why) for reason in OWN for why in (None, WHY, WHY + ".")]
    found += [receipt(state, word, status) for word, status in words]
    return [*found, *(receipt(state, each.reason, cancelling=True) for each in found if state is State.QUEUED)]


@pytest.mark.parametrize("state", State)
def test_every_state_and_reason_is_told_in_plain_sentences(state: State) -> None:
    for each in possible(state):
        said = meaning(each)
        assert 20 < len(said) < 420, said
        assert said[0].isupper(), said
        assert said.endswith("."), said
        assert not re.search(r"None|\.\.|  |\n|: *\.", said), said
        assert all(sentence[0].isupper() for sentence in re.split(r"\. ", said)), said


@pytest.mark.parametrize("state", [State.BURIED, State.EXPIRED, State.CANCELLED, State.UNKNOWN, State.ACCEPTED])
def test_what_has_ended_is_never_said_to_be_sent_again_by_itself(state: State) -> None:
    for each in possible(state):
        assert not re.search(r"it is (sent|tried) again|by itself", meaning(each)), meaning(each)


@pytest.mark.parametrize("state", State)
def test_every_state_says_something_of_its_own_and_what_to_do(state: State) -> None:
    said = meaning(receipt(state, "Unregistered", 410) if state is State.REJECTED else receipt(state))
    assert [each for each in State if meaning(receipt(each)) == said] in ([state], [])
    assert re.search("there is nothing|ask again|stop sending|send it anew|has it sent again", said, re.IGNORECASE)


@pytest.mark.parametrize(
    "each,said",
    [
        (receipt(State.QUEUED), "waiting to be sent. There is nothing to do."),
        (receipt(State.QUEUED, "NotProcessed", why=WHY), f"The last try failed: {WHY}. It is tried again by itself."),
        (receipt(State.QUEUED, "InvalidProviderToken", 403), "check key, key id and team id"),
        (receipt(State.QUEUED, "NoAnswer", why=WHY, cancelling=True), "if Apple does not take it this time"),
        (receipt(State.ACCEPTED), "nobody is told"),
        (receipt(State.REJECTED, "BadDeviceToken", 400), "belongs to the other environment"),
        (receipt(State.REJECTED, "NewWord", 400), "correct it"),
        (receipt(State.EXPIRED, "TooLate"), "Its expiration passed"),
        (receipt(State.EXPIRED, "ServiceUnavailable", 503), "Apple's last answer was 503 ServiceUnavailable."),
        (receipt(State.BURIED, "InvalidProviderToken", 403), "403 InvalidProviderToken. Apple cannot verify"),
        (receipt(State.BURIED, "NotProcessed", why=WHY), "api.push.apple.com:443: timed out."),
        (receipt(State.BURIED, "Unreadable"), "send it anew"),
        (receipt(State.CANCELLED, "ServiceUnavailable", 503), "503 ServiceUnavailable"),
        (receipt(State.CANCELLED, connection="main-9f31c2-17"), "before it on its connection was refused"),
        (
            receipt(State.CANCELLED, "NotProcessed", why=WHY, connection="main-9f31c2-17"),
            "before it on its connection was",
        ),
        (receipt(State.CANCELLED, "ServiceUnavailable", 503, connection="main-9f31c2-17"), "503 ServiceUnavailable"),
        (receipt(State.CANCELLED, "SentBefore"), "It had gone out before, and its client sent it again"),
        (
            receipt(State.CANCELLED, "SentBefore", why=f"it is {ID}", connection="main-9f31c2-17"),
            f"before as {ID}, and",
        ),
        (receipt(State.UNKNOWN, "NoAnswer", why=WHY), "Apple may have taken it or not"),
    ],
)
def test_what_people_must_know_is_said(each: Receipt, said: str) -> None:
    assert said in meaning(each)


def test_a_receipt_as_json_tells_all_of_it() -> None:
    whole = receipt(
        State.REJECTED,
        "Unregistered",
        410,
        since=1_795_262_400_123,
        updated_at=NOW + 1.5,
        attempts=2,
        environment=Environment.PRODUCTION,
        topic="com.example.shop",
        push_type=PushType.ALERT,
        token=DeviceToken("00ff"),
        collapse_id="a",
        expiration=0,
        connection="main-9f31c2-17",
        identifier=0xFFFFFFFF,
        apns_id=ID,
    )
    assert msgspec.json.decode(msgspec.json.encode(receipt_body(whole))) == {
        "id": "x",
        "app": "shop",
        "environment": "production",
        "topic": "com.example.shop",
        "push_type": "alert",
        "token": "00ff",
        "collapse_id": "a",
        "expiration": 0,
        "state": "rejected",
        "cancelling": False,
        "reason": "Unregistered",
        "status": 410,
        "meaning": meaning(whole),
        "created_at": "2026-11-21T12:00:00.000Z",
        "updated_at": "2026-11-21T12:00:01.500Z",
        "attempts": 2,
        "next_attempt_at": None,
        "unregistered_at": "2026-11-21T12:00:00.123Z",
        "unique_id": None,
        "connection": "main-9f31c2-17",
        "identifier": 0xFFFFFFFF,
        "apns_id": ID,
    }
    assert "00ff" not in repr(whole)


@pytest.mark.parametrize("since", [-(2**63), 2**63])
def test_a_time_that_cannot_be_is_told_as_the_nearest_that_can(since: int) -> None:
    assert receipt_body(receipt(State.REJECTED, "Unregistered", 410, since=since)).unregistered_at
