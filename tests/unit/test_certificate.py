from __future__ import annotations

import itertools
import re
import subprocess
from base64 import b64encode, encodebytes
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import dsa, ed25519
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA1, SHA256
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    pkcs12,
)
from hypothesis import example, given
from hypothesis import strategies as st

from heliograph.errors import ConfigError
from heliograph.model import ClientCertificate, Environment
from heliograph.protocols.certificate import load, particulars
from heliograph.protocols.certificate.der import Tlv
from heliograph.protocols.certificate.files import MAX_BYTES, items
from tests.certificates import (
    BOTH,
    TOPIC,
    Issued,
    ec_key,
    key_pem,
    push_certificate,
    rsa_key,
    tlv,
    topic_list,
)

KEYCHAIN = (Path(__file__).parents[1] / "data" / "keychain.p12").read_bytes()
"""Encrypted as Keychain Access does, with the passphrase "keychain"; its key was made to be thrown away.

`openssl pkcs12 -export -legacy -certpbe PBE-SHA1-RC2-40 -keypbe PBE-SHA1-3DES -macalg sha1` made it of a
`push_certificate`, which ends in 2125.
"""

PASSPHRASE = b"correct horse"
START = datetime(2026, 3, 1, 12, tzinfo=UTC)
EC = push_certificate(TOPIC, now=START)
RSA = push_certificate(TOPIC, now=START, key=rsa_key())
DEVELOPMENT, PRODUCTION = Environment.DEVELOPMENT, Environment.PRODUCTION


def der(key: Any, form: PrivateFormat = PrivateFormat.PKCS8, passphrase: bytes = b"") -> bytes:
    encryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    octets: bytes = key.private_bytes(Encoding.DER, form, encryption)
    return octets


