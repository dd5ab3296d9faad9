"""The Apple-shaped proxy: `POST /3/device/{token}` over HTTP/2, answered as Apple answers, with the app's credentials.

By itself a request is carried out at once and its caller waits for Apple's word (`relay.sends`); of apps that are
`durable` it is answered 200 as soon as it is safe in the queue. What one turn of the loop brings, on all connections,
goes south together, and what comes back is answered in one write for each connection.

An answer never blames a caller for what is not its fault: where Apple does not take our credentials, or was not
reached, it is 503 ServiceUnavailable if Apple certainly did not act, and 500 InternalServerError if nobody knows.

The order in which a request is looked at: method, path, duplicate headers, who sends it, topic, the other headers,
payload, device token. Apple publishes none.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from binascii import unhexlify
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from operator import itemgetter
from typing import NamedTuple
from uuid import uuid4

import structlog
from msgspec.structs import replace

from heliograph import reasons
from heliograph.callers import Callers
from heliograph.config import AppleProxySettings, TlsVersion
from heliograph.doors.apple.reading import Common, Reader, check_path
from heliograph.doors.receipts import DURABLE, PLACES, PROXY, is_about_us
from heliograph.errors import ConfigError, Overloaded, Refused, StoreError
from heliograph.keys import Keyring
from heliograph.model import ACCEPTED, Answered, App, Batch, Environment, Headers, NotProcessed, Origin, Outcome
from heliograph.net.http2 import Link, Listener, listen
from heliograph.net.tls import legacy_context
from heliograph.payload import MAX_VOIP_BYTES
from heliograph.ports import Store
from heliograph.protocols import apns
from heliograph.protocols.http2 import Answer, Event, Failed, Field, Limits, Request, ServerConnection
from heliograph.relay import Relay
from heliograph.relay.sends import Courier
from heliograph.telemetry import Telemetry

STREAMS = 1000
"""Open requests of one connection, at most; as Apple allows."""

_LIMITS = Limits(header_octets=8000, idle_s=3600.0, resets=2000)
"""Clients keep connections for hours, as Apple advises, and give up on many requests at once."""
_ANSWERING_S = 10.0
"""How long open requests may take when the server stops."""
_RETRY_AFTER_S = 5
_MINUTE_S = 60.0
_SINGLY = 10
"""So many refusals of one kind are told one by one in a minute."""
_KINDS = 20
"""So many kinds of refusals of one reason are told apart in a minute."""
_NOT_HTTP2 = (
    "NotHttp2",
    (
        "A client spoke HTTP/1.1 or something else, and was cut off: have it use HTTP/2 (curl --http2, without TLS "
        "--http2-prior-knowledge)."
    ),
)
_MOST_STORING = 20_000
"""Notifications on their way into the queue, at most."""
_REMEMBERED = 64
"""Sets of headers that a connection is remembered for."""

_VARYING = (b":path", b"apns-id", b"apns-expiration", b"apns-collapse-id")
"""Fields that may differ from one request to the next."""
_LENGTH = b"content-length"
"""Differs as well, and was compared with the body already."""
_BARE: tuple[bytes, ...] = (b":method", b":scheme", b":path")
"""What every request has."""
_PREFIX = apns.PATH_PREFIX
_PREFIX_LENGTH = len(_PREFIX)
_is_uuid = re.compile(rb"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}").fullmatch
_JSON: Field = (b"content-type", b"application/json")

_log = structlog.get_logger("heliograph.proxy")

Ticket = tuple["_Visit", int]
"""Where an answer goes: the connection and the stream."""


class _Layout(NamedTuple):
    """Where fields are in requests that have the same names in the same order."""

    path: int
    apns_id: int | None
    expiration: int | None
    collapse_id: int | None
    common: Callable[[Sequence[Field]], tuple[Field, ...]]
    """Picks the fields that requests share."""


@lru_cache(maxsize=256)
def _layout(names: tuple[bytes, ...]) -> _Layout:
    """Of what comes twice and should not, the second one is among those that are shared, where it will be seen."""
    places = [names.index(name) if name in names else None for name in _VARYING]
    shared = [place for place, name in enumerate(names) if place not in places and name != _LENGTH]
    path, apns_id, expiration, collapse_id = places
    assert path is not None  # the core has seen to that
    return _Layout(path, apns_id, expiration, collapse_id, itemgetter(*shared))


class AppleProxy:
    """One listener."""

    def __init__(
        self,
        name: str,
        settings: AppleProxySettings,
        *,
        relay: Relay,
        store: Store,
        apps: Mapping[str, App],
        keyring: Keyring,
        callers: Callers,
        identity: tuple[bytes, bytes],
        telemetry: Telemetry,
        clock: Callable[[], float],
    ) -> None:
        """`name`: as in `[apple_proxy.NAME]`. `apps` may change. `identity`: certificate chain and key, as PEM.

        `clock` gives UNIX seconds.
        """
        self.name = name
        self.origin = Origin(PROXY + name)
        """Of what is carried at once."""
        self.port = settings.port
        """Where it listens; the real one once it does."""
        self.apps = apps
        self.reader = Reader(settings, apps, keyring, callers)
        self.clock = clock
        self._settings = settings
        self._relay = relay
        self._store = store
        self._callers = callers
        self._identity = identity
        self._telemetry = telemetry
        self._loop = asyncio.get_running_loop()
        self._listener: Listener | None = None
        self._tls: ssl.SSLContext | None = None
        self._anchors = -1
        """Which version of the callers' certificates the context has."""
        self._ways: dict[tuple[str, Environment], Courier | _Desk] = {}
        self._complaints: dict[tuple[str, str], _Complaint] = {}
        self.storing = 0
        """Notifications on their way into the queue."""
        self.tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen. Raises ConfigError."""
        settings = self._settings
        if settings.tls:
            certificate, key = self._identity
            # Who comes with a certificate is known by it alone, as at the other doors.
            context = legacy_context(certificate, key, anchors=(), minimum=TlsVersion.TLS_1_2, required=False)
            context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")  # what RFC 9113, appendix A, leaves
            context.set_alpn_protocols(["h2"])
            self._tls = context
        try:
            self._listener = await listen(
                lambda link: _Visit(self, link),
                tls=self._tls,
                host=settings.host,
                port=settings.port,
                new_core=lambda now: ServerConnection(
                    now, max_streams=STREAMS, max_body=MAX_VOIP_BYTES, limits=_LIMITS
                ),
                max_connections=settings.max_connections,
                before=self._trust,
            )
        except OSError as error:
            where = f"{settings.host}:{settings.port}"
            raise ConfigError(
                f"apple_proxy.{self.name} cannot listen on {where} ({error.strerror or error}): stop what uses it, or "
                "set host and port to what is free here"
            ) from None
        self.port = self._listener.port

    async def aclose(self) -> None:
        """Listen no more, say GOAWAY, let open requests be answered for a while, close."""
        if self._listener is not None:
            await self._listener.aclose(_ANSWERING_S)
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks)
        for each in list(self._complaints.values()):
            each.end()

    def _trust(self) -> None:
        """Take the certificates of callers that were registered meanwhile. Those that are not any more open nothing."""
        if self._tls is not None and self._anchors != self._callers.version:
            self._anchors = self._callers.version
            for each in self._callers.certificates():
                self._tls.load_verify_locations(cadata=each.decode("ascii"))

    # -- the way of a request ------------------------------------------------------------------------------------

    def way(self, app: str, environment: Environment) -> Courier | _Desk:
        """Who takes an app's notifications."""
        found = self._ways.get((app, environment))
        if found is None:
            if app in self._settings.durable:
                found = _Desk(self, self._relay, self._store, app, environment)
            else:
                found = self._relay.courier(app, environment, self._tell, self.origin)
            self._ways[app, environment] = found
        return found

    def _tell(self, tickets: Sequence[Ticket], ids: Sequence[bytes], outcome: Outcome) -> None:
        """What became of these, as an answer to each."""
        if outcome is ACCEPTED:
            self.answer(tickets, ids, 200)
        elif isinstance(outcome, Answered) and outcome.status == 200:
            self.answer(tickets, ids, 200, unique_id=outcome.unique_id)
        else:
            status, reason, retry_after_s = _as_apple_would(outcome)
            since = outcome.since if isinstance(outcome, Answered) and outcome.status == status else None
            self.answer(tickets, ids, status, reason, since, retry_after_s)

    def answer(
        self,
        tickets: Sequence[Ticket],
        ids: Iterable[bytes],
        status: int,
        reason: str | None = None,
        since: int | None = None,
        retry_after_s: int | None = None,
        unique_id: str | None = None,
    ) -> None:
        """Answer these alike, each with its id."""
        rest: tuple[Field, ...] = ()
        body = b""
        if unique_id is not None:
            rest = ((b"apns-unique-id", unique_id.encode()),)
        if reason is not None:
            rest = (_JSON,) if retry_after_s is None else (_JSON, (b"retry-after", b"%d" % retry_after_s))
            body = apns.answer_body(reason, since)
        touched: list[_Visit] = []
        for (visit, stream_id), apns_id in zip(tickets, ids, strict=True):
            answers = visit.answers
            if not answers:
                touched.append(visit)
            own = (b"apns-id", apns_id)
            answers.append(Answer(stream_id, status, (own, *rest) if rest else (own,), body))
        for visit in touched:
            visit.answer()
        self._telemetry.proxied(self.name, status, reason or "", len(tickets))

    def complain(self, refused: Refused) -> None:
        """Tell in the log of a caller that was turned away: Apple's words alone say too little."""
        kind = refused.reason, refused.detail
        if kind not in self._complaints and len(self._complaints) >= _KINDS:
            kind = refused.reason, ""  # callers choose topics: what differs in these alone is summed up
        found = self._complaints.get(kind)
        if found is None:
            found = self._complaints[kind] = _Complaint(self.name, kind, self._complaints)
            self._loop.call_later(_MINUTE_S, found.end)
        found.add(refused.detail)


