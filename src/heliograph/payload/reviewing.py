"""Everything that is wrong with a payload, and what Apple takes that does not do what was probably meant."""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any

from heliograph.errors import Refused
from heliograph.model import PushType
from heliograph.payload.checking import (
    LIVE_EVENTS,
    NOTHING,
    Problem,
    check_size,
    find_lacking,
    is_number,
    parse,
    wrong,
)
from heliograph.payload.fields import InterruptionLevel

_ALERT_PUSH = PushType.ALERT
_MDM = PushType.MDM
_LIVE = PushType.LIVEACTIVITY
_CHANGING = (PushType.WIDGETS, PushType.CONTROLS)


def validate(payload: bytes, push_type: PushType) -> list[Problem]:
    """Everything that is wrong with a payload or will not do what was probably meant, worst first; one a field.

    What `check` refuses is among it. An empty list says that we know nothing against it.
    """
    problems = Problems()
    try:
        check_size(payload, push_type)
    except Refused as refused:
        problems.add(Problem("payload", refused.detail, wrong=True))
    try:
        content = parse(payload)
    except Refused as refused:
        problems.add(Problem("payload", refused.detail, wrong=True))
    else:
        find_wrong(content, push_type, problems)
        _find_doubtful(content, push_type, problems)
    return sorted(problems.by_field.values(), key=lambda problem: not problem.wrong)


class Problems:
    """Problems as they are found; of each field the first counts."""

    __slots__ = ("by_field",)

    def __init__(self) -> None:
        self.by_field: dict[str, Problem] = {}

    def add(self, problem: Problem) -> None:
        self.by_field.setdefault(problem.field, problem)

    def wrong(self, field: str, what: str) -> None:
        self.add(wrong(field, what))

    def doubt(self, field: str, what: str) -> None:
        self.add(Problem(field, f"{field} {what}.", wrong=False))


_Rule = Callable[[Any, str, Problems], None]
"""Looks at the value at a path."""

_MILLISECONDS = 10**11
"""UNIX seconds of the year 5138; milliseconds have been above it since 1973."""
_SHOWN = 64
"""Characters that are shown of a key that a caller made up."""


def _text(value: Any, path: str, problems: Problems) -> None:
    if type(value) is not str:
        problems.wrong(path, "must be a string")


def _texts(value: Any, path: str, problems: Problems) -> None:
    if type(value) is not list:
        problems.wrong(path, "must be an array of strings")
        return
    for index, each in enumerate(value):
        _text(each, f"{path}[{index}]", problems)


def _text_or_null(value: Any, path: str, problems: Problems) -> None:
    if value is not None:
        _text(value, path, problems)


def _object(value: Any, path: str, problems: Problems) -> None:
    if type(value) is not dict:
        problems.wrong(path, "must be a JSON object")


def _whole_number(value: Any, path: str, problems: Problems) -> None:
    if type(value) is not int:
        problems.wrong(path, "must be a whole number")


def _badge(value: Any, path: str, problems: Problems) -> None:
    _whole_number(value, path, problems)
    if type(value) is int and value < 0:
        problems.wrong(path, "must not be negative; 0 removes the badge")


def _switch(value: Any, path: str, problems: Problems) -> None:
    if value not in (0, 1):
        problems.wrong(path, "must be 1, or not be there at all")
    elif not value:
        problems.doubt(path, "does nothing unless it is 1: leave it out, or make it 1")


def _true(value: Any, path: str, problems: Problems) -> None:
    if value is not True:
        problems.wrong(path, "must be true, or not be there at all")


def _seconds(value: Any, path: str, problems: Problems) -> None:
    if not is_number(value):
        problems.wrong(path, "must be UNIX seconds")
    elif value > _MILLISECONDS:
        problems.wrong(path, "must be UNIX seconds, and looks like milliseconds: divide it by 1000")


def _interruption_level(value: Any, path: str, problems: Problems) -> None:
    if type(value) is not str or value not in _INTERRUPTION_LEVELS:
        problems.wrong(path, f"must be one of {', '.join(_INTERRUPTION_LEVELS)}")


def _relevance_score(value: Any, path: str, problems: Problems) -> None:
    if not is_number(value):
        problems.wrong(path, "must be a number")


def _event(value: Any, path: str, problems: Problems) -> None:
    if value not in LIVE_EVENTS:
        problems.wrong(path, "must be start, update or end")


def _channel(value: Any, path: str, problems: Problems) -> None:
    try:
        binascii.a2b_base64(value, strict_mode=True)
    except (TypeError, ValueError):
        problems.wrong(path, "must be a channel id in base64, as Apple returned it")


