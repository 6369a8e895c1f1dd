"""A strand: consecutive blocks of one path, and what each tier has of it. Structure only: no lock, policy or capacity.

    root ── strand A  [0 ........ 5 ........ 9)
                                  └─ strand B [0 .. 4)      B.parent = A, B.at = 5, B.depth = A.depth + 5

A strand is never split and never moves, so a handle (strand, end) names a path for as long as a lease keeps it. Token
bytes are compared with `startswith`: one memcmp without a copy; never let a view of a bytearray out of a function, since
a bytearray with views cannot grow.
"""

from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from tierkv.keys import KEY_BYTES, Key

if TYPE_CHECKING:
    from tierkv.fates import Fate

ABSENT: Final = 0
HELD: Final = 1
PENDING: Final = 2
"""State of a block in a tier; a byte each, searched with `find`."""
MAX_TIERS: Final = 4
HISTORY: Final = -1
"""Stands for a tier where a strand is asked what may be taken out of the tree, by those who can order a tier."""
_STATES: Final = tuple(bytes((kind,)) for kind in (ABSENT, HELD, PENDING))


class Steps:
    """A number per block that never rises from the first block to the last, kept as its steps.

    Uses always cover a leading part of a path, so what they leave behind (a time, an age) is a staircase: far smaller
    than a number per block, exact, and a tail of equal numbers is found without a scan.
    """

    __slots__ = ("_ends", "_values")

    def __init__(self, end: int, value: float) -> None:
        self._ends = [-end]  # deepest step first, negated: ascending, for bisect
        self._values = [value]

    def cover(self, end: int, value: float) -> None:
        """Give blocks [0, end) a value that is at least every value so far."""
        ends, values = self._ends, self._values
        while ends and ends[-1] >= -end:
            ends.pop()
            values.pop()
        if not values or values[-1] != value:
            ends.append(-end)
            values.append(value)

    def grow(self, end: int, value: float) -> None:
        """Let the blocks after the last, up to `end`, have a value that is at most the last block's."""
        if self._values[0] == value:
            self._ends[0] = -end
        else:
            self._ends.insert(0, -end)
            self._values.insert(0, value)

    def cut(self, end: int) -> None:
        """Forget blocks from `end` on; some stay."""
        step = self._step(end - 1)
        del self._ends[:step], self._values[:step]
        self._ends[0] = max(self._ends[0], -end)

    def at(self, block: int) -> float:
        """The number of a block."""
        return self._values[bisect_left(self._ends, -block) - 1]

    def start(self, block: int) -> int:
        """The first block of the step that `block` is on."""
        step = self._step(block) + 1
        return -self._ends[step] if step < len(self._ends) else 0

    def _step(self, block: int) -> int:
        return bisect_left(self._ends, -block) - 1

    def check(self) -> int:
        """Verify the order; returns the number of blocks."""
        assert self._ends == sorted(set(self._ends)) and self._values == sorted(set(self._values))
        assert len(self._ends) == len(self._values) > 0 and self._ends[-1] < 0
        return -self._ends[0]