class _Complaint:
    """What is told in a minute of requests that were refused for one reason: of the first ones each, then how many."""

    def __init__(self, listener: str, kind: tuple[str, str], complaints: dict[tuple[str, str], _Complaint]) -> None:
        """`complaints`: where it is, by its kind, until it ends."""
        self._listener = listener
        self._kind = kind
        self._complaints = complaints
        self._singly = 1 if kind[0] == _NOT_HTTP2[0] else _SINGLY
        self._more = 0
        self._why = ""

    def add(self, why: str) -> None:
        self._why = why
        if self._singly:
            self._singly -= 1
            self._tell(1)
        else:
            self._more += 1

    def end(self) -> None:
        """Tell of what there were more."""
        if self._complaints.get(self._kind) is self:
            del self._complaints[self._kind]
            if self._more:
                self._tell(self._more)

    def _tell(self, number: int) -> None:
        reason = self._kind[0]
        _log.warning("proxy_refused", listener=self._listener, reason=reason, count=number, why=self._why)


class _Visit:
    """One connection of a client: a session of `net.http2`."""

    def __init__(self, proxy: AppleProxy, link: Link[ServerConnection]) -> None:
        self._proxy = proxy
        self._link = link
        self._core = link.core
        self._certificate = link.peer_certificate
        self._known: dict[tuple[Field, ...], tuple[Common, Courier | _Desk]] = {}
        """By the fields that requests share."""
        self.answers: list[Answer] = []

    def answer(self) -> None:
        """Have `answers` written, with whatever else is answered in this turn of the loop."""
        answers, self.answers = self.answers, []
        self._core.respond(answers)
        self._link.flush()

    # -- the link calls these ------------------------------------------------------------------------------------

    def on_events(self, events: Sequence[Event]) -> None:
        now = self._proxy.clock()
        names, layout = _BARE, _layout(_BARE)
        shared: tuple[Field, ...] = ()
        found: tuple[Common, Courier | _Desk] | None = None
        for event in events:
            if type(event) is not Request:
                if type(event) is Failed and event.why.startswith("not HTTP/2"):
                    self._proxy.complain(Refused(*_NOT_HTTP2))
                continue
            stream_id, fields, body, truncated = event.stream_id, event.fields, event.body, event.truncated
            these = tuple([field[0] for field in fields])
            if these != names:
                names, layout = these, _layout(these)
            path_at, id_at, expiration_at, collapse_at, common_to = layout
            path, apns_id = fields[path_at][1], None if id_at is None else fields[id_at][1]
            own: str | None = None
            try:
                alike = common_to(fields)
                if found is None or alike != shared:  # what one read brings is mostly alike
                    found = self._find(alike, path, now)
                    shared = alike
                common, way = found
                if apns_id is not None:
                    if not _is_uuid(apns_id):
                        raise Refused(*_BAD_MESSAGE_ID)
                    own = apns_id.decode().lower()
                if expiration_at is None and collapse_at is None and not common.open_kind:
                    headers = common.headers
                else:
                    headers = common.headers_for(
                        None if expiration_at is None else fields[expiration_at][1],
                        None if collapse_at is None else fields[collapse_at][1],
                        body,
                    )
                if not 0 < len(body) <= common.max_payload or truncated:
                    raise Refused(*(_TOO_LARGE if body else _EMPTY))
                token = path[_PREFIX_LENGTH:].lower()
                if not path.startswith(_PREFIX) or not _is_token(token):
                    check_path(path)
                    raise Refused(*_BAD_TOKEN)
            except Refused as error:
                self._refuse(stream_id, apns_id, error)
                continue
            way.send(headers, token, body, own, (self, stream_id))

    def on_writable(self) -> None:
        """Answers are small, and there are no more of them than streams: nothing waits for this."""

    def on_close(self) -> None:
        """What is open goes on: an answer to it goes nowhere."""
        self._known.clear()

    # -- inside --------------------------------------------------------------------------------------------------

    def _find(self, shared: tuple[Field, ...], path: bytes, now: float) -> tuple[Common, Courier | _Desk]:
        """What these fields say, and who takes such a notification. Raises Refused."""
        proxy = self._proxy
        found = self._known.get(shared)
        if found is not None:
            common = found[0]
            if common.access.holds(now) and proxy.apps.get(common.app.name) is common.app:
                return found
            del self._known[shared]
        common = proxy.reader.read(shared, path, self._certificate, now)
        found = common, proxy.way(common.app.name, common.environment)
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known[shared] = found
        return found

    def _refuse(self, stream_id: int, apns_id: bytes | None, error: Refused) -> None:
        reason = reasons.find(error.reason)
        shown = apns_id if apns_id is not None and _is_uuid(apns_id) else str(uuid4()).encode()
        self._proxy.answer(((self, stream_id),), (shown.lower(),), reason.status, reason.word)
        if reason.status == 403 or reason is reasons.TOPIC_DISALLOWED:
            self._proxy.complain(error)


