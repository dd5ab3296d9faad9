"""The HTTP API: JSON in, ids and receipts out. ASGI.

The way of a request: `_Request.body` reads it within bounds, one typed decode turns it into structs, `_columns` turns
these into the columns that `Relay.admit` takes. Nothing is made for each notification but its struct and its entries.
Payloads that a caller brought stay the octets that they were.

What is refused is told as problem+json (RFC 9457), `errors` beside it with one entry for each thing that is wrong.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from difflib import get_close_matches
from operator import attrgetter
from typing import Any
from urllib.parse import parse_qs

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from heliograph import payload, reasons
from heliograph.errors import Overloaded, Refused, StoreError
from heliograph.model import MAX_BATCH, Batch, Environment, Headers, PushType, Receipt, State
from heliograph.relay import Relay

PATH = "/v1/notifications"

MAX_NOTIFICATIONS = 10_000
"""Notifications in one request, at most."""

MAX_BODY_BYTES = 8 * 1024 * 1024
"""Octets of a request's body, at most."""

MAX_WAIT_S = 30.0
"""How long a caller may have its answer held back until the outcome is known."""

_MAX_ERRORS = 100
"""Errors told in one answer; a caller that got everything wrong learns no more from the thousandth."""
_STORE_RETRY_S = 5

_PLACES = [f"{place:04x}" for place in range(1, MAX_BATCH + 1)]
"""The last four digits of the ids in a batch (see `model.Batch.id`)."""


class _Fields(Struct, forbid_unknown_fields=True):
    """What a notification may say of itself. Null is the same as nothing."""

    payload: Raw | UnsetType = UNSET
    title: str | None = None
    subtitle: str | None = None
    body: str | None = None
    badge: int | None = None
    sound: str | None = None
    thread_id: str | None = None
    category: str | None = None
    content_available: bool | None = None
    mutable_content: bool | None = None
    interruption_level: str | None = None
    relevance_score: float | None = None
    data: dict[str, Raw] | None = None
    topic: str | None = None
    push_type: PushType | None = None
    priority: int | None = None
    expiration: int | None = None
    collapse_id: str | None = None


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


_CONTENT = (
    *("title", "subtitle", "body", "badge", "sound", "thread_id", "category"),
    *("content_available", "mutable_content", "interruption_level", "relevance_score", "data"),
)
_HEADERS = ("topic", "push_type", "priority", "expiration", "collapse_id")
_content = attrgetter(*_CONTENT)
_headers = attrgetter(*_HEADERS)
_NO_CONTENT = (None,) * len(_CONTENT)
_NO_HEADERS = (None,) * len(_HEADERS)

_decode_post = msgspec.json.Decoder(_Post).decode
_decode_item = msgspec.json.Decoder(_Item).decode
_encode = msgspec.json.encode


class _OnlyMembers(Struct):
    notifications: list[Raw]


_decode_members = msgspec.json.Decoder(_OnlyMembers).decode


class _Columns(Struct):
    """What `Relay.admit` takes: `headers` and `payloads` with one entry for all or one each."""

    headers: Sequence[Headers]
    tokens: Sequence[str]
    payloads: Sequence[bytes]


class _ErrorItem(Struct, omit_defaults=True):
    code: str
    detail: str
    index: int | None = None
    field: str | None = None


