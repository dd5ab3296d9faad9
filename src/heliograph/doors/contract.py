"""What the HTTP API offers, as data: each operation, what it is for, what it takes and answers, what can go wrong.

`openapi` makes a document of it. What bodies hold is read from the structs that the parts decode and encode. The tests
send every example, and look whether each route of each part is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct, to_builtins

from heliograph import reasons
from heliograph.doors import apps, callers, decoding, keys, notifications, queries, removals
from heliograph.doors.answers import (
    AppBody,
    AppsBody,
    BuriedBody,
    Cancelled,
    Life,
    ManyTaken,
    NotificationsBody,
    OneTaken,
    Removed,
    Replayed,
)
from heliograph.doors.operations import HealthBody, Reason
from heliograph.doors.receipts import STATES, ReceiptBody, receipt_body
from heliograph.model import DeviceToken, Environment, PushType, Receipt, Scope, State
from heliograph.payload import CriticalSound, LiveActivity

JSON = "application/json"


class Parameter(Struct, frozen=True):
    """What may stand in the path, in the query or in a header."""

    name: str
    where: str
    description: str
    schema: Mapping[str, Any]
    example: Any = None


class Example(Struct, frozen=True):
    name: str
    summary: str
    value: Any


class Reply(Struct, frozen=True):
    """An answer that is a success."""

    status: int
    description: str
    kinds: tuple[type, ...] = ()
    """The structs of which its body is one; none: it is not JSON."""
    example: Any = None
    headers: Mapping[str, str] = {}
    """Name: meaning."""
    links: Mapping[str, Any] = {}
    content_type: str = JSON


class Operation(Struct, frozen=True, kw_only=True):
    """What a method does at a path. Where there is GET there is HEAD, which is not told of by itself."""

    id: str
    method: str
    path: str
    tag: str
    summary: str
    description: str = ""
    scopes: frozenset[Scope] | None
    """An API key with one of them is needed; None: it needs no key."""
    parameters: tuple[Parameter, ...] = ()
    body: type | None = None
    examples: tuple[Example, ...] = ()
    replies: tuple[Reply, ...]
    codes: tuple[str, ...] = ()
    """Its own problems, beside those that every operation has, and every operation with a body."""


TAGS = {
    "Notifications": "Send them, and see what became of them.",
    "Buried": "What was given up on after a day. It is kept for people to look at, and to have sent again.",
    "Apps": "What is sent to, with which credentials. Apps come and go without a restart.",
    "API keys": "Who may do what here, for which apps.",
    "Callers": "Whose certificates and signing keys open the doors for old scripts and other people's libraries.",
    "Removals": "Device tokens that Apple calls dead, and those that were registered again.",
    "Operations": "For load balancers, for Prometheus and for people. None of them needs an API key.",
}

PRIVATE_KEY = "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----\n"
"""Stands in examples for what is in the .p8 file."""

PUBLIC_KEY = (
    "-----BEGIN PUBLIC KEY-----\n"
    "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEQTlKgWMbq0D2nYjea5i8reCYlLu+\n"
    "m3hFWLazdSEzu5Sttnnl0TEQLIF+hxsXeZPQ/vL924B0P75Iuc01ucM0/g==\n"
    "-----END PUBLIC KEY-----\n"
)
"""Of nobody; stands in examples."""

_SEND = frozenset({Scope.SEND})
_READ = frozenset({Scope.READ})
_MANAGE = frozenset({Scope.MANAGE})

_HEX = {"pattern": "^([0-9A-Fa-f]{2})+$"}
_TOKEN = "4f1cab8d02e6b7395d48c1f0a9e35b6724d8f01c9b3ea6570d12c84f6be9a305"  # noqa: S105 - of a device, and of none
_OTHER_TOKEN = "b7d90c3e51a8f24679ce0b1d83f5a2460e97c4d1853bfa60297dc1e84f30b56a"  # noqa: S105
ID = "01a1fdfa-4600-7d52-9e31-5a4cf08b0001"
KEY_ID = "0b5cfe52"
CALLER_ID = "DEF123GHIJ.HIJ456KLMN"
"""These stand in examples for ids that answers give."""
_OTHER_ID = "01a1fdfa-4600-7d52-9e31-5a4cf08b0002"

_NOON = 1795262400  # UNIX seconds of 2026-11-21T12:00:00Z


def _receipt(state: State, **more: Any) -> dict[str, Any]:
    """A receipt as the API shows it."""
    receipt = Receipt(
        ID,
        "shop",
        state,
        _NOON,
        environment=Environment.PRODUCTION,
        topic="com.example.shop",
        push_type=PushType.ALERT,
        token=DeviceToken(_TOKEN),
        collapse_id=ID,
        **more,
    )
    shown: dict[str, Any] = to_builtins(receipt_body(receipt))
    return shown


_RECEIPT = _receipt(State.ACCEPTED, updated_at=_NOON + 0.023, status=200, attempts=1)
_BURIED = _receipt(
    State.BURIED, updated_at=_NOON + 86400, reason=reasons.SERVICE_UNAVAILABLE.word, status=503, attempts=9
)
_CANCELLED = _receipt(State.CANCELLED, updated_at=_NOON + 2)
_CANCELLING = _receipt(State.QUEUED, attempts=1, cancelling=True)
_APP = {
    "name": "shop",
    "source": "api",
    "topics": ["com.example.shop"],
    "environments": ["production", "development"],
    "host": None,
    "port": 443,
    "proxy": None,
    "credentials": [
        {
            "id": "ABC123DEFG",
            "kind": "signing key",
            "name": "ABC123DEFG",
            "environments": ["production", "development"],
            "topics": None,
            "team_id": "DEF123GHIJ",
            "ends_at": None,
            "days_left": None,
        }
    ],
}
_KEY = {
    "id": KEY_ID,
    "name": "shop backend",
    "scopes": ["send"],
    "apps": ["shop"],
    "created_at": "2026-11-21T12:00:00Z",
    "expires_at": "2027-11-21T12:00:00Z",
}

_CALLER = {
    "id": CALLER_ID,
    "kind": "signing key",
    "name": "mail robot",
    "app": "shop",
    "environment": None,
    "topic": None,
    "ends_at": None,
    "created_at": "2026-11-21T12:00:00Z",
}
_REMOVAL = {
    "token": _TOKEN,
    "app": "shop",
    "environment": "production",
    "since": "2026-11-21T12:00:00Z",
    "number": 4711,
}

_NOTIFICATION_ID = Parameter("id", "path", "The notification's id, as the answer to its request gave it.", {}, ID)
_APP_NAME = Parameter("name", "path", "The app's name.", {"pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"}, "shop")
_CREDENTIAL = {"pattern": "^([A-Z0-9]{10}|[0-9a-f]{16})$"}
_KEY_NAMED = Parameter("id", "path", "The key's id: what stands between `hg_` and the next `_`.", {}, KEY_ID)
_LIMIT = Parameter(
    "limit", "query", "How many.", {"type": "integer", "minimum": 1, "maximum": queries.MAX_PAGE, "default": 100}
)
_NUMBER = {"pattern": "^[0-9]{1,18}$"}
_LOCATION = {"Location": "Where it is."}
_FOR_REMOVAL = {"Location": "Where it is, to be removed."}
_REPLAYED = {"Idempotency-Replayed": "`true` where it was taken before, and is only told again."}
_RECEIPT_LINK = {
    "receipt": {
        "operationId": "getNotification",
        "parameters": {"id": "$response.body#/id"},
        "description": "What became of it.",
    }
}

OPERATIONS = (
    Operation(
        id="sendNotifications",
        method="POST",
        path=notifications.PATH,
        tag="Notifications",
        summary="Send notifications",
        description=(
            "One to a device token, one payload to many device tokens, or many with a payload each. The answer is sent "
            "after they are on disk: what got a 202 is not lost, whatever crashes.\n\n"
            "All or nothing: if one of them cannot be sent, nothing is taken, and `errors` says what is wrong with "
            "each. That holds for device tokens that are known to be dead (`Unregistered`) or held back "
            "(`BadDeviceToken`) too: take those out and send the rest again, or send `partial`. At most 10,000 "
            "notifications and 8 MB a request.\n\n"
            "With `Idempotency-Key` a request may be repeated, as after an answer that never came: what was taken is "
            "not taken again, and the answer is as it was."
        ),
        scopes=_SEND,
        parameters=(
            Parameter(
                "wait",
                "query",
                "As `wait` in the body, and wins over it.",
                {"type": "number", "minimum": 0, "maximum": notifications.MAX_WAIT_S},
            ),
            Parameter(
                "Idempotency-Key",
                "header",
                "A word for this request, such as a new UUID: 1 to 255 printable ASCII characters. Who repeats a "
                "request sends the same one with the same body.",
                {"minLength": 1, "maxLength": 255, "pattern": "^[!#-~][!-~]*$"},
                "8e03978e-40d5-43dd-bc93-6894a57f9324",
            ),
        ),
        body=decoding.Post,
        examples=(
            Example(
                "one",
                "One notification",
                {"app": "shop", "token": _TOKEN, "title": "Hello", "body": "Your parcel arrives today"},
            ),
            Example(
                "many",
                "One payload to many device tokens",
                {"app": "shop", "tokens": [_TOKEN, _OTHER_TOKEN], "title": "Hello", "sound": "default", "badge": 1},
            ),
            Example(
                "each",
                "Many, each with its own content; what stands beside `notifications` is the default for all",
                {
                    "app": "shop",
                    "title": "Your parcel",
                    "notifications": [
                        {"token": _TOKEN, "body": "It arrives today, Ada"},
                        {"token": _OTHER_TOKEN, "payload": {"aps": {"badge": 3}}, "collapse_id": "badge"},
                    ],
                },
            ),
            Example(
                "raw",
                "A payload of your own, which is sent octet by octet",
                {
                    "app": "shop",
                    "token": _TOKEN,
                    "push_type": "background",
                    "payload": {"aps": {"content-available": 1}, "order": 8041},
                },
            ),
            Example(
                "wait",
                "Wait for what Apple says, up to ten seconds",
                {"app": "shop", "token": _TOKEN, "body": "The kettle boils", "wait": 10},
            ),
        ),
        replies=(
            Reply(
                200,
                "With `wait`: what became of it is known.",
                (ReceiptBody,),
                _RECEIPT,
                {**_LOCATION, **_REPLAYED},
                _RECEIPT_LINK,
            ),
            Reply(
                202,
                "Taken. For one `token` its id and where its receipt is; for more the ids, in order; with `wait`, "
                "where the outcome is not known yet, the receipt as it is.",
                (OneTaken, ManyTaken, ReceiptBody),
                {"id": ID, "receipt": f"{notifications.PATH}/{ID}"},
                {"Location": "Where the receipt is, for one `token`.", **_REPLAYED},
                _RECEIPT_LINK,
            ),
        ),
        codes=(
            "AmbiguousRequest",
            "BadEnvironment",
            "BadIdempotencyKey",
            "BadParameter",
            "BadWait",
            "IdempotencyKeyReused",
            "MissingApp",
            "MissingEnvironment",
            "UnknownApp",
            "UnknownEnvironment",
            "UnknownParameter",
            "AppNotAllowed",
            "TooManyNotifications",
            "Overloaded",
            "BadCollapseId",
            "BadDeviceToken",
            "BadExpirationDate",
            "BadPriority",
            "BadRequestPayload",
            "BadTopic",
            "InvalidPushType",
            "MissingDeviceToken",
            "MissingTopic",
            "PayloadEmpty",
            "PayloadTooLarge",
            "TopicDisallowed",
            "Unregistered",
        ),
    ),
    Operation(
        id="listNotifications",
        method="GET",
        path=notifications.PATH,
        tag="Notifications",
        summary="Look for notifications",
        description=(
            "Newest first. Each request looks through some hundred thousand of them, so that a page may have fewer "
            "than `limit`, or none, and still a `next`: ask again with it as `cursor` until it is null."
        ),
        scopes=_READ,
        parameters=(
            Parameter("app", "query", "Of this app only.", {}, "shop"),
            Parameter("environment", "query", "Sent to this environment.", {"enum": list(Environment)}),
            Parameter(
                "state",
                "query",
                "In one of these states; several with commas, or the parameter several times.",
                {"type": "array", "items": {"enum": list(STATES.values())}},
            ),
            Parameter(
                "reason",
                "query",
                "With this reason, as the receipt has it: a word of `/docs/errors`, or `Status` with a number.",
                {},
            ),
            Parameter("token", "query", "To this device token.", _HEX),
            Parameter("topic", "query", "With this topic.", {"minLength": 1}),
            Parameter("push_type", "query", "With this push type.", {"enum": list(PushType)}),
            Parameter("since", "query", "Taken then or later: a time (RFC 3339), or UNIX seconds.", {}),
            Parameter("until", "query", "Taken before: as `since`.", {}),
            Parameter("connection", "query", "Brought by this connection, as receipts and log lines name it.", {}),
            _LIMIT,
            Parameter("cursor", "query", "Go on where the former page ended: its `next`.", {}),
        ),
        replies=(Reply(200, "A page of them.", (NotificationsBody,), {"notifications": [_RECEIPT], "next": None}),),
        codes=("AppNotAllowed", "BadDeviceToken", "BadParameter", "UnknownApp", "UnknownParameter"),
    ),
    Operation(
        id="getNotification",
        method="GET",
        path=f"{notifications.PATH}/{{id}}",
        tag="Notifications",
        summary="See what became of a notification",
        description=(
            "Where its sender chose an `apns-id`, that finds it as well; of several with the same one, the last."
        ),
        scopes=_SEND | _READ,
        parameters=(_NOTIFICATION_ID,),
        replies=(Reply(200, "Its receipt.", (ReceiptBody,), _RECEIPT),),
        codes=("UnknownNotification",),
    ),
    Operation(
        id="cancelNotification",
        method="DELETE",
        path=f"{notifications.PATH}/{{id}}",
        tag="Notifications",
        summary="Cancel a notification",
        description=(
            "What waits is not sent any more, wherever it does: in the queue, for its next try, or for a connection. "
            "The answer is sent once that is on disk."
        ),
        scopes=_SEND,
        parameters=(_NOTIFICATION_ID,),
        replies=(
            Reply(200, "It is cancelled.", (ReceiptBody,), _CANCELLED),
            Reply(
                202,
                "It is being sent: if Apple does not take it this time, it is not tried again. Ask for its receipt in "
                "a moment.",
                (ReceiptBody,),
                _CANCELLING,
            ),
        ),
        codes=("TooLate", "UnknownNotification"),
    ),
    Operation(
        id="cancelNotifications",
        method="POST",
        path=notifications.CANCEL_PATH,
        tag="Notifications",
        summary="Cancel many notifications",
        scopes=_SEND,
        body=decoding.Ids,
        examples=(Example("two", "Two of them", {"ids": [ID, _OTHER_ID]}),),
        replies=(
            Reply(
                200,
                "What became of each.",
                (Cancelled,),
                {"cancelled": [ID], "cancelling": [], "too_late": [_OTHER_ID], "unknown": []},
            ),
        ),
        codes=("TooManyNotifications",),
    ),
    Operation(
        id="listBuried",
        method="GET",
        path=notifications.BURIED_PATH,
        tag="Buried",
        summary="List what was given up on",
        description="Newest first. Where `next` is not null there is more: ask again with it as `before`.",
        scopes=_READ,
        parameters=(
            Parameter("app", "query", "Of this app only.", {}, "shop"),
            Parameter("before", "query", "Go on where the former page ended: its `next`.", {}),
            Parameter(
                "limit",
                "query",
                "How many.",
                {"type": "integer", "minimum": 1, "maximum": queries.MAX_PAGE, "default": 100},
            ),
        ),
        replies=(Reply(200, "A page of them.", (BuriedBody,), {"buried": [_BURIED], "next": None}),),
        codes=("AppNotAllowed", "BadParameter", "UnknownApp", "UnknownParameter"),
    ),
    Operation(
        id="replayBuried",
        method="POST",
        path=notifications.REPLAY_PATH,
        tag="Buried",
        summary="Have the buried sent again",
        description="Under the same ids. The answer is sent once that is on disk.",
        scopes=_MANAGE,
        body=decoding.Ids,
        examples=(Example("two", "Two of them", {"ids": [ID, _OTHER_ID]}),),
        replies=(
            Reply(
                200,
                "Those that are sent again. An id that is not buried, whose batch is being worked on, or that is of "
                "an app that the API key is not for, is left out.",
                (Replayed,),
                {"replayed": [ID]},
            ),
        ),
        codes=("TooManyNotifications",),
    ),
    Operation(
        id="listApps",
        method="GET",
        path=apps.PATH,
        tag="Apps",
        summary="List the apps",
        scopes=_MANAGE,
        replies=(Reply(200, "All that the API key is for, without secrets.", (AppsBody,), {"apps": [_APP]}),),
    ),
    Operation(
        id="getApp",
        method="GET",
        path=f"{apps.PATH}/{{name}}",
        tag="Apps",
        summary="See an app",
        scopes=_MANAGE,
        parameters=(_APP_NAME,),
        replies=(Reply(200, "The app, without secrets.", (AppBody,), _APP),),
        codes=("AppNotAllowed", "UnknownApp"),
    ),
    Operation(
        id="putApp",
        method="PUT",
        path=f"{apps.PATH}/{{name}}",
        tag="Apps",
        summary="Add an app, or change it",
        description=(
            "What is sent is all that the app is made of: nothing is left of what was there before. It is kept "
            "encrypted, and used at once. In one request, send either a single key or certificate, or `credentials`."
        ),
        scopes=_MANAGE,
        parameters=(_APP_NAME,),
        body=apps.NewApp,
        examples=(
            Example(
                "key",
                "With a signing key, which is for all apps of a team",
                {"key": PRIVATE_KEY, "key_id": "ABC123DEFG", "team_id": "DEF123GHIJ", "topic": "com.example.shop"},
            ),
        ),
        replies=(
            Reply(200, "It was there, and is changed.", (AppBody,), _APP, _LOCATION),
            Reply(201, "It is new.", (AppBody,), _APP, _LOCATION),
        ),
        codes=("AppNotAllowed", "BadApp", "BadEnvironment", "ConfiguredApp"),
    ),
    Operation(
        id="addCredential",
        method="POST",
        path=f"{apps.PATH}/{{name}}/credentials",
        tag="Apps",
        summary="Give an app more credentials",
        description=(
            "A signing key or a certificate, as one of `credentials` in what an app is made of. It comes behind those "
            "that the app has, or takes the place of the one that has the same id: the same request twice is as good "
            "as once. With `replace` it takes the place of another: so a new key comes in with no moment between. It "
            "is used at once."
        ),
        scopes=_MANAGE,
        parameters=(
            _APP_NAME,
            Parameter("replace", "query", "The id of those whose place it takes.", _CREDENTIAL),
        ),
        body=apps.NewCredentials,
        examples=(
            Example(
                "key",
                "A signing key for development, beside one for production",
                {"key": PRIVATE_KEY, "key_id": "HIJ456KLMN", "team_id": "DEF123GHIJ", "environment": "development"},
            ),
        ),
        replies=(
            Reply(
                201,
                "The app with them, without secrets.",
                (AppBody,),
                _APP,
                {"Location": "Where they are, to be removed."},
            ),
        ),
        codes=(
            "AppNotAllowed",
            "BadApp",
            "BadEnvironment",
            "BadParameter",
            "ConfiguredApp",
            "UnknownApp",
            "UnknownCredential",
            "UnknownParameter",
        ),
    ),
    Operation(
        id="deleteCredential",
        method="DELETE",
        path=f"{apps.PATH}/{{name}}/credentials/{{id}}",
        tag="Apps",
        summary="Take credentials from an app",
        description="An app keeps what it needs: one of them at least, and one for each of its topics.",
        scopes=_MANAGE,
        parameters=(
            _APP_NAME,
            Parameter("id", "path", "Their id, as the app shows it.", _CREDENTIAL, "ABC123DEFG"),
        ),
        replies=(Reply(200, "They are removed.", (Removed,), {"removed": "ABC123DEFG"}),),
        codes=("AppNotAllowed", "ConfiguredApp", "CredentialNeeded", "UnknownApp", "UnknownCredential"),
    ),
    Operation(
        id="deleteApp",
        method="DELETE",
        path=f"{apps.PATH}/{{name}}",
        tag="Apps",
        summary="Remove an app",
        description="What still waits for it is kept, and sent if the app comes back in time.",
        scopes=_MANAGE,
        parameters=(_APP_NAME,),
        replies=(Reply(200, "It is removed.", (Removed,), {"removed": "shop"}),),
        codes=("AppNotAllowed", "ConfiguredApp", "UnknownApp"),
    ),
    Operation(
        id="listKeys",
        method="GET",
        path=keys.PATH,
        tag="API keys",
        summary="List the API keys",
        description="Oldest first; the server's own is not among them.",
        scopes=_MANAGE,
        replies=(
            Reply(
                200, "All that are for no other apps than yours, without secrets.", (keys.KeysBody,), {"keys": [_KEY]}
            ),
        ),
    ),
    Operation(
        id="makeKey",
        method="POST",
        path=keys.PATH,
        tag="API keys",
        summary="Make an API key",
        description=(
            "A key can pass on what it may do itself, and nothing else: not another scope, nor another app, nor a "
            "longer life."
        ),
        scopes=_MANAGE,
        body=keys.NewKey,
        examples=(
            Example(
                "sender",
                "A key for a server that sends to one app",
                {"name": "shop backend", "scopes": ["send"], "apps": ["shop"], "expires_in_days": 365},
            ),
        ),
        replies=(
            Reply(
                201,
                "The key, which is shown this once.",
                (keys.MadeKeyBody,),
                {**_KEY, "key": "hg_0b5cfe52_..."},
                _LOCATION,
                {
                    "key": {
                        "operationId": "getKey",
                        "parameters": {"id": "$response.body#/id"},
                        "description": "What is known of it.",
                    },
                    "remove": {
                        "operationId": "deleteKey",
                        "parameters": {"id": "$response.body#/id"},
                        "description": "Its end.",
                    },
                },
            ),
        ),
        codes=("AmbiguousRequest", "AppNotAllowed", "BadKey", "OutlivesYourKey", "UnknownApp"),
    ),
    Operation(
        id="getOwnKey",
        method="GET",
        path=f"{keys.PATH}/self",
        tag="API keys",
        summary="See what your API key may do",
        scopes=frozenset(Scope),
        replies=(Reply(200, "The key of this request.", (keys.KeyBody,), _KEY),),
        codes=("UnknownKey",),
    ),
    Operation(
        id="getKey",
        method="GET",
        path=f"{keys.PATH}/{{id}}",
        tag="API keys",
        summary="See an API key",
        scopes=_MANAGE,
        parameters=(_KEY_NAMED,),
        replies=(Reply(200, "What is known of it.", (keys.KeyBody,), _KEY),),
        codes=("UnknownKey",),
    ),
    Operation(
        id="deleteKey",
        method="DELETE",
        path=f"{keys.PATH}/{{id}}",
        tag="API keys",
        summary="Remove an API key",
        description="It opens nothing any more from the answer on.",
        scopes=_MANAGE,
        parameters=(_KEY_NAMED,),
        replies=(Reply(200, "It is removed.", (Removed,), {"removed": KEY_ID}),),
        codes=("UnknownKey",),
    ),
    Operation(
        id="listCallers",
        method="GET",
        path=callers.PATH,
        tag="Callers",
        summary="List the callers",
        description="Oldest first.",
        scopes=_MANAGE,
        replies=(
            Reply(200, "Those of all apps that the API key is for.", (callers.CallersBody,), {"callers": [_CALLER]}),
        ),
    ),
    Operation(
        id="addCaller",
        method="POST",
        path=callers.PATH,
        tag="Callers",
        summary="Register a caller",
        description=(
            "A client that has no API key shows a certificate in its TLS handshake, or a provider token that it signs "
            "with a key of its own. Register the public half of it here, as PEM, and the doors know it. It opens "
            "nothing at Apple: there the app's own credentials are used. Of a certificate nothing but its fingerprint "
            "counts, so that one that ended years ago does as well.\n\n"
            "What is registered for the same app again is changed; for another app it is refused."
        ),
        scopes=_MANAGE,
        body=callers.NewCaller,
        examples=(
            Example(
                "key",
                "Who signs provider tokens with a key of its own",
                {
                    "app": "shop",
                    "name": "mail robot",
                    "public_key": PUBLIC_KEY,
                    "key_id": "HIJ456KLMN",
                    "team_id": "DEF123GHIJ",
                },
            ),
        ),
        replies=(
            Reply(200, "It was known, and is changed.", (callers.CallerBody,), _CALLER, _FOR_REMOVAL),
            Reply(
                201,
                "It is known now.",
                (callers.CallerBody,),
                _CALLER,
                _FOR_REMOVAL,
                {
                    "remove": {
                        "operationId": "deleteCaller",
                        "parameters": {"id": "$response.body#/id"},
                        "description": "Its end.",
                    }
                },
            ),
        ),
        codes=(
            "AmbiguousRequest",
            "AppNotAllowed",
            "BadCaller",
            "BadEnvironment",
            "CallerTaken",
            "MissingApp",
            "MissingTopic",
            "TopicDisallowed",
            "UnknownApp",
            "UnknownEnvironment",
        ),
    ),
    Operation(
        id="deleteCaller",
        method="DELETE",
        path=f"{callers.PATH}/{{id}}",
        tag="Callers",
        summary="Remove a caller",
        description="It opens nothing any more from the answer on; connections that are open stay so.",
        scopes=_MANAGE,
        parameters=(Parameter("id", "path", "The caller's id.", {}, CALLER_ID),),
        replies=(Reply(200, "It is removed.", (Removed,), {"removed": CALLER_ID}),),
        codes=("UnknownCaller",),
    ),
    Operation(
        id="listRemovals",
        method="GET",
        path=removals.PATH,
        tag="Removals",
        summary="Read which device tokens are dead",
        description=(
            "Those that Apple calls dead (410), in the order in which that came to be known. Reading consumes nothing: "
            "keep `next`, send it as `after`, and the answer has what came since, be it right away, as long as pages "
            "are full, or in an hour. A removal is forgotten 180 days after Apple's word."
        ),
        scopes=_READ,
        parameters=(
            Parameter("app", "query", "Of this app. Default: the only one.", {}, "shop"),
            Parameter("environment", "query", "Of this environment only.", {"enum": list(Environment)}),
            Parameter("token", "query", "Of this device token only.", _HEX),
            Parameter("after", "query", "The `next` of the former answer; none: from the beginning.", _NUMBER),
            _LIMIT,
        ),
        replies=(Reply(200, "A page of them.", (removals.RemovalsBody,), {"removals": [_REMOVAL], "next": "4711"}),),
        codes=("AppNotAllowed", "BadDeviceToken", "BadParameter", "MissingApp", "UnknownApp", "UnknownParameter"),
    ),
    Operation(
        id="register",
        method="POST",
        path=removals.REGISTRATIONS_PATH,
        tag="Removals",
        summary="Say that device tokens were registered",
        description=(
            "An app that starts registers, and may get a device token that was dead before. Sent here, it is sent to "
            "again, unless Apple called it dead after that moment: what Apple says of the time before is not counted, "
            "also where it is learnt later. So send only what an app did register, and `at` where that is not now."
        ),
        scopes=_SEND,
        body=removals.NewRegistrations,
        examples=(Example("two", "Two of them", {"app": "shop", "tokens": [_TOKEN, _OTHER_TOKEN]}),),
        replies=(Reply(200, "It is on disk.", (removals.Revived,), {"revived": 1}),),
        codes=(
            "AppNotAllowed",
            "BadDeviceToken",
            "BadEnvironment",
            "BadRegistration",
            "MissingApp",
            "MissingDeviceToken",
            "TooManyNotifications",
            "UnknownApp",
            "UnknownEnvironment",
        ),
    ),
    Operation(
        id="getHealth",
        method="GET",
        path="/healthz",
        tag="Operations",
        summary="Ask whether pushes can go out",
        description="With an API key it says why not, too: of the apps that the key is for.",
        scopes=None,
        replies=(
            Reply(
                200,
                "They can: all of them (`ok`), or not all (`degraded`).",
                (HealthBody,),
                {"status": "ok", "lanes": {"good": 1, "idle": 1, "failing": 0}, "problems": 0},
            ),
            Reply(
                503,
                "They cannot.",
                (HealthBody,),
                {"status": "failing", "lanes": {"good": 0, "idle": 0, "failing": 1}, "problems": 1},
            ),
        ),
    ),
    Operation(
        id="getLife",
        method="GET",
        path="/livez",
        tag="Operations",
        summary="Ask whether the process answers",
        scopes=None,
        replies=(Reply(200, "It does.", (Life,), {"status": "ok"}),),
    ),
    Operation(
        id="getMetrics",
        method="GET",
        path="/metrics",
        tag="Operations",
        summary="Read the metrics",
        scopes=None,
        replies=(Reply(200, "In Prometheus' text format.", content_type="text/plain"),),
    ),
    Operation(
        id="getDocument",
        method="GET",
        path="/openapi.json",
        tag="Operations",
        summary="Read this document",
        description="`/docs` shows it to people, `/docs/errors` the codes of problems.",
        scopes=None,
        replies=(Reply(200, "OpenAPI 3.1.", content_type=JSON),),
    ),
)

LIMITS: dict[type, dict[str, dict[str, Any]]] = {
    decoding.Fields: {
        "payload": {"type": "object"},
        "badge": {"minimum": 0},
        "interruption_level": {"enum": ["passive", "active", "time-sensitive", "critical", None]},
        "priority": {"enum": [1, 5, 10, None]},
        "expiration": {"minimum": 0},
        "collapse_id": {"minLength": 1, "maxLength": 64},
    },
    decoding.Item: {
        "token": _HEX,
    },
    decoding.Post: {
        "token": _HEX,
        "tokens": {"minItems": 1, "maxItems": decoding.MAX_NOTIFICATIONS},
        "notifications": {"minItems": 1, "maxItems": decoding.MAX_NOTIFICATIONS},
        "wait": {"minimum": 0, "maximum": notifications.MAX_WAIT_S},
    },
    decoding.Ids: {
        "ids": {"maxItems": notifications.MAX_IDS},
    },
    LiveActivity: {
        "event": {"enum": ["start", "update", "end"]},
    },
    CriticalSound: {
        "volume": {"minimum": 0, "maximum": 1},
    },
    ReceiptBody: {
        "state": {"enum": list(STATES.values())},
        "created_at": {"format": "date-time"},
        "updated_at": {"format": "date-time"},
        "next_attempt_at": {"format": "date-time"},
        "unregistered_at": {"format": "date-time"},
    },
    keys.NewKey: {
        "name": {"minLength": 1, "maxLength": keys.MAX_NAME},
        "scopes": {"minItems": 1},
        "apps": {"minItems": 1},
        "expires_in_days": {"exclusiveMinimum": 0, "maximum": keys.MAX_DAYS},
    },
    callers.NewCaller: {
        "name": {"minLength": 1, "maxLength": callers.MAX_NAME},
    },
    removals.NewRegistrations: {
        "tokens": {"minItems": 1, "maxItems": removals.MAX_TOKENS},
    },
    Reason: {
        "since": {"format": "date-time"},
        "rests_until": {"format": "date-time"},
    },
}
"""What the values of members have to be that their types do not say."""
