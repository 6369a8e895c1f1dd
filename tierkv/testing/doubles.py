"""Small real things that tests stand on: tiers in memory, a fault on demand, an executor and a clock that wait for the test."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import xxhash

from tierkv.keys import Key
from tierkv.metrics import Metrics
from tierkv.tiers.base import Miss, Run, Tier


class StepExecutor(Executor):
    """Runs jobs when a test says so, in the order it says: a mover without threads, so that every interleaving can be tried."""

    def __init__(self) -> None:
        self.queue: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, job: Callable[..., Any], /, *args: Any, **options: Any) -> "Future[Any]":
        """Queue a job."""
        future: Future[Any] = Future()
        self.queue.append((future, lambda: job(*args, **options)))
        return future

    def step(self, number: int = 0) -> None:
        """Run one queued job."""
        future, job = self.queue.pop(number)
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(job())
            except BaseException as error:  # noqa: BLE001  it is the future's, as with any executor
                future.set_exception(error)

    def run_all(self) -> None:
        """Run until nothing is queued."""
        while self.queue:
            self.step()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Drop what is queued."""
        for future, _ in self.queue:
            future.cancel()
        self.queue.clear()


class FakeClock:
    """Seconds that pass when a test says so."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """Return the time."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


class MemoryTier(Tier):
    """Blocks in a dict: a real tier, for tests of what stands above tiers, and the shortest example of the contract.

    stored: the tests' to damage. Not thread-safe beyond what a dict is; forgets everything at `close`.
    """

    name = "memory"

    def __init__(self, *, metrics: Metrics, capacity_blocks: int = 1 << 20) -> None:
        self._metrics, self._capacity = metrics, capacity_blocks
        self.stored: dict[Key, bytes] = {}
        self._known: dict[Key, tuple[int, Run]] = {}  # checksum, and the block as a run of its own

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        """As the interface says."""
        return [key in self.stored for key in keys]

    def read(self, keys: Sequence[Key], outs: Sequence[memoryview], *, deadline_s: float | None = None) -> list[bool]:
        """As the interface says."""
        if deadline_s is not None and deadline_s <= 0:
            self._metrics.misses.add(len(keys), self.name, Miss.LATE)
            return [False] * len(keys)
        start = time.monotonic()
        came = [self._read(key, out) for key, out in zip(keys, outs, strict=True)]
        self._metrics.load_seconds.observe(time.monotonic() - start, self.name)
        return came

    def _read(self, key: Key, out: memoryview) -> bool:
        block = self.stored.get(key)
        if block is None:
            self._metrics.misses.add(1, self.name, Miss.ABSENT)
            return False
        out[: len(block)] = (
            block  # before the check, as from a disk: where the answer is False, anything may be in `out`
        )
        if xxhash.xxh3_64_intdigest(block) != self._known[key][0]:
            self.delete([key])
            self._metrics.corrupt_blocks.add(1, self.name)
            self._metrics.misses.add(1, self.name, Miss.CORRUPT)
            return False
        self._metrics.bytes_read.add(len(block), self.name)
        return True

    def write(self, run: Run, blocks: Sequence[memoryview], *, deadline_s: float | None = None) -> list[bool]:
        """As the interface says."""
        start = time.monotonic()
        size = len(run.tokens) // max(1, len(run.keys))
        parents = (run.parent, *run.keys)
        for at, (key, block) in enumerate(zip(run.keys, blocks, strict=True)):
            if key not in self.stored and len(self.stored) < self._capacity:
                alone = Run(run.root, parents[at], run.depth + at, (key,), run.tokens[at * size : (at + 1) * size])
                self.stored[key] = bytes(block)
                self._known[key] = (xxhash.xxh3_64_intdigest(self.stored[key]), alone)
                self._metrics.bytes_written.add(len(block), self.name)
        self._metrics.save_seconds.observe(time.monotonic() - start, self.name)
        return self.contains(run.keys)

    def delete(self, keys: Sequence[Key]) -> None:
        """As the interface says."""
        for key in keys:
            self.stored.pop(key, None)
            self._known.pop(key, None)

    def scan(self) -> Iterator[Run]:
        """As the interface says: every block a run of its own, in the order of writing."""
        return iter([run for _, run in self._known.values()])

    def close(self) -> None:
        """As the interface says."""
        self._capacity = 0
        self.delete(list(self.stored))


class SharedMemoryTier(MemoryTier):
    """A MemoryTier that is asked and not remembered, as Redis is."""

    name = "shared"
    shared = True


class FaultyTier(Tier):
    """A tier whose n-th call fails, for every n a test likes: a seeded fault, in front of a real tier.

    `fail_after` counts calls down; at 0 the call raises OSError, before or after the real one as `late` says.
    """

    name = "faulty"

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self.name, self.shared = tier.name, tier.shared  # type: ignore[misc]  # of the tier it stands for
        self.fail_after: int | None = None
        self.late = False
        self.fired = 0

    def _call(self, call: Callable[[], Any]) -> Any:
        failing = self.fail_after == 0
        if self.fail_after is not None:
            self.fail_after -= 1
        if failing and not self.late:
            self.fired += 1
            raise OSError("a seeded fault")
        answer = call()
        if failing:
            self.fired += 1
            raise OSError("a seeded fault, after the fact")
        return answer

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        """As the interface says, or OSError."""
        return list(self._call(lambda: self._tier.contains(keys)))

    def read(self, keys: Sequence[Key], outs: Sequence[memoryview], *, deadline_s: float | None = None) -> list[bool]:
        """As the interface says, or OSError."""
        return list(self._call(lambda: self._tier.read(keys, outs, deadline_s=deadline_s)))

    def write(self, run: Run, blocks: Sequence[memoryview], *, deadline_s: float | None = None) -> list[bool]:
        """As the interface says, or OSError."""
        return list(self._call(lambda: self._tier.write(run, blocks, deadline_s=deadline_s)))

    def delete(self, keys: Sequence[Key]) -> None:
        """As the interface says, or OSError."""
        self._call(lambda: self._tier.delete(keys))

    def scan(self) -> Iterator[Run]:
        """As the interface says."""
        return self._tier.scan()

    def close(self) -> None:
        """As the interface says."""
        self._tier.close()
