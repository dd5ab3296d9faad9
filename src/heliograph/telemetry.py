"""The names of all metrics and log events. Metrics never drive behaviour.

What is counted here comes in groups, hundreds at a time: an observation is one call for all of them, and costs an
addition or two. So these counters and histograms are our own, and are handed to prometheus_client when it asks. They
are added to on one thread each; who reads them on another sees each number whole, if not all of one moment.

Log events are listed in docs/operations.md.
"""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence

from msgspec import Struct
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from heliograph import __version__, reasons
from heliograph.model import ACCEPTED, Answered, Depth, LaneView, NotProcessed, Outcome, State

_WAYS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)
"""Upper ends: from a quiet server to one whose Apple is away for an hour."""
_ANSWERS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
COMMITS_S = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)

_LANE = ("app", "environment")

Labels = tuple[str, ...]


class Histogram:
    """Observations by size, many at a time."""

    __slots__ = ("_counts", "_ends", "_sum")

    def __init__(self, ends: Sequence[float]) -> None:
        """`ends`: upper ends, ascending; what is above the last is counted apart."""
        self._ends = ends
        self._counts = [0] * (len(ends) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """So many were of this size. What is below 0, as a clock that was set makes it, counts as 0."""
        self._counts[bisect_left(self._ends, value)] += count
        if value > 0.0:
            self._sum += value * count

    @property
    def count(self) -> int:
        return sum(self._counts)

    def add_to(self, family: HistogramMetricFamily, labels: Labels = ()) -> None:
        total = 0
        buckets: list[tuple[str, float]] = []
        for end, count in zip((*map(repr, self._ends), "+Inf"), tuple(self._counts), strict=True):
            total += count
            buckets.append((end, total))
        family.add_metric(labels, buckets, self._sum)


class Counts:
    """Numbers that only grow, by labels."""

    __slots__ = ("_numbers",)

    def __init__(self) -> None:
        self._numbers: dict[Labels, int] = {}

    def add(self, labels: Labels, count: int = 1) -> None:
        numbers = self._numbers
        numbers[labels] = numbers.get(labels, 0) + count

    def items(self) -> list[tuple[Labels, int]]:
        """As it is now, also where another thread adds meanwhile."""
        return list(self._numbers.items())


class LaneMeter:
    """What is counted of an app in an environment."""

    __slots__ = ("_answers", "_ends", "answer_s", "wait_s", "way_s")

    def __init__(self) -> None:
        self._answers = Counts()
        self._ends: dict[State, int] = {}
        self.wait_s = Histogram(_WAYS_S)
        """From taken to handed to the carrier, of what is sent for the first time."""
        self.answer_s = Histogram(_ANSWERS_S)
        """From a request's writing to its answer."""
        self.way_s = Histogram(_WAYS_S)
        """From taken to the end on record."""

    def answered(self, push_type: str, outcome: Outcome, count: int) -> None:
        self._answers.add((push_type, "accepted" if outcome is ACCEPTED else _outcome_name(outcome)), count)

    def ended(self, state: State, count: int, way_s: float | None = None) -> None:
        """So many came to an end, which is on record, `way_s` after they were taken, where that is known."""
        if way_s is not None:
            self.way_s.observe(way_s, count)
        self._ends[state] = self._ends.get(state, 0) + count

    @property
    def ends(self) -> list[tuple[Labels, int]]:
        """By the state that they ended in."""
        return [((state.name.lower(),), count) for state, count in list(self._ends.items())]

    @property
    def answers(self) -> list[tuple[Labels, int]]:
        """By push type and outcome."""
        return self._answers.items()


class LegacyMeter:
    """What is counted of a listener for clients of the binary protocol."""

    __slots__ = ("_packets", "frames", "open", "refused", "window_s")

    def __init__(self) -> None:
        self._packets = Counts()
        self.open = 0
        """Connections at this moment."""
        self.refused = 0
        """Clients that were not let in."""
        self.frames = 0
        """Taken, and on disk."""
        self.window_s = Histogram(COMMITS_S)
        """From a frame's reading to when it is on disk."""

    def answered(self, status: int) -> None:
        """An error packet went out."""
        self._packets.add((str(int(status)),))

    @property
    def packets(self) -> list[tuple[Labels, int]]:
        """Error packets by status."""
        return self._packets.items()


class Standing(Struct, frozen=True):
    """What is at this moment."""

    lanes: Sequence[LaneView] = ()
    depths: Sequence[Depth] | None = None
    """None: the store did not say."""
    room: int = 0
    unrecorded: int = 0
    """Batches of which something was learnt that is not on disk yet."""


class Telemetry:
    """What happened, for Prometheus."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._lanes: dict[tuple[str, str], LaneMeter] = {}
        self._taken = Counts()
        self._refused = Counts()
        self._requests = Counts()
        self._proxied = Counts()
        self._opened = Counts()
        self._ended = Counts()
        self._failed = Counts()
        self._legacy: dict[str, LegacyMeter] = {}
        self._registry.register(_Of(self._collect))
        ProcessCollector(registry=self._registry)

    def lane(self, app: str, environment: str) -> LaneMeter:
        """The meter of an app in an environment; keep it, where something is counted often."""
        found = self._lanes.get((app, environment))
        if found is None:
            found = self._lanes[app, environment] = LaneMeter()
        return found

    def legacy(self, listener: str) -> LegacyMeter:
        """The meter of a listener for clients of the binary protocol."""
        return self._legacy.setdefault(listener, LegacyMeter())

    def taken(self, app: str, count: int) -> None:
        self._taken.add((app,), count)

    def refused(self, app: str, reason: str, count: int = 1) -> None:
        """Admission refused notifications of an app that there is."""
        self._refused.add((app, reason), count)

    def requested(self, status: int, code: str) -> None:
        """The HTTP side answered; `code` is the problem's, or empty."""
        self._requests.add((str(status), code))

    def proxied(self, listener: str, status: int, reason: str, count: int) -> None:
        """An Apple-shaped proxy answered; `reason` is Apple's word, or empty."""
        self._proxied.add((listener, str(status), reason if reason in reasons.TABLE else ""), count)

    def connected(self, host: str) -> None:
        self._opened.add((host,))

    def disconnected(self, host: str, why: str) -> None:
        """`why` is out of a small set."""
        self._ended.add((host, why))

    def not_connected(self, host: str) -> None:
        self._failed.add((host,))

    def show_days_left(self, find: Callable[[], Iterable[tuple[str, str, str, str, int]]]) -> None:
        """Have `find` asked whenever metrics are read: app, environment, kind, name and days left of credentials."""
        self._registry.register(_Of(lambda: _days_left(list(find()))))

    def show_commits(self, commit_s: Histogram) -> None:
        """Show how long a store's transactions take."""

        def collect() -> Iterator[Metric]:
            family = HistogramMetricFamily("heliograph_store_commit_seconds", "Transactions of the store", labels=())
            commit_s.add_to(family)
            yield family

        self._registry.register(_Of(collect))

    def page(self, standing: Standing) -> bytes:
        """Everything, as Prometheus reads it. Takes a while where there are many apps: it may run in another thread."""
        now = CollectorRegistry()
        now.register(_Of(lambda: _gauges(standing)))
        return generate_latest(self._registry) + generate_latest(now)

    def _collect(self) -> Iterator[Metric]:
        build = InfoMetricFamily("heliograph_build", "What runs here")
        build.add_metric((), {"version": __version__, "python": platform.python_version()})
        yield build
        for name, text, names, counts in (
            ("taken", "Notifications made durable", ("app",), self._taken),
            ("refused", "Notifications refused at admission, by reason", ("app", "reason"), self._refused),
            ("http_requests", "HTTP requests answered, by status and problem", ("status", "code"), self._requests),
            (
                "proxy_requests",
                "Requests that Apple-shaped proxies answered",
                ("listener", "status", "reason"),
                self._proxied,
            ),
            ("apns_connections_opened", "Connections to Apple that came about", ("host",), self._opened),
            ("apns_connections_ended", "Connections to Apple that ended, by why", ("host", "why"), self._ended),
            ("apns_connects_failed", "Attempts to connect to Apple that failed", ("host",), self._failed),
        ):
            yield _counter(name, text, names, counts.items())
        lanes = list(self._lanes.items())
        yield _counter(
            "answers",
            "What became of requests to Apple, by Apple's reason or ours",
            (*_LANE, "push_type", "outcome"),
            [((*lane, *labels), count) for lane, meter in lanes for labels, count in meter.answers],
        )
        yield _counter(
            "ended",
            "Notifications that came to their end, by the state they ended in",
            (*_LANE, "state"),
            [((*lane, *labels), count) for lane, meter in lanes for labels, count in meter.ends],
        )
        for name, text, histograms in (
            ("queue_wait", "From taken to handed to the carrier", [(lane, meter.wait_s) for lane, meter in lanes]),
            (
                "apns_answer",
                "From a request's writing to Apple's answer",
                [(lane, meter.answer_s) for lane, meter in lanes],
            ),
            ("whole_way", "From taken to the end on record", [(lane, meter.way_s) for lane, meter in lanes]),
        ):
            family = HistogramMetricFamily(f"heliograph_{name}_seconds", text, labels=_LANE)
            for lane, histogram in histograms:
                if histogram.count:
                    histogram.add_to(family, lane)
            yield family
        if self._legacy:
            yield from _of_legacy(list(self._legacy.items()))


class _Of(Collector):
    """What a function gives when it is asked."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def describe(self) -> Iterable[Metric]:
        """Nothing is asked while it is being registered."""
        return ()

    def collect(self) -> Iterable[Metric]:
        return self._collect()


def _of_legacy(meters: Sequence[tuple[str, LegacyMeter]]) -> Iterator[Metric]:
    names = ("listener",)
    yield _gauge(
        "legacy_connections",
        "Open connections of clients of the binary protocol",
        names,
        [((name,), meter.open) for name, meter in meters],
    )
    yield _counter(
        "legacy_refused", "Clients that were not let in", names, [((name,), meter.refused) for name, meter in meters]
    )
    yield _counter(
        "legacy_frames", "Frames taken, and on disk", names, [((name,), meter.frames) for name, meter in meters]
    )
    yield _counter(
        "legacy_error_packets",
        "Error packets by status",
        (*names, "status"),
        [((name, *labels), count) for name, meter in meters for labels, count in meter.packets],
    )
    family = HistogramMetricFamily(
        "heliograph_legacy_window_seconds", "From a frame's reading to when it is on disk", labels=names
    )
    for name, meter in meters:
        meter.window_s.add_to(family, (name,))
    yield family


def _counter(name: str, text: str, names: Labels, numbers: Iterable[tuple[Labels, int]]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"heliograph_{name}", text, labels=names)
    for labels, count in numbers:
        family.add_metric(labels, count)
    return family


def _gauge(name: str, text: str, names: Labels, numbers: Iterable[tuple[Labels, float]]) -> GaugeMetricFamily:
    """Where two have the same labels, which would spoil the page, the last one counts."""
    family = GaugeMetricFamily(f"heliograph_{name}", text, labels=names)
    for labels, number in dict(numbers).items():
        family.add_metric(labels, number)
    return family


def _gauges(standing: Standing) -> Iterator[Metric]:
    routes = [((each.app, each.environment.value, each.host, each.credentials), each) for each in standing.lanes]
    names = (*_LANE, "host", "credentials")
    yield _gauge(
        "apns_connections",
        "Open connections that the lane may use; lanes with the same credentials share them",
        names,
        [(labels, each.connections) for labels, each in routes],
    )
    yield _gauge(
        "apns_streams",
        "Requests of the lane that Apple has not answered yet",
        names,
        [(labels, each.in_flight) for labels, each in routes],
    )
    yield _gauge(
        "apns_backlog",
        "Notifications of the lane that wait for a free stream",
        names,
        [(labels, each.waiting) for labels, each in routes],
    )
    yield _gauge(
        "apns_failing",
        "1 while nothing of the lane gets through to Apple",
        names,
        [(labels, each.trouble is not None) for labels, each in routes],
    )
    yield _gauge("queue_room", "Notifications that would still be taken", (), [((), standing.room)])
    yield _gauge("unrecorded_batches", "Batches with news that are not on disk yet", (), [((), standing.unrecorded)])
    if standing.depths is None:
        return
    depths = [((each.app, each.environment.value), each) for each in standing.depths]
    yield _gauge(
        "queue_notifications",
        "Notifications in the store that are not finished and not leased",
        _LANE,
        [(lane, each.waiting) for lane, each in depths],
    )
    yield _gauge(
        "queue_oldest_due_seconds",
        "For how long that one of them is due that is due for longest",
        _LANE,
        [(lane, each.oldest_due_s) for lane, each in depths],
    )
    yield _gauge(
        "queue_leased_batches", "Batches being worked on", _LANE, [(lane, each.leased) for lane, each in depths]
    )


def _days_left(found: Sequence[tuple[str, str, str, str, int]]) -> Iterator[Metric]:
    yield _gauge(
        "credentials_days_left",
        "Whole days until credentials end, negative once they have; signing keys have no end",
        (*_LANE, "kind", "name"),
        [(tuple(labels), days) for *labels, days in sorted(found, key=lambda each: -each[4])],  # the fewest win
    )


def _outcome_name(outcome: Outcome) -> str:
    """A name out of a small set: Apple's known words and our own."""
    if isinstance(outcome, Answered):
        if outcome.status == 200:
            return "accepted"
        word = reasons.find(outcome.reason, outcome.status).word
        return word if word in reasons.TABLE else f"other {outcome.status}"
    return "not processed" if isinstance(outcome, NotProcessed) else "unknown"


class Summary:
    """Tells of something at once, and then at most once a minute how many more there were."""

    __slots__ = ("_later", "_more", "_quiet", "_tell")

    PAUSE_S = 60.0

    def __init__(self, tell: Callable[[int], None], later: Callable[[float, Callable[[], None]], object]) -> None:
        """`tell` is called with how many there were since the last time; `later` is a loop's `call_later`."""
        self._tell = tell
        self._later = later
        self._more = 0
        self._quiet = False

    def add(self, count: int) -> None:
        self._more += count
        if not self._quiet:
            self.flush()

    def flush(self) -> None:
        """Tell of what there is to tell."""
        self._quiet = self._more > 0
        if self._more:
            more, self._more = self._more, 0
            self._later(self.PAUSE_S, self.flush)
            self._tell(more)
