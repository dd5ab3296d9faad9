"""What is refused before anything is queued, and in which words."""

from __future__ import annotations

import sys

import pytest

from heliograph.admission import Checked, check, choose_environment, leave_out, refuse_held
from heliograph.errors import Refused
from heliograph.model import Access, App, Environment, Headers, PushType, SigningKey

NOW = 1_700_000_000.0
KEY = SigningKey("ABCDE12345", "TEAM123456", b"")
ONE = App("one", ("com.example.one",), (Access(KEY, (Environment.PRODUCTION,)),))
TWO = App("two", ("com.example.two", "com.example.three"), (Access(KEY, tuple(Environment)),))
TOKEN = "ab" * 32
ALERT = b'{"aps":{"alert":"hi"}}'


def refusals(app: App, headers: Headers, payload: bytes = ALERT) -> list[tuple[str, str | None, int | None]]:
    checked = check(app, Environment.PRODUCTION, NOW, [headers], [TOKEN], [payload])
    return [(refused.reason, refused.field, refused.index) for refused in checked.refused]


def test_the_only_topic_is_filled_in_with_the_push_types_suffix() -> None:
    checked = check(ONE, Environment.PRODUCTION, NOW, [Headers("", PushType.VOIP)], [TOKEN], [ALERT])
    assert not checked.refused
    assert checked.headers[0].topic == "com.example.one.voip"


def test_with_several_topics_one_must_be_named() -> None:
    assert refusals(TWO, Headers("")) == [("MissingTopic", "topic", None)]
    assert refusals(TWO, Headers("com.example.three")) == []


def test_a_topic_without_its_push_types_suffix_is_refused() -> None:
    assert refusals(ONE, Headers("com.example.one", PushType.VOIP)) == [("TopicDisallowed", "topic", None)]


def test_an_expiration_that_has_passed_is_refused_and_zero_is_not() -> None:
    assert refusals(ONE, Headers("", expiration=int(NOW) - 1)) == [("BadExpirationDate", "expiration", None)]
    assert refusals(ONE, Headers("", expiration=0)) == []


def test_each_of_those_whose_expiration_has_passed_is_refused() -> None:
    over, fresh = Headers("", expiration=int(NOW) - 1), Headers("", expiration=int(NOW) + 9)
    checked = check(ONE, Environment.PRODUCTION, NOW, [over, fresh, over], [TOKEN] * 3, [ALERT])
    assert [(refused.reason, refused.index) for refused in checked.refused] == [
        ("BadExpirationDate", 0),
        ("BadExpirationDate", 2),
    ]


def test_alerts_collapse_on_their_own_id_unless_told_otherwise() -> None:
    headers = [Headers(""), Headers("", collapse_id="mine"), Headers("", PushType.VOIP)]
    checked = check(ONE, Environment.PRODUCTION, NOW, headers, [TOKEN] * 3, [ALERT])
    assert [each.collapse_on_id for each in checked.headers] == [True, None, None]


def test_everything_that_is_wrong_is_told_with_its_place() -> None:
    headers = [Headers(""), Headers("", priority=7), Headers("")]
    checked = check(ONE, Environment.PRODUCTION, NOW, headers, [TOKEN, TOKEN, "x"], [ALERT, ALERT, b"["])
    assert {(refused.reason, refused.index) for refused in checked.refused} == {
        ("BadPriority", 1),
        ("BadDeviceToken", 2),
        ("BadRequestPayload", 2),
    }


LONG = b'{"aps":{"alert":"' + b"x" * 4500 + b'"}}'
"""Not too long for VoIP."""


@pytest.mark.parametrize(
    "push_types, refused",
    [
        ([PushType.VOIP, PushType.ALERT, PushType.ALERT], [1, 2]),
        ([PushType.ALERT, PushType.ALERT], [None]),
        ([PushType.ALERT], [None]),
        ([PushType.VOIP], []),
    ],
)
def test_a_shared_payload_is_judged_by_every_push_type_that_it_goes_out_with(
    push_types: list[PushType], refused: list[int | None]
) -> None:
    headers = [Headers("", push_type) for push_type in push_types]
    checked = check(ONE, Environment.PRODUCTION, NOW, headers, [TOKEN] * len(headers), [LONG])
    assert [(each.reason, each.index) for each in checked.refused] == [("PayloadTooLarge", index) for index in refused]


