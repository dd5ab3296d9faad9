"""The HTTP API: JSON in, ids and receipts out.

The way of a request: what cannot be taken now is refused before its body is read; `Exchange.read` reads it within
bounds, one typed decode turns it into structs, `_columns` turns these into the columns that `Relay.admit` takes.
Nothing is made for each notification but its struct and its entries. Payloads that a caller brought stay the octets
that they were, but for alert text that it asks to have shortened.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from operator import attrgetter
from typing import Any, Protocol, TypeVar
from urllib.parse import parse_qs

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from heliograph import payload, reasons
from heliograph.doors.exchange import (
    MAX_BODY_BYTES,
    Answer,
    ErrorItem,
    Exchange,
    Gone,
    Problem,
    closest,
    dissect,
    shown,
)
from heliograph.errors import Overloaded, Refused, StoreError
from heliograph.model import MAX_BATCH, Batch, Environment, Headers, PushType, Receipt, State
from heliograph.payload import CriticalSound, LiveActivity, Localized
from heliograph.relay import Relay

S = TypeVar("S", bound=Struct)
T = TypeVar("T")

PATH = "/v1/notifications"
BURIED_PATH = "/v1/buried"
REPLAY_PATH = "/v1/buried/replay"

MAX_NOTIFICATIONS = 10_000
"""Notifications in one request, at most."""

MAX_WAIT_S = 30.0
"""How long a caller may have its answer held back until the outcome is known."""

_MAX_ERRORS = 100
"""Errors told in one answer; a caller that got everything wrong learns no more from the thousandth."""

MAX_REQUESTS = 2000
"""Requests in hand, at most; those that wait for an outcome are not counted."""

MAX_WAITS = 10_000
"""Callers that wait for an outcome, at most; who is above is answered at once with what is known."""

MAX_HELD_BYTES = 32 * 1024 * 1024
"""Octets of bodies in hand, at most, announced or read; several times `MAX_BODY_BYTES`, so one alone always fits."""

MAX_PAGE = 1000
"""Receipts in one answer, at most."""

MAX_REPLAY = 1000
"""Ids to replay in one request, at most."""

_RETRY_S = 5
"""When to try again where the store is full or fails; where only too many came at once, `_BUSY_S`."""
_BUSY_S = 1

_PLACES = [f"{place:04x}" for place in range(1, MAX_BATCH + 1)]
"""The last four digits of the ids in a batch (see `model.Batch.id`)."""


class _LiveActivity(LiveActivity, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the app decodes stays the octets that it is."""

    content_state: dict[str, Raw] | None = None
    attributes: dict[str, Raw] | None = None


class _Fields(Struct, forbid_unknown_fields=True):
    """What a notification may say of itself. Null is the same as nothing."""

    payload: Raw | UnsetType = UNSET
    title: str | Localized | None = None
    subtitle: str | Localized | None = None
    body: str | Localized | None = None
    badge: int | None = None
    sound: str | CriticalSound | None = None
    data: dict[str, Raw] | None = None
    launch_image: str | None = None
    action: str | None = None
    thread_id: str | None = None
    category: str | None = None
    content_available: bool | None = None
    mutable_content: bool | None = None
    interruption_level: str | None = None
    relevance_score: float | None = None
    target_content_id: str | None = None
    filter_criteria: str | None = None
    url_args: list[str] | None = None
    content_changed: bool | None = None
    live_activity: _LiveActivity | None = None
    shorten: bool | None = None
    topic: str | None = None
    push_type: PushType | None = None
    priority: int | None = None
    expiration: int | None = None
    collapse_id: str | None = None
    collapse: bool | None = None
    at_most_once: bool | None = None

    def __repr__(self) -> str:
        return "<what a caller wants sent>"


class _Item(_Fields):
    """A member of `notifications`."""

    token: str = ""


class _Post(_Fields):
    """The body of a POST."""

    app: str | None = None
    environment: Environment | None = None
    token: str | None = None
    tokens: list[str] | None = None
    notifications: list[_Item] | None = None
    wait: float | None = None


