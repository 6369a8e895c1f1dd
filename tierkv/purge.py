"""Forgetting on request, which no policy chooses: namespaces, or what was not used for long; a batch of strands at a time.

Every batch leaves the tree as any other call does. What comes between two of them: blocks that were not known when the call
began stay, and so does what is above them; all others go as they stand at their turn.
"""

from collections.abc import Collection
from math import inf
from typing import Final

from tierkv.keys import Key
from tierkv.lease import Purged
from tierkv.strands import Strand
from tierkv.tree import Tree
from tierkv.walks import Guarded, batches

REASON: Final = "forgotten"
"""Why such blocks are not held (see `Index.explain`)."""


def purge(of: Guarded, roots: Collection[Key] | None, until: float) -> Purged:
    """See `Index.purge`."""
    tree, lock = of
    with lock:
        wanted = tree.roots.keys() if roots is None else roots
        starts = [root for key in wanted if (root := tree.roots.get(key))]
        listed = [(strand, strand.size) for strand in tree.strands(starts)]
    evicted = [0] * len(tree.rooms)
    victims: list[list[Key]] = [[] for _ in tree.rooms]
    for batch in batches(listed):
        with lock:
            for strand, size in reversed(batch):  # what hangs on a strand goes before it
                before = sum(evicted)
                for tier in range(len(tree.rooms)):
                    if strand.span(tier)[1] <= size:  # else its last blocks are new
                        evicted[tier] += _forget(tree, strand, tier, until, victims[tier])
                if sum(evicted) > before:
                    tree.spare(strand)
                if strand.past and until == inf:
                    tree.cut_past(strand)
            tree.bound_history()
    return Purged(tuple(evicted), [key for keys in victims for key in keys])


def _forget(tree: Tree, strand: Strand, tier: int, until: float, victims: list[Key]) -> int:
    """Let the tier forget what it may of a strand, run by run from the tail; returns how many blocks."""
    count = 0
    while True:
        lo, hi = strand.span(tier)
        first = hi
        while first > lo and strand.stamp(first - 1) <= until:  # stamps never rise: what is old is a tail
            first = max(lo, strand.stamp_start(first - 1))
        if first == hi:
            return count
        tree.clear(strand, first, hi, tier, victims)
        tree.note(strand, first, hi, tier, REASON)
        count += hi - first
