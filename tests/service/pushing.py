"""The smallest client that pushes, of nothing but h2 and a socket: what other projects may have in its place.

Nothing of heliograph is imported, so that tests can put this file into a project of somebody else.
"""

from __future__ import annotations

import json
import socket
import ssl
from pathlib import Path
from typing import Any

from h2.connection import H2Connection
from h2.events import DataReceived, ResponseReceived, StreamEnded

TOPIC = "com.example.shop"
PATIENCE_S = 30


def push(
    port: int,
    ca_pem: bytes,
    provider_token: str | Path,
    token: str,
    payload: bytes = b'{"aps":{"alert":"Hello"}}',
    **fields: str,
) -> tuple[int, Any]:
    """One push over a connection of its own: status and reason. `fields`: more headers, such as `apns_id`.

    `provider_token` may be the file of a client certificate and its key instead.
    """
    context = ssl.create_default_context(cadata=ca_pem.decode())
    context.set_alpn_protocols(["h2"])
    headers = {"apns-topic": TOPIC, "apns-push-type": "alert"}
    if isinstance(provider_token, Path):
        context.load_cert_chain(provider_token)
    else:
        headers["authorization"] = f"bearer {provider_token}"
    headers |= {name.replace("_", "-"): value for name, value in fields.items()}
    request = {":method": "POST", ":scheme": "https", ":authority": "localhost", ":path": f"/3/device/{token}"}
    with (
        socket.create_connection(("127.0.0.1", port), PATIENCE_S) as connected,
        context.wrap_socket(connected, server_hostname="localhost") as tls,
    ):
        connection = H2Connection()
        connection.initiate_connection()
        connection.send_headers(1, [*request.items(), *headers.items()])
        connection.send_data(1, payload, end_stream=True)
        tls.sendall(connection.data_to_send())
        status, body = 0, b""
        while octets := tls.recv(65_536):
            for event in connection.receive_data(octets):
                if isinstance(event, ResponseReceived):
                    status = int(dict(event.headers)[b":status"])
                elif isinstance(event, DataReceived):
                    body += event.data
                elif isinstance(event, StreamEnded):
                    return status, json.loads(body)["reason"] if body else None
    raise ConnectionError("the simulator hung up")
