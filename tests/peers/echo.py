"""The session behind our server role in these tests: 200 to everything."""

from __future__ import annotations

from collections.abc import Sequence

from heliograph.net.http2 import Link
from heliograph.protocols.http2 import Answer, Event, Request, ServerConnection


class Echo:
    """Answers with the request's x-echo field and its body; a GET, which has none, with a small one."""

    def __init__(self, link: Link[ServerConnection]) -> None:
        self._link = link

    def on_events(self, events: Sequence[Event]) -> None:
        self._link.core.respond([self._answer(event) for event in events if isinstance(event, Request)])
        self._link.flush()

    def _answer(self, request: Request) -> Answer:
        assert not request.truncated
        echoed = tuple(field for field in request.fields if field[0] == b"x-echo")
        body = b"a small body" if (b":method", b"GET") in request.fields else request.body
        return Answer(request.stream_id, 200, echoed, body)

    def on_writable(self) -> None:
        pass

    def on_close(self) -> None:
        pass
