"""Properties of the stored form of a batch."""

from __future__ import annotations

import contextlib
import struct

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import structs

from heliograph.errors import StoreError
from heliograph.model import Batch, Environment, Headers, Origin, PushType
from heliograph.stores.body import Places, head_octets, pack, unpack

ID = "01890a5d-ac96-774b-bcce-b302099a"

hex_digits = st.text("0123456789abcdef", min_size=1, max_size=200).map(str.encode)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=64)
header_sets = st.builds(
    Headers,
    topic=texts,
    push_type=st.sampled_from(PushType),
    priority=st.none() | st.integers(0, 10),
    expiration=st.none() | st.integers(0, 2**63 - 1),
    collapse_id=st.none() | texts,
    collapse_on_id=st.booleans(),
)


@st.composite
def origins(draw: st.DrawFn, size: int) -> Origin | None:
    if draw(st.booleans()):
        return None
    some = draw(st.lists(st.binary(min_size=4, max_size=4), max_size=min(size, 12)))
    return Origin(draw(texts), b"".join((some * size)[:size]))


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    size = draw(st.integers(1, 12) | st.sampled_from([999, 1000]))
    # Few distinct entries, repeated: a thousand drawn one by one would be slow and say no more.
    length = draw(st.none() | st.integers(1, 200))
    tokens = draw(
        st.lists(
            hex_digits
            if length is None
            else st.binary(min_size=length, max_size=length).map(lambda b: b.hex().encode()),
            min_size=1,
            max_size=min(size, 12),
        )
    )
    payloads = draw(st.lists(st.binary(max_size=300), min_size=1, max_size=min(size, 12)))
    headers = draw(st.lists(header_sets, min_size=1, max_size=4))
    return Batch(
        id=ID,
        app=draw(texts),
        environment=draw(st.sampled_from(Environment)),
        created_at=draw(st.floats(0, 4e9)),
        headers=tuple(headers),
        tokens=(tokens * size)[:size],
        payloads=draw(st.sampled_from([payloads[:1], (payloads * size)[:size]])),
        headers_of=draw(st.none() | st.just(bytes(range(len(headers))) * size).map(lambda all_of: all_of[:size])),
        origin=draw(origins(size)),
        apns_ids=draw(st.dictionaries(st.integers(0, size - 1), st.uuids().map(str), max_size=5)),
    )


def restored(batch: Batch, body: bytes) -> Batch:
    return unpack(batch.id, batch.app, batch.environment, batch.created_at, body)


def plain(size: int = 2) -> Batch:
    return Batch(ID, "shop", Environment.PRODUCTION, 1.7e9, (Headers("com.example.shop"),), [b"00ff"] * size, [b"{}"])


@given(batches())
@example(plain(1))
@example(structs.replace(plain(1), tokens=[b"abc"]))
@example(structs.replace(plain(3), tokens=[b"a", b"ab", b"abc" * 2000], payloads=[b"", b"", b""]))
def test_batch_comes_back_as_it_was_packed(batch: Batch) -> None:
    assert restored(batch, pack(batch)) == batch


def test_tokens_take_half_of_their_digits_and_a_shared_payload_is_stored_once() -> None:
    batch = structs.replace(plain(1000), tokens=[b"%064x" % number for number in range(1000)], payloads=[b"x" * 4096])
    assert len(pack(batch)) < 32 * 1000 + 4096 + 200


@pytest.mark.parametrize(
    "batch",
    [
        structs.replace(plain(), tokens=[]),
        structs.replace(plain(), tokens=[b"00"] * 1001),
        structs.replace(plain(), tokens=[b"no", b"hex"]),
        structs.replace(plain(3), payloads=[]),
        structs.replace(plain(3), payloads=[b"{}"] * 2),
        structs.replace(plain(), headers=()),
        structs.replace(plain(), headers_of=b"\0"),
        structs.replace(plain(), headers_of=b"\0\1"),
        structs.replace(plain(), origin=Origin("main-1", bytes(4))),
        structs.replace(plain(), origin=Origin("main-1", bytes(9))),
        structs.replace(plain(), apns_ids={2: ID + "0001"}),
        structs.replace(plain(), apns_ids={-1: ID + "0001"}),
    ],
)
def test_batch_whose_columns_do_not_fit_is_refused(batch: Batch) -> None:
    with pytest.raises(ValueError):
        pack(batch)


@given(batches(), st.data())
def test_damaged_body_gives_a_batch_or_a_store_error(batch: Batch, data: st.DataObject) -> None:
    body = bytearray(pack(batch))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    del body[data.draw(st.integers(0, len(body))) :]
    with contextlib.suppress(StoreError):
        found = restored(batch, bytes(body))
        assert len(found.payloads) in (1, len(found))


@pytest.mark.parametrize("body", [b"", b"\x00", b"\x03" + pack(plain())[1:], b"\x01", b"\x02", pack(plain())[:9]])
def test_body_of_another_form_is_a_store_error_that_names_the_batch(body: bytes) -> None:
    with pytest.raises(StoreError, match=ID):
        restored(plain(), body)
    with pytest.raises(StoreError):
        Places(body)


