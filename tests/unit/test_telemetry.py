"""What is counted, as Prometheus reads it; what is told once a minute; what logs do not show."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from heliograph import logs
from heliograph.model import (
    ACCEPTED,
    Answered,
    Batch,
    Depth,
    DeviceToken,
    Environment,
    Headers,
    LaneView,
    NotProcessed,
    Removal,
    SigningKey,
    Unknown,
)
from heliograph.telemetry import Histogram, LaneMeter, Standing, Summary, Telemetry

PRODUCTION = Environment.PRODUCTION


def samples(telemetry: Telemetry, standing: Standing | None = None) -> dict[str, float]:
    """What Prometheus would read: values by name and labels, spelt as on the page."""
    page = telemetry.page(standing or Standing()).decode()
    found = {}
    for family in text_string_to_metric_families(page):
        for each in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(each.labels.items()))
            key = f"{each.name}{{{labels}}}" if labels else each.name
            assert key not in found, "the same series twice"
            found[key] = each.value
    return found


# -- histograms ------------------------------------------------------------------------------------------------------


def test_a_histogram_counts_many_of_one_size_in_one_call() -> None:
    telemetry = Telemetry()
    telemetry.lane("shop", "production").answer_s.observe(0.03, 200)
    telemetry.lane("shop", "production").answer_s.observe(0.7)
    found = samples(telemetry)
    name, lane = "heliograph_apns_answer_seconds", 'app="shop",environment="production"'
    assert found[f'{name}_bucket{{{lane},le="0.025"}}'] == 0
    assert found[f'{name}_bucket{{{lane},le="0.05"}}'] == 200
    assert found[f'{name}_bucket{{{lane},le="0.5"}}'] == 200
    assert found[f'{name}_bucket{{{lane},le="1.0"}}'] == 201
    assert found[f'{name}_bucket{{{lane},le="+Inf"}}'] == found[f"{name}_count{{{lane}}}"] == 201
    assert found[f"{name}_sum{{{lane}}}"] == pytest.approx(6.7)


def test_what_is_just_as_long_as_a_bucket_allows_is_in_it_and_what_is_longer_than_all_is_counted() -> None:
    telemetry = Telemetry()
    meter = telemetry.lane("shop", "production")
    meter.answer_s.observe(0.005)
    meter.answer_s.observe(1e9)
    found = samples(telemetry)
    name, lane = "heliograph_apns_answer_seconds", 'app="shop",environment="production"'
    assert found[f'{name}_bucket{{{lane},le="0.005"}}'] == 1
    assert found[f'{name}_bucket{{{lane},le="30.0"}}'] == 1
    assert found[f'{name}_bucket{{{lane},le="+Inf"}}'] == 2


def test_a_clock_that_was_set_back_makes_no_sum_shrink() -> None:
    telemetry = Telemetry()
    telemetry.lane("shop", "production").way_s.observe(-3600.0, 5)
    found = samples(telemetry)
    assert found['heliograph_whole_way_seconds_sum{app="shop",environment="production"}'] == 0
    assert found['heliograph_whole_way_seconds_count{app="shop",environment="production"}'] == 5


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 500)), max_size=20))
def test_a_histogram_of_groups_is_that_of_their_members(groups: list[tuple[float, int]]) -> None:
    ends = (0.01, 0.1, 1.0, 10.0)
    grouped, single = Histogram(ends), Histogram(ends)
    for value, count in groups:
        grouped.observe(value, count)
        for _ in range(count):
            single.observe(value)
    assert grouped._counts == single._counts
    assert grouped._sum == pytest.approx(single._sum)


def test_lanes_without_observations_make_no_series() -> None:
    telemetry = Telemetry()
    telemetry.lane("shop", "production")
    assert not [name for name in samples(telemetry) if "seconds" in name and "shop" in name]


# -- counters and gauges ---------------------------------------------------------------------------------------------


def test_answers_are_counted_by_app_environment_push_type_and_outcome() -> None:
    telemetry = Telemetry()
    meter: LaneMeter = telemetry.lane("shop", "production")
    for outcome, count in (
        (ACCEPTED, 300),
        (Answered(200, unique_id="x"), 1),
        (Answered(410, "Unregistered", 1), 2),
        (Answered(400, "SomethingNew"), 3),
        (Answered(400, "SomethingElse"), 3),
        (NotProcessed("the connection ended"), 4),
        (Unknown("no answer"), 5),
    ):
        meter.answered("alert", outcome, count)
    meter.answered("voip", ACCEPTED, 7)
    found = {name: value for name, value in samples(telemetry).items() if name.startswith("heliograph_answers_total")}
    by_outcome: dict[str, float] = {}
    for name, value in found.items():
        assert 'app="shop",environment="production"' in name
        if 'push_type="alert"' in name:
            by_outcome[name.split('outcome="')[1].split('"')[0]] = value
    assert by_outcome == {
        "accepted": 301,
        "Unregistered": 2,
        "other 400": 6,  # new words share a name: there is no end of them
        "not processed": 4,
        "unknown": 5,
    }
    voip = 'heliograph_answers_total{app="shop",environment="production",outcome="accepted",push_type="voip"}'
    assert found[voip] == 7


def test_what_doors_and_connections_tell_is_counted() -> None:
    telemetry = Telemetry()
    telemetry.taken("shop", 1000)
    telemetry.refused("shop", "PayloadTooLarge", 3)
    telemetry.requested(202, "")
    telemetry.requested(400, "PayloadTooLarge")
    telemetry.connected("api.push.apple.com")
    telemetry.disconnected("api.push.apple.com", "GOAWAY Shutdown")
    telemetry.not_connected("api.push.apple.com")
    found = samples(telemetry)
    for name, value in (
        ('heliograph_taken_total{app="shop"}', 1000),
        ('heliograph_refused_total{app="shop",reason="PayloadTooLarge"}', 3),
        ('heliograph_http_requests_total{code="",status="202"}', 1),
        ('heliograph_http_requests_total{code="PayloadTooLarge",status="400"}', 1),
        ('heliograph_apns_connections_opened_total{host="api.push.apple.com"}', 1),
        ('heliograph_apns_connections_ended_total{host="api.push.apple.com",why="GOAWAY Shutdown"}', 1),
        ('heliograph_apns_connects_failed_total{host="api.push.apple.com"}', 1),
    ):
        assert found[name] == value, name
    assert any(name.startswith('heliograph_build_info{python="3.') for name in found)


def test_what_is_at_this_moment_is_shown_by_lane() -> None:
    view = LaneView(
        "shop", PRODUCTION, "h", "signing key K", connections=2, in_flight=30, waiting=4, answered_at=None, trouble="no"
    )
    found = samples(
        Telemetry(), Standing((view,), (Depth("shop", PRODUCTION, waiting=5, leased=6, oldest_due_s=7.5),), 8, 9)
    )
    lane = 'app="shop",environment="production"'
    route = 'app="shop",credentials="signing key K",environment="production",host="h"'
    for name, value in (
        (f"heliograph_apns_connections{{{route}}}", 2),
        (f"heliograph_apns_streams{{{route}}}", 30),
        (f"heliograph_apns_backlog{{{route}}}", 4),
        (f"heliograph_apns_failing{{{route}}}", 1),
        (f"heliograph_queue_notifications{{{lane}}}", 5),
        (f"heliograph_queue_leased_batches{{{lane}}}", 6),
        (f"heliograph_queue_oldest_due_seconds{{{lane}}}", 7.5),
        ("heliograph_queue_room", 8),
        ("heliograph_unrecorded_batches", 9),
    ):
        assert found[name] == value, name


def test_a_store_that_does_not_answer_leaves_the_rest_of_the_page() -> None:
    found = samples(Telemetry(), Standing(room=8))
    assert found["heliograph_queue_room"] == 8
    assert not any(name.startswith("heliograph_queue_notifications") for name in found)


def test_of_two_credentials_of_one_name_the_fewest_days_are_shown() -> None:
    telemetry = Telemetry()
    telemetry.show_days_left(lambda: [("shop", "production", "certificate", "X", days) for days in (90, -3, 30)])
    (found,) = [value for name, value in samples(telemetry).items() if "days_left" in name]
    assert found == -3


def test_store_transactions_are_a_histogram() -> None:
    telemetry, commits = Telemetry(), Histogram((0.001, 0.1))
    commits.observe(0.05)
    telemetry.show_commits(commits)
    assert samples(telemetry)['heliograph_store_commit_seconds_bucket{le="0.1"}'] == 1


# -- told once a minute ----------------------------------------------------------------------------------------------


class Later:
    """A loop's `call_later` whose time comes when it is told."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def __call__(self, seconds: float, call: Callable[[], None]) -> None:
        assert seconds == Summary.PAUSE_S
        self.calls.append(call)

    def ring(self) -> None:
        for call in self.calls[:]:
            self.calls.remove(call)
            call()


