"""What became of a batch, between the database's columns and the model: what every database does alike. Pure."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec

from heliograph.errors import StoreError
from heliograph.model import Detail, Outcomes, Receipt, State

UNREADABLE = "Unreadable"
"""The reason in the receipts of a batch that is damaged in the store."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[Detail, ...]).decode


def encode_details(details: tuple[Detail, ...]) -> bytes | None:
    """What a column holds; None where there are none."""
    return _encode(details) if details else None


def decode_details(stored: bytes | None) -> tuple[Detail, ...]:
    """What `encode_details` was given. Raises StoreError when `stored` is not what it made."""
    try:
        return _decode(stored) if stored else ()
    except msgspec.DecodeError as error:
        raise StoreError(f"Stored outcomes cannot be read: {error}") from error


def receipt(id: str, row: tuple[Any, ...], details: dict[int, Detail]) -> Receipt | None:
    """The receipt of `id` from its batch's row; None where the batch has no such place.

    `row` has the batch's id, app, created_at and size, then its states, times_ms and details or None for each.
    """
    _, app, created_at, size, states, times_ms, _ = row
    index = int(id[-4:], 16) - 1
    if not 0 <= index < size:
        return None
    state = State.QUEUED if states is None else State(states[index])
    detail = details.get(index)
    if detail is None and state is State.QUEUED:
        return Receipt(id, app, state, created_at)
    updated_at = created_at + int.from_bytes(times_ms[4 * index : 4 * index + 4], "big") / 1000
    if detail is None:
        attempts = 1 if state in (State.ACCEPTED, State.SENT) else 0
        return Receipt(id, app, state, created_at, updated_at, attempts=attempts)
    return Receipt(
        id,
        app,
        state,
        created_at,
        updated_at,
        reason=detail.reason,
        why=detail.why,
        status=detail.status,
        since=detail.since,
        unique_id=detail.unique_id,
        attempts=detail.attempts - (state is State.QUEUED),  # of what waits, the detail has the number of the next try
        next_attempt_at=detail.due_at,
    )


def bury(known: Outcomes, attempt: int, age_s: float) -> Outcomes:
    """`known` with an end for all that had none, as the batch cannot be read. What may have been sent is unknown."""
    moment = _moment(age_s)
    times_ms = bytearray(known.times_ms)
    details = {detail.index: detail for detail in known.details}
    for index, state in enumerate(known.states):
        if state in {State.QUEUED, State.SENT}:
            times_ms[4 * index : 4 * index + 4] = moment
            details[index] = Detail(index, reason=UNREADABLE, attempts=attempt)
    states = known.states.translate(_ENDED)
    return Outcomes(known.batch_id, attempt, states, bytes(times_ms), tuple(details.values()))


_ENDED = bytes.maketrans(bytes((State.QUEUED, State.SENT)), bytes((State.BURIED, State.UNKNOWN)))


def exhume(known: Outcomes, indices: Collection[int], now: float, age_s: float) -> tuple[Outcomes, list[int]]:
    """`known` with those of `indices` queued again that are buried and can be read, and which those are."""
    moment = _moment(age_s)
    states = bytearray(known.states)
    times_ms = bytearray(known.times_ms)
    details = {detail.index: detail for detail in known.details}
    again = []
    for index in indices:
        if not 0 <= index < len(states) or states[index] != State.BURIED:
            continue
        if index in details and details[index].reason == UNREADABLE:
            continue
        states[index] = State.QUEUED
        times_ms[4 * index : 4 * index + 4] = moment
        details[index] = Detail(index, due_at=now, again_from=now)
        again.append(index)
    return Outcomes(known.batch_id, known.attempt, bytes(states), bytes(times_ms), tuple(details.values())), again


def _moment(age_s: float) -> bytes:
    """A time as `Outcomes.times_ms` has it."""
    return min(max(round(age_s * 1000), 0), 2**32 - 1).to_bytes(4, "big")
