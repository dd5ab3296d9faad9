"""Who may come without an API key: known by a certificate or by a signing key, from a real store."""

from __future__ import annotations

import json
from base64 import b64encode, urlsafe_b64encode
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from heliograph import callers
from heliograph.callers import Callers, leaf_of
from heliograph.errors import ConfigError, Refused, StoreError
from heliograph.model import Access, App, Environment, KnownCaller, SigningKey
from heliograph.protocols import provider_token
from heliograph.stores.sqlite import SqliteStore
from tests.certificates import Issued, authority, key_pem, push_certificate

NOW = 1_795_262_400.0
TEAM, OTHER_TEAM, KEY = "DEF123GHIJ", "KLM456NOPQ", "ABC123DEFG"
PAIR = ec.derive_private_key(41, ec.SECP256R1())
OTHER_PAIR = ec.derive_private_key(42, ec.SECP256R1())
SIGNING = SigningKey(KEY, TEAM, key_pem(PAIR))
ACCESS = (Access(SIGNING, (Environment.PRODUCTION,)),)
APPS = {name: App(name, ("com.example.shop",), ACCESS) for name in ("shop", "till")}


def with_certificate(issued: Issued, app: str = "shop") -> KnownCaller:
    return KnownCaller(
        id=callers.certificate_id(issued.certificate_der),
        name="old script",
        app=app,
        certificate=issued.certificate_pem,
        not_after=1,
        created_at=NOW,
    )


def with_key(
    pair: ec.EllipticCurvePrivateKey = PAIR, team: str = TEAM, app: str = "shop", key: str = KEY
) -> KnownCaller:
    pem = pair.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return KnownCaller(id=callers.key_id(team, key), name="robot", app=app, public_key=pem, created_at=NOW)


def signed(pair: ec.EllipticCurvePrivateKey = PAIR, *, team: str = TEAM, key: str = KEY, now: float = NOW) -> bytes:
    return provider_token.mint(SigningKey(key, team, key_pem(pair)), now).encode()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = await SqliteStore.open(tmp_path / "heliograph.db")
    try:
        yield store
    finally:
        await store.aclose()


@pytest.fixture
async def known(store: SqliteStore) -> Callers:
    known = Callers(store, dict(APPS), clock=lambda: NOW)
    await known.load()
    return known


@contextmanager
def counting_checks() -> Iterator[list[bytes]]:
    """The provider tokens whose signature is looked at."""
    seen: list[bytes] = []
    verify = provider_token.verify

    def counted(token: bytes, *rest: object) -> provider_token.Claims:
        seen.append(token)
        return verify(token, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provider_token, "verify", counted)
        yield seen


# -- certificates ----------------------------------------------------------------------------------------------------


async def test_a_certificate_is_known_by_its_octets_whoever_signed_it_and_whenever_it_ended(known: Callers) -> None:
    issued, stranger = (push_certificate(now=datetime(2016, 2, 29, tzinfo=UTC)) for _ in range(2))
    await known.add(with_certificate(issued))
    found = known.by_certificate(issued.certificate_der)
    assert found is not None
    assert found.app == "shop"
    assert known.by_certificate(stranger.certificate_der) is None
    assert known.by_certificate(b"") is None
    assert list(known.certificates()) == [issued.certificate_pem]


async def test_the_version_changes_when_the_certificates_do_and_not_otherwise(
    known: Callers, store: SqliteStore
) -> None:
    seen = [known.version]
    first, second = with_certificate(push_certificate()), with_certificate(push_certificate())
    await known.add(first)
    seen.append(known.version)
    await known.load()
    await known.add(with_key())
    assert known.version == seen[-1]
    await store.save_caller(second)
    await known.look()
    seen.append(known.version)
    assert await known.remove(first.id)
    seen.append(known.version)
    assert len(set(seen)) == len(seen)
    assert not await known.remove(first.id)
    assert known.version == seen[-1]


