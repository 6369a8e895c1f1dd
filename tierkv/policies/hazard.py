"""How soon blocks are used again, learned from how they were: a table of hazards by kind of block and by age.

The *hazard* of a block is its chance of being used in the next second, given how long it has not been. It is counted as in
survival analysis: events (uses) over exposure (seconds in which a use could have been), per kind and age, whether a tier
held the block or not: what was forgotten too early is just what has to be learned. Pure: numbers in, numbers out.
"""

from array import array
from bisect import bisect_right
from typing import Final

import numpy as np
from numpy.typing import NDArray

NUM_AGES: Final = 40
EDGES_S: Final = (0.0, *(2 ** (at / 2) for at in range(NUM_AGES - 1)))
"""Ages are told apart by half octaves from a second on; the last is open (from 6 days on)."""
PRIOR_PER_S: Final = 0.002
"""Hazard of a block used within the last second, before anything is known."""
EVIDENCE: Final = 100.0
"""Blocks' worth of belief in what is shared by all (the shape over age, the parts of a kind)."""
EVIDENCE_KIND: Final = 300.0
"""Blocks' worth of belief in the parts of a kind against what was seen of the very kind."""
ALIKE_S: Final = 1000.0
"""Kinds differ less the older the blocks: those that are still unused by then are much alike."""
SWEEPS: Final = 3

Table = NDArray[np.float64]

_WIDTH: Final = np.array([hi - lo for lo, hi in zip(EDGES_S, (*EDGES_S[1:], EDGES_S[-1] * 2**0.5), strict=True)])
_MIDDLE: Final = np.array(EDGES_S) + _WIDTH / 2
_FADE: Final = 1 / (1 + np.array(EDGES_S) / ALIKE_S)


def age_of(seconds: float) -> int:
    """Number of an age."""
    return bisect_right(EDGES_S, seconds) - 1


