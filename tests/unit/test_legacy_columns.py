"""What frames of the binary protocol become: push types, priorities, expirations."""

from __future__ import annotations

from typing import Any

import pytest

from heliograph.doors.legacy.columns import HeaderSets, append, empty_frames, pick
from heliograph.model import Headers, PushType
from heliograph.protocols.apns import implied_push_type, is_background
from heliograph.protocols.binary import Frames

NOW = 1_700_000_000.0
TOPIC = "com.example.shop"
PAYLOAD = b'{"aps":{"alert":"Tea"}}'
SILENT = b'{"aps":{"content-available":1}}'


def frames(*some: dict[str, Any]) -> Frames:
    made = empty_frames()
    for number, each in enumerate(some):
        payload, expiration, priority = each.get("payload", PAYLOAD), each.get("expiration"), each.get("priority")
        append(made, Frames([b"ab"], [payload], [number], [expiration], [priority]))
    return made


@pytest.mark.parametrize(
    "topic,push_type",
    [
        (TOPIC, None),
        (f"{TOPIC}.voip", PushType.VOIP),
        (f"{TOPIC}.voip-ptt", PushType.PUSHTOTALK),
        (f"{TOPIC}.complication", PushType.COMPLICATION),
        (f"{TOPIC}.pushkit.fileprovider", PushType.FILEPROVIDER),
        ("com.example.my.voip", None),
        ("com.apple.mgmt.External.0815", PushType.MDM),
        ("", None),
    ],
)
def test_the_end_of_a_topic_says_the_push_type_unless_the_app_is_called_so(
    topic: str, push_type: PushType | None
) -> None:
    assert implied_push_type(topic, (TOPIC, "com.example.my.voip")) is push_type


@pytest.mark.parametrize(
    "payload,background",
    [
        (SILENT, True),
        (b'{"aps":{"content-available":1,"category":"x"},"more":2}', True),
        (b'{"aps":{"content-available":1,"sound":""}}', False),
        (b'{"aps":{"content-available":1,"badge":0}}', False),
        (b'{"aps":{"content-available":1,"alert":"Tea"}}', False),
        (b'{"aps":{"content-available":0}}', False),
        (b'{"aps":{"content-available":"1"}}', False),
        (b'{"aps":{},"content-available":1}', False),
        (b'{"aps":"content-available"}', False),
        (b'"content-available"', False),
        (b'{"content-available', False),
        (b'\xff"content-available"', False),
        (PAYLOAD, False),
    ],
)
def test_a_payload_with_nothing_to_show_is_a_background_one(payload: bytes, background: bool) -> None:
    assert is_background(payload) is background


def test_frames_alike_share_one_header_set() -> None:
    sets = HeaderSets(TOPIC, (TOPIC,))
    (first,) = sets.column(frames({}, {}), NOW)
    (again,) = sets.column(frames({}), NOW)
    assert first is again
    assert first == Headers(TOPIC)


def test_each_frame_has_its_own_expiration_and_priority() -> None:
    later = int(NOW) + 60
    column = HeaderSets(TOPIC, (TOPIC,)).column(
        frames({"expiration": later, "priority": 5}, {"expiration": 0, "priority": 10}, {"expiration": 5}, {}), NOW
    )
    assert [each.expiration for each in column] == [later, 0, 0, None]
    assert [each.priority for each in column] == [5, 10, None, None]


@pytest.mark.parametrize("priority", [None, 1, 5, 10])
def test_a_background_payload_has_the_one_priority_that_apple_takes(priority: int | None) -> None:
    (headers,) = HeaderSets(TOPIC, (TOPIC,)).column(frames({"payload": SILENT, "priority": priority}), NOW)
    assert (headers.push_type, headers.priority) == (PushType.BACKGROUND, 5)


def test_with_a_topic_for_another_kind_of_push_the_payload_says_nothing() -> None:
    (headers,) = HeaderSets(f"{TOPIC}.voip", (TOPIC,)).column(frames({"payload": SILENT, "priority": 10}), NOW)
    assert headers == Headers(f"{TOPIC}.voip", PushType.VOIP, 10)


def test_header_sets_that_change_all_the_time_do_not_pile_up() -> None:
    sets = HeaderSets(TOPIC, (TOPIC,))
    for second in range(5000):
        sets.column(frames({"expiration": int(NOW) + 60 + second}), NOW)
    assert len(sets) <= 1025


def test_some_frames_can_be_picked() -> None:
    some = pick(frames({}, {"expiration": 5}, {"priority": 5}), [0, 2])
    assert (some.identifiers, some.expirations, some.priorities) == ([0, 2], [None, None], [None, 5])
