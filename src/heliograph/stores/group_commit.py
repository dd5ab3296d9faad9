"""One thread that writes to SQLite, and group commit: what came in during one commit is the next one.

Callers hand over functions with an argument. All that wait run in one transaction, which is committed once (with
synchronous=FULL the data is then on disk), and are answered together. Nothing waits for a group to grow.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import apsw

from heliograph import crash
from heliograph.errors import StoreError
from heliograph.telemetry import COMMITS_S, Histogram

A = TypeVar("A")
T = TypeVar("T")

Work = Callable[[apsw.Connection, Sequence[A]], Sequence[T]]
"""Something to do on the writer's connection for several calls at once: their arguments in, their answers out."""

_CHECKPOINT_PAGES = 512
"""In the log before it is folded into the file, 8 MB: more saves next to nothing and stalls the writer for longer."""


class _Operation:
    """What one caller wants of the writer, and where the answer goes."""

    __slots__ = ("answer", "argument", "error", "future", "unwanted", "work")

    def __init__(
        self, work: Work[A, T], argument: A, future: asyncio.Future[T], unwanted: Callable[[T], None] | None
    ) -> None:
        self.work: Work[Any, Any] = work
        self.argument = argument
        self.future = future
        self.unwanted: Callable[[Any], None] | None = unwanted
        self.answer: Any = None
        self.error: Exception | None = None


