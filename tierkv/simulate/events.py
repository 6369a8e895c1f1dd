"""Virtual time, and what is shared in it: links and the engine's compute, each one job at a time in the order of coming."""

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush

Job = Callable[[], float]
"""Begins when its turn comes; returns the seconds it takes. Nothing to do: 0."""


class Timeline:
    """Calls what is due, earliest first; what is due at one time, in the order it was asked for."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, time_s: float, call: Callable[[], None]) -> None:
        """Call at a time, not before now."""
        self._count += 1
        heappush(self._due, (max(time_s, self.now_s), self._count, call))

    def run(self, until_s: float) -> None:
        """Call all that is due by `until_s`, which is the time afterwards."""
        due = self._due
        while due and due[0][0] <= until_s:
            self.step()
        self.now_s = until_s

    def step(self) -> bool:
        """Call what is due next; False: nothing is."""
        if not self._due:
            return False
        self.now_s, _, call = heappop(self._due)
        call()
        return True


class Server:
    """Does one job at a time. busy_s: seconds it has worked.

    max_waiting: weight that may wait; a job beyond it is refused, unless none waits (what is larger would never be taken).
    """

    def __init__(self, timeline: Timeline, *, max_waiting: int | None = None) -> None:
        self._timeline, self._max_waiting = timeline, max_waiting
        self._waiting: deque[tuple[Job, Callable[[], None], int]] = deque()
        self._weight = 0
        self._busy = False
        self.busy_s = 0.0

    def submit(self, job: Job, end: Callable[[], None], *, weight: int = 0) -> bool:
        """Queue a job; `end` is called when it is done. False: refused."""
        if self._max_waiting is not None and self._weight and self._weight + weight > self._max_waiting:
            return False
        self._weight += weight
        self._waiting.append((job, end, weight))
        if not self._busy:
            self._begin()
        return True

    def _begin(self) -> None:
        while self._waiting:
            job, end, weight = self._waiting.popleft()
            self._busy = True  # `job` and `end` may submit more: those wait
            seconds = job()
            self.busy_s += seconds
            if seconds:
                self._timeline.at(self._timeline.now_s + seconds, lambda end=end, weight=weight: self._end(end, weight))  # type: ignore[misc]  # defaults bind
                return
            self._weight -= weight
            end()
            self._busy = False

    def _end(self, end: Callable[[], None], weight: int) -> None:
        self._weight -= weight
        end()
        self._busy = False
        self._begin()


class Link(Server):
    """One direction between two tiers. latency_s: of a batch, spent before its first byte."""

    def __init__(
        self,
        timeline: Timeline,
        *,
        bytes_per_s: float,
        latency_s: float,
        block_bytes: int,
        max_waiting: int | None = None,
    ) -> None:
        super().__init__(timeline, max_waiting=max_waiting)
        self._block_s, self._latency_s = block_bytes / bytes_per_s, latency_s

    def seconds(self, blocks: int) -> float:
        """To move some blocks in one batch."""
        return self._latency_s + blocks * self._block_s if blocks else 0.0
