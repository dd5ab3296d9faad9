from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliograph import reasons
from heliograph.model import ACCEPTED, Answered, NotProcessed, Outcome, State, Unknown
from heliograph.policy import PATIENCE_S, TRY_ONCE_S, Again, Crowd, Decision, End, deadline, decide

NOW = 1_800_000_000.0
MINUTE = 60.0
HOUR = 3600.0

SERVICE_UNAVAILABLE = Answered(503, "ServiceUnavailable")
TOO_MANY_REQUESTS = Answered(429, "TooManyRequests")
EXPIRED_PROVIDER_TOKEN = Answered(403, "ExpiredProviderToken")


def decided(outcome: Outcome, attempt: int = 1, **changed: Any) -> Decision:
    arguments: dict[str, Any] = {"now": NOW, "created_at": NOW, "expiration": None, "random": 0.5} | changed
    return decide(outcome, attempt, arguments.pop("now"), **arguments)


def pause(outcome: Outcome, attempt: int = 1, **changed: Any) -> float:
    decision = decided(outcome, attempt, **changed)
    assert isinstance(decision, Again)
    return decision.at - NOW


@pytest.mark.parametrize("outcome", [ACCEPTED, Answered(200, unique_id="A"), Answered(204)])
def test_success_ends_as_accepted(outcome: Outcome) -> None:
    assert decided(outcome) == End(State.ACCEPTED)


@pytest.mark.parametrize(
    "status,word",
    [
        (400, "BadTopic"),
        (400, "DeviceTokenNotForTopic"),
        (400, "PayloadEmpty"),
        (403, "Forbidden"),
        (404, "BadPath"),
        (405, "MethodNotAllowed"),
        (413, "PayloadTooLarge"),
        (400, "NewInJune"),
    ],
)
@pytest.mark.parametrize("attempt", [1, 7])
def test_no_for_good_ends_as_rejected_and_removes_nothing(status: int, word: str, attempt: int) -> None:
    assert decided(Answered(status, word), attempt) == End(State.REJECTED, word)


@pytest.mark.parametrize(
    "word", ["InvalidProviderToken", "MissingProviderToken", "BadCertificate", "BadEnvironmentKeyIdInToken", "New"]
)
def test_credentials_that_apple_does_not_take_are_waited_for_as_an_operator_can_put_them_right(word: str) -> None:
    answer = Answered(403, word)
    for attempt, shortest in {1: 30, 2: 60, 3: 120, 4: 240, 5: 300, 9: 300}.items():
        assert pause(answer, attempt, random=0.0) == shortest
    assert decided(answer, 9, now=NOW + PATIENCE_S) == End(State.BURIED, word)


def test_a_device_token_that_apple_does_not_know_is_held_back_for_an_hour_and_not_removed() -> None:
    decision = decided(Answered(400, "BadDeviceToken"), now=NOW + 0.5)
    assert decision == End(State.REJECTED, "BadDeviceToken", quarantined_until=int(NOW) + 3600)


@pytest.mark.parametrize("word", ["Unregistered", "ExpiredToken", "NewInJune"])
def test_410_is_rejected_and_removes_the_token_since_the_second_it_names(word: str) -> None:
    decision = decided(Answered(410, word, since=1_700_000_000_999))
    assert decision == End(State.REJECTED, word, removed_since=1_700_000_000)


def test_410_without_a_timestamp_removes_the_token_since_now() -> None:
    assert decided(Answered(410, "ExpiredToken"), now=NOW + 0.9) == End(State.REJECTED, "ExpiredToken", int(NOW))


def test_410_from_the_future_does_not_outlive_a_registration_made_after_it() -> None:
    decision = decided(Answered(410, "Unregistered", since=10**18))
    assert decision == End(State.REJECTED, "Unregistered", removed_since=int(NOW))


@pytest.mark.parametrize("attempt", [1, 2, 50])
def test_not_processed_goes_again_at_once_and_uncounted(attempt: int) -> None:
    decision = decided(NotProcessed("Goaway"), attempt)
    assert decision == Again(NOW, counted=False, reason="Goaway")


