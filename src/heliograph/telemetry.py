"""The names of all metrics and log events. Metrics never drive behaviour.

Counters count groups, not single notifications: one call for hundreds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from heliograph import reasons
from heliograph.model import Answered, NotProcessed, Outcome


class Telemetry:
    """What happened, for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._taken = Counter("heliograph_taken", "Notifications made durable", ("app",), registry=self.registry)
        self._answers = Counter(
            "heliograph_answers",
            "What became of requests to Apple, by Apple's reason or ours",
            ("app", "outcome"),
            registry=self.registry,
        )
        self._bound: dict[tuple[str, str], Counter] = {}

    def taken(self, app: str, count: int) -> None:
        self._taken.labels(app).inc(count)

    def answered(self, app: str, outcome: Outcome, count: int) -> None:
        name = _outcome_name(outcome)
        counter = self._bound.get((app, name))
        if counter is None:
            counter = self._bound[app, name] = self._answers.labels(app, name)
        counter.inc(count)

    def show_days_left(self, find: Callable[[], Iterable[tuple[str, str, str, str, int]]]) -> None:
        """Have `find` asked whenever metrics are read: app, environment, kind, name and days left of credentials."""
        self.registry.register(_DaysLeft(find))


class _DaysLeft(Collector):
    def __init__(self, find: Callable[[], Iterable[tuple[str, str, str, str, int]]]) -> None:
        self._find = find

    def collect(self) -> Iterator[GaugeMetricFamily]:
        days_left = GaugeMetricFamily(
            "heliograph_credentials_days_left",
            "Whole days until credentials end, negative once they have; signing keys have no end",
            labels=("app", "environment", "kind", "name"),
        )
        found: dict[tuple[str, ...], int] = {}
        for *labels, days in self._find():
            found[tuple(labels)] = min(days, found.get(tuple(labels), days))  # two of a name would spoil the page
        for name, days in found.items():
            days_left.add_metric(name, days)
        yield days_left


def _outcome_name(outcome: Outcome) -> str:
    """A name out of a small set: Apple's known words and our own."""
    if isinstance(outcome, Answered):
        return "accepted" if outcome.status == 200 else reasons.find(outcome.reason, outcome.status).word
    return "not processed" if isinstance(outcome, NotProcessed) else "unknown"