class _Problem(Exception):
    """An answer that says what is wrong."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        errors: Sequence[_ErrorItem] = (),
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = errors
        self.headers = headers


class _Answer(Struct):
    status: int
    body: bytes
    headers: Sequence[tuple[bytes, bytes]] = ()


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


class _Gone(Exception):
    """The caller hung up before its request was whole."""


_Handler = Callable[[Scope, Receive], Awaitable[_Answer]]


class Api:
    """The door. `routes` are for the ASGI app that it becomes a part of."""

    def __init__(self, relay: Relay, apps: Collection[str], key: bytes) -> None:
        """`apps` are the names of all apps; `key` is what callers must show as `Authorization: Bearer <key>`."""
        self._relay = relay
        self._only_app = next(iter(apps)) if len(apps) == 1 else None
        self._key = key
        self._waits: set[asyncio.Timeout] = set()
        self._hurrying = False
        self.routes = [
            Route(PATH, _Endpoint({"POST": self._post}, self._key)),
            Route(PATH + "/{id}", _Endpoint({"GET": self._get, "HEAD": self._get}, self._key)),
        ]

    def hurry(self) -> None:
        """Answer those who wait for an outcome with what is known: the server is stopping."""
        self._hurrying = True
        now = asyncio.get_running_loop().time()
        for wait in self._waits:
            if (wait.when() or now) > now:  # one that ran out already can no longer be moved
                wait.reschedule(now)

    async def _post(self, scope: Scope, receive: Receive) -> _Answer:
        post = _parse(await _body(scope, receive))
        wait_s = _wait_s(scope, post)
        columns = _columns(post)
        app = self._only_app if post.app is None else post.app
        if app is None:
            raise Refused("MissingApp", "Say which app: there is more than one here, or none yet.", field="app")
        relay = self._relay
        admitted = await relay.admit(app, post.environment, columns.headers, columns.tokens, columns.payloads)
        if admitted.refused:
            raise _refusal(admitted.refused, post, len(columns.tokens))
        await relay.enqueue(admitted.batches)
        if post.token is None:
            return _Answer(202, _ids_body(admitted.batches))
        notification_id = admitted.batches[0].id + _PLACES[0]
        receipt = await self._outcome(notification_id, wait_s) if wait_s else None
        where = f"{PATH}/{notification_id}"
        headers = ((b"location", where.encode()),)
        if receipt is None:
            return _Answer(202, _encode({"id": notification_id, "receipt": where}), headers)
        return _Answer(202 if receipt.state is State.QUEUED else 200, _receipt_body(receipt), headers)

    async def _outcome(self, notification_id: str, wait_s: float) -> Receipt | None:
        """The receipt as it is after the wait. None where it cannot be read: what was taken is taken all the same."""
        wait = asyncio.timeout(0 if self._hurrying else wait_s)
        self._waits.add(wait)
        try:
            try:
                async with wait:
                    return await self._relay.receipt(notification_id, wait_s)
            except TimeoutError:
                return (await self._relay.receipts([notification_id]))[0]
        except StoreError:
            return None
        finally:
            self._waits.discard(wait)

    async def _get(self, scope: Scope, receive: Receive) -> _Answer:  # noqa: ARG002 - a GET has no body
        (receipt,) = await self._relay.receipts([scope["path_params"]["id"]])
        if receipt is None:
            raise _Problem(404, "UnknownNotification", "No notification with this id was ever taken here.")
        return _Answer(200, _receipt_body(receipt))


class _Endpoint:
    """One path as an ASGI app: asks for the key, finds the handler, says what went wrong."""

    def __init__(self, handlers: Mapping[str, _Handler], key: bytes) -> None:
        self._handlers = handlers
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await self._answer(scope, receive)
        except Refused as refused:
            answer = _problem_answer(_refusal([refused], None, 1))
        except _Problem as problem:
            answer = _problem_answer(problem)
        except Overloaded as error:
            retry = ((b"retry-after", b"%d" % math.ceil(error.retry_after_s)),)
            answer = _problem_answer(_Problem(429, "Overloaded", str(error), headers=retry))
        except StoreError as error:
            retry = ((b"retry-after", b"%d" % _STORE_RETRY_S),)
            answer = _problem_answer(_Problem(503, "StoreUnavailable", str(error), headers=retry))
        except _Gone:
            return
        await _send(send, answer)

    async def _answer(self, scope: Scope, receive: Receive) -> _Answer:
        headers = dict(scope["headers"])
        scheme, _, shown = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(shown.strip(), self._key):
            wrong = "is not the one of this server" if shown else "is missing"
            raise _Problem(
                401,
                "Unauthorized",
                f"The API key {wrong}: send it as `Authorization: Bearer hg_...`. "
                "The server keeps it in the file api-key of its data folder, unless told otherwise.",
                headers=((b"www-authenticate", b"Bearer"),),
            )
        handler = self._handlers.get(scope["method"])
        if handler is None:
            allowed = ", ".join(self._handlers)
            raise _Problem(
                405,
                "MethodNotAllowed",
                f"This path takes {allowed} only.",
                headers=((b"allow", allowed.encode()),),
            )
        return await handler(scope, receive)


def problem_response(status: int, code: str, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """A problem of the app that this door is a part of, in the same form."""
    answer = _problem_answer(_Problem(status, code, detail))
    return Response(answer.body, status, {"content-type": "application/problem+json", **(headers or {})})


# -- the request -----------------------------------------------------------------------------------------------------


async def _body(scope: Scope, receive: Receive) -> bytes:
    headers = dict(scope["headers"])
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise _Problem(415, "UnsupportedEncoding", "Send the body as it is, without Content-Encoding.")
    announced = headers.get(b"content-length", b"")
    if announced.isdigit() and int(announced[:20]) > MAX_BODY_BYTES:
        raise _too_long()
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise _too_long()
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _too_long() -> _Problem:
    return _Problem(
        413,
        "RequestTooLarge",
        f"The body is longer than {MAX_BODY_BYTES} octets: send the notifications in several requests.",
    )


def _parse(body: bytes) -> _Post:
    try:
        return _decode_post(body)
    except msgspec.ValidationError as error:
        raise _invalid(body, error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _Problem(400, "InvalidJson", _json_complaint(body, error)) from None


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


def _wait_s(scope: Scope, post: _Post) -> float:
    """How long to hold the answer back; the query wins over the body."""
    wait_s = post.wait
    for name, values in parse_qs(scope["query_string"].decode("ascii", "replace"), keep_blank_values=True).items():
        if name != "wait":
            raise Refused(
                "UnknownParameter", "The query may hold wait only: the rest goes into the body.", field="wait"
            )
        try:
            wait_s = float(values[-1])
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
    """The request as columns. Raises Refused and _Problem."""
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
    if len(tokens) > MAX_NOTIFICATIONS:
        raise _Problem(
            413,
            "TooManyNotifications",
            f"{way} has {len(tokens)} entries and one request takes {MAX_NOTIFICATIONS}: send several requests.",
        )
    if not items:
        return _Columns((_make_headers(_headers(post)),), tokens, (_make_payload(post),))
    return _Columns(_headers_column(items, post), tokens, _payloads_column(items, post))


def _headers_column(items: Sequence[_Item], post: _Post) -> Sequence[Headers]:
    defaults = _headers(post)
    own = list(map(_headers, items))
    made = {each: _make_headers(_merge(each, defaults)) for each in set(own)}
    return tuple(made.values()) if len(made) == 1 else [made[each] for each in own]


def _payloads_column(items: Sequence[_Item], post: _Post) -> Sequence[bytes]:
    contents = list(map(_content, items))
    if contents.count(_NO_CONTENT) == len(items):
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
            if each.payload is UNSET and content == _NO_CONTENT:
                if shared is None:
                    shared = _make_payload(post)
                payloads.append(shared)
            else:
                content = content if each.payload is not UNSET else _merge(content, defaults)  # noqa: PLW2901
                payloads.append(_make_content(each.payload, content, each.push_type or post.push_type))
        except Refused as refused:
            wrong.append(Refused(refused.reason, refused.detail, index=index, field=refused.field))
    if wrong:
        raise _refusal(wrong, post, len(items))
    return payloads


def _merge(own: tuple[Any, ...], defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(default if mine is None else mine for mine, default in zip(own, defaults, strict=True))


def _make_headers(values: tuple[Any, ...]) -> Headers:
    topic, push_type, priority, expiration, collapse_id = values
    return Headers(topic or "", push_type or PushType.ALERT, priority, expiration, collapse_id)


def _make_payload(fields: _Fields) -> bytes:
    return _make_content(fields.payload, _content(fields), fields.push_type)


def _make_content(raw: Raw | UnsetType, content: tuple[Any, ...], push_type: PushType | None) -> bytes:
    """The caller's own payload, octet by octet, or one built of its fields. Raises Refused."""
    given = {name: value for name, value in zip(_CONTENT, content, strict=True) if value is not None}
    if raw is not UNSET:
        if given:
            text = "Send either a whole payload or fields to build it of, not both."
            raise Refused("AmbiguousRequest", text, field=next(iter(given)))
        return bytes(raw)
    if not given:
        text = "There is nothing to send: add title or body, or a whole payload."
        raise Refused(reasons.PAYLOAD_EMPTY.word, text, field="payload")
    return payload.build(**given, push_type=push_type or PushType.ALERT)


