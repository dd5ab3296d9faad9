"""pyOpenSSL on a blocking socket: what sends away without a word closes without a look. See ../contract.py."""

from __future__ import annotations

import os
import socket
import sys
from importlib import import_module
from typing import Any

from tests.peers.legacy.python.common import HOST, Message, messages, tell_error, tell_gone

SSL = import_module("OpenSSL.SSL")


def connect(port: str) -> Any:
    context = SSL.Context(SSL.TLS_METHOD)
    context.use_certificate_file(os.environ["LEGACY_PEM"])
    context.set_passwd_cb(lambda *_: os.environ["LEGACY_PASSPHRASE"].encode())
    context.use_privatekey_file(os.environ["LEGACY_PEM"])
    context.load_verify_locations(os.environ["LEGACY_CA"])
    context.set_verify(SSL.VERIFY_PEER, lambda *arguments: bool(arguments[-1]))
    connection = SSL.Connection(context, socket.create_connection((HOST, int(port))))
    connection.set_connect_state()
    connection.do_handshake()
    return connection


def read_all(connection: Any) -> bytes:
    content = b""
    while True:
        try:
            content += connection.recv(4096)
        except SSL.ZeroReturnError:
            return content


def push(sent: list[Message], *, careful: bool) -> None:
    connection = connect(os.environ["LEGACY_PORT"])
    for message in sent:
        connection.sendall(message.frame())
    if careful:
        push(tell_error(read_all(connection), sent), careful=False)
    connection.shutdown()
    connection.close()


if sys.argv[1] == "feedback":
    tell_gone(read_all(connect(os.environ["LEGACY_FEEDBACK_PORT"])))
else:
    push(messages(), careful=sys.argv[1] == "careful")
