from __future__ import annotations

from typing import Any

import msgspec
import pytest

from heliograph.model import DeviceToken
from heliograph.protocols.http2 import ErrorCode
from heliograph.simulator.faults import (
    Action,
    Answer,
    Close,
    Cut,
    Delay,
    Faults,
    GoAway,
    Handshake,
    HoldWindows,
    Reset,
    Rule,
    StopReading,
    StreamLimit,
    Trickle,
    Withhold,
)

ONE, TWO = "aa" * 32, "bb" * 32
APP = "com.example.app"


def found(
    faults: Faults, token: str = ONE, topic: str = APP, *, connection: int = 1, stream: int = 1, now: float = 0.0
) -> Action | None:
    return faults.find_fault(token.encode(), topic.encode(), connection, stream, now)


def test_without_rules_nothing_is_special() -> None:
    faults = Faults()
    assert not faults.misbehaving
    assert found(faults) is None


def test_rule_for_a_device_token_leaves_others_alone() -> None:
    faults = Faults()
    faults.resets(ONE.upper(), ErrorCode.INTERNAL_ERROR)
    assert found(faults, TWO) is None
    assert found(faults, ONE) == Reset(2)
    assert found(faults, ONE) == Reset(2)


def test_rule_for_an_app_covers_its_topics_and_no_other_app() -> None:
    faults = Faults()
    faults.delays(0.5, app=APP)
    assert found(faults, topic=APP) == Delay(0.5)
    assert found(faults, topic=APP + ".voip") == Delay(0.5)
    assert found(faults, topic=APP + ".other") is None


def test_rule_for_a_number_of_times_is_gone_after_them() -> None:
    faults = Faults()
    faults.rejects(ONE, "TooManyRequests", retry_after_s=3, times=2)
    busy = Answer(429, "TooManyRequests", retry_after_s=3)
    assert [found(faults) for _ in range(3)] == [busy, busy, None]
    assert not faults.misbehaving


def test_rule_for_a_connection_and_a_stream_leaves_others_alone() -> None:
    faults = Faults()
    faults.misbehaves(StreamLimit(1), connection=2)
    faults.misbehaves(Close(), stream=7)
    assert found(faults) is None
    assert found(faults, connection=2, stream=7) == StreamLimit(1)
    assert found(faults, connection=1, stream=7) == Close()


def test_rule_holds_from_its_start_to_before_its_end() -> None:
    faults = Faults()
    faults.misbehaves(Withhold(), start=10.0, until=20.0)
    faults.rejects(None, "Shutdown", until=5.0)
    assert [found(faults, now=now) for now in (4.9, 5.0, 10.0, 19.9, 20.0)] == [
        Answer(503, "Shutdown"),
        None,
        Withhold(),
        Withhold(),
        None,
    ]


def test_rule_for_a_share_takes_about_so_many_and_the_same_ones_again() -> None:
    def places() -> list[int]:
        faults = Faults()
        faults.misbehaves(Reset(ErrorCode.CANCEL), share=0.1)
        return [place for place in range(1000) if found(faults) is not None]

    assert 50 < len(places()) < 150
    assert places() == places()


def test_other_dice_take_others() -> None:
    one, two = Faults(), Faults()
    for faults in (one, two):
        faults.misbehaves(Close(), share=0.5)
    two.dice.seed(1)
    assert [found(one) for _ in range(100)] != [found(two) for _ in range(100)]


def test_first_rule_that_matches_decides() -> None:
    faults = Faults()
    faults.withholds(ONE, times=1)
    faults.delays(1.0)
    assert [found(faults, token) for token in (TWO, ONE, ONE)] == [Delay(1.0), Withhold(), Delay(1.0)]


def test_rule_that_still_lets_pass_leaves_the_request_to_the_next_one() -> None:
    faults = Faults()
    faults.hangs_up_after(2)
    faults.delays(1.0)
    assert [found(faults) for _ in range(4)] == [Delay(1.0), Delay(1.0), Close(), Delay(1.0)]


def test_goodbye_is_said_once() -> None:
    faults = Faults()
    faults.says_goodbye("Shutdown", last_stream_id=3, after=1)
    assert [found(faults) for _ in range(3)] == [None, GoAway("Shutdown", 3), None]


