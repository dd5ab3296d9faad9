"""Takes connections for the simulator: counts them, and fails the TLS handshake of those that are to suffer it."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal, cast

from msgspec import Struct

from heliograph.errors import ConfigError
from heliograph.net.http2 import HANDSHAKE_S, Link, end_links
from heliograph.protocols.http2 import ServerConnection

BACKLOG = 1024
_AGAIN_S = 0.1
"""Between two tries to take a connection where the process has no file descriptor left."""

# RFC 8446, sections 5.1 and 6: an alert record of two octets, fatal, handshake_failure.
_ALERT = bytes((21, 3, 3, 0, 2, 2, 40))

Treatment = Literal["silent", "closed", "alert"]
"""How a handshake fails without TLS."""


class Welcome(Struct, frozen=True):
    """How to go on with a connection."""

    tls: ssl.SSLContext | None
    """None: who is at the other end of `new_link` sees to it."""
    new_link: Callable[[], asyncio.BaseProtocol]


class Reception:
    """Listening sockets, and the connections that they brought."""

    def __init__(self, listening: Iterable[socket.socket], receive: Callable[[], Welcome | Treatment]) -> None:
        """`receive` is called for each connection as it is accepted."""
        self._listening = list(listening)
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._accepting = [self._loop.create_task(self._accept(each)) for each in self._listening]
        self._handshakes: set[asyncio.Task[None]] = set()
        self._mute: set[_Mute] = set()
        self._links: set[Link[ServerConnection]] = set()
        self.port: int = self._listening[0].getsockname()[1]

    def enter(self, link: Link[ServerConnection]) -> None:
        """A link is there, and will say when it is closed."""
        self._links.add(link)
        link.closed.add_done_callback(lambda _: self._links.discard(link))

    async def aclose(self, grace_s: float) -> None:
        """Listen no more; end all connections, those with open streams after `grace_s` at the latest."""
        tasks = [*self._accepting, *self._handshakes]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for each in self._listening:
            each.close()
        mute = list(self._mute)
        for protocol in mute:
            protocol.abort()
        await asyncio.gather(*(protocol.closed for protocol in mute))
        await end_links(self._links, grace_s)

    # -- inside --------------------------------------------------------------------------------------------------

    async def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(listening)
            except OSError:
                await asyncio.sleep(_AGAIN_S)
                continue
            task = self._loop.create_task(self._greet(connection, self._receive()))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)
            task.add_done_callback(partial(_close_unless_taken, connection))

    async def _greet(self, connection: socket.socket, how: Welcome | Treatment) -> None:
        connect = self._loop.connect_accepted_socket
        try:
            if isinstance(how, Welcome):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                patience = None if how.tls is None else HANDSHAKE_S
                await connect(how.new_link, connection, ssl=how.tls, ssl_handshake_timeout=patience)
            elif how == "closed":
                connection.close()
            else:
                await connect(lambda: _Mute(self._mute, _ALERT if how == "alert" else b""), connection)
        except OSError:
            connection.close()  # the client's handshake failed, or it went away


def _close_unless_taken(connection: socket.socket, greeting: asyncio.Task[None]) -> None:
    if greeting.cancelled():  # perhaps before it began
        connection.close()


class _Mute(asyncio.Protocol):
    """Reads what the client says; answers nothing, or one last thing."""

    def __init__(self, all_of_them: set[_Mute], last_words: bytes) -> None:
        self._all = all_of_them
        self._last_words = last_words
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none by type
        self._all.add(self)

    def data_received(self, data: bytes) -> None:  # noqa: ARG002
        if self._last_words:
            self._transport.write(self._last_words)
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._all.discard(self)
        self.closed.set_result(None)

    def abort(self) -> None:
        self._transport.abort()


async def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen on all addresses of a host that this machine has, on one port; 0 is any free one.

    Raises OSError.
    """
    found = await asyncio.get_running_loop().getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    listening: list[socket.socket] = []
    missing: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        each = None
        try:
            each = socket.socket(family, kind, protocol)
            each.setblocking(False)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            each.bind((address[0], port, *address[2:]))
            each.listen(BACKLOG)
        except OSError as error:
            if each is not None:
                each.close()
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # ::1 on a machine without IPv6
                missing = error
                continue
            for other in listening:
                other.close()
            raise
        listening.append(each)
        port = each.getsockname()[1]
    if missing is not None and not listening:
        raise missing
    return listening


def cannot_listen(what: str, host: str, port: int, error: OSError) -> ConfigError:
    """What to tell where a port cannot be had; `what` begins its sentence."""
    todo = "name another port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "name an address of this machine"
    return ConfigError(f"{what} cannot listen on {host}:{port} ({error.strerror}): {todo}")
