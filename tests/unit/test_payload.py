from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliograph.errors import Refused
from heliograph.model import PushType
from heliograph.payload import (
    MAX_NESTING,
    CriticalSound,
    InterruptionLevel,
    LiveActivity,
    Localized,
    build,
    check,
    measure,
    shorten,
    validate,
)

LIVE = {"timestamp": 1_700_000_000, "event": "update", "content-state": {"score": 3}}
START = LIVE | {
    "event": "start",
    "attributes-type": "Match",
    "attributes": {"teams": 2},
    "alert": {"title": "Kick-off"},
}


def refused(payload: bytes, push_type: PushType = PushType.ALERT) -> Refused:
    with pytest.raises(Refused) as caught:
        check(payload, push_type)
    return caught.value


def aps(content: Any) -> bytes:
    return json.dumps({"aps": content}).encode()


@pytest.mark.parametrize(
    "payload",
    [
        b'{"aps":{"alert":"Hello"}}',
        b' { "aps" : { "badge" : 3 } , "own" : [ 1.50 , 1e3 , -0 , null , true ] } \n',
        '{"aps":{"alert":"Grüße 👋"}}'.encode(),
        b'{"aps":{"alert":"\\ud83d\\udc4b \\u0000"}}',
        b'{"a":{"id":1},"b":{"id":2},"c":[{"id":3},{"id":4}]}',
        b"{}",
        b'{"big":' + b"9" * 4000 + b"}",
    ],
)
def test_json_object_is_taken_however_it_is_written(payload: bytes) -> None:
    check(payload, PushType.ALERT)


def test_empty_payload_is_refused_in_apples_word() -> None:
    error = refused(b"")
    assert (error.reason, error.field) == ("PayloadEmpty", "payload")


@pytest.mark.parametrize(
    "push_type,limit", [(PushType.ALERT, 4096), (PushType.LIVEACTIVITY, 4096), (PushType.VOIP, 5120)]
)
def test_payload_may_be_as_long_as_its_push_type_allows_and_no_longer(push_type: PushType, limit: int) -> None:
    payload = json.dumps({"aps": LIVE, "filler": ""}).encode()
    longest = payload.replace(b'""', b'"%s"' % (b"x" * (limit - len(payload))))
    check(longest, push_type)
    error = refused(longest + b" ", push_type)
    assert (error.reason, error.field) == ("PayloadTooLarge", "payload")
    assert "by 1." in error.detail


@pytest.mark.parametrize(
    "payload",
    [
        b" ",
        b"{",
        b'{"a":1} x',
        b"{'a':1}",
        b'{"a":01}',
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b'{"a":1e999}',
        b'{"a":"\x01"}',
        b'{"a":"\\q"}',
        b'{"a":"\xff"}',
        b'{"\xff":1}',
        b'{"a":"\xed\xa0\x80"}',
        b'{"a":"\\ud800"}',
        b'{"a":"\\ud800x"}',
        b'{"\\udc00":1}',
        b"\xef\xbb\xbf{}",
        '{"aps":{}}'.encode("utf-16"),
        b"[]",
        b'"aps"',
        b"null",
        b"0",
    ],
)
def test_what_is_no_json_object_in_utf8_is_refused(payload: bytes) -> None:
    error = refused(payload)
    assert (error.reason, error.field) == ("BadRequestPayload", "payload")


@pytest.mark.parametrize("opening,closing", [(b"[", b"]"), (b'{"a":', b"}")])
def test_nesting_that_no_device_reads_is_refused(opening: bytes, closing: bytes) -> None:
    deepest = MAX_NESTING - 1
    for depth in (deepest + 1, 600, 700):
        payload = b'{"a":' + opening * depth + b"1" + closing * depth + b"}"
        assert refused(payload, PushType.VOIP).reason == "BadRequestPayload"
    check(b'{"a":' + opening * deepest + b"1" + closing * deepest + b"}", PushType.ALERT)


def test_nesting_beyond_the_interpreters_stack_is_refused() -> None:
    assert refused(b'{"a":' + b"[" * 2000 + b"]" * 2000 + b"}").reason == "BadRequestPayload"
    assert refused(b"[" * 4096).reason == "BadRequestPayload"


