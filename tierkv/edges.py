"""When blocks are copied down: each edge between two tiers does it as soon as they are saved, at their second use, or ahead of
eviction ("save", "second_use", "spill"). How they are copied is transfers.py's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil, inf
from threading import Lock

from tierkv.index import Lease
from tierkv.mover import SAVE_LANE, Mover
from tierkv.transfers import DEVICE, HOST, Below, Places, copy_to_host, write_down


@dataclass(slots=True)
class _Spill:
    """One edge that copies ahead of eviction; at most one piece of it is under way.

    below: None stands for the host.  reach: blocks that are to be free, or below already.  left: that may still be copied
    until somebody asks for room again.
    """

    above: int
    below: Below | None
    under_way: bool = field(default=False)
    reach: int = field(default=0)
    left: int = field(default=0)

    @property
    def target(self) -> int | None:
        """The number of the tier that gets the blocks; None: the index does not know what that has."""
        return self.below.number if self.below else HOST


@dataclass(frozen=True, slots=True)
class _Written:
    """What the engine had queued to be written to device pages: all up to a mark, at a time of the index's clock."""

    mark: object
    clock: int


class Edges:
    """The edges of one store. Its jobs run on the mover's threads; calls from any.

    watermark: free part of a tier under which "spill" copies ahead.  share: of the time, in which a spill from the device keeps
    the link busy.  piece: blocks spilled at a time.
    """

    def __init__(
        self,
        *,
        places: Places,
        below: Sequence[Below],
        mover: Mover,
        host_copy_down: str,
        watermark: float,
        share: float,
        piece: int,
    ) -> None:
        self._places, self._below, self._mover = places, below, mover
        self._host_copy_down, self._watermark, self._share, self._piece = host_copy_down, watermark, share, piece
        self._lock = Lock()  # of what is under way and what is left
        self._spills = [_Spill(DEVICE, None)] if host_copy_down == "spill" else []
        self._spills += [_Spill(HOST, tier) for tier in below if tier.copy_down == "spill"]

    @property
    def feeds(self) -> bool:
        """Is there a tier that gets everything the host gets?"""
        return any(below.copy_down == "save" for below in self._below)

    def copy_saved(self, lease: Lease, lo: int, hi: int) -> None:
        """Blocks [lo, hi) lie on the device now: queue copies of them where `copy_down` is "save"."""
        if self._host_copy_down == "save":
            self._queue_host(lease, lo, hi)

    def copy_refused(self, lease: Lease, hi: int) -> None:
        """More is known of a request at its end: let a full host look again at those of its blocks [0, hi) it did not take."""
        missing = [(lo, min(end, hi)) for lo, end in lease.missing(HOST) if lo < hi]
        if sum(end - lo for lo, end in missing) > self._places.index.room(HOST)[0]:
            for lo, end in missing:
                self.copy_saved(lease, lo, end)

    def copy_second_use(self, lease: Lease) -> None:
        """The lease's path is used again: queue copies where `copy_down` is "second_use"."""
        if self._host_copy_down == "second_use":
            for lo, hi in lease.second_use(HOST):
                self._queue_host(lease, lo, hi)
        for below in self._below:
            if below.copy_down == "second_use":
                for lo, hi in lease.second_use(below.number):
                    self._queue_below(below, lease, lo, hi)

    def copy_ahead(self, blocks: int) -> None:
        """Where `copy_down` is "spill": copy what is forgotten next, once room is short, so that eviction only forgets.

        blocks: that room was asked for just now. It goes on until as many, or those under the watermark, are free or below, or
        were copied: a tier below that soon forgets what it got would be given it for ever.
        """
        index = self._places.index
        for spill in self._spills:
            reach = max(blocks, ceil(self._watermark * index.room(spill.above)[1]))
            if spill.target is not None:  # a piece goes beyond it, and is not to push out what came before
                reach = min(reach, ceil(index.room(spill.target)[1] / 2))
            with self._lock:
                spill.reach = max(reach, spill.reach if spill.under_way else 0)
                spill.left = max(reach, spill.left if spill.under_way else 0)
            self._spill(spill, None)

    def _spill(self, spill: _Spill, written: _Written | None) -> None:
        """Copy the next piece, if none is under way and room is short.

        written: None on the engine's thread. Others cannot tell what that has queued since, and go on with what was used
        last before.
        """
        index = self._places.index
        free, capacity = index.room(spill.above)
        with self._lock:
            short, n = spill.reach - free, min(self._piece, spill.left)
            if spill.under_way or short <= 0 or n <= 0 or free > self._watermark * capacity:
                return
            spill.under_way = True
        leases = index.spill(spill.above, spill.target, n, within=short, until=written.clock if written else inf)
        if not leases:
            spill.under_way = False
            return
        written = written or _Written(self._places.device.mark(), index.clock)
        job = partial(self._run_spill, spill, leases, written)
        lane = spill.below.name if spill.below else SAVE_LANE
        if self._mover.submit(lane, job, blocks=sum(lease.num_blocks - lease.lo for lease in leases)) is None:
            self._end_spill(spill, leases)

    def to_host(
        self, lease: Lease, lo: int, hi: int, mark: object, *, share: float = 1.0, worth: float | None = None
    ) -> None:
        """Copy to the host, in a job, and queue what the tiers below it want as soon as it is there.

        worth: as in `Index.begin_copy`. A host that feeds a tier below lets everything in: what it refused would be nowhere.
        """
        if self.feeds:
            worth = inf
        copy_to_host(self._places, lease, lo, hi, mark=mark, share=share, worth=worth)
        self.copy_arrived(lease, lo, hi)

    def copy_arrived(self, lease: Lease, lo: int, hi: int) -> None:
        """Blocks [lo, hi) have come to the host: queue copies where `copy_down` is "save"."""
        for below in self._below:
            if below.copy_down == "save":
                self._queue_below(below, lease, lo, hi)

    def _queue_host(self, lease: Lease, lo: int, hi: int) -> None:
        """Copy blocks [lo, hi) to the host, and from there to the tiers that are written through."""
        own = lease.share(lo, hi, DEVICE)
        job = partial(self._run_host, own, lo, hi, self._places.device.mark())
        if self._mover.submit(SAVE_LANE, job, blocks=hi - lo) is None:
            self._places.metrics.saves_dropped.add(hi - lo, "host", "queue")
            own.release()

    def _run_host(self, lease: Lease, lo: int, hi: int, mark: object) -> None:
        with lease:
            self.to_host(lease, lo, hi, mark)

    def _queue_below(self, below: Below, lease: Lease, lo: int, hi: int) -> None:
        """Write blocks [lo, hi), as far as the host holds them, to a tier below it."""
        reason = "down" if below.breaker.open else "queue"
        own = lease.share(lo, hi, HOST)
        job = partial(self._run_below, below, own, lo, hi)
        future = None if below.breaker.open else self._mover.submit(below.name, job, blocks=hi - lo)
        if future is None:
            self._places.metrics.saves_dropped.add(hi - lo, below.name, reason)
            own.release()

    def _run_below(self, below: Below, lease: Lease, lo: int, hi: int) -> None:
        with lease:
            write_down(self._places, below, lease, lo, hi)

    def _run_spill(self, spill: _Spill, leases: Sequence[Lease], written: _Written) -> None:
        moved = 0
        try:
            for lease in leases:
                if spill.below is None:
                    self.to_host(lease, lease.lo, lease.num_blocks, written.mark, share=self._share)
                else:
                    write_down(self._places, spill.below, lease, lease.lo, lease.num_blocks)
            if spill.target is not None:
                held = [lease.held(spill.target, lease.lo, lease.num_blocks) for lease in leases]
                moved = sum(hi - lo for ranges in held for lo, hi in ranges)
        finally:
            self._end_spill(spill, leases, moved=moved)
        if moved:
            self._spill(spill, written)

    def _end_spill(self, spill: _Spill, leases: Sequence[Lease], *, moved: int = 0) -> None:
        for lease in leases:
            lease.release()
        with self._lock:
            spill.under_way = False
            spill.left -= moved
