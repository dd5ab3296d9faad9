"""The three interfaces of heliograph: Store, Queue, Carrier.

Structs of `model` cross them, never rows, frames or sockets. No transaction crosses them either: the order of calls
and their repeatability do the work of one (see `relay`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from heliograph.model import Batch, Environment, Lease, LeaseEnd, Outcome, Outcomes, Receipt, Removal

Report = Callable[[Sequence[int], Outcome], None]
"""Called by a carrier with a group of indices of one batch that share an outcome, on the event loop's thread."""


class Carrier(Protocol):
    """What takes notifications out of the house."""

    def carry(self, batch: Batch, indices: Sequence[int], report: Report) -> None:
        """Take these on and return at once. Every index is reported exactly once, in groups, as answers come."""
        ...

    async def ready(self) -> int:
        """Wait until more would be taken without piling up; how many notifications that is."""
        ...

    async def aclose(self) -> None:
        """Take nothing more, let what is in flight end within its deadlines, report the rest as not processed."""
        ...


class Queue(Protocol):
    """Batches that are to be sent."""

    async def put(self, batches: Sequence[Batch]) -> None:
        """Durable on return, all or nothing. A batch whose id is known already is left as it is.

        Raises Overloaded, StoreError.
        """
        ...

    async def take(self, limit: int) -> Sequence[Lease]:
        """Wait until at least one batch is due, then lease up to `limit` batches, oldest due first.

        A lease ends by itself if it is not finished in time; the next one has a higher `attempt`.
        """
        ...

    async def finish(self, ends: Sequence[LeaseEnd]) -> None:
        """End leases. An end whose `attempt` is not the batch's newest changes nothing."""
        ...

    async def aclose(self) -> None: ...


class Store(Protocol):
    """What is known: outcomes, removals."""

    async def record(self, outcomes: Sequence[Outcomes], removals: Sequence[Removal]) -> None:
        """Record both durably, in one transaction. Recording the same again changes nothing."""
        ...

    async def find_receipts(self, ids: Sequence[str]) -> Sequence[Receipt | None]:
        """One entry an id, in order; None where no such notification was ever taken."""
        ...

    async def removed_among(self, app: str, environment: Environment, tokens: Collection[bytes]) -> set[bytes]:
        """Which of these device tokens (lower-case hex) are known to be dead."""
        ...