def test_the_first_is_told_at_once_and_the_others_together_a_minute_later() -> None:
    told: list[int] = []
    later = Later()
    summary = Summary(told.append, later)
    summary.add(2)
    summary.add(3)
    summary.add(4)
    assert told == [2]
    later.ring()
    assert told == [2, 7]
    summary.add(1)
    assert told == [2, 7]
    later.ring()
    assert told == [2, 7, 1]


def test_after_a_quiet_minute_the_next_one_is_told_at_once() -> None:
    told: list[int] = []
    later = Later()
    summary = Summary(told.append, later)
    summary.add(2)
    later.ring()
    assert (told, later.calls) == ([2], [])
    summary.add(5)
    assert told == [2, 5]


# -- logs ------------------------------------------------------------------------------------------------------------

TOKEN = DeviceToken("c0ffee" * 10 + "cafe")
PAYLOAD = b'{"aps":{"alert":"the secret recipe"}}'
KEY = SigningKey("ABC123DEFG", "DEF123GHIJ", b"-----BEGIN PRIVATE KEY----- hush")
BATCH = Batch(
    "01a1fdd3-db9d-79a4-87f4-efdcdc8e", "shop", PRODUCTION, 1.0, (Headers("com.example"),), [TOKEN.encode()], [PAYLOAD]
)
EVERYTHING: dict[str, Any] = {
    "token": TOKEN,
    "octets": PAYLOAD,
    "changing": bytearray(PAYLOAD),
    "view": memoryview(PAYLOAD),
    "listed": [TOKEN, [PAYLOAD, {"deep": (TOKEN,)}]],
    "keyed": {TOKEN: 1, PAYLOAD: {"token": TOKEN}},
    "chosen": {TOKEN},
    "frozen": frozenset({TOKEN}),
    "queued": deque([PAYLOAD]),
    "batch": BATCH,
    "removal": Removal("shop", PRODUCTION, TOKEN, 1),
    "answer": Answered(400, "BadDeviceToken"),
    "key": KEY,
    "environment": PRODUCTION,
    "number": 7,
    "none": None,
    "error": ValueError("plain"),
}


