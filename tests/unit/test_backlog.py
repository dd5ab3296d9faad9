"""Who is next, where several lanes wait for the streams of one pool."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliograph.batches import make_batches
from heliograph.carriers.apns.backlog import SMALL, TURN, Backlog
from heliograph.carriers.apns.slices import Slice, slices
from heliograph.model import Environment, Headers, Lane, PushType

A: Lane = ("a", Environment.PRODUCTION)
B: Lane = ("b", Environment.PRODUCTION)
A_TESTING: Lane = ("a", Environment.DEVELOPMENT)

numbers = itertools.count()


def work_of(lane: Lane, count: int, since: float = 0.0) -> Slice:
    base = next(numbers) << 16
    (batch,) = make_batches(
        lambda: f"{base:032x}", *lane, 0.0, [Headers("com.example")], [b"%064x" % n for n in range(count)], [b"{}"]
    )
    (work,) = slices(batch, range(count), base, since)
    return work


def backlog_of(*work: Slice) -> Backlog:
    backlog = Backlog()
    for each in work:
        backlog.put(each)
    return backlog


def send(backlog: Backlog, room: int) -> tuple[Slice, int]:
    work, count = backlog.offer(room)
    backlog.take(count)
    return work, count


def order(backlog: Backlog, room: int) -> list[Slice]:
    """Whose notification goes out first, second, ... where there is so much room at a time."""
    sent: list[Slice] = []
    while backlog.waiting:
        work, count = send(backlog, room)
        assert 0 < count <= room
        sent += [work] * count
    return sent


@pytest.mark.parametrize("room", [1, 32, 1000])
def test_fifty_thousand_of_one_lane_delay_a_single_one_of_another_by_one_turn(room: int) -> None:
    crowd = [work_of(A, 1000) for _ in range(50)]
    backlog = backlog_of(*crowd)
    send(backlog, 1000)
    single = work_of(B, 1)
    backlog.put(single)
    assert order(backlog, room).index(single) <= TURN


def test_single_ones_do_not_wait_behind_the_thousand_blocks_of_their_own_lane() -> None:
    single = work_of(A, SMALL)
    backlog = backlog_of(*[work_of(A, 1000) for _ in range(50)], single)
    sent = order(backlog, 1000)
    assert sent.index(single) <= TURN


def test_thousand_blocks_are_not_starved_by_single_ones_that_keep_coming() -> None:
    block = work_of(A, 1000)
    backlog = backlog_of(block)
    sent = 0
    while block.left:
        while len(backlog.lanes) and backlog.waiting - block.left < 10:
            backlog.put(work_of(A, 1))
        sent += send(backlog, 100)[1]
    assert sent <= 2 * 1000 + 2 * TURN


def test_lanes_that_differ_in_environment_only_take_turns() -> None:
    backlog = backlog_of(*[work_of(A, 1000) for _ in range(5)], work_of(A_TESTING, 1000))
    sent = order(backlog, 1000)
    assert [work.lane for work in sent[: 4 * TURN]].count(A_TESTING) == 2 * TURN


def test_a_lane_that_is_alone_is_not_cut_into_turns() -> None:
    backlog = backlog_of(work_of(A, 1000), work_of(A, 1000))
    assert send(backlog, 5000)[1] == 1000
    assert send(backlog, 600)[1] == 600


def test_what_a_connection_did_not_take_stays_first() -> None:
    first, second = work_of(A, 10), work_of(A, 10)
    backlog = backlog_of(first, second)
    backlog.offer(10)
    backlog.take(3)
    assert backlog.offer(10) == (first, 7)
    assert backlog.waiting == 17


def test_what_waited_longest_is_found_wherever_it_stands() -> None:
    oldest = work_of(B, 1000, since=1.0)
    backlog = backlog_of(work_of(A, 1, since=2.0), oldest, work_of(B, 1000, since=3.0))
    assert backlog.oldest == 1.0
    assert backlog.pop_oldest() is oldest
    assert (backlog.oldest, backlog.waiting, backlog.lanes) == (2.0, 1001, {A: 1, B: 1000})


steps = st.one_of(
    st.tuples(st.just("put"), st.sampled_from([A, B, A_TESTING]), st.sampled_from([1, 2, SMALL, SMALL + 1, 200])),
    st.tuples(st.just("send"), st.integers(1, 300), st.integers(0, 300)),
    st.tuples(st.just("pop"), st.none(), st.none()),
    st.tuples(st.just("withdraw"), st.sets(st.integers(0, 199)), st.integers(1, 3)),
)


@given(st.lists(steps, max_size=60))
def test_everything_leaves_once_and_is_counted(script: list[tuple[str, object, object]]) -> None:
    backlog = Backlog()
    put: dict[Slice, int] = {}
    gone: dict[Slice, int] = {}
    bases: dict[Slice, int] = {}
    for number, (verb, first, second) in enumerate(script):
        if verb == "put":
            assert isinstance(first, tuple)
            assert isinstance(second, int)
            work = work_of((first[0], first[1]), second, since=float(number))
            put[work] = second
            bases[work] = work.keys[0] >> 16
            backlog.put(work)
        elif not backlog.waiting:
            assert backlog.oldest is None
        elif verb == "send":
            assert isinstance(first, int)
            assert isinstance(second, int)
            work, count = backlog.offer(first)
            taken = min(count, second)
            backlog.take(taken)
            gone[work] = gone.get(work, 0) + taken
        elif verb == "withdraw":
            assert isinstance(first, set)
            assert isinstance(second, int)
            wanted = {work.prefixes[0]: frozenset(first) for work in list(put)[-second:]}
            for key in backlog.withdraw(wanted):
                work = next(each for each in put if bases[each] == key >> 16)
                assert key & 0xFFFF in first
                gone[work] = gone.get(work, 0) + 1
            assert not backlog.withdraw(wanted)
        else:
            work = backlog.pop_oldest()
            gone[work] = gone.get(work, 0) + work.left
        left = {each: put[each] - gone.get(each, 0) for each in put}
        assert backlog.waiting == sum(left.values())
        for lane in (A, B, A_TESTING):
            assert backlog.lanes.get(lane, 0) == sum(count for each, count in left.items() if each.lane == lane)
        assert all(count >= 0 for count in left.values())
    if len(script) % 2:
        for work in backlog.pop_all():
            gone[work] = gone.get(work, 0) + work.left
    for work in order(backlog, 7):
        gone[work] = gone.get(work, 0) + 1
    assert {each: count for each, count in gone.items() if count} == put
    assert not backlog.lanes
    assert not backlog._parts
    assert not backlog._alone


def test_what_is_left_beside_what_is_taken_back_stays_whole_and_in_order() -> None:
    kinds = [Headers("com.example", collapse_id=f"c{number % 3}") for number in range(40)]
    (batch,) = make_batches(
        lambda: "0" * 32, *A, 0.0, kinds, [b"%064x" % n for n in range(40)], [b'{"n":%d}' % n for n in range(40)]
    )
    (work,) = slices(batch, range(40), 7 << 16, 0.0)
    backlog = backlog_of(work)
    assert send(backlog, 10) == (work, 10)
    assert backlog.withdraw({batch.id.encode(): {3, 10, 12, 39}, b"other": {11}}) == [7 << 16 | n for n in (10, 12, 39)]
    left = [11, *range(13, 39)]
    assert backlog.waiting == len(left)
    assert [key & 0xFFFF for key in work.keys] == left
    assert list(work.paths) == [batch.tokens[index] for index in left]
    assert list(work.bodies) == [batch.payloads[index] for index in left]
    assert list(work.suffixes) == [b"%04x" % (index + 1) for index in left]
    assert [dict(each)[b"apns-collapse-id"] for each in work.literals] == [b"c%d" % (index % 3) for index in left]
    assert send(backlog, 100) == (work, len(left))
    assert not backlog.waiting


def test_how_often_it_may_be_sent_makes_no_further_slice() -> None:
    kinds = [Headers("com.example", at_most_once=once, expiration=at) for once in (False, True) for at in (1, 2)]
    (batch,) = make_batches(
        lambda: "0" * 32, *A, 0.0, [kinds[n % 4] for n in range(40)], [b"%064x" % n for n in range(40)], [b"{}"]
    )
    (work,) = slices(batch, range(40), 0, 0.0)
    assert list(work.keys) == list(range(40))
    assert work.headers == Headers("com.example")
    assert [dict(each)[b"apns-expiration"] for each in work.literals] == [b"1", b"2"] * 20


def test_each_push_type_makes_a_slice_of_its_own() -> None:
    kinds = [Headers("com.example"), Headers("com.example", PushType.BACKGROUND)]
    (batch,) = make_batches(lambda: "0" * 32, *A, 0.0, [kinds[n % 2] for n in range(6)], [b"ab"] * 6, [b"{}"])
    assert [list(work.keys) for work in slices(batch, range(6), 0, 0.0)] == [[0, 2, 4], [1, 3, 5]]
