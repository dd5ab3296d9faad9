"""Every code that an answer of ours gives: in a problem's `code`, in one of its `errors`, in a receipt's `reason`.

One catalogue, of which `/docs/errors`, `docs/errors.md` and the OpenAPI document are made. Apple's words are those of
`reasons`. In texts, what stands between backticks is said literally.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum

from msgspec import Struct

from heliograph import reasons

_word = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


class Origin(Enum):
    """Where a code is met; the value is the heading."""

    API = "Of the API"
    RECEIPTS = "Of ours, in receipts"
    APPLE = "Of Apple"


INTRODUCTION = (
    "Every code that the API says in a problem's `code`, and that a receipt gives as `reason`. Where Apple has a word, "
    "it is Apple's."
)
INTRODUCTIONS = {
    Origin.API: "What is no success is answered as `application/problem+json` (RFC 9457), with one of these as `code`.",
    Origin.RECEIPTS: "What a receipt gives as `reason` where Apple had no word.",
    Origin.APPLE: "The status is that of Apple's answer; where the API refuses a notification for the same reason "
    "beforehand, it says 400.",
}


class Entry(Struct, frozen=True):
    """What one code means."""

    code: str
    statuses: tuple[int, ...]
    """The HTTP statuses that it comes with as a problem; none for what only receipts say."""
    meaning: str
    remedy: str
    """What to do; empty where the meaning says it."""
    origin: Origin

    @property
    def title(self) -> str:
        return title(self.code)

    @property
    def slug(self) -> str:
        return slug(self.code)


def title(code: str) -> str:
    """`MissingDeviceToken` in words: `Missing device token`."""
    return _word.sub(" ", code).capitalize()


def slug(code: str) -> str:
    """What comes behind the # in links to a code."""
    return _word.sub("-", code).lower()


_OF_API: tuple[tuple[str, tuple[int, ...], str, str], ...] = (
    (
        "AmbiguousRequest",
        (400,),
        (
            "Two things were sent of which one is wanted, such as `token` and `tokens`, or a payload and fields to "
            "build one of."
        ),
        "Send one.",
    ),
    (
        "AppNotAllowed",
        (403,),
        "The API key is for some apps, and this is none of them, whether there is such an app or not.",
        "Use a key that is for the app, or one that is for all; `GET /v1/keys/self` says what yours is for.",
    ),
    ("BadApp", (400,), "What was sent makes no app.", "The detail says what to change."),
    (
        "BadCaller",
        (400,),
        "What was sent makes no caller: its certificate, public key, ids or name are not what they can be.",
        "The detail says what to change.",
    ),
    ("BadEnvironment", (400,), "`environment` has a value that it cannot have.", "The detail lists those that it can."),
    (
        "BadIdempotencyKey",
        (400,),
        "`Idempotency-Key` must have 1 to 255 printable ASCII characters: without blanks, or in double quotes.",
        "Send a new UUID with each request, and the same one only when it is repeated.",
    ),
    (
        "BadKey",
        (400,),
        "What was sent makes no API key: its name, scopes, apps or end are not what they can be.",
        "The detail says what to change.",
    ),
    (
        "BadParameter",
        (400,),
        "A parameter of the query has a value that it cannot have.",
        "The detail says which it can have; a cursor is sent as the former page gave it.",
    ),
    (
        "BadRegistration",
        (400,),
        "What was sent tells of no registration: there are no device tokens, or their time is in the future.",
        "The detail says what to change.",
    ),
    ("BadType", (400,), "A member has a value of the wrong type.", "The detail says which type is wanted."),
    (
        "BadWait",
        (400,),
        "`wait` is a number of seconds from 0 to 30, and goes with a single `token`.",
        "Leave it out for many, and ask for their receipts later.",
    ),
    (
        "Busy",
        (503,),
        (
            "As many requests are in hand, or as much of their bodies, as memory allows, or as many listings as are "
            "looked through at a time. The body was not read and nothing was taken."
        ),
        "Try again after `Retry-After` seconds.",
    ),
    (
        "CallerTaken",
        (409,),
        "The certificate or signing key is that of a caller of another app. Nothing was changed.",
        "Remove it there first, or give the client one of its own: `heliograph legacy certificate` makes certificates.",
    ),
    ("ConfiguredApp", (409,), "The app is in the server's configuration file.", "Change it there, then send SIGHUP."),
    (
        "CredentialNeeded",
        (409,),
        "The app cannot be without these credentials: they are all that it has, or all that one of its topics has.",
        "Remove the app, add others first, or put the app anew.",
    ),
    (
        "ExpiredKey",
        (401,),
        "The time of this API key is over; the detail says since when.",
        "Make a new one with `heliograph keys add`, or have somebody make it.",
    ),
    (
        "IdempotencyKeyReused",
        (422,),
        "Another request was sent with this `Idempotency-Key` in the last 24 hours. Nothing was taken.",
        "Send another key with each request, and the same one only with the same octets in the body.",
    ),
    (
        "InternalError",
        (500,),
        "A mistake of ours.",
        "The server's log has the details; please report it. Whether something was taken is not known.",
    ),
    ("InvalidJson", (400,), "The body is not JSON in UTF-8.", "The detail says where."),
    (
        "MethodNotAllowed",
        (405,),
        "The path takes other methods. (Apple's word for anything but POST is the same.)",
        "`Allow` lists them.",
    ),
    (
        "MissingApp",
        (400,),
        "There are several apps that this API key is for, or none.",
        "Say which in `app`; where there is none yet, add one.",
    ),
    ("MissingEnvironment", (400,), "The app has both environments.", "Say which in `environment`."),
    (
        "MissingScope",
        (403,),
        "The API key is good, but not for this. Where a key was to be made: it cannot have a scope that yours has not.",
        "The detail names the scope that is wanted and those that the key has.",
    ),
    ("NotFound", (404,), "There is no such path.", "The API begins with `/v1/`; `/docs` lists what there is."),
    (
        "OutlivesYourKey",
        (403,),
        "An API key was to last longer than the key that makes it.",
        "Name an earlier end, or none: then the new key ends with yours.",
    ),
    (
        "Overloaded",
        (429,),
        "As much is waiting as the server promised to keep. Nothing was taken.",
        "Try again after `Retry-After` seconds.",
    ),
    ("RequestTimeout", (408,), "The body did not come within 30 s. Nothing was taken.", "Send it again."),
    (
        "RequestTooLarge",
        (413,),
        "The body is longer than the path takes: 8 MB for notifications, 1 MB for registrations, 512 kB for an app.",
        "Send several requests, or less.",
    ),
    (
        "StoreUnavailable",
        (503,),
        "The store cannot be written or read now (a full disk, say). Nothing was taken.",
        "The log says why. Try again after `Retry-After` seconds.",
    ),
    (
        "TooManyNotifications",
        (413,),
        "One request takes 10,000 notifications, or 1,000 ids or device tokens.",
        "Send several requests.",
    ),
    (
        "Unauthorized",
        (401,),
        "The API key is missing, is not one of this server, or was removed.",
        (
            "Send `Authorization: Bearer hg_...`. The server keeps its own key in the file `api-key` of its data "
            "folder, unless told otherwise; `heliograph keys add` makes others."
        ),
    ),
    ("UnknownApp", (400, 404), "There is no such app.", "The detail lists those that there are."),
    (
        "UnknownCaller",
        (404,),
        "There is no caller with this id, or it is of an app that the API key is not for.",
        "Name it by its whole id; `GET /v1/callers` lists those that there are.",
    ),
    (
        "UnknownCredential",
        (404,),
        "The app has no credentials with this id.",
        "The detail lists those that it has: a key's id, or the first 16 digits of a certificate's fingerprint.",
    ),
    (
        "UnknownEnvironment",
        (400,),
        "The app's credentials are for the other environment.",
        "Send to the other one, or give the app credentials for this one.",
    ),
    (
        "UnknownField",
        (400,),
        "There is no such member.",
        "The detail names what may have been meant. The app's own keys go into `data`.",
    ),
    (
        "UnknownKey",
        (404,),
        "There is no API key with this id, or it is for apps that yours is not for.",
        "Name a key by its id, the 8 characters behind `hg_`; `GET /v1/keys` lists those that there are.",
    ),
    (
        "UnknownNotification",
        (404,),
        "No notification with this id was ever taken here, or its receipt was forgotten (`store.receipts_days`).",
        "",
    ),
    (
        "UnknownParameter",
        (400,),
        "There is no such parameter of the query.",
        "The detail lists those that there are.",
    ),
    ("UnsupportedEncoding", (415,), "The body came with a `Content-Encoding`.", "Send it as it is."),
)

