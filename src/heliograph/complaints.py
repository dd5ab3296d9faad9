"""What a typed decode disliked, told so that a caller can act on it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

import msgspec
from msgspec import Struct

_SHOWN = 64
"""Characters of a caller's own word that an answer repeats."""

_UNKNOWN = "Object contains unknown field `"
_AT = " - at `$"
_PLACE_CHARS = 200
"""No place in a body of ours is longer."""
_is_place = re.compile(r"[a-z0-9_.\[\]]*").fullmatch


class Dislike(Struct, frozen=True):
    """A complaint of msgspec in its parts."""

    words: str
    """Empty for an unknown field. They hold a value of the caller's for an enum, and never otherwise."""
    place: str
    """Such as `notifications[0].sound`; empty: the whole."""
    unknown: str | None = None
    """The name of a field that there is not; its beginning where it is long."""


def dissect(error: msgspec.ValidationError) -> Dislike:
    """In time and memory that hardly grow with what the caller named."""
    text = str(error)
    if text.startswith(_UNKNOWN):
        # First of all, as a name may look like anything, and like a place behind it too.
        begin = len(_UNKNOWN)
        end = text.rfind("`" + _AT, max(begin, len(text) - _PLACE_CHARS))
        place = text[end + 1 + len(_AT) : -1]
        if end < 0 or not _is_place(place):
            end, place = len(text) - 1, ""
        return Dislike("", place.removeprefix(".")[:_SHOWN], text[begin : min(end, begin + _SHOWN + 1)])
    words, at, place = text.rpartition(_AT)
    if not at:
        return Dislike(text, "")
    return Dislike(words, place.removesuffix("`").removeprefix(".")[:_SHOWN])


def sandbox_hint(dislike: Dislike) -> str:
    """What to say behind the environments that there are, to who used Apple's other word for one."""
    return " Apple's sandbox is called development here." if dislike.words.endswith(" 'sandbox'") else ""


def closest(name: str, known: Iterable[str]) -> str | None:
    """Which of the known names may have been meant."""
    return next(iter(get_close_matches(name[:_SHOWN].lower(), list(known), n=1)), None)


def shown(name: str) -> str:
    """A word of the caller's as an answer repeats it."""
    return name if len(name) <= _SHOWN else f"{name[: _SHOWN - 3]}..."
