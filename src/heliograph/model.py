"""The vocabulary as frozen structs and enums; nothing here does anything.

A **batch** is up to 1,000 notifications of one app and environment that came in together. It is the unit of storage,
queueing and settling; a single notification is a batch of one. A notification has no object of its own between the
queue and the socket: it is a place (0-based `index`) in a batch, and its columns are read from there.

Identity. A notification's id is a UUIDv7 whose last 16 bits are its place in the batch, counted from 1; the batch's id
is the same with zeros there (RFC 9562, section 5.7, leaves those bits to us). So an id alone finds its batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum, StrEnum

from msgspec import Struct
from msgspec.structs import force_setattr, replace

MAX_BATCH = 1000
"""Notifications in one batch, at most."""

MAX_BATCH_BYTES = 512 * 1024
"""Tokens and payloads of one batch together, at most."""


class Environment(StrEnum):
    """Where a device token lives; Apple calls the second one sandbox as well."""

    PRODUCTION = "production"
    DEVELOPMENT = "development"


class PushType(StrEnum):
    """Apple's `apns-push-type` (Apple, "Sending notification requests to APNs")."""

    ALERT = "alert"
    BACKGROUND = "background"
    LOCATION = "location"
    VOIP = "voip"
    COMPLICATION = "complication"
    FILEPROVIDER = "fileprovider"
    MDM = "mdm"
    LIVEACTIVITY = "liveactivity"
    PUSHTOTALK = "pushtotalk"
    WIDGETS = "widgets"
    CONTROLS = "controls"


class State(IntEnum):
    """The last known state of a notification; one octet a notification in a batch's outcomes."""

    QUEUED = 0
    """Not sent yet, or to be sent again."""
    ACCEPTED = 1
    """Apple answered 200. Nobody knows whether it reached the device."""
    REJECTED = 2
    """Apple said no for good."""
    EXPIRED = 3
    """Its expiration passed first."""
    CANCELLED = 4
    BURIED = 5
    """Given up on; kept for people to see and replay."""
    UNKNOWN = 6
    """Sent at most once, by request, and the answer never came."""
    SENT = 7
    """Is being sent at most once: written down before, so that nobody sends it a second time. No end yet."""


class DeviceToken(str):
    """Apple's opaque address of an app on a device, as lower-case hex of any length. Shown redacted."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<device token of {len(self) // 2} octets>"


class Headers(Struct, frozen=True, omit_defaults=True):
    """What Apple reads from request headers, but for the id; many notifications of a batch share one.

    Values are those of the wire: `expiration` is UNIX seconds, 0 means try once, None means not sent.
    """

    topic: str
    push_type: PushType = PushType.ALERT
    priority: int | None = None
    expiration: int | None = None
    collapse_id: str | None = None
    """At most 64 octets of UTF-8."""
    collapse_on_id: bool | None = None
    """Send each notification's own id as its collapse id, so that a duplicate replaces itself on the device.
    None: admission decides."""
    at_most_once: bool = False
    """Never send it again where Apple may have acted on it."""


class Origin(Struct, frozen=True, omit_defaults=True):
    """Which connection brought a batch, for whoever asks what became of what was sent there."""

    connection: str
    """The door's name for it, as in its log lines; never used twice."""
    identifiers: bytes = b""
    """What the client calls each notification, 4 octets each, big-endian; empty where it calls them nothing."""

    def part(self, start: int, stop: int) -> Origin:
        """That of some of the notifications."""
        return Origin(self.connection, self.identifiers[4 * start : 4 * stop])


