"""The streams and events of the device tier under a random schedule: what arrives is what was there at the mark.

Two machines over a fake device whose work runs late and out of order. The first drives the pool itself: kernels write pages,
threads copy them in both directions at once, pages and places are given out again as soon as a call returned. The second is the
whole store's machine, its pages on the fake device. Faults planted in the pool say which of them would see what.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.device_parts import SMALL, Slab, bytes_of, content, cuda_pool, put_under
from tests.store_parts import TINY
from tests.test_store_machine import StoreMachine
from tierkv.errors import TierError
from tierkv.testing import FakeClock
from tierkv.testing.cuda import FakeCuda
from tierkv.tiers import device
from tierkv.tiers.device import CudaPagePool

PAGES, PLACES = 8, 9
NUMBERS = st.integers(0, 99)
COUNTS = st.sampled_from([1, 2, 3, 4, 5])
SIZE = SMALL.block_bytes


@dataclass(frozen=True)
class Job:
    """What a thread of the mover will do, and what it has to itself until then."""

    run: Callable[[], None]
    pages: tuple[int, ...]
    places: tuple[int, ...]
    paced: bool = False


class DeviceMachine(RuleBasedStateMachine):
    """Kernels, saves and loads of one pool.

    seen: what the engine's next kernel finds in a page; None: nobody may look.
    lies: the bytes of every row of the host that no save is writing to.
    """

    @initialize(
        seed=st.integers(0, 1 << 32),
        padded=st.sampled_from([False, False, True]),
        piece=st.sampled_from([2, 3, PLACES]),
        batches=st.booleans(),
        groups=st.sampled_from([1, 1, 2, 4]),
        threads=st.booleans(),
    )
    def begin(self, seed: int, padded: bool, piece: int, batches: bool, groups: int, threads: bool) -> None:
        self.random, self.clock = Random(seed), FakeClock()
        self.cuda = FakeCuda(self.random.randrange)
        self.pool = cuda_pool(self.cuda, num_pages=PAGES, clock=self.clock, wait=self.clock.advance)
        self.pool.batches, self.pool.lead = batches, seed % 3
        self.slab = Slab(self.cuda, num_places=PLACES, block_bytes=SIZE, stride=SIZE + 64 * padded, piece_places=piece)
        self.spans = [(at, at + SIZE // groups) for at in range(0, SIZE, SIZE // groups)] if groups > 1 else [None]
        self.jobs: list[Job] = []
        self.seen: dict[int, Any] = dict.fromkeys(range(PAGES))
        self.lies: dict[int, Any] = {place: self.slab.rows[place].copy() for place in range(PLACES)}
        self.kept: set[int] = set()  # places that hold a block
        self.tag = 0
        self.failed = 0
        if threads:
            self.cuda.interrupt = self.another_thread

    # -- who may touch what -----------------------------------------------------------------------------------------

    def pages(self) -> list[int]:
        busy = {page for job in self.jobs for page in job.pages}
        return [page for page in range(PAGES) if page not in busy]

    def places(self) -> list[int]:
        busy = {place for job in self.jobs for place in job.places}
        return [place for place in range(PLACES) if place not in busy]

    def some(self, numbers: Sequence[int], first: int, count: int) -> list[int]:
        """Numbers that follow each other, as far as the others are free."""
        start = first % max(1, len(numbers))
        return list(numbers[start : start + count])

    def new(self) -> Any:
        self.tag += 1
        return content(self.tag, SIZE)

    # -- the engine -------------------------------------------------------------------------------------------------

    @rule(number=NUMBERS, count=st.integers(1, 4))
    def write(self, number: int, count: int) -> None:
        """A step fills pages that nobody else has."""
        for page in self.some(self.pages(), number, count):
            self.fill(page)

    def fill(self, page: int) -> None:
        block = self.seen[page] = self.new()

        def kernel() -> None:
            bytes_of(self.pool)[page] = block

        self.cuda.compute(kernel)

    @rule(number=NUMBERS)
    def attend(self, number: int) -> None:
        """A step reads a page; its job, if it has one, does not change it."""
        page = number % PAGES
        block = self.seen[page]
        if block is not None:
            self.cuda.compute(lambda: self.expect(page, block))

    def expect(self, page: int, block: Any) -> None:
        assert (bytes_of(self.pool)[page] == block).all(), f"a kernel reads other bytes in page {page}"

    # -- the store --------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.pages() and self.places())
    @rule(page=NUMBERS, place=NUMBERS, count=COUNTS, paced=st.booleans())
    def save(self, page: int, place: int, count: int, paced: bool) -> None:
        sources = self.some(self.pages(), page, count)
        targets = self.some(self.places(), place, len(sources))
        sources = sources[: len(targets)]
        for source in sources:
            if self.seen[source] is None:
                self.fill(source)
        blocks, after = [self.seen[page] for page in sources], self.pool.mark()
        self.kept.difference_update(targets)
        for place in targets:
            del self.lies[place]

        def run() -> None:
            try:
                for span in self.spans:
                    share = 0.5 if paced else 1.0
                    self.pool.copy_out(sources, self.slab, targets, after=after, span=span, share=share)
                for place, block in zip(targets, blocks, strict=True):
                    assert (self.slab.rows[place, :SIZE] == block).all(), "a save brought other bytes"
                    assert (self.slab.rows[place, SIZE:] == 0xEE).all(), "a save wrote past the block"
                self.kept.update(targets)
            finally:
                for place in targets:
                    self.lies[place] = self.slab.rows[place].copy()

        self.jobs.append(Job(run, tuple(sources), tuple(targets), paced))

    @precondition(lambda self: self.pages() and self.places())
    @rule(page=NUMBERS, place=NUMBERS, count=COUNTS)
    def load(self, page: int, place: int, count: int) -> None:
        sources = self.some(self.places(), place, count)
        targets = self.some(self.pages(), page, len(sources))
        sources = sources[: len(targets)]
        for source in sources:
            if source not in self.kept:
                self.come_from_disk(source)
        blocks, after = [self.lies[place][:SIZE] for place in sources], self.pool.mark()

        def run() -> None:
            for span in self.spans:
                self.pool.copy_in(self.slab, sources, targets, after=after, span=span)
                lo, hi = span or (0, SIZE)
                for page, block in zip(targets, blocks, strict=True):
                    assert (bytes_of(self.pool)[page, lo:hi] == block[lo:hi]).all(), "a load brought other bytes"
            self.seen.update(zip(targets, blocks, strict=True))

        self.give(targets, Job(run, tuple(targets), tuple(sources)))

    @precondition(lambda self: len(self.pages()) > 3 and any(self.seen[page] is not None for page in self.pages()))
    @rule(source=NUMBERS, page=NUMBERS, count=st.integers(1, 3))
    def copy(self, source: int, page: int, count: int) -> None:
        sources = self.some([page for page in self.pages() if self.seen[page] is not None], source, count)
        targets = self.some([page for page in self.pages() if page not in sources], page, len(sources))
        sources = sources[: len(targets)]
        blocks, after = [self.seen[page] for page in sources], self.pool.mark()

        def run() -> None:
            self.pool.copy_within(sources, targets, after=after)
            for page, block in zip(targets, blocks, strict=True):
                assert (bytes_of(self.pool)[page] == block).all(), "a page was copied from other bytes"
            self.seen.update(zip(targets, blocks, strict=True))

        self.give(targets, Job(run, (*sources, *targets), ()))

    def give(self, pages: Sequence[int], job: Job) -> None:
        for page in pages:
            self.seen[page] = None
        self.jobs.append(job)

    @rule(number=NUMBERS)
    def read_from_disk(self, number: int) -> None:
        """Another tier's block comes into a place that no job has."""
        for place in self.some(self.places(), number, 1):
            self.come_from_disk(place)

    def come_from_disk(self, place: int) -> None:
        self.slab.rows[place, :SIZE] = self.new()
        self.lies[place] = self.slab.rows[place].copy()
        self.kept.add(place)

    # -- time passes ------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.jobs)
    @rule(number=NUMBERS)
    def work(self, number: int) -> None:
        self.start(self.jobs[number % len(self.jobs)])

    def start(self, job: Job) -> None:
        self.running = [*getattr(self, "running", []), job]
        try:
            job.run()
        except TierError:
            self.failed += 1
            assert self.failed == self.cuda.failed, "a copy was refused"
        finally:
            self.running.remove(job)
            self.jobs.remove(job)

    def another_thread(self) -> None:
        """A second thread does a whole job in the middle of another's; it would wait if both were paced."""
        waiting = [job for job in self.jobs if job not in self.running and not job.paced]
        if waiting:
            self.start(self.random.choice(waiting))

    @precondition(lambda self: not self.cuda.idle)
    @rule(count=st.integers(1, 8))
    def run_device(self, count: int) -> None:
        for _ in range(count):
            if not self.cuda.idle:
                self.cuda.step()

    @rule(after=st.integers(0, 6))
    def seed_fault(self, after: int) -> None:
        self.cuda.fail_after = after

    @invariant()
    def nothing_else_changes(self) -> None:
        if not hasattr(self, "lies"):
            return
        for place, row in self.lies.items():
            assert (self.slab.rows[place] == row).all(), f"place {place} changed after it was given out"

    def teardown(self) -> None:
        if not hasattr(self, "jobs"):
            return
        while self.jobs:
            self.start(self.jobs[0])
        self.cuda.run_all()
        self.nothing_else_changes()
        for page, block in self.seen.items():
            if block is not None:
                self.expect(page, block)


DeviceMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
test_device = DeviceMachine.TestCase


# -- the whole store over it --------------------------------------------------------------------------------------------


class Page:
    """A device page as the engine sees it: what it does to it are kernels on torch's stream, and run when the device says so."""

    def __init__(self, cuda: FakeCuda, pool: CudaPagePool, number: int) -> None:
        self.cuda, self.bytes, self.number = cuda, bytes_of(pool), number  # the engine's, also when the pool is closed

    def __setitem__(self, key: slice, block: Any) -> None:
        def kernel() -> None:
            self.bytes[self.number] = block

        self.cuda.compute(kernel)

    def __eq__(self, block: object) -> Any:
        def kernel() -> None:
            assert (self.bytes[self.number] == block).all(), f"page {self.number} lies"

        self.cuda.compute(kernel)
        return Said()

    __hash__ = None  # type: ignore[assignment]


class Said:
    """The comparison is queued; it raises when it runs."""

    def all(self) -> bool:
        return True


class CudaStoreMachine(StoreMachine):
    """The store's own machine; its device is fake, and its kernels and copies are late."""

    @initialize(seed=st.integers(0, 1 << 32), batches=st.booleans())
    def begin_device(self, seed: int, batches: bool) -> None:
        self.seed, self.batches = seed, batches

    def swap(self) -> None:
        """Put the fake device under the store, before its first request."""
        self.cuda = FakeCuda(Random(self.seed).randrange)
        pool = cuda_pool(self.cuda, layout=TINY, num_pages=self.store.places.device.num_places)
        pool.batches, pool.lead = self.batches, self.seed % 3
        put_under(self.store, pool)
        for _ in self.store.places.host.pin(self.cuda.host_register, self.cuda.host_unregister):
            pass
        self.parts.page = lambda number: Page(self.cuda, pool, number)  # type: ignore[method-assign,assignment,return-value]

    @rule(count=st.integers(1, 20))
    def run_device(self, count: int) -> None:
        for _ in range(count):
            if not self.cuda.idle:
                self.cuda.step()

    @invariant()
    def everything_held_is_what_its_tokens_say(self) -> None:
        if hasattr(self, "seed") and hasattr(self, "store"):
            if not hasattr(self, "cuda"):
                self.swap()
            super().everything_held_is_what_its_tokens_say()

    def teardown(self) -> None:
        if hasattr(self, "cuda"):
            super().teardown()
            self.cuda.run_all()
            assert not self.cuda.pinned, "host memory is pinned after its slab was closed"


CudaStoreMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
test_store_on_device = CudaStoreMachine.TestCase


# -- the machines themselves must be able to fail -------------------------------------------------------------------------

COPY_OUT, COPY_IN, COPY_WITHIN = CudaPagePool.copy_out, CudaPagePool.copy_in, CudaPagePool.copy_within
BETWEEN, RUNS = CudaPagePool._between, device._runs


def passed(cuda: Any) -> Any:
    event = cuda.record(cuda.new_stream())
    event.recorded.passed = True
    return event


def save_waits_for_no_mark(self: CudaPagePool, *args: Any, after: object, **options: Any) -> None:
    COPY_OUT(self, *args, after=passed(self.cuda), **options)


def load_waits_for_no_mark(self: CudaPagePool, *args: Any, after: object, **options: Any) -> None:
    COPY_IN(self, *args, after=passed(self.cuda), **options)


def returns_before_its_event(self: CudaPagePool, copies: Any, after: Any, *, batch: bool, priority: Any) -> None:
    with self._stream(priority) as stream:
        self.cuda.wait(stream, after)
        self.cuda.copy(stream, copies)
        self.cuda.record(stream)


def event_comes_before_the_copies(self: CudaPagePool, copies: Any, after: Any, *, batch: bool, priority: Any) -> None:
    with self._stream(priority) as stream:
        self.cuda.wait(stream, after)
        event = self.cuda.record(stream)
        self.cuda.copy(stream, copies)
        event.wait()


