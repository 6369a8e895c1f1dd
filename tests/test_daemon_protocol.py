"""The daemon's protocol: golden frames, streams cut anywhere, and lengths that nobody believes."""

import tracemalloc
from collections.abc import Iterable, Sequence
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.daemon.protocol import (
    FIELDS,
    MAX_HEADER_BYTES,
    MAX_ITEMS,
    MAX_PAYLOAD_BYTES,
    MAX_REQUEST_BYTES,
    PRELUDE,
    SCRATCH_BYTES,
    STRANGER_BYTES,
    Incoming,
    Limits,
    Message,
    Op,
    encode,
)
from tierkv.errors import ProtocolError

KEY = bytes(range(32))
TOKENS = bytes(64)
SUM = b"\x01\x02\x03\x04\x05\x06\x07\x08"

GOLDEN: dict[Op, tuple[int, dict[str, Any], bytes, str]] = {
    Op.HELLO: (
        1,
        {
            "client": KEY,
            "name": "engine",
            "pid": 4711,
            "connection": 3,
            "ended": [1, 2],
            "token": "",
            "wants": ["memory"],
        },
        b"",
        "544b0101 6b000000 0000000000000000 88a2696401a6636c69656e74c420~a46e616d65a6656e67696e65a3706964"
        "cd1267aa636f6e6e656374696f6e03a5656e646564920102a5746f6b656ea0a577616e747391a66d656d6f7279",
    ),
    Op.ATTACH: (
        2,
        {"layout": {"num_layers": 2}, "namespace": {"model": "m"}, "root": KEY, "device_bytes": 1 << 33, "memory": 1},
        b"",
        "544b0102 71000000 0000000000000000 86a2696402a66c61796f757481aa6e756d5f6c617965727302a96e616d657"
        "37061636581a56d6f64656ca16da4726f6f74c420~ac6465766963655f6279746573cf0000000200000000a66d656d6f"
        "727901",
    ),
    Op.PING: (
        3,
        {},
        b"",
        "544b0103 05000000 0000000000000000 81a2696403",
    ),
    Op.CONTAINS: (
        4,
        {"pool": 1},
        KEY,
        "544b0104 0b000000 2000000000000000 82a2696404a4706f6f6c01",
    ),
    Op.SEEK: (
        5,
        {"pool": 1, "root": KEY, "parent": KEY, "depth": 0},
        KEY + TOKENS,
        "544b0105 62000000 6000000000000000 85a2696405a4706f6f6c01a4726f6f74c420~a6706172656e74c420~a5646570746800",
    ),
    Op.AWAIT: (
        6,
        {"pool": 1, "known": 0, "deadline_s": 0.5},
        KEY,
        "544b0106 26000000 2000000000000000 84a2696406a4706f6f6c01a56b6e6f776e00aa646561646c696e655f73cb3"
        "fe0000000000000",
    ),
    Op.READ: (
        7,
        {"pool": 1, "deadline_s": 5},
        KEY,
        "544b0107 17000000 2000000000000000 83a2696407a4706f6f6c01aa646561646c696e655f7305",
    ),
    Op.LEND: (
        8,
        {"pool": 1, "deadline_s": 5.0},
        KEY,
        "544b0108 1f000000 2000000000000000 83a2696408a4706f6f6c01aa646561646c696e655f73cb4014000000000000",
    ),
    Op.RELEASE: (
        9,
        {"lease": 70000},
        b"",
        "544b0109 10000000 0000000000000000 82a2696409a56c65617365ce00011170",
    ),
    Op.RESERVE: (
        10,
        {"pool": 1, "root": KEY, "parent": KEY, "depth": 128},
        TOKENS,
        "544b010a 63000000 4000000000000000 85a269640aa4706f6f6c01a4726f6f74c420~a6706172656e74c420~a56465707468cc80",
    ),
    Op.FILL: (
        11,
        {"lease": 9, "checksums": SUM},
        b"block",
        "544b010b 20000000 0500000000000000 83a269640ba56c6561736509a9636865636b73756d73c4080102030405060708",
    ),
    Op.COMMIT: (
        12,
        {"lease": 9, "checksums": SUM},
        b"",
        "544b010c 20000000 0000000000000000 83a269640ca56c6561736509a9636865636b73756d73c4080102030405060708",
    ),
    Op.ABORT: (
        13,
        {"lease": 9},
        b"",
        "544b010d 0c000000 0000000000000000 82a269640da56c6561736509",
    ),
    Op.REPORT: (
        14,
        {"pool": 1},
        KEY,
        "544b010e 0b000000 2000000000000000 82a269640ea4706f6f6c01",
    ),
    Op.PIN: (
        15,
        {"pool": 1, "prefix": "0a", "ttl_s": 60.0},
        KEY,
        "544b010f 24000000 2000000000000000 84a269640fa4706f6f6c01a6707265666978a23061a574746c5f73cb404e000000000000",
    ),
    Op.UNPIN: (
        16,
        {"pin": "pin-1"},
        b"",
        "544b0110 0f000000 0000000000000000 82a2696410a370696ea570696e2d31",
    ),
    Op.FORGET: (
        17,
        {"model": "m", "tenant": None, "older_s": 3600.0},
        b"",
        "544b0111 26000000 0000000000000000 84a2696411a56d6f64656ca16da674656e616e74c0a76f6c6465725f73cb4"
        "0ac200000000000",
    ),
    Op.FLUSH: (
        18,
        {"deadline_s": 30.0},
        b"",
        "544b0112 19000000 0000000000000000 82a2696412aa646561646c696e655f73cb403e000000000000",
    ),
    Op.DRAIN: (
        19,
        {"deadline_s": 30.0},
        b"",
        "544b0113 19000000 0000000000000000 82a2696413aa646561646c696e655f73cb403e000000000000",
    ),
    Op.VERIFY: (
        20,
        {},
        b"",
        "544b0114 05000000 0000000000000000 81a2696414",
    ),
    Op.STATS: (
        21,
        {},
        b"",
        "544b0115 05000000 0000000000000000 81a2696415",
    ),
    Op.SUBSCRIBE: (
        22,
        {},
        b"",
        "544b0116 05000000 0000000000000000 81a2696416",
    ),
    Op.DELETE: (
        23,
        {"pool": 1},
        KEY,
        "544b0117 0b000000 2000000000000000 82a2696417a4706f6f6c01",
    ),
    Op.REPLY: (
        4,
        {},
        b"\x02",
        "544b0140 05000000 0100000000000000 81a2696404",
    ),
    Op.REFUSED: (
        0,
        {"reason": "no", "kind": "refused"},
        b"",
        "544b0141 1c000000 0000000000000000 83a2696400a6726561736f6ea26e6fa46b696e64a772656675736564",
    ),
    Op.EVENT: (
        22,
        {"pool": 1, "events": [{"kind": "cleared", "sequence": 0}]},
        b"",
        "544b0142 2b000000 0000000000000000 83a2696416a4706f6f6c01a66576656e74739182a46b696e64a7636c65617"
        "26564a873657175656e636500",
    ),
}
"""id, fields, payload; prelude and header in hex, where ~ stands for KEY."""