def test_body_of_form_1_is_read_as_ever() -> None:
    lengths = struct.pack("<2I", 2, 3)
    parts = [[{"topic": "com.example.shop"}], None, 0, lengths, b"\xab\xcd\xe0", lengths, b"{}[1]"]
    body = b"\x01" + msgspec.msgpack.encode(parts)
    batch = structs.replace(plain(), tokens=[b"ab", b"cde"], payloads=[b"{}", b"[1]"])
    assert restored(batch, body) == batch
    assert head_octets(body[:5], len(body)) == len(body)
    assert told(Places(body), 2) == [(Headers("com.example.shop"), "ab"), (Headers("com.example.shop"), "cde")]


def test_body_from_before_connections_were_told_is_read_as_ever_and_what_has_none_is_still_packed_so() -> None:
    body = (
        b"\x02\x00\x00\x00{\x96\x92\x82\xa5topic\xb0com.example.shop\xa8priority\n\x83\xa5topic\xb5com.example.shop.voip"
        b"\xa9push_type\xa4voip\xaaexpiration\x00\xc4\x02\x01\x00\x00\xc4\x08\x04\x00\x00\x00\x03\x00\x00\x00"
        b"\xc4\x04\x00\xff\xab\xc0\xc4\x08\x02\x00\x00\x00\x03\x00\x00\x00{}[1]"
    )
    kinds = Headers("com.example.shop", priority=10), Headers("com.example.shop.voip", PushType.VOIP, expiration=0)
    batch = structs.replace(
        plain(), headers=kinds, headers_of=b"\1\0", tokens=[b"00ff", b"abc"], payloads=[b"{}", b"[1]"]
    )
    assert restored(batch, body) == batch
    assert pack(batch) == body
    places = Places(body)
    assert told(places, 2) == [(kinds[1], "00ff"), (kinds[0], "abc")]
    assert [marks(places, index) for index in range(2)] == [(None, None, None)] * 2


def test_identifiers_that_were_cut_short_are_a_store_error() -> None:
    body = pack(structs.replace(plain(), origin=Origin("main-1", b"\0\0\0\1\0\0\0\2")))
    cut = body.replace(b"\xc4\x08\0\0\0\1\0\0\0\2", b"\xc4\x07\0\0\0\1\0\0\0")
    cut = b"\x02" + (int.from_bytes(body[1:5], "big") - 1).to_bytes(4, "big") + cut[5:]
    with pytest.raises(StoreError, match="identifiers"):
        restored(plain(), cut)
    assert [Places(cut).identifier(index) for index in range(3)] == [1, None, None]


# What is read of a place, without the payloads


def marks(places: Places, index: int) -> tuple[str | None, int | None, str | None]:
    return places.connection, places.identifier(index), places.apns_id(index)


@given(batches())
@example(structs.replace(plain(1), origin=Origin("", b"\xff\xff\xff\xff")))
def test_the_head_alone_tells_where_each_place_came_from(batch: Batch) -> None:
    body = pack(batch)
    places = Places(body[: head_octets(body[:5], len(body))])
    origin = batch.origin
    for index in range(len(batch)):
        octets = origin.identifiers[4 * index : 4 * index + 4] if origin else b""
        assert marks(places, index) == (
            origin.connection if origin else None,
            int.from_bytes(octets, "big") if octets else None,
            batch.apns_ids.get(index),
        )
    assert places.apns_id(len(batch)) is None
    assert places.identifier(len(batch)) is None


def told(places: Places, size: int) -> list[tuple[Headers, str]]:
    return [(places.headers(index), places.token(index)) for index in range(size)]


@given(batches())
@example(plain(1))
@example(structs.replace(plain(1), tokens=[b"abc"]))
def test_the_head_alone_tells_headers_and_device_token_of_each_place(batch: Batch) -> None:
    body = pack(batch)
    head = body[: head_octets(body[:5], len(body))]
    assert len(body) - len(head) == sum(map(len, batch.payloads))
    headers_of = batch.headers_of or bytes(len(batch))
    expected = [(batch.headers[kind], token.decode()) for kind, token in zip(headers_of, batch.tokens, strict=True)]
    places = Places(head)
    assert told(places, len(batch)) == expected
    for beyond in (len(batch), 1000):
        with pytest.raises(IndexError):
            places.token(beyond)


@given(batches(), st.data())
def test_the_places_of_a_device_token_are_found(batch: Batch, data: st.DataObject) -> None:
    places = Places(pack(batch))
    token = data.draw(st.sampled_from(batch.tokens) | st.binary(min_size=1, max_size=3).map(lambda b: b.hex().encode()))
    if len(token) % 2 == 0:
        assert places.find(bytes.fromhex(token.decode())) == [
            index for index, each in enumerate(batch.tokens) if each == token
        ]


@given(batches(), st.data())
def test_damaged_heads_tell_something_or_nothing(batch: Batch, data: st.DataObject) -> None:
    body = bytearray(pack(batch))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, min(len(body), 200) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(StoreError):
        places = Places(bytes(body))
        for token in (*batch.tokens, b"ab"):
            found = places.find(token)
            assert found == sorted(set(found))
        with contextlib.suppress(IndexError):
            assert len(told(places, len(batch))) == len(batch)


def test_lengths_of_more_device_tokens_than_there_are_are_no_body() -> None:
    body = pack(structs.replace(plain(2), tokens=[b"00ff", b"00ff00"]))
    lengths = bytes((4, 0, 0, 0, 6, 0, 0, 0))
    assert body.count(lengths) == 1
    with pytest.raises(StoreError, match="fewer device tokens"):
        Places(body.replace(lengths, bytes((4, 0, 0, 0, 8, 0, 0, 0))))
