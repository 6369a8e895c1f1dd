"""What queued requests want: forgotten last, and of that what was queued last first. Not thread-safe: index.py locks.

A want marks each strand that its prompt passes with the end of the part it covers, and keeps that path in the tree, in no
tier. A tail that a policy names although it is wanted is parked in its room: asked for once, not at every eviction.
"""

from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from tierkv.strands import Strand

if TYPE_CHECKING:
    from tierkv.index import Index


class Want:
    """The wish of one queued request, which covers the path (strand, end); it ends with `release`.

    What follows of its prompt is wanted as soon as it is known.
    """

    __slots__ = ("_index", "end", "released", "serial", "strand", "tokens")

    def __init__(self, index: "Index", serial: int, root: Strand, tokens: bytes) -> None:
        self._index = index
        self.serial = serial
        self.strand = root
        self.end = 0
        self.tokens = tokens
        self.released = False

    def awaits(self, block_bytes: int) -> tuple[Strand, int, bytes] | None:
        """The path that it covers and the whole block that is to follow; None: it covers all."""
        at = (self.strand.depth + self.end) * block_bytes
        first = self.tokens[at : at + block_bytes]
        return (self.strand, self.end, first) if len(first) == block_bytes else None

    def release(self) -> None:
        """Want no more. Idempotent, and safe from any thread."""
        self._index._unwant(self)


class Parked:
    """Tails of one room that are wanted, by claim: the number of the first want that covers the last block."""

    def __init__(self) -> None:
        self._claims: dict[Strand, int] = {}
        self._heap: list[tuple[int, int, Strand]] = []
        self._count = 0  # breaks ties, so that strands are never compared

    def items(self) -> Iterable[tuple[Strand, int]]:
        """Tails and their claims."""
        return self._claims.items()

    def __contains__(self, strand: Strand) -> bool:
        return strand in self._claims

    def __bool__(self) -> bool:
        return bool(self._claims)

    def park(self, strand: Strand, claim: int) -> None:
        """Put a tail here; again, if its claim is another one now."""
        if self._claims.get(strand) == claim:
            return
        self._count += 1
        self._claims[strand] = claim
        heappush(self._heap, (-claim, self._count, strand))
        if len(self._heap) > 2 * len(self._claims) + 64:
            self._heap = [(-claim, at, strand) for at, (strand, claim) in enumerate(self._claims.items())]
            self._count = len(self._heap)
            heapify(self._heap)

    def take(self, strand: Strand) -> bool:
        """Take a tail out; whether it was here."""
        return self._claims.pop(strand, None) is not None

    def pop(self) -> Strand | None:
        """Take out the tail whose first want came last."""
        while self._heap:
            claim, _, strand = heappop(self._heap)
            if self._claims.get(strand) == -claim:
                del self._claims[strand]
                return strand
        return None


def wanted(strand: Strand) -> int:
    """Leading blocks of a strand that some request wants."""
    return max(strand.wants.values()) if strand.wants else 0


def claim(strand: Strand, end: int) -> tuple[int, int]:
    """The first want that covers the last block before `end`, and the first block that has no other claim up to there."""
    assert strand.wants
    first = min(serial for serial, covered in strand.wants.items() if covered >= end)
    return first, max((covered for serial, covered in strand.wants.items() if serial < first), default=0)
