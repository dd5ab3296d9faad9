"""The simulator's control API: devices, what they show, faults, keys and apps, over plain HTTP with JSON.

It is for tests in any language and for people with curl, beside the port that plays Apple. Problems are told as
problem+json (RFC 9457), in sentences that say what to change. Nothing guards it: it listens where the simulator does,
which is loopback unless somebody wants it otherwise, and the only secret that it gives away is the simulator's own key.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from heliograph.complaints import closest, shown
from heliograph.errors import ConfigError, Refused
from heliograph.model import Environment, SigningKey
from heliograph.net.asgi import serving
from heliograph.protocols import apns
from heliograph.protocols.provider_token import check_ids, mint
from heliograph.simulator.devices import KEEP, Device, Shown
from heliograph.simulator.faults import Rule
from heliograph.simulator.reading import add_rules, parse_json, read, read_rules
from heliograph.simulator.reception import cannot_listen
from heliograph.simulator.server import Simulator, reached_at
from heliograph.simulator.watching import as_json, told

MAX_BODY_BYTES = 1024 * 1024
"""Octets of a request's body, at most."""

_LINES = "application/x-ndjson"
_ANSWERING_S = 1
_DIGITS = 18
"""No number of ours has more."""

B = TypeVar("B", bound=Struct)
Handler = Callable[[Request], Awaitable[Response]]

_encode = msgspec.json.encode


