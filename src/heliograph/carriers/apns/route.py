"""Where notifications go, and with what credentials."""

from __future__ import annotations

import ssl

from msgspec import Struct

from heliograph.model import SigningKey


class Endpoint(Struct, frozen=True):
    """Where a pool connects to."""

    host: str
    port: int
    tls: ssl.SSLContext
    unique_ids: bool = False
    """Whether answers carry `apns-unique-id` that is worth keeping (Apple's sandbox)."""
    proxy: str | None = None
    """`http://[user:password@]host:port` of a proxy that speaks CONNECT; None: straight there."""

    def __repr__(self) -> str:
        return f"<endpoint {self.host}:{self.port}{' by a proxy' if self.proxy else ''}>"


class Route(Struct, frozen=True):
    """A way to Apple: connections are shared by whatever takes the same one."""

    endpoint: Endpoint
    key: SigningKey | None
    """None: the endpoint's TLS context has a client certificate, which speaks for itself."""
