"""From what a tier still holds after a stop to strands again."""

from collections.abc import Iterable
from threading import Lock

from tierkv.keys import Key, chain
from tierkv.layout import TOKEN_BYTES
from tierkv.strands import Strand
from tierkv.tiers.base import Run
from tierkv.tree import Tree


class Recovery:
    """One restoring of one tier. Runs come in any order; each is put after the block that its parent key names."""

    def __init__(self, tree: Tree, tier: int) -> None:
        self._tree = tree
        self._tier = tier
        self._orphans: list[Run] = []
        self._touched: dict[Strand, None] = {}

    def run(self, runs: Iterable[Run], lock: Lock) -> list[Run]:
        """Take the runs in, under the lock but for the hashing; returns those that found no place."""
        tree, waiting = self._tree, self._sound(runs)
        with lock:
            ends = [(root, tree.root(root), 0) for root in {run.root for runs in waiting.values() for run in runs}]
            for strand in tree.strands():
                ends += [(key, strand, at + 1) for at in range(strand.num_keys) if (key := strand.key(at)) in waiting]
            self._touched.update((strand, None) for _, strand, _ in ends)
            while ends:
                parent, strand, end = ends.pop()
                for run in waiting.pop(parent, ()):
                    before = strand.depth + end
                    for part, lo, hi in self._adopt(strand, end, run):
                        keys = run.keys[part.depth + lo - before : part.depth + hi - before]
                        ends += [(key, part, lo + at + 1) for at, key in enumerate(keys) if key in waiting]
            for strand in self._touched:
                tree.trim(strand)
                tree.offer(strand, self._tier)
        return self._orphans + [run for runs in waiting.values() for run in runs]

    def _sound(self, runs: Iterable[Run]) -> dict[Key, list[Run]]:
        """Runs whose keys are what their parent and tokens say, by parent. A key that lies names another prompt's KV."""
        waiting: dict[Key, list[Run]] = {}
        block_tokens = self._tree.block_bytes // TOKEN_BYTES
        for run in runs:
            if run.keys and chain(run.parent, run.tokens, block_tokens=block_tokens) == list(run.keys):
                waiting.setdefault(run.parent, []).append(run)
            else:
                self._orphans.append(run)
        return waiting

    def _adopt(self, strand: Strand, end: int, run: Run) -> list[tuple[Strand, int, int]]:
        """Put a run after the path (strand, end), as far as there is room; returns where it is now."""
        tree, room, size = self._tree, self._tree.rooms[self._tier], self._tree.block_bytes
        start = strand.depth + end
        last, last_end = known_end = tree.follow(strand, end, run.tokens)[-1]
        known = last.depth + last_end - start
        fits = room.num_free - sum(b - a for a, b in self._absent(tree.segments(last, last_end, start, start + known)))
        count = min(len(run.keys), known + max(fits, 0))
        if known < count:
            last, last_end = tree.grow(last, last_end, run.tokens[known * size : count * size])
        placed = []
        count = 0
        for part, lo, hi in tree.segments(last, last_end, start, last.depth + last_end):
            end = self._hold(part, lo, hi)
            self._touched[part] = None
            tree.name(part, b"".join(run.keys[part.depth + part.num_keys - start : part.depth + end - start]))
            placed.append((part, lo, end))
            count = part.depth + end - start
            if end < hi:
                break
        if known < count:
            tree.arrived(*known_end, run.tokens[known * size : (known + 1) * size])
        if count < len(run.keys):
            parent = run.keys[count - 1] if count else run.parent
            left = Run(run.root, parent, run.depth + count, run.keys[count:], run.tokens[count * size :])
            self._orphans.append(left)
        return placed

    def _absent(self, segments: list[tuple[Strand, int, int]]) -> list[tuple[int, int]]:
        """What the tier neither holds nor expects, as ranges within the strands."""
        found: list[tuple[int, int]] = []
        for strand, lo, hi in segments:
            holding = strand.holdings[self._tier]
            found += holding.absent(lo, hi) if holding else ((lo, hi),)
        return found

    def _hold(self, strand: Strand, lo: int, hi: int) -> int:
        """Let the tier hold blocks [lo, hi); returns where the room ends."""
        room = self._tree.rooms[self._tier]
        for a, b in self._absent([(strand, lo, hi)]):
            fits = min(b - a, room.num_free)
            if fits:
                room.take(fits)
                self._tree.hold(strand, a, a + fits, self._tier, ())
            if fits < b - a:
                return a + fits
        return hi
