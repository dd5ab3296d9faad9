from __future__ import annotations

import pytest

from heliograph import reasons
from heliograph.reasons import FollowUp, find


def test_table_holds_every_word_under_its_own_name() -> None:
    assert all(reason.word == word for word, reason in reasons.TABLE.items())
    constants = {value.word for value in vars(reasons).values() if isinstance(value, reasons.Reason)}
    assert constants == set(reasons.TABLE)


DOCUMENTED = {
    400: """
        BadCollapseId BadDeviceToken BadExpirationDate BadMessageId BadPriority BadTopic DeviceTokenNotForTopic
        DuplicateHeaders IdleTimeout InvalidPushType MissingDeviceToken MissingTopic PayloadEmpty TopicDisallowed
        FeatureNotEnabled MissingChannelId BadChannelId ChannelNotRegistered BadRequestParams BadRequestPayload
        MissingPushType CannotCreateChannelConfig MissingChannelQueueSize
    """,
    403: """
        BadCertificate BadCertificateEnvironment ExpiredProviderToken Forbidden InvalidProviderToken
        MissingProviderToken UnrelatedKeyIdInToken BadEnvironmentKeyIdInToken BadEnvironmentKeyInToken TopicMismatch
    """,
    404: "BadPath",
    405: "MethodNotAllowed",
    410: "ExpiredToken Unregistered",
    413: "PayloadTooLarge",
    429: "TooManyProviderTokenUpdates TooManyRequests",
    500: "InternalServerError",
    503: "ServiceUnavailable Shutdown",
}


def test_table_lists_what_apple_documents_and_nothing_else() -> None:
    listed = {(reason.status, reason.word) for reason in reasons.TABLE.values()}
    assert listed == {(status, word) for status, words in DOCUMENTED.items() for word in words.split()}


def test_only_the_two_words_of_410_kill_a_device_token() -> None:
    assert {reason.word for reason in reasons.TABLE.values() if reason.token_dies} == {"Unregistered", "ExpiredToken"}


def test_dead_token_is_told_by_feedback_and_not_by_an_error_packet() -> None:
    assert {reason.word for reason in reasons.TABLE.values() if reason.legacy_status is None} == {
        "Unregistered",
        "ExpiredToken",
    }


@pytest.mark.parametrize(
    "word,legacy_status",
    [
        ("MissingDeviceToken", 2),
        ("MissingTopic", 3),
        ("PayloadEmpty", 4),
        ("BadTopic", 6),
        ("PayloadTooLarge", 7),
        ("BadDeviceToken", 8),
        ("DeviceTokenNotForTopic", 8),
        ("InvalidProviderToken", 1),
        ("ServiceUnavailable", 1),
    ],
)
def test_legacy_status_blames_what_is_at_fault(word: str, legacy_status: int) -> None:
    assert find(word).legacy_status == legacy_status


def test_what_must_never_be_retried_has_no_retrying_follow_up() -> None:
    words = ["BadDeviceToken", "DeviceTokenNotForTopic", "Forbidden", "ExpiredToken", "Unregistered", "PayloadTooLarge"]
    assert {find(word).follow_up for word in words} == {FollowUp.NEVER, FollowUp.QUARANTINE, FollowUp.REMOVE_TOKEN}


def test_every_meaning_is_one_sentence() -> None:
    for reason in reasons.TABLE.values():
        assert reason.meaning.endswith(".")
        assert reason.meaning[0].isupper()
        assert "\n" not in reason.meaning


@pytest.mark.parametrize(
    "status,follow_up",
    [
        (400, FollowUp.FIX_REQUEST),
        (403, FollowUp.FIX_CREDENTIALS),
        (410, FollowUp.REMOVE_TOKEN),
        (413, FollowUp.NEVER),
        (418, FollowUp.FIX_REQUEST),
        (429, FollowUp.RETRY_LATER),
        (500, FollowUp.RETRY_SOON),
        (502, FollowUp.RETRY_SOON),
        (302, FollowUp.RETRY_SOON),
        (0, FollowUp.RETRY_SOON),
    ],
)
@pytest.mark.parametrize("word", ["NewInJune", None])
def test_unknown_word_is_judged_by_its_status(word: str | None, status: int, follow_up: FollowUp) -> None:
    reason = find(word, status)
    assert (reason.follow_up, reason.status) == (follow_up, status)
    assert reason.word == (word or f"Status{status}")


def test_unknown_word_without_a_status_is_the_requests_fault() -> None:
    assert (find("OurOwnWord").word, find("OurOwnWord").status) == ("OurOwnWord", 400)


def test_known_word_is_found_without_its_status() -> None:
    assert find("PayloadTooLarge").status == 413


def test_known_word_under_another_status_of_its_class_is_still_known() -> None:
    assert find("PayloadTooLarge", 400) is reasons.PAYLOAD_TOO_LARGE


def test_deadly_word_under_a_server_error_kills_nothing() -> None:
    reason = find("Unregistered", 503)
    assert not reason.token_dies
    assert reason.follow_up is FollowUp.RETRY_SOON


def test_service_unavailable_is_known_as_the_broadcast_page_prints_it() -> None:
    assert find("Service Unavailable", 503) is reasons.SERVICE_UNAVAILABLE
