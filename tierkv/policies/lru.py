"""Least recently used leaf first: the safe, simple choice."""

from typing import ClassVar

from tierkv.policies.base import Leaf
from tierkv.policies.heap import HeapPolicy, Rank


class LruPolicy(HeapPolicy):
    """Exact, block by block: only the part of a strand that a prompt matched counts as used.

    A flat LRU, a clock or one time per strand all lose hits on traces; frequency first loses more where the prompts
    change (bench/bench_policies.py).
    """

    name: ClassVar[str] = "lru"
    learns: ClassVar[bool] = False

    def rank(self, strand: Leaf, block: int) -> Rank:
        """Time of the last use; then the deeper one."""
        return strand.stamp(block), -strand.depth - block

    def start(self, strand: Leaf, block: int) -> int:
        """Blocks of one use go together."""
        return strand.stamp_start(block)
