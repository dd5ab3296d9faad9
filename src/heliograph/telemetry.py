"""The names of all metrics and log events. Metrics never drive behaviour.

Counters count groups, not single notifications: one call for hundreds.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

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


def _outcome_name(outcome: Outcome) -> str:
    """A name out of a small set: Apple's known words and our own."""
    if isinstance(outcome, Answered):
        return "accepted" if outcome.status == 200 else reasons.find(outcome.reason, outcome.status).word
    return "not processed" if isinstance(outcome, NotProcessed) else "unknown"