def golden(op: Op) -> bytes:
    """A whole frame."""
    *_, payload, text = GOLDEN[op]
    return bytes.fromhex(text.replace("~", KEY.hex())) + payload


def feed(incoming: Incoming, stream: bytes, cuts: Iterable[int] = ()) -> list[Message]:
    """Let a stream come in pieces of these sizes, and what then is left in pieces as large as fit."""
    come: list[Message] = []
    sizes = iter(cuts)
    at = 0
    while at < len(stream):
        with incoming.target() as target:
            assert len(target)
            count = min(len(target), next(sizes, len(stream)), len(stream) - at)
            target[:count] = stream[at : at + count]
        at += count
        come += incoming.advance(count)
    return come


def prelude(op: int = Op.PING, *, header: int = 0, payload: int = 0, magic: bytes = b"TK", version: int = 1) -> bytes:
    return PRELUDE.pack(magic, version, op, header, payload)


def frame(op: Op, header: bytes, payload: bytes = b"") -> bytes:
    return prelude(op, header=len(header), payload=len(payload)) + header + payload


def peak_bytes(incoming: Incoming, stream: bytes) -> int:
    """Memory that was taken at most while a stream was refused."""
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            feed(incoming, stream)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# -- frames -----------------------------------------------------------------------------------------------------------------


def test_every_operation_has_a_golden_frame() -> None:
    assert set(GOLDEN) == set(FIELDS) == set(Op)


