"""When blocks are copied down: each edge between two tiers does it as soon as they are saved, at their second use, or ahead of
eviction ("save", "second_use", "spill"). How they are copied is transfers.py's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from tierkv.index import Lease
from tierkv.mover import SAVE_LANE, Mover
from tierkv.transfers import DEVICE, HOST, Below, Places, copy_to_host, write_down


@dataclass(slots=True)
class _Spill:
    """One edge that copies ahead of eviction; at most one batch of it is under way."""

    above: int
    below: Below | None
    under_way: bool = field(default=False)


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
        self._spills = [_Spill(DEVICE, None)] if host_copy_down == "spill" else []
        self._spills += [_Spill(HOST, tier) for tier in below if tier.copy_down == "spill"]

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

    def copy_ahead(self) -> None:
        """Where `copy_down` is "spill": copy what is forgotten next, once room is short, so that eviction only forgets."""
        index = self._places.index
        for spill in self._spills:
            free, capacity = index.room(spill.above)
            if spill.under_way or free > self._watermark * capacity:
                continue
            leases = index.spill(spill.above, spill.below.number if spill.below else HOST, self._piece)
            if not leases:
                continue
            spill.under_way = True
            job = partial(self._run_spill, spill, leases, self._places.device.mark())
            lane = spill.below.name if spill.below else SAVE_LANE
            if self._mover.submit(lane, job, blocks=sum(lease.num_blocks - lease.lo for lease in leases)) is None:
                self._end_spill(spill, leases)

    def to_host(self, lease: Lease, lo: int, hi: int, mark: object, *, share: float = 1.0) -> None:
        """Copy to the host, in a job, and queue what the tiers below it want as soon as it is there."""
        copy_to_host(self._places, lease, lo, hi, mark=mark, share=share)
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

    def _run_spill(self, spill: _Spill, leases: Sequence[Lease], mark: object) -> None:
        try:
            for lease in leases:
                if spill.below is None:
                    self.to_host(lease, lease.lo, lease.num_blocks, mark, share=self._share)
                else:
                    write_down(self._places, spill.below, lease, lease.lo, lease.num_blocks)
        finally:
            self._end_spill(spill, leases)

    @staticmethod
    def _end_spill(spill: _Spill, leases: Sequence[Lease]) -> None:
        for lease in leases:
            lease.release()
        spill.under_way = False
