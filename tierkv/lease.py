"""What the index hands out: leases, and the reservations and copies made on them. Born in index.py only.

A lease keeps one path: in the tree by a grip on its end, and in each tier that it reads from by a pin on its end.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Final, NamedTuple

from tierkv import names
from tierkv.keys import Key
from tierkv.policies.base import Use
from tierkv.strands import MAX_TIERS, Holding, Strand
from tierkv.tiers.base import Run

if TYPE_CHECKING:
    from tierkv.index import Index

BITS: Final = tuple(tuple(tier for tier in range(MAX_TIERS) if bits >> tier & 1) for bits in range(1 << MAX_TIERS))
"""Tiers of a bit set."""


class Match(NamedTuple):
    """How much of a prompt is held. num_tokens counts the agreeing part of the next block too; nothing is pinned.

    clock: logical time of the answer; anything may have changed since.
    """

    num_blocks: int
    num_tokens: int
    clock: int


class Head(NamedTuple):
    """A held block that follows a lease's path and agrees with the first `num_tokens` tokens of the rest of its query."""

    strand: Strand
    block: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """Room in a tier, private to the caller until it is filled or freed.

    places: one per block, where the tier has places.  victims: keys that the caller must delete from a tier without
    places before it writes there.  evicted: blocks that were forgotten for it.
    """

    tier: int
    count: int
    places: list[int]
    victims: list[Key]
    evicted: int


class Purged(NamedTuple):
    """What was forgotten on request. evicted: blocks, by tier.

    victims: keys that the caller must delete from the tiers without places before it writes there; tier after tier, of each
    as many as `evicted` says.
    """

    evicted: tuple[int, ...]
    victims: list[Key]


class Traced(NamedTuple):
    """Known blocks of a query of keys: the lease's [lo, num_blocks), whose keys stand there from `position` on."""

    position: int
    lease: "Lease"


@dataclass(slots=True)
class Copy:
    """Blocks under way to a tier: `blocks` are positions on the lease's path, `places` and `victims` as in Reservation.

    Ends with `Index.commit_copy` or `Index.abort`, whatever became of the lease.
    """

    lease: "Lease"
    tier: int
    blocks: list[int]
    places: list[int]
    victims: list[Key]
    segments: list[tuple[Strand, int, int]] = field(repr=False)  # the same blocks, in order; gripped and pinned
    done: bool = False