def refusal(content: bytes, *, key: bytes | None = None, passphrase: bytes | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(content, key=key, passphrase=passphrase)
    text = str(caught.value)
    assert "\n" not in text
    assert not text.endswith(".")
    return text


def is_loaded(loaded: ClientCertificate, issued: Issued) -> bool:
    """Whether it is all there, and in the form that TLS wants."""
    return (
        loaded.certificate_pem.startswith(issued.certificate_pem)
        and loaded.key_pem == issued.key_pem
        and loaded.fingerprint == issued.certificate.fingerprint(SHA256()).hex()
    )


BAG_ATTRIBUTES = (
    b"Bag Attributes\n    friendlyName: Apple Push Services: com.example.shop\n    localKeyID: 3F 82 \n"
    b"subject=UID = com.example.shop, CN = Apple Push Services: com.example.shop\n\nissuer=CN = A\n\n"
)


def three_des(rounds: int) -> Any:
    builder = PrivateFormat.PKCS12.encryption_builder().kdf_rounds(rounds).hmac_hash(SHA1())
    return builder.key_cert_algorithm(pkcs12.PBES.PBESv1SHA1And3KeyTripleDESCBC).build(PASSPHRASE)


def modern(rounds: int) -> Any:
    builder = PrivateFormat.PKCS12.encryption_builder().kdf_rounds(rounds).hmac_hash(SHA256())
    return builder.key_cert_algorithm(pkcs12.PBES.PBESv2SHA256AndAES256CBC).build(PASSPHRASE)


ONE_FILE: dict[str, Callable[[Issued], bytes]] = {
    "p12 of today": lambda issued: issued.p12(PASSPHRASE),
    "p12 with Triple-DES": lambda issued: issued.p12(encryption=three_des(2048)),
    "p12 with 600,000 rounds": lambda issued: issued.p12(encryption=modern(600_000)),
    "p12 without passphrase": lambda issued: issued.p12(),
    "p12 as base64": lambda issued: encodebytes(issued.p12(PASSPHRASE)),
    "p12 as base64 in one line": lambda issued: b64encode(issued.p12(PASSPHRASE)),
    "p12 with octets behind it": lambda issued: issued.p12(PASSPHRASE) + b"\r\n",
    "certificate before key": lambda issued: issued.certificate_pem + issued.key_pem,
    "key before certificate": lambda issued: issued.key_pem + issued.certificate_pem,
    "key amid certificates": lambda issued: issued.chain_pem + issued.key_pem + issued.certificate_pem,
    "bag attributes": lambda issued: BAG_ATTRIBUTES.join([b"", issued.certificate_pem, issued.key_pem]),
    "lines of Windows": lambda issued: (BAG_ATTRIBUTES + issued.pem).replace(b"\n", b"\r\n"),
    "lines of an old Mac": lambda issued: issued.pem.replace(b"\n", b"\r"),
    "no newline at the end": lambda issued: issued.pem.rstrip(),
    "text of Notepad": lambda issued: b"\xef\xbb\xbf" + issued.pem,
    "text of PowerShell": lambda issued: issued.pem.decode().encode("utf-16"),
    "among keys of other programs": lambda issued: (
        b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nmQ\n=ab\n-----END PGP PUBLIC KEY BLOCK-----\n" + issued.pem
    ),
    "encrypted key": lambda issued: issued.certificate_pem + key_pem(issued.key, passphrase=PASSPHRASE),
}


@pytest.mark.parametrize("issued", [EC, RSA], ids=["EC", "RSA"])
@pytest.mark.parametrize("form", ONE_FILE)
def test_certificate_and_key_in_one_file_are_loaded(form: str, issued: Issued) -> None:
    loaded = load(ONE_FILE[form](issued), passphrase=PASSPHRASE)
    assert is_loaded(loaded, issued)
    assert (loaded.topics, loaded.environments) == ((TOPIC,), BOTH)
    assert loaded.name == "Apple Push Services: com.example.shop"
    assert (loaded.not_before, loaded.not_after) == (
        (START - timedelta(hours=1)).timestamp(),
        (START + timedelta(days=365)).timestamp(),
    )


TRADITIONAL = PrivateFormat.TraditionalOpenSSL
KEY_FILES: dict[str, Callable[[Any], bytes]] = {
    "PKCS#8": key_pem,
    "PKCS#8 as DER": der,
    "PKCS#8 as DER and base64": lambda key: encodebytes(der(key)),
    "encrypted PKCS#8": lambda key: key_pem(key, passphrase=PASSPHRASE),
    "encrypted PKCS#8 as DER": lambda key: der(key, passphrase=PASSPHRASE),
    "PKCS#1 or SEC1": lambda key: key_pem(key, TRADITIONAL),
    "PKCS#1 or SEC1 as DER": lambda key: der(key, TRADITIONAL),
    "encrypted PKCS#1 or SEC1": lambda key: key_pem(key, TRADITIONAL, PASSPHRASE),
}


@pytest.mark.parametrize("issued", [EC, RSA], ids=["EC", "RSA"])
@pytest.mark.parametrize("form", KEY_FILES)
@pytest.mark.parametrize("certificate", ["certificate_pem", "certificate_der"])
def test_certificate_and_key_in_two_files_are_loaded(certificate: str, form: str, issued: Issued) -> None:
    key_file = KEY_FILES[form](issued.key)
    assert is_loaded(load(getattr(issued, certificate), key=key_file, passphrase=PASSPHRASE), issued)
    assert is_loaded(load(key_file, key=getattr(issued, certificate), passphrase=PASSPHRASE), issued)


def test_p12_of_keychain_access_is_loaded() -> None:
    loaded = load(KEYCHAIN, passphrase=b"keychain")
    assert loaded.topics == (TOPIC, f"{TOPIC}.voip", f"{TOPIC}.complication")
    assert loaded.environments == BOTH


def openssl(*arguments: str, content: bytes) -> bytes:
    return subprocess.run(["openssl", *arguments], input=content, capture_output=True, check=True).stdout


BUNDLES = {
    "today's": "",
    "older": "-legacy",
    "of Keychain Access": "-legacy -certpbe PBE-SHA1-RC2-40 -keypbe PBE-SHA1-3DES -macalg sha1",
    "weak key too": "-legacy -certpbe PBE-SHA1-RC2-40 -keypbe PBE-SHA1-RC2-40",
    "128 bits of RC2": "-legacy -certpbe PBE-SHA1-RC2-128 -keypbe PBE-SHA1-RC2-128",
    "two keys of Triple-DES": "-legacy -certpbe PBE-SHA1-2DES -keypbe PBE-SHA1-2DES",
    "128 bits of AES": "-certpbe AES-128-CBC -keypbe AES-128-CBC -iter 10000",
    "plain certificate": "-certpbe NONE",
    "plain key": "-keypbe NONE",
    "nothing encrypted": "-certpbe NONE -keypbe NONE",
    "no MAC": "-nomac",
    "nothing at all": "-certpbe NONE -keypbe NONE -nomac",
}


@pytest.mark.peer("openssl")
@pytest.mark.parametrize("passphrase", ["", "correct horse", "Grüße 🔑"])
@pytest.mark.parametrize("options", BUNDLES)
def test_p12_of_the_openssl_program_is_loaded(options: str, passphrase: str, tmp_path: Path) -> None:
    (tmp_path / "push.pem").write_bytes(RSA.pem)  # the program reads it twice
    source = ("-in", str(tmp_path / "push.pem"), "-passout", f"pass:{passphrase}")
    made = openssl("pkcs12", "-export", *source, *BUNDLES[options].split(), content=b"")
    assert is_loaded(load(made, passphrase=passphrase.encode()), RSA)
    if not passphrase:
        assert is_loaded(load(made), RSA)


@pytest.mark.peer("openssl")
@pytest.mark.parametrize(
    "options",
    [
        "pkcs8 -topk8 -v2 aes-256-cbc",
        "pkcs8 -topk8 -scrypt",
        "pkcs8 -topk8 -v1 PBE-SHA1-3DES",
        "rsa -traditional -aes128",
        "rsa -traditional -des3",
    ],
)
def test_encrypted_key_of_the_openssl_program_is_loaded(options: str) -> None:
    made = openssl(*options.split(), "-passout", "pass:correct horse", content=RSA.key_pem)
    assert is_loaded(load(RSA.certificate_pem, key=made, passphrase=PASSPHRASE), RSA)


@pytest.mark.peer("openssl")
def test_key_on_a_curve_that_is_not_known_is_refused(tmp_path: Path) -> None:
    key = openssl("ecparam", "-name", "secp112r1", "-genkey", "-noout", content=b"")
    (tmp_path / "push.pem").write_bytes(key)
    certificate = openssl(
        "req", "-x509", "-new", "-sha256", "-key", str(tmp_path / "push.pem"), "-subj", "/CN=x", content=b""
    )
    (tmp_path / "push.pem").write_bytes(key + certificate)
    bundle = openssl("pkcs12", "-export", "-in", str(tmp_path / "push.pem"), "-passout", "pass:x", content=b"")
    for content in (bundle, certificate + openssl("pkcs8", "-topk8", "-passout", "pass:x", content=key)):
        assert "has a key of an unknown kind" in refusal(content, passphrase=b"x")


@pytest.mark.peer("openssl")
def test_trusted_certificate_of_the_openssl_program_is_loaded() -> None:
    made = openssl("x509", "-trustout", "-addtrust", "clientAuth", "-setalias", "push", content=RSA.certificate_pem)
    assert b"TRUSTED CERTIFICATE" in made
    assert is_loaded(load(made, key=RSA.key_pem), RSA)


def parts(octets: bytes) -> Iterator[tuple[int, bytes]]:
    """The tags in a row of DER, with what they hold; ValueError for anything else."""
    at = 0
    while at < len(octets):
        tag, length = octets[at : at + 2]
        at += 2
        if length & 0x80:
            size = length & 0x7F
            length = int.from_bytes(octets[at : at + size], "big")
            at += size
        if at + length > len(octets):
            raise ValueError
        yield tag, octets[at : at + length]
        at += length


def rewritten(octets: bytes, change: Callable[[int, bytes], bytes | None]) -> bytes:
    """DER with some of its tags changed, those inside OCTET STRINGs as well; `change` gives None for what may stay."""
    result = b""
    for tag, content in parts(octets):
        new = change(tag, content)
        if new is not None:
            result += new
            continue
        if tag & 0x20 or (tag == 0x04 and content[:1] == b"\x30"):
            with suppress(ValueError):
                result += tlv(tag, rewritten(content, change))
                continue
        result += tlv(tag, content)
    return result


def with_rounds(octets: bytes, old: int, new: int, *, place: int) -> bytes:
    """A file in which one count of rounds, the one at `place` of those that are `old`, is another number."""
    found = iter(range(100))

    def change(tag: int, content: bytes) -> bytes | None:
        if tag == 0x02 and int.from_bytes(content, "big") == old and next(found) == place:
            return tlv(tag, new.to_bytes(new.bit_length() // 8 + 1, "big"))
        return None

    return rewritten(octets, change)


def indefinite(octets: bytes) -> bytes:
    """The same in BER: no lengths around, and OCTET STRINGs that hold something in two pieces (X.690, section 8)."""
    result = b""
    for tag, content in parts(octets):
        if tag & 0x20:
            result += bytes((tag, 0x80)) + indefinite(content) + b"\0\0"
        elif tag == 0x04 and len(content) > 100:
            result += b"\x24\x80" + tlv(0x04, content[:50]) + tlv(0x04, content[50:]) + b"\0\0"
        else:
            result += tlv(tag, content)
    return result


@pytest.mark.parametrize("passphrase", [b"", PASSPHRASE])
def test_p12_in_ber_is_loaded(passphrase: bytes) -> None:
    assert is_loaded(load(indefinite(EC.p12(passphrase)), passphrase=passphrase), EC)


def test_passphrase_that_nothing_needs_is_not_looked_at() -> None:
    assert is_loaded(load(EC.pem, passphrase=b"other"), EC)
    assert is_loaded(load(EC.p12(), passphrase=b"other"), EC)


def test_certificate_that_the_key_fits_is_the_leaf_and_its_issuer_follows() -> None:
    other = push_certificate("com.example.news", key=rsa_key())
    loaded = load(other.certificate_pem + EC.chain_pem + EC.pem)
    assert is_loaded(loaded, EC)
    assert loaded.certificate_pem == EC.certificate_pem + EC.chain_pem


def test_chain_has_each_certificate_once() -> None:
    loaded = load(EC.pem + EC.chain_pem + EC.chain_pem + EC.certificate_pem)
    assert loaded.certificate_pem == EC.certificate_pem + EC.chain_pem
    assert load(EC.p12(PASSPHRASE), passphrase=PASSPHRASE).certificate_pem == EC.certificate_pem + EC.chain_pem


def test_of_several_pairs_the_push_certificate_that_ends_last_is_taken() -> None:
    later = push_certificate("com.example.news", now=START, days=400)
    code_signing = push_certificate(
        now=START, days=800, uid="TEAM123456", environments=(), name="Apple Development: A Person (ABCDEF1234)"
    )
    assert is_loaded(load(EC.pem + code_signing.pem + later.pem + RSA.pem), later)


def test_expired_certificate_is_loaded_and_says_when_it_ended() -> None:
    old = push_certificate(TOPIC, now=datetime(2012, 1, 1, tzinfo=UTC))
    assert load(old.pem).not_after == datetime(2012, 12, 31, tzinfo=UTC).timestamp()


def test_what_is_loaded_is_not_shown() -> None:
    assert "PRIVATE" not in repr(EC.loaded())
    secret = der(EC.key)
    assert [repr(each) for each in items(EC.key_pem)] == ["<private key>"]
    assert repr(Tlv.of(secret)) == f"<tag 0x30 of {len(secret)} octets>"


# What it opens.


def opened(issued: Issued) -> tuple[tuple[str, ...], tuple[Environment, ...]]:
    found = particulars(issued.certificate)
    return found.topics, found.environments


def test_topics_are_those_of_the_list_with_the_suffix_of_their_kind() -> None:
    listed = push_certificate((TOPIC, "app"), (f"{TOPIC}.voip", "voip"), (f"{TOPIC}.complication", "complication"))
    assert opened(listed)[0] == (TOPIC, f"{TOPIC}.voip", f"{TOPIC}.complication")
    bare = push_certificate((TOPIC, "app"), (TOPIC, "voip"), (TOPIC, "complication"), (TOPIC, "app"), (TOPIC, "other"))
    assert opened(bare)[0] == (TOPIC, f"{TOPIC}.voip", f"{TOPIC}.complication")


def test_kinds_of_one_topic_may_stand_together() -> None:
    together = tlv(0x30, tlv(0x0C, TOPIC.encode()), tlv(0x30, tlv(0x0C, b"app"), tlv(0x0C, b"voip")))
    assert opened(push_certificate(extensions=[("6", together)]))[0] == (TOPIC, f"{TOPIC}.voip")


@pytest.mark.parametrize(
    "value", [topic_list((TOPIC, "voip")), topic_list((f"{TOPIC}.voip", "voip")), tlv(0x0C, TOPIC.encode())]
)
def test_voip_certificate_opens_voip_only(value: bytes) -> None:
    issued = push_certificate(extensions=[("4", value)], name="VoIP Services: com.example.shop")
    assert opened(issued)[0] == (f"{TOPIC}.voip",)


@pytest.mark.parametrize("environments", [(PRODUCTION,), (DEVELOPMENT,), BOTH])
def test_environments_are_those_whose_mark_it_has(environments: tuple[Environment, ...]) -> None:
    assert opened(push_certificate(TOPIC, environments=reversed(environments)))[1] == environments


@pytest.mark.parametrize(
    "name,uid",
    [
        ("APSP:7a2e4c1e-3c8e-4a43-9b53-0f5a1d6c8b11", "com.apple.mgmt.External.7a2e4c1e-3c8e-4a43-9b53-0f5a1d6c8b11"),
        ("Pass Type ID: pass.com.example.shop", "pass.com.example.shop"),
        ("Website Push ID: web.com.example.shop", "web.com.example.shop"),
        ("Apple Push Services: com.example.shop", "com.example.shop"),
        ("Apple Production IOS Push Services: com.example.shop", "com.example.shop"),
    ],
)
def test_topic_without_a_list_is_the_subject_s_uid_and_without_a_mark_it_is_production(name: str, uid: str) -> None:
    assert opened(push_certificate(environments=(), name=name, uid=uid)) == ((uid,), (PRODUCTION,))


def test_uid_is_the_topic_of_a_certificate_with_a_mark_whatever_its_name() -> None:
    assert opened(push_certificate(environments=[DEVELOPMENT], name="House", uid=TOPIC)) == ((TOPIC,), (DEVELOPMENT,))


def test_topic_that_could_not_stand_in_a_header_is_left_out() -> None:
    strange = push_certificate(("com.example\r\nx: y", "app"), ("", "app"), ("shöp", "app"), (TOPIC, "app"))
    assert opened(strange)[0] == (TOPIC,)


def test_name_is_such_as_may_be_shown() -> None:
    assert (
        particulars(push_certificate(TOPIC, name="Push\r\n\x1b[31m: x").certificate).name
        == "Push\ufffd\ufffd\ufffd[31m: x"
    )


@pytest.mark.parametrize("value", [b"", b"\x30", b"\x0c\x02\xff\xfe", b"\x30\x80", b"\5\0", b"\x30\0\x30\0"])
def test_damaged_list_of_topics_is_refused(value: bytes) -> None:
    issued = push_certificate(extensions=[("6", value)])
    assert "a certificate in it cannot be read" in refusal(issued.pem) or "damaged" in refusal(issued.pem)


# What is refused.

REQUEST = (
    x509.CertificateSigningRequestBuilder()
    .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "A Person")]))
    .sign(ec_key(), SHA256())
)
PUBLIC = ec_key().public_key()
PROFILE = tlv(0x30, tlv(0x06, bytes.fromhex("2a864886f70d010702")), tlv(0xA0, tlv(0x30, b"\2\1\1" + b"x" * 200)))