# -- what is wrong with it -------------------------------------------------------------------------------------------

_place = re.compile(r"(?:tokens|notifications)\[(\d+)\]\.?").match
_complaint = re.compile(r"(.*?)(?: - at `\$\.?(.*)`)?", re.DOTALL).fullmatch
_unknown_field = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL).fullmatch
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


def _invalid(body: bytes, error: msgspec.ValidationError) -> _Problem:
    """What the typed decode disliked: with many notifications, of each of them."""
    found = [_field_error(error)]
    if found[0].index is not None and b'"notifications"' in body:
        try:
            members = _decode_members(body).notifications
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            members = []
        found = list(_member_errors(members)) or found
    return _many(found, None)


def _member_errors(members: Sequence[Raw]) -> Iterator[_ErrorItem]:
    for index, raw in enumerate(members):
        try:
            _decode_item(raw)
        except msgspec.ValidationError as error:
            yield _field_error(error, index)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            yield _ErrorItem("InvalidJson", _json_complaint(bytes(raw), error), index)


def _field_error(error: msgspec.ValidationError, index: int | None = None) -> _ErrorItem:
    """The words of msgspec in ours; `index` where it was a member that was decoded, by itself."""
    match = _complaint(str(error))
    assert match is not None
    text, field = match[1], match[2] or ""
    place = _place(field)
    if place:
        index = int(place[1])
        field = field[place.end() :] or ("token" if field.startswith("tokens") else "")
    unknown = _unknown_field(text)
    if unknown:
        return _unknown(unknown[1], index)
    if "enum value" in text:
        of_push_type = field == "push_type"
        code = reasons.INVALID_PUSH_TYPE.word if of_push_type else "BadEnvironment"
        values: Iterable[str] = PushType if of_push_type else Environment
        return _ErrorItem(code, f"{field} must be one of {', '.join(values)}.", index, field)
    plain = _quoted.sub(lambda kinds: " or ".join(_JSON_NAMES.get(k, k) for k in kinds[1].split(" | ")), text)
    whole = "The body" if index is None else "The entry"
    return _ErrorItem("BadType", f"{field or whole}: {plain[:1].lower()}{plain[1:]}.", index, field or None)