def test_delay_may_end_in_something_else() -> None:
    faults = Faults()
    faults.misbehaves(Delay(1.0, then=Reset(7)), token=ONE)
    assert found(faults) == Delay(1.0, Reset(7))


def test_rejection_has_the_status_that_apple_gives_its_reason() -> None:
    faults = Faults()
    faults.rejects(ONE, "Unregistered", since=1_700_000_000_000)
    assert found(faults) == Answer(410, "Unregistered", 1_700_000_000_000)


def test_rules_can_be_forgotten() -> None:
    faults = Faults()
    faults.delays(1.0)
    faults.behaves()
    assert found(faults) is None


def test_reason_that_apple_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="no reason 'Unregisterd'"):
        Faults().rejects(ONE, "Unregisterd")


def test_rule_that_could_never_match_is_refused() -> None:
    with pytest.raises(ValueError, match="device token"):
        Faults().withholds("not hex")
    with pytest.raises(ValueError, match="1 or more"):
        Faults().withholds(ONE, times=0)
    with pytest.raises(ValueError, match="above 0"):
        Faults().misbehaves(Close(), share=0.0)


@pytest.mark.parametrize(
    "action, fields, wrong",
    [
        ("close", {}, "action"),
        (Close, {}, "action"),
        (Delay(1.0, then="cut"), {}, "action.then"),  # type: ignore[arg-type]
        (Handshake("expierd"), {}, "action.how"),  # type: ignore[arg-type]
        (Close(), {"connection": "2"}, "connection"),
        (Close(), {"start": "tomorrow"}, "start"),
    ],
)
def test_rule_of_wrong_types_is_refused_where_it_is_made(action: Any, fields: dict[str, Any], wrong: str) -> None:
    faults = Faults()
    with pytest.raises(ValueError, match=rf"no rule: .* - at `\$\.{wrong}`"):
        faults.misbehaves(action, **fields)
    assert faults.rules() == {}


def test_rule_may_name_the_device_token_of_what_was_received() -> None:
    faults = Faults()
    faults.delays(1.0, token=DeviceToken(ONE))
    assert found(faults) == Delay(1.0)


# -- for connections as they open --------------------------------------------------------------------------------


def test_rule_for_connections_takes_no_requests_and_the_other_way_round() -> None:
    faults = Faults()
    faults.misbehaves(Close(), opening=True)
    assert found(faults) is None
    assert not faults.misbehaving
    assert faults.find_opening_fault(1, 0.0) == Close()
    faults.behaves()
    faults.misbehaves(Close())
    assert faults.find_opening_fault(1, 0.0) is None


def test_failed_handshake_is_for_connections_without_saying_so() -> None:
    faults = Faults()
    faults.misbehaves(Handshake("expired"), times=1)
    assert found(faults) is None
    assert [faults.find_opening_fault(number, 0.0) for number in (1, 2)] == [Handshake("expired"), None]


def test_rule_for_connections_matches_by_number_count_and_time() -> None:
    faults = Faults()
    faults.misbehaves(Handshake("silent"), connection=2)
    faults.misbehaves(Handshake("alert"), after=2, times=1)
    faults.misbehaves(Cut(), opening=True, start=10.0, until=20.0)
    assert [faults.find_opening_fault(number, 10.0 * (number - 4)) for number in range(1, 7)] == [
        None,
        Handshake("silent"),
        None,
        Handshake("alert"),
        Cut(),
        None,
    ]


# -- as data -----------------------------------------------------------------------------------------------------

decode = msgspec.json.Decoder(Rule).decode

