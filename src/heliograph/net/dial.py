"""Ways to a host: fresh addresses for each connection, and sockets, straight or through a proxy."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
from typing import Any

from heliograph.net.proxy import Proxy, tunnel

Address = tuple[socket.AddressFamily, tuple[Any, ...]]
"""A family, and what its sockets connect to."""

_Found = asyncio.Future[list[Address]]


class LookUps:
    """Looks names up, each time anew, without holding up the loop.

    The system's resolver may take as long as it likes and cannot be interrupted: it works in a thread of its own, which
    nobody waits for at the end. Whoever asks for the same while it is at work shares its answer, so that there are as
    many threads as names at most.
    """

    def __init__(self) -> None:
        self._pending: dict[tuple[str, int], _Found] = {}

    async def addresses(self, host: str, port: int) -> list[Address]:
        """In random order. Raises OSError (socket.gaierror)."""
        asked = (host, port)
        pending = self._pending.get(asked)
        if pending is None:
            loop = asyncio.get_running_loop()
            pending = self._pending[asked] = loop.create_future()
            pending.add_done_callback(lambda done: self._forget(asked, done))
            threading.Thread(target=_look_up, args=(loop, pending, host, port), daemon=True, name="look-up").start()
        found = list(await asyncio.shield(pending))
        random.shuffle(found)
        return found

    def _forget(self, asked: tuple[str, int], done: _Found) -> None:
        del self._pending[asked]
        if not done.cancelled():
            done.exception()  # whoever asked may have gone meanwhile


def _look_up(loop: asyncio.AbstractEventLoop, answer: _Found, host: str, port: int) -> None:
    found: list[Address] | OSError
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        found = error
    except UnicodeError:  # of the IDNA codec, for what is no name at all
        found = socket.gaierror(socket.EAI_NONAME, "that is no host's name")
    else:
        found = list(dict.fromkeys((socket.AddressFamily(info[0]), info[4]) for info in infos))
    with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
        loop.call_soon_threadsafe(_answer, answer, found)


def _answer(answer: _Found, found: list[Address] | OSError) -> None:
    if answer.done():
        return
    if isinstance(found, OSError):
        answer.set_exception(found)
    else:
        answer.set_result(found)


async def dial(address: Address, *, proxy: Proxy | None, host: str, port: int) -> socket.socket:
    """A socket that leads to `host`; `address` is its own, or the proxy's. It has no deadline of its own.

    Raises OSError.
    """
    family, to = address
    connected = socket.socket(family, socket.SOCK_STREAM)
    try:
        connected.setblocking(False)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(connected, to)
        if proxy is not None:
            await tunnel(connected, proxy, host, port)
    except BaseException:
        connected.close()
        raise
    return connected
