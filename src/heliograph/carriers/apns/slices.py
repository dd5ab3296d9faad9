"""A carried batch, cut into slices: notifications that one template serves, as columns."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from msgspec.structs import replace

from heliograph.model import MAX_BATCH, Batch, Headers, Lane
from heliograph.protocols import apns
from heliograph.protocols.http2 import Requests, Template

_PLACES = [b"%04x" % place for place in range(1, MAX_BATCH + 1)]
"""The last four digits of the ids in a batch, by index."""

INDEX_BITS = 16
"""The low bits of a request's key are the index in the batch."""
INDEX_MASK = (1 << INDEX_BITS) - 1

Literals = tuple[tuple[bytes, bytes], ...]
"""Fields that may differ from one notification to the next."""


class Slice:
    """Notifications with the same template that wait for a stream, as columns: of one batch, or `alone`."""

    __slots__ = (
        *("alone", "batch_id", "bodies", "headers", "keys", "lane", "literals", "names", "paths", "place"),
        *("prefixes", "since", "suffixes"),
    )

    def __init__(
        self,
        lane: Lane,
        headers: Headers,
        literals: Sequence[Literals],
        batch_id: bytes,
        prefix: bytes,
        keys: Sequence[int],
        paths: Sequence[bytes],
        bodies: Sequence[bytes],
        suffixes: Sequence[bytes],
        since: float,
        *,
        names: Sequence[bytes] = (),
    ) -> None:
        """`prefix` is what the ids that are sent begin with: that of the batch's, or nothing where these are not its.

        `names`: our own ids, where each is all of its batch that is to be sent; then there is no `batch_id`.
        """
        self.alone = not batch_id
        self.batch_id = batch_id
        self.lane = lane
        self.headers = headers
        """What they share; expiration and collapse id are in `literals`, one entry for all or one each."""
        self.literals = literals
        self.prefixes = (prefix, prefix) if headers.collapse_on_id else (prefix,)
        self.keys = keys
        self.paths = paths
        self.bodies = bodies
        self.suffixes = suffixes
        self.names = names
        self.since = since
        self.place = 0
        """How many were sent already."""

    @property
    def left(self) -> int:
        return len(self.keys) - self.place

    def join(self, other: Slice) -> bool:
        """Whether `other` goes along from now on: the two are `alone`, alike, and of one turn of the loop."""
        if not (self.alone and other.alone and self.since == other.since and self.headers == other.headers):
            return False
        if len(self.literals) > 1 or self.literals != other.literals:
            mine = self.literals if len(self.literals) > 1 else [self.literals[0]] * len(self.keys)
            self.literals = [*mine, *other.literals]
        self.keys = [*self.keys, *other.keys]
        self.paths = [*self.paths, *other.paths]
        self.bodies = [*self.bodies, *other.bodies]
        self.suffixes = [*self.suffixes, *other.suffixes]
        self.names = [*self.names, *other.names]
        return True

    def withdraw(self, wanted: Mapping[bytes, Collection[int]]) -> list[int]:
        """Take those of these out that were not sent, by the id of their batch and their index; their keys."""
        taken: list[int] = []
        kept: list[int] = []
        if not self.alone and self.batch_id not in wanted:
            return taken
        for place in range(self.place, len(self.keys)):
            indices = wanted.get(self.names[place][:-4] if self.alone else self.batch_id, ())
            (taken if self.keys[place] & INDEX_MASK in indices else kept).append(place)
        if taken:
            taken = [self.keys[place] for place in taken]
            self.keys = [self.keys[place] for place in kept]
            self.paths = [self.paths[place] for place in kept]
            self.suffixes = [self.suffixes[place] for place in kept]
            self.names = [self.names[place] for place in kept] if self.alone else self.names
            # Of the others, one entry stands for all.
            self.bodies = [self.bodies[place] for place in kept] if len(self.bodies) > 1 else self.bodies
            self.literals = [self.literals[place] for place in kept] if len(self.literals) > 1 else self.literals
            self.place = 0
        return taken

    def requests(self, template: Template, count: int) -> Requests:
        """The next `count` of them."""
        first, last = self.place, self.place + count
        return Requests(
            template,
            self.keys[first:last],
            self.paths[first:last],
            self.bodies if len(self.bodies) == 1 else self.bodies[first:last],
            self.literals if len(self.literals) == 1 else self.literals[first:last],
            self.prefixes,
            self.suffixes[first:last],
        )


