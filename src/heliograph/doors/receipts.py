"""Receipts as JSON: what became of a notification, in Apple's words, ours and a plain sentence."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache

from msgspec import Struct

from heliograph import reasons
from heliograph.model import MAX_BATCH, Receipt, State
from heliograph.reasons import FollowUp

PLACES = [f"{place:04x}" for place in range(1, MAX_BATCH + 1)]
"""The last four digits of the ids in a batch (see `model.Batch.id`)."""


class ReceiptBody(Struct):
    """A receipt as JSON. Times are RFC 3339, in UTC."""

    id: str
    """The notification's id."""
    app: str
    """The app that it is for."""
    environment: str | None
    """Where it is sent to."""
    topic: str | None
    """As Apple got it. This and the next five are null where they can be read no more."""
    push_type: str | None
    """As Apple got it."""
    token: str | None
    """The device token."""
    collapse_id: str | None
    """As Apple got it: the notification's own id where nobody gave one."""
    expiration: int | None
    """UNIX seconds, as they were sent; 0: tried once."""
    state: str
    """What became of it."""
    cancelling: bool
    """It is being sent, and cancelled if Apple does not take it this time."""
    reason: str | None
    """Apple's word, or ours where Apple said nothing. `/docs/errors` has all of them."""
    status: int | None
    """The HTTP status of Apple's answer."""
    meaning: str
    """What state and reason mean, and what to do, in a sentence."""
    created_at: str
    """When it was taken."""
    updated_at: str | None
    """When its state was last set; null: nothing has happened."""
    attempts: int
    """How often it was sent."""
    next_attempt_at: str | None
    """When it is sent again."""
    unregistered_at: str | None
    """With 410: when Apple learnt that the device token is dead."""
    unique_id: str | None
    """Apple's `apns-unique-id`, by which its Push Notifications Console finds it; from the development environment
    only."""
    connection: str | None
    """The connection that brought it, as log lines name it; of an Apple-shaped proxy the listener,
    `apple_proxy.NAME`, with `.durable` behind it where the queue took it; null where it came by this API."""
    identifier: int | None
    """What the client of that connection called it, in the binary protocol."""
    apns_id: str | None
    """The `apns-id` that its sender chose, and that it was sent under; null: it was sent under `id`."""


def receipt_body(receipt: Receipt) -> ReceiptBody:
    since = receipt.since
    return ReceiptBody(
        receipt.id,
        receipt.app,
        receipt.environment,
        receipt.topic,
        receipt.push_type,
        None if receipt.token is None else str(receipt.token),  # msgspec encodes no subclasses
        receipt.collapse_id,
        receipt.expiration,
        STATES[receipt.state],
        receipt.cancelling,
        receipt.reason,
        200 if receipt.state is State.ACCEPTED else receipt.status,
        meaning(receipt),
        _rfc3339(receipt.created_at),
        None if receipt.updated_at is None else _rfc3339(receipt.updated_at),
        receipt.attempts,
        None if receipt.next_attempt_at is None else _rfc3339(receipt.next_attempt_at),
        None if since is None else _rfc3339(min(max(since, 0), _LAST_MS) / 1000),
        receipt.unique_id,
        receipt.connection,
        receipt.identifier,
        receipt.apns_id,
    )


STATES = {state: state.name.lower() for state in State}
"""Their names in JSON."""

_LAST_MS = 253_402_300_799_999
"""The last millisecond that RFC 3339 can write; what Apple sends is not ours to trust."""

_MEANINGS = {
    State.QUEUED: "It is waiting to be sent.",
    State.SENT: "It is being sent, once only as asked for, and Apple has not answered yet: ask again in a moment.",
    State.ACCEPTED: "Apple took it. Whether it reached the device, nobody is told: there is nothing more to do.",
    State.REJECTED: "Apple said no for good.",
    State.EXPIRED: "Its expiration passed before Apple took it: send it anew if it still matters.",
    State.CANCELLED: "It was cancelled before Apple took it: send it anew if it should be sent after all.",
    State.BURIED: "It was given up on, as Apple did not take it in time. POST /v1/buried/replay or `heliograph buried "
    "replay` has it sent again.",
    State.UNKNOWN: "It was sent and the answer never came, so Apple may have taken it or not. It is not sent again, "
    "as was asked for, or as it was cancelled meanwhile: send it anew if twice is better than never.",
}

_CANCELLING = (
    "It was cancelled while it was being sent: if Apple does not take it this time, it is not tried again. "
    "Ask again in a moment."
)
_CUT_OFF = (
    "It was cancelled before Apple took it: somebody here did that, or a notification before it on its connection was "
    "refused. Of that its client was told, and has to send it again."
)
_SENT_BEFORE = (
    "It had gone out before{as_what}, and its client sent it again, as clients of the binary protocol do after an "
    "error packet: it was not sent twice. There is nothing to do."
)
_NO_WORD = (
    "It was sent and the answer never came, so Apple may have taken it or not. Its sender was answered 500 "
    "InternalServerError, and decides whether to send it again: nothing is sent again here."
)
_find_id = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}").search
_UNREADABLE = {
    State.BURIED: "The store is damaged where it was, so it cannot be read, sent or replayed: send it anew.",
    State.UNKNOWN: "The store is damaged where it was, so it cannot be read, and it may have been sent before: send it "
    "anew if twice is better than never.",
}
_TO_DO = (FollowUp.FIX_CREDENTIALS, FollowUp.FIX_REQUEST, FollowUp.RENEW_PROVIDER_TOKEN)
"""What time alone does not cure: there is something to do, also where we have stopped trying."""
_RETRIED = (FollowUp.RETRY_SOON, FollowUp.RETRY_TOKEN_LATER, FollowUp.RETRY_LATER)
"""What the queue would send again."""

