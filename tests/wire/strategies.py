"""Hypothesis strategies for HTTP/2: frames that make sense, and the same with something wrong.

A *step* is what a peer sends at once: one frame, or HEADERS with its CONTINUATIONs. Steps come as octets, because an
HPACK encoder has to spell them in order. What they say is drawn first, so that a failing example shrinks to few steps.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from struct import pack

from hpack import Encoder
from hypothesis import strategies as st

from heliograph.protocols.http2 import frames as f

ERROR_CODES = st.sampled_from([*range(14), 0xFFFF, 2**32 - 1])
WINDOWS = st.sampled_from([0, 1, 100, 5_000, 16_384, 65_535, 2**31 - 1])
INCREMENTS = st.sampled_from([0, 1, 1_000, 65_535, 2**31 - 1 - 65_535, 2**31 - 65_535, 2**31 - 1])
TABLE_SIZES = st.sampled_from([0, 31, 64, 200, 4_096, 8_192])

NAMES = st.sampled_from([b"apns-id", b"apns-topic", b"apns-expiration", b"x-a", b"x-b", b"cookie", b"content-type"])
VALUES = st.one_of(
    st.sampled_from([b"", b"0", b"com.example.app", b"eabeae54-14a8-11e5-b60b-1697f925ec7b", b"x" * 200]),
    st.binary(max_size=12).map(lambda octets: octets.hex().encode()),
)
ORDINARY = st.lists(st.tuples(NAMES, VALUES), max_size=5)

BAD_FIELDS = st.sampled_from(
    [
        (b"X-Upper", b"1"),
        (b"x space", b"1"),
        (b"", b"1"),
        (b"x-nul", b"a\0b"),
        (b"x-crlf", b"a\r\nb: c"),
        (b"x-lead", b" a"),
        (b"x-trail", b"a\t"),
        (b"connection", b"close"),
        (b"transfer-encoding", b"chunked"),
        (b"te", b"gzip"),
        (b":late", b"1"),
        (b"content-length", b"-1"),
        (b"content-length", b"7"),
    ]
)


def request_fields(bad: bool = False) -> st.SearchStrategy[list[tuple[bytes, bytes]]]:
    path = st.sampled_from([b"/", b"/3/device/" + b"ab" * 32, b"/3/device/%s" % (b"9" * 300)])
    good = st.builds(
        lambda method, at, more: [
            (b":method", method), (b":scheme", b"https"), (b":path", at), (b":authority", b"localhost"), *more
        ],
        st.sampled_from([b"POST", b"GET"]),
        path,
        ORDINARY,
    )  # fmt: skip
    return st.one_of(good, _spoilt(good)) if bad else good


def answer_fields(bad: bool = False) -> st.SearchStrategy[list[tuple[bytes, bytes]]]:
    good = st.builds(
        lambda status, more: [(b":status", status), *more],
        st.sampled_from([b"200", b"200", b"200", b"400", b"410", b"429", b"503"]),
        ORDINARY,
    )
    return st.one_of(good, _spoilt(good)) if bad else good


def _spoilt(
    fields: st.SearchStrategy[list[tuple[bytes, bytes]]],
) -> st.SearchStrategy[list[tuple[bytes, bytes]]]:
    """One field too many, missing, twice, or not where it belongs."""

    def with_more(given: list[tuple[bytes, bytes]], more: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        return [*given, more]

    return st.one_of(
        st.builds(with_more, fields, BAD_FIELDS),
        fields.map(lambda given: given[1:]),
        fields.map(lambda given: [given[0], *given]),
        fields.map(lambda given: given[::-1]),
    )


def cuts(data: bytes) -> st.SearchStrategy[list[bytes]]:
    """The same octets in pieces, some of them perhaps empty."""
    places = st.lists(st.integers(0, len(data)), max_size=8).map(sorted)
    return places.map(lambda at: [data[start:stop] for start, stop in pairwise([0, *at, len(data)])])


@st.composite
def header_frames(draw: st.DrawFn, stream_id: int, block: bytes, end_stream: bool, *, split: bool = True) -> bytes:
    """A block as HEADERS with whatever HEADERS may have, and CONTINUATION where it is cut."""
    parts = draw(cuts(block)) if split and draw(st.booleans()) else [block]
    flags = f.END_STREAM if end_stream else 0
    first = parts[0]
    if draw(st.booleans()) and draw(st.booleans()):
        flags |= f.WITH_PRIORITY
        first = pack(">IB", draw(st.sampled_from([0, 0x8000_0000, stream_id + 2])), draw(st.integers(0, 255))) + first
    # hyperframe refuses HEADERS in which there is nothing but padding; RFC 9113, section 6.2, allows it.
    if first and draw(st.booleans()) and draw(st.booleans()):
        flags |= f.PADDED
        padding = draw(st.sampled_from([0, 1, 255]))
        first = bytes((padding,)) + first + bytes(padding)
    out = f.frame(f.HEADERS, flags | (f.END_HEADERS if len(parts) == 1 else 0), stream_id, first)
    for place, part in enumerate(parts[1:], 2):
        out += f.frame(f.CONTINUATION, f.END_HEADERS if place == len(parts) else 0, stream_id, part)
    return out


@st.composite
def data_frame(draw: st.DrawFn, stream_id: int, data: bytes, end_stream: bool) -> bytes:
    flags = f.END_STREAM if end_stream else 0
    if draw(st.booleans()) and draw(st.booleans()):
        padding = draw(st.sampled_from([0, 1, 255]))
        return f.frame(f.DATA, flags | f.PADDED, stream_id, bytes((padding,)) + data + bytes(padding))
    return f.frame(f.DATA, flags, stream_id, data)


def settings_values(*, server: bool) -> st.SearchStrategy[dict[int, int]]:
    """SETTINGS of a peer in this role, all of them legal."""
    values: dict[int, st.SearchStrategy[int]] = {
        f.HEADER_TABLE_SIZE: TABLE_SIZES,
        f.MAX_CONCURRENT_STREAMS: st.sampled_from([0, 1, 2, 100, 1000, 2**32 - 1]),
        f.INITIAL_WINDOW_SIZE: WINDOWS,
        f.MAX_FRAME_SIZE: st.sampled_from([16_384, 16_385, 2**24 - 1]),
        f.MAX_HEADER_LIST_SIZE: st.sampled_from([0, 1000, 65_536]),
        0xF0F0: st.integers(0, 2**32 - 1),
    }
    values[f.ENABLE_PUSH] = st.just(0) if server else st.sampled_from([0, 1])
    return st.fixed_dictionaries({}, optional=values)


BAD_SETTINGS = st.sampled_from(
    [
        pack(">HI", f.ENABLE_PUSH, 2),
        pack(">HI", f.INITIAL_WINDOW_SIZE, 2**31),
        pack(">HI", f.MAX_FRAME_SIZE, 16_383),
        pack(">HI", f.MAX_FRAME_SIZE, 2**24),
        pack(">HI", f.MAX_CONCURRENT_STREAMS, 1)[:5],
        b"\0",
    ]
)

PINGS = st.sampled_from([bytes(8), b"heliogr?", b"\xff" * 8])


@st.composite
def _control_step(draw: st.DrawFn, ids: st.SearchStrategy[int], server: bool, bad: bool) -> bytes:
    kind = draw(st.sampled_from(["settings", "ping", "window", "window of stream", "priority", "unknown", "reset"]))
    if kind == "settings":
        if bad and draw(st.booleans()):
            return f.frame(f.SETTINGS, 0, draw(st.sampled_from([0, 0, 1])), draw(BAD_SETTINGS))
        return f.settings(draw(settings_values(server=server)))
    if kind == "ping":
        return f.frame(f.PING, draw(st.sampled_from([0, f.ACK])), 0, draw(PINGS))
    if kind == "window":
        return f.window_update(0, draw(INCREMENTS if bad else st.sampled_from([1, 1000])))
    stream_id = draw(ids)
    if kind == "window of stream":
        return f.window_update(stream_id, draw(INCREMENTS if bad else st.sampled_from([1, 1000])))
    if kind == "priority":
        on = draw(st.sampled_from([0, stream_id + 2, *([stream_id] if bad else [])]))
        return f.frame(f.PRIORITY, 0, stream_id, pack(">IB", on, draw(st.integers(0, 255))))
    if kind == "reset":
        return f.rst_stream(stream_id, draw(ERROR_CODES))
    return f.frame(draw(st.integers(0x20, 0xFF)), draw(st.integers(0, 255)), stream_id, draw(st.binary(max_size=20)))


@st.composite
def _misshapen_step(draw: st.DrawFn, ids: st.SearchStrategy[int]) -> bytes:
    """A frame of any kind with any flags, and a payload that fits by chance only."""
    kind = draw(st.integers(f.DATA, f.CONTINUATION))
    payload = draw(st.one_of(st.binary(max_size=12), st.sampled_from([bytes(4), bytes(5), bytes(6), bytes(8)])))
    flags = draw(st.sampled_from([0, 1, 4, 5, 8, 0x20, 0x2D, 0xFF]))
    return f.frame(kind, flags, draw(st.one_of(st.just(0), ids)), payload)


@st.composite
def peer_steps(
    draw: st.DrawFn,
    *,
    server: bool,
    streams: int,
    bad: bool = True,
    goaway: bool = True,
    max_steps: int = 12,
) -> list[bytes]:
    """What a peer might send after the connection's start, step by step: SETTINGS first (mostly).

    `server`: the peer is the server, and its client opened streams 1, 3, ... Otherwise the peer is a client and opens
    streams itself, `streams` of them at most. With `bad`, now and then a step that breaks a rule.
    """
    encoder = Encoder()
    opened = [2 * place + 1 for place in range(streams)] if server else []
    known = st.sampled_from([2 * place + 1 for place in range(max(streams, 1))])
    ids = st.one_of(known, known, known, st.sampled_from([2, 2 * streams + 1, 2**31 - 1])) if bad else known
    steps = [b"" if bad and draw(st.integers(0, 30)) == 30 else f.settings(draw(settings_values(server=server)))]
    kinds = ["headers"] * 5 + ["data"] * 3 + ["control"] * 3 + ["trailers", "ack"]
    kinds += ["goaway"] if goaway else []
    kinds += ["interim"] * 2 if server else []
    kinds += ["misshapen", "mutated"] if bad else []
    for _ in range(draw(st.integers(0, max_steps))):
        kind = draw(st.sampled_from(kinds))
        if kind == "ack":
            steps.append(f.SETTINGS_ACK)
        elif kind == "control":
            steps.append(draw(_control_step(ids if server or opened else st.just(1), server, bad)))
        elif kind == "goaway":
            last = draw(st.sampled_from([0, 1, 3, 2**31 - 1]))
            steps.append(f.goaway(last, draw(ERROR_CODES), draw(st.sampled_from([b"", b'{"reason":"Shutdown"}']))))
        elif kind == "misshapen":
            steps.append(draw(_misshapen_step(ids)))
        elif kind == "mutated":
            if steps[-1]:
                step = bytearray(steps[-1])
                # Not in the length, after which nothing would be a frame any more.
                step[draw(st.integers(3, len(step) - 1))] ^= 1 << draw(st.integers(0, 7))
                steps.append(bytes(step))
        elif kind == "data":
            body = draw(st.sampled_from([b"", b"{}", b'{"reason":"BadDeviceToken"}', b"d" * 4_000]))
            stream_id = draw(ids) if server or bad or not opened else draw(st.sampled_from(opened))
            steps.append(draw(data_frame(stream_id, body, draw(st.booleans()))))
        else:
            if draw(st.integers(0, 6)) == 6:
                encoder.header_table_size = draw(st.sampled_from([0, 64, 4_096]))
            if kind == "trailers":
                fields, end = draw(ORDINARY), True
            elif kind == "interim":
                fields, end = [(b":status", draw(st.sampled_from([b"100", b"103"]))), *draw(ORDINARY)], False
            else:
                fields, end = draw((answer_fields if server else request_fields)(bad)), draw(st.booleans())
            if server or kind == "trailers":
                stream_id = draw(ids)
            else:
                stream_id = draw(ids) if bad and draw(st.integers(0, 5)) == 5 else (opened[-1] + 2 if opened else 1)
                opened.append(stream_id)
            block = encoder.encode(fields, huffman=draw(st.booleans()))
            steps.append(draw(header_frames(stream_id, block, end)))
    return steps


@st.composite
def plain_answers(draw: st.DrawFn, streams: int) -> list[bytes]:
    """Answers to all these streams: long runs of alike 200s, as Apple sends them, and now and then something else."""
    encoder = Encoder()
    encoder.header_table_size = 0
    steps = [f.settings({})]
    ids = list(range(1, 2 * streams, 2))
    if draw(st.booleans()):
        ids = draw(st.permutations(ids))
    odd = draw(st.sets(st.sampled_from(ids), max_size=4))
    huffman = draw(st.booleans())
    never = draw(st.sampled_from([b"\0", b"\x10"]))
    more: list[tuple[bytes, bytes]] = draw(st.sampled_from([[], [(b"x-a", b"1")], [(b"content-length", b"0")]]))
    for stream_id in ids:
        apns_id = b"0191d5a8-0000-7000-8000-%012d" % stream_id
        fields = [(b":status", b"200"), *more, (b"apns-id", apns_id)]
        kind = draw(st.sampled_from(["other", "reset", "interim", "long", "body", "twice"])) if stream_id in odd else ""
        if kind == "other":
            block = encoder.encode([(b":status", b"410"), (b"apns-id", apns_id)], huffman)
            steps.append(f.frame(f.HEADERS, f.END_HEADERS, stream_id, block))
            steps.append(f.frame(f.DATA, f.END_STREAM, stream_id, b'{"reason":"Unregistered"}'))
            continue
        if kind == "reset":
            steps.append(f.rst_stream(stream_id, draw(ERROR_CODES)))
            continue
        if kind == "interim":
            block = encoder.encode([(b":status", b"103"), *fields[1:]], huffman)
            steps.append(f.frame(f.HEADERS, f.END_HEADERS, stream_id, block))
        if kind == "long":
            fields[-1] = (b"apns-id", apns_id * draw(st.integers(2, 6)))
        # Literals that leave the table alone (RFC 7541, section 6.2.2 or 6.2.3), so that equal answers look equal.
        block = encoder.encode([(name, value, True) for name, value in fields[:-1]], huffman)
        block += never + b"\7apns-id" + encode_string(fields[-1][1], huffman=huffman)
        if kind == "body":
            steps.append(f.frame(f.HEADERS, f.END_HEADERS, stream_id, block))
            steps.append(f.frame(f.DATA, f.END_STREAM, stream_id, draw(st.sampled_from([b"", b"{}"]))))
            continue
        steps.append(f.frame(f.HEADERS, f.END_HEADERS | f.END_STREAM, stream_id, block))
        if kind == "twice":
            steps.append(steps[-1])
    return steps


def encode_string(text: bytes, *, huffman: bool) -> bytes:
    """A string literal (RFC 7541, section 5.2), spelt by the `hpack` package."""
    # Index 1 is :authority: two octets less, and the rest is the string.
    return Encoder().encode([(b":authority", text, True)], huffman)[1:]


def chunks(data: bytes, sizes: list[int]) -> list[bytes]:
    """`data` in pieces of these sizes, the last size again and again."""
    ends = [0, *accumulate(sizes)]
    while ends[-1] < len(data):
        ends.append(ends[-1] + sizes[-1])
    return [data[start:stop] for start, stop in pairwise(ends) if start < len(data)]


Split = Callable[[bytes], list[bytes]]


def splits() -> st.SearchStrategy[Split]:
    """Ways to cut a stream of octets: whole, an octet at a time, or in pieces of drawn sizes."""
    sizes = st.one_of(st.just([1]), st.just([2**31]), st.lists(st.integers(1, 40), min_size=1, max_size=8))
    return sizes.map(lambda drawn: lambda data: chunks(data, drawn))
