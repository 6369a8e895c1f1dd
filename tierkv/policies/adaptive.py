"""The policy that learns: forgets what is least likely to be used soon, and follows LRU where that knows better."""

from heapq import heapify, heappop, heappush
from math import inf
from typing import ClassVar, Final, NamedTuple

from tierkv.policies.base import Leaf, Policy, Victim
from tierkv.policies.hazard import EDGES_S, NUM_AGES, age_of
from tierkv.policies.reuse import ReuseModel, Run

MEMORY: Final = 0.999
"""Weight that the hits so far keep at the next request: about a thousand requests count."""
LOST: Final = 0.05
"""LRU is followed when it is ahead by this share of its own misses: near the bound a little is much."""
PROBATION: Final = 300
"""Requests that LRU is followed for before the policy tries again."""

Kind = int | tuple[int, float]
"""What a queue is of: a kind of the hazards; of those of another priority than the usual, with their weight."""

_EVERY: Final = -1
"""The one queue of all blocks, while LRU is followed."""
STALE: Final = 64
"""So many entries that stand for nothing any more are left where they are in any case, until queues or board are made anew."""

_UNUSED: Final = -2
"""Blocks that were restored from a tier at rest and not used since."""


class _Entry(NamedTuple):
    """A strand on offer. Of a queue the one goes first whose tail was used longest ago; then the deepest."""

    serial: int
    depth: int
    number: int
    strand: Leaf
    run: Run | None
    kind: Kind


