"""What no policy can beat: Belady's choice, and a store without a limit.

Belady keeps, of what it may keep, the blocks that are used again soonest. With bypass (a block that would be used again last
is not let in) that is optimal for block hits, and it obeys the rule of a prefix cache by itself: whoever uses a block uses
those before it first, so they are always the better ones to keep. Belady, "A study of replacement algorithms", 1966.
It is not optimal for seconds or tokens: there it is a good solution, not a bound.
"""

import mmap
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from heapq import heapify, heappush, heappushpop
from itertools import chain
from typing import IO, Final

import numpy as np
import numpy.typing as npt

from tierkv.cost import CostModel
from tierkv.simulate.cells import BELADY, UNBOUNDED, Cell, Tally
from tierkv.simulate.request import ID_BYTES, Trace

NEVER: Final = np.iinfo(np.int64).max
BATCH_REFS: Final = 1 << 18
SORTED_REFS: Final = 1 << 22
"""References that are put in order at a time, at about 50 bytes each."""

Positions = npt.NDArray[np.int64]


class Oracle:
    """The future of a trace: for every reference, when its block is referenced next. num_unique: its different blocks.

    Memory: one byte per reference while a cell is made, and what Belady keeps (100 bytes per block of capacity); the rest
    lies in an unnamed temporary file, 8 bytes per reference, and 16 more at first.
    """

    def __init__(
        self,
        trace: Trace,
        *,
        cost: CostModel,
        clock: Callable[[], float] = time.process_time,
        at_a_time: int = SORTED_REFS,
    ) -> None:
        self._trace, self._cost, self._clock = trace, cost, clock
        self._next, self.num_unique = next_uses(trace, at_a_time=at_a_time)

    def belady(self, capacity_blocks: int) -> Cell:
        """Keep what is used again soonest."""
        start = self._clock()
        return self._cell(BELADY, capacity_blocks, self._kept(capacity_blocks), start)

    def unbounded(self) -> Cell:
        """Keep everything."""
        start, hits = self._clock(), np.zeros(len(self._next), dtype=np.uint8)
        for at in range(0, len(hits), BATCH_REFS):
            following = self._next[at : at + BATCH_REFS]
            hits[following[following != NEVER]] = 1
        return self._cell(UNBOUNDED, self.num_unique, hits.data, start)

    def _cell(self, policy: str, capacity: int, hits: memoryview | bytearray, start: float) -> Cell:
        tally, at = Tally(), 0
        for request in self._trace:
            if size := request.num_blocks:
                tally.add(bytes(hits[at : at + size]).count(1), size, request.input_tokens)
                at += size
        return tally.cell(
            policy=policy,
            capacity=capacity,
            unique=self.num_unique,
            block_tokens=self._trace.block_tokens,
            cost=self._cost,
            elapsed_s=self._clock() - start,
        )

    def _kept(self, capacity: int) -> bytearray:
        """One byte per reference: 1 where its block is held."""
        hits = bytearray(len(self._next))
        heap: list[
            int
        ] = []  # when kept blocks are used next, negated: the last one first; those that passed stay at its end
        size = 0
        batches = (self._next[at : at + BATCH_REFS].tolist() for at in range(0, len(hits), BATCH_REFS))
        for at, following in enumerate(chain.from_iterable(batches)):
            if hits[at]:
                size -= 1
            if following == NEVER:
                continue
            hits[following] = 1
            if size < capacity:
                size += 1
                heappush(heap, -following)
                if len(heap) > 2 * size + 1024:
                    heap = [each for each in heap if -each > at]
                    heapify(heap)
            else:
                hits[-heappushpop(heap, -following)] = 0
        return hits


def next_uses(trace: Trace, *, at_a_time: int = SORTED_REFS) -> tuple[Positions, int]:
    """For every reference of a trace the next one to the same block, or NEVER; and the number of different blocks.

    References are dealt by their ids into piles of about `at_a_time`, which are sorted one by one.
    """
    refs = sum(request.num_blocks for request in trace)
    if not refs:
        return np.empty(0, dtype=np.int64), 0
    bits = max(refs // at_a_time, 1).bit_length()
    with tempfile.TemporaryFile(prefix="tierkv-oracle-") as file:
        file.truncate(8 * refs)
        following: Positions = np.frombuffer(mmap.mmap(file.fileno(), 8 * refs), dtype=np.int64)
    following[:] = NEVER
    num_unique = 0
    with ExitStack() as stack:
        piles = [stack.enter_context(tempfile.TemporaryFile(prefix="tierkv-oracle-")) for _ in range(1 << bits)]
        _deal(trace, piles, bits)
        for pile in piles:
            pile.seek(0)
            ids, positions = np.frombuffer(pile.read(), dtype=np.uint64).reshape(-1, 2).T
            order = np.argsort(ids, kind="stable")
            ids, positions = ids[order], positions[order].astype(np.int64)
            again = ids[1:] == ids[:-1]
            following[positions[:-1][again]] = positions[1:][again]
            num_unique += len(ids) - int(np.count_nonzero(again))
            pile.truncate(0)
    return following, num_unique


def _deal(trace: Trace, piles: Sequence[IO[bytes]], bits: int) -> None:
    """Write each reference, its id and its position, onto the pile that the id's leading bits name."""
    at = 0
    for batch in _batches(trace):
        ids = np.frombuffer(batch, dtype="<u8").astype(np.uint64)
        pairs = np.stack([ids, np.arange(at, at + len(ids), dtype=np.uint64)], axis=1)
        at += len(ids)
        number = (ids >> np.uint64(64 - bits)).astype(np.int64)
        pairs = pairs[np.argsort(number, kind="stable")]
        ends = np.cumsum(np.bincount(number, minlength=len(piles))).tolist()
        for pile, lo, hi in zip(piles, [0, *ends], ends, strict=False):
            pile.write(pairs[lo:hi].tobytes())


def _batches(trace: Trace) -> Iterator[bytes]:
    """Ids of all references, some at a time."""
    parts, size = [], 0
    for request in trace:
        parts.append(request.blocks)
        size += len(request.blocks)
        if size >= BATCH_REFS * ID_BYTES:
            yield b"".join(parts)
            parts, size = [], 0
    yield b"".join(parts)
