"""The journeys of a block: up to the device (`Load`), up to the host ahead of that (`copy_up`), and down to the tiers below
(`copy_to_host`, `write_down`).

Each is a job for the mover and follows reserve -> move -> commit: the index says what may be touched, the bytes move without
any lock, the index is told how it went. Whatever breaks in between leaves a miss. All bytes pass through host memory: a place
of the host tier, or a spare place when that tier has no room.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import inf
from queue import SimpleQueue
from typing import Final

from tierkv.arrival import Arrival
from tierkv.cost import CostModel
from tierkv.errors import TierError
from tierkv.index import Index, Lease
from tierkv.keys import Key
from tierkv.metrics import Counter, Metrics
from tierkv.mover import Breaker, Clock, Gate
from tierkv.tiers.base import Miss, Run, Tier
from tierkv.tiers.device import PagePool
from tierkv.tiers.host import HostSlab

DEVICE: Final = 0
HOST: Final = 1
WRITE_DEADLINE_S: Final = 30.0
"""For a batch of writes: nobody waits for it, but what it pins must come free."""


@dataclass(frozen=True, slots=True)
class Below:
    """A tier at rest, under the host, and how blocks come to it.

    place: where it is, for people.
    number: its number in the index; None for a shared tier, which is asked and not remembered.
    """

    tier: Tier
    place: str
    number: int | None
    copy_down: str
    breaker: Breaker

    @property
    def name(self) -> str:
        """The tier's name; also that of its lane in the mover."""
        return self.tier.name

    def attempt(self, call: Callable[[], list[bool]], *, count: int, failures: Counter) -> list[bool] | None:
        """Call the tier. None, with `count` blocks added to `failures`: it broke, or is being left alone."""
        if self.breaker.open:
            failures.add(count, self.name, Miss.DOWN)
            return None
        try:
            answer = call()
        except (TierError, OSError) as error:
            self.breaker.failure(error)
            failures.add(count, self.name, Miss.FAILED)
            return None
        self.breaker.success()
        return answer

    def forget(self, keys: Sequence[Key]) -> bool:
        """Delete keys, so that their room may be used again; False if the tier broke."""
        try:
            self.tier.delete(keys)
        except (TierError, OSError) as error:
            self.breaker.failure(error)
            return False
        return True


@dataclass(frozen=True, slots=True)
class Places:
    """What every job needs: the memory, the index that says who may use it, and where things are counted.

    spares: bundles of host places that belong to no tier, one per mover thread, so that borrowing never waits long.
    """

    index: Index
    device: PagePool
    host: HostSlab
    spares: "SimpleQueue[list[int]]"
    metrics: Metrics
    cost: CostModel
    clock: Clock

    @contextmanager
    def spare(self) -> Iterator[list[int]]:
        """Borrow a bundle of spare places."""
        places = self.spares.get()
        try:
            yield places
        finally:
            self.spares.put(places)

    def views(self, places: Sequence[int]) -> list[memoryview]:
        """The bytes of host places."""
        return [self.host.view(place) for place in places]


