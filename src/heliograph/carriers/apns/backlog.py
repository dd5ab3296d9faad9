"""What waits for a stream in a pool, and who is next. Pure.

Each lane has two queues here, one of small slices and one of large ones, and queues take turns: `TURN` notifications
each. So a lane with fifty thousand waiting delays another's single notification by one turn, thousand-blocks do not
delay the single ones of their own lane for longer, and no stream of single ones starves a block. The price is that a
lane with both kinds has two turns in a round.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping

from heliograph.carriers.apns.slices import Slice
from heliograph.model import Lane

SMALL = 32
"""Slices of up to so many notifications do not wait behind larger ones."""
TURN = 64
"""Notifications that a queue may send before the next one's turn, where there is more than one."""


class _Queue(deque[Slice]):
    """Slices of one lane and size."""

    __slots__ = ("share",)

    def __init__(self, share: _Share) -> None:
        super().__init__()
        self.share = share


class _Share:
    """What a lane has here. It stays, even empty: to make one anew for each notification would cost more than that."""

    __slots__ = ("large", "small", "waiting")

    def __init__(self) -> None:
        self.small = _Queue(self)
        self.large = _Queue(self)
        self.waiting = 0
        """Notifications."""


class Backlog:
    """Slices in the order in which they are to be sent."""

    def __init__(self) -> None:
        self.waiting = 0
        """Notifications."""
        self._shares: dict[Lane, _Share] = {}
        self._ring: deque[_Queue] = deque()
        """The queues that hold anything; the first one's turn it is."""
        self._turn = TURN
        """What is left of that turn."""

    @property
    def lanes(self) -> dict[Lane, int]:
        """Notifications of each lane that has any."""
        return {lane: share.waiting for lane, share in self._shares.items() if share.waiting}

    def put(self, work: Slice) -> None:
        """Behind what is there of its lane and size."""
        count = len(work.keys)
        share = self._shares.get(work.lane)
        if share is None:
            share = self._shares[work.lane] = _Share()
        queue = share.small if count <= SMALL else share.large
        if not queue:
            self._ring.append(queue)
        queue.append(work)
        share.waiting += count
        self.waiting += count

    def offer(self, room: int) -> tuple[Slice, int]:
        """What is next where there is room for so many: from which slice, and how many. Something must be waiting."""
        work = self._ring[0][0]
        count = len(work.keys) - work.place
        count = min(count, room)
        return work, self._turn if count > self._turn and len(self._ring) > 1 else count

    def take(self, count: int) -> None:
        """So many of what was offered last are gone."""
        queue = self._ring[0]
        work = queue[0]
        work.place += count
        queue.share.waiting -= count
        self.waiting -= count
        self._turn -= count
        if work.place == len(work.keys):
            queue.popleft()
            if not queue:
                self._ring.popleft()
                self._turn = TURN
                return
        if self._turn <= 0:
            self._turn = TURN
            self._ring.rotate(-1)

    @property
    def oldest(self) -> float | None:
        """Since when the slice waits that waits longest; None where nothing does."""
        return min((queue[0].since for queue in self._ring), default=None)

    def pop_oldest(self) -> Slice:
        """Take that slice out, whole. Something must be waiting."""
        queue = min(self._ring, key=lambda each: each[0].since)
        work = queue.popleft()
        queue.share.waiting -= work.left
        self.waiting -= work.left
        if not queue:
            self._ring = deque(each for each in self._ring if each)
            self._turn = TURN
        return work

    def withdraw(self, wanted: Mapping[bytes, Collection[int]]) -> list[int]:
        """Take these notifications out where they wait, by the prefix of their batch (see `Slice`); their keys."""
        keys: list[int] = []
        for queue in self._ring:
            taken: list[int] = []
            for work in queue:
                indices = wanted.get(work.prefixes[0])
                if indices is not None:
                    taken += work.withdraw(indices)
            if taken:
                queue.share.waiting -= len(taken)
                left = [work for work in queue if work.left]
                queue.clear()
                queue.extend(left)
                keys += taken
        if keys:
            self.waiting -= len(keys)
            if not self._ring[0]:
                self._turn = TURN
            self._ring = deque(queue for queue in self._ring if queue)
        return keys

    def pop_all(self) -> list[Slice]:
        """Take everything out."""
        everything = [work for queue in self._ring for work in queue]
        self.waiting = 0
        self._turn = TURN
        self._shares.clear()
        self._ring.clear()
        return everything
