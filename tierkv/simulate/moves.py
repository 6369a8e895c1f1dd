"""Blocks under way between tiers, in virtual time: up for loads, down when they are saved, used again or about to go.

The same decisions as in tierkv/edges.py, transfers.py and ahead.py, on the same index; a link's time instead of bytes.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from tierkv.cost import CostModel
from tierkv.index import Copy, Index, Lease
from tierkv.simulate.events import Link, Timeline
from tierkv.simulate.hierarchy import DiskFigures, EdgeFigures, EnginePlan, TierPlan, piece_blocks
from tierkv.simulate.request import ID_BYTES

DEVICE, HOST = 0, 1


class Distinct:
    """Counts different ids, at most 24 bytes each."""

    def __init__(self) -> None:
        self._known = np.empty(0, dtype=np.uint64)
        self._fresh: list[bytes] = []
        self._size = 0

    def add(self, ids: bytes) -> None:
        """Count ids of ID_BYTES each, those known already once."""
        self._fresh.append(ids)
        self._size += len(ids) // ID_BYTES
        if self._size > max(1 << 16, len(self._known)):
            self.count()

    def count(self) -> int:
        """Different ids so far."""
        fresh = np.frombuffer(b"".join(self._fresh), dtype=np.uint64)
        self._known = np.union1d(self._known, fresh)
        self._fresh, self._size = [], 0
        return len(self._known)


class Moves:
    """The links of one hierarchy. copied: called after each copy down, which has unpinned what it kept.

    unsaved: blocks that a full queue refused.  num_copies: downward, queued or under way.
    """

    def __init__(
        self,
        *,
        index: Index,
        plans: tuple[TierPlan, ...],
        engine: EnginePlan,
        cost: CostModel,
        timeline: Timeline,
        block_tokens: int,
        block_bytes: int,
        copied: Callable[[], None],
    ) -> None:
        self._index, self._plans, self._cost, self._copied = index, plans, cost, copied
        self._watermark, self._block_bytes = engine.spill_watermark, block_bytes
        self.piece = piece_blocks(block_bytes)
        queue = max(1, engine.save_queue_tokens // block_tokens)
        link = partial(Link, timeline, block_bytes=block_bytes)
        self._up = [link(bytes_per_s=plan.read_bytes_per_s, latency_s=plan.latency_s) for plan in plans]
        self._down = [
            link(bytes_per_s=plan.write_bytes_per_s, latency_s=plan.latency_s, max_waiting=queue) for plan in plans
        ]
        self.num_copies = self.unsaved = 0
        self._spilling = [False] * len(plans)
        self._spill_left = [0] * len(plans)  # blocks, until somebody needs room again
        self._moved: Counter[tuple[int, int]] = Counter()
        self._distinct = Distinct()
        for tier, up in enumerate(self._up[HOST:], HOST):  # what a store knows of its tiers after a while
            cost.observe_fetch(tier, self.piece, up.seconds(self.piece))

    # -- up ---------------------------------------------------------------------------------------------------------

    def to_host(
        self, lease: Lease, tier: int, lo: int, hi: int, *, wanted: Callable[[], bool], then: Callable[[], None]
    ) -> None:
        """Read blocks of a lease from a tier at rest, into the host tier where it has room; not begun unless still `wanted`.

        then: called at the end in any case.
        """
        copies: list[Copy] = []
        link = self._up[tier]

        def begin() -> float:
            if not wanted():
                return 0.0
            if copy := self._index.begin_copy(lease, HOST, lo, hi, worth=math.inf):
                copies.append(copy)
            self._moved[tier, HOST] += hi - lo
            self._cost.observe_fetch(tier, hi - lo, link.seconds(hi - lo))
            return link.seconds(hi - lo)

        def end() -> None:
            for copy in copies:
                self._index.commit_copy(copy, [True] * len(copy.blocks))
            then()

        link.submit(begin, end)

    def to_device(self, blocks: int, *, wanted: Callable[[], bool], then: Callable[[], None]) -> None:
        """Copy blocks from host memory to pages; as `to_host`."""
        link = self._up[HOST]

        def begin() -> float:
            if not wanted():
                return 0.0
            self._moved[HOST, DEVICE] += blocks
            return link.seconds(blocks)

        link.submit(begin, then)

    # -- down -------------------------------------------------------------------------------------------------------

    def copy_saved(self, lease: Lease, lo: int, hi: int) -> None:
        """Blocks [lo, hi) lie on the device now: queue copies of them where that is when they are copied."""
        if len(self._plans) > HOST and self._plans[HOST].copy_down == "save":
            self._queue(HOST, lease, lo, hi)

    def copy_second_use(self, lease: Lease) -> None:
        """The lease's path is used again: queue copies where that is when they are copied."""
        for tier, plan in enumerate(self._plans[HOST:], HOST):
            if plan.copy_down == "second_use":
                for lo, hi in lease.second_use(tier):
                    self._queue(tier, lease, lo, hi)

    def copy_ahead(self, blocks: int) -> None:
        """Room for some blocks was given out: copy what is forgotten next where that is when it is copied, if room is short."""
        for tier, plan in enumerate(self._plans[HOST:], HOST):
            if plan.copy_down == "spill":
                capacity = self._index.room(_above(tier))[1]
                self._spill_left[tier] = max(blocks, math.ceil(self._watermark * capacity))
                self._spill(tier)

    def _spill(self, tier: int) -> None:
        """Copy the next batch, if none is under way.

        It goes on until what the watermark asks for is below, or as much was copied: a tier that is too small for that
        forgets what it got, and would be given it for ever.
        """
        above, left = _above(tier), self._spill_left[tier]
        free, capacity = self._index.room(above)
        if self._spilling[tier] or left <= 0 or free > self._watermark * capacity:
            return
        leases = self._index.spill(above, tier, min(left, self.piece))
        if leases:
            self._spilling[tier] = True
            done = partial(self._end_spill, tier, leases)
            if not self._copy(tier, [(lease, lease.lo, lease.num_blocks) for lease in leases], done):
                done(0)

    def _end_spill(self, tier: int, leases: list[Lease], moved: int) -> None:
        for lease in leases:
            lease.release()
        self._spilling[tier] = False
        self._spill_left[tier] -= moved
        if moved:
            self._spill(tier)

    def _queue(self, tier: int, lease: Lease, lo: int, hi: int) -> None:
        if lo < hi:
            own = lease.share(lo, hi, _above(tier))
            if not self._copy(tier, [(own, lo, hi)], lambda _: own.release()):
                self.unsaved += hi - lo
                own.release()

    def _copy(self, tier: int, parts: list[tuple[Lease, int, int]], done: Callable[[int], None]) -> bool:
        """Queue the copy of some leases' blocks; `done` is told how many moved. False: the queue is full."""
        above, link = _above(tier), self._down[tier]
        feeds = tier == HOST and any(plan.copy_down == "save" for plan in self._plans[HOST + 1 :])
        copies: list[Copy] = []

        def begin() -> float:
            for lease, lo, hi in parts:
                for first, last in lease.held(above, lo, hi):
                    lease.places(above, first, last)  # pins them
                    if copy := self._index.begin_copy(lease, tier, first, last, worth=math.inf if feeds else None):
                        copies.append(copy)
            return link.seconds(sum(len(copy.blocks) for copy in copies))

        def end() -> None:
            for copy in copies:
                self._index.commit_copy(copy, [True] * len(copy.blocks))
                self._moved[above, tier] += len(copy.blocks)
                for lo, hi in _stretches(copy.blocks) if self._plans[tier].name == "disk" else ():
                    self._distinct.add(copy.lease.tokens(lo, hi))
            if tier == HOST:
                self._written_through(parts)
            self.num_copies -= 1
            done(sum(len(copy.blocks) for copy in copies))
            self._copied()

        self.num_copies += 1
        if link.submit(begin, end, weight=sum(hi - lo for _, lo, hi in parts)):
            return True
        self.num_copies -= 1
        return False

    def _written_through(self, parts: list[tuple[Lease, int, int]]) -> None:
        """Blocks have come to the host: queue them for the tiers that get them at once."""
        for below in range(HOST + 1, len(self._plans)):
            if self._plans[below].copy_down == "save":
                for lease, lo, hi in parts:
                    self._queue(below, lease, lo, hi)

    # -- figures ----------------------------------------------------------------------------------------------------

    def edges(self, duration_s: float) -> Iterator[EdgeFigures]:
        """What moved between the tiers."""
        for tier in range(HOST, len(self._plans)):
            for source, target, link in ((_above(tier), tier, self._down[tier]), (tier, _above(tier), self._up[tier])):
                yield EdgeFigures(
                    source=self._plans[source].name,
                    target=self._plans[target].name,
                    bytes=self._moved[source, target] * self._block_bytes,
                    busy_share=link.busy_s / duration_s if duration_s else 0.0,
                )

    def disk(self, duration_s: float) -> DiskFigures | None:
        """What the disk had to bear; None: there is none."""
        for tier, plan in enumerate(self._plans):
            if plan.name == "disk":
                return DiskFigures(
                    written_bytes=self._moved[HOST, tier] * self._block_bytes,
                    distinct_bytes=self._distinct.count() * self._block_bytes,
                    read_bytes=self._moved[tier, HOST] * self._block_bytes,
                    capacity_bytes=self._index.room(tier)[1] * self._block_bytes,
                    duration_s=duration_s,
                )
        return None


def _above(tier: int) -> int:
    """Where a tier gets its blocks from: all that are below it, from the host."""
    return DEVICE if tier == HOST else HOST


def _stretches(blocks: list[int]) -> Iterator[tuple[int, int]]:
    """Ranges [lo, hi) of consecutive numbers in a rising list."""
    lo = 0
    for at in range(1, len(blocks) + 1):
        if at == len(blocks) or blocks[at] != blocks[at - 1] + 1:
            yield blocks[lo], blocks[at - 1] + 1
            lo = at
