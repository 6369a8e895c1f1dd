"""Block keys against the bare chain of hashlib calls they are made of, and token conversion."""

import hashlib
from typing import Any

import numpy as np
import pytest

from tierkv.keys import Namespace, chain, token_bytes
from tierkv.layout import Layout

TOKENS = np.random.default_rng(0).integers(0, 49152, 131072, dtype=np.int32)
ROOT = Namespace("bench", Layout(num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16")).root()


def bare_chain(data: bytes) -> bytes:
    digest: bytes = ROOT
    for at in range(0, len(data), 64):
        digest = hashlib.sha256(digest + data[at : at + 64]).digest()
    return digest


def test_keys(versus: Any) -> None:
    data = TOKENS.tobytes()
    versus(
        "keys of 8,192 blocks",
        lambda: chain(ROOT, data, block_tokens=16),
        "bare hashlib chain",
        lambda: bare_chain(data),
        unit="ms",
        amount=1,
        rounds=40,
    )


@pytest.mark.parametrize("form", ["bytes", "int32", "int64", "list"])
def test_token_bytes(versus: Any, form: str) -> None:
    tokens = {"bytes": TOKENS.tobytes(), "int32": TOKENS, "int64": TOKENS.astype(np.int64), "list": TOKENS.tolist()}[
        form
    ]
    versus(
        f"131,072 tokens from {form}",
        lambda: token_bytes(tokens),
        "copy of the bytes",
        TOKENS.tobytes,
        unit="us",
        amount=1,
        rounds=40,
    )
