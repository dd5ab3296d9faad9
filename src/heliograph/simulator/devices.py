"""What devices there are and what they show. Pure.

A device token is one app on one device, so "device" stands for both. In the lenient mode, the default, a device is
there as soon as it is pushed to, for every topic and with a network; in the strict mode it must be registered first.

What Apple keeps for a device without a network, by "Sending notification requests to APNs" and "Viewing the status of
push notifications using Metrics and APNs", where nothing else is said:

- One notification for each app and device. Apple says that it is the newest "in most cases": here it always is, and
  whatever its collapse id, push type or priority.
- It is kept until its expiration, but no longer than 30 days, and so long where it has none. Expiration 0 is one
  attempt: it is not kept, nor is one that has expired already; what was kept before stays (our choice).
- What has expired when the device is back is discarded. A device with a network shows what has expired as well: Apple
  calls an expiration a best effort, and attempts everything once (our choice).
- An app that is uninstalled gets nothing of what was kept. What it showed before can still be read (our choice: tests
  want to know), and so it is once the app is registered again.

A notification with the collapse id of an earlier one takes its place on the device. What the device itself does (alerts
that are switched off, background pushes that it holds back to save power) is not simulated: it shows everything.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable
from math import inf
from typing import Literal

from msgspec import Struct

from heliograph import reasons
from heliograph.complaints import shown
from heliograph.errors import Refused
from heliograph.model import DeviceToken, Environment, PushType
from heliograph.protocols import apns

KEEP = 1000
"""Notifications that stay readable in `Apple.received` and `Apple.shown`, over all devices."""

STORED_S = 30 * 86_400
"""How long Apple keeps a notification without an expiration, at most."""

State = Literal["installed", "uninstalled"]


class Received(Struct, frozen=True):
    """A notification that was accepted: what its device would be shown."""

    id: str
    """The `apns-id`, the client's or ours."""
    token: DeviceToken
    topic: str
    push_type: PushType
    payload: bytes
    collapse_id: str | None = None
    identifier: int | None = None
    """What the client called it, where it came to the binary gateway (0: nothing); None: it came by HTTP/2."""

    @property
    def door(self) -> str:
        """`http2` or `legacy`."""
        return "http2" if self.identifier is None else "legacy"

    def __repr__(self) -> str:
        return f"<notification {self.id} for {self.topic}>"


class Shown(Struct, frozen=True):
    """A notification that reached its device, and was shown or handed to the app."""

    received: Received
    at: float
    """UNIX seconds at which it got there."""


class Gone(Struct, frozen=True):
    """A device token as the feedback service lists it."""

    token: DeviceToken
    at: int
    """UNIX seconds at which its app was found to be gone."""

    def __repr__(self) -> str:
        return "<device token that is gone>"


class Device(Struct, frozen=True):
    """A device as it is at the moment."""

    token: DeviceToken
    topic: str | None
    """The topic that its token is for; None: any."""
    environment: Environment | None
    """Where its token lives; None: in the simulator's environment, whichever that is."""
    state: State = "installed"
    since: int | None = None
    """UNIX milliseconds from which the app is gone."""
    online: bool = True
    waiting: Received | None = None
    """What Apple keeps for it until it has a network again."""

    def __repr__(self) -> str:
        return f"<device, {self.state}, {'online' if self.online else 'offline'}>"


Entry = tuple[bytes, bytes, str, PushType, bytes, bytes | None, int | None, float]
"""An accepted notification as it is kept, for speed: as `Received`, and when."""


class Known(Struct):
    """A device of which more is known than that it exists."""

    topic: bytes | None = None
    environment: Environment | None = None
    since: int | None = None
    online: bool = True
    stored: Entry | None = None
    expires_at: float = inf
    """UNIX seconds, of what is stored."""


is_topic = re.compile(rb"[A-Za-z0-9._-]{1,255}").fullmatch


def check_topic(topic: str) -> str:
    """The same, if a request could ever have it as its topic or bundle id. Raises Refused."""
    if not is_topic(topic.encode(errors="replace")):
        text = f"{shown(topic)!r} is no bundle id: it is letters, digits, hyphens and periods, 255 of them at most."
        raise Refused(reasons.BAD_TOPIC.word, text, field="topic")
    return topic


