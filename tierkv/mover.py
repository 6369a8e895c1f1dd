"""Executes transfers: bounded lanes of worker threads, a back-off for tiers that fail, a gate for late jobs.

The only file that starts threads. A lane is a queue measured in blocks: when it is full a job is refused, and the caller drops
a save (counted) or treats a load as a miss. Jobs are plain callables; what they may touch is settled before they are queued
(the three steps: reserve, move, commit), so a job that never runs leaves a miss and nothing else.

What goes first is decided by who has threads, not by sorting queues: each kind of transfer has a lane, so a load for the next
step never waits behind a save or a spill; on CUDA each direction has streams of its own, and spills leave the link idle for
a share of the time. What has no end in sight (touching and pinning the host slab) is no job of a lane: it runs in the background.
"""

import logging
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Lock
from typing import Final, TypeVar, cast

from tierkv.metrics import Metrics

T = TypeVar("T")
Clock = Callable[[], float]
log = logging.getLogger("tierkv")

LOAD_LANE: Final = "load"
SAVE_LANE: Final = "save"
PROBE_LANE: Final = "probe"
SUSPEND_LANE: Final = "suspend"
AHEAD_LANE: Final = "ahead"
"""What nobody waits for yet: prefetches and pins. The other lanes of a store are named like its tiers at rest."""


@dataclass(frozen=True, slots=True)
class LaneSpec:
    """Worker threads of a lane and the blocks that may wait in it."""

    threads: int
    max_blocks: int


class _Lane:
    def __init__(self, name: str, spec: LaneSpec, executor: Executor) -> None:
        self.name, self.spec, self.executor = name, spec, executor
        self.blocks = 0
        self.futures: set[Future[object]] = set()


