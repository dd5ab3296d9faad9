"""Connections that share one route, behind one backlog.

A notification waits in the backlog, never inside a connection: whichever connection has a free stream takes the next
ones. A `Slice` is what a carried batch still has to send, as columns; a key of a request is an int that holds the
carried batch's number and the index in it. So nothing is made for each notification between the backlog and the wire.

One provider token is in use at a time. A connection that has carried one for less than Apple's twenty minutes is not
given the next, but replaced. Where Apple calls the token in use expired though the half hour gives no other, this
machine's clock is wrong: the pool then rests, and asks again now and then.
"""

from __future__ import annotations

import asyncio
import math
import random
import socket
import ssl
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import cast

import structlog
from msgspec import Struct
from msgspec.structs import replace

from heliograph import reasons
from heliograph.carriers.apns.backlog import Backlog
from heliograph.carriers.apns.connection import NEW_S, Connection, speaks_against_us
from heliograph.carriers.apns.credentials import LEAST_S, Authorization, TokenSource
from heliograph.carriers.apns.route import Endpoint, Route
from heliograph.carriers.apns.slices import INDEX_BITS, Slice, slices
from heliograph.errors import ConfigError
from heliograph.model import Answered, Batch, Headers, Lane, LaneView, NotProcessed, Outcome
from heliograph.net import http2
from heliograph.net.dial import Address, LookUps, dial
from heliograph.net.proxy import Proxy, parse_proxy
from heliograph.ports import Report
from heliograph.protocols import apns
from heliograph.protocols.http2 import ClientConnection, Template
from heliograph.protocols.http2.client import CLIENT_LIMITS
from heliograph.reasons import FollowUp, Reason
from heliograph.telemetry import LaneMeter, Telemetry

_log = structlog.get_logger("heliograph.apns")

_TOP_UP = 32
"""With more than this many streams open, a connection that is full waits until it can take so many at once."""
_UNIQUE_ID = frozenset((b"apns-unique-id",))
LIMITS = replace(CLIENT_LIMITS, ping_after_s=15.0, ping_wait_s=4.5)
"""Of a connection: a server that is gone is noticed within 20 s, the grain of timers included."""
_ADDRESSES = 3
"""Of a host, that one connect tries."""
_NAME_BACKOFF_S = 5.0
"""The longest pause after a failed look-up: it asks nobody at Apple."""
_REST_S = 20.0
"""How long a pool rests whose provider token Apple calls expired; less than anybody's patience."""
_ILL_S = 10.0
"""So long after a good answer a 5xx is Apple's trouble with one request, and not with all: single ones are common."""
_ILL_ADVICE = "it is Apple's own trouble (its System Status page may tell more): what waits is tried again by itself"
_ALARM_S = 60.0
"""The same trouble is not logged more often."""


_DRAIN_S = 15.0
"""How long open streams may take to be answered when the server stops, which promises to be gone
after 30 s, and may have let callers finish for 10."""


class PoolSettings(Struct, frozen=True):
    """How many connections, and how patient. Times in seconds."""

    connections: int = 4
    look_up_s: float = 5.0
    """For the name."""
    connect_s: float = 10.0
    """From the look-up of the name to the server's SETTINGS."""
    backoff_s: float = 20.0
    """The longest pause between failed connects."""
    tls_backoff_s: float = 60.0
    """The same where TLS fails, which waiting seldom cures."""
    patience_s: float = 30.0
    """How long a notification waits for a stream before it is handed back as not processed."""
    spare_idle_s: float = 300.0
    """How long a connection may have nothing to do, where there is another one."""
    idle_s: float = 3600.0
    """The same for the last one, and for the pool itself."""


class _Carried:
    """A batch, or some of it, on its way."""

    __slots__ = ("lane", "left", "meter", "report", "sent")

    def __init__(self, left: int, report: Report, lane: Lane, meter: LaneMeter) -> None:
        self.left = left
        self.report = report
        self.lane = lane
        self.meter = meter
        self.sent: list[tuple[float, int]] = []
        """When how many were sent that are not answered, oldest first."""

    def came_back(self, count: int, answered_at: float | None) -> None:
        """So many that were sent are over. Those sent first are taken to be answered first: it keeps the sum right."""
        sent = self.sent
        while count:
            at, number = sent[0]
            if number > count:
                sent[0] = at, number - count
                number = count
            else:
                del sent[0]
            if answered_at is not None:
                self.meter.answer_s.observe(answered_at - at, number)
            count -= number


