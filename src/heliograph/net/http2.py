"""Drives `protocols.http2` over a socket, as client and as server. Nothing is decided here.

One turn of the loop, one write: whatever the core has to say after a read goes out together.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar, cast

from heliograph.protocols.http2 import ClientConnection, ErrorCode, Event, Failed, ServerConnection

UNSENT_OCTETS = 256 * 1024
"""Above this much unread output, the peer is not read from, and a client is not given more requests."""
UNREAD_S = 30.0
"""How long a peer may leave output unread before it is shed."""
HANDSHAKE_S = 10.0
"""How long a client may take for the TLS handshake."""
_TICK_S = 1.0
"""Deadlines are looked at this often, at least."""
_FLUSH_S = 5.0
"""How long a peer may take to read our last words."""

Core = TypeVar("Core", ClientConnection, ServerConnection)


class Session(Protocol):
    """What the user of a link implements. Called on the loop's thread; `on_close` once, at the very end."""

    def on_events(self, events: Sequence[Event]) -> None: ...

    def on_writable(self) -> None:
        """The peer has read enough of what was unsent (see `Link.writable`)."""
        ...

    def on_close(self) -> None: ...


class Link(asyncio.Protocol, Generic[Core]):
    """One connection, either role: octets from the socket to the core, events from the core to the session."""

    def __init__(self, new_session: Callable[[Link[Core]], Session], new_core: Callable[[float], Core]) -> None:
        self._loop = asyncio.get_running_loop()
        self._new_session: Callable[[Link[Core]], Session] = new_session
        self._new_core: Callable[[float], Core] = new_core
        self._flush_due = False
        self._handling = False
        """The session is being told something; what it has to say to that is written right behind."""
        self._finishing = False
        self._deaf = False
        self._blocked_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._last_words: asyncio.TimerHandle | None = None
        self.writable = True
        """Whether less than `UNSENT_OCTETS` wait for the peer to read."""
        self.error: Exception | None = None
        """What broke the socket, where anything did: a peer's TLS alert, for one."""
        self.closed: asyncio.Future[None] = self._loop.create_future()
        """Done when the socket is gone and the session knows."""

    # -- for the session -----------------------------------------------------------------------------------------

    @property
    def peer_certificate(self) -> bytes | None:
        """The peer's certificate as DER, if it showed one."""
        tls = self._transport.get_extra_info("ssl_object")
        return None if tls is None else cast("bytes | None", tls.getpeercert(binary_form=True))

    @property
    def peername(self) -> object:
        return self._transport.get_extra_info("peername")

    def flush(self) -> None:
        """Have the core's output written, once this turn of the loop, however often it is asked for."""
        if not (self._flush_due or self._handling):
            self._flush_due = True
            self._loop.call_soon(self._write)

    def stop_reading(self) -> None:
        """Leave in the socket what the peer says, until `read_on`; that it goes away is not noticed either."""
        self._deaf = True
        self._transport.pause_reading()

    def read_on(self) -> None:
        """Take `stop_reading` back."""
        self._deaf = False
        if self.writable and not self._transport.is_closing():
            self._transport.resume_reading()

    def finish(self) -> None:
        """Close as soon as no stream is open. Who wants no new ones says GOAWAY first."""
        self._finishing = True
        self.flush()

    def close(self) -> None:
        """Write what there is, then close; a peer that does not read it has `_FLUSH_S`."""
        if self._transport.is_closing():
            return
        data = self.core.data_to_send()
        if data:
            self._transport.write(data)
        self._transport.close()
        self._last_words = self._loop.call_later(_FLUSH_S, self._transport.abort)

    def abort(self) -> None:
        """Close at once; what was not written is lost."""
        self._transport.abort()

    # -- asyncio calls these -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=UNSENT_OCTETS)
        self.core: Core = self._new_core(self._loop.time())
        self.session = self._new_session(self)
        self._write()
        self._tick()

    def data_received(self, data: bytes) -> None:
        self._handle(self.core.receive(data, self._loop.time()))

    def pause_writing(self) -> None:
        self.writable = False
        self._blocked_since = self._loop.time()
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self.writable = True
        self._blocked_since = None
        if not self._deaf and not self._transport.is_closing():
            self._transport.resume_reading()
        self.session.on_writable()
        self._write()

    def connection_lost(self, exc: Exception | None) -> None:
        self.error = exc
        for timer in (self._timer, self._last_words):
            if timer is not None:
                timer.cancel()
        events = self.core.eof(self._loop.time())
        if events:
            self.session.on_events(events)
        self.session.on_close()
        self.closed.set_result(None)

    # -- inside --------------------------------------------------------------------------------------------------

    def _handle(self, events: Sequence[Event]) -> None:
        if events:
            self._handling = True
            try:
                self.session.on_events(events)
            finally:
                self._handling = False
            if self.core.over and isinstance(events[-1], Failed):
                self.close()
                return
        self._write()

    def _write(self) -> None:
        self._flush_due = False
        data = self.core.data_to_send()
        if self._transport.is_closing():
            return
        if data:
            self._transport.write(data)
        if self._finishing and not self.core.open_streams:
            self.close()

    def _tick(self) -> None:
        now = self._loop.time()
        if self._blocked_since is not None and now >= self._blocked_since + UNREAD_S:
            self.abort()
            return
        self._handle(self.core.tick(now))
        due = self.core.wake_at()
        delay = _TICK_S if due is None else min(max(due - now, 0.02), _TICK_S)
        self._timer = self._loop.call_later(delay, self._tick)


