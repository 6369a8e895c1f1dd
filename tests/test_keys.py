"""Keys, byte for byte: the golden vectors here were computed once by plain hashlib calls and must never change.

A change that breaks one makes every stored block of every user unreachable: raise FORMAT_VERSION and know why.
"""

import array
import hashlib
import hmac
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tierkv.errors import TokensError
from tierkv.keys import FORMAT_VERSION, KEY_BYTES, Key, Namespace, chain, token_bytes
from tierkv.layout import Layout

LAYOUT = Layout(num_layers=30, num_kv_heads=3, head_dim=64, dtype="float32")
LATENT = Layout(num_layers=61, num_kv_heads=1, head_dim=576, dtype="bfloat16", parts=1, block_tokens=64)
ROOT = Namespace("smollm2@1", LAYOUT).root()

ROOTS = [
    (Namespace("smollm2@1", LAYOUT), b"", "ba137feee6db7f443ca2f7e896ee4ca476c66f3f12e1bb8dcb2e4fc96fb7d232"),
    (Namespace("smollm2@1", LAYOUT), b"secret", "fb31b1c2797f69896ff89347cb44ff9fe7d71f04f0b22a5ebcb9f523ba7704b9"),
    (Namespace("smollm2@1", LAYOUT, adapter="lora-7"), b"", "2b2dc98be12e15e2847dfb9ec2940b0de08f657a7508d05efc1c5c04ddb3d11e"),
    (Namespace("smollm2@1", LAYOUT, tenant="acme"), b"", "aa7d5c5d8955ba917a252f9d9cb164d9079566e161fd12b1f4f6dfcd4d833a98"),
    (Namespace("smollm2@1", LATENT), b"", "36b77cf12443870d426e5e55943efb12148bdebdea677e25c2fc79b4389c685c"),
    (Namespace("modèle", LAYOUT, "ä", "t"), b"k" * 64, "721010bfdb45d78598faeae25ec399f633392379dffb4758f62c5c3bbdd2dab3"),
]  # fmt: skip

SIXTEENS = [
    "5431c77d7558efa97c7011d09b86fc8cc0b92ad6f4dff78569b89c36ca64a456",
    "005c2585f8fc5ac4fc5d5d0568d3d1907d82a826dde1887f15e3dd02e6a31ec7",
]
EXTREMES = [
    "a3e32ac4c6ae4fed7b402a1e81dda18dcb6774def6f187b724217daed90993a3",
    "75a134153c67e398730714737d452696820dce5b9e42cc3c716e13c6e1e2ffcc",
    "364ab6f9dcb2f531adc27244c4f5860368e957367edb210e5f6c1a25b558744d",
    "34273c1550f52c417a4c6a21035cb7b30f186504b4a902b36be545163a00d519",
]
WITH_EXTRA = [
    "9ea593397851cab67e4cff9c101a668e574e2a4f6ca0c963d1dad3c6e147dff5",
    "6a9c00b2aa4af27511db1ad9d161ff319af5a51aa645baa856d4d6687d67dda8",
    "9b94e57137f47e3652b5e693f11799b44989fd55e2b0c2a779bd81ee79882304",
]

ids = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=80)


@pytest.mark.parametrize(("namespace", "secret", "root"), ROOTS)
def test_root_is_golden(namespace: Namespace, secret: bytes, root: str) -> None:
    assert namespace.root(secret).hex() == root


def test_every_field_of_a_namespace_changes_its_root() -> None:
    assert len({root for _, _, root in ROOTS}) == len(ROOTS)


def test_fields_of_a_namespace_do_not_run_into_each_other() -> None:
    assert Namespace("a", LAYOUT, adapter="bc").root() != Namespace("ab", LAYOUT, adapter="c").root()
    assert Namespace("a", LAYOUT, adapter="b").root() != Namespace("a", LAYOUT, tenant="b").root()


def test_root_is_what_the_format_says() -> None:
    def text(value: str) -> bytes:  # msgpack fixstr
        return bytes([0xA0 + len(value)]) + value.encode()

    packed = b"\x95" + bytes([FORMAT_VERSION]) + text("smollm2@1") + b"\xc4\x10" + LAYOUT.fingerprint + text("") * 2
    assert hmac.new(b"", packed, hashlib.sha256).digest() == ROOT


def test_chain_is_golden() -> None:
    assert [key.hex() for key in chain(ROOT, token_bytes(list(range(40))), block_tokens=16)] == SIXTEENS


def test_chain_over_the_whole_range_of_int32_is_golden() -> None:
    tokens = token_bytes([0, -1, 2**31 - 1, -(2**31)])
    assert [key.hex() for key in chain(ROOT, tokens, block_tokens=1)] == EXTREMES


def test_chain_with_extras_is_golden() -> None:
    tokens, extras = token_bytes(list(range(12))), {1: b"image:" + b"\x07" * 4}
    assert [key.hex() for key in chain(ROOT, tokens, block_tokens=4, extras=extras)] == WITH_EXTRA


def test_chain_is_plain_sha256_of_parent_and_tokens() -> None:
    digest: bytes = ROOT
    for start, golden in zip((0, 16), SIXTEENS, strict=True):
        digest = hashlib.sha256(digest + struct.pack("<16i", *range(start, start + 16))).digest()
        assert digest.hex() == golden
        assert len(digest) == KEY_BYTES


