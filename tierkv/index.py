"""Who holds what, who keeps it, and what goes: the one place that decides, under one lock, and never moves a byte.

    match / acquire        how much of a prompt is held; `acquire` keeps it by a lease, `keep` without counting it as a use
    reserve … extend       room in a slab, written by an engine, then owned by the index
    begin_copy … commit    room in any tier, filled by a mover from a block that a lease keeps
    spill, evict, drop     what to copy down next; what to forget
    want                   what to forget last
    explain                what is held where, and how what is not held left
    presence, trace        what is held of blocks that are asked for by key, where the index is `named`
    purge                  forget namespaces, or what was not used for long

Every public method takes the lock itself and does nothing slow inside: no I/O, no hashing; those that go over all strands
take it for a batch of them at a time. Whatever happens between two steps leaves a miss: a copy that is never committed is a
block the tier does not hold. No clock but a count of uses; times are what callers tell.
Structure: strands.py, paths.py, tree.py, names.py; invariants: audit.py; figures: bench/bench_index.py.
"""

from collections.abc import Collection, Iterable, Sequence
from math import inf
from threading import Lock

from tierkv import audit, fates
from tierkv.fates import Known
from tierkv.hints import NO_HINTS, Ending, Hints
from tierkv.keys import KEY_BYTES, Key
from tierkv.lease import Copy, Head, Lease, Match, Purged, Reservation, Traced, outcomes, ranges
from tierkv.names import Listener, Names, Stretch
from tierkv.policies.base import Observer, Use
from tierkv.purge import purge
from tierkv.recovery import Recovery
from tierkv.rooms import IndexStats, Room, TierSpec, TierStats
from tierkv.strands import MAX_TIERS, Strand
from tierkv.tiers.base import Run
from tierkv.tree import Tree
from tierkv.walks import Guarded, held_by_root, keep_all
from tierkv.wants import Want

__all__ = [
    "Copy",
    "Head",
    "Index",
    "IndexStats",
    "Lease",
    "Listener",
    "Match",
    "Purged",
    "Reservation",
    "TierSpec",
    "TierStats",
    "Traced",
    "Want",
]


