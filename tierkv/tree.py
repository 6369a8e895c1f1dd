"""The tree of strands with its tiers' rooms: everything that spans several strands. Not thread-safe: index.py locks.

Three things keep a block of a strand:
- in the *tree*: a tier that holds it or expects a copy, a lease or want whose path covers it, or a descendant that one of
  these keeps. A block that no tier holds is a ghost; it keeps its children findable. Once nothing needs it any more it is
  history: of those the `history_blocks` used last stay known, and nothing else is different for them.
- in a *tier*: a pin at or below it, or anything alive in that tier below it. So each tier forgets leaf first, and a lease
  protects its whole path by one pin at its end.
Only changes between nothing and something travel to the parent, so pins and copies cost O(1) on the usual path.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from math import inf
from typing import Final

from tierkv import fates
from tierkv.keys import KEY_BYTES, Key
from tierkv.layout import TOKEN_BYTES
from tierkv.policies.base import Observer, Victim
from tierkv.policies.lru import LruPolicy
from tierkv.rooms import Room, TierSpec
from tierkv.strands import ABSENT, HELD, HISTORY, PENDING, Fork, Holding, Strand, agree, common, same
from tierkv.wants import Want, claim, wanted

MAX_HEADS: Final = 16
"""Strands that are looked at for a head: where many hang, most may be history."""


class Tree:
    """Strands by namespace. `num_strands` and `num_blocks` (ghosts included) count them, roots apart.

    num_past: blocks that nothing needs, at most `history_blocks`.  now_s: the latest time that a caller told.
    """

    def __init__(
        self,
        *,
        block_tokens: int,
        tiers: Sequence[TierSpec],
        observer: Observer | None = None,
        history_blocks: int = 0,
    ) -> None:
        self.block_bytes = block_tokens * TOKEN_BYTES
        self.rooms = [Room(spec) for spec in tiers]
        self.learners = [(tier, spec.policy) for tier, spec in enumerate(tiers) if spec.policy.learns]
        self.roots: dict[Key, Strand] = {}
        self.clock = 0
        self.now_s = 0.0
        self.observer = observer
        self.num_strands = 0
        self.num_blocks = 0
        self.num_past = 0
        self.history_blocks = history_blocks
        self.history = LruPolicy(tier=HISTORY)
        self.wants: dict[int, Want] = {}
        self.waiting: dict[tuple[Strand, int, bytes], list[Want]] = {}  # those that cover all before a block, not it

    # -- finding ---------------------------------------------------------------------------------------------------

    def root(self, key: Key) -> Strand:
        """The root of a namespace; it goes when nothing hangs on it and no lease is at it."""
        root = self.roots.get(key)
        if root is None:
            root = self.roots[key] = Strand(None, 0, b"", 0, 0, len(self.rooms))
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
        child = Strand(strand, end, tokens, size, 0, len(self.rooms))
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
        self._drop_root(strand)
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
            self._drop_root(parent)

    def _cut(self, strand: Strand, size: int) -> None:
        """Take the blocks from `size` on, which are all history, out of the tree."""
        gone = strand.size - size
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

    def _drop_root(self, strand: Strand) -> None:
        """Forget a namespace that nothing hangs on."""
        if not strand.parent and not strand.children and not strand.holds:
            self.roots.pop(Key(bytes(strand.keys)), None)

    # -- what requests want ----------------------------------------------------------------------------------------

    def want(self, want: Want) -> None:
        """Let a want that grips the path so far cover what is known of its prompt now."""
        strand, end, size = want.strand, want.end, self.block_bytes
        path = self.follow(strand, end, want.tokens[(strand.depth + end) * size :])
        for part, covered in path:
            if covered:
                if part.wants is None:
                    part.wants = {}
                part.wants[want.serial] = covered
                self._reclaim(part)
        want.strand, want.end = path[-1]
        self.grip(want.strand, want.end)
        self.loosen(strand, end)
        if at := want.awaits(size):
            self.waiting.setdefault(at, []).append(want)

    def arrived(self, strand: Strand, end: int, first: bytes) -> None:
        """The block `first` follows the path (strand, end) now."""
        for want in self.waiting.pop((strand, end, first), ()):
            self.want(want)

    def unwant(self, want: Want) -> None:
        """Undo a want."""
        if at := want.awaits(self.block_bytes):
            others = self.waiting[at]
            others.remove(want)
            if not others:
                del self.waiting[at]
        for part, _, _ in self.segments(want.strand, want.end, 0, want.strand.depth + want.end):
            assert part.wants
            del part.wants[want.serial]
            part.wants = part.wants or None
            self._reclaim(part)
        self.loosen(want.strand, want.end)

    def _reclaim(self, strand: Strand) -> None:
        """Other requests want the strand now: see where its tail belongs, where it is parked."""
        for tier, room in enumerate(self.rooms):
            if strand in room.parked:
                lo, hi = strand.span(tier)
                if lo < hi <= wanted(strand):
                    room.parked.park(strand, claim(strand, hi)[0])
                else:
                    self.offer(strand, tier)

    # -- what tiers hold -------------------------------------------------------------------------------------------

    def pin(self, strand: Strand, end: int, tier: int) -> None:
        """Keep what the tier has of the path (strand, end), held or not yet."""
        if not strand.parent:
            return
        holding = self._holding(strand, tier)
        was_alive = holding.alive
        pins = holding.pins
        if pins is None:
            holding.pins = {end: 1}
        else:
            pins[end] = pins.get(end, 0) + 1
        if not was_alive:
            self._wake(strand, tier)

    def unpin(self, strand: Strand, end: int, tier: int) -> None:
        """Undo one `pin`."""
        if not strand.parent:
            return
        holding = strand.holdings[tier]
        assert holding and holding.pins
        pins = holding.pins
        if pins[end] > 1:
            pins[end] -= 1
            return
        del pins[end]
        if not pins:
            holding.pins = None
        self._changed(strand, tier)

    def expect(self, strand: Strand, lo: int, hi: int, tier: int) -> None:
        """Blocks [lo, hi) are on their way to the tier; the caller has pinned a path that covers them."""
        self._holding(strand, tier).mark(lo, hi, PENDING)

    def hold(self, strand: Strand, lo: int, hi: int, tier: int, places: Sequence[int]) -> None:
        """The tier holds blocks [lo, hi), in places taken before; the caller has pinned a path that covers them."""
        room = self.rooms[tier]
        room.fill(places, hi - lo)
        if strand.past:
            self._need(strand, hi)
        holding = self._holding(strand, tier)
        was_alive = holding.alive
        holding.mark(lo, hi, HELD)
        if holding.places is not None:
            holding.places[lo:hi] = array("i", places)
        if room.policy.learns:
            room.policy.record(strand, lo, hi, self.clock)
        if not was_alive:
            self._wake(strand, tier)

    def forget(self, strand: Strand, lo: int, hi: int, tier: int) -> list[int]:
        """The tier does not hold (or expect) blocks [lo, hi) any more; held ones leave their places taken."""
        holding = strand.holdings[tier]
        assert holding
        held = holding.state[lo] == HELD
        places = holding.places[lo:hi].tolist() if holding.places is not None and held else []
        holding.mark(lo, hi, ABSENT)
        if held:
            self.rooms[tier].empty(places, hi - lo)
        self._changed(strand, tier)
        self.trim(strand)
        return places

    def evict(self, tier: int, count: int, victims: list[Key], *, below: float = inf) -> int:
        """Forget up to `count` blocks in the order of the tier's policy, as long as they are worth less than `below`.

        Returns how many. Their places are free. Keys of blocks that are not placed are added to `victims`.
        """
        room = self.rooms[tier]
        done = 0
        while done < count:
            victim = self.victim(tier, below=below)
            if victim is None:
                break
            strand = victim.strand
            assert isinstance(strand, Strand)
            lo, hi = strand.span(tier)
            lo = max(lo, hi - min(victim.blocks, count - done))
            if lo == hi:
                continue
            if not room.placed:
                victims.extend(strand.key(block) for block in range(lo, hi))
            room.lost += self._only(strand, lo, hi, tier)
            room.evicted += hi - lo
            done += hi - lo
            room.policy.forgot(strand, hi - lo)
            holding = strand.holdings[tier]
            assert holding
            room.clear(holding.places[lo:hi] if holding.places is not None else (), hi - lo)
            holding.mark(lo, hi, ABSENT)
            self._changed(strand, tier)
            self.trim(strand)
            self.note(strand, lo, hi, tier, room.policy.name)
        return done

    def note(self, strand: Strand, lo: int, hi: int, tier: int, why: str) -> None:
        """Remember how blocks [lo, hi), as far as they are still known, left the tier."""
        if lo < strand.size:
            fates.note(strand, lo, hi, fates.Fate(tier, self.now_s, why))

    def victim(self, tier: int, *, below: float = inf) -> Victim | None:
        """What to forget next: what the policy names and no request wants; or else what the last queued request wants."""
        room = self.rooms[tier]
        while victim := room.policy.pop(below):
            strand = victim.strand
            assert isinstance(strand, Strand)
            if not strand.wants:
                return victim
            lo, hi = strand.span(tier)
            end = wanted(strand)
            if end < hi:
                return Victim(strand, min(victim.blocks, hi - max(lo, end)))
            if lo < hi:
                room.parked.park(strand, claim(strand, hi)[0])
        while below == inf and (parked := room.parked.pop()):
            lo, hi = parked.span(tier)
            if lo < hi:
                return Victim(parked, hi - max(lo, claim(parked, hi)[1]))
        return None

    def goes_with(self, strand: Strand, blocks: int, tier: int, below: int | None) -> Iterator[tuple[Strand, int, int]]:
        """Ranges that are not below yet, last first, of what goes when this victim goes: its tail, and then whatever
        above it was used last together with it; or else the next part of the strand.
        """
        span = strand.span(tier)
        tail = max(span[0], span[1] - blocks)
        while span[0] < span[1]:
            ranges = [(span[0], span[1])]
            if under := strand.holdings[below] if below is not None else None:
                ranges = list(under.absent(*span))[::-1]
            if ranges and ranges[0][1] <= tail:
                lo, hi = ranges[0]
                tail = max(lo, strand.stamp_start(hi - 1))
            for lo, hi in ranges:
                if hi > tail:
                    yield strand, max(lo, tail), hi
            parent = strand.parent
            if tail > 0 or parent is None or not (above := parent.holdings[tier]):
                return
            assert above.hang
            if max(above.hang) != strand.at or above.hang[strand.at] > 1:
                return
            span = above.span(floor=max((at for at in above.hang if at != strand.at), default=0))
            if span[0] == span[1] or parent.stamp(span[1] - 1) != strand.stamp(0):
                return
            strand, tail = parent, max(span[0], parent.stamp_start(span[1] - 1))

    def _only(self, strand: Strand, lo: int, hi: int, tier: int) -> int:
        """How many blocks of [lo, hi) no other tier holds."""
        if len(strand.holdings) == 1:
            return hi - lo
        others = [holding.state for at, holding in enumerate(strand.holdings) if holding and at != tier]
        if not others:
            return hi - lo
        if len(others) == 1:
            return hi - lo - others[0].count(HELD, lo, hi)
        return sum(all(state[at : at + 1] != b"\1" for state in others) for at in range(lo, hi))

    def _holding(self, strand: Strand, tier: int) -> Holding:
        holding = strand.holdings[tier]
        if holding is None:
            holding = strand.holdings[tier] = Holding(placed=self.rooms[tier].placed)
        return holding

    def _changed(self, strand: Strand, tier: int) -> None:
        """Something that kept blocks of this strand in the tier has gone."""
        holding = strand.holdings[tier]
        assert holding
        if not (holding.count or holding.pins or holding.hang):
            self._sleep(strand, tier)
        elif holding.count:
            self.offer(strand, tier)

    def offer(self, strand: Strand, tier: int) -> None:
        """Tell the policy if the strand has something to forget."""
        lo, hi = strand.span(tier)
        if lo < hi:
            room = self.rooms[tier]
            if room.parked:
                room.parked.take(strand)
            room.policy.offer(strand)

    def _wake(self, strand: Strand, tier: int) -> None:
        """The strand has become alive in the tier: what is above it must stay."""
        while strand.parent and strand.parent.parent:
            parent, at = strand.parent, strand.at
            holding = self._holding(parent, tier)
            was_alive = holding.alive
            if holding.hang is None:
                holding.hang = {at: 1}
            else:
                holding.hang[at] = holding.hang.get(at, 0) + 1
            holding.floor = max(holding.floor, at)
            if was_alive:
                return
            strand = parent

    def _sleep(self, strand: Strand, tier: int) -> None:
        """The strand is not alive in the tier any more."""
        while True:
            strand.holdings[tier] = None
            self.rooms[tier].parked.take(strand)
            self.rooms[tier].policy.withdraw(strand)
            parent, at = strand.parent, strand.at
            if parent is None or not parent.parent:
                return
            holding = parent.holdings[tier]
            assert holding and holding.hang
            if holding.hang[at] > 1:
                holding.hang[at] -= 1
                return
            del holding.hang[at]
            if not holding.hang:
                holding.hang, holding.floor = None, 0
            elif at == holding.floor:
                holding.floor = max(holding.hang)
            if holding.alive:
                self.offer(parent, tier)
                return
            strand = parent

    def strands(self) -> Iterator[Strand]:
        """Every strand but the roots, parents first."""
        stack = [child for root in self.roots.values() for child in root.offspring()]
        while stack:
            strand = stack.pop()
            yield strand
            stack.extend(strand.offspring())