def slices(batch: Batch, indices: Sequence[int], base: int, now: float) -> Iterator[Slice]:
    """These notifications of the batch; a request's key is its index and `base`. `now` is the loop's time."""
    if len(indices) == 1:
        yield _alone(batch, indices[0], base, now)
        return
    for headers, literals, chosen in _alike(batch, indices):
        yield _slice(batch, headers, literals, base, chosen, now)


def _alone(batch: Batch, index: int, base: int, now: float) -> Slice:
    headers = batch.headers[0 if batch.headers_of is None else batch.headers_of[index]]
    name = batch.id.encode() + _PLACES[index]
    own = batch.apns_ids.get(index)
    return Slice(
        (batch.app, batch.environment),
        _shared(headers),
        [tuple(apns.varying_fields(headers))],
        b"",
        b"",
        [base + index],
        [batch.tokens[index]],
        [batch.payloads[index if len(batch.payloads) > 1 else 0]],
        [name if own is None else own.encode()],
        now,
        names=[name],
    )


def _alike(batch: Batch, indices: Sequence[int]) -> Iterator[tuple[Headers, Sequence[Literals], Sequence[int]]]:
    """Parts that one template serves: what they share, what each sends beside it, and which they are.

    Notifications that differ in expiration and collapse id only stay together.
    """
    literals = [tuple(apns.varying_fields(headers)) for headers in batch.headers]
    shared = [_shared(headers) for headers in batch.headers]
    if batch.headers_of is None:
        yield shared[0], literals, indices
        return
    for headers in dict.fromkeys(shared):
        kinds = {kind for kind, each in enumerate(shared) if each == headers}
        chosen = [index for index in indices if batch.headers_of[index] in kinds]
        if chosen:
            yield headers, [literals[batch.headers_of[index]] for index in chosen], chosen


def _shared(headers: Headers) -> Headers:
    """What goes into a template; whether it may be sent twice is nothing that the wire says."""
    if headers.expiration is None and headers.collapse_id is None and not headers.at_most_once:
        return headers
    return replace(headers, expiration=None, collapse_id=None, at_most_once=False)


def _slice(
    batch: Batch, headers: Headers, literals: Sequence[Literals], base: int, indices: Sequence[int], now: float
) -> Slice:
    lane, batch_id = (batch.app, batch.environment), batch.id.encode()
    prefix = b"" if batch.apns_ids else batch_id
    if isinstance(indices, range) and indices.step == 1:
        span = slice(indices.start, indices.stop)
        keys: Sequence[int] = range(base + indices.start, base + indices.stop)
        tokens = batch.tokens[span]
        payloads = batch.payloads if len(batch.payloads) == 1 else batch.payloads[span]
        ids = _PLACES[span] if prefix else _whole_ids(batch, batch_id, indices)
    else:
        keys = [base + index for index in indices]
        tokens = [batch.tokens[index] for index in indices]
        payloads = batch.payloads if len(batch.payloads) == 1 else [batch.payloads[index] for index in indices]
        ids = [_PLACES[index] for index in indices] if prefix else _whole_ids(batch, batch_id, indices)
    return Slice(lane, headers, literals, batch_id, prefix, keys, tokens, payloads, ids, now)


def _whole_ids(batch: Batch, batch_id: bytes, indices: Sequence[int]) -> list[bytes]:
    """What these are sent under: their callers' ids, or ours."""
    own = batch.apns_ids
    return [own[index].encode() if index in own else batch_id + _PLACES[index] for index in indices]
