"""Ids, and columns cut into batches."""

from __future__ import annotations

import itertools
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliograph.batches import MAX_KINDS, make_batches, new_batch_id, notification_id, parse_id
from heliograph.model import MAX_BATCH, MAX_BATCH_BYTES, Batch, Environment, Headers

NOW = 1_700_000_000.5


def cut(tokens: list[bytes], payloads: list[bytes], headers: list[Headers] | None = None) -> list[Batch]:
    numbers = itertools.count()
    return list(
        make_batches(
            lambda: new_batch_id(NOW, next(numbers).to_bytes(8, "big")),
            "app",
            Environment.PRODUCTION,
            NOW,
            headers or [Headers("topic")],
            tokens,
            payloads,
        )
    )


@given(st.floats(0, 2**38), st.binary(min_size=8, max_size=8), st.integers(0, MAX_BATCH - 1))
def test_an_id_is_a_uuid_of_version_7_with_its_time_and_its_place(now: float, random: bytes, index: int) -> None:
    batch_id = new_batch_id(now, random)
    text = notification_id(batch_id, index)
    parsed = uuid.UUID(text)
    assert str(parsed) == text
    assert parsed.version == 7
    assert parsed.variant == uuid.RFC_4122
    assert parsed.int >> 80 == int(now * 1000)
    assert parsed.int & 0xFFFF == index + 1
    assert parse_id(text) == parse_id(text.upper()) == (batch_id, index)


def test_ids_differ_by_each_bit_of_the_random_octets_that_is_kept() -> None:
    ids = {new_batch_id(NOW, (1 << bit).to_bytes(8, "big")) for bit in range(58)}
    assert len(ids) == 58


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", "018bcfe5-6800-7000-8000-00000000", "018bcfe5680070008000000000000001", "g" * 36],
)
def test_what_is_no_id_is_not_taken_for_one(text: str) -> None:
    assert parse_id(text) is None


def test_a_batchs_own_id_names_no_notification() -> None:
    assert parse_id(new_batch_id(NOW, bytes(8)) + "0000") is None
    assert parse_id(new_batch_id(NOW, bytes(8)) + f"{MAX_BATCH + 1:04x}") is None


def test_columns_are_cut_at_a_thousand_and_keep_their_order() -> None:
    tokens = [b"%064x" % number for number in range(2500)]
    batches = cut(tokens, [b"{}"])
    assert [len(batch) for batch in batches] == [1000, 1000, 500]
    assert [token for batch in batches for token in batch.tokens] == tokens
    assert all(list(batch.payloads) == [b"{}"] for batch in batches)


def test_large_payloads_make_smaller_batches() -> None:
    payloads = [b"x" * 4096 for _ in range(1000)]
    batches = cut([b"ab"] * 1000, payloads)
    assert sum(map(len, batches)) == 1000
    assert all(sum(map(len, batch.payloads)) <= MAX_BATCH_BYTES for batch in batches)
    assert len(batches) < 12


def test_equal_headers_are_kept_once_and_found_again() -> None:
    kinds = [Headers("one"), Headers("two")]
    (batch,) = cut([b"ab"] * 5, [b"{}"], [kinds[place % 2] for place in range(5)])
    assert batch.headers == tuple(kinds)
    assert batch.headers_of == bytes([0, 1, 0, 1, 0])


def test_more_distinct_headers_than_an_octet_can_name_make_more_batches() -> None:
    headers = [Headers("topic", collapse_id=f"c{number}") for number in range(700)]
    batches = cut([b"%02x" % (number % 256) for number in range(700)], [b"{}"], headers)
    assert [len(batch) for batch in batches] == [MAX_KINDS, MAX_KINDS, 700 - 2 * MAX_KINDS]
    found = [
        batch.headers[0 if batch.headers_of is None else batch.headers_of[place]]
        for batch in batches
        for place in range(len(batch))
    ]
    assert found == headers
