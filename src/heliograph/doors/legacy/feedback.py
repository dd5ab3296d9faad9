"""The feedback service of Apple's binary interface: an app's dead device tokens, then the end.

Who connects gets what came since the last reading of this app and environment. That counts as told when the client ends
its side after us, with all of it in its machine; where the connection breaks before, or nothing is heard of the client,
the same is told again. A client that ends its side first is told as well, and again the next time: nobody knows whether
it read on. Readers of one app and environment take turns.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import structlog

from heliograph.callers import Callers
from heliograph.config import LegacySettings
from heliograph.doors.legacy.admittance import Admittance, Guest, NotAdmitted
from heliograph.doors.legacy.common import advise, cannot_listen, with_hint
from heliograph.errors import StoreError
from heliograph.model import App, Lane, Listed
from heliograph.net import streams
from heliograph.net.streams import Stream, StreamListener, listen
from heliograph.ports import Store
from heliograph.protocols.binary import feedback_tuples

TURN_S = 30.0
"""How long a client waits for another one of the same app and environment to be done."""
UNENDED_S = 900.0
"""How long a client may work on what its machine has got before it ends; others wait meanwhile."""
STOP_S = 1.0
"""How long clients have to end when the server stops."""

_PAGE = 5000
"""Removals read at once."""
_RECORD_OCTETS = 8192
"""PHP reads so much at once, and its scripts take a tuple that is cut there for the end."""
_LINE_S = 60.0
"""Between two log lines about clients that did not get in."""

_log = structlog.get_logger("heliograph.feedback")


class Turns:
    """Of those that read the same, whatever listener they came by; one for all of a process."""

    def __init__(self) -> None:
        self._locks: dict[Lane, asyncio.Lock] = {}

    @asynccontextmanager
    async def take(self, lane: Lane) -> AsyncIterator[None]:
        """One's own turn, for as long as the block runs. Raises TimeoutError."""
        lock = self._locks.setdefault(lane, asyncio.Lock())
        async with asyncio.timeout(TURN_S):
            await lock.acquire()
        try:
            yield
        finally:
            lock.release()


class Feedback:
    """One listener. `start`, then `aclose` while the store is open."""

    def __init__(
        self,
        name: str,
        settings: LegacySettings,
        *,
        store: Store,
        apps: Mapping[str, App],
        callers: Callers,
        identity: tuple[bytes, bytes],
        turns: Turns,
    ) -> None:
        """`name`: as in `[legacy.NAME]`. `apps` may change. `identity`: certificate chain and key as PEM."""
        self.name = name
        self.settings = settings
        self.store = store
        self.turns = turns
        self.admittance = Admittance(name, settings, callers, apps, identity)
        self._start = os.urandom(3).hex()
        self._opened = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: StreamListener | None = None
        self._loop = asyncio.get_running_loop()
        self._refused = 0
        self._line_at = 0.0

    async def start(self) -> None:
        """Take connections. Raises ConfigError."""
        self.admittance.context()
        host, port = self.settings.host, self.settings.feedback_port
        try:
            self._listener = await listen(
                self._new_reader,
                context=self.admittance.context,
                host=host,
                port=port,
                max_connections=self.settings.max_connections,
                refused=lambda address, why: self.note_refused(address, why, advise(why, self.name, self.settings)),
            )
        except OSError as error:
            raise cannot_listen(self.name, "feedback_port", host, port, error) from None

    @property
    def port(self) -> int:
        """Where it listens."""
        return 0 if self._listener is None else self._listener.port

    async def aclose(self) -> None:
        """Listen no more; who reads just now has `STOP_S` to end, and is told again otherwise."""
        if self._listener is None:
            return
        self._listener.stop()
        if self._tasks:
            _, late = await asyncio.wait(set(self._tasks), timeout=STOP_S)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
        await self._listener.aclose(0.0)

    # -- for its readers -----------------------------------------------------------------------------------------

    def run(self, reader: Reader, guest: Guest) -> None:
        """Have a reader told, also where it is gone before that is on record."""
        task = self._loop.create_task(reader.work(guest))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def note_refused(self, address: str, why: str, hint: str | None) -> None:
        """Log it, or count it where one was logged just now."""
        self._refused += 1
        now = self._loop.time()
        if now >= self._line_at:
            count, self._refused, self._line_at = self._refused, 0, now + _LINE_S
            told = {"listener": self.name, "address": address, "why": why, "count": count}
            _log.warning("feedback_refused", **told, **with_hint(hint))

    def _new_reader(self, stream: Stream) -> Reader:
        self._opened += 1
        return Reader(self, stream, f"{self.name}-{self._start}-{self._opened}")


