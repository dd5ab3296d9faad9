"""What is looked for in the SQLite store's file, on the connection that reads and in its thread.

There is one such thread for what is asked for by name, and another one for looking through much (`find_buried` and
`sqlite_listing`): what takes long makes others of its thread wait. Rows of many come back as they are, for the event
loop's thread to make values of; where most of the rows found would be dropped again, that is done here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from heapq import merge
from operator import attrgetter, itemgetter

import apsw

from heliograph.batches import notification_id
from heliograph.model import DeviceToken, Environment, Listed, Once, Receipt, Removal, State
from heliograph.stores.body import HEAD_GUESS, head_octets
from heliograph.stores.outcomes import receipt
from heliograph.stores.sqlite_file import Row
from heliograph.stores.sqlite_records import ONCE_LAPSES_S, REMOVAL_LAPSES_S
from heliograph.stores.sqlite_rows import CANONICAL, details_of, id_of, key_of, places_of

# As `octets_of` does: what is no hex is kept as it is.
_HELD = """
SELECT value, CASE
    WHEN EXISTS (
        SELECT 1 FROM removal
        WHERE app = ?2 AND environment = ?3 AND token = coalesce(unhex(value), value) AND recorded_at > ?5)
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

SHORT = 8192
"""A body of so many octets stands in its row's page. Of a longer one only the beginning is read: see `Bodies`."""

COLUMNS = f"""id, app, environment, created_at, size, states, times_ms, details,
    row, length(body), CASE WHEN length(body) <= {SHORT} THEN body END"""
"""Of batch and outcome: a row as `outcomes.receipt` wants it, once `Bodies.whole` has completed it."""

_RECEIPTS = f"""
SELECT {COLUMNS}
FROM carray(?) AS wanted CROSS JOIN batch ON batch.id = wanted.value LEFT JOIN outcome USING (row)"""  # noqa: S608 - columns of ours

# Of several the one that was stored last.
_OWN = """
SELECT value, place, batch.id
FROM carray(?) AS wanted CROSS JOIN apns_id AS own ON (row, place) = (
    SELECT row, place FROM apns_id AS each INDEXED BY apns_id_id WHERE each.id = wanted.value {whose}
    ORDER BY row DESC, place DESC LIMIT 1)
CROSS JOIN batch USING (row)"""

_OF_APPS = "AND EXISTS (SELECT 1 FROM batch WHERE batch.row = each.row AND app IN (SELECT value FROM carray(?)))"

_REMOVALS = """
SELECT number, token, since FROM removal INDEXED BY removal_number
WHERE app = ? AND environment = ? AND number > ? AND recorded_at > ? ORDER BY number LIMIT ?"""

_REMOVAL_OF = """
SELECT number, token, since FROM removal
WHERE app = ? AND environment = ? AND number > ? AND recorded_at > ? AND token = ? LIMIT ?"""

_BURIED = f"""
SELECT {COLUMNS} FROM outcome INDEXED BY outcome_buried
CROSS JOIN batch USING (row) WHERE buried_id IS NOT NULL AND buried_id <= ? ORDER BY buried_id DESC"""  # noqa: S608 - columns of ours

_BURIED_OF_APP = f"""
SELECT {COLUMNS} FROM outcome INDEXED BY outcome_buried_app
CROSS JOIN batch USING (row)
WHERE buried_app = ? AND buried_id IS NOT NULL AND buried_id <= ? ORDER BY buried_id DESC"""  # noqa: S608

_STEP_ROWS = 20_000
"""Jobs that are counted at a time: some milliseconds."""

_DEPTHS = f"""
SELECT line / 2, total(size) FILTER (WHERE leased_until IS NULL), count(leased_until),
    min(due_at) FILTER (WHERE leased_until IS NULL), max(row), count(*)
FROM (SELECT row, line, size, due_at, leased_until FROM job WHERE row > ? ORDER BY row LIMIT {_STEP_ROWS})
GROUP BY line / 2"""  # noqa: S608 - an integer of ours

