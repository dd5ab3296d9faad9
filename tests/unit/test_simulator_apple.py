from __future__ import annotations

from collections.abc import Iterable

import pytest

from heliograph import reasons
from heliograph.model import DeviceToken, Environment, PushType, SigningKey
from heliograph.protocols.certificate import particulars
from heliograph.protocols.http2 import Field
from heliograph.protocols.provider_token import GRID_S, MAX_AGE_S, mint
from heliograph.simulator.apple import LEAST_AGE_S, Apple, Received, Verdict, Visit, addressed_to
from heliograph.simulator.faults import Answer
from heliograph.simulator.server import new_signing_key
from tests.certificates import push_certificate

NOW = 1_700_000_000.0
TOKEN = "ab" * 32
ID = b"5b1c8f1e-0f4a-4b6e-8a53-2f0f6a3f9d11"
PAYLOAD = b'{"aps":{"alert":"Hello"}}'
TOPIC = "com.example.app"

KEY = new_signing_key("KEYKEYKEY1", "TEAMTEAM01")
OTHER_KEY = new_signing_key("KEYKEYKEY2", "TEAMTEAM01")
FOREIGN_KEY = new_signing_key("KEYKEYKEY3", "TEAMTEAM02")
GOOD = ("authorization", "bearer " + mint(KEY, NOW))


def request(
    *more: tuple[str, str], without: Iterable[str] = (), path: str = "/3/device/" + TOKEN, method: str = "POST"
) -> list[Field]:
    """A good request; `more` replaces fields or adds some, `without` takes some away."""
    fields = {
        ":method": method,
        ":scheme": "https",
        ":authority": "api.push.apple.com",
        ":path": path,
        "apns-topic": TOPIC,
        "apns-push-type": "alert",
        "apns-id": ID.decode(),
        **dict([GOOD]),
        **dict(more),
    }
    return [(name.encode(), value.encode()) for name, value in fields.items() if name not in without]


@pytest.fixture
def apple() -> Apple:
    apple = Apple()
    for key in (KEY, OTHER_KEY, FOREIGN_KEY):
        apple.add_key(key)
    return apple


def ask(
    apple: Apple, fields: list[Field], body: bytes = PAYLOAD, now: float = NOW, visit: Visit | None = None
) -> Verdict:
    return apple.judge(visit or Visit(), fields, body, now)


def test_good_request_is_accepted_under_its_own_id(apple: Apple) -> None:
    assert ask(apple, request()) == Verdict(200, ID)


def test_what_the_device_would_show_can_be_read(apple: Apple) -> None:
    ask(apple, request(("apns-collapse-id", "news"), path="/3/device/" + TOKEN.upper()))
    assert apple.received == [
        Received(ID.decode(), DeviceToken(TOKEN), TOPIC, PushType.ALERT, PAYLOAD, collapse_id="news")
    ]


def test_received_notification_shows_neither_token_nor_payload(apple: Apple) -> None:
    ask(apple, request())
    assert TOKEN not in repr(apple.received)
    assert "Hello" not in repr(apple.received)


def test_refused_notification_is_not_received(apple: Apple) -> None:
    ask(apple, request(), b"")
    assert apple.received == []


def test_only_the_last_notifications_are_kept() -> None:
    apple = Apple(keep=2)
    apple.add_key(KEY)
    for body in (b"{}", b"[]", b"0"):
        ask(apple, request(), body)
    assert [received.payload for received in apple.received] == [b"[]", b"0"]


def test_benchmark_may_keep_nothing() -> None:
    apple = Apple(keep=0)
    apple.add_key(KEY)
    assert ask(apple, request()).status == 200
    assert apple.received == []


def test_request_without_an_id_is_given_a_new_one_each_time(apple: Apple) -> None:
    ids = {ask(apple, request(without=["apns-id"])).apns_id for _ in range(3)}
    assert len(ids) == 3
    assert all(len(new) == 36 and ask(apple, request(("apns-id", new.decode()))).apns_id == new for new in ids)


