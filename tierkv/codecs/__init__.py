"""Bytes at rest: codecs by name, and self-contained objects made with them.

An object is a header of fixed length and a payload (see `header`). `seal` and `unseal` are the only way in and out, so that a
checksum is never forgotten: `unseal` verifies the stored bytes before a codec sees them.
"""

from typing import Final

from tierkv.codecs.base import Codec
from tierkv.codecs.header import HEADER_BYTES, Header, checksum, pack
from tierkv.codecs.lz4 import Lz4
from tierkv.codecs.raw import Raw
from tierkv.errors import CodecError, ConfigError
from tierkv.keys import Key

CODECS: Final[dict[str, type[Codec]]] = {codec.name: codec for codec in (Raw, Lz4)}


def make(name: str, *, itemsize: int) -> Codec:
    """Return the codec of this name for elements of `itemsize` bytes. Raises ConfigError for an unknown name."""
    if name not in CODECS:
        raise ConfigError(f"codec {name!r}: must be one of {', '.join(CODECS)}")
    return CODECS[name](itemsize=itemsize)


def seal(
    block: memoryview, *, codec: Codec, key: Key, parent: Key, depth: int, fingerprint: bytes
) -> tuple[bytes, memoryview]:
    """Return header and payload of a block, to be written one after the other.

    A block that does not shrink goes as it is: the payload then shares memory with `block`.
    """
    encoded = codec.encode(block)
    payload = block.cast("B") if encoded is None else memoryview(encoded)
    header = Header(
        key=key,
        parent=parent,
        depth=depth,
        fingerprint=fingerprint,
        codec=Raw.name if encoded is None else codec.name,
        raw_bytes=block.nbytes,
        stored_bytes=payload.nbytes,
        checksum=checksum(payload),
    )
    return pack(header), payload


def unseal(header: Header, payload: memoryview, out: memoryview, *, itemsize: int) -> None:
    """Check `payload` against its header and decode it into `out`; they may be the same memory where nothing is packed.

    Raises CodecError; `out` is undefined then.
    """
    if payload.nbytes != header.stored_bytes:
        raise CodecError(f"payload of {payload.nbytes} bytes: its header says {header.stored_bytes}")
    if header.raw_bytes != out.nbytes:
        raise CodecError(f"block of {header.raw_bytes} bytes: expected {out.nbytes}")
    if checksum(payload) != header.checksum:
        raise CodecError("payload differs from its checksum")
    if header.codec not in CODECS:
        raise CodecError(f"codec {header.codec!r}: this version knows {', '.join(CODECS)}")
    CODECS[header.codec](itemsize=itemsize).decode(payload, out)


__all__ = ["CODECS", "HEADER_BYTES", "Codec", "Header", "make", "seal", "unseal"]
