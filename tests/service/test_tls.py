from __future__ import annotations

import socket
import ssl
import sys
import tempfile
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from heliograph.config import TlsVersion
from heliograph.errors import ConfigError
from heliograph.model import ClientCertificate
from heliograph.net.tls import (
    Identity,
    check_anchor,
    client_context,
    good_until,
    legacy_context,
    server_context,
    throwaway_identity,
)
from tests.certificates import TOPIC, authority, key_pem, push_certificate, rsa_key


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


def test_end_of_what_is_no_certificate_cannot_be_told() -> None:
    with pytest.raises(ConfigError, match="not PEM, or damaged"):
        good_until(b"nonsense")


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


# Client certificates.


def shown(
    identity: Identity, authorities: bytes | None, certificate: ClientCertificate | None, version: str = "TLSv1.3"
) -> bytes | None:
    """The client certificate that the server sees, as DER. Raises what the server raises."""
    server = server_context(identity.certificate_pem, identity.key_pem, client_authorities=authorities)
    client = client_context(identity.ca_pem, certificate)
    client.maximum_version = ssl.TLSVersion[version.replace(".", "_")]
    ours, theirs = socket.socketpair()
    seen: list[bytes | Exception | None] = []

    def serve() -> None:
        try:
            with server.wrap_socket(theirs, server_side=True) as connection:
                seen.append(connection.getpeercert(binary_form=True))
                connection.unwrap()
        except OSError as error:
            seen.append(error)
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname="localhost") as connection:
            assert connection.version() == version
            connection.unwrap()
    except OSError:
        ours.close()  # refused: what the server says of it is of interest
    thread.join()
    (found,) = seen
    if isinstance(found, Exception):
        raise found
    return found


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
@pytest.mark.parametrize("kind", ["EC", "RSA"])
def test_client_shows_its_certificate_to_a_server_that_asks(identity: Identity, kind: str, version: str) -> None:
    issued = push_certificate(TOPIC, key=rsa_key() if kind == "RSA" else None)
    assert shown(identity, issued.chain_pem, issued.loaded(), version) == issued.certificate_der


def test_certificate_itself_may_be_whom_the_server_trusts(identity: Identity) -> None:
    issued, other = push_certificate(TOPIC), push_certificate("com.example.news", key=rsa_key())
    assert shown(identity, issued.certificate_pem + other.certificate_pem, other.loaded()) == other.certificate_der
    with pytest.raises(ssl.SSLError):
        shown(identity, issued.certificate_pem, other.loaded())


def test_client_without_a_certificate_is_taken_by_a_server_that_asks(identity: Identity) -> None:
    assert shown(identity, authority().certificate_pem, None) is None


def test_server_asks_for_no_certificate_unless_it_knows_whose_to_trust(identity: Identity) -> None:
    assert shown(identity, None, push_certificate(TOPIC).loaded()) is None


@pytest.mark.parametrize("days", [-0.5, -400])
def test_expired_client_certificate_is_not_taken(identity: Identity, days: float) -> None:
    old = push_certificate(TOPIC, now=datetime.now(UTC) - timedelta(days=500), days=500 + days)
    with pytest.raises(ssl.SSLCertVerificationError):
        shown(identity, old.chain_pem, old.loaded())


def test_client_certificate_of_an_unknown_authority_is_not_taken(identity: Identity) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        shown(identity, identity.ca_pem, push_certificate(TOPIC).loaded())


def test_client_certificate_without_its_key_is_refused_by_name() -> None:
    issued = push_certificate(TOPIC)
    wrong = msgspec.structs.replace(issued.loaded(), key_pem=key_pem(rsa_key()))
    with pytest.raises(ConfigError, match=r"'Apple Push Services: com.example.shop' cannot be shown in TLS"):
        client_context(None, wrong)


def test_authorities_of_clients_that_are_not_pem_are_refused(identity: Identity) -> None:
    for nonsense in (b"", b"nonsense", b"\xff"):
        with pytest.raises(ConfigError, match="authorities of clients are not PEM"):
            server_context(identity.certificate_pem, identity.key_pem, client_authorities=nonsense)


def test_anchor_that_openssl_cannot_read_shuts_out_no_other(identity: Identity) -> None:
    good = [push_certificate(TOPIC, key=rsa_key()) for _ in range(4)]
    as_text, as_octets = bytes.fromhex("06035504030c"), bytes.fromhex("060355040304")  # of the common name
    bad = ssl.DER_cert_to_PEM_cert(good[0].certificate_der.replace(as_text, as_octets)).encode()
    with pytest.raises(ConfigError, match="OpenSSL cannot read it"):
        check_anchor(bad)
    check_anchor(good[1].certificate_pem)
    for anchors in (
        [bad],
        [bad, good[1].certificate_pem],
        [good[1].certificate_pem, bad, good[2].certificate_pem, bad],
    ):
        context = legacy_context(
            identity.certificate_pem,
            identity.key_pem,
            anchors=anchors,
            minimum=TlsVersion.TLS_1_2,
            required=True,
        )
        assert context.cert_store_stats()["x509"] == len(anchors) - anchors.count(bad)


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_key_is_on_no_disk_where_that_can_be_and_else_in_a_file_for_our_eyes_that_is_gone_afterwards(
    identity: Identity, platform: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if platform == "linux" != sys.platform:
        pytest.skip("only Linux has files in memory")
    modes: list[int] = []
    load = ssl.SSLContext.load_cert_chain

    def look(self: ssl.SSLContext, name: str, **arguments: bytes) -> None:
        modes.extend(file.stat().st_mode & 0o777 for file in tmp_path.iterdir())
        load(self, name, **arguments)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", look)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "platform", platform)
    server_context(identity.certificate_pem, identity.key_pem)
    client_context(identity.ca_pem, push_certificate(TOPIC).loaded())
    assert modes == ([] if platform == "linux" else [0o600] * 2)
    assert not list(tmp_path.iterdir())
