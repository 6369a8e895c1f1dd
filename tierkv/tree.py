"""The tree of strands with its tiers' rooms: what tiers hold of the known paths. Not thread-safe: index.py locks.

A block stays in a *tier* by a pin at or below it, or by anything alive in that tier below it. So each tier forgets leaf first,
and a lease protects its whole path by one pin at its end. What keeps it in the tree, in no tier, is in paths.py.
Only changes between nothing and something travel to the parent, so pins and copies cost O(1) on the usual path.
"""

from array import array
from collections.abc import Iterator, Sequence
from math import inf

from tierkv import fates
from tierkv.keys import KEY_BYTES, Key
from tierkv.names import Listener, Names
from tierkv.paths import Paths
from tierkv.policies.base import Observer, Victim
from tierkv.rooms import Room, TierSpec
from tierkv.strands import ABSENT, HELD, PENDING, Holding, Strand
from tierkv.wants import Want, claim, wanted


class Tree(Paths):
    """Known paths, and the rooms of the tiers that hold parts of them."""

    def __init__(
        self,
        *,
        block_tokens: int,
        tiers: Sequence[TierSpec],
        observer: Observer | None = None,
        history_blocks: int = 0,
        names: Names | None = None,
        listener: Listener | None = None,
    ) -> None:
        super().__init__(
            block_tokens=block_tokens,
            num_tiers=len(tiers),
            observer=observer,
            history_blocks=history_blocks,
            names=names,
        )
        self.listener = listener
        self.rooms = [Room(spec) for spec in tiers]
        self.learners = [(tier, spec.policy) for tier, spec in enumerate(tiers) if spec.policy.learns]
        self.wants: dict[int, Want] = {}
        self.waiting: dict[tuple[Strand, int, bytes], list[Want]] = {}  # those that cover all before a block, not it

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

    def grant(
        self, tier: int, wanted: list[tuple[Strand, int, int]], victims: list[Key], *, worth: float | None
    ) -> list[tuple[Strand, int, int]]:
        """Expect in the tier the leading blocks of a path's ranges that there is room for, or that it makes room for.

        Returns them; their end is gripped and pinned. worth: see `Index.begin_copy`. For `victims` see `evict`.
        """
        room = self.rooms[tier]
        last, _, last_end = wanted[-1]
        self.pin(last, last_end, tier)  # or the room might come from the blocks right above
        granted: list[tuple[Strand, int, int]] = []
        count = 0
        for strand, lo, hi in wanted:
            short = count + hi - lo - room.num_free
            if short > 0:
                own = room.policy.worth(strand, hi - 1) if worth is None else worth
                self.evict(tier, short, victims, below=own)
            end = min(hi, lo + room.num_free - count)
            if end > lo:
                granted.append((strand, lo, end))
                count += end - lo
            if end < hi:
                break
        if granted:
            strand, _, end = granted[-1]
            self.grip(strand, end)
            self.pin(strand, end, tier)
            room.pinned += strand.depth + end
        for strand, lo, hi in granted:
            self.expect(strand, lo, hi, tier)
        self.unpin(last, last_end, tier)
        return granted

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
        if self.listener is not None:
            self._tell_stored(self.listener, strand, lo, hi, tier)

    def name(self, strand: Strand, keys: bytes) -> None:
        """The strand's next blocks have these keys."""
        known = strand.num_keys
        strand.keys += keys
        if not strand.size:
            return  # it has been taken off; whoever asked for the keys may have them, but they name nothing
        if self.names:
            self.names.add(strand, keys)
        if self.listener is not None:
            for tier, holding in enumerate(strand.holdings):
                for lo, hi in holding.runs(known, strand.num_keys) if holding else ():
                    self._tell_stored(self.listener, strand, lo, hi, tier)

    def fill(
        self,
        tier: int,
        segments: list[tuple[Strand, int, int]],
        places: Sequence[int] | None,
        *,
        start: int,
        count: int,
    ) -> list[bool]:
        """The tier holds those of a path's blocks [start, start + count) that it neither held nor expected: which."""
        taken = [False] * count
        for strand, lo, hi in segments:
            offset = strand.depth - start
            holding = strand.holdings[tier]
            for a, b in list(holding.absent(lo, hi)) if holding else ((lo, hi),):
                self.hold(strand, a, b, tier, places[offset + a : offset + b] if places is not None else ())
                taken[offset + a : offset + b] = [True] * (b - a)
        return taken

    def forget(self, strand: Strand, lo: int, hi: int, tier: int) -> list[int]:
        """The tier does not hold (or expect) blocks [lo, hi) any more; held ones leave their places taken."""
        holding = strand.holdings[tier]
        assert holding
        held = holding.state[lo] == HELD
        places = holding.places[lo:hi].tolist() if holding.places is not None and held else []
        holding.mark(lo, hi, ABSENT)
        if held:
            self.rooms[tier].empty(places, hi - lo)
            if self.listener is not None:
                self._tell_removed(self.listener, strand, lo, hi, tier)
        self._changed(strand, tier)
        self.trim(strand)
        return places

    def clear(self, strand: Strand, lo: int, hi: int, tier: int, victims: list[Key]) -> None:
        """The tier does not hold blocks [lo, hi) any more, and their places are free.

        Keys of blocks that are not placed are added to `victims`. The caller looks at what needs them still.
        """
        room, holding = self.rooms[tier], strand.holdings[tier]
        assert holding
        if not room.placed:
            victims.extend(strand.key(block) for block in range(lo, hi))
        room.clear(holding.places[lo:hi] if holding.places is not None else (), hi - lo)
        holding.mark(lo, hi, ABSENT)
        if self.listener is not None:
            self._tell_removed(self.listener, strand, lo, hi, tier)
        self._changed(strand, tier)

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
            room.lost += self._only(strand, lo, hi, tier)
            room.evicted += hi - lo
            done += hi - lo
            room.policy.forgot(strand, hi - lo)
            self.clear(strand, lo, hi, tier, victims)
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

    def next_down(
        self, tier: int, below: int | None, n: int, *, within: int, until: float
    ) -> tuple[list[tuple[Strand, int, int]], list[Strand]]:
        """What to copy down next (see `Index.spill`), and the strands that are to be offered again once that is pinned."""
        found: list[tuple[Strand, int, int]] = []
        popped: list[Strand] = []
        while n > 0 and within > 0 and (victim := self.victim(tier)):
            assert isinstance(victim.strand, Strand)
            popped.append(victim.strand)
            for strand, lo, hi in self._goes_with(victim.strand, victim.blocks, tier, below):
                ranges = _absent(strand, lo, hi, below) if strand.stamp(lo) <= until else []
                if ranges and not found and hi - ranges[0][1] < within:
                    within += n
                lo = max(lo, hi - within)
                within -= hi - lo
                for first, last in ranges:
                    first = max(first, lo, last - n)
                    if first < last:
                        n -= last - first
                        found.append((strand, first, last))
                if n <= 0 or within <= 0:
                    break
        return found, popped

    @staticmethod
    def held_not_below(strand: Strand, tier: int, below: int | None) -> list[tuple[int, int]]:
        """Ranges of a strand's blocks that `tier` holds and `below` neither holds nor expects (None: all), first to last."""
        holding = strand.holdings[tier]
        held = holding.runs(0, strand.size) if holding else ()
        return [part for lo, hi in held for part in reversed(_absent(strand, lo, hi, below))]

    def _goes_with(
        self, strand: Strand, blocks: int, tier: int, below: int | None
    ) -> Iterator[tuple[Strand, int, int]]:
        """What goes when this victim goes, last first: its tail, and then whatever above it was used last together with it.

        Where all of that is below, what comes next of the strand that is not belongs to it, with all that goes before.
        """
        lo, hi = strand.span(tier)
        tail = max(lo, hi - blocks)
        while lo < hi:
            first, last = next(iter(_absent(strand, lo, hi, below)), (hi, hi))
            if last <= tail:
                tail = max(first, strand.stamp_start(last - 1))
            yield strand, tail, hi
            parent = strand.parent
            if tail > 0 or parent is None or not (above := parent.holdings[tier]):
                return
            assert above.hang
            if max(above.hang) != strand.at or above.hang[strand.at] > 1:
                return
            lo, hi = above.span(floor=max((at for at in above.hang if at != strand.at), default=0))
            if lo == hi or parent.stamp(hi - 1) != strand.stamp(0):
                return
            strand, tail = parent, max(lo, parent.stamp_start(hi - 1))

    def _tell_stored(self, listener: Listener, strand: Strand, lo: int, hi: int, tier: int) -> None:
        """Tell of blocks [lo, hi) that the tier holds now, as far as their keys are known."""
        hi, size = min(hi, strand.num_keys), self.block_bytes
        if lo < hi:
            keys, tokens = strand.keys[lo * KEY_BYTES : hi * KEY_BYTES], strand.tok[lo * size : hi * size]
            listener.stored(tier, strand.key(lo - 1), strand.depth + lo, bytes(keys), bytes(tokens))

    def _tell_removed(self, listener: Listener, strand: Strand, lo: int, hi: int, tier: int) -> None:
        """Tell of blocks [lo, hi) that the tier holds no more, as far as it was told that it did."""
        if keys := strand.keys[lo * KEY_BYTES : hi * KEY_BYTES]:
            listener.removed(tier, bytes(keys))

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


def _absent(strand: Strand, lo: int, hi: int, tier: int | None) -> list[tuple[int, int]]:
    """Ranges of blocks [lo, hi) that a tier neither holds nor expects, last first; None holds nothing."""
    holding = strand.holdings[tier] if tier is not None else None
    return list(holding.absent(lo, hi))[::-1] if holding else [(lo, hi)]
