"""The ledger: what the client, Apple's simulator and the server each wrote down, and the checker of all fault tests.

The client writes what it is about to submit, what got a 2xx, and what it has seen to be over, into a file that is
synced before it goes on. The simulator writes a line for each request before it answers (`Judged`). The server's part
are its receipts, and its counters. `check` compares the three; the promises that it names are those of
docs/reliability.md.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Self

import msgspec
from msgspec import Struct

from heliograph.model import MAX_BATCH, Receipt, State
from heliograph.protocols.http2 import ErrorCode
from heliograph.simulator.server import Judged

OWN_ID = "<its own id>"
"""Expected of a collapse id: the notification's apns-id."""

_STRETCH_S = 5.0
_LATELY_S = 10.0
"""The rate of what is new is taken from so long (`policy.Crowd`)."""

ENDS = frozenset((State.ACCEPTED, State.REJECTED, State.EXPIRED, State.CANCELLED, State.BURIED, State.UNKNOWN))


class Submitted(Struct, frozen=True, tag="submitted", omit_defaults=True):
    """What the client is about to send; no two have both device token and body in common."""

    client_id: int
    token: str
    sha256: str
    """Of the body, as hex."""
    topic: str
    collapse_id: str | None
    """What Apple is to see; `OWN_ID`, or None where there is to be none."""
    at_most_once: bool = False


class Taken(Struct, frozen=True, tag="taken"):
    """It got a 2xx."""

    client_id: int
    apns_id: str
    at: float
    """UNIX seconds, here and below."""


class Settled(Struct, frozen=True, tag="settled"):
    """Its receipt was seen with an end: it must not be sent from then on."""

    apns_id: str
    at: float


class Life(Struct, frozen=True):
    """The counters of a server process that was not killed, read when all had an end."""

    since: float
    until: float
    taken: int
    answers: Mapping[str, int]
    """By Apple's word or ours, as in `heliograph_answers_total`."""


class Ledger(Struct, frozen=True):
    submitted: Sequence[Submitted]
    taken: Sequence[Taken]
    settled: Sequence[Settled]
    judged: Sequence[Judged]
    receipts: Mapping[str, Receipt]
    """The server's last word, by id."""
    lives: Sequence[Life] = ()
    left: int = 0
    """Notifications without an end a minute after the last fault."""
    rss_bytes: int = 0
    """The most that a server process had, as the next."""
    descriptors: int = 0
    purged: bool = False
    """Receipts that were seen with an end may be gone."""
    deaths: Sequence[float] = ()
    """When server processes were killed."""


class Bounds(Struct, frozen=True):
    """What a case may cost."""

    duplicates: int = 0
    """Requests that Apple acted on once more: in all, or after each death where there were any."""
    retries_per_s: float = math.inf
    """Requests after an answer that asked for patience, beside a tenth of those that are new."""
    rss_bytes: int = 512 * 1024 * 1024
    descriptors: int = 512


class Violation(Struct, frozen=True):
    """A promise that was not kept."""

    promise: str
    what: str
    count: int
    example: str


