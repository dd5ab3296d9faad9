"""What tests with foreign programs share: certificates, and our server role on an ephemeral port."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from heliograph.net.http2 import Listener, listen
from tests.peers.echo import Echo


@dataclass(frozen=True)
class Pki:
    """A throw-away authority, and a certificate of its for localhost and 127.0.0.1."""

    authority: Path
    certificate: Path
    key: Path

    def server(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        context.set_alpn_protocols(["h2"])
        return context

    def client(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.authority)
        context.set_alpn_protocols(["h2"])
        return context


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    folder = tmp_path_factory.mktemp("pki")
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    found = Pki(folder / "authority.pem", folder / "certificate.pem", folder / "key.pem")
    authority.cert_pem.write_to_path(found.authority)
    issued.private_key_pem.write_to_path(found.key)
    for blob in issued.cert_chain_pems:
        blob.write_to_path(found.certificate, append=True)
    return found


@pytest.fixture
async def echo(pki: Pki) -> AsyncIterator[Listener]:
    """Our server role over TLS, with an echo behind it."""
    listener = await listen(Echo, tls=pki.server())
    yield listener
    await listener.aclose()


@pytest.fixture
async def plain_echo() -> AsyncIterator[Listener]:
    """The same without TLS, for clients with prior knowledge."""
    listener = await listen(Echo, tls=None)
    yield listener
    await listener.aclose()
