"""Apple's reasons as one table: what each means, what follows from it, whether the device token dies.

Source: Apple, "Handling notification responses from APNs" (device pushes) and "Handling error responses from APNs"
(broadcasts and channels). The legacy status is that of the binary gateway's error packet (Apple, "Binary Provider
API"); Apple never published how the two correspond, so that column is ours.

`find` never fails: a word that is not in the table yet is judged by its HTTP status.
"""

from __future__ import annotations

from enum import StrEnum, auto

from msgspec import Struct


class FollowUp(StrEnum):
    """What has to happen after a no."""

    FIX_REQUEST = auto()
    """The sender must change the notification; the same again gets the same answer."""
    FIX_CREDENTIALS = auto()
    """An operator must change a key, a certificate or an account; all of this app's notifications suffer."""
    NEVER = auto()
    """Nothing helps; it must not be sent again."""
    REMOVE_TOKEN = auto()
    """The device token is dead."""
    QUARANTINE = auto()
    """The device token is wrong here, or our environment or topic is: hold it back, do not delete it."""
    RETRY_SOON = auto()
    """Apple's own trouble: a few quick tries elsewhere, then long pauses."""
    RETRY_TOKEN_LATER = auto()
    """Too much for this device token; others are not concerned."""
    RETRY_LATER = auto()
    """Too much of something else; the same again after a pause."""
    RENEW_PROVIDER_TOKEN = auto()
    """Mint a new provider token, open a new connection with it, send again."""
    NEW_CONNECTION = auto()
    """This connection is of no more use; send again on another."""


class Reason(Struct, frozen=True):
    """One of Apple's reasons, with its facts."""

    word: str
    """As on the wire."""
    status: int
    """The HTTP status that it comes with."""
    legacy_status: int | None
    """The status in a binary error packet; None where the gateway kept silent and told of it by feedback."""
    follow_up: FollowUp
    meaning: str
    """What it means and what to do, for people."""

    @property
    def token_dies(self) -> bool:
        """Whether the device token is dead from now on. Only a 410 says so."""
        return self.follow_up is FollowUp.REMOVE_TOKEN


TABLE: dict[str, Reason] = {}
"""All reasons by wire word."""


def _row(word: str, status: int, legacy_status: int | None, follow_up: FollowUp, meaning: str) -> Reason:
    return TABLE.setdefault(word, Reason(word, status, legacy_status, follow_up, meaning))