@pytest.mark.parametrize(
    "content,complaint",
    [
        (b"", "no certificate in the file"),
        (b"00000 is how some text begins" * 9, "no certificate in the file"),
        (b"\xff\xd8\xff\xe0" * 99, "no certificate in the file"),
        (b"MI" + b"x" * 202, "damaged"),
        (EC.certificate_pem, "no private key: in Keychain Access"),
        (EC.certificate_der, "no private key: in Keychain Access"),
        (pkcs12.serialize_key_and_certificates(None, None, EC.certificate, None, NoEncryption()), "no private key"),
        (pkcs12.serialize_key_and_certificates(None, EC.key, None, None, NoEncryption()), "but no certificate"),
        (EC.key_pem, "configure it as a signing key"),
        (EC.certificate_pem + RSA.key_pem, "belongs to none of the certificates"),
        (pkcs12.serialize_key_and_certificates(None, RSA.key, None, [EC.certificate], NoEncryption()), "belongs to"),
        (EC.certificate_pem + key_pem(ed25519.Ed25519PrivateKey.generate()), "neither RSA nor of an elliptic curve"),
        (EC.certificate_pem + key_pem(dsa.generate_private_key(1024)), "neither RSA nor of an elliptic curve"),
        (REQUEST.public_bytes(Encoding.PEM), "is a certificate signing request"),
        (REQUEST.public_bytes(Encoding.DER), "is a certificate signing request"),
        (PUBLIC.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), "is a public key"),
        (PUBLIC.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo), "is a public key"),
        (PROFILE, "is a signed document"),
        (EC.pem * 33, "more than 64"),
        (EC.pem + b" " * MAX_BYTES, f"longer than {MAX_BYTES} octets"),
        (EC.pem[:-40], "PEM block PRIVATE KEY has no end"),
        (EC.pem[:100], "PEM block CERTIFICATE has no end"),
        (EC.certificate_pem.replace(b"MII", b"MIJ", 1) + EC.key_pem, "a certificate in it cannot be read"),
        (EC.certificate_pem + EC.key_pem.replace(b"KEY-----\nM", b"KEY-----\nN"), "private key in it cannot be read"),
        (b"-----BEGIN CERTIFICATE-----\nA\n-----END CERTIFICATE-----\n", "PEM block CERTIFICATE is damaged"),
        (EC.p12()[:-300], "damaged, or cut short"),
        (EC.p12().replace(bytes.fromhex("2a864886f70d010701"), bytes.fromhex("2a864886f70d010702")), "is signed"),
        (KEYCHAIN.replace(bytes.fromhex("2a864886f70d010706"), bytes.fromhex("2a864886f70d010703")), "for a key"),
    ],
    ids=map(str, itertools.count()),
)
def test_file_without_a_usable_pair_is_refused_with_what_it_is_and_what_to_do(content: bytes, complaint: str) -> None:
    assert complaint in refusal(content, passphrase=b"keychain")