def test_extra_changes_its_block_and_all_after_it_and_none_before() -> None:
    tokens = token_bytes(list(range(32)))
    plain = chain(ROOT, tokens, block_tokens=8)
    marked = chain(ROOT, tokens, block_tokens=8, extras={2: b"image"})
    assert marked[:2] == plain[:2]
    assert not set(marked[2:]) & set(plain)
    assert chain(ROOT, tokens, block_tokens=8, extras={2: b""}) == plain
    assert chain(ROOT, tokens, block_tokens=8, extras={9: b"past the end"}) == plain


@given(ids, st.integers(1, 9), st.integers(0, 80))
def test_chain_resumed_in_the_middle_equals_the_whole(tokens: list[int], block_tokens: int, cut: int) -> None:
    data = token_bytes(tokens)
    whole = chain(ROOT, data, block_tokens=block_tokens)
    done = min(cut, len(whole))
    parent = whole[done - 1] if done else ROOT
    assert chain(parent, data[done * block_tokens * 4 :], block_tokens=block_tokens) == whole[done:]
    assert len(whole) == len(tokens) // block_tokens


@given(ids, st.integers(1, 9), st.data())
def test_changed_token_changes_its_key_and_all_after_it(
    tokens: list[int], block_tokens: int, data: st.DataObject
) -> None:
    tokens = tokens + [0] * block_tokens
    at = data.draw(st.integers(0, len(tokens) // block_tokens * block_tokens - 1))
    other = [*tokens]
    other[at] ^= 1
    one = chain(ROOT, token_bytes(tokens), block_tokens=block_tokens)
    two = chain(ROOT, token_bytes(other), block_tokens=block_tokens)
    assert one[: at // block_tokens] == two[: at // block_tokens]
    assert not set(one[at // block_tokens :]) & set(two)


def forms(tokens: list[int]) -> dict[str, Any]:
    return {
        "bytes": struct.pack(f"<{len(tokens)}i", *tokens),
        "bytearray": bytearray(struct.pack(f"<{len(tokens)}i", *tokens)),
        "memoryview of bytes": memoryview(struct.pack(f"<{len(tokens)}i", *tokens)),
        "tuple": tuple(tokens),
        "array i": array.array("i", tokens),
        "array q": array.array("q", tokens),
        "int32": np.array(tokens, np.int32),
        "int64": np.array(tokens, np.int64),
        "int64 with strides": np.repeat(np.array(tokens, np.int64), 3)[::3],
        "int32 reversed view": np.array(tokens[::-1], np.int32)[::-1],
        "numpy integers": list(np.array(tokens, np.int64)),
        "torch int32": torch.tensor(tokens, dtype=torch.int32),
        "torch int64": torch.tensor(tokens, dtype=torch.int64),
        "torch slice": torch.tensor([tokens, tokens], dtype=torch.int64)[1],
        "range-like": array.array("l", tokens),
    }


@given(ids)
def test_every_form_of_tokens_gives_the_same_bytes(tokens: list[int]) -> None:
    expected = struct.pack(f"<{len(tokens)}i", *tokens)
    assert token_bytes(tokens) == expected
    for form, value in forms(tokens).items():
        assert token_bytes(value) == expected, form
    assert token_bytes(range(5)) == token_bytes([0, 1, 2, 3, 4])


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (b"abc", "multiple of 4"),
        ("hello", "str"),
        (None, "NoneType"),
        (7, "int"),
        ({1: 2}, "dict"),
        ([1.5], "fit in int32"),
        (["a"], "fit in int32"),
        ([2**31], "fit in int32"),
        ([-(2**31) - 1], "fit in int32"),
        (np.array([1, 2**31]), "fit in int32"),
        (np.array([-(2**31) - 1, 0]), "fit in int32"),
        (torch.tensor([2**40]), "fit in int32"),
        (np.zeros((2, 2), np.int32), "one dimension"),
        (torch.zeros((1, 4), dtype=torch.int64), "one dimension"),
        (np.zeros(2, np.float32), "int32 or int64"),
        (np.zeros(2, np.int16), "int32 or int64"),
        (np.zeros(4, np.int8), "int32 or int64"),
        (torch.zeros(4, dtype=torch.bfloat16), "int32 or int64"),
        (torch.zeros(4, dtype=torch.int8), "int32 or int64"),
        (np.zeros(2, ">i4"), "int32 or int64"),
    ],
)
def test_what_is_no_token_sequence_is_refused(tokens: Any, told: str) -> None:
    with pytest.raises(TokensError, match=told):
        token_bytes(tokens)


def test_keys_do_not_depend_on_the_process() -> None:
    code = (
        "from tierkv.keys import *; from tierkv.layout import Layout\n"
        "root = Namespace('smollm2@1', Layout(num_layers=30, num_kv_heads=3, head_dim=64, dtype='float32')).root()\n"
        "print(chain(root, token_bytes(list(range(32))), block_tokens=16)[-1].hex())"
    )
    for seed in ("0", "1"):
        environ = {"PYTHONHASHSEED": seed}
        out = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
        assert out.stdout.strip() == SIXTEENS[1]


def test_no_tokens_have_no_keys() -> None:
    assert token_bytes([]) == b""
    assert chain(Key(ROOT), b"", block_tokens=16) == []
    assert chain(Key(ROOT), token_bytes([1] * 15), block_tokens=16) == []
