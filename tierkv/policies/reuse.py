"""What the learning policies of one index know in common: runs of blocks, what kind they are, and when they were last used.

What tells kinds apart are causes of reuse, as far as a store can see them: how many times the conversation has gone on, how
much the last request added, how quickly these blocks came back so far, how long the answer was, and what an engine says
about what comes next (`tierkv.hints`).
"""

from collections.abc import Callable, Sequence
from math import log2
from operator import attrgetter
from typing import Final

import numpy as np

from tierkv.hints import PRIORITIES, Ending, Next
from tierkv.policies.base import Leaf, Observer, Use
from tierkv.policies.hazard import Hazards

TURNS: Final = 4
FRESH: Final = (0, 1, 2, 4, 8, 16, 32, 64)
"""Upper ends of what counts as the same number of blocks that a request added."""
PAUSES: Final = 10
LONGEST_PAUSE_S: Final = 2.0**PAUSES
ANSWERS: Final = (16, 400)
"""Bounds between calls, usual and long answers, in tokens."""
NEXTS: Final = {following: number for number, following in enumerate(Next)}
REPLACED: Final = len(NEXTS)
"""In the place of what is expected: the conversation went on from before these blocks, without them."""
BRANCHES: Final = 3
"""A block that so many different blocks follow is what many conversations begin with: who goes on from there is new."""
KEPT_USES: Final = 4
"""Runs that were used more often than this are not told apart by their number of uses."""
LEARN_AFTER: Final = 100
"""Requests between two rounds of learning, at least; later a twentieth of all requests, up to LEARN_AT_LEAST."""
LEARN_AT_LEAST: Final = 1000
WEIGHT: Final = 4.0
"""What a step of priority multiplies the worth of a block by."""


class Run:
    """Blocks of a strand, up to `end`, that were used together so far.

    kind: in the hazards.  parts: what it was made of.  serial: of the request that used it last.  uses: times used again.
    """

    __slots__ = ("blocks", "end", "first_s", "kind", "last_s", "parts", "serial", "uses", "weight")

    def __init__(
        self, end: int, blocks: int, parts: tuple[int, ...], kind: int, now_s: float, serial: int, weight: float
    ) -> None:
        self.end, self.blocks, self.parts, self.kind = end, blocks, parts, kind
        self.first_s = self.last_s = now_s
        self.serial, self.weight, self.uses = serial, weight, 0

    def split(self, end: int) -> "Run":
        """Cut off the blocks before `end`, as a run of their own."""
        first = Run(end, self.blocks - (self.end - end), self.parts, self.kind, self.last_s, self.serial, self.weight)
        first.first_s, first.uses = self.first_s, self.uses
        self.blocks = self.end - end
        return first


class Shadow:
    """What an LRU of some capacity would hold, to the request: it holds all that requests after `floor` used last.

    hits: blocks that it would have had, of those that came up so far.
    """

    __slots__ = ("capacity", "floor", "held", "hits")

    def __init__(self, capacity_blocks: int) -> None:
        self.capacity, self.floor, self.held, self.hits = capacity_blocks, -1, 0, 0


