"""What no policy can beat: Belady's choice, and a store without a limit.

Belady keeps, of what it may keep, the blocks that are used again soonest. With bypass (a block that would be used again last
is not let in) that is optimal for block hits, and it obeys the rule of a prefix cache by itself: whoever uses a block uses
those before it first, so they are always the better ones to keep. Belady, "A study of replacement algorithms", 1966.
It is not optimal for seconds or tokens: there it is a good solution, not a bound.
"""

import time
from collections.abc import Callable, Iterator
from heapq import heapify, heappush, heappushpop
from typing import Final

import numpy as np
import numpy.typing as npt

from tierkv.cost import CostModel
from tierkv.simulate.cells import BELADY, UNBOUNDED, Cell, Tally
from tierkv.simulate.request import Request, Trace

NEVER: Final = np.iinfo(np.int64).max

Positions = npt.NDArray[np.int64]


class Oracle:
    """The future of a trace: for every reference, when its block is referenced next."""

    def __init__(self, trace: Trace, *, cost: CostModel, clock: Callable[[], float] = time.perf_counter) -> None:
        self._trace, self._cost, self._clock = trace, cost, clock
        ids = np.frombuffer(b"".join(request.blocks for request in trace), dtype="<u8")
        order = np.argsort(ids, kind="stable")
        ids = ids[order]
        again = ids[1:] == ids[:-1]
        self._next: Positions = np.full(len(ids), NEVER, dtype=np.int64)
        self._next[order[:-1][again]] = order[1:][again]
        self.num_unique = len(ids) - int(again.sum())

    def belady(self, capacity_blocks: int) -> Cell:
        """Keep what is used again soonest."""
        return self._cell(BELADY, capacity_blocks, self._kept(capacity_blocks))

    def unbounded(self) -> Cell:
        """Keep everything."""
        hits = np.zeros(len(self._next), dtype=np.uint8)
        hits[self._next[self._next != NEVER]] = 1
        return self._cell(UNBOUNDED, self.num_unique, memoryview(hits.tobytes()))

    def _cell(self, policy: str, capacity: int, hits: memoryview) -> Cell:
        start, tally, at = self._clock(), Tally(), 0
        for request, size in _sized(self._trace):
            found = hits[at : at + size].tobytes().count(1)
            tally.add(request, found, self._trace.block_tokens)
            at += size
        return tally.cell(
            policy=policy,
            capacity=capacity,
            unique=self.num_unique,
            cost=self._cost,
            elapsed_s=self._clock() - start,
        )

    def _kept(self, capacity: int) -> memoryview:
        """One byte per reference: 1 where its block is held."""
        hits = bytearray(len(self._next))
        heap: list[
            int
        ] = []  # when kept blocks are used next, negated: the last one first; those that passed stay at its end
        size = 0
        for at, following in enumerate(self._next.tolist()):
            if hits[at]:
                size -= 1
            if following == NEVER:
                continue
            if size < capacity:
                size += 1
                hits[following] = 1
                heappush(heap, -following)
                if len(heap) > 2 * size + 1024:
                    heap = [each for each in heap if -each > at]
                    heapify(heap)
            elif capacity:
                hits[following] = 1
                hits[-heappushpop(heap, -following)] = 0
        return memoryview(hits)


def _sized(trace: Trace) -> Iterator[tuple[Request, int]]:
    for request in trace:
        if size := request.num_blocks:
            yield request, size
