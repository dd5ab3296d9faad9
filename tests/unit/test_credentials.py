from __future__ import annotations

from base64 import b64encode
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from heliograph.credentials import Description, Kind, days_left, describe, ends_at, push_types, warning_due
from heliograph.model import Environment, PushType, SigningKey
from tests.certificates import BOTH, TEAM_ID, TOPIC, ec_key, key_pem, push_certificate, rsa_key, tlv

DAY = 86400
START = datetime(2026, 3, 1, 12, tzinfo=UTC)
END = (START + timedelta(days=365)).timestamp()
NOW = END - 100 * DAY
EC = push_certificate(TOPIC, now=START)
RSA = push_certificate((TOPIC, "app"), (f"{TOPIC}.voip", "voip"), now=START, key=rsa_key())
MASTER = SigningKey("ABC123DEFG", TEAM_ID, EC.key_pem)


def problem(found: Description) -> str:
    (text,) = found.problems
    assert "\n" not in text
    assert not text.endswith(".")
    return text


@pytest.mark.parametrize(
    "content,key,passphrase",
    [
        (RSA.pem, None, None),
        (RSA.p12(b"secret"), None, b"secret"),
        (RSA.p12(), None, None),
        (RSA.certificate_der, RSA.key_pem, None),
        (RSA.key_pem, RSA.certificate_pem, None),
        (RSA.certificate_pem, key_pem(RSA.key, passphrase=b"secret"), b"secret"),
    ],
)
def test_certificate_with_its_key_tells_all_that_can_be_known(
    content: bytes, key: bytes | None, passphrase: bytes | None
) -> None:
    assert describe(content, filename="push.p12", key=key, passphrase=passphrase, now=NOW) == Description(
        Kind.CLIENT_CERTIFICATE,
        usable=True,
        name="Apple Push Services: com.example.shop",
        issuer="A certification authority for tests",
        team_id=TEAM_ID,
        topics=(TOPIC, f"{TOPIC}.voip"),
        environments=BOTH,
        push_types=(PushType.ALERT, PushType.BACKGROUND, PushType.VOIP),
        starts_at=int(START.timestamp()) - 3600,
        ends_at=int(END),
        days_left=100,
        fingerprint=RSA.certificate.fingerprint(SHA256()).hex(),
    )


def test_certificate_alone_tells_all_but_is_not_usable() -> None:
    for content in (EC.certificate_pem, EC.certificate_der, EC.certificate_pem + EC.chain_pem):
        found = describe(content, filename="aps.cer", now=NOW)
        assert (found.kind, found.usable, found.topics, found.days_left) == (Kind.CERTIFICATE, False, (TOPIC,), 100)
        assert "no private key: in Keychain Access" in problem(found)


def test_certificate_with_the_key_of_another_is_not_usable() -> None:
    found = describe(EC.certificate_pem, key=RSA.key_pem, now=NOW)
    assert (found.kind, found.usable, found.topics) == (Kind.CLIENT_CERTIFICATE, False, (TOPIC,))
    assert "belongs to none of the certificates" in problem(found)


def test_certificate_for_something_else_is_told_by_name() -> None:
    other = push_certificate(environments=(), name="Apple Distribution: A House (TEAM123456)", uid="TEAM123456")
    found = describe(other.pem, now=datetime.now(UTC).timestamp())
    assert (found.usable, found.topics, found.push_types) == (False, (), ())
    assert "'Apple Distribution: A House (TEAM123456)' is not one for pushing" in problem(found)


def test_expired_certificate_is_not_usable_and_says_since_when() -> None:
    found = describe(EC.pem, now=END + 1.5 * DAY)
    assert (found.usable, found.days_left, found.ends_at) == (False, -2, END)
    assert "has ended: create a new one" in problem(found)
    assert describe(EC.pem, now=END - 1).usable
    assert not describe(EC.pem, now=END).usable


def test_certificate_from_the_future_asks_for_the_clock() -> None:
    found = describe(EC.pem, now=START.timestamp() - DAY)
    assert not found.usable
    assert "not valid yet: correct the clock" in problem(found)


@pytest.mark.parametrize("content", [RSA.p12(b"secret"), key_pem(EC.key, passphrase=b"secret")])
def test_file_under_a_passphrase_is_told_until_the_right_one_is_given(content: bytes) -> None:
    found = describe(content, now=NOW)
    assert (found.kind, found.usable) == (Kind.LOCKED, False)
    assert "is under a passphrase" in problem(found)
    assert "does not open" in problem(describe(content, passphrase=b"wrong", now=NOW))
    assert describe(content, passphrase=b"secret", now=NOW).usable


@pytest.mark.parametrize(
    "filename", ["AuthKey_ABC123DEFG.p8", "/etc/keys/AuthKey_ABC123DEFG.p8", r"C:\keys\AuthKey_ABC123DEFG.p8"]
)
def test_signing_key_tells_its_id_and_opens_everything(filename: str) -> None:
    assert describe(EC.key_pem, filename=filename, now=NOW) == Description(
        Kind.SIGNING_KEY,
        usable=True,
        key_id="ABC123DEFG",
        environments=tuple(Environment),
        push_types=tuple(PushType),
    )


def test_signing_key_that_was_renamed_asks_for_its_id() -> None:
    found = describe(EC.key_pem, filename="push.pem", now=NOW)
    assert (found.kind, found.usable, found.key_id) == (Kind.SIGNING_KEY, True, None)
    assert "write it into key_id" in problem(found)


def test_key_for_another_of_apple_s_interfaces_is_doubted() -> None:
    found = describe(EC.key_pem, filename="SubscriptionKey_ABC123DEFG.p8", now=NOW)
    assert "App Store's interface" in found.problems[0]


