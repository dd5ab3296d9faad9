"""Through an HTTP proxy by CONNECT (RFC 9110, section 9.3.6), with Basic credentials where it wants some (RFC 7617)."""

from __future__ import annotations

import asyncio
import re
import socket
from base64 import b64encode
from urllib.parse import unquote, urlsplit

from msgspec import Struct

from heliograph.errors import ConfigError

_MOST_OCTETS = 8192
"""Of the proxy's answer."""
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([0-9]{3})(?: .*)?")


class Proxy(Struct, frozen=True):
    """Where a proxy listens, and what it is told of us."""

    host: str
    port: int
    credentials: str | None = None
    """`user:password`."""

    def __repr__(self) -> str:
        return f"<proxy {self.host}:{self.port}>"


def parse_proxy(url: str) -> Proxy:
    """A proxy from `http://[user:password@]host:port`. Raises ConfigError, which never repeats what it refuses."""
    how = "write http://host:port, or http://user:password@host:port"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ConfigError(f"The proxy's address cannot be read: {how}") from None
    if parts.scheme != "http":
        raise ConfigError(f"The proxy must be one that is spoken to in plain HTTP: {how}")
    if not host or not port or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ConfigError(f"The proxy's address needs a host and a port, and nothing behind: {how}")
    if parts.username is None:
        return Proxy(host, port)
    credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    if not credentials.isprintable():
        raise ConfigError(f"The proxy's user and password must not hold control characters: {how}")
    return Proxy(host, port, credentials)


async def tunnel(connected: socket.socket, proxy: Proxy, host: str, port: int) -> None:
    """Have the proxy, to which this socket leads, connect it to `host`. It has no deadline of its own.

    Raises ConnectionError that says what the proxy answered.
    """
    loop = asyncio.get_running_loop()
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if proxy.credentials is not None:
        lines.append(f"Proxy-Authorization: Basic {b64encode(proxy.credentials.encode()).decode()}")
    await loop.sock_sendall(connected, "\r\n".join([*lines, "", ""]).encode())
    answer = b""
    while b"\r\n\r\n" not in answer:
        more = await loop.sock_recv(connected, _MOST_OCTETS)
        answer += more
        if not more or len(answer) > _MOST_OCTETS:
            break
    head, end, rest = answer.partition(b"\r\n\r\n")
    line = head.partition(b"\r\n")[0]
    status = _STATUS_LINE.fullmatch(line)
    name = f"the proxy {proxy.host}:{proxy.port}"
    if status is None or not end:
        raise ConnectionError(f"{name} did not answer as an HTTP proxy does: check its address")
    if status[1] == b"407":
        what = "does not take these" if proxy.credentials else "wants"
        raise ConnectionError(f"{name} {what} credentials ({_text(line)}): write http://user:password@host:port")
    if not status[1].startswith(b"2"):
        raise ConnectionError(f"{name} would not connect to {target}: it answered {_text(line)}")
    if rest:  # TLS begins with our words, so whose are these?
        raise ConnectionError(f"{name} sent octets of its own after its answer")


def _text(line: bytes) -> str:
    return "".join(each if each.isprintable() else "?" for each in line[:100].decode("ascii", "replace"))