def test_not_processed_is_no_second_sending_for_at_most_once() -> None:
    assert isinstance(decided(NotProcessed("Goaway"), at_most_once=True), Again)


@pytest.mark.parametrize("random", [0.0, 0.5, 0.999])
def test_unknown_goes_again_one_second_on(random: float) -> None:
    decision = decided(Unknown("ConnectionLost"), random=random)
    assert decision == Again(NOW + 1, counted=True, reason="ConnectionLost")


def test_unknown_again_and_again_waits_longer_but_never_more_than_half_a_minute() -> None:
    longest = [pause(Unknown("ConnectionLost"), attempt, random=0.9999) for attempt in range(1, 9)]
    assert longest == pytest.approx([1, 2, 4, 8, 16, 30, 30, 30], rel=1e-3)
    assert pause(Unknown("ConnectionLost"), 100_000, random=0.9999) < 30


def test_unknown_sent_at_most_once_ends_as_unknown() -> None:
    assert decided(Unknown("ConnectionLost"), at_most_once=True) == End(State.UNKNOWN, "ConnectionLost")


@pytest.mark.parametrize(
    "outcome",
    [
        Answered(500, "InternalServerError"),
        SERVICE_UNAVAILABLE,
        Answered(503, "Shutdown"),
        Answered(502),
        Answered(400, "IdleTimeout"),
        Answered(403, "UnrelatedKeyIdInToken"),
    ],
)
def test_apples_trouble_gets_two_quick_tries_with_full_jitter_then_fifteen_minutes_growing(outcome: Outcome) -> None:
    expected = {1: (0, 1), 2: (0, 5), 3: (900, 1800), 4: (1800, 3600), 5: (3600, 7200)}
    for attempt, (shortest, longest) in expected.items():
        assert pause(outcome, attempt, random=0.0) == shortest
        assert pause(outcome, attempt, random=0.99999) == pytest.approx(longest, rel=1e-3)


def test_apples_trouble_goes_again_counted() -> None:
    decision = decided(SERVICE_UNAVAILABLE)
    assert isinstance(decision, Again)
    assert (decision.counted, decision.reason) == (True, "ServiceUnavailable")


@pytest.mark.parametrize("word", ["TooManyRequests", "TooManyProviderTokenUpdates", "NewInJune"])
def test_429_waits_from_thirty_seconds_on(word: str) -> None:
    outcome = Answered(429, word)
    shortest = [pause(outcome, attempt, random=0.0) for attempt in (1, 2, 3, 8, 9)]
    assert shortest == [30, 60, 120, 3600, 3600]
    assert pause(outcome, random=0.999) < 60
    decision = decided(outcome)
    assert isinstance(decision, Again)
    assert decision.counted


@pytest.mark.parametrize("attempt", [1, 2, 3, 9])
@pytest.mark.parametrize("status,word", [(429, "TooManyRequests"), (503, "ServiceUnavailable"), (500, None)])
def test_retry_after_wins_over_every_pause(status: int, word: str | None, attempt: int) -> None:
    assert pause(Answered(status, word, retry_after_s=7.0), attempt) == 7


def test_retry_after_does_not_revive_what_is_rejected() -> None:
    assert decided(Answered(413, "PayloadTooLarge", retry_after_s=7.0)) == End(State.REJECTED, "PayloadTooLarge")


@pytest.mark.parametrize("seconds", [float("inf"), 1e9])
def test_retry_after_beyond_the_deadline_ends_now(seconds: float) -> None:
    assert decided(Answered(503, "Shutdown", retry_after_s=seconds)) == End(State.BURIED, "Shutdown")


@pytest.mark.parametrize("seconds", [float("nan"), -5.0])
def test_retry_after_that_is_no_pause_means_at_once(seconds: float) -> None:
    assert pause(Answered(503, "Shutdown", retry_after_s=seconds)) == 0


