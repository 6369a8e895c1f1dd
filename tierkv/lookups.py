"""What is noted of every lookup of a store: why blocks were missing, how far back reuse reaches, and the access log.

    begin (as its blocks are found) -> short (a load that did not bring all) -> end (its request is over)

The engine's thread only looks into the index and counts, and only where something is missing; digests, distances and files are
the work of a lane of the mover. A lane that is full costs the note, never the request.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np

from tierkv.explain import Fields, Reason, Stretch, differences, from_index, partial_tail
from tierkv.fates import Known
from tierkv.hints import Ending, Hints
from tierkv.keys import Key
from tierkv.layout import TOKEN_BYTES
from tierkv.metrics import Metrics
from tierkv.record import Access, Recorder
from tierkv.reuse_distance import Namer, Names, ReuseDistances, as_rows, what_if
from tierkv.tiers.base import Miss

RECORD_LANE: Final = "record"
MAX_WAITING: Final = 4096
"""Notes that may wait in the lane; what they keep in memory is their prompts."""
NOTE_EVERY_S: Final = 60.0
NOTE: Final = "stats"
OTHER_ROOTS: Final = 8
"""Other namespaces that are looked into when a prompt is not known in its own."""


@dataclass(slots=True)
class Lookup:
    """One request's. missing: stretches of its blocks that could not be had, and why."""

    at_s: float
    num_tokens: int
    hints: Hints
    missing: list[Stretch] = field(default_factory=list)
    _names: Names | None = None
    _after: tuple[int, int] = (0, 0)
    _digests: bytes = b""


@dataclass(frozen=True, slots=True)
class Sources:
    """What lookups ask. explain, roots: of the index.  tier_names: by its numbers.  namespaces: what other roots stand for.

    down: name of a shared tier that is left alone at the moment, so that nobody knows what it holds.
    """

    explain: Callable[[Key, bytes], Sequence[Known]]
    roots: Callable[[], Sequence[Key]]
    tier_names: Sequence[str]
    fields: Fields
    namespaces: Mapping[Key, Fields] = field(default_factory=dict)
    down: Callable[[], str | None] = lambda: None