_LAST_ID = "ffffffff-ffff-ffff-ffff-ffffffffffff"


def receipt_rows(db: apsw.Connection, keys: tuple[bytes, ...]) -> list[Row]:
    """For each of these batches that there is, a row as `outcomes.receipt` wants it; last, what `places_of` reads."""
    rows: list[Row] = db.execute(_RECEIPTS, (apsw.carray(keys),)).fetchall()
    if None in [row[-1] for row in rows]:
        with contextlib.closing(Bodies(db)) as bodies:
            return [bodies.whole(row) for row in rows]
    return rows


def own_rows(
    db: apsw.Connection, wanted: tuple[bytes, ...], apps: tuple[str, ...] | None
) -> list[tuple[bytes, int, Row]]:
    """For each of these ids that a caller of these apps brought, as octets: the place, and the row of `receipt_rows`.

    Callers of several apps may have brought the same id.
    """
    sql = _OWN.format(whose="" if apps is None else _OF_APPS)
    of_apps = () if apps is None else (apsw.carray(apps),)
    found: list[Row] = db.execute(sql, (apsw.carray(wanted), *of_apps)).fetchall()
    rows = {row[0]: row for row in receipt_rows(db, tuple({key for _, _, key in found}))} if found else {}
    return [(octets, place, rows[key]) for octets, place, key in found if key in rows]


class Bodies:
    """Reads the beginnings of long bodies, page by page: of up to half a megabyte, at most some 40 kB are wanted."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db
        self._blob: apsw.Blob | None = None

    def close(self) -> None:
        if self._blob is not None:
            self._blob.close(force=True)

    def whole(self, row: Row) -> Row:
        """A row of `COLUMNS`; where it lacks the body, the beginning of that is its last entry now."""
        return row if row[-1] is not None else (*row[:-1], self._start(row[-3], row[-2]))

    def _start(self, row: int, size: int) -> bytes:
        try:
            if self._blob is None:
                self._blob = self._db.blob_open("main", "batch", "body", row, False)
            else:
                self._blob.reopen(row)
            start = self._blob.read(min(HEAD_GUESS, size))
            octets = head_octets(start, size)
            return start + self._blob.read(octets - len(start)) if octets > len(start) else start
        except apsw.Error:  # purged meanwhile, or damaged: what else is known is told
            self.close()
            self._blob = None
            return b""


def canonical_before(before: str | None) -> str:
    """The id before which to look, newest first; above all where `before` is None. Raises ValueError if it is no id."""
    canonical = _LAST_ID if before is None else before.lower()
    if not CANONICAL.fullmatch(canonical):
        raise ValueError(f"{before!r} is no notification's id")
    return canonical


def find_buried(db: apsw.Connection, apps: Collection[str] | None, before: str, limit: int) -> list[Receipt]:
    """What was given up on, newest first, before the canonical id `before`."""
    found: list[Receipt] = []
    key = key_of(before[:-4])
    with contextlib.ExitStack() as ends:
        if apps is None:
            ways = [db.execute(_BURIED, (key,))]
        else:
            ways = [db.execute(_BURIED_OF_APP, (app, key)) for app in apps]
        for each in ways:
            ends.callback(each.close)  # it may not be read to its end
        bodies = ends.enter_context(contextlib.closing(Bodies(db)))
        for row in merge(*ways, key=itemgetter(0), reverse=True):
            details, places = details_of(row[7]), places_of(bodies.whole(row)[-1])
            buried = [index for index, state in enumerate(row[5]) if state == State.BURIED]
            for name in (notification_id(id_of(row[0]), index) for index in reversed(buried)):
                if len(found) >= limit:
                    return found
                if name < before and (known := receipt(name, row, details, places)):
                    found.append(known)
    return found


def held_among(
    db: apsw.Connection, app: str, environment: Environment, tokens: tuple[bytes, ...], now: float
) -> dict[bytes, str]:
    """Which of these are held back at `now`, by the store's own clock, and why."""
    wanted = apsw.carray(tokens), app, environment.value
    rows: list[Row] = db.execute(_HELD, (*wanted, now, now - REMOVAL_LAPSES_S)).fetchall()
    return dict(rows)


