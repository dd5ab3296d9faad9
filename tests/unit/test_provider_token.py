from __future__ import annotations

import json
import shutil
import subprocess
from base64 import b64encode, urlsafe_b64decode, urlsafe_b64encode
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    pkcs12,
)
from hypothesis import given
from hypothesis import strategies as st

from heliograph.errors import ConfigError, Refused
from heliograph.model import SigningKey
from heliograph.protocols.provider_token import (
    FUTURE_TOLERANCE_S,
    Claims,
    key_id_from_filename,
    mint,
    parse_signing_key,
    public_key,
    verify,
)

KEY_ID, TEAM_ID = "ABC123DEFG", "TEAM123456"

# RFC 6979, appendix A.2.5: the key, and what it makes of "sample" with SHA-256.
PRIVATE = ec.derive_private_key(0xC9AFA9D845BA75166B5C215767B1D6934E50C3DB36E89B127B8A622B120F6721, ec.SECP256R1())
SAMPLE_R = 0xEFD48B2AACB6A8FD1140DD9CD45E81D69D2C877B56AAF991C34D0EA84EAF3716
SAMPLE_S = 0xF7CB1C942D657C41D436C7A1B6E29F65F3E900DBB9AFF4064DC4AB2F843ACDA8

ISSUED_AT = 1_700_001_000
# The same key's token as python-ecdsa 0.19.2 signs it with sign_deterministic.
TOKEN = (
    "eyJhbGciOiJFUzI1NiIsImtpZCI6IkFCQzEyM0RFRkcifQ.eyJpc3MiOiJURUFNMTIzNDU2IiwiaWF0IjoxNzAwMDAxMDAwfQ."
    "2wIFyQYaWMbZkYgnfuPmcS7LzbBx2nCSASNWZliIdwv2OMJXEFHPRf4Iad-MH7A-tbUGf26mSv0Tw_LltR1l7Q"
)


def pem_of(key: Any) -> bytes:
    pem: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem


KEY = SigningKey(KEY_ID, TEAM_ID, pem_of(PRIVATE))


def find_key(key_id: str) -> ec.EllipticCurvePublicKey | None:
    return PRIVATE.public_key() if key_id == KEY_ID else None


def to_base64(octets: bytes) -> bytes:
    return urlsafe_b64encode(octets).rstrip(b"=")


def signed(header: Any, claims: Any, *, der: bool = False, key: ec.EllipticCurvePrivateKey = PRIVATE) -> bytes:
    """A JWT of whatever is given, with a signature that fits."""
    text = b".".join(
        to_base64(part if isinstance(part, bytes) else json.dumps(part).encode()) for part in (header, claims)
    )
    signature = key.sign(text, ec.ECDSA(SHA256()))
    if not der:
        r, s = decode_dss_signature(signature)
        signature = r.to_bytes(32, "big") + s.to_bytes(32, "big")
    return text + b"." + to_base64(signature)


HEADER = {"alg": "ES256", "kid": KEY_ID}
CLAIMS = {"iss": TEAM_ID, "iat": ISSUED_AT}


def refused(token: bytes, now: float = ISSUED_AT) -> str:
    with pytest.raises(Refused) as caught:
        verify(token, find_key, now)
    assert caught.value.detail.startswith("The provider token ")
    return caught.value.reason


def test_signing_is_deterministic_as_rfc_6979_has_it() -> None:
    signature = PRIVATE.sign(b"sample", ec.ECDSA(SHA256(), deterministic_signing=True))
    assert decode_dss_signature(signature) == (SAMPLE_R, SAMPLE_S)


@pytest.mark.parametrize("now", [ISSUED_AT + 60, ISSUED_AT + 60.5, ISSUED_AT + 1000, ISSUED_AT + 1859.999])
def test_token_is_the_same_to_the_octet_for_a_whole_half_hour(now: float) -> None:
    assert mint(KEY, now) == TOKEN


