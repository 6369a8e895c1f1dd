"""Replay a trace through the real index and a real policy: what would have been held, without a byte of KV."""

import gc
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

from tierkv import policies
from tierkv.cost import CostModel
from tierkv.errors import ConfigError
from tierkv.hints import NO_HINTS, Ending, Next
from tierkv.index import Index, Lease, TierSpec
from tierkv.keys import Key
from tierkv.simulate.cells import Cell, Tally
from tierkv.simulate.request import ID_BYTES, Request, Trace
from tierkv.wants import Want

ROOT: Final = Key(b"simulated namespace".ljust(32, b"\0"))
ID_TOKENS: Final = ID_BYTES // 4
"""An id of a trace is a block of so many tokens to the index."""
LOOKAHEAD_S: Final = 10.0
"""Requests that arrive within this time count as waiting, where the queue is known."""
HINTS: Final = ("session", "tool", "queue")


@dataclass(frozen=True, slots=True)
class Known:
    """What an engine tells of its requests besides their tokens and, when they end, the length of the answer.

    session: which requests belong together, priorities, and when a session is over.  tool: whether the answer calls a tool,
    and when to expect its continuation, where the trace says.  queue_s: requests are known this long before they are served.
    """

    session: bool = False
    tool: bool = False
    queue_s: float = 0.0


NOTHING: Final = Known()


def known(hints: str, *, queue_s: float = LOOKAHEAD_S) -> Known:
    """Read `none`, `all` or some of HINTS with commas between. Raises ConfigError."""
    names = {"none": (), "all": HINTS}.get(hints) or tuple(filter(None, hints.split(",")))
    if hints != "none" and not (names and set(names) <= set(HINTS)):
        raise ConfigError(f"hints {hints!r}: must be none, all, or some of {', '.join(HINTS)} with commas between")
    if hints == "none":
        return NOTHING
    return Known("session" in names, "tool" in names, queue_s if "queue" in names else 0.0)


def replay(
    trace: Trace,
    *,
    policy: str,
    capacity_blocks: int,
    unique_blocks: int,
    cost: CostModel,
    objective: str = "hits",
    hints: Known = NOTHING,
    clock: Callable[[], float] = time.process_time,
) -> Cell:
    """Run every request of a trace against one tier, empty at first; what is not held there is nowhere.

    A request is over before the next one comes. unique_blocks: of the trace, for the capacity as a share.  objective: what the
    adaptive policy keeps most of, `hits` or `seconds`.
    """
    (made,), observer = policies.build([policy], capacities=[capacity_blocks], cost=cost, objective=objective)
    index = Index(
        block_tokens=ID_TOKENS,
        tiers=[TierSpec("simulated", capacity_blocks, True, made)],
        observer=observer,
        history_blocks=policies.history_blocks([capacity_blocks]) if policy in policies.REMEMBERING else 0,
    )
    start = clock()
    tally = drive(trace, index, hints=hints, learns=observer is not None)
    return tally.cell(
        policy=policy,
        capacity=capacity_blocks,
        unique=unique_blocks,
        block_tokens=trace.block_tokens,
        cost=cost,
        elapsed_s=clock() - start,
    )


def drive(trace: Iterable[Request], index: Index, *, hints: Known = NOTHING, learns: bool = False) -> Tally:
    """Run every request of a trace that has a full block against the first tier of an index, whose blocks are the trace's.

    learns: the index has an observer. It is told of every request and its end, and what it thinks little of is not let in, as
    in the tiers of a store below the device.
    """
    tally = Tally()
    queue = _Queue(trace, index, hints.queue_s) if hints.queue_s else None
    with _uncollected():
        for request in trace:
            blocks = request.blocks
            if not blocks:
                continue
            if queue:
                queue.look(request.time_s)
            lease = index.acquire(
                ROOT, blocks, now_s=request.time_s, hints=request.hints if hints.session else NO_HINTS
            )
            if queue:
                queue.served()
            found, asked = lease.num_blocks, len(blocks) // ID_BYTES
            if learns:
                index.extend(lease, blocks[found * ID_BYTES :])
                _let_in(index, lease, found)
            elif found < asked and (room := index.reserve(0, asked - found, at_least=1)):
                fresh = blocks[found * ID_BYTES : (found + room.count) * ID_BYTES]
                index.extend(lease, fresh, tier=0, places=room.places)
            if learns:
                index.end(lease, told(request, hints), now_s=request.time_s)
                _let_in(index, lease, found)  # as a store does: more is known of it now
            lease.release()
            tally.add(found, asked, request.input_tokens)
    return tally


def _let_in(index: Index, lease: Lease, found: int) -> None:
    """Let the lease's blocks from `found` on into the first tier, as far as that wants them."""
    copy = index.begin_copy(lease, 0, found, lease.num_blocks) if found < lease.num_blocks else None
    if copy:
        index.commit_copy(copy, [True] * len(copy.blocks))


def told(request: Request, hints: Known) -> Ending:
    """What is said of a request as it ends."""
    ending, following = request.ending, Next.UNKNOWN
    if ending.next is Next.ENDED:
        following = Next.ENDED if hints.session else Next.UNKNOWN
    elif hints.tool:
        following = ending.next
    return replace(ending, next=following, within_s=ending.within_s if hints.tool else None)


class _Queue:
    """Requests that wait, as far as they are known, and what they want."""

    def __init__(self, trace: Iterable[Request], index: Index, ahead_s: float) -> None:
        self._coming = (request for request in trace if request.blocks)
        self._next = next(self._coming, None)
        self._index, self._ahead_s = index, ahead_s
        self._wants: deque[Want] = deque()

    def look(self, now_s: float) -> None:
        """See who has come by now, the request that is served among them."""
        while self._next and self._next.time_s <= now_s + self._ahead_s:
            self._wants.append(self._index.want(ROOT, self._next.blocks))
            self._next = next(self._coming, None)

    def served(self) -> None:
        """The first one waits no more."""
        self._wants.popleft().release()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Leave garbage to reference counts: nothing here is freed otherwise, and looking for it takes a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
