"""HPACK against RFC 7541's examples, against the `hpack` package, and against hostile blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import chain

import hpack
import pytest
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hpack.huffman_table import decode_huffman
from hypothesis import given
from hypothesis import strategies as st

from heliograph.protocols.http2.hpack import (
    Decoder,
    Encoder,
    Field,
    HeaderListTooLarge,
    HpackError,
    _unhuffman,
    _unhuffman_by_octets,
    encode_static,
    huffman,
    int_octets,
)

ENDS = [
    b"",
    b"\x7f",
    b"\xff",
    b"\x7f\xff",
    b"\xff\xff",
    b"\xff\x7f",
    b"\xff\xff\xff",
    b"\xff\xff\xff\xff",
    b"\xff\xff\xff\xfc",
]
"""Some of these are padding that may be, or begin symbols of many bits, or EOS."""

NEWEST = 62
"""The index of the youngest dynamic entry."""


def indexed(index: int) -> bytes:
    return int_octets(index, 7, 0x80)


def string(text: bytes) -> bytes:
    return int_octets(len(text), 7, 0) + text


def coded(octets: bytes) -> bytes:
    """A string that claims to be Huffman code."""
    return int_octets(len(octets), 7, 0x80) + octets


def inserted(name: bytes, value: bytes) -> bytes:
    return b"\x40" + string(name) + string(value)


def resized(size: int) -> bytes:
    return int_octets(size, 5, 0x20)


def path(value: bytes) -> bytes:
    """`:path` as a literal that leaves the table alone; the value as it is on the wire."""
    return b"\x04" + value


def list_size(fields: Sequence[Field]) -> int:
    return sum(len(name) + len(value) + 32 for name, value in fields)


def entries(decoder: Decoder) -> list[Field]:
    """The dynamic table, youngest first, seen from outside."""
    looker = deepcopy(decoder)
    found: list[Field] = []
    while True:
        try:
            found += looker.decode(indexed(NEWEST + len(found)))
        except HpackError:
            return found


# -- RFC 7541, appendix C ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number,prefix_bits,octets", [(10, 5, "0a"), (1337, 5, "1f9a0a"), (42, 8, "2a"), (31, 5, "1f00"), (30, 5, "1e")]
)
def test_integers_are_spelt_as_in_appendix_c_1(number: int, prefix_bits: int, octets: str) -> None:
    assert int_octets(number, prefix_bits, 0).hex() == octets


@pytest.mark.parametrize(
    "block,field,enters",
    [
        ("400a637573746f6d2d6b65790d637573746f6d2d686561646572", (b"custom-key", b"custom-header"), True),
        ("040c2f73616d706c652f70617468", (b":path", b"/sample/path"), False),
        ("100870617373776f726406736563726574", (b"password", b"secret"), False),
        ("82", (b":method", b"GET"), False),
    ],
)
def test_each_kind_of_field_reads_as_in_appendix_c_2(block: str, field: Field, enters: bool) -> None:
    decoder = Decoder()
    assert decoder.decode(bytes.fromhex(block)) == [field]
    assert entries(decoder) == ([field] if enters else [])


FIRST: list[Field] = [
    (b":method", b"GET"),
    (b":scheme", b"http"),
    (b":path", b"/"),
    (b":authority", b"www.example.com"),
]
SECOND: list[Field] = [*FIRST, (b"cache-control", b"no-cache")]
THIRD: list[Field] = [
    (b":method", b"GET"),
    (b":scheme", b"https"),
    (b":path", b"/index.html"),
    (b":authority", b"www.example.com"),
    (b"custom-key", b"custom-value"),
]
PLAIN_REQUESTS = (
    "828684410f7777772e6578616d706c652e636f6d",
    "828684be58086e6f2d6361636865",
    "828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565",
)
CODED_REQUESTS = (
    "828684418cf1e3c2e5f23a6ba0ab90f4ff",
    "828684be5886a8eb10649cbf",
    "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf",
)


@pytest.mark.parametrize("blocks", [PLAIN_REQUESTS, CODED_REQUESTS], ids=["C.3", "C.4"])
def test_requests_read_as_in_appendices_c_3_and_c_4(blocks: tuple[str, ...]) -> None:
    decoder = Decoder()
    tables: list[list[Field]] = [[FIRST[-1]], [SECOND[-1], FIRST[-1]], [THIRD[-1], SECOND[-1], FIRST[-1]]]
    for block, fields, table, size in zip(blocks, (FIRST, SECOND, THIRD), tables, (57, 110, 164), strict=True):
        assert decoder.decode(bytes.fromhex(block)) == fields
        assert entries(decoder) == table
        assert list_size(table) == size


def test_requests_are_spelt_as_in_appendix_c_3() -> None:
    encoder = Encoder()
    for block, fields in zip(PLAIN_REQUESTS, (FIRST, SECOND, THIRD), strict=True):
        assert (encoder.start() + b"".join(map(encoder.index, fields))).hex() == block


DATE_21, DATE_22 = b"Mon, 21 Oct 2013 20:13:21 GMT", b"Mon, 21 Oct 2013 20:13:22 GMT"
COOKIE = b"foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1"
PRIVATE: Field = (b"cache-control", b"private")
LOCATION: Field = (b"location", b"https://www.example.com")
ANSWERS: tuple[list[Field], ...] = (
    [(b":status", b"302"), PRIVATE, (b"date", DATE_21), LOCATION],
    [(b":status", b"307"), PRIVATE, (b"date", DATE_21), LOCATION],
    [
        (b":status", b"200"),
        PRIVATE,
        (b"date", DATE_22),
        LOCATION,
        (b"content-encoding", b"gzip"),
        (b"set-cookie", COOKIE),
    ],
)
PLAIN_ANSWERS = (
    (
        "4803333032580770726976617465611d4d6f6e2c203231204f637420323031332032303a31333a323120474d54"
        "6e1768747470733a2f2f7777772e6578616d706c652e636f6d"
    ),
    "4803333037c1c0bf",
    (
        "88c1611d4d6f6e2c203231204f637420323031332032303a31333a323220474d54c05a04677a69707738666f6f3d4153444a4b48514b425a"
        "584f5157454f50495541585157454f49553b206d61782d6167653d333630303b2076657273696f6e3d31"
    ),
)
CODED_ANSWERS = (
    "488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff6e919d29ad171863c78f0b97c8e9ae82ae43d3",
    "4883640effc1c0bf",
    (
        "88c16196d07abe941054d444a8200595040b8166e084a62d1bffc05a839bd9ab77ad94e7821dd7f2e6c7b335dfdfcd5b3960d5af27087f36"
        "72c1ab270fb5291f9587316065c003ed4ee5b1063d5007"
    ),
)


@pytest.mark.parametrize("blocks", [PLAIN_ANSWERS, CODED_ANSWERS], ids=["C.5", "C.6"])
def test_answers_read_and_evict_as_in_appendices_c_5_and_c_6(blocks: tuple[str, ...]) -> None:
    decoder = Decoder(max_table_size=256)
    tables: list[list[Field]] = [
        [LOCATION, (b"date", DATE_21), PRIVATE, (b":status", b"302")],
        [(b":status", b"307"), LOCATION, (b"date", DATE_21), PRIVATE],
        [(b"set-cookie", COOKIE), (b"content-encoding", b"gzip"), (b"date", DATE_22)],
    ]
    for block, fields, table, size in zip(blocks, ANSWERS, tables, (222, 222, 215), strict=True):
        assert decoder.decode(bytes.fromhex(block)) == fields
        assert entries(decoder) == table
        assert list_size(table) == size


@pytest.mark.parametrize(
    "text,octets",
    [
        (b"www.example.com", "f1e3c2e5f23a6ba0ab90f4ff"),
        (b"no-cache", "a8eb10649cbf"),
        (b"custom-key", "25a849e95ba97d7f"),
        (b"302", "6402"),
        (DATE_21, "d07abe941054d444a8200595040b8166e082a62d1bff"),
        (b"", ""),
    ],
)
def test_strings_are_coded_as_in_appendices_c_4_and_c_6(text: bytes, octets: str) -> None:
    assert huffman(text).hex() == octets


# -- Huffman code --------------------------------------------------------------------------------------------------


def read_coded(octets: bytes) -> bytes | None:
    """What a Huffman string says; None where it is refused."""
    try:
        return Decoder().decode(path(coded(octets)))[0][1]
    except HpackError:
        return None


def test_every_octet_and_every_pair_survives_huffman_code() -> None:
    reference = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH)
    texts = [bytes((first,)) for first in range(256)]
    texts += [bytes((first, second)) for first in range(256) for second in range(256)]
    decoder = Decoder()
    for text in texts:
        octets = huffman(text)
        assert octets == reference.encode(text)
        assert decoder.decode(path(coded(octets))) == [(b":path", text)]


def test_all_huffman_strings_of_two_octets_mean_the_same_to_hpack() -> None:
    for octets in chain((bytes((one,)) for one in range(256)), (number.to_bytes(2, "big") for number in range(65536))):
        try:
            text = decode_huffman(octets)
        except hpack.HPACKDecodingError:
            text = None
        assert read_coded(octets) == text, octets.hex()


def bits(text: str) -> bytes:
    return int(text, 2).to_bytes(len(text) // 8, "big")


CODES = [f"{code:0{length}b}" for code, length in zip(REQUEST_CODES, REQUEST_CODES_LENGTH, strict=True)]
EOS = CODES[256]


@pytest.mark.parametrize("before", range(8))
def test_eos_is_refused_wherever_it_stands(before: int) -> None:
    start = CODES[ord("a")] * before
    for after in ("", CODES[ord("a")], CODES[ord("a")] * 8, EOS):
        text = start + EOS + after
        assert read_coded(bits(text + "1" * (-len(text) % 8))) is None
        text += "0" * (-len(text) % 8)
        assert read_coded(bits(text)) is None
        with pytest.raises(HpackError, match="EOS inside"):
            Decoder().decode(path(coded(bits(text + "1" * 8))))


def test_padding_must_be_ones_and_shorter_than_an_octet() -> None:
    for octet in range(256):
        code = CODES[octet]
        room = -len(code) % 8
        assert read_coded(bits(code + "1" * room)) == bytes((octet,))
        assert read_coded(bits(code + "1" * (room + 8))) is None
        for wrong in range(room):
            padding = "1" * wrong + "0" + "1" * (room - wrong - 1)
            # No code is shorter than five bits: what is not all ones can still be one more symbol, where there is room.
            text = read_coded(bits(code + padding))
            assert text is None or huffman(text) == bits(code + padding), (octet, padding)
    assert read_coded(b"\xff") is None
    assert read_coded(b"") == b""


def test_a_symbol_cut_short_is_refused() -> None:
    for code in CODES[:256]:
        for cut in range(8, len(code), 8):
            assert read_coded(bits(code[:cut])) is None


def test_a_long_coded_string_reads_the_same_every_time() -> None:
    decoder = Decoder()
    texts = [b"bearer " + bytes((65 + number % 26,)) * (80 + number) for number in range(100)]
    for _ in range(3):
        for text in texts:
            assert decoder.decode(path(coded(huffman(text)))) == [(b":path", text)]
    assert len(decoder._strings) <= 64


# -- against hpack -------------------------------------------------------------------------------------------------

NAMES = st.one_of(
    st.sampled_from([b":path", b":status", b":method", b"apns-id", b"apns-topic", b"authorization", b"x-a", b"x-b"]),
    st.binary(max_size=6),
)
VALUES = st.one_of(
    st.sampled_from([b"", b"GET", b"POST", b"200", b"/", b"com.example.app", b"10", b"x" * 100, b"y" * 900]),
    st.binary(max_size=12),
    st.binary(min_size=32, max_size=32).map(lambda token: b"/3/device/" + token.hex().encode()),
)
FIELDS: st.SearchStrategy[Field] = st.tuples(NAMES, VALUES)
TABLE_SIZES = st.sampled_from([0, 1, 31, 32, 64, 100, 256, 1000, 4096, 8192])


@given(
    st.lists(
        st.tuples(
            st.lists(TABLE_SIZES, max_size=3),
            st.lists(st.tuples(NAMES, VALUES, st.booleans()), max_size=12),
            st.booleans(),
        ),
        max_size=12,
    )
)
def test_what_hpack_writes_reads_as_it_was(
    blocks: list[tuple[list[int], list[tuple[bytes, bytes, bool]], bool]],
) -> None:
    writer, reader, decoder = hpack.Encoder(), hpack.Decoder(), Decoder(8192)
    reader.max_allowed_table_size = 8192
    for sizes, fields, coded_strings in blocks:
        for size in sizes:
            # hpack forgets a change that it has not yet told of when the same size is set twice.
            if size != writer.header_table_size:
                writer.header_table_size = size
        block = writer.encode(fields, huffman=coded_strings)
        changed = decoder.changed
        before = entries(decoder)
        assert decoder.decode(block) == [(name, value) for name, value, _ in fields]
        reader.decode(block, raw=True)
        assert entries(decoder) == list(reader.header_table.dynamic_entries)
        if decoder.changed == changed:
            assert entries(decoder) == before
            assert decoder.decode(block) == [(name, value) for name, value, _ in fields]


@given(
    TABLE_SIZES,
    st.lists(
        st.tuples(
            st.lists(TABLE_SIZES, max_size=3),
            st.lists(st.tuples(st.sampled_from(["index", "known", "literal", "index_name"]), FIELDS), max_size=12),
        ),
        max_size=12,
    ),
)
def test_what_we_write_reads_as_it_was(
    max_table_size: int, blocks: list[tuple[list[int], list[tuple[str, Field]]]]
) -> None:
    encoder, decoder, reader = Encoder(max_table_size), Decoder(8192), hpack.Decoder()
    spelt: dict[tuple[int, Field], bytes] = {}
    for sizes, fields in blocks:
        for size in sizes:
            encoder.resize(size)
            reader.max_allowed_table_size = size
        block = encoder.start()
        for how, field in fields:
            if how == "index":
                block += encoder.index(field)
            elif how == "index_name":
                block += encoder.index_name(*field)
            elif how == "literal":
                assert encoder.literal_head(field[0], len(field[1])) + field[1] == encoder.literal(*field)
                block += encoder.literal(*field)
            else:
                octets = encoder.known(field)
                assert spelt.setdefault((encoder.generation, field), octets) == octets
                block += octets
        assert encoder.start() == b""
        wanted = [field for _, field in fields]
        assert decoder.decode(block) == wanted
        assert [tuple(field) for field in reader.decode(block, raw=True)] == wanted
        table = list(reader.header_table.dynamic_entries)
        assert entries(decoder) == table
        assert list_size(table) <= max_table_size
        if block:
            assert reader.header_table.maxsize <= max_table_size


@given(st.lists(FIELDS, max_size=12))
def test_blocks_without_a_dynamic_table_read_as_they_were(fields: list[Field]) -> None:
    block = encode_static(fields)
    decoder, reader = Decoder(0), hpack.Decoder()
    reader.header_table_size = reader.max_allowed_table_size = 0
    assert decoder.decode(block) == fields
    assert decoder.changed == 0
    assert [tuple(field) for field in reader.decode(block, raw=True)] == fields


INTEGERS = st.one_of(st.integers(0, 70), st.integers(0, 300), st.sampled_from([2**14, 2**28, 2**32, 2**34]))
STRINGS = st.one_of(
    VALUES.map(string),
    VALUES.map(lambda text: coded(huffman(text))),
    st.binary(max_size=12).map(coded),
)


@st.composite
def stretched(draw: st.DrawFn, numbers: st.SearchStrategy[int], prefix_bits: int, first: int) -> bytes:
    """An integer, perhaps with zeros that say nothing behind it."""
    octets = int_octets(draw(numbers), prefix_bits, first)
    extra = draw(st.sampled_from([0, 0, 0, 1, 2, 3, 4, 5]))
    if extra and len(octets) > 1:
        octets = octets[:-1] + bytes((octets[-1] | 0x80,)) + b"\x80" * (extra - 1) + b"\0"
    return octets


@st.composite
def literals(draw: st.DrawFn) -> bytes:
    first, prefix_bits = draw(st.sampled_from([(0x40, 6), (0x00, 4), (0x10, 4)]))
    if draw(st.booleans()):
        return bytes((first,)) + draw(STRINGS) + draw(STRINGS)
    return draw(stretched(st.integers(1, 70), prefix_bits, first)) + draw(STRINGS)


PIECES = st.one_of(
    st.sampled_from([2, 4, 8, 61, 62, 62, 63, 64]).map(indexed),
    literals(),
    stretched(INTEGERS, 7, 0x80),
    st.binary(max_size=4),
)
BLOCKS = st.one_of(
    st.binary(max_size=60),
    st.lists(PIECES, max_size=8).map(b"".join),
    st.tuples(st.lists(stretched(TABLE_SIZES, 5, 0x20), max_size=3), st.lists(literals(), max_size=8)).map(
        lambda parts: b"".join(chain(*parts))
    ),
    st.tuples(st.lists(PIECES, min_size=1, max_size=8).map(b"".join), st.integers(0, 400)).map(
        lambda cut: cut[0][: cut[1]]
    ),
)


@given(st.lists(BLOCKS, max_size=8), st.sampled_from([300, 65_536]))
def test_any_octets_mean_the_same_to_hpack_or_are_refused_by_both(blocks: list[bytes], max_list_size: int) -> None:
    decoder, reader = Decoder(4096, max_list_size), hpack.Decoder(max_list_size)
    for block in blocks:
        try:
            wanted = [tuple(field) for field in reader.decode(block, raw=True)]
        except hpack.HPACKDecodingError:
            with pytest.raises(HpackError):
                decoder.decode(block)
            return
        assert decoder.decode(block) == wanted
        assert decoder.decode(b"") == []
        assert entries(decoder) == list(reader.header_table.dynamic_entries)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "block,complaint",
    [
        pytest.param(b"\x80", "index 0", id="index-0"),
        pytest.param(indexed(62), "index 62 is in neither table", id="index-beyond-the-tables"),
        pytest.param(indexed(2**32), "neither table", id="index-far-beyond-the-tables"),
        pytest.param(int_octets(62, 6, 0x40) + b"\0", "index 62 is in neither table", id="name-beyond-the-tables"),
        pytest.param(int_octets(900, 4, 0x10) + b"\0", "index 900 is in neither table", id="name-far-beyond"),
        pytest.param(b"\xff" + b"\x80" * 5 + b"\0", "more than five octets", id="index-too-long"),
        pytest.param(b"\x04\x7f" + b"\xff" * 9 + b"\0", "more than five octets", id="length-too-long"),
        pytest.param(b"\x3f" + b"\xff" * 5 + b"\0", "more than five octets", id="size-too-long"),
        pytest.param(resized(4097), "a dynamic table of 4097 octets, over our 4096", id="size-over-our-limit"),
        pytest.param(b"\x82" + resized(100), "behind a field", id="size-behind-a-field"),
        pytest.param(path(int_octets(2**34, 7, 0)) + b"x", "ends inside a field", id="length-beyond-the-block"),
        pytest.param(path(coded(huffman(b"abc")))[:-1], "Huffman|ends inside", id="coded-string-cut-short"),
        pytest.param(b"\x40", "ends inside a field", id="nothing-behind-the-first-octet"),
        pytest.param(b"\xff", "ends inside a field", id="index-without-its-end"),
        pytest.param(b"\x3f\x80", "ends inside a field", id="size-without-its-end"),
    ],
)
def test_a_block_that_means_nothing_is_refused_and_says_why(block: bytes, complaint: str) -> None:
    decoder = Decoder()
    with pytest.raises(HpackError, match=complaint) as refusal:
        decoder.decode(block)
    assert not isinstance(refusal.value, HeaderListTooLarge)


def test_an_integer_may_take_five_more_octets() -> None:
    text = b"x" * 127
    assert Decoder().decode(path(b"\x7f\x80\x80\x80\x80\0" + text)) == [(b":path", text)]


@pytest.mark.parametrize("spell", [string, lambda text: coded(huffman(text))], ids=["plain", "coded"])
def test_a_block_cut_anywhere_but_between_fields_is_refused(spell: Callable[[bytes], bytes]) -> None:
    pieces = [resized(2000), b"\x82", path(spell(b"/3/device/" + b"0a" * 32)), b"\x40" + spell(b"x-a") + spell(b"1")]
    pieces += [indexed(62), b"\x10" + spell(b"authorization") + spell(b"bearer " + b"e" * 300)]
    block = b"".join(pieces)
    borders = {len(b"".join(pieces[:count])) for count in range(len(pieces) + 1)}
    for cut in range(len(block) + 1):
        if cut in borders:
            Decoder().decode(block[:cut])
        else:
            with pytest.raises(HpackError):
                Decoder().decode(block[:cut])


# -- limits --------------------------------------------------------------------------------------------------------


def test_a_list_is_measured_with_32_octets_a_field() -> None:
    fields: list[Field] = [(b":method", b"POST"), (b"x-a", b"1" * 50)]
    block, size = encode_static(fields), list_size(fields)
    assert Decoder(max_list_size=size).decode(block) == fields
    with pytest.raises(HeaderListTooLarge, match=f"{size} octets, over our {size - 1}"):
        Decoder(max_list_size=size - 1).decode(block)


def test_a_list_that_is_too_large_still_has_its_effect_on_the_table() -> None:
    decoder = Decoder(max_list_size=200)
    block = resized(1000) + inserted(b"x-a", b"1") + b"\x82" * 10 + inserted(b"x-b", b"2" * 100)
    with pytest.raises(HeaderListTooLarge):
        decoder.decode(block)
    assert entries(decoder) == [(b"x-b", b"2" * 100), (b"x-a", b"1")]
    assert decoder.decode(indexed(63)) == [(b"x-a", b"1")]
    with pytest.raises(HeaderListTooLarge):
        decoder.decode(b"\x82" * 10)
    with pytest.raises(HeaderListTooLarge):
        decoder.decode(b"\x82" * 10)
    assert decoder.decode(indexed(62)) == [(b"x-b", b"2" * 100)]


def test_a_block_that_is_too_large_and_broken_is_broken() -> None:
    with pytest.raises(HpackError) as refusal:
        Decoder(max_list_size=200).decode(b"\x82" * 10 + b"\x80")
    assert not isinstance(refusal.value, HeaderListTooLarge)


def test_an_entry_referenced_thousands_of_times_is_not_copied() -> None:
    decoder = Decoder(max_list_size=1 << 30)
    value = b"v" * 4000
    decoder.decode(inserted(b"x-bomb", value))
    fields = decoder.decode(indexed(62) * 16_000 + b"\x0f\x2f\0")
    assert len({id(octets) for field in fields[:-1] for octets in field}) == 2
    assert fields[-1][0] is fields[0][0]
    small = Decoder()
    small.decode(inserted(b"x-bomb", value))
    with pytest.raises(HeaderListTooLarge):
        small.decode(indexed(62) * 16_000)
    with pytest.raises(HeaderListTooLarge):
        small.decode(indexed(62) * 17)
    assert small.decode(indexed(62) * 16) == [(b"x-bomb", value)] * 16


def test_a_field_larger_than_the_table_empties_it() -> None:
    decoder = Decoder(256)
    decoder.decode(inserted(b"x-a", b"1") + inserted(b"x-b", b"2"))
    assert decoder.decode(inserted(b"x-c", b"3" * 300)) == [(b"x-c", b"3" * 300)]
    assert entries(decoder) == []


def test_a_name_may_come_from_the_entry_that_its_field_evicts() -> None:
    decoder = Decoder(64)
    decoder.decode(inserted(b"x-name", b"old"))
    assert decoder.decode(int_octets(62, 6, 0x40) + string(b"new")) == [(b"x-name", b"new")]
    assert entries(decoder) == [(b"x-name", b"new")]


def test_a_size_of_0_empties_the_table_until_it_may_grow_again() -> None:
    decoder = Decoder()
    decoder.decode(inserted(b"x-a", b"1"))
    assert decoder.decode(resized(0) + resized(100) + inserted(b"x-b", b"2")) == [(b"x-b", b"2")]
    assert entries(decoder) == [(b"x-b", b"2")]
    decoder.decode(resized(0) + inserted(b"x-c", b"3"))
    assert entries(decoder) == []


def test_a_table_starts_no_larger_than_4096_octets_whatever_we_allow() -> None:
    decoder = Decoder(8192)
    decoder.decode(inserted(b"x-a", b"1" * 3000) + inserted(b"x-b", b"2" * 3000))
    assert entries(decoder) == [(b"x-b", b"2" * 3000)]
    decoder.decode(resized(8192) + inserted(b"x-a", b"1" * 3000))
    assert entries(decoder) == [(b"x-a", b"1" * 3000), (b"x-b", b"2" * 3000)]


# -- what the decoder remembers ------------------------------------------------------------------------------------


def test_the_same_block_reads_differently_after_the_table_changed() -> None:
    decoder = Decoder()
    decoder.decode(inserted(b"x-a", b"1"))
    for _ in range(3):
        assert decoder.decode(indexed(62)) == [(b"x-a", b"1")]
    decoder.decode(inserted(b"x-b", b"2"))
    for _ in range(3):
        assert decoder.decode(indexed(62)) == [(b"x-b", b"2")]
    decoder.decode(resized(0))
    with pytest.raises(HpackError):
        decoder.decode(indexed(62))


def test_a_block_that_changes_the_table_does_so_each_time() -> None:
    decoder = Decoder()
    block = inserted(b"x-a", b"1")
    for count in range(1, 4):
        assert decoder.decode(block) == [(b"x-a", b"1")]
        assert entries(decoder) == [(b"x-a", b"1")] * count
        assert decoder.changed == count


def test_blocks_that_leave_the_table_alone_do_not_count_as_changes() -> None:
    decoder = Decoder()
    decoder.decode(resized(4096) + inserted(b"x-a", b"1"))
    changed = decoder.changed
    assert changed == 2
    for block in (b"", indexed(62), path(string(b"/")), b"\x10" + string(b"a") + string(b"b"), indexed(62)):
        decoder.decode(block)
    assert decoder.changed == changed


def test_a_list_that_its_reader_changes_is_not_seen_again() -> None:
    decoder = Decoder()
    for _ in range(3):
        fields = decoder.decode(b"\x82\x87")
        assert fields == [(b":method", b"GET"), (b":scheme", b"https")]
        fields.clear()


def test_what_is_remembered_is_bounded() -> None:
    decoder = Decoder()
    for number in range(200):
        after = b"\0" + string(b"x-%d" % number) + string(b"1")
        assert decoder.decode(path(string(b"/")) + after) == [(b":path", b"/"), (b"x-%d" % number, b"1")]
        assert 0 < len(decoder._shapes) <= 64
    decoder.decode(path(string(b"/")) + b"\0" + string(b"x") + string(b"x" * 600))
    assert all(len(before) + len(after) < 512 for before, after in decoder._shapes)


GAPS = st.sampled_from([b"", b"/", b"/3/device/" + b"0f" * 32, b"~" * 20, b"x" * 130])
PARTS = st.sampled_from(
    [b"", b"\x83", indexed(NEWEST), inserted(b"x-a", b"1"), b"\0" + string(b"x-b") + string(b"2"), b"\x1f\x2f\0"],
)


@given(st.lists(st.tuples(PARTS, GAPS, st.booleans(), PARTS), max_size=30), st.integers(0, 40))
def test_blocks_of_a_shape_that_is_known_read_as_others(
    blocks: list[tuple[bytes, bytes, bool, bytes]], cut: int
) -> None:
    """Each also without its end, in a decoder that is not used any more."""
    ours, theirs = Decoder(), hpack.Decoder()
    found: list[Field] | str = ""
    for before, gap, code, after in blocks:
        block = before + path(coded(huffman(gap)) if code else string(gap)) + after
        for octets, decoder in ((block[: len(block) - cut], deepcopy(ours)), (block, ours)):
            fresh = deepcopy(ours)
            fresh._shapes.clear()
            found = outcome(decoder, octets)
            assert found == outcome(fresh, octets)
        try:
            expected = [(bytes(name), bytes(value)) for name, value in theirs.decode(block, raw=True)]
        except hpack.HPACKError:
            return
        assert found == expected


def outcome(decoder: Decoder, block: bytes) -> list[Field] | str:
    try:
        return decoder.decode(block)
    except HpackError as error:
        return str(error)


def test_a_list_that_is_too_large_is_so_in_a_shape_that_is_known() -> None:
    limit = 10 * 33 + 5 + 32 + 40
    decoder = Decoder(max_list_size=limit)
    after = (b"\0" + string(b"x") + string(b"")) * 10
    for size in range(128):
        block = path(string(b"/" * size)) + after
        if list_size([(b":path", b"/" * size), *[(b"x", b"")] * 10]) > limit:
            with pytest.raises(HeaderListTooLarge):
                decoder.decode(block)
        else:
            assert decoder.decode(block)[0] == (b":path", b"/" * size)


# -- long Huffman strings go by way of zlib --------------------------------------------------------------------------


@given(st.one_of(st.binary(max_size=60), st.binary(max_size=60).map(huffman)), st.sampled_from(ENDS))
def test_long_huffman_strings_read_as_short_ones(octets: bytes, end: bytes) -> None:
    octets = huffman(b"0123456789abcdef" * 2) + octets + end if len(octets) % 2 else octets + end
    try:
        expected: bytes | None = _unhuffman_by_octets(octets)
    except HpackError:
        expected = None
    try:
        found: bytes | None = _unhuffman(octets)
    except HpackError:
        found = None
    assert found == expected


@pytest.mark.parametrize("symbol", [bytes((octet,)) for octet in range(256)])
def test_any_symbol_may_end_a_long_huffman_string(symbol: bytes) -> None:
    for count in range(24, 32):
        text = b"0" * count + symbol
        assert _unhuffman(huffman(text)) == text
        assert _unhuffman(huffman(symbol * count)) == symbol * count


# -- what the encoder remembers ------------------------------------------------------------------------------------

TOPIC: Field = (b"apns-topic", b"com.example.app")


def test_a_field_enters_the_table_once_and_costs_an_octet_afterwards() -> None:
    encoder = Encoder()
    generation = encoder.generation
    assert encoder.known(TOPIC) == b"\0" + string(TOPIC[0]) + string(TOPIC[1])
    assert encoder.generation == generation
    assert encoder.index(TOPIC) == inserted(*TOPIC)
    assert encoder.generation != generation
    generation = encoder.generation
    assert encoder.index(TOPIC) == encoder.known(TOPIC) == b"\xbe"
    assert encoder.literal(*TOPIC) == b"\x0f\x2f" + string(TOPIC[1])
    assert encoder.generation == generation
    encoder.index((b"apns-priority", b"10"))
    assert encoder.known(TOPIC) == b"\xbf"


def test_static_entries_need_no_place_in_the_table() -> None:
    encoder = Encoder()
    generation = encoder.generation
    assert encoder.index((b":method", b"POST")) == b"\x83"
    assert encoder.literal(b":path", b"/x") == b"\x04\x02/x"
    assert encoder.literal_head(b":path", 74) == b"\x04\x4a"
    assert encoder.literal_head(b":path", 300) == b"\x04\x7f\xad\x01"
    assert encoder.generation == generation


def test_a_name_enters_the_table_with_its_first_value_only() -> None:
    encoder = Encoder()
    assert encoder.index_name(b"apns-id", b"1") == inserted(b"apns-id", b"1")
    generation = encoder.generation
    assert encoder.index_name(b"apns-id", b"2") == b"\x0f\x2f\x012"
    assert encoder.index_name(b"authorization", b"x") == b"\x0f\x08\x01x"
    assert encoder.generation == generation


def test_a_name_is_found_while_any_entry_has_it() -> None:
    encoder = Encoder(140)
    encoder.start()
    for value in (b"1", b"2", b"3", b"4", b"5"):
        encoder.index((b"x", value))
        assert encoder.literal(b"x", b"") == b"\x0f\x2f\0"
    assert encoder.known((b"x", b"5")) == b"\xbe"
    assert encoder.known((b"x", b"3")) == b"\xc0"
    assert encoder.known((b"x", b"1")) == b"\x0f\x2f\x011"


def test_a_field_over_a_quarter_of_the_table_stays_out_of_it() -> None:
    encoder = Encoder()
    generation = encoder.generation
    large: Field = (b"x", b"v" * (1024 - 32))
    assert encoder.index(large) == encoder.index_name(*large) == encoder.literal(*large)
    assert encoder.generation == generation
    assert encoder.index((b"x", b"v" * (1024 - 33))).startswith(b"\x40")


def test_nothing_enters_a_table_of_no_size() -> None:
    encoder = Encoder()
    encoder.index(TOPIC)
    generation = encoder.generation
    encoder.resize(0)
    assert encoder.generation != generation
    assert encoder.start() == b"\x20"
    assert encoder.start() == b""
    assert encoder.index(TOPIC) == encoder.literal(*TOPIC) == b"\0" + string(TOPIC[0]) + string(TOPIC[1])


def test_a_table_that_shrank_and_grew_between_blocks_tells_both_sizes() -> None:
    encoder = Encoder()
    for size in (1000, 100, 2000):
        encoder.resize(size)
    assert encoder.start() == resized(100) + resized(2000)
    encoder.resize(3000)
    assert encoder.start() == resized(3000)


def test_a_size_that_changes_nothing_for_us_is_not_told() -> None:
    encoder = Encoder()
    generation = encoder.generation
    encoder.resize(65_536)
    assert encoder.start() == b""
    assert encoder.generation == generation


def test_an_encoder_that_wants_less_than_the_peer_allows_says_so_first() -> None:
    encoder = Encoder(512)
    assert encoder.start() == resized(512)
    assert Encoder(65_536).start() == b""


def test_a_larger_table_is_filled_only_where_the_peer_allows_it() -> None:
    encoder = Encoder(8192)
    encoder.resize(65_536)
    assert encoder.start() == resized(8192)


def test_a_block_without_a_dynamic_table_uses_static_entries_and_names() -> None:
    assert encode_static([(b":status", b"200"), (b":status", b"410"), (b"apns-id", b"x")]) == (
        b"\x88" + b"\x08\x03410" + b"\0\x07apns-id\x01x"
    )