class Writer:
    """The connection that writes, its thread, and group commit.

    An operation that fails fails alone: the group's two halves are tried again, each in a transaction of its own, and
    so on down to the one at fault. When the commit itself fails, nothing of the group has happened.
    """

    def __init__(
        self,
        db: apsw.Connection,
        path: Path,
        waiting: int,
        *,
        wake: Callable[[], None],
        forget: Callable[[], None],
    ) -> None:
        """`wake` is called after each group, and `forget` after a transaction that was rolled back.

        What its work had noted in memory does not hold then.
        """
        self.commits = 0
        self.commit_s = Histogram(COMMITS_S)
        """How long transactions took that changed something, the way to the disk included."""
        self.waiting = waiting
        self.counted = waiting
        """`waiting` as the transaction under way will leave it; operations count here."""
        self.closed = False
        self._db = db
        self._path = path
        self._wake = wake
        self._forget = forget
        self._gate = threading.Lock()
        self._asked: dict[asyncio.AbstractEventLoop, list[_Operation]] = {}
        """What was asked for in this turn of a loop: it comes as one, as each hand-over has its price."""
        self._operations: queue.SimpleQueue[list[_Operation] | None] = queue.SimpleQueue()
        self._pages = 0
        """In the log."""
        db.set_wal_hook(self._note_pages)
        self._thread = threading.Thread(target=self._work, name="heliograph-sqlite-writer", daemon=True)
        self._thread.start()

    def run(self, work: Work[A, T], argument: A, *, unwanted: Callable[[T], None] | None = None) -> asyncio.Future[T]:
        """Have `work` done for `argument` with the next group; the future ends when that is on disk.

        What a group wants of the same `work` is one call of it. A call may be repeated, each time on a clean slate.
        Where the future was cancelled meanwhile, `unwanted` is called with the answer.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        with self._gate:
            if self.closed:
                raise closed_error(self._path)
            asked = self._asked.get(loop)
            if asked is None:
                asked = self._asked[loop] = []
                loop.call_soon(self._hand_over, loop)
            asked.append(_Operation(work, argument, future, unwanted))
        return future

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._gate:  # so that nothing comes in behind the None that ends the thread
            asked = self._asked.pop(loop, None)
            if asked is not None:
                self._operations.put(asked)

    def close(self) -> None:
        """Let the thread end after what it was given so far. May be called again."""
        with self._gate:
            if not self.closed:
                self.closed = True
                for asked in self._asked.values():
                    self._operations.put(asked)
                self._asked.clear()
                self._operations.put(None)

    def join(self) -> None:
        self._thread.join()

    def _work(self) -> None:
        ending = False
        while not ending:
            taken = [self._operations.get()]
            taken += [self._operations.get() for _ in range(self._operations.qsize())]
            group = [operation for asked in taken if asked is not None for operation in asked]
            ending = None in taken
            self._commit(group)
            self._wake()
            _answer(group)
            self._fold_log()
        with contextlib.suppress(apsw.Error):  # a reader from outside may be in the way: the log is as good as the file
            self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)

    def _commit(self, group: Sequence[_Operation]) -> None:
        if not group:
            return
        self.counted = self.waiting
        changes = self._db.total_changes()
        began = time.monotonic()
        try:
            self._db.execute("BEGIN IMMEDIATE")
            fault = self._try(group)
            if fault is None:
                self._end_transaction(began, changed=self._db.total_changes() != changes)
            else:
                self._roll_back()
        except apsw.Error as error:
            self._roll_back()
            for operation in group:
                operation.error = store_error(self._path, error)
            return
        if fault is None:
            self.waiting = self.counted
        elif len(group) == 1:
            group[0].error = store_error(self._path, fault) if isinstance(fault, apsw.Error) else fault
        else:
            half = len(group) // 2
            self._commit(group[:half])
            self._commit(group[half:])

    def _try(self, group: Sequence[_Operation]) -> Exception | None:
        """Do all of the group; what went wrong, if anything did."""
        works: dict[Work[Any, Any], list[_Operation]] = {}
        for operation in group:
            works.setdefault(operation.work, []).append(operation)
        try:
            for work, operations in works.items():
                answers = work(self._db, [operation.argument for operation in operations])
                for operation, answer in zip(operations, answers, strict=True):
                    operation.answer = answer
        except Exception as error:  # noqa: BLE001 - it is the caller's, who gets it
            return error
        return None

    def _end_transaction(self, began: float, *, changed: bool) -> None:
        if changed:
            crash.point("before-commit")
        self._db.execute("COMMIT")
        if changed:
            self.commits += 1
            self.commit_s.observe(time.monotonic() - began)
            crash.point("after-commit")

    def _note_pages(self, db: apsw.Connection, schema: str, pages: int) -> int:  # noqa: ARG002 - SQLite's signature
        self._pages = pages
        return apsw.SQLITE_OK

    def _fold_log(self) -> None:
        """Keep the log short. Nobody waits for it but who comes meanwhile: some milliseconds.

        SQLite's own way is to do this within a commit, before that is answered. A thread of its own did not do better.
        """
        if self._pages < _CHECKPOINT_PAGES:
            return
        self._pages = 0
        crash.point("checkpoint")
        with contextlib.suppress(apsw.Error):  # no room, or a reader from outside: the log is as good as the file
            self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)

    def _roll_back(self) -> None:
        self._forget()
        if self._db.in_transaction:  # some errors have rolled back already
            with contextlib.suppress(apsw.Error):  # then BEGIN will say so to everyone
                self._db.execute("ROLLBACK")


def _answer(group: Sequence[_Operation]) -> None:
    """Wake each event loop once for all that it waits for."""
    loops: dict[asyncio.AbstractEventLoop, list[_Operation]] = {}
    for operation in group:
        loops.setdefault(operation.future.get_loop(), []).append(operation)
    for loop, operations in loops.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_resolve, operations)


def _resolve(operations: Sequence[_Operation]) -> None:
    for operation in operations:
        if operation.future.done():  # its caller was cancelled
            if operation.unwanted is not None and operation.error is None:
                operation.unwanted(operation.answer)
        elif operation.error is None:
            operation.future.set_result(operation.answer)
        else:
            operation.future.set_exception(operation.error)


def closed_error(path: Path) -> StoreError:
    """The store was closed."""
    return StoreError(f"{path} is closed.")


def store_error(path: Path, error: Exception) -> StoreError:
    """What SQLite says, and what to do about it."""
    match error:
        case apsw.FullError():
            advice = "Make room on the disk; nothing needs a restart."
        case apsw.CorruptError() | apsw.NotADBError():
            advice = "The file is damaged or no SQLite file. Stop, keep a copy, restore the last good one."
        case apsw.BusyError():
            advice = "Another program is writing to the file. Stop that."
        case _:
            advice = "See whether the disk is sound and the file may be written."
    return StoreError(f"{path}: {error}. {advice}")
