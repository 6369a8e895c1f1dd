"""The header of a self-contained object: what Redis, object stores, packs and the wire carry before a payload.

    msgpack [magic, version, key, parent, depth, layout fingerprint, codec, raw bytes, stored bytes, xxh3-64 of the payload]
    zeros up to HEADER_BYTES, then the payload

The length is fixed: a reader fetches the header into scratch and the payload straight to where it belongs, in one call.
What it was given by a stranger never does more than raise CodecError. Golden vectors in tests/test_header.py pin every byte.
"""

from dataclasses import dataclass
from typing import Any, Final, cast

import msgpack
import xxhash

from tierkv.errors import CodecError
from tierkv.keys import KEY_BYTES, Key

MAGIC: Final = b"TKVB"
VERSION: Final = 1
HEADER_BYTES: Final = 192
"""Longest possible header, 168 bytes, rounded up to a multiple of 64 so that payloads stay aligned."""

FINGERPRINT_BYTES: Final = 16
MAX_BLOCK_BYTES: Final = 1 << 32
"""A bound on what a header may claim, far above any block (0.4 to 2.5 MB are usual)."""
_MAX_DEPTH: Final = 1 << 31
_MAX_CODEC_CHARACTERS: Final = 16
_FIELDS: Final = 10


@dataclass(frozen=True, slots=True)
class Header:
    """What is known of an object before its payload is looked at.

    depth: number of blocks before this one.  codec: how the payload is packed.  checksum: xxh3-64 of the stored payload.
    """

    key: Key
    parent: Key
    depth: int
    fingerprint: bytes
    codec: str
    raw_bytes: int
    stored_bytes: int
    checksum: int


def checksum(payload: bytes | bytearray | memoryview) -> int:
    """The digest that guards a payload at rest: xxh3-64, not against malice but against disks, wires and bugs."""
    return xxhash.xxh3_64_intdigest(payload)


def pack(header: Header) -> bytes:
    """HEADER_BYTES bytes that stand before a payload."""
    fields = [
        MAGIC,
        VERSION,
        header.key,
        header.parent,
        header.depth,
        header.fingerprint,
        header.codec,
        header.raw_bytes,
        header.stored_bytes,
        header.checksum,
    ]
    packed = cast(bytes, msgpack.packb(fields, use_bin_type=True))
    return packed.ljust(HEADER_BYTES, b"\0")


def unpack(
    buffer: bytes | bytearray | memoryview, *, key: Key | None = None, fingerprint: bytes | None = None
) -> Header:
    """Read the header at the start of `buffer`, which may go on with the payload.

    Raises CodecError when it is none, or not the one of `key`; with reason "layout" when it is one of another layout
    than `fingerprint`.
    """
    data = bytes(memoryview(buffer)[:HEADER_BYTES])
    if len(data) < HEADER_BYTES:
        raise CodecError(f"object of {len(data)} bytes: shorter than its header of {HEADER_BYTES}")
    header = _validated(_unpacked(data))
    if key is not None and header.key != key:
        raise CodecError(f"object of key {header.key.hex()}: stored under {key.hex()}")
    if fingerprint is not None and header.fingerprint != fingerprint:
        raise CodecError(
            f"object of layout {header.fingerprint.hex()}: this store's is {fingerprint.hex()}", reason="layout"
        )
    return header


def _unpacked(data: bytes) -> list[Any]:
    # Every length is bounded before it is believed: a stranger's "4 GB array" must cost nothing.
    unpacker = msgpack.Unpacker(
        max_buffer_size=HEADER_BYTES,
        max_bin_len=KEY_BYTES,
        max_str_len=_MAX_CODEC_CHARACTERS,
        max_array_len=_FIELDS,
        max_map_len=0,
        max_ext_len=0,
        raw=False,
    )
    unpacker.feed(data)
    try:
        fields = unpacker.unpack()
    except (msgpack.UnpackException, ValueError, OverflowError, TypeError) as error:
        raise CodecError(f"object without a header: {type(error).__name__}") from None
    if not isinstance(fields, list) or len(fields) < 2 or fields[0] != MAGIC:
        raise CodecError("object without a header: other magic")
    if fields[1] != VERSION or len(fields) != _FIELDS:
        raise CodecError(f"object of version {fields[1]!r}: this store reads version {VERSION}", reason="layout")
    if any(data[unpacker.tell() :]):
        raise CodecError("header with bytes after its end")
    return fields


def _validated(fields: list[Any]) -> Header:
    _, _, key, parent, depth, fingerprint, codec, raw_bytes, stored_bytes, digest = fields
    for name, value, length in (
        ("key", key, KEY_BYTES),
        ("parent", parent, KEY_BYTES),
        ("layout fingerprint", fingerprint, FINGERPRINT_BYTES),
    ):
        if not isinstance(value, bytes) or len(value) != length:
            raise CodecError(f"header with a {name} that is not {length} bytes")
    for name, value, most in (
        ("depth", depth, _MAX_DEPTH),
        ("raw size", raw_bytes, MAX_BLOCK_BYTES),
        ("stored size", stored_bytes, raw_bytes),  # what does not shrink is stored raw
        ("checksum", digest, 2**64 - 1),
    ):
        if type(value) is not int or not 0 <= value <= most:
            raise CodecError(f"header with {name} {value!r}: must be an integer from 0 to {most}")
    if not isinstance(codec, str) or not codec.isascii() or not codec.isidentifier():
        raise CodecError("header with a codec that is no name")
    return Header(Key(key), Key(parent), depth, fingerprint, codec, raw_bytes, stored_bytes, digest)
