"""Which blocks are known, on which path: everything of the tree that no tier is asked for but what it holds. Not thread-safe.

A block stays known as long as something needs it: a tier that holds it or expects a copy, a lease or want whose path covers
it, or a descendant that one of these keeps. A block that no tier holds is a ghost; it keeps its children findable. Once
nothing needs it any more it is history: of those the `history_blocks` used last stay known, and nothing else is different
for them.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final

from tierkv import fates
from tierkv.keys import KEY_BYTES, Key
from tierkv.layout import TOKEN_BYTES
from tierkv.names import Names
from tierkv.policies.base import Observer
from tierkv.policies.lru import LruPolicy
from tierkv.strands import HISTORY, Fork, Strand, agree, common, same

MAX_HEADS: Final = 16
"""Strands that are looked at for a head: where many hang, most may be history."""


class Paths:
    """Strands by namespace. `num_strands` and `num_blocks` (ghosts included) count them, roots apart.

    num_past: blocks that nothing needs, at most `history_blocks`.  clock: counts uses.  now_s: the latest time that a caller
    told.  names: every key that is known, if blocks are to be found by key.
    """

    def __init__(
        self,
        *,
        block_tokens: int,
        num_tiers: int,
        observer: Observer | None,
        history_blocks: int,
        names: Names | None,
    ) -> None:
        self.block_tokens = block_tokens
        self.block_bytes = block_tokens * TOKEN_BYTES
        self.num_tiers = num_tiers
        self.roots: dict[Key, Strand] = {}
        self.clock = 0
        self.now_s = 0.0
        self.observer = observer
        self.num_strands = 0
        self.num_blocks = 0
        self.num_past = 0
        self.history_blocks = history_blocks
        self.history = LruPolicy(tier=HISTORY)
        self.names = names

    # -- finding ---------------------------------------------------------------------------------------------------

    def root(self, key: Key) -> Strand:
        """The root of a namespace; it goes when nothing hangs on it and no lease is at it."""
        root = self.roots.get(key)
        if root is None:
            root = self.roots[key] = Strand(None, 0, b"", 0, 0, self.num_tiers)
            root.keys += key
        return root

    def follow(self, strand: Strand, end: int, query: bytes) -> list[tuple[Strand, int]]:
        """Strands that `query` passes after the path (strand, end), ghosts too, each with the end of the part used."""
        path = []
        block_bytes = self.block_bytes
        pos, last = 0, len(query) - block_bytes
        while pos <= last:
            child = None
            children = strand.children
            if end < strand.size:
                if not end and query.startswith(strand.tok, pos):
                    count = strand.size
                elif children and len(children) <= 4 and (turn := self._turn(strand, end, query, pos)):
                    count, child = turn
                else:
                    count = agree(strand.tok, end * block_bytes, query, pos, block_bytes)
                end += count
                pos += count * block_bytes
            if child is None:
                child = strand.child(end, query[pos : pos + block_bytes]) if children and pos <= last else None
                if child is None:
                    break
            path.append((strand, end))
            strand, end = child, 0
        path.append((strand, end))
        return path

    def _turn(self, strand: Strand, end: int, query: bytes, pos: int) -> tuple[int, Strand] | None:
        """The child that the query takes, and the blocks before it: where few hang, cheaper than to look for where it departs."""
        block_bytes = self.block_bytes
        for at, found in (strand.children or {}).items():
            if at > end:
                size = (at - end) * block_bytes
                first = query[pos + size : pos + size + block_bytes]
                child = found if type(found) is Strand and found.tok.startswith(first) else strand.child(at, first)
                if child and len(first) == block_bytes and same(strand.tok, end * block_bytes, query, pos, size):
                    return at - end, child
        return None

    def sources(self, strand: Strand, lo: int, hi: int) -> Iterator[tuple[int, int, int]]:
        """The fastest tier of each block of [lo, hi), as runs, up to the first block that no tier holds."""
        holdings = strand.holdings
        while lo < hi:
            for tier, holding in enumerate(holdings):
                end = holding.run(lo, hi) if holding else lo
                if end > lo:
                    for faster in holdings[:tier]:
                        if faster:
                            end = faster.first(lo, end)
                    yield tier, lo, end
                    lo = end
                    break
            else:
                return

    def held(self, path: list[tuple[Strand, int]]) -> int:
        """Cut `path` after the leading blocks that some tier holds; returns the tiers they come from, as bits."""
        tiers = 0
        for number, (strand, end) in enumerate(path):
            first = strand.holdings[0]
            if first and end <= first.count == len(first.state):  # the usual case: no gap, and nothing else to ask
                tiers |= 1
                continue
            at = 0
            for tier, _, hi in self.sources(strand, 0, end):
                tiers |= 1 << tier
                at = hi
            if at < end:
                del path[number + (1 if at else 0) :]
                if at:
                    path[number] = (strand, at)
                break
        return tiers

    def segments(self, strand: Strand, end: int, lo: int, hi: int) -> list[tuple[Strand, int, int]]:
        """Blocks [lo, hi) of the path (strand, end), as ranges of strands."""
        found = []
        while hi > lo:
            depth = strand.depth
            if hi > depth:
                found.append((strand, max(lo - depth, 0), min(end, hi - depth)))
                hi = depth
            assert strand.parent is not None
            end, strand = strand.at, strand.parent
        found.reverse()
        return found

    def locate(self, strand: Strand, end: int, num_blocks: int) -> tuple[Strand, int]:
        """The end of the leading `num_blocks` of the path (strand, end)."""
        while strand.parent and strand.depth >= num_blocks:
            strand, end = strand.parent, strand.at
        return strand, min(end, num_blocks - strand.depth)

    def head(self, strand: Strand, end: int, rest: bytes) -> tuple[Strand, int, int] | None:
        """The held block after the path (strand, end) that agrees longest with `rest`: its strand, its number, the tokens."""
        size = self.block_bytes
        best, shared = None, 0
        if end < strand.size and strand.tier_of(end) is not None:
            shared = common(bytes(strand.tok[end * size : (end + 1) * size]), rest)
            if shared:
                best = (strand, end, shared)
        found = strand.children.get(end) if strand.children else None
        if type(found) is Strand:
            nearest: Iterable[tuple[int, Strand]] = ((common(bytes(found.tok[:size]), rest), found),)
        else:
            nearest = found.nearest(rest) if isinstance(found, Fork) else ()
        for agreed, child in islice(nearest, MAX_HEADS):
            if agreed <= shared:
                break
            if child.tier_of(0) is not None:
                return child, 0, agreed
        return best

    # -- growing and trimming --------------------------------------------------------------------------------------

    def grow(self, strand: Strand, end: int, tokens: bytes) -> tuple[Strand, int]:
        """Add blocks after the path (strand, end), where none agrees; returns the new end. The caller grips or fills them."""
        size = len(tokens) // self.block_bytes
        self.num_blocks += size
        self.num_past += size
        if end == strand.size and strand.parent:
            strand.tok += tokens
            strand.size += size
            strand.past += size
            strand.stamps.grow(strand.size, 0)
            return strand, strand.size
        child = Strand(strand, end, tokens, size, 0, self.num_tiers)
        strand.hang(child, tokens[: self.block_bytes])
        self.num_strands += 1
        return child, size

    def use(self, strand: Strand, end: int) -> None:
        """The path (strand, end) is used now."""
        clock = self.clock
        while strand.parent:
            strand.stamps.cover(end, clock)
            end, strand = strand.at, strand.parent

    def grip(self, strand: Strand, end: int) -> None:
        """Keep the path (strand, end) in the tree."""
        holds = strand.holds
        if holds is None:
            strand.holds = {end: 1}
        else:
            holds[end] = holds.get(end, 0) + 1
        if strand.past:
            self._need(strand, end)

    def loosen(self, strand: Strand, end: int) -> None:
        """Undo one `grip`."""
        holds = strand.holds
        assert holds is not None
        if holds[end] > 1:
            holds[end] -= 1
            return
        del holds[end]
        if not holds:
            strand.holds = None
        self.trim(strand)

    def _need(self, strand: Strand, end: int) -> None:
        """Something needs the path (strand, end), which may have been history."""
        while strand.parent:
            before = strand.size - strand.past
            if end <= before:
                return
            strand.past = strand.size - end
            self.num_past -= end - before
            if before:
                return
            parent, at = strand.parent, strand.at
            assert parent.children
            found = parent.children[at]
            if isinstance(found, Fork):
                found.needed += 1
            strand, end = parent, at

    def trim(self, strand: Strand) -> None:
        """As `spare`, and forget what is too much history then."""
        self.spare(strand)
        if self.num_past > self.history_blocks:
            self.bound_history()

    def spare(self, strand: Strand) -> None:
        """See what nothing needs any more: the tail of this strand, then of its parents. It becomes history."""
        while strand.parent and strand.size:  # none: it has been taken off before
            before = strand.size - strand.past
            needed = self._needed(strand, before)
            if needed == strand.size:
                break
            if needed < before:
                strand.past = strand.size - needed
                self.num_past += before - needed
            if not needed and before:
                found = (strand.parent.children or {})[strand.at]
                if isinstance(found, Fork):
                    found.needed -= 1
            if strand.past:
                if self.history_blocks:
                    self.history.offer(strand)
                else:
                    self._cut(strand, needed)
            if needed:
                break
            strand = strand.parent
        self.drop_root(strand)

    def bound_history(self) -> None:
        """Forget the oldest history, as much as is too much."""
        while self.num_past > self.history_blocks:
            victim = self.history.pop()
            assert victim and isinstance(victim.strand, Strand)
            self._forget_past(victim.strand, victim.blocks)

    def _needed(self, strand: Strand, before: int) -> int:
        """Leading blocks that something needs; it was `before`, and has not risen since."""
        needed = 0
        for holding in strand.holdings:
            if holding and len(holding.state) > needed:
                needed = len(holding.state)
        if needed < before:
            if strand.holds:
                needed = max(needed, *strand.holds)
            for at, found in (strand.children or {}).items():
                if at > needed and found.needed:
                    needed = at
        return needed

    def _forget_past(self, strand: Strand, blocks: int) -> None:
        """Take the last `blocks` out of the tree, or as many as are too many, and see what may go next."""
        parent = strand.parent
        assert parent
        self._cut(strand, max(strand.size - blocks, strand.size - (self.num_past - self.history_blocks)))
        if strand.size:
            self.history.offer(strand)
        elif parent.parent:
            self.history.offer(parent)
        else:
            self.drop_root(parent)

    def cut_past(self, strand: Strand) -> None:
        """Take what is history of a strand, and has nothing hanging on it, out of the tree; and then of its parents."""
        while strand.parent:
            lo, hi = strand.span(HISTORY)
            if lo == hi:
                return
            self._cut(strand, lo)
            self.history.withdraw(strand)
            if strand.size:
                return
            strand = strand.parent
        self.drop_root(strand)

    def _cut(self, strand: Strand, size: int) -> None:
        """Take the blocks from `size` on, which are all history, out of the tree."""
        gone = strand.size - size
        if self.names:
            self.names.remove(strand, size)
        self.num_blocks -= gone
        self.num_past -= gone
        strand.past -= gone
        strand.size = size
        if size:
            del strand.tok[size * self.block_bytes :], strand.keys[size * KEY_BYTES :]
            strand.stamps.cut(size)
            strand.again = min(strand.again, size)
            if strand.fates:
                fates.cut(strand)
        else:
            self.num_strands -= 1
            if self.history_blocks:
                self.history.withdraw(strand)
            assert strand.parent
            strand.parent.unhang(strand, bytes(strand.tok[: self.block_bytes]))
        if self.observer:
            self.observer.gone(strand, size)

    def drop_root(self, strand: Strand) -> None:
        """Forget a namespace that nothing hangs on."""
        if not strand.parent and not strand.children and not strand.holds:
            self.roots.pop(Key(bytes(strand.keys)), None)

    def strands(self, roots: Iterable[Strand] | None = None) -> Iterator[Strand]:
        """Every strand but the roots, parents first; those of all roots, or of these."""
        stack = list(self.roots.values() if roots is None else roots)
        while stack:
            strand = stack.pop()
            if strand.parent:
                yield strand
            if strand.children:
                stack.extend(strand.offspring())