@dataclass(slots=True)
class Load:
    """Fill device pages with the blocks of a lease, in path order, up to the first that does not come.

    lease: the job's own, released at its end.  first: the blocks before it are attended to in place.
    pages: one per block from `first` on, then one for the lease's head if `head_tokens` is not 0.
    head_place: the host place that holds the head, if it is not the lease's.
    remote: keys of blocks that follow the lease's last one, to be had from `source`, and their tokens.
    mark: the point of the device's work after which the pages may be written.
    piece: blocks moved at a time; at most the size of a bundle of spares.
    arrival: not None lets blocks that the host holds come layer group by layer group; spans: bytes of a block, per group.

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
    _begun: list[tuple[Sequence[int], Sequence[int]]] = field(default_factory=list)
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
                for places, pages in self._begun:
                    self.places.device.copy_in(self.places.host, places, pages, after=self.mark, span=span)
                self.arrival.arrive(group)
            self._learn(sum(len(pages) for _, pages in self._begun), self._first_s + self.places.clock() - start)
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
            self._begun.append((places, pages))

        return self._arrive(lo, hi, begin, "host")

    def _arrive(self, lo: int, hi: int, copy: Callable[[Sequence[int]], None], tier: str) -> bool:
        """Copy into the pages of blocks [lo, hi), unless the answer has been given."""
        start = self.places.clock()
        grouped = self.arrival is not None and tier == "host"

        def arrive() -> None:
            copy(self.pages[lo - self.first : hi - self.first])
            self._blocks = hi

        if not self._gate.enter(arrive):
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
        came, why = _read_below(self.places, below, self.lease, range(lo, hi), views, deadline=self.deadline)
        if why:
            self._because(why, below.name)
        return came

    def _load_remote(self) -> bool:
        if not self.source or not self.remote:
            return True
        lo = self.lease.num_blocks
        self.places.index.extend(self.lease, self.remote_tokens, keys=self.remote)
        end = self.lease.num_blocks
        return all(self._fetch(self.source, at, min(end, at + self.piece)) for at in range(lo, end, self.piece))

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


def copy_to_host(
    places: Places,
    lease: Lease,
    lo: int,
    hi: int,
    *,
    mark: object,
    share: float = 1.0,
    worth: float | None = None,
) -> None:
    """Copy those blocks [lo, hi) of the lease to the host that the device holds and the host does not.

    mark: the point of the device's work after which the pages are written.  share: of the time, in which the link is kept busy.
    worth: as in `Index.begin_copy`.
    """
    start = places.clock()
    for first, last in lease.held(DEVICE, lo, hi):
        try:
            pages = lease.places(DEVICE, first, last)  # pins them
        except LookupError:
            continue
        copy = places.index.begin_copy(lease, HOST, first, last, worth=worth)
        if copy:
            done = False
            try:
                places.device.copy_out(
                    [pages[block - first] for block in copy.blocks], places.host, copy.places, after=mark, share=share
                )
                done = True
            except TierError:  # the device refused; the blocks stay where they are
                places.metrics.saves_dropped.add(len(copy.blocks), "host", Miss.FAILED)
                continue
            finally:
                places.index.commit_copy(copy, [done] * len(copy.blocks))
            places.metrics.blocks_spilled.add(len(copy.blocks), "device", "host")
            places.metrics.save_seconds.observe(places.clock() - start, "host")
        refused = sum(max(0, min(b, last) - max(a, first)) for a, b in lease.missing(HOST))
        if refused:
            places.metrics.saves_dropped.add(refused, "host", "full")


def copy_up(places: Places, below: Below, lease: Lease, lo: int, hi: int, *, deadline: float) -> int:
    """Read those blocks [lo, hi) of the lease into the host that it lacks, as far as it has room; how many came."""
    start = places.clock()
    copy = places.index.begin_copy(lease, HOST, lo, hi, worth=inf)  # somebody waits for them
    if copy is None:
        return 0
    came, why = [False] * len(copy.blocks), None
    try:
        came, why = _read_below(places, below, lease, copy.blocks, places.views(copy.places), deadline=deadline)
    finally:
        places.index.commit_copy(copy, came, reason=why or Miss.FAILED)
    places.metrics.blocks_prefetched.add(sum(came), below.name)
    if below.number is not None:
        places.cost.observe_fetch(below.number, sum(came), places.clock() - start)
    return sum(came)


def _read_below(
    places: Places, below: Below, lease: Lease, blocks: Sequence[int], views: Sequence[memoryview], *, deadline: float
) -> tuple[list[bool], Miss | None]:
    """Read some of the lease's blocks; which came, and why most others did not.

    What a tier turns out to have no more, or to have broken, it and the index forget.
    """
    left_s = deadline - places.clock()
    if left_s <= 0:
        return [False] * len(blocks), Miss.LATE
    first = blocks[0]
    known = lease.keys(first, blocks[-1] + 1)
    keys = [known[block - first] for block in blocks]
    call = partial(below.tier.read, keys, views, deadline_s=left_s)
    with places.metrics.misses.tally() as counted:
        came = below.attempt(call, count=len(blocks), failures=places.metrics.misses)
    why = Miss(max(counted, key=lambda labels: counted[labels])[1]) if counted else None
    if came is None:
        return [False] * len(blocks), why
    lost = [block for block, ok in zip(blocks, came, strict=True) if not ok]
    if lost and below.number is not None and places.clock() < deadline:
        below.forget([known[block - first] for block in lost])
        places.index.drop(below.number, lease, lost, reason=why or Miss.ABSENT)
    return came, why


def write_down(places: Places, below: Below, lease: Lease, lo: int, hi: int) -> None:
    """Write those blocks [lo, hi) of the lease to a tier at rest that the host holds and the tier does not."""
    for first, last in lease.held(HOST, lo, hi):
        try:
            views = places.views(lease.places(HOST, first, last))  # pins them
        except LookupError:
            continue
        if below.number is None:
            _write_shared(places, below, lease, first, views)
        else:
            _write_own(places, below, below.number, lease, first, views)


def _write_own(places: Places, below: Below, number: int, lease: Lease, lo: int, views: Sequence[memoryview]) -> None:
    copy = places.index.begin_copy(lease, number, lo, lo + len(views))
    if copy is None:
        return
    written: dict[int, bool] = {}
    try:
        if not copy.victims or below.forget(copy.victims):
            for first, last in _stretches(copy.blocks):
                came = _write(places, below, lease.run(first, last), views[first - lo : last - lo])
                written |= zip(range(first, last), came, strict=True)
    finally:
        places.index.commit_copy(copy, [written.get(block, False) for block in copy.blocks])


def _write_shared(places: Places, below: Below, lease: Lease, lo: int, views: Sequence[memoryview]) -> None:
    """What is there already, of this store or another, is not sent again."""
    ask = partial(below.tier.contains, lease.keys(lo, lo + len(views)))
    present = below.attempt(ask, count=len(views), failures=places.metrics.saves_dropped)
    if present is not None:
        for first, last in _stretches([lo + at for at, there in enumerate(present) if not there]):
            _write(places, below, lease.run(first, last), views[first - lo : last - lo])


def _write(places: Places, below: Below, run: Run, views: Sequence[memoryview]) -> list[bool]:
    call = partial(below.tier.write, run, views, deadline_s=WRITE_DEADLINE_S)
    written = below.attempt(call, count=len(views), failures=places.metrics.saves_dropped) or [False] * len(views)
    places.metrics.blocks_spilled.add(sum(written), "host", below.name)
    return written


def _stretches(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges [lo, hi) of consecutive numbers in a rising sequence."""
    start = 0
    for at in range(1, len(blocks) + 1):
        if at == len(blocks) or blocks[at] != blocks[at - 1] + 1:
            yield blocks[start], blocks[at - 1] + 1
            start = at
