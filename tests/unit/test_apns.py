from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliograph.errors import Refused
from heliograph.model import ACCEPTED, Answered, Headers, PushType
from heliograph.protocols.apns import (
    allowed_topic,
    answer,
    answer_body,
    check_headers,
    check_token,
    constant_fields,
    default_priority,
    topic_for,
    varying_fields,
)

TOPIC = "com.example.news"


@pytest.mark.parametrize(
    "push_type,suffix",
    [
        (PushType.ALERT, ""),
        (PushType.BACKGROUND, ""),
        (PushType.MDM, ""),
        (PushType.LOCATION, ".location-query"),
        (PushType.VOIP, ".voip"),
        (PushType.COMPLICATION, ".complication"),
        (PushType.FILEPROVIDER, ".pushkit.fileprovider"),
        (PushType.LIVEACTIVITY, ".push-type.liveactivity"),
        (PushType.PUSHTOTALK, ".voip-ptt"),
        (PushType.WIDGETS, ".push-type.widgets"),
        (PushType.CONTROLS, ".push-type.controls"),
    ],
)
def test_topic_is_the_bundle_id_with_the_suffix_of_its_push_type(push_type: PushType, suffix: str) -> None:
    topic = topic_for(TOPIC, push_type)
    assert topic == TOPIC + suffix
    assert allowed_topic(topic, push_type, ["com.example.other", TOPIC])


@pytest.mark.parametrize(
    "topic,push_type",
    [
        (TOPIC + ".voip", PushType.ALERT),
        (TOPIC, PushType.VOIP),
        (TOPIC + ".voip.voip", PushType.VOIP),
        (TOPIC + ".voip-ptt", PushType.VOIP),
        ("com.example.newsvoip", PushType.VOIP),
        (".voip", PushType.VOIP),
        (TOPIC.upper(), PushType.ALERT),
        ("com.example", PushType.ALERT),
        ("", PushType.ALERT),
    ],
)
def test_topic_of_another_app_or_push_type_is_not_allowed(topic: str, push_type: PushType) -> None:
    assert not allowed_topic(topic, push_type, [TOPIC])


@given(st.text(), st.sampled_from(PushType))
def test_topic_made_for_a_bundle_id_is_allowed_for_it_alone(bundle_id: str, push_type: PushType) -> None:
    assert allowed_topic(topic_for(bundle_id, push_type), push_type, [bundle_id])
    assert not allowed_topic(topic_for(bundle_id + "x", push_type), push_type, [bundle_id])


@pytest.mark.parametrize(
    "headers",
    [
        Headers(TOPIC),
        Headers(TOPIC, priority=1, expiration=0, collapse_id="a"),
        Headers(TOPIC, priority=10, expiration=2**32 - 1, collapse_id="é" * 32),
        Headers(TOPIC, PushType.BACKGROUND),
        Headers(TOPIC, PushType.BACKGROUND, priority=5),
        Headers(TOPIC, collapse_id="two words"),
    ],
)
def test_headers_that_apple_takes_pass(headers: Headers) -> None:
    check_headers(headers)