class Problem(Exception):
    """An answer that says what is wrong, and what to change."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class _Body(Struct, forbid_unknown_fields=True):
    """Null is the same as nothing."""


class _Register(_Body):
    topic: str | None = None
    environment: Environment | None = None


class _Uninstall(_Body):
    since: Annotated[int, Meta(ge=0, lt=1 << 53)] | None = None


class _Key(_Body):
    key: str
    key_id: str
    team_id: str | None = None
    environment: Environment | None = None
    topics: list[str] | None = None
    related: str | None = None

    def __repr__(self) -> str:
        return "<a key that somebody added>"


class _App(_Body):
    bundle_id: str
    team_id: str | None = None


class _Feedback(_Body):
    tokens: list[str] = []
    count: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    at: Annotated[int, Meta(ge=0, lt=1 << 32)] | None = None

    def __repr__(self) -> str:
        return f"<{len(self.tokens)} device tokens that are gone>"


@contextlib.asynccontextmanager
async def controlled(simulator: Simulator, port: int = 0) -> AsyncIterator[Control]:
    """The control API of a simulator that listens, for as long as the block runs.

    Port 0 is any free one. Raises ConfigError where the port cannot be used.
    """
    family = socket.AF_INET6 if ":" in simulator.host else socket.AF_INET
    try:
        listening = socket.create_server((simulator.host, port), family=family)
    except OSError as error:
        raise cannot_listen("The control API", simulator.host, port, error) from None
    address, port = listening.getsockname()[:2]
    host = reached_at(address)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    with contextlib.closing(listening), contextlib.closing(Control(simulator, url)) as control:
        async with serving(control.app, listening, answering_s=_ANSWERING_S):
            try:
                yield control
            finally:
                control.close()


class Control:
    """The API as an ASGI app."""

    def __init__(self, simulator: Simulator, url: str) -> None:
        self.url = url
        """Where it is reached."""
        self._apple = simulator
        self._history: deque[tuple[int, Shown]] = deque(maxlen=KEEP)
        """What was shown, with its number."""
        self._number = 0
        self._news = asyncio.Event()
        self._closing = False
        self._unfollow = simulator.follow(self._on_shown)
        routes: dict[str, dict[str, Handler]] = {
            "/": {"GET": self._describe},
            "/ca.pem": {"GET": self._ca},
            "/AuthKey.p8": {"GET": self._signing_key},
            "/client.pem": {"GET": self._client},
            "/provider-token": {"GET": self._provider_token},
            "/devices": {"GET": self._devices},
            "/devices/{token}": {"GET": self._device, "PUT": self._register, "DELETE": self._uninstall},
            "/devices/{token}/offline": {"POST": self._go_offline},
            "/devices/{token}/online": {"POST": self._come_online},
            "/devices/{token}/shown": {"GET": self._shown_by},
            "/shown": {"GET": self._shown},
            "/shown/follow": {"GET": self._follow},
            "/feedback": {"GET": self._feedback, "POST": self._add_feedback, "DELETE": self._forget_feedback},
            "/rules": {"GET": self._rules, "POST": self._add_rules, "DELETE": self._remove_rules},
            "/rules/{id}": {"GET": self._rule, "DELETE": self._remove_rule},
            "/keys": {"GET": self._keys, "POST": self._add_key},
            "/apps": {"GET": self._apps, "POST": self._add_app},
            "/reset": {"POST": self._reset},
        }
        self._paths = tuple(routes)
        app = Starlette(
            routes=[_route(path, methods) for path, methods in routes.items()],
            exception_handlers={
                **dict.fromkeys((Problem, ConfigError, Refused), _on_error),
                ClientDisconnect: _on_hang_up,
                HTTPException: self._on_http_exception,
            },
        )
        app.router.redirect_slashes = False  # people with curl would see nothing at all
        self.app: ASGIApp = app

    def close(self) -> None:
        """Let go of the simulator; streams of what is shown end."""
        self._closing = True
        self._unfollow()
        self._wake()

    def follow(self, follower: Callable[[int, Shown], None]) -> Callable[[], None]:
        """Have `follower` called with all that is shown from now on, and its number; call what this gives to end it."""
        # Who follows is told in turn, and we came first: by then it is counted.
        return self._apple.follow(lambda new: follower(self._number, new))

    # -- what it is ----------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, object]:
        """What a client has to know, and what there is to ask for."""
        apple = self._apple
        return {
            "what": "a simulator of Apple Push Notification service",
            "url": apple.url,
            "host": reached_at(apple.host),
            "port": apple.port,
            "control": self.url,
            "environment": apple.environment,
            "strict": apple.strict,
            "key_id": apple.signing_key.key_id,
            "team_id": apple.signing_key.team_id,
            "legacy_port": apple.legacy_port,
            "feedback_port": apple.feedback_port,
            "topic": apple.topic,
            "connections": apple.connections,
            "shown": self._number,
            "paths": self._paths,
        }

    async def _describe(self, _: Request) -> Response:
        return _json(self.describe())

    async def _ca(self, _: Request) -> Response:
        return Response(self._apple.ca_pem, media_type="application/x-pem-file")

    async def _signing_key(self, _: Request) -> Response:
        name = f'attachment; filename="AuthKey_{self._apple.signing_key.key_id}.p8"'
        return Response(
            self._apple.signing_key.pem,
            media_type="application/x-pem-file",
            headers={"content-disposition": name, "cache-control": "no-store"},
        )

    async def _client(self, _: Request) -> Response:
        headers = {"content-disposition": 'attachment; filename="client.pem"', "cache-control": "no-store"}
        return Response(self._apple.client_pem, media_type="application/x-pem-file", headers=headers)

    async def _provider_token(self, _: Request) -> Response:
        token = mint(self._apple.signing_key, time.time())
        return Response(token, media_type="text/plain", headers={"cache-control": "no-store"})

    # -- devices -------------------------------------------------------------------------------------------------

    async def _devices(self, _: Request) -> Response:
        return _json({"devices": [_told_device(each) for each in self._apple.devices()]})

    async def _device(self, request: Request) -> Response:
        return self._show(_token(request))

    async def _register(self, request: Request) -> Response:
        token, body = _token(request), await _read(request, _Register)
        self._apple.register(token, topic=body.topic, environment=body.environment)
        return self._show(token)

    async def _uninstall(self, request: Request) -> Response:
        token, body = _token(request), await _read(request, _Uninstall)
        self._apple.unregister(token, int(time.time() * 1000) if body.since is None else body.since)
        return self._show(token)

    async def _go_offline(self, request: Request) -> Response:
        token = _token(request)
        self._apple.go_offline(token)
        return self._show(token)

    async def _come_online(self, request: Request) -> Response:
        token = _token(request)
        self._apple.come_online(token, time.time())
        return self._show(token)

    def _show(self, token: str) -> Response:
        for device in self._apple.devices():
            if device.token == token:
                return _json(_told_device(device))
        raise Problem(404, "Nothing is known of this device: register it with PUT, or push to it first")

    # -- what they show ------------------------------------------------------------------------------------------

    async def _shown(self, request: Request) -> Response:
        query = _query(request, "after", "token")
        lines = [as_json(each, number) for number, each in self._since(_after(query, 0), _wanted(query))]
        return _json({"shown": [Raw(line) for line in lines], "last": self._number})

    async def _shown_by(self, request: Request) -> Response:
        """As it looks now: what was replaced is not there any more."""
        now = self._apple.shown(_token(request))
        return _json({"shown": [{"at": each.at, **told(each.received)} for each in now]})

    async def _follow(self, request: Request) -> Response:
        query = _query(request, "after", "token")
        lines = self._follow_from(_after(query, self._number), _wanted(query))
        if request.method == "HEAD":
            return Response(media_type=_LINES)
        return StreamingResponse(lines, media_type=_LINES, headers={"cache-control": "no-store"})

    async def _follow_from(self, after: int, token: str | None) -> AsyncIterator[bytes]:
        while not self._closing:
            news, last = self._news, self._number
            for number, each in self._since(after, token):
                yield as_json(each, number) + b"\n"
            after = last
            await news.wait()

    def _since(self, after: int, token: str | None) -> list[tuple[int, Shown]]:
        wanted = None if token is None else token.lower()
        return [
            (number, each) for number, each in self._history if number > after and wanted in (None, each.received.token)
        ]

    def _on_shown(self, new: Shown) -> None:
        self._number += 1
        self._history.append((self._number, new))
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    # -- the feedback service ------------------------------------------------------------------------------------

    async def _feedback(self, _: Request) -> Response:
        return _json({"feedback": [{"token": str(each.token), "at": each.at} for each in self._apple.feedback]})

    async def _add_feedback(self, request: Request) -> Response:
        body = await _read(request, _Feedback)
        made_up = (f"{number:064x}" for number in range(1, body.count + 1))
        self._apple.add_feedback([*body.tokens, *made_up], int(time.time()) if body.at is None else body.at)
        return _json({"listed": len(self._apple.feedback)}, 201)

    async def _forget_feedback(self, _: Request) -> Response:
        removed = len(self._apple.feedback)
        self._apple.forget_feedback()
        return _json({"removed": removed})

    # -- faults --------------------------------------------------------------------------------------------------

    async def _rules(self, _: Request) -> Response:
        return _json({"rules": [_told_rule(number, rule) for number, rule in self._apple.rules().items()]})

    async def _rule(self, request: Request) -> Response:
        number = _rule_number(request)
        rule = self._apple.rules().get(number)
        if rule is None:
            raise _no_rule(number)
        return _json(_told_rule(number, rule))

    async def _add_rules(self, request: Request) -> Response:
        """One rule, or several: then all are added or none."""
        document = parse_json(await _octets(request))
        rules = read_rules(document)
        numbers = add_rules(self._apple, rules)
        added = [_told_rule(number, rule) for number, rule in zip(numbers, rules, strict=True)]
        single = isinstance(document, dict) and "rules" not in document
        return _json(added[0] if single else {"rules": added}, 201)

    async def _remove_rule(self, request: Request) -> Response:
        number = _rule_number(request)
        if not self._apple.remove_rule(number):
            raise _no_rule(number)
        return _json({"removed": [number]})

    async def _remove_rules(self, _: Request) -> Response:
        removed = list(self._apple.rules())
        self._apple.behaves()
        return _json({"removed": removed})

    # -- keys and apps -------------------------------------------------------------------------------------------

    async def _keys(self, _: Request) -> Response:
        return _json({"keys": [{"key_id": key_id, "team_id": team_id} for key_id, team_id in self._apple.keys()]})  # noqa: SIM118 - no dict

    async def _add_key(self, request: Request) -> Response:
        body = await _read(request, _Key)
        team_id = self._apple.signing_key.team_id if body.team_id is None else body.team_id
        check_ids(body.key_id, team_id)
        key = SigningKey(body.key_id, team_id, body.key.encode())
        self._apple.add_key(key, environment=body.environment, topics=body.topics, related=body.related)
        return _json({"key_id": key.key_id, "team_id": key.team_id}, 201)

    async def _apps(self, _: Request) -> Response:
        return _json({"apps": [{"bundle_id": app, "team_id": team} for app, team in self._apple.apps()]})

    async def _add_app(self, request: Request) -> Response:
        body = await _read(request, _App)
        team_id = body.team_id or self._apple.signing_key.team_id
        self._apple.add_app(body.bundle_id, team_id)
        return _json({"bundle_id": body.bundle_id, "team_id": team_id}, 201)

    async def _reset(self, request: Request) -> Response:
        self._apple.reset()
        self._history.clear()
        return await self._describe(request)

    async def _on_http_exception(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        if error.status_code == 405:
            return _problem(
                405, f"{shown(path)} takes {', '.join(sorted((error.headers or {})['Allow'].split(', ')))} only"
            )
        near = closest(path, self._paths)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(self._paths)}"
        return _problem(error.status_code, f"There is no path {shown(path)!r} here: {hint}")


# -- requests --------------------------------------------------------------------------------------------------------


def _token(request: Request) -> str:
    """The device token in the path. Raises Refused."""
    return apns.check_token(request.path_params["token"]).decode()


def _rule_number(request: Request) -> int:
    number: str = request.path_params["id"]
    if not number.isdecimal() or len(number) > _DIGITS:
        raise _no_rule(number)
    return int(number)


def _no_rule(number: object) -> Problem:
    return Problem(404, f"There is no rule {shown(str(number))} (any more): GET /rules lists those that there are")


def _query(request: Request, *known: str) -> Mapping[str, str]:
    """The query's parameters, if they are among these. Raises Problem."""
    for name in request.query_params:
        if name not in known:
            raise Problem(400, f"There is no parameter {shown(name)!r} here: known are {', '.join(known)}")
    return request.query_params


