"""HPACK, HTTP/2's header compression (RFC 7541): a strict decoder, and an encoder that is told what to remember.

The static table and the Huffman code are those of the `hpack` package, which the tests hold this module against.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable
from functools import cache

from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hpack.table import HeaderTable

Field = tuple[bytes, bytes]
"""Name and value."""


class HpackError(Exception):
    """A block that means nothing; both sides' tables differ from here on, so the connection ends (section 2.3.3)."""


class HeaderListTooLarge(HpackError):
    """A sound block with more in it than we take. The table is right, and the connection may go on."""


_STATIC: tuple[Field, ...] = HeaderTable.STATIC_TABLE
_STATIC_INDEX: dict[Field, int] = {field: index for index, field in enumerate(_STATIC, 1)}
_STATIC_NAME: dict[bytes, int] = {field[0]: index for index, field in reversed(list(enumerate(_STATIC, 1)))}

_DEFAULT_TABLE_SIZE = 4096
"""Both sides' dynamic table until SETTINGS_HEADER_TABLE_SIZE says otherwise (RFC 9113, section 6.5.2)."""
_ENTRY_OVERHEAD = 32
"""What a field counts beside its octets, in the table (RFC 7541, section 4.1) and in a list (RFC 9113, 6.5.2)."""


# -- integers and strings ------------------------------------------------------------------------------------------


def int_octets(number: int, prefix_bits: int, first: int) -> bytes:
    """An integer (section 5.1) whose first octet shares its place with the bits set in `first`."""
    mask = (1 << prefix_bits) - 1
    if number < mask:
        return bytes((first | number,))
    octets = bytearray((first | mask,))
    number -= mask
    while number >= 0x80:
        octets.append(number & 0x7F | 0x80)
        number >>= 7
    octets.append(number)
    return bytes(octets)


def _string(text: bytes) -> bytes:
    return int_octets(len(text), 7, 0) + text


def _read_integer(block: bytes, at: int, mask: int) -> tuple[int, int]:
    """The rest of an integer whose prefix was all ones, and where it ends. IndexError: the block ends first."""
    number = mask
    for shift in range(0, 35, 7):
        octet = block[at]
        at += 1
        number += (octet & 0x7F) << shift
        if octet < 0x80:
            return number, at
    raise HpackError("an integer goes on for more than five octets")


# -- Huffman code --------------------------------------------------------------------------------------------------

_EOS = 1 << REQUEST_CODES_LENGTH[256] | REQUEST_CODES[256]
_SYMBOLS: dict[int, bytes] = {
    1 << length | code: bytes((octet,))
    for octet, (code, length) in enumerate(zip(REQUEST_CODES[:256], REQUEST_CODES_LENGTH[:256], strict=True))
}
"""Codes with a one in front, so that leading zeros count."""
_PADDING = frozenset((1 << bits) - 1 for bits in range(1, 9))
"""What may be left over at the end of a string: up to seven ones, with a one in front."""


class _State:
    """Where a Huffman string stands between two octets: the bits since the last whole symbol, a one in front."""

    __slots__ = ("bits", "steps")

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.steps: list[tuple[bytes, _State]] = []
        """By the next octet: the symbols that it completes, and the state after it. Empty until first needed."""

    def fill(self) -> None:
        if self.bits == _EOS:
            raise HpackError("EOS inside a Huffman string")
        for octet in range(256):
            bits, text = self.bits, b""
            for shift in range(7, -1, -1):
                bits = bits << 1 | octet >> shift & 1
                if bits in _SYMBOLS:
                    text += _SYMBOLS[bits]
                    bits = 1
                elif bits == _EOS:
                    break
            self.steps.append((text, _state(bits)))


@cache
def _state(bits: int) -> _State:
    """Each state once: 256 and EOS."""
    return _State(bits)