@pytest.mark.parametrize(
    "changed,reason,field",
    [
        ({"topic": ""}, "MissingTopic", "topic"),
        ({"topic": "a\r\nb"}, "BadTopic", "topic"),
        ({"topic": "a\x00"}, "BadTopic", "topic"),
        ({"topic": " a"}, "BadTopic", "topic"),
        ({"topic": "\ud800"}, "BadTopic", "topic"),
        ({"topic": "a" * 256}, "BadTopic", "topic"),
        ({"priority": 0}, "BadPriority", "priority"),
        ({"priority": 7}, "BadPriority", "priority"),
        ({"priority": 10, "push_type": PushType.BACKGROUND}, "BadPriority", "priority"),
        ({"priority": 1, "push_type": PushType.BACKGROUND}, "BadPriority", "priority"),
        ({"expiration": -1}, "BadExpirationDate", "expiration"),
        ({"expiration": 1_800_000_000_000}, "BadExpirationDate", "expiration"),
        ({"collapse_id": "a" * 65}, "BadCollapseId", "collapse_id"),
        ({"collapse_id": "é" * 33}, "BadCollapseId", "collapse_id"),
        ({"collapse_id": ""}, "BadCollapseId", "collapse_id"),
        ({"collapse_id": "a\n"}, "BadCollapseId", "collapse_id"),
        ({"collapse_id": "a "}, "BadCollapseId", "collapse_id"),
        ({"collapse_id": "\x7f"}, "BadCollapseId", "collapse_id"),
        ({"collapse_id": "\udfff"}, "BadCollapseId", "collapse_id"),
    ],
)
def test_headers_that_apple_refuses_are_refused_in_apples_words(
    changed: dict[str, Any], reason: str, field: str
) -> None:
    with pytest.raises(Refused) as caught:
        check_headers(Headers(**({"topic": TOPIC} | changed)))
    assert (caught.value.reason, caught.value.field) == (reason, field)


@given(
    st.builds(
        Headers,
        st.text(),
        st.sampled_from(PushType),
        st.none() | st.integers(),
        st.none() | st.integers(),
        st.none() | st.text(),
    )
)
def test_headers_that_pass_make_fields_that_http2_carries(headers: Headers) -> None:
    try:
        check_headers(headers)
    except Refused:
        return
    for _, value in constant_fields(headers) + varying_fields(headers):
        assert value == value.strip(b" \t") != b""
        assert not any(octet < 0x20 or octet == 0x7F for octet in value)


@pytest.mark.parametrize("token", ["ab", "0123456789abcdef" * 4, "0123456789ABCDEF" * 4, "aB" * 54, "00" * 200])
def test_device_token_of_any_length_becomes_lower_case_hex(token: str) -> None:
    assert check_token(token) == token.lower().encode()


@pytest.mark.parametrize(
    "token,reason,hint",
    [
        ("", "MissingDeviceToken", "no device token"),
        ("abc", "BadDeviceToken", "odd number"),
        ("00" * 201, "BadDeviceToken", "longer than 400"),
        ("<01234567 89abcdef>", "BadDeviceToken", "remove them"),
        ("01234567 89abcdef", "BadDeviceToken", "remove them"),
        ("ab\n", "BadDeviceToken", "remove them"),
        ("q83vEjRWeJA=", "BadDeviceToken", "base64"),
        ("\uff11\uff12", "BadDeviceToken", "hex digits only"),
        ("\u0661\u0662", "BadDeviceToken", "hex digits only"),
        ("a\x00", "BadDeviceToken", "hex digits only"),
        ("\ud800\ud800", "BadDeviceToken", "hex digits only"),
    ],
)
def test_device_token_that_is_no_hex_is_refused_and_not_quoted(token: str, reason: str, hint: str) -> None:
    with pytest.raises(Refused, match=hint) as caught:
        check_token(token)
    assert (caught.value.reason, caught.value.field) == (reason, "token")
    assert not token or token not in caught.value.detail


@given(st.text() | st.text("0123456789abcdefABCDEF \t<>", max_size=500))
def test_any_text_is_a_device_token_or_is_refused(token: str) -> None:
    try:
        hexed = check_token(token)
    except Refused:
        return
    assert hexed == token.lower().encode()
    assert 1 <= len(bytes.fromhex(hexed.decode())) <= 200


def test_fields_are_parted_into_those_worth_indexing_and_those_that_change() -> None:
    headers = Headers(TOPIC, PushType.ALERT, priority=5, expiration=0, collapse_id="Tor für uns")
    assert constant_fields(headers) == [
        (b"apns-topic", b"com.example.news"),
        (b"apns-push-type", b"alert"),
        (b"apns-priority", b"5"),
    ]
    assert varying_fields(headers) == [(b"apns-expiration", b"0"), (b"apns-collapse-id", "Tor für uns".encode())]