SAID = [
    (
        '{"action": {"kind": "delay", "seconds": 1, "then": {"kind": "answer", "status": 503, "reason": "Shutdown"}}}',
        Rule(Delay(1.0, then=Answer(503, "Shutdown"))),
    ),
    (
        '{"action": {"kind": "answer", "status": 410, "reason": "Unregistered", "since": 5}, "token": "aa"}',
        Rule(Answer(410, "Unregistered", since=5), token="aa"),
    ),
    ('{"action": {"kind": "withhold"}, "app": "com.example.app", "times": 3}', Rule(Withhold(), app=APP, times=3)),
    ('{"action": {"kind": "reset", "code": 8, "acted": true}, "share": 0.5}', Rule(Reset(8, acted=True), share=0.5)),
    (
        '{"action": {"kind": "goaway", "reason": "Shutdown", "newest": 3}, "after": 10}',
        Rule(GoAway("Shutdown", newest=3), after=10),
    ),
    ('{"action": {"kind": "close"}, "stream": 7}', Rule(Close(), stream=7)),
    ('{"action": {"kind": "cut"}, "opening": true}', Rule(Cut(), opening=True)),
    (
        '{"action": {"kind": "stream-limit", "count": 1, "then": {"kind": "delay", "seconds": 0.5}}}',
        Rule(StreamLimit(1, then=Delay(0.5))),
    ),
    (
        '{"action": {"kind": "stop-reading", "seconds": 2}, "start": 10, "until": 20}',
        Rule(StopReading(2.0), start=10.0, until=20.0),
    ),
    ('{"action": {"kind": "hold-windows", "octets": 100}}', Rule(HoldWindows(100))),
    (
        '{"action": {"kind": "trickle", "octets": 2, "seconds": 0.1}, "connection": 2}',
        Rule(Trickle(2, 0.1), connection=2),
    ),
    ('{"action": {"kind": "handshake", "how": "other-name"}}', Rule(Handshake("other-name"))),
]


@pytest.mark.parametrize("text, rule", SAID, ids=[type(rule.action).__name__ for _, rule in SAID])
def test_every_fault_can_be_said_in_json(text: str, rule: Rule) -> None:
    assert decode(text) == rule
    assert decode(msgspec.json.encode(rule)) == rule


def test_rules_are_listed_by_id_with_what_is_left_of_them() -> None:
    faults = Faults()
    first = faults.add_rule(Rule(Close(), after=3))
    second = faults.add_rule(Rule(Handshake("closed")))
    third = faults.rejects(ONE, "Shutdown", times=2)
    assert list(faults.rules()) == [first, second, third]
    found(faults)
    assert faults.rules() == {
        first: Rule(Close(), after=2),
        second: Rule(Handshake("closed")),
        third: Rule(Answer(503, "Shutdown"), token=ONE, times=1),
    }
    found(faults)
    assert list(faults.rules()) == [first, second]


def test_rule_that_is_removed_is_gone_and_its_id_never_used_again() -> None:
    faults = Faults()
    first, second = faults.withholds(), faults.misbehaves(Handshake("alert"))
    assert faults.remove_rule(first)
    assert not faults.remove_rule(first)
    assert found(faults) is None
    assert faults.remove_rule(second)
    assert faults.find_opening_fault(1, 0.0) is None
    assert faults.withholds() not in (first, second)


def test_rule_shows_no_token_in_its_repr() -> None:
    assert ONE not in repr(Rule(Close(), token=ONE))


@pytest.mark.parametrize(
    "text, complaint",
    [
        ('{"action": {"kind": "explode"}}', "explode"),
        ('{"action": {"kind": "close"}, "tokn": "aa"}', "tokn"),
        ('{"action": {"kind": "close", "code": 1}}', "code"),
        ('{"action": {"kind": "close"}, "token": "zz"}', "hex digits only"),
        ('{"action": {"kind": "delay", "seconds": -1}}', "`seconds` is 0 or more"),
        ('{"action": {"kind": "answer", "status": 99, "reason": "Odd"}}', "`status` is from"),
        ('{"action": {"kind": "reset", "code": -1}}', "`code`"),
        ('{"action": {"kind": "hold-windows", "octets": 65536}}', "`octets`"),
        ('{"action": {"kind": "trickle", "octets": 0}}', "`octets` is 1 or more"),
        ('{"action": {"kind": "trickle", "seconds": 0}}', "`seconds` above 0"),
        ('{"action": {"kind": "withhold"}, "opening": true}', "needs a request"),
        ('{"action": {"kind": "delay", "seconds": 1}, "opening": true}', "needs a request"),
        (
            '{"action": {"kind": "stream-limit", "count": 1, "then": {"kind": "close"}}, "opening": true}',
            "`then` needs a request",
        ),
        ('{"action": {"kind": "handshake", "how": "alert"}, "token": "aa"}', "has no `token`"),
    ],
)
def test_rule_that_cannot_be_is_refused_with_what_is_wrong(text: str, complaint: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=complaint):
        decode(text)
