"""Lossless packing of floating-point blocks: byte planes, their bits transposed, then lz4 where that shrinks them.

    itemsize planes: (method, stored bytes) of each          little endian
    the planes, least significant byte of the elements first

Plain lz4 does nothing on KV: random mantissa bits break up every match (ratio 1.00 on SmolLM2). Apart from them, the bytes that
hold sign and exponent give 1.15 in bf16; with equal bits of many elements side by side, as bitshuffle does, 1.25, and lz4 runs
no slower on them (bench/bench_codecs.py). Pays on links below about half a GB/s, not on a local disk.
"""

import struct
from typing import ClassVar, Final

import lz4.block
import numpy as np
import numpy.typing as npt

from tierkv.codecs.base import Codec
from tierkv.errors import CodecError

_PLANE: Final = struct.Struct("<BI")
_STORED, _LZ4, _LZ4_OF_BITS = 0, 1, 2
_WORTH: Final = 0.95
"""A plane stays as it is unless it shrinks below this: decoding costs time, and mantissas never get there."""
_PROBE_BYTES: Final = 8192
"""How much of the middle of a plane is tried first: most planes are mantissas, and then this is all they cost."""

Bytes = npt.NDArray[np.uint8]


class Lz4(Codec):
    """lz4 of byte planes."""

    name: ClassVar[str] = "lz4"

    def encode(self, block: memoryview) -> bytes | None:
        """Pack a block whose length is a multiple of itemsize; another one stays as it is."""
        if block.nbytes % self.itemsize or not block.nbytes:
            return None
        elements = np.frombuffer(block, np.uint8).reshape(-1, self.itemsize)
        heads, bodies = [], []
        for number in range(self.itemsize):
            method, body = _packed(np.ascontiguousarray(elements[:, number]))
            heads.append(_PLANE.pack(method, len(body)))
            bodies.append(body)
        packed = b"".join((*heads, *bodies))
        return packed if len(packed) < block.nbytes else None

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """Put the planes back together."""
        count, rest = divmod(out.nbytes, self.itemsize)
        at = self.itemsize * _PLANE.size
        if rest or len(stored) < at:
            raise CodecError(f"lz4 block of {len(stored)} bytes for {out.nbytes}: not one of {self.itemsize} planes")
        elements = np.frombuffer(out, np.uint8).reshape(-1, self.itemsize)
        for number in range(self.itemsize):
            method, length = _PLANE.unpack_from(stored, number * _PLANE.size)
            if length > len(stored) - at:
                raise CodecError(f"lz4 block: plane {number} of {length} bytes goes past the end")
            elements[:, number] = _unpacked(method, stored[at : at + length], count)
            at += length
        if at != len(stored):
            raise CodecError(f"lz4 block: {len(stored) - at} bytes after the last plane")


def _packed(plane: Bytes) -> tuple[int, bytes | memoryview]:
    method = _LZ4 if len(plane) % 8 else _LZ4_OF_BITS
    start = (len(plane) - _PROBE_BYTES) // 16 * 8
    probe = plane[start : start + _PROBE_BYTES] if start > 0 else plane
    if len(_compressed(method, probe)) < _WORTH * len(probe):
        body = _compressed(method, plane)
        if len(body) < _WORTH * len(plane):
            return method, body
    return _STORED, plane.data


def _compressed(method: int, plane: Bytes) -> bytes:
    data = _bits_together(plane) if method == _LZ4_OF_BITS else plane
    return lz4.block.compress(data, store_size=False)  # type: ignore[no-any-return]  # lz4 has no types


def _unpacked(method: int, body: memoryview, count: int) -> Bytes:
    if method in (_LZ4, _LZ4_OF_BITS):
        try:
            plain = lz4.block.decompress(body, uncompressed_size=count)
        except (lz4.block.LZ4BlockError, ValueError) as error:
            raise CodecError(f"lz4 block: {error}") from None
        plane = np.frombuffer(plain, np.uint8)
    elif method == _STORED:
        plane = np.frombuffer(body, np.uint8)
    else:
        raise CodecError(f"lz4 block: unknown method {method}")
    if len(plane) != count or (method == _LZ4_OF_BITS and count % 8):
        raise CodecError(f"lz4 block: plane of {len(plane)} bytes, expected {count}")
    return _bits_apart(plane) if method == _LZ4_OF_BITS else plane


def _bits_together(plane: Bytes) -> Bytes:
    """All lowest bits of the bytes, then all second bits, and so on; the length is a multiple of 8."""
    eights = plane.view("<u8").copy()
    _transpose(eights)
    return np.ascontiguousarray(eights.view(np.uint8).reshape(-1, 8).T).reshape(-1)


def _bits_apart(bits: Bytes) -> Bytes:
    eights = np.ascontiguousarray(bits.reshape(8, -1).T).reshape(-1).view("<u8")
    _transpose(eights)
    return eights.view(np.uint8)


def _transpose(eights: npt.NDArray[np.uint64]) -> None:
    """Transpose each element as a matrix of 8 × 8 bits, in place; its own inverse (Hacker's Delight, 7-3)."""
    swap = np.empty_like(eights)
    for shift, mask in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0)):
        np.right_shift(eights, np.uint64(shift), out=swap)
        swap ^= eights
        swap &= np.uint64(mask)
        eights ^= swap
        swap <<= np.uint64(shift)
        eights ^= swap
