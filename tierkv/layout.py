"""What a block is: its shape, its dtype, its size, and the fingerprint of all that makes two blocks incompatible.

Standard library only.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Final

from tierkv.errors import LayoutError

DTYPE_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3": 1, "int8": 1}
"""Bytes of one element, by the name a layout gives its dtype."""

TOKEN_BYTES: Final = 4
"""A token id at rest and in the index: int32, little endian."""


@dataclass(frozen=True)
class Layout:
    """Shape of one block: `[num_layers, parts, num_kv_heads, block_tokens, head_dim]`, C order.

    `parts` is 2 (K after RoPE, then V) or 1 (the latents of MLA). Heads come before tokens: a tensor-parallel shard is
    a slice, and attention reads contiguous `[block_tokens, head_dim]` tiles.
    Raises LayoutError on a shape that cannot hold KV.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    block_tokens: int = 16
    parts: int = 2

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "block_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise LayoutError(f"layout {name}={value!r}: must be an integer of at least 1")
        if self.parts not in (1, 2):
            raise LayoutError(f"layout parts={self.parts!r}: must be 2 (K and V) or 1 (MLA latents)")
        if self.dtype not in DTYPE_BYTES:
            raise LayoutError(f"layout dtype={self.dtype!r}: must be one of {', '.join(DTYPE_BYTES)}")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Shape of a block."""
        return (self.num_layers, self.parts, self.num_kv_heads, self.block_tokens, self.head_dim)

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of KV of one token, all layers."""
        return self.block_bytes // self.block_tokens

    @cached_property
    def fingerprint(self) -> bytes:
        """16 bytes, equal only for blocks that may stand in for each other. Part of every key and every header."""
        text = json.dumps(
            {
                "block_tokens": self.block_tokens,
                "dtype": self.dtype,
                "head_dim": self.head_dim,
                "num_kv_heads": self.num_kv_heads,
                "num_layers": self.num_layers,
                "parts": self.parts,
            },
            sort_keys=True,
            separators=(",", ":"),
        )
        return hashlib.sha256(text.encode()).digest()[:16]