PROXY = "apple_proxy."
"""How the connection begins of what an Apple-shaped proxy brought; its listener's name follows."""
DURABLE = ".durable"
"""How it ends where the queue took it: the sender was answered before Apple said anything."""


def is_about_us(reason: reasons.Reason) -> bool:
    """Whether Apple's no is about our connection or our credentials, of which the proxy's callers know nothing."""
    return (
        reason.status == 403
        or reason.follow_up is FollowUp.NEW_CONNECTION
        or reason is reasons.TOO_MANY_PROVIDER_TOKEN_UPDATES
    )


def meaning(receipt: Receipt) -> str:
    """What the state and the reason mean, and what to do, in plain sentences."""
    state, reason, status = receipt.state, receipt.reason, receipt.status
    said = _MEANINGS[state]
    known = None if reason is None or status is None else reasons.find(reason, status)
    proxied = receipt.connection is not None and receipt.connection.startswith(PROXY)
    if proxied and not str(receipt.connection).endswith(DURABLE):
        told = _what_the_sender_was_told(receipt, known)
        if told is not None:
            return told
    match state:
        case State.REJECTED if receipt.why is not None:  # Apple said nothing
            return f"It was refused as it came, and Apple was not asked: {receipt.why.rstrip('.')}."
        case State.REJECTED:
            return f"{said} {reasons.find(reason, status).meaning}"
        case State.QUEUED if receipt.cancelling:
            return _CANCELLING
        case State.QUEUED if reason is None:
            return f"{said} There is nothing to do."
        case State.QUEUED if known is not None:
            return f"{said} {known.meaning}"
        case State.QUEUED:
            return f"{said} {_failed(receipt)} It is tried again by itself."
        case State.CANCELLED if reason == SENT_BEFORE:
            earlier = _find_id(receipt.why or "")
            return _SENT_BEFORE.format(as_what=f" as {earlier[0]}" if earlier else "")
        case State.CANCELLED if receipt.connection is not None and not proxied and known is None:
            return _CUT_OFF
        case State.BURIED | State.UNKNOWN if reason == UNREADABLE:
            return _UNREADABLE[state]
        case State.SENT | State.ACCEPTED | State.UNKNOWN:
            return said
    if known is not None:
        advice = f" {known.meaning}" if known.follow_up in _TO_DO else ""
        return f"{said} Apple's last answer was {status} {reason}.{advice}"
    return said if reason in (None, "TooLate") else f"{said} {_failed(receipt)}"


def _what_the_sender_was_told(receipt: Receipt, known: reasons.Reason | None) -> str | None:
    """Of what was carried at once: where the queue would send it again, its sender decides. None: nothing special."""
    match receipt.state:
        case State.REJECTED if known is not None and is_about_us(known):
            advice = f" {known.meaning}" if known.follow_up is FollowUp.FIX_CREDENTIALS else ""
            return (
                f"Apple answered {known.status} {known.word}, which is not its sender's fault: that one was answered "
                f"503 ServiceUnavailable, and decides whether to send it again.{advice}"
            )
        case State.REJECTED if known is not None and known.follow_up in _RETRIED:
            return (
                f"Apple did not take it, for now. Its sender was given Apple's answer, {known.status} {known.word}, "
                "and decides whether to send it again: nothing is sent again here."
            )
        case State.CANCELLED:
            why = f" ({receipt.why.rstrip('.')})" if receipt.why else ""
            return (
                f"Apple was not reached or did not act on it{why}. Its sender was answered 503 ServiceUnavailable, and "
                "decides whether to send it again: nothing is sent again here."
            )
        case State.UNKNOWN if receipt.reason != UNREADABLE:
            return _NO_WORD
    return None


UNREADABLE = "Unreadable"
"""The reason of what cannot be read, as the store has it."""
SENT_BEFORE = "SentBefore"
"""The reason of what a client sent again although it had gone out; `why` names the id that it had gone out as."""


def _failed(receipt: Receipt) -> str:
    why = receipt.why or "no answer came"
    return f"The last try failed: {why.rstrip('.')}."


def _rfc3339(at: float) -> str:
    second, microseconds = divmod(round(at * 1_000_000), 1_000_000)
    return f"{_second(second)}.{microseconds // 1000:03}Z"


@lru_cache
def _second(at: int) -> str:
    """Up to the second. Those of a page are few, and `datetime` would take half of the time that its answer takes."""
    return datetime.fromtimestamp(at, UTC).isoformat().removesuffix("+00:00")