def count_held(db: apsw.Connection) -> int:
    rows: list[Row] = db.execute(_COUNT_HELD).fetchall()
    return sum(number for (number,) in rows)


def held_page(db: apsw.Connection, sql: str, place: Row) -> list[Row]:
    """Some of what is held back, from after `place`: app, environment, the token's octets. `sql`: of `HELD_PAGES`."""
    rows: list[Row] = db.execute(sql, place).fetchall()
    return rows


def find_removals(
    db: apsw.Connection,
    app: str,
    environments: Collection[Environment],
    after: int,
    limit: int,
    token: bytes | None,
    now: float,
) -> list[Listed]:
    """Up to `limit` with numbers above `after`, in their order, that have not lapsed at `now` (the store's clock).

    `token`: of this one alone, as octets.
    """
    sql, which = (_REMOVALS, ()) if token is None else (_REMOVAL_OF, (token,))
    since = now - REMOVAL_LAPSES_S
    found = []
    with db:  # one moment for all: a reader who saw a higher number never looks for a lower one again
        for environment in environments:
            place = app, environment.value, after, since, *which, max(0, limit)
            rows: list[Row] = db.execute(sql, place).fetchall()
            for number, octets, dead_since in rows:
                found.append(Listed(number, Removal(app, environment, DeviceToken(octets.hex()), dead_since)))
    found.sort(key=attrgetter("number"))
    return found[: max(0, limit)]


def told_until(db: apsw.Connection, app: str, environment: Environment) -> int:
    sql = "SELECT number FROM told WHERE app = ? AND environment = ?"
    return int(db.execute(sql, (app, environment.value)).get or 0)


def find_once(db: apsw.Connection, key: bytes, now: float) -> Once | None:
    """What is kept under this key at `now`, by the store's own clock."""
    sql = "SELECT key, request, answer FROM once WHERE key = ? AND kept_at > ?"
    found: Row | None = db.execute(sql, (key, now - ONCE_LAPSES_S)).fetchone()
    return None if found is None else Once(*found)


def find_apps(db: apsw.Connection) -> dict[str, bytes]:
    rows: list[Row] = db.execute("SELECT name, record FROM app ORDER BY name").fetchall()
    return dict(rows)


def api_key_rows(db: apsw.Connection) -> list[Row]:
    """As `sqlite_rows.api_key` wants them, oldest first."""
    rows: list[Row] = db.execute("SELECT * FROM api_key ORDER BY created_at, id").fetchall()
    return rows


def caller_records(db: apsw.Connection) -> list[bytes]:
    """As `sqlite_rows.caller_of` wants them."""
    return [record for (record,) in db.execute("SELECT record FROM caller")]


def depth_rows(db: apsw.Connection, place: int) -> tuple[list[Row], int | None]:
    """Of some jobs after the row `place`, and where to go on, if there may be more.

    For each lane its number, notifications that nobody has leased, batches that somebody has, when the first of the
    former is due.
    """
    found: list[Row] = db.execute(_DEPTHS, (place,)).fetchall()
    more = sum(row[5] for row in found) == _STEP_ROWS
    return [row[:4] for row in found], max(row[4] for row in found) if more else None


def lanes(db: apsw.Connection) -> list[Row]:
    """Number, app and environment."""
    rows: list[Row] = db.execute("SELECT number, app, environment FROM lane ORDER BY number").fetchall()
    return rows


def probe(db: apsw.Connection) -> None:
    """Raises apsw.Error where the file cannot be read."""
    db.execute("SELECT count(*) FROM lane").fetchall()
