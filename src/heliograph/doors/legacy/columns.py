"""What frames of the binary protocol become: headers as Apple's HTTP/2 interface has them. Pure.

The old interface had no push type: a topic's suffix says it, else the payload. Its priority is Apple's of today.
Sources: Apple, "Binary Provider API" and "Sending notification requests to APNs".
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from heliograph.model import Headers, PushType
from heliograph.protocols import apns
from heliograph.protocols.binary import Frames

_MAX_SETS = 1024
"""Header sets that are kept. Scripts that count the expiration from now make a new one each second."""

_SOON_S = 1.0
"""What expires within it is past already once it is looked at again."""


def empty_frames() -> Frames:
    """None so far."""
    return Frames([], [], [], [], [])


def append(frames: Frames, more: Frames) -> None:
    """Let `frames` have these as well."""
    frames.tokens.extend(more.tokens)
    frames.payloads.extend(more.payloads)
    frames.identifiers.extend(more.identifiers)
    frames.expirations.extend(more.expirations)
    frames.priorities.extend(more.priorities)


def pick(frames: Frames, places: Sequence[int]) -> Frames:
    """Some of them."""
    return Frames(
        [frames.tokens[place] for place in places],
        [frames.payloads[place] for place in places],
        [frames.identifiers[place] for place in places],
        [frames.expirations[place] for place in places],
        [frames.priorities[place] for place in places],
    )


class HeaderSets(dict[tuple[int | None, int | None, bool], Headers]):
    """Header sets of one topic by expiration, priority and whether the payload is a background one.

    Thousands of frames share an object, which is all the faster to check and to store.
    """

    def __init__(self, topic: str, bundle_ids: Collection[str]) -> None:
        """`topic` has its suffix; empty: nobody said it."""
        super().__init__()
        self._topic = topic
        self._push_type = apns.implied_push_type(topic, bundle_ids)

    def __missing__(self, key: tuple[int | None, int | None, bool]) -> Headers:
        expiration, priority, background = key
        if background:  # Apple takes these with 5 only
            made = Headers(self._topic, PushType.BACKGROUND, 5, expiration)
        else:
            made = Headers(self._topic, self._push_type or PushType.ALERT, priority, expiration)
        self[key] = made
        return made

    def column(self, frames: Frames, now: float) -> list[Headers]:
        """One entry for all frames, or one each. An expiration that has passed becomes 0: try once.

        That is what the old gateway did, where the interface of today would refuse it.
        """
        if len(self) > _MAX_SETS:
            self.clear()
        expirations, priorities, payloads = frames.expirations, frames.priorities, frames.payloads
        soon = now + _SOON_S
        expirations = [0 if each is not None and each <= soon else each for each in expirations]
        backgrounds = [False] * len(payloads) if self._push_type else list(map(apns.is_background, payloads))
        keys = list(zip(expirations, priorities, backgrounds, strict=True))
        if keys.count(keys[0]) == len(keys):
            return [self[keys[0]]]
        return list(map(self.__getitem__, keys))
