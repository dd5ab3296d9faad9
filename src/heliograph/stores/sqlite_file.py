"""The file of the SQLite store: its lock, its connections, its schema and the migrations to it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import apsw

from heliograph.errors import StoreBusy, StoreError

Row = tuple[Any, ...]

# A full batch takes 10 such pages and not 37 of SQLite's own 4096: 40 % less CPU to store it, 20 % more for a lone one.
_PAGE_OCTETS = 16384

_CLOCK_TOLERANCE_S = 60.0
"""By so much clocks are set back in passing."""


class Migration(NamedTuple):
    """One step of the schema, as the file that holds it."""

    number: int
    name: str
    sql: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


def migrations() -> Iterator[Migration]:
    files = resources.files("heliograph.stores") / "schema" / "sqlite"
    for file in sorted(files.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".sql"):
            yield Migration(int(file.name[:4]), file.name, file.read_text("utf-8"))


def migrate(db: apsw.Connection, path: Path, known: Sequence[Migration]) -> None:
    """Bring the schema up to date, wholly or not at all. The caller's transaction is around it."""
    db.execute(
        "CREATE TABLE IF NOT EXISTS migration "
        "(number INTEGER PRIMARY KEY, name TEXT NOT NULL, sha256 TEXT NOT NULL, applied_at REAL NOT NULL) STRICT"
    )
    recorded: list[Row] = db.execute("SELECT number, sha256 FROM migration").fetchall()
    applied: dict[int, str] = dict(recorded)
    newest = max(applied, default=0)
    if newest > known[-1].number:
        raise StoreError(
            f"{path} has schema {newest}, made by a newer heliograph; this one knows schemas up to {known[-1].number}. "
            "Start the newer version."
        )
    for migration in known:
        if migration.number not in applied:
            db.execute(migration.sql)
            db.execute(
                "INSERT INTO migration VALUES (?, ?, ?, ?)",
                (migration.number, migration.name, migration.sha256, time.time()),
            )
        elif applied[migration.number] != migration.sha256:
            raise StoreError(
                f"{path} was made with another {migration.name} than this version of heliograph has. "
                "Start the version that made it."
            )


def prepare(db: apsw.Connection, path: Path, now: float) -> int:
    """Make the file ready for work; how many notifications wait in it."""
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    if tables and "migration" not in tables:
        raise StoreError(f"{path} is another program's SQLite file. Give the store a path of its own.")
    if db.pragma("journal_mode", "wal") != "wal":
        raise StoreError(f"{path} is on a file system without shared memory. Put the store on a local disk.")
    with db:
        migrate(db, path, tuple(migrations()))
        # What was leased, and what was never tried, was due, whatever the clock said then.
        db.execute("UPDATE job SET due_at = ?1 WHERE due_at > ?1 AND (leased_until IS NOT NULL OR attempt = 0)", (now,))
        db.execute("UPDATE job SET leased_until = NULL WHERE leased_until IS NOT NULL")
        # What was made in the future was put off by a clock that was fast, and set right meanwhile.
        db.execute(
            "UPDATE job SET due_at = ?1 WHERE due_at > ?1 AND row IN (SELECT row FROM batch WHERE id > ?2)",
            (now, round((now + _CLOCK_TOLERANCE_S) * 1000).to_bytes(6, "big")),  # ids begin with their time
        )
    return int(db.execute("SELECT total(size) FROM job").get)


def connect(path: Path) -> apsw.Connection:
    db = apsw.Connection(str(path))
    db.set_busy_timeout(5000)  # for a shell that looks into the file; of ours there is one writer only
    db.pragma("page_size", _PAGE_OCTETS)
    db.pragma("synchronous", "full")
    db.pragma("cache_size", -16384)
    db.pragma("wal_autocheckpoint", 0)  # the writer sees to that
    db.pragma("journal_size_limit", 64 * 1024 * 1024)
    return db


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `<path>.lock`, with our pid in it. The kernel releases it however this process ends."""
    file = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 32, 0).decode("ascii", "replace").strip()
            raise StoreBusy(
                f"{path} is in use by process {holder or 'unknown'}. Stop that first, or use a file of your own."
            ) from None
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(file)


def make_directory(directory: Path) -> None:
    """Make what is missing of the path, for us alone, so that a power cut does not undo it."""
    if directory.exists():
        return
    make_directory(directory.parent)
    directory.mkdir(mode=0o700, exist_ok=True)
    parent = os.open(directory.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