@pytest.fixture
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def hushed(said: str) -> bool:
    return "c0ffee" not in said and "recipe" not in said and "hush" not in said


@pytest.mark.usefixtures("_logging_as_it_was")
@pytest.mark.parametrize("as_json", [False, True])
def test_no_log_line_shows_a_device_token_or_a_payload(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    logs.configure_logging(json=as_json)
    log = structlog.get_logger("anything")
    log.info("everything", **EVERYTHING)
    for name, value in EVERYTHING.items():
        log.warning("one", **{name: value})
    log.bind(token=TOKEN).error("bound")
    said = capsys.readouterr().err
    assert hushed(said)
    assert said.count("<device token of 32 octets>") >= 8
    assert f"<{len(PAYLOAD)} octets>" in said
    assert "plain" in said
    if as_json:
        lines = [json.loads(line) for line in said.splitlines()]
        assert lines[0]["event"] == "everything"
        assert lines[0]["listed"][1][1] == {"deep": ["<device token of 32 octets>"]}
        assert (lines[0]["number"], lines[0]["none"], lines[0]["environment"]) == (7, None, "production")


@pytest.mark.usefixtures("_logging_as_it_was")
@pytest.mark.parametrize("as_json", [False, True])
def test_what_other_libraries_log_shows_none_either(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    logs.configure_logging(json=as_json)
    log = logging.getLogger("somebody.else")
    log.warning("sent %s and %r to %s", PAYLOAD, [PAYLOAD], TOKEN)
    log.warning("sent %(payload)s", {"payload": PAYLOAD})
    log.error("plain words, 100%")
    said = capsys.readouterr().err
    assert hushed(said)
    assert "to <device token of 32 octets>" in said
    assert "plain words, 100%" in said


@pytest.mark.usefixtures("_logging_as_it_was")
@pytest.mark.parametrize("as_json", [False, True])
def test_a_traceback_shows_no_local_variables(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    logs.configure_logging(json=as_json)

    def fail(payload: bytes, token: str) -> None:
        raise ValueError(f"{len(payload)} octets for {len(token)} digits")

    try:
        fail(PAYLOAD, TOKEN)
    except ValueError:
        structlog.get_logger("anything").exception("failed")
        logging.getLogger("somebody.else").exception("failed")
    said = capsys.readouterr().err
    assert hushed(said)
    assert said.count("ValueError") >= 2


@pytest.mark.usefixtures("_logging_as_it_was")
@pytest.mark.parametrize(
    "level, shown",
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_the_level_is_what_is_logged_and_what_is_above(
    capsys: pytest.CaptureFixture[str], level: str, shown: list[str]
) -> None:
    logs.configure_logging(json=True, level=level)
    log = structlog.get_logger("anything")
    for each in ("debug", "info", "warning", "error"):
        getattr(log, each)("said")
    assert [json.loads(line)["level"] for line in capsys.readouterr().err.splitlines()] == shown
