"""The interface of an eviction policy: one instance per tier, driven by the index under its lock."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, Protocol


class Leaf(Protocol):
    """What a policy may see of a strand. The index owns it; identity is the key (`hash` is by identity)."""

    depth: int
    """Blocks on the path before this strand's first."""

    def span(self, tier: int) -> tuple[int, int]:
        """Blocks [lo, hi) of this strand that `tier` may forget now, the tail first; lo == hi: none."""

    def stamp(self, block: int) -> int:
        """Logical time of the last use of a block of this strand; never rises from root to leaf."""

    def stamp_start(self, block: int) -> int:
        """The first of the blocks up to `block` that were last used together with it."""


class Victim(NamedTuple):
    """Blocks to forget: the last `blocks` of what the strand's `span` allows."""

    strand: Leaf
    blocks: int


class Policy(ABC):
    """Order in which a tier forgets. Only unpinned tails of leaves are ever offered, so a prefix outlives its branches.

    `now` is a logical clock that never goes back. Costs a few µs per call at most; none is O(strands).
    """

    name: ClassVar[str]
    learns: ClassVar[bool] = True
    """Whether `record` does anything: a hit would call it for every strand and tier."""

    @abstractmethod
    def admit(self, strand: Leaf, blocks: int) -> bool:
        """Let `blocks` new blocks of `strand` into this tier?"""

    @abstractmethod
    def record(self, strand: Leaf, lo: int, hi: int, now: int) -> None:
        """Blocks [lo, hi) of the strand were used, or have just come in."""

    @abstractmethod
    def offer(self, strand: Leaf) -> None:
        """The strand has a tail this tier may forget. Offering twice is offering once."""

    def forgot(self, strand: Leaf, blocks: int) -> None:  # noqa: B027 -- not every policy learns from it
        """The last `blocks` of the strand's span go now: `pop` named them. A popped strand may also be offered back whole."""

    @abstractmethod
    def withdraw(self, strand: Leaf) -> None:
        """The strand has gone, or has nothing to forget any more."""

    @abstractmethod
    def pop(self) -> Victim | None:
        """What to forget next; it counts as withdrawn and is offered again if some of it stays. None: nothing."""
