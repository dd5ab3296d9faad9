"""Many notifications from the command line: sent in requests of a thousand, followed until Apple has answered."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from heliograph.commands.calling import NOTIFICATIONS, Reply, Server, with_payload
from heliograph.commands.status import UNFINISHED, exit_code_of, say_state
from heliograph.commands.telling import DONE, FAILED, WAITING, RefusedError, UnreachableError, progress, tell

_REQUEST = 1000
"""Notifications in one request."""
_BUSY_S = 60.0
"""How long a server may take nothing before this gives up."""
_TRIES, _AGAIN_S = 3, 1.0
"""Of a request whose answer is lost, and between two of them."""
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.05, 1.0
"""Between two rounds of asking; it grows."""
_AHEAD = 100
"""So many without an outcome in a row: those behind them, which were sent later, are not asked for yet."""
_SHOWN = 5

_REFUSED, _NOT_SENT = "refused", "not sent"


@dataclass(slots=True)
class _One:
    """A notification of many."""

    line: int
    """Of the file."""
    token: str
    id: str | None = None
    state: str = _NOT_SENT
    """As the API has it, or one of the two above."""
    reason: str | None = None
    meaning: str | None = None


def send_many(
    server: Server, content: dict[str, Any], payload: bytes | None, tokens: Mapping[int, str], wait_s: float
) -> int:
    """Send to each of these device tokens, here by their line, and tell what became of them. Returns the exit code.

    Raises RefusedError, UnreachableError, KeyboardInterrupt, after it has told how far it came.
    """
    run = _Run(server, content, payload, [_One(line, token) for line, token in tokens.items()], follow=wait_s > 0)
    try:
        run.send()
        if wait_s:
            run.follow(wait_s)
    finally:
        run.tell()
    return run.exit_code()


class _Run:
    def __init__(
        self,
        server: Server,
        content: dict[str, Any],
        payload: bytes | None,
        every: Sequence[_One],
        *,
        follow: bool,
    ) -> None:
        self._server = server
        self._content = content
        self._payload = payload
        self._all = every
        self._follow = follow
        self._in_doubt: Sequence[_One] = ()
        """What a request holds whose answer is not known."""

    def send(self) -> None:
        with progress(len(self._all), "Sending") as advance:
            for start in range(0, len(self._all), _REQUEST):
                some = self._all[start : start + _REQUEST]
                self._send_some(some)
                advance(len(some))

    def _send_some(self, some: Sequence[_One]) -> None:
        self._in_doubt = some
        try:
            reply = self._post(some)
        except UnreachableError as error:
            self._in_doubt = some if error.in_doubt else ()
            raise
        self._in_doubt = ()
        errors = reply.body.get("errors", ())
        if reply.status >= 400 and not all("index" in each for each in errors or [{}]):
            raise RefusedError(reply.status, reply.body)
        for each in errors:
            one = some[each["index"]]
            one.state, one.reason, one.meaning = _REFUSED, each["code"], each["detail"]
        ids = reply.body["ids"] if reply.status < 400 else [None] * len(some)
        for one, made in zip(some, ids, strict=True):
            if made is not None:
                one.id, one.state = made, "queued"
            if made is None or not self._follow:
                self._show(one)

    def _post(self, some: Sequence[_One]) -> Reply:
        """The server's answer, once it takes anything. Sent again where the answer is lost, and taken once only."""
        tokens = [one.token for one in some]
        body = with_payload({**self._content, "tokens": tokens, "partial": True}, self._payload)
        once = os.urandom(16).hex()
        until = time.monotonic() + _BUSY_S
        tries, in_doubt = _TRIES, False
        while True:
            try:
                reply = self._server.client.ask("POST", NOTIFICATIONS, body, once=once)
            except UnreachableError as error:
                tries -= 1
                error.in_doubt = in_doubt = in_doubt or error.in_doubt
                if not in_doubt or not tries:
                    raise
                time.sleep(_AGAIN_S)
                continue
            pause_s = reply.retry_after_s
            if reply.status not in (429, 503) or pause_s is None or time.monotonic() + pause_s > until:
                return reply
            time.sleep(pause_s)

    def follow(self, wait_s: float) -> None:
        waiting = [one for one in self._all if one.state in UNFINISHED]
        until = time.monotonic() + wait_s
        pause_s = _FIRST_PAUSE_S
        with progress(len(waiting), "Waiting for Apple") as advance:
            while waiting:
                before = len(waiting)
                waiting = self._look(waiting, advance)
                left_s = until - time.monotonic()
                if not waiting or left_s <= 0:
                    break
                pause_s = _FIRST_PAUSE_S if len(waiting) < before else min(2 * pause_s, _LAST_PAUSE_S)
                time.sleep(min(pause_s, left_s))

    def _look(self, waiting: Sequence[_One], advance: Callable[[int], None]) -> list[_One]:
        """Those that still wait."""
        still: list[_One] = []
        for place, one in enumerate(waiting):
            reply = self._server.client.ask("GET", f"{NOTIFICATIONS}/{one.id}")
            if reply.status >= 400 and reply.status not in (429, 503):
                raise RefusedError(reply.status, reply.body)
            one.state = reply.body.get("state", one.state)
            one.reason, one.meaning = reply.body.get("reason"), reply.body.get("meaning")
            if one.state in UNFINISHED:
                still.append(one)
            else:
                self._show(one)
                advance(1)
            if len(still) >= _AHEAD:
                return [*still, *waiting[place + 1 :]]
        return still

    # -- what is told ------------------------------------------------------------------------------------------------

    def _show(self, one: _One) -> None:
        if self._server.as_json:
            told = {"line": one.line, "token": one.token, "id": one.id, "state": one.state, "reason": one.reason}
            tell({**told, "meaning": one.meaning})

    def tell(self) -> None:
        """The numbers, and what is not finished."""
        counts = Counter(one.state for one in self._all)
        if counts[_NOT_SENT] == len(self._all) and not self._in_doubt:
            return
        if self._follow:
            for one in self._all:
                if one.state in UNFINISHED:
                    self._show(one)
        if self._server.as_json:
            tell({"summary": counts})
        else:
            self._say(counts)
        if counts[_NOT_SENT]:
            first = next(one.line for one in self._all if one.state == _NOT_SENT)
            doubt = f" Whether lines {_span(self._in_doubt)} were taken is not known." if self._in_doubt else ""
            done = f"{len(self._all) - counts[_NOT_SENT]:,} of {len(self._all):,}"
            click.echo(f"{done} were dealt with; the rest begins at line {first:,}.{doubt}", err=True)

    def _say(self, counts: Counter[str]) -> None:
        for state, count in counts.most_common():
            reasons = Counter(one.reason for one in self._all if one.state == state and one.reason)
            if not reasons:
                click.echo(f"{say_state(state)}  {count:,}")
            for reason, number in reasons.most_common():
                some = [one for one in self._all if (one.state, one.reason) == (state, reason)]
                more = f", ... ({len(some) - _SHOWN:,} more)" if len(some) > _SHOWN else ""
                where = f"line {', '.join(f'{one.line}' for one in some[:_SHOWN])}{more}"
                click.echo(f"{say_state(state)}  {number:,}  {reason}  {where}")
                click.echo(f"  {some[0].meaning}")

    def exit_code(self) -> int:
        states = {one.state for one in self._all}
        if not self._follow:
            return FAILED if _REFUSED in states else DONE
        codes = {exit_code_of(state) for state in states}
        return FAILED if FAILED in codes else WAITING if WAITING in codes else DONE


def _span(some: Sequence[_One]) -> str:
    return f"{some[0].line:,} to {some[-1].line:,}"