class Reader:
    """A client's connection. It is a `streams.User`. One that writes takes us for the gateway: its list is kept."""

    def __init__(self, feedback: Feedback, stream: Stream, name: str) -> None:
        self.name = name
        self._feedback = feedback
        self._stream = stream
        self._over = asyncio.Event()
        """The client ended its side, or is gone."""
        self._finished = False
        """We ended ours."""
        self._wrote = False
        self._read = False
        """The client ended its side in order, after us, with all of it."""
        self._error: Exception | None = None

    def on_open(self) -> None:
        try:
            guest = self._feedback.admittance.admit(self._stream)
        except NotAdmitted as error:
            self._feedback.note_refused(self._stream.address, str(error), error.hint)
            self._stream.close()
            return
        self._feedback.run(self, guest)

    def on_data(self, data: bytes) -> None:  # noqa: ARG002 - whatever it is
        self._wrote = True
        self._over.set()

    def on_end(self) -> None:
        if self._finished:
            self._read = not self._stream.unconfirmed
            self._over.set()

    def on_close(self, error: Exception | None) -> None:
        self._error = error
        self._over.set()

    async def work(self, guest: Guest) -> None:
        lane = guest.app, guest.environment
        who = {"connection": self.name, "app": guest.app, "environment": guest.environment.value}
        try:
            async with self._feedback.turns.take(lane):
                count, last = await self._tell(lane)
                await self._wait()
                if self._wrote:
                    _log.warning("feedback_not_read", **who, count=count, why=self._why())
                elif not count:
                    _log.debug("feedback_empty", **who)
                elif self._read:
                    await self._feedback.store.tell_until(*lane, last)
                    _log.info("feedback_told", **who, count=count)
                else:
                    _log.warning("feedback_not_read", **who, count=count, why=self._why())
        except TimeoutError:
            _log.warning("feedback_busy", **who, why=f"another client of the app has been reading for {TURN_S:g} s")
        except ConnectionError:
            _log.warning("feedback_not_read", **who, why=self._why())
        except StoreError as error:
            _log.error("cannot_tell", **who, why=str(error))
        finally:
            self._stream.close()

    async def _tell(self, lane: Lane) -> tuple[int, int]:
        """How many, and the number of the last. Raises ConnectionError, StoreError."""
        store = self._feedback.store
        last = await store.told_until(*lane)
        count = 0
        while not self._wrote and (page := await store.find_removals(*lane, last, _PAGE)):
            for record in _records(page):
                self._stream.write(record)
                await self._stream.drained()
            count += len(page)
            last = page[-1].number
        self._finished = True
        self._stream.end()
        return count, last

    async def _wait(self) -> None:
        """Until the client ends, too, or is given up."""
        loop = asyncio.get_running_loop()
        until = loop.time() + UNENDED_S
        before = self._stream.unconfirmed
        while not self._over.is_set() and loop.time() < until:
            try:
                async with asyncio.timeout(min(streams.UNREAD_S, UNENDED_S)):
                    await self._over.wait()
            except TimeoutError:
                left = self._stream.unconfirmed
                if left and left >= before:
                    return
                before = left

    def _why(self) -> str:
        if self._wrote:
            return f"it sends: notifications go to the gateway, port {self._feedback.settings.port}"
        if self._error is not None:
            return str(self._error)
        if self._over.is_set():
            return "the client closed before it had all of it"
        return "the client did not close the connection"


def _records(page: Sequence[Listed]) -> list[bytes]:
    """The tuples of removals, none of them cut between two records."""
    longest = max(len(each.removal.token) for each in page) // 2 + 6
    step = max(1, _RECORD_OCTETS // longest)
    return [
        feedback_tuples(
            [each.removal.since for each in page[at : at + step]],
            [each.removal.token.encode() for each in page[at : at + step]],
        )
        for at in range(0, len(page), step)
    ]