async def test_who_stays_as_it_is_stays_the_same_object_when_another_process_changes_the_rest(
    known: Callers, store: SqliteStore
) -> None:
    kept = push_certificate()
    await known.add(with_certificate(kept))
    await known.add(with_key())
    found = known.by_certificate(kept.certificate_der), known.by_provider_token(signed(), NOW)
    await store.save_caller(with_certificate(push_certificate()))
    await store.save_caller(with_key(OTHER_PAIR, OTHER_TEAM))
    await known.load()
    assert len(known.all()) == 4
    assert known.by_certificate(kept.certificate_der) is found[0]
    assert known.by_provider_token(signed(), NOW) is found[1]


async def test_a_caller_whose_app_is_gone_is_known_again_when_it_comes_back(store: SqliteStore) -> None:
    apps = dict(APPS)
    known = Callers(store, apps, clock=lambda: NOW)
    issued = push_certificate()
    await known.add(with_certificate(issued))
    await known.add(with_key())
    token = signed()
    assert known.by_provider_token(token, NOW).app == "shop"
    gone = apps.pop("shop")
    assert known.by_certificate(issued.certificate_der) is None
    with pytest.raises(Refused, match="app that is gone") as caught:
        known.by_provider_token(token, NOW)
    assert caught.value.reason == "InvalidProviderToken"
    apps["shop"] = gone
    assert known.by_certificate(issued.certificate_der) is not None
    assert known.by_provider_token(token, NOW).app == "shop"


async def test_what_is_another_app_s_is_left_as_it_is(known: Callers) -> None:
    issued = push_certificate()
    assert await known.add(with_certificate(issued)) is None
    former = await known.add(with_certificate(issued, "till"))
    assert former is not None
    assert former.app == "shop"
    assert [each.app for each in known.all()] == ["shop"]


async def test_callers_are_there_after_a_restart(known: Callers, store: SqliteStore) -> None:
    issued = push_certificate()
    await known.add(with_certificate(issued))
    await known.add(with_key())
    again = Callers(store, APPS, clock=lambda: NOW)
    await again.load()
    assert sorted(again.all(), key=lambda each: each.id) == sorted(known.all(), key=lambda each: each.id)
    assert again.by_provider_token(signed(), NOW).name == "robot"


async def test_what_is_known_goes_on_where_the_store_cannot_be_read(known: Callers, store: SqliteStore) -> None:
    issued = push_certificate()
    await known.add(with_certificate(issued))
    await store.aclose()
    with pytest.raises(StoreError):
        await known.load()
    await known.look()
    assert known.by_certificate(issued.certificate_der) is not None


async def test_a_key_that_cannot_be_read_back_hinders_no_other(known: Callers, store: SqliteStore) -> None:
    await store.save_caller(
        KnownCaller(id=f"{TEAM}.XXXXXXXXXX", name="x", app="shop", public_key=b"damaged", created_at=NOW)
    )
    await store.save_caller(with_key())
    await known.load()
    assert known.by_provider_token(signed(), NOW).name == "robot"
    with pytest.raises(Refused):
        known.by_provider_token(signed(key="XXXXXXXXXX"), NOW)


# -- provider tokens -------------------------------------------------------------------------------------------------


async def test_two_teams_may_have_a_key_with_the_same_id(known: Callers) -> None:
    await known.add(with_key())
    await known.add(with_key(OTHER_PAIR, OTHER_TEAM, "till"))
    assert known.by_provider_token(signed(), NOW).app == "shop"
    assert known.by_provider_token(signed(OTHER_PAIR, team=OTHER_TEAM), NOW).app == "till"
    for forged in (signed(OTHER_PAIR), signed(PAIR, team=OTHER_TEAM)):
        with pytest.raises(Refused, match="signature that does not fit"):
            known.by_provider_token(forged, NOW)


async def test_a_team_id_that_the_key_was_not_registered_with_is_refused(known: Callers) -> None:
    await known.add(with_key())
    with pytest.raises(Refused, match="team id") as caught:
        known.by_provider_token(signed(team=OTHER_TEAM), NOW)
    assert caught.value.reason == "InvalidProviderToken"


async def test_a_token_is_verified_once_for_as_long_as_it_is_good(known: Callers) -> None:
    await known.add(with_key())
    token = signed()
    with counting_checks() as checked:
        for later in (0, 1, 1700):
            assert known.by_provider_token(token, NOW + later).app == "shop"
        assert checked == [token]
        with pytest.raises(Refused) as caught:
            known.by_provider_token(token, NOW + 7200)
    assert caught.value.reason == "ExpiredProviderToken"


