"""What callers send: JSON as structs, and what is wrong with it.

One typed decode reads a body. It stops at the first thing that it dislikes; only then each field, and each member of a
list, is looked at by itself, so that callers learn of all of it at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType
from msgspec.structs import asdict

from heliograph import reasons
from heliograph.complaints import closest, dissect, sandbox_hint, shown
from heliograph.doors.exchange import ErrorItem, Problem
from heliograph.errors import Refused
from heliograph.model import Environment, PushType
from heliograph.payload import CriticalSound, LiveActivity, Localized

S = TypeVar("S", bound=Struct)

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What reading JSON raises, whatever the octets are."""

MAX_NOTIFICATIONS = 10_000
"""Notifications in one request, at most."""

_MAX_ERRORS = 100
"""Errors told in one answer, unless all are wanted; a caller that got everything wrong learns no more from the
thousandth. Up to so many are looked for field by field, with a guess at what was meant; beyond, one an entry."""

_SHORT = 64 * 1024
"""Octets of an object that cannot have very many fields."""


class _LiveActivity(LiveActivity, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What starts, updates or ends a Live Activity. All times are UNIX seconds.

    What the app decodes stays the octets that it is.
    """

    content_state: dict[str, Raw] | None = None
    attributes: dict[str, Raw] | None = None


class Fields(Struct, forbid_unknown_fields=True):
    """What a notification may say of itself. Null is the same as nothing."""

    payload: Raw | UnsetType = UNSET
    """The whole payload, which is sent octet by octet as it stands here. In place of it there may be the fields from
    `title` to `live_activity`, of which one is built."""
    title: str | Localized | None = None
    """The alert's title."""
    subtitle: str | Localized | None = None
    """The alert's subtitle."""
    body: str | Localized | None = None
    """The alert's text."""
    badge: int | None = None
    """The number at the app's icon; 0 takes it away."""
    sound: str | CriticalSound | None = None
    """A sound file of the app, or `default`; for a critical alert an object."""
    data: dict[str, Raw] | None = None
    """The app's own keys, which go beside `aps` and keep their spelling."""
    launch_image: str | None = None
    """The alert's `launch-image`."""
    action: str | None = None
    """The label of the alert's button, in Safari."""
    thread_id: str | None = None
    """What groups notifications on the device."""
    category: str | None = None
    """Names the actions that the app has for this notification."""
    content_available: bool | None = None
    """Wakes the app in the background. A background push needs it."""
    mutable_content: bool | None = None
    """Has the app's service extension see the notification first, and change it."""
    interruption_level: str | None = None
    """How much it disturbs."""
    relevance_score: float | None = None
    """Which of the app's notifications comes first in a summary: 0 to 1. It only puts Live Activities in order."""
    target_content_id: str | None = None
    """Which of the app's windows to bring forward."""
    filter_criteria: str | None = None
    """Whether a Focus shows it, as the app decides by this."""
    url_args: list[str] | None = None
    """Fill the places in the website's URL, in Safari."""
    content_changed: bool | None = None
    """With push types `widgets` and `controls`: have them drawn anew."""
    live_activity: _LiveActivity | None = None
    """With push type `liveactivity`: what to show."""
    shorten: bool | None = None
    """Cut alert text that makes the payload too long, instead of refusing it: the body first, then the subtitle, then
    the title, each with an ellipsis at its end."""
    topic: str | None = None
    """Default: the app's only topic, with the suffix that the push type needs."""
    push_type: PushType | None = None
    """Default: `alert`."""
    priority: int | None = None
    """Default: 10, and 5 for a background push."""
    expiration: int | None = None
    """UNIX seconds after which it is not sent any more; 0 tries once."""
    collapse_id: str | None = None
    """What it replaces on the device: an earlier one of the same id, at most 64 octets. An alert without one gets its
    own id, so that a duplicate after a crash replaces itself."""
    collapse: bool | None = None
    """false: an alert without a `collapse_id` goes without; true: other push types get their own id too."""
    at_most_once: bool | None = None
    """It is never sent again where Apple may have acted on it. If the answer is lost it ends as `unknown`, instead of
    being sent twice."""

    def __repr__(self) -> str:
        return "<what a caller wants sent>"


class Item(Fields):
    """A member of `notifications`."""

    token: str = ""
    """The device token, as hex digits."""


class _Common(Fields):
    """What stands at the top of a POST, but for its lists."""

    app: str | None = None
    """Which app. It may be left out where there is one only."""
    environment: Environment | None = None
    """It may be left out where the app has one only."""
    token: str | None = None
    """A device token, as hex digits. Send exactly one of `token`, `tokens` and `notifications`."""
    wait: float | None = None
    """With `token`: hold the answer back until the outcome is known, for so many seconds at most."""
    partial: bool | None = None
    """With `tokens` or `notifications`: take those that are good, and tell what is wrong with the rest."""


class Post(_Common):
    """What to send, and to whom. Null is the same as nothing, but for `payload`."""

    tokens: list[str] | None = None
    """Device tokens, which all get the same."""
    notifications: list[Item] | None = None
    """Notifications of their own. What they do not say is as it stands beside."""


class _Unread(_Common):
    """Such a body with lists that are still to be read."""

    tokens: list[Raw] | None = None
    notifications: list[Raw] | None = None


_NESTED: dict[str, type[Struct]] = {
    **dict.fromkeys(("title", "subtitle", "body"), Localized),
    "sound": CriticalSound,
    "live_activity": LiveActivity,
}

_LISTS = ("tokens", "notifications")
_decode_item = msgspec.json.Decoder(Item).decode
_decode_token = msgspec.json.Decoder(str).decode
_decode_unread = msgspec.json.Decoder(_Unread).decode
_decode_object = msgspec.json.Decoder(dict[str, Raw]).decode
_decode_list = msgspec.json.Decoder(list[Raw] | None).decode


class Ids(Struct, forbid_unknown_fields=True):
    """Ids of notifications, to be replayed or cancelled."""

    ids: list[str]
    """Ids of notifications."""


class _Wait(Struct):
    wait: float | None = None


_decode_wait = msgspec.json.Decoder(_Wait).decode
_DECODE: dict[type[Struct], Callable[[bytes], Any]] = {
    Post: msgspec.json.Decoder(Post).decode,
    Ids: msgspec.json.Decoder(Ids).decode,
}
_DECODE_MEMBER: dict[str, Callable[[Raw], Any]] = {"tokens": _decode_token, "notifications": _decode_item}


@cache
def _decoders(kind: type[Struct]) -> dict[str, Callable[[Raw], Any]]:
    """By field."""
    return {field.name: msgspec.json.Decoder(field.type).decode for field in msgspec.structs.fields(kind)}


@cache
def _decode_known(kind: type[Struct]) -> Callable[[bytes | Raw], Struct]:
    """Of any object the fields that `kind` has, unread."""
    fields = [(field.name, Raw | UnsetType, UNSET) for field in msgspec.structs.fields(kind)]
    return msgspec.json.Decoder(msgspec.defstruct(f"Unread{kind.__name__}", fields)).decode


class Rest(Struct):
    """What is left of a body."""

    post: Post
    places: Sequence[int]
    """Where the members of its list stood."""
    count: int
    """How many there were."""
    wrong: list[ErrorItem]
    """With those that are no longer there."""


def parse(body: bytes, kind: type[S]) -> S:
    """The body as it should be. Raises Problem."""
    try:
        parsed: S = _DECODE[kind](body)
        return parsed
    except msgspec.ValidationError as error:
        raise _invalid(body, kind, error) from None
    except UNREADABLE as error:
        raise Problem(400, "InvalidJson", _json_complaint(body, error)) from None


def read_wait(body: bytes) -> float | None:
    """The `wait` of a body that was read before."""
    return _decode_wait(body).wait


def leave_out(body: bytes) -> Rest | None:
    """What is left of a POST without the members that cannot be read, for a caller who wants what is good taken.

    None where it does not, or where more is wrong with the body. Raises Problem where nothing is left.
    """
    try:
        unread = _decode_unread(body)
    except UNREADABLE:
        return None
    lists = {name: members for name in _LISTS if (members := getattr(unread, name)) is not None}
    if not unread.partial or len(lists) != 1:
        return None
    ((name, members),) = lists.items()
    check_count(name, len(members))
    good: list[Any] = []
    places: list[int] = []
    wrong: list[ErrorItem] = []
    for index, member in enumerate(members):
        try:
            good.append(_DECODE_MEMBER[name](member))
            places.append(index)
        except UNREADABLE as error:
            _judge_member(name, member, error, wrong, index)
    if not good:
        raise problem(wrong, len(members), all_told=True)
    said = {field: getattr(unread, field) for field in _Common.__struct_fields__}
    return Rest(Post(**said | {name: good}), places, len(members), wrong)


def _json_complaint(body: bytes, error: Exception) -> str:
    if not body.strip():
        return "The body is empty: send a JSON object."
    if isinstance(error, RecursionError):
        return "The body is nested too deeply."
    try:
        body.decode()
    except UnicodeDecodeError as broken:
        return f"The body is not UTF-8 (octet {broken.start}): encode it as such."
    if _is_form(body):
        return "The body is a form, and forms are not taken: send a JSON object."
    if _has_lone_surrogate(body):
        return "The body has a lone surrogate (half of a \\u pair), which is no character: send both halves or none."
    return f"The body is not JSON: {error}."


_has_lone_surrogate = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
).search