_HEADERS = ("topic", "push_type", "priority", "expiration", "collapse_id", "collapse", "at_most_once")
_CONTENT = tuple(name for name in _Fields.__struct_fields__ if name not in ("payload", *_HEADERS))
"""What a payload is built of; last, whether it may be shortened."""
_content = attrgetter(*_CONTENT)
_headers = attrgetter(*_HEADERS)
_NO_CONTENT = (None,) * len(_CONTENT)
_COMMON = 6
"""So many of `_CONTENT` are what most notifications are built of."""
_RARE = (*_CONTENT[_COMMON:-1], "shortened")
_NO_RARE = (None,) * len(_RARE)
_NESTED: dict[str, type[Struct]] = {
    **dict.fromkeys(("title", "subtitle", "body"), Localized),
    "sound": CriticalSound,
    "live_activity": LiveActivity,
}

_decode_item = msgspec.json.Decoder(_Item).decode
_encode = msgspec.json.encode


class _Replay(Struct, forbid_unknown_fields=True):
    """The body of a POST to `REPLAY_PATH`."""

    ids: list[str]


_DECODE: dict[type[Struct], Callable[[bytes], Any]] = {
    _Post: msgspec.json.Decoder(_Post).decode,
    _Replay: msgspec.json.Decoder(_Replay).decode,
}


class _OnlyMembers(Struct):
    notifications: list[Raw]


_decode_members = msgspec.json.Decoder(_OnlyMembers).decode


class _Columns(Struct):
    """What `Relay.admit` takes: `headers` and `payloads` with one entry for all or one each."""

    headers: Sequence[Headers]
    tokens: Sequence[str]
    payloads: Sequence[bytes]

    def __repr__(self) -> str:
        return f"<columns of {len(self.tokens)} notifications>"


class _ReceiptBody(Struct):
    """A receipt as JSON. Times are RFC 3339, in UTC."""

    id: str
    app: str
    state: str
    reason: str | None
    status: int | None
    meaning: str
    created_at: str
    updated_at: str | None
    attempts: int
    next_attempt_at: str | None
    unique_id: str | None


class Read(Protocol):
    """Reads a request's body, of `most` octets at most, which count as in hand until `use` is through with it."""

    async def __call__(
        self, exchange: Exchange, use: Callable[[Exchange, bytes], Awaitable[T]], most: int = MAX_BODY_BYTES, /
    ) -> T:
        """What `use` makes of it. Raises Problem, Gone, and what `use` raises."""
        ...


Handlers = Mapping[str, Callable[[Exchange, Read], Awaitable[Answer]]]
"""What answers at a path, by method."""


