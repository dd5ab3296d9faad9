"""What operators look at: whether pushes can go out, and the metrics.

What counts as failing and what as degraded is in docs/decisions/0019-what-healthy-means.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum

import msgspec
from msgspec import UNSET, Struct, UnsetType
from prometheus_client import CONTENT_TYPE_LATEST

from heliograph.doors.exchange import Answer
from heliograph.errors import StoreError
from heliograph.keys import Caller
from heliograph.model import App, ClientCertificate, Depth, Lane, LaneView
from heliograph.ports import Carrier, Store
from heliograph.relay import Relay
from heliograph.telemetry import Standing, Telemetry

RECENT_S = 120.0
"""What a lane met with longer ago says nothing of now, unless something waits."""

_STORE_RECENT_S = 30.0
"""For so long after a failed write the store counts as failing, unless another one did well."""
_FRESH_S = 1.0
"""Who asks more often is told the same."""
_STORE_S = 3.0
"""The store is to answer within this time."""

_encode = msgspec.json.encode


class Status(StrEnum):
    """The whole, in a word."""

    OK = "ok"
    DEGRADED = "degraded"
    """Pushes go out, but not all of them can, or something wants to be looked at."""
    FAILING = "failing"
    """A push that is given now does not reach Apple."""


class Reason(Struct, frozen=True, omit_defaults=True):
    """One thing that is not well."""

    about: str
    """`server`, `store` or `app`."""
    problem: str
    """What is not well."""
    advice: str
    """What to do."""
    app: str | None = None
    """Which app."""
    environment: str | None = None
    """In which environment."""
    waiting: int | None = None
    """Notifications that wait for it to be put right."""
    since: str | None = None
    """Since when, where that is known: RFC 3339, in UTC, as the next."""
    rests_until: str | None = None
    """Nothing is tried before."""


class LanesBody(Struct):
    """Apps, each in each of its environments, counted by how they are."""

    good: int
    """To these Apple gave an answer lately."""
    idle: int
    """Of these nothing is known, and nothing against them."""
    failing: int
    """From these nothing goes out."""


class HealthBody(Struct):
    """Whether pushes can go out."""

    status: Status
    """`ok`, `degraded` (some cannot) or `failing` (none can)."""
    lanes: LanesBody
    """How apps are."""
    problems: int
    """How many things are not well."""
    reasons: Sequence[Reason] | UnsetType = UNSET
    """With an API key: what is not well."""


class Health(Struct, frozen=True):
    """How the whole server is."""

    status: Status
    good: int
    """Lanes to which Apple gave an answer lately."""
    idle: int
    """Those of which nothing is known, and nothing against them."""
    failing: int
    reasons: Sequence[Reason]


class Seen(Struct, frozen=True):
    """What health is judged by. Times are UNIX seconds."""

    now: float
    apps: Mapping[str, App]
    lanes: Sequence[LaneView]
    depths: Sequence[Depth]
    room: int
    store_trouble: tuple[str, float | None] | None = None
    """Why the store cannot be used, and since when, where that is known."""
    stopping: bool = False


def judge(seen: Seen) -> Health:
    """Pure: the same is always judged alike."""
    reasons = list(_of_server(seen))
    good, idle, cut_off, on_its_own = 0, 0, 0, 0
    views: dict[Lane, list[LaneView]] = {}
    for view in seen.lanes:
        views.setdefault((view.app, view.environment), []).append(view)
    waiting = {(each.app, each.environment): each.waiting for each in seen.depths}
    for app in seen.apps.values():
        for environment in app.environments:
            lane = app.name, environment
            troubled = [view for view in views.get(lane, ()) if _is_in_trouble(view, waiting.get(lane, 0), seen.now)]
            ended = _ended(app, lane, seen.now)
            reasons += [_of_view(view, waiting.get(lane, 0)) for view in troubled]
            reasons += [_of_ended(lane, each, waiting.get(lane, 0)) for each in ended]
            if any(_is_good(view, seen.now) for view in views.get(lane, ())):
                good += 1
            elif ended and len(ended) == sum(environment in each.environments for each in app.access):
                on_its_own += 1  # Apple ends the connection of such a certificate, which looks like the network
            elif any(not view.own for view in troubled):
                cut_off += 1
            elif troubled:
                on_its_own += 1
            else:
                idle += 1
    for depth in seen.depths:
        app_there = seen.apps.get(depth.app)
        if depth.waiting and (app_there is None or depth.environment not in app_there.environments):
            on_its_own += 1
            reasons.append(_of_nobody(depth))
    failing = (
        seen.stopping
        or seen.store_trouble is not None
        or seen.room <= 0
        or (cut_off > 0 and not good)
        or (on_its_own > 0 and not good and not idle)
    )
    status = Status.FAILING if failing else Status.DEGRADED if reasons else Status.OK
    return Health(status, good, idle, cut_off + on_its_own, reasons)


def _of_server(seen: Seen) -> Sequence[Reason]:
    reasons = []
    if seen.stopping:
        text = "what waits is kept for the next start; ask another server, or wait for that"
        reasons.append(Reason("server", "The server is stopping.", text))
    if not seen.apps:
        text = "add an [apps.NAME] to the configuration, or an app by the API or with heliograph app add"
        reasons.append(Reason("server", "There are no apps, so every notification is refused.", text))
    if seen.store_trouble is not None:
        why, since = seen.store_trouble
        text = "nothing is taken or sent until it works again, which needs no restart; what Apple answered is kept"
        reasons.append(Reason("store", why, text, since=_iso(since)))
    if seen.room <= 0:
        text = "see what keeps those that wait from leaving, send less, or set store.max_waiting higher"
        reasons.append(Reason("store", "As many notifications wait as are kept: new ones are refused.", text))
    return reasons


def _is_good(view: LaneView, now: float) -> bool:
    return view.trouble is None and view.answered_at is not None and now - view.answered_at <= RECENT_S


def _is_in_trouble(view: LaneView, waiting: int, now: float) -> bool:
    if view.trouble is None:
        return False
    # Between two tries may be several minutes: what waits for the next one says that the trouble is not over.
    return waiting + view.waiting > 0 or (view.failed_at is not None and now - view.failed_at <= RECENT_S)


def _ended(app: App, lane: Lane, now: float) -> list[ClientCertificate]:
    shown = (access.credentials for access in app.access if lane[1] in access.environments)
    return [each for each in shown if isinstance(each, ClientCertificate) and each.not_after <= now]


def _of_view(view: LaneView, waiting: int) -> Reason:
    problem = f"{view.trouble} ({view.credentials})" if view.own else view.trouble or ""
    return Reason(
        "app",
        problem,
        view.advice,
        view.app,
        view.environment.value,
        waiting + view.waiting,
        _iso(view.since),
        _iso(view.rests_until),
    )


def _of_ended(lane: Lane, certificate: ClientCertificate, waiting: int) -> Reason:
    problem = f"The certificate {certificate.name} has ended: Apple takes nothing with it."
    text = "make a new one in the developer account, and put it in its place: no restart is needed"
    return Reason("app", problem, text, lane[0], lane[1].value, waiting, _iso(certificate.not_after))


def _of_nobody(depth: Depth) -> Reason:
    return Reason(
        "app",
        "There are no credentials for what waits for this app in this environment.",
        "put the app back, by the configuration or by the API; what waits is sent then, and buried after a day",
        depth.app,
        depth.environment.value,
        depth.waiting,
    )


def _iso(moment: float | None) -> str | None:
    if moment is None:
        return None
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


class Operations:
    """Answers at /healthz and /metrics."""

    def __init__(
        self,
        relay: Relay,
        store: Store,
        carrier: Carrier,
        apps: Mapping[str, App],
        telemetry: Telemetry,
        *,
        clock: Callable[[], float],
    ) -> None:
        """`apps` may change; `clock` gives UNIX seconds."""
        self._relay = relay
        self._store = store
        self._carrier = carrier
        self._apps = apps
        self.telemetry = telemetry
        self._clock = clock
        self.stopping = False
        """Set this once the server takes nothing more."""
        self._looking: asyncio.Task[Seen] | None = None
        self._looked_at = 0.0
        self._counting: asyncio.Task[Sequence[Depth] | None] | None = None

    async def healthz(self, caller: Caller | None) -> Answer:
        """200 when pushes can go out, 503 when not; why, for callers with an API key: of their own apps."""
        seen = await self._seen()
        health = judge(msgspec.structs.replace(seen, stopping=self.stopping))
        lanes = LanesBody(health.good, health.idle, health.failing)
        body = HealthBody(health.status, lanes, len(health.reasons))
        if caller is not None:
            body.reasons = [each for each in health.reasons if each.app is None or caller.may_use(each.app)]
        status = 503 if health.status is Status.FAILING else 200
        return Answer(status, _encode(body), ((b"cache-control", b"no-store"),))

    async def metrics(self) -> Answer:
        """All metrics. They are put together in another thread, as there may be thousands."""
        if self._counting is None or self._counting.done():
            self._counting = asyncio.create_task(self._count())
        depths = await asyncio.shield(self._counting)
        standing = Standing(self._carrier.lanes(), depths, self._relay.room, self._relay.unrecorded)
        page = await asyncio.to_thread(self.telemetry.page, standing)
        return Answer(200, page, content_type=CONTENT_TYPE_LATEST.encode())

    async def _count(self) -> Sequence[Depth] | None:
        """What waits; None where the store does not say. It walks through all of it: who asks meanwhile shares it."""
        try:
            async with asyncio.timeout(_STORE_S):
                return await self._store.depths()
        except (StoreError, TimeoutError):
            return None

    async def _seen(self) -> Seen:
        """As it is now, or was within the last second: whoever asks shares one look."""
        now = asyncio.get_running_loop().time()
        if self._looking is None or (self._looking.done() and now > self._looked_at + _FRESH_S):
            self._looked_at = now
            self._looking = asyncio.create_task(self._look())
        return await asyncio.shield(self._looking)

    async def _look(self) -> Seen:
        trouble: tuple[str, float | None] | None = None
        depths: Sequence[Depth] = ()
        try:
            async with asyncio.timeout(_STORE_S):
                await self._store.probe()
                depths = await self._store.depths()
        except TimeoutError:
            trouble = f"The store has not answered within {_STORE_S:.0f} s: see whether the disk is overloaded.", None
        except StoreError as error:
            trouble = str(error), None
        now, failure = self._clock(), self._relay.store_failure
        if failure is not None and (trouble is not None or now - failure.seen_at <= _STORE_RECENT_S):
            trouble = failure.why, failure.since
        return Seen(now, self._apps, self._carrier.lanes(), depths, self._relay.room, trouble)