class AdaptivePolicy(Policy):
    """Worth of a block: the chance of its use per second of keeping it (`Hazards.worth`), times what a use saves.

    One queue per kind of block and priority, by last use: all but the oldest of these can wait. The scores of the heads stand
    on a board and are looked at again when a head changes, when its age does, and when something was learned.
    New blocks that are worth less than what would have to go are not let in.

    Beside it runs the shadow of an LRU of the same size. When that would have hit more lately, blocks are forgotten by their
    last use for a while. capacity_blocks: of the tier; None: no shadow.
    """

    name: ClassVar[str] = "adaptive"

    def __init__(self, *, tier: int, model: ReuseModel, capacity_blocks: int | None = None) -> None:
        self.tier = tier
        self._model = model
        self._live: dict[Leaf, _Entry] = {}
        self._queues: dict[Kind, list[_Entry]] = {}
        self._board: list[tuple[float, int, int, Kind]] = []  # score and last use of a head, version, kind
        self._ageing: list[tuple[float, int, Kind]] = []  # when the age of a head changes, version, kind
        self._version: dict[Kind, int] = {}
        self._versions = self._count = self._rounds = self._queued = 0
        model.watchers.append(self._changed)
        self._shadow = None if capacity_blocks is None else model.shadow(capacity_blocks)
        self._ahead = self._missed = 0.0  # blocks that the shadow hit and this did not; that the shadow missed
        self._shadow_hits = 0
        self._followed_until = 0  # LRU is followed, up to this request; 0: it is not

    # -- what a block is worth ----------------------------------------------------------------------------------------

    def value(self, strand: Leaf, block: int) -> float:
        """What one use of a block saves."""
        return 1.0

    def worth(self, strand: Leaf, block: int) -> float:
        """See Policy."""
        run = self._model.run(strand, block)
        if run is None or self._followed_until:
            return inf
        return self._model.hazards.worth[run.kind][0] * run.weight * self.value(strand, block)

    def admit(self, strand: Leaf, blocks: int) -> bool:
        """Let in what `pop` makes room for."""
        return True

    # -- following the better one -------------------------------------------------------------------------------------

    def record(self, strand: Leaf, lo: int, hi: int, now: int) -> None:
        """Learn nothing: the model sees it all."""

    def found(self, blocks: int) -> None:
        """See Policy."""
        shadow, model = self._shadow, self._model
        if shadow is None:
            return
        self._ahead = MEMORY * self._ahead + shadow.hits - self._shadow_hits - blocks
        self._missed = MEMORY * self._missed + model.num_asked - (shadow.hits - self._shadow_hits)
        self._shadow_hits = shadow.hits
        if self._followed_until:
            if model.serial >= self._followed_until:
                self._followed_until, self._ahead = 0, 0.0
                self._requeue()
        elif self._ahead > LOST * self._missed:
            self._followed_until = model.serial + PROBATION
            self._requeue()

    def _requeue(self) -> None:
        """Sort all that is on offer into queues anew."""
        self._queues = {}
        for strand, entry in self._live.items():
            entry = self._live[strand] = entry._replace(kind=self._kind(entry.run))
            self._queues.setdefault(entry.kind, []).append(entry)
        for queue in self._queues.values():
            heapify(queue)
        self._queued = len(self._live)
        self._survey()

    def _kind(self, run: Run | None) -> Kind:
        if self._followed_until:
            return _EVERY
        if run is None:
            return _UNUSED
        return run.kind if run.weight == 1 else (run.kind, run.weight)

    # -- what may go --------------------------------------------------------------------------------------------------

    def _changed(self, strand: Leaf) -> None:
        """Blocks of the strand are of another kind, or were used again."""
        if strand in self._live:
            self.offer(strand)

    def offer(self, strand: Leaf) -> None:
        """See Policy."""
        lo, hi = strand.span(self.tier)
        if lo == hi:
            return
        run = self._model.run(strand, hi - 1)
        serial = run.serial if run else -1
        old = self._live.get(strand)
        kind, depth = self._kind(run), -strand.depth - hi
        if old and old.run is run and old.serial == serial and old.kind == kind and old.depth == depth:
            return
        self._count += 1
        entry = self._live[strand] = _Entry(serial, depth, self._count, strand, run, kind)
        queue = self._queues.get(kind)
        if queue is None:
            queue = self._queues[kind] = []
        heappush(queue, entry)
        self._queued += 1
        if self._queued > 2 * len(self._live) + STALE:
            self._requeue()
            return
        if queue[0] is entry or queue[0] is old:
            self._look(kind)
        if old and old.kind != kind and (left := self._queues[old.kind]) and left[0] is old:
            self._look(old.kind)

    def withdraw(self, strand: Leaf) -> None:
        """See Policy."""
        old = self._live.pop(strand, None)
        if old and self._queues[old.kind][0] is old:
            self._look(old.kind)

    def pop(self, below: float = inf) -> Victim | None:
        """See Policy."""
        if self._rounds != self._model.rounds:
            self._survey()
        now_s, ageing, board = self._model.now_s, self._ageing, self._board
        while ageing and ageing[0][0] <= now_s:
            _, version, kind = heappop(ageing)
            if self._version[kind] == version:
                self._look(kind)
        while board:
            score, _, version, kind = board[0]
            if self._version[kind] != version:
                heappop(board)
                continue
            head = self._queues[kind][0]
            strand, run = head.strand, head.run
            if self._live.get(strand) is not head:
                self._drop_head(kind)
                continue
            lo, hi = strand.span(self.tier)
            if not self._is_true(head, kind, lo, hi):
                self._drop_head(kind)
                self.offer(strand)
                continue
            if score >= below:
                return None
            self._drop_head(kind)
            return Victim(strand, hi - max(lo, run.end - run.blocks if run else lo))
        return None

    def _is_true(self, entry: _Entry, kind: Kind, lo: int, hi: int) -> bool:
        """Whether an entry still says what it stands for: its strand's tail may have been used, cut or told of."""
        run = self._model.run(entry.strand, hi - 1) if lo < hi else None
        return (
            lo < hi
            and run is entry.run
            and entry.depth == -entry.strand.depth - hi
            and (not run or run.serial == entry.serial)
            and self._kind(run) == kind
        )

    def _drop_head(self, kind: Kind) -> None:
        queue = self._queues[kind]
        entry = heappop(queue)
        self._queued -= 1
        if self._live.get(entry.strand) is entry:
            del self._live[entry.strand]
        self._look(kind)

    def _survey(self) -> None:
        """Look at all queues."""
        self._rounds = self._model.rounds
        self._version.clear()
        self._board.clear()
        self._ageing.clear()
        for kind in list(self._queues):
            self._look(kind)

    def _look(self, kind: Kind) -> None:
        """Put the head of a queue on the board, in the place of what stood there for it."""
        queue = self._queues[kind]
        while queue and self._live.get(queue[0].strand) is not queue[0]:
            heappop(queue)
            self._queued -= 1
        if len(self._board) > 8 * (len(self._queues) + STALE):
            self._survey()
            return
        self._versions += 1
        self._version[kind] = version = self._versions
        if not queue:
            return
        head = queue[0]
        run = head.run
        if run is None or kind == _EVERY:
            score = -inf
        else:
            now_s, last_s = self._model.now_s, run.last_s
            age = age_of(now_s - last_s)
            while age + 1 < NUM_AGES and last_s + EDGES_S[age + 1] <= now_s:  # rounded: it must not come up again
                age += 1
            score = (
                self._model.hazards.worth[run.kind][age]
                * run.weight
                * self.value(head.strand, -head.depth - head.strand.depth - 1)
            )
            if age + 1 < NUM_AGES:
                heappush(self._ageing, (last_s + EDGES_S[age + 1], version, kind))
        heappush(self._board, (score, head.serial, version, kind))
