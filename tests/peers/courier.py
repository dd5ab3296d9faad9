"""The session behind our client role in these tests: sends a list of requests and writes down what became of each."""

from __future__ import annotations

import ssl
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from heliograph.net.http2 import Link, connect
from heliograph.protocols.http2 import (
    Accepted,
    Answered,
    ClientConnection,
    Event,
    Failed,
    GoAway,
    NotProcessed,
    Requests,
    Template,
    Unknown,
)

TEMPLATE = Template(
    b"localhost",
    b"/3/device/",
    ((b"apns-topic", b"com.example.app"), (b"authorization", b"bearer " + b"e" * 180)),
    (b"apns-id",),
)
PREFIX = b"0191d5a8-0000-7000-8000-"
BODIES = (b"", b'{"aps":{"alert":"hello"}}', b"x" * 4096)


def apns_id(key: int) -> str:
    return f"{PREFIX.decode()}{key:012d}"


@dataclass
class Book:
    """Requests 0 to `len(tokens)` - 1, and what became of them over however many connections it took."""

    tokens: Sequence[str]
    """The ends of the paths."""
    bodies: Sequence[bytes] = BODIES
    """Taken in turn."""
    waiting: deque[int] = field(init=False)
    flying: set[int] = field(default_factory=set)
    answers: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    """Status and body."""
    unknown: set[int] = field(default_factory=set)
    handed_back: int = 0
    """How often a request was not processed and went back on the list."""
    goaways: list[GoAway] = field(default_factory=list)
    failures: list[Failed] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.waiting = deque(range(len(self.tokens)))

    @property
    def finished(self) -> bool:
        return not self.waiting and not self.flying

    def take(self, keys: Sequence[int]) -> None:
        for key in keys:
            assert key not in self.flying, "a key that is already under way"
            assert key not in self.answers
            self.flying.add(key)

    def end(self, keys: Sequence[int]) -> None:
        for key in keys:
            self.flying.remove(key)  # KeyError: it ended twice


class Courier:
    """Keeps one connection as full as the server allows, until the book is finished or the connection is."""

    def __init__(self, link: Link[ClientConnection], book: Book) -> None:
        self._link = link
        self._book = book
        self._leaving = False

    def on_events(self, events: Sequence[Event]) -> None:
        book = self._book
        for event in events:
            if isinstance(event, Accepted):
                book.end(event.keys)
                book.answers.update((key, (200, b"")) for key in event.keys)
            elif isinstance(event, Answered):
                book.end([event.key])
                book.answers[event.key] = (event.status, event.body)
            elif isinstance(event, NotProcessed):
                book.end(event.keys)
                book.waiting.extend(event.keys)
                book.handed_back += len(event.keys)
            elif isinstance(event, Unknown):
                book.end(event.keys)
                book.unknown.update(event.keys)
            elif isinstance(event, GoAway):
                book.goaways.append(event)
                self._leaving = True
            elif isinstance(event, Failed):
                book.failures.append(event)
        self._send()

    def on_writable(self) -> None:
        self._send()

    def on_close(self) -> None:
        pass

    def _send(self) -> None:
        core, book = self._link.core, self._book
        while book.waiting and core.capacity and self._link.writable:
            keys = [book.waiting[place] for place in range(min(len(book.waiting), 200))]
            taken = core.submit(_requests(keys, book), self._link._loop.time())
            book.take(keys[:taken])
            for _ in range(taken):
                book.waiting.popleft()
            if taken < len(keys):
                break
        if self._leaving and not core.open_streams:
            self._link.abort()  # a polite end takes seconds: after its GOAWAY, Node does not answer TLS's close
        elif book.finished:
            self._link.close()
        else:
            self._link.flush()


def _requests(keys: list[int], book: Book) -> Requests:
    return Requests(
        TEMPLATE,
        keys,
        [book.tokens[key].encode() for key in keys],
        [book.bodies[key % len(book.bodies)] for key in keys],
        literals=(((b"apns-priority", b"10"),),),
        prefixes=(PREFIX,),
        suffixes=[b"%012d" % key for key in keys],
    )


async def deliver(
    tokens: Sequence[str],
    port: int,
    tls: ssl.SSLContext | None,
    *,
    connections: int = 1,
    bodies: Sequence[bytes] = BODIES,
) -> Book:
    """Send a request for each token; where a connection ends early, the rest over another, up to so many."""
    book = Book(tokens, bodies)
    while not book.finished and connections:
        link = await connect(lambda link: Courier(link, book), host="127.0.0.1", port=port, tls=tls)
        await link.closed
        connections -= 1
    return book