class _Desk:
    """Takes an app's notifications for the queue: what one turn of the loop brings in one transaction."""

    def __init__(self, proxy: AppleProxy, relay: Relay, store: Store, app: str, environment: Environment) -> None:
        self._proxy = proxy
        self._relay = relay
        self._removals = store
        self._app = app
        self._environment = environment
        self._origin = Origin(PROXY + proxy.name + DURABLE)
        self._loop = asyncio.get_running_loop()
        self._rows: list[tuple[Headers, bytes, bytes, str | None, Ticket]] = []

    def send(self, headers: Headers, token: bytes, payload: bytes, apns_id: str | None, ticket: Ticket) -> None:
        """As `Courier.send`."""
        if not self._rows:
            self._loop.call_soon(self._flush)
        self._rows.append((headers, token, payload, apns_id, ticket))

    def _flush(self) -> None:
        rows, self._rows = self._rows, []
        proxy = self._proxy
        if proxy.storing >= _MOST_STORING:
            self._put_off(rows, 1)
            return
        proxy.storing += len(rows)
        task = self._loop.create_task(self._store(rows))
        proxy.tasks.add(task)
        task.add_done_callback(proxy.tasks.discard)

    async def _store(self, rows: Sequence[tuple[Headers, bytes, bytes, str | None, Ticket]]) -> None:
        headers, tokens, payloads, own, tickets = zip(*rows, strict=True)
        now = self._proxy.clock()
        try:
            admitted = await self._relay.admit(
                self._app,
                self._environment,
                [_not_past(each, now) for each in headers],
                [token.decode() for token in tokens],
                payloads,
                partial=True,
            )
            wrong = {each.index for each in admitted.refused}
            good = [] if None in wrong else [index for index in range(len(rows)) if index not in wrong]
            batches = list(_marked(admitted.batches, self._origin, [own[index] for index in good]))
            if batches:
                await self._relay.enqueue(batches)
        except Refused as error:  # the app went away meanwhile
            reason = reasons.TOPIC_DISALLOWED
            self._proxy.answer(tickets, _ids(own), reason.status, reason.word)
            self._proxy.complain(Refused(reason.word, error.detail))
        except Overloaded as error:
            self._put_off(rows, max(1, round(error.retry_after_s)))
        except StoreError:
            self._put_off(rows, _RETRY_AFTER_S)
        else:
            if batches:
                ours = [batch.id + place for batch in batches for place in PLACES[: len(batch)]]
                ids = [(own[index] or mine).encode() for mine, index in zip(ours, good, strict=True)]
                self._proxy.answer([tickets[index] for index in good], ids, 200)
            told: set[int] = set()
            for refused in admitted.refused:  # there may be several for one
                those = [index for index in _places(refused, len(rows)) if index not in told]
                told.update(those)
                word = reasons.find(refused.reason)
                if those:
                    theirs = _ids([own[index] for index in those])
                    since = await self._since(tokens[those[0]]) if word is reasons.UNREGISTERED else None
                    self._proxy.answer([tickets[index] for index in those], theirs, word.status, word.word, since)
        finally:
            self._proxy.storing -= len(rows)

    async def _since(self, token: bytes) -> int:
        """Since when a device token is dead, in UNIX milliseconds, as Apple tells with each 410."""
        with contextlib.suppress(StoreError):
            for found in await self._removals.find_removals(self._app, self._environment, 0, 1, token):
                return found.removal.since * 1000
        return int(self._proxy.clock() * 1000)

    def _put_off(self, rows: Sequence[tuple[Headers, bytes, bytes, str | None, Ticket]], seconds: int) -> None:
        reason = reasons.SERVICE_UNAVAILABLE
        tickets, own = [row[4] for row in rows], [row[3] for row in rows]
        self._proxy.answer(tickets, _ids(own), reason.status, reason.word, retry_after_s=seconds)