def test_expired_provider_token_goes_again_at_once_on_a_new_connection_and_counts() -> None:
    decision = decided(EXPIRED_PROVIDER_TOKEN)
    assert decision == Again(NOW, counted=True, reason="ExpiredProviderToken")


def test_expired_provider_token_that_comes_back_does_not_loop() -> None:
    assert pause(EXPIRED_PROVIDER_TOKEN, 2) > 0
    assert pause(EXPIRED_PROVIDER_TOKEN, 3) >= 15 * MINUTE


@pytest.mark.parametrize(
    "expiration,expected",
    [
        (None, NOW + PATIENCE_S),
        (0, NOW + TRY_ONCE_S),
        (int(NOW) + 600, NOW + 600),
        (int(NOW) + 10**6, NOW + PATIENCE_S),
        (1, 1.0),
    ],
)
def test_deadline_is_the_expiration_or_a_day_or_a_minute_for_what_is_tried_once(
    expiration: int | None, expected: float
) -> None:
    assert deadline(NOW, expiration) == expected


@pytest.mark.parametrize("outcome", [NotProcessed("Goaway"), Unknown("ConnectionLost"), SERVICE_UNAVAILABLE])
def test_after_a_day_it_is_buried_with_the_last_reason(outcome: Outcome) -> None:
    decision = decided(outcome, 2, now=NOW + 24 * HOUR + 1)
    assert isinstance(decision, End)
    assert decision.state is State.BURIED
    assert decision.reason in {"Goaway", "ConnectionLost", "ServiceUnavailable"}


def test_expiration_beyond_a_day_does_not_lengthen_the_day() -> None:
    late = NOW + 24 * HOUR + 1
    assert decided(NotProcessed("Goaway"), now=late, expiration=int(NOW) + 10**6) == End(State.BURIED, "Goaway")


def test_expiration_that_passed_ends_as_expired() -> None:
    decision = decided(NotProcessed("Goaway"), now=NOW + 601, expiration=int(NOW) + 600)
    assert decision == End(State.EXPIRED, "Goaway")


def test_pause_that_would_outlast_the_expiration_ends_as_expired_now() -> None:
    assert decided(SERVICE_UNAVAILABLE, 3, expiration=int(NOW) + 600) == End(State.EXPIRED, "ServiceUnavailable")


def test_expiration_zero_is_tried_for_a_minute_and_no_longer() -> None:
    assert pause(NotProcessed("Goaway"), expiration=0) == 0
    assert pause(SERVICE_UNAVAILABLE, 2, expiration=0, random=0.999) < 5
    assert decided(SERVICE_UNAVAILABLE, 3, expiration=0) == End(State.EXPIRED, "ServiceUnavailable")
    assert decided(NotProcessed("Goaway"), now=NOW + 61, expiration=0) == End(State.EXPIRED, "Goaway")


def test_answer_after_the_deadline_still_counts() -> None:
    late = NOW + 100 * HOUR
    assert decided(ACCEPTED, now=late) == End(State.ACCEPTED)
    assert decided(Answered(400, "BadTopic"), now=late) == End(State.REJECTED, "BadTopic")
    assert decided(Unknown("Reset"), now=late, at_most_once=True) == End(State.UNKNOWN, "Reset")


outcomes = (
    st.builds(
        Answered,
        st.sampled_from([100, 200, 301, 400, 403, 404, 405, 410, 413, 429, 500, 503, 599]),
        st.none() | st.sampled_from(sorted(reasons.TABLE)) | st.text(),
        since=st.none() | st.integers(0, 2**53),
        retry_after_s=st.none() | st.floats(),
    )
    | st.builds(NotProcessed, st.text())
    | st.builds(Unknown, st.text())
)
fractions = st.floats(0, 1, exclude_max=True)
expirations = st.none() | st.just(0) | st.integers(0, 2**32 - 1)