def test_only_the_development_environment_gives_a_unique_id() -> None:
    apple = Apple(Environment.DEVELOPMENT)
    apple.add_key(KEY)
    verdict = ask(apple, request())
    assert verdict.unique_id is not None
    assert verdict.unique_id != verdict.apns_id


@pytest.mark.parametrize(
    "fields, reason",
    [
        (request(method="GET"), reasons.METHOD_NOT_ALLOWED),
        (request(path="/3/devices/" + TOKEN), reasons.BAD_PATH),
        (request(path="/3/device/"), reasons.MISSING_DEVICE_TOKEN),
        (request(without=["authorization"]), reasons.MISSING_PROVIDER_TOKEN),
        (request(("authorization", "basic dTpw")), reasons.MISSING_PROVIDER_TOKEN),
        (request(("authorization", "bearer")), reasons.MISSING_PROVIDER_TOKEN),
        (request(("authorization", "bearer a.b.c")), reasons.INVALID_PROVIDER_TOKEN),
        (request(("apns-id", "5b1c8f1e")), reasons.BAD_MESSAGE_ID),
        (request(("apns-id", "")), reasons.BAD_MESSAGE_ID),
        (request(("apns-expiration", "tomorrow")), reasons.BAD_EXPIRATION_DATE),
        (request(("apns-expiration", "-1")), reasons.BAD_EXPIRATION_DATE),
        (request(("apns-expiration", "1700000000000")), reasons.BAD_EXPIRATION_DATE),
        (request(("apns-collapse-id", "x" * 65)), reasons.BAD_COLLAPSE_ID),
        (request(("apns-collapse-id", "é" * 33)), reasons.BAD_COLLAPSE_ID),
        (request(("apns-priority", "2")), reasons.BAD_PRIORITY),
        (request(("apns-push-type", "background"), ("apns-priority", "10")), reasons.BAD_PRIORITY),
        (request(("apns-push-type", "loud")), reasons.INVALID_PUSH_TYPE),
        (request(without=["apns-topic"]), reasons.MISSING_TOPIC),
        (request(("apns-topic", "com example")), reasons.BAD_TOPIC),
        (request(("apns-push-type", "voip")), reasons.BAD_TOPIC),
        (request(path="/3/device/abc"), reasons.BAD_DEVICE_TOKEN),
        (request(path="/3/device/" + "xy" * 32), reasons.BAD_DEVICE_TOKEN),
        (request(path="/3/device/" + "ab" * 201), reasons.BAD_DEVICE_TOKEN),
    ],
)
def test_what_is_wrong_with_a_request_is_answered(apple: Apple, fields: list[Field], reason: reasons.Reason) -> None:
    verdict = ask(apple, fields)
    assert (verdict.status, verdict.reason) == (reason.status, reason.word)


@pytest.mark.parametrize(
    "more",
    [
        [("apns-id", ID.decode().upper())],
        [("apns-expiration", "0")],
        [("apns-expiration", "1700000000")],
        [("apns-collapse-id", "x" * 64)],
        [("apns-priority", "1")],
        [("apns-push-type", "background"), ("apns-priority", "5")],
        [("apns-push-type", "background")],
        [("apns-push-type", "liveactivity"), ("apns-topic", TOPIC + ".push-type.liveactivity")],
        [("authorization", "Bearer " + mint(KEY, NOW))],
        [("content-type", "text/plain"), ("user-agent", "curl")],
    ],
)
def test_what_apple_allows_is_accepted(apple: Apple, more: list[tuple[str, str]]) -> None:
    assert ask(apple, request(*more)).status == 200


@pytest.mark.parametrize("octets", [1, 32, 54, 80, 200])
def test_device_token_may_have_any_length(apple: Apple, octets: int) -> None:
    assert ask(apple, request(path="/3/device/" + "cd" * octets)).status == 200