@pytest.mark.parametrize("now,issued_at", [(ISSUED_AT + 59.9, ISSUED_AT - 1800), (ISSUED_AT + 1860, ISSUED_AT + 1800)])
def test_token_changes_a_minute_after_the_half_hour(now: float, issued_at: int) -> None:
    claims = urlsafe_b64decode(mint(KEY, now).split(".")[1] + "==")
    assert json.loads(claims) == {"iss": TEAM_ID, "iat": issued_at}


def test_half_hour_grid_is_that_of_the_clock() -> None:
    assert ISSUED_AT % 1800 == 0


@given(st.integers(0, 2**33))
def test_minted_token_is_never_from_the_future_nor_near_its_end(now: int) -> None:
    claims = verify(mint(KEY, now).encode(), find_key, now)
    assert now < 60 or 60 <= now - claims.issued_at < 1860


def test_minted_token_says_who_made_it() -> None:
    assert verify(TOKEN.encode(), find_key, ISSUED_AT) == Claims(KEY_ID, TEAM_ID, ISSUED_AT)
    assert public_key(KEY) == PRIVATE.public_key()


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl program")
def test_openssl_takes_the_minted_signature(tmp_path: Path) -> None:
    text, _, signature = mint(KEY, ISSUED_AT + 60).rpartition(".")
    octets = urlsafe_b64decode(signature + "==")
    # DER by hand: two INTEGERs in a SEQUENCE.
    numbers = b"".join(
        b"\x02%c%b" % (len(number), number)
        for half in (octets[:32], octets[32:])
        if (number := (b"\0" + half.lstrip(b"\0")) if half.lstrip(b"\0")[0] & 0x80 else half.lstrip(b"\0"))
    )
    (tmp_path / "signature").write_bytes(b"\x30%c%b" % (len(numbers), numbers))
    (tmp_path / "text").write_text(text)
    (tmp_path / "key").write_bytes(PRIVATE.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    command = ["openssl", "dgst", "-sha256", "-verify", "key", "-signature", "signature", "text"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "Verified OK")


@pytest.mark.parametrize("der", [False, True])
def test_signature_may_be_r_and_s_or_der(der: bool) -> None:
    for _ in range(20):
        assert verify(signed(HEADER, CLAIMS, der=der), find_key, ISSUED_AT).team_id == TEAM_ID


def test_token_from_another_library_may_carry_more_claims() -> None:
    token = signed(HEADER | {"typ": "JWT"}, CLAIMS | {"exp": ISSUED_AT + 9, "aud": ["x"]})
    assert verify(token, find_key, ISSUED_AT) == Claims(KEY_ID, TEAM_ID, ISSUED_AT)


def test_token_expires_an_hour_after_it_was_issued() -> None:
    assert verify(TOKEN.encode(), find_key, ISSUED_AT + 3600).issued_at == ISSUED_AT
    assert refused(TOKEN.encode(), ISSUED_AT + 3600.5) == "ExpiredProviderToken"


def test_token_from_the_future_is_invalid_beyond_the_tolerance() -> None:
    assert verify(TOKEN.encode(), find_key, ISSUED_AT - FUTURE_TOLERANCE_S).issued_at == ISSUED_AT
    assert refused(TOKEN.encode(), ISSUED_AT - FUTURE_TOLERANCE_S - 1) == "InvalidProviderToken"


@pytest.mark.parametrize(
    "header,claims",
    [
        (HEADER | {"alg": "none"}, CLAIMS),
        (HEADER | {"alg": "HS256"}, CLAIMS),
        (HEADER | {"alg": "es256"}, CLAIMS),
        (HEADER | {"alg": ["ES256"]}, CLAIMS),
        ({"kid": KEY_ID}, CLAIMS),
        ({"alg": "ES256"}, CLAIMS),
        (HEADER | {"kid": "UNKNOWNKEY"}, CLAIMS),
        (HEADER | {"kid": 7}, CLAIMS),
        (HEADER | {"crit": ["b64"]}, CLAIMS),
        (HEADER | {"crit": None}, CLAIMS),
        ([], CLAIMS),
        (b"\xff", CLAIMS),
        (b"[" * 3000, CLAIMS),
        (HEADER, {"iss": TEAM_ID}),
        (HEADER, {"iat": ISSUED_AT}),
        (HEADER, CLAIMS | {"iat": f"{ISSUED_AT}.5"}),
        (HEADER, CLAIMS | {"iat": f"-{ISSUED_AT}"}),
        (HEADER, CLAIMS | {"iat": "1e9"}),
        (HEADER, CLAIMS | {"iat": "9" * 5000}),
        (HEADER, CLAIMS | {"iat": ""}),
        (HEADER, CLAIMS | {"iat": 1e300}),
        (HEADER, CLAIMS | {"iat": True}),
        (HEADER, CLAIMS | {"iat": None}),
        (HEADER, CLAIMS | {"iat": 10**40}),
        (HEADER, CLAIMS | {"iss": None}),
        (HEADER, b'{"iss":"\xff","iat":1}'),
        (HEADER, b"{"),
    ],
)
def test_token_that_apple_would_not_take_is_invalid_though_its_signature_fits(header: Any, claims: Any) -> None:
    assert refused(signed(header, claims)) == "InvalidProviderToken"


@pytest.mark.parametrize("iat", [ISSUED_AT + 0.75, float(ISSUED_AT), str(ISSUED_AT)])
def test_time_of_issue_may_have_a_fraction_or_be_a_string_as_apple_takes_it(iat: float | str) -> None:
    token = signed(HEADER, CLAIMS | {"iat": iat})
    assert verify(token, find_key, ISSUED_AT + 3600) == Claims(KEY_ID, TEAM_ID, ISSUED_AT)
    assert refused(token, ISSUED_AT + 3601) == "ExpiredProviderToken"
    assert refused(token, ISSUED_AT - FUTURE_TOLERANCE_S - 1) == "InvalidProviderToken"


def test_unsigned_token_is_invalid() -> None:
    header = to_base64(json.dumps(HEADER | {"alg": "none"}).encode())
    assert refused(header + b"." + TOKEN.split(".")[1].encode() + b".") == "InvalidProviderToken"
    assert refused(TOKEN.rpartition(".")[0].encode() + b".") == "InvalidProviderToken"


def test_token_in_padded_base64_is_taken_as_apple_takes_that_of_a2() -> None:
    text = b".".join(b64encode(json.dumps(part).encode()) for part in (HEADER, CLAIMS))
    token = text + b"." + b64encode(PRIVATE.sign(text, ec.ECDSA(SHA256())))
    assert b"=" in token
    assert verify(token, find_key, ISSUED_AT) == Claims(KEY_ID, TEAM_ID, ISSUED_AT)


@pytest.mark.parametrize(
    "signature",
    [b"\0" * 64, b"\0" * 63 + b"\1", b"\xff" * 64, b"\1" * 63, b"\x30\x00", b"\x30\x06\x02\x01\x01\x02\x01\x01", b"x"],
)
def test_made_up_signature_is_invalid(signature: bytes) -> None:
    assert refused(TOKEN.rpartition(".")[0].encode() + b"." + to_base64(signature)) == "InvalidProviderToken"


def test_signature_of_another_key_is_invalid() -> None:
    assert refused(signed(HEADER, CLAIMS, key=ec.generate_private_key(ec.SECP256R1()))) == "InvalidProviderToken"


@pytest.mark.parametrize(
    "token",
    [
        b"",
        b"..",
        b"a.b.c",
        b"bearer " + TOKEN.encode(),
        TOKEN.encode() + b"=",
        TOKEN.encode() + b"\n",
        b" " + TOKEN.encode(),
        TOKEN.encode() + b".x",
        TOKEN.replace(".", "!.", 1).encode(),
        TOKEN.replace("-", "+").replace("_", "/").encode(),
        TOKEN.encode()[:-1] + b"R",
        b"a" * 5000,
        b"\xff.\xff.\xff",
    ],
)
def test_token_that_is_not_spelt_as_jws_wants_it_is_invalid(token: bytes) -> None:
    assert refused(token) == "InvalidProviderToken"


@given(st.binary() | st.text("eyJ.-_=ab", max_size=60).map(str.encode))
def test_any_octets_are_refused_and_nothing_else(token: bytes) -> None:
    assert refused(token) == "InvalidProviderToken"


@given(st.integers(0, len(TOKEN) - 1), st.integers(1, 255))
def test_token_with_one_octet_changed_is_refused(place: int, change: int) -> None:
    token = bytearray(TOKEN.encode())
    token[place] ^= change
    assert refused(bytes(token)) == "InvalidProviderToken"


def test_signing_key_is_taken_as_apple_issues_it() -> None:
    key = parse_signing_key(KEY.pem, key_id=KEY_ID, team_id=TEAM_ID)
    assert key == KEY
    windows = parse_signing_key(KEY.pem.replace(b"\n", b"\r\n"), key_id=KEY_ID, team_id=TEAM_ID)
    assert mint(windows, ISSUED_AT + 60) == TOKEN


def certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Apple Push Services: com.example.news")])
    start = datetime(2026, 1, 1, tzinfo=UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(start).not_valid_after(start + timedelta(days=365))
    return builder.sign(key, SHA256())


CERTIFICATE = certificate(PRIVATE)


@pytest.mark.parametrize(
    "pem,complaint",
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"AuthKey_ABC123DEFG.p8", "is not PEM"),
        (b"\xff\xfe-", "is not PEM"),
        (PRIVATE.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()), "is not PEM"),
        (KEY.pem[:100], "is damaged PEM"),
        (KEY.pem.replace(KEY.pem[40:60], b"!" * 20), "is damaged PEM"),
        (PRIVATE.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")), "is encrypted"),
        (pem_of(ec.generate_private_key(ec.SECP384R1())), "is on the curve secp384r1"),
        (pem_of(ec.generate_private_key(ec.SECP256K1())), "is on the curve secp256k1"),
        (pem_of(ed25519.Ed25519PrivateKey.generate()), "is no elliptic-curve key"),
        (CERTIFICATE.public_bytes(Encoding.PEM), "is a certificate"),
        (pkcs12.serialize_key_and_certificates(None, PRIVATE, CERTIFICATE, None, NoEncryption()), r"is a \.p12"),
        (PRIVATE.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), "is a public key"),
    ],
)
def test_file_that_is_no_signing_key_is_refused_with_what_it_is(pem: bytes, complaint: str) -> None:
    with pytest.raises(ConfigError, match=f"The signing key {complaint}"):
        parse_signing_key(pem, key_id=KEY_ID, team_id=TEAM_ID)


@given(st.binary())
def test_any_file_is_a_signing_key_or_a_config_error(pem: bytes) -> None:
    with pytest.raises(ConfigError):
        parse_signing_key(pem, key_id=KEY_ID, team_id=TEAM_ID)


@pytest.mark.parametrize("wrong", ["", "abc123defg", "ABC123DEF", "ABC123DEFGH", "ABC123DEF\n", "ÄBC123DEFG"])
def test_key_id_and_team_id_are_ten_capitals_and_digits(wrong: str) -> None:
    with pytest.raises(ConfigError, match="The key id"):
        parse_signing_key(KEY.pem, key_id=wrong, team_id=TEAM_ID)
    with pytest.raises(ConfigError, match="The team id"):
        parse_signing_key(KEY.pem, key_id=KEY_ID, team_id=wrong)


def test_key_id_is_read_from_the_name_that_apple_gives_the_file() -> None:
    assert key_id_from_filename("AuthKey_ABC123DEFG.p8") == "ABC123DEFG"
    for name in ("AuthKey_ABC123.p8", "key.p8", "AuthKey_ABC123DEFG.p8.bak", "AuthKey_ABC123DEFG.p8\n"):
        assert key_id_from_filename(name) is None
