"""Cuts the text of an alert so that its payload fits."""

from __future__ import annotations

import re
import unicodedata

import msgspec

from heliograph import reasons
from heliograph.errors import Refused
from heliograph.payload.checking import parse

_decode = msgspec.json.Decoder().decode

_ELLIPSIS = "…".encode()

_token = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[][{}:,]', re.DOTALL).finditer

_character = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4}|\\u[0-9a-fA-F]{4}|\\."
    rb"|[\x00-\x7f]|[\xc0-\xdf].|[\xe0-\xef]..|[\xf0-\xff]...",
    re.DOTALL,
).finditer
"""One character inside a JSON string, however it is written."""


def shorten(payload: bytes, limit: int) -> bytes:
    """The payload with its alert text cut so that all of it has `limit` octets at most.

    The body is cut first, then the subtitle, then the title; each ends in an ellipsis then, and no character that
    people see as one is cut apart. Everything else stays octet by octet. A payload that fits is not looked at.

    Raises Refused: PayloadTooLarge where cutting text cannot help, BadRequestPayload where it is no payload at all.
    """
    excess = len(payload) - limit
    if excess <= 0:
        return payload
    parse(payload)
    cuts: list[tuple[int, int, bytes]] = []
    for start, end in _find_texts(payload, limit):
        if excess > 0 and end - start > len(_ELLIPSIS):
            text = _cut(payload[start:end], max(end - start - excess, len(_ELLIPSIS)))
            cuts.append((start, end, text))
            excess -= end - start - len(text)
    if excess > 0:
        raise Refused(
            reasons.PAYLOAD_TOO_LARGE.word,
            f"The payload has {len(payload)} octets and may have {limit}: that is {excess} too many even without any "
            "alert text, so shorten the rest of it.",
            field="payload",
        )
    for start, end, text in sorted(cuts, reverse=True):
        payload = payload[:start] + text + payload[end:]
    return payload


def _find_texts(payload: bytes, limit: int) -> list[tuple[int, int]]:
    """Where the texts of the alert lie, without their quotes, in the order in which they may be cut."""
    aps = _members(payload, payload.index(b"{"), limit).get("aps")
    alert = None if aps is None else _members(payload, aps[0], limit).get("alert")
    if alert is None:
        return []
    texts = [alert]
    if payload[alert[0]] == _BRACE:
        members = _members(payload, alert[0], limit)
        texts = [members[name] for name in ("body", "subtitle", "title") if name in members]
    return [(start + 1, end - 1) for start, end in texts if payload[start] == _QUOTE]


_BRACE, _QUOTE = b'{"'


def _members(payload: bytes, start: int, limit: int) -> dict[str, tuple[int, int]]:
    """Where the values of the object that begins at `start` lie; of a name that comes twice the last, as it counts.

    Nothing is found where the object has more parts than `limit` leaves room for, since none of them is text to cut.
    """
    if payload[start] != _BRACE:
        return {}
    found: dict[str, tuple[int, int]] = {}
    depth, name, value_start = 0, b"", 0
    for parts, token in enumerate(_token(payload, start + 1)):
        if parts > limit:
            break
        match token[0]:
            case b"{" | b"[":
                depth += 1
            case b"}" | b"]" if depth:
                depth -= 1
            case _ if depth:
                pass
            case b":":
                value_start = token.end()
            case b"," | b"}":
                if name:
                    value = payload[value_start : token.start()]
                    end = value_start + len(value.rstrip())
                    found[_decode(name)] = (end - len(value.strip()), end)
                if token[0] == b"}":
                    return found
                value_start = 0
            case _ if not value_start:
                name = token[0]
    return {}


def _cut(text: bytes, most: int) -> bytes:
    """As much of the start of a JSON string as fits into `most` octets with an ellipsis behind it."""
    most -= len(_ELLIPSIS)
    kept = end = flags = 0
    last = " "
    for match in _character(text):
        written = match[0]
        character: str = _decode(b'"%b"' % written) if written[:1] == b"\\" else written.decode()
        # No blank stands before the ellipsis.
        if not last.isspace() and not _belong_together(last, character, flags):
            kept = end
        end += len(written)
        if end > most:
            break
        flags = flags + 1 if _is_flag_half(character) else 0
        last = character
    return text[:kept] + _ELLIPSIS


def _belong_together(last: str, character: str, flags: int) -> bool:
    """Whether people see the two as parts of one (after Unicode Standard Annex 29, without prefixes and conjuncts).

    `flags`: how many halves of flags stand in a row up to `last`.
    """
    return (
        last == _JOINER
        or unicodedata.category(character)[0] == "M"  # combining marks and variation selectors
        or character in _EXTENDING
        or (flags % 2 == 1 and _is_flag_half(character))
        or "\u1160" <= character <= "\u11ff"  # vowels and final consonants of a Hangul syllable
        or "\U0001f3fb" <= character <= "\U0001f3ff"  # skin tones
        or "\U000e0020" <= character <= "\U000e007f"  # tags, as in the flag of Scotland
    )


_JOINER = "\u200d"
_EXTENDING = _JOINER + "\u200c\uff9e\uff9f"


def _is_flag_half(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"