class Holding:
    """What one tier has of one strand.

    state: one byte per block up to the last that is not absent.  places: of the same length (0 where not held), or None.
    pins: block offset -> number of leases that end there and need this tier.  hang: block offset -> number of child
    strands that are alive in this tier; floor: its largest key. The tier may forget no block above a pin or a floor.
    """

    __slots__ = ("count", "floor", "hang", "num_pending", "pins", "places", "state")

    def __init__(self, *, placed: bool) -> None:
        self.state = bytearray()
        self.places = array("i") if placed else None
        self.count = 0
        self.num_pending = 0
        self.pins: dict[int, int] | None = None
        self.hang: dict[int, int] | None = None
        self.floor = 0

    @property
    def alive(self) -> bool:
        """Whether blocks above this strand must stay in the tier as long as this is."""
        return bool(self.count or self.pins or self.hang)

    def run(self, lo: int, hi: int) -> int:
        """End of the held blocks that begin at `lo`, at most `hi`; `lo` if that block is not held."""
        state = self.state
        hi = min(hi, len(state))
        at = state.find(ABSENT, lo, hi)
        if at >= 0:
            hi = at
        if self.num_pending:
            at = state.find(PENDING, lo, hi)
            if at >= 0:
                hi = at
        return max(lo, hi)

    def first(self, lo: int, hi: int) -> int:
        """The first held block in [lo, hi), or `hi`."""
        at = self.state.find(HELD, lo, hi)
        return at if at >= 0 else hi

    def runs(self, lo: int, hi: int) -> Iterator[tuple[int, int]]:
        """Ranges of [lo, hi) that are held."""
        while (lo := self.first(lo, hi)) < hi:
            end = self.run(lo, hi)
            yield lo, end
            lo = end

    def absent(self, lo: int, hi: int) -> Iterator[tuple[int, int]]:
        """Ranges of [lo, hi) that are neither held nor pending."""
        state = self.state
        while lo < hi:
            if lo < len(state):
                at = state.find(ABSENT, lo, hi)
                lo = at if at >= 0 else len(state)
                if lo >= hi:
                    return
            ends = [at for kind in (HELD, PENDING) if (at := state.find(kind, lo, hi)) >= 0]
            end = min(ends, default=hi)
            yield lo, end
            lo = end

    def span(self, *, floor: int | None = None) -> tuple[int, int]:
        """The last run of held blocks that has nothing below it in the tier: what may be forgotten.

        floor: as if the children below this offset were gone.
        """
        state = self.state
        hi = len(state) if not self.num_pending else state.rfind(HELD) + 1
        lo = self.floor if floor is None else floor
        if self.pins:
            lo = max(lo, *self.pins)
        if lo >= hi:
            return hi, hi
        if self.count == len(state):
            return lo, hi
        at = state.rfind(ABSENT, lo, hi)
        if self.num_pending:
            at = max(at, state.rfind(PENDING, lo, hi))
        return (at + 1 if at >= 0 else lo), hi

    def mark(self, lo: int, hi: int, kind: int) -> None:
        """Set the state of blocks [lo, hi), which had one state in common, to another; keeps the counts."""
        state = self.state
        old = state[lo] if lo < len(state) else ABSENT
        if old == HELD:
            self.count -= hi - lo
        elif old == PENDING:
            self.num_pending -= hi - lo
        if kind == HELD:
            self.count += hi - lo
        elif kind == PENDING:
            self.num_pending += hi - lo
        if kind == ABSENT and hi >= len(state):
            del state[lo:]
            if state and not state[-1]:
                del state[len(state.rstrip(b"\0")) :]
        else:
            if lo > len(state):
                state.extend(bytes(lo - len(state)))
            state[lo:hi] = _STATES[kind] * (hi - lo)
        if self.places is not None:
            if len(self.places) > len(state):
                del self.places[len(state) :]
            elif len(self.places) < len(state):
                self.places.frombytes(bytes(4 * (len(state) - len(self.places))))


class Fork:
    """Several strands that hang at one offset: found by their first block, or by how far they agree with one.

    needed: how many of them something needs (see `Strand.past`).
    """

    __slots__ = ("by_first", "needed", "order")

    def __init__(self) -> None:
        self.by_first: dict[bytes, Strand] = {}
        self.order: list[bytes] = []
        self.needed = 0

    def add(self, first: bytes, strand: "Strand") -> None:
        """Hang a strand whose first block is not here yet."""
        self.by_first[first] = strand
        insort(self.order, first)

    def remove(self, first: bytes) -> None:
        """Take a strand off."""
        del self.by_first[first]
        del self.order[bisect_left(self.order, first)]

    def nearest(self, start: bytes) -> "Iterator[tuple[int, Strand]]":
        """Strands by falling number of the tokens that they have in common with `start`, down to one."""
        order = self.order
        right = bisect_right(order, start)
        left = right - 1
        before = common(order[left], start) if left >= 0 else 0
        after = common(order[right], start) if right < len(order) else 0
        while before or after:
            if before >= after:
                yield before, self.by_first[order[left]]
                left -= 1
                before = common(order[left], start) if left >= 0 else 0
            else:
                yield after, self.by_first[order[right]]
                right += 1
                after = common(order[right], start) if right < len(order) else 0


