"""Throw-away keys, certificates and test data for one run: a folder that every contestant can read.

| file | content |
|---|---|
| `ca.pem` | the CA to trust |
| `server.pem`, `server.key` | the far side's certificate for 127.0.0.1, localhost and Apple's host names |
| `AuthKey.p8` | an ES256 signing key, as Apple hands them out; `KEY_ID` and `TEAM_ID` go with it |
| `jwt.txt` | a provider token made from it |
| `body.json` | the payload, 118 octets |
| `tokens.txt` | 100,000 device tokens of 32 octets as hex, a line each |
| `tokens-mixed.txt` | the same, but each tenth has another length |
"""

from __future__ import annotations

import base64
import datetime
import os
import time
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from heliograph.net.tls import throwaway_identity

KEY_ID = "KEYID12345"
TEAM_ID = "ABCDE12345"
TOPIC = "com.example.app"
TOKENS = 100_000
OTHER_LENGTHS = (8, 48, 64, 100)
"""Octets of the device tokens in `tokens-mixed.txt` that are not of 32."""

PAYLOAD = {
    "aps": {
        "alert": {"title": "Hello Ada", "body": "Your parcel arrives today"},
        "badge": 1,
        "sound": "default",
    },
    "id": "a1b2c3d4",
}


def make(folder: Path) -> None:
    """Write all of the above into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    _certificates(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    signing_key = folder / "AuthKey.p8"
    signing_key.touch(mode=0o600)  # servers refuse a key that others may read
    signing_key.write_bytes(_pem(key))
    (folder / "jwt.txt").write_text(_provider_token(key))
    (folder / "body.json").write_bytes(msgspec.json.encode(PAYLOAD))
    plain = [_device_token(32) for _ in range(TOKENS)]
    mixed = [
        _device_token(OTHER_LENGTHS[i // 10 % len(OTHER_LENGTHS)]) if i % 10 == 9 else token
        for i, token in enumerate(plain)
    ]
    (folder / "tokens.txt").write_text("\n".join(plain) + "\n")
    (folder / "tokens-mixed.txt").write_text("\n".join(mixed) + "\n")


def _device_token(octets: int) -> str:
    """A random device token whose first octet says how long it is, so that the far side can check."""
    return (bytes([octets]) + os.urandom(octets - 1)).hex()


def _provider_token(key: ec.EllipticCurvePrivateKey) -> str:
    # our own few lines, not the product's: what is measured must not make the far side's test data
    parts = ({"alg": "ES256", "kid": KEY_ID, "typ": "JWT"}, {"iss": TEAM_ID, "iat": int(time.time())})
    text = b".".join(_base64url(msgspec.json.encode(part)) for part in parts)
    r, s = decode_dss_signature(key.sign(text, ec.ECDSA(hashes.SHA256())))
    return (text + b"." + _base64url(r.to_bytes(32, "big") + s.to_bytes(32, "big"))).decode()


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _certificates(folder: Path) -> None:
    identity = throwaway_identity(datetime.datetime.now(datetime.UTC))
    (folder / "ca.pem").write_bytes(identity.ca_pem)
    (folder / "server.pem").write_bytes(identity.certificate_pem)
    (folder / "server.key").write_bytes(identity.key_pem)
