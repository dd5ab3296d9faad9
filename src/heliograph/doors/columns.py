"""A body as the columns that `Relay.admit` takes, and what is wrong with its entries.

Nothing is made for each notification but its entries. Payloads that a caller brought stay the octets that they were,
but for alert text that it asks to have shortened.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from msgspec import UNSET, Raw, Struct, UnsetType

from heliograph import payload, reasons
from heliograph.doors import decoding
from heliograph.doors.decoding import Fields, Item, Post
from heliograph.doors.exchange import ErrorItem, Problem
from heliograph.errors import Refused
from heliograph.model import Headers, PushType

_HEADERS = ("topic", "push_type", "priority", "expiration", "collapse_id", "collapse", "at_most_once")
_CONTENT = tuple(name for name in Fields.__struct_fields__ if name not in ("payload", *_HEADERS))
"""What a payload is built of; last, whether it may be shortened."""
_content = attrgetter(*_CONTENT)
_headers = attrgetter(*_HEADERS)
_NO_CONTENT = (None,) * len(_CONTENT)
_COMMON = 6
"""So many of `_CONTENT` are what most notifications are built of."""
_RARE = (*_CONTENT[_COMMON:-1], "shortened")
_NO_RARE = (None,) * len(_RARE)


class Columns(Struct):
    """What `Relay.admit` takes: `headers` and `payloads` with one entry for all or one each."""

    headers: Sequence[Headers]
    tokens: Sequence[str]
    payloads: Sequence[bytes]

    def __repr__(self) -> str:
        return f"<columns of {len(self.tokens)} notifications>"


class Request(Struct):
    """What a POST asks for."""

    post: Post
    columns: Columns
    places: Sequence[int]
    """Where the columns' entries stand in the caller's list."""
    count: int
    """Entries in that list."""
    wrong: list[ErrorItem]
    """What is wrong with those that are not in the columns, which is something with `partial` only."""

    @property
    def single(self) -> bool:
        """Whether one notification is sent by itself, and not in a list."""
        return self.post.token is not None

    def complaints(self, refused: Sequence[Refused]) -> list[ErrorItem]:
        """All that is wrong: what is not in the columns, and what is `refused` of them."""
        told = [ErrorItem(each.reason, each.detail, self._place(each), each.field) for each in refused]
        return sorted(self.wrong + told, key=lambda each: each.index or 0) if self.wrong else told

    def refusal(self, refused: Sequence[Refused]) -> Problem:
        """Nothing of it is taken."""
        return decoding.problem(self.complaints(refused), self.count, all_told=bool(self.post.partial))

    def _place(self, refused: Refused) -> int | None:
        if self.single:
            return None
        if refused.index is None:  # a column of one entry has no place, but the list that it stands for has
            return self.places[0] if len(self.places) == 1 else None
        return self.places[refused.index]


def read(body: bytes) -> Request:
    """The request as columns: of all there is, or with `partial` of what makes sense. Raises Refused and Problem."""
    try:
        post = decoding.parse(body, Post)
    except Problem:
        rest = decoding.leave_out(body)
        if rest is None:
            raise
        return _request(rest.post, rest.places, rest.count, rest.wrong)
    return _request(post, None, None, [])


def _request(post: Post, places: Sequence[int] | None, count: int | None, wrong: list[ErrorItem]) -> Request:
    tokens = _tokens(post)
    if places is None or count is None:
        count = len(tokens)
        places = range(count)
    items = post.notifications
    if items is None:
        columns = Columns((_make_headers(_headers(post)),), tokens, (_make_payload(post),))
        return Request(post, columns, places, count, wrong)
    payloads, refused = _payloads_column(items, post)
    request = Request(post, Columns(_headers_column(items, post), tokens, payloads), places, count, wrong)
    if not refused:
        return request
    if not post.partial or not payloads:
        raise request.refusal(refused)
    out = {each.index for each in refused}
    good = [index for index in range(len(items)) if index not in out]
    columns = Columns(
        _headers_column([items[index] for index in good], post), [tokens[index] for index in good], payloads
    )
    return Request(post, columns, [places[index] for index in good], count, request.complaints(refused))


def _tokens(post: Post) -> Sequence[str]:
    ways = [name for name in ("token", "tokens", "notifications") if getattr(post, name) is not None]
    if len(ways) != 1:
        text = "Send one of token, tokens (one payload for many) and notifications (a payload each)"
        if not ways:
            raise Refused(reasons.MISSING_DEVICE_TOKEN.word, f"{text}: there is none.", field="token")
        raise Refused("AmbiguousRequest", f"{text}, not {' and '.join(ways)}.", field=ways[-1])
    (way,) = ways
    if post.token is not None:
        if post.partial:
            text = "partial goes with tokens or notifications: a single token is taken or refused."
            raise Refused("AmbiguousRequest", text, field="partial")
        return [post.token]
    tokens = post.tokens if post.notifications is None else [each.token for each in post.notifications]
    if not tokens:
        raise Refused(reasons.MISSING_DEVICE_TOKEN.word, f"{way} is empty: send one entry at least.", field=way)
    decoding.check_count(way, len(tokens))
    return tokens


def _headers_column(items: Sequence[Item], post: Post) -> Sequence[Headers]:
    defaults = _headers(post)
    own = list(map(_headers, items))
    made = {each: _make_headers(_merge(each, defaults)) for each in set(own)}
    return tuple(made.values()) if len(made) == 1 else [made[each] for each in own]


def _payloads_column(items: Sequence[Item], post: Post) -> tuple[Sequence[bytes], Sequence[Refused]]:
    """Without those that are refused."""
    contents = list(map(_content, items))
    if not post.shorten and contents.count(_NO_CONTENT) == len(items):
        whole = [bytes(each.payload) for each in items if each.payload is not UNSET]
        if len(whole) == len(items):
            return whole, ()
        if not whole:
            return (_make_payload(post),), ()
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
    return payloads, wrong


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


def _make_payload(fields: Fields) -> bytes:
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