class Pool:
    """One backlog and the connections that empty it."""

    def __init__(
        self,
        route: Route,
        settings: PoolSettings,
        clock: Callable[[], float],
        look_ups: LookUps,
        on_room: Callable[[], None],
        telemetry: Telemetry,
    ) -> None:
        """`on_room` is called when less waits, or when `trouble` comes or goes."""
        self.route = route
        self._endpoint = route.endpoint
        self._key = route.key
        self._settings = settings
        self._clock = clock
        self._look_ups = look_ups
        self._on_room = on_room
        self._telemetry = telemetry
        self._tokens = None if route.key is None else TokenSource(route.key)
        self._loop = asyncio.get_running_loop()
        self._backlog = Backlog()
        self._carried: dict[int, _Carried] = {}
        self._last_number = 0
        self._apps: set[str] = set()
        """Who ever used it."""
        self._used_at = self._loop.time()
        self._connections: list[Connection] = []
        self._connecting: asyncio.Task[None] | None = None
        self._failures = 0
        """Connects that failed since one led to a good answer."""
        self._longest_pause = 0.0
        self._pump_due = False
        self._patience: asyncio.TimerHandle | None = None
        self._look_again: asyncio.TimerHandle | None = None
        self._closing: str | None = None
        """Why nothing more is taken."""
        self._templates: dict[Headers, Template] = {}
        self._authorization: Authorization | None = None
        """What those templates carry; None with a client certificate."""
        self._expired: Authorization | None = None
        """What Apple called expired last."""
        self._rests_until = 0.0
        """Until then nothing is sent with the provider token that is `_expired`."""
        self._refused_until = 0.0
        """Until then nothing is sent, as Apple refuses the credentials."""
        self._alarms: dict[str, float] = {}
        """When each was logged last."""
        self.trouble: str | None = None
        """Why nothing gets through; None since a good answer came."""
        self._advice = ""
        """What to do about it."""
        self._own = False
        """It is about the credentials, and says nothing of other pools."""
        self._trouble_since = self._trouble_seen = 0.0
        self._answered_at = -math.inf
        """When an answer came that speaks neither against us nor of trouble at Apple's."""
        self._ill: str | None = None
        """Apple's reason for the last 5xx."""
        self._ill_since = self._ill_seen = -math.inf

    # -- in ------------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Notifications in the backlog."""
        return self._backlog.waiting

    @property
    def lanes(self) -> dict[Lane, int]:
        """Those of each lane that has any."""
        return self._backlog.lanes

    def put(self, batch: Batch, indices: Sequence[int], report: Report) -> None:
        """Take these on; each index will be reported once."""
        if self._closing is not None:
            report(indices, NotProcessed(self._closing))
            return
        self._last_number += 1
        lane = batch.app, batch.environment
        self._carried[self._last_number] = _Carried(len(indices), report, lane, self._telemetry.lane(*lane))
        self._apps.add(batch.app)
        self._used_at = now = self._loop.time()
        for work in slices(batch, indices, self._last_number << INDEX_BITS, now):
            if not (work.alone and self._backlog.join(work)):
                self._backlog.put(work)
        self._pump_soon()

    def _pump_soon(self) -> None:
        if not self._pump_due:
            self._pump_due = True
            self._loop.call_soon(self.pump)

    # -- out -----------------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Give what waits to connections that can take it; open another one if none can."""
        self._pump_due = False
        backlog = self._backlog
        before = backlog.waiting
        if not before:
            return
        self._renew()
        if self._resting:
            self._pump_later(1.0)  # the clock may be put right meanwhile
        else:
            for connection in self._connections:
                if not self._feed(connection):
                    break
            if backlog.waiting < before:
                self._on_room()
            if backlog.waiting:
                self._grow()
        if backlog.waiting and self._patience is None:
            self._watch_backlog()

    def _feed(self, connection: Connection) -> bool:
        """Fill one connection's free streams. False where nothing waits any more."""
        if connection.authorization is not self._authorization and not self._authorize(connection):
            return True
        backlog = self._backlog
        while backlog.waiting:
            free = connection.capacity
            if free < backlog.waiting and free < _TOP_UP < connection.open_streams:
                return True  # answers are on their way and will free more: fewer, larger writes
            if not free:
                return True
            work, count = backlog.offer(free)
            taken = connection.submit(work.requests(self._template(work.headers), count))
            if taken and work.alone:
                for key in work.keys[work.place : work.place + taken]:
                    self._carried[key >> INDEX_BITS].sent.append((connection.used_at, 1))
            elif taken:
                carried = self._carried[work.keys[work.place] >> INDEX_BITS]
                carried.sent.append((connection.used_at, taken))
            backlog.take(taken)
            if taken < count:
                return True
        return False

    def _template(self, headers: Headers) -> Template:
        found = self._templates.get(headers)
        if found is None:
            if len(self._templates) > 256:
                self._templates.clear()
            fields = apns.constant_fields(headers)
            found = self._templates[headers] = Template(
                self._endpoint.host.encode(),
                apns.PATH_PREFIX,
                (*fields,) if self._authorization is None else (self._authorization, *fields),
                (b"apns-id", b"apns-collapse-id") if headers.collapse_on_id else (b"apns-id",),
            )
        return found

    def _watch_backlog(self) -> None:
        """Hand back what waited too long, so that nothing waits here beyond its lease; one slice in a turn."""
        self._patience = None
        oldest, now = self._backlog.oldest, self._loop.time()
        if oldest is not None and oldest + self._settings.patience_s <= now:
            self._hand_back(self._backlog.pop_oldest(), self.trouble or "no free stream in time")
            oldest = self._backlog.oldest
        if oldest is not None:
            delay = max(oldest + self._settings.patience_s - now, 0.0)
            self._patience = self._loop.call_later(delay, self._watch_backlog)

    def _hand_back(self, work: Slice, why: str) -> None:
        self._settle(list(work.keys[work.place :]), NotProcessed(why), sent=False)
        self._on_room()

    def withdraw(self, wanted: Mapping[bytes, Collection[int]]) -> None:
        """Hand back those of these that still wait; see `Backlog.withdraw`."""
        keys = self._backlog.withdraw(wanted)
        if keys:
            self._settle(keys, NotProcessed("it was taken back before it was sent"), sent=False)
            self._on_room()

    # -- provider tokens -----------------------------------------------------------------------------------------

    def _renew(self) -> None:
        """Use the provider token of this half hour."""
        if self._tokens is not None:
            authorization = self._tokens.field(self._clock())
            if authorization is not self._authorization:
                self._authorization = authorization
                self._templates.clear()

    @property
    def _resting(self) -> bool:
        now = self._loop.time()
        return now < self._refused_until or (now < self._rests_until and self._authorization == self._expired)

    def _authorize(self, connection: Connection) -> bool:
        """Have a connection carry what is now in use; False where that would be too soon after what it carries."""
        now = self._loop.time()
        if connection.authorization not in (None, self._authorization) and now < connection.authorized_at + LEAST_S:
            connection.finish("provider token")
            return False
        connection.authorization = self._authorization
        connection.authorized_at = now
        return True

    def _expire(self, connection: Connection) -> None:
        """Apple calls the provider token of this connection expired. As many may draw this at once, once is enough."""
        carried = connection.authorization
        self._renew()
        if carried == self._expired and not connection.usable:
            return
        self._expired = carried
        for each in self._connections:
            if each.authorization == carried:  # Apple takes nothing more on them, whatever they carry
                each.finish("provider token")
        if self._authorization != carried:
            _log.info("provider_token_renewed", credentials=self._credentials)
            self._pump_soon()
            return
        self._rests_until = self._loop.time() + _REST_S
        self._set_trouble(
            "Apple calls the provider token expired, though it is the newest: this machine's clock is wrong",
            "set this machine's clock",
        )
        self._alarm(
            "clock_wrong",
            reasons.EXPIRED_PROVIDER_TOKEN,
            "Apple calls a provider token expired that was made for this half hour: set this machine's clock "
            "(timedatectl, chronyc or ntpdate say how far it is off)",
            machine_time=_iso(self._clock()),
            token_issued_at=None if self._tokens is None else _iso(self._tokens.issued_at),
        )

    # -- back ----------------------------------------------------------------------------------------------------

    def settle(self, keys: list[int], outcome: Outcome) -> None:
        """Report these, which were sent, to the batches that they belong to, a group each."""
        self._settle(keys, outcome, sent=True)

    def _settle(self, keys: list[int], outcome: Outcome, *, sent: bool) -> None:
        answered_at = None
        if isinstance(outcome, Answered):
            answered_at = self._loop.time()
            self._relieve(outcome, answered_at)
        keys.sort()
        start, size = 0, len(keys)
        while start < size:
            number = keys[start] >> INDEX_BITS
            base = number << INDEX_BITS
            stop = size if keys[-1] >> INDEX_BITS == number else bisect_left(keys, base + (1 << INDEX_BITS), start)
            count = stop - start
            first, last = keys[start] - base, keys[stop - 1] - base
            indices: Sequence[int] = (
                range(first, last + 1) if last - first == count - 1 else [key - base for key in keys[start:stop]]
            )
            carried = self._carried[number]
            carried.left -= count
            if sent:
                carried.came_back(count, answered_at)
            if not carried.left:
                del self._carried[number]
            carried.report(indices, outcome)
            start = stop

    def refused(self, connection: Connection, reason: Reason) -> None:
        """Apple said no for the connection's sake or for that of its credentials."""
        if reason is reasons.EXPIRED_PROVIDER_TOKEN:
            self._expire(connection)
            return
        if reason.follow_up is FollowUp.NEW_CONNECTION and connection.usable:
            connection.finish("refused")
            if not connection.answered:  # to come back at once would be a storm
                self._failed(f"{self._endpoint.host} has no use for a new connection: {reason.word}")
        if reason.status == 403:
            self._set_trouble(f"Apple refuses the credentials: {reason.word}", reason.meaning, own=True)
            if reason.follow_up is FollowUp.FIX_CREDENTIALS:
                self._refused_until = self._loop.time() + _REST_S
        if reason.status == 403 or reason is reasons.TOO_MANY_PROVIDER_TOKEN_UPDATES:
            self._alarm("credentials_refused", reason, reason.meaning)

    def proved(self) -> None:
        """A new connection is good. An old one's answers say nothing of new ones, which may be refused meanwhile."""
        self._failures = 0

    def _relieve(self, answer: Answered, now: float) -> None:
        """An answer came, and perhaps a good one."""
        if answer.status != 200:
            reason = reasons.find(answer.reason, answer.status)
            if speaks_against_us(reason):
                return
            if answer.status >= 500:
                if self._ill_seen <= self._answered_at:
                    self._ill_since = now
                self._ill, self._ill_seen = reason.word, now
        if answer.status < 500:
            self._answered_at = now
        if self.trouble is not None:
            self._rests_until = self._refused_until = 0.0
            self.trouble = None
            self._on_room()

    def _set_trouble(self, why: str, advice: str, *, own: bool = False) -> None:
        self._trouble_seen = self._loop.time()
        if self.trouble is None:
            self._trouble_since = self._trouble_seen
        if why != self.trouble:
            self.trouble, self._advice, self._own = why, advice, own
            self._on_room()

    def _alarm(self, event: str, reason: Reason, hint: str, **more: str | None) -> None:
        now = self._loop.time()
        if now - self._alarms.get(reason.word, -_ALARM_S) >= _ALARM_S:
            self._alarms[reason.word] = now
            _log.error(
                event,
                reason=reason.word,
                credentials=self._credentials,
                apps=sorted(self._apps),
                host=self._endpoint.host,
                **more,
                hint=hint,
            )

    @property
    def _credentials(self) -> str:
        key = self._key
        return "a client certificate" if key is None else f"signing key {key.key_id} of team {key.team_id}"

    # -- connections ---------------------------------------------------------------------------------------------

    def _grow(self) -> None:
        """Open one more connection, if there may be more and none is on its way."""
        usable = [connection for connection in self._connections if connection.usable]
        if self._connecting is not None or len(usable) >= self._settings.connections or self._closing is not None:
            return
        if any(connection.new for connection in usable):  # its one stream is no sign of load
            self._pump_later(NEW_S)
            return
        self._connecting = self._loop.create_task(self._connect())

    def _pump_later(self, delay: float) -> None:
        if self._look_again is None:
            self._look_again = self._loop.call_later(delay, self._pump_again)

    def _pump_again(self) -> None:
        self._look_again = None
        self.pump()

    async def _connect(self) -> None:
        try:
            if self._failures:
                # Full jitter; the first failure waits little, as a lone lost connection is no storm.
                longest = min(self._longest_pause, 0.5 * 2 ** min(self._failures, 16))
                await asyncio.sleep(random.uniform(0, longest))  # noqa: S311 - spreads load, guards nothing
            connection = await self._open()
        except (OSError, ConfigError, ValueError) as error:  # the last: a name that TLS cannot be told
            endpoint = self._endpoint
            why = f"cannot connect to {endpoint.host}:{endpoint.port}: {str(error) or type(error).__name__}"
            self._failed(why, error)
        except Exception as error:  # noqa: BLE001 - a fault of ours must not keep the pool from trying again
            _log.exception("apns_connect_failed", host=self._endpoint.host)
            self._failed(f"cannot connect to {self._endpoint.host}: {type(error).__name__}", error)
        else:
            if connection.closed.done():
                self._failed(f"{self._endpoint.host} ended a new connection: {connection.goodbye}")
            else:
                self._connections.append(connection)
                self._telemetry.connected(self._endpoint.host)
                _log.debug("apns_connection_opened", host=self._endpoint.host, connections=len(self._connections))
        finally:
            self._connecting = None
        self._pump_soon()

    async def _open(self) -> Connection:
        """A connection whose server has said its SETTINGS, on the first of its addresses that gives one in time.

        Raises OSError, ConfigError.
        """
        endpoint, settings = self._endpoint, self._settings
        until = self._loop.time() + settings.connect_s
        proxy = None if endpoint.proxy is None else parse_proxy(endpoint.proxy)
        host, port = (endpoint.host, endpoint.port) if proxy is None else (proxy.host, proxy.port)
        try:
            async with asyncio.timeout(min(settings.look_up_s, settings.connect_s)):
                addresses = await self._look_ups.addresses(host, port)
        except TimeoutError:
            raise socket.gaierror(socket.EAI_AGAIN, f"the name {host} was not looked up in time") from None
        addresses = addresses[:_ADDRESSES]
        failure: OSError = socket.gaierror(socket.EAI_NONAME, f"the name {host} has no address")
        for place, address in enumerate(addresses):
            share = (until - self._loop.time()) / (len(addresses) - place)
            try:
                async with asyncio.timeout(share):
                    return await self._open_at(address, proxy)
            except TimeoutError:
                failure = TimeoutError(f"{address[1][0]} did not answer in time")
            except OSError as error:
                failure = error
        raise failure

    async def _open_at(self, address: Address, proxy: Proxy | None) -> Connection:
        endpoint = self._endpoint
        keep = _UNIQUE_ID if endpoint.unique_ids else frozenset[bytes]()
        link = await http2.connect(
            lambda link: Connection(link, self, self._loop),
            host=endpoint.host,
            port=endpoint.port,
            tls=endpoint.tls,
            new_core=lambda now: ClientConnection(now, keep=keep, limits=LIMITS),
            connected=await dial(address, proxy=proxy, host=endpoint.host, port=endpoint.port),
        )
        connection = cast("Connection", link.session)
        try:
            if not await connection.greeted:
                raise ConnectionError(f"{endpoint.host} ended a new connection: {connection.goodbye}") from link.error
        except BaseException:
            connection.abort()
            raise
        return connection

    def _failed(self, why: str, error: Exception | None = None) -> None:
        self._failures += 1
        settings = self._settings
        # With TLS 1.3 a client certificate is refused after the handshake: the alert then is the cause.
        tls = error is not None and isinstance(error.__cause__ or error, ssl.SSLError)
        if isinstance(error, socket.gaierror):
            self._longest_pause = min(_NAME_BACKOFF_S, settings.backoff_s)
        else:
            self._longest_pause = settings.tls_backoff_s if tls else settings.backoff_s
        self._telemetry.not_connected(self._endpoint.host)
        if not any(connection.usable and connection.answered for connection in self._connections):
            self._set_trouble(why, _advice(self._endpoint, tls=tls))
        log = _log.error if tls or isinstance(error, ConfigError) else _log.warning
        log("apns_connect_failed", why=why, failures=self._failures, waiting=self.waiting)

    def lost(self, connection: Connection) -> None:
        """A connection's socket is gone; what was open on it has been settled."""
        if connection not in self._connections:  # it never was a whole one
            return
        self._connections.remove(connection)
        self._telemetry.disconnected(self._endpoint.host, connection.end)
        if connection.dismissed:
            _log.debug("apns_connection_ended", host=self._endpoint.host, why=connection.end)
        if self._closing is not None:
            return
        if not connection.dismissed:
            _log.info("apns_connection_ended", host=self._endpoint.host, why=connection.goodbye)
            if not connection.answered:  # to come back at once would be a storm
                self._failed(f"{self._endpoint.host} ended a new connection: {connection.goodbye}")
        self._pump_soon()

    # -- what there is to see ------------------------------------------------------------------------------------

    def view(self, lanes: Collection[Lane]) -> Iterator[LaneView]:
        """How these lanes fare here."""
        in_flight: dict[Lane, int] = dict.fromkeys(lanes, 0)
        for carried in self._carried.values():
            in_flight[carried.lane] = in_flight.get(carried.lane, 0) + sum(count for _, count in carried.sent)
        waiting = self._backlog.lanes
        ahead = self._clock() - self._loop.time()
        trouble, advice, own = self.trouble, self._advice, self._own
        since, seen = self._trouble_since, self._trouble_seen
        if trouble is None and self._ill_seen > self._answered_at + _ILL_S:
            trouble, advice, own = f"Apple answers {self._ill} ({self._endpoint.host})", _ILL_ADVICE, False
            since, seen = self._ill_since, self._ill_seen
        rests_until = max(self._rests_until, self._refused_until)
        for lane in lanes:
            yield LaneView(
                *lane,
                host=self._endpoint.host,
                credentials=self._credentials,
                connections=len(self._connections),
                in_flight=in_flight[lane],
                waiting=waiting.get(lane, 0),
                answered_at=None if self._answered_at == -math.inf else self._answered_at + ahead,
                trouble=trouble,
                advice=advice if trouble else "",
                own=own and trouble is not None,
                since=since + ahead if trouble else None,
                failed_at=seen + ahead if trouble else None,
                rests_until=rests_until + ahead if self._resting else None,
            )

    # -- ends ----------------------------------------------------------------------------------------------------

    def tidy(self) -> bool:
        """Close connections that have had nothing to do for long; whether the pool itself had."""
        now, settings = self._loop.time(), self._settings
        usable = [connection for connection in self._connections if connection.usable]
        left = len(usable)
        for connection in reversed(usable):  # the first ones are used first
            enough = settings.idle_s if left == 1 else settings.spare_idle_s
            if not connection.open_streams and now >= connection.used_at + enough:
                connection.finish("idle")
                left -= 1
        return not (self._carried or self._connections or self._connecting) and now >= self._used_at + settings.idle_s

    def retire(self, why: str) -> None:
        """Take nothing more, hand back what waits; connections end once what is open on them is answered."""
        if self._closing is not None:
            return
        self._closing = why
        for timer in (self._patience, self._look_again):
            if timer is not None:
                timer.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
        for work in self._backlog.pop_all():
            self._hand_back(work, why)
        for connection in self._connections:
            connection.finish("retired")

    @property
    def ended(self) -> bool:
        """After `retire`: nothing is left to be waited for."""
        return not self._connections and (self._connecting is None or self._connecting.done())

    async def aclose(self) -> None:
        """As `retire`, and wait until all is over."""
        self.retire("the server is stopping")
        if self._connecting is not None:
            await asyncio.gather(self._connecting, return_exceptions=True)
        connections = list(self._connections)
        if not connections:
            return
        _, late = await asyncio.wait([each.closed for each in connections], timeout=_DRAIN_S)
        if late:
            for connection in connections:
                connection.abort()  # what is open on it is reported as unknown
            await asyncio.wait(late)


def _advice(endpoint: Endpoint, *, tls: bool) -> str:
    where = f"{endpoint.host}:{endpoint.port}"
    if tls:
        return (
            f"the TLS handshake failed: see that nothing between here and {where} opens TLS, and that the "
            "certificates, if any are configured, are good; heliograph doctor looks"
        )
    by = "" if endpoint.proxy is None else " by its proxy"
    return f"see that this machine reaches {where}{by} (DNS, firewall); heliograph doctor looks. What waits is kept"


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")
