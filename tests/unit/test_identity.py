"""The certificate of the doors: made once, kept, renewed; or the operator's own."""

from __future__ import annotations

import socket
import ssl
import stat
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

from heliograph.errors import ConfigError
from heliograph.net.identity import AUTHORITY, server_identity
from heliograph.net.tls import server_context, throwaway_identity
from tests.certificates import key_pem, push_certificate, rsa_key

NOW = datetime.now(UTC)


def made(data: Path, now: datetime = NOW) -> tuple[bytes, bytes]:
    return server_identity(data, None, None, now=now)


def shakes_hands(chain: bytes, key: bytes, ca: bytes, name: str) -> str:
    """The certificate's key exchange with a client that verifies; the cipher."""
    context = ssl.create_default_context(cadata=ca.decode())
    server, client = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs = context.wrap_bio(server, client, server_hostname=name)
    ours = server_context(chain, key).wrap_bio(client, server, server_side=True)
    for _ in range(3):
        for side in (theirs, ours):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    cipher = theirs.cipher()
    assert cipher is not None
    return cipher[0]


NAMES = (
    *("localhost", "127.0.0.1", "::1", "gateway.push.apple.com", "gateway.sandbox.push.apple.com"),
    *("feedback.push.apple.com", "feedback.sandbox.push.apple.com"),
    *("api.push.apple.com", "api.sandbox.push.apple.com", "api.development.push.apple.com"),
)


def test_clients_that_trust_the_authority_verify_it_under_every_name(tmp_path: Path) -> None:
    chain, key = made(tmp_path)
    for name in NAMES:
        assert shakes_hands(chain, key, (tmp_path / AUTHORITY).read_bytes(), name)


def test_it_is_rsa_of_2048_bits_and_for_this_host_too(tmp_path: Path) -> None:
    chain, _ = made(tmp_path)
    certificate, authority = x509.load_pem_x509_certificates(chain)
    for each in (certificate, authority):
        key = each.public_key()
        assert isinstance(key, rsa.RSAPublicKey)
        assert key.key_size == 2048
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert socket.gethostname().lower() in names.get_values_for_type(x509.DNSName)
    assert certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_encipherment  # no ECDHE, no DHE


def test_it_is_the_same_at_the_next_start_and_only_we_can_read_it(tmp_path: Path) -> None:
    data = tmp_path / "new" / "data"
    first = made(data)
    assert made(data, NOW + timedelta(days=700)) == first
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in data.iterdir()} == dict.fromkeys(
        ("doors-ca.pem", "doors-ca-key.pem", "doors.pem", "doors.lock"), 0o600
    )


def test_near_its_end_it_is_made_anew_by_the_same_authority(tmp_path: Path) -> None:
    chain, key = made(tmp_path)
    ca = (tmp_path / AUTHORITY).read_bytes()
    later = NOW + timedelta(days=741)
    renewed, new_key = made(tmp_path, later)
    assert renewed != chain
    assert new_key != key
    assert (tmp_path / AUTHORITY).read_bytes() == ca
    certificate = x509.load_pem_x509_certificate(renewed)
    assert certificate.not_valid_after_utc > later + timedelta(days=790)
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca))


def test_an_authority_that_would_end_first_is_made_anew(tmp_path: Path) -> None:
    made(tmp_path)
    ca = (tmp_path / AUTHORITY).read_bytes()
    renewed, key = made(tmp_path, NOW + timedelta(days=7000))
    assert (tmp_path / AUTHORITY).read_bytes() != ca
    x509.load_pem_x509_certificate(renewed).verify_directly_issued_by(
        x509.load_pem_x509_certificate((tmp_path / AUTHORITY).read_bytes())
    )
    assert made(tmp_path, NOW + timedelta(days=7000)) == (renewed, key)


def test_a_host_with_a_new_name_gets_a_certificate_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(tmp_path)
    monkeypatch.setattr(socket, "gethostname", lambda: "Push-7.example.")
    renewed, key = made(tmp_path)
    assert renewed != first[0]
    assert shakes_hands(renewed, key, (tmp_path / AUTHORITY).read_bytes(), "push-7.example")
    monkeypatch.setattr(socket, "gethostname", lambda: "not a name")
    assert made(tmp_path) == (renewed, key)


def test_a_removed_file_is_made_anew_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / "doors.pem").unlink()
    (tmp_path / AUTHORITY).unlink()
    chain, _ = made(tmp_path)
    x509.load_pem_x509_certificate(chain).verify_directly_issued_by(
        x509.load_pem_x509_certificate((tmp_path / AUTHORITY).read_bytes())
    )
    for name in ("doors.pem", "doors-ca-key.pem"):
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(kept[:900])
        with pytest.raises(ConfigError, match=f"{name} is damaged: put it back as it was, or remove it"):
            made(tmp_path)
        (tmp_path / name).write_bytes(kept)


def test_processes_that_start_at_once_agree(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        found = set(pool.map(made, [tmp_path] * 4))
    assert found == {made(tmp_path)}


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be kept in"):
        made(tmp_path / "file" / "data")


# -- the operator's own ----------------------------------------------------------------------------------------------


def private(path: Path, content: bytes) -> str:
    path.touch(0o600)
    path.write_bytes(content)
    return f"file:{path}"


def test_the_operator_s_certificate_is_taken_from_one_file_or_two(tmp_path: Path) -> None:
    identity = throwaway_identity(NOW)
    certificate = tmp_path / "server.pem"
    certificate.write_bytes(identity.certificate_pem)  # for everybody to read
    key = private(tmp_path / "server.key", identity.key_pem)
    assert server_identity(tmp_path, f"file:{certificate}", key) == (identity.certificate_pem, identity.key_pem)
    both = private(tmp_path / "both.pem", identity.key_pem + identity.certificate_pem)
    assert shakes_hands(*server_identity(tmp_path, both, None), identity.ca_pem, "localhost")
    assert not (tmp_path / AUTHORITY).exists()


def test_what_the_operator_gives_wrong_is_told(tmp_path: Path) -> None:
    identity = throwaway_identity(NOW)
    alone = private(tmp_path / "server.pem", identity.certificate_pem)
    other = private(tmp_path / "other.key", key_pem(rsa_key()))
    locked = private(tmp_path / "locked.key", key_pem(rsa_key(), passphrase=b"secret"))
    nothing = private(tmp_path / "empty.pem", b"")
    rsa_pem = private(tmp_path / "rsa.pem", push_certificate(key=rsa_key()).certificate_pem)
    for certificate, key, words in (
        (None, other, "certificate_key without a certificate"),
        (alone, None, "has no private key in it: name the key's file as certificate_key"),
        (alone, other, "belong together"),
        (rsa_pem, locked, "without a passphrase"),
        (nothing, None, "no private key"),
        (f"file:{tmp_path}/nowhere.pem", None, "certificate"),
    ):
        with pytest.raises(ConfigError, match=words):
            server_identity(tmp_path, certificate, key)


def test_a_setting_is_named_by_its_table_and_a_missing_key_before_the_mode(tmp_path: Path) -> None:
    public = tmp_path / "public.pem"
    public.write_bytes(throwaway_identity(NOW).certificate_pem)
    public.chmod(0o644)
    for name, words in (
        ("public.pem", "legacy.a.certificate: the file has no private key in it: .* as legacy.a.certificate_key"),
        ("nowhere.pem", "legacy.a.certificate: cannot be read"),
    ):
        with pytest.raises(ConfigError, match=words):
            server_identity(tmp_path, f"file:{tmp_path}/{name}", None, table="legacy.a")