@pytest.mark.parametrize("name", ["apns-id", "apns-topic", "apns-expiration", "authorization"])
def test_field_that_comes_twice_is_refused(apple: Apple, name: str) -> None:
    fields = request(("apns-expiration", "0"))
    twice = [*fields, next(field for field in fields if field[0] == name.encode())]
    assert ask(apple, twice).reason == "DuplicateHeaders"


def test_other_fields_may_come_twice(apple: Apple) -> None:
    assert ask(apple, [*request(), (b"accept", b"a"), (b"accept", b"b")]).status == 200


def test_empty_payload_is_refused(apple: Apple) -> None:
    verdict = ask(apple, request(), b"")
    assert (verdict.status, verdict.reason) == (400, "PayloadEmpty")


@pytest.mark.parametrize(
    "kind, topic, limit", [("alert", TOPIC, 4096), ("voip", TOPIC + ".voip", 5120), (None, TOPIC + ".voip", 5120)]
)
def test_payload_may_have_its_limit_and_no_octet_more(apple: Apple, kind: str | None, topic: str, limit: int) -> None:
    more = [("apns-topic", topic)] + ([("apns-push-type", kind)] if kind else [])
    fields = request(*more, without=[] if kind else ["apns-push-type"])
    assert ask(apple, fields, b"x" * limit).status == 200
    verdict = ask(apple, fields, b"x" * (limit + 1))
    assert (verdict.status, verdict.reason) == (413, "PayloadTooLarge")


def test_order_of_the_checks_is_the_documented_one(apple: Apple) -> None:
    """Everything is wrong at first; each step puts right what was answered."""
    apple.unregister(TOKEN, 5)
    apple.add_app(TOPIC, KEY.team_id)
    wrong = {
        ":method": "GET",
        ":path": "/3",
        "authorization": "",
        "apns-id": "1",
        "apns-expiration": "x",
        "apns-collapse-id": "x" * 65,
        "apns-priority": "11",
        "apns-push-type": "loud",
        "apns-topic": "",
    }
    duplicate = [(b"apns-topic", b"com.example.other")]
    body = b""
    seen = []

    def answered() -> None:
        fields = [*request(*wrong.items()), *duplicate]
        seen.append(ask(apple, fields, body).reason)

    for name, value in [
        (":method", "POST"),
        (":path", "/3/device/"),
        (":path", "/3/device/" + TOKEN),
    ]:
        answered()
        wrong[name] = value
    answered()
    duplicate.clear()
    for name, value in [
        ("authorization", "bearer x"),
        ("authorization", "bearer " + mint(KEY, NOW - 2 * MAX_AGE_S)),
        ("authorization", GOOD[1]),
        ("apns-id", ID.decode()),
        ("apns-expiration", "0"),
        ("apns-collapse-id", "x"),
        ("apns-priority", "10"),
        ("apns-push-type", "alert"),
        ("apns-topic", "com example"),
        ("apns-topic", "com.example.other"),
        ("apns-topic", TOPIC),
    ]:
        answered()
        wrong[name] = value
    answered()
    body = b"x" * 5000
    answered()
    body = PAYLOAD
    answered()
    apple.register(TOKEN)
    answered()
    assert seen == [
        "MethodNotAllowed",
        "BadPath",
        "MissingDeviceToken",
        "DuplicateHeaders",
        "MissingProviderToken",
        "InvalidProviderToken",
        "ExpiredProviderToken",
        "BadMessageId",
        "BadExpirationDate",
        "BadCollapseId",
        "BadPriority",
        "InvalidPushType",
        "MissingTopic",
        "BadTopic",
        "TopicDisallowed",
        "PayloadEmpty",
        "PayloadTooLarge",
        "Unregistered",
        None,
    ]


# -- provider tokens ---------------------------------------------------------------------------------------------


def bearer(key: SigningKey, now: float = NOW) -> tuple[str, str]:
    return ("authorization", "bearer " + mint(key, now))


def test_provider_token_of_an_unknown_key_is_invalid(apple: Apple) -> None:
    assert ask(apple, request(bearer(new_signing_key("KEYKEYKEY9", "TEAMTEAM01")))).reason == "InvalidProviderToken"