class Listener:
    """A listening socket and the links that it brought."""

    def __init__(self, server: asyncio.Server, links: set[Link[ServerConnection]]) -> None:
        self._server = server
        self.links = links
        self.port: int = server.sockets[0].getsockname()[1]

    async def aclose(self, grace_s: float = 1.0) -> None:
        """Listen no more; say GOAWAY, give open streams `grace_s` to be answered, then close."""
        self._server.close()
        await end_links(self.links, grace_s)
        with contextlib.suppress(TimeoutError):  # from Python 3.12 on it waits for TLS handshakes as well
            await asyncio.wait_for(self._server.wait_closed(), grace_s)


async def end_links(links: Iterable[Link[ServerConnection]], grace_s: float) -> None:
    """Say GOAWAY on all of them, give open streams `grace_s` to be answered, then close."""
    links = list(links)
    for link in links:
        link.core.goaway(ErrorCode.NO_ERROR)
        link.finish()
    if links:
        _, late = await asyncio.wait([link.closed for link in links], timeout=grace_s)
        if late:
            for link in links:
                link.abort()
            await asyncio.wait(late)


class _Turned:
    """A connection that was turned away: nothing is done for it."""

    def __init__(self, link: Link[ServerConnection]) -> None:
        link.core.goaway(ErrorCode.ENHANCE_YOUR_CALM, b"too many connections", 0)
        asyncio.get_running_loop().call_soon(link.close)

    def on_events(self, events: Sequence[Event]) -> None: ...

    def on_writable(self) -> None: ...

    def on_close(self) -> None: ...


async def listen(
    new_session: Callable[[Link[ServerConnection]], Session],
    *,
    tls: ssl.SSLContext | None,
    host: str = "127.0.0.1",
    port: int = 0,
    new_core: Callable[[float], ServerConnection] = ServerConnection,
    max_connections: int | None = None,
    before: Callable[[], None] | None = None,
) -> Listener:
    """Listen for HTTP/2; without `tls`, for clients with prior knowledge. Raises OSError where the port is taken.

    Above `max_connections` they are turned away with GOAWAY. `before` is called for each before its TLS handshake.
    """
    links: set[Link[ServerConnection]] = set()

    def enter(link: Link[ServerConnection]) -> Session:
        # From here on connection_lost is certain; a failed TLS handshake would never take it out again.
        if max_connections is not None and len(links) >= max_connections:
            return _Turned(link)
        links.add(link)
        link.closed.add_done_callback(lambda _: links.discard(link))
        return new_session(link)

    def new_link() -> Link[ServerConnection]:
        if before is not None:
            before()
        return Link(enter, new_core)

    server = await asyncio.get_running_loop().create_server(
        new_link,
        host,
        port,
        ssl=tls,
        ssl_handshake_timeout=None if tls is None else HANDSHAKE_S,
        backlog=1024,
    )
    return Listener(server, links)


async def connect(
    new_session: Callable[[Link[ClientConnection]], Session],
    *,
    host: str,
    port: int,
    tls: ssl.SSLContext | None,
    new_core: Callable[[float], ClientConnection] = ClientConnection,
    server_hostname: str | None = None,
    connected: socket.socket | None = None,
) -> Link[ClientConnection]:
    """Connect and begin. The server's first SETTINGS come as an event.

    `connected`: a socket that leads there already. Raises OSError (ssl.SSLError among them), also where the server
    does not choose HTTP/2 by ALPN.
    """
    loop = asyncio.get_running_loop()
    name = (server_hostname or host) if tls is not None else None

    def new_link() -> Link[ClientConnection]:
        return Link(new_session, new_core)

    if connected is None:
        transport, link = await loop.create_connection(new_link, host, port, ssl=tls, server_hostname=name)
    else:
        transport, link = await loop.create_connection(new_link, sock=connected, ssl=tls, server_hostname=name)
    if tls is not None:
        chosen = transport.get_extra_info("ssl_object").selected_alpn_protocol()
        if chosen != "h2":
            transport.abort()
            msg = f"{host}:{port} did not choose HTTP/2 (ALPN h2)"
            raise ConnectionError(msg)
    return link
