"""What no policy can beat: Belady's choice, and a store without a limit.

Belady keeps, of what it may keep, the blocks that are used again soonest. With bypass (a block that would be used again last
is not let in) that is optimal for block hits, and it obeys the rule of a prefix cache by itself: whoever uses a block uses
those before it first, so they are always the better ones to keep. Belady, "A study of replacement algorithms", 1966.
It is not optimal for seconds or tokens: there it is a good solution, not a bound.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from heapq import heapify, heappush, heappushpop
from itertools import chain
from typing import IO, Final
from weakref import finalize

import numpy as np
import numpy.typing as npt

from tierkv.cost import CostModel
from tierkv.simulate.blocks import Ids
from tierkv.simulate.cells import BELADY, UNBOUNDED, Cell, Tally
from tierkv.simulate.request import ID_BYTES, Request, Trace

NEVER: Final = np.iinfo(np.int64).max
BATCH_REFS: Final = 1 << 18
SORTED_REFS: Final = 1 << 22
"""References that are put in order at a time, at about 50 bytes each."""

Positions = npt.NDArray[np.int64]


class Oracle:
    """The bounds of a trace. num_unique: its different blocks.

    Memory: one byte per reference while a cell is made, and what Belady keeps (100 bytes per block of capacity). The rest
    lies in unnamed temporary files: 8 bytes per reference, and 24 more while they are made.
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
        self._future = Future(trace, at_a_time=at_a_time)
        self.num_unique = self._future.num_unique

    def belady(self, capacity_blocks: int) -> Cell:
        """Keep what is used again soonest."""
        start = self._clock()
        return self._cell(BELADY, capacity_blocks, self._kept(capacity_blocks), start)

    def unbounded(self) -> Cell:
        """Keep everything."""
        start, hits = self._clock(), np.zeros(self._future.num_refs, dtype=np.uint8)
        for following in self._future:
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
        hits = bytearray(self._future.num_refs)
        heap: list[
            int
        ] = []  # when kept blocks are used next, negated: the last one first; those that passed stay at its end
        size = 0
        for at, following in enumerate(chain.from_iterable(map(np.ndarray.tolist, self._future))):
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


class Future:
    """For every reference of a trace the next one to the same block, or NEVER. num_unique: different blocks.

    References are dealt by their ids onto piles of about `at_a_time`, which are sorted one by one; what comes out is dealt by
    position onto others, which are put together one by one. Memory: 50 bytes for each reference of a pile.
    """

    def __init__(self, trace: Iterable[Request], *, at_a_time: int = SORTED_REFS) -> None:
        self.num_unique = 0
        self.num_refs = sum(request.num_blocks for request in trace)
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="tierkv-oracle-")  # noqa: SIM115
        finalize(self, self._file.close)
        with ExitStack() as stack:
            count = self.num_refs // at_a_time + 1
            bits = count.bit_length()
            by_id = [stack.enter_context(tempfile.TemporaryFile(prefix="tierkv-oracle-")) for _ in range(1 << bits)]
            at = 0
            for batch in _batches(trace):
                ids = np.frombuffer(batch, dtype="<u8").astype(np.uint64)
                _deal(by_id, ids >> np.uint64(64 - bits), ids, np.arange(at, at + len(ids), dtype=np.uint64))
                at += len(ids)
            by_place = [stack.enter_context(tempfile.TemporaryFile(prefix="tierkv-oracle-")) for _ in range(count)]
            for pile in by_id:
                ids, places = _taken(pile)
                order = np.argsort(ids, kind="stable")
                ids, places = ids[order], places[order]
                again = ids[1:] == ids[:-1]
                self.num_unique += len(ids) - int(np.count_nonzero(again))
                now, following = places[:-1][again], places[1:][again]
                _deal(by_place, now // np.uint64(at_a_time), now, following)
            for number, pile in enumerate(by_place):
                lo = number * at_a_time
                part = np.full(min(at_a_time, self.num_refs - lo), NEVER, dtype=np.int64)
                now, following = _taken(pile)
                part[now.astype(np.int64) - lo] = following
                self._file.write(part.tobytes())
        self._file.flush()

    def __iter__(self) -> Iterator[Positions]:
        """The next references of all, in order, some at a time."""
        for at in range(0, 8 * self.num_refs, 8 * BATCH_REFS):
            yield np.frombuffer(os.pread(self._file.fileno(), 8 * BATCH_REFS, at), dtype=np.int64)


def _deal(piles: Sequence[IO[bytes]], number: Ids, one: Ids, other: Ids) -> None:
    """Write each pair onto the pile of its number."""
    pairs = np.stack([one, other], axis=1)[np.argsort(number, kind="stable")]
    ends = np.cumsum(np.bincount(number.astype(np.int64), minlength=len(piles))).tolist()
    for pile, lo, hi in zip(piles, [0, *ends], ends, strict=False):
        pile.write(pairs[lo:hi].tobytes())


def _taken(pile: IO[bytes]) -> tuple[Ids, Ids]:
    """The pairs of a pile, which is empty then."""
    pile.seek(0)
    one, other = np.frombuffer(pile.read(), dtype=np.uint64).reshape(-1, 2).T
    pile.truncate(0)
    return one, other


def _batches(trace: Iterable[Request]) -> Iterator[bytes]:
    """Ids of all references, some at a time."""
    parts, size = [], 0
    for request in trace:
        parts.append(request.blocks)
        size += len(request.blocks)
        if size >= BATCH_REFS * ID_BYTES:
            yield b"".join(parts)
            parts, size = [], 0
    yield b"".join(parts)
