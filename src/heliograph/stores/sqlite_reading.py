"""What is looked for in the SQLite store's file, on the connection that reads and in its thread.

There is one such thread: what takes long makes the others wait. Rows of many come back as they are, for the event
loop's thread to make values of; where most of the rows found would be dropped again, that is done here.
"""

from __future__ import annotations

import contextlib

import apsw

from heliograph.batches import notification_id
from heliograph.model import Environment, Receipt, State
from heliograph.stores.outcomes import receipt
from heliograph.stores.sqlite_file import Row
from heliograph.stores.sqlite_rows import CANONICAL, details_of, id_of, key_of

# As `octets_of` does: what is no hex is kept as it is.
_HELD = """
SELECT value, CASE
    WHEN EXISTS (
        SELECT 1 FROM removal WHERE app = ?2 AND environment = ?3 AND token = coalesce(unhex(value), value))
    THEN 'Unregistered'
    WHEN EXISTS (
        SELECT 1 FROM quarantine
        WHERE app = ?2 AND environment = ?3 AND token = coalesce(unhex(value), value) AND until > ?4)
    THEN 'BadDeviceToken' END AS word
FROM carray(?1) WHERE word IS NOT NULL"""

_COUNT_HELD = "SELECT count(*) FROM removal UNION ALL SELECT count(*) FROM quarantine"

HELD_PAGES = tuple(
    f"""
SELECT app, environment, token FROM {table} WHERE (app, environment, token) > (?, ?, ?)
ORDER BY app, environment, token LIMIT 5000"""  # noqa: S608 - two literals
    for table in ("removal", "quarantine")
)
"""For `held_page`."""

_RECEIPTS = """
SELECT id, app, created_at, size, states, times_ms, details
FROM carray(?) AS wanted CROSS JOIN batch ON batch.id = wanted.value LEFT JOIN outcome USING (row)"""

_BURIED = """
SELECT id, app, created_at, size, states, times_ms, details FROM outcome INDEXED BY outcome_buried
CROSS JOIN batch USING (row) WHERE buried_id IS NOT NULL AND buried_id <= ? ORDER BY buried_id DESC"""

_BURIED_OF_APP = """
SELECT id, app, created_at, size, states, times_ms, details FROM outcome INDEXED BY outcome_buried_app
CROSS JOIN batch USING (row)
WHERE buried_app = ? AND buried_id IS NOT NULL AND buried_id <= ? ORDER BY buried_id DESC"""

_LAST_ID = "ffffffff-ffff-ffff-ffff-ffffffffffff"


def receipt_rows(db: apsw.Connection, keys: tuple[bytes, ...]) -> list[Row]:
    """For each of these batches that there is, a row as `outcomes.receipt` wants it."""
    rows: list[Row] = db.execute(_RECEIPTS, (apsw.carray(keys),)).fetchall()
    return rows


def canonical_before(before: str | None) -> str:
    """The id before which to look, newest first; above all where `before` is None. Raises ValueError if it is no id."""
    canonical = _LAST_ID if before is None else before.lower()
    if not CANONICAL.fullmatch(canonical):
        raise ValueError(f"{before!r} is no notification's id")
    return canonical


def find_buried(db: apsw.Connection, app: str | None, before: str, limit: int) -> list[Receipt]:
    """What was given up on, newest first, before the canonical id `before`."""
    found: list[Receipt] = []
    key = key_of(before[:-4])
    rows = db.execute(_BURIED, (key,)) if app is None else db.execute(_BURIED_OF_APP, (app, key))
    with contextlib.closing(rows):  # it may not be read to its end
        for row in rows:
            details = details_of(row[-1])
            buried = [index for index, state in enumerate(row[4]) if state == State.BURIED]
            for name in (notification_id(id_of(row[0]), index) for index in reversed(buried)):
                if len(found) >= limit:
                    return found
                if name < before and (known := receipt(name, row, details)):
                    found.append(known)
    return found


def held_among(
    db: apsw.Connection, app: str, environment: Environment, tokens: tuple[bytes, ...], now: float
) -> dict[bytes, str]:
    """Which of these are held back at `now`, by the store's own clock, and why."""
    rows: list[Row] = db.execute(_HELD, (apsw.carray(tokens), app, environment.value, now)).fetchall()
    return dict(rows)


def count_held(db: apsw.Connection) -> int:
    rows: list[Row] = db.execute(_COUNT_HELD).fetchall()
    return sum(number for (number,) in rows)


def held_page(db: apsw.Connection, sql: str, place: Row) -> list[Row]:
    """Some of what is held back, from after `place`: app, environment, the token's octets. `sql`: of `HELD_PAGES`."""
    rows: list[Row] = db.execute(sql, place).fetchall()
    return rows


def find_apps(db: apsw.Connection) -> dict[str, bytes]:
    rows: list[Row] = db.execute("SELECT name, record FROM app ORDER BY name").fetchall()
    return dict(rows)


def api_key_rows(db: apsw.Connection) -> list[Row]:
    """As `sqlite_rows.api_key` wants them, oldest first."""
    rows: list[Row] = db.execute("SELECT * FROM api_key ORDER BY created_at, id").fetchall()
    return rows
