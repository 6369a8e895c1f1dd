"""Two segments: blocks that were used once go before those that were used again (segmented LRU)."""

from typing import ClassVar, Final

from tierkv.policies.base import Leaf
from tierkv.policies.heap import HeapPolicy, Rank
from tierkv.policies.lru import LruPolicy
from tierkv.strands import Steps

PROTECTED_SHARE: Final = 0.8
"""Most of what a tier holds that may be protected, unless told otherwise."""


class _Part:
    """What the tier has of a strand.

    held: blocks up to the last one.  protected: leading blocks that were used again, and have not been demoted since.
    demoted: when blocks were demoted; the deeper the earlier, as they are demoted from the tail on.
    """

    __slots__ = ("demoted", "held", "protected")

    def __init__(self, held: int) -> None:
        self.held = held
        self.protected = 0
        self.demoted = Steps(held, 0)


class _Protected(LruPolicy):
    """The protected segment, leaves or not: what it names is demoted, not forgotten."""

    def __init__(self, *, tier: int, parts: dict[Leaf, _Part]) -> None:
        super().__init__(tier=tier)
        self._parts = parts

    def span(self, strand: Leaf) -> tuple[int, int]:
        """All that is protected."""
        return 0, self._parts[strand].protected


class SlruPolicy(HeapPolicy):
    """Forgets the least recently used leaf on probation; a protected one only if there is no other.

    A use protects. Where more than `protected_share` of what the tier holds is protected, the least recently used of it is
    on probation again, as if used now. Karedla, Love & Wherry, "Caching Strategies to Improve Disk System Performance", 1994.
    """

    name: ClassVar[str] = "slru"

    def __init__(self, *, tier: int, protected_share: float = PROTECTED_SHARE) -> None:
        super().__init__(tier=tier)
        self.protected_share = protected_share
        self.num_held = 0
        self.num_protected = 0
        self._now = 0
        self._parts: dict[Leaf, _Part] = {}
        self._protected = _Protected(tier=tier, parts=self._parts)

    def rank(self, strand: Leaf, block: int) -> Rank:
        """The segment; the time of the last use, or of the demotion; of those demoted together, that of the last use."""
        part, used = self._parts[strand], strand.stamp(block)
        if block < part.protected:
            return 1, used
        return 0, max(used, part.demoted.at(block)), used

    def start(self, strand: Leaf, block: int) -> int:
        """See HeapPolicy."""
        part = self._parts[strand]
        if block < part.protected:
            return strand.stamp_start(block)
        return max(part.protected, strand.stamp_start(block), part.demoted.start(block))

    def record(self, strand: Leaf, lo: int, hi: int, now: int) -> None:
        """See Policy. What begins with the first block is a use of what is here; the rest comes in."""
        part = self._parts.get(strand)
        if part is None:
            self._parts[strand] = _Part(hi)
            self.num_held += hi
            return
        used = min(hi, part.held) if lo == 0 else 0
        if hi > part.held:
            self.num_held += hi - part.held
            if part.held:
                part.demoted.grow(hi, 0)
            else:
                part.demoted = Steps(hi, 0)
            part.held = hi
        if used > part.protected:
            self.num_protected += used - part.protected
            part.protected = used
            self._protected.offer(strand)
            self._now = now

    def found(self, blocks: int) -> None:
        """Put on probation what is too much, the least recently used first. Not before the whole path is known to be used."""
        while (excess := self.num_protected - int(self.protected_share * self.num_held)) > 0:
            victim = self._protected.pop()
            assert victim, "what is protected is on offer"
            strand = victim.strand
            part = self._parts[strand]
            part.demoted.cover(part.protected, self._now)
            blocks = min(victim.blocks, excess)
            part.protected -= blocks
            self.num_protected -= blocks
            if part.protected:
                self._protected.offer(strand)
            if strand in self:  # its rank has fallen
                self.offer(strand)

    def offer(self, strand: Leaf) -> None:
        """See Policy. Blocks may have gone otherwise than by `forgot`."""
        lo, hi = strand.span(self.tier)
        if lo < hi:
            self._cut(self._parts[strand], hi)
            self._push(strand, self.rank(strand, hi - 1))

    def forgot(self, strand: Leaf, blocks: int) -> None:
        """See Policy."""
        self._cut(self._parts[strand], strand.span(self.tier)[1] - blocks)

    def withdraw(self, strand: Leaf) -> None:
        """See Policy."""
        part = self._parts.get(strand)
        if part:
            self._cut(part, 0)
            del self._parts[strand]
        self._protected.withdraw(strand)
        super().withdraw(strand)

    def _cut(self, part: _Part, end: int) -> None:
        """Blocks from `end` on have gone."""
        if end < part.held:
            self.num_held -= part.held - end
            self.num_protected -= max(part.protected - end, 0)
            part.held = end
            part.protected = min(part.protected, end)
            if end:
                part.demoted.cut(end)