@pytest.mark.parametrize("filling", [b" ", b"=", b" =", b"A ", b"\n"])
def test_file_that_is_almost_base64_is_refused_without_looking_twice(filling: bytes) -> None:
    content = b"MI" + b"A" * 100 + filling * (65_000 // len(filling)) + b"!"  # minutes, with a regex that backtracks
    assert "no certificate in the file" in refusal(content)


def test_certificate_for_something_else_than_pushing_is_refused_by_name() -> None:
    issued = push_certificate(environments=(), name="Apple Development: A Person (ABCDEF1234)", uid="ABCDEF1234")
    assert "'Apple Development: A Person (ABCDEF1234)' is not one for pushing" in refusal(issued.pem)


@pytest.mark.parametrize(
    "content",
    [
        EC.p12(PASSPHRASE),
        EC.p12(encryption=three_des(1000)),
        KEYCHAIN,
        EC.certificate_pem + key_pem(EC.key, passphrase=PASSPHRASE),
        EC.certificate_pem + key_pem(EC.key, TRADITIONAL, PASSPHRASE),
        RSA.certificate_pem + key_pem(RSA.key, TRADITIONAL, PASSPHRASE),
    ],
)
def test_missing_passphrase_and_a_wrong_one_are_told_apart(content: bytes) -> None:
    for missing in (None, b""):
        assert "is under a passphrase: give" in refusal(content, passphrase=missing)
    for wrong in (b"wrong", PASSPHRASE + b"\n", "Grüße".encode(), b"x" * 2000):
        assert "The passphrase does not open" in refusal(content, passphrase=wrong)


def test_passphrase_that_cannot_be_one_is_refused() -> None:
    assert "not UTF-8" in refusal(KEYCHAIN, passphrase=b"\xff")
    for content in (KEYCHAIN, EC.certificate_pem + key_pem(EC.key, passphrase=PASSPHRASE)):
        assert "has a NUL" in refusal(content, passphrase="keychain".encode("utf-16"))


@pytest.mark.parametrize(
    "old,new",
    [
        (rb"DEK-Info: .*", b"DEK-Info: AES-256-CBC,0011"),
        (rb"DEK-Info: [^,]*", b"DEK-Info: DES-CBC"),
        (rb"DEK-Info: [^,]*", b"DEK-Info: DES-EDE3-CBC"),
        (rb"DEK-Info", b"DEK"),
    ],
)
def test_traditional_encryption_that_is_not_known_is_refused(old: bytes, new: bytes) -> None:
    key = re.sub(old, new, key_pem(EC.key, TRADITIONAL, PASSPHRASE))
    assert "encrypted in a way that is not known" in refusal(EC.certificate_pem, key=key, passphrase=PASSPHRASE)


def test_key_that_would_take_long_to_check_is_refused() -> None:
    assert "longer than one of 4,096 bits" in refusal(EC.certificate_pem, key=long_key())
    assert "more than 8 private keys" in refusal(EC.pem, key=RSA.key_pem * 8)
    assert is_loaded(load(EC.pem, key=RSA.key_pem * 7), EC)


def long_key() -> bytes:
    """PKCS#1, made of numbers of 16,384 bits and half of it; nothing says that they are primes."""
    half = tlv(0x02, b"\x7f" * 1024)
    return tlv(0x30, b"\2\1\0", tlv(0x02, b"\x7f" * 2048), b"\2\3\1\0\1", tlv(0x02, b"\x7f" * 2048), half * 5)


# Bombs: what asks for hours of key derivation.

HOURS = 2**31 - 1


def small(encryption: Any) -> bytes:
    return EC.p12(encryption=encryption)


BOMBS = {
    "certificates, PBES1": with_rounds(small(three_des(1001)), 1001, HOURS, place=0),
    "key, PBES1": with_rounds(small(three_des(1001)), 1001, HOURS, place=1),
    "certificates, PBES2": with_rounds(small(modern(1001)), 1001, HOURS, place=0),
    "key, PBES2": with_rounds(small(modern(1001)), 1001, HOURS, place=1),
    "MAC": with_rounds(small(modern(1001)), 2048, HOURS, place=0),
    "beyond 64 bits": with_rounds(small(modern(1001)), 1001, 2**70, place=1),
    "BER": indefinite(with_rounds(small(modern(1001)), 1001, HOURS, place=1)),
    "just too many together": with_rounds(
        with_rounds(small(three_des(1001)), 1001, 1_000_000, place=0), 1001, 1_000_001, place=0
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_p12_that_wants_hours_is_refused_before_any_key_is_derived(bomb: str) -> None:
    for passphrase in (PASSPHRASE, b"wrong", None):
        assert "rounds of key derivation" in refusal(BOMBS[bomb], passphrase=passphrase)


def test_rounds_count_twice_where_no_passphrase_is_two_that_are_tried() -> None:
    content = with_rounds(small(three_des(1001)), 1001, 1_000_000, place=0)
    assert "does not open" in refusal(content, passphrase=b"wrong")
    assert "rounds of key derivation" in refusal(content)


def test_number_of_rounds_that_nobody_could_print_is_refused() -> None:
    content = with_rounds(small(three_des(1001)), 1001, 1 << 100_000, place=0)
    assert "damaged" in refusal(content, passphrase=PASSPHRASE)


def test_bombs_are_files_that_open_but_for_their_rounds() -> None:
    for encryption in (three_des(1001), modern(1001)):
        whole = small(encryption)
        assert with_rounds(whole, 1001, 1001, place=0) == whole
        assert is_loaded(load(whole, passphrase=PASSPHRASE), EC)


def pem_of(label: str, octets: bytes) -> bytes:
    return b"-----BEGIN %b-----\n%b-----END %b-----\n" % (label.encode(), encodebytes(octets), label.encode())


SCRYPT = bytes.fromhex("2b06010401da47040b")


def under_scrypt(cost: int, block: int, parallel: int) -> bytes:
    """An encrypted PKCS#8 key with these parameters (RFC 7914, section 7); what is encrypted is nonsense."""
    numbers = [tlv(0x02, number.to_bytes(number.bit_length() // 8 + 1, "big")) for number in (cost, block, parallel)]
    derivation = tlv(0x30, tlv(0x06, SCRYPT), tlv(0x30, tlv(0x04, b"saltsalt"), *numbers))
    cipher = tlv(0x30, tlv(0x06, bytes.fromhex("60864801650304012a")), tlv(0x04, bytes(16)))
    scheme = tlv(0x30, tlv(0x06, bytes.fromhex("2a864886f70d01050d")), tlv(0x30, derivation, cipher))
    return tlv(0x30, scheme, tlv(0x04, bytes(160)))


@pytest.mark.parametrize(
    "key",
    [
        with_rounds(der(EC.key, passphrase=PASSPHRASE), 2048, HOURS, place=0),
        under_scrypt(2**30, 8, 1),
        under_scrypt(2**14, 2**20, 1),
        under_scrypt(2**14, 8, 2**20),
        under_scrypt(2**200, 2**200, 2**200),
    ],
)
def test_encrypted_key_that_wants_hours_or_all_memory_is_refused(key: bytes) -> None:
    for form in (key, pem_of("ENCRYPTED PRIVATE KEY", key)):
        assert "rounds of key derivation" in refusal(EC.certificate_pem, key=form, passphrase=PASSPHRASE)


def test_key_that_hides_within_another_block_is_refused() -> None:
    bomb = pem_of("ENCRYPTED PRIVATE KEY", with_rounds(der(EC.key, passphrase=PASSPHRASE), 2048, HOURS, place=0))
    around = b"-----BEGIN RSA PRIVATE KEY-----\n" + bomb + b"-----END RSA PRIVATE KEY-----\n"
    assert "RSA PRIVATE KEY has another in it" in refusal(EC.certificate_pem + around, passphrase=PASSPHRASE)


@pytest.mark.parametrize("cost", [1, 3, 2**14 + 1])
def test_scrypt_that_cannot_be_is_refused(cost: int) -> None:
    key = under_scrypt(cost, 8, 1)
    assert "encrypted in a way that is not known" in refusal(EC.certificate_pem, key=key, passphrase=PASSPHRASE)


def test_scrypt_as_openssl_sets_it_is_tried() -> None:
    assert "does not open" in refusal(EC.certificate_pem, key=under_scrypt(2**14, 8, 1), passphrase=PASSPHRASE)


def encrypted_safe(safe: bytes) -> bytes:
    """A ContentInfo with a SafeContents under `PASSPHRASE`, by PBES2 with one round."""
    key = PBKDF2HMAC(SHA256(), 32, b"saltsalt", 1).derive(PASSPHRASE)
    padder = PKCS7(128).padder()
    encryptor = Cipher(algorithms.AES256(key), modes.CBC(bytes(16))).encryptor()
    secret = encryptor.update(padder.update(safe) + padder.finalize()) + encryptor.finalize()
    prf = tlv(0x30, tlv(0x06, bytes.fromhex("2a864886f70d0209")), b"\5\0")
    parameters = tlv(0x30, tlv(0x04, b"saltsalt"), b"\2\1\1", prf)
    derivation = tlv(0x30, tlv(0x06, bytes.fromhex("2a864886f70d01050c")), parameters)
    cipher = tlv(0x30, tlv(0x06, bytes.fromhex("60864801650304012a")), tlv(0x04, bytes(16)))
    scheme = tlv(0x30, tlv(0x06, bytes.fromhex("2a864886f70d01050d")), tlv(0x30, derivation, cipher))
    content = tlv(0x30, tlv(0x06, bytes.fromhex("2a864886f70d010701")), scheme, tlv(0x80, secret))
    data = tlv(0xA0, tlv(0x30, b"\2\1\0", content))
    return tlv(0x30, tlv(0x06, bytes.fromhex("2a864886f70d010706")), data)


def p12_of(safes: bytes) -> bytes:
    data = tlv(0xA0, tlv(0x04, tlv(0x30, safes)))
    return tlv(0x30, b"\2\1\3", tlv(0x30, tlv(0x06, bytes.fromhex("2a864886f70d010701")), data))


def hiding(rounds: int) -> bytes:
    """A .p12 whose encrypted part holds a key that wants so many rounds, which nobody sees from outside."""
    key = der(EC.key, passphrase=PASSPHRASE)
    shrouded = with_rounds(key, 2048, rounds, place=0)
    return p12_of(encrypted_safe(tlv(0x30, bag(2, shrouded))))


def bag(kind: int, value: bytes) -> bytes:
    """A SafeBag (RFC 7292, section 4.2)."""
    return tlv(0x30, tlv(0x06, bytes.fromhex("2a864886f70d010c0a01") + bytes([kind])), tlv(0xA0, value))


def data_info(content: bytes) -> bytes:
    return tlv(0x30, tlv(0x06, bytes.fromhex("2a864886f70d010701")), tlv(0xA0, tlv(0x04, content)))


def test_bags_in_bags_are_found() -> None:
    x509_oid = tlv(0x06, bytes.fromhex("2a864886f70d01091601"))
    certificate = bag(3, tlv(0x30, x509_oid, tlv(0xA0, tlv(0x04, EC.certificate_der))))
    locked = bag(2, der(EC.key, passphrase=PASSPHRASE))
    other = bag(5, tlv(0x30, tlv(0x06, b"\x2a\3"), tlv(0xA0, b"\5\0")))
    nested = bag(6, tlv(0x30, other, certificate, bag(6, tlv(0x30, locked))))
    assert is_loaded(load(p12_of(data_info(tlv(0x30, nested))), passphrase=PASSPHRASE), EC)
    deep = tlv(0x30, certificate)
    for _ in range(100):
        deep = tlv(0x30, bag(6, deep))
    assert "neither certificate nor private key" in refusal(p12_of(data_info(deep)))


def test_mac_of_today_s_kind_that_wants_hours_is_refused() -> None:
    def with_mac(rounds: int) -> bytes:
        parameters = tlv(0x30, tlv(0x04, b"saltsalt"), tlv(0x02, rounds.to_bytes(4, "big")), b"\2\1\x20")
        derivation = tlv(0x30, tlv(0x06, bytes.fromhex("2a864886f70d01050c")), parameters)
        hmac = tlv(0x30, tlv(0x06, bytes.fromhex("2a864886f70d0209")), b"\5\0")
        mac = tlv(0x30, tlv(0x06, bytes.fromhex("2a864886f70d01050e")), tlv(0x30, derivation, hmac))  # RFC 9579
        version, safe, _ = (tlv(tag, content) for tag, content in parts(next(parts(EC.p12()))[1]))
        data = tlv(0x30, tlv(0x30, mac, tlv(0x04, bytes(32))), tlv(0x04, b"unused"), b"\2\1\1")
        return tlv(0x30, version, safe, data)

    assert is_loaded(load(with_mac(2048)), EC)
    assert "rounds of key derivation" in refusal(with_mac(HOURS))


@pytest.mark.parametrize(
    "parameters",
    [b"", b"\5\0", tlv(0x30), tlv(0x30, b"\4\0"), tlv(0x30, b"\4\0\2\1\0"), tlv(0x30, b"\4\0\2\1\xff"), b"\x04\x80"],
)
def test_key_under_senseless_parameters_is_refused(parameters: bytes) -> None:
    scheme = tlv(0x30, tlv(0x06, bytes.fromhex("2a864886f70d010c0103")), parameters)
    key = pem_of("ENCRYPTED PRIVATE KEY", tlv(0x30, scheme, tlv(0x04, bytes(160))))
    assert "damaged, or cut short" in refusal(EC.certificate_pem, key=key, passphrase=PASSPHRASE)


def test_key_that_hides_in_an_encrypted_part_is_not_derived() -> None:
    # The control: OpenSSL would open it, at any price.
    assert pkcs12.load_pkcs12(hiding(2048), PASSPHRASE).key is not None
    assert "neither certificate nor private key" in refusal(hiding(HOURS), passphrase=PASSPHRASE)


def test_way_of_encryption_that_is_not_known_is_refused() -> None:
    unknown = KEYCHAIN.replace(bytes.fromhex("2a864886f70d010c0106"), bytes.fromhex("2a864886f70d01990106"))
    assert "encrypted in a way that is not known" in refusal(unknown, passphrase=b"keychain")


# Anything.

SEEDS = [
    EC.pem,
    EC.certificate_der,
    EC.p12(),
    small(three_des(1)),
    small(modern(1)),
    indefinite(small(modern(1))),
    EC.certificate_pem + key_pem(EC.key, passphrase=PASSPHRASE),
    EC.certificate_pem + key_pem(EC.key, TRADITIONAL, PASSPHRASE),
    der(EC.key, passphrase=PASSPHRASE),
    der(RSA.key),
    under_scrypt(2, 1, 1),
    hiding(1),
    push_certificate(TOPIC, extensions=[("4", topic_list((TOPIC, "voip")))]).certificate_der,
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good file with some octets changed, put in, or taken out."""
    content = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        how = draw(st.sampled_from(["change", "insert", "remove", "cut"]))
        if how == "change":
            content[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
        elif how == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=4))
        elif how == "remove":
            del content[place : place + draw(st.integers(1, 4))]
        else:
            del content[place + 1 :]
    return bytes(content)


@given(mutated() | st.binary(), mutated() | st.binary() | st.none(), st.sampled_from([None, PASSPHRASE, b"\xff"]))
@example(b"\x30\x80" * 500, None, None)
@example(b"\x30\x84\xff\xff\xff\xff", None, None)
@example(b"-----BEGIN CERTIFICATE-----" * 2000, None, None)
def test_any_files_are_loaded_or_refused(content: bytes, key: bytes | None, passphrase: bytes | None) -> None:
    with suppress(ConfigError):
        loaded = load(content, key=key, passphrase=passphrase)
        load_pem_private_key(loaded.key_pem, None)
        assert loaded.topics