class Lease:
    """The leading blocks of a prompt that were held when it was taken, kept until `release`. Not thread-safe itself.

    Blocks are numbered from 0 along the path. `lo` is the first one this lease is about (see `share` and `Index.spill`).
    `use`: what an observer was told of its request.
    What it names stays: places that `places` returned are not reused before `release`, not even after a `drop`.
    """

    __slots__ = (
        "_end",
        "_head_tier",
        "_index",
        "_serial",
        "_strand",
        "_tiers",
        "head",
        "lo",
        "num_blocks",
        "released",
        "root",
        "use",
    )

    def __init__(
        self,
        index: "Index",
        serial: int,
        root: Key,
        strand: Strand,
        end: int,
        tiers: int,
        *,
        lo: int = 0,
        use: Use | None = None,
    ) -> None:
        self._index = index
        self._serial = serial
        self._strand = strand
        self._end = end
        self._tiers = tiers
        self.root = root
        self.use = use
        self.lo = lo
        self.num_blocks = strand.depth + end
        self.head: Head | None = None
        self._head_tier = 0
        self.released = False
        index._live[serial] = index._live.get(serial, 0) + 1
        index._tree.grip(strand, end)
        self._pin(tiers)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """Tokens that are held: the path, and what the head agrees on."""
        return self.num_blocks * self._index.block_tokens + (self.head.num_tokens if self.head else 0)

    def tokens(self, lo: int, hi: int) -> bytes:
        """Token ids of blocks [lo, hi)."""
        size = self._index._tree.block_bytes
        with self._index._lock:
            return b"".join(bytes(strand.tok[a * size : b * size]) for strand, a, b in self._segments(lo, hi))

    def sources(self) -> list[tuple[int, int, int]]:
        """The fastest tier of every block, as runs (tier, lo, hi) in path order, pinned there.

        Ends early where a block was dropped from its last tier: `shrink` to there.
        """
        with self._index._lock:
            found: list[tuple[int, int, int]] = []
            at = 0
            for strand, lo, hi in self._segments(0, self.num_blocks):
                depth = strand.depth
                for tier, a, b in self._index._tree.sources(strand, lo, hi):
                    if found and found[-1][0] == tier:
                        found[-1] = (tier, found[-1][1], depth + b)
                    else:
                        found.append((tier, depth + a, depth + b))
                    at = depth + b
                if at < depth + hi:
                    break
            self._pin_more({tier for tier, _, _ in found})
            return found

    def places(self, tier: int, lo: int, hi: int) -> list[int]:
        """Places of blocks [lo, hi), pinned. Raises LookupError if the tier has no places or does not hold them all."""
        with self._index._lock:
            found: list[int] = []
            for strand, a, b in self._segments(lo, hi):
                holding = strand.holdings[tier]
                if not holding or holding.places is None or holding.run(a, b) < b:
                    raise LookupError(f"tier {tier} has no places for all blocks [{lo}, {hi}): ask `sources` first")
                found += holding.places[a:b]
            self._pin_more((tier,))
            return found

    def head_source(self) -> tuple[int, int | None] | None:
        """Tier and place of the head, pinned there; None once it has no head or was dropped from its last tier."""
        with self._index._lock:
            if not self.head:
                return None
            strand, block, _ = self.head
            tier = strand.tier_of(block)
            if tier is None:
                return None
            if tier != self._head_tier:
                head = self.head
                self._index._tree.grip(strand, block + 1)
                self._drop_head()
                self._take_head(head, tier)
                self._index._tree.loosen(strand, block + 1)
            holding = strand.holdings[tier]
            assert holding
            return tier, holding.places[block] if holding.places is not None else None

    def missing(self, tier: int) -> list[tuple[int, int]]:
        """Ranges of the path that the tier neither holds nor expects."""
        with self._index._lock:
            return _joined(self._absent(tier, self._segments(0, self.num_blocks)))

    def held(self, tier: int, lo: int, hi: int) -> list[tuple[int, int]]:
        """Ranges of [lo, hi) that the tier holds now; `places` pins them, or says that they have gone."""
        with self._index._lock:
            found: list[tuple[int, int]] = []
            for strand, a, b in self._segments(lo, hi):
                holding, depth = strand.holdings[tier], strand.depth
                found += [(depth + lo, depth + hi) for lo, hi in (holding.runs(a, b) if holding else ())]
            return _joined(found)

    def second_use(self, tier: int | None) -> list[tuple[int, int]]:
        """As `missing`, of the blocks that were used at least twice; with None, whatever tier has them."""
        with self._index._lock:
            segments = [(strand, lo, min(hi, strand.again)) for strand, lo, hi in self._segments(0, self.num_blocks)]
            if tier is None:
                return _joined([(strand.depth + lo, strand.depth + hi) for strand, lo, hi in segments if lo < hi])
            return _joined(self._absent(tier, segments))

    def keys(self, lo: int, hi: int) -> list[Key]:
        """Keys of blocks [lo, hi), hashed when first asked for, outside the lock. Safe from any thread."""
        with self._index._lock:
            segments = self._segments(0, hi)
        return names.keys(self._index._tree, segments, lo, self._index._lock)

    def run(self, lo: int, hi: int) -> Run:
        """Blocks [lo, hi) as tiers at rest are given them."""
        keys = self.keys(max(lo - 1, 0), hi)
        parent = keys.pop(0) if lo else self.root
        return Run(self.root, parent, lo, tuple(keys), self.tokens(lo, hi))

    def head_run(self) -> Run:
        """The head as a run of one block. Raises LookupError without a head."""
        if not self.head:
            raise LookupError("this lease has no head")
        index, (strand, block, _) = self._index, self.head
        depth = strand.depth + block
        with index._lock:
            segments = index._tree.segments(strand, block + 1, 0, depth + 1)
            size = index._tree.block_bytes
            tokens = bytes(strand.tok[block * size : (block + 1) * size])
        *parents, key = names.keys(index._tree, segments, max(depth - 1, 0), index._lock)
        return Run(self.root, parents[0] if parents else self.root, depth, (key,), tokens)

    # -- changing what is kept -------------------------------------------------------------------------------------

    def shrink(self, num_blocks: int) -> None:
        """Keep the leading blocks only; the head goes."""
        with self._index._lock:
            tree = self._index._tree
            self._drop_head()
            if num_blocks >= self.num_blocks:
                return
            strand, end = tree.locate(self._strand, self._end, num_blocks)
            tiers = 0
            for part, lo, hi in tree.segments(strand, end, 0, num_blocks):
                for tier, _, _ in tree.sources(part, lo, hi):
                    tiers |= 1 << tier
            self._move(strand, end, tiers)

    def shorten_pins(self, tier: int) -> None:
        """Keep the path in the tree and in this tier only."""
        with self._index._lock:
            self._move(self._strand, self._end, 1 << tier)

    def share(self, lo: int, hi: int, tier: int) -> "Lease":
        """Take a lease of its own on blocks [0, hi), for a job on [lo, hi) in another thread.

        Pinned in `tier` if that holds all of [lo, hi), else in every tier that is the fastest for some of them.
        """
        with self._index._lock:
            tree = self._index._tree
            parts = self._segments(lo, hi)
            tiers = 1 << tier
            if not all((holding := strand.holdings[tier]) and holding.run(a, b) == b for strand, a, b in parts):
                tiers = 0
                for strand, a, b in parts:
                    for source, _, _ in tree.sources(strand, a, b):
                        tiers |= 1 << source
            strand, end = tree.locate(self._strand, self._end, hi)
            return Lease(self._index, self._serial, self.root, strand, end, tiers, lo=lo, use=self.use)

    def fork(self) -> "Lease":
        """Take a lease on the same path, with the same pins and head."""
        with self._index._lock:
            other = Lease(
                self._index, self._serial, self.root, self._strand, self._end, self._tiers, lo=self.lo, use=self.use
            )
            if self.head:
                other._take_head(self.head, self._head_tier)
            return other

    def release(self) -> None:
        """Let go. Idempotent; nothing else may be called after."""
        if self.released:
            return
        with self._index._lock:
            self.released = True
            self._drop_head()
            self._unpin(self._strand, self._end, self._tiers)
            self._index._tree.loosen(self._strand, self._end)
            self._index._retire(self._serial)

    # -- under the lock --------------------------------------------------------------------------------------------

    def _segments(self, lo: int, hi: int) -> list[tuple[Strand, int, int]]:
        if not 0 <= lo <= hi <= self.num_blocks or self.released:
            state = "is released" if self.released else f"has {self.num_blocks} blocks"
            raise IndexError(f"blocks [{lo}, {hi}) of a lease that {state}")
        return self._index._tree.segments(self._strand, self._end, lo, hi)

    def _absent(self, tier: int, segments: Iterable[tuple[Strand, int, int]]) -> list[tuple[int, int]]:
        nothing = Holding(placed=False)
        return [
            (strand.depth + a, strand.depth + b)
            for strand, lo, hi in segments
            for a, b in (strand.holdings[tier] or nothing).absent(lo, hi)
        ]

    def _move(self, strand: Strand, end: int, tiers: int) -> None:
        """Let the lease end at (strand, end), pinned in `tiers`."""
        old, tree = (self._strand, self._end, self._tiers), self._index._tree
        self._strand, self._end, self._tiers = strand, end, 0
        tree.grip(strand, end)
        self._pin(tiers, num_blocks=strand.depth + end)
        self._unpin(*old)
        self.num_blocks = strand.depth + end
        tree.loosen(old[0], old[1])

    def _pin(self, tiers: int, *, num_blocks: int | None = None) -> None:
        tree = self._index._tree
        for tier in BITS[tiers]:
            tree.pin(self._strand, self._end, tier)
            tree.rooms[tier].pinned += self.num_blocks if num_blocks is None else num_blocks
        self._tiers |= tiers

    def _unpin(self, strand: Strand, end: int, tiers: int) -> None:
        tree = self._index._tree
        for tier in BITS[tiers]:
            tree.unpin(strand, end, tier)
            tree.rooms[tier].pinned -= self.num_blocks

    def _pin_more(self, tiers: Iterable[int]) -> None:
        self._pin(sum(1 << tier for tier in tiers) & ~self._tiers)

    def _take_head(self, head: Head, tier: int) -> None:
        tree = self._index._tree
        tree.grip(head.strand, head.block + 1)
        tree.pin(head.strand, head.block + 1, tier)
        tree.rooms[tier].pinned += head.strand.depth + head.block + 1
        self.head, self._head_tier = head, tier

    def _drop_head(self) -> None:
        if self.head:
            tree = self._index._tree
            strand, block, _ = self.head
            tree.unpin(strand, block + 1, self._head_tier)
            tree.rooms[self._head_tier].pinned -= strand.depth + block + 1
            tree.loosen(strand, block + 1)
            self.head = None


def _joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in order, adjacent ones as one."""
    joined: list[tuple[int, int]] = []
    for lo, hi in ranges:
        if joined and joined[-1][1] == lo:
            joined[-1] = (joined[-1][0], hi)
        else:
            joined.append((lo, hi))
    return joined


def ranges(blocks: Iterable[int]) -> list[tuple[int, int]]:
    """Block numbers as ranges."""
    return _joined([(block, block + 1) for block in sorted(set(blocks))])


def outcomes(ok: Sequence[bool], start: int) -> Iterable[tuple[int, int, bool]]:
    """Runs of equal results, numbered from `start`."""
    lo = 0
    for at in range(1, len(ok) + 1):
        if at == len(ok) or ok[at] != ok[lo]:
            yield start + lo, start + at, ok[lo]
            lo = at
