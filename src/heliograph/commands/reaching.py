"""What `heliograph doctor` learns on the way to Apple: names, ports, TLS, and whether credentials are taken."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import Iterator, Sequence

from heliograph import reasons
from heliograph.apps.building import Entry, kind_and_name
from heliograph.batches import new_batch_id
from heliograph.carriers.apns import ApnsCarrier, Endpoint, PoolSettings, Route
from heliograph.commands.findings import Finding, ok, problem, warning
from heliograph.errors import ConfigError
from heliograph.model import Access, Answered, Batch, Environment, Headers, Outcome, PushType
from heliograph.net.dial import Address, LookUps, dial
from heliograph.net.proxy import Proxy, parse_proxy
from heliograph.protocols.apns import topic_for

_STEP_S = 10.0
_SEND_S = 20.0
_NOBODY = b"0" * 64
"""A device token that Apple gave nobody."""
_PAYLOAD = b'{"aps":{}}'

# OpenSSL, x509_vfy.h.
_NOT_YET_VALID, _EXPIRED = 9, 10
_WRONG_NAME = 62


def of_endpoints(entries: Sequence[Entry]) -> Iterator[Finding]:
    """Each place that is sent to, once for each way there."""
    endpoints = {route.endpoint for entry in entries for route in entry.routes.values()}
    for endpoint in sorted(endpoints, key=lambda each: (each.host, each.port, each.proxy or "")):
        yield asyncio.run(_of_endpoint(endpoint))


def of_sending(entries: Sequence[Entry]) -> Iterator[Finding]:
    """Whether Apple takes the credentials of each app: it must know them before it can say that a token is no good."""
    for entry in entries:
        for access in entry.app.access:
            for environment in access.environments:
                route = entry.routes[environment, access.credentials]
                yield asyncio.run(_of_credentials(entry, access, environment, route))


async def _of_endpoint(endpoint: Endpoint) -> Finding:
    about = f"{endpoint.host}:{endpoint.port}"
    try:
        proxy = None if endpoint.proxy is None else parse_proxy(endpoint.proxy)
    except ConfigError as error:
        return problem(about, str(error))
    first = f"the proxy {proxy.host}:{proxy.port}" if proxy else about
    to = (proxy.host, proxy.port) if proxy else (endpoint.host, endpoint.port)
    try:
        async with asyncio.timeout(_STEP_S):
            addresses = await LookUps().addresses(*to)
    except (OSError, TimeoutError):
        return problem(about, f"the name {to[0]} is not known here: check it, and this machine's resolver")
    try:
        async with asyncio.timeout(_STEP_S):
            connected = await _connected(addresses, proxy, endpoint)
    except (OSError, TimeoutError) as error:
        why = str(error) or "no answer"
        if proxy and isinstance(error, ConnectionError) and error.errno is None:  # the proxy's own no, with advice
            return problem(about, why)
        return problem(
            about, f"{first} cannot be reached ({why}): open the way in the firewall, try port 2197, or set a proxy"
        )
    try:
        async with asyncio.timeout(_STEP_S):
            _, writer = await asyncio.open_connection(sock=connected, ssl=endpoint.tls, server_hostname=endpoint.host)
    except ssl.SSLCertVerificationError as error:
        return problem(about, _complaint(error))
    except (OSError, TimeoutError) as error:
        why = getattr(error, "reason", None) or str(error) or "no answer"
        return problem(about, f"the TLS handshake failed ({why}): is it a proxy or another program that answers there?")
    session = writer.get_extra_info("ssl_object")
    spoken, version = session.selected_alpn_protocol(), session.version()
    writer.transport.abort()
    through = f" through {first}" if proxy else ""
    if spoken != "h2":
        return problem(
            about, f"what answers{through} does not speak HTTP/2: something stands between, or it is no Apple"
        )
    return ok(about, f"reached{through}, {version} and HTTP/2, its certificate is good")


async def _connected(addresses: Sequence[Address], proxy: Proxy | None, endpoint: Endpoint) -> socket.socket:
    """Raises OSError, that of the last address."""
    for address in addresses[:-1]:
        try:
            return await dial(address, proxy=proxy, host=endpoint.host, port=endpoint.port)
        except OSError:
            continue
    return await dial(addresses[-1], proxy=proxy, host=endpoint.host, port=endpoint.port)


def _complaint(error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code in (_NOT_YET_VALID, _EXPIRED):
        return "its certificate is not valid at this time: check this machine's clock first"
    if error.verify_code == _WRONG_NAME:
        return "its certificate is for another name: correct host, or find out what stands between"
    return (
        f"its certificate is of an authority that is not trusted here ({error.verify_message}): install the system's "
        "certificates (ca-certificates), or name those of your own in ca"
    )


async def _of_credentials(entry: Entry, access: Access, environment: Environment, route: Route) -> Finding:
    kind, name = kind_and_name(access.credentials)
    about = f"app {entry.app.name}, {environment}"
    push_type, topic = _kind_of(entry, access)
    batch = Batch(
        new_batch_id(time.time(), os.urandom(8)),
        entry.app.name,
        environment,
        time.time(),
        (Headers(topic, push_type, expiration=0),),
        (_NOBODY,),
        (_PAYLOAD,),
    )
    carrier = ApnsCarrier(lambda *_: route, settings=PoolSettings(connections=1, patience_s=_SEND_S), clock=time.time)
    answered: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    def report(_: Sequence[int], outcome: Outcome) -> None:
        if not answered.done():
            answered.set_result(outcome)

    carrier.carry(batch, range(1), report)
    try:
        async with asyncio.timeout(_SEND_S):
            outcome = await answered
    except TimeoutError:
        return problem(about, f"no answer to a notification within {_SEND_S:.0f} s: see what is said of the way there")
    finally:
        await carrier.aclose()
    if not isinstance(outcome, Answered):
        return problem(about, f"a notification with the {kind} {name} brought no answer: {outcome.why}")
    if outcome.status == 200 or outcome.reason in (reasons.BAD_DEVICE_TOKEN.word, reasons.UNREGISTERED.word):
        return ok(about, f"the {kind} {name} is taken for {topic}")
    known = reasons.find(outcome.reason, outcome.status)
    told = f"the answer to the {kind} {name} is {outcome.status} {outcome.reason or ''}: {known.meaning}"
    return (warning if outcome.status in (429, 500, 503) else problem)(about, told)


def _kind_of(entry: Entry, access: Access) -> tuple[PushType, str]:
    """A push type, and a topic that these credentials open with it."""
    bundle_id = entry.app.topics[0]
    if access.topics is None:
        return PushType.ALERT, bundle_id
    for push_type in PushType:
        for each in entry.app.topics:
            if topic_for(each, push_type) in access.topics:
                return push_type, topic_for(each, push_type)
    return PushType.ALERT, access.topics[0]
