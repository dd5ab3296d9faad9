"""Looking through all that the SQLite store's file knows, newest first, a bounded piece at a time.

There is no index for this but for the connection that brought something: it would cost every put, and people look
rarely. SQLite tries on each batch's row what can be tried there, for many rows in one call. What passes may still hold
no place that fits, or one that is told only by its batch's body: that is looked at here.

Ids begin with the milliseconds of their taking, so they are the order, and the bounds of a time.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Collection, Iterable, Iterator

import apsw

from heliograph.batches import notification_id
from heliograph.model import Detail, Filter, Page, PushType, Receipt, State
from heliograph.stores.body import Places
from heliograph.stores.outcomes import receipt
from heliograph.stores.sqlite_file import Row
from heliograph.stores.sqlite_reading import COLUMNS, SHORT, Bodies
from heliograph.stores.sqlite_rows import details_of, id_of, key_of, places_of

LOOK_S = 0.1
"""How long one look may take, about."""

_CHUNK = 1024
"""Batches that one query looks at."""

_ALL = "batch", "id >= ? AND id < ?"
_OF_CONNECTION = "batch INDEXED BY batch_connection", "connection = ? AND id >= ? AND id < ?"

# Of a long body only the beginning is read, and not by SQLite.
_IN_BODY = f"(length(body) > {SHORT} OR instr(body, ?))"


def find_notifications(db: apsw.Connection, wanted: Filter, before: str, limit: int) -> Page:
    """Up to `limit` that fit, newest first, before the canonical id `before`; see `ports.Store.find_notifications`."""
    if limit < 1:
        return Page((), before)
    ends_at = time.monotonic() + LOOK_S
    low, high = _bounds(wanted, before)
    conditions, arguments = _conditions(wanted)
    which = () if wanted.connection is None else (wanted.connection,)
    batches, bounds = _OF_CONNECTION if which else _ALL
    every = " AND ".join((bounds, *conditions))
    rows_sql = f"SELECT {COLUMNS} FROM {batches} LEFT JOIN outcome USING (row) WHERE {every} ORDER BY id DESC"  # noqa: S608 - words of ours
    cut_sql = f"SELECT id FROM {batches} WHERE {bounds} ORDER BY id DESC LIMIT 1 OFFSET ?"  # noqa: S608 - likewise
    fitting = _Fitting(wanted)
    found: list[Receipt] = []
    with contextlib.closing(Bodies(db)) as bodies:
        while True:
            cut: bytes | None = db.execute(cut_sql, (*which, low, high, _CHUNK - 1)).get
            with contextlib.closing(db.execute(rows_sql, (*which, cut or low, high, *arguments))) as rows:
                for row in map(bodies.whole, rows):
                    details, places = details_of(row[7]), places_of(row[-1])
                    name = id_of(row[0])
                    for index in fitting.places(row, details, places):
                        each = notification_id(name, index)
                        if each >= before or (known := receipt(each, row, details, places)) is None:
                            continue
                        found.append(known)
                        if len(found) == limit:
                            more = index > 0 or db.execute(cut_sql, (*which, low, row[0], 0)).get is not None
                            return Page(found, each if more else None)
                    if time.monotonic() >= ends_at:
                        return Page(found, notification_id(name, 0))
            if cut is None:
                return Page(found, None)
            if time.monotonic() >= ends_at:
                return Page(found, notification_id(id_of(cut), 0))
            high = cut


def _bounds(wanted: Filter, before: str) -> tuple[bytes, bytes]:
    """Of the keys to look at: the first, and what is above the last."""
    # Its own batch is looked at too, unless nothing of that can be before it.
    low, high = b"", key_of(before[:-4]) + (b"" if before[-4:] <= "0001" else b"\0")
    if wanted.since is not None:
        low = _milliseconds(wanted.since)
    if wanted.until is not None:
        high = min(high, _milliseconds(wanted.until))
    return low, high


def _milliseconds(at: float) -> bytes:
    """What the ids of this moment begin with, or else of the next."""
    return min(max(math.ceil(at * 1000), 0), 2**48 - 1).to_bytes(6, "big")


def _conditions(wanted: Filter) -> tuple[list[str], list[object]]:
    """What SQLite can tell of a batch's row: where this does not hold, nothing in the batch fits."""
    conditions: list[str] = []
    arguments: list[object] = []
    if wanted.apps is not None:
        conditions.append("app IN (SELECT value FROM carray(?))")
        arguments.append(apsw.carray(tuple(wanted.apps)))
    if wanted.environment is not None:
        conditions.append("environment = ?")
        arguments.append(wanted.environment.value)
    if wanted.states is not None:
        ways = ["states IS NULL"] if State.QUEUED in wanted.states else []
        ways += ["instr(states, ?)"] * len(wanted.states)
        conditions.append(f"({' OR '.join(ways) or 'false'})")
        arguments += [bytes((state,)) for state in wanted.states]
    if wanted.reason is not None:
        conditions.append("instr(details, ?)")
        arguments.append(wanted.reason.encode())
    in_body = [
        None if wanted.token is None else bytes.fromhex(wanted.token.decode()),
        None if wanted.topic is None else wanted.topic.encode(),
        None if wanted.push_type in (None, PushType.ALERT) else wanted.push_type.value.encode(),  # no word for alerts
    ]
    for each in in_body:
        if each is not None:
            conditions.append(_IN_BODY)
            arguments.append(each)
    return conditions, arguments


class _Fitting:
    """Which places of a batch fit."""

    def __init__(self, wanted: Filter) -> None:
        self._wanted = wanted
        self._octets = None if wanted.token is None else bytes.fromhex(wanted.token.decode())
        states = wanted.states
        self._marks = None if states is None else bytes(each in states for each in range(256))
        """What translates states to 1 where they are wanted."""

    def places(self, row: Row, details: dict[int, Detail], places: Places | None) -> Iterable[int]:
        """Newest first; where the row's own columns fit, see `_conditions`."""
        wanted, size = self._wanted, row[4]
        kinds = self._kinds(places)
        if not kinds:
            return ()
        marks = None if self._marks is None else (row[5] or bytes(size)).translate(self._marks)
        fitting: Iterable[int]
        if self._octets is not None:
            fitting = reversed(places.find(self._octets)) if places is not None else ()
        elif wanted.reason is not None:
            fitting = sorted(details, reverse=True)
        elif marks is not None:
            fitting, marks = _marked(marks), None
        else:
            fitting = reversed(range(size))
        if marks is not None:
            chosen = marks
            fitting = (index for index in fitting if chosen[index : index + 1] == b"\1")
        if wanted.reason is not None:
            fitting = (index for index in fitting if index in details and details[index].reason == wanted.reason)
        if places is not None and len(kinds) < len(places.kinds):
            kind_of = places.kind_of
            fitting = (index for index in fitting if kind_of[index : index + 1] in kinds)
        return fitting

    def _kinds(self, places: Places | None) -> Collection[bytes]:
        """Which of the batch's sets of headers fit, each as its octet in `kind_of`."""
        topic, push_type = self._wanted.topic, self._wanted.push_type
        if places is None:
            return (b"",) if topic is None and push_type is None else ()
        return [
            bytes((kind,))
            for kind, headers in enumerate(places.kinds)
            if topic in (None, headers.topic) and push_type in (None, headers.push_type)
        ]


def _marked(marks: bytes) -> Iterator[int]:
    index = marks.rfind(1)
    while index >= 0:
        yield index
        index = marks.rfind(1, 0, index)