async def test_a_removed_key_opens_nothing_though_its_token_was_verified(known: Callers) -> None:
    await known.add(with_key())
    token = signed()
    known.by_provider_token(token, NOW)
    await known.remove(with_key().id)
    with pytest.raises(Refused, match="not known here"):
        known.by_provider_token(token, NOW)
    await known.add(with_key())
    assert known.by_provider_token(token, NOW).app == "shop"  # the no is forgotten as well


async def test_a_refused_token_is_not_verified_again_for_a_while(known: Callers) -> None:
    await known.add(with_key())
    early = signed(now=NOW + 7200)
    with counting_checks() as checked:
        for _ in range(3):
            with pytest.raises(Refused, match="from the future"):
                known.by_provider_token(early, NOW)
        assert len(checked) == 1
    assert known.by_provider_token(early, NOW + 7200).app == "shop"


async def test_any_number_of_tokens_takes_little_memory(known: Callers) -> None:
    await known.add(with_key())
    good = signed()
    known.by_provider_token(good, NOW)
    for number in range(2000):
        for token in (b"%d" % number, b"%d.e30.e30" % number, b"x" * 5000 + b"%d" % number):
            with pytest.raises(Refused):
                known.by_provider_token(token, NOW)
    assert len(known._bad._known) <= callers._REMEMBERED
    assert max(map(len, known._bad._known)) <= 4096
    with counting_checks() as checked:
        known.by_provider_token(good, NOW)
    assert checked == []  # it was not pushed out


def base64(value: object) -> bytes:
    return urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=")


ANY_PART = st.one_of(
    st.binary(max_size=40),
    st.recursive(st.none() | st.integers() | st.text(max_size=9), st.lists, max_leaves=4).map(base64),
    st.fixed_dictionaries({"alg": st.just("ES256"), "kid": st.sampled_from([KEY, "x"])}).map(base64),
    st.fixed_dictionaries({"iss": st.sampled_from([TEAM, OTHER_TEAM, ""]), "iat": st.integers()}).map(base64),
)


@given(st.lists(ANY_PART, max_size=4).map(b".".join))
def test_whatever_is_no_token_is_refused_in_apple_s_words(token: bytes) -> None:
    known = Callers(None, APPS, clock=lambda: NOW)  # type: ignore[arg-type] # it is not asked
    known._put({caller.id: caller for caller in [with_key()]})
    with pytest.raises(Refused) as caught:
        known.by_provider_token(token, NOW)
    assert caught.value.reason in ("InvalidProviderToken", "ExpiredProviderToken")


async def test_a_token_with_padded_base64_is_read_as_apple_reads_it(known: Callers) -> None:
    # The library a2 writes so.
    await known.add(with_key())
    parts = [json.dumps(each).encode() for each in ({"alg": "ES256", "kid": KEY}, {"iss": TEAM, "iat": int(NOW)})]
    start = b".".join(map(b64encode, parts))
    token = start + b"." + b64encode(PAIR.sign(start, ec.ECDSA(SHA256())))
    assert known.by_provider_token(token, NOW).app == "shop"


async def test_nothing_of_a_token_is_in_an_error(known: Callers) -> None:
    token = signed()
    with pytest.raises(Refused) as caught:
        known.by_provider_token(token, NOW)
    assert not any(part in caught.value.detail for part in token.decode().split("."))


# -- which certificate of several ------------------------------------------------------------------------------------


def test_who_vouches_for_a_certificate_is_not_taken_for_it() -> None:
    issued = push_certificate()
    assert leaf_of([authority().certificate, issued.certificate]) == issued.certificate
    assert leaf_of([authority().certificate]) == authority().certificate  # as `openssl req -x509` makes them


def test_two_clients_or_none_are_told_apart() -> None:
    with pytest.raises(ConfigError, match="There are 2 certificates of clients"):
        leaf_of([push_certificate().certificate, push_certificate().certificate])
    with pytest.raises(ConfigError, match="There is no certificate"):
        leaf_of([])
