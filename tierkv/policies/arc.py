"""Two lists, of blocks used once and of those used again, whose shares follow what is missed (ARC), leaf by leaf."""

from collections import OrderedDict
from math import ceil, inf
from typing import ClassVar, Final

from tierkv.policies.base import Leaf, Policy, Victim
from tierkv.policies.lru import LruPolicy

LOOKED_OVER: Final = 2
"""Strands that are looked over for each run that is remembered."""


class _Part:
    """What the tier has of a strand. held: blocks up to the last one.  again: leading blocks that were used again."""

    __slots__ = ("again", "held")

    def __init__(self) -> None:
        self.held = 0
        self.again = 0


class _Once(LruPolicy):
    """Tails that were used once."""

    def __init__(self, *, tier: int, parts: dict[Leaf, _Part]) -> None:
        super().__init__(tier=tier)
        self._parts = parts

    def span(self, strand: Leaf) -> tuple[int, int]:
        """What may go, up to the part that was used again."""
        lo, hi = strand.span(self.tier)
        return max(lo, min(self._parts[strand].again, hi)), hi


class _Again(_Once):
    """Tails that were used again."""

    def span(self, strand: Leaf) -> tuple[int, int]:
        """What may go, unless there is a part behind it that was used once."""
        lo, hi = strand.span(self.tier)
        return (lo, hi) if hi <= self._parts[strand].again else (hi, hi)


class _Run:
    """Blocks [lo, hi) of a strand that were forgotten together."""

    __slots__ = ("hi", "lo", "strand")

    def __init__(self, strand: Leaf, lo: int, hi: int) -> None:
        self.strand, self.lo, self.hi = strand, lo, hi


class Ghosts:
    """Blocks that were forgotten, in that order. Of one strand the deepest went first: its runs lie in falling order.

    Nobody tells when the index does not know them any more: strands are looked over in turn, some at every `put`.
    """

    def __init__(self) -> None:
        self.num_blocks = 0
        self._order: OrderedDict[_Run, None] = OrderedDict()
        self._runs: OrderedDict[Leaf, list[_Run]] = OrderedDict()

    def put(self, strand: Leaf, lo: int, hi: int) -> None:
        """Remember blocks [lo, hi), which lie before all of the strand's that are remembered."""
        if lo < hi:
            run = _Run(strand, lo, hi)
            self._order[run] = None
            self._runs.setdefault(strand, []).append(run)
            self.num_blocks += hi - lo
            for _ in range(min(LOOKED_OVER, len(self._runs))):
                strand = next(iter(self._runs))
                self._runs.move_to_end(strand)
                self._cut(strand)

    def take(self, strand: Leaf, hi: int) -> tuple[int, int]:
        """Take out the strand's blocks before `hi`: how many there are, and the end of the last."""
        runs, count, end = self._runs.get(strand), 0, 0
        while runs and runs[-1].lo < hi:
            run = runs[-1]
            end = min(run.hi, hi)
            count += end - run.lo
            run.lo = end
            if run.lo == run.hi:
                self._drop(run)
        self.num_blocks -= count
        return count, end

    def trim(self, most: int) -> None:
        """Let go of what was forgotten first, until at most so many blocks are left."""
        while self.num_blocks > max(most, 0):
            run = next(iter(self._order))
            blocks = min(run.hi - run.lo, self.num_blocks - max(most, 0))
            run.hi -= blocks
            self.num_blocks -= blocks
            if run.lo == run.hi:
                self._drop(run)

    def _cut(self, strand: Leaf) -> None:
        """Let go of the strand's blocks that the index does not know any more."""
        runs = self._runs[strand]
        while runs and runs[0].hi > strand.size:
            run = runs[0]
            end = max(strand.size, run.lo)
            self.num_blocks -= run.hi - end
            run.hi = end
            if run.lo == run.hi:
                self._drop(run)

    def _drop(self, run: _Run) -> None:
        """Take out a run that is empty: its strand's first or last."""
        del self._order[run]
        runs = self._runs[run.strand]
        runs.pop(0 if runs[0] is run else -1)
        if not runs:
            del self._runs[run.strand]