class Lookups:
    """Of one store. `begin`, `short` and `end` are its scheduling thread's.

    submit: queues a job on RECORD_LANE, or says False.  capacities: blocks of each tier that the index knows, the fastest first.
    note: keeps a text where `tierkv stats` finds it.  now: seconds since the epoch.
    """

    def __init__(
        self,
        *,
        root: Key,
        block_tokens: int,
        sources: Sources,
        capacities: Mapping[str, int],
        metrics: Metrics,
        submit: Callable[[Callable[[], None]], bool],
        recorder: Recorder | None = None,
        note: Callable[[str, str], None] | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._root, self._block_tokens, self._sources = root, block_tokens, sources
        self._capacities, self._metrics, self._submit = capacities, metrics, submit
        self._recorder, self._note, self._now = recorder, note, now
        self._namer = Namer(block_tokens=block_tokens)
        self.distances = ReuseDistances(max_blocks=4 * max(capacities.values(), default=1))
        self._next_note_s = now() + NOTE_EVERY_S
        for tier, times in what_if(self.distances, capacities):
            metrics.capacity_hit_share.read_from(partial(self._share, tier, times), tier, f"{times:g}")

    def _share(self, tier: str, times: float) -> float:
        return what_if(self.distances, self._capacities)[tier, times]

    # -- on the scheduling thread -----------------------------------------------------------------------------------

    def begin(self, tokens: bytes, *, num_loadable: int, hints: Hints) -> Lookup:
        """A request's blocks have just been found, and none of its own is saved yet; num_loadable: how many can be had."""
        lookup = Lookup(self._now(), len(tokens) // TOKEN_BYTES, hints)
        whole = len(tokens) // (self._block_tokens * TOKEN_BYTES)
        if num_loadable < whole:
            lookup.missing = self._explain(tokens, num_loadable, whole)
        if partial_tail(tokens, block_tokens=self._block_tokens):
            lookup.missing.append(Stretch(whole, whole + 1, reason=Reason.PARTIAL_TAIL))
        for stretch in lookup.missing:
            assert stretch.reason is not None
            self._metrics.missed_blocks.add(stretch.hi - stretch.lo, stretch.reason)
        if not self._submit(partial(self._begun, lookup, tokens)) and self._recorder:
            self._metrics.records_dropped.add(1, "queue")
        return lookup

    def _explain(self, tokens: bytes, lo: int, hi: int) -> list[Stretch]:
        sources = self._sources
        known = from_index(sources.explain(self._root, tokens), sources.tier_names)
        found = [one if one.lo >= lo else one.part(lo, one.hi) for one in known if one.hi > lo]
        if found and found[-1].reason is Reason.NEVER_SEEN:
            found[-1:] = self._elsewhere(tokens, found[-1])
        # What can be had is not the index's alone to say: it may have gone since.
        return [one if one.reason else one.because(Reason.UNREACHABLE) for one in found]

    def _elsewhere(self, tokens: bytes, unseen: Stretch) -> list[Stretch]:
        """Blocks that are not known here: perhaps under another key, perhaps in a tier that cannot be asked."""
        sources = self._sources
        best: Stretch | None = None
        for root in [root for root in sources.roots() if root != self._root][:OTHER_ROOTS]:
            theirs = from_index(sources.explain(root, tokens), sources.tier_names)
            if theirs and theirs[0].reason is None and theirs[0].hi > max(unseen.lo, best.hi if best else 0):
                differs = differences(sources.fields, sources.namespaces.get(root, {}))
                best = Stretch(unseen.lo, theirs[0].hi, theirs[0].tiers, Reason.KEY_DIFFERS, differs=differs)
        down = sources.down()
        rest = unseen.because(Reason.DOWN, tier=down) if down else unseen
        if best is None:
            return [rest]
        return [best, *([rest.part(best.hi, unseen.hi)] if best.hi < unseen.hi else [])]

    def short(self, lookup: Lookup, blocks: int, reason: Miss, *, lo: int, tier: str | None = None) -> None:
        """A load brought fewer blocks than were found: those from `lo` on must be computed."""
        if blocks > 0:
            self._metrics.missed_blocks.add(blocks, reason)
            lookup.missing.insert(0, Stretch(lo, lo + blocks, reason=Reason(reason.value), tier=tier))

    def end(self, lookup: Lookup, ending: Ending, *, written: bytes = b"") -> None:
        """The request is over. written: tokens of the whole blocks that follow the prompt's, which its answer filled."""
        if not self._submit(partial(self._ended, lookup, ending, written)) and self._recorder:
            self._metrics.records_dropped.add(1, "queue")

    # -- on the lane ------------------------------------------------------------------------------------------------

    def _begun(self, lookup: Lookup, tokens: bytes) -> None:
        lookup._names, lookup._after = self._namer.names(tokens)
        self.distances.refer(lookup._names)
        if self._recorder:
            lookup._digests = self._recorder.digests(tokens)

    def _ended(self, lookup: Lookup, ending: Ending, written: bytes) -> None:
        if lookup._names is None:  # its beginning was not taken up: counted then
            return
        if written:
            names, _ = self._namer.names(written, after=lookup._after)
            self.distances.touch(np.concatenate([lookup._names, names]))
        if self._recorder:
            self._recorder.write(Access(lookup.at_s, lookup._digests, lookup.num_tokens, lookup.hints, ending))
        if self._note and self._now() >= self._next_note_s:
            self._next_note_s = self._now() + NOTE_EVERY_S
            self._note(NOTE, json.dumps(self.stats()))

    # -- for people ---------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:  # Any: as JSON takes it
        """What `tierkv stats` shows."""
        return {
            "at": self._now(),
            "block_tokens": self._block_tokens,
            "refs": self.distances.num_refs,
            "tiers": as_rows(self.distances, self._capacities),
            "missed": {labels[0][1]: value for _, labels, value in self._metrics.missed_blocks.samples()},
        }

    def close(self) -> None:
        """Leave the last figures, and let go of the access log. The lane must have ended."""
        if self._note:
            self._note(NOTE, json.dumps(self.stats()))
        if self._recorder:
            self._recorder.close()
