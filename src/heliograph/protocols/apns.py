"""A notification as Apple's HTTP/2 headers, and Apple's answer as a value; both ways, for carrier, proxy and simulator.

Sources: Apple, "Sending notification requests to APNs" and "Handling notification responses from APNs".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

import msgspec
from msgspec import Struct

from heliograph import reasons
from heliograph.errors import Refused
from heliograph.model import ACCEPTED, Answered, Headers, PushType

PATH_PREFIX = b"/3/device/"
"""What stands before the device token in `:path`."""

MAX_TOKEN_BYTES = 200
"""Octets of a device token. Apple names no length; 32, 54 and 80 are seen, 100 were announced."""

MAX_COLLAPSE_ID_BYTES = 64

_MAX_TOPIC_BYTES = 255
# The binary protocol had 32 bits for it; milliseconds in place of seconds are far above.
_MAX_EXPIRATION = 2**32 - 1
_MAX_REASON_CHARS = 64

_SUFFIXES = {
    PushType.LOCATION: ".location-query",
    PushType.VOIP: ".voip",
    PushType.COMPLICATION: ".complication",
    PushType.FILEPROVIDER: ".pushkit.fileprovider",
    PushType.LIVEACTIVITY: ".push-type.liveactivity",
    PushType.PUSHTOTALK: ".voip-ptt",
    PushType.WIDGETS: ".push-type.widgets",
    PushType.CONTROLS: ".push-type.controls",
}

_MDM_TOPIC = "com.apple.mgmt."
"""How the topics of device management begin, which have no suffix."""

# RFC 9113, section 8.2.1: no control characters in a field value, no blank at its ends.
_UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]|^ | $")


def topic_for(bundle_id: str, push_type: PushType) -> str:
    """The topic that a push type needs; with MDM the UID of the push certificate stands for the bundle id."""
    return bundle_id + _SUFFIXES.get(push_type, "")


def allowed_topic(topic: str, push_type: PushType, bundle_ids: Collection[str]) -> bool:
    """Whether `topic` is one of the bundle ids with exactly the suffix that the push type needs."""
    suffix = _SUFFIXES.get(push_type, "")
    return topic.endswith(suffix) and topic.removesuffix(suffix) in bundle_ids


def implied_push_type(topic: str, bundle_ids: Collection[str] = ()) -> PushType | None:
    """The push type of what was sent before there were any, by its topic; None: for whatever the payload says."""
    if topic.startswith(_MDM_TOPIC):
        return PushType.MDM
    if topic in bundle_ids:
        return None
    return next((push_type for push_type, suffix in _SUFFIXES.items() if topic.endswith(suffix)), None)


def is_background(payload: bytes) -> bool:
    """Whether there is nothing in it to be shown or heard, only for the app to wake up.

    Where it cannot be read there is not: whoever checks payloads says what is wrong with it.
    """
    if b"content-available" not in payload:
        return False
    try:
        aps = _decode_payload(payload).aps
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return aps.content_available == 1 and aps.alert is None and aps.badge is None and aps.sound is None


class _Aps(Struct):
    content_available: Any = msgspec.field(default=None, name="content-available")
    alert: Any = None
    badge: Any = None
    sound: Any = None


class _Payload(Struct):
    aps: _Aps


_decode_payload = msgspec.json.Decoder(_Payload).decode


def default_priority(push_type: PushType) -> int:
    """What Apple assumes where no priority is sent, but for background pushes, which may have 5 only."""
    return 5 if push_type is PushType.BACKGROUND else 10


def check_headers(headers: Headers) -> None:
    """Refuse header values that Apple would refuse or that a field cannot carry. Whose topic it is, is not asked here.

    Raises Refused: MissingTopic, BadTopic, BadPriority, BadExpirationDate, BadCollapseId.
    """
    topic, priority, expiration, collapse_id = (
        headers.topic,
        headers.priority,
        headers.expiration,
        headers.collapse_id,
    )
    if not topic:
        raise Refused(reasons.MISSING_TOPIC.word, "There is no topic: send the app's bundle id.", field="topic")
    if _UNFIT.search(topic) or len(topic.encode()) > _MAX_TOPIC_BYTES:
        raise Refused(
            reasons.BAD_TOPIC.word,
            f"The topic must be a bundle id with its suffix, {_MAX_TOPIC_BYTES} octets at most, "
            "without control characters or blanks at its ends.",
            field="topic",
        )
    if priority is not None and priority not in (1, 5, 10):
        raise Refused(reasons.BAD_PRIORITY.word, "The priority must be 1, 5 or 10.", field="priority")
    if priority not in (None, 5) and headers.push_type is PushType.BACKGROUND:
        raise Refused(reasons.BAD_PRIORITY.word, "A background push must have priority 5.", field="priority")
    if expiration is not None and not 0 <= expiration <= _MAX_EXPIRATION:
        raise Refused(
            reasons.BAD_EXPIRATION_DATE.word,
            "The expiration must be UNIX seconds (not milliseconds), or 0 to try once.",
            field="expiration",
        )
    if collapse_id is not None and (
        not collapse_id or _UNFIT.search(collapse_id) or len(collapse_id.encode()) > MAX_COLLAPSE_ID_BYTES
    ):
        raise Refused(
            reasons.BAD_COLLAPSE_ID.word,
            f"The collapse id must have 1 to {MAX_COLLAPSE_ID_BYTES} octets of UTF-8, "
            "without control characters or blanks at its ends.",
            field="collapse_id",
        )


def check_token(token: str) -> bytes:
    """The device token as lower-case hex, as the wire wants it.

    Raises Refused: MissingDeviceToken, BadDeviceToken.
    """
    try:
        octets = bytes.fromhex(token)
    except ValueError:
        octets = b""
    # fromhex skips blanks, so the length has to agree as well.
    if 0 < len(octets) <= MAX_TOKEN_BYTES and 2 * len(octets) == len(token):
        return octets.hex().encode()
    if not token:
        raise Refused(reasons.MISSING_DEVICE_TOKEN.word, "There is no device token.", field="token")
    if len(token) > 2 * MAX_TOKEN_BYTES:
        wrong = f"is longer than {2 * MAX_TOKEN_BYTES} hex digits"
    elif re.search(r"[\s<>]", token):
        wrong = "holds blanks or angle brackets, as printed by Xcode: remove them"
    elif re.search(r"[^0-9a-fA-F]", token):
        wrong = "must be hex digits only; if it is base64, convert it"
    else:
        wrong = "has an odd number of hex digits: a part of it is missing"
    raise Refused(reasons.BAD_DEVICE_TOKEN.word, f"The device token {wrong}.", field="token")


def constant_fields(headers: Headers) -> list[tuple[bytes, bytes]]:
    """The fields that many notifications share and that are worth a place in the peer's table.

    The priority is left out where it is what Apple assumes anyway.
    """
    fields = [(b"apns-topic", headers.topic.encode()), (b"apns-push-type", headers.push_type.value.encode())]
    priority = default_priority(headers.push_type) if headers.priority is None else headers.priority
    if priority != 10:
        fields.append((b"apns-priority", b"%d" % priority))
    return fields


def varying_fields(headers: Headers) -> list[tuple[bytes, bytes]]:
    """The fields that change from one notification to the next: to be sent literally, without indexing."""
    fields = []
    if headers.expiration is not None:
        fields.append((b"apns-expiration", b"%d" % headers.expiration))
    if headers.collapse_id is not None:
        fields.append((b"apns-collapse-id", headers.collapse_id.encode()))
    return fields


class _Body(Struct):
    reason: Any = None
    timestamp: Any = None


_decode_body = msgspec.json.Decoder(_Body).decode


def answer(status: int, fields: Iterable[tuple[bytes, bytes]], body: bytes) -> Answered:
    """Apple's answer as a value. What cannot be read in it is taken as absent; nothing is raised."""
    unique_id: str | None = None
    retry_after_s: float | None = None
    for name, value in fields:
        if name == b"apns-unique-id":
            unique_id = _printable(value.decode("utf-8", "replace"))
        elif name == b"retry-after" and value.isdigit():
            # Apple documents none; what stands between us and Apple may send one. Dates (RFC 9110, section 10.2.3)
            # would need a clock that agrees with theirs.
            retry_after_s = float(value)
    if status == 200:
        return ACCEPTED if unique_id is None else Answered(200, unique_id=unique_id)
    try:
        content = _decode_body(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        content = _Body()
    reason = _printable(content.reason) if isinstance(content.reason, str) else None
    since = content.timestamp if type(content.timestamp) is int and 0 <= content.timestamp < 2**53 else None
    return Answered(status, reason, since, unique_id, retry_after_s)


def answer_body(reason: str, since: int | None = None) -> bytes:
    """The body of a no, as Apple writes it. `since` is UNIX milliseconds, with 410 only."""
    return msgspec.json.encode({"reason": reason} if since is None else {"reason": reason, "timestamp": since})


def _printable(text: str) -> str | None:
    # It goes into receipts, logs and labels, whoever wrote it.
    return text if 0 < len(text) <= _MAX_REASON_CHARS and text.isascii() and text.isprintable() else None