class Api:
    """The door."""

    def __init__(
        self,
        relay: Relay,
        apps: Collection[str],
        key: bytes,
        beside: Callable[[str], Handlers | None] = lambda _: None,
    ) -> None:
        """`apps` are the names of all apps, and may change; `key` is what callers must show (RFC 6750).

        `beside` finds what answers at other paths, for callers with the key; None where there is nothing.
        """
        self._relay = relay
        self._apps = apps
        self._key = key
        self._waits: set[asyncio.Timeout] = set()
        self._hurrying = False
        self._requests = 0
        """In hand now."""
        self._held_bytes = 0
        """Octets of their bodies, announced or read."""
        self._beside = beside
        self._paths: dict[str, Handlers] = {
            PATH: {"POST": self._post},
            BURIED_PATH: {"GET": self._buried, "HEAD": self._buried},
            REPLAY_PATH: {"POST": self._replay},
        }
        self._receipt_path: Handlers = {"GET": self._get, "HEAD": self._get}

    def hurry(self) -> None:
        """Answer those who wait for an outcome with what is known: the server is stopping."""
        self._hurrying = True
        now = asyncio.get_running_loop().time()
        for wait in self._waits:
            if (wait.when() or now) > now:  # one that ran out already can no longer be moved
                wait.reschedule(now)

    async def serve(self, exchange: Exchange) -> None:
        """Answer one request, whatever it is. Raises what is our own fault, once that is told."""
        try:
            answer = await self._answer(exchange)
        except Refused as refused:
            answer = _refusal([refused], None, 1).answer()
        except Problem as problem:
            answer = problem.answer()
        except Overloaded as error:
            answer = Problem(429, "Overloaded", str(error), headers=_retry_after(error.retry_after_s)).answer()
        except StoreError as error:
            answer = Problem(503, "StoreUnavailable", str(error), headers=_retry_after(_RETRY_S)).answer()
        except Gone:
            return
        except Exception:
            text = "Something failed here; the server's log says what."
            await exchange.answer(Problem(500, "InternalError", text).answer())
            raise
        await exchange.answer(answer)

    async def _answer(self, exchange: Exchange) -> Answer:
        handlers = self._paths.get(exchange.path) or self._find(exchange.path)
        if handlers is None:
            text = f"There is nothing at {exchange.path}. Notifications go to POST {PATH}."
            raise Problem(404, "NotFound", text)
        self._check_key(exchange)
        handler = handlers.get(exchange.method)
        if handler is None:
            allowed = ", ".join(handlers)
            headers = ((b"allow", allowed.encode()),)
            raise Problem(405, "MethodNotAllowed", f"This path takes {allowed} only.", headers=headers)
        if self._requests >= MAX_REQUESTS:
            raise _busy(f"{MAX_REQUESTS} requests are in hand already")
        self._requests += 1
        try:
            return await handler(exchange, self._read)
        finally:
            self._requests -= 1

    def _find(self, path: str) -> Handlers | None:
        start, _, name = path.rpartition("/")
        return self._receipt_path if start == PATH and name else self._beside(path)

    def _check_key(self, exchange: Exchange) -> None:
        scheme, _, shown = exchange.headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(shown.strip(), self._key):
            wrong = "is not the one of this server" if shown else "is missing"
            raise Problem(
                401,
                "Unauthorized",
                f"The API key {wrong}: send it as `Authorization: Bearer hg_...`. "
                "The server keeps it in the file api-key of its data folder, unless told otherwise.",
                headers=((b"www-authenticate", b"Bearer"),),
            )

    async def _post(self, exchange: Exchange, read: Read) -> Answer:
        if self._relay.room <= 0:
            raise Overloaded("As many notifications are waiting as are kept: try again later.", retry_after_s=_RETRY_S)
        batches, single, wait_s = await read(exchange, self._take)
        if not single:
            return Answer(202, _ids_body(batches))
        notification_id = batches[0].id + _PLACES[0]
        del batches  # it may be a long wait
        receipt = await self._outcome(notification_id, wait_s) if wait_s else None
        where = f"{PATH}/{notification_id}"
        headers = ((b"location", where.encode()),)
        if receipt is None:
            return Answer(202, _encode({"id": notification_id, "receipt": where}), headers)
        return Answer(202 if receipt.state in _NOT_FINAL else 200, _encode(_receipt_body(receipt)), headers)

    async def _read(
        self, exchange: Exchange, use: Callable[[Exchange, bytes], Awaitable[T]], most: int = MAX_BODY_BYTES, /
    ) -> T:
        """As `Read` has it."""
        held = 0

        def hold(octets: int) -> None:
            nonlocal held
            if self._held_bytes - held + octets > MAX_HELD_BYTES:
                raise _busy("The requests in hand are as long as memory allows")
            self._held_bytes += octets - held
            held = octets

        try:
            return await use(exchange, await exchange.read(hold, most))
        finally:
            self._held_bytes -= held

    async def _take(self, exchange: Exchange, body: bytes) -> tuple[Sequence[Batch], bool, float]:
        """The batches, durable; whether one notification was sent by itself, and how long its sender waits."""
        post = _parse(body, _Post)
        wait_s = _wait_s(exchange, post)
        columns = _columns(post)
        app = self._only_app() if post.app is None else post.app
        relay = self._relay
        admitted = await relay.admit(app, post.environment, columns.headers, columns.tokens, columns.payloads)
        if admitted.refused:
            raise _refusal(admitted.refused, post, len(columns.tokens))
        await relay.enqueue(admitted.batches)
        return admitted.batches, post.token is not None, wait_s

    def _only_app(self) -> str:
        if len(self._apps) != 1:
            raise Refused("MissingApp", "Say which app: there is more than one here, or none yet.", field="app")
        return next(iter(self._apps))

    async def _outcome(self, notification_id: str, wait_s: float) -> Receipt | None:
        """The receipt as it is after the wait. None where it cannot be read: what was taken is taken all the same."""
        if len(self._waits) >= MAX_WAITS:
            return None
        wait = asyncio.timeout(0 if self._hurrying else wait_s)
        self._waits.add(wait)
        self._requests -= 1  # it costs next to nothing now, and must not keep others out
        try:
            try:
                async with wait:
                    return await self._relay.receipt(notification_id, wait_s)
            except TimeoutError:
                return (await self._relay.receipts([notification_id]))[0]
        except StoreError:
            return None
        finally:
            self._requests += 1
            self._waits.discard(wait)

    async def _get(self, exchange: Exchange, _: Read) -> Answer:
        (receipt,) = await self._relay.receipts([exchange.path.rpartition("/")[2]])
        if receipt is None:
            raise Problem(
                404,
                "UnknownNotification",
                "No notification with this id is known here: it never was, or its receipt was forgotten meanwhile.",
            )
        return Answer(200, _encode(_receipt_body(receipt)))

    async def _buried(self, exchange: Exchange, _: Read) -> Answer:
        query = _query(exchange, ("app", "before", "limit"))
        limit = query.get("limit", "100")
        if not (len(limit) <= 4 and limit.isascii() and limit.isdecimal() and 1 <= int(limit) <= MAX_PAGE):
            raise Refused("BadParameter", f"limit must be a whole number from 1 to {MAX_PAGE}.", field="limit")
        count = int(limit)
        try:
            found = await self._relay.buried(query.get("app"), query.get("before"), count + 1)
        except ValueError:
            text = "before must be the id of a notification, as the former page gave it in next."
            raise Refused("BadParameter", text, field="before") from None
        page = found[:count]
        more = page[-1].id if len(found) > count else None
        return Answer(200, _encode({"buried": list(map(_receipt_body, page)), "next": more}))

    async def _replay(self, exchange: Exchange, read: Read) -> Answer:
        return await read(exchange, self._replay_those)

    async def _replay_those(self, _: Exchange, body: bytes) -> Answer:
        ids = _parse(body, _Replay).ids
        _check_count("ids", len(ids), MAX_REPLAY)
        return Answer(200, _encode({"replayed": list(await self._relay.replay(ids))}))