@pytest.mark.parametrize(
    "pem",
    [RSA.key_pem, key_pem(ec.generate_private_key(ec.SECP384R1())), key_pem(RSA.key, PrivateFormat.TraditionalOpenSSL)],
)
def test_private_key_that_cannot_be_a_signing_key_asks_for_its_certificate(pem: bytes) -> None:
    found = describe(pem, now=NOW)
    assert (found.kind, found.usable) == (Kind.PRIVATE_KEY, False)
    assert "give the certificate that belongs to it" in problem(found)


REQUEST = (
    x509.CertificateSigningRequestBuilder()
    .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "A Person")]))
    .sign(ec_key(), SHA256())
)
SIGNED = tlv(0x06, bytes.fromhex("2a864886f70d010702"))
PROFILE = tlv(0x30, SIGNED, tlv(0xA0, tlv(0x30, b"\2\1\1" + b'<?xml version="1.0"?><plist version="1.0">' * 9)))


@pytest.mark.parametrize(
    "content,kind,advice",
    [
        (b"", Kind.EMPTY, "copy it again"),
        (b" \r\n", Kind.EMPTY, "copy it again"),
        (REQUEST.public_bytes(Encoding.PEM), Kind.REQUEST, "upload it to the developer account"),
        (
            ec_key().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
            Kind.PUBLIC_KEY,
            "give a certificate with its private key",
        ),
        (PROFILE, Kind.PROVISIONING_PROFILE, "a signed document, as a provisioning profile is"),
        (b"ABC123DEFG", Kind.UNKNOWN, "no certificate in the file"),
        (b'{"type": "service_account"}', Kind.UNKNOWN, "no certificate in the file"),
        (b"\x89PNG\r\n\x1a\n" * 100, Kind.UNKNOWN, "no certificate in the file"),
        (b"x" * 100_000, Kind.UNKNOWN, "longer than"),
        (EC.p12()[:-5], Kind.UNKNOWN, "cut short"),
        (EC.pem[:-5], Kind.UNKNOWN, "no end"),
    ],
)
def test_other_file_is_told_with_what_to_do(content: bytes, kind: Kind, advice: str) -> None:
    found = describe(content, filename="AuthKey_ABC123DEFG.p8", now=NOW)
    assert (found.kind, found.usable, found.environments, found.push_types) == (kind, False, (), ())
    assert advice in problem(found)


def test_description_holds_nothing_of_the_key_or_the_passphrase() -> None:
    for content in (RSA.pem, RSA.p12(b"a long passphrase"), EC.key_pem):
        shown = repr(describe(content, passphrase=b"a long passphrase", now=NOW))
        assert "PRIVATE KEY" not in shown
        assert "a long passphrase" not in shown
        assert b64encode(RSA.key_pem.splitlines()[3]).decode() not in shown


@given(st.binary() | st.text().map(str.encode), st.text(), st.binary() | st.none(), st.binary() | st.none())
def test_any_file_is_described(content: bytes, filename: str, key: bytes | None, passphrase: bytes | None) -> None:
    assert describe(content, filename=filename, key=key, passphrase=passphrase, now=NOW).problems


@given(st.integers(0, len(EC.pem) - 1), st.binary(max_size=3))
def test_damaged_certificate_is_described(place: int, octets: bytes) -> None:
    found = describe(EC.pem[:place] + octets + EC.pem[place + len(octets) :], now=NOW)
    assert found.usable or found.problems


@pytest.mark.parametrize(
    "topics,kinds",
    [
        ((), ()),
        ((TOPIC,), (PushType.ALERT, PushType.BACKGROUND)),
        ((f"{TOPIC}.voip",), (PushType.VOIP,)),
        ((f"{TOPIC}.complication", f"{TOPIC}.voip"), (PushType.VOIP, PushType.COMPLICATION)),
        ((f"{TOPIC}.voip-ptt",), (PushType.PUSHTOTALK,)),
        ((f"{TOPIC}.pushkit.fileprovider",), (PushType.FILEPROVIDER,)),
        ((f"{TOPIC}.push-type.liveactivity", f"{TOPIC}.location-query"), ()),
        (("com.apple.mgmt.External.7a2e4c1e",), (PushType.MDM,)),
    ],
)
def test_push_types_of_a_certificate_are_those_of_its_topics(
    topics: tuple[str, ...], kinds: tuple[PushType, ...]
) -> None:
    assert push_types(topics) == kinds


def test_certificate_ends_and_a_signing_key_does_not() -> None:
    loaded = EC.loaded()
    assert (ends_at(loaded), ends_at(MASTER)) == (END, None)
    assert days_left(MASTER, NOW) is None
    for ahead, days in [(DAY * 3, 3), (DAY * 3 - 1, 2), (1, 0), (0, 0), (-1, -1), (-DAY, -1), (-DAY - 1, -2)]:
        assert days_left(loaded, END - ahead) == days


@pytest.mark.parametrize(
    "days,warned,due",
    [
        (365, None, None),
        (30, None, None),
        (29, None, 30),
        (29, 30, None),
        (14, 30, None),
        (13, 30, 14),
        (6, 30, 7),
        (0, 7, 1),
        (0, 1, None),
        (-1, 1, 0),
        (-1, None, 0),
        (-99, 0, None),
        (29, 0, None),
    ],
)
def test_warning_is_due_once_for_each_mark_that_is_passed(days: int, warned: int | None, due: int | None) -> None:
    assert warning_due(days, warned) == due


def test_certificate_that_is_watched_to_its_end_is_warned_of_five_times() -> None:
    warned, told = None, []
    for days in range(60, -10, -1):
        due = warning_due(days, warned)
        if due is not None:
            warned = due
            told.append(days)
    assert told == [29, 13, 6, 0, -1]