class Batch(Struct, frozen=True):
    """Up to `MAX_BATCH` notifications of one app and environment. Immutable once stored.

    Columns, one entry a notification in order: `tokens` always; `payloads` has one entry for all or one each;
    `headers_of` has the position in `headers` for each, or is None where all use the first.
    """

    id: str
    """32 characters: the canonical UUID's text without its last four digits. The notification at `index` has the
    id `id + f"{index + 1:04x}"`, the batch itself `id + "0000"`."""
    app: str
    environment: Environment
    created_at: float
    """UNIX seconds."""
    headers: tuple[Headers, ...]
    tokens: Sequence[bytes]
    """Device tokens as lower-case ASCII hex, as the wire wants them."""
    payloads: Sequence[bytes]
    headers_of: bytes | None = None
    origin: Origin | None = None
    apns_ids: Mapping[int, str] = {}
    """By index: ids that callers brought themselves, canonical UUIDs. They are sent in place of ours."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"<batch {self.id}0000 of {len(self.tokens)} for {self.app}>"


NO_ANSWER = "NoAnswer"
"""The reason where a request went out and nobody knows whether Apple acted on it."""


class Detail(Struct, frozen=True, omit_defaults=True):
    """What is known of one notification beyond its state octet and time; only those with news have one."""

    index: int
    reason: str | None = None
    """Apple's word (`BadDeviceToken`), or ours where Apple said nothing (`NotProcessed`, `NoAnswer`, `TooLate`)."""
    status: int | None = None
    """Apple's HTTP status."""
    since: int | None = None
    """With 410: UNIX milliseconds from which the token is dead, as Apple says."""
    unique_id: str | None = None
    """Apple's `apns-unique-id`, where the sandbox gave one."""
    attempts: int = 1
    """The number of the last counted try; of the next one where it is queued."""
    due_at: float | None = None
    """UNIX seconds of the next try of a deferred one."""
    why: str | None = None
    """What happened, in a sentence, where Apple said nothing."""
    unanswered: bool = False
    """An answer to one of its tries never came, so Apple may have taken it whatever came of the later ones."""
    again_from: float | None = None
    """UNIX seconds when somebody had a buried one sent again: patience counts from there."""

    cancelled: bool = False
    """Somebody cancelled it while it was being sent: whatever becomes of that, it is not sent again."""

    def left_unanswered(self) -> Detail:
        """Of one that is called off after an answer never came: that is what there is to say of it."""
        why = self.why if self.reason == NO_ANSWER else "an earlier try was not answered"
        return replace(self, reason=NO_ANSWER, status=None, why=why)


class Outcomes(Struct, frozen=True):
    """What became of a batch so far; recorded whole each time, beside the batch's immutable body."""

    batch_id: str
    attempt: int
    """The lease under which this was learnt; what an older lease says is not recorded."""
    states: bytes
    """One `State` octet a notification."""
    times_ms: bytes
    """One big-endian uint32 a notification: milliseconds from `created_at` to when its state was last set."""
    details: tuple[Detail, ...] = ()


class Receipt(Struct, frozen=True):
    """The last known state of one notification."""

    id: str
    app: str
    state: State
    created_at: float
    updated_at: float | None = None
    """UNIX seconds when the state was last set; None while nothing has happened."""
    reason: str | None = None
    status: int | None = None
    since: int | None = None
    """UNIX milliseconds, with 410."""
    unique_id: str | None = None
    attempts: int = 0
    next_attempt_at: float | None = None
    why: str | None = None
    """What happened, in a sentence, where Apple said nothing."""
    cancelling: bool = False
    """It is being sent, and not again: it is cancelled if Apple does not take it this time."""
    environment: Environment | None = None
    topic: str | None = None
    """This and what follows is None too where it can be read no more."""
    push_type: PushType | None = None
    token: DeviceToken | None = None
    collapse_id: str | None = None
    """As Apple got it: the notification's own id where nobody gave one."""
    expiration: int | None = None
    """As in `Headers`."""
    connection: str | None = None
    """As in `Origin`; None where it did not come by such a connection."""
    identifier: int | None = None
    """What the client of that connection called it."""
    apns_id: str | None = None
    """The id that its caller brought, and that it was sent under; None: it was sent under `id`."""


class Filter(Struct, frozen=True):
    """Which notifications are looked for; None is any."""

    apps: frozenset[str] | None = None
    environment: Environment | None = None
    states: frozenset[State] | None = None
    reason: str | None = None
    token: bytes | None = None
    """Lower-case hex."""
    push_type: PushType | None = None
    topic: str | None = None
    since: float | None = None
    """UNIX seconds of the taking: not before."""
    until: float | None = None
    """Before."""
    connection: str | None = None
    """As in `Origin`."""


