"""The three interfaces of heliograph: Store, Queue, Carrier.

Structs of `model` cross them, never rows, frames or sockets. No transaction crosses them either: the order of calls
and their repeatability do the work of one (see `relay`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from heliograph.model import (
    ApiKey,
    Batch,
    Depth,
    Environment,
    Filter,
    KnownCaller,
    Lane,
    LaneView,
    Lease,
    LeaseEnd,
    Listed,
    Once,
    Outcome,
    Outcomes,
    Page,
    Quarantine,
    Receipt,
    Removal,
)

Report = Callable[[Sequence[int], Outcome], None]
"""Called by a carrier with a group of indices of one batch that share an outcome, on the event loop's thread."""


class Carrier(Protocol):
    """What takes notifications out of the house."""

    def carry(self, batch: Batch, indices: Sequence[int], report: Report) -> None:
        """Take these on and return at once. Every index is reported exactly once, in groups, as answers come."""
        ...

    def withdraw(self, those: Mapping[str, Collection[int]]) -> None:
        """Of these, by batch id, report those at once as not processed that are not on their way to Apple yet."""
        ...

    def full(self) -> frozenset[Lane] | None:
        """The lanes that should be given nothing now, as enough of theirs waits; None: all, as it is too much."""
        ...

    async def ready(self, full: frozenset[Lane] | None = None) -> frozenset[Lane]:
        """As `full`, but waits while all of them together are too much, and while the answer would be `full`."""
        ...

    def lanes(self) -> Sequence[LaneView]:
        """What is known of each lane that was carried for lately; one for each of its credentials."""
        ...

    async def aclose(self) -> None:
        """Take nothing more, let what is in flight end within its deadlines, report the rest as not processed."""
        ...


class Queue(Protocol):
    """Batches that are to be sent."""

    @property
    def waiting(self) -> int:
        """Notifications in batches that are not finished."""
        ...

    @property
    def room(self) -> int:
        """How many more notifications `put` would take."""
        ...

    async def put(self, batches: Sequence[Batch], *, lease: bool = False, once: Once | None = None) -> Sequence[Lease]:
        """Durable on return, all or nothing. A batch whose id is known already is left as it is.

        `lease`: those that are new are leased to the caller at once, which saves the way through `take`. `once` is kept
        in the same transaction; where its key is known already, nothing is put.
        Raises Overloaded, Repeated, StoreError, and ValueError for a batch that cannot be written down, as one with an
        id of its caller's that is no UUID.
        """
        ...

    async def take(self, limit: int, full: Collection[Lane] = ()) -> Sequence[Lease]:
        """Wait until at least one batch is due, then lease up to `limit` batches, none of a lane that is `full`.

        Fair: lanes take turns, and within a lane small batches do not wait behind large ones; among their like the
        oldest due come first. A lease ends by itself if it is not finished in time; the next one has a higher
        `attempt`.
        """
        ...

    async def finish(self, ends: Sequence[LeaseEnd]) -> None:
        """End leases. An end whose `attempt` is not the batch's newest changes nothing."""
        ...

    async def aclose(self) -> None: ...


