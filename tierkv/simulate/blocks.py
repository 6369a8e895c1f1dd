"""Ids of blocks: chained, 8 bytes each. Whatever a trace calls its blocks, equal ids mean equal prompts up to there."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

Ids = npt.NDArray[np.uint64]

STEP: Final = np.uint64(0x9E3779B97F4A7C15)
FIRST: Final = np.uint64(0xBF58476D1CE4E5B9)
SECOND: Final = np.uint64(0x94D049BB133111EB)
FAR: Final = np.uint64(30)
NEAR: Final = np.uint64(27)
LAST: Final = np.uint64(31)

_KNOWN: Final[dict[int, Ids]] = {}
"""Random bits of as many positions as were needed so far, by their number."""


def chained(ids: Ids, *, seed: int = 0) -> bytes:
    """Ids that name each block and all before it, as bytes.

    Ids that are chained already stay as distinct as they were, so this is safe for any trace. A running sum of pairs of
    position and id, each mixed to 64 random bits: two different prefixes of a trace of 10**8 blocks meet with a chance of
    3e-4. seed: prompts of different seeds have nothing in common.
    """
    if seed:
        ids = ids ^ np.uint64(seed)
    return np.cumsum(_mixed(ids * STEP ^ _positions(len(ids))), dtype=np.uint64).astype("<u8", copy=False).tobytes()


def _positions(count: int) -> Ids:
    """64 random bits for each of the first positions."""
    size = 1 << max(count - 1, 1023).bit_length()
    if size not in _KNOWN:
        _KNOWN[size] = _mixed(np.arange(1, size + 1, dtype=np.uint64) * STEP)
    return _KNOWN[size][:count]


def _mixed(values: Ids) -> Ids:
    """Spread every bit over all others (splitmix64: Steele, Lea & Flood, OOPSLA'14)."""
    values = (values ^ (values >> FAR)) * FIRST
    values = (values ^ (values >> NEAR)) * SECOND
    return values ^ (values >> LAST)


def numbers(ids: Sequence[object]) -> Ids:
    """A trace's ids as 64-bit numbers: whole numbers that fit as they are, larger ones and texts by their hash.

    Raises TypeError for anything else; its arguments are what it was and where.
    """
    if set(map(type, ids)) <= {int}:
        try:
            return np.array(ids, dtype=np.int64).view(np.uint64)
        except OverflowError:
            pass  # told apart one by one
    return np.array([_number(each, at) for at, each in enumerate(ids)], dtype=np.uint64)


def _number(given: object, at: int) -> int:
    if type(given) is int:
        return given % 2**64 if -(2**63) <= given < 2**64 else hashed(str(given))
    if type(given) is str:
        return hashed(given)
    raise TypeError(given, at)


def hashed(text: str) -> int:
    """A 64-bit number for a text."""
    return xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass"))  # JSON may hold halves of characters
