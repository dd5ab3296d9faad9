"""Whose turn it is: which lanes have something due, and how what a take gets is shared out among them. In memory, pure.

A lane's batches stand in two lines, the small ones and the large ones. A line is an integer: twice the lane's number,
and one more for the large ones. What is kept of a line is one time, which is never later than when its first is due:
where it turns out too early, somebody looks in vain once and then says so.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import islice

SMALL = 32
"""Notifications in a small batch, at most.

It may be changed: a job keeps the line that it was given when it was made, by migration 0002 with the number of that
day or later with this one, and every line is looked into, so that what is in the other of its lane's lines is only
sent a little sooner or later. `SMALL` of `carriers.apns.backlog` counts slices, in memory, and need not be the same;
but a batch that is small in one place and large in the other waits behind large ones after all.
"""

_LARGE_ONES = 8
"""Large batches in one take, at most, unless an eighth of what is asked for is more: each is up to half a megabyte, and
who puts something meanwhile waits until they are read."""

_IN_A_ROW = 4
"""What a lane gives before the next one's turn: what is near one another in the database costs less."""

Due = tuple[int, int, float]
"""A batch that waits: its line, its row, and the UNIX seconds from which it is due."""


class Turns:
    """The lines that are not empty."""

    def __init__(self, due: Mapping[int, float] | None = None) -> None:
        """`due`: when the first of each line is due."""
        self._due = dict(due or {})
        self._later = [(at, line) for line, at in self._due.items()]
        heapify(self._later)
        self._ready: dict[int, None] = {}
        """Lanes with something due, in the order of their turns."""
        self._last: dict[int, int] = {}
        """The line that a lane's last batch was of."""

    def add(self, line: int, at: float) -> None:
        """Something of `line` is due at `at`."""
        if at < self._due.get(line, math.inf):
            self._set(line, at)

    def next_due(self, full: Collection[int]) -> float:
        """When something will be due in a lane that is not `full`, where nothing is now; infinity if nothing waits."""
        while self._later and self._due.get(self._later[0][1]) != self._later[0][0]:
            heappop(self._later)
        if self._later and self._later[0][1] >> 1 not in full:
            return self._later[0][0]
        return min((at for line, at in self._due.items() if line >> 1 not in full), default=math.inf)

    def choose(self, now: float, limit: int, full: Collection[int]) -> list[int]:
        """The lines to look into: those of up to `limit` lanes that have something due and are not `full`."""
        while self._later and self._later[0][0] <= now:
            at, line = heappop(self._later)
            if self._due.get(line) == at:
                self._ready[line >> 1] = None
        lanes = islice((lane for lane in self._ready if lane not in full), limit)
        lines = []
        for lane in lanes:
            last = self._last.get(lane, 2 * lane + 1)
            lines += [line for line in (last ^ 1, last) if self._due.get(line, math.inf) <= now]
        return lines

    def share(self, lines: Sequence[int], found: Iterable[Due], looked: int, now: float, limit: int) -> list[Due]:
        """What a take gets of what was `found` in `lines`, which `choose` named: up to `looked` of each, oldest first.

        Lanes take turns, and so do a lane's lines.
        """
        waiting: dict[int, list[Due]] = {line: [] for line in lines}
        for each in found:
            waiting[each[0]].append(each)
        of_lanes: dict[int, list[list[Due]]] = {}
        for line, those in waiting.items():
            of_lanes.setdefault(line >> 1, []).append([each for each in those if each[2] <= now])
        large_ones = max(_LARGE_ONES, limit // 8)
        given: list[Due] = []
        for each in _in_turns([_in_turns(queues) for queues in of_lanes.values()], _IN_A_ROW):
            if each[0] & 1:
                if not large_ones:
                    continue
                large_ones -= 1
            given.append(each)
            if len(given) == limit:
                break

        counts = dict.fromkeys(lines, 0)
        for line, _, _ in given:
            counts[line] += 1
            self._last[line >> 1] = line
        for lane, queues in of_lanes.items():
            if any(queues) and not any(counts.get(line, 0) for line in (2 * lane, 2 * lane + 1)):
                continue  # the others used up what there was to give: it is the first next time
            del self._ready[lane]
            for line in (2 * lane, 2 * lane + 1):
                if line in waiting:
                    self._set_rest(line, waiting[line][counts[line] :], waiting[line], looked)
        return given

    def _set_rest(self, line: int, rest: Sequence[Due], those: Sequence[Due], looked: int) -> None:
        """Note when the first of `rest` is due: what is left of `those` that were found."""
        if rest:
            self._set(line, rest[0][2])
        elif len(those) == looked:  # there may be more, not older than these
            self._set(line, those[-1][2])
        else:
            del self._due[line]

    def _set(self, line: int, at: float) -> None:
        self._due[line] = at
        heappush(self._later, (at, line))
        if len(self._later) > 2 * len(self._due) + 64:  # mostly times that no longer hold
            self._later = [(at, line) for line, at in self._due.items()]
            heapify(self._later)


def _in_turns(queues: Iterable[Iterable[Due]], in_a_row: int = 1) -> Iterator[Due]:
    """Some of each in turn, until all are empty."""
    waiting = list(map(iter, queues))
    while waiting:
        for queue in tuple(waiting):
            some = list(islice(queue, in_a_row))
            yield from some
            if len(some) < in_a_row:
                waiting.remove(queue)