@pytest.mark.parametrize("content", [None, [], "Hello", 1, True])
def test_aps_that_is_no_object_is_refused(content: Any) -> None:
    error = refused(aps(content))
    assert (error.reason, error.field) == ("BadRequestPayload", "aps")


@pytest.mark.parametrize("content", [{"content-available": 1}, {"content-available": True}])
def test_background_push_with_content_available_is_taken(content: Any) -> None:
    check(aps(content), PushType.BACKGROUND)


@pytest.mark.parametrize("content", [{}, {"content-available": 0}, {"content-available": "1"}, {"alert": "Hi"}])
def test_background_push_without_content_available_is_refused(content: Any) -> None:
    assert refused(aps(content), PushType.BACKGROUND).field == "aps.content-available"
    assert refused(b"{}", PushType.BACKGROUND).field == "aps.content-available"


@pytest.mark.parametrize("content", [LIVE, START, LIVE | {"event": "end"}, {"timestamp": 1, "event": "end"}])
def test_live_activity_with_what_it_needs_is_taken(content: Any) -> None:
    check(aps(content), PushType.LIVEACTIVITY)


@pytest.mark.parametrize(
    "content,field",
    [
        ({}, "timestamp"),
        (LIVE | {"timestamp": "now"}, "timestamp"),
        (LIVE | {"timestamp": True}, "timestamp"),
        (LIVE | {"event": "stop"}, "event"),
        (LIVE | {"event": ["start"]}, "event"),
        ({"timestamp": 1, "event": "update"}, "content-state"),
        (LIVE | {"event": "end", "content-state": None}, "content-state"),
        (START | {"attributes-type": None}, "attributes-type"),
        (START | {"attributes": []}, "attributes"),
        (START | {"alert": None}, "alert"),
    ],
)
def test_live_activity_that_lacks_something_is_refused_by_its_field(content: Any, field: str) -> None:
    error = refused(aps(content), PushType.LIVEACTIVITY)
    assert (error.reason, error.field) == ("BadRequestPayload", f"aps.{field}")


def test_mdm_push_holds_mdm_alone() -> None:
    check(b'{"mdm":"5B1A8D1E-6C3E-4D86-8E8B-BB2BB1E9B0F2"}', PushType.MDM)
    assert refused(b'{"mdm":"x","aps":{}}', PushType.MDM).field == "aps"
    assert refused(b"{}", PushType.MDM).field == "mdm"


def test_refusal_never_quotes_the_payload() -> None:
    for payload in (b'{"aps":"canary', b'{"a":"canary\xff"}', b'{"aps":"canary"}'):
        error = refused(payload)
        assert "canary" not in error.detail
        assert error.__context__ is None or error.__suppress_context__


@given(st.binary(max_size=6000), st.sampled_from(PushType))
def test_any_bytes_are_taken_or_refused_and_nothing_else(payload: bytes, push_type: PushType) -> None:
    try:
        check(payload, push_type)
    except Refused as error:
        assert error.reason in {"PayloadEmpty", "PayloadTooLarge", "BadRequestPayload"}  # noqa: PT017


json_text = st.recursive(
    st.sampled_from([b"1", b"-0", b"1e9", b'"a"', b'"\\u00e9"', b'"\\ud800"', b"null", b"9" * 40, b"1e999", b"\xff"]),
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: b"[" + b" ,".join(items) + b"]")
        | st.lists(st.tuples(st.sampled_from([b'"aps"', b'"a"', b'"event"', b'"\\u0061"']), inner), max_size=4).map(
            lambda pairs: b"{" + b",".join(name + b" :" + value for name, value in pairs) + b"}"
        )
    ),
)


@given(json_text, st.sampled_from(PushType))
def test_anything_like_json_is_taken_or_refused_as_the_standard_library_would(
    payload: bytes, push_type: PushType
) -> None:
    try:
        check(payload, push_type)
    except Refused:
        return
    assert isinstance(json.loads(payload), dict)