def test_provider_token_that_names_another_team_is_invalid(apple: Apple) -> None:
    liar = SigningKey(KEY.key_id, "TEAMTEAM02", KEY.pem)
    assert ask(apple, request(bearer(liar))).reason == "InvalidProviderToken"


def test_provider_token_with_a_forged_signature_is_invalid(apple: Apple) -> None:
    forger = new_signing_key(KEY.key_id, KEY.team_id)
    assert ask(apple, request(bearer(forger))).reason == "InvalidProviderToken"


def test_provider_token_expires_on_a_connection_that_used_it_before(apple: Apple) -> None:
    visit = Visit()
    assert ask(apple, request(), visit=visit).status == 200
    verdict = ask(apple, request(), visit=visit, now=NOW + 2 * MAX_AGE_S)
    assert (verdict.status, verdict.reason) == (403, "ExpiredProviderToken")


def test_provider_token_that_was_verified_elsewhere_expires_too(apple: Apple) -> None:
    ask(apple, request())
    assert ask(apple, request(), now=NOW + 2 * MAX_AGE_S).reason == "ExpiredProviderToken"


def test_connection_on_which_a_provider_token_expired_takes_no_other(apple: Apple) -> None:
    visit = Visit()
    later = NOW + 2 * MAX_AGE_S
    assert ask(apple, request(), visit=visit, now=later).reason == "ExpiredProviderToken"
    assert ask(apple, request(bearer(KEY, later)), visit=visit, now=later).reason == "ExpiredProviderToken"
    assert ask(apple, request(bearer(KEY, later)), now=later).status == 200


def test_provider_token_that_changes_within_twenty_minutes_is_too_much_and_the_old_one_still_good(apple: Apple) -> None:
    visit = Visit()
    assert ask(apple, request(), visit=visit).status == 200
    soon = NOW + GRID_S
    new = request(bearer(KEY, soon))
    verdict = ask(apple, new, visit=visit, now=NOW + LEAST_AGE_S - 1)
    assert (verdict.status, verdict.reason) == (429, "TooManyProviderTokenUpdates")
    assert ask(apple, request(), visit=visit, now=NOW + LEAST_AGE_S - 1).status == 200
    assert ask(apple, new, visit=visit, now=soon).status == 200
    assert ask(apple, request(), visit=visit, now=soon).reason == "TooManyProviderTokenUpdates"
    assert ask(apple, request(), now=soon).status == 200


def test_client_certificate_needs_no_provider_token_and_none_is_looked_at(apple: Apple) -> None:
    visit = Visit(particulars(push_certificate(TOPIC).certificate))
    assert ask(apple, request(without=["authorization"]), visit=visit).status == 200
    assert ask(apple, request(("authorization", "bearer x")), visit=visit).status == 200


def test_client_certificate_sends_to_the_topics_that_it_lists(apple: Apple) -> None:
    visit = Visit(particulars(push_certificate(TOPIC, (f"{TOPIC}.voip", "voip")).certificate))
    voip = (("apns-push-type", "voip"), ("apns-topic", f"{TOPIC}.voip"))
    assert ask(apple, request(*voip), visit=visit).status == 200
    assert ask(apple, request(("apns-topic", "com.example.other")), visit=visit).reason == "TopicDisallowed"
    assert ask(apple, request(without=["apns-topic"]), visit=visit).reason == "MissingTopic"


def test_client_certificate_of_one_topic_implies_it(apple: Apple) -> None:
    visit = Visit(particulars(push_certificate(TOPIC).certificate))
    assert ask(apple, request(without=["apns-topic"]), visit=visit).status == 200
    assert apple.received[-1].topic == TOPIC


def test_new_provider_token_of_the_same_key_is_taken_on_the_same_connection(apple: Apple) -> None:
    visit = Visit()
    ask(apple, request(), visit=visit)
    later = NOW + 2 * MAX_AGE_S
    assert ask(apple, request(bearer(KEY, later)), visit=visit, now=later).status == 200


