"""apns-clerk, the apns-client for Python 3: it knows TLS 1.0 and nothing else. See ../contract.py."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from typing import Any

from tests.peers.legacy.python.common import HOST, messages, tell

library = import_module("apns_clerk")


def connect(port: str, tail_s: float = 0.1) -> Any:
    """`tail_s`: how long to wait for an error after the last message."""
    session = library.Session(read_tail_timeout=tail_s)
    files = {"cert_file": os.environ["LEGACY_PEM"], "passphrase": os.environ["LEGACY_PASSPHRASE"]}
    certificate = session.pool.get_certificate(files)
    # OpenSSL speaks TLS 1.0 at this level only.
    certificate.get_context().set_cipher_list(b"DEFAULT:@SECLEVEL=0")
    return library.APNs(session.new_connection((HOST, int(os.environ[port])), certificate))


if sys.argv[1] == "feedback":
    for token, at in connect("LEGACY_FEEDBACK_PORT").feedback():
        tell(token=token if isinstance(token, str) else token.decode(), at=int(at.timestamp()))
    sys.exit()

service = connect("LEGACY_PORT", 30 if sys.argv[1] == "careful" else 0.1)
rest = [
    library.Message([each.token], payload=json.loads(each.payload), expiry=each.expiry, priority=each.priority)
    for each in messages()
]
while rest:
    result = service.send(rest)
    for token, (status, _) in result.failed.items():
        tell(status=status, token=token)
    if result.errors:
        sys.exit(str(result.errors))
    rest = result.retry()
    service = connect("LEGACY_PORT")
