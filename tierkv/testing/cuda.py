"""A CUDA device without one: streams whose work runs late and in any order that CUDA's promises leave open.

    choose = Random(seed).randrange            the test's source of randomness: choose(n) is in [0, n)
    cuda = FakeCuda(choose)
    pool = CudaPagePool(layout=…, num_pages=…, device=torch.device("cpu"), cuda=cuda)
    cuda.compute(lambda: …)                     a kernel of the engine, queued on torch's stream
    after = pool.mark()
    pool.copy_out([3], slab, [7], after=after)  runs what is queued, at random, until this copy is done, and no further

Device memory is any memory of this process. Nothing runs before the test steps it, or a host thread waits for an event; then
one piece of work after another, of whichever stream the test's randomness picks, until the event has passed. A copy is torn: its
halves run apart, and those of a batch in any order. So a wait that is missing somewhere is seen as bytes that are too old or too
new, for some seed.

Streams and events go with their last reference, as CuPy's do, and are counted: several stores may share one fake device, and what
one of them leaves behind is seen. Host memory that is unregistered under a queued copy is an AssertionError.
"""

import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from threading import RLock
from typing import Protocol
from weakref import WeakSet

from tierkv.errors import TierError
from tierkv.tiers.device_cuda import Copy, Event, Priority


