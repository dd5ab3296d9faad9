"""The JSON that Apple carries: check it, build it. Bytes that a caller brought are never rewritten.

Sources: Apple, "Generating a remote notification" (keys and sizes), "Pushing background updates to your App",
"Starting and updating Live Activities with ActivityKit push notifications".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NoReturn

import msgspec
from msgspec import Struct

from heliograph import reasons
from heliograph.errors import Refused
from heliograph.model import PushType

MAX_BYTES = 4096
"""Octets of a payload, at most."""

MAX_VOIP_BYTES = 5120
"""The same for VoIP pushes."""

MAX_NESTING = 512
"""Objects and arrays within each other; Apple's own parser goes no deeper."""

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


class InterruptionLevel(StrEnum):
    """How much an alert may disturb."""

    PASSIVE = "passive"
    ACTIVE = "active"
    TIME_SENSITIVE = "time-sensitive"
    CRITICAL = "critical"


def limit(push_type: PushType) -> int:
    """How many octets of payload Apple takes with this push type."""
    return MAX_VOIP_BYTES if push_type is PushType.VOIP else MAX_BYTES


def check(payload: bytes, push_type: PushType) -> None:
    """Refuse what Apple, or every device, would refuse.

    That is: nothing at all, too much, what is no JSON object in UTF-8 (RFC 8259), an `aps` that is no object, and what
    a background, Live Activity or MDM push cannot work without. Priorities are headers, and are checked with them.

    Raises Refused, and nothing else whatever the bytes are: PayloadEmpty, PayloadTooLarge or BadRequestPayload.
    """
    if not payload:
        raise Refused(reasons.PAYLOAD_EMPTY.word, "The payload is empty: send a JSON object.", field="payload")
    if len(payload) > limit(push_type):
        raise Refused(
            reasons.PAYLOAD_TOO_LARGE.word,
            f"The payload has {len(payload)} octets and Apple takes {limit(push_type)} with push type {push_type}: "
            f"shorten it by {len(payload) - limit(push_type)}.",
            field="payload",
        )
    content = _parse(payload)
    if push_type is PushType.MDM:
        _check_mdm(content)
        return
    if "aps" in content and type(content["aps"]) is not dict:
        _refuse("aps", "must be a JSON object")
    if push_type is PushType.BACKGROUND:
        _check_background(content.get("aps", {}))
    elif push_type is PushType.LIVEACTIVITY:
        _check_live_activity(content.get("aps", {}))


def build(
    *,
    title: str | None = None,
    subtitle: str | None = None,
    body: str | None = None,
    badge: int | None = None,
    sound: str | None = None,
    thread_id: str | None = None,
    category: str | None = None,
    content_available: bool = False,
    mutable_content: bool = False,
    interruption_level: str | None = None,
    relevance_score: float | None = None,
    data: Mapping[str, Any] | None = None,
    push_type: PushType = PushType.ALERT,
) -> bytes:
    """The payload for these fields, as compact JSON that has passed `check`.

    `badge` 0 takes the badge away. `interruption_level` is an `InterruptionLevel`, `relevance_score` lies within 0
    and 1. `data` are the app's own keys, beside `aps`; what msgspec encodes may be in it.

    Raises Refused.
    """
    if badge is not None and badge < 0:
        _refuse("aps.badge", "must not be negative; 0 removes the badge")
    if interruption_level is not None and interruption_level not in set(InterruptionLevel):
        _refuse("aps.interruption-level", f"must be one of {', '.join(InterruptionLevel)}")
    if relevance_score is not None and not 0 <= relevance_score <= 1:
        _refuse("aps.relevance-score", "must lie within 0 and 1")
    if data and "aps" in data:
        _refuse("data.aps", "belongs to Apple: use the fields of their own, or send a whole payload")
    alert = _Alert(title, subtitle, body)
    aps = _Aps(
        alert=None if alert == _Alert() else alert,
        badge=badge,
        sound=sound,
        thread_id=thread_id,
        category=category,
        content_available=int(content_available),
        mutable_content=int(mutable_content),
        interruption_level=interruption_level,
        relevance_score=relevance_score,
    )
    try:
        # msgspec writes null in place of a NaN or an infinity, which would change the data unseen.
        finite = _is_finite(data)
        payload = _encode({"aps": aps, **(data or {})})
    except (TypeError, ValueError, OverflowError, RecursionError):
        _refuse(
            "payload",
            "cannot be written as JSON: use text without lone surrogates, numbers, booleans, null, lists and objects, "
            "not too deep within each other",
        )
    if not finite:
        _refuse("data", "holds a number that JSON has not (NaN or an infinity)")
    check(payload, push_type)
    return payload


class _Alert(Struct, omit_defaults=True):
    title: str | None = None
    subtitle: str | None = None
    body: str | None = None


class _Aps(Struct, omit_defaults=True, rename="kebab"):
    alert: _Alert | None = None
    badge: int | None = None
    sound: str | None = None
    thread_id: str | None = None
    category: str | None = None
    content_available: int = 0
    mutable_content: int = 0
    interruption_level: str | None = None
    relevance_score: float | None = None


def _refuse(field: str, what: str) -> NoReturn:
    raise Refused(reasons.BAD_REQUEST_PAYLOAD.word, f"{field} {what}.", field=field) from None


def _parse(payload: bytes) -> dict[str, Any]:
    try:
        content = _decode(payload)
    except UnicodeDecodeError:
        _refuse("payload", "is not UTF-8")
    except msgspec.DecodeError as error:
        # msgspec says what and where, and never quotes the text itself.
        _refuse("payload", f"is not JSON that Apple can read: {error}")
    except RecursionError:
        _refuse("payload", "is nested too deeply")
    if type(content) is not dict:
        _refuse("payload", "must be a JSON object")
    # Counting brackets is much cheaper than looking, and short payloads have no room for as many.
    if (
        len(payload) > 2 * MAX_NESTING
        and payload.count(b"[") + payload.count(b"{") > MAX_NESTING
        and _depth(content) > MAX_NESTING
    ):
        _refuse("payload", "is nested too deeply")
    return content


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return depth - 1


def _is_finite(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _check_mdm(content: dict[str, Any]) -> None:
    if "aps" in content:
        _refuse("aps", "does not belong into an MDM push, which holds the key mdm alone")
    if not isinstance(content.get("mdm"), str):
        _refuse("mdm", "must be the device's PushMagic string")


def _check_background(aps: dict[str, Any]) -> None:
    if aps.get("content-available") != 1:
        _refuse("aps.content-available", "must be 1 in a background push")


def _check_live_activity(aps: dict[str, Any]) -> None:
    timestamp = aps.get("timestamp")
    if isinstance(timestamp, bool) or not isinstance(timestamp, int | float):
        _refuse("aps.timestamp", "must be the UNIX seconds of this Live Activity update")
    event = aps.get("event")
    if event not in ("start", "update", "end"):
        _refuse("aps.event", "must be start, update or end in a Live Activity push")
    # An end without one leaves what is shown.
    if not isinstance(aps.get("content-state"), dict) and (event != "end" or "content-state" in aps):
        _refuse("aps.content-state", "must be the JSON object that the Live Activity shows")
    if event == "start":
        if not isinstance(aps.get("attributes-type"), str):
            _refuse("aps.attributes-type", "must name the attributes of the Live Activity to start")
        if not isinstance(aps.get("attributes"), dict):
            _refuse("aps.attributes", "must be the JSON object that the Live Activity starts from")
        if not aps.get("alert"):
            _refuse("aps.alert", "must be there to start a Live Activity")
