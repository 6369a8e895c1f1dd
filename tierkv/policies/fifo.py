"""First in, first out, leaf by leaf: what a tier does when it learns nothing from its hits."""

from bisect import bisect_right
from typing import ClassVar

from tierkv.policies.base import Leaf
from tierkv.policies.heap import HeapPolicy, Rank


class _Arrivals:
    """When the blocks of a strand came in: a prefix comes first, so times rise along it; kept as runs of equal times."""

    __slots__ = ("ends", "times")

    def __init__(self, end: int, time: int) -> None:
        self.ends = [end]  # ascending
        self.times = [time]

    def add(self, hi: int, time: int) -> None:
        """Blocks up to `hi` are here; those that were here before stay what they are."""
        if not self.ends or hi > self.ends[-1]:
            self.ends.append(hi)
            self.times.append(time)

    def cut(self, end: int) -> None:
        """Blocks from `end` on have gone."""
        ends, times = self.ends, self.times
        while ends and (ends[-2] if len(ends) > 1 else 0) >= end:
            ends.pop()
            times.pop()
        if ends:
            ends[-1] = min(ends[-1], end)

    def time(self, block: int) -> int:
        """When a block came in."""
        return self.times[bisect_right(self.ends, block)]

    def start(self, block: int) -> int:
        """The first of the blocks up to `block` that came in together with it."""
        at = bisect_right(self.ends, block)
        return self.ends[at - 1] if at else 0


class FifoPolicy(HeapPolicy):
    """Forgets the leaf that came in first: hits keep nothing, but a prefix stays as long as its branches."""

    name: ClassVar[str] = "fifo"

    def __init__(self, *, tier: int) -> None:
        super().__init__(tier=tier)
        self._arrivals: dict[Leaf, _Arrivals] = {}

    def rank(self, strand: Leaf, block: int) -> Rank:
        """When it came in; then the deeper one."""
        return self._arrivals[strand].time(block), -strand.depth - block

    def start(self, strand: Leaf, block: int) -> int:
        """See HeapPolicy."""
        return self._arrivals[strand].start(block)

    def record(self, strand: Leaf, lo: int, hi: int, now: int) -> None:
        """See Policy."""
        arrivals = self._arrivals.get(strand)
        if arrivals is None:
            self._arrivals[strand] = _Arrivals(hi, now)
        else:
            arrivals.add(hi, now)

    def offer(self, strand: Leaf) -> None:
        """See Policy. Blocks may have gone otherwise than by `forgot`: what comes after them comes anew."""
        lo, hi = strand.span(self.tier)
        if lo < hi:
            self._arrivals[strand].cut(hi)
            self._push(strand, self.rank(strand, hi - 1))

    def forgot(self, strand: Leaf, blocks: int) -> None:
        """See Policy."""
        self._arrivals[strand].cut(strand.span(self.tier)[1] - blocks)

    def withdraw(self, strand: Leaf) -> None:
        """See Policy."""
        self._arrivals.pop(strand, None)
        super().withdraw(strand)