@pytest.mark.parametrize("op", Op, ids=lambda op: op.name)
def test_frames_are_these_bytes_and_come_out_as_they_went_in(op: Op) -> None:
    id, fields, payload, _ = GOLDEN[op]
    assert encode(op, id, fields, payload_bytes=len(payload)) + payload == golden(op)
    (message,) = feed(Incoming(), golden(op))
    assert (message.op, message.id, message.fields) == (op, id, fields)
    assert bytes(message.payload or b"") == payload


@st.composite
def messages(draw: st.DrawFn) -> tuple[Op, dict[str, Any], bytes]:
    op = draw(st.sampled_from(Op))
    fields = dict(GOLDEN[op][1])
    if "checksums" in fields and draw(st.booleans()):
        fields["checksums"] = bytes(draw(st.integers(0, 2 * SCRATCH_BYTES)))
    size = draw(st.one_of(st.integers(0, 100), st.integers(SCRATCH_BYTES - 100, 2 * SCRATCH_BYTES)))
    return op, fields, (draw(st.binary(min_size=7, max_size=7)) * (size // 7 + 1))[:size]


CUTS = st.lists(st.one_of(st.integers(1, 40), st.integers(1, SCRATCH_BYTES)), max_size=60)


@settings(max_examples=150, deadline=None)
@given(sent=st.lists(messages(), max_size=6), cuts=CUTS)
def test_any_messages_cut_anywhere_come_out_the_same(
    sent: Sequence[tuple[Op, dict[str, Any], bytes]], cuts: list[int]
) -> None:
    stream = b"".join(
        encode(op, id, fields, payload_bytes=len(payload)) + payload for id, (op, fields, payload) in enumerate(sent)
    )
    come = feed(Incoming(), stream, cuts)
    assert [(m.op, m.fields, bytes(m.payload or b"")) for m in come] == sent
    assert [m.id for m in come] == list(range(len(sent)))


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(0, SCRATCH_BYTES + 10), min_size=1, max_size=6), cuts=CUTS, before=st.integers(0, 3))
def test_payloads_land_in_the_views_of_the_sink_and_nowhere_else(
    sizes: list[int], cuts: list[int], before: int
) -> None:
    payload = bytes(number % 251 for number in range(sum(sizes)))
    areas = [bytearray(size) for size in sizes]

    def sink(message: Message, size: int) -> list[memoryview] | None:
        assert size == len(payload) or message.op is not Op.FILL
        return [memoryview(area) for area in areas] if message.op is Op.FILL else None

    ping = golden(Op.CONTAINS)
    fill = encode(Op.FILL, 7, {"lease": 1, "checksums": b""}, payload_bytes=len(payload)) + payload
    come = feed(Incoming(sink=sink), ping * before + fill + ping, cuts)
    assert [m.op for m in come] == [Op.CONTAINS] * before + [Op.FILL, Op.CONTAINS]
    assert come[before].payload is None and b"".join(areas) == payload
    assert come[-1].payload == KEY


def test_views_of_another_size_than_the_payload_are_a_protocol_error() -> None:
    areas = [memoryview(bytearray(3)), memoryview(bytearray(3))]
    with pytest.raises(ProtocolError, match="payload of 5 bytes: 6 expected"):
        feed(Incoming(sink=lambda message, size: areas), golden(Op.FILL))
    assert not any(any(area) for area in areas)


@pytest.mark.parametrize("length", [SCRATCH_BYTES - PRELUDE.size, SCRATCH_BYTES - PRELUDE.size + 1, MAX_HEADER_BYTES])
def test_headers_up_to_the_limit_are_taken_whatever_the_scratch_holds(length: int) -> None:
    def filled(size: int) -> bytes:
        header = msgpack.packb({"id": 5, "lease": 1, "checksums": bytes(size)}, use_bin_type=True)
        return header if len(header) == length else filled(size + length - len(header))

    one = frame(Op.COMMIT, filled(length))
    for cuts in ([], [1] * 40, [PRELUDE.size], [1000, 7]):
        come = feed(Incoming(), golden(Op.PING) + one + one + golden(Op.PING), cuts)
        assert [m.op for m in come] == [Op.PING, Op.COMMIT, Op.COMMIT, Op.PING]


def test_whole_messages_come_out_before_what_is_wrong_after_them() -> None:
    incoming = Incoming()
    with incoming.target() as target:
        stream = golden(Op.PING) * 2 + b"GET / HTTP/1.1\r\n\r\n"
        target[: len(stream)] = stream
    come = incoming.advance(len(stream))
    assert [next(come).op, next(come).op] == [Op.PING, Op.PING]
    with pytest.raises(ProtocolError, match="where a message must begin"):
        next(come)


