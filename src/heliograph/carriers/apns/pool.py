"""Connections that share one signing key and environment, behind one backlog.

A notification waits in the backlog, never inside a connection: whichever connection has a free stream takes the next
ones. A `_Slice` is what a carried batch still has to send, as columns; a key of a request is an int that holds the
carried batch's number and the index in it. So nothing is made for each notification between the backlog and the wire.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import structlog
from msgspec import Struct
from msgspec.structs import replace

from heliograph.carriers.apns.connection import NEW_S, Connection
from heliograph.carriers.apns.credentials import TokenSource
from heliograph.model import MAX_BATCH, Answered, Batch, Headers, NotProcessed, Outcome, SigningKey
from heliograph.net import http2
from heliograph.ports import Report
from heliograph.protocols import apns
from heliograph.protocols.http2 import ClientConnection, Requests, Template

_log = structlog.get_logger("heliograph.apns")

_INDEX_BITS = 16
_SUFFIXES = [b"%04x" % place for place in range(1, MAX_BATCH + 1)]
"""The last four digits of the ids in a batch, by index."""
_TOP_UP = 32
"""With more than this many streams open, a connection that is full waits until it can take so many at once."""
_UNIQUE_ID = frozenset((b"apns-unique-id",))

Literals = tuple[tuple[bytes, bytes], ...]
"""Fields that may differ from one notification to the next."""


class Endpoint(Struct, frozen=True):
    """Where a pool connects to."""

    host: str
    port: int
    tls: ssl.SSLContext
    unique_ids: bool = False
    """Whether answers carry `apns-unique-id` that is worth keeping (Apple's sandbox)."""


class Route(Struct, frozen=True):
    """A way to Apple: connections are shared by whatever takes the same one."""

    endpoint: Endpoint
    key: SigningKey | None
    """None: the endpoint's TLS context has a client certificate, which speaks for itself."""


class PoolSettings(Struct, frozen=True):
    """How many connections, and how patient. Times in seconds."""

    connections: int = 4
    connect_s: float = 10.0
    """From the look-up of the name to the end of the TLS handshake."""
    backoff_s: float = 60.0
    """The longest pause between failed connects."""
    patience_s: float = 30.0
    """How long a notification waits for a stream before it is handed back as not processed."""


class _Carried:
    """A batch, or some of it, on its way."""

    __slots__ = ("left", "report")

    def __init__(self, left: int, report: Report) -> None:
        self.left = left
        self.report = report


class _Slice:
    """Notifications of one batch with the same template that wait for a stream, as columns."""

    __slots__ = ("bodies", "headers", "keys", "literals", "paths", "place", "prefixes", "since", "suffixes")

    def __init__(
        self,
        headers: Headers,
        literals: Sequence[Literals],
        prefix: bytes,
        keys: Sequence[int],
        paths: Sequence[bytes],
        bodies: Sequence[bytes],
        suffixes: Sequence[bytes],
        since: float,
    ) -> None:
        self.headers = headers
        """What they share; expiration and collapse id are in `literals`, one entry for all or one each."""
        self.literals = literals
        self.prefixes = (prefix, prefix) if headers.collapse_on_id else (prefix,)
        self.keys = keys
        self.paths = paths
        self.bodies = bodies
        self.suffixes = suffixes
        self.since = since
        self.place = 0
        """How many were sent already."""

    def requests(self, template: Template, count: int) -> Requests:
        """The next `count` of them."""
        first, last = self.place, self.place + count
        return Requests(
            template,
            self.keys[first:last],
            self.paths[first:last],
            self.bodies if len(self.bodies) == 1 else self.bodies[first:last],
            self.literals if len(self.literals) == 1 else self.literals[first:last],
            self.prefixes,
            self.suffixes[first:last],
        )


class Pool:
    """One backlog and the connections that empty it."""

    def __init__(
        self,
        route: Route,
        settings: PoolSettings,
        clock: Callable[[], float],
        on_room: Callable[[], None],
    ) -> None:
        self._endpoint = route.endpoint
        self._settings = settings
        self._clock = clock
        self._on_room = on_room
        assert route.key is not None
        self._tokens = TokenSource(route.key)
        self._loop = asyncio.get_running_loop()
        self._backlog: deque[_Slice] = deque()
        self.waiting = 0
        """Notifications in the backlog."""
        self._carried: dict[int, _Carried] = {}
        self._last_number = 0
        self._connections: list[Connection] = []
        self._connecting: asyncio.Task[None] | None = None
        self._failures = 0
        self._pump_due = False
        self._patience: asyncio.TimerHandle | None = None
        self._look_again: asyncio.TimerHandle | None = None
        self._closing = False
        self._templates: dict[Headers, Template] = {}
        self._templates_with: tuple[bytes, bytes] | None = None
        self.trouble: str | None = None
        """Why the last connection failed; None since one brought an answer."""

    # -- in ------------------------------------------------------------------------------------------------------

    def put(self, batch: Batch, indices: Sequence[int], report: Report) -> None:
        """Take these on; each index will be reported once."""
        if self._closing:
            report(indices, NotProcessed("the server is stopping"))
            return
        self._last_number += 1
        self._carried[self._last_number] = _Carried(len(indices), report)
        base = self._last_number << _INDEX_BITS
        now = self._loop.time()
        for headers, literals, chosen in _alike(batch, indices):
            self._backlog.append(_make_slice(batch, headers, literals, base, chosen, now))
        self.waiting += len(indices)
        self._pump_soon()

    def _pump_soon(self) -> None:
        if not self._pump_due:
            self._pump_due = True
            self._loop.call_soon(self.pump)

    # -- out -----------------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Give what waits to connections that can take it; open another one if none can."""
        self._pump_due = False
        if not self._backlog:
            return
        before = self.waiting
        for connection in self._connections:
            if not self._feed(connection):
                break
        if self.waiting < before:
            self._on_room()
        if self._backlog:
            self._grow()
            if self._patience is None:
                self._watch_backlog()

    def _feed(self, connection: Connection) -> bool:
        """Fill one connection's free streams. False where nothing waits any more."""
        while self._backlog:
            free = connection.capacity
            if free < self.waiting and free < _TOP_UP < connection.open_streams:
                return True  # answers are on their way and will free more: fewer, larger writes
            if not free:
                return True
            work = self._backlog[0]
            count = min(free, len(work.keys) - work.place)
            taken = connection.submit(work.requests(self._template(work.headers), count))
            work.place += taken
            self.waiting -= taken
            if work.place == len(work.keys):
                self._backlog.popleft()
            if taken < count:
                return True
        return False

    def _template(self, headers: Headers) -> Template:
        authorization = self._tokens.field(self._clock())
        if authorization is not self._templates_with or len(self._templates) > 256:
            self._templates.clear()
            self._templates_with = authorization
        found = self._templates.get(headers)
        if found is None:
            found = self._templates[headers] = Template(
                self._endpoint.host.encode(),
                apns.PATH_PREFIX,
                (authorization, *apns.constant_fields(headers)),
                (b"apns-id", b"apns-collapse-id") if headers.collapse_on_id else (b"apns-id",),
            )
        return found

    def _watch_backlog(self) -> None:
        """Hand back what waited too long, so that nothing waits here beyond its lease."""
        self._patience = None
        oldest = self._loop.time() - self._settings.patience_s
        while self._backlog and self._backlog[0].since <= oldest:
            work = self._backlog.popleft()
            keys = list(work.keys[work.place :])
            self.waiting -= len(keys)
            self.settle(keys, NotProcessed(self.trouble or "no free stream in time"))
            self._on_room()
        if self._backlog:
            delay = self._backlog[0].since - oldest
            self._patience = self._loop.call_later(max(delay, 0.1), self._watch_backlog)

    # -- back ----------------------------------------------------------------------------------------------------

    def settle(self, keys: list[int], outcome: Outcome) -> None:
        """Report these to the batches that they belong to, a group each."""
        if self._failures and isinstance(outcome, Answered):
            self._failures = 0
            self.trouble = None
        keys.sort()
        start, size = 0, len(keys)
        while start < size:
            number = keys[start] >> _INDEX_BITS
            base = number << _INDEX_BITS
            stop = size if keys[-1] >> _INDEX_BITS == number else bisect_left(keys, base + (1 << _INDEX_BITS), start)
            count = stop - start
            first, last = keys[start] - base, keys[stop - 1] - base
            indices: Sequence[int] = (
                range(first, last + 1) if last - first == count - 1 else [key - base for key in keys[start:stop]]
            )
            carried = self._carried[number]
            carried.left -= count
            if not carried.left:
                del self._carried[number]
            carried.report(indices, outcome)
            start = stop

    # -- connections ---------------------------------------------------------------------------------------------

    def _grow(self) -> None:
        """Open one more connection, if there may be more and none is on its way."""
        usable = [connection for connection in self._connections if connection.usable]
        if self._connecting is not None or len(usable) >= self._settings.connections or self._closing:
            return
        if any(connection.new for connection in usable):  # its one stream is no sign of load
            if self._look_again is None:
                self._look_again = self._loop.call_later(NEW_S, self._pump_again)
            return
        self._connecting = self._loop.create_task(self._connect())

    def _pump_again(self) -> None:
        self._look_again = None
        self.pump()

    async def _connect(self) -> None:
        endpoint = self._endpoint
        keep = _UNIQUE_ID if endpoint.unique_ids else frozenset[bytes]()
        try:
            if self._failures:
                # Full jitter; the first failure waits little, as a lone lost connection is no storm.
                longest = min(self._settings.backoff_s, 0.5 * 2**self._failures)
                await asyncio.sleep(random.uniform(0, longest))  # noqa: S311 - spreads load, guards nothing
            async with asyncio.timeout(self._settings.connect_s):
                link = await http2.connect(
                    self._new_connection,
                    host=endpoint.host,
                    port=endpoint.port,
                    tls=endpoint.tls,
                    new_core=lambda now: ClientConnection(now, keep=keep),
                )
        except (OSError, TimeoutError) as error:
            self._failed(f"cannot connect to {endpoint.host}:{endpoint.port}: {str(error) or type(error).__name__}")
        else:
            if not link.closed.done():
                self._connections.append(cast("Connection", link.session))
        self._connecting = None
        self._pump_soon()

    def _failed(self, why: str) -> None:
        self._failures += 1
        self.trouble = why
        _log.warning("apns_connect_failed", why=why, failures=self._failures, waiting=self.waiting)

    def _new_connection(self, link: http2.Link[ClientConnection]) -> Connection:
        return Connection(link, self, self._loop.time)

    def lost(self, connection: Connection) -> None:
        """A connection's socket is gone; what was open on it has been settled."""
        if not self._closing:
            _log.info("apns_connection_ended", host=self._endpoint.host, why=connection.goodbye)
            if not connection.answered:  # to come back at once would be a storm
                self._failed(f"{self._endpoint.host} ended a new connection: {connection.goodbye or 'without a word'}")
        if connection in self._connections:
            self._connections.remove(connection)
        self._pump_soon()

    async def aclose(self) -> None:
        """Take nothing more, hand back what waits, let open streams be answered, close."""
        self._closing = True
        for timer in (self._patience, self._look_again):
            if timer is not None:
                timer.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
        for work in list(self._backlog):
            self.settle(list(work.keys[work.place :]), NotProcessed("the server is stopping"))
        self._backlog.clear()
        self.waiting = 0
        connections = list(self._connections)
        for connection in connections:
            connection.finish()
        for connection in connections:
            await connection.closed  # ends: each stream has its deadline


def _alike(batch: Batch, indices: Sequence[int]) -> Iterator[tuple[Headers, Sequence[Literals], Sequence[int]]]:
    """Parts that one template serves: what they share, what each sends beside it, and which they are.

    Notifications that differ in expiration and collapse id only stay together.
    """
    literals = [tuple(apns.varying_fields(headers)) for headers in batch.headers]
    if batch.headers_of is None:
        yield batch.headers[0], literals, indices
        return
    shared = [replace(headers, expiration=None, collapse_id=None) for headers in batch.headers]
    for headers in dict.fromkeys(shared):
        kinds = {kind for kind, each in enumerate(shared) if each == headers}
        chosen = [index for index in indices if batch.headers_of[index] in kinds]
        if chosen:
            yield headers, [literals[batch.headers_of[index]] for index in chosen], chosen


def _make_slice(
    batch: Batch, headers: Headers, literals: Sequence[Literals], base: int, indices: Sequence[int], now: float
) -> _Slice:
    """`base` is what the index is added to for a request's key."""
    prefix = batch.id.encode()
    if isinstance(indices, range) and indices.step == 1:
        span = slice(indices.start, indices.stop)
        keys: Sequence[int] = range(base + indices.start, base + indices.stop)
        payloads = batch.payloads if len(batch.payloads) == 1 else batch.payloads[span]
        return _Slice(headers, literals, prefix, keys, batch.tokens[span], payloads, _SUFFIXES[span], now)
    return _Slice(
        headers,
        literals,
        prefix,
        [base + index for index in indices],
        [batch.tokens[index] for index in indices],
        batch.payloads if len(batch.payloads) == 1 else [batch.payloads[index] for index in indices],
        [_SUFFIXES[index] for index in indices],
        now,
    )