def huffman(text: bytes) -> bytes:
    """A string's Huffman code, padded to whole octets (section 5.2)."""
    bits, length = 0, 0
    for octet in text:
        size = REQUEST_CODES_LENGTH[octet]
        bits = bits << size | REQUEST_CODES[octet]
        length += size
    padding = -length % 8
    return (bits << padding | (1 << padding) - 1).to_bytes((length + padding) // 8, "big")


_MIRROR = bytes(int(f"{octet:08b}"[::-1], 2) for octet in range(256))
"""Octets with their bits turned round: DEFLATE fills them from the other end."""
_END_OF_BLOCK = b"\xff\x7f"
"""Fifteen ones, as DEFLATE has them, and a zero."""
_LONG = 16
"""Strings of so many octets are worth the call."""


def _inflater() -> zlib._Decompress:
    """A decompressor that stands behind the head of a block of DEFLATE (RFC 1951) whose code is HPACK's.

    Both codes are canonical, so that their lengths say all. DEFLATE's have 15 bits at most: of HPACK's, those up to
    there leave one code of fifteen ones free, which ends the block.
    """
    lengths = [size if size <= 15 else 0 for size in REQUEST_CODES_LENGTH[:256]] + [15]
    # The code of the lengths themselves: five of three bits, so that the head ends with an octet, the rest of four.
    sizes = {size: 3 if size in _THREE_BITS else 4 for size in sorted(set(lengths))}
    codes: dict[int, str] = {}
    code = 0
    for bits in (3, 4):
        for size in [size for size in sizes if sizes[size] == bits]:
            codes[size] = f"{code:0{bits}b}"
            code += 1
        code <<= 1
    # The last block, with codes of its own: 257 lengths for octets and end, one (none) for distances, 19 for lengths.
    head = "1" + "01" + "00000" + "00000" + "1111"
    head += "".join(f"{sizes.get(size, 0):03b}"[::-1] for size in _ORDER_OF_LENGTHS)
    head += "".join(codes[size] for size in [*lengths, 0])
    inflater = zlib.decompressobj(-15)
    inflater.decompress(bytes(int(head[at : at + 8][::-1], 2) for at in range(0, len(head), 8)))
    return inflater


_THREE_BITS = (0, 5, 6, 7, 15)
_ORDER_OF_LENGTHS = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)
"""RFC 1951, section 3.2.7."""
_INFLATER = _inflater()


def _inflate(octets: bytes) -> tuple[bytes, int | None]:
    """What zlib makes of a Huffman string, and how many octets it left over; None where the block did not end."""
    inflater = _INFLATER.copy()
    text = inflater.decompress(octets.translate(_MIRROR) + _END_OF_BLOCK)
    return text, len(inflater.unused_data) if inflater.eof else None


def _unhuffman(octets: bytes) -> bytes:
    """Long strings by way of zlib: only what is certainly right is taken from there, the rest is read octet by octet.

    Right is what ends a block: whole symbols, then ones that were padding up to the last octet's end, and no more.
    """
    if len(octets) >= _LONG:
        text, left = _inflate(octets)
        # An octet is left over where seven ones or more were padding. Eight are too many, and then that octet was
        # not needed.
        if left == 0 or (left == 1 and _inflate(octets[:-1])[1] != 0):
            return text
    return _unhuffman_by_octets(octets)


def _unhuffman_by_octets(octets: bytes) -> bytes:
    state = _state(1)
    parts: list[bytes] = []
    for octet in octets:
        try:
            part, state = state.steps[octet]
        except IndexError:
            state.fill()
            part, state = state.steps[octet]
        parts.append(part)
    if state.bits not in _PADDING:
        raise HpackError("a Huffman string ends in EOS, or in padding other than up to seven ones")
    return b"".join(parts)


# -- decoder -------------------------------------------------------------------------------------------------------

_REMEMBERED_BLOCKS = 64
_REMEMBERED_BLOCK_OCTETS = 512
_MISSES = 256
"""After so many blocks that were not known, none is looked for until the table changes."""
_LONGEST_IN_GAP = 0x7F * 2
"""No Huffman code is shorter than five bits."""
_REMEMBERED_STRINGS = 64
_REMEMBERED_STRING_OCTETS = range(65, 513)
"""Provider tokens, which some clients never index, but not paths with a device token, which do not come again."""