class ClientFile:
    """The client's part of the ledger. What a call wrote is on the disk when it returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)

    def write(self, lines: Iterable[Submitted | Taken | Settled]) -> None:
        data = b"".join([msgspec.json.encode(line) + b"\n" for line in lines])
        if data:
            assert os.write(self._file, data) == len(data)
            os.fsync(self._file)

    def read(self) -> tuple[list[Submitted], list[Taken], list[Settled]]:
        decode = msgspec.json.Decoder(Submitted | Taken | Settled).decode
        lines = [decode(line) for line in self._path.read_bytes().splitlines()]
        return (
            [line for line in lines if isinstance(line, Submitted)],
            [line for line in lines if isinstance(line, Taken)],
            [line for line in lines if isinstance(line, Settled)],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def read_journal(path: Path) -> list[Judged]:
    decode = msgspec.json.Decoder(Judged).decode
    return [decode(line) for line in path.read_bytes().splitlines()]


def duplicates(ledger: Ledger) -> list[int]:
    """How often Apple acted on a notification that it had acted on before: until the first death, and after each."""
    counts = [0] * (len(ledger.deaths) + 1)
    acted: set[str | None] = set()
    for line in ledger.judged:
        if line.status == 200:
            counts[bisect_right(ledger.deaths, line.at)] += line.apns_id in acted
            acted.add(line.apns_id)
    return counts


def lost(ledger: Ledger) -> int:
    """How many that got a 2xx have no end."""
    ended = {receipt.id for receipt in ledger.receipts.values() if receipt.state in ENDS} | _forgotten(ledger)
    return sum(taken.apns_id not in ended for taken in ledger.taken)


def _forgotten(ledger: Ledger) -> set[str]:
    return {each.apns_id for each in ledger.settled} - ledger.receipts.keys() if ledger.purged else set()


def check(ledger: Ledger, bounds: Bounds) -> list[Violation]:
    """All promises that were not kept, one entry for each way of not keeping them."""
    found = _Found()
    _check_pushes(ledger, found)
    _check_ends(ledger, found)
    _check_repetitions(ledger, bounds, found)
    for life in ledger.lives:
        _check_counters(life, ledger, found)
    if ledger.left:
        found.add("P4", "without an end a minute after the last fault", str(ledger.left), ledger.left)
    if ledger.rss_bytes > bounds.rss_bytes:
        found.add("P6", "more memory than allowed", f"{ledger.rss_bytes} octets")
    if ledger.descriptors > bounds.descriptors:
        found.add("P6", "more descriptors than allowed", str(ledger.descriptors))
    return found.all()


class _Found:
    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, promise: str, what: str, example: str, count: int = 1) -> None:
        self._entries[promise, what].append(example)
        self._counts[promise, what] += count

    def all(self) -> list[Violation]:
        return [
            Violation(promise, what, self._counts[promise, what], examples[0])
            for (promise, what), examples in self._entries.items()
        ]


def _check_pushes(ledger: Ledger, found: _Found) -> None:
    """No push without a submission, and each with the identity that it was submitted with (P3)."""
    submitted = {each.client_id: each for each in ledger.submitted}
    by_content = {(each.token, each.sha256): each for each in ledger.submitted}
    assert len(by_content) == len(ledger.submitted), "two submissions cannot be told apart"
    known = {each.apns_id: submitted[each.client_id] for each in ledger.taken}
    ids = {each.client_id: each.apns_id for each in ledger.taken}
    for line in ledger.judged:
        name = str(line.apns_id)
        expected = known.get(name)
        if expected is None:
            # Its 2xx never came: its content tells which one it is, and from here on so does its id.
            expected = by_content.get((line.token, line.sha256))
            if expected is None:
                found.add("P2", "a push that nobody submitted", name)
                continue
            known[name] = expected
        if ids.setdefault(expected.client_id, name) != name:
            found.add("P3", "a second id for one notification", name)
        if line.token != expected.token:
            found.add("P3", "another device token", name)
        if line.sha256 != expected.sha256:
            found.add("P3", "another body", name)
        if line.topic != expected.topic:
            found.add("P3", "another topic", name)
        if line.collapse_id != (name if expected.collapse_id == OWN_ID else expected.collapse_id):
            found.add("P3", "another collapse id", name)


def _check_ends(ledger: Ledger, found: _Found) -> None:
    """Each 2xx has an end (P2), and those that are Apple's are what Apple said (P10)."""
    said = {(line.apns_id, line.status, line.reason) for line in ledger.judged}
    forgotten = _forgotten(ledger)
    for taken in ledger.taken:
        receipt = ledger.receipts.get(taken.apns_id)
        if taken.apns_id in forgotten:
            continue
        if receipt is None:
            found.add("P2", "lost: it got a 2xx, and there is no receipt", taken.apns_id)
        elif receipt.state not in ENDS:
            found.add("P2", "no end", f"{taken.apns_id} is {receipt.state.name.lower()}")
        elif receipt.state is State.ACCEPTED and (taken.apns_id, 200, None) not in said:
            found.add("P10", "called accepted, and Apple did not accept it", taken.apns_id)
        elif receipt.state is State.REJECTED and (taken.apns_id, receipt.status, receipt.reason) not in said:
            found.add("P10", "called rejected, and Apple did not say so", f"{taken.apns_id}: {receipt.reason}")


