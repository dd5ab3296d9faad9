"""What callers of `send` gave in one turn of the loop, as columns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence

from heliograph.model import Environment, Headers, Outcome


class Sends:
    """What was given to `send` in this turn of the loop, as columns."""

    __slots__ = ("apps", "environments", "futures", "headers", "payloads", "tokens")

    def __init__(self) -> None:
        self.apps: list[str] = []
        self.environments: list[Environment] = []
        self.headers: list[Headers] = []
        self.tokens: list[bytes] = []
        self.payloads: list[bytes] = []
        self.futures: list[asyncio.Future[Outcome]] = []

    def add(
        self,
        app: str,
        environment: Environment,
        headers: Headers,
        token: bytes,
        payload: bytes,
        future: asyncio.Future[Outcome],
    ) -> None:
        self.apps.append(app)
        self.environments.append(environment)
        self.headers.append(headers)
        self.tokens.append(token)
        self.payloads.append(payload)
        self.futures.append(future)

    def groups(self) -> Iterator[tuple[str, Environment, Sends]]:
        """By app and environment; mostly there is one of each."""
        app, environment, size = self.apps[0], self.environments[0], len(self.apps)
        if self.apps.count(app) == size and self.environments.count(environment) == size:
            yield app, environment, self
            return
        groups: dict[tuple[str, Environment], Sends] = {}
        columns = (self.apps, self.environments, self.headers, self.tokens, self.payloads, self.futures)
        for row in zip(*columns, strict=True):
            groups.setdefault((row[0], row[1]), Sends()).add(*row)
        for (app, environment), group in groups.items():
            yield app, environment, group


def resolve(futures: Sequence[asyncio.Future[Outcome]]) -> Callable[[Sequence[int], Outcome], None]:
    def report(indices: Sequence[int], outcome: Outcome) -> None:
        for index in indices:
            future = futures[index]
            if not future.done():  # its caller may have gone
                future.set_result(outcome)

    return report
