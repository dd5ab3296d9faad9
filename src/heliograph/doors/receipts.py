"""Receipts as JSON: what became of a notification, in Apple's words, ours and a plain sentence."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from msgspec import Struct

from heliograph import reasons
from heliograph.model import MAX_BATCH, Batch, Receipt, State

PLACES = [f"{place:04x}" for place in range(1, MAX_BATCH + 1)]
"""The last four digits of the ids in a batch (see `model.Batch.id`)."""


class ReceiptBody(Struct):
    """A receipt as JSON. Times are RFC 3339, in UTC."""

    id: str
    app: str
    state: str
    reason: str | None
    status: int | None
    meaning: str
    created_at: str
    updated_at: str | None
    attempts: int
    next_attempt_at: str | None
    unique_id: str | None


def ids_body(batches: Sequence[Batch]) -> bytes:
    """All ids as JSON, in order; ids need no escaping."""
    between = '","'
    parts = [each.id + (between + each.id).join(PLACES[: len(each)]) for each in batches]
    return ('{"ids":["' + between.join(parts) + '"]}').encode()


def receipt_body(receipt: Receipt) -> ReceiptBody:
    return ReceiptBody(
        receipt.id,
        receipt.app,
        receipt.state.name.lower(),
        receipt.reason,
        200 if receipt.state is State.ACCEPTED else receipt.status,
        _meaning(receipt),
        _rfc3339(receipt.created_at),
        None if receipt.updated_at is None else _rfc3339(receipt.updated_at),
        receipt.attempts,
        None if receipt.next_attempt_at is None else _rfc3339(receipt.next_attempt_at),
        receipt.unique_id,
    )


_MEANINGS = {
    State.QUEUED: "It is waiting to be sent.",
    State.SENT: "It is being sent, once only as asked for, and Apple has not answered yet.",
    State.ACCEPTED: "Apple took it. Whether it reached the device, nobody is told.",
    State.REJECTED: "Apple said no for good.",
    State.EXPIRED: "Its expiration passed before Apple took it, so it is not sent any more.",
    State.CANCELLED: "It was cancelled before it was sent.",
    State.BURIED: "It was given up on, as its time was over. It is kept, and can be replayed.",
    State.UNKNOWN: "It was sent once, as asked for, and the answer never came.",
}


def _meaning(receipt: Receipt) -> str:
    """One sentence or two: what the state and the reason mean, and what to do."""
    meaning = _MEANINGS[receipt.state]
    if receipt.state is State.ACCEPTED or receipt.reason in (None, "TooLate"):
        return meaning
    if receipt.status is not None and receipt.state in (State.BURIED, State.EXPIRED):
        return f"{meaning} Apple's last answer was {receipt.status} {receipt.reason}."
    if receipt.status is not None:
        return f"{meaning} {reasons.find(receipt.reason, receipt.status).meaning}"
    return f"{meaning} The last try failed: {receipt.why or receipt.reason}."


def _rfc3339(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