def _check_repetitions(ledger: Ledger, bounds: Bounds, found: _Found) -> None:
    for count in duplicates(ledger):
        if count > bounds.duplicates:
            found.add("P2", "more duplicates than the bound", f"{count} above {bounds.duplicates}", count)
    settled: dict[str, float] = {}
    for each in ledger.settled:
        settled[each.apns_id] = min(each.at, settled.get(each.apns_id, each.at))
    by_id: dict[str | None, list[Judged]] = defaultdict(list)
    for line in ledger.judged:
        by_id[line.apns_id].append(line)
        if line.apns_id in settled and line.at > settled[line.apns_id]:
            found.add("P2", "sent after its receipt was recorded", line.apns_id)
    once_contents = {(each.token, each.sha256) for each in ledger.submitted if each.at_most_once}
    retries: list[float] = []
    for name, lines in by_id.items():
        for former, line in pairwise(lines):
            if former.status in (429, 500, 503):
                retries.append(line.at)
            if _perhaps_acted(former) and (line.token, line.sha256) in once_contents:
                found.add("P3", "sent again, though Apple may have acted on it and it was to be sent once", str(name))
    _check_retries(sorted(retries), sorted(lines[0].at for lines in by_id.values()), bounds.retries_per_s, found)


def _check_retries(retries: Sequence[float], new: Sequence[float], per_s: float, found: _Found) -> None:
    """In any stretch of time, retries are a tenth of what was new of late, and so many a second (P5)."""
    for place, start in enumerate(retries):
        end = start + _STRETCH_S
        count = bisect_right(retries, end) - place
        lately = bisect_right(new, end) - bisect_left(new, start - _LATELY_S)
        if count > _STRETCH_S * per_s + lately / 10 + MAX_BATCH:
            found.add("P5", "a storm of retries", f"{count} in {_STRETCH_S} s, beside {lately} that were new of late")


def _perhaps_acted(line: Judged) -> bool:
    """As the sender must see it: Apple did not say that it did nothing."""
    if line.fault is None:
        return line.status == 200
    return line.code != ErrorCode.REFUSED_STREAM


def _check_counters(life: Life, ledger: Ledger, found: _Found) -> None:
    """What the server counted is what the client and the simulator saw (P10)."""
    taken = sum(life.since <= each.at <= life.until for each in ledger.taken)
    if taken != life.taken:
        found.add("P10", "taken was counted wrong", f"{life.taken}, but {taken} got a 2xx")
    lines = [line for line in ledger.judged if life.since <= line.at <= life.until]
    said = Counter("accepted" if line.status == 200 else line.reason for line in lines if line.status is not None)
    answered = Counter(
        "accepted" if line.status == 200 else line.reason
        for line in lines
        if line.status is not None and line.fault is None
    )
    unanswered = sum(line.fault is not None and line.code != ErrorCode.REFUSED_STREAM for line in lines)
    unknown = life.answers.get("unknown", 0)
    if unknown < unanswered:
        found.add("P10", "unknown outcomes were counted wrong", f"{unknown}, but {unanswered} got no answer")
    # Only where connections broke off may an answer have been on its way and not have come.
    missing = 0
    for word in {*life.answers, *said} - {"unknown", "not processed"}:
        counted = life.answers.get(str(word), 0)
        missing += max(0, answered[word] - counted)
        if counted > said[word] or (answered[word] > counted and not unknown):
            found.add("P10", f"{word} was counted wrong", f"{counted}, but Apple said so {said[word]} times")
    if missing > max(0, unknown - unanswered):
        found.add("P10", "answers were not counted", f"{missing}, of which {unknown - unanswered} may not have come")