# -- lengths ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", Op, ids=lambda op: op.name)
@pytest.mark.parametrize("claimed", [MAX_PAYLOAD_BYTES + 1, 1 << 60, (1 << 64) - 1])
def test_a_payload_that_is_only_claimed_costs_nothing(op: Op, claimed: int) -> None:
    asked: list[int] = []
    incoming = Incoming(sink=lambda message, size: asked.append(size))
    id, fields, *_ = GOLDEN[op]
    assert peak_bytes(incoming, encode(op, id, fields, payload_bytes=claimed)) < 1 << 16
    assert not asked


@pytest.mark.parametrize("claimed", [MAX_HEADER_BYTES + 1, (1 << 32) - 1])
def test_a_header_that_is_only_claimed_costs_nothing(claimed: int) -> None:
    assert peak_bytes(Incoming(), prelude(header=claimed)) < 1 << 16


def test_limits_are_those_of_the_moment_and_of_the_operation() -> None:
    incoming = Incoming(Limits(header=STRANGER_BYTES, payload=0, filled=0))
    assert len(feed(incoming, golden(Op.HELLO))) == 1
    for stream in (golden(Op.CONTAINS), golden(Op.FILL), prelude(header=STRANGER_BYTES + 1)):
        with pytest.raises(ProtocolError, match="at most are taken now"):
            feed(Incoming(Limits(header=STRANGER_BYTES, payload=0, filled=0)), stream)
    incoming.limits = Limits(payload=MAX_REQUEST_BYTES)
    assert len(feed(incoming, golden(Op.CONTAINS) + golden(Op.FILL))) == 2
    id, fields, *_ = GOLDEN[Op.CONTAINS]
    for op, size, fits in ((Op.CONTAINS, MAX_REQUEST_BYTES + 1, False), (Op.FILL, MAX_REQUEST_BYTES + 1, True)):
        id, fields, *_ = GOLDEN[op]
        stream = encode(op, id, fields, payload_bytes=size)
        sunk = Incoming(Limits(payload=MAX_REQUEST_BYTES), sink=lambda message, size: [memoryview(bytearray(size))])
        if fits:
            assert feed(sunk, stream) == []
        else:
            with pytest.raises(ProtocolError):
                feed(sunk, stream)


