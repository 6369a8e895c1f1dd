"""Lossless packing of floating-point blocks: byte planes first, then lz4 on the planes that shrink.

    itemsize planes: (method, stored bytes) of each          little endian
    the planes, least significant byte of the elements first

Plain lz4 does nothing on KV: the random low bytes of mantissas break up every match (ratio 1.00 on SmolLM2, bench_codecs).
Apart from them, the bytes that hold sign and exponent repeat. Pays on links below about half a GB/s, not on a local disk.
"""

import struct
from typing import ClassVar, Final

import lz4.block
import numpy as np
import numpy.typing as npt

from tierkv.codecs.base import Codec
from tierkv.errors import CodecError

_PLANE: Final = struct.Struct("<BI")
_STORED, _LZ4 = 0, 1
_WORTH: Final = 0.95
"""A plane stays as it is unless it shrinks below this: decoding costs time, and mantissas never get there."""

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
            plane = np.ascontiguousarray(elements[:, number])
            body = lz4.block.compress(plane, store_size=False)
            method = _LZ4 if len(body) < _WORTH * plane.nbytes else _STORED
            if method == _STORED:
                body = plane.data
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
            elements[:, number] = _plane(method, stored[at : at + length], count)
            at += length
        if at != len(stored):
            raise CodecError(f"lz4 block: {len(stored) - at} bytes after the last plane")


def _plane(method: int, body: memoryview, count: int) -> Bytes:
    if method == _LZ4:
        try:
            plain = lz4.block.decompress(body, uncompressed_size=count)
        except (lz4.block.LZ4BlockError, ValueError) as error:
            raise CodecError(f"lz4 block: {error}") from None
        plane = np.frombuffer(plain, np.uint8)
    elif method == _STORED:
        plane = np.frombuffer(body, np.uint8)
    else:
        raise CodecError(f"lz4 block: unknown method {method}")
    if len(plane) != count:
        raise CodecError(f"lz4 block: plane of {len(plane)} bytes, expected {count}")
    return plane
