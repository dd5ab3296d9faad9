"""TLS streams of the server role, over `ssl.MemoryBIO` on a plain transport of asyncio or uvloop.

For protocols that are older than their manners: clients that close without a word and at once, that half-close, that
write on after they were refused. asyncio's own TLS cannot end one direction and read on in the other, does not tell why
a handshake failed, and takes 280 kB a connection. See docs/decisions/0023-our-own-tls-pump.md.

After the handshake nothing is written that the user did not write, so that a client that closes without reading closes
in order: no session tickets of TLS 1.3 (`tls.legacy_context`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import struct
import sys
from collections.abc import Callable
from typing import Protocol, cast

HANDSHAKE_S = 10.0
"""How long a client may take for the TLS handshake."""
UNREAD_S = 60.0
"""How long a peer may read nothing while more than the transport holds (64 kB) waits for it. Slow readers are none."""
CLOSE_S = 2.0
"""How long `Stream.close` waits for the peer's end."""
_READ_OCTETS = 64 * 1024
"""What is read from a socket at once; asyncio would read 256 kB, and keep the user as long."""
_PIECE_OCTETS = 8 * 1024
"""So much goes into the memory BIO at once: its buffer never gets smaller again."""
_RECORD_OCTETS = 16 * 1024
"""What one TLS record holds at most (RFC 8446, section 5.1)."""
_KEEPALIVE = (("TCP_KEEPIDLE", 120), ("TCP_KEEPINTVL", 30), ("TCP_KEEPCNT", 4))
"""Clients idle for hours; one whose machine is gone is noticed after 4 minutes. Seconds, but for the last."""

NO_CERTIFICATE = "the client showed no certificate"
NOT_REGISTERED = "the client's certificate is not registered"
TOO_OLD = "the client's TLS version is too old"
CLIENT_REFUSED = "the client refused: it says"
OWN_TLS_REFUSED = "the client's own TLS gave up before it began"
NO_TLS = "the client does not speak TLS"
HUNG_UP = "the client hung up during the TLS handshake"
"""What `Refuse` is told begins so, where the handshake failed for what the client is or does."""

Refuse = Callable[[str, str], None]


class User(Protocol):
    """Who speaks on a stream. Called on the loop's thread."""

    def on_open(self) -> None:
        """The handshake is over."""
        ...

    def on_data(self, data: bytes) -> None: ...

    def on_end(self) -> None:
        """The peer ended its side, by close_notify or FIN, and all that it wrote was given; once, before `on_close`."""
        ...

    def on_close(self, error: Exception | None) -> None:
        """The connection is gone; once, at the very end. `error`: what broke it; None: it was closed in order."""
        ...


class _Tls(ssl.SSLObject):
    """Remembers which server name the client asked for."""

    server_name: str | None = None