def _critical(value: Any, path: str, problems: Problems) -> None:
    if value not in (0, 1):
        problems.wrong(path, "must be 1 for a critical alert, or 0")


def _volume(value: Any, path: str, problems: Problems) -> None:
    if not is_number(value) or not 0 <= value <= 1:
        problems.wrong(path, "must lie within 0 and 1")


def _sound(value: Any, path: str, problems: Problems) -> None:
    if type(value) is not dict:
        if type(value) is not str:
            problems.wrong(path, "must be a string, or an object with name, volume and critical")
        return
    _keys(value, path, _SOUND, problems)


def _live_text(value: Any, path: str, problems: Problems) -> None:
    if type(value) is dict:
        _keys(value, path, _LIVE_TEXT, problems)
    elif type(value) is not str:
        problems.wrong(path, "must be a string, or an object with loc-key and loc-args")


def _alert(rules: Mapping[str, _Rule], value: Any, path: str, problems: Problems) -> None:
    if type(value) is dict:
        _keys(value, path, rules, problems)
    elif type(value) is not str:
        problems.wrong(path, "must be a string, or an object with title and body")


def _keys(value: dict[str, Any], path: str, rules: Mapping[str, _Rule], problems: Problems) -> None:
    for key, inner in value.items():
        rule = rules.get(key)
        if rule is None:
            _unknown_key(key, path, rules, problems)
        else:
            rule(inner, f"{path}.{key}", problems)


def _unknown_key(key: str, path: str, rules: Mapping[str, _Rule], problems: Problems) -> None:
    likely = _hump.sub("-", key[:_SHOWN]).replace("_", "-").lower()
    close = [likely] if likely in rules else get_close_matches(likely, rules, n=1)
    hint = f"did you mean {close[0]}?" if close else "the app's own keys stand beside aps, not in it."
    shown = f"{path}.{key if len(key) <= _SHOWN else key[: _SHOWN - 3] + '...'}"
    problems.add(Problem(shown, f"{shown} is none of Apple's keys: {hint}", wrong=False))


_hump = re.compile(r"(?<=[a-z])(?=[A-Z])")
_INTERRUPTION_LEVELS = tuple(each.value for each in InterruptionLevel)
_SOUND: dict[str, _Rule] = {"critical": _critical, "name": _text, "volume": _volume}
_LIVE_TEXT: dict[str, _Rule] = {"loc-key": _text, "loc-args": _texts}
_ALERT: dict[str, _Rule] = {
    "title": _text,
    "title-loc-key": _text,
    "title-loc-args": _texts,
    "subtitle": _text,
    "subtitle-loc-key": _text,
    "subtitle-loc-args": _texts,
    "body": _text,
    "loc-key": _text,
    "loc-args": _texts,
    "launch-image": _text,
    "action": _text,
    "action-loc-key": _text_or_null,
    "summary-arg": _text,
    "summary-arg-count": _whole_number,
}
_TEXTS = ("title", "subtitle", "body")
_LIVE_ALERT = _ALERT | dict.fromkeys(_TEXTS, _live_text) | {"sound": _sound}
_ARGUMENTS = frozenset(key for key in _ALERT if key.endswith("loc-args"))
_SHOWING = ("title", "title-loc-key", "subtitle", "subtitle-loc-key", "body", "loc-key")
_APS: dict[str, _Rule] = {
    "alert": partial(_alert, _ALERT),
    "badge": _badge,
    "sound": _sound,
    "thread-id": _text,
    "category": _text,
    "content-available": _switch,
    "mutable-content": _switch,
    "target-content-id": _text,
    "interruption-level": _interruption_level,
    "relevance-score": _relevance_score,
    "filter-criteria": _text,
    "url-args": _texts,
    "content-changed": _true,
    "timestamp": _seconds,
    "event": _event,
    "content-state": _object,
    "stale-date": _seconds,
    "dismissal-date": _seconds,
    "attributes-type": _text,
    "attributes": _object,
    "input-push-token": _switch,
    "input-push-channel": _channel,
}
_LIVE_APS = _APS | {"alert": partial(_alert, _LIVE_ALERT)}
_LIVE_ONLY = frozenset(list(_APS)[list(_APS).index("timestamp") :])
_START_ONLY = ("attributes-type", "attributes", "input-push-token", "input-push-channel")
_NOTICED = ("alert", "badge", "sound")
_MISPLACED = (*_NOTICED, "content-available", "mutable-content")