def test_build_writes_apples_names_and_leaves_out_what_was_not_given() -> None:
    payload = build(
        title="Grüße",
        subtitle="von",
        body="uns",
        badge=0,
        sound="default",
        thread_id="t",
        category="c",
        content_available=True,
        mutable_content=True,
        interruption_level=InterruptionLevel.TIME_SENSITIVE,
        relevance_score=0.5,
        data={"order": 7, "nested": {"a": [1, None]}},
    )
    assert (
        payload
        == (
            '{"aps":{"alert":{"title":"Grüße","subtitle":"von","body":"uns"},"badge":0,"sound":"default",'
            '"thread-id":"t","category":"c","content-available":1,"mutable-content":1,'
            '"interruption-level":"time-sensitive","relevance-score":0.5},"order":7,"nested":{"a":[1,null]}}'
        ).encode()
    )
    assert build(body="Hello") == b'{"aps":{"alert":{"body":"Hello"}}}'
    assert build(badge=3) == b'{"aps":{"badge":3}}'


def test_build_checks_what_it_built_for_its_push_type() -> None:
    assert build(content_available=True, push_type=PushType.BACKGROUND) == b'{"aps":{"content-available":1}}'
    with pytest.raises(Refused, match="must be 1 in a background push"):
        build(body="Hello", push_type=PushType.BACKGROUND)
    build(body="x" * 5000, push_type=PushType.VOIP)
    with pytest.raises(Refused, match="takes 4096"):
        build(body="x" * 5000)


def test_build_cuts_text_that_is_too_long_where_it_may() -> None:
    payload = build(title="Kitchen", body="x" * 5000, shortened=True)
    assert len(payload) == 4096
    alert = json.loads(payload)["aps"]["alert"]
    assert (alert["title"], alert["body"].strip("x")) == ("Kitchen", "…")
    with pytest.raises(Refused, match="even without any alert text"):
        build(title="Kitchen", data={"x": "x" * 5000}, shortened=True)


def itself() -> dict[str, Any]:
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    return loop