class Hazards:
    """Events and exposure by kind and age, and what follows from them: `worth[kind][age]`.

    parts: how many values each part of a kind can have; a kind is a tuple of these, and gets a number when it is first seen.
    The last `told` parts are 0 until somebody tells: a kind of which nothing was told yet is judged by all that agree in
    the other parts.
    Kinds that were seen little are judged by their parts, these by all blocks: a product of factors, fitted to the counts
    (iterative proportional fitting), and shrunk towards by as many blocks' worth of belief as above.
    worth: the largest chance of a use per second of keeping the block, over all times that one could give up at (the
    Gittins index of the job "wait for the next use"; Gittins, "Bandit Processes and Dynamic Allocation Indices", 1979).
    """

    def __init__(self, parts: tuple[int, ...], *, told: int = 0) -> None:
        self._parts, self._told = parts, told
        self._kinds: dict[tuple[int, ...], int] = {}
        self._events, self._ended, self._partial = array("d"), array("d"), array("d")
        self._shape = _shape(np.zeros(NUM_AGES), np.zeros(NUM_AGES))
        self._factors = [np.ones(size) for size in parts]
        self._usual: list[float] = _gittins(self._shape[np.newaxis])[0].tolist()  # worth of all blocks together
        self.worth: list[list[float]] = []

    def __len__(self) -> int:
        """Kinds seen so far."""
        return len(self._kinds)

    def number(self, kind: tuple[int, ...]) -> int:
        """The number of a kind."""
        found = self._kinds.get(kind)
        if found is None:
            found = self._kinds[kind] = len(self._kinds)
            for table in (self._events, self._ended, self._partial):
                table.frombytes(bytes(8 * NUM_AGES))
            level = float(np.prod([factor[part] for factor, part in zip(self._factors, kind, strict=True)]))
            self.worth.append([each * level for each in self._usual])
        return found

    def observe(self, kind: int, blocks: int, age_s: float) -> None:
        """Blocks of a kind were used again, after `age_s`."""
        age = bisect_right(EDGES_S, age_s) - 1
        at = kind * NUM_AGES + age
        self._events[at] += blocks
        self._ended[at] += blocks
        self._partial[at] += blocks * (age_s - EDGES_S[age])

    def leave(self, kind: int, blocks: int, age_s: float) -> None:
        """Blocks of a kind are lost from sight after `age_s` without a use."""
        age = bisect_right(EDGES_S, age_s) - 1
        at = kind * NUM_AGES + age
        self._ended[at] += blocks
        self._partial[at] += blocks * (age_s - EDGES_S[age])

    def learn(self, kinds: NDArray[np.int64], blocks: Table, ages_s: Table) -> None:
        """Work out `worth` anew. The arguments are all runs of blocks that wait for their next use now."""
        count = len(self._kinds)
        if not count:
            return
        cells = kinds * NUM_AGES + np.searchsorted(EDGES_S, ages_s, "right") - 1
        size = count * NUM_AGES
        waiting: Table = np.asarray(np.bincount(cells, blocks, size), dtype=np.float64)
        begun_s = np.array(EDGES_S)[cells % NUM_AGES]
        partial: Table = np.asarray(np.bincount(cells, blocks * (ages_s - begun_s), size), dtype=np.float64)
        events = np.array(self._events).reshape(count, NUM_AGES)
        exposure = _exposure(
            (np.array(self._ended) + waiting).reshape(count, NUM_AGES),
            (np.array(self._partial) + partial).reshape(count, NUM_AGES),
        )
        self._shape = shape = _shape(events.sum(0), exposure.sum(0))
        kinds = np.array(list(self._kinds), dtype=np.int64).T
        level = self._fit(kinds, events.sum(1), exposure @ shape)
        if self._told:
            self._pool(kinds, events, exposure)
        seen, expected = events.sum(1), exposure @ shape
        level = (EVIDENCE_KIND * level + seen) / (EVIDENCE_KIND + expected)
        prior = shape * level[:, np.newaxis] ** _FADE
        found = _gittins(np.vstack(((events + EVIDENCE) / (exposure + EVIDENCE / prior), shape)))
        *self.worth, self._usual = found.tolist()

    def _pool(self, kinds: NDArray[np.int64], events: Table, exposure: Table) -> None:
        """Give kinds of which nothing was told the counts of all that agree with them otherwise."""
        first = len(self._parts) - self._told
        group = np.ravel_multi_index(tuple(kinds[:first]), self._parts[:first])
        untold = ~kinds[first:].any(0)
        for table in (events, exposure):
            sums = np.zeros((int(group.max()) + 1, NUM_AGES))
            np.add.at(sums, group, table)
            table[untold] = sums[group[untold]]

    def _fit(self, kinds: NDArray[np.int64], seen: Table, expected: Table) -> Table:
        """Fit a factor per value of each part; returns the product of every kind."""
        for _ in range(SWEEPS):
            for part, values in enumerate(kinds):
                others = np.ones(len(seen))
                for other, number in enumerate(kinds):
                    if other != part:
                        others *= self._factors[other][number]
                size = self._parts[part]
                found = np.bincount(values, seen, size)
                self._factors[part] = (EVIDENCE + found) / (EVIDENCE + np.bincount(values, expected * others, size))
        product = np.ones(len(seen))
        for factor, number in zip(self._factors, kinds, strict=True):
            product *= factor[number]
        return product


def _exposure(ended: Table, partial: Table) -> Table:
    """Seconds spent in each age, from where waits ended: those that ended later went through all of it."""
    passed = np.zeros_like(ended)
    passed[:, :-1] = ended[:, :0:-1].cumsum(1)[:, ::-1]
    return np.asarray(partial + passed * _WIDTH, dtype=np.float64)


def _shape(events: Table, exposure: Table) -> Table:
    """The hazard of all blocks by age; where little was seen it falls as one over the age."""
    shape = np.empty(NUM_AGES)
    prior = PRIOR_PER_S
    for age in range(NUM_AGES):
        shape[age] = (events[age] + EVIDENCE) / (exposure[age] + EVIDENCE / prior)
        if age + 1 < NUM_AGES:
            prior = shape[age] * _MIDDLE[age] / _MIDDLE[age + 1]
    return shape


def _gittins(hazards: Table) -> Table:
    """The index of each age, row by row."""
    hazard = np.ascontiguousarray(hazards.T)  # ages first: all that start at one age in a row
    stay = np.exp(-hazard * _WIDTH[:, np.newaxis])
    use = -np.expm1(-hazard * _WIDTH[:, np.newaxis])
    seconds = use / hazard
    gained, waited, still, index = use.copy(), seconds.copy(), stay.copy(), hazard.copy()
    for more in range(1, NUM_AGES):  # who starts at any age gives up so many ages later
        last = NUM_AGES - more
        gained[:last] += still[:last] * use[more:]
        waited[:last] += still[:last] * seconds[more:]
        still[:last] *= stay[more:]
        np.maximum(index[:last], gained[:last] / waited[:last], out=index[:last])
    return index.T
