"""Prefill there, decode here: waiting for a prompt that another engine computes, through a tier that hears of what others write.

    the other engine   [ chunk ][ chunk ][ chunk ]            each is copied down as it ends
    this store              └ wait ─▶ host └ wait ─▶ host     while the next is computed (`Ahead` brings it up)

A wait blocks a thread, but never for long: it is asked again, so that a wait that is cancelled or late ends soon, and so that
more prompts than there are threads take turns.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Final

from tierkv.ahead import Ahead, Expected
from tierkv.keys import Key, chain
from tierkv.layout import TOKEN_BYTES
from tierkv.mover import Mover
from tierkv.transfers import Below, Places

WAITERS: Final = 8
"""Threads that wait for prompts."""
TURN_S: Final = 0.25
"""A prompt is asked for again after so long, however many are waited for."""
log = logging.getLogger("tierkv")


@dataclass(slots=True, eq=False)
class _Awaited:
    """A prompt. announced: leading blocks that are known to be here or in the tier.  keys: of its whole blocks, once hashed."""

    tokens: bytes
    deadline: float
    expected: Expected
    here: "Future[int]" = field(default_factory=Future)
    keys: Sequence[Key] = ()
    announced: int = 0


class Handoffs:
    """Prompts that one store waits for, in the first tier of `below` that can. Thread-safe."""

    def __init__(
        self, *, root: Key, block_tokens: int, places: Places, below: Sequence[Below], ahead: Ahead, mover: Mover
    ) -> None:
        self._root, self._block_tokens, self._places, self._ahead = root, block_tokens, places, ahead
        self._lock = Lock()
        self._awaited: set[_Awaited] = set()
        self._below = next((tier for tier in below if tier.tier.waits), None)
        self._executor = mover.helpers("handoff", threads=WAITERS) if self._below else None

    def wait(self, tokens: bytes, *, deadline_s: float) -> "Future[int]":
        """As `Store.await_prefix`."""
        if self._below is None or self._executor is None:
            nobody: Future[int] = Future()
            nobody.set_result(self._count(tokens))
            return nobody
        awaited = _Awaited(tokens, self._places.clock() + deadline_s, self._ahead.expect(tokens))
        with self._lock:
            self._awaited.add(awaited)
        awaited.here.add_done_callback(lambda _: self._leave(awaited))
        self._executor.submit(self._turn, awaited, self._below, self._executor)
        return awaited.here

    def close(self) -> None:
        """Cancel all."""
        with self._lock:
            awaited = list(self._awaited)
        for one in awaited:
            one.here.cancel()

    def _leave(self, awaited: _Awaited) -> None:
        with self._lock:
            self._awaited.discard(awaited)
        self._ahead.cancel(awaited.expected)

    def _turn(self, awaited: _Awaited, below: Below, executor: Executor) -> None:
        """Wait for more of a prompt, and queue for the next turn."""
        try:
            if not awaited.here.done() and self._look(awaited, below) and not awaited.here.done():
                executor.submit(self._turn, awaited, below, executor)
                return
        except Exception:  # a defect: it must be seen, and the request goes on
            log.exception("a prompt is not waited for any more")
        if not awaited.here.done() and awaited.here.set_running_or_notify_cancel():
            awaited.here.set_result(self._count(awaited.tokens))

    def _count(self, tokens: bytes) -> int:
        """Leading blocks that this store has."""
        return self._places.index.match(self._root, tokens).num_blocks

    def _look(self, awaited: _Awaited, below: Below) -> bool:
        """Wait for one turn; False once there is nothing to wait for."""
        if not awaited.keys:
            block_bytes = self._block_tokens * TOKEN_BYTES
            whole_bytes = len(awaited.tokens) // block_bytes * block_bytes
            awaited.keys = chain(self._root, awaited.tokens[:whole_bytes], block_tokens=self._block_tokens)
        here, whole = self._count(awaited.tokens), len(awaited.keys)
        left_s = awaited.deadline - self._places.clock()
        if here >= whole or left_s <= 0:
            return False
        turn_s = min(left_s, TURN_S * min(1.0, WAITERS / max(1, len(self._awaited))))
        if awaited.announced >= whole:  # what rests now has no room, or did not come
            return not awaited.expected.rests.wait(turn_s)
        known = max(0, awaited.announced - here)
        wait = partial(below.tier.wait, awaited.keys[here:], known=known, deadline_s=turn_s)
        found = below.attempt(wait, count=whole - here, failures=self._places.metrics.misses)
        if found is None:
            return False
        if found > known:
            awaited.announced = here + found
            self._ahead.announce(awaited.expected, below, awaited.keys[here : awaited.announced], base=here)
        return True