class ArcPolicy(Policy):
    """Forgets the least recently used leaf of the list that has more than its share.

    A block that comes back soon after it was forgotten shifts `target`, the share of those used once, towards the list that
    it had been in. What was forgotten is remembered as long as the index knows it: the index needs a history of about
    `capacity_blocks`, or else nothing comes back and this is a segmented LRU. With the blocks held, at most twice
    `capacity_blocks` are remembered. Megiddo & Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003.
    """

    name: ClassVar[str] = "arc"

    def __init__(self, *, tier: int, capacity_blocks: int) -> None:
        self.tier = tier
        self.capacity_blocks = capacity_blocks
        self.target = 0.0
        self.num_once = 0
        self.num_again = 0
        self.once_gone = Ghosts()
        self.again_gone = Ghosts()
        self._parts: dict[Leaf, _Part] = {}
        self._once = _Once(tier=tier, parts=self._parts)
        self._again = _Again(tier=tier, parts=self._parts)

    def admit(self, strand: Leaf, blocks: int) -> bool:
        """Let everything in: a prefix without its beginning is of no use."""
        return True

    def record(self, strand: Leaf, lo: int, hi: int, now: int) -> None:
        """See Policy. What begins with the first block is a use of what is here; the rest comes in."""
        part = self._parts.get(strand)
        if part is None:
            part = self._parts[strand] = _Part()
        if lo == 0 < part.held:
            self._use_again(strand, part, min(hi, part.held))
        if hi > part.held:
            self._let_in(strand, part, hi)

    def _use_again(self, strand: Leaf, part: _Part, end: int) -> None:
        """Blocks up to `end`, which are here, were used once more."""
        if end > part.again:
            self.num_once -= end - part.again
            self.num_again += end - part.again
            part.again = end
            if strand in self._once:
                self._again.offer(strand)

    def _let_in(self, strand: Leaf, part: _Part, hi: int) -> None:
        """Blocks up to `hi` have come in; those that are remembered have come back."""
        num_once, num_again = self.once_gone.num_blocks, self.again_gone.num_blocks
        once, once_end = self.once_gone.take(strand, hi)
        again, again_end = self.again_gone.take(strand, hi)
        if once:
            self.target = min(self.target + once * max(1.0, num_again / num_once), float(self.capacity_blocks))
        if again:
            self.target = max(self.target - again * max(1.0, num_once / num_again), 0.0)
        self.num_once += hi - part.held
        part.held = hi
        self._use_again(strand, part, max(once_end, again_end))
        self._trim()

    def _trim(self) -> None:
        """Remember no more than the original: of those used once as many as have room beside them, of all twice the room."""
        most = self.capacity_blocks
        self.once_gone.trim(most - self.num_once)
        self.again_gone.trim(2 * most - self.num_once - self.num_again - self.once_gone.num_blocks)

    def offer(self, strand: Leaf) -> None:
        """See Policy. Blocks may have gone otherwise than by `forgot`."""
        lo, hi = strand.span(self.tier)
        if lo < hi:
            part = self._parts[strand]
            self._cut(part, hi)
            (self._once if hi > part.again else self._again).offer(strand)

    def forgot(self, strand: Leaf, blocks: int) -> None:
        """See Policy."""
        hi = strand.span(self.tier)[1]
        lo, part = hi - blocks, self._parts[strand]
        middle = min(max(part.again, lo), hi)
        self.once_gone.put(strand, middle, hi)
        self.again_gone.put(strand, lo, middle)
        self._cut(part, lo)
        self._trim()

    def withdraw(self, strand: Leaf) -> None:
        """See Policy."""
        part = self._parts.get(strand)
        if part:
            self._cut(part, 0)
            del self._parts[strand]
        self._once.withdraw(strand)
        self._again.withdraw(strand)

    def _cut(self, part: _Part, end: int) -> None:
        """Blocks from `end` on are not here any more."""
        if end < part.held:
            self.num_once -= part.held - max(part.again, end)
            self.num_again -= max(part.again - end, 0)
            part.held = end
            part.again = min(part.again, end)

    def pop(self, below: float = inf) -> Victim | None:
        """See Policy. Where no leaf of one list may go, one of the other does."""
        too_many = ceil(self.num_once - self.target)
        if too_many > 0 and (victim := self._once.pop()):
            return Victim(victim.strand, min(victim.blocks, too_many))
        return self._again.pop() or self._once.pop()
