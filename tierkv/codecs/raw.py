"""Blocks as they are."""

from typing import ClassVar

from tierkv.codecs.base import Codec
from tierkv.errors import CodecError


class Raw(Codec):
    """Packs nothing."""

    name: ClassVar[str] = "raw"

    def encode(self, block: memoryview) -> bytes | None:
        """Store the block itself."""
        return None

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """Copy, unless the bytes were read into place already."""
        if stored.nbytes != out.nbytes:
            raise CodecError(f"raw block of {stored.nbytes} bytes: expected {out.nbytes}")
        if stored is not out:
            out[:] = stored
