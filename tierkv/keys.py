"""What a block is called: the chained digest of its tokens and of everything before them.

    root  = HMAC-SHA-256(secret, msgpack of the namespace)
    key_i = SHA-256(key_{i-1} + int32-LE tokens of block i [+ extra_i])

Equal keys mean equal KV, across processes, machines and versions: golden vectors in tests/test_keys.py pin every byte.
Never a non-cryptographic hash and never Python's `hash`: a collision here would put another prompt's KV under an
attention head, and a seeded hash would never hit across processes.

numpy and torch are recognised when they are given, never imported before.
"""

import hashlib
import hmac
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, NewType, cast

import msgpack

from tierkv.errors import TokensError
from tierkv.layout import TOKEN_BYTES, Layout

Key = NewType("Key", bytes)
"""32 bytes that name one block and everything before it; also the root of a namespace, which names no block."""

KEY_BYTES: Final = 32
FORMAT_VERSION: Final = 1

Tokens = Any  # what `token_bytes` accepts; typed there by what it does, since numpy and torch are not imported


@dataclass(frozen=True, slots=True)
class Namespace:
    """All that must be equal before two prompts may share KV, besides their tokens.

    model: identity of the weights (a digest, or name and revision).  adapter: identity of a LoRA or the like.
    tenant: who may share; with a store secret, a tenant's keys cannot be guessed from its tokens.
    """

    model: str
    layout: Layout
    adapter: str = ""
    tenant: str = ""

    def fields(self) -> dict[str, str | int]:
        """What must be equal, by name: what people are told when it is not."""
        return {"model": self.model, "adapter": self.adapter, "tenant": self.tenant} | asdict(self.layout)

    def root(self, secret: bytes = b"") -> Key:
        """The key before the first block."""
        fields = [FORMAT_VERSION, self.model, self.layout.fingerprint, self.adapter, self.tenant]
        packed = cast(bytes, msgpack.packb(fields, use_bin_type=True))
        return Key(hmac.digest(secret, packed, "sha256"))


def chain(
    parent: Key, tokens: bytes | bytearray | memoryview, *, block_tokens: int, extras: Mapping[int, bytes] | None = None
) -> list[Key]:
    """Keys of the full blocks in `tokens` (int32-LE) that follow `parent`; a partial last block has none.

    extras: for a block number (from 0, after `parent`), bytes that are not tokens but decide its KV, such as the digest
    of an image. Costs what the bare chain of hashlib calls costs (bench/bench_keys.py).
    """
    sha256 = hashlib.sha256
    step = block_tokens * TOKEN_BYTES
    data = bytes(tokens)
    digest: bytes = parent
    keys = []
    if extras:
        for number, at in enumerate(range(0, len(data) - step + 1, step)):
            digest = sha256(digest + data[at : at + step] + extras.get(number, b"")).digest()
            keys.append(digest)
    else:
        for at in range(0, len(data) - step + 1, step):
            digest = sha256(digest + data[at : at + step]).digest()
            keys.append(digest)
    return cast(list[Key], keys)


def token_bytes(tokens: Tokens) -> bytes:
    """Token ids as int32, little endian: convert once per request and keep the result.

    Takes bytes that already are int32-LE, int32 and int64 arrays (numpy, `array`, memoryview), torch tensors, and any
    sequence of ints; one dimension. Raises TokensError for anything else and for ids that do not fit.
    """
    if isinstance(tokens, bytes):
        return _checked(tokens)
    if isinstance(tokens, list | tuple):
        return _pack(tokens)
    if hasattr(tokens, "detach"):  # a torch tensor; its numpy view shares memory
        if str(tokens.dtype) not in ("torch.int32", "torch.int64"):
            raise TokensError(f"tokens of dtype {tokens.dtype}: give int32 or int64 ids")
        tokens = tokens.detach().cpu().numpy()
    if hasattr(tokens, "__array__") and not hasattr(tokens, "__buffer__") and not hasattr(tokens, "dtype"):
        tokens = tokens.__array__()
    try:
        view = memoryview(tokens)
    except TypeError:
        if isinstance(tokens, Sequence) and not isinstance(tokens, str):
            return _pack(tokens)
        raise TokensError(f"tokens of type {type(tokens).__name__}: give token ids, as a list or an array") from None
    return _from_buffer(view)


def _from_buffer(view: memoryview) -> bytes:
    if view.ndim != 1:
        raise TokensError(f"tokens with shape {view.shape}: give one dimension, one prompt at a time")
    kind = view.format.lstrip("@=<")
    if kind in ("B", "c"):  # bytes; not int8, which could only be ids
        return _checked(view.tobytes())
    if kind in ("i", "l", "q") and view.itemsize == TOKEN_BYTES:
        return view.tobytes() if sys.byteorder == "little" else _pack(view.tolist())
    if kind in ("l", "q") and view.itemsize == 2 * TOKEN_BYTES:
        return _narrow(view)
    raise TokensError(f"tokens with element format {view.format!r}: give int32 or int64 ids")


def _narrow(view: memoryview) -> bytes:
    import numpy as np  # whoever holds an int64 array of tokens has loaded it, or can

    wide = np.ascontiguousarray(view, dtype="<i8")
    narrow = wide.astype("<i4")
    # High words first: cheaper than comparing all. They are all zero too for [2**31, 2**32), which then turns negative.
    suspect = wide.view("<i4")[1::2].any() or narrow.min(initial=0) < 0
    if suspect and not np.array_equal(narrow, wide):
        raise TokensError(f"token ids between {wide.min()} and {wide.max()}: must fit in int32")
    return narrow.tobytes()


def _pack(ids: Sequence[int]) -> bytes:
    try:
        # The native form is twice as fast as "<".
        return struct.pack(f"{len(ids)}i" if sys.byteorder == "little" else f"<{len(ids)}i", *ids)
    except struct.error as error:
        raise TokensError(f"list of tokens: {error}; give ids that fit in int32") from None


def _checked(data: bytes) -> bytes:
    if len(data) % TOKEN_BYTES:
        raise TokensError(f"{len(data)} bytes of tokens: int32 ids need a multiple of {TOKEN_BYTES}")
    return data