class Index:
    """A tree of strands per namespace. Thread-safe; a lease taken in one thread stays good whatever others do.

    Tiers are numbered by position, fastest first, at most 4.  observer: sees every use; blocks that `restore` brought are
    new to it when they are first used.  history_blocks: blocks that no tier holds and nothing needs, known all the same,
    the last used ones.  named: blocks are found by key, too, as far as keys are known.  listener: hears what tiers hold.
    Raises ValueError for what no caller may do: giving back a place that was not taken, blocks that are not whole.
    """

    def __init__(
        self,
        *,
        block_tokens: int,
        tiers: Sequence[TierSpec],
        observer: Observer | None = None,
        history_blocks: int = 0,
        named: bool = False,
        listener: Listener | None = None,
    ) -> None:
        if not 1 <= len(tiers) <= MAX_TIERS:
            raise ValueError(f"{len(tiers)} tiers: an index has 1 to {MAX_TIERS}")
        if history_blocks < 0:
            raise ValueError(f"a history of {history_blocks} blocks: 0 or more is expected")
        self.block_tokens = block_tokens
        self._tree = Tree(
            block_tokens=block_tokens,
            tiers=tiers,
            observer=observer,
            history_blocks=history_blocks,
            names=Names() if named else None,
            listener=listener,
        )
        self._lock = Lock()
        self._serial = 0
        self._num_wants = 0
        self._live: dict[int, int] = {}  # serial -> leases that may know what was there when it was given out
        self._limbo: list[tuple[int, Room, list[int]]] = []  # places dropped under leases up to that serial

    # -- finding ---------------------------------------------------------------------------------------------------

    def match(self, root: Key, tokens: bytes) -> Match:
        """Tell how much is held. Changes nothing, pins nothing."""
        tree = self._tree
        with self._lock:
            start = tree.roots.get(root)
            if start is None:
                return Match(0, 0, tree.clock)
            path = tree.follow(start, 0, tokens)
            tree.held(path)
            strand, end = path[-1]
            num_blocks = strand.depth + end
            head = tree.head(strand, end, tokens[num_blocks * tree.block_bytes : (num_blocks + 1) * tree.block_bytes])
            return Match(num_blocks, num_blocks * self.block_tokens + (head[2] if head else 0), tree.clock)

    def acquire(self, root: Key, tokens: bytes, *, now_s: float = 0.0, hints: Hints = NO_HINTS) -> Lease:
        """Find what is held, keep it and count it as used, all at once. What is known but not held counts as used, too.

        now_s: seconds on the caller's clock, of any origin; a time before the latest one counts as that.
        """
        tree = self._tree
        with self._lock:
            tree.clock = clock = tree.clock + 1
            tree.now_s = max(tree.now_s, now_s)
            path = tree.follow(tree.root(root), 0, tokens)
            last, last_end = path[-1]
            known = path[1:] if tree.observer else []
            tiers = tree.held(path)
            strand, end = path[-1]
            use = None
            if tree.observer:
                num_blocks = len(tokens) // tree.block_bytes
                use = Use(tree.now_s, num_blocks, last.depth + last_end, strand.depth + end, hints)
                tree.observer.arrive(known, use)
            if strand is not last or end < last_end:
                tree.use(last, last_end)
            for strand, end in path:
                if end:
                    strand.stamps.cover(end, clock)
                    if strand.again < end:
                        strand.again = end
            for tier, policy in tree.learners:
                num_found = 0
                for strand, end in path:
                    holding = strand.holdings[tier]
                    if end and holding and holding.count:
                        end = min(end, len(holding.state))
                        policy.record(strand, 0, end, clock)
                        num_found += end
                policy.found(num_found)
            return self._lease(root, tokens, path[-1], tiers, use)

    def keep(self, root: Key, tokens: bytes, *, use: Use | None = None) -> Lease:
        """As `acquire`, for somebody who only looks, copies or keeps: it counts as no use, and no observer hears of it.

        use: that of a request whose first lease has been released, and which goes on.
        """
        tree = self._tree
        with self._lock:
            path = tree.follow(tree.root(root), 0, tokens)
            tiers = tree.held(path)
            return self._lease(root, tokens, path[-1], tiers, use)

    def _lease(self, root: Key, tokens: bytes, found: tuple[Strand, int], tiers: int, use: Use | None) -> Lease:
        tree, (strand, end) = self._tree, found
        self._serial += 1
        lease = Lease(self, self._serial, root, strand, end, tiers, use=use)
        at = lease.num_blocks * tree.block_bytes
        head = tree.head(strand, end, tokens[at : at + tree.block_bytes])
        if head:
            source = head[0].tier_of(head[1])
            assert source is not None
            lease._take_head(Head(*head), source)
        return lease

    def presence(self, keys: bytes) -> bytes:
        """Tell of every key, 32 bytes each, which tier is the fastest to hold its block: a byte, 1 + its number; 0: none.

        Quick where consecutive keys are those of a path. Changes nothing, pins nothing.
        """
        known = self._named(keys)
        with self._lock:
            return bytes(known.presence(keys))

    def trace(self, keys: bytes) -> list[Traced]:
        """Lease the blocks that are known by these keys, held or not, one lease for as many as follow each other on a path.

        Each is about its blocks [lo, num_blocks), pinned in every tier that is the fastest for some of them; what is above
        `lo` is kept, too. In order; keys that are not known are not covered. It counts as no use.
        """
        known = self._named(keys)
        with self._lock:
            return self._lease_stretches(known.stretches(keys))

    def trace_all(self, keys: bytes) -> list[Traced]:
        """As `trace`; then the same blocks on other paths: one may be known under its root and under the key of a block of it.

        For what must not be found again.
        """
        known = self._named(keys)
        with self._lock:
            return self._lease_stretches(known.stretches(keys) + known.twins(keys))

    def _lease_stretches(self, stretches: list[Stretch]) -> list[Traced]:
        return [
            Traced(position, self._lease_part(strand, lo - strand.depth, end, tiers))
            for position, lo, strand, end, tiers in stretches
        ]

    def _named(self, keys: bytes) -> Names:
        if len(keys) % KEY_BYTES:
            raise ValueError(f"{len(keys)} bytes of keys: whole keys of {KEY_BYTES} are expected")
        if not self._tree.names:
            raise ValueError("this index finds no blocks by key: it is to be made with named=True")
        return self._tree.names

    def want(self, root: Key, tokens: bytes) -> Want:
        """Let the blocks of a queued request be forgotten last, in every tier, and after those of requests queued before.

        Those that come to be known later, too. It keeps nothing once there is nothing else to forget.
        """
        tree = self._tree
        with self._lock:
            self._num_wants += 1
            start = tree.root(root)
            want = tree.wants[self._num_wants] = Want(self, self._num_wants, start, tokens)
            tree.grip(start, 0)
            tree.want(want)
            return want

    def _unwant(self, want: Want) -> None:
        with self._lock:
            if not want.released:
                want.released = True
                del self._tree.wants[want.serial]
                self._tree.unwant(want)

    # -- adding ----------------------------------------------------------------------------------------------------

    def extend(
        self,
        lease: Lease,
        tokens: bytes,
        *,
        tier: int | None = None,
        places: Sequence[int] | None = None,
        keys: Sequence[Key] | None = None,
    ) -> list[bool]:
        """Let whole blocks follow the lease's path; the path covers them then. One bool per block.

        With `tier`, its reserved `places` (one per block; None where it has none) hold the blocks now: True, the place is
        the index's; False, the tier holds or expects that block already and the place stays the caller's. Without, they
        are ghosts until a copy of them is committed, and all False. keys: as far as known; they are believed.
        """
        tree = self._tree
        count, rest = divmod(len(tokens), tree.block_bytes)
        if rest:
            raise ValueError(f"{len(tokens)} bytes of tokens: whole blocks of {tree.block_bytes} are expected")
        if tier is not None and tree.rooms[tier].placed and len(places or ()) != count:
            raise ValueError(f"{len(places or ())} places for {count} blocks: one each is expected")
        if not count:
            return []
        with self._lock:
            tree.clock += 1
            start = lease.num_blocks
            lease._segments(start, start)
            path = tree.follow(lease._strand, lease._end, tokens)
            for strand, end in path:
                if strand.depth + end > start:
                    strand.again = max(strand.again, end)
            strand, end = last, last_end = path[-1]
            known = strand.depth + end - start
            if known < count:
                strand, end = tree.grow(strand, end, tokens[known * tree.block_bytes :])
                if tree.observer and lease.use:
                    tree.observer.extend(strand, end - count + known, end, lease.use)
            segments = tree.segments(strand, end, start, start + count)
            for part, lo, hi in segments if keys else ():
                named = part.num_keys
                if lo <= named < hi and part.key(named - 1):  # never a key without the one before
                    tree.name(part, b"".join((keys or ())[part.depth + named - start : part.depth + hi - start]))
            tree.use(strand, end)
            tiers = lease._tiers
            if tier is not None:
                tiers |= 1 << tier
            else:
                for part, lo, hi in segments:
                    for source, _, _ in tree.sources(part, lo, hi):
                        tiers |= 1 << source
            lease._move(strand, end, tiers)
            if known < count and tree.waiting:
                tree.arrived(last, last_end, tokens[known * tree.block_bytes : (known + 1) * tree.block_bytes])
            return [False] * count if tier is None else tree.fill(tier, segments, places, start=start, count=count)

    def end(self, lease: Lease, ending: Ending, *, now_s: float) -> None:
        """Tell that the lease's request is over, and what is expected after it. The lease stays until its release."""
        tree = self._tree
        with self._lock:
            tree.now_s = max(tree.now_s, now_s)
            if tree.observer and lease.use:
                path = [(strand, hi) for strand, _, hi in lease._segments(0, lease.num_blocks)]
                tree.observer.end(path, lease.use, ending, tree.now_s)

    # -- room ------------------------------------------------------------------------------------------------------

    def reserve(self, tier: int, n: int, *, at_least: int | None = None) -> Reservation | None:
        """Give out room for `n` blocks, or for fewer but `at_least` that many (default: all); None if it cannot.

        Forgets what the policy names until there is room; what was forgotten in vain stays free.
        """
        with self._lock:
            room = self._tree.rooms[tier]
            victims: list[Key] = []
            evicted = self._tree.evict(tier, n - room.num_free, victims)
            count = min(n, room.num_free)
            if count < (n if at_least is None else at_least):
                return None
            return Reservation(tier, count, room.take(count), victims, evicted)

    def room(self, tier: int) -> tuple[int, int]:
        """Free blocks of a tier, and all it can hold. Takes no lock: a hint."""
        room = self._tree.rooms[tier]
        return room.num_free, room.capacity

    def free(self, tier: int, places: Sequence[int] = (), *, count: int | None = None) -> None:
        """Give reserved places back, or `count` blocks of a tier without places."""
        with self._lock:
            self._tree.rooms[tier].give_back(places, len(places) if count is None else count)

    def evict(self, tier: int, n: int | None = None) -> Reservation:
        """Forget up to `n` blocks (None: all that nothing protects). The room is free, not reserved: count is 0."""
        with self._lock:
            victims: list[Key] = []
            evicted = self._tree.evict(tier, self._tree.rooms[tier].held if n is None else n, victims)
            return Reservation(tier, 0, [], victims, evicted)

    def purge(self, *, roots: Collection[Key] | None, until: float = inf) -> Purged:
        """Forget in every tier what nothing pins of these namespaces (None: of all), tails first.

        until: only blocks that were not used after this time of `clock`; infinite: all, and their history, so that nothing
        but what something keeps stays known. The room is free. Lets others have the lock now and then: blocks that come to
        be known meanwhile stay, with what is above them.
        """
        return purge(Guarded(self._tree, self._lock), roots, until)

    # -- copies ----------------------------------------------------------------------------------------------------

    def begin_copy(self, lease: Lease, tier: int, lo: int, hi: int, *, worth: float | None = None) -> Copy | None:
        """Expect in `tier` those of the lease's blocks [lo, hi) that it neither holds nor expects, and that it admits.

        Covers the leading ones that there is room for; None: not one. Until the end of the copy nothing above the blocks
        is forgotten by `tier`. Hashes the keys first where the tier needs them.  worth: what has to be worth less to go for them;
        None: as the policy says.
        """
        tree = self._tree
        room = tree.rooms[tier]
        if not room.placed and lo < hi:
            lease.keys(hi - 1, hi)
        with self._lock:
            wanted = []
            for strand, a, b in lease._segments(lo, hi):
                holding = strand.holdings[tier]
                for first, end in list(holding.absent(a, b)) if holding else ((a, b),):
                    if room.policy.admit(strand, end - first):
                        wanted.append((strand, first, end))
            if not wanted:
                return None
            victims: list[Key] = []
            granted = tree.grant(tier, wanted, victims, worth=worth)
            if not granted:
                return None
            blocks = [block for strand, a, b in granted for block in range(strand.depth + a, strand.depth + b)]
            return Copy(lease, tier, blocks, room.take(len(blocks)), victims, granted)

    def commit_copy(self, copy: Copy, ok: Sequence[bool], *, reason: str = "failed") -> None:
        """End a copy: blocks that are `ok` are held, the others' places free. A copy ends once; later calls do nothing.

        reason: why the others did not come (see `explain`).
        """
        if len(ok) != len(copy.blocks):
            raise ValueError(f"{len(ok)} results for a copy of {len(copy.blocks)} blocks")
        tree, tier = self._tree, copy.tier
        with self._lock:
            if copy.done:
                return
            copy.done = True
            at = 0
            for strand, lo, hi in copy.segments:
                for a, b, good in outcomes(ok[at : at + hi - lo], lo):
                    places = copy.places[at + a - lo : at + b - lo]
                    if good:
                        tree.hold(strand, a, b, tier, places)
                    else:
                        tree.forget(strand, a, b, tier)
                        tree.rooms[tier].give_back(places, b - a)
                        tree.note(strand, a, b, tier, reason)
                at += hi - lo
            strand, _, end = copy.segments[-1]
            tree.rooms[tier].pinned -= strand.depth + end
            tree.unpin(strand, end, tier)
            tree.loosen(strand, end)

    def abort(self, copy: Copy, *, reason: str = "failed") -> None:
        """End a copy of which nothing arrived."""
        self.commit_copy(copy, [False] * len(copy.blocks), reason=reason)

    def drop(self, tier: int, lease: Lease, blocks: Sequence[int], *, reason: str = "absent") -> None:
        """Forget this tier's copies of some blocks of the lease's path, or of its head: they were found bad or absent.

        The blocks leave the tier at once, pinned or not; pins of other leases still protect what is above. A freed place
        is given out again only when every lease taken before now is released: a reader may still be at it.
        """
        tree = self._tree
        with self._lock:
            segments = [
                part for lo, hi in ranges(b for b in blocks if b < lease.num_blocks) for part in lease._segments(lo, hi)
            ]
            if lease.head and lease.head.strand.depth + lease.head.block in {
                b for b in blocks if b >= lease.num_blocks
            }:
                segments.append((lease.head.strand, lease.head.block, lease.head.block + 1))
            for strand, lo, hi in segments:
                while (holding := strand.holdings[tier]) and (first := holding.first(lo, hi)) < hi:
                    lo = holding.run(first, hi)
                    places = tree.forget(strand, first, lo, tier)
                    if places:
                        self._limbo.append((self._serial, tree.rooms[tier], places))
                    else:
                        tree.rooms[tier].give_back((), lo - first)
                    tree.note(strand, first, lo, tier, reason)

    def _retire(self, serial: int) -> None:
        """A lease of this serial has gone: free dropped places that no older lease can know."""
        left = self._live[serial] - 1
        if left:
            self._live[serial] = left
            return
        del self._live[serial]
        if self._limbo:
            oldest = min(self._live, default=self._serial + 1)
            for known, room, places in self._limbo:
                if known < oldest:
                    room.give_back(places, len(places))
            self._limbo = [entry for entry in self._limbo if entry[0] >= oldest]

    # -- ahead of need ---------------------------------------------------------------------------------------------

    def spill(
        self, tier: int, below: int | None, n: int, *, within: int | None = None, until: float = inf
    ) -> list[Lease]:
        """Lease the next blocks, up to `n`, that `tier` would forget and `below` neither holds nor expects (None: all).

        Each lease is about its blocks [lo, num_blocks), pinned in `tier`. The order of forgetting stays as it is.
        within: how many of the blocks that are forgotten next are looked at, and `n` more if one of them is not below; None:
        all, which takes long where most are below.  until: only blocks that were not used after this time of `clock`.
        """
        tree = self._tree
        within = tree.rooms[tier].capacity if within is None else within
        with self._lock:
            found, popped = tree.next_down(tier, below, n, within=within, until=until)
            leases = [self._lease_part(strand, lo, hi, 1 << tier) for strand, lo, hi in found]
            for strand in popped:
                tree.offer(strand, tier)
        return leases

    def keep_all(self, tier: int, below: int | None) -> list[Lease]:
        """Lease every block that `tier` holds and `below` neither holds nor expects (None: all), parents first.

        Each lease is about its blocks [lo, num_blocks), as those of `spill`. O(strands), but lets others have the lock now
        and then: what comes or goes meanwhile may be left out. For a whole tier on request, where `spill` tells what goes
        next, which of a branching path is its ends alone.
        """
        return keep_all(Guarded(self._tree, self._lock), tier, below, self._lease_part)

    def _lease_part(self, strand: Strand, lo: int, hi: int, tiers: int) -> Lease:
        """Lease the path up to block `hi` of a strand, for its blocks from `lo` on."""
        self._serial += 1
        return Lease(self, self._serial, strand.root, strand, hi, tiers, lo=strand.depth + lo)

    @property
    def clock(self) -> int:
        """Logical time of the latest use. Takes no lock: uses that begin after this was read are later."""
        return self._tree.clock

    # -- starting --------------------------------------------------------------------------------------------------

    def restore(self, tier: int, runs: Iterable[Run]) -> list[Run]:
        """Take in what a tier without places still holds, in any order; returns what it should delete.

        Those are runs whose keys are not what their parent and tokens say, whose parent is unknown, or that exceed the
        capacity. Holds the lock for long: meant for the start.
        """
        if self._tree.rooms[tier].placed:
            raise ValueError(f"tier {self._tree.rooms[tier].name} has places: what they hold does not survive a stop")
        return Recovery(self._tree, tier).run(runs, self._lock)

    # -- why it is not held ----------------------------------------------------------------------------------------

    def explain(self, root: Key, tokens: bytes) -> list[Known]:
        """Tell of every whole block of a prompt which tiers hold it and how it left others, in order. Changes nothing.

        Blocks are remembered for as long as something needs them, and then as history (`history_blocks`).
        """
        tree = self._tree
        with self._lock:
            start = tree.roots.get(root)
            path = tree.follow(start, 0, tokens)[1:] if start else []
            return fates.explain(path, len(tokens) // tree.block_bytes)

    def roots(self) -> list[Key]:
        """Namespaces of which something is known."""
        with self._lock:
            return list(self._tree.roots)

    # -- figures, checks -----------------------------------------------------------------------------------------------

    def held_by_root(self) -> dict[Key, int]:
        """Count the blocks of each namespace that some tier holds; of one that several hold, most of them once.

        O(strands), of which the lock is for the listing: what comes or goes meanwhile may be counted or not.
        """
        return held_by_root(Guarded(self._tree, self._lock))

    def stats(self) -> IndexStats:
        """Count everything, in O(tiers)."""
        tree = self._tree
        with self._lock:
            tiers = tuple(room.stats() for room in tree.rooms)
            return IndexStats(tiers, tree.num_strands, tree.num_blocks, sum(self._live.values()), tree.num_past)

    def memory_bytes(self) -> int:
        """Memory of the tree, by asking every object: slow."""
        with self._lock:
            return audit.memory_bytes(self._tree)

    def check(self, leases: Iterable[Lease] | None = None, copies: Iterable[Copy] | None = None) -> None:
        """Raise AssertionError unless every invariant holds; slow.

        leases, copies: all that are live, if known; then pins and grips are compared with them.
        """
        with self._lock:
            audit.check(self._tree, None if leases is None else list(leases), list(copies or ()))