_NOT_FINAL = (State.QUEUED, State.SENT)


def _retry_after(seconds: float) -> tuple[tuple[bytes, bytes]]:
    return ((b"retry-after", b"%d" % math.ceil(seconds)),)


def _busy(why: str) -> Problem:
    return Problem(503, "Busy", f"{why}: nothing was taken, try again soon.", headers=_retry_after(_BUSY_S))


# -- the request -----------------------------------------------------------------------------------------------------


def _parse(body: bytes, kind: type[S]) -> S:
    try:
        parsed: S = _DECODE[kind](body)
        return parsed
    except msgspec.ValidationError as error:
        raise _invalid(body, kind, error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, "InvalidJson", _json_complaint(body, error)) from None


def _json_complaint(body: bytes, error: Exception) -> str:
    if not body.strip():
        return "The body is empty: send a JSON object."
    if isinstance(error, RecursionError):
        return "The body is nested too deeply."
    try:
        body.decode()
    except UnicodeDecodeError as broken:
        return f"The body is not UTF-8 (octet {broken.start}): encode it as such."
    if _has_lone_surrogate(body):
        return "The body has a lone surrogate (half of a \\u pair), which is no character: send both halves or none."
    return f"The body is not JSON: {error}."


_has_lone_surrogate = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
).search


def _query(exchange: Exchange, names: Sequence[str]) -> dict[str, str]:
    """The query's parameters; of one that comes twice, the last."""
    if not exchange.query:
        return {}
    parameters = parse_qs(exchange.query.decode("ascii", "replace"), keep_blank_values=True)
    for name in parameters:
        if name not in names:
            text = f"The query may hold {', '.join(names)} only: there is {shown(name)!r}."
            raise Refused("UnknownParameter", text, field=shown(name))
    return {name: values[-1] for name, values in parameters.items()}


