"""Codecs, and objects sealed with them."""

import numpy as np
import pytest

from tierkv import codecs
from tierkv.codecs import Codec, header
from tierkv.errors import CodecError, ConfigError
from tierkv.keys import Key
from tierkv.testing import CodecContract, floats

KEY, PARENT, PRINT = Key(b"k" * 32), Key(b"p" * 32), b"f" * 16


class TestRaw(CodecContract):
    def make(self, itemsize: int) -> Codec:
        return codecs.make("raw", itemsize=itemsize)


class TestLz4(CodecContract):
    def make(self, itemsize: int) -> Codec:
        return codecs.make("lz4", itemsize=itemsize)


@pytest.mark.parametrize(("dtype", "itemsize", "at_least"), [("bfloat16", 2, 1.2), ("float32", 4, 1.09)])
def test_lz4_shrinks_what_looks_like_kv(dtype: str, itemsize: int, at_least: float) -> None:
    block = floats(dtype, 184320)
    stored = codecs.make("lz4", itemsize=itemsize).encode(memoryview(block))
    assert stored is not None and len(block) / len(stored) > at_least


def test_lz4_leaves_random_bytes_alone() -> None:
    assert codecs.make("lz4", itemsize=2).encode(memoryview(np.random.default_rng(0).bytes(8192))) is None


@pytest.mark.parametrize(
    "stored",
    [
        # lz4 of transposed bits, twice
        "0217000000020b000000420000ffff0400000a003fffff000100175000000000001f00010027500000000000",
        # lz4 of bytes, and bytes as they are
        "011600000000400000001b0001001b0101001b0201001603010050030303030300" + "00" * 63,
    ],
    ids=["bits", "bytes"],
)
def test_what_was_packed_once_can_be_unpacked_for_ever(stored: str) -> None:
    out = bytearray(128)
    codecs.make("lz4", itemsize=2).decode(memoryview(bytes.fromhex(stored)), memoryview(out))
    assert out == (np.arange(64, dtype="<u2") // 16).tobytes()


def test_unknown_codec_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="raw, lz4"):
        codecs.make("zip", itemsize=2)


def sealed(block: bytes, name: str) -> tuple[header.Header, memoryview]:
    codec = codecs.make(name, itemsize=2)
    head, payload = codecs.seal(memoryview(block), codec=codec, key=KEY, parent=PARENT, depth=3, fingerprint=PRINT)
    return header.unpack(head, key=KEY, fingerprint=PRINT), payload


@pytest.mark.parametrize("name", ["raw", "lz4"])
@pytest.mark.parametrize("block", [bytes(4096), np.random.default_rng(0).bytes(4096)], ids=["zeros", "random"])
def test_a_sealed_block_comes_back(name: str, block: bytes) -> None:
    head, payload = sealed(block, name)
    out = bytearray(len(block))
    codecs.unseal(head, payload, memoryview(out), itemsize=2)
    assert out == block
    assert (head.key, head.parent, head.depth, head.raw_bytes) == (KEY, PARENT, 3, 4096)


def test_a_block_that_does_not_shrink_is_sealed_raw_and_uncopied() -> None:
    block = np.random.default_rng(0).bytes(4096)
    head, payload = sealed(block, "lz4")
    assert head.codec == "raw" and payload.obj is block


def test_a_raw_payload_that_was_read_into_place_is_checked_there() -> None:
    block = np.random.default_rng(0).bytes(4096)
    head, _ = sealed(block, "raw")
    out = memoryview(bytearray(block))
    codecs.unseal(head, out, out, itemsize=2)
    out[7] ^= 1
    with pytest.raises(CodecError, match="checksum"):
        codecs.unseal(head, out, out, itemsize=2)


@pytest.mark.parametrize("name", ["raw", "lz4"])
def test_every_flipped_byte_of_a_payload_is_caught(name: str) -> None:
    head, payload = sealed(bytes(600) + floats("bfloat16", 100), name)
    out = memoryview(bytearray(800))
    for at in range(len(payload)):
        bad = bytearray(payload)
        bad[at] ^= 0x10
        with pytest.raises(CodecError):
            codecs.unseal(head, memoryview(bad), out, itemsize=2)


def test_a_payload_of_another_length_is_refused() -> None:
    head, payload = sealed(bytes(4096), "lz4")
    with pytest.raises(CodecError, match="header says"):
        codecs.unseal(head, payload[:-1], memoryview(bytearray(4096)), itemsize=2)
    with pytest.raises(CodecError, match="expected 4095"):
        codecs.unseal(head, payload, memoryview(bytearray(4095)), itemsize=2)


def test_a_codec_of_a_later_version_is_an_error_of_the_object() -> None:
    head, payload = sealed(bytes(64), "raw")
    later = header.Header(KEY, PARENT, 3, PRINT, "fp9", 64, 64, head.checksum)
    with pytest.raises(CodecError, match="fp9"):
        codecs.unseal(later, payload, memoryview(bytearray(64)), itemsize=2)
