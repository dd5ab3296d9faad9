"""What answers hold, as structs, where they are no receipts: parts encode them, the document is made of them."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET, Struct, UnsetType

from heliograph.doors.exchange import ErrorItem
from heliograph.doors.receipts import ReceiptBody
from heliograph.model import Environment


class OneTaken(Struct):
    """One notification was taken."""

    id: str
    """Its id, which is the `apns-id` of every attempt too."""
    receipt: str
    """The path of its receipt."""


class ManyTaken(Struct):
    """Many notifications were taken."""

    ids: Sequence[str | None]
    """Their ids, in the order of the request; with `partial`, null for what was left out."""
    errors: Sequence[ErrorItem] | UnsetType = UNSET
    """With `partial`: what is wrong with those left out."""


class NotificationsBody(Struct):
    """A page of what was looked for."""

    notifications: Sequence[ReceiptBody]
    """Newest first."""
    next: str | None
    """What to send as `cursor` for more, also where nothing was found so far; null: that was all."""


class Cancelled(Struct):
    """What became of a wish to cancel, by id."""

    cancelled: Sequence[str]
    """These are not sent any more."""
    cancelling: Sequence[str]
    """These are being sent: if Apple does not take them this time, they are not tried again."""
    too_late: Sequence[str]
    """What became of these is final."""
    unknown: Sequence[str]
    """There are no such notifications."""


class BuriedBody(Struct):
    """A page of what was given up on."""

    buried: Sequence[ReceiptBody]
    """Newest first."""
    next: str | None
    """What to send as `before` for more; null: that was all."""


class Replayed(Struct):
    """What is sent again."""

    replayed: Sequence[str]
    """The ids."""


class CredentialBody(Struct):
    """Credentials, without secrets."""

    id: str
    """What to name them by in paths: a signing key's id, or the first 16 digits of a certificate's fingerprint."""
    kind: str
    """`signing key` or `certificate`."""
    name: str
    """A signing key's id, or a certificate's common name."""
    environments: Sequence[Environment]
    """What they are used for."""
    topics: Sequence[str] | None
    """What they are good for; null: every topic of the team."""
    ends_at: str | None
    """When Apple stops taking them; null: never."""
    days_left: int | None
    """Whole days until then; negative once it has passed."""
    team_id: str | UnsetType = UNSET
    """With a signing key: whose it is."""
    fingerprint: str | UnsetType = UNSET
    """With a certificate: its SHA-256."""


class AppBody(Struct):
    """An app, without secrets."""

    name: str
    """What requests call it."""
    source: str
    """`api`, or `configuration`: then it is changed in its file only."""
    topics: Sequence[str]
    """Bundle ids."""
    environments: Sequence[Environment]
    """Where it can send to."""
    host: str | None
    """Where it sends to in place of Apple; null: to Apple."""
    port: int
    """Of that host."""
    proxy: str | None
    """The HTTP proxy that it goes through, without its password."""
    credentials: Sequence[CredentialBody]
    """What it sends with."""


class AppsBody(Struct):
    """Apps."""

    apps: Sequence[AppBody]
    """By name."""


class Removed(Struct):
    """What is no longer there."""

    removed: str
    """Its name or id."""


class Life(Struct):
    """The process answers."""

    status: str
    """`ok`."""
