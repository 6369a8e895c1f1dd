"""What a codec is: bytes of a block to bytes at rest, and back. Checksums are not its business: see `header`."""

from abc import ABC, abstractmethod
from typing import ClassVar


class Codec(ABC):
    """Packs one block at a time. Stateless and thread-safe; `itemsize` is the bytes of one element of the block."""

    name: ClassVar[str]
    """As it stands in headers and configurations: ASCII, 16 characters at most."""

    def __init__(self, *, itemsize: int) -> None:
        self.itemsize = itemsize

    @abstractmethod
    def encode(self, block: memoryview) -> bytes | None:
        """Pack a block; None where that does not make it smaller: it is stored raw then."""

    @abstractmethod
    def decode(self, stored: memoryview, out: memoryview) -> None:
        """Unpack into `out`, which is exactly as long as the block was.

        Raises CodecError for bytes that cannot be a packed block of that length, and reads or writes past no buffer
        whatever they are; a changed byte that still decodes is for the checksum to find. `out` is undefined then.
        """
