"""What became of a batch, between the database's columns and the model: what every database does alike. Pure."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec
from msgspec.structs import replace

from heliograph.errors import StoreError
from heliograph.model import Detail, Environment, Headers, Outcomes, Receipt, State
from heliograph.stores.body import Places

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


def receipt(id: str, row: tuple[Any, ...], details: dict[int, Detail], places: Places | None) -> Receipt | None:
    """The receipt of `id` from its batch's row; None where the batch has no such place.

    `row` has the batch's id, app, environment, created_at and size, then its states, times_ms and more, or None.
    """
    _, app, environment, created_at, size, states, times_ms, *_ = row
    index = int(id[-4:], 16) - 1
    if not 0 <= index < size:
        return None
    state = State.QUEUED if states is None else State(states[index])
    detail = details.get(index)
    if detail is None and state is State.QUEUED:
        detail, updated_at = _NEVER, None
    else:
        updated_at = created_at + int.from_bytes(times_ms[4 * index : 4 * index + 4], "big") / 1000
        if detail is None:
            detail = _ONCE if state is State.ACCEPTED or state is State.SENT else _NEVER
        elif state is State.QUEUED:
            detail = replace(detail, attempts=detail.attempts - 1)  # it has the number of the next one
    if places is not None:
        try:
            headers, token = places.headers(index), places.token(index)
        except IndexError:  # damaged
            headers, token = _NO_HEADERS, None
        connection, identifier, apns_id = places.connection, places.identifier(index), places.apns_id(index)
    else:
        headers, token = _NO_HEADERS, None
        connection, identifier, apns_id = None, None, None
    # By position, which takes half as long: there are a thousand in an answer.
    return Receipt(
        id,
        app,
        state,
        created_at,
        updated_at,
        detail.reason,
        detail.status,
        detail.since,
        detail.unique_id,
        detail.attempts,
        detail.due_at,
        detail.why,
        detail.cancelled,
        _ENVIRONMENTS[environment],
        headers.topic or None,
        None if token is None else headers.push_type,
        token,
        id if headers.collapse_on_id else headers.collapse_id,
        headers.expiration,
        connection,
        identifier,
        apns_id,
    )


_ONCE, _NEVER = Detail(0), Detail(0, attempts=0)
_NO_HEADERS = Headers("")
_ENVIRONMENTS = {each.value: each for each in Environment}


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
        unanswered = index in details and details[index].unanswered
        details[index] = Detail(index, due_at=now, again_from=now, unanswered=unanswered)
        again.append(index)
    return Outcomes(known.batch_id, known.attempt, bytes(states), bytes(times_ms), tuple(details.values())), again


def call_off(known: Outcomes, indices: Collection[int], age_s: float) -> tuple[Outcomes, list[int]]:
    """`known` with those of `indices` called off that are queued, and which those are.

    They are cancelled, but for what Apple may have taken when it was tried: that is unknown.
    """
    moment = _moment(age_s)
    states = bytearray(known.states)
    times_ms = bytearray(known.times_ms)
    details = {detail.index: detail for detail in known.details}
    called_off = []
    for index in indices:
        if not 0 <= index < len(states) or states[index] != State.QUEUED:
            continue
        state = State.CANCELLED
        if index in details:
            if details[index].cancelled:  # it was on its way when its holder was lost: nobody knows what became of it
                continue
            detail = replace(details[index], attempts=details[index].attempts - 1, due_at=None)
            if detail.unanswered:
                state, detail = State.UNKNOWN, detail.left_unanswered()
            details[index] = detail
        states[index] = state
        times_ms[4 * index : 4 * index + 4] = moment
        called_off.append(index)
    return Outcomes(known.batch_id, known.attempt, bytes(states), bytes(times_ms), tuple(details.values())), called_off


def _moment(age_s: float) -> bytes:
    """A time as `Outcomes.times_ms` has it."""
    return min(max(round(age_s * 1000), 0), 2**32 - 1).to_bytes(4, "big")