def test_second_key_on_a_connection_is_unrelated(apple: Apple) -> None:
    visit = Visit()
    ask(apple, request(), visit=visit)
    verdict = ask(apple, request(bearer(OTHER_KEY)), visit=visit)
    assert (verdict.status, verdict.reason) == (403, "UnrelatedKeyIdInToken")
    assert ask(apple, request(), visit=visit).status == 200
    assert ask(apple, request(bearer(OTHER_KEY))).status == 200


def test_related_key_may_use_the_same_connection_and_its_tokens_may_alternate() -> None:
    apple, visit = Apple(), Visit()
    apple.add_key(KEY)
    apple.add_key(OTHER_KEY, related=KEY.key_id)
    for key in (KEY, OTHER_KEY, KEY, OTHER_KEY):
        assert ask(apple, request(bearer(key)), visit=visit).status == 200
    renewed = request(bearer(OTHER_KEY, NOW + GRID_S))
    assert ask(apple, renewed, visit=visit, now=NOW + LEAST_AGE_S - 1).reason == "TooManyProviderTokenUpdates"
    other_way = Visit()
    for key in (OTHER_KEY, KEY):
        assert ask(apple, request(bearer(key)), visit=other_way).status == 200


def test_key_of_another_team_is_never_related() -> None:
    apple, visit = Apple(), Visit()
    apple.add_key(KEY)
    apple.add_key(FOREIGN_KEY, related=KEY.key_id)
    ask(apple, request(), visit=visit)
    assert ask(apple, request(bearer(FOREIGN_KEY)), visit=visit).reason == "UnrelatedKeyIdInToken"


def test_key_of_one_environment_is_for_no_other() -> None:
    for environment, reason in (
        (Environment.PRODUCTION, None),
        (Environment.DEVELOPMENT, "BadEnvironmentKeyInToken"),
    ):
        apple = Apple()
        apple.add_key(KEY, environment=environment)
        assert ask(apple, request()).reason == reason


def test_topic_specific_key_is_for_its_topics_only() -> None:
    apple = Apple()
    apple.add_key(KEY, topics=[TOPIC])
    other = request(("apns-topic", "com.example.other"))
    assert ask(apple, request()).status == 200
    assert ask(apple, request(("apns-topic", f"{TOPIC}.voip"), ("apns-push-type", "voip"))).status == 200
    assert ask(apple, other).reason == "TopicDisallowed"
    apple.add_app("com.example.other", KEY.team_id)
    assert ask(apple, other).reason == "TopicDisallowed"
    assert ask(apple, request()).reason == "TopicDisallowed", "the team has not this app"


def test_provider_token_from_the_future_is_invalid_until_its_time(apple: Apple) -> None:
    early = request(bearer(KEY, NOW + MAX_AGE_S))
    assert ask(apple, early).reason == "InvalidProviderToken"
    assert ask(apple, early, now=NOW + MAX_AGE_S).status == 200


def test_connection_is_known_by_its_key_only_after_a_good_provider_token(apple: Apple) -> None:
    visit = Visit()
    ask(apple, request(("authorization", "bearer x")), visit=visit)
    assert visit.key_id is None
    ask(apple, request(), b"", visit=visit)
    assert visit.key_id == KEY.key_id


def test_key_that_is_added_later_is_known_to_connections_that_were_there(apple: Apple) -> None:
    late, visit = new_signing_key("KEYKEYKEY9", "TEAMTEAM01"), Visit()
    assert ask(apple, request(bearer(late)), visit=visit).reason == "InvalidProviderToken"
    apple.add_key(late)
    assert ask(apple, request(bearer(late)), visit=visit).status == 200


def test_many_different_clients_on_one_connection_are_not_all_remembered(apple: Apple) -> None:
    visit = Visit()
    for number in range(1000):
        assert ask(apple, request(("user-agent", str(number))), visit=visit).status == 200
    assert len(visit.memo) <= 64