def _wait_s(exchange: Exchange, post: _Post) -> float:
    """How long to hold the answer back; the query wins over the body."""
    wait_s = post.wait
    asked = _query(exchange, ("wait",)).get("wait")
    if asked is not None:
        try:
            wait_s = float(asked)
        except ValueError:
            wait_s = math.nan
    if wait_s is None or wait_s == 0:
        return 0.0
    if not 0 < wait_s <= MAX_WAIT_S:
        raise Refused("BadWait", f"wait must be seconds from 0 to {MAX_WAIT_S:.0f}.", field="wait")
    if post.token is None:
        raise Refused("BadWait", "wait goes with a single token: ask for the receipts of many later.", field="wait")
    return wait_s


def _columns(post: _Post) -> _Columns:
    """The request as columns. Raises Refused and Problem."""
    ways = [name for name in ("token", "tokens", "notifications") if getattr(post, name) is not None]
    if len(ways) != 1:
        text = "Send one of token, tokens (one payload for many) and notifications (a payload each)"
        if not ways:
            raise Refused(reasons.MISSING_DEVICE_TOKEN.word, f"{text}: there is none.", field="token")
        raise Refused("AmbiguousRequest", f"{text}, not {' and '.join(ways)}.", field=ways[-1])
    (way,) = ways
    if post.notifications is not None:
        items: list[_Item] = post.notifications
        tokens = [each.token for each in items]
    else:
        items = []
        tokens = [post.token] if post.token is not None else post.tokens or []
    if not tokens:
        raise Refused(reasons.MISSING_DEVICE_TOKEN.word, f"{way} is empty: send one entry at least.", field=way)
    _check_count(way, len(tokens))
    if not items:
        return _Columns((_make_headers(_headers(post)),), tokens, (_make_payload(post),))
    return _Columns(_headers_column(items, post), tokens, _payloads_column(items, post))


def _check_count(name: str, count: int, most: int = MAX_NOTIFICATIONS) -> None:
    if count > most:
        raise Problem(
            413,
            "TooManyNotifications",
            f"{name} has {count} entries and one request takes {most}: send several requests.",
        )


def _headers_column(items: Sequence[_Item], post: _Post) -> Sequence[Headers]:
    defaults = _headers(post)
    own = list(map(_headers, items))
    made = {each: _make_headers(_merge(each, defaults)) for each in set(own)}
    return tuple(made.values()) if len(made) == 1 else [made[each] for each in own]


def _payloads_column(items: Sequence[_Item], post: _Post) -> Sequence[bytes]:
    contents = list(map(_content, items))
    if not post.shorten and contents.count(_NO_CONTENT) == len(items):
        whole = [bytes(each.payload) for each in items if each.payload is not UNSET]
        if len(whole) == len(items):
            return whole
        if not whole:
            return (_make_payload(post),)
    defaults = _content(post)
    shared: bytes | None = None
    payloads: list[bytes] = []
    wrong: list[Refused] = []
    for index, (each, content) in enumerate(zip(items, contents, strict=True)):
        try:
            if each.payload is not UNSET:
                own = content if content[-1] is not None else (*content[:-1], post.shorten)
            elif content == _NO_CONTENT:
                shared = shared or _make_payload(post)
                payloads.append(shared)
                continue
            else:
                own = _merge(content, defaults)
            payloads.append(_make_content(each.payload, own, each.push_type or post.push_type))
        except Refused as refused:
            wrong.append(Refused(refused.reason, refused.detail, index=index, field=refused.field))
    if wrong:
        raise _refusal(wrong, post, len(items))
    return payloads


