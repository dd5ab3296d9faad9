"""What a gateway remembers of frames: of one connection, and of those that will be sent again."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from heliograph.doors.legacy.trail import KEEP_S, Place, Sent, Stretch, Trail, marks
from heliograph.model import Environment
from heliograph.protocols.binary import Frames

WHOSE = ("guest", "shop", Environment.PRODUCTION)
OTHER = ("other", "shop", Environment.PRODUCTION)


def stretch(batch_id: str | None, positions: Sequence[int], at: float = 0.0) -> Stretch:
    own = array("q", positions)
    ids = () if batch_id else [f"before-{each}" for each in positions]
    return Stretch(batch_id, positions, array("I", [each + 100 for each in positions]), own, at, ids)


def behind(trail: Trail, position: int) -> list[int]:
    return list(trail.behind(position).values())


def test_a_frame_is_found_by_its_batch_and_place() -> None:
    trail = Trail()
    trail.add(stretch("a", range(3)))
    trail.add(stretch("b", [3, 5, 6]))
    assert trail.find("b", 1) == Place(5, 105)
    assert trail.find("c", 0) is None


def test_everything_behind_a_frame_is_known_until_its_batch_and_all_before_have_ended() -> None:
    trail = Trail()
    trail.add(stretch("a", range(3)))
    trail.add(stretch("b", [3, 5]))
    trail.add(stretch(None, [4, 6]))
    trail.add(stretch("c", range(7, 9)))
    trail.end("b")
    assert behind(trail, 1) == [2, 3, 5, 4, 6, 7, 8]
    assert trail.behind(4) == {"b0002": 5, "before-6": 6, "c0001": 7, "c0002": 8}
    assert trail.open == ["a", "c"]
    trail.end("a")
    assert behind(trail, -1) == [7, 8]
    assert trail.find("b", 0) is None
    trail.end("c")
    assert trail.over


def test_once_a_frame_is_bad_nothing_behind_it_is_forgotten_though_it_ends() -> None:
    trail = Trail()
    trail.add(stretch("a", range(3)))
    trail.freeze()
    trail.end("a")
    trail.add(stretch(None, [3]))
    assert behind(trail, 0) == [1, 2, 3]


def test_frames_that_were_not_taken_after_all_leave_no_trace() -> None:
    trail = Trail()
    trail.add(stretch("a", range(3)))
    trail.forget("a")
    assert trail.over
    assert trail.find("a", 0) is None


def test_the_oldest_frames_are_forgotten_where_there_are_too_many() -> None:
    trail = Trail(most=5)
    assert trail.add(stretch("a", range(3))) == []
    assert trail.add(stretch("b", range(3, 6))) == ["a"]
    assert behind(trail, -1) == [3, 4, 5]


def test_frames_are_forgotten_after_a_while() -> None:
    trail = Trail()
    trail.add(stretch("a", range(3)))
    assert trail.add(stretch("b", range(3, 6), at=KEEP_S + 1)) == ["a"]
    assert trail.open == ["b"]


def test_a_mark_tells_token_payload_and_expiration_apart_and_nothing_else() -> None:
    tokens, payloads = [b"aa", b"aa", b"ab", b"aa", b"aa"], [b"{}", b"{}", b"{}", b"[]", b"{}"]
    same = Frames(tokens, payloads, [1, 2, 3, 4, 5], [7, 7, 7, 7, None], [5, 10, 5, 5, 5])
    first, again, *others = marks(same)
    assert first == again
    assert len({first, *others}) == 4


def test_what_went_out_is_known_again_once_for_each_time() -> None:
    sent = Sent()
    sent.remember(WHOSE, [("a", 7), ("b", 8), ("c", 7)], now=0.0)
    taken = sent.take(WHOSE, [6, 7, 7, 7, 8], now=1.0)
    assert sorted(taken) == [1, 2, 4]
    assert {taken[1].id, taken[2].id} == {"a", "c"}
    assert taken[4].id == "b"
    assert len(sent) == 0
    assert sent.take(WHOSE, [7, 8], now=1.0) == {}


def test_what_went_out_for_one_guest_is_not_known_to_another() -> None:
    sent = Sent()
    sent.remember(WHOSE, [("a", 7)], now=0.0)
    assert sent.take(OTHER, [7], now=0.0) == {}
    assert len(sent) == 1


def test_what_went_out_is_forgotten_after_a_while_or_where_it_is_too_much() -> None:
    sent = Sent(most=3, keep_s=10.0)
    sent.remember(WHOSE, [("a", 7)], now=0.0)
    sent.remember(WHOSE, [("b", 7)], now=5.0)
    assert len(sent) == 2
    assert sent.take(WHOSE, [7, 7], now=11.0)[0].id == "b"
    sent.remember(WHOSE, [(str(number), number) for number in range(5)], now=12.0)
    assert sorted(sent.take(WHOSE, range(5), now=12.0)) == [2, 3, 4]


def test_what_nobody_will_send_again_is_forgotten() -> None:
    sent = Sent()
    entries = sent.remember(WHOSE, [("a", 7), ("b", 7), ("c", 8)], now=0.0)
    sent.take(WHOSE, [7], now=0.0)
    sent.forget(entries)
    sent.forget(entries)
    assert len(sent) == 0
    assert sent.take(WHOSE, [7, 8], now=0.0) == {}


@given(st.lists(st.tuples(st.sampled_from("rtf"), st.lists(st.integers(0, 3), max_size=6), st.integers(0, 8))))
def test_it_is_a_multiset_whatever_is_done_to_it(steps: list[tuple[str, list[int], int]]) -> None:
    sent = Sent(most=1000, keep_s=10.0)
    model: list[tuple[float, int]] = []
    handles = []
    now = 0.0
    for what, those, passed in steps:
        now += passed
        model = [(until, mark) for until, mark in model if until > now]
        if what == "r":
            handles.append(sent.remember(WHOSE, [("", mark) for mark in those], now))
            model += [(now + 10.0, mark) for mark in those]
        elif what == "t":
            left = Counter(mark for _, mark in model)
            taken = sent.take(WHOSE, those, now)
            for index, mark in enumerate(those):
                assert (index in taken) == (left[mark] > 0)
                if left[mark] > 0:
                    left[mark] -= 1
                    # The newest goes first.
                    model.remove(max(each for each in model if each[1] == mark))
        else:
            for entries in handles:
                sent.forget(entries)
            handles, model = [], []
        sent.take(WHOSE, (), now)
        assert len(sent) == len(model)
