"""What an index can tell of blocks, held or not: where they are, and how they left."""

from typing import NamedTuple


class Fate(NamedTuple):
    """How blocks left a tier. at_s: on the clock of the index's callers.  why: the policy that chose them, or a reason."""

    tier: int
    at_s: float
    why: str


class Known(NamedTuple):
    """What is known of blocks [lo, hi) of a path.

    tiers: that hold them, the fastest first.  fates: how they left others, the latest first.  known: False for blocks that the
    index never had, or remembers no more.
    """

    lo: int
    hi: int
    tiers: tuple[int, ...] = ()
    fates: tuple[Fate, ...] = ()
    known: bool = True