def _after(query: Mapping[str, str], default: int) -> int:
    after = query.get("after")
    if after is None:
        return default
    if not after.isdecimal() or len(after) > _DIGITS:
        raise Problem(400, "after must be a number: the last that you have seen")
    return int(after)


def _wanted(query: Mapping[str, str]) -> str | None:
    """The device token that is asked for; None: all. Raises Refused."""
    token = query.get("token")
    return None if token is None else apns.check_token(token).decode()


async def _octets(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise Problem(413, f"The body is longer than {MAX_BODY_BYTES} octets: send less")
    return body


async def _read(request: Request, kind: type[B]) -> B:
    """The body as such a struct. Raises ConfigError, Problem."""
    return read(parse_json(await _octets(request)), kind)


# -- answers ---------------------------------------------------------------------------------------------------------


def _route(path: str, methods: Mapping[str, Handler]) -> Route:
    async def serve(request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        return await methods[method](request)

    return Route(path, serve, methods=list(methods))


def _json(content: object, status: int = 200) -> Response:
    return Response(_encode(content) + b"\n", status, media_type="application/json")


def _told_device(device: Device) -> dict[str, object]:
    return {
        "token": str(device.token),
        "state": device.state,
        "since": device.since,
        "online": device.online,
        "topic": device.topic,
        "environment": device.environment,
        "waiting": None if device.waiting is None else told(device.waiting),
    }


def _told_rule(number: int, rule: Rule) -> dict[str, object]:
    return {"id": number, **msgspec.to_builtins(rule)}


def _problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    content = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail if detail[-1] in ".?" else f"{detail}.",
    }
    return Response(_encode(content) + b"\n", status, headers, "application/problem+json")


async def _on_hang_up(_: Request, __: Exception) -> Response:
    """Nobody is there to read it."""
    return Response(status_code=400)


async def _on_error(_: Request, error: Exception) -> Response:
    """What was raised, as a problem."""
    if isinstance(error, Problem):
        return _problem(error.status, error.detail)
    assert isinstance(error, ConfigError | Refused)
    return _problem(400, str(error))
