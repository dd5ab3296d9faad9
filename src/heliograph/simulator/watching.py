"""What a device shows, told to people in a line and to programs as JSON. Pure, but for the local time of day."""

from __future__ import annotations

import time
from base64 import b64encode
from collections import OrderedDict
from typing import Any

import msgspec
from msgspec import Raw, Struct

from heliograph.simulator.devices import KEEP, Received, Shown

_TOKEN_CHARS = 8
_TEXT_CHARS = 160
"""A line on a terminal is not for reading whole payloads."""
_JOINER = "\u200d"
"""Not printable by itself, and part of many an emoji."""

_encode = msgspec.json.encode


class Line(Struct, frozen=True):
    """The parts of a line for people, without anything that could steer a terminal."""

    at: str
    """Local time of day, to the millisecond."""
    token: str
    """The beginning of the device token."""
    push_type: str
    text: str
    note: str = ""
    """What is special about it."""

    def __str__(self) -> str:
        return f"{self.at}  {self.token}  {self.push_type:<12}  {self.text}{self.note and f'  ({self.note})'}"


class Watcher:
    """Turns one notification after the other into lines; knows which replaces which."""

    def __init__(self) -> None:
        self._collapsible: OrderedDict[tuple[str, str], None] = OrderedDict()
        """Device tokens and collapse ids that were there before, those of late last."""

    def line(self, shown: Shown) -> Line:
        """For people."""
        received = shown.received
        moment = time.strftime("%H:%M:%S", time.localtime(shown.at))
        return Line(
            f"{moment}.{int(shown.at * 1000) % 1000:03d}",
            received.token[:_TOKEN_CHARS] + ("..." if len(received.token) > _TOKEN_CHARS else ""),
            received.push_type,
            _safe(essentials(received)),
            self._note(received),
        )

    def _note(self, received: Received) -> str:
        if received.identifier is not None:
            return f"legacy, identifier {received.identifier}" if received.identifier else "legacy"
        if received.collapse_id is None:
            return ""
        key = received.token, received.collapse_id
        replaces = key in self._collapsible
        self._collapsible[key] = None
        self._collapsible.move_to_end(key)
        if len(self._collapsible) > KEEP:
            self._collapsible.popitem(last=False)
        # Each alert of heliograph's has one, its own id, so that the first with one is nothing special.
        return f"replaces the last with collapse id {_safe(received.collapse_id)}" if replaces else ""


def essentials(received: Received) -> str:
    """What people want to know of a payload."""
    try:
        content = msgspec.json.decode(received.payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return f"{len(received.payload)} octets that are not JSON"
    if not isinstance(content, dict):
        return _compact(content)
    aps = content.pop("aps", None)
    if not isinstance(aps, dict):
        return f"no aps: {_compact(content)}"
    words = [_alert(aps.pop("alert", None)), *_marks(aps)]
    if "event" in aps:
        words.append(f"{aps['event']} {_compact(aps.get('content-state'))}")
    if content:
        words.append(_compact(content))
    return "  ".join(filter(None, words)) or "nothing to show"


def as_json(shown: Shown, number: int) -> bytes:
    """For programs: one line of JSON. `number` is its place among all that was shown, counted from 1."""
    return _encode({"number": number, "at": shown.at, **told(shown.received)})


def told(received: Received) -> dict[str, Any]:
    """A notification for JSON; its payload as JSON if it is some, else as base64: the simulator judges no payload."""
    payload = _as_one_line(received.payload)
    return {
        "id": received.id,
        "token": str(received.token),
        "topic": received.topic,
        "push_type": received.push_type,
        "collapse_id": received.collapse_id,
        "door": received.door,
        **({"identifier": received.identifier} if received.identifier else {}),
        **({"payload_base64": b64encode(received.payload).decode()} if payload is None else {"payload": Raw(payload)}),
    }


def _as_one_line(payload: bytes) -> bytes | None:
    """The payload's JSON as it came, without the blanks between; None where it is none."""
    try:
        payload.decode()
        msgspec.json.decode(payload, type=Raw)
        return msgspec.json.format(payload, indent=-1)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _alert(alert: object) -> str:
    if isinstance(alert, str):
        return alert
    if not isinstance(alert, dict):
        return ""
    title, subtitle, body = (_text(alert, name) for name in ("title", "subtitle", ""))
    if subtitle:
        title = f"{title} ({subtitle})" if title else subtitle
    return ": ".join(filter(None, (title, body)))


def _text(alert: dict[str, Any], name: str) -> str:
    """One of an alert's texts, or the key under which the app has it."""
    text = alert.get(name or "body")
    if isinstance(text, str):
        return text
    prefix = name and f"{name}-"
    key = alert.get(f"{prefix}loc-key")
    if not isinstance(key, str):
        return ""
    arguments = alert.get(f"{prefix}loc-args")
    return f"<{key}>" if not arguments else f"<{key} {_compact(arguments)}>"


def _marks(aps: dict[str, Any]) -> list[str]:
    """What goes with the text."""
    marks = [f"{name} {_compact(aps[name])}" for name in ("badge", "sound", "category", "thread-id") if name in aps]
    if aps.get("content-available") == 1:
        marks.append("content available")
    if aps.get("mutable-content") == 1:
        marks.append("mutable")
    return [f"[{', '.join(marks)}]"] if marks else []


def _compact(value: object) -> str:
    return value if isinstance(value, str) else _encode(value).decode()


def _safe(text: str) -> str:
    """On one line, without control characters, and not too long."""
    shown = "".join(
        each if each.isprintable() or each == _JOINER else each.encode("unicode_escape").decode()
        for each in text[: _TEXT_CHARS + 1]
    )
    return shown if len(shown) <= _TEXT_CHARS else f"{shown[: _TEXT_CHARS - 3]}..."