@pytest.mark.parametrize(
    "fields,field",
    [
        ({"title": 3}, "aps.alert.title"),
        ({"body": Localized("K", ("a", 1))}, "aps.alert.loc-args[1]"),  # type: ignore[arg-type]
        ({"title": Localized("K", ("a", "b", None))}, "aps.alert.title-loc-args[2]"),  # type: ignore[arg-type]
        ({"subtitle": Localized("K", "abc")}, "aps.alert.subtitle-loc-args"),
        ({"badge": -1}, "aps.badge"),
        ({"badge": True}, "aps.badge"),
        ({"badge": 1.5}, "aps.badge"),
        ({"sound": CriticalSound(volume=1.5)}, "aps.sound.volume"),
        ({"sound": CriticalSound(volume=float("nan"))}, "aps.sound.volume"),
        ({"url_args": "abc"}, "aps.url-args"),
        ({"url_args": ["a", 1]}, "aps.url-args[1]"),
        ({"thread_id": 1}, "aps.thread-id"),
        ({"summary_arg_count": "2"}, "aps.alert.summary-arg-count"),
        ({"push_type": PushType.WIDGETS}, "aps.content-changed"),
        ({"interruption_level": "loud"}, "aps.interruption-level"),
        ({"relevance_score": 1.5}, "aps.relevance-score"),
        ({"relevance_score": float("nan")}, "aps.relevance-score"),
        ({"data": {"aps": {}}}, "data.aps"),
        ({"data": {"x": [1.0, float("nan")]}}, "data"),
        ({"data": {"x": float("inf")}}, "data"),
        ({"data": {"x": object()}}, "payload"),
        ({"data": {"x": {(1, 2): 3}}}, "payload"),
        ({"data": itself()}, "payload"),
        ({"body": "\ud800"}, "payload"),
    ],
)
def test_build_refuses_what_json_or_apple_does_not_know(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(Refused) as caught:
        build(**fields)
    assert caught.value.field == field


def build_live(push_type: PushType = PushType.LIVEACTIVITY, sound: Any = None, **fields: Any) -> bytes:
    activity = LiveActivity(**{"event": "update", "timestamp": 1_700_000_000, "content_state": {"score": 3}, **fields})
    return build(title="Goal", sound=sound, live_activity=activity, push_type=push_type)


def test_build_writes_every_field_of_apples_alert() -> None:
    payload = build(
        title=Localized("TITLE", ("a", "b")),
        subtitle=Localized("SUBTITLE"),
        body=Localized("BODY", ["c"]),
        launch_image="launch.png",
        action="View",
        action_loc_key="VIEW",
        summary_arg="Ada",
        summary_arg_count=2,
        sound=CriticalSound("alarm.caf", 0.25),
        target_content_id="window",
        filter_criteria="work",
        url_args=["order", "7"],
    )
    assert json.loads(payload) == {
        "aps": {
            "alert": {
                "title-loc-key": "TITLE",
                "title-loc-args": ["a", "b"],
                "subtitle-loc-key": "SUBTITLE",
                "loc-key": "BODY",
                "loc-args": ["c"],
                "launch-image": "launch.png",
                "action": "View",
                "action-loc-key": "VIEW",
                "summary-arg": "Ada",
                "summary-arg-count": 2,
            },
            "sound": {"critical": 1, "name": "alarm.caf", "volume": 0.25},
            "target-content-id": "window",
            "filter-criteria": "work",
            "url-args": ["order", "7"],
        }
    }
    assert validate(payload, PushType.ALERT) == []


@pytest.mark.parametrize("push_type", [PushType.WIDGETS, PushType.CONTROLS])
def test_build_tells_controls_and_widgets_that_their_content_changed(push_type: PushType) -> None:
    payload = build(content_changed=True, push_type=push_type)
    assert payload == b'{"aps":{"content-changed":true}}'
    assert validate(payload, push_type) == []


def test_build_starts_a_live_activity_with_texts_and_sound_where_it_looks_for_them() -> None:
    payload = build(
        title=Localized("KICK_OFF", ("Reds", "Blues")),
        body="In the park",
        sound="whistle.caf",
        relevance_score=75,
        live_activity=LiveActivity(
            event="start",
            timestamp=1_700_000_000,
            content_state={"score": [0, 0]},
            stale_date=1_700_000_600,
            attributes_type="Match",
            attributes={"teams": ["Reds", "Blues"]},
            input_push_token=True,
        ),
        push_type=PushType.LIVEACTIVITY,
    )
    assert json.loads(payload) == {
        "aps": {
            "alert": {
                "title": {"loc-key": "KICK_OFF", "loc-args": ["Reds", "Blues"]},
                "body": "In the park",
                "sound": "whistle.caf",
            },
            "relevance-score": 75,
            "timestamp": 1_700_000_000,
            "event": "start",
            "content-state": {"score": [0, 0]},
            "stale-date": 1_700_000_600,
            "attributes-type": "Match",
            "attributes": {"teams": ["Reds", "Blues"]},
            "input-push-token": 1,
        }
    }
    assert validate(payload, PushType.LIVEACTIVITY) == []


def test_build_ends_a_live_activity() -> None:
    payload = build_live(event="end", dismissal_date=1_700_000_900)
    assert json.loads(payload)["aps"]["dismissal-date"] == 1_700_000_900
    assert validate(payload, PushType.LIVEACTIVITY) == []


@pytest.mark.parametrize(
    "fields,field",
    [
        ({"event": "stop"}, "aps.event"),
        ({"timestamp": 1_700_000_000_000}, "aps.timestamp"),
        ({"timestamp": "now"}, "aps.timestamp"),
        ({"content_state": None}, "aps.content-state"),
        ({"content_state": {"x": float("nan")}}, "aps.content-state"),
        ({"stale_date": "soon"}, "aps.stale-date"),
        ({"event": "end", "dismissal_date": 1e12}, "aps.dismissal-date"),
        ({"event": "start"}, "aps.attributes-type"),
        ({"event": "start", "attributes_type": "Match"}, "aps.attributes"),
        ({"event": "start", "attributes_type": "Match", "attributes": {"x": float("inf")}}, "aps.attributes"),
        ({"input_push_channel": "no base64!"}, "aps.input-push-channel"),
        ({"push_type": PushType.ALERT}, "live_activity"),
        ({"sound": CriticalSound(volume=2)}, "aps.alert.sound.volume"),
    ],
)
def test_build_refuses_a_live_activity_by_the_field_at_fault(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(Refused) as caught:
        build_live(**fields)
    assert caught.value.field == field
    assert caught.value.detail.startswith(field)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.text(max_size=20), st.dictionaries(st.text(max_size=5), json_values, max_size=3))
def test_built_payload_says_what_was_asked_or_is_refused(body: str, data: dict[str, Any]) -> None:
    try:
        payload = build(body=body, data=data)
    except Refused:
        return
    assert json.loads(payload) == {"aps": {"alert": {"body": body}}, **data}


# -- validate --------------------------------------------------------------------------------------------------------


def fields_of(content: Any, push_type: PushType = PushType.ALERT) -> dict[str, bool]:
    return {each.field: each.wrong for each in validate(json.dumps(content).encode(), push_type)}


@pytest.mark.parametrize(
    "content,push_type",
    [
        ({"aps": {"alert": "Hello"}, "own": {"alert": 1}}, PushType.ALERT),
        ({"aps": {"badge": 0}}, PushType.ALERT),
        ({"aps": {"alert": {"title": "T", "body": "B"}, "mutable-content": 1, "sound": "default"}}, PushType.ALERT),
        ({"aps": {"alert": {"title": "T", "action": "View"}, "url-args": []}}, PushType.ALERT),
        ({"aps": {"alert": "x", "content-available": True}}, PushType.ALERT),
        ({"aps": {"content-available": 1}, "own": 1}, PushType.BACKGROUND),
        ({"aps": LIVE}, PushType.LIVEACTIVITY),
        ({"aps": START | {"alert": {"title": {"loc-key": "K", "loc-args": ["a"]}}}}, PushType.LIVEACTIVITY),
        ({"aps": START | {"input-push-channel": "dHN0LXNyY2gtY2hubA=="}}, PushType.LIVEACTIVITY),
        ({}, PushType.VOIP),
        ({"caller": "Ada"}, PushType.VOIP),
        ({"mdm": "5B1A8D1E"}, PushType.MDM),
    ],
)
def test_nothing_is_said_against_what_is_right(content: Any, push_type: PushType) -> None:
    assert validate(json.dumps(content).encode(), push_type) == []


@pytest.mark.parametrize(
    "content,problems",
    [
        ({"alert": 7}, {"aps.alert": True}),
        ({"alert": None}, {"aps.alert": True}),
        ({"alert": {"title": 1, "body": ["x"]}}, {"aps.alert.title": True, "aps.alert.body": True}),
        ({"alert": {"loc-key": "K", "loc-args": ["a", 2]}}, {"aps.alert.loc-args[1]": True}),
        ({"alert": {"loc-key": "K", "loc-args": "a"}}, {"aps.alert.loc-args": True}),
        ({"alert": {"title": {"loc-key": "K"}}}, {"aps.alert.title": True}),
        ({"alert": {"title": "x", "title-loc-args": ["a"]}}, {"aps.alert.title-loc-args": False}),
        ({"alert": {"launch-image": "x"}}, {"aps.alert": False}),
        ({"alert": ""}, {"aps.alert": False}),
        ({"alert": "x", "badge": "1"}, {"aps.badge": True}),
        ({"badge": -1}, {"aps.badge": True}),
        ({"sound": 1}, {"aps.sound": True}),
        ({"sound": {"name": "x", "volume": 2, "critical": 3}}, {"aps.sound.volume": True, "aps.sound.critical": True}),
        ({"sound": {"critical": 1}}, {"aps.sound.name": False}),
        ({"alert": "x", "content-available": "1"}, {"aps.content-available": True}),
        ({"alert": "x", "content-available": 0}, {"aps.content-available": False}),
        ({"badge": 1, "mutable-content": 1}, {"aps.mutable-content": False}),
        ({"alert": "x", "interruption-level": "loud"}, {"aps.interruption-level": True}),
        ({"alert": "x", "interruption-level": ["active"]}, {"aps.interruption-level": True}),
        ({"alert": "x", "relevance-score": 1.5}, {"aps.relevance-score": True}),
        ({"alert": "x", "relevance-score": True}, {"aps.relevance-score": True}),
        ({"alert": "x", "content-changed": 1}, {"aps.content-changed": True}),
        ({"alert": "x", "content-changed": True}, {"aps.content-changed": False}),
        ({"alert": "x", "event": "update"}, {"aps.event": False}),
        ({"content-available": 1}, {"aps": False}),
        ({}, {"aps": False}),
    ],
)  # fmt: skip
def test_each_problem_of_an_alert_is_told_by_its_field(content: Any, problems: dict[str, bool]) -> None:
    assert fields_of({"aps": content}) == problems


@pytest.mark.parametrize(
    "content,problems",
    [
        ({}, {"aps.timestamp": True, "aps.event": True, "aps.content-state": True}),
        (LIVE | {"timestamp": 1_700_000_000_000}, {"aps.timestamp": True}),
        (LIVE | {"sound": "default"}, {"aps.sound": False}),
        (LIVE | {"alert": "Goal"}, {"aps.alert": False}),
        (LIVE | {"alert": {"title": {"loc-key": "K", "loc-args": [1]}}}, {"aps.alert.title.loc-args[0]": True}),
        (LIVE | {"alert": {"title": {"loc-args": []}}}, {"aps.alert.title.loc-args": False}),
        (LIVE | {"dismissal-date": 1}, {"aps.dismissal-date": False}),
        (LIVE | {"attributes": {}}, {"aps.attributes": False}),
        ({"timestamp": 1, "event": "end"}, {"aps.content-state": False}),
        (START | {"input-push-token": 1, "input-push-channel": "AAAA"}, {"aps.input-push-channel": False}),
        (START | {"input-push-channel": "?"}, {"aps.input-push-channel": True}),
        (START | {"attributes-type": 1, "attributes": []}, {"aps.attributes-type": True, "aps.attributes": True}),
    ],
)
def test_each_problem_of_a_live_activity_is_told_by_its_field(content: Any, problems: dict[str, bool]) -> None:
    assert fields_of({"aps": content}, PushType.LIVEACTIVITY) == problems


def test_what_does_not_go_with_a_push_type_is_told() -> None:
    assert fields_of({"aps": {"content-available": 1, "alert": "x", "sound": "y"}}, PushType.BACKGROUND) == {
        "aps.alert": False,
        "aps.sound": False,
    }
    assert fields_of({"aps": {}}, PushType.CONTROLS) == {"aps.content-changed": True}
    assert fields_of({"aps": {}}, PushType.MDM) == {"aps": True, "mdm": True}


@pytest.mark.parametrize(
    "key,meant",
    [
        ("content_available", "content-available"),
        ("contentAvailable", "content-available"),
        ("Badge", "badge"),
        ("thread", "thread-id"),
    ],
)
def test_an_unknown_key_is_told_with_what_was_probably_meant(key: str, meant: str) -> None:
    (problem,) = validate(json.dumps({"aps": {"alert": "x", key: 1}}).encode(), PushType.ALERT)
    assert problem.field == f"aps.{key}"
    assert problem.detail.endswith(f"did you mean {meant}?")
    assert not problem.wrong


def test_keys_of_the_apps_own_and_of_apple_are_told_where_they_belong() -> None:
    assert fields_of({"aps": {"alert": "x", "order-number": 1}}) == {"aps.order-number": False}
    assert fields_of({"alert": "x", "aps": {"badge": 1}}) == {"alert": False}


def test_what_is_no_payload_at_all_is_told_in_one_problem_or_two() -> None:
    assert [each.field for each in validate(b"", PushType.ALERT)] == ["payload"]
    assert [each.field for each in validate(b"[]", PushType.ALERT)] == ["payload"]
    too_long = json.dumps({"aps": {"alert": "x" * 5000, "badge": "1"}}).encode()
    assert [each.field for each in validate(too_long, PushType.ALERT)] == ["payload", "aps.badge"]


apple_keys = st.sampled_from(
    ["alert", "badge", "sound", "timestamp", "event", "content-state", "loc-args", "title", "content-available", "mdm"]
)
apple_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.sampled_from(["start", "", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(apple_keys, inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(apple_keys, apple_json, max_size=6), st.sampled_from(PushType))
def test_whatever_check_refuses_is_among_what_is_wrong(content: Any, push_type: PushType) -> None:
    payload = aps(content)
    wrong = {each.field: each.detail for each in validate(payload, push_type) if each.wrong}
    try:
        check(payload, push_type)
    except Refused as refused:
        assert (refused.field, refused.detail) in wrong.items()  # noqa: PT017


@given(st.binary(max_size=6000), st.sampled_from(PushType))
def test_any_bytes_can_be_validated(payload: bytes, push_type: PushType) -> None:
    for problem in validate(payload, push_type):
        assert problem.detail[-1] in ".?"


# -- measure and shorten ---------------------------------------------------------------------------------------------


def test_measure_counts_octets_on_the_wire() -> None:
    size = measure('{"aps":{"alert":"\\u00e9é"}}'.encode(), PushType.ALERT)
    assert (size.size, size.limit, size.left) == (28, 4096, 4068)
    assert measure(bytes(5000), PushType.VOIP).left == 120
    assert measure(bytes(5121), PushType.LIVEACTIVITY, broadcast=True).left == -1


def shortened(alert: Any, by: int, **rest: Any) -> Any:
    payload = json.dumps({"aps": {"alert": alert}, **rest}, ensure_ascii=False).encode()
    short = shorten(payload, len(payload) - by)
    assert len(short) <= len(payload) - by
    content = json.loads(short)
    assert {**content, "aps": 0} == {"aps": 0, **rest}
    return content["aps"]["alert"]


def test_a_payload_that_fits_is_left_alone() -> None:
    payload = b' {"aps" : { "alert" : "Hello" } } '
    assert shorten(payload, len(payload)) is payload
    assert shorten(b"not JSON", 8) == b"not JSON"


@pytest.mark.parametrize(
    "alert,by,expected",
    [
        ("The kettle boils", 1, "The kettle b…"),
        ("The kettle boils", 6, "The ket…"),
        ("The kettle boils", 9, "The…"),  # no blank before the ellipsis
        ({"body": "The kettle boils", "title": "Kitchen"}, 1, {"body": "The kettle b…", "title": "Kitchen"}),
        ({"title": "Kitchen", "body": "boils"}, 2, {"title": "Kitchen", "body": "…"}),
        ({"title": "Kitchen", "body": "boils"}, 3, {"title": "Kit…", "body": "…"}),
        ({"title": "Kitchen", "subtitle": "Home", "body": "x"}, 1, {"title": "Kitchen", "subtitle": "…", "body": "x"}),
        ({"title": "Kitchen", "body": {"loc-key": "B"}}, 1, {"title": "Kit…", "body": {"loc-key": "B"}}),
        ("Grüße", 1, "Gr…"),
        ("日本語です", 1, "日本語…"),
    ],
)  # fmt: skip
def test_text_is_cut_body_first_and_ends_in_an_ellipsis(alert: Any, by: int, expected: Any) -> None:
    assert shortened(alert, by, own={"alert": "The kettle boils", "n": [1, None]}) == expected


@pytest.mark.parametrize(
    "cluster",
    [
        "e\u0301",  # a base and an accent
        "❤\ufe0f",  # with a variation selector
        "👩\u200d👩\u200d👧",  # a family of joined people
        "👋🏽",  # with a skin tone
        "🇨🇭",  # two halves of a flag
        "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",  # the flag of Scotland
        "\u1100\u1161\u11a8",  # a Hangul syllable in parts
        "ｶ\uff9e",  # half-width, with its voicing mark
    ],
)
@pytest.mark.parametrize("escaped", [False, True])
def test_what_people_see_as_one_character_is_kept_or_cut_whole(cluster: str, escaped: bool) -> None:
    payload = json.dumps({"aps": {"alert": "ab" + cluster * 4 + "xyz"}}, ensure_ascii=escaped).encode()
    for limit in range(len(payload) - 1, len(payload) - len(json.dumps(cluster * 4, ensure_ascii=escaped)), -1):
        text = json.loads(shorten(payload, limit))["aps"]["alert"]
        kept = text.removesuffix("…")
        assert kept in {"ab" + cluster * count for count in range(5)} | {"a", "ab" + cluster * 4 + "x"}


def test_escapes_count_with_the_octets_that_they_cost() -> None:
    payload = b'{"aps":{"alert":"\\ud83d\\udc4b\\ud83d\\udc4b\\u00e9\\n\\"x\\\\"}}'
    # The line's end would be a blank before the ellipsis.
    assert shorten(payload, len(payload) - 1) == '{"aps":{"alert":"\\ud83d\\udc4b\\ud83d\\udc4b\\u00e9…"}}'.encode()
    assert shorten(payload, len(payload) - 9) == '{"aps":{"alert":"\\ud83d\\udc4b\\ud83d\\udc4b…"}}'.encode()
    assert shorten(payload, len(payload) - 16) == '{"aps":{"alert":"\\ud83d\\udc4b…"}}'.encode()


def test_of_a_name_that_stands_twice_the_one_that_counts_is_cut() -> None:
    payload = b'{"aps":{"alert":"first"},"\\u0061ps" : {"alert":"x","alert" :\t"The kettle boils"} }'
    short = shorten(payload, len(payload) - 5)
    assert short == payload.replace(b"The kettle boils", "The kett…".encode())


@pytest.mark.parametrize(
    "payload",
    [
        b'{"aps":{"badge":1},"own":"%s"}',
        b'{"aps":{"alert":{"loc-key":"%s"}}}',
        b'{"aps":{"alert":"x"},"own":"%s"}',
        b'{"aps":{"alert":["%s"]}}',
        b'{"aps":["%s"]}',
        b'{"own":"%s"}',
        b'{"%s":1}',
    ],
)
def test_what_cutting_text_cannot_help_is_refused(payload: bytes) -> None:
    with pytest.raises(Refused) as caught:
        shorten(payload % (b"x" * 5000), 4096)
    assert (caught.value.reason, caught.value.field) == ("PayloadTooLarge", "payload")


def test_what_is_no_payload_is_not_shortened() -> None:
    with pytest.raises(Refused) as caught:
        shorten(b'{"aps":{"alert":"' + b"x" * 5000, 4096)
    assert caught.value.reason == "BadRequestPayload"


def test_a_payload_of_many_small_parts_is_given_up_early() -> None:
    with pytest.raises(Refused):
        shorten(b'{"a":[' + b"0," * 1_000_000 + b'0],"aps":{"alert":"x"}}', 4096)


def common(one: bytes, other: bytes) -> int:
    """How many octets both begin with."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (mine, yours) in enumerate(pairs) if mine != yours), min(len(one), len(other)))


alerts = st.text(max_size=40) | st.dictionaries(
    st.sampled_from(["title", "subtitle", "body", "loc-key", "x"]), st.text(max_size=30), max_size=4
)


@given(alerts, json_values, st.integers(1, 80), st.booleans(), st.sampled_from([None, 1]))
def test_only_alert_text_is_cut_and_everything_fits(
    alert: Any, own: Any, by: int, escaped: bool, indent: int | None
) -> None:
    content = {"aps": {"alert": alert, "badge": 1}, "own": own}
    payload = json.dumps(content, ensure_ascii=escaped, indent=indent, allow_nan=True).encode(errors="surrogatepass")
    limit = max(1, len(payload) - by)
    try:
        short = shorten(payload, limit)
    except Refused:
        return
    assert len(short) <= limit
    # Each cut text is a start of what it was; with those put back, the octets are the same.
    old, new = json.loads(payload), json.loads(short)
    before, after = old["aps"].pop("alert"), new["aps"].pop("alert")
    assert old == new
    texts = [("", before, after)] if isinstance(before, str) else [(key, before[key], after[key]) for key in before]
    for key, was, now in texts:
        if was == now:
            continue
        assert key in ("", "title", "subtitle", "body")
        assert now.endswith("…")
        assert was.startswith(now[:-1])
    cut = [key for key, was, now in texts if was != now]
    assert cut
    # What comes first in the order of cutting is down to its ellipsis before the next one loses anything.
    order = [key for key in ("body", "subtitle", "title") if key in cut]
    assert all(after[key] == "…" for key in order[:-1])
    if len(cut) == 1:
        assert common(payload, short) + common(payload[::-1], short[::-1]) >= len(short) - len("…".encode())
    check(short, PushType.ALERT)


@given(alerts, st.integers(1, 60))
def test_shortening_again_changes_nothing(alert: Any, by: int) -> None:
    payload = json.dumps({"aps": {"alert": alert}}).encode()
    limit = len(payload) - by
    try:
        short = shorten(payload, limit)
    except Refused:
        return
    assert shorten(short, limit) is short