def find_wrong(content: dict[str, Any], push_type: PushType, problems: Problems) -> None:
    """What is wrong; keys that nobody knows are told on the way."""
    for problem in find_lacking(content, push_type):
        problems.add(problem)
    aps = content.get("aps", NOTHING)
    if type(aps) is not dict or push_type is _MDM:
        return
    _keys(aps, "aps", _LIVE_APS if push_type is _LIVE else _APS, problems)
    if "relevance-score" in aps and push_type is not _LIVE:
        score = aps["relevance-score"]
        if is_number(score) and not 0 <= score <= 1:
            problems.wrong("aps.relevance-score", "must lie within 0 and 1")
    if push_type is not _ALERT_PUSH and push_type in _CHANGING and "content-changed" not in aps:
        problems.wrong("aps.content-changed", f"must be true with push type {push_type}")


def _find_doubtful(content: dict[str, Any], push_type: PushType, problems: Problems) -> None:
    """What Apple takes, and what does not do what was probably meant."""
    aps = content.get("aps", NOTHING)
    if type(aps) is not dict or push_type is _MDM:
        return
    for key in _MISPLACED:
        if key in content and key not in aps:
            problems.doubt(key, "stands beside aps, where Apple does not look: move it into aps")
    alert = aps.get("alert")
    _doubt_alert(alert, problems)
    for path, sound in (("aps.sound", aps.get("sound")), ("aps.alert.sound", _get(alert, "sound"))):
        if type(sound) is dict and "name" not in sound:
            problems.doubt(f"{path}.name", "is missing: name a sound file of the app, or default")
    if "content-changed" in aps and push_type not in _CHANGING:
        problems.doubt("aps.content-changed", "is for push types widgets and controls: send it with one of these")
    if push_type is _LIVE:
        _doubt_live_activity(aps, problems)
        return
    for key in _LIVE_ONLY & aps.keys():
        problems.doubt(f"aps.{key}", "is read in Live Activities only: send it with push type liveactivity")
    if push_type is _ALERT_PUSH:
        _doubt_alert_push(aps, problems)
    elif push_type is PushType.BACKGROUND:
        for key in _NOTICED:
            if key in aps:
                problems.doubt(f"aps.{key}", "does not go with a background push: leave it out, or send an alert")


def _doubt_alert(alert: Any, problems: Problems) -> None:
    if alert == "":
        problems.doubt("aps.alert", "is empty, so nothing is shown: write something, or leave it out")
    if type(alert) is not dict:
        return
    if not any(map(alert.get, _SHOWING)):
        problems.doubt("aps.alert", "has no text, so nothing is shown: add a title or a body, or leave it out")
    _doubt_arguments(alert, "aps.alert", problems)
    for name in _TEXTS:
        _doubt_arguments(alert.get(name), f"aps.alert.{name}", problems)


def _doubt_arguments(value: Any, path: str, problems: Problems) -> None:
    for name in _ARGUMENTS:
        key = name.removesuffix("args") + "key"
        if type(value) is dict and name in value and key not in value:
            problems.doubt(f"{path}.{name}", f"has nothing to go into: add {key}")


def _doubt_alert_push(aps: dict[str, Any], problems: Problems) -> None:
    if "alert" in aps:
        return
    if "mutable-content" in aps:
        problems.doubt("aps.mutable-content", "changes alerts only, and there is none: add alert, or leave it out")
    if not any(key in aps for key in (*_NOTICED, "url-args")):
        background = "; what is to wake the app unseen has push type background" if "content-available" in aps else ""
        problems.doubt("aps", f"has no alert, badge or sound, so nobody notices it: add one{background}")


def _doubt_live_activity(aps: dict[str, Any], problems: Problems) -> None:
    event = aps.get("event")
    if type(aps.get("alert")) is str:
        problems.doubt("aps.alert", "must be an object with title and body in a Live Activity")
    if "sound" in aps:
        problems.doubt("aps.sound", "stands inside aps.alert in a Live Activity: move it there")
    if "dismissal-date" in aps and event != "end":
        problems.doubt("aps.dismissal-date", "is read with event end only")
    if event != "start":
        for key in _START_ONLY:
            if key in aps:
                problems.doubt(f"aps.{key}", "is read with event start only")
    elif "input-push-token" in aps and "input-push-channel" in aps:
        problems.doubt("aps.input-push-channel", "and aps.input-push-token exclude each other: updates come one way")
    if event == "end" and "content-state" not in aps:
        problems.doubt(
            "aps.content-state", "is missing: what was shown last stays, so send what is to be shown at last"
        )


def _get(value: Any, name: str) -> Any:
    return value.get(name) if type(value) is dict else None
