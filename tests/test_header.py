"""The header of self-contained objects: golden bytes, and strangers' bytes."""

from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierkv.codecs.header import HEADER_BYTES, MAGIC, VERSION, Header, checksum, pack, unpack
from tierkv.errors import CodecError
from tierkv.keys import Key
from tierkv.tiers.base import Miss

HEADER = Header(
    key=Key(bytes(range(32))),
    parent=Key(bytes(range(32, 64))),
    depth=300,
    fingerprint=bytes(range(64, 80)),
    codec="lz4",
    raw_bytes=368640,
    stored_bytes=319488,
    checksum=0x0123456789ABCDEF,
)
GOLDEN = bytes.fromhex(
    "9a"  # an array of 10
    "c404544b5642"  # magic
    "01"  # version
    "c420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"  # key
    "c420202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f"  # parent
    "cd012c"  # depth
    "c410404142434445464748494a4b4c4d4e4f"  # layout fingerprint
    "a36c7a34"  # codec
    "ce0005a000"  # raw bytes
    "ce0004e000"  # stored bytes
    "cf0123456789abcdef"  # checksum
).ljust(HEADER_BYTES, b"\0")


def test_header_bytes_never_change() -> None:
    assert pack(HEADER) == GOLDEN
    assert unpack(GOLDEN) == HEADER


def test_checksum_is_xxh3_64() -> None:
    assert checksum(b"") == 0x2D06800538D394C2
    assert checksum(memoryview(b"a" * 1000)) == checksum(bytearray(b"a" * 1000))


def test_longest_header_fits() -> None:
    most = replace(HEADER, depth=2**31, codec="c" * 16, raw_bytes=2**32, stored_bytes=2**32, checksum=2**64 - 1)
    assert len(pack(most)) == HEADER_BYTES and unpack(pack(most)) == most


def test_header_is_read_from_the_start_of_a_longer_buffer() -> None:
    assert unpack(memoryview(GOLDEN + b"payload"), key=HEADER.key, fingerprint=HEADER.fingerprint) == HEADER


def test_object_of_another_key_is_corrupt() -> None:
    with pytest.raises(CodecError, match="stored under") as raised:
        unpack(GOLDEN, key=HEADER.parent)
    assert Miss(raised.value.reason) is Miss.CORRUPT


def test_object_of_another_layout_says_so() -> None:
    with pytest.raises(CodecError, match="layout") as raised:
        unpack(GOLDEN, key=HEADER.key, fingerprint=bytes(16))
    assert Miss(raised.value.reason) is Miss.LAYOUT


def test_object_of_another_version_is_a_layout_miss() -> None:
    with pytest.raises(CodecError, match="version 2") as raised:
        unpack(msgpack.packb([MAGIC, 2, "later"]).ljust(HEADER_BYTES, b"\0"))
    assert Miss(raised.value.reason) is Miss.LAYOUT


def test_truncated_header_is_refused() -> None:
    for length in range(HEADER_BYTES):
        with pytest.raises(CodecError):
            unpack(GOLDEN[:length])


def test_bytes_after_the_header_are_refused() -> None:
    with pytest.raises(CodecError, match="after its end"):
        unpack(GOLDEN[:-1] + b"\1")


FIELDS = [MAGIC, VERSION, *(getattr(HEADER, name) for name in Header.__slots__)]
BAD = [
    (0, b"TKVA", "magic"),
    (0, "TKVB", "magic"),
    (2, b"k" * 31, "key"),
    (2, "k" * 16, "key"),
    (3, None, "parent"),
    (4, -1, "depth"),
    (4, 2**31 + 1, "depth"),
    (4, 1.0, "depth"),
    (4, True, "depth"),
    (5, b"f" * 17, "fingerprint"),
    (6, b"lz4", "codec"),
    (6, "", "codec"),
    (6, "a/b", "codec"),
    (6, "c" * 17, "header"),
    (7, 2**32 + 1, "raw size"),
    (7, [1], "raw size"),
    (8, 368641, "stored size"),
    (9, -1, "checksum"),
]


@pytest.mark.parametrize(("place", "value", "reason"), BAD)
def test_wrong_fields_are_named(place: int, value: object, reason: str) -> None:
    fields = [*FIELDS[:place], value, *FIELDS[place + 1 :]]
    with pytest.raises(CodecError, match=reason):
        unpack(msgpack.packb(fields).ljust(HEADER_BYTES, b"\0"))


def test_claimed_sizes_are_not_believed() -> None:
    for start in (b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\1"):
        with pytest.raises(CodecError):
            unpack(start.ljust(HEADER_BYTES, b"\0"))
        with pytest.raises(CodecError):
            unpack((b"\x9a" + start).ljust(HEADER_BYTES, b"\0"))


def refused_or_equal(data: bytes) -> None:
    try:
        header = unpack(data)
    except CodecError:
        return
    assert unpack(pack(header)) == header


@given(st.binary(max_size=2 * HEADER_BYTES))
def test_random_bytes_only_raise_codec_errors(data: bytes) -> None:
    refused_or_equal(data)
    refused_or_equal(data.ljust(HEADER_BYTES, b"\0"))


@given(st.lists(st.tuples(st.integers(0, 160), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_only_raise_codec_errors(changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOLDEN)
    for at, value in changes:
        data[at] = value
    refused_or_equal(bytes(data))


ATOMS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=40)
)
VALUES = st.recursive(
    ATOMS, lambda inner: st.lists(inner, max_size=12) | st.dictionaries(ATOMS, inner, max_size=3), max_leaves=20
)


@given(st.lists(VALUES, max_size=12), st.integers(0, 10))
def test_wrong_types_only_raise_codec_errors(values: list[object], kept: int) -> None:
    fields = [*FIELDS[:kept], *values]
    refused_or_equal(msgpack.packb(fields)[: 2 * HEADER_BYTES].ljust(HEADER_BYTES, b"\0"))
