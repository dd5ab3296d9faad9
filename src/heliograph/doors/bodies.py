"""The body of a request as a struct; what it may not hold is refused, with what was probably meant."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from msgspec import Struct

from heliograph.complaints import closest, dissect, sandbox_hint, shown
from heliograph.doors.exchange import Problem
from heliograph.errors import Refused
from heliograph.model import App, Environment

_T = TypeVar("_T", bound=Struct)

TIME = "a time with its offset, such as 2026-11-21T12:00:00Z"


def parse(body: bytes, kind: type[_T]) -> _T:
    """What the body says. Raises Problem, Refused, which never repeat a value."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(error, kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Problem(400, "InvalidJson", "The body is not JSON in UTF-8: send a JSON object.") from None


def check_environment(app: App, environment: Environment | None) -> None:
    """Raises Refused where it is none of the app's."""
    if environment is not None and environment not in app.environments:
        text = f"The app {app.name!r} is not set up for {environment}: its credentials are for {app.environments[0]}."
        raise Refused("UnknownEnvironment", text, field="environment")


def _invalid(error: msgspec.ValidationError, kind: type[Struct]) -> Refused:
    dislike = dissect(error)
    if dislike.unknown is not None:
        known = kind.__struct_fields__
        close = closest(dislike.unknown, known)
        hint = f"Did you mean {close}?" if close else f"Known here are {', '.join(known)}."
        name = shown(dislike.unknown)
        return Refused("UnknownField", f"There is no field {name!r} here. {hint}", field=name)
    field = dislike.place or None
    if dislike.words.startswith("Invalid enum value"):
        text = f"{field} must be one of {', '.join(Environment)}.{sandbox_hint(dislike)}"
        return Refused("BadEnvironment", text, field=field)
    if "RFC3339" in dislike.words or "timezone" in dislike.words or "datetime" in dislike.words:
        return Refused("BadType", f"{field} must be {TIME}.", field=field)
    plain = dislike.words.replace("`", "")
    return Refused("BadType", f"{field or 'The body'}: {plain[:1].lower()}{plain[1:]}.", field=field)
