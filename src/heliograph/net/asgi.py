"""Serves an ASGI app over HTTP/1.1 as one task among others."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from heliograph.net.http1 import Protocol

_SPARE_FILES = 200
"""Open files that callers may not take up: those of the store, and connections to Apple."""


class Server(uvicorn.Server):
    """uvicorn that leaves signals alone, and tells when it takes requests. `should_exit = True` ends it."""

    def __init__(self, app: ASGIApp, *, answering_s: int) -> None:
        """`answering_s`: how long requests in hand may take when it ends."""
        super().__init__(
            uvicorn.Config(
                cast("Any", app),  # starlette and uvicorn type ASGI in different words
                loop="none",
                http=Protocol,
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                log_level="warning",
                server_header=False,
                proxy_headers=False,
                limit_concurrency=_most_connections(),
                timeout_graceful_shutdown=answering_s,
            )
        )
        self.ready = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if counter % 10 == 0:
            now = asyncio.get_running_loop().time()
            for connection in list(self.server_state.connections):
                cast("Protocol", connection).look(now)
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


def _most_connections() -> int | None:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if files == resource.RLIM_INFINITY else max(files - _SPARE_FILES, files // 2)


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, listening: socket.socket, *, answering_s: int) -> AsyncIterator[None]:
    """Serve for as long as the block runs, on a socket that listens already."""
    server = Server(app, answering_s=answering_s)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(server.serve([listening]))
        await server.ready.wait()
        try:
            yield
        finally:
            server.should_exit = True
            await asyncio.wait([task])