def _places(refused: Refused, size: int) -> Sequence[int]:
    """Which of so many are refused."""
    return range(size) if refused.index is None else (refused.index,)


def _ids(own: Iterable[str | None]) -> list[bytes]:
    """For answers to what was not taken: callers' own ids, or any."""
    return [(str(uuid4()) if each is None else each).encode() for each in own]


def _marked(batches: Sequence[Batch], origin: Origin, own: Iterable[str | None]) -> Iterable[Batch]:
    """With where they came from, and the ids that their callers chose."""
    left = iter(own)
    for batch in batches:
        ids = {index: each for index, each in enumerate(islice(left, len(batch))) if each is not None}
        yield replace(batch, origin=origin, apns_ids=ids)


def _not_past(headers: Headers, now: float) -> Headers:
    """Apple takes what has expired already, and tries it once."""
    past = headers.expiration is not None and headers.expiration <= now
    return replace(headers, expiration=0) if past and headers.expiration else headers


def _as_apple_would(outcome: Outcome) -> tuple[int, str, int | None]:
    """Status, reason and when to try again, where it was no 200."""
    if isinstance(outcome, Answered):
        reason = reasons.find(outcome.reason, outcome.status)
        if not is_about_us(reason):
            return outcome.status, reason.word, None if outcome.retry_after_s is None else int(outcome.retry_after_s)
    elif not isinstance(outcome, NotProcessed):
        return reasons.INTERNAL_SERVER_ERROR.status, reasons.INTERNAL_SERVER_ERROR.word, None
    return reasons.SERVICE_UNAVAILABLE.status, reasons.SERVICE_UNAVAILABLE.word, _RETRY_AFTER_S


def _is_token(token: bytes) -> bool:
    try:
        return 0 < len(unhexlify(token)) <= apns.MAX_TOKEN_BYTES
    except ValueError:
        return False


_BAD_MESSAGE_ID, _EMPTY, _TOO_LARGE, _BAD_TOKEN = (
    (each.word, each.meaning)
    for each in (
        reasons.BAD_MESSAGE_ID,
        reasons.PAYLOAD_EMPTY,
        reasons.PAYLOAD_TOO_LARGE,
        reasons.BAD_DEVICE_TOKEN,
    )
)
