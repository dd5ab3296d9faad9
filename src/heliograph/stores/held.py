"""Which device tokens may be held back: a few bits in memory each, so that hardly any other has to be looked up.

Nearly every token that comes in is not held, and asking the database for each costs a turn through another thread. This
is a Bloom filter: a no is certain, a yes is to be looked up. Python's hash of octets is keyed anew in each process
(SipHash), so nobody can choose tokens that collide.
"""

from __future__ import annotations

from collections.abc import Iterable

_BITS_EACH = 16
"""With two probes, one token in about seventy that is not held is looked up for nothing."""
_LEAST = 1 << 16


class MaybeHeld:
    """Device tokens as lower-case hex; of any app, as one token belongs to one app anyway."""

    def __init__(self, count: int = 0) -> None:
        """`count`: how many are expected; a quarter more, and `crowded` says that it is time for a larger one."""
        size = _LEAST
        while size < count * _BITS_EACH * 5 // 4:
            size *= 2
        self._bits = bytearray(size // 8)
        self._mask = size - 1
        self._room = size // _BITS_EACH

    @property
    def crowded(self) -> bool:
        """So many were added that it says yes too often."""
        return self._room <= 0

    def add(self, tokens: Iterable[bytes]) -> None:
        bits, mask = self._bits, self._mask
        for token in tokens:
            self._room -= 1
            number = hash(token)
            for place in (number & mask, (number >> 32) & mask):
                bits[place >> 3] |= 1 << (place & 7)

    def among(self, tokens: Iterable[bytes]) -> list[bytes]:
        """Those that may be held."""
        bits, mask = self._bits, self._mask
        found = []
        for token in tokens:
            number = hash(token)
            place = number & mask
            if bits[place >> 3] >> (place & 7) & 1:
                place = (number >> 32) & mask
                if bits[place >> 3] >> (place & 7) & 1:
                    found.append(token)
        return found
