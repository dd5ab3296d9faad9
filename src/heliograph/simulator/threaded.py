"""A simulator in a thread of its own, for tests and programs that run no event loop, or another one.

    with ThreadedSimulator() as apple:
        push_with_whatever_you_have(apple.host, apple.port, apple.ca_file, apple.key_file, apple.key_id, apple.team_id)
        (received,) = apple.wait_for(1)

Every method may be called from any thread, and has had its effect when it returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from heliograph.model import Environment
from heliograph.protocols.provider_token import mint
from heliograph.simulator.apple import KEEP, Received
from heliograph.simulator.devices import Gone
from heliograph.simulator.legacy import Legacy
from heliograph.simulator.server import Simulator, open_private

P = ParamSpec("P")
R = TypeVar("R")

_NOT_THERE = "The simulator does not listen (any more): use it inside its `with` block"

_LOOK_S = 0.005
"""Between two looks at what was received."""


def _in_its_thread(
    method: Callable[Concatenate[Simulator, P], R],
) -> Callable[Concatenate[ThreadedSimulator, P], R]:
    @wraps(method)
    def call(self: ThreadedSimulator, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.ask(lambda apple: method(apple, *args, **kwargs))

    return call


class ThreadedSimulator:
    """A `Simulator` that listens on loopback, from `with` on."""

    def __init__(
        self,
        environment: Environment = Environment.PRODUCTION,
        *,
        strict: bool = False,
        port: int = 0,
        legacy: Legacy | None = None,
    ) -> None:
        """See `Simulator`; the binary gateway is there in any case.

        Raises ConfigError where a port is taken, from `with`.
        """
        self._simulator = Simulator(environment, strict=strict, port=port, legacy=legacy or Legacy())
        self._thread = threading.Thread(target=self._run, name="heliograph simulator", daemon=True)
        self._started: Future[asyncio.AbstractEventLoop] = Future()
        self._over = False
        self._asked: set[Future[Any]] = set()
        """What callers wait for."""
        self._stop = asyncio.Event()
        self._folder = TemporaryDirectory(prefix="heliograph-simulator-")

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._started.result()
        except BaseException:
            self._thread.join()
            self._folder.cleanup()
            raise
        for path, content in ((self.ca_file, self.ca_pem), (self.key_file, self._simulator.signing_key.pem)):
            self._write(path, content)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._folder.cleanup()

    def _write(self, path: Path, content: bytes) -> None:
        file = open_private(path, os.O_TRUNC)
        os.write(file, content)
        os.close(file)

    # -- what a client has to know -------------------------------------------------------------------------------

    @property
    def host(self) -> str:
        return self._simulator.host

    @property
    def port(self) -> int:
        return self._simulator.port

    @property
    def legacy_port(self) -> int:
        """Of the binary gateway, for clients of old."""
        port = self._simulator.legacy_port
        assert port is not None
        return port

    @property
    def feedback_port(self) -> int:
        """Of the feedback service."""
        port = self._simulator.feedback_port
        assert port is not None
        return port

    @property
    def url(self) -> str:
        """`https://127.0.0.1:PORT`; a push goes to `/3/device/TOKEN` there."""
        return self._simulator.url

    @property
    def ca_pem(self) -> bytes:
        """The authority to trust."""
        return self._simulator.ca_pem

    @property
    def ca_file(self) -> Path:
        """The same as a file."""
        return Path(self._folder.name) / "ca.pem"

    @property
    def key_file(self) -> Path:
        """The signing key as Apple hands it out, a .p8 file."""
        return Path(self._folder.name) / f"AuthKey_{self.key_id}.p8"

    @property
    def client_file(self) -> Path:
        """A client certificate and its key, for clients of the binary gateway that cannot start without one."""
        path = Path(self._folder.name) / "client.pem"
        if not path.exists():
            self._write(path, self._simulator.client_pem)
        return path

    @property
    def key_id(self) -> str:
        return self._simulator.signing_key.key_id

    @property
    def team_id(self) -> str:
        return self._simulator.signing_key.team_id

    @property
    def environment(self) -> Environment:
        return self._simulator.environment

    @property
    def strict(self) -> bool:
        """Whether only registered devices exist."""
        return self._simulator.strict

    def provider_token(self) -> str:
        """A provider token that is good for half an hour at least: what follows `authorization: bearer`."""
        return mint(self._simulator.signing_key, time.time())

    # -- what came -----------------------------------------------------------------------------------------------

    @property
    def received(self) -> list[Received]:
        """The notifications that were accepted last, oldest first."""
        return self.ask(lambda apple: apple.received)

    @property
    def connections(self) -> int:
        """How many there have been."""
        return self.ask(lambda apple: apple.connections)

    def wait_for(self, count: int = 1, timeout_s: float = 5.0) -> list[Received]:
        """What was received, as soon as it is so many notifications.

        It blocks: where the code under test runs in this thread's event loop, `await` `wait_for_async` instead.
        Raises TimeoutError where there are not so many in time.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._start_waiting(count, timeout_s).result()
        raise RuntimeError("wait_for would stop this event loop: write `await apple.wait_for_async(...)`")

    async def wait_for_async(self, count: int = 1, timeout_s: float = 5.0) -> list[Received]:
        """As `wait_for`, for tests that are coroutines of asyncio."""
        return await asyncio.wrap_future(self._start_waiting(count, timeout_s))

    def _start_waiting(self, count: int, timeout_s: float) -> Future[list[Received]]:
        loop = self._loop
        return self._promised(asyncio.run_coroutine_threadsafe(self._wait(count, timeout_s), loop))

    async def _wait(self, count: int, timeout_s: float) -> list[Received]:
        if count > KEEP:
            raise ValueError(f"Only the last {KEEP} notifications are kept: wait for that many at most")
        until = self._loop.time() + timeout_s
        while len(received := self._simulator.received) < count:
            if self._loop.time() >= until:
                raise TimeoutError(f"{len(received)} of {count} notifications were received within {timeout_s:g} s")
            # What is accepted for a device without a network is told to nobody who follows.
            await asyncio.sleep(_LOOK_S)
        return received

    # -- what there is, and how it misbehaves: as `Apple` and `Faults` have it ------------------------------------

    shown = _in_its_thread(Simulator.shown)
    devices = _in_its_thread(Simulator.devices)
    register = _in_its_thread(Simulator.register)
    go_offline = _in_its_thread(Simulator.go_offline)
    add_key = _in_its_thread(Simulator.add_key)
    add_app = _in_its_thread(Simulator.add_app)
    clear_received = _in_its_thread(Simulator.clear_received)
    misbehaves = _in_its_thread(Simulator.misbehaves)
    behaves = _in_its_thread(Simulator.behaves)
    rejects = _in_its_thread(Simulator.rejects)
    delays = _in_its_thread(Simulator.delays)
    withholds = _in_its_thread(Simulator.withholds)
    resets = _in_its_thread(Simulator.resets)
    hangs_up_after = _in_its_thread(Simulator.hangs_up_after)
    says_goodbye = _in_its_thread(Simulator.says_goodbye)
    add_rule = _in_its_thread(Simulator.add_rule)
    remove_rule = _in_its_thread(Simulator.remove_rule)
    rules = _in_its_thread(Simulator.rules)
    reset = _in_its_thread(Simulator.reset)
    forget_feedback = _in_its_thread(Simulator.forget_feedback)

    @property
    def feedback(self) -> list[Gone]:
        """What the feedback service would list now."""
        return self.ask(lambda apple: apple.feedback)

    def add_feedback(self, tokens: Iterable[str], at: int | None = None) -> None:
        """As `Simulator.add_feedback`; where no `at` is given, they are gone from now on."""
        seconds = int(time.time()) if at is None else at
        self.ask(lambda apple: apple.add_feedback(tokens, seconds))

    def unregister(self, token: str, since: int | None = None) -> None:
        """As `Simulator.unregister`; where no `since` is given, the app is gone from now on."""
        at = int(time.time() * 1000) if since is None else since
        self.ask(lambda apple: apple.unregister(token, at))

    def come_online(self, token: str) -> None:
        """The device has a network again, and shows what waited for it."""
        self.ask(lambda apple: apple.come_online(token, time.time()))

    def ask(self, what: Callable[[Simulator], R]) -> R:
        """Have something done in the simulator's thread, and wait for it. Raises RuntimeError where that has ended."""
        done: Future[R] = Future()

        def do() -> None:
            try:
                done.set_result(what(self._simulator))
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the caller's
                done.set_exception(error)

        self._loop.call_soon_threadsafe(do)
        return self._promised(done).result()

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """Raises RuntimeError where the simulator does not listen."""
        if self._over or not self._started.done():
            raise RuntimeError(_NOT_THERE)
        return self._started.result()

    def _promised(self, what: Future[R]) -> Future[R]:
        """It comes to an end even if the loop does before it has come to it."""
        self._asked.add(what)
        what.add_done_callback(self._asked.discard)
        if self._over:
            self._break_promises()
        return what

    def _break_promises(self) -> None:
        for what in tuple(self._asked):
            with contextlib.suppress(InvalidStateError):  # it is done meanwhile
                what.set_exception(RuntimeError(_NOT_THERE))

    # -- its thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:  # noqa: BLE001 - told to who started it
            self._started.set_exception(error)
        finally:
            self._over = True
            self._break_promises()

    async def _serve(self) -> None:
        async with self._simulator:
            self._started.set_result(asyncio.get_running_loop())
            await self._stop.wait()
