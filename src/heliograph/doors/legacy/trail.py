"""What a gateway remembers: each connection its own frames, the door those that went out and will be sent again. Pure.

A client that is told of a bad frame sends everything behind it again, on a new connection. By then Apple's answer to
the bad one has taken its time, so that some of what was behind it had gone out. These are known again by their mark.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence

from msgspec import Struct

from heliograph.doors.receipts import PLACES
from heliograph.model import Environment
from heliograph.protocols.binary import Frames

KEEP_S = 300.0
"""How long either is remembered."""

MOST_FRAMES = 200_000
"""Of one connection; the same of all that is expected to be sent again."""

Whose = tuple[str, str, Environment]
"""A guest's id, app and environment."""


def marks(frames: Frames) -> array[int]:
    """What a frame is known again by: token, payload and expiration, in 64 bits each.

    Python's hash is keyed anew in each process (SipHash), and only frames of the same guest are held against each
    other: that two differ and have the same mark will not happen (once in 10^13 resends of a thousand frames).
    """
    return array("q", map(hash, zip(frames.tokens, frames.payloads, frames.expirations, strict=True)))


class Place(Struct, frozen=True):
    """A frame of a connection."""

    position: int
    """Counted from 0."""
    identifier: int


class Stretch(Struct, eq=False):
    """Frames of a connection that became a batch, or were known to have gone out before."""

    batch_id: str | None
    """None: of the latter kind."""
    positions: Sequence[int]
    """Ascending."""
    identifiers: Sequence[int]
    marks: array[int]
    at: float
    """Seconds from anywhere, of the taking."""
    ids: Sequence[str] = ()
    """Of the latter kind: the notifications that they had gone out as."""
    ended: bool = False

    def behind(self, position: int) -> dict[str, int]:
        """Those that came after it: their marks, by the ids of the notifications that they went in as."""
        indices = range(bisect_right(self.positions, position), len(self.positions))
        batch_id = self.batch_id
        if batch_id is None:
            return {self.ids[index]: self.marks[index] for index in indices}
        return {batch_id + PLACES[index]: self.marks[index] for index in indices}


class Trail:
    """What a connection has brought lately: from the first batch on that has not ended."""

    def __init__(self, most: int = MOST_FRAMES) -> None:
        self._most = most
        self._stretches: deque[Stretch] = deque()
        self._by_batch: dict[str, Stretch] = {}
        self._frames = 0
        self._frozen = False

    @property
    def open(self) -> list[str]:
        """Batches that have not ended."""
        return [batch_id for batch_id, each in self._by_batch.items() if not each.ended]

    @property
    def over(self) -> bool:
        """Everything has ended."""
        return not self._stretches

    def add(self, stretch: Stretch) -> list[str]:
        """The batches that nothing is known of any more, as it is too much, or too long ago."""
        stretch.ended = stretch.batch_id is None
        self._stretches.append(stretch)
        self._frames += len(stretch.positions)
        if stretch.batch_id is not None:
            self._by_batch[stretch.batch_id] = stretch
        gone: list[str] = []
        while not self._frozen and (self._frames > self._most or self._stretches[0].at < stretch.at - KEEP_S):
            first = self._drop_first()
            if first.batch_id is not None and not first.ended:
                gone.append(first.batch_id)
        self._drop_ended()
        return gone

    def freeze(self) -> None:
        """Forget nothing from now on: a frame is bad, and what is behind it will be asked for. Nothing much follows."""
        self._frozen = True

    def end(self, batch_id: str) -> None:
        """Nothing more is heard of this one."""
        stretch = self._by_batch.get(batch_id)
        if stretch is not None:
            stretch.ended = True
            self._drop_ended()

    def forget(self, batch_id: str) -> None:
        """It was not taken after all."""
        stretch = self._by_batch.pop(batch_id, None)
        if stretch is not None:
            self._stretches.remove(stretch)
            self._frames -= len(stretch.positions)

    def find(self, batch_id: str, index: int) -> Place | None:
        """Where it was; None where that is not known any more."""
        stretch = self._by_batch.get(batch_id)
        return None if stretch is None else Place(stretch.positions[index], stretch.identifiers[index])

    def behind(self, position: int) -> dict[str, int]:
        """Everything that came after it, as in `Stretch.behind`."""
        found: dict[str, int] = {}
        for stretch in self._stretches:
            found |= stretch.behind(position)
        return found

    def _drop_ended(self) -> None:
        while self._stretches and self._stretches[0].ended and not self._frozen:
            self._drop_first()

    def _drop_first(self) -> Stretch:
        first = self._stretches.popleft()
        self._frames -= len(first.positions)
        if first.batch_id is not None:
            del self._by_batch[first.batch_id]
        return first


class Entry:
    """A notification that went out, and whose frame will come once more."""

    __slots__ = ("id", "mark", "older", "there", "until", "whose")

    def __init__(self, whose: Whose, mark: int, id: str, until: float, older: Entry | None) -> None:
        self.whose = whose
        self.mark = mark
        self.id = id
        self.until = until
        self.older = older
        """The one before with the same mark."""
        self.there = True
        """It is waited for."""


class Sent:
    """What went out and will be sent again: a multiset, as some clients send the same twice and mean it."""

    def __init__(self, most: int = MOST_FRAMES, keep_s: float = KEEP_S) -> None:
        self._most = most
        self._keep_s = keep_s
        self._known: dict[Whose, dict[int, Entry]] = {}
        """By mark, the newest; it leads to those before."""
        self._order: deque[Entry] = deque()
        """Oldest first. Those that are over may be among them."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def remember(self, whose: Whose, found: Iterable[tuple[str, int]], now: float) -> list[Entry]:
        """Wait for these, by the notification's id and the mark; `now` is in seconds from anywhere."""
        known = self._known.setdefault(whose, {})
        made = []
        for went_as, mark in found:
            entry = known[mark] = Entry(whose, mark, went_as, now + self._keep_s, known.get(mark))
            made.append(entry)
        self._order.extend(made)
        self._count += len(made)
        if not known:
            del self._known[whose]
        self._drop(now)
        return made

    def take(self, whose: Whose, marks: Sequence[int], now: float) -> dict[int, Entry]:
        """Which of these frames are waited for, by index. They are no longer."""
        if self._order:
            self._drop(now)
        taken: dict[int, Entry] = {}
        known = self._known.get(whose)
        if known is not None:
            for index, mark in enumerate(marks):
                if mark in known:
                    taken[index] = known[mark]
                    self._remove(known[mark])
        return taken

    def forget(self, entries: Iterable[Entry]) -> None:
        """Nobody will send these again."""
        for entry in entries:
            if entry.there:
                self._remove(entry)

    def _drop(self, now: float) -> None:
        order = self._order
        while order and (order[0].until <= now or len(order) > self._most):
            self.forget((order.popleft(),))

    def _remove(self, entry: Entry) -> None:
        entry.there = False
        self._count -= 1
        known = self._known[entry.whose]
        newest: Entry | None = known[entry.mark]
        while newest is not None and not newest.there:
            newest = newest.older
        if newest is not None:
            known[entry.mark] = newest
            return
        del known[entry.mark]
        if not known:
            del self._known[entry.whose]
