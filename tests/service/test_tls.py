from __future__ import annotations

import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from heliograph.errors import ConfigError
from heliograph.net.tls import Identity, client_context, good_until, server_context, throwaway_identity


@pytest.fixture(scope="module")
def identity() -> Identity:
    return throwaway_identity(datetime.now(UTC))


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> ssl.SSLSocket:
    """The client's end of a connection; raises what the client raises."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        return client.wrap_socket(ours, server_hostname=name)
    finally:
        ours.close()
        thread.join()


def negotiated(identity: Identity, client: ssl.SSLContext, name: str = "localhost") -> tuple[str | None, str | None]:
    server = server_context(identity.certificate_pem, identity.key_pem)
    with shake_hands(server, client, name) as connection:
        return connection.selected_alpn_protocol(), connection.version()


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1", "api.push.apple.com", "api.sandbox.push.apple.com"])
def test_throwaway_identity_stands_strict_verification_under_each_name(identity: Identity, name: str) -> None:
    client = client_context(identity.ca_pem)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    assert negotiated(identity, client, name) == ("h2", "TLSv1.3")


def test_client_does_not_take_a_server_under_another_name(identity: Identity) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        negotiated(identity, client_context(identity.ca_pem), "example.com")


@pytest.mark.parametrize("own_authority", [True, False])
def test_client_does_not_take_a_server_of_an_unknown_authority(identity: Identity, own_authority: bool) -> None:
    ca = throwaway_identity(datetime.now(UTC)).ca_pem if own_authority else None
    with pytest.raises(ssl.SSLCertVerificationError):
        negotiated(identity, client_context(ca))


def test_expired_certificate_is_not_taken() -> None:
    old = throwaway_identity(datetime.now(UTC) - timedelta(days=1000))
    assert good_until(old.certificate_pem) < datetime.now(UTC)
    with pytest.raises(ssl.SSLCertVerificationError):
        negotiated(old, client_context(old.ca_pem))


def test_tls_1_2_is_taken_and_nothing_older(identity: Identity) -> None:
    client = client_context(identity.ca_pem)
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    assert negotiated(identity, client) == ("h2", "TLSv1.2")
    server = server_context(identity.certificate_pem, identity.key_pem)
    assert client.minimum_version == server.minimum_version == ssl.TLSVersion.TLSv1_2


def test_certificate_key_and_authority_may_be_files(identity: Identity, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("ca.pem", "server.pem", "server.key")]
    for path, pem in zip(paths, (identity.ca_pem, identity.certificate_pem, identity.key_pem), strict=True):
        path.write_bytes(pem)
    with shake_hands(server_context(paths[1], paths[2]), client_context(paths[0]), "localhost") as connection:
        assert connection.selected_alpn_protocol() == "h2"


def test_key_of_another_certificate_is_refused(identity: Identity) -> None:
    other = throwaway_identity(datetime.now(UTC))
    with pytest.raises(ConfigError, match="belong together"):
        server_context(identity.certificate_pem, other.key_pem)


def test_key_with_a_passphrase_is_refused_and_nobody_is_asked_for_it(identity: Identity) -> None:
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        load_pem_private_key,
    )

    key = load_pem_private_key(identity.key_pem, None)
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    with pytest.raises(ConfigError, match="without a passphrase"):
        server_context(identity.certificate_pem, locked)


def test_authority_that_is_not_pem_is_refused() -> None:
    for nonsense in (b"", b"nonsense", b"\xff"):
        with pytest.raises(ConfigError, match="not PEM"):
            client_context(nonsense)


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.pem: No such file"):
        client_context(tmp_path / "absent.pem")


def test_identity_is_not_shown(identity: Identity) -> None:
    assert "PRIVATE" not in repr(identity)