@pytest.mark.parametrize("size", [STRANGER_BYTES, MAX_HEADER_BYTES])
@pytest.mark.parametrize(
    "unit",
    [
        b"\xdd\x00\x01\x00\x00",
        b"\xdc\xff\xff",
        b"\xdf\x00\x01\x00\x00\xa1a",
        b"\xdd\xff\xff\xff\xff",
        b"\x91",
        b"\x81\xa1a",
    ],
    ids=["arrays", "short arrays", "maps", "huge arrays", "deep", "deep maps"],
)
def test_items_that_are_only_claimed_cost_little(unit: bytes, size: int) -> None:
    header = b"\x82\xa2id\x01\xa1x" + unit * ((size - 7) // len(unit))
    assert peak_bytes(Incoming(), frame(Op.PING, header)) < (24 << 20 if size == STRANGER_BYTES else 48 << 20)


def test_a_header_past_the_limit_is_not_sent_either() -> None:
    with pytest.raises(ProtocolError, match="ask for less"):
        encode(Op.COMMIT, 1, {"lease": 1, "checksums": bytes(MAX_HEADER_BYTES)})


# -- rubbish ----------------------------------------------------------------------------------------------------------------

WRONG: list[tuple[str, bytes]] = [
    ("magic", prelude(magic=b"KT", header=5)),
    ("version", prelude(version=2, header=5)),
    ("operation", prelude(0, header=5)),
    ("operation", prelude(24, header=5)),
    ("operation", prelude(255, header=5)),
    ("no header", prelude()),
    ("no map", frame(Op.PING, b"\x90")),
    ("no map", frame(Op.PING, b"\x05")),
    ("no msgpack", frame(Op.PING, b"\xc1")),
    ("cut short", frame(Op.PING, b"\x81\xa2id")),
    ("more after it", frame(Op.PING, b"\x81\xa2id\x01\x00")),
    ("no id", frame(Op.PING, b"\x80")),
    ("id below 0", frame(Op.PING, b"\x81\xa2id\xff")),
    ("id above 2^63", frame(Op.PING, b"\x81\xa2id\xcf" + b"\xff" * 8)),
    ("id of bool", frame(Op.PING, b"\x81\xa2id\xc3")),
    ("id of float", frame(Op.PING, b"\x81\xa2id\xcb" + bytes(8))),
    ("key of nil", frame(Op.PING, b"\x82\xa2id\x01\xc0\x01")),
    ("key of list", frame(Op.PING, b"\x82\xa2id\x01\x90\x01")),
    ("text that is no utf-8", frame(Op.PING, b"\x82\xa2id\x01\xa1\xff\x01")),
    ("extension", frame(Op.PING, b"\x82\xa2id\x01\xa1a\xc7\x01\x05\x00")),
    ("timestamp", frame(Op.PING, b"\x82\xa2id\x01\xa1a\xd6\xff\x00\x00\x00\x00")),
    ("long text", frame(Op.PING, msgpack.packb({"id": 1, "a": "x" * 5000}))),
]


@pytest.mark.parametrize(("what", "stream"), WRONG, ids=[what for what, _ in WRONG])
def test_what_is_no_frame_is_a_protocol_error(what: str, stream: bytes) -> None:
    with pytest.raises(ProtocolError):
        feed(Incoming(), stream)


BAD_VALUES: list[object] = [
    None, True, -1, 1 << 63, 1.5, float("nan"), float("inf"), -0.5, 1e300, "", "x" * 1025, b"", bytes(31), bytes(33), [], [None],
    [-1], ["x" * 1025], ["x"] * 65, {}, {b"x": 1}, {"x" * 1025: 1},
]  # fmt: skip


@pytest.mark.parametrize("op", [op for op in Op if FIELDS[op]], ids=lambda op: op.name)
def test_every_field_is_needed_and_of_its_type(op: Op) -> None:
    id, fields, *_ = GOLDEN[op]
    for name, check in FIELDS[op].items():
        with pytest.raises(ProtocolError, match=f"{op.name} without {name}"):
            feed(Incoming(), encode(op, id, {of: value for of, value in fields.items() if of != name}))
        refused = 0
        for value in BAD_VALUES:
            stream = frame(op, msgpack.packb({"id": id, **fields, name: value}, use_bin_type=True))
            if check(value):
                assert feed(Incoming(), stream)[0].fields[name] == value
            else:
                refused += 1
                with pytest.raises(ProtocolError, match=f"{op.name} (with {name}|with a header)"):
                    feed(Incoming(), stream)
        assert refused >= 10, name


def parse(stream: bytes, cuts: Sequence[int] = ()) -> list[Message] | None:
    """What comes out, or None for a ProtocolError; anything else is the test's failure."""
    incoming = Incoming(Limits(payload=1 << 20, filled=1 << 20))
    try:
        return feed(incoming, stream, cuts)
    except ProtocolError:
        return None


@settings(max_examples=400, deadline=None)
@given(stream=st.binary(max_size=300), cuts=st.lists(st.integers(1, 50), max_size=10))
def test_arbitrary_bytes_are_a_protocol_error_and_nothing_else(stream: bytes, cuts: list[int]) -> None:
    assert not parse(stream, cuts)
    assert parse(prelude(header=len(stream)) + stream, cuts) is None or b"\xa2id" in stream


@settings(max_examples=600, deadline=None)
@given(
    op=st.sampled_from(Op),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 255)), min_size=1, max_size=4),
    cuts=st.lists(st.integers(1, 50), max_size=10),
)
def test_a_damaged_frame_is_a_protocol_error_or_another_frame(
    op: Op, changes: list[tuple[int, int]], cuts: list[int]
) -> None:
    damaged = bytearray(golden(op))
    for at, by in changes:
        damaged[at % len(damaged)] ^= by
    for message in parse(bytes(damaged), cuts) or ():
        assert all(check(message.fields[name]) for name, check in FIELDS[message.op].items())


def test_as_many_items_as_a_header_may_have_are_taken() -> None:
    id, fields, *_ = GOLDEN[Op.HELLO]
    for length in (MAX_ITEMS, MAX_ITEMS + 1):
        stream = encode(Op.HELLO, id, {**fields, "connection": 1 << 40, "ended": [1 << 35] * length})
        assert (parse(stream) is not None) == (length == MAX_ITEMS)
