"""What other capacities would have hit: sampled reuse distances of one stream of lookups (SHARDS). Pure.

A cache that forgets the least recently used leaf first is a stack: a lookup uses its whole path, the root last, so the blocks
above a block are always more recent than it, and block i of a prompt is found in a tier of C blocks exactly when fewer than C
others are above it in the stack when the prompt comes. One pass thus tells the hit rate at every capacity.

Blocks are followed only where a hash of their name is under a limit; so a share R of them stands for all, and a position among
them is one R-th of the true one. Between two requests no more changes than which leading part of older paths has moved to the
top, so the stack is kept as groups, one per request: what was last used by it.

Source: Waldspurger et al., Efficient MRC Construction with SHARDS, FAST'15 (fixed size, §3.3; SHARDS_adj, §4). Grouping and
the cut at the far end are ours.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from threading import Lock
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tierkv.layout import TOKEN_BYTES

Names = npt.NDArray[np.uint64]
"""One number per block of a prompt, evenly distributed, that stands for the block and all before it."""

SAMPLES: Final = 32768
BYTES_PER_SAMPLE: Final = 260
"""At most: peaks under tracemalloc were 252 at 32,768 samples and 257 at 8,192 (CPython 3.11, 2026-11-22)."""
KEPT: Final = 0.75
"""Part of the samples that is left when there are too many: fewer would cost precision, more would come too often."""
EXACT: Final = 128
"""Capacities under this are told apart one by one; above, those of an octave by half as many steps."""
CLASSES: Final = EXACT + EXACT // 2 * 33
BATCH: Final = 4096
"""Blocks, or lookups, that are taken in together."""
WINDOW_REFS: Final = 1 << 22
"""References after which all that was counted weighs half."""

TIMES: Final = (0.5, 1.0, 2.0, 4.0)
"""How much larger each tier is thought to be."""

_UNKNOWN: Final = 1 << 60
_MASK: Final = (1 << 64) - 1
_STEP: Final = 0x9E3779B97F4A7C15


class Namer:
    """Names of a prompt's blocks, a few tens of nanoseconds each: not the store's keys, and good for statistics only.

    seed: names of two namers tell nothing of each other.
    """

    def __init__(self, *, block_tokens: int, seed: int = 0) -> None:
        self._step = block_tokens * TOKEN_BYTES
        # Two tokens to a word where that is possible: half the products.
        self._word: np.dtype[Any] = np.dtype("<u8") if self._step % 8 == 0 else np.dtype("<u4")  # Any: of either size
        words = self._step // self._word.itemsize
        numbers = np.arange(1, words + 1, dtype=np.uint64) * np.uint64(_STEP) + np.uint64(seed & _MASK)
        self._factors = mixed(numbers) | np.uint64(1)

    def names(self, tokens: bytes, *, after: "tuple[int, int]" = (0, 0)) -> "tuple[Names, tuple[int, int]]":
        """Names of the whole blocks of `tokens` (int32-LE), and what to give as `after` for those that follow them."""
        size = len(tokens) // self._step
        width = len(self._factors)
        words = np.frombuffer(tokens, self._word, size * width).reshape(size, width).astype(np.uint64, copy=False)
        sums = (words * self._factors).sum(axis=1, dtype=np.uint64)
        start, number = after
        sums += np.arange(number + 1, number + size + 1, dtype=np.uint64) * np.uint64(_STEP)
        chained = np.cumsum(mixed(sums), dtype=np.uint64) + np.uint64(start)
        end = int(chained[-1]) if size else start
        return mixed(chained), (end, number + size)


def mixed(numbers: Names) -> Names:
    """Numbers as evenly distributed ones, one to one (the finaliser of SplitMix64, Steele et al., OOPSLA'14)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


class ReuseDistances:
    """A stack of blocks by last use, sampled. Thread-safe.

    max_blocks: capacities beyond are not told apart: blocks so far down are forgotten, so that a store may run for ever.
    samples: blocks followed at most, but for one batch; the error falls with its root.
    """

    def __init__(self, *, max_blocks: int, samples: int = SAMPLES, window_refs: int = WINDOW_REFS) -> None:
        self.max_blocks, self._samples, self._window = max_blocks, samples, window_refs
        self._limit = _MASK  # a block is followed when its name is not above
        self._group: dict[int, int] = {}  # name of a followed block -> the request that used it last
        self._above = _Sums(2 * samples)
        self._now = 0
        self._waiting: list[tuple[Names, bool]] = []
        self._num_waiting = 0
        self._missed = np.zeros(CLASSES)  # references by the smallest capacity that would hit; the last: none
        self._refs = 0.0
        self._lock = Lock()

    @property
    def rate(self) -> float:
        """Share of all blocks that is followed."""
        return (self._limit + 1) / (_MASK + 1)

    @property
    def num_samples(self) -> int:
        """Blocks that are followed now."""
        return len(self._group)

    def refer(self, names: Names) -> None:
        """A prompt came that consists of these blocks: count where they were, and use them."""
        self._wait(names, True)

    def touch(self, names: Names) -> None:
        """Use blocks without a lookup: an answer wrote the last of them."""
        self._wait(names, False)

    def hit_shares(self, capacities: Sequence[int]) -> list[float]:
        """Share of all block references that least-recently-used-first would have found, at each capacity in blocks."""
        with self._lock:
            self._work()
            if not self._refs:
                return [0.0] * len(capacities)
            missed = np.interp(np.asarray(capacities, float) + 1, _EDGES, np.cumsum(self._missed[::-1])[::-1])
            return [float(min(1.0, max(0.0, 1 - share))) for share in missed / self._refs]

    @property
    def num_refs(self) -> int:
        """References that count, those from long ago by half."""
        with self._lock:
            self._work()
            return round(self._refs)

    def _wait(self, names: Names, counted: bool) -> None:
        with self._lock:
            self._waiting.append((names, counted))
            self._num_waiting += len(names)
            if self._num_waiting >= BATCH or len(self._waiting) >= BATCH:
                self._work()

    # -- under the lock ---------------------------------------------------------------------------------------------

    def _work(self) -> None:
        """Take in what waits, in its order; numpy's cost per call is that of many blocks."""
        if not self._waiting:
            return
        lookups, self._waiting, self._num_waiting = self._waiting, [], 0
        names = np.concatenate([names for names, _ in lookups])
        blocks = np.array([len(names) for names, _ in lookups])
        counted = np.array([counted for _, counted in lookups])
        places = np.flatnonzero(names <= self._limit)
        followed = names[places].tolist()
        ends = np.searchsorted(places, np.cumsum(blocks))
        stretches: list[tuple[int, int]] = []
        at = 0
        for end in ends.tolist():
            if at < end:
                self._use(followed[at:end], stretches)
            at = end
        if stretches:
            self._count(
                places - np.repeat(np.cumsum(blocks) - blocks, np.diff(ends, prepend=0)),
                blocks,
                ends,
                counted,
                stretches,
            )
        self._refs += int(blocks[counted].sum())
        if self._refs > self._window:
            self._missed /= 2
            self._refs /= 2
        if len(self._group) > self._samples:
            self._shrink()

    def _use(self, followed: list[int], stretches: list[tuple[int, int]]) -> None:
        """Move a path to the top; add where its blocks were, in stretches of the stack, the unknown ones last."""
        if self._now == self._above.size:
            self._renumber()
        now, above, total, left = self._now, self._above, len(self._group), len(followed)
        fresh = dict.fromkeys(followed, now)  # a strange trace may name a block twice
        for group, blocks in groupby(map(self._group.get, fresh)):
            if group is None:
                break
            count = len(list(blocks))
            # A path takes the leading part of what a group has left: whatever is before that was used with it, or later.
            stretches.append((total - above.upto(group), count))
            above.add(group, -count)
            left -= count
        if left:
            stretches.append((_UNKNOWN, left))
        self._group.update(fresh)
        above.add(now, len(fresh))
        self._now = now + 1

    def _count(
        self,
        places: npt.NDArray[np.int64],
        blocks: npt.NDArray[np.int64],
        ends: npt.NDArray[np.int64],
        counted: npt.NDArray[np.bool_],
        stretches: list[tuple[int, int]],
    ) -> None:
        """Add what each capacity misses of some prompts.

        places: of the followed blocks in their prompts.  blocks: of each prompt.  ends: the end of each prompt in `places`.

        Distances rise along a prompt, so what a capacity misses of it is its end. How long that is is told by the first
        followed block in it, and on average 1/R - 1 unfollowed ones before; where none is followed, it counts as nothing.
        That is without bias, and its error is that of one gap, mostly among blocks that are new. Counting each followed block
        1/R times, as SHARDS does, errs with the root of the prompt's length, and in the same way for all prompts that begin
        alike: by up to 1.7 points at 16,384 samples, where this erred by up to 0.9, and by up to 0.4 at 32,768 (two traces of
        Mooncake's and one of coding agents, 1-50 % of the unique blocks, four seeds; 2026-11-22).
        """
        sizes = np.diff(ends, prepend=0)
        each = 1 / self.rate
        until = np.diff(places, append=0).astype(float)
        until[ends[sizes > 0] - 1] = (blocks - 1)[sizes > 0] - places[ends[sizes > 0] - 1] + each
        until *= np.repeat(counted, sizes)
        firsts, lengths = np.array(stretches).T
        starts = np.cumsum(lengths) - lengths
        positions = np.repeat(firsts - starts, lengths) + np.arange(len(places))
        # Above the first followed block there are on average 1/R - 1 others; where all are followed, none.
        self._missed += np.bincount(_classes((positions + 1) * each), until, len(self._missed))

    def _shrink(self) -> None:
        """Forget what is too far down for any capacity; then, if that is not enough, follow fewer blocks."""
        names = np.fromiter(self._group, np.uint64, len(self._group))
        groups = np.fromiter(self._group.values(), np.int64, len(names))
        reach = max(1, round(self.max_blocks * self.rate))
        if len(names) > reach:
            kept = groups >= np.partition(groups, len(groups) - reach)[len(groups) - reach]
            names, groups = names[kept], groups[kept]
        left = int(self._samples * KEPT)
        if len(names) > left:
            self._limit = int(np.partition(names, left)[left]) - 1
            kept = names <= self._limit
            names, groups = names[kept], groups[kept]
        self._rebuild(names, groups)

    def _renumber(self) -> None:
        names = np.fromiter(self._group, np.uint64, len(self._group))
        self._rebuild(names, np.fromiter(self._group.values(), np.int64, len(names)))

    def _rebuild(self, names: Names, groups: "npt.NDArray[np.int64]") -> None:
        """Number the groups that are left from 0."""
        _, numbers = np.unique(groups, return_inverse=True)
        self._group = dict(zip(names.tolist(), numbers.tolist(), strict=True))
        self._above = _Sums(self._above.size, np.bincount(numbers) if len(numbers) else ())
        self._now = int(numbers.max()) + 1 if len(numbers) else 0


def what_if(distances: ReuseDistances, capacities: Mapping[str, int]) -> dict[tuple[str, float], float]:
    """Share of all block references found in a tier or a faster one, by the tier and how many times as large it is thought.

    capacities: blocks, the fastest tier first; what a tier holds, the slower ones hold too, or as much beside it.
    """
    cells, sizes, above = [], [], 0
    for tier, capacity in capacities.items():
        for times in TIMES:
            cells.append((tier, times))
            sizes.append(max(above, round(capacity * times)))
        above = max(above, capacity)
    return dict(zip(cells, distances.hit_shares(sizes), strict=True))


def _classes(needed: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.int64]:
    """The class of each capacity that would just hit; those beyond the last belong to it."""
    parts, exponents = np.frexp(needed)
    octaves = exponents - EXACT.bit_length()  # the first has the capacities from EXACT to twice as much
    large = EXACT + octaves * (EXACT // 2) + ((parts - 0.5) * EXACT).astype(np.int64)
    found: npt.NDArray[np.int64] = np.where(octaves < 0, np.minimum(needed, EXACT).astype(np.int64), large)
    return np.minimum(found, CLASSES - 1)


def _edges() -> npt.NDArray[np.float64]:
    octaves, steps = np.divmod(np.arange(CLASSES - EXACT), EXACT // 2)
    return np.concatenate([np.arange(EXACT, dtype=float), EXACT * 2.0**octaves * (1 + steps / (EXACT // 2))])


_EDGES: Final = _edges()


def as_rows(distances: ReuseDistances, capacities: Mapping[str, int]) -> list[dict[str, Any]]:  # Any: as JSON takes it
    """The same for people and files: a row per tier."""
    shares = what_if(distances, capacities)
    return [
        {"tier": tier, "blocks": blocks, "found": {f"{times:g}": round(shares[tier, times], 5) for times in TIMES}}
        for tier, blocks in capacities.items()
    ]


class _Sums:
    """Counts by number, with the sum of all up to one in logarithmic time (a Fenwick tree)."""

    def __init__(self, size: int, counts: "Sequence[int] | npt.NDArray[Any]" = ()) -> None:  # Any: of either sign
        self.size = size
        sums = np.zeros(size + 1, np.int64)
        sums[1 : len(counts) + 1] = counts
        running = np.cumsum(sums)
        at = np.arange(1, size + 1)
        self._tree: list[int] = [0, *(running[at] - running[at - (at & -at)]).tolist()]

    def add(self, number: int, count: int) -> None:
        """Change one count."""
        tree, size = self._tree, self.size
        number += 1
        while number <= size:
            tree[number] += count
            number += number & -number

    def upto(self, number: int) -> int:
        """The sum of the counts up to a number, it included."""
        tree, total = self._tree, 0
        number += 1
        while number:
            total += tree[number]
            number &= number - 1
        return total
