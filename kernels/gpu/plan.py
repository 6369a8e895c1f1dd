"""Which program of the attention kernel reads which keys: made on the host once per step, for all layers alike.

Sequences of a step differ in length a thousandfold, and a card is busy only while all its processors are. So the unit of
work is an *item*: some query rows of one sequence and a stretch of its keys. A long sequence is cut into several items
whose partial results are merged (split-K; Dao et al., Flash-Decoding, 2023); the cut is chosen so that the last program ends
soonest. Rows are (token, query head of the group) pairs, token-major: one load of K serves all heads of a group.

    rows   a0 a1 a2 a3 | a4 ...                   tiles of `Tiles.rows`
    keys   0 ......... 512 ......... 1024 ... 1200    stretches, whole turns of `Tiles.keys`
           item 1      item 2        item 3           slots 0, 1, 2 of the partial results
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from .tiles import Tiles

Array = np.ndarray[tuple[int, ...], np.dtype[np.integer[Any]]]

MAX_SPLITS: Final = 128
_MIN_TURNS: Final = 4
# What a program costs besides its turns, and a second launch, in turns; and what a finer cut must gain, for partial results
# are written and read again. Estimates: to be measured on a card.
_PROGRAM, _MERGE, _GAIN = 1.0, 2.0, 0.95
_WAVES: Final = 5


class Plan(NamedTuple):
    """Work of one launch, as int32 arrays on the host.

    items: [n, 5] sequence, first row, first key, key past the last, slot (negative: the result is whole).  Longest first.
    merges: [m, 4] sequence, first row, first slot, number of slots.
    """

    items: Array
    merges: Array

    @property
    def num_slots(self) -> int:
        """Partial results, over all items."""
        return int(self.merges[:, 3].sum())

    @property
    def most_slots(self) -> int:
        """Partial results of one tile of rows, at most."""
        return int(self.merges[:, 3].max(initial=0))


def plan(
    spans: Sequence[tuple[int, int, int]],
    sequences: Array,
    *,
    group: int,
    kv_heads: int,
    window: int | None,
    tiles: Tiles,
    resident: int,
    most_items: int | None = None,
) -> Plan:
    """Cut the attention of `sequences` (numbers into spans) into items.

    group: query heads per KV head.  window: keys a query sees, itself included.  resident: programs the card runs at a time.
    most_items: at least the number of tiles; None sets no limit.
    """
    first, last, length = np.asarray(spans, np.int64)[sequences].T
    rows = (last - first) * group
    count = -(-rows // tiles.rows)
    of = np.repeat(np.arange(len(sequences)), count)  # tile -> sequence
    row = _within(count) * tiles.rows
    past = (length - (last - first))[of]
    stop = past + (np.minimum(row + tiles.rows, rows[of]) - 1) // group + 1
    start = np.zeros_like(stop)
    if window is not None:
        start = np.maximum(past + row // group + 1 - window, 0) // tiles.keys * tiles.keys
    turns = -(-(stop - start) // tiles.keys)

    share = _share(turns, kv_heads=kv_heads, resident=resident, most_items=most_items)
    splits = -(-turns // share)
    tile = np.repeat(np.arange(len(turns)), splits)  # item -> tile
    begin = start[tile] + _within(splits) * share[tile] * tiles.keys
    end = np.minimum(begin + share[tile] * tiles.keys, stop[tile])
    split = splits > 1
    slots = np.where(split, splits, 0)
    base = np.cumsum(slots) - slots
    slot = np.where(split[tile], base[tile] + _within(splits), -1)
    items = np.stack((sequences[of[tile]], row[tile], begin, end, slot), axis=1)
    merges = np.stack((sequences[of], row, base, splits), axis=1)[split]
    return Plan(items[np.argsort(begin - end, kind="stable")], merges)


def most_items(num_tiles: int, *, kv_heads: int, resident: int) -> int:
    """Items that are room enough for a good cut of so many tiles, whatever their lengths.

    One wave where tiles are few; up to four items each where they are many, and what `_share` tries at most.
    """
    wave = max(1, resident // kv_heads)
    room = max(num_tiles, min(_WAVES * wave, max(wave, 4 * num_tiles)))
    return -(-room // 4) * 4  # merges, which follow, begin at a multiple of 16 bytes


def padded(cut: Plan, *, sequence: int, num_items: int, num_merges: int) -> Array:
    """Items and merges as int32, each filled up to a fixed number with some that do nothing: `sequence` has no tokens."""
    both = np.zeros(num_items * 5 + num_merges * 4, np.int32)
    items, merges = both[: num_items * 5].reshape(-1, 5), both[num_items * 5 :].reshape(-1, 4)
    items[:, 0], items[:, 4], merges[:, 0] = sequence, -1, sequence
    items[: len(cut.items)], merges[: len(cut.merges)] = cut.items, cut.merges
    return both


def _share(turns: Array, *, kv_heads: int, resident: int, most_items: int | None) -> Array:
    """Turns per item of each tile: the cut after which the last program ends soonest.

    Tried are whole tiles, and what fills one wave of resident programs, two, and so on.
    """
    total, wave = int(turns.sum()), max(1, resident // kv_heads)
    best, least = turns, _makespan(turns, np.ones_like(turns), wave)
    for waves in range(1, _WAVES + 1):
        room = waves * wave - len(turns)  # a tile leaves at most one item that is not full
        limit = -(-total // room) if room > 0 else 0
        limit = max(limit, _MIN_TURNS, -(-int(turns.max()) // MAX_SPLITS))
        splits = -(-turns // limit)
        share = -(-turns // splits)
        cost = _makespan(share, splits, wave) + (_MERGE if splits.max() > 1 else 0.0)
        fits = most_items is None or int(splits.sum()) <= most_items
        if room > 0 and fits and cost < least * _GAIN:
            best, least = share, cost
    return best


def _makespan(share: Array, splits: Array, wave: int) -> float:
    """Time, in turns: all waves but the last are as long as the mean of items, the last may be as long as the longest."""
    count = int(splits.sum())
    mean = float((share * splits).sum()) / count
    return (-(-count // wave) - 1) * (mean + _PROGRAM) + float(share.max()) + _PROGRAM


def _within(counts: Array) -> Array:
    """[3, 1, 2] -> [0, 1, 2, 0, 0, 1]."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1]) - np.repeat(ends - counts, counts)