BAD_COLLAPSE_ID = _row(
    "BadCollapseId", 400, 1, FollowUp.FIX_REQUEST, "The collapse id is longer than 64 octets: shorten it."
)
BAD_DEVICE_TOKEN = _row(
    "BadDeviceToken",
    400,
    8,
    FollowUp.QUARANTINE,
    "The device token is malformed or belongs to the other environment: "
    "check whether the app was built for development or production before giving the token up.",
)
BAD_EXPIRATION_DATE = _row(
    "BadExpirationDate", 400, 1, FollowUp.FIX_REQUEST, "The expiration is no date: send whole UNIX seconds, or 0."
)
BAD_MESSAGE_ID = _row(
    "BadMessageId", 400, 1, FollowUp.FIX_REQUEST, "The apns-id is no UUID: send 32 hex digits as 8-4-4-4-12."
)
BAD_PRIORITY = _row(
    "BadPriority", 400, 1, FollowUp.FIX_REQUEST, "The priority must be 1, 5 or 10, and 5 for a background push."
)
BAD_TOPIC = _row(
    "BadTopic",
    400,
    6,
    FollowUp.FIX_REQUEST,
    "The topic is malformed: send the app's bundle id with the suffix that its push type needs.",
)
DEVICE_TOKEN_NOT_FOR_TOPIC = _row(
    "DeviceTokenNotForTopic",
    400,
    8,
    FollowUp.QUARANTINE,
    "The device token was issued to another app, or for another kind of push: "
    "send it with the topic it was registered for.",
)
DUPLICATE_HEADERS = _row("DuplicateHeaders", 400, 1, FollowUp.FIX_REQUEST, "A header was sent twice: send each once.")
IDLE_TIMEOUT = _row(
    "IdleTimeout", 400, 1, FollowUp.NEW_CONNECTION, "The connection was idle for too long: send again on a new one."
)
INVALID_PUSH_TYPE = _row(
    "InvalidPushType", 400, 1, FollowUp.FIX_REQUEST, "Apple does not know this push type: correct it."
)
MISSING_DEVICE_TOKEN = _row(
    "MissingDeviceToken", 400, 2, FollowUp.FIX_REQUEST, "No device token was given: name the device to send to."
)
MISSING_TOPIC = _row(
    "MissingTopic", 400, 3, FollowUp.FIX_REQUEST, "No topic was given and the credentials do not imply one: name it."
)
PAYLOAD_EMPTY = _row("PayloadEmpty", 400, 4, FollowUp.FIX_REQUEST, "There is no payload: send a JSON object.")
TOPIC_DISALLOWED = _row(
    "TopicDisallowed",
    400,
    6,
    FollowUp.FIX_CREDENTIALS,
    "These credentials may not send to this topic: use those of the team that owns the app.",
)
BAD_CERTIFICATE = _row(
    "BadCertificate",
    403,
    1,
    FollowUp.FIX_CREDENTIALS,
    "Apple does not take the client certificate: renew it, it has probably expired or was revoked.",
)
BAD_CERTIFICATE_ENVIRONMENT = _row(
    "BadCertificateEnvironment",
    403,
    1,
    FollowUp.FIX_CREDENTIALS,
    "The client certificate is for the other environment: use the one made for this one.",
)
BAD_ENVIRONMENT_KEY_IN_TOKEN = _row(
    # As Apple's servers were seen to spell it; the table on its page has the next.
    "BadEnvironmentKeyInToken",
    403,
    1,
    FollowUp.FIX_CREDENTIALS,
    "The signing key is for the other environment: use one made for this one.",
)
BAD_ENVIRONMENT_KEY_ID_IN_TOKEN = _row(
    "BadEnvironmentKeyIdInToken",
    403,
    1,
    FollowUp.FIX_CREDENTIALS,
    "The signing key is for the other environment: use one made for this one.",
)
EXPIRED_PROVIDER_TOKEN = _row(
    "ExpiredProviderToken",
    403,
    1,
    FollowUp.RENEW_PROVIDER_TOKEN,
    "The provider token is older than an hour: it is made anew; if that does not help, set this machine's clock.",
)
FORBIDDEN = _row(
    "Forbidden", 403, 1, FollowUp.NEVER, "Apple does not allow this action: check what the account may do."
)
INVALID_PROVIDER_TOKEN = _row(
    "InvalidProviderToken",
    403,
    1,
    FollowUp.FIX_CREDENTIALS,
    "Apple cannot verify the provider token: "
    "check key, key id and team id, whether the key was revoked, and whether this machine's clock is fast.",
)
MISSING_PROVIDER_TOKEN = _row(
    "MissingProviderToken",
    403,
    1,
    FollowUp.FIX_CREDENTIALS,
    "Neither a provider token nor a client certificate was sent: configure a signing key.",
)
UNRELATED_KEY_ID_IN_TOKEN = _row(
    "UnrelatedKeyIdInToken",
    403,
    1,
    FollowUp.NEW_CONNECTION,
    "The connection began with another signing key: each key needs a connection of its own.",
)
BAD_PATH = _row("BadPath", 404, 1, FollowUp.FIX_REQUEST, "Apple has nothing at this path: send to /3/device/<token>.")
METHOD_NOT_ALLOWED = _row("MethodNotAllowed", 405, 1, FollowUp.FIX_REQUEST, "Notifications are sent with POST only.")
EXPIRED_TOKEN = _row(
    "ExpiredToken", 410, None, FollowUp.REMOVE_TOKEN, "The device token has expired: stop sending to it."
)
UNREGISTERED = _row(
    "Unregistered",
    410,
    None,
    FollowUp.REMOVE_TOKEN,
    "The app is no longer on the device: stop sending, unless the token was registered again since.",
)
PAYLOAD_TOO_LARGE = _row(
    "PayloadTooLarge",
    413,
    7,
    FollowUp.NEVER,
    "The payload is longer than Apple takes (4096 octets, 5120 for VoIP): shorten it.",
)
TOO_MANY_PROVIDER_TOKEN_UPDATES = _row(
    "TooManyProviderTokenUpdates",
    429,
    1,
    FollowUp.RETRY_LATER,
    "The provider token changed more than once in 20 minutes: keep the one in use.",
)
TOO_MANY_REQUESTS = _row(
    "TooManyRequests",
    429,
    1,
    FollowUp.RETRY_TOKEN_LATER,
    "Too many notifications in a row to this device token: it is sent again after a pause; send fewer.",
)
INTERNAL_SERVER_ERROR = _row(
    "InternalServerError", 500, 1, FollowUp.RETRY_SOON, "Something failed at Apple: it is sent again."
)
SERVICE_UNAVAILABLE = _row(
    "ServiceUnavailable", 503, 1, FollowUp.RETRY_SOON, "Apple cannot take it at the moment: it is sent again."
)
SHUTDOWN = _row(
    "Shutdown", 503, 1, FollowUp.NEW_CONNECTION, "Apple's server is going away: it is sent again on a new connection."
)

