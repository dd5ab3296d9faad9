"""What columns of the SQLite store hold, to and from the words of the model, and how many rows are written at once."""

from __future__ import annotations

import binascii
import re
from collections.abc import Sequence
from itertools import chain

import apsw
import msgspec

from heliograph.errors import StoreError
from heliograph.model import ApiKey, Batch, Detail, KnownCaller, Outcomes, Scope, State
from heliograph.stores.body import Places, pack
from heliograph.stores.outcomes import decode_details, encode_details
from heliograph.stores.sqlite_file import Row

CANONICAL = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""A notification's id in lower case."""

_ROWS = 64
"""Rows in one statement. Each call of SQLite gives up the interpreter's lock, and a busy event loop may then keep it
for a switch interval: a thousand calls for a thousand rows took seconds. One for 64 rows also costs half the CPU."""

_encode = msgspec.json.encode
_decode_scopes = msgspec.json.Decoder(tuple[Scope, ...]).decode
_decode_apps = msgspec.json.Decoder(tuple[str, ...]).decode
_decode_caller = msgspec.json.Decoder(KnownCaller).decode


def key_of(id: str) -> bytes:
    """The 16 octets of the batch with this id, which lacks its last four digits (see `Batch.id`)."""
    key = bytes.fromhex(id.replace("-", "") + "0000")
    if len(key) != 16:
        raise ValueError("a batch's id is a UUID without its last four digits")
    return key


def id_of(key: bytes) -> str:
    """The batch's id again."""
    digits = key.hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:28]}"


def batch_row(batch: Batch) -> Row:
    """As the table has it, but for its number: the batch's key first. Raises ValueError as `body.pack`."""
    connection = None if batch.origin is None else batch.origin.connection
    return (
        key_of(batch.id),
        batch.app,
        batch.environment.value,
        batch.created_at,
        len(batch),
        pack(batch),
        connection,
    )


def apns_id_key(text: str) -> bytes:
    """The 16 octets of an id that a caller brought, in whatever case. Raises ValueError if it is no canonical UUID."""
    if not CANONICAL.fullmatch(text.lower()):
        raise ValueError("an id that a caller brings is a canonical UUID")
    return bytes.fromhex(text.replace("-", ""))


def outcome_row(known: Outcomes) -> Row:
    """As `sqlite_records.record_outcomes` writes it: the batch's key first, and last whether any of it is buried."""
    buried = State.BURIED in known.states
    details = encode_details(known.details)
    return key_of(known.batch_id), known.attempt, known.states, known.times_ms, details, buried


def details_of(stored: bytes | None) -> dict[int, Detail]:
    """By index. Where they are damaged the states still count, and no other batch's reader may suffer."""
    try:
        return {detail.index: detail for detail in decode_details(stored)}
    except StoreError:
        return {}


def places_of(start: bytes) -> Places | None:
    """What the beginning of a stored body says of its places. None where it is damaged: the states still count."""
    try:
        return Places(start)
    except StoreError:
        return None


def octets_of(token: str) -> bytes:
    """What its hex digits spell; what is no hex as it is."""
    digits = token.encode()
    try:
        return binascii.unhexlify(digits)
    except binascii.Error:
        return digits


def api_key_row(key: ApiKey) -> Row:
    """As the table has it."""
    apps = None if key.apps is None else _encode(key.apps).decode()
    return key.id, key.name, key.digest, _encode(key.scopes).decode(), apps, key.created_at, key.expires_at


def api_key(row: Row) -> ApiKey | None:
    """None where it is damaged: such a key opens nothing, and the others must not suffer."""
    key_id, name, digest, scopes, apps, created_at, expires_at = row
    try:
        only = None if apps is None else _decode_apps(apps)
        return ApiKey(key_id, name, digest, _decode_scopes(scopes), only, created_at, expires_at)
    except msgspec.DecodeError:
        return None


def caller_row(caller: KnownCaller) -> Row:
    """As the table has it."""
    return caller.id, _encode(caller)


def caller_of(record: bytes) -> KnownCaller | None:
    """None where it is damaged: such a caller is not known, and the others must not suffer."""
    try:
        return _decode_caller(record)
    except msgspec.DecodeError:
        return None


def write_rows(db: apsw.Connection, sql: str, rows: Sequence[Row]) -> list[Row]:
    """Run `sql` for `rows`, which stand where it says `{rows}`; what it returns."""
    returned: list[Row] = []
    for start in range(0, len(rows), _ROWS):
        some = rows[start : start + _ROWS]
        marks = ",".join([f"({','.join('?' * len(some[0]))})"] * len(some))
        returned += db.execute(sql.format(rows=marks), tuple(chain.from_iterable(some))).fetchall()
    return returned
