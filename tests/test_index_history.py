"""Blocks that nothing needs any more stay known for a while, and an observer hears of every use."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tierkv.hints import NO_ENDING, Ending, Hints, Next
from tierkv.index import Index, TierSpec
from tierkv.keys import Key
from tierkv.policies import make
from tierkv.policies.base import Leaf, Observer, Use

ROOT = Key(b"a" * 32)
BLOCK_TOKENS = 4
BLOCK_BYTES = 4 * BLOCK_TOKENS


class Listener(Observer):
    """Keeps what it hears, paths as (blocks before, end) per strand."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def arrive(self, path: Sequence[tuple[Leaf, int]], use: Use) -> None:
        self.heard.append(("arrive", [(strand.depth, end) for strand, end in path], use))

    def extend(self, strand: Leaf, lo: int, hi: int, use: Use) -> None:
        self.heard.append(("extend", strand.depth, lo, hi, use.now_s))

    def end(self, path: Sequence[tuple[Leaf, int]], use: Use, ending: Ending, now_s: float) -> None:
        self.heard.append(("end", [(strand.depth, end) for strand, end in path], use.hints, ending, now_s))

    def gone(self, strand: Leaf, size: int) -> None:
        self.heard.append(("gone", strand.depth, size))


def new_index(history_blocks: int, *, observer: Observer | None = None, capacity: int = 64) -> Index:
    specs = [TierSpec("host", capacity, True, make("lru", tier=0))]
    return Index(block_tokens=BLOCK_TOKENS, tiers=specs, observer=observer, history_blocks=history_blocks)


def prompt(*blocks: int) -> bytes:
    return np.array([[1, 2, 3, block] for block in blocks], dtype="<i4").tobytes()


def save(index: Index, tokens: bytes, *, now_s: float = 0.0) -> None:
    with index.acquire(ROOT, tokens, now_s=now_s) as lease:
        rest = tokens[lease.num_blocks * BLOCK_BYTES :]
        room = index.reserve(0, len(rest) // BLOCK_BYTES)
        assert room
        index.extend(lease, rest, tier=0, places=room.places)


def test_history_is_known_but_never_matched() -> None:
    listener = Listener()
    index = new_index(3, observer=listener)
    save(index, prompt(1, 2, 3, 4))
    index.evict(0)
    assert index.match(ROOT, prompt(1, 2, 3, 4)).num_tokens == 0
    stats = index.stats()
    assert (stats.num_blocks, stats.num_past, stats.tiers[0].used) == (3, 3, 0)
    listener.heard.clear()
    index.acquire(ROOT, prompt(1, 2, 3, 4)).release()
    [(_, path, use)] = listener.heard
    assert path == [(0, 3)] and (use.num_blocks, use.num_known, use.num_held) == (4, 3, 0)
    index.check([])


def test_history_is_the_blocks_used_last() -> None:
    index = new_index(4)
    for blocks in ((1, 2), (3, 4), (5, 6)):
        save(index, prompt(*blocks))
    index.acquire(ROOT, prompt(1, 2)).release()
    index.evict(0)
    save(index, prompt(1, 2))  # history needed again takes no room of it
    listener = Listener()
    index._tree.observer = listener
    for blocks, known in ((1, 2), 2), ((3, 4), 0), ((5, 6), 2):
        index.acquire(ROOT, prompt(*blocks)).release()
        assert listener.heard[-1][2].num_known == known
    assert index.stats().num_past == 2
    index.check([])


def test_asking_for_history_makes_it_young() -> None:
    index = new_index(2)
    save(index, prompt(1))
    save(index, prompt(2))
    index.evict(0)
    index.acquire(ROOT, prompt(1)).release()
    save(index, prompt(3))
    index.evict(0)
    listener = Listener()
    index._tree.observer = listener
    for block in (1, 2, 3):
        index.acquire(ROOT, prompt(block)).release()
    assert [use.num_known for _, _, use in listener.heard] == [1, 0, 1]


def test_history_takes_no_place_and_holds_no_eviction_up() -> None:
    index = new_index(100, capacity=4)
    for first in range(0, 40, 2):
        save(index, prompt(0, first + 1, first + 2))
    stats = index.stats()
    assert stats.tiers[0].used <= 4 and stats.num_past == stats.num_blocks - stats.tiers[0].held
    assert index.evict(0).evicted == stats.tiers[0].held
    index.check([])


@pytest.mark.parametrize("kept", [0, 1, 5])
def test_history_below_a_held_block_goes_without_it(kept: int) -> None:
    index = new_index(kept)
    save(index, prompt(1, 2, 3))
    save(index, prompt(1, 2, 4, 5))
    index.evict(0, 3)
    assert index.match(ROOT, prompt(1, 2, 3)).num_blocks == 2
    assert index.stats().num_blocks == 2 + min(kept, 3)
    index.check([])


def test_head_is_found_among_many_forgotten_strands() -> None:
    index = new_index(1000, capacity=8)
    for number in range(500):
        save(index, np.array([number, 0, 0, 0], dtype="<i4").tobytes())
    query = np.array([499, 0, 0, 1], dtype="<i4").tobytes()
    assert index.match(ROOT, query).num_tokens == 3


def test_observer_hears_of_a_request_from_arrival_to_end() -> None:
    listener = Listener()
    index = new_index(0, observer=listener)
    save(index, prompt(1, 2), now_s=3.0)
    hints = Hints(session="s", priority=2)
    with index.acquire(ROOT, prompt(1, 9, 9), now_s=5.0, hints=hints) as lease:
        room = index.reserve(0, 2)
        assert room
        index.extend(lease, prompt(8, 9), tier=0, places=room.places)
        with lease.fork() as other:
            index.end(other, Ending(next=Next.TOOL, within_s=2.0), now_s=4.0)
    index.evict(0)
    used = Use(3.0, 2, 0, 0)
    assert listener.heard == [
        ("arrive", [], used),
        ("extend", 0, 0, 2, 3.0),
        ("arrive", [(0, 1)], Use(5.0, 3, 1, 1, hints)),
        ("extend", 1, 0, 2, 5.0),
        ("end", [(0, 1), (1, 2)], hints, Ending(next=Next.TOOL, within_s=2.0), 5.0),  # the clock had gone back
        ("gone", 0, 1),
        ("gone", 1, 0),
        ("gone", 0, 0),
    ]


def test_end_of_a_spill_says_nothing() -> None:
    listener = Listener()
    index = new_index(0, observer=listener)
    save(index, prompt(1))
    listener.heard.clear()
    for lease in index.spill(0, None, 1):
        index.end(lease, NO_ENDING, now_s=1.0)
        lease.release()
    assert listener.heard == []


def test_history_of_less_than_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="history of -1 blocks"):
        new_index(-1)
