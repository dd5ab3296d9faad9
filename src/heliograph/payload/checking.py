"""What Apple, or every device, would refuse. This runs for each notification that is taken in."""

from __future__ import annotations

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

MAX_BROADCAST_BYTES = 5120
"""The same for what goes to a channel."""

MAX_NESTING = 512
"""Objects and arrays within each other; Apple's own parser goes no deeper."""

_decode = msgspec.json.Decoder().decode
# Members of an enum are slow to look up.
_ALERT_PUSH = PushType.ALERT
_VOIP = PushType.VOIP
_MDM = PushType.MDM
_LIVE = PushType.LIVEACTIVITY

LIVE_EVENTS = ("start", "update", "end")
NOTHING: dict[str, Any] = {}
"""In place of an `aps` that is not there."""


class Size(Struct, frozen=True):
    """How long a payload is, and may be, in octets."""

    size: int
    limit: int

    @property
    def left(self) -> int:
        """How many more there may be; negative where there are too many already."""
        return self.limit - self.size


class Problem(Struct, frozen=True):
    """Something about a payload that its sender should know."""

    field: str
    """A path like `aps.alert.loc-args[1]`, or `payload` for all of it."""
    detail: str
    """A sentence that says what to change. It holds names of keys, and no values."""
    wrong: bool
    """Whether it cannot be meant so. Otherwise it is read, and does not do what was probably meant."""


def limit(push_type: PushType, *, broadcast: bool = False) -> int:
    """How many octets of payload Apple takes with this push type."""
    if broadcast:
        return MAX_BROADCAST_BYTES
    return MAX_VOIP_BYTES if push_type is _VOIP else MAX_BYTES


def measure(payload: bytes, push_type: PushType, *, broadcast: bool = False) -> Size:
    """Octets as they go over the wire: an escape counts with all of its characters."""
    return Size(len(payload), limit(push_type, broadcast=broadcast))


def check(payload: bytes, push_type: PushType) -> None:
    """Refuse what Apple, or every device, would refuse.

    That is: nothing at all, too much, what is no JSON object in UTF-8 (RFC 8259), an `aps` that is no object, and what
    a background, Live Activity or MDM push cannot work without. Priorities are headers, and are checked with them.

    Raises Refused, and nothing else whatever the bytes are: PayloadEmpty, PayloadTooLarge or BadRequestPayload.
    """
    check_size(payload, push_type)
    lacking = find_lacking(parse(payload), push_type)
    if lacking:
        raise refusal(lacking[0])


# -- for the rest of the room -----------------------------------------------------------------------------------------


def refuse(field: str, what: str) -> NoReturn:
    raise Refused(reasons.BAD_REQUEST_PAYLOAD.word, f"{field} {what}.", field=field) from None


def refusal(problem: Problem) -> Refused:
    return Refused(reasons.BAD_REQUEST_PAYLOAD.word, problem.detail, field=problem.field)


def wrong(field: str, what: str) -> Problem:
    return Problem(field, f"{field} {what}.", wrong=True)


def is_number(value: Any) -> bool:
    return type(value) is int or type(value) is float


def check_size(payload: bytes, push_type: PushType) -> None:
    if 0 < len(payload) <= MAX_BYTES:
        return
    if not payload:
        raise Refused(reasons.PAYLOAD_EMPTY.word, "The payload is empty: send a JSON object.", field="payload")
    if len(payload) > limit(push_type):
        raise Refused(
            reasons.PAYLOAD_TOO_LARGE.word,
            f"The payload has {len(payload)} octets and Apple takes {limit(push_type)} with push type {push_type}: "
            f"shorten it by {len(payload) - limit(push_type)}.",
            field="payload",
        )


def parse(payload: bytes) -> dict[str, Any]:
    try:
        content = _decode(payload)
    except UnicodeDecodeError:
        refuse("payload", "is not UTF-8")
    except msgspec.DecodeError as error:
        # msgspec says what and where, and never quotes the text itself.
        refuse("payload", f"is not JSON that Apple can read: {error}")
    except RecursionError:
        refuse("payload", "is nested too deeply")
    if type(content) is not dict:
        refuse("payload", "must be a JSON object")
    # Counting brackets is much cheaper than looking, and short payloads have no room for as many.
    if (
        len(payload) > 2 * MAX_NESTING
        and payload.count(b"[") + payload.count(b"{") > MAX_NESTING
        and _depth(content) > MAX_NESTING
    ):
        refuse("payload", "is nested too deeply")
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


def find_lacking(content: dict[str, Any], push_type: PushType) -> list[Problem]:
    """What Apple or every device would refuse in a payload that is JSON."""
    if push_type is _MDM:
        return _find_lacking_for_mdm(content)
    aps = content.get("aps", NOTHING)
    if type(aps) is not dict:
        return [wrong("aps", "must be a JSON object")]
    if push_type is _ALERT_PUSH:
        return []
    if push_type is PushType.BACKGROUND and aps.get("content-available") != 1:
        return [wrong("aps.content-available", "must be 1 in a background push")]
    if push_type is _LIVE:
        return _find_lacking_for_live_activity(aps)
    return []


def _find_lacking_for_mdm(content: dict[str, Any]) -> list[Problem]:
    lacking = []
    if "aps" in content:
        lacking.append(wrong("aps", "does not belong into an MDM push, which holds the key mdm alone"))
    if not isinstance(content.get("mdm"), str):
        lacking.append(wrong("mdm", "must be the device's PushMagic string"))
    return lacking


def _find_lacking_for_live_activity(aps: dict[str, Any]) -> list[Problem]:
    lacking = []
    if not is_number(aps.get("timestamp")):
        lacking.append(wrong("aps.timestamp", "must be the UNIX seconds of this Live Activity update"))
    event = aps.get("event")
    if event not in LIVE_EVENTS:
        lacking.append(wrong("aps.event", "must be start, update or end in a Live Activity push"))
    # An end without one leaves what is shown.
    if not isinstance(aps.get("content-state"), dict) and (event != "end" or "content-state" in aps):
        lacking.append(wrong("aps.content-state", "must be the JSON object that the Live Activity shows"))
    if event == "start":
        if not isinstance(aps.get("attributes-type"), str):
            lacking.append(wrong("aps.attributes-type", "must name the attributes of the Live Activity to start"))
        if not isinstance(aps.get("attributes"), dict):
            lacking.append(wrong("aps.attributes", "must be the JSON object that the Live Activity starts from"))
        if not aps.get("alert"):
            lacking.append(wrong("aps.alert", "must be there to start a Live Activity"))
    return lacking
