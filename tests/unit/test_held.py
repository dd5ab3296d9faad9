from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from heliograph.stores.held import MaybeHeld

TOKENS = st.lists(st.binary(min_size=1, max_size=40).map(lambda octets: octets.hex().encode()), max_size=200)


@given(TOKENS, TOKENS)
def test_what_was_added_is_always_found(added: list[bytes], others: list[bytes]) -> None:
    held = MaybeHeld()
    held.add(added)
    assert [token for token in held.among(others + added) if token in added] == [
        token for token in others + added if token in added
    ]


def test_few_that_were_not_added_are_found() -> None:
    chance = random.Random(1)
    held = MaybeHeld(20_000)
    held.add(chance.randbytes(32).hex().encode() for _ in range(20_000))
    strangers = [chance.randbytes(32).hex().encode() for _ in range(20_000)]
    assert len(held.among(strangers)) < 20_000 / 20


def test_it_says_when_it_holds_more_than_it_was_made_for() -> None:
    held = MaybeHeld()
    held.add(b"%064x" % number for number in range(4000))
    assert not held.crowded
    held.add(b"%064x" % number for number in range(200))
    assert held.crowded
