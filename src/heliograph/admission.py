"""Admission: refuse what cannot succeed, before anything is queued. Pure.

Columns are checked entry by entry, so that a caller learns of everything that is wrong at once. Nothing is refused that
Apple would take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import compress
from typing import TypeVar, cast

from msgspec import Struct
from msgspec.structs import replace

from heliograph import payload as rules
from heliograph import policy, reasons
from heliograph.errors import Refused
from heliograph.model import App, Environment, Headers, PushType
from heliograph.protocols import apns

T = TypeVar("T")


class Checked(Struct, frozen=True):
    """Columns as they will be sent, and what is wrong with them; only good for sending but for what is refused."""

    headers: Sequence[Headers]
    """The topic is filled in; alerts without a collapse id get their own id as one."""
    tokens: Sequence[bytes]
    """Lower-case hex."""
    payloads: Sequence[bytes]
    refused: list[Refused]


def check(
    app: App,
    environment: Environment,
    now: float,
    headers: Sequence[Headers],
    tokens: Sequence[str] | Sequence[bytes],
    payloads: Sequence[bytes],
) -> Checked:
    """Check a request's columns; `headers` and `payloads` have one entry for all or one each.

    Device tokens that are octets are lower-case hex already, as a codec made them.
    """
    refused: list[Refused] = []
    checked_headers = _check_headers(app, environment, now, headers, refused)
    checked_tokens = _check_tokens(tokens, refused)
    _check_payloads(payloads, headers, refused)
    return Checked(checked_headers, checked_tokens, payloads, refused)


def leave_out(checked: Checked) -> Checked:
    """What is left without the entries that are refused; nothing, where something is wrong with all of them."""
    wrong = {each.index for each in checked.refused}
    if None in wrong:
        return Checked((), (), (), [])
    good = [index not in wrong for index in range(len(checked.tokens))]
    return Checked(_those(checked.headers, good), _those(checked.tokens, good), _those(checked.payloads, good), [])


def _those(column: Sequence[T], good: Sequence[bool]) -> Sequence[T]:
    return list(compress(column, good)) if len(column) == len(good) else column


def choose_environment(app: App, environment: Environment | None) -> Environment:
    """The environment that is meant. Raises Refused where it is not clear or not the app's."""
    if environment is None:
        if len(app.environments) != 1:
            text = f"The app {app.name!r} has both environments: say which, production or development."
            raise Refused("MissingEnvironment", text, field="environment")
        return app.environments[0]
    if environment not in app.environments:
        text = f"The app {app.name!r} is not set up for {environment}: its credentials are for {app.environments[0]}."
        raise Refused("UnknownEnvironment", text, field="environment")
    return environment


def refuse_held(tokens: Sequence[bytes], held: Mapping[bytes, str]) -> list[Refused]:
    """A refusal for each device token that is not to be sent to; `held` has Apple's word for each (see `ports`)."""
    return [
        Refused(held[token], _HELD[held[token]], index=index, field="token")
        for index, token in enumerate(tokens)
        if token in held
    ]


_HELD = {
    reasons.UNREGISTERED.word: "Apple said that this device token is dead: remove it on your side.",
    reasons.BAD_DEVICE_TOKEN.word: "Apple did not know this device token a while ago, so it is held back: check "
    "whether the app was built for development or production, and send it to that environment.",
}


def _at(refused: Refused, index: int | None) -> Refused:
    return Refused(refused.reason, refused.detail, index=index, field=refused.field)


def _check_headers(
    app: App, environment: Environment, now: float, headers: Sequence[Headers], refused: list[Refused]
) -> list[Headers]:
    known: dict[Headers, Headers] = {}
    out: list[Headers] = []
    for index, each in enumerate(headers):
        final = known.get(each)
        if final is None:
            try:
                final = _final_headers(app.topics, each)
                if app.credentials_for(environment, final.topic) is None:
                    raise _without_credentials(app, environment, final.topic)
                if each.expiration is not None and policy.deadline(now, each.expiration) <= now:
                    raise Refused("BadExpirationDate", "The expiration has passed already.", field="expiration")
                known[each] = final
            except Refused as error:
                refused.append(_at(error, index if len(headers) > 1 else None))
                final = each
        out.append(final)
    return out


@lru_cache(1024)  # most notifications of an app have the same few, and to check them takes longer than to find them
def _final_headers(topics: tuple[str, ...], headers: Headers) -> Headers:
    """As they will be sent for an app with these topics. Raises Refused.

    What is kept outlives the app, and the moment: neither credentials nor a clock have to do with it.
    """
    if not headers.topic:
        if len(topics) != 1:
            text = f"The app has several topics: name one of {', '.join(topics)}."
            raise Refused("MissingTopic", text, field="topic")
        headers = replace(headers, topic=apns.topic_for(topics[0], headers.push_type))
    apns.check_headers(headers)
    if not apns.allowed_topic(headers.topic, headers.push_type, topics):
        wanted = " or ".join(apns.topic_for(topic, headers.push_type) for topic in topics)
        text = f"The topic {headers.topic!r} is not the app's. With push type {headers.push_type} send {wanted}."
        raise Refused("TopicDisallowed", text, field="topic")
    if headers.push_type is PushType.ALERT and headers.collapse_id is None and headers.collapse_on_id is None:
        headers = replace(headers, collapse_on_id=True)
    return headers


def _without_credentials(app: App, environment: Environment, topic: str) -> Refused:
    text = (
        f"The app {app.name!r} has no credentials for the topic {topic!r} in {environment}: no certificate of its "
        "lists it. Add a certificate that does, or a signing key, which serves every push type."
    )
    return Refused("TopicDisallowed", text, field="push_type")


def _check_tokens(tokens: Sequence[str] | Sequence[bytes], refused: list[Refused]) -> Sequence[bytes]:
    if isinstance(tokens[0], bytes):
        return cast("Sequence[bytes]", tokens)
    out: list[bytes] = []
    check_token = apns.check_token
    for index, token in enumerate(cast("Sequence[str]", tokens)):
        try:
            out.append(check_token(token))
        except Refused as error:
            refused.append(_at(error, index))
            out.append(b"")  # keeps the places of the others
    return out


def _check_payloads(payloads: Sequence[bytes], headers: Sequence[Headers], refused: list[Refused]) -> None:
    check_payload = rules.check
    if len(payloads) > 1:
        push_types = [each.push_type for each in headers] * (len(payloads) if len(headers) == 1 else 1)
        for index, (payload, push_type) in enumerate(zip(payloads, push_types, strict=True)):
            try:
                check_payload(payload, push_type)
            except Refused as error:
                refused.append(_at(error, index))
        return
    # One payload, under many headers perhaps: each push type has its own limits.
    wrong: dict[PushType, Refused] = {}
    push_types = [each.push_type for each in headers]
    kinds = dict.fromkeys(push_types)
    for push_type in kinds:
        try:
            check_payload(payloads[0], push_type)
        except Refused as error:
            wrong[push_type] = error
    if len(wrong) == len(kinds):
        refused += wrong.values()
    elif wrong:
        refused += [_at(wrong[each], index) for index, each in enumerate(push_types) if each in wrong]