_OF_RECEIPTS: tuple[tuple[str, tuple[int, ...], str], ...] = (
    (
        "NoAnswer",
        (),
        (
            "The request went out and no answer came: the connection was lost, the stream was reset, or 30 s went by. "
            "It is sent again with the same id."
        ),
    ),
    (
        "NotProcessed",
        (),
        (
            "Apple certainly did not act on it: it could not be reached, or refused the stream. `meaning` says why. It "
            "is sent again, and that does not count as an attempt."
        ),
    ),
    (
        "SentBefore",
        (),
        (
            "A client of the binary protocol sent it again after an error packet, and it had gone out already: it was "
            "not sent twice. `meaning` names the id under which it had gone out."
        ),
    ),
    (
        "TooLate",
        (409,),
        (
            "In a receipt: its expiration, or the 24 hours that one is tried, had passed when its turn came. As a "
            "problem: it cannot be cancelled any more, as Apple has taken it or refused it, or it was given up on."
        ),
    ),
    (
        "Unreadable",
        (),
        "What the store had kept of it is damaged. It is buried; the log of the machine's disk may know more.",
    ),
)


def _entries() -> Iterator[Entry]:
    for code, statuses, meaning, remedy in _OF_API:
        yield Entry(code, statuses, meaning, remedy, Origin.API)
    for code, statuses, meaning in _OF_RECEIPTS:
        yield Entry(code, statuses, meaning, "", Origin.RECEIPTS)
    for word, reason in sorted(reasons.TABLE.items()):
        if word not in _OURS:
            yield Entry(word, (reason.status,), reason.meaning, "", Origin.APPLE)


_OURS = {code for code, *_ in _OF_API}
"""Those that Apple says too are told of once."""

CATALOGUE = {entry.code: entry for entry in _entries()}
"""All by code: those of the API, those of receipts, Apple's, each in the alphabet's order."""


def of(origin: Origin) -> Iterator[Entry]:
    return (entry for entry in CATALOGUE.values() if entry.origin is origin)


def markdown() -> str:
    """`docs/errors.md`."""
    return "\n".join(_markdown())


def _markdown() -> Iterator[str]:
    yield "# Errors\n"
    yield f"{INTRODUCTION}\n"
    for origin in Origin:
        yield f"## {origin.value}\n"
        yield f"{INTRODUCTIONS[origin]}\n"
        for entry in of(origin):
            yield f"### {entry.title}\n"
            named = ", ".join([f"`{entry.code}`", " or ".join(map(str, entry.statuses))]).removesuffix(", ")
            yield " ".join(filter(None, [f"{named}.", entry.meaning, entry.remedy])) + "\n"
