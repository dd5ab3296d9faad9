"""One seed a test, and the table of what the cases found."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import msgspec
import pytest

from tests.faults.campaign import Campaign, Figures, open_campaign

_NAME = "figures"


@pytest.fixture
def seed() -> int:
    """Everything that a test leaves to chance follows from it."""
    seed = int(os.environ.get("SEED") or random.randrange(2**32))
    print(f"again with SEED={seed}")  # noqa: T201 - shown where the test fails
    return seed


@pytest.fixture
def chance(seed: int) -> random.Random:
    return random.Random(seed)


@pytest.fixture
def figures(request: pytest.FixtureRequest, seed: int) -> Iterator[Figures]:
    figures = Figures(request.node.name.removeprefix("test_"), seed)
    yield figures
    request.node.user_properties.append((_NAME, msgspec.to_builtins(figures)))


@pytest.fixture
def campaign(
    tmp_path: Path, figures: Figures, chance: random.Random
) -> Callable[..., AbstractAsyncContextManager[Campaign]]:
    return partial(open_campaign, tmp_path, figures, chance)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # Read from the reports, because these come from the processes of xdist as well.
    lines = [
        msgspec.convert(value, Figures)
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "teardown"
        for name, value in report.user_properties
        if name == _NAME
    ]
    if not lines:
        return
    terminalreporter.section("faults")
    head = ("runs", "kills", "notifications", "lost", "duplicates", "most a kill", "bound", "recovery", "seed")
    terminalreporter.line(f"{'case':60}" + "".join(f"{word:>14}" for word in head))
    for each in lines:
        cells = (each.runs, each.kills, each.notifications, each.lost, each.duplicates, each.most, each.bound)
        terminalreporter.line(
            f"{each.case[:60]:60}"
            + "".join(f"{cell:>14}" for cell in (*cells, f"{each.recovery_s:.2f} s", each.seed))
            + (f"  {each.remark}" if each.remark else "")
        )