class _Background:
    """Steps of a generator, each a job of its own: so none is begun once the executor, or the interpreter, shuts down."""

    def __init__(self, name: str, steps: Generator[object, None, None], executor: Executor) -> None:
        self._name, self._steps, self._executor = name, steps, executor

    def queue(self) -> None:
        """Queue the next step."""
        try:
            self._executor.submit(self._step)
        except RuntimeError:  # closed meanwhile, or the interpreter is about to end
            log.debug("%s ends unfinished", self._name)

    def _step(self) -> None:
        try:
            next(self._steps)
        except StopIteration:
            return
        except Exception:
            log.exception("%s ends unfinished", self._name)
            return
        self.queue()

    def close(self) -> None:
        """Wait for the step at hand, drop the rest. Idempotent."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._steps.close()


def _threads(name: str, spec: LaneSpec) -> Executor:
    return ThreadPoolExecutor(max_workers=spec.threads, thread_name_prefix=f"tierkv-{name}")


class Mover:
    """Lanes by name. Thread-safe.

    executor: makes the executor of a lane; tests pass one that runs jobs step by step.
    """

    def __init__(
        self,
        lanes: Mapping[str, LaneSpec],
        *,
        metrics: Metrics,
        executor: Callable[[str, LaneSpec], Executor] = _threads,
    ) -> None:
        self._lock = Lock()
        self._lanes = {name: _Lane(name, spec, executor(name, spec)) for name, spec in lanes.items()}
        self._helpers: list[Executor] = []
        self._background: list[_Background] = []
        self._executor = executor
        self._closed = False
        for lane in self._lanes.values():
            metrics.queue_depth.read_from(lambda lane=lane: float(lane.blocks), lane.name)  # type: ignore[misc]  # default binds the lane

    def helpers(self, name: str, *, threads: int) -> Executor:
        """Threads for a tier to split one call over; never those that call it, or it would wait for itself."""
        executor = _threads(name, LaneSpec(threads, 0))
        self._helpers.append(executor)
        return executor

    def background(self, name: str, steps: Generator[object, None, None]) -> None:
        """Take the steps one after another, on a thread of their own, until they end, fail, or the mover closes.

        `drain` does not wait for them; `close`, and the end of the process, wait for the step at hand and drop the rest.
        """
        with self._lock:
            if self._closed:
                return steps.close()
            work = _Background(name, steps, self._executor(name, LaneSpec(1, 0)))
            self._background.append(work)
        work.queue()

    def submit(self, lane_name: str, job: Callable[[], T], *, blocks: int) -> "Future[T] | None":
        """Queue a job that moves `blocks` blocks; None when the lane is full or closed.

        A lane takes a job larger than its limit when it is empty: nothing would ever take it otherwise.
        """
        lane = self._lanes[lane_name]
        with self._lock:
            if self._closed or (lane.blocks and lane.blocks + blocks > lane.spec.max_blocks):
                return None
            future = lane.executor.submit(job)  # never waits; and under the lock, `close` cannot come between
            lane.blocks += blocks
            lane.futures.add(cast("Future[object]", future))
        future.add_done_callback(lambda done: self._finished(lane, done, blocks))
        return future

    def is_idle(self, lane_name: str) -> bool:
        """Nothing waits in the lane, and nothing of it is under way. A hint: a job may come any moment."""
        return not self._lanes[lane_name].futures

    @property
    def num_queued(self) -> int:
        """Blocks of the lane that has most to do: waiting, and under way."""
        return max(lane.blocks for lane in self._lanes.values())

    def room(self, lane_name: str) -> int:
        """Blocks that may wait in a lane."""
        return self._lanes[lane_name].spec.max_blocks

    def _finished(self, lane: _Lane, future: "Future[T]", blocks: int) -> None:
        with self._lock:
            lane.blocks -= blocks
            lane.futures.discard(cast("Future[object]", future))
        # Jobs turn expected failures into misses: an exception that arrives here is a defect, and must be seen.
        error = None if future.cancelled() else future.exception()
        if error is not None:
            log.error("a %s job failed: %r", lane.name, error, exc_info=error)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until no lane has work, including work that finishing jobs queue. False: the time was up first."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._lock:
                waiting = {future for lane in self._lanes.values() for future in lane.futures}
            if not waiting:
                return True
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return False
            wait(waiting, timeout=left)

    def close(self) -> None:
        """Refuse new jobs, drop those not begun, wait for those under way. Idempotent."""
        with self._lock:
            self._closed = True
        for work in self._background:
            work.close()
        for lane in self._lanes.values():
            lane.executor.shutdown(wait=True, cancel_futures=True)
        for executor in self._helpers:
            executor.shutdown(wait=True)


class Breaker:
    """Takes a tier out of use after `failures` failures in a row, for a time that doubles up to a minute.

    Thread-safe; the clock is passed in. One log line and one count each time.
    """

    def __init__(self, tier: str, *, metrics: Metrics, clock: Clock, failures: int = 3, first_s: float = 1.0) -> None:
        self._tier, self._metrics, self._clock = tier, metrics, clock
        self._allowed, self._first_s = failures, first_s
        self._failed, self._pause_s, self._until = 0, first_s, float("-inf")
        self._lock = Lock()

    @property
    def open(self) -> bool:
        """Leave the tier alone for now?"""
        return self._clock() < self._until

    def success(self) -> None:
        """A call went well."""
        with self._lock:
            self._failed, self._pause_s = 0, self._first_s

    def failure(self, error: BaseException) -> None:
        """A call failed as a whole."""
        with self._lock:
            self._failed += 1
            if self._failed < self._allowed:
                return
            pause, self._failed = self._pause_s, 0
            self._until = self._clock() + pause
            self._pause_s = min(60.0, pause * 2)
        self._metrics.tier_down.add(1, self._tier)
        log.warning(
            "tier %s is left alone for %.0f s after %d failures, the last: %s", self._tier, pause, self._allowed, error
        )


class Gate:
    """Lets the owner of some memory take it back from a job that is late.

    The job does each short copy into that memory under `enter`; after `shut` it is refused, and `shut` has waited for the copy
    under way. So a load that misses its deadline can be answered while its tier still hangs.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._open = True

    def enter(self, copy: Callable[[], None]) -> bool:
        """Run `copy` if the gate is open."""
        with self._lock:
            if self._open:
                copy()
            return self._open

    def shut(self) -> bool:
        """Refuse copies from now on; True for the first who asks."""
        with self._lock:
            was_open, self._open = self._open, False
            return was_open
