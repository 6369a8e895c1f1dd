"""The interface of an eviction policy: one instance per tier, driven by the index under its lock."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, NamedTuple, Protocol

from tierkv.hints import NO_HINTS, Ending, Hints


class Leaf(Protocol):
    """What a policy may see of a strand. The index owns it; identity is the key (`hash` is by identity)."""

    depth: int
    """Blocks on the path before this strand's first."""

    size: int
    """Its blocks, forgotten ones included."""

    notes: Any  # what the index's observer keeps of it, in its own terms
    """None until the observer writes it."""

    def fanout(self, block: int) -> int:
        """How many different blocks are known to follow this one."""

    def follower(self, block: int) -> "tuple[Leaf, int] | None":
        """The only block that is known to follow this one: its strand and its number there."""

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


@dataclass(slots=True)
class Use:
    """One request's use of the index.

    now_s: seconds on a clock that never goes back, of any origin.  num_blocks: whole blocks of the prompt.  num_known: its
    leading blocks that the index knows, forgotten ones included.  num_held: its leading blocks that some tier held.
    """

    now_s: float
    num_blocks: int
    num_known: int
    num_held: int
    hints: Hints = NO_HINTS
    notes: Any = None  # the observer's own, from `arrive` to `end`


class Observer(ABC):
    """Sees how every path is used, forgotten blocks included: what policies that learn have in common. One per index.

    Called under the index's lock, like a policy: pure, and quick.
    """

    @abstractmethod
    def arrive(self, path: Sequence[tuple[Leaf, int]], use: Use) -> None:
        """A request came. path: the strands that its known blocks pass, each with the end of the part used; may be empty."""

    @abstractmethod
    def extend(self, strand: Leaf, lo: int, hi: int, use: Use) -> None:
        """Blocks [lo, hi) of the strand are new, and follow the path of the request that came with `use`."""

    @abstractmethod
    def end(self, path: Sequence[tuple[Leaf, int]], use: Use, ending: Ending, now_s: float) -> None:
        """The request is over; path: as in `arrive`, all that it covers now."""

    @abstractmethod
    def gone(self, strand: Leaf, size: int) -> None:
        """Only the strand's leading `size` blocks are known from now on; 0: none."""


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

    def found(self, blocks: int) -> None:  # noqa: B027 -- not every policy learns from it
        """A request came, and this tier held so many of its blocks; after the calls of `record` for them."""

    @abstractmethod
    def offer(self, strand: Leaf) -> None:
        """The strand has a tail this tier may forget. Offering twice is offering once."""

    def forgot(self, strand: Leaf, blocks: int) -> None:  # noqa: B027 -- not every policy learns from it
        """The last `blocks` of the strand's span go now: `pop` named them. A popped strand may also be offered back whole."""

    @abstractmethod
    def withdraw(self, strand: Leaf) -> None:
        """The strand has gone, or has nothing to forget any more."""

    def worth(self, strand: Leaf, block: int) -> float:
        """What it is worth to let this block in, on the scale of `pop`; infinite where new blocks always come first."""
        return inf

    @abstractmethod
    def pop(self, below: float = inf) -> Victim | None:
        """What to forget next; it counts as withdrawn and is offered again if some of it stays.

        None: nothing, or nothing that is worth less than `below`; a policy that knows no worth ignores it.
        """