# -- apps and devices --------------------------------------------------------------------------------------------


def test_team_without_listed_apps_may_send_to_any_topic(apple: Apple) -> None:
    assert ask(apple, request(("apns-topic", "org.example.anything"))).status == 200


def test_team_with_listed_apps_may_send_to_theirs_only(apple: Apple) -> None:
    visit = Visit()
    other = request(("apns-topic", "org.example.other"))
    assert ask(apple, other, visit=visit).status == 200
    apple.add_app(TOPIC, KEY.team_id)
    assert ask(apple, request(), visit=visit).status == 200
    assert ask(apple, request(("apns-topic", TOPIC + ".voip"), ("apns-push-type", "voip"))).status == 200
    assert ask(apple, other, visit=visit).reason == "TopicDisallowed"
    assert ask(apple, [*request(bearer(FOREIGN_KEY))]).status == 200


def test_topic_of_an_own_app_with_the_suffix_of_another_push_type_is_bad(apple: Apple) -> None:
    apple.add_app(TOPIC, KEY.team_id)
    assert ask(apple, request(("apns-topic", TOPIC + ".voip"))).reason == "BadTopic"
    assert ask(apple, request(("apns-push-type", "voip"))).reason == "BadTopic"


def test_unregistered_token_is_answered_with_its_time_in_milliseconds(apple: Apple) -> None:
    apple.unregister(TOKEN.upper(), 1_699_999_999_123)
    assert ask(apple, request()) == Verdict(410, ID, "Unregistered", 1_699_999_999_123)
    apple.register(TOKEN)
    assert ask(apple, request()).status == 200


def test_token_of_the_other_environment_is_bad(apple: Apple) -> None:
    apple.register(TOKEN, environment=Environment.DEVELOPMENT)
    assert ask(apple, request()).reason == "BadDeviceToken"
    apple.register(TOKEN, environment=Environment.PRODUCTION)
    assert ask(apple, request()).status == 200


def test_token_of_another_topic_is_not_for_this_one(apple: Apple) -> None:
    apple.register(TOKEN, topic=TOPIC)
    assert ask(apple, request()).status == 200
    verdict = ask(apple, request(("apns-topic", "com.example.other")))
    assert verdict.reason == "DeviceTokenNotForTopic"


def test_device_token_may_get_so_many_a_second_where_there_is_a_limit() -> None:
    apple = Apple(device_limit=2)
    apple.add_key(KEY)
    other = "/3/device/" + "cd" * 32
    assert [ask(apple, request()).status for _ in range(3)] == [200, 200, 429]
    assert ask(apple, request()).reason == "TooManyRequests"
    assert ask(apple, request(path=other)).status == 200
    assert ask(apple, request(), now=NOW + 1).status == 200
    assert len(apple.received) == 4


def test_keys_and_apps_can_be_listed(apple: Apple) -> None:
    apple.add_app("com.example.b", "TEAMTEAM01")
    apple.add_app("com.example.a", "TEAMTEAM01")
    assert apple.apps() == [("com.example.a", "TEAMTEAM01"), ("com.example.b", "TEAMTEAM01")]
    assert apple.keys()[0] == (KEY.key_id, KEY.team_id)


# -- faults ------------------------------------------------------------------------------------------------------


def test_ordered_answer_takes_the_place_of_a_200_only(apple: Apple) -> None:
    busy = Answer(503, "ServiceUnavailable", retry_after_s=7)
    assert apple.judge(Visit(), request(), PAYLOAD, NOW, busy) == Verdict(
        503, ID, "ServiceUnavailable", retry_after_s=7
    )
    assert apple.judge(Visit(), request(), b"", NOW, busy).reason == "PayloadEmpty"
    assert apple.received == []


def test_address_of_a_request_is_read_without_judging_it() -> None:
    assert addressed_to(request(path="/3/device/ABCD")) == (b"abcd", TOPIC.encode())
    assert addressed_to(request(path="/nowhere", without=["apns-topic"])) == (b"", b"")
