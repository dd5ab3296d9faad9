"""What a payload can be built of, as far as it is more than a string or a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from msgspec import Struct


class InterruptionLevel(StrEnum):
    """How much an alert may disturb."""

    PASSIVE = "passive"
    ACTIVE = "active"
    TIME_SENSITIVE = "time-sensitive"
    CRITICAL = "critical"


class Localized(Struct, frozen=True, forbid_unknown_fields=True):
    """A text that the device looks up in the app's own language files."""

    loc_key: str
    """The text's key in the app's language files."""
    loc_args: Sequence[str] = ()
    """What the device puts in place of `%@` in it, in order."""


class CriticalSound(Struct, frozen=True, forbid_unknown_fields=True):
    """A sound with a volume, heard although the device is muted; the app needs Apple's leave for that."""

    name: str = "default"
    """A file of the app, or `default`."""
    volume: float | None = None
    """Within 0 (silent) and 1; without it as the device has it."""
    critical: bool = True
    """False: it is a sound like others, with a volume."""


class LiveActivity(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What starts, updates or ends a Live Activity. All times are UNIX seconds."""

    event: str
    """`start`, `update` or `end`."""
    timestamp: int
    """When this was so; the device shows the newest."""
    content_state: Mapping[str, Any] | None = None
    """What it shows, as the app decodes it."""
    stale_date: int | None = None
    """From when on it is out of date."""
    dismissal_date: int | None = None
    """With `end`: when it goes from the Lock Screen; a time that has passed means now."""
    attributes_type: str | None = None
    """With `start`: the name of the app's type that `attributes` are decoded as."""
    attributes: Mapping[str, Any] | None = None
    """With `start`: what it starts from, as the app decodes it."""
    input_push_token: bool = False
    """With `start`: have the device make a token to send updates to."""
    input_push_channel: str | None = None
    """With `start`: the channel that updates come from, as Apple returned it."""