@given(outcomes, st.integers(1, 10**6), st.floats(0, 2**33), st.floats(0, 2**33), expirations, st.booleans(), fractions)
def test_next_try_is_never_in_the_past_and_never_after_the_deadline(
    outcome: Outcome,
    attempt: int,
    now: float,
    created_at: float,
    expiration: int | None,
    at_most_once: bool,
    random: float,
) -> None:
    decision = decide(
        outcome,
        attempt,
        now,
        created_at=created_at,
        expiration=expiration,
        at_most_once=at_most_once,
        random=random,
    )
    if isinstance(decision, Again):
        assert now <= decision.at <= deadline(created_at, expiration)
    else:
        assert decision.state in {State.ACCEPTED, State.REJECTED, State.EXPIRED, State.BURIED, State.UNKNOWN}
        assert decision.removed_since is None or 0 <= decision.removed_since <= now


@given(
    st.sampled_from([Unknown("Reset"), SERVICE_UNAVAILABLE, TOO_MANY_REQUESTS, EXPIRED_PROVIDER_TOKEN, Answered(200)]),
    expirations,
    st.lists(fractions, min_size=1, max_size=8),
)
def test_whatever_apple_repeats_comes_to_an_end(outcome: Outcome, expiration: int | None, randoms: list[float]) -> None:
    # In the last hour of its day, so that a connection lost every second is followed to the end, too.
    now, attempt, created_at = NOW, 1, NOW - PATIENCE_S + HOUR
    while isinstance(
        decision := decide(
            outcome, attempt, now, created_at=created_at, expiration=expiration, random=randoms[attempt % len(randoms)]
        ),
        Again,
    ):
        now, attempt = decision.at, attempt + decision.counted
        assert attempt <= (HOUR + 1 if isinstance(outcome, Unknown) else 20)


def test_tries_after_an_answer_queue_up_behind_those_that_are_planned() -> None:
    assert pause(SERVICE_UNAVAILABLE, random=0.0, crowd_s=7.5) == 7.5
    assert pause(TOO_MANY_REQUESTS, random=0.0, crowd_s=7.5) == 37.5
    assert pause(Answered(503, "Shutdown", retry_after_s=5), crowd_s=7.5) == 12.5


def test_tries_after_no_answer_and_the_renewal_of_a_provider_token_wait_for_no_crowd() -> None:
    assert pause(Unknown("ConnectionLost"), crowd_s=7.5) == 1.0
    assert pause(NotProcessed("Goaway"), crowd_s=7.5) == 0.0
    assert pause(EXPIRED_PROVIDER_TOKEN, crowd_s=7.5) == 0.0


def test_a_crowd_of_retries_gets_a_tenth_of_what_is_sent_anew() -> None:
    crowd = Crowd()
    for step in range(1000):  # ten seconds at 100,000 a second
        crowd.sent(1000, NOW + step / 100)
    for _ in range(60_000):
        crowd.plan()
    rate = 60_000 / crowd.wait_s(NOW + 10)
    assert 0.05 * 100_000 < rate < 0.1 * 100_000


def test_a_small_sender_may_retry_a_hundred_times_a_second_whatever_it_sends() -> None:
    crowd = Crowd()
    crowd.sent(10, NOW)
    for _ in range(200):
        crowd.plan()
    assert crowd.wait_s(NOW) == pytest.approx(2.0)
    assert crowd.wait_s(NOW + 1.5) == pytest.approx(0.5)
    assert crowd.wait_s(NOW + 10) == 0.0


@given(st.lists(st.tuples(st.sampled_from(["sent", "plan", "wait"]), st.floats(0, 100), st.integers(0, 10**6))))
def test_a_crowd_never_waits_less_than_nothing(steps: list[tuple[str, float, int]]) -> None:
    crowd = Crowd()
    now = NOW
    for what, seconds, count in steps:
        now += seconds
        if what == "sent":
            crowd.sent(count, now)
        elif what == "plan":
            crowd.plan()
        else:
            assert crowd.wait_s(now) >= 0
