"""The journeys of a block but the last one up, which is `load.Load`: up to the host ahead of need (`copy_up`), and down to the
tiers below (`copy_to_host`, `write_down`).

Each is a job for the mover and follows reserve -> move -> commit: the index says what may be touched, the bytes move without
any lock, the index is told how it went. Whatever breaks in between leaves a miss. All bytes pass through host memory: a place
of the host tier, a spare place when that tier has no room, or memory that a tier lends.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final, TypeVar

from tierkv.cost import CostModel
from tierkv.errors import TierError
from tierkv.index import Index, Lease
from tierkv.keys import Key
from tierkv.metrics import Counter, Metrics
from tierkv.mover import Breaker, Clock
from tierkv.tiers.base import Miss, Run, Tier
from tierkv.tiers.host import HostSlab

if TYPE_CHECKING:
    from tierkv.tiers.device import PagePool  # which needs torch: a daemon has no device

T = TypeVar("T")
DEVICE: Final = 0
HOST: Final = 1
WRITE_DEADLINE_S: Final = 30.0
"""For a batch of writes: nobody waits for it, but what it pins must come free."""


@dataclass(frozen=True, slots=True)
class Below:
    """A tier at rest, under the host, and how blocks come to it.

    place: where it is, for people.
    number: its number in the index; None for a shared tier, which is asked and not remembered.
    copy_down: as in the configuration; "never" for one that takes nothing.
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

    def attempt(self, call: Callable[[], T], *, count: int, failures: Counter) -> T | None:
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

    def seek(self, run: Run, *, failures: Counter) -> int:
        """How many leading blocks of `run` the tier has; none when it broke."""
        return self.attempt(partial(self.tier.seek, run), count=len(run.keys), failures=failures) or 0

    def peek(self, run: Run, *, failures: Counter) -> int:
        """The same for whoever only looks: it counts as no use."""
        present = self.attempt(partial(self.tier.contains, run.keys), count=len(run.keys), failures=failures) or [False]
        return present.index(False) if False in present else len(present)

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
    device: "PagePool"
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
        came, why = read_below(places, below, lease, copy.blocks, places.views(copy.places), deadline=deadline)
    finally:
        places.index.commit_copy(copy, came, reason=why or Miss.FAILED)
    places.metrics.blocks_prefetched.add(sum(came), below.name)
    if below.number is not None:
        places.cost.observe_fetch(below.number, sum(came), places.clock() - start)
    return sum(came)


def read_below(
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
    why = reason(counted)
    if came is None:
        return [False] * len(blocks), why
    lost = [block for block, ok in zip(blocks, came, strict=True) if not ok]
    if lost and below.number is not None and places.clock() < deadline:
        below.forget([known[block - first] for block in lost])
        places.index.drop(below.number, lease, lost, reason=why or Miss.ABSENT)
    return came, why


def reason(counted: Mapping[tuple[str, ...], float]) -> Miss | None:
    """What most of the misses that were counted were."""
    return Miss(max(counted, key=lambda labels: counted[labels])[1]) if counted else None


def write_down(places: Places, below: Below, lease: Lease, lo: int, hi: int) -> None:
    """Write those blocks [lo, hi) of the lease to a tier at rest that the host holds and the tier does not."""
    for first, last in lease.held(HOST, lo, hi):
        try:
            held = lease.places(HOST, first, last)  # pins them
        except LookupError:
            continue
        if below.number is None:
            _write_shared(places, below, lease, first, held)
        else:
            _write_own(places, below, below.number, lease, first, held)


def _write_own(places: Places, below: Below, number: int, lease: Lease, lo: int, held: Sequence[int]) -> None:
    copy = places.index.begin_copy(lease, number, lo, lo + len(held))
    if copy is None:
        return
    written: dict[int, bool] = {}
    try:
        if not copy.victims or below.forget(copy.victims):
            for first, last in _stretches(copy.blocks):
                came = _write(places, below, lease.run(first, last), held[first - lo : last - lo])
                written |= zip(range(first, last), came, strict=True)
    finally:
        places.index.commit_copy(copy, [written.get(block, False) for block in copy.blocks])


def _write_shared(places: Places, below: Below, lease: Lease, lo: int, held: Sequence[int]) -> None:
    """What is there already, of this store or another, is not sent again."""
    ask = partial(below.tier.contains, lease.keys(lo, lo + len(held)))
    present = below.attempt(ask, count=len(held), failures=places.metrics.saves_dropped)
    if present is not None:
        for first, last in _stretches([lo + at for at, there in enumerate(present) if not there]):
            _write(places, below, lease.run(first, last), held[first - lo : last - lo])


def _write(places: Places, below: Below, run: Run, held: Sequence[int]) -> list[bool]:
    """Write the blocks of these host places. Where others write to that memory, too, they are checked before and after:
    a tier that makes checksums of its own must not vouch for what a stray write left there.
    """
    sound = places.host.sound(run.keys, held)
    if not all(sound):
        places.metrics.saves_dropped.add(sound.count(False), below.name, Miss.CORRUPT)
        return [False] * len(held)
    call = partial(below.tier.write, run, places.views(held), deadline_s=WRITE_DEADLINE_S)
    written = below.attempt(call, count=len(held), failures=places.metrics.saves_dropped) or [False] * len(held)
    spoilt = [key for key, ok in zip(run.keys, places.host.sound(run.keys, held), strict=True) if not ok]
    if spoilt:
        below.forget(spoilt)
        written = [ok and key not in spoilt for key, ok in zip(run.keys, written, strict=True)]
        places.metrics.saves_dropped.add(len(spoilt), below.name, Miss.CORRUPT)
    places.metrics.blocks_spilled.add(sum(written), "host", below.name)
    return written


def _stretches(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges [lo, hi) of consecutive numbers in a rising sequence."""
    start = 0
    for at in range(1, len(blocks) + 1):
        if at == len(blocks) or blocks[at] != blocks[at - 1] + 1:
            yield blocks[start], blocks[at - 1] + 1
            start = at