# Broadcasts and channels; the binary gateway never knew them.
BAD_CHANNEL_ID = _row(
    "BadChannelId", 400, 1, FollowUp.FIX_REQUEST, "The channel id cannot be decoded: send it as Apple returned it."
)
BAD_REQUEST_PARAMS = _row(
    "BadRequestParams", 400, 1, FollowUp.FIX_REQUEST, "The request names an attribute Apple does not know: remove it."
)
BAD_REQUEST_PAYLOAD = _row(
    "BadRequestPayload", 400, 1, FollowUp.FIX_REQUEST, "The payload is not what Apple can read: send valid JSON."
)
CANNOT_CREATE_CHANNEL_CONFIG = _row(
    "CannotCreateChannelConfig",
    400,
    1,
    FollowUp.FIX_REQUEST,
    "The app has as many channels as it may have: delete some first.",
)
CHANNEL_NOT_REGISTERED = _row(
    "ChannelNotRegistered", 400, 1, FollowUp.NEVER, "There is no such channel in this environment: create one."
)
FEATURE_NOT_ENABLED = _row(
    "FeatureNotEnabled",
    400,
    1,
    FollowUp.FIX_CREDENTIALS,
    "Broadcasts are not enabled for this bundle id: switch the capability on in the developer account.",
)
MISSING_CHANNEL_ID = _row(
    "MissingChannelId", 400, 1, FollowUp.FIX_REQUEST, "No channel was given: send its id in apns-channel-id."
)
MISSING_CHANNEL_QUEUE_SIZE = _row(
    "MissingChannelQueueSize",
    400,
    1,
    FollowUp.FIX_REQUEST,
    "The channel's storage policy is missing or invalid: send 0 or 1.",
)
MISSING_PUSH_TYPE = _row("MissingPushType", 400, 1, FollowUp.FIX_REQUEST, "No push type was given: send one.")
TOPIC_MISMATCH = _row(
    "TopicMismatch",
    403,
    1,
    FollowUp.FIX_CREDENTIALS,
    "The credentials do not cover the bundle id in the path: use those that do.",
)


def find(word: str | None, status: int | None = None) -> Reason:
    """Apple's reason for a wire word, with the status that came with it, if one did.

    A word that is missing, unknown, or found under a status of another class is judged by the status alone (400 where
    there is none); the word is kept.
    """
    # Apple's page on broadcasts prints "Service Unavailable".
    known = TABLE.get(word.replace(" ", "")) if word else None
    if known and (status is None or status // 100 == known.status // 100):
        return known
    return _by_status(word, 400 if status is None else status)


def _by_status(word: str | None, status: int) -> Reason:
    word = word or f"Status{status}"
    match status:
        case 403:
            return Reason(word, status, 1, FollowUp.FIX_CREDENTIALS, "Apple does not take the credentials: check them.")
        case 410:
            return Reason(word, status, None, FollowUp.REMOVE_TOKEN, "The device token is dead: stop sending to it.")
        case 413:
            return Reason(word, status, 7, FollowUp.NEVER, "The payload is too long: shorten it.")
        case 429:
            return Reason(word, status, 1, FollowUp.RETRY_LATER, "Apple asks for a pause: it is sent again.")
        case _ if 400 <= status < 500:
            return Reason(word, status, 1, FollowUp.FIX_REQUEST, "Apple does not take the request: correct it.")
        case _:
            return Reason(word, status, 1, FollowUp.RETRY_SOON, "Apple could not answer properly: it is sent again.")