class Decoder:
    """The dynamic table that the peer fills, and what its blocks mean by it.

    `max_table_size`: the largest table we allow, as announced in SETTINGS_HEADER_TABLE_SIZE. An announcement of less
    than 4096 holds only once it is acknowledged, so who wants no mistakes before that passes 4096.
    `max_list_size`: the largest list of fields we take, each counted with 32 octets on top.

    After any HpackError but HeaderListTooLarge, a decoder is of no more use.
    """

    def __init__(self, max_table_size: int = _DEFAULT_TABLE_SIZE, max_list_size: int = 65_536) -> None:
        self.changed = 0
        """Counts insertions into the dynamic table and settings of its size: the same after a block, the same table."""
        self._max_table_size = max_table_size
        self._max_list_size = max_list_size
        # The oldest dynamic entry first, the static entries last and backwards: index n is table[-n] for both tables.
        self._table: list[Field] = list(reversed(_STATIC))
        self._limit = min(max_table_size, _DEFAULT_TABLE_SIZE)
        self._used = 0
        self._largest = max(len(name) + len(value) for name, value in _STATIC)
        """No entry that ever was in the table had more octets."""
        self._shapes: dict[tuple[bytes, bytes], tuple[int, list[Field]]] = {}
        """What comes before and after the gap of blocks that were decoded since the table last changed, none of which
        changed it: the place of the field whose value is in the gap, and all fields."""
        self._gap: tuple[int, int] | None = None
        """Where the value of the last block's first literal begins that left the table alone, and its field's place."""
        self._misses = 0
        """How many blocks since one that was known."""
        self._gap_at = 0
        """The first of it, in the block that was remembered last."""
        self._strings: dict[bytes, bytes] = {}

    def decode(self, block: bytes) -> list[Field]:
        """A whole block's fields; equal fields are often the same objects.

        Raises HeaderListTooLarge after the block has had its effect on the table; any other HpackError at once.
        """
        gap_at = self._gap_at
        if self._misses < _MISSES and gap_at < len(block):
            first = block[gap_at]
            stop = gap_at + 1 + (first & 0x7F)
            shape = self._shapes.get((block[:gap_at], block[stop:]))
            if shape is not None and first & 0x7F != 0x7F and stop <= len(block):
                place, known = shape
                value = block[gap_at + 1 : stop]
                self._misses = 0
                fields = known.copy()
                fields[place] = known[place][0], value if first < 0x80 else _unhuffman(value)
                return fields
        before = self.changed
        self._gap = None
        try:
            fields = self._read(block)
        except IndexError:
            raise HpackError("the block ends inside a field") from None
        changed = self.changed != before
        if changed:
            self._shapes.clear()
            self._misses = 0
        # Most lists are far from the limit, and seen to be so without adding up. Collecting them first takes at most
        # some forty octets of memory for each of the block's: what an index stands for is not copied.
        most = len(block) * 2 + len(fields) * (_ENTRY_OVERHEAD + self._largest)
        if most > self._max_list_size:
            size = sum([len(name) + len(value) + _ENTRY_OVERHEAD for name, value in fields])
            if size > self._max_list_size:
                raise HeaderListTooLarge(f"a list of fields of {size} octets, over our {self._max_list_size}")
        if not changed and self._gap is not None and most + _LONGEST_IN_GAP <= self._max_list_size:
            self._remember(block, fields, *self._gap)
        return fields

    def _remember(self, block: bytes, fields: list[Field], gap_at: int, place: int) -> None:
        self._misses += 1
        if self._misses > _MISSES:
            return
        stop = gap_at + 1 + (block[gap_at] & 0x7F)
        if block[gap_at] & 0x7F != 0x7F and len(block) < _REMEMBERED_BLOCK_OCTETS:
            if len(self._shapes) >= _REMEMBERED_BLOCKS:
                self._shapes.clear()
            self._shapes[block[:gap_at], block[stop:]] = place, fields.copy()
            self._gap_at = gap_at

    def _read(self, block: bytes) -> list[Field]:
        """IndexError: the block ends inside a field."""
        table = self._table
        fields: list[Field] = []
        at, end = 0, len(block)
        while at < end:
            octet = block[at]
            at += 1
            if octet > 0x80:
                index = octet & 0x7F
                if index == 0x7F:
                    index, at = _read_integer(block, at, 0x7F)
                try:
                    fields.append(table[-index])
                except IndexError:
                    raise HpackError(f"index {index} is in neither table") from None
                continue
            if octet == 0x80:
                raise HpackError("index 0")
            if octet >= 0x40:
                index, mask = octet & 0x3F, 0x3F
            elif octet >= 0x20:
                if fields:
                    raise HpackError("a change of the table's size behind a field")
                at = self._read_size(block, at)
                continue
            else:
                index, mask = octet & 0x0F, 0x0F
            if index:
                if index == mask:
                    index, at = _read_integer(block, at, mask)
                try:
                    name = table[-index][0]
                except IndexError:
                    raise HpackError(f"index {index} is in neither table") from None
            else:
                name, at = self._read_string(block, at)
            if octet < 0x20 and self._gap is None:
                self._gap = at, len(fields)
            length = block[at]
            if length < 0x7F:
                at += 1
                value = block[at : at + length]
                at += length
            else:
                value, at = self._read_string(block, at)
            field = (name, value)
            fields.append(field)
            if octet >= 0x40:
                self._insert(field)
        if at > end:
            raise IndexError
        return fields

    def _read_string(self, block: bytes, at: int) -> tuple[bytes, int]:
        """A string and where it ends, which may be behind the block's end."""
        octet = block[at]
        at += 1
        length = octet & 0x7F
        if length == 0x7F:
            length, at = _read_integer(block, at, 0x7F)
        stop = at + length
        text = block[at:stop]
        if octet < 0x80:
            return text, stop
        if length not in _REMEMBERED_STRING_OCTETS:
            return _unhuffman(text), stop
        remembered = self._strings.get(text)
        if remembered is None:
            remembered = _unhuffman(text)
            if len(self._strings) >= _REMEMBERED_STRINGS:
                self._strings.clear()
            self._strings[text] = remembered
        return remembered, stop

    def _read_size(self, block: bytes, at: int) -> int:
        size = block[at - 1] & 0x1F
        if size == 0x1F:
            size, at = _read_integer(block, at, 0x1F)
        if size > self._max_table_size:
            raise HpackError(f"a dynamic table of {size} octets, over our {self._max_table_size}")
        self.changed += 1
        self._limit = size
        self._evict()
        return at

    def _insert(self, field: Field) -> None:
        """A field larger than the whole table empties it and is not an error (section 4.4)."""
        octets = len(field[0]) + len(field[1])
        self._largest = max(self._largest, octets)
        self.changed += 1
        self._table.insert(-len(_STATIC), field)
        self._used += octets + _ENTRY_OVERHEAD
        self._evict()

    def _evict(self) -> None:
        while self._used > self._limit:
            name, value = self._table.pop(0)
            self._used -= len(name) + len(value) + _ENTRY_OVERHEAD


