"""Going over all strands: listed once under the index's lock, then a batch at a time, so that others get a turn between.

A caller pauses between batches: for threads that may wait. A listed strand that has gone meanwhile has no blocks and is in
no tier; one that is new is not listed.
"""

from collections.abc import Callable, Iterator
from threading import Event, Lock
from typing import Final, NamedTuple, TypeVar

from tierkv.keys import Key
from tierkv.lease import Lease
from tierkv.strands import Strand
from tierkv.tree import Tree

BATCH: Final = 256
"""Strands of a batch: 2 to 6 ms under the lock, as long as it takes to list 15,000."""
PAUSE_S: Final = 1e-4
"""Between two batches. Who waits for a lock wakes only after it is free: without a pause it is taken again by then."""

Listed = TypeVar("Listed")


class Guarded(NamedTuple):
    """A tree, and the lock that everybody takes for it."""

    tree: Tree
    lock: Lock


def batches(listed: list[Listed]) -> Iterator[list[Listed]]:
    """Parts of a list, the last one first; each is taken off. Whoever asks for the next one does not hold the lock.

    What a caller forgets goes with its part: 15,000 strands that go at once stop every thread for tens of milliseconds.
    """
    while listed:
        yield listed[-BATCH:]
        del listed[-BATCH:]
        if listed:
            Event().wait(PAUSE_S)


def keep_all(of: Guarded, tier: int, below: int | None, lease: Callable[[Strand, int, int, int], Lease]) -> list[Lease]:
    """See `Index.keep_all`.  lease: of a strand's blocks [lo, hi), pinned in tiers that are given as bits."""
    tree, lock = of
    with lock:
        listed = list(tree.strands())[::-1]
    leases: list[Lease] = []
    for batch in batches(listed):
        with lock:
            for strand in reversed(batch):
                leases += [lease(strand, lo, hi, 1 << tier) for lo, hi in tree.held_not_below(strand, tier, below)]
    return leases


def held_by_root(of: Guarded) -> dict[Key, int]:
    """See `Index.held_by_root`."""
    tree, lock = of
    with lock:
        listed = [(key, strand) for key, root in tree.roots.items() for strand in tree.strands([root])]
    found: dict[Key, int] = {}
    for key, strand in listed:  # without the lock: a count that changes meanwhile may be the old or the new one
        held = max((holding.count for holding in strand.holdings if holding), default=0)
        found[key] = found.get(key, 0) + held
    with lock:
        return {key: found.get(key, 0) for key in tree.roots}