def threads_share_an_event(self: Any, copies: Any, after: Any, *, batch: bool, priority: Any) -> None:
    with self._stream(priority) as stream:
        self.cuda.wait(stream, after)
        self.cuda.copy(stream, copies)
        event = self.cuda.record(stream)
        if not hasattr(self, "shared"):
            self.shared = event
        self.shared.recorded = event.recorded
        self.shared.wait()


def copies_cross_pieces(pages: Any, places: Any, *, piece: int) -> Any:
    return RUNS(pages, places, piece=1 if piece == 1 else 1 << 30)


def copies_go_beyond_the_run(pages: Any, places: Any, *, piece: int) -> Any:
    return RUNS(range(pages[0], pages[0] + len(pages)), places, piece=piece) if pages else []


def span_is_forgotten_on_the_host(
    self: CudaPagePool, pages: Any, host: Any, places: Any, span: Any, *, out: bool
) -> Any:
    for copy in BETWEEN(self, pages, host, places, span, out=out):
        lo = span[0] if span else 0
        yield copy._replace(target=copy.target - lo) if out else copy._replace(source=copy.source - lo)


def a_refused_copy_leaves_others_under_way(
    self: CudaPagePool, copies: Any, after: Any, *, batch: bool, priority: Any
) -> None:
    with self._stream(priority) as stream:
        self.cuda.wait(stream, after)
        self.cuda.copy(stream, copies)
        self.cuda.record(stream).wait()


def device_blocks_are_not_waited_for(self: CudaPagePool, sources: Any, pages: Any, *, after: object) -> None:
    COPY_WITHIN(self, sources, pages, after=passed(self.cuda))


BOTH = (DeviceMachine, CudaStoreMachine)
POOL = (
    DeviceMachine,
)  # the store's machine has neither pinned pieces, spans, threads within calls, nor copies that fail
PLANTED: dict[str, tuple[Any, str, Any, tuple[type[RuleBasedStateMachine], ...]]] = {
    "a save does not wait for its mark": (CudaPagePool, "copy_out", save_waits_for_no_mark, BOTH),
    "a load does not wait for its mark": (CudaPagePool, "copy_in", load_waits_for_no_mark, BOTH),
    "a page is copied without its mark": (CudaPagePool, "copy_within", device_blocks_are_not_waited_for, BOTH),
    "a call returns before its event": (CudaPagePool, "_move", returns_before_its_event, BOTH),
    "the event is recorded before the copies": (CudaPagePool, "_move", event_comes_before_the_copies, BOTH),
    "two threads share an event": (CudaPagePool, "_move", threads_share_an_event, POOL),
    "a copy crosses registrations": (device, "_runs", copies_cross_pieces, POOL),
    "a copy goes beyond the run": (device, "_runs", copies_go_beyond_the_run, BOTH),
    "a span begins elsewhere on the host": (CudaPagePool, "_between", span_is_forgotten_on_the_host, POOL),
    "a refused copy leaves others under way": (CudaPagePool, "_move", a_refused_copy_leaves_others_under_way, POOL),
}
CASES = [(fault, machine) for fault, (*_, machines) in PLANTED.items() for machine in machines]


@pytest.mark.parametrize(("fault", "machine"), CASES)
def test_a_planted_fault_is_caught(
    fault: str, machine: type[RuleBasedStateMachine], monkeypatch: pytest.MonkeyPatch
) -> None:
    where, name, planted, _ = PLANTED[fault]
    monkeypatch.setattr(where, name, planted)
    quick = settings(
        max_examples=400,
        stateful_step_count=40,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=quick)