class Stream(asyncio.BufferedProtocol):
    """One connection, server role. Before `User.on_open` it is nobody's."""

    __slots__ = (
        "_blocked",
        "_deaf",
        "_ending",
        "_error",
        "_first",
        "_incoming",
        "_listener",
        "_outgoing",
        "_paused",
        "_tail",
        "_timer",
        "_tls",
        "_transport",
        "_user",
        "_waiter",
        "certificate",
        "ended",
        "peername",
        "server_name",
    )

    _tls: _Tls
    _transport: asyncio.Transport

    def __init__(self, listener: StreamListener) -> None:
        self._listener = listener
        self._user: User | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._first = b""
        self._tail = 0
        self._blocked = self._paused = self._ending = self._deaf = False
        self.ended = False
        """Whether the peer ended its side."""
        self.certificate: bytes | None = None
        """What the client showed, as DER; None: nothing. It was verified as the context of the listener wants it."""
        self.server_name: str | None = None
        """Which name the client called (SNI)."""
        self.peername: tuple[object, ...] = ()
        """Address and port."""

    # -- for the user --------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Write as one TLS record, up to 16 kB. Does nothing after our end, or where the connection is gone."""
        if not self._ending and not self._transport.is_closing():
            self._tls.write(data)
            self._flush()

    async def drained(self) -> None:
        """Wait until the peer has read most of what was written. Raises ConnectionError where it is gone."""
        if self._blocked and not self._transport.is_closing():
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._transport.is_closing():
            raise ConnectionResetError("The connection is gone")

    @property
    def unconfirmed(self) -> int:
        """Octets of what was written that the peer's machine has not confirmed; 0 where the connection is gone.

        What is confirmed was not necessarily read. Elsewhere than on Linux: what our machine has not taken.
        """
        if self._transport.is_closing():
            return 0
        octets = self._transport.get_write_buffer_size()
        if sys.platform == "linux":
            import fcntl
            import termios

            # SIOCOUTQ, under the name that it shares its number with (Linux, tcp(7)).
            handle = self._transport.get_extra_info("socket").fileno()
            (sent,) = struct.unpack("i", fcntl.ioctl(handle, termios.TIOCOUTQ, bytes(4)))
            octets += int(sent)
        return max(0, octets - self._tail)

    @property
    def broken(self) -> bool:
        """Whether the peer's machine has reset the connection. Once the peer's end was read, no call tells of it."""
        self._look_for_reset()
        return self._error is not None

    def end(self) -> None:
        """End our side: close_notify, then FIN. What comes in is given on until the peer ends as well."""
        if self._ending or self._transport.is_closing():
            return
        self._ending = True
        with contextlib.suppress(ssl.SSLError):  # it also looks for the peer's close_notify, which is not there yet
            self._tls.unwrap()
        self._tail = self._outgoing.pending + 1  # a FIN counts as an octet
        self._flush()
        self._write_eof()
        if self.ended:
            self._close()

    def linger(self, seconds: float) -> None:
        """End our side, throw away what still comes in, and close at the peer's end, or after so many seconds.

        To close with something unread resets the connection, and what was written last may never be read. Of the user
        only `on_close` is called from here on.
        """
        self.end()
        if not self._transport.is_closing():
            self._hear_out(seconds)

    def close(self) -> None:
        """As `linger`, for a short while."""
        self.linger(CLOSE_S)

    def abort(self) -> None:
        """Close at once; what was not written is lost."""
        self._transport.abort()

    def reset(self) -> None:
        """As `abort`, by RST: the peer is told, and what it has not read yet is lost to it."""
        connection = self._transport.get_extra_info("socket")
        if connection is not None:  # None: gone already
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def pause(self) -> None:
        """Leave in the socket what the peer says, until `resume`; that it ends or goes away is not noticed either.

        What has been read already is still given.
        """
        self._paused = True
        if not self._deaf and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        """Take `pause` back."""
        self._paused = False
        if not self._blocked and not self._transport.is_closing():
            self._transport.resume_reading()

    # -- asyncio calls these -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self.peername = transport.get_extra_info("peername") or ()
        if not self._listener.enters(self):
            self._deaf = True
            self._transport.abort()
            return
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = self._listener.context()
        self._tls = cast("_Tls", context.wrap_bio(self._incoming, self._outgoing, server_side=True))
        self._set_timer(HANDSHAKE_S, self._on_slow_handshake)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's own guess
        return self._listener.buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._deaf or self.ended:
            return
        pieces: list[bytes] = []
        over = False
        data = self._listener.buffer[:nbytes]
        for at in range(0, nbytes, _PIECE_OCTETS):
            self._incoming.write(data[at : at + _PIECE_OCTETS])
            if self._user is None and not self._shake_hands(data):
                if self._deaf:
                    return
                continue
            over = self._decrypt(pieces)
            if over or self._deaf:
                break
        user = self._user
        if user is None or self._deaf:
            return
        if pieces:
            user.on_data(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if self._error is not None:
            self._hear_out(CLOSE_S)
        elif over:
            self._on_end()

    def eof_received(self) -> bool:
        if self._deaf or self._user is None:
            return False  # closes
        self._on_end()
        return not self._ending

    def pause_writing(self) -> None:
        self._blocked = True
        if not self._deaf:
            self._transport.pause_reading()
            self._wait_for_reader()

    def resume_writing(self) -> None:
        self._blocked = False
        self._wake()
        if self._deaf or self._transport.is_closing():
            return
        self._clear_timer()
        if not self._paused:
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_timer()
        self._wake()
        user, self._user = self._user, None
        error = self._error or (None if self._deaf else exc)
        if user is None and not self._deaf and self._first:  # who says nothing at all asks whether the port is open
            self._listener.refused(self.address, HUNG_UP)
        # The user may keep this: no rings for the garbage collector, and no TLS state.
        for name in ("_tls", "_incoming", "_outgoing"):
            with contextlib.suppress(AttributeError):
                delattr(self, name)
        try:
            if user is not None:
                user.on_close(error)
        finally:
            self._listener.leaves(self)

    # -- inside --------------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """The peer's, for people."""
        return str(self.peername[0]) if self.peername else "?"

    def _shake_hands(self, data: memoryview) -> bool:
        """Whether the handshake is over."""
        self._first = self._first or bytes(data[:1])
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return False
        except ssl.SSLError as error:
            self._flush()  # the alert
            self._refuse(_why(error, self._first))
            return False
        self._flush()
        self._clear_timer()
        self.certificate = self._tls.getpeercert(binary_form=True)
        self.server_name = self._tls.server_name
        self._user = self._listener.opens(self)
        self._user.on_open()
        return True

    def _decrypt(self, pieces: list[bytes]) -> bool:
        """Whether that was all: the peer's close_notify, or an error."""
        read = self._tls.read
        over = False
        try:
            while piece := read(_RECORD_OCTETS):
                pieces.append(piece)
            over = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            over = True
        except ssl.SSLError as error:
            self._error = error
            over = True
        if self._outgoing.pending:
            self._flush()
        return over

    def _flush(self) -> None:
        data = self._outgoing.read()
        if data and not self._transport.is_closing():
            self._transport.write(data)

    def _write_eof(self) -> None:
        with contextlib.suppress(OSError):  # asyncio says at once that the peer is gone, and then again
            self._transport.write_eof()

    def _on_end(self) -> None:
        if self.ended:
            return
        self.ended = True
        if self._user is not None:
            self._user.on_end()
        if self._ending:
            self._close()

    def _look_for_reset(self) -> None:
        if not self._transport.is_closing():
            number = self._transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number:  # said once only
                self._error = OSError(number, os.strerror(number))  # a ConnectionError, by its number

    def _close(self) -> None:
        if not self._transport.is_closing():
            self._look_for_reset()
            self._transport.close()
            self._set_timer(UNREAD_S, self._transport.abort)

    def _refuse(self, why: str) -> None:
        self._listener.refused(self.address, why)
        self._hear_out(CLOSE_S)

    def _hear_out(self, seconds: float) -> None:
        self._deaf = True
        if self._transport.is_closing():
            return
        if not self._ending:
            self._ending = True
            self._write_eof()
        self._transport.resume_reading()
        self._set_timer(seconds, self._transport.abort)

    def _on_slow_handshake(self) -> None:
        self._listener.refused(self.address, f"the TLS handshake took longer than {HANDSHAKE_S:g} s")
        self._deaf = True
        self._transport.abort()

    def _wait_for_reader(self) -> None:
        before = self.unconfirmed

        def look() -> None:
            if self.unconfirmed < before:
                self._wait_for_reader()
                return
            self._error = TimeoutError(f"The peer read nothing for {UNREAD_S:g} s")
            self._transport.abort()

        self._set_timer(UNREAD_S, look)

    def _set_timer(self, seconds: float, then: Callable[[], None]) -> None:
        self._clear_timer()
        self._timer = asyncio.get_running_loop().call_later(seconds, then)

    def _clear_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wake(self) -> None:
        if self._waiter is not None:
            if not self._waiter.done():
                self._waiter.set_result(None)
            self._waiter = None


class StreamListener:
    """A listening socket and the streams that it brought."""

    def __init__(
        self,
        new_user: Callable[[Stream], User],
        context: Callable[[], ssl.SSLContext],
        max_connections: int,
        refused: Refuse,
    ) -> None:
        self._new_user = new_user
        self._context = context
        self._max_connections = max_connections
        self._server: asyncio.Server | None = None
        self._stopped = False
        self._entering: set[Stream] = set()
        self._empty: asyncio.Event = asyncio.Event()
        self.refused = refused
        self.buffer = memoryview(bytearray(_READ_OCTETS))
        """What was read last, of whichever stream: it is taken out before anything else is read."""
        self.port = 0
        self.streams: set[Stream] = set()
        """Those whose handshake is over."""

    async def start(self, host: str, port: int) -> None:
        self._server = await asyncio.get_running_loop().create_server(lambda: Stream(self), host, port, backlog=1024)
        for listening in self._server.sockets:
            # What is accepted inherits it.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE:
                if hasattr(socket, name):
                    listening.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.port = self._server.sockets[0].getsockname()[1]

    def stop(self) -> None:
        """Listen no more, and give up those that are still in their handshake."""
        self._stopped = True
        if self._server is not None:
            self._server.close()
        for stream in tuple(self._entering):
            stream.abort()

    async def aclose(self, grace_s: float) -> None:
        """Stop, wait up to `grace_s` for the streams to be closed by their users, abort the rest."""
        self.stop()
        self._empty.clear()
        if self.streams or self._entering:
            try:
                await asyncio.wait_for(self._empty.wait(), grace_s)
            except TimeoutError:
                for stream in (*self.streams, *self._entering):
                    stream.abort()
                await self._empty.wait()
        if self._server is not None:
            await self._server.wait_closed()

    # -- for its streams -----------------------------------------------------------------------------------------

    def context(self) -> ssl.SSLContext:
        context = self._context()
        if context.sslobject_class is not _Tls:
            context.sslobject_class = _Tls
            context.sni_callback = _note_name
        return context

    def enters(self, stream: Stream) -> bool:
        """Whether it may."""
        if self._stopped:  # it was accepted before
            return False
        if len(self.streams) + len(self._entering) >= self._max_connections:
            self.refused(stream.address, f"there are {self._max_connections} connections already")
            return False
        self._entering.add(stream)
        return True

    def opens(self, stream: Stream) -> User:
        self._entering.discard(stream)
        self.streams.add(stream)
        return self._new_user(stream)

    def leaves(self, stream: Stream) -> None:
        self._entering.discard(stream)
        self.streams.discard(stream)
        if not self.streams and not self._entering:
            self._empty.set()


async def listen(
    new_user: Callable[[Stream], User],
    *,
    context: Callable[[], ssl.SSLContext],
    host: str,
    port: int,
    max_connections: int,
    refused: Refuse,
) -> StreamListener:
    """Listen for TLS connections. Raises OSError where the port is taken.

    `context` is asked at each connection. `refused` is told the address of whoever did not get in, and why, in words
    for people: no certificate, one that is not registered, a TLS version too old, no TLS at all, too many connections.
    It is told nothing of connections that end without an octet, as load balancers make them to see whether we live.
    """
    listener = StreamListener(new_user, context, max_connections, refused)
    await listener.start(host, port)
    return listener


def _note_name(tls: ssl.SSLObject | ssl.SSLSocket, name: str | None, _: ssl.SSLSocket | ssl.SSLContext) -> None:
    cast("_Tls", tls).server_name = name


def _why(error: ssl.SSLError, first: bytes) -> str:
    """Why a handshake failed, for whoever looks after the client."""
    reason = error.reason or ""
    if first == b"\x15":  # an alert, where its ClientHello should be
        return OWN_TLS_REFUSED
    if first not in (b"\x16", b"\x80"):
        return NO_TLS
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return NO_CERTIFICATE
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"{NOT_REGISTERED} ({error.verify_message})"
    if reason in ("UNSUPPORTED_PROTOCOL", "VERSION_TOO_LOW"):
        return TOO_OLD
    if "ALERT" in reason:
        return f"{CLIENT_REFUSED} {reason.partition('ALERT_')[2].replace('_', ' ').lower()}"
    return f"the TLS handshake failed: {reason.replace('_', ' ').lower() or 'for no known reason'}"
