"""Rules of the whole suite: foreign programs, slow campaigns, how hard Hypothesis looks."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

from tests.programs import PROGRAMS, absence, need


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the long campaigns too")


def pytest_configure(config: pytest.Config) -> None:
    # Whoever runs this in the background of a script has it ignore Ctrl-C, and what the tests start would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Random examples, but in CI, where a change must not fail for what it did not touch. What a run finds, it prints in
    # a form that can be replayed.
    common = settings(derandomize=False, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("here", common, max_examples=100)
    settings.register_profile("ci", common, max_examples=50, derandomize=True)
    settings.register_profile("whole", common, max_examples=2000)
    settings.load_profile("whole" if config.getoption("--slow") else "ci" if os.environ.get("CI") == "true" else "here")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("peer"):
        for name in marker.args:
            need(name)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # Read from the reports, because these come from the processes of xdist as well.
    reasons = {report.longrepr[2] for report in terminalreporter.getreports("skipped")}
    absent = [name for name in PROGRAMS if f"Skipped: {absence(name)}" in reasons]
    if absent:
        terminalreporter.section("skipped for want of a program")
        for name in absent:
            terminalreporter.line(absence(name))