def _merge(own: tuple[Any, ...], defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    if defaults == _NO_CONTENT:
        return own
    return tuple([default if mine is None else mine for mine, default in zip(own, defaults, strict=True)])


def _make_headers(values: tuple[Any, ...]) -> Headers:
    topic, push_type, priority, expiration, collapse_id, collapse, at_most_once = values
    return Headers(
        topic or "",
        push_type or PushType.ALERT,
        priority,
        expiration,
        collapse_id,
        collapse if collapse_id is None else None,
        bool(at_most_once),
    )


def _make_payload(fields: _Fields) -> bytes:
    return _make_content(fields.payload, _content(fields), fields.push_type)


def _make_content(raw: Raw | UnsetType, content: tuple[Any, ...], push_type: PushType | None) -> bytes:
    """The caller's own payload, octet by octet, or one built of its fields. Raises Refused."""
    push_type = push_type or PushType.ALERT
    shorten = content[-1]
    nothing = content[:-1] == _NO_CONTENT[:-1]
    if raw is not UNSET:
        if not nothing:
            text = "Send either a whole payload or fields to build it of, not both."
            first = next(name for name, value in zip(_CONTENT, content, strict=True) if value is not None)
            raise Refused("AmbiguousRequest", text, field=first)
        return payload.shorten(bytes(raw), payload.limit(push_type)) if shorten else bytes(raw)
    if nothing:
        wanted = {
            PushType.BACKGROUND: "content_available",
            PushType.LIVEACTIVITY: "live_activity",
            PushType.WIDGETS: "content_changed",
            PushType.CONTROLS: "content_changed",
        }.get(push_type, "title or body")
        text = f"There is nothing to send: add {wanted}, or a whole payload."
        raise Refused(reasons.PAYLOAD_EMPTY.word, text, field="payload")
    title, subtitle, body, badge, sound, data = content[:_COMMON]
    rare: dict[str, Any] = {}
    if content[_COMMON:] != _NO_RARE:
        rare = dict(zip(_RARE, content[_COMMON:], strict=True))
    return payload.build(
        title=title, subtitle=subtitle, body=body, badge=badge, sound=sound, data=data, **rare, push_type=push_type
    )


# -- what is wrong with it -------------------------------------------------------------------------------------------

_place = re.compile(r"(?:tokens|notifications)\[(\d+)\]\.?").match
_quoted = re.compile(r"`([^`]*)`")
_JSON_NAMES = {
    "str": "a string",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "object": "an object",
    "array": "an array",
    "null": "null",
}


def _invalid(body: bytes, kind: type[Struct], error: msgspec.ValidationError) -> Problem:
    """What the typed decode disliked: with many notifications, of each of them."""
    first = _field_error(kind, error)
    if first.index is not None and b'"notifications"' in body:
        try:
            members = _decode_members(body).notifications
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            members = []
        _check_count("notifications", len(members))
        complaints = [(index, complaint) for index, raw in enumerate(members) if (complaint := _complaint(raw))]
        if complaints:
            # Words for each would take a second, and are not read.
            told = [_member_error(members[index], index, each) for index, each in complaints[:_MAX_ERRORS]]
            return _many(told, None, len(complaints))
    return _many([first], None)


def _complaint(raw: Raw) -> Exception | None:
    try:
        _decode_item(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return error
    return None


def _member_error(raw: Raw, index: int, complaint: Exception) -> ErrorItem:
    if isinstance(complaint, msgspec.ValidationError):
        return _field_error(_Item, complaint, index)
    return ErrorItem("InvalidJson", _json_complaint(bytes(raw), complaint), index)


def _field_error(kind: type[Struct], error: msgspec.ValidationError, index: int | None = None) -> ErrorItem:
    """The words of msgspec in ours; `index` where it was a member that was decoded, by itself."""
    dislike = dissect(error)
    field = dislike.place
    place = _place(field)
    if place:
        kind = _Item
        index = int(place[1])
        field = field[place.end() :] or ("token" if field.startswith("tokens") else "")
    if dislike.unknown is not None:
        return _unknown(dislike.unknown, kind, field, index)
    if dislike.words.startswith("Invalid enum value"):
        of_push_type = field == "push_type"
        code = reasons.INVALID_PUSH_TYPE.word if of_push_type else "BadEnvironment"
        values: Iterable[str] = PushType if of_push_type else Environment
        return ErrorItem(code, f"{field} must be one of {', '.join(values)}.", index, field)
    plain = _quoted.sub(lambda kinds: " or ".join(_JSON_NAMES.get(k, k) for k in kinds[1].split(" | ")), dislike.words)
    whole = "The body" if index is None else "The entry"
    return ErrorItem("BadType", f"{field or whole}: {plain[:1].lower()}{plain[1:]}.", index, field or None)


def _unknown(name: str, kind: type[Struct], field: str, index: int | None) -> ErrorItem:
    known = _NESTED.get(field, kind).__struct_fields__
    close = closest(name, known)
    if kind is _Item and not field and name in _Post.__struct_fields__:
        hint = "It stands at the top of the request, beside notifications."
    elif close:
        hint = f"Did you mean {close}?"
    elif field or kind is _Replay:
        hint = f"There may be {', '.join(known)}."
    else:
        hint = "The app's own keys go into data, or into a whole payload."
    path = f"{field}.{shown(name)}" if field else shown(name)
    return ErrorItem("UnknownField", f"There is no field {path!r} here. {hint}", index, path)


def _refusal(refused: Sequence[Refused], post: _Post | None, count: int) -> Problem:
    """What admission refused. `index` is left out where the caller sent no list."""
    single = post is None or post.token is not None
    return _many(
        [
            ErrorItem(
                each.reason,
                each.detail,
                # A column of one entry has no place, but the list that it stands for has.
                None if single else 0 if each.index is None and count == 1 else each.index,
                each.field,
            )
            for each in refused
        ],
        count,
    )


def _many(errors: Sequence[ErrorItem], count: int | None, wrong: int | None = None) -> Problem:
    """`wrong`: how many are, where not all of them are among the errors."""
    first = errors[0]
    detail = first.detail
    wrong = wrong or len(errors)
    if wrong > 1:
        of = f" in {count} notifications" if count else ""
        listed = f" The first {_MAX_ERRORS} are listed." if wrong > _MAX_ERRORS else ""
        detail = f"{wrong} things are wrong{of}, so nothing was taken.{listed} The first: {detail}"
    return Problem(400, first.code, detail, errors=errors[:_MAX_ERRORS])


# -- answers ---------------------------------------------------------------------------------------------------------


def _ids_body(batches: Sequence[Batch]) -> bytes:
    """All ids as JSON, in order; ids need no escaping."""
    between = '","'
    parts = [each.id + (between + each.id).join(_PLACES[: len(each)]) for each in batches]
    return ('{"ids":["' + between.join(parts) + '"]}').encode()


def _receipt_body(receipt: Receipt) -> _ReceiptBody:
    return _ReceiptBody(
        receipt.id,
        receipt.app,
        receipt.state.name.lower(),
        receipt.reason,
        200 if receipt.state is State.ACCEPTED else receipt.status,
        _meaning(receipt),
        _rfc3339(receipt.created_at),
        None if receipt.updated_at is None else _rfc3339(receipt.updated_at),
        receipt.attempts,
        None if receipt.next_attempt_at is None else _rfc3339(receipt.next_attempt_at),
        receipt.unique_id,
    )


_MEANINGS = {
    State.QUEUED: "It is waiting to be sent.",
    State.SENT: "It is being sent, once only as asked for, and Apple has not answered yet.",
    State.ACCEPTED: "Apple took it. Whether it reached the device, nobody is told.",
    State.REJECTED: "Apple said no for good.",
    State.EXPIRED: "Its expiration passed before Apple took it, so it is not sent any more.",
    State.CANCELLED: "It was cancelled before it was sent.",
    State.BURIED: "It was given up on, as its time was over. It is kept, and can be replayed.",
    State.UNKNOWN: "It was sent once, as asked for, and the answer never came.",
}


def _meaning(receipt: Receipt) -> str:
    """One sentence or two: what the state and the reason mean, and what to do."""
    meaning = _MEANINGS[receipt.state]
    if receipt.state is State.ACCEPTED or receipt.reason in (None, "TooLate"):
        return meaning
    if receipt.status is not None and receipt.state in (State.BURIED, State.EXPIRED):
        return f"{meaning} Apple's last answer was {receipt.status} {receipt.reason}."
    if receipt.status is not None:
        return f"{meaning} {reasons.find(receipt.reason, receipt.status).meaning}"
    return f"{meaning} The last try failed: {receipt.why or receipt.reason}."


def _rfc3339(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