_is_form = re.compile(rb"[\w.%+\[\]-]+=|--[^\r\n]+\r?\nContent-Disposition:", re.IGNORECASE).match
"""As curl -d and curl -F send."""


def check_count(name: str, count: int, most: int = MAX_NOTIFICATIONS) -> None:
    if count > most:
        raise Problem(
            413,
            "TooManyNotifications",
            f"{name} has {count} entries and one request takes {most}: send several requests.",
        )


# -- what is wrong with it -------------------------------------------------------------------------------------------

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
    wrong: list[ErrorItem] = []
    _judge(body, kind, error, wrong, None)
    return problem(wrong, None)


def _judge(
    octets: bytes | Raw, kind: type[Struct], error: Exception, wrong: list[ErrorItem], index: int | None
) -> None:
    """Add all that is wrong with an object; `error` is what the decode of the whole said."""
    before = len(wrong)
    fields: dict[str, Raw] = {}
    try:
        if before < _MAX_ERRORS:
            fields = _fields(octets, kind)
    except msgspec.ValidationError:  # it is no object
        pass
    except UNREADABLE as worse:  # the decode of the whole did not come so far
        error = worse
    for name, value in fields.items():
        if kind is Post and name in _LISTS:
            _judge_list(name, value, wrong)
            continue
        guess = len(wrong) < _MAX_ERRORS
        decode = _decoders(kind).get(name)
        if decode is None:
            wrong.append(_unknown(name, kind, "", index, guess=guess))
        else:
            try:
                decode(value)
            except UNREADABLE as dislike:
                wrong.append(_complaint(value, kind, dislike, index, name, guess=guess))
    if len(wrong) == before:
        wrong.append(_complaint(octets, kind, error, index, "", guess=before < _MAX_ERRORS))