class Strand:
    """Consecutive blocks of one path. The root of a namespace is a strand without blocks whose one key is the root.

    keys: of the leading blocks that were hashed so far.  again: leading blocks that were used at least twice.  past: last
    blocks that nothing needs any more (see paths.py): known as history only.
    holds: block offset -> number of leases and wants whose path ends there: keeps blocks in the tree, in no tier.
    wants: number of a want -> how many leading blocks it covers (see wants.py).  fates: how ranges of blocks left tiers,
    the latest last (see fates.py).
    """

    __slots__ = (
        "again",
        "at",
        "children",
        "depth",
        "fates",
        "holdings",
        "holds",
        "keys",
        "notes",
        "parent",
        "past",
        "size",
        "stamps",
        "tok",
        "wants",
    )

    def __init__(self, parent: "Strand | None", at: int, tok: bytes, size: int, stamp: int, num_tiers: int) -> None:
        self.parent = parent
        self.at = at
        self.depth: int = parent.depth + at if parent else 0
        self.tok = bytearray(tok)
        self.size = size
        self.past = size
        self.keys = bytearray()
        self.stamps = Steps(size, stamp)
        self.again = 0
        self.notes: Any = None  # the observer's, see tierkv.policies.base.Leaf
        self.children: dict[int, Strand | Fork] | None = None
        self.holds: dict[int, int] | None = None
        self.wants: dict[int, int] | None = None
        self.fates: list[tuple[int, int, Fate]] | None = None
        self.holdings: list[Holding | None] = [None] * num_tiers

    def tier_of(self, block: int) -> int | None:
        """The fastest tier that holds a block."""
        for tier, holding in enumerate(self.holdings):
            if holding and holding.state[block : block + 1] == b"\1":
                return tier
        return None

    def fanout(self, block: int) -> int:
        """How many different blocks are known to follow this one."""
        found = self.children.get(block + 1) if self.children else None
        within = block + 1 < self.size
        return within + (0 if found is None else len(found.by_first) if type(found) is Fork else 1)

    def follower(self, block: int) -> "tuple[Strand, int] | None":
        """The only block that is known to follow this one: its strand and its number there."""
        found = self.children.get(block + 1) if self.children else None
        if found is None:
            return (self, block + 1) if block + 1 < self.size else None
        return (found, 0) if type(found) is Strand and block + 1 == self.size else None

    def span(self, tier: int) -> tuple[int, int]:
        """Blocks that the tier may forget now (see `tierkv.policies.base.Leaf`)."""
        if tier == HISTORY:
            return max(self.size - self.past, max(self.children or (0,))) if self.past else self.size, self.size
        holding = self.holdings[tier]
        if not holding:
            return 0, 0
        hi = holding.count
        if not holding.pins and hi == len(holding.state):  # the usual case: no gap, and nobody at it
            return min(holding.floor, hi), hi
        return holding.span()

    def stamp(self, block: int) -> int:
        """Logical time of a block's last use."""
        return int(self.stamps.at(block))

    def stamp_start(self, block: int) -> int:
        """The first of the blocks up to `block` that were last used together with it."""
        return self.stamps.start(block)

    def child(self, at: int, first: bytes) -> "Strand | None":
        """The strand that hangs at `at` and begins with the block `first`."""
        found = self.children.get(at) if self.children else None
        if found is None:
            return None
        if type(found) is Fork:
            return found.by_first.get(first)
        assert type(found) is Strand
        return found if found.tok.startswith(first) else None

    def hang(self, child: "Strand", first: bytes) -> None:
        """Add a child at its offset."""
        if self.children is None:
            self.children = {}
        found = self.children.get(child.at)
        if found is None:
            self.children[child.at] = child
            return
        if type(found) is not Fork:
            assert type(found) is Strand
            fork = self.children[child.at] = Fork()
            fork.add(bytes(found.tok[: len(first)]), found)
            fork.needed = int(found.needed)
            found = fork
        found.add(first, child)

    def unhang(self, child: "Strand", first: bytes) -> None:
        """Take a child off."""
        assert self.children is not None
        found = self.children[child.at]
        if type(found) is Fork:
            found.remove(first)
            if found.by_first:
                return
        del self.children[child.at]
        if not self.children:
            self.children = None

    @property
    def needed(self) -> bool:
        """Whether something needs some of its blocks: then the blocks before it are needed, too."""
        return self.past < self.size

    def offspring(self) -> "Iterator[Strand]":
        """Every child."""
        for found in (self.children or {}).values():
            if type(found) is Fork:
                yield from found.by_first.values()
            else:
                assert type(found) is Strand
                yield found

    def key(self, block: int) -> Key:
        """Key of a block that was hashed; of block -1, the key before this strand."""
        if block >= 0:
            return Key(bytes(self.keys[block * KEY_BYTES : (block + 1) * KEY_BYTES]))
        if self.parent is None:
            return Key(bytes(self.keys))
        return self.parent.key(self.at - 1)

    @property
    def root(self) -> Key:
        """The root of its namespace."""
        strand = self
        while strand.parent:
            strand = strand.parent
        return Key(bytes(strand.keys))

    @property
    def num_keys(self) -> int:
        """Leading blocks whose key is known."""
        return len(self.keys) // KEY_BYTES if self.parent else 0


def common(one: bytes, other: bytes) -> int:
    """Leading tokens that two blocks, or parts of blocks, agree on."""
    if one[:4] != other[:4]:
        return 0
    differ = int.from_bytes(one, "little") ^ int.from_bytes(other, "little")
    agree = ((differ & -differ).bit_length() - 1) >> 5 if differ else len(one)
    return min(agree, len(one) >> 2, len(other) >> 2)


def agree(tok: bytearray, start: int, query: bytes, pos: int, block_bytes: int) -> int:
    """Whole blocks that `tok` from byte `start` and `query` from byte `pos` have in common."""
    hi = min(len(tok) - start, len(query) - pos) // block_bytes
    if not hi or same(tok, start, query, pos, hi * block_bytes):
        return hi
    lo = 0
    # Halving compares each byte about once more; numpy needs 30 us for the first mismatch in 512 KiB.
    while hi - lo > 1:
        middle = (lo + hi) >> 1
        at = lo * block_bytes
        if same(tok, start + at, query, pos + at, middle * block_bytes - at):
            lo = middle
        else:
            hi = middle
    return lo


def same(tok: bytearray, start: int, query: bytes, pos: int, size: int) -> bool:
    """Whether `size` bytes of `tok` from `start` and of `query` from `pos` are equal; both are that long."""
    return query.startswith(memoryview(tok)[start : start + size], pos)
