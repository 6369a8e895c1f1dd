"""Uncompressed zarr v3 shards as slabs of blocks: where each lies, and the index that tells zarr readers so.

    shard    place 0 | place 1 | … | index: (offset, bytes) for each, crc32c      place i at i × stride, always

Without compression the index never changes, so a place is read and written where it is. Used by the disk tier and by packs.
Specification: zarr v3, sharding codec. Standard library only.
"""

import functools
import struct
from typing import Final

ALIGNMENT: Final = 4096
_ABSENT: Final = (1 << 64) - 1


def stride_of(block_bytes: int) -> int:
    """Bytes from one place to the next: what O_DIRECT can read and write."""
    return -(-block_bytes // ALIGNMENT) * ALIGNMENT


@functools.cache
def shard_index(used: int, places: int, block_bytes: int) -> bytes:
    """The index at the end of a shard of so many places, of which the first `used` hold blocks."""
    stride = stride_of(block_bytes)
    entries = [(at * stride, block_bytes) if at < used else (_ABSENT, _ABSENT) for at in range(places)]
    index = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    return index + struct.pack("<I", crc32c(index))


def index_bytes(places: int) -> int:
    """Bytes of such an index."""
    return 16 * places + 4


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), bit by bit: a kilobyte per shard, never a block."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