class _Work(Protocol):
    """The head of a stream."""

    def ready(self) -> bool:
        """May it run now?"""

    def run(self) -> bool:
        """Run a piece of it; True when nothing is left."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class FakeEvent:
    """An event that knows its latest recording, as a CUDA event does."""

    cuda: "FakeCuda"
    recorded: "_Recording"

    def wait(self) -> None:
        """Run work of any stream until the event has passed."""
        self.cuda.other_threads()
        self.cuda.run_until(self.recorded)


@dataclass(slots=True, eq=False)
class _Recording:
    passed: bool = False

    def ready(self) -> bool:
        return True

    def run(self) -> bool:
        self.passed = True
        return True


@dataclass(slots=True, eq=False)
class _Wait:
    recorded: _Recording

    def ready(self) -> bool:
        return self.recorded.passed

    def run(self) -> bool:
        return True


@dataclass(slots=True, eq=False)
class _Kernel:
    body: Callable[[], None]

    def ready(self) -> bool:
        return True

    def run(self) -> bool:
        self.body()
        return True


@dataclass(slots=True, eq=False)
class _Copies:
    parts: list[Copy]
    choose: Callable[[int], int]

    def ready(self) -> bool:
        return True

    def run(self) -> bool:
        part = self.parts.pop(self.choose(len(self.parts)))
        ctypes.memmove(part.target, part.source, part.size)
        return not self.parts


@dataclass(slots=True, eq=False, weakref_slot=True)
class FakeStream:
    """Work that runs in order. number: streams are numbered as they are made.  num_copies: that were queued so far."""

    number: int
    priority: Priority
    queue: deque[_Work] = field(default_factory=deque)
    num_copies: int = 0


class FakeCuda:
    """`tierkv.tiers.device_cuda.Cuda`, for tests. Thread-safe; a test that is to be repeatable models threads by `interrupt`.

    choose: returns a number in [0, n).
    interrupt: called in the middle of calls, when randomness says so and never within itself: what another thread does there.
    fail_after: copies from now until one is refused, with those of its call that came before it queued; None: none is.
    fault: what a refused copy raises.
    pinned: size of what is registered, by address.  memory: what `free_memory` says.
    """

    name = "fake"
    batches = True

    def __init__(self, choose: Callable[[int], int], *, memory: int = 1 << 40) -> None:
        self._choose, self.memory = choose, memory
        self._lock = RLock()  # held while work runs: other threads come in between calls
        self._running = False
        self._made = 0
        self._queues: list[deque[_Work]] = []  # a stream's work is done also when the stream is gone
        self._streams: WeakSet[FakeStream] = WeakSet()
        self._events: WeakSet[FakeEvent] = WeakSet()
        self.torch = self.new_stream()
        self.pinned: dict[int, int] = {}
        self.allocations: dict[int, int] = {}
        self.interrupt: Callable[[], None] | None = None
        self.fail_after: int | None = None
        self.fault: Callable[[str], BaseException] = TierError
        self.failed = 0

    # -- what a test does -------------------------------------------------------------------------------------------

    def compute(self, kernel: Callable[[], None]) -> None:
        """Queue a kernel on torch's current stream."""
        with self._lock:
            self.torch.queue.append(_Kernel(kernel))

    def allocate(self, address: int, size: int) -> None:
        """Make an allocation of device memory known, so that a copy that leaves it is refused."""
        with self._lock:
            self.allocations[address] = size

    @property
    def streams(self) -> list[FakeStream]:
        """Those that somebody holds, oldest first; torch's is the first."""
        return sorted(self._streams, key=lambda stream: stream.number)

    @property
    def num_events(self) -> int:
        """Events that somebody holds."""
        return len(self._events)

    @property
    def idle(self) -> bool:
        """Is nothing queued?"""
        with self._lock:
            return not any(self._queues)

    def step(self) -> None:
        """Run one piece of work, of a stream that may go on. Raises TierError where all wait for each other."""
        with self._lock:
            ready = [queue for queue in self._queues if queue and queue[0].ready()]
            if not ready:
                raise TierError(
                    "every stream waits for another, or nothing is queued: this host thread would wait for ever"
                )
            queue = ready[self._choose(len(ready))]
            self._running = True
            try:
                if queue[0].run():
                    queue.popleft()
            finally:
                self._running = False

    def run_until(self, recorded: "_Recording") -> None:
        """Run work until a recording has passed."""
        with self._lock:
            self.other_threads()
            while not recorded.passed:
                self.step()
                self.other_threads()

    def catch_up(self) -> None:
        """Run work until what is on torch's stream so far is done, as before a kernel that runs at once."""
        with self._lock:
            if not self._running:  # within a kernel, all before it is done
                self.run_until(self.mark().recorded)

    def run_all(self) -> None:
        """Run until nothing is queued."""
        with self._lock:
            while not self.idle:
                self.step()

    # -- what the device tier calls ---------------------------------------------------------------------------------

    def new_stream(self, priority: Priority = Priority.LOW) -> FakeStream:
        """As the interface says."""
        with self._lock:
            stream = FakeStream(self._made, priority)
            self._made += 1
            self._streams.add(stream)
            self._queues.append(stream.queue)
        return stream

    def mark(self) -> FakeEvent:
        """As the interface says."""
        return self._record(self.torch)

    def record(self, stream: FakeStream) -> FakeEvent:
        """As the interface says."""
        with self._lock:
            self.other_threads()
            return self._record(stream)

    def _record(self, stream: FakeStream) -> FakeEvent:
        with self._lock:
            recorded = _Recording()
            stream.queue.append(recorded)
            event = FakeEvent(self, recorded)
            self._events.add(event)
        return event

    def wait(self, stream: FakeStream, event: Event) -> None:
        """As the interface says."""
        with self._lock:
            self.other_threads()
            assert isinstance(event, FakeEvent), "events of this device alone"
            stream.queue.append(_Wait(event.recorded))

    def copy(self, stream: FakeStream, copies: Iterable[Copy]) -> None:
        """As the interface says."""
        with self._lock:
            for copy in copies:
                self.other_threads()
                self._check(copy)
                stream.queue.append(_Copies(_halves(copy), self._choose))
                stream.num_copies += 1

    def copy_batch(self, stream: FakeStream, copies: Sequence[Copy]) -> None:
        """As the interface says."""
        with self._lock:
            self.other_threads()
            parts: list[Copy] = []
            try:
                for copy in copies:
                    self._check(copy)
                    parts += _halves(copy)
                    stream.num_copies += 1
            finally:
                if parts:
                    stream.queue.append(_Copies(parts, self._choose))

    def _check(self, copy: Copy) -> None:
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0:
                self.fail_after, self.failed = None, self.failed + 1
                raise self.fault("a seeded fault")
        for address in (copy.target, copy.source):
            for start, size in (self.pinned | self.allocations).items():
                within = start <= address and address + copy.size <= start + size
                if not within and _overlap(address, copy.size, start, size):
                    raise TierError(
                        f"invalid argument: {copy.size} bytes leave the registration or allocation they begin in"
                    )

    def host_register(self, address: int, size: int) -> None:
        """As the interface says."""
        with self._lock:
            if any(_overlap(address, size, start, pinned) for start, pinned in self.pinned.items()):
                raise TierError("host memory already registered")
            self.pinned[address] = size

    def host_unregister(self, address: int) -> None:
        """As the interface says."""
        with self._lock:
            size = self.pinned.pop(address, None)
            if size is None:
                raise TierError("host memory not registered")
            for copy in self._queued():
                ends = (copy.target, copy.source)
                assert not any(_overlap(end, copy.size, address, size) for end in ends), "unregistered under a copy"

    def _queued(self) -> list[Copy]:
        """Parts of copies that have not run."""
        return [part for queue in self._queues for work in queue if isinstance(work, _Copies) for part in work.parts]

    def free_memory(self) -> int:
        """As the interface says."""
        return self.memory

    def numa_node(self) -> int | None:
        """As the interface says."""
        return None

    def other_threads(self) -> None:
        """Let another host thread run now, perhaps."""
        interrupt = self.interrupt
        if interrupt is not None and self._choose(4) == 0:
            self.interrupt = None  # not within itself
            try:
                interrupt()
            finally:
                self.interrupt = interrupt


def _overlap(one: int, size: int, other: int, other_size: int) -> bool:
    return one < other + other_size and other < one + size


def _halves(copy: Copy) -> list[Copy]:
    half = copy.size // 2
    rest = Copy(copy.target + half, copy.source + half, copy.size - half)
    return [Copy(copy.target, copy.source, half), rest] if half else [rest]
