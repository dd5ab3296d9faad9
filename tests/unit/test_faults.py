from __future__ import annotations

import pytest

from heliograph.errors import Refused
from heliograph.protocols.http2 import ErrorCode
from heliograph.simulator.faults import Action, Answer, Close, Delay, Faults, GoAway, Reset, StreamLimit, Withhold

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
    with pytest.raises(Refused):
        Faults().withholds("not hex")
    with pytest.raises(ValueError, match="1 or more"):
        Faults().withholds(ONE, times=0)
    with pytest.raises(ValueError, match="above 0"):
        Faults().misbehaves(Close(), share=0.0)
