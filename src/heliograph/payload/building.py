"""Builds a payload of fields."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Raw, Struct

from heliograph.model import PushType
from heliograph.payload.checking import check_size, limit, parse, refusal, refuse
from heliograph.payload.fields import CriticalSound, LiveActivity, Localized
from heliograph.payload.reviewing import Problems, find_wrong
from heliograph.payload.shortening import shorten

_encode = msgspec.json.Encoder().encode
_LIVE = PushType.LIVEACTIVITY


def build(
    *,
    title: str | Localized | None = None,
    subtitle: str | Localized | None = None,
    body: str | Localized | None = None,
    launch_image: str | None = None,
    action: str | None = None,
    action_loc_key: str | None = None,
    summary_arg: str | None = None,
    summary_arg_count: int | None = None,
    badge: int | None = None,
    sound: str | CriticalSound | None = None,
    thread_id: str | None = None,
    category: str | None = None,
    content_available: bool = False,
    mutable_content: bool = False,
    interruption_level: str | None = None,
    relevance_score: float | None = None,
    target_content_id: str | None = None,
    filter_criteria: str | None = None,
    url_args: Sequence[str] | None = None,
    content_changed: bool = False,
    live_activity: LiveActivity | None = None,
    data: Mapping[str, Any] | None = None,
    push_type: PushType = PushType.ALERT,
    shortened: bool = False,
) -> bytes:
    """The payload for these fields, as compact JSON.

    `badge` 0 takes the badge away. `interruption_level` is an `InterruptionLevel`; `relevance_score` lies within 0
    and 1, but for Live Activities, which it only puts in order. `content_changed` is for controls and widgets,
    `url_args` for Safari. `data` are the app's own keys, beside `aps`; what msgspec encodes may be in it.
    `shortened`: text that is too long is cut, as `shorten` does it.

    Raises Refused for what `validate` calls wrong.
    """
    if data and "aps" in data:
        refuse("data.aps", "belongs to Apple: use the fields of their own, or send a whole payload")
    live = live_activity is not None
    if live and push_type is not _LIVE:
        refuse("live_activity", f"goes with push type {_LIVE} only")
    alert = _Alert(
        title=title,
        subtitle=subtitle,
        body=body,
        launch_image=launch_image,
        action=action,
        action_loc_key=action_loc_key,
        summary_arg=summary_arg,
        summary_arg_count=summary_arg_count,
    )
    if isinstance(title, Localized):
        alert.title, alert.title_loc_key, alert.title_loc_args = _localize(title, live)
    if isinstance(subtitle, Localized):
        alert.subtitle, alert.subtitle_loc_key, alert.subtitle_loc_args = _localize(subtitle, live)
    if isinstance(body, Localized):
        alert.body, alert.loc_key, alert.loc_args = _localize(body, live)
    aps = _Aps(
        badge=badge,
        thread_id=thread_id,
        category=category,
        content_available=1 if content_available else None,
        mutable_content=1 if mutable_content else None,
        interruption_level=interruption_level,
        relevance_score=relevance_score,
        target_content_id=target_content_id,
        filter_criteria=filter_criteria,
        url_args=url_args,
        content_changed=True if content_changed else None,
    )
    heard = _Sound(1 if sound.critical else 0, sound.name, sound.volume) if isinstance(sound, CriticalSound) else sound
    if live_activity is None:
        aps.sound = heard
    else:
        alert.sound = heard
        _put_live_activity(aps, live_activity)
    if alert != _NO_ALERT:
        aps.alert = alert
    try:
        payload = _encode({"aps": aps, **data} if data else {"aps": aps})
        # msgspec writes null in place of a NaN or an infinity, which would change what was said unseen.
        if data and not _is_finite(data):
            refuse("data", _NOT_FINITE)
        if live_activity is not None:
            if not _is_finite(live_activity.content_state):
                refuse("aps.content-state", _NOT_FINITE)
            if not _is_finite(live_activity.attributes):
                refuse("aps.attributes", _NOT_FINITE)
    except (TypeError, ValueError, OverflowError, RecursionError):
        refuse(
            "payload",
            "cannot be written as JSON: use text without lone surrogates, numbers, booleans, null, lists and objects, "
            "not too deep within each other",
        )
    if shortened:
        payload = shorten(payload, limit(push_type))
    check_size(payload, push_type)
    problems = Problems()
    find_wrong(parse(payload), push_type, problems)
    for problem in problems.by_field.values():
        if problem.wrong:
            raise refusal(problem)
    return payload


class _Alert(Struct, omit_defaults=True, rename="kebab"):
    """As on the wire. Nothing is typed: what callers gave is looked at once it is JSON."""

    title: Any = None
    title_loc_key: Any = None
    title_loc_args: Any = None
    subtitle: Any = None
    subtitle_loc_key: Any = None
    subtitle_loc_args: Any = None
    body: Any = None
    loc_key: Any = None
    loc_args: Any = None
    launch_image: Any = None
    action: Any = None
    action_loc_key: Any = None
    summary_arg: Any = None
    summary_arg_count: Any = None
    sound: Any = None
    """Here in Live Activities only."""


class _Sound(Struct, omit_defaults=True):
    critical: int
    name: Any
    volume: Any = None


class _Aps(Struct, omit_defaults=True, rename="kebab"):
    alert: Any = None
    badge: Any = None
    sound: Any = None
    thread_id: Any = None
    category: Any = None
    content_available: Any = None
    mutable_content: Any = None
    interruption_level: Any = None
    relevance_score: Any = None
    target_content_id: Any = None
    filter_criteria: Any = None
    url_args: Any = None
    content_changed: Any = None
    timestamp: Any = None
    event: Any = None
    content_state: Any = None
    stale_date: Any = None
    dismissal_date: Any = None
    attributes_type: Any = None
    attributes: Any = None
    input_push_token: Any = None
    input_push_channel: Any = None


_NO_ALERT = _Alert()


def _localize(text: Localized, live: bool) -> tuple[Any, Any, Any]:
    """The text, its key and its arguments; Live Activities have the latter two in place of the text."""
    args = text.loc_args or None
    if not live:
        return None, text.loc_key, args
    return {"loc-key": text.loc_key, **({"loc-args": args} if args else {})}, None, None


def _put_live_activity(aps: _Aps, live: LiveActivity) -> None:
    aps.event = live.event
    aps.timestamp = live.timestamp
    aps.content_state = live.content_state
    aps.stale_date = live.stale_date
    aps.dismissal_date = live.dismissal_date
    aps.attributes_type = live.attributes_type
    aps.attributes = live.attributes
    aps.input_push_token = 1 if live.input_push_token else None
    aps.input_push_channel = live.input_push_channel


_PLAIN = (str, int, Raw, type(None))
_NOT_FINITE = "holds a number that JSON has not (NaN or an infinity)"


def _is_finite(value: Any) -> bool:
    if isinstance(value, _PLAIN):
        return True
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, Mapping) or all(map(_is_finite, value.values()))