def test_a_shared_payload_that_no_push_type_may_have_is_refused_once_for_each() -> None:
    headers = [Headers("", PushType.VOIP), Headers("", PushType.ALERT), Headers("", PushType.VOIP)]
    checked = check(ONE, Environment.PRODUCTION, NOW, headers, [TOKEN] * 3, [b"x" * 6000])
    assert [(each.reason, each.index) for each in checked.refused] == [("PayloadTooLarge", None)] * 2


OTHERS = ["cd" * 32, "ef" * 32]


def test_what_is_refused_is_left_out_of_every_column_that_has_an_entry_for_each() -> None:
    headers = [Headers("", priority=7), Headers("", collapse_id="b"), Headers("", collapse_id="c"), Headers("")]
    payloads = [ALERT, b"[", b'{"c":1}', b'{"d":1}']
    checked = check(ONE, Environment.PRODUCTION, NOW, headers, [TOKEN, TOKEN, *OTHERS], payloads)
    checked.refused.extend(refuse_held(checked.tokens, {OTHERS[1].encode(): "Unregistered"}))
    assert sorted(each.index or 0 for each in checked.refused) == [0, 1, 3]
    assert leave_out(checked) == Checked(checked.headers[2:3], [OTHERS[0].encode()], [b'{"c":1}'], [])


def test_columns_with_one_entry_for_all_are_left_as_they_are() -> None:
    checked = check(ONE, Environment.PRODUCTION, NOW, [Headers("")], ["x", *OTHERS], [ALERT])
    left = leave_out(checked)
    assert left == Checked(checked.headers, [each.encode() for each in OTHERS], [ALERT], [])


def test_nothing_is_left_where_something_is_wrong_with_all() -> None:
    for headers, payload, token in ((Headers("", priority=7), ALERT, TOKEN), (Headers(""), b"[", TOKEN)):
        checked = check(ONE, Environment.PRODUCTION, NOW, [headers], [token] * 2, [payload])
        assert not leave_out(checked).tokens
    assert not leave_out(check(ONE, Environment.PRODUCTION, NOW, [Headers("")], ["x"], [ALERT])).tokens


def test_a_refused_token_does_not_shift_the_places_of_dead_ones() -> None:
    checked = check(ONE, Environment.PRODUCTION, NOW, [Headers("")], ["x", TOKEN], [ALERT])
    dead = refuse_held(checked.tokens, {TOKEN.encode(): "Unregistered"})
    assert [(refused.reason, refused.index) for refused in dead] == [("Unregistered", 1)]


def test_the_environment_may_be_left_out_where_there_is_one() -> None:
    assert choose_environment(ONE, None) is Environment.PRODUCTION
    with pytest.raises(Refused, match="both environments"):
        choose_environment(TWO, None)
    with pytest.raises(Refused, match="not set up for development"):
        choose_environment(ONE, Environment.DEVELOPMENT)


def test_a_topic_that_no_certificate_of_the_app_serves_is_refused_at_the_door() -> None:
    access = Access(KEY, (Environment.PRODUCTION,), ("com.example.one",))
    app = App("one", ("com.example.one",), (access,))
    headers = [Headers(""), Headers("", PushType.VOIP)]
    checked = check(app, Environment.PRODUCTION, NOW, headers, [TOKEN] * 2, [ALERT])
    assert [(each.reason, each.index) for each in checked.refused] == [("TopicDisallowed", 1)]
    assert "signing key, which serves every push type" in checked.refused[0].detail


def test_an_app_whose_credentials_changed_is_checked_against_the_new_ones() -> None:
    certified = Access(KEY, (Environment.PRODUCTION,), ("com.example.one",))
    less = App("one", ONE.topics, (certified,))
    voip = Headers("", PushType.VOIP)
    assert refusals(ONE, voip) == []
    assert refusals(less, voip) == [("TopicDisallowed", "push_type", None)]
    assert refusals(ONE, voip) == []


def test_no_credentials_are_kept_of_what_was_checked() -> None:
    key = SigningKey("ABCDE12345", "TEAM123456", b"secret")
    app = App("gone", ("com.example.gone",), (Access(key, (Environment.PRODUCTION,)),))
    before = sys.getrefcount(app), sys.getrefcount(key)
    assert refusals(app, Headers("")) == []
    assert (sys.getrefcount(app), sys.getrefcount(key)) == before