class ReuseModel(Observer):
    """Runs of all strands that the index knows, and the hazards learned from them.

    now_s, serial, num_asked: time, number and blocks of the last request.  watchers: told of every strand some of whose blocks
    are of another kind now, or were used again.  rounds: of learning.
    Memory is bounded by the index's history: a few hundred bytes per run of blocks, 3 KiB per kind that occurs (of 7,200).
    """

    def __init__(self) -> None:
        self.hazards = Hazards((TURNS, len(FRESH) + 1, PAUSES, len(ANSWERS) + 2, len(NEXTS) + 1), told=2)
        self.now_s = 0.0
        self.rounds = self.num_asked = 0
        self.watchers: list[Callable[[Leaf], None]] = []
        self.shadows: list[Shadow] = []
        self._runs: dict[Run, None] = {}
        self.serial = self._due = 0
        self._last_used: dict[int, int] = {}  # request -> blocks that it was the last to use

    # -- what happens -------------------------------------------------------------------------------------------------

    def arrive(self, path: Sequence[tuple[Leaf, int]], use: Use) -> None:
        """See Observer."""
        self.now_s = use.now_s
        self.num_asked = use.num_blocks
        self.serial += 1
        if self.serial >= self._due:
            self._learn()
        self._advance()
        turn = 0
        if path:
            strand, end = path[-1]
            last = self.run(strand, end - 1)
            if last and strand.fanout(end - 1) < BRANCHES:
                turn = min(last.parts[0] + 1, TURNS - 1)
            if last and turn and use.num_known < use.num_blocks:
                self._replace(strand, end - 1, last.serial)
        new = use.num_blocks - use.num_known
        fresh = next((at for at, most in enumerate(FRESH) if new <= most), len(FRESH))
        priority = max(PRIORITIES[0], min(PRIORITIES[-1], use.hints.priority))
        use.notes = (turn, fresh, self.serial, WEIGHT**priority)
        for strand, end in path:
            if end:
                self._touch(strand, end, turn, fresh, use.notes[3])
                self._tell(strand)

    def extend(self, strand: Leaf, lo: int, hi: int, use: Use) -> None:
        """See Observer."""
        if use.notes is None:
            return
        turn, fresh, serial, weight = use.notes
        if strand.notes is None:
            strand.notes = []
        parts = (turn, fresh, 0, 0, 0)
        self._append(strand.notes, hi, parts, serial, weight)

    def end(self, path: Sequence[tuple[Leaf, int]], use: Use, ending: Ending, now_s: float) -> None:
        """See Observer."""
        self.now_s = max(self.now_s, now_s)
        tokens = ending.output_tokens
        answer = 0 if tokens is None else 1 + sum(tokens >= bound for bound in ANSWERS)
        following = NEXTS[ending.next]
        if use.notes is None or not (answer or following or ending.within_s is not None):
            return
        serial = use.notes[2]
        for strand, _ in path:
            for run in strand.notes or ():
                if run.serial == serial:
                    turn, fresh, pause = run.parts[:3]
                    if ending.within_s is not None:
                        pause = _pause(ending.within_s)
                    run.parts = (turn, fresh, pause, answer, following)
                    run.kind = self.hazards.number(run.parts)
            self._tell(strand)

    def gone(self, strand: Leaf, size: int) -> None:
        """See Observer."""
        runs = strand.notes or []
        while runs and runs[-1].end > size:
            run = runs[-1]
            if run.end - run.blocks < size:
                rest, runs[-1] = run, run.split(size)
                self._runs[runs[-1]] = None
            else:
                rest = runs.pop()
            del self._runs[rest]
            self.hazards.leave(rest.kind, rest.blocks, self.now_s - rest.last_s)
            self._moved(rest.serial, rest.blocks)
            for shadow in self.shadows:
                if rest.serial > shadow.floor:
                    shadow.held -= rest.blocks
        if not runs:
            strand.notes = None

    # -- what is known ------------------------------------------------------------------------------------------------

    def run(self, strand: Leaf, block: int) -> Run | None:
        """The run that a block belongs to; None for one that was not used since it was restored."""
        for run in strand.notes or ():
            if block < run.end:
                return run  # type: ignore[no-any-return]  # notes are ours
        return None

    def shadow(self, capacity_blocks: int) -> Shadow:
        """Follow an LRU of this capacity from now on."""
        self.shadows.append(Shadow(capacity_blocks))
        return self.shadows[-1]

    # -- runs ---------------------------------------------------------------------------------------------------------

    def _touch(self, strand: Leaf, end: int, turn: int, fresh: int, weight: float) -> None:
        """Blocks [0, end) of a strand are used."""
        runs: list[Run] = strand.notes or []
        now_s, serial, number = self.now_s, self.serial, self.hazards.number
        kept: list[Run] = []
        for at, run in enumerate(runs):
            if run.end - run.blocks >= end:
                kept += runs[at:]
                break
            if run.end > end:
                rest, run = run, run.split(end)
                self._runs[run] = None
                kept_rest = [rest, *runs[at + 1 :]]
            else:
                kept_rest = []
            age_s = now_s - run.last_s
            self.hazards.observe(run.kind, run.blocks, age_s)
            self._count(run)
            run.uses += 1
            run.parts = (turn, fresh, _pause((now_s - run.first_s) / run.uses), 0, 0)
            run.last_s, run.serial, run.weight = now_s, serial, weight
            before = kept[-1] if kept else None
            if before and before.parts == run.parts and (before.uses == run.uses or run.uses > KEPT_USES):
                before.end = run.end
                before.blocks += run.blocks
                del self._runs[run]
            else:
                run.kind = number(run.parts)
                kept.append(run)
            if kept_rest:
                kept += kept_rest
                break
        strand.notes = kept
        if not kept or kept[-1].end < end:  # restored, and used for the first time
            self._append(kept, end, (turn, fresh, 0, 0, 0), serial, weight)

    def _replace(self, strand: Leaf, block: int, serial: int) -> None:
        """The request that comes parts from the only way on from a block: mark what follows, as far as one request used it."""
        while found := strand.follower(block):
            strand, block = found
            runs: list[Run] = strand.notes or []
            at = next((at for at, run in enumerate(runs) if block < run.end), len(runs))
            if at < len(runs) and runs[at].end - runs[at].blocks < block:
                if runs[at].serial != serial:
                    return
                runs.insert(at, runs[at].split(block))
                self._runs[runs[at]] = None
                at += 1
            for run in runs[at:]:
                if run.serial != serial:
                    break
                run.parts = (*run.parts[:-1], REPLACED)
                run.kind = self.hazards.number(run.parts)
            self._tell(strand)
            if not runs or runs[-1].end < strand.size or runs[-1].serial != serial:
                return
            block = strand.size - 1

    def _tell(self, strand: Leaf) -> None:
        for watcher in self.watchers:
            watcher(strand)

    def _append(self, runs: list[Run], end: int, parts: tuple[int, ...], serial: int, weight: float) -> None:
        last = runs[-1] if runs else None
        start = last.end if last else 0
        if start >= end:
            return
        self._last_used[serial] = self._last_used.get(serial, 0) + end - start
        for shadow in self.shadows:
            if serial > shadow.floor:
                shadow.held += end - start
        if last and last.serial == serial and last.parts == parts and not last.uses:
            last.blocks += end - start
            last.end = end
            return
        run = Run(end, end - start, parts, self.hazards.number(parts), self.now_s, serial, weight)
        runs.append(run)
        self._runs[run] = None

    # -- the shadows --------------------------------------------------------------------------------------------------

    def _count(self, run: Run) -> None:
        """A run passes from the request that used it last to this one."""
        self._moved(run.serial, run.blocks)
        self._last_used[self.serial] = self._last_used.get(self.serial, 0) + run.blocks
        for shadow in self.shadows:
            if run.serial > shadow.floor:
                shadow.hits += run.blocks
            else:
                shadow.held += run.blocks

    def _moved(self, serial: int, blocks: int) -> None:
        left = self._last_used.get(serial, 0) - blocks
        if left > 0:
            self._last_used[serial] = left
        else:
            self._last_used.pop(serial, None)

    def _advance(self) -> None:
        """Let every shadow forget the requests that it has no room for."""
        for shadow in self.shadows:
            while shadow.held > shadow.capacity and shadow.floor < self.serial:
                shadow.floor += 1
                shadow.held -= self._last_used.get(shadow.floor, 0)

    # -- learning -----------------------------------------------------------------------------------------------------

    def _learn(self) -> None:
        self._due = self.serial + min(LEARN_AT_LEAST, max(LEARN_AFTER, self.serial // 20))
        self.rounds += 1
        runs = self._runs
        count = len(runs)
        self.hazards.learn(
            np.fromiter(map(attrgetter("kind"), runs), np.int64, count),
            np.fromiter(map(attrgetter("blocks"), runs), np.float64, count),
            self.now_s - np.fromiter(map(attrgetter("last_s"), runs), np.float64, count),
        )


def _pause(seconds: float) -> int:
    """Number of a mean time between uses; 0 is for blocks that were used once."""
    return min(PAUSES - 1, 1 + int(log2(1 + min(max(0.0, seconds), LONGEST_PAUSE_S) / 2)))
