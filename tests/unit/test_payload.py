from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliograph.errors import Refused
from heliograph.model import PushType
from heliograph.payload import MAX_NESTING, InterruptionLevel, build, check

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


def itself() -> dict[str, Any]:
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    return loop


@pytest.mark.parametrize(
    "fields,field",
    [
        ({"badge": -1}, "aps.badge"),
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
