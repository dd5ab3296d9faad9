"""Assembles the ASGI app: the API, /healthz, /metrics.

Paths are told apart by hand: there are few, and a router would cost a tenth of what the rest of the API does.
"""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.types import ASGIApp, Receive, Scope, Send

from heliograph.doors.api import Api
from heliograph.doors.exchange import Answer, Exchange, Problem


def make_app(door: Api, metrics: CollectorRegistry) -> ASGIApp:
    """The whole HTTP side as one ASGI app. Who serves it speaks plain HTTP to it: no WebSocket, no lifespan."""

    def healthz() -> Answer:
        return Answer(200, b'{"status":"ok"}')

    def show_metrics() -> Answer:
        return Answer(200, generate_latest(metrics), content_type=CONTENT_TYPE_LATEST.encode())

    pages = {"/healthz": healthz, "/metrics": show_metrics}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        page = pages.get(exchange.path)
        if page is None:
            await door.serve(exchange)
        elif exchange.method in ("GET", "HEAD"):
            await exchange.answer(page())
        else:
            headers = ((b"allow", b"GET, HEAD"),)
            problem = Problem(405, "MethodNotAllowed", "This path takes GET, HEAD only.", headers=headers)
            await exchange.answer(problem.answer())

    return app
