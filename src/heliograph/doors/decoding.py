"""What callers send: JSON as structs, structs as the columns that `Relay.admit` takes, and what is wrong with them.

One typed decode reads a body. Nothing is made for each notification but its struct and its entries. Payloads that a
caller brought stay the octets that they were, but for alert text that it asks to have shortened.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from heliograph import payload, reasons
from heliograph.doors.exchange import ErrorItem, Problem, closest, dissect, shown
from heliograph.errors import Refused
from heliograph.model import Environment, Headers, PushType
from heliograph.payload import CriticalSound, LiveActivity, Localized

S = TypeVar("S", bound=Struct)

MAX_NOTIFICATIONS = 10_000
"""Notifications in one request, at most."""

_MAX_ERRORS = 100
"""Errors told in one answer; a caller that got everything wrong learns no more from the thousandth."""


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


class Post(_Fields):
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


class Replay(Struct, forbid_unknown_fields=True):
    """The body of a POST to `REPLAY_PATH`."""

    ids: list[str]


_DECODE: dict[type[Struct], Callable[[bytes], Any]] = {
    Post: msgspec.json.Decoder(Post).decode,
    Replay: msgspec.json.Decoder(Replay).decode,
}


class _OnlyMembers(Struct):
    notifications: list[Raw]


_decode_members = msgspec.json.Decoder(_OnlyMembers).decode


class Columns(Struct):
    """What `Relay.admit` takes: `headers` and `payloads` with one entry for all or one each."""

    headers: Sequence[Headers]
    tokens: Sequence[str]
    payloads: Sequence[bytes]

    def __repr__(self) -> str:
        return f"<columns of {len(self.tokens)} notifications>"


def parse(body: bytes, kind: type[S]) -> S:
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


def columns(post: Post) -> Columns:
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
    check_count(way, len(tokens))
    if not items:
        return Columns((_make_headers(_headers(post)),), tokens, (_make_payload(post),))
    return Columns(_headers_column(items, post), tokens, _payloads_column(items, post))


def check_count(name: str, count: int, most: int = MAX_NOTIFICATIONS) -> None:
    if count > most:
        raise Problem(
            413,
            "TooManyNotifications",
            f"{name} has {count} entries and one request takes {most}: send several requests.",
        )


def _headers_column(items: Sequence[_Item], post: Post) -> Sequence[Headers]:
    defaults = _headers(post)
    own = list(map(_headers, items))
    made = {each: _make_headers(_merge(each, defaults)) for each in set(own)}
    return tuple(made.values()) if len(made) == 1 else [made[each] for each in own]


def _payloads_column(items: Sequence[_Item], post: Post) -> Sequence[bytes]:
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
        raise refusal(wrong, post, len(items))
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
        check_count("notifications", len(members))
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
    if kind is _Item and not field and name in Post.__struct_fields__:
        hint = "It stands at the top of the request, beside notifications."
    elif close:
        hint = f"Did you mean {close}?"
    elif field or kind is Replay:
        hint = f"There may be {', '.join(known)}."
    else:
        hint = "The app's own keys go into data, or into a whole payload."
    path = f"{field}.{shown(name)}" if field else shown(name)
    return ErrorItem("UnknownField", f"There is no field {path!r} here. {hint}", index, path)


def refusal(refused: Sequence[Refused], post: Post | None, count: int) -> Problem:
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
