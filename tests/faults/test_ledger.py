"""A checker that passes everything proves nothing: each broken promise is planted once, and must be found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from heliograph.model import Receipt, State
from heliograph.protocols.http2 import ErrorCode
from heliograph.simulator.server import Judged
from tests.faults.ledger import OWN_ID, Bounds, ClientFile, Ledger, Life, Settled, Submitted, Taken, check, read_journal

TOPIC = "com.example.app"


def name(number: int) -> str:
    return f"01a1b2c3-0000-7000-8000-00000000{number:04x}"


def submitted(number: int, *, at_most_once: bool = False) -> Submitted:
    collapse_id = f"collapse {number}" if number == 2 else OWN_ID
    return Submitted(number, f"{number:064x}", f"{number + 100:064x}", TOPIC, collapse_id, at_most_once=at_most_once)


def judged(number: int, at: float, status: int | None = 200, reason: str | None = None) -> Judged:
    what = submitted(number)
    collapse_id = name(number) if what.collapse_id == OWN_ID else what.collapse_id
    return Judged(
        at, 1, 2 * number + 1, what.token, what.sha256, name(number), collapse_id, status, reason, topic=TOPIC
    )


def receipt(number: int, state: State = State.ACCEPTED, status: int = 200, reason: str | None = None) -> Receipt:
    return Receipt(name(number), "example", state, 0.0, 1.0, reason=reason, status=status)


CLEAN = Ledger(
    # 3 never got its 2xx, and was taken all the same. 4 is rejected. 5 was tried twice, and acted on once.
    submitted=[submitted(number) for number in range(1, 6)],
    taken=[Taken(number, name(number), 1.0 + number) for number in (1, 2, 4, 5)],
    settled=[Settled(name(1), 10.0)],
    judged=[
        *(judged(number, 2.0 + number) for number in range(1, 4)),
        judged(4, 6.0, 410, "Unregistered"),
        judged(5, 7.0, 503, "Shutdown"),
        judged(5, 9.0),
    ],
    receipts={
        **{name(number): receipt(number) for number in (1, 2, 3, 5)},
        name(4): receipt(4, State.REJECTED, 410, "Unregistered"),
    },
    lives=[Life(0.0, 100.0, 4, {"accepted": 4, "Unregistered": 1, "Shutdown": 1})],
    rss_bytes=1000,
    descriptors=10,
)


def found(ledger: Ledger, bounds: Bounds | None = None) -> list[tuple[str, str]]:
    return [(each.promise, each.what) for each in check(ledger, bounds or Bounds())]


def with_push(line: Judged) -> Ledger:
    """One more request, which is counted."""
    answers = dict(CLEAN.lives[0].answers)
    word = "accepted" if line.status == 200 else str(line.reason)
    answers[word] = answers.get(word, 0) + 1
    return replace(CLEAN, judged=[*CLEAN.judged, line], lives=[replace(CLEAN.lives[0], answers=answers)])


def test_clean_ledger_passes() -> None:
    assert found(CLEAN) == []


def test_loss_is_found() -> None:
    receipts = {key: value for key, value in CLEAN.receipts.items() if key != name(2)}
    assert found(replace(CLEAN, receipts=receipts)) == [("P2", "lost: it got a 2xx, and there is no receipt")]


def test_purge_may_forget_what_had_an_end_only() -> None:
    receipts = {key: value for key, value in CLEAN.receipts.items() if key != name(1)}
    assert found(replace(CLEAN, receipts=receipts, purged=True)) == []
    assert found(replace(CLEAN, receipts=receipts, settled=[], purged=True)) != []


def test_notification_that_is_still_queued_is_found() -> None:
    receipts = {**CLEAN.receipts, name(2): receipt(2, State.QUEUED)}
    assert found(replace(CLEAN, receipts=receipts, left=1)) == [
        ("P2", "no end"),
        ("P4", "without an end a minute after the last fault"),
    ]


def test_foreign_push_is_found() -> None:
    assert found(with_push(judged(77, 8.0))) == [("P2", "a push that nobody submitted")]


CHANGES: dict[str, Callable[[Judged], Judged]] = {
    "another body": lambda line: replace(line, sha256="f" * 64),
    "another device token": lambda line: replace(line, token="f" * 64),
    "another topic": lambda line: replace(line, topic="com.example.other"),
    "another collapse id": lambda line: replace(line, collapse_id="other"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_second_try_that_differs_is_found(what: str) -> None:
    again = CHANGES[what](judged(2, 8.0, 503, "Shutdown"))
    assert found(with_push(again)) == [("P3", what)]


def test_collapse_id_is_held_against_what_was_submitted_even_without_a_2xx() -> None:
    lines = [replace(line, collapse_id=None) if line.apns_id == name(3) else line for line in CLEAN.judged]
    assert found(replace(CLEAN, judged=lines)) == [("P3", "another collapse id")]


def test_second_id_for_one_notification_is_found() -> None:
    again = replace(judged(1, 8.0), apns_id=name(9), collapse_id=name(9))
    assert found(with_push(again)) == [("P3", "a second id for one notification")]


def test_duplicates_are_held_against_their_bound() -> None:
    twice = with_push(judged(2, 8.0))
    assert found(twice) == [("P2", "more duplicates than the bound")]
    assert found(twice, Bounds(duplicates=1)) == []


def test_bound_holds_for_each_death_by_itself() -> None:
    twice = replace(with_push(judged(2, 8.0)), deaths=[7.5])
    thrice = replace(twice, judged=[*twice.judged, judged(2, 9.0)], lives=[])
    assert found(thrice, Bounds(duplicates=1)) == [("P2", "more duplicates than the bound")]
    assert found(replace(thrice, deaths=[7.5, 8.5]), Bounds(duplicates=1)) == []


def test_duplicate_after_a_recorded_receipt_is_found_within_any_bound() -> None:
    late = with_push(judged(1, 11.0))
    assert found(late, Bounds(duplicates=1000)) == [("P2", "sent after its receipt was recorded")]


@pytest.mark.parametrize(
    "first, again",
    [
        ((200, None, None), False),
        ((200, "withheld", None), False),
        ((None, "closed", None), False),
        ((None, "reset", ErrorCode.INTERNAL_ERROR), False),
        ((None, "reset", ErrorCode.REFUSED_STREAM), True),
        ((503, None, None), True),
    ],
)
def test_second_push_of_what_was_to_be_sent_once_is_found(
    first: tuple[int | None, str | None, int | None], *, again: bool
) -> None:
    status, fault, code = first
    former = replace(judged(1, 2.0, status), fault=fault, code=code)
    ledger = replace(
        CLEAN,
        submitted=[submitted(1, at_most_once=True)],
        taken=[Taken(1, name(1), 1.0)],
        judged=[former, judged(1, 4.0)],
        receipts={name(1): receipt(1)},
        lives=[],
    )
    what = ("P3", "sent again, though Apple may have acted on it and it was to be sent once")
    assert found(ledger, Bounds(duplicates=1)) == ([] if again else [what])


@pytest.mark.parametrize(
    "wrong, what",
    [
        ({"accepted": 5, "Unregistered": 1, "Shutdown": 1}, "accepted was counted wrong"),
        ({"accepted": 4, "Unregistered": 1, "Shutdown": 2}, "Shutdown was counted wrong"),
        ({"accepted": 4, "Unregistered": 1, "Shutdown": 1, "BadTopic": 1}, "BadTopic was counted wrong"),
    ],
)
def test_wrong_counter_is_found(wrong: dict[str, int], what: str) -> None:
    assert found(replace(CLEAN, lives=[Life(0.0, 100.0, 4, wrong)])) == [("P10", what)]


def test_answers_that_were_not_counted_are_found() -> None:
    lives = [Life(0.0, 100.0, 4, {"accepted": 2, "Unregistered": 1, "Shutdown": 1, "unknown": 1})]
    assert found(replace(CLEAN, lives=lives)) == [("P10", "answers were not counted")]
    lives = [Life(0.0, 100.0, 4, {"accepted": 2, "Unregistered": 1, "Shutdown": 1, "unknown": 2})]
    assert found(replace(CLEAN, lives=lives)) == []


def test_wrong_number_of_taken_is_found() -> None:
    lives = [replace(CLEAN.lives[0], taken=5)]
    assert found(replace(CLEAN, lives=lives)) == [("P10", "taken was counted wrong")]


def test_receipts_that_apple_never_gave_are_found() -> None:
    receipts = {**CLEAN.receipts, name(4): receipt(4), name(5): receipt(5, State.REJECTED, 400, "BadTopic")}
    assert found(replace(CLEAN, receipts=receipts)) == [
        ("P10", "called accepted, and Apple did not accept it"),
        ("P10", "called rejected, and Apple did not say so"),
    ]


def test_storm_of_retries_is_found() -> None:
    tries = [judged(1, 3.0 + number / 1000, 503, "Shutdown") for number in range(2500)]
    ledger = replace(CLEAN, judged=[*tries, *CLEAN.judged], lives=[])
    assert found(ledger) == []
    assert found(ledger, Bounds(retries_per_s=300.0)) == []
    assert ("P5", "a storm of retries") in found(ledger, Bounds(retries_per_s=100.0))


def test_growth_is_found() -> None:
    assert found(CLEAN, Bounds(rss_bytes=999)) == [("P6", "more memory than allowed")]
    assert found(CLEAN, Bounds(descriptors=9)) == [("P6", "more descriptors than allowed")]


def test_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    with ClientFile(tmp_path / "client") as file:
        file.write(CLEAN.submitted)
        file.write([*CLEAN.taken, *CLEAN.settled])
        assert file.read() == (CLEAN.submitted, CLEAN.taken, CLEAN.settled)
    assert read_journal(Path("/dev/null")) == []
