"""Assembles the ASGI app: the API, /healthz, /metrics."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from heliograph.doors import api


def make_app(door: api.Api, metrics: CollectorRegistry) -> ASGIApp:
    """The whole HTTP side as one ASGI app."""

    async def healthz(_: Request) -> Response:
        return Response(b'{"status":"ok"}', media_type="application/json")

    async def show_metrics(_: Request) -> Response:
        return Response(generate_latest(metrics), headers={"content-type": CONTENT_TYPE_LATEST})

    routes = [*door.routes, Route("/healthz", healthz), Route("/metrics", show_metrics)]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_problem, Exception: _our_fault})
    # A redirect would lose the body of a POST in many clients.
    app.router.redirect_slashes = False
    return app


async def _http_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        text = f"There is nothing at {request.url.path}. Notifications go to POST {api.PATH}."
        return api.problem_response(404, "NotFound", text)
    headers = error.headers or {}
    text = f"This path takes {headers.get('Allow', 'another method')} only."
    return api.problem_response(error.status_code, "MethodNotAllowed", text, headers)


async def _our_fault(_: Request, __: Exception) -> Response:
    return api.problem_response(500, "InternalError", "Something failed here; the server's log says what.")
