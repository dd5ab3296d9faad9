"""Twisted with the context factory of its early days. See ../contract.py."""

# ruff: noqa: N802 - Twisted chose these names

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

from tests.peers.legacy.python.common import HOST, Message, messages, tell_error, tell_gone

SSL = import_module("OpenSSL.SSL")
protocol: Any = import_module("twisted.internet.protocol")
reactor: Any = import_module("twisted.internet.reactor")
ssl: Any = import_module("twisted.internet.ssl")


class ContextFactory(ssl.ClientContextFactory):  # type: ignore[misc]
    method = SSL.TLS_METHOD

    def getContext(self) -> Any:
        context = ssl.ClientContextFactory.getContext(self)
        context.use_certificate_file(os.environ["LEGACY_PEM"])
        context.set_passwd_cb(lambda *_: os.environ["LEGACY_PASSPHRASE"].encode())
        context.use_privatekey_file(os.environ["LEGACY_PEM"])
        return context


class Client(protocol.Protocol):  # type: ignore[misc]
    def __init__(self, sent: list[Message], *, stays: bool) -> None:
        self.sent = sent
        self.stays = stays
        self.content = b""

    def connectionMade(self) -> None:
        for message in self.sent:
            self.transport.write(message.frame())
        if not self.stays:
            self.transport.loseConnection()

    def dataReceived(self, data: bytes) -> None:
        self.content += data

    def connectionLost(self, reason: object) -> None:
        if self.sent and self.content:
            connect("LEGACY_PORT", tell_error(self.content, self.sent), stays=False)
            return
        tell_gone(self.content)
        reactor.stop()


class Factory(protocol.ClientFactory):  # type: ignore[misc]
    def __init__(self, sent: list[Message], *, stays: bool) -> None:
        self.sent = sent
        self.stays = stays

    def buildProtocol(self, _: object) -> Client:
        return Client(self.sent, stays=self.stays)

    def clientConnectionFailed(self, _: object, reason: object) -> None:
        sys.stderr.write(f"{reason}\n")
        reactor.stop()


def connect(port: str, sent: list[Message], *, stays: bool) -> None:
    reactor.connectSSL(HOST, int(os.environ[port]), Factory(sent, stays=stays), ContextFactory())


if sys.argv[1] == "feedback":
    connect("LEGACY_FEEDBACK_PORT", [], stays=True)
else:
    connect("LEGACY_PORT", messages(), stays=sys.argv[1] == "careful")
reactor.run()
