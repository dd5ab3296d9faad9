"""Assembles the ASGI app: the API, and beside it /healthz, /livez, /metrics and the documentation, which need no key.

Paths are told apart by hand: there are few, and a router would cost a tenth of what the rest of the API does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from heliograph.doors.api import Api
from heliograph.doors.exchange import Answer, Exchange, Problem
from heliograph.doors.operations import Operations


def make_app(door: Api, operations: Operations) -> ASGIApp:
    """The whole HTTP side as one ASGI app. Who serves it speaks plain HTTP to it: no WebSocket, no lifespan."""

    async def healthz(exchange: Exchange) -> Answer:
        return await operations.healthz(door.identify(exchange))

    async def livez(_: Exchange) -> Answer:
        return Answer(200, b'{"status":"ok"}')

    async def metrics(_: Exchange) -> Answer:
        return await operations.metrics()

    async def front(exchange: Exchange) -> Answer:
        from heliograph.doors import pages

        return pages.front(exchange.headers.get(b"accept", b""))

    async def document(exchange: Exchange) -> Answer:
        return await asyncio.to_thread(_document, exchange.path)

    pages: dict[str, Callable[[Exchange], Awaitable[Answer]]] = {
        "/healthz": healthz,
        "/livez": livez,
        "/metrics": metrics,
        "/": front,
        **dict.fromkeys(("/docs", "/docs/errors", "/openapi.json"), document),
    }
    requested = operations.telemetry.requested

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        page = pages.get(exchange.path)
        if page is None:
            try:
                await door.serve(exchange)
            finally:
                if exchange.answered is not None:  # else its caller hung up first
                    requested(exchange.answered.status, exchange.answered.code)
        elif exchange.method in ("GET", "HEAD"):
            await exchange.answer(await page(exchange))
        else:
            headers = ((b"allow", b"GET, HEAD"),)
            problem = Problem(405, "MethodNotAllowed", "This path takes GET, HEAD only.", headers=headers)
            await exchange.answer(problem.answer())

    return app


def _document(path: str) -> Answer:
    # Nobody who starts a server should wait for what few ask it for.
    from heliograph.doors import pages

    return pages.page(path)
