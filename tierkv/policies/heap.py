"""The heap that orders strands by the worth of their tail: what lru, lfu and cost have in common."""

from abc import abstractmethod
from heapq import heapify, heappop, heappush

from tierkv.policies.base import Leaf, Policy, Victim


class HeapPolicy(Policy):
    """Forgets the tail with the lowest worth, the deepest of equals.

    One live entry per strand, never worth more than its tail: worth that rises is found out when the entry comes up,
    worth that falls makes a new entry and leaves the old one dead.
    """

    def __init__(self, *, tier: int) -> None:
        self.tier = tier
        self._heap: list[tuple[float, int, int, Leaf]] = []
        self._live: dict[Leaf, tuple[float, int, int, Leaf]] = {}
        self._count = 0  # breaks ties, so that strands are never compared

    @abstractmethod
    def worth(self, strand: Leaf, block: int) -> float:
        """What keeping this block, the last one, is worth."""

    @abstractmethod
    def start(self, strand: Leaf, block: int) -> int:
        """The first of the blocks up to `block` that may as well go together with it."""

    def admit(self, strand: Leaf, blocks: int) -> bool:
        """Let everything in: a prefix without its beginning is of no use."""
        return True

    def record(self, strand: Leaf, lo: int, hi: int, now: int) -> None:
        """Learn nothing by default: stamps say when, and are looked up when an entry comes up."""

    def offer(self, strand: Leaf) -> None:
        """See Policy."""
        lo, hi = strand.span(self.tier)
        if lo < hi:
            self._push(strand, self.worth(strand, hi - 1), hi)

    def withdraw(self, strand: Leaf) -> None:
        """See Policy."""
        self._live.pop(strand, None)
        if len(self._heap) > 2 * len(self._live) + 64:
            self._heap = list(self._live.values())
            heapify(self._heap)

    def pop(self) -> Victim | None:
        """See Policy."""
        while self._heap:
            entry = heappop(self._heap)
            strand = entry[3]
            if self._live.get(strand) is not entry:
                continue
            del self._live[strand]
            lo, hi = strand.span(self.tier)
            if lo == hi:
                continue
            worth = self.worth(strand, hi - 1)
            if (worth, -strand.depth - hi) > entry[:2]:
                self._push(strand, worth, hi)
                continue
            return Victim(strand, hi - max(lo, self.start(strand, hi - 1)))
        return None

    def _push(self, strand: Leaf, worth: float, hi: int) -> None:
        live = self._live.get(strand)
        deep = -strand.depth - hi
        if live is not None and (live[0], live[1]) <= (worth, deep):
            return
        self._count += 1
        entry = (worth, deep, self._count, strand)
        self._live[strand] = entry
        heappush(self._heap, entry)
