"""Apple in a box as a pytest fixture, for any project that sends notifications.

    def test_order_is_announced(apple):
        shop.announce_order(token, host=apple.host, port=apple.port, ca=apple.ca_file, key=apple.key_file)
        (received,) = apple.wait_for(1)
        assert b"Your order" in received.payload

    @pytest.mark.apple(strict=True, environment="development")
    def test_unknown_device(apple): ...

Nothing of heliograph is imported before a test asks for `apple`: other tests start no slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from heliograph.simulator.threaded import ThreadedSimulator

_MARKER = (
    "apple(strict=False, environment='production'): what the fixture `apple` is like; strict: only registered devices "
    "exist; environment: production or development"
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _MARKER)


@pytest.fixture(scope="session")
def _apples() -> Iterator[Callable[[bool, str], ThreadedSimulator]]:
    """Simulators by what they are like, started when first asked for."""
    started: dict[tuple[bool, str], ThreadedSimulator] = {}
    with ExitStack() as stack:

        def find(strict: bool, environment: str) -> ThreadedSimulator:
            from heliograph.model import Environment
            from heliograph.simulator.threaded import ThreadedSimulator

            key = strict, environment
            if key not in started:
                started[key] = stack.enter_context(ThreadedSimulator(Environment(environment), strict=strict))
            return started[key]

        yield find


@pytest.fixture
def apple(request: pytest.FixtureRequest, _apples: Callable[[bool, str], ThreadedSimulator]) -> ThreadedSimulator:
    """A simulator of Apple Push Notification service that listens, knows no devices yet and behaves.

    It listens on the same port, with the same authority and signing key, for all tests of a session; what a test did
    to it is undone before the next. Connections stay open meanwhile, as Apple's would.
    """
    simulator = _apples(*_wanted(request.node))
    simulator.reset()
    return simulator


def _wanted(node: pytest.Item) -> tuple[bool, str]:
    """What the test's marker says."""
    marker = node.get_closest_marker("apple")
    given = dict(marker.kwargs) if marker is not None else {}
    strict, environment = given.pop("strict", False), given.pop("environment", "production")
    if given or (marker is not None and marker.args) or environment not in ("production", "development"):
        raise pytest.UsageError(
            "@pytest.mark.apple takes strict=True or False and environment='production' or 'development', "
            f"and nothing else (at {node.nodeid})"
        )
    return bool(strict), str(environment)
