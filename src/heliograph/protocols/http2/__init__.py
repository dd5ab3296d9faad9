"""HTTP/2 as Apple's provider API uses it, both roles, shaped for batches: octets in, events out (RFC 9113, RFC 7541).

No sockets, no clock: `heliograph.net.http2` drives a connection. Theory of operation: `core`, `client`, `server`.
"""

from heliograph.protocols.http2.client import ClientConnection, Requests, Template
from heliograph.protocols.http2.core import Limits
from heliograph.protocols.http2.events import (
    Accepted,
    Answered,
    Cancelled,
    Event,
    Failed,
    GoAway,
    Key,
    NotProcessed,
    Pong,
    Request,
    SettingsChanged,
    Unknown,
    WindowOpened,
)
from heliograph.protocols.http2.frames import ErrorCode
from heliograph.protocols.http2.hpack import Field
from heliograph.protocols.http2.server import Answer, ServerConnection

__all__ = [
    "Accepted",
    "Answer",
    "Answered",
    "Cancelled",
    "ClientConnection",
    "ErrorCode",
    "Event",
    "Failed",
    "Field",
    "GoAway",
    "Key",
    "Limits",
    "NotProcessed",
    "Pong",
    "Request",
    "Requests",
    "ServerConnection",
    "SettingsChanged",
    "Template",
    "Unknown",
    "WindowOpened",
]