@pytest.mark.parametrize(
    "headers,sent",
    [
        (Headers(TOPIC), None),
        (Headers(TOPIC, priority=10), None),
        (Headers(TOPIC, priority=1), b"1"),
        (Headers(TOPIC, PushType.BACKGROUND), b"5"),
        (Headers(TOPIC, PushType.LIVEACTIVITY, priority=5), b"5"),
    ],
)
def test_priority_is_sent_only_where_it_is_not_what_apple_assumes(headers: Headers, sent: bytes | None) -> None:
    assert dict(constant_fields(headers)).get(b"apns-priority") == sent
    assert varying_fields(headers) == []


def test_default_priority_of_a_background_push_is_the_only_one_it_may_have() -> None:
    assert [default_priority(push_type) for push_type in (PushType.BACKGROUND, PushType.ALERT)] == [5, 10]


def test_200_is_the_one_accepted_value() -> None:
    assert answer(200, [(b":status", b"200"), (b"apns-id", b"A")], b"") is ACCEPTED
    assert answer(200, [(b"apns-unique-id", b"B")], b"") == Answered(200, unique_id="B")


def test_410_carries_when_the_token_died() -> None:
    body = b'{"reason":"Unregistered","timestamp":1454948015990}'
    assert answer(410, [], body) == Answered(410, "Unregistered", since=1_454_948_015_990)
    assert answer(410, [], b'{"reason":"ExpiredToken"}') == Answered(410, "ExpiredToken")


def test_retry_after_is_read_as_seconds_and_a_date_is_passed_over() -> None:
    body = b'{"reason":"TooManyRequests"}'
    assert answer(429, [(b"retry-after", b"17")], body) == Answered(429, "TooManyRequests", retry_after_s=17.0)
    for value in (b"Fri, 31 Dec 1999 23:59:59 GMT", b"-1", b"1.5", b"", b"\xb2"):
        assert answer(429, [(b"retry-after", value)], body).retry_after_s is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>Bad Gateway</html>",
        b"\xff",
        b"[]",
        b"null",
        b"{",
        b"{}",
        b'{"reason":7,"timestamp":"soon"}',
        b'{"reason":"\xff"}',
        b'{"reason":""}',
        b'{"reason":"two\\nlines"}',
        b'{"reason":"' + b"x" * 65 + b'"}',
        b'{"timestamp":-1}',
        b'{"timestamp":1e3}',
        b'{"timestamp":true}',
        b'{"timestamp":' + b"9" * 300 + b"}",
        b"[" * 100_000,
    ],
)
def test_answer_that_cannot_be_read_has_no_reason(body: bytes) -> None:
    assert answer(502, [], body) == Answered(502)


def test_one_wrong_part_of_an_answer_does_not_cost_the_other() -> None:
    assert answer(410, [], b'{"reason":"Unregistered","timestamp":"soon"}') == Answered(410, "Unregistered")
    assert answer(410, [], b'{"reason":null,"timestamp":5,"more":[]}') == Answered(410, None, since=5)


@given(st.integers(0, 999), st.lists(st.tuples(st.binary(), st.binary())), st.binary())
def test_no_answer_raises(status: int, fields: list[tuple[bytes, bytes]], body: bytes) -> None:
    fields = [*fields, (b"retry-after", body), (b"apns-unique-id", body)]
    assert answer(status, fields, body).status == status


def test_answer_body_is_what_answer_reads() -> None:
    assert answer_body("BadTopic") == b'{"reason":"BadTopic"}'
    body = answer_body("Unregistered", 1_454_948_015_990)
    assert json.loads(body) == {"reason": "Unregistered", "timestamp": 1_454_948_015_990}
    assert answer(410, [], body) == Answered(410, "Unregistered", since=1_454_948_015_990)
