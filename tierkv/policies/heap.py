"""The heap that orders strands by the worth of their tail: what most policies have in common."""

from abc import abstractmethod
from heapq import heapify, heappop, heappush
from math import inf

from tierkv.policies.base import Leaf, Policy, Victim

Rank = tuple[float, ...]


class HeapPolicy(Policy):
    """Forgets the tail of the lowest rank.

    One live entry per strand, never ranked higher than its tail: a rank that rises is found out when the entry comes up,
    one that falls makes a new entry and leaves the old one dead.
    """

    def __init__(self, *, tier: int) -> None:
        self.tier = tier
        self._heap: list[tuple[Rank, int, Leaf]] = []
        self._live: dict[Leaf, tuple[Rank, int, Leaf]] = {}
        self._count = 0  # breaks ties, so that strands are never compared

    @abstractmethod
    def rank(self, strand: Leaf, block: int) -> Rank:
        """What keeping this block, the last one, is worth; later numbers decide between equals."""

    @abstractmethod
    def start(self, strand: Leaf, block: int) -> int:
        """The first of the blocks up to `block` that may as well go together with it."""

    def admit(self, strand: Leaf, blocks: int) -> bool:
        """Let everything in: a prefix without its beginning is of no use."""
        return True

    def record(self, strand: Leaf, lo: int, hi: int, now: int) -> None:
        """Learn nothing by default: stamps say when, and are looked up when an entry comes up."""

    def span(self, strand: Leaf) -> tuple[int, int]:
        """Blocks of a strand that may go now; a policy that orders part of what a tier has says which part."""
        return strand.span(self.tier)

    def __contains__(self, strand: Leaf) -> bool:
        """Whether the strand is offered; its span may be empty by now."""
        return strand in self._live

    def offer(self, strand: Leaf) -> None:
        """See Policy."""
        lo, hi = self.span(strand)
        if lo < hi:
            self._push(strand, self.rank(strand, hi - 1))

    def withdraw(self, strand: Leaf) -> None:
        """See Policy."""
        self._live.pop(strand, None)
        self._compact()

    def pop(self, below: float = inf) -> Victim | None:
        """See Policy."""
        while self._heap:
            entry = heappop(self._heap)
            old, _, strand = entry
            if self._live.get(strand) is not entry:
                continue
            del self._live[strand]
            lo, hi = self.span(strand)
            if lo == hi:
                continue
            rank = self.rank(strand, hi - 1)
            if rank > old:
                self._push(strand, rank)
                continue
            return Victim(strand, hi - max(lo, self.start(strand, hi - 1)))
        return None

    def _push(self, strand: Leaf, rank: Rank) -> None:
        live = self._live.get(strand)
        if live is not None and live[0] <= rank:
            return
        self._count += 1
        entry = (rank, self._count, strand)
        self._live[strand] = entry
        heappush(self._heap, entry)
        self._compact()

    def _compact(self) -> None:
        """Drop the dead entries once they are the most."""
        if len(self._heap) > 2 * len(self._live) + 64:
            self._heap = list(self._live.values())
            heapify(self._heap)
