"""Single notifications that wait for a stream and go together."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from heliograph.batches import make_batches, notification_id
from heliograph.carriers.apns.backlog import SMALL, Backlog
from heliograph.carriers.apns.slices import Slice, slices
from heliograph.model import Batch, Environment, Headers, Lane
from heliograph.protocols.http2 import Template

LANE: Lane = ("a", Environment.PRODUCTION)
TEMPLATE = Template(b"here", b"/3/device/", (), (b"apns-id",))


def batch_of(number: int, size: int = 1, headers: Headers | None = None) -> Batch:
    (batch,) = make_batches(
        lambda: f"{number:08x}-0000-7000-8000-00000000",
        *LANE,
        0.0,
        [headers or Headers("com.example")],
        [b"%062x%02x" % (number, place) for place in range(size)],
        [b'{"n":%d}' % (100 * number + place) for place in range(size)],
    )
    return batch


def slice_of(batch: Batch, number: int, *indices: int, since: float = 1.0) -> Slice:
    (work,) = slices(batch, indices, number << 16, since)
    return work


def put(backlog: Backlog, work: Slice) -> None:
    if not backlog.join(work):
        backlog.put(work)


def joined(count: int) -> Slice:
    """Of the third place of so many batches."""
    backlog = Backlog()
    for number in range(count):
        put(backlog, slice_of(batch_of(number, 5), number, 2))
    work, ready = backlog.offer(1000)
    assert (ready, backlog.waiting, backlog.lanes) == (count, count, {LANE: count})
    return work


def test_single_ones_of_one_turn_go_together_under_their_own_ids() -> None:
    requests = joined(3).requests(TEMPLATE, 3)
    assert list(requests.keys) == [number << 16 | 2 for number in range(3)]
    assert list(requests.paths) == [batch_of(number, 5).tokens[2] for number in range(3)]
    assert list(requests.bodies) == [batch_of(number, 5).payloads[2] for number in range(3)]
    assert list(requests.literals) == [()]
    ids = [prefix + suffix for suffix in requests.suffixes for prefix in requests.prefixes]
    assert ids == [notification_id(batch_of(number).id, 2).encode() for number in range(3)]


def test_what_varies_stays_with_its_own() -> None:
    backlog = Backlog()
    collapse_ids = [None, None, "x", "y"]
    for number, collapse_id in enumerate(collapse_ids):
        put(backlog, slice_of(batch_of(number, headers=Headers("com.example", collapse_id=collapse_id)), number, 0))
    work, count = backlog.offer(1000)
    assert count == len(collapse_ids)
    wanted = [() if each is None else ((b"apns-collapse-id", each.encode()),) for each in collapse_ids]
    assert list(work.requests(TEMPLATE, 4).literals) == wanted


@pytest.mark.parametrize(
    "other",
    [
        slice_of(batch_of(2, 2), 2, 0, 1),
        slice_of(batch_of(2), 2, 0, since=2.0),
        slice_of(batch_of(2, headers=Headers("com.example.other")), 2, 0),
    ],
    ids=["several", "later", "of another topic"],
)
def test_what_is_not_alike_goes_by_itself(other: Slice) -> None:
    backlog = Backlog()
    put(backlog, slice_of(batch_of(1), 1, 0))
    put(backlog, other)
    assert backlog.offer(1000)[1] == 1
    assert len(backlog.pop_all()) == 2


def test_no_more_go_together_than_a_small_slice_has() -> None:
    backlog = Backlog()
    for number in range(SMALL + 1):
        put(backlog, slice_of(batch_of(number), number, 0))
    assert [len(work.keys) for work in backlog.pop_all()] == [SMALL, 1]


def test_single_ones_are_taken_back_one_by_one() -> None:
    backlog = Backlog()
    for number in range(4):
        put(backlog, slice_of(batch_of(number), number, 0))
    backlog.offer(1)
    backlog.take(1)
    wanted = {batch_of(number).id.encode(): {0} for number in (0, 2)} | {batch_of(3).id.encode(): {1}}
    assert backlog.withdraw(wanted) == [2 << 16]  # the first was sent, and the last is another place
    assert backlog.waiting == 2
    work, count = backlog.offer(1000)
    assert list(work.requests(TEMPLATE, count).bodies) == [b'{"n":100}', b'{"n":300}']


def test_what_is_taken_back_whole_takes_nothing_along_and_holds_nothing_up() -> None:
    backlog = Backlog()
    kinds = [Headers("com.example"), Headers("com.example", priority=5)]
    for number in range(6):  # a slice each, as no two neighbours are alike
        put(backlog, slice_of(batch_of(number, headers=kinds[number % 2]), number, 0))
    for number in (5, 2, 0):
        assert backlog.withdraw({batch_of(number).id.encode(): {0}}) == [number << 16]
        assert not backlog.withdraw({batch_of(number).id.encode(): {0}})
    put(backlog, slice_of(batch_of(7, headers=kinds[1]), 7, 0))  # like the last one, of which nothing is left
    sent: list[tuple[int, bytes]] = []
    while backlog.waiting:
        work, count = backlog.offer(1000)
        request = work.requests(TEMPLATE, count)
        sent += zip(request.keys, request.bodies, strict=True)
        backlog.take(count)
    assert sent == [(number << 16, batch_of(number).payloads[0]) for number in (1, 3, 4, 7)]
    assert backlog.oldest is None


def test_nothing_of_what_is_gone_is_kept() -> None:
    backlog = Backlog()
    for number in range(40):
        put(backlog, slice_of(batch_of(number), number, 0))
    backlog.withdraw({batch_of(number).id.encode(): {0} for number in (3, 39)})
    backlog.offer(7)
    backlog.take(7)
    backlog.pop_oldest()
    _work, count = backlog.offer(1000)
    backlog.take(count)
    assert (backlog.waiting, backlog._alone, backlog._parts) == (0, {}, {})


OWN = [f"{number:08x}-1111-4000-8000-000000000000" for number in range(6)]


def with_own_ids(batch: Batch, *indices: int) -> Batch:
    return replace(batch, apns_ids={index: OWN[index] for index in indices})


def sent_ids(work: Slice, count: int) -> list[bytes]:
    requests = work.requests(TEMPLATE, count)
    assert len({len(each) for each in requests.suffixes}) == 1, "of one length, as one template wants them"
    return [requests.prefixes[0] + suffix for suffix in requests.suffixes]


@pytest.mark.parametrize("indices", [range(5), [0, 2, 4]], ids=["in a row", "picked"])
def test_callers_own_ids_are_sent_in_place_of_ours_and_all_go_together(indices: range | list[int]) -> None:
    batch = with_own_ids(batch_of(1, 5), 0, 1, 4)
    (work,) = slices(batch, indices, 1 << 16, 1.0)
    ours = [notification_id(batch.id, index) for index in range(5)]
    wanted = [OWN[index] if index in (0, 1, 4) else ours[index] for index in indices]
    assert sent_ids(work, len(indices)) == [each.encode() for each in wanted]


def test_own_id_is_the_collapse_id_where_the_id_is() -> None:
    batch = with_own_ids(batch_of(1, 2, Headers("com.example", collapse_on_id=True)), 0, 1)
    assert slice_of(batch, 1, 0, 1).prefixes == (b"", b"")


@pytest.mark.parametrize("size", [1, 5])
def test_what_has_an_id_of_its_callers_is_taken_back_by_the_id_of_its_batch(size: int) -> None:
    backlog = Backlog()
    for number in range(3):
        put(backlog, slice_of(with_own_ids(batch_of(number, size), 0), number, *range(size)))
    assert not backlog.withdraw({OWN[0][:32].encode(): {0}})
    assert backlog.withdraw({batch_of(1).id.encode(): {0}}) == [1 << 16]
    assert backlog.waiting == 3 * size - 1
    left = [sent_ids(work, work.left) for work in backlog.pop_all()]
    assert sum(map(len, left)) == 3 * size - 1
    assert sum(each.count(OWN[0].encode()) for each in left) == 2
    assert (backlog._alone, backlog._parts) == ({}, {})


def test_single_ones_with_and_without_own_ids_go_together() -> None:
    backlog = Backlog()
    for number in range(4):
        batch = batch_of(number)
        put(backlog, slice_of(with_own_ids(batch, 0) if number % 2 else batch, number, 0))
    work, count = backlog.offer(1000)
    ours = [notification_id(batch_of(number).id, 0).encode() for number in (0, 2)]
    assert sent_ids(work, count) == [ours[0], OWN[0].encode(), ours[1], OWN[0].encode()]
    backlog.take(count)
    assert (backlog._alone, backlog._parts) == ({}, {})
