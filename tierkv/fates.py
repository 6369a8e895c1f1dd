"""What an index can tell of blocks, held or not: where they are, and how they left. Not thread-safe: index.py locks.

A strand keeps how its blocks left, latest last, as ranges; a range that a later one of the same tier covers is forgotten.
What a tier has taken in again since is told by what it holds, so nothing is done for it.
"""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from tierkv.strands import Strand

MAX_FATES: Final = 4
"""Ranges that a strand remembers per tier. One more: the oldest two become one, with the later time; or the oldest goes."""


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


def note(strand: Strand, lo: int, hi: int, fate: Fate) -> None:
    """Blocks [lo, hi) of a strand have left a tier; those that are not known any more do not count."""
    hi = min(hi, strand.size)
    if lo >= hi:
        return
    fates = strand.fates
    if fates is None:
        strand.fates = [(lo, hi, fate)]
        return
    a, b, last = fates[-1]
    if last == fate and (a == hi or b == lo):
        fates[-1] = (min(a, lo), max(b, hi), fate)
        return
    fates[:] = [other for other in fates if other[2].tier != fate.tier or other[0] < lo or other[1] > hi]
    fates.append((lo, hi, fate))
    same = [at for at, (_, _, other) in enumerate(fates) if other.tier == fate.tier]
    if len(same) > MAX_FATES:
        (a, b, old), (c, d, new) = fates[same[0]], fates[same[1]]
        if old.why == new.why and a <= d and c <= b:
            fates[same[1]] = (min(a, c), max(b, d), new)
        del fates[same[0]]


def cut(strand: Strand) -> None:
    """Forget what became of blocks that the strand does not have any more."""
    size = strand.size
    strand.fates = [(lo, min(hi, size), fate) for lo, hi, fate in strand.fates or () if lo < size] or None


def explain(path: Sequence[tuple[Strand, int]], num_blocks: int) -> list[Known]:
    """What is known of the leading `num_blocks` of a prompt, in order. path: of those that are known, from a root on."""
    found: list[Known] = []
    for strand, end in path:
        for part in _parts(strand, end):
            if found and found[-1][2:] == part[2:]:
                part = part._replace(lo=found.pop().lo)
            found.append(part)
    known = found[-1].hi if found else 0
    if known < num_blocks:
        found.append(Known(known, num_blocks, known=False))
    return found


def _parts(strand: Strand, end: int) -> Iterator[Known]:
    """The leading blocks of a strand, wherever something changes a new part; numbered along the path."""
    bounds = {0, end}
    for holding in strand.holdings:
        bounds.update(*(holding.runs(0, end) if holding else ()))
    for lo, hi, _ in strand.fates or ():
        bounds |= {lo, hi} if hi <= end else {lo, end} if lo < end else set()
    lo = 0
    for hi in sorted(bounds)[1:]:
        tiers = tuple(tier for tier, holding in enumerate(strand.holdings) if holding and holding.run(lo, hi) == hi)
        left: dict[int, Fate] = {}
        for a, b, fate in reversed(strand.fates or ()):
            if a <= lo < b and fate.tier not in tiers:
                left.setdefault(fate.tier, fate)
        yield Known(strand.depth + lo, strand.depth + hi, tiers, tuple(left.values()))
        lo = hi