# -- encoder -------------------------------------------------------------------------------------------------------


class Encoder:
    """The peer's dynamic table as we fill it.

    Octets from `start`, `index` and `index_name` must be sent, in the order in which they were asked for; the others
    hold while `generation` stays the same. Strings go plain, without Huffman coding.
    `max_table_size`: the most that we fill, whatever the peer allows.
    """

    def __init__(self, max_table_size: int = _DEFAULT_TABLE_SIZE) -> None:
        self.generation = 0
        """Changes whenever an index may have changed its meaning, or `start` has something to say."""
        self._max_table_size = max_table_size
        self._limit = _DEFAULT_TABLE_SIZE
        self._lowest: int | None = None
        """The lowest limit since the last block, where there was a change."""
        self._used = 0
        self._entries: deque[Field] = deque()
        """Oldest first."""
        self._inserted = 0
        self._fields: dict[Field, int] = {}
        """Entries, each with what `_inserted` was after its insertion; no field is in the table twice."""
        self._names: dict[bytes, int] = {}
        """The same for the youngest entry of each name."""
        self.resize(_DEFAULT_TABLE_SIZE)

    def resize(self, peer_max: int) -> None:
        """The peer's SETTINGS_HEADER_TABLE_SIZE; the next block must begin with what `start` gives."""
        limit = min(peer_max, self._max_table_size)
        if limit == self._limit:
            return
        self._lowest = limit if self._lowest is None else min(limit, self._lowest)
        self._limit = limit
        self._evict()
        self.generation += 1

    @property
    def settled(self) -> bool:
        """Whether `start` has nothing to say."""
        return self._lowest is None

    def start(self) -> bytes:
        """What a block begins with: changes of the table's size (section 4.2), mostly nothing."""
        if self._lowest is None:
            return b""
        octets = int_octets(self._limit, 5, 0x20)
        if self._lowest < self._limit:
            octets = int_octets(self._lowest, 5, 0x20) + octets
        self._lowest = None
        return octets

    def index(self, field: Field) -> bytes:
        """A field by its index; without one it becomes an entry, unless it needs over a quarter of the table."""
        if self._find(field):
            return self.known(field)
        name, value = field
        size = len(name) + len(value) + _ENTRY_OVERHEAD
        if size > self._limit // 4:
            return self.literal(name, value)
        at = self._find_name(name)
        self._inserted += 1
        self._entries.append(field)
        self._used += size
        self._fields[field] = self._names[name] = self._inserted
        self._evict()
        self.generation += 1
        return (int_octets(at, 6, 0x40) if at else b"\x40" + _string(name)) + _string(value)

    def index_name(self, name: bytes, value: bytes) -> bytes:
        """A field whose name is worth a place: an entry where no table has the name, else a literal."""
        return self.literal(name, value) if self._find_name(name) else self.index((name, value))

    def known(self, field: Field) -> bytes:
        """A field by its index, where it has one, else as a literal; the table stays as it is."""
        at = self._find(field)
        return int_octets(at, 7, 0x80) if at else self.literal(*field)

    def literal(self, name: bytes, value: bytes) -> bytes:
        """A field as a literal that leaves the table as it is, its name by index where there is one."""
        return self.literal_head(name, len(value)) + value

    def literal_head(self, name: bytes, value_length: int) -> bytes:
        """A literal's octets up to its value."""
        at = self._find_name(name)
        return (int_octets(at, 4, 0) if at else b"\0" + _string(name)) + int_octets(value_length, 7, 0)

    def _find(self, field: Field) -> int:
        """0: nowhere."""
        at = _STATIC_INDEX.get(field)
        return self._dynamic(self._fields.get(field)) if at is None else at

    def _find_name(self, name: bytes) -> int:
        """0: nowhere."""
        at = _STATIC_NAME.get(name)
        return self._dynamic(self._names.get(name)) if at is None else at

    def _dynamic(self, inserted: int | None) -> int:
        return 0 if inserted is None else len(_STATIC) + 1 + self._inserted - inserted

    def _evict(self) -> None:
        while self._used > self._limit:
            oldest = self._inserted - len(self._entries) + 1
            field = self._entries.popleft()
            self._used -= len(field[0]) + len(field[1]) + _ENTRY_OVERHEAD
            del self._fields[field]
            if self._names[field[0]] == oldest:  # else a younger entry has the name too
                del self._names[field[0]]


def encode_static(fields: Iterable[Field]) -> bytes:
    """A block that needs no dynamic table and leaves it alone: static entries by index, the rest as plain literals."""
    octets: list[bytes] = []
    for field in fields:
        at = _STATIC_INDEX.get(field)
        if at is not None:
            octets.append(int_octets(at, 7, 0x80))
            continue
        name, value = field
        at = _STATIC_NAME.get(name)
        octets += (b"\0" + _string(name) if at is None else int_octets(at, 4, 0), _string(value))
    return b"".join(octets)