class Page(Struct, frozen=True):
    """Part of what was looked for, newest first."""

    receipts: Sequence[Receipt]
    next: str | None
    """The id of a notification before which to look on, also where nothing was found so far; None: that was all."""


class Once(Struct, frozen=True):
    """What keeps a repeated request from being taken twice; kept with what it put for as long as callers may repeat."""

    key: bytes
    """32 octets: which request this is, by its caller's word for it."""
    request: bytes
    """32 octets: a digest of what was asked, to tell a repetition from another request under the same word."""
    answer: bytes
    """What the door makes its answer from, whoever asks again."""


class Removal(Struct, frozen=True):
    """A device token that Apple says is dead (410).

    The token may come back: a registration newer than `since` wins (Apple, "Handling notification responses from
    APNs").
    """

    app: str
    environment: Environment
    token: DeviceToken
    since: int
    """UNIX seconds. Apple's 410 speaks milliseconds, a feedback tuple seconds; here it is seconds."""


class Listed(Struct, frozen=True):
    """A removal in the order in which they came to be known."""

    number: int
    """Higher than that of every earlier one, of whatever app. A removal that is learnt anew gets a new number."""
    removal: Removal


class Quarantine(Struct, frozen=True):
    """A device token that drew 400 BadDeviceToken: held back, not removed, as a wrong environment looks the same."""

    app: str
    environment: Environment
    token: DeviceToken
    until: int
    """UNIX seconds from which Apple is asked again."""


class Lease(Struct, frozen=True):
    """The right to work on a batch for a while."""

    batch: Batch
    outcomes: Outcomes | None
    """What earlier leases recorded; None where nothing was."""
    attempt: int
    """How often the batch was leased, this time included; the fence against a holder whose lease ran out."""


class LeaseEnd(Struct, frozen=True):
    """How a lease ends: done, or the rest of the batch again at a time."""

    batch_id: str
    attempt: int
    again_at: float | None = None
    """UNIX seconds; None: nothing of the batch is left to do."""


class Answered(Struct, frozen=True):
    """Apple answered; a no is a value, not an exception."""

    status: int
    reason: str | None = None
    since: int | None = None
    """UNIX milliseconds, with 410."""
    unique_id: str | None = None
    retry_after_s: float | None = None


class NotProcessed(Struct, frozen=True):
    """Apple certainly did not act on it (RFC 9113, sections 6.8 and 8.7): sending again is free."""

    why: str


class Unknown(Struct, frozen=True):
    """It may or may not have been acted on: the answer never came."""

    why: str


Outcome = Answered | NotProcessed | Unknown

ACCEPTED = Answered(200)
"""The outcome of nearly everything, made once."""


class SigningKey(Struct, frozen=True):
    """What a provider token is made from (Apple, "Establishing a token-based connection to APNs")."""

    key_id: str
    team_id: str
    pem: bytes
    """The .p8 file: PEM, PKCS#8, EC P-256."""

    def __repr__(self) -> str:
        return f"<signing key {self.key_id} of team {self.team_id}>"


class ClientCertificate(Struct, frozen=True):
    """What a connection shows in its TLS handshake (Apple, "Establishing a certificate-based connection to APNs")."""

    name: str
    """The subject's common name, such as `Apple Push Services: com.example.shop`."""
    certificate_pem: bytes
    """The certificate, and the chain behind it where the file held one."""
    key_pem: bytes
    """Its private key: PEM, PKCS#8, without a passphrase."""
    topics: tuple[str, ...]
    """What it may send to, with the suffixes of push types."""
    environments: tuple[Environment, ...]
    not_before: int
    """UNIX seconds, as the next."""
    not_after: int
    fingerprint: str
    """SHA-256 of the certificate, as lower-case hex."""

    def __repr__(self) -> str:
        return f"<client certificate {self.fingerprint[:16]} of {self.name}>"


Credentials = SigningKey | ClientCertificate


class Access(Struct, frozen=True):
    """Credentials, and what they open."""

    credentials: Credentials
    environments: tuple[Environment, ...]
    topics: tuple[str, ...] | None = None
    """With suffixes, as a certificate lists them; None: every topic of the app."""


