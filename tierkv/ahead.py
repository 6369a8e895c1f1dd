"""What a store does for requests that wait in an engine's queue: their blocks are forgotten last, and come up to host memory.

    disk, shared ──piece──▶ host         one piece at a time, on a lane of its own, for whoever has waited longest

A load never waits for it: no piece is begun while one is queued or under way, no spare place is borrowed, and what is brought
for requests that still wait is a bounded part of the host tier. A piece that fails ends it for that request: its load asks again.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import Event, Lock
from typing import NamedTuple

from tierkv.index import Lease, Want
from tierkv.keys import Key
from tierkv.mover import AHEAD_LANE, LOAD_LANE, Mover
from tierkv.transfers import HOST, Below, Places, copy_up

Found = tuple[Below, list[Key]]
"""A shared tier, and the keys that it holds after those that are known."""


class _There(NamedTuple):
    """Keys of blocks from number `base` on, and the shared tier that holds them."""

    base: int
    below: Below
    keys: Sequence[Key]


class Expected:
    """A request that waits. brought: blocks that came to the host for it.  rests: nothing more is brought at present."""

    def __init__(self, tokens: bytes, want: Want) -> None:
        self.tokens, self.want = tokens, want
        self.brought = 0
        self.rests = Event()
        self.there: _There | None = None
        self.asked = False
        self.announced = 0  # how often


class Ahead:
    """Requests that wait, in the order of their coming, and the one transfer for them. Thread-safe.

    share: part of the host tier that may hold what was brought for them.  piece: blocks moved at a time.
    ask: which keys after a lease's last block a shared tier holds; None: there is none to ask.
    """

    def __init__(
        self,
        *,
        root: Key,
        block_bytes: int,
        places: Places,
        below: Mapping[int, Below],
        ask: Callable[[Lease, bytes], Found | None] | None,
        mover: Mover,
        share: float,
        piece: int,
        deadline_s: float,
    ) -> None:
        self._root, self._block_bytes, self._places, self._mover = root, block_bytes, places, mover
        self._below, self._ask = below, ask
        self._limit = int(share * places.index.room(HOST)[1])
        self._piece, self._deadline_s = piece, deadline_s
        self._lock = Lock()
        self._waiting: dict[Expected, None] = {}
        self._unfinished: dict[Expected, None] = {}  # those for which something may be left to bring
        self._brought = 0
        self._under_way = False

    def expect(self, tokens: bytes) -> Expected:
        """Take up a request that begins with these tokens; `cancel` it when it does not wait any more."""
        expected = Expected(tokens, self._places.index.want(self._root, tokens))
        with self._lock:
            self._waiting[expected] = None
            if self._below or self._ask:
                self._unfinished[expected] = None
        self.go_on()
        return expected

    def cancel(self, expected: Expected) -> None:
        """Bring no more for it, and let its blocks be forgotten like others. Idempotent."""
        expected.want.release()
        with self._lock:
            if expected in self._waiting:
                del self._waiting[expected]
                self._brought -= expected.brought
            self._unfinished.pop(expected, None)
        expected.rests.set()

    def announce(self, expected: Expected, below: Below, keys: Sequence[Key], *, base: int) -> None:
        """A shared tier holds these blocks now, from number `base` on: bring what has not come yet."""
        with self._lock:
            expected.there, expected.announced = _There(base, below, keys), expected.announced + 1
            if expected in self._waiting:
                self._unfinished[expected] = None
                expected.rests.clear()
        self.go_on()

    def close(self) -> None:
        """Cancel all."""
        for expected in list(self._waiting):
            self.cancel(expected)

    def go_on(self) -> None:
        """Queue the next piece, unless one is under way or a load is."""
        with self._lock:
            expected = next(iter(self._unfinished), None)
            busy = self._under_way or not self._mover.is_idle(LOAD_LANE)
            if self._brought >= self._limit:
                for full in self._unfinished:
                    full.rests.set()
                return
            if busy or expected is None:
                return
            expected.rests.clear()
            self._under_way = True
        if self._mover.submit(AHEAD_LANE, partial(self._run, expected), blocks=self._piece) is None:
            self._under_way = False

    def _run(self, expected: Expected) -> None:
        came, announced = 0, expected.announced
        try:
            if expected in self._waiting:
                came = self._bring(expected)
        finally:
            with self._lock:
                self._under_way = False
                if expected in self._waiting:
                    expected.brought += came
                    self._brought += came
                if not came and announced == expected.announced:
                    self._unfinished.pop(expected, None)
                    expected.rests.set()
        self.go_on()

    def _bring(self, expected: Expected) -> int:
        """Bring the next piece; how many blocks came."""
        num_blocks = min(self._piece, self._limit - self._brought)
        with self._places.index.keep(self._root, expected.tokens) as lease:
            for tier, lo, hi in lease.sources():
                if tier > HOST:
                    return self._copy(self._below[tier], lease, lo, min(hi, lo + num_blocks))
            if self._ask and not expected.asked:
                expected.asked = True
                self._learn(expected, lease.num_blocks, self._ask(lease, expected.tokens))
            lo, there = lease.num_blocks, expected.there
            if there is None or lo < there.base:
                return 0
            if there.below.tier.lends and not expected.announced:
                self._lift(there.below, there.keys[lo - there.base :])
                return 0
            keys = there.keys[lo - there.base : lo - there.base + num_blocks]
            if not keys:
                return 0
            hi = lo + len(keys)
            tokens = expected.tokens[lo * self._block_bytes : hi * self._block_bytes]
            self._places.index.extend(lease, tokens, keys=keys)
            return self._copy(there.below, lease, lo, hi)

    def _lift(self, below: Below, keys: Sequence[Key]) -> None:
        """Let a tier bring blocks to the memory that it lends: a load copies out of there, they need not come to the host."""
        failures = self._places.metrics.misses
        for at in range(0, len(keys), self._piece):
            piece = keys[at : at + self._piece]
            if not self._mover.is_idle(LOAD_LANE):
                return

            def lend(piece: Sequence[Key] = piece) -> bool:
                with below.tier.lend(piece, deadline_s=self._deadline_s) as lending:
                    return lending is not None

            if not below.attempt(lend, count=len(piece), failures=failures):
                return

    def _learn(self, expected: Expected, base: int, found: Found | None) -> None:
        with self._lock:
            if found and not expected.announced:  # whoever announces knows of later blocks
                expected.there = _There(base, *found)

    def _copy(self, below: Below, lease: Lease, lo: int, hi: int) -> int:
        if below.breaker.open:
            return 0
        return copy_up(self._places, below, lease, lo, hi, deadline=self._places.clock() + self._deadline_s)
