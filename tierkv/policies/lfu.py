"""Least frequently used leaf first, with ageing: what was popular long ago does not stay for ever (LFU-DA)."""

from bisect import bisect_left, bisect_right
from typing import ClassVar

from tierkv.policies.base import Leaf
from tierkv.policies.heap import HeapPolicy, Rank
from tierkv.strands import Steps


class _Uses:
    """How often each block of a strand was used, and the policy's age when it last was.

    A use covers a leading part of a strand: counting uses by where they end is exact, and a tail's count is a short sum.
    """

    __slots__ = ("ages", "counts", "ends")

    def __init__(self, end: int, age: float) -> None:
        self.ends = [end]  # ascending
        self.counts = [1]
        self.ages = Steps(end, age)

    def add(self, lo: int, hi: int, age: float) -> None:
        """Count a use of [0, hi); one that was counted up to `lo` before goes on to `hi`."""
        if lo:
            self._count(lo, -1)
        self._count(hi, 1)
        self.ages.cover(hi, age)

    def _count(self, end: int, change: int) -> None:
        at = bisect_left(self.ends, end)
        if at < len(self.ends) and self.ends[at] == end:
            self.counts[at] += change
            if not self.counts[at]:
                del self.ends[at], self.counts[at]
        elif change > 0:
            self.ends.insert(at, end)
            self.counts.insert(at, change)

    def cut(self, end: int) -> None:
        """Blocks from `end` on are forgotten; uses of them were uses of what is left, too."""
        at = bisect_left(self.ends, end)
        past = sum(self.counts[at:])
        del self.ends[at:], self.counts[at:]
        if past:
            self.ends.append(end)
            self.counts.append(past)
        self.ages.cut(end)

    def frequency(self, block: int) -> int:
        """Uses of a block."""
        return sum(self.counts[bisect_right(self.ends, block) :])

    def start(self, block: int) -> int:
        """The first of the blocks up to `block` that have the same frequency and age."""
        at = bisect_right(self.ends, block)
        return max(self.ends[at - 1] if at else 0, self.ages.start(block))


class LfuPolicy(HeapPolicy):
    """Worth of a block: its uses while it was here, plus the worth of what was forgotten last when it was last used."""

    name: ClassVar[str] = "lfu"

    def __init__(self, *, tier: int) -> None:
        super().__init__(tier=tier)
        self.age = 0.0
        self._uses: dict[Leaf, _Uses] = {}

    def value(self, strand: Leaf, block: int) -> float:
        """What one use of a block is worth."""
        return 1.0

    def rank(self, strand: Leaf, block: int) -> Rank:
        """Age when it was last used, plus what its uses are worth; then the time of the last use, since many are equal."""
        uses = self._uses[strand]
        return uses.ages.at(block) + uses.frequency(block) * self.value(strand, block), strand.stamp(block)

    def start(self, strand: Leaf, block: int) -> int:
        """See HeapPolicy."""
        return self._uses[strand].start(block)

    def record(self, strand: Leaf, lo: int, hi: int, now: int) -> None:
        """See Policy."""
        uses = self._uses.get(strand)
        if uses is None:
            self._uses[strand] = _Uses(hi, self.age)
        else:
            uses.add(lo, hi, self.age)

    def forgot(self, strand: Leaf, blocks: int) -> None:
        """Age: whoever comes now is not behind those that have long been here."""
        end = strand.span(self.tier)[1]
        self.age = max(self.age, self.rank(strand, end - 1)[0])
        if end > blocks:
            self._uses[strand].cut(end - blocks)
        else:
            del self._uses[strand]

    def withdraw(self, strand: Leaf) -> None:
        """See Policy."""
        self._uses.pop(strand, None)
        super().withdraw(strand)