Lane = tuple[str, Environment]
"""An app's name and an environment: what waits or fails in one does not hold up another."""


class LaneView(Struct, frozen=True):
    """How a lane gets to Apple with some of its credentials, at this moment. Times are UNIX seconds."""

    app: str
    environment: Environment
    host: str
    credentials: str
    """How people know them: a key's id and team, a client certificate."""
    connections: int
    """Open ones. Lanes with the same credentials share them."""
    in_flight: int
    """Notifications of the lane that were sent and not answered yet."""
    waiting: int
    """Those that wait for a stream."""
    answered_at: float | None
    """When Apple last gave an answer that speaks neither against us nor of trouble of its own."""
    trouble: str | None = None
    """Why nothing gets through, in a sentence; None: nothing is known against it."""
    advice: str = ""
    """What to do about it."""
    own: bool = False
    """The trouble is with the credentials, and says nothing of other lanes."""
    since: float | None = None
    """When the trouble began."""
    failed_at: float | None = None
    """When it was last seen."""
    rests_until: float | None = None
    """Until then nothing is tried."""


class Depth(Struct, frozen=True):
    """What there is of a lane in the store that is not finished."""

    app: str
    environment: Environment
    waiting: int
    """Notifications in batches that nobody works on."""
    leased: int
    """Batches that somebody works on."""
    oldest_due_s: float
    """For how many seconds that batch has been due that nobody works on and that is due for longest; 0: none is."""


class App(Struct, frozen=True):
    """What we hold credentials for."""

    name: str
    topics: tuple[str, ...]
    """Bundle ids; a push type's suffix is allowed on each of them."""
    access: tuple[Access, ...]
    """The first that fits is used."""
    environments: tuple[Environment, ...] = ()
    """Those that `access` opens; not to be given."""

    def __post_init__(self) -> None:
        opened = {environment for access in self.access for environment in access.environments}
        force_setattr(self, "environments", tuple(each for each in Environment if each in opened))

    def credentials_for(self, environment: Environment, topic: str) -> Credentials | None:
        """What to send with; `topic` has its suffix."""
        for access in self.access:
            if environment in access.environments and (access.topics is None or topic in access.topics):
                return access.credentials
        return None


class Scope(StrEnum):
    """What the bearer of an API key may do."""

    SEND = "send"
    """Send notifications, see what became of one whose id is known, and cancel it."""
    READ = "read"
    """Look for notifications, and see what was given up on."""
    MANAGE = "manage"
    """Change apps, credentials and API keys, and have the buried sent again."""


class KnownCaller(Struct, frozen=True, kw_only=True):
    """Who may come to the doors where clients have no API key: known by a certificate, or by a signing key of its own.

    What it shows opens our door, never Apple's.
    """

    id: str
    """Of a certificate the SHA-256, as lower-case hex; of a signing key `<team id>.<key id>`."""
    name: str
    """What people call it."""
    app: str
    """The app that it sends to."""
    environment: Environment | None = None
    """None: that of the door it comes to, or the app's only one."""
    topic: str | None = None
    """With suffix; None: the app's."""
    certificate: bytes | None = None
    """PEM, without a private key. It may have ended long ago, and whoever signed it is not asked about."""
    public_key: bytes | None = None
    """PEM: what verifies the provider tokens that it signs."""
    not_after: int | None = None
    """UNIX seconds, of the certificate."""
    created_at: float
    """UNIX seconds."""

    def __repr__(self) -> str:
        return f"<caller {self.id[:16]} of {self.app}>"


class ApiKey(Struct, frozen=True):
    """What is kept of an API key: enough to know it again, not to make it."""

    id: str
    """The part of the key that everybody may see."""
    name: str
    """What people call it."""
    digest: bytes
    """SHA-256 of the whole key."""
    scopes: tuple[Scope, ...]
    apps: tuple[str, ...] | None
    """The apps that it is for; None: all, whatever comes."""
    created_at: float
    """UNIX seconds, as the next."""
    expires_at: float | None = None

    def __repr__(self) -> str:
        return f"<API key {self.id}>"