def _fields(octets: bytes | Raw, kind: type[Struct]) -> dict[str, Raw]:
    """What an object has, by field; where that may be very much, what it may have. Raises what decoding raises."""
    if len(bytes(octets)) <= _SHORT:
        return _decode_object(octets)
    return {name: value for name, value in asdict(_decode_known(kind)(octets)).items() if value is not UNSET}


def _judge_list(name: str, octets: Raw, wrong: list[ErrorItem]) -> None:
    try:
        members = _decode_list(octets) or ()
    except UNREADABLE as error:
        wrong.append(_complaint(octets, Post, error, None, name, guess=True))
        return
    check_count(name, len(members))
    for index, member in enumerate(members):
        try:
            _DECODE_MEMBER[name](member)
        except UNREADABLE as error:
            _judge_member(name, member, error, wrong, index)


def _judge_member(name: str, member: Raw, error: Exception, wrong: list[ErrorItem], index: int) -> None:
    if name == "tokens":
        wrong.append(_complaint(member, Item, error, index, "token", guess=True))
    else:
        _judge(member, Item, error, wrong, index)


def _complaint(
    octets: bytes | Raw, kind: type[Struct], error: Exception, index: int | None, field: str, *, guess: bool
) -> ErrorItem:
    """The words of msgspec in ours; `field`: which one the octets are of, empty where they are the whole."""
    if not isinstance(error, msgspec.ValidationError):
        return ErrorItem("InvalidJson", _json_complaint(bytes(octets), error), index, field or None)
    dislike = dissect(error)
    # Where the caller's own words are told, they may look like a place. Of a field by itself none is told then.
    at = field or dislike.place
    if dislike.unknown is not None:
        return _unknown(dislike.unknown, kind, at, index, guess=guess)
    if dislike.words.startswith("Invalid enum value"):
        of_push_type = at.endswith("push_type")
        code = reasons.INVALID_PUSH_TYPE.word if of_push_type else "BadEnvironment"
        values: Iterable[str] = PushType if of_push_type else Environment
        return ErrorItem(code, f"{at} must be one of {', '.join(values)}.{sandbox_hint(dislike)}", index, at)
    if field and dislike.place:
        at = f"{field}{'' if dislike.place.startswith('[') else '.'}{dislike.place}"
    # That null is the same as nothing helps nobody who meant to send something.
    plain = _quoted.sub(
        lambda kinds: " or ".join(_JSON_NAMES.get(k, k) for k in kinds[1].removesuffix(" | null").split(" | ")),
        dislike.words,
    )
    whole = "The body" if index is None else "The entry"
    return ErrorItem("BadType", f"{at or whole}: {plain[:1].lower()}{plain[1:]}.", index, at or None)


