"""The last journey of a block: up to the device, where a request waits for it.

Bytes come from the host tier, from a tier at rest through a place of the host tier (a spare one, when that has no room), or
straight out of memory that a tier lends.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from tierkv.arrival import Arrival
from tierkv.errors import TierError
from tierkv.index import Lease
from tierkv.keys import Key
from tierkv.lending import LentMemory
from tierkv.mover import Gate
from tierkv.tiers.base import Miss, Staging
from tierkv.transfers import DEVICE, HOST, Below, Places, read_below, reason


class _Begun(NamedTuple):
    """Blocks of which the first group of layers has come."""

    staging: Staging
    places: Sequence[int]
    pages: Sequence[int]


@dataclass(slots=True)
class Load:
    """Fill device pages with the blocks of a lease, in path order, up to the first that does not come.

    lease: the job's own, released at its end.  first: the blocks before it are attended to in place.
    pages: one per block from `first` on, then one for the lease's head if `head_tokens` is not 0.
    head_place: the host place that holds the head, if it is not the lease's.
    remote: keys of blocks that follow the lease's last one, to be had from `source`, and their tokens.
    mark: the point of the device's work after which the pages may be written.
    piece: blocks moved at a time; at most the size of a bundle of spares.
    memory: what tiers lend from.
    arrival: not None lets blocks that the host holds, or a tier lends, come layer group by layer group; spans: bytes of a
    block, per group.

    why, why_tier: what ended it before its last block.

    `done` resolves to (usable blocks, usable tokens of the head): when all have come, at the first failure, or in
    `expire`, whichever is first. The pages are not touched after that, even when a tier comes back late; but where there is
    an arrival, only the first group has come then, and the rest follows into the pages of usable blocks.
    """

    places: Places
    lease: Lease
    first: int
    pages: Sequence[int]
    below: Mapping[int, Below]
    mark: object
    deadline: float
    piece: int
    memory: LentMemory
    head_tokens: int = 0
    head_place: int | None = None
    source: Below | None = None
    remote: Sequence[Key] = ()
    remote_tokens: bytes = b""
    arrival: Arrival | None = None
    spans: Sequence[tuple[int, int]] = ()
    done: "Future[tuple[int, int]]" = field(default_factory=Future)
    why: Miss | None = None
    why_tier: str | None = None
    _gate: Gate = field(default_factory=Gate)
    _begun: list[_Begun] = field(default_factory=list)
    _loans: ExitStack = field(default_factory=ExitStack)
    _intact: list[Callable[[], bool]] = field(default_factory=list)  # one for each loan that is kept
    _lent_from: int | None = None
    _first_s: float = 0.0
    _blocks: int = field(init=False)
    _wanted: int = field(init=False)

    def __post_init__(self) -> None:
        self._blocks = self.first
        self._wanted = self.lease.num_blocks + len(self.remote)

    @property
    def short(self) -> int:
        """Blocks that were to come and did not; meant for after the answer."""
        return self._wanted - self._blocks

    @property
    def lent(self) -> range:
        """Blocks that need not be copied down: out of a tier's own memory, or of one that lasts. Meant for after the answer."""
        return range(0) if self._lent_from is None else range(self._lent_from, self._blocks)

    def run(self) -> None:
        """Load, on a thread of the mover."""
        head = 0
        try:
            if self._load_path() and self._load_remote() and self.head_tokens and self._load_head():
                head = self.head_tokens
        except TierError:  # a copy to the device that the device refused
            self._because(Miss.FAILED, "device")
            self.places.metrics.misses.add(self._wanted - self._blocks, "device", Miss.FAILED)
        finally:
            self._answer(head)
            try:
                self._follow()
            finally:
                self._loans.close()
                self.lease.release()

    def expire(self, now: float) -> None:
        """Answer with what has come so far, if the deadline is past."""
        if now >= self.deadline and self._answer(0):
            self._because(Miss.LATE)
            self.places.metrics.misses.add(self._wanted - self._blocks, "load", Miss.LATE)

    def refuse(self) -> None:
        """Answer that nothing comes: the mover has no room for this job."""
        if self._answer(0):
            self._because(Miss.BUSY)
            self.places.metrics.misses.add(self._wanted - self._blocks, "load", Miss.BUSY)
        self.lease.release()

    def _because(self, why: Miss, tier: str | None = None) -> None:
        if self.why is None:  # whatever a job that goes on late finds out afterwards
            self.why, self.why_tier = why, tier

    def _answer(self, head: int) -> bool:
        if not self._gate.shut():
            return False
        if self.arrival is not None and not self._begun:  # the job may not even have started, and nothing waits for it
            self.arrival.finish()
        self.done.set_result((self._blocks, head))
        return True

    def _follow(self) -> None:
        """Bring the later layers of what came with its first."""
        if self.arrival is None or not self._begun:
            return
        error: BaseException | None = None
        start = self.places.clock()
        try:
            self.arrival.arrive(0)
            for group, span in enumerate(self.spans[1:], 1):
                for staging, places, pages in self._begun:
                    self.places.device.copy_in(staging, places, pages, after=self.mark, span=span)
                if not all(intact() for intact in self._intact):
                    raise TierError("the memory they were lent in was taken back")
                self.arrival.arrive(group)
            if not self._intact:
                blocks = sum(len(begun.pages) for begun in self._begun)
                self._learn(blocks, self._first_s + self.places.clock() - start)
        except TierError as failed:
            error = failed
            self.places.metrics.misses.add(self._blocks - self.first, "device", Miss.FAILED)
        except BaseException as failed:
            error = failed
            raise
        finally:
            self.arrival.finish(error)

    def _load_path(self) -> bool:
        for tier, lo, hi in self.lease.sources():
            for at in range(max(lo, self.first), hi, self.piece):
                if not self._load_piece(tier, at, min(hi, at + self.piece)):
                    return False
        return True

    def _load_piece(self, tier: int, lo: int, hi: int) -> bool:
        if tier > HOST:
            return self._fetch(self.below[tier], lo, hi)
        try:
            places = self.lease.places(tier, lo, hi)
        except LookupError:  # found bad by another job, and dropped
            self._because(Miss.ABSENT)
            return False
        device, host = self.places.device, self.places.host
        if tier == DEVICE:
            return self._arrive(lo, hi, partial(device.copy_within, places, after=self.mark), "device")
        if self.arrival is None:
            return self._arrive(lo, hi, partial(device.copy_in, host, places, after=self.mark), "host")

        def begin(pages: Sequence[int]) -> None:
            device.copy_in(host, places, pages, after=self.mark, span=self.spans[0])
            self._begun.append(_Begun(host, places, pages))

        return self._arrive(lo, hi, begin, "host")

    def _arrive(self, lo: int, hi: int, copy: Callable[[Sequence[int]], bool | None], tier: str) -> bool:
        """Copy into the pages of blocks [lo, hi), unless the answer has been given. copy: False is for what came broken."""
        start = self.places.clock()
        grouped = self.arrival is not None and tier == "host"

        def arrive() -> None:
            if copy(self.pages[lo - self.first : hi - self.first]) is not False:
                self._blocks = hi

        if not self._gate.enter(arrive) or self._blocks < hi:
            return False
        self.places.metrics.blocks_loaded.add(hi - lo, tier)
        seconds = self.places.clock() - start
        if grouped:  # its other layers take time too, and are counted when they have come
            self._first_s += seconds
        elif tier == "host":
            self._learn(hi - lo, seconds)
        return True

    def _learn(self, blocks: int, seconds: float) -> None:
        self.places.metrics.load_seconds.observe(seconds, "host")
        self.places.cost.observe_fetch(HOST, blocks, seconds)

    def _fetch(self, below: Below, lo: int, hi: int) -> bool:
        """Read blocks [lo, hi) of the lease from a tier at rest: into the host tier where it has room, and on to the device."""
        index = self.places.index
        start = self.places.clock()
        with self.places.spare() as spare:
            copy = index.begin_copy(self.lease, HOST, lo, hi)
            kept = dict(zip(copy.blocks, copy.places, strict=True)) if copy else {}
            others = iter(spare)
            targets = [kept[block] if block in kept else next(others) for block in range(lo, hi)]
            came = [False] * (hi - lo)
            try:
                came = self._read(below, lo, hi, self.places.views(targets))
                good = came.index(False) if False in came else hi - lo
                into = partial(self.places.device.copy_in, self.places.host, targets[:good], after=self.mark)
                arrived = good > 0 and self._arrive(lo, lo + good, into, below.name)
            finally:
                if copy:
                    why = self.why or Miss.FAILED
                    index.commit_copy(copy, [came[block - lo] for block in copy.blocks], reason=why)
        if below.number is not None:
            self.places.cost.observe_fetch(below.number, good, self.places.clock() - start)
        return arrived and good == hi - lo

    def _read(self, below: Below, lo: int, hi: int, views: Sequence[memoryview]) -> list[bool]:
        came, why = read_below(self.places, below, self.lease, range(lo, hi), views, deadline=self.deadline)
        if why:
            self._because(why, below.name)
        return came

    def _load_remote(self) -> bool:
        if not self.source or not self.remote:
            return True
        lo = self.lease.num_blocks
        self.places.index.extend(self.lease, self.remote_tokens, keys=self.remote)
        end = self.lease.num_blocks
        step = self.piece if self.arrival is None else end - lo  # one loan, for all groups
        return all(self._bring(self.source, at, min(end, at + step)) for at in range(lo, end, step))

    def _bring(self, below: Below, lo: int, hi: int) -> bool:
        came = self._borrow(below, lo, hi) if below.tier.lends else None
        if below.tier.lasting and self._lent_from is None:
            self._lent_from = lo
        if came is None:
            return all(self._fetch(below, at, min(hi, at + self.piece)) for at in range(lo, hi, self.piece))
        return came

    def _borrow(self, below: Below, lo: int, hi: int) -> bool | None:
        """Copy blocks [lo, hi) of the lease out of memory that the tier lends; None: it lends nothing now.

        They do not come to the host tier: what lends is one. Where there is an arrival, the loan is kept until its end.
        """
        misses = self.places.metrics.misses
        keys, left_s = self.lease.keys(lo, hi), max(0.0, self.deadline - self.places.clock())
        with ExitStack() as loan:
            with misses.tally() as counted:
                lend = partial(below.tier.lend, keys, deadline_s=left_s)
                lending = below.attempt(lambda: loan.enter_context(lend()), count=hi - lo, failures=misses)
            why = reason(counted)
            if why:
                self._because(why, below.name)
            if lending is None:
                return False if why else None
            good = lending.places.index(None) if None in lending.places else hi - lo
            places = [place for place in lending.places[:good] if place is not None]
            staging = loan.enter_context(self.memory.staging(below.name, lending.rows))
            span = None if self.arrival is None else self.spans[0]

            def copy(pages: Sequence[int]) -> bool:
                self.places.device.copy_in(staging, places, pages, after=self.mark, span=span)
                if not lending.intact():
                    self._because(Miss.LATE, below.name)
                    misses.add(good, below.name, Miss.LATE)
                    return False
                if self._lent_from is None:
                    self._lent_from = lo
                if span is not None:
                    self._begun.append(_Begun(staging, places, pages))
                    self._intact.append(lending.intact)
                return True

            came = good > 0 and self._arrive(lo, lo + good, copy, below.name)
            if came and span is not None:
                self._loans.push(loan.pop_all())
            return came and good == hi - lo

    def _load_head(self) -> bool:
        source = (HOST, self.head_place) if self.head_place is not None else self.lease.head_source()
        if source is None:
            return False
        tier, place = source
        page, device, host = [self.pages[-1]], self.places.device, self.places.host
        if place is not None and tier == DEVICE:
            return self._gate.enter(partial(device.copy_within, [place], page, after=self.mark))
        if place is not None:
            return self._gate.enter(partial(device.copy_in, host, [place], page, after=self.mark))
        with self.places.spare() as spare:
            came = self._read_head(self.below[tier], self.places.views(spare[:1]))
            return came and self._gate.enter(partial(device.copy_in, host, spare[:1], page, after=self.mark))

    def _read_head(self, below: Below, views: Sequence[memoryview]) -> bool:
        run, left_s = self.lease.head_run(), self.deadline - self.places.clock()
        call = partial(below.tier.read, run.keys, views, deadline_s=left_s)
        came = below.attempt(call, count=1, failures=self.places.metrics.misses)
        if came == [False] and below.number is not None and self.places.clock() < self.deadline:
            below.forget(run.keys)
            self.places.index.drop(below.number, self.lease, [run.depth])
        return came == [True]