def _unknown(name: str, index: int | None) -> _ErrorItem:
    shown = name if len(name) <= 64 else f"{name[:61]}..."
    known = (_Post if index is None else _Item).__struct_fields__
    if index is not None and name in _Post.__struct_fields__:
        hint = "It stands at the top of the request, beside notifications."
    else:
        close = get_close_matches(name.lower(), known, n=1)
        hint = f"Did you mean {close[0]}?" if close else "The app's own keys go into data, or into a whole payload."
    return _ErrorItem("UnknownField", f"There is no field {shown!r} here. {hint}", index, shown)


def _refusal(refused: Sequence[Refused], post: _Post | None, count: int) -> _Problem:
    """What admission refused. `index` is left out where the caller sent no list."""
    single = post is None or post.token is not None
    return _many(
        [
            _ErrorItem(
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


def _many(errors: Sequence[_ErrorItem], count: int | None) -> _Problem:
    first = errors[0]
    detail = first.detail
    if len(errors) > 1:
        of = f" in {count} notifications" if count else ""
        listed = f" The first {_MAX_ERRORS} are listed." if len(errors) > _MAX_ERRORS else ""
        detail = f"{len(errors)} things are wrong{of}, so nothing was taken.{listed} The first: {detail}"
    return _Problem(400, first.code, detail, errors=errors[:_MAX_ERRORS])


# -- answers ---------------------------------------------------------------------------------------------------------

_word = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def _problem_answer(problem: _Problem) -> _Answer:
    title = _word.sub(" ", problem.code).capitalize()
    body = {
        "type": f"/docs/errors#{_word.sub('-', problem.code).lower()}",
        "title": title,
        "status": problem.status,
        "detail": problem.detail,
        "code": problem.code,
    }
    if problem.errors:
        body["errors"] = problem.errors
    return _Answer(problem.status, _encode(body), ((b"content-type", b"application/problem+json"), *problem.headers))


async def _send(send: Send, answer: _Answer) -> None:
    headers = [(b"content-length", b"%d" % len(answer.body)), *answer.headers]
    if not any(name == b"content-type" for name, _ in answer.headers):
        headers.append((b"content-type", b"application/json"))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


def _ids_body(batches: Sequence[Batch]) -> bytes:
    """All ids as JSON, in order; ids need no escaping."""
    between = '","'
    parts = [each.id + (between + each.id).join(_PLACES[: len(each)]) for each in batches]
    return ('{"ids":["' + between.join(parts) + '"]}').encode()


def _receipt_body(receipt: Receipt) -> bytes:
    return _encode(
        _ReceiptBody(
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
    )


_MEANINGS = {
    State.QUEUED: "It is waiting to be sent.",
    State.ACCEPTED: "Apple took it. Whether it reached the device, nobody is told.",
    State.REJECTED: "Apple said no for good.",
    State.EXPIRED: "Its expiration passed before Apple took it, so it is not sent any more.",
    State.CANCELLED: "It was cancelled before it was sent.",
    State.BURIED: "It was given up on after many tries; it is kept.",
    State.UNKNOWN: "It was sent once, as asked for, and the answer never came.",
}


def _meaning(receipt: Receipt) -> str:
    """One sentence or two: what the state and the reason mean, and what to do."""
    meaning = _MEANINGS[receipt.state]
    if receipt.state is State.ACCEPTED or receipt.reason is None:
        return meaning
    if receipt.status is not None:
        return f"{meaning} {reasons.find(receipt.reason, receipt.status).meaning}"
    return f"{meaning} The last try failed: {receipt.why or receipt.reason}."


def _rfc3339(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