def _unknown(name: str, kind: type[Struct], field: str, index: int | None, *, guess: bool) -> ErrorItem:
    known = _NESTED.get(field, kind).__struct_fields__
    close = closest(name, known) if guess else None
    if kind is Item and not field and name in Post.__struct_fields__:
        hint = "It stands at the top of the request, beside notifications."
    elif close:
        hint = f"Did you mean {close}?"
    elif field or kind is Ids:
        hint = f"There may be {', '.join(known)}."
    else:
        hint = "The app's own keys go into data, or into a whole payload."
    path = f"{field}.{shown(name)}" if field else shown(name)
    return ErrorItem("UnknownField", f"There is no field {path!r} here. {hint}", index, path)


def refusal(refused: Refused) -> Problem:
    """What concerns all of a request."""
    return problem([ErrorItem(refused.reason, refused.detail, None, refused.field)], None)


def problem(errors: Sequence[ErrorItem], count: int | None, *, all_told: bool = False) -> Problem:
    """`count`: of the notifications that they are among."""
    first = errors[0]
    detail = first.detail
    if len(errors) > 1:
        of = f" in {count} notifications" if count else ""
        some = len(errors) > _MAX_ERRORS and not all_told
        listed = f" The first {_MAX_ERRORS} are listed." if some else ""
        detail = f"{len(errors)} things are wrong{of}, so nothing was taken.{listed} The first: {detail}"
    return Problem(400, first.code, detail, errors=errors if all_told else errors[:_MAX_ERRORS])