class Store(Protocol):
    """What is known: outcomes, removals, the buried, apps, API keys and other callers."""

    async def record(
        self, outcomes: Sequence[Outcomes], removals: Sequence[Removal], quarantines: Sequence[Quarantine] = ()
    ) -> Collection[str]:
        """Record all of it durably, in one transaction. Recording the same again changes nothing.

        Returns the ids of the batches whose outcomes were recorded: not those that somebody else has leased since, or
        that are finished.
        """
        ...

    async def find_receipts(self, ids: Sequence[str], apps: Collection[str] | None = None) -> Sequence[Receipt | None]:
        """One entry an id, in order; None where no such notification was ever taken for these apps (None: for any).

        Where an id is none of ours, it may be one that a caller brought: the receipt, which has our id and theirs as
        its `apns_id`, is that of the last such notification for these apps.
        """
        ...

    async def keep(
        self,
        finished: Sequence[tuple[Batch, Outcomes]],
        removals: Sequence[Removal] = (),
        quarantines: Sequence[Quarantine] = (),
    ) -> None:
        """Keep batches that never were in the queue, with what became of them; durable, in one transaction.

        A batch whose id is known already is left as it is. Raises StoreError, and ValueError as `Queue.put`.
        """
        ...

    async def find_removals(
        self, app: str, environment: Environment | None, after: int, limit: int, token: bytes | None = None
    ) -> Sequence[Listed]:
        """The app's removals with numbers above `after`, lowest first; those that lapsed or were revived are gone.

        `token`: only of this device token (lower-case hex).
        """
        ...

    async def told_until(self, app: str, environment: Environment) -> int:
        """The number up to which the app's removals were told by the feedback service; 0 before the first time."""
        ...

    async def tell_until(self, app: str, environment: Environment, number: int) -> None:
        """They are told up to this number now; a lower one than before changes nothing."""
        ...

    async def revive(self, app: str, environment: Environment, tokens: Collection[bytes], at: float) -> int:
        """These device tokens (lower-case hex) were registered at `at` (UNIX seconds): how many were held back so far.

        Ends removals that are not newer, those too that come to be known later, and the quarantines of now.
        """
        ...

    async def held_among(self, app: str, environment: Environment, tokens: Collection[bytes]) -> dict[bytes, str]:
        """Which of these device tokens (lower-case hex) are not to be sent to, and why, as Apple said it.

        `Unregistered` for the dead, `BadDeviceToken` for those in quarantine.
        """
        ...

    async def find_buried(self, apps: Collection[str] | None, before: str | None, limit: int) -> Sequence[Receipt]:
        """What was given up on, newest first: of these apps or of all, and before the one with the id `before`."""
        ...

    async def replay(self, ids: Sequence[str]) -> Sequence[str]:
        """Have buried notifications sent again, under the same ids; which of these that are. Durable on return.

        Those in a batch that is leased at the moment are left alone: ask again.
        """
        ...

    async def find_notifications(self, wanted: Filter, before: str | None, limit: int) -> Page:
        """Up to `limit` of those that fit, newest first: those taken before the one with the id `before`.

        A page may have fewer, even none, and still a `next`: what there is to look through at once is bounded.
        Raises ValueError if `before` is no id.
        """
        ...

    async def cancel(self, ids: Sequence[str]) -> Sequence[str]:
        """Have these not sent any more; which of them that are. Durable on return.

        They are cancelled, or unknown where nobody knows whether Apple took it when it was last tried. Those that are
        sent or ended are left alone, and so are those in a batch that is leased at the moment.
        """
        ...

    async def find_once(self, key: bytes) -> Once | None:
        """What was put once under this key, within the time for which that is kept."""
        ...

    async def purge(self, before: float) -> int:
        """Forget finished batches made before `before` (UNIX seconds), and what has lapsed since; how many batches.

        Works in small steps that let others through.
        """
        ...

    async def depths(self) -> Sequence[Depth]:
        """What waits, by lane; of what comes and goes meanwhile, some. Works in small steps that let others through."""
        ...

    async def probe(self) -> None:
        """Write a little, durably, and read. Raises StoreError where either fails."""
        ...

    async def save_app(self, name: str, record: bytes) -> None:
        """Keep an app's record, in place of a former one."""
        ...

    async def find_apps(self) -> dict[str, bytes]:
        """All apps' records."""
        ...

    async def delete_app(self, name: str) -> bool:
        """Whether there was one."""
        ...

    async def save_caller(self, caller: KnownCaller) -> None:
        """Keep who may come with a certificate or a signing key of its own, in place of a former one with this id."""
        ...

    async def find_callers(self) -> Sequence[KnownCaller]:
        """All of them, oldest first."""
        ...

    async def delete_caller(self, id: str) -> bool:
        """Whether there was one."""
        ...

    async def save_key(self, key: ApiKey) -> None:
        """Keep an API key."""
        ...

    async def find_keys(self) -> Sequence[ApiKey]:
        """All API keys, oldest first."""
        ...

    async def delete_key(self, id: str) -> bool:
        """Whether there was one."""
        ...