class Devices:
    """All devices of a simulator."""

    def __init__(self, *, strict: bool, keep: int) -> None:
        self.strict = strict
        """Whether only registered devices exist."""
        self._known: dict[bytes, Known] = {}
        self._accepted: deque[Entry] = deque(maxlen=keep)
        self._arrived: deque[Entry] = deque(maxlen=keep)
        self._followers: list[Callable[[Shown], None]] = []
        self._gone: dict[bytes, int] = {}
        """What the feedback service lists."""

    # -- what there is -------------------------------------------------------------------------------------------

    def register(self, token: str, *, topic: str | None = None, environment: Environment | None = None) -> None:
        """The app is on the device (again). The token is for `topic` only and of `environment`; None: any, and ours.

        A device without a network stays without one. Raises Refused where token or topic are none, ValueError where the
        environment is none.
        """
        octets = apns.check_token(token)
        lives = None if environment is None else Environment(environment)  # in tests it may well be a word
        scope = None if topic is None else check_topic(topic).encode()
        device = self._known.setdefault(octets, Known())
        device.topic = scope
        device.environment = lives
        device.since = None

    def unregister(self, token: str, since: int) -> None:
        """The app is gone from the device: 410 from now on, with `since` (UNIX milliseconds) as its timestamp.

        Raises Refused where the token is none.
        """
        device = self._known.setdefault(apns.check_token(token), Known())
        device.since = since
        device.stored = None

    def go_offline(self, token: str) -> None:
        """The device loses its network. Raises Refused where there is no such device."""
        self._find(token).online = False

    def come_online(self, token: str, now: float) -> None:
        """The device has a network again, and shows what Apple kept for it. `now` is UNIX seconds.

        Raises Refused where there is no such device.
        """
        device = self._find(token)
        device.online = True
        stored, device.stored = device.stored, None
        if stored is not None and now < device.expires_at:
            self._arrive((*stored[:-1], now))

    def devices(self) -> list[Device]:
        """Those that something is known of, then those that were pushed to, as far back as is kept."""
        found = [_device(token, known) for token, known in self._known.items()]
        others = dict.fromkeys(entry[1] for entry in self._accepted if entry[1] not in self._known)
        return found + [Device(DeviceToken(token.decode()), None, None) for token in others]

    # -- what the feedback service lists --------------------------------------------------------------------------

    @property
    def feedback(self) -> list[Gone]:
        """What the feedback service would list now: device tokens that the binary gateway was given in vain."""
        return [Gone(DeviceToken(token.decode()), at) for token, at in self._gone.items()]

    def add_feedback(self, tokens: Iterable[str], at: int) -> None:
        """Have the feedback service list these device tokens as well, with this time (UNIX seconds).

        Those that it lists already get the later of the two times. Raises Refused where one is none, and adds none.
        """
        if not 0 <= at < 1 << 32:
            raise ValueError("`at` is from 0 to 4294967295: the service tells UNIX seconds in 32 bits")
        for octets in [apns.check_token(token) for token in tokens]:
            self._gone[octets] = max(at, self._gone.get(octets, 0))

    def forget_feedback(self, told: Iterable[Gone] | None = None) -> None:
        """Take these off the list, unless something newer is known of them; None: all of them."""
        if told is None:
            self._gone.clear()
            return
        for each in told:
            octets = each.token.encode()
            if self._gone.get(octets) == each.at:
                del self._gone[octets]

    # -- what they got -------------------------------------------------------------------------------------------

    @property
    def received(self) -> list[Received]:
        """The notifications that were accepted last, oldest first, whether their devices had a network or not."""
        return [_received(entry) for entry in self._accepted]

    def clear_received(self) -> None:
        """Forget what was received and shown so far. What waits for a device still does."""
        self._accepted.clear()
        self._arrived.clear()

    def shown(self, token: str | None = None) -> list[Shown]:
        """What a device shows, or all of them, in the order of arrival, as far back as is kept.

        A notification with the collapse id of an earlier one stands for both. Raises Refused where the token is none.
        """
        wanted = None if token is None else apns.check_token(token)
        found: dict[object, Entry] = {}
        for place, entry in enumerate(self._arrived):
            if wanted is None or entry[1] == wanted:
                key = place if entry[5] is None else (entry[1], entry[5])
                found.pop(key, None)
                found[key] = entry
        return [Shown(_received(entry), entry[-1]) for entry in found.values()]

    def follow(self, callback: Callable[[Shown], None]) -> Callable[[], None]:
        """Have `callback` called whenever a device shows something; what is returned ends that.

        It is called before the answer goes out, with the notification as it came, and must neither block nor raise.
        """

        def follower(shown: Shown) -> None:  # the same callback may follow twice
            callback(shown)

        self._followers.append(follower)

        def end() -> None:
            if follower in self._followers:
                self._followers.remove(follower)

        return end

    # -- for Apple -----------------------------------------------------------------------------------------------

    def _take(self, entry: Entry, device: Known | None, expiration: bytes | None) -> None:
        """A notification was accepted: show it, or keep it for later."""
        self._accepted.append(entry)
        if device is None or device.online:
            self._arrive(entry)
            return
        expires_at = entry[-1] + STORED_S if expiration is None else min(float(expiration), entry[-1] + STORED_S)
        if expires_at > entry[-1]:
            device.stored = entry
            device.expires_at = expires_at

    def _arrive(self, entry: Entry) -> None:
        self._arrived.append(entry)
        if self._followers:
            shown = Shown(_received(entry), entry[-1])
            for follower in tuple(self._followers):
                follower(shown)

    def _forget_devices(self) -> None:
        self._known.clear()
        self._gone.clear()
        self.clear_received()

    def _find(self, token: str) -> Known:
        octets = apns.check_token(token)
        if self.strict and octets not in self._known:
            raise Refused(
                reasons.BAD_DEVICE_TOKEN.word,
                "There is no such device, as this simulator is strict: register its token first.",
                field="token",
            )
        return self._known.setdefault(octets, Known())


def _device(token: bytes, known: Known) -> Device:
    return Device(
        DeviceToken(token.decode()),
        None if known.topic is None else known.topic.decode(),
        known.environment,
        "installed" if known.since is None else "uninstalled",
        known.since,
        known.online,
        None if known.stored is None else _received(known.stored),
    )


def _received(entry: Entry) -> Received:
    apns_id, token, topic, push_type, payload, collapse_id, identifier, _ = entry
    return Received(
        apns_id.decode(),
        DeviceToken(token.decode()),
        topic,
        push_type,
        payload,
        None if collapse_id is None else collapse_id.decode("utf-8", "replace"),
        identifier,
    )
