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
        self._alone: dict[bytes, Slice] = {}
        """Where those wait that are alone, by their whole id."""
        self._parts: dict[bytes, list[Slice]] = {}
        """The other slices, by the id of their batch."""

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
        if work.alone:
            for each in work.names:
                self._alone[each] = work
        else:
            self._parts.setdefault(work.batch_id, []).append(work)
        share.waiting += count
        self.waiting += count

    def join(self, work: Slice) -> bool:
        """Whether what was put last of its lane takes it along, which must be small: else it is to be put."""
        share = self._shares.get(work.lane)
        if share is None or not share.small:
            return False
        last = share.small[-1]
        if not last.left or len(last.keys) >= SMALL or not last.join(work):
            return False
        for each in work.names:
            self._alone[each] = last
        share.waiting += len(work.keys)
        self.waiting += len(work.keys)
        return True

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
        if work.alone:
            self._forget_alone(work, count)
        work.place += count
        queue.share.waiting -= count
        self.waiting -= count
        self._turn -= count
        if work.place == len(work.keys):
            queue.popleft()
            if not work.alone:
                self._forget_part(work)
            _skip_empty(queue)
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
        if work.alone:
            self._forget_alone(work, work.left)
        else:
            self._forget_part(work)
        _skip_empty(queue)
        queue.share.waiting -= work.left
        self.waiting -= work.left
        if not queue:
            self._ring = deque(each for each in self._ring if each)
            self._turn = TURN
        return work

    def withdraw(self, wanted: Mapping[bytes, Collection[int]]) -> list[int]:
        """Take these notifications out where they wait, by the id of their batch (see `Slice`); their keys."""
        those: dict[Slice, None] = {}
        for prefix, indices in wanted.items():
            those.update(dict.fromkeys(self._parts.get(prefix, ())))
            for index in indices:
                alone = self._alone.pop(prefix + b"%04x" % (index + 1), None)
                if alone is not None:
                    those[alone] = None
        keys: list[int] = []
        for work in those:
            taken = work.withdraw(wanted)
            keys += taken
            share = self._shares[work.lane]
            share.waiting -= len(taken)
            if not work.left:
                # It stays in its queue until it would be first: to look for it takes longer, the more there are.
                if not work.alone:
                    self._forget_part(work)
                _skip_empty(share.small)
                _skip_empty(share.large)
        if keys:
            self.waiting -= len(keys)
            if not self._ring[0]:
                self._turn = TURN
            if not all(self._ring):
                self._ring = deque(queue for queue in self._ring if queue)
        return keys

    def pop_all(self) -> list[Slice]:
        """Take everything out."""
        everything = [work for queue in self._ring for work in queue if work.left]
        self.waiting = 0
        self._turn = TURN
        self._shares.clear()
        self._ring.clear()
        self._alone.clear()
        self._parts.clear()
        return everything

    def _forget_alone(self, work: Slice, count: int) -> None:
        for each in work.names[work.place : work.place + count]:
            self._alone.pop(each, None)

    def _forget_part(self, work: Slice) -> None:
        parts = self._parts[work.batch_id]
        parts.remove(work)
        if not parts:
            del self._parts[work.batch_id]


def _skip_empty(queue: _Queue) -> None:
    """What is first has something left."""
    while queue and not queue[0].left:
        queue.popleft()
