"""What an index can tell of a prompt: which tiers hold it, and how it left others."""

import numpy as np
import pytest

from tierkv import fates
from tierkv.fates import Fate, Known
from tierkv.index import Index, TierSpec
from tierkv.keys import Key
from tierkv.policies import make
from tierkv.tiers.base import Miss

ROOT, OTHER = Key(b"a" * 32), Key(b"b" * 32)
BLOCK_TOKENS = 4
BLOCK_BYTES = 4 * BLOCK_TOKENS
HOST, DISK = range(2)


def new_index(history_blocks: int = 64) -> Index:
    specs = [TierSpec("host", 64, True, make("lru", tier=HOST)), TierSpec("disk", 64, False, make("lfu", tier=DISK))]
    return Index(block_tokens=BLOCK_TOKENS, tiers=specs, history_blocks=history_blocks)


def prompt(*blocks: int) -> bytes:
    return np.array([[1, 2, 3, block] for block in blocks], dtype="<i4").tobytes()


def save(index: Index, tokens: bytes, *, now_s: float, to_disk: int = 0) -> None:
    with index.acquire(ROOT, tokens, now_s=now_s) as lease:
        rest = tokens[lease.num_blocks * BLOCK_BYTES :]
        room = index.reserve(HOST, len(rest) // BLOCK_BYTES)
        assert room
        index.extend(lease, rest, tier=HOST, places=room.places)
        if to_disk:
            copy = index.begin_copy(lease, DISK, 0, to_disk)
            assert copy
            index.commit_copy(copy, [True] * to_disk)


def test_every_range_is_held_has_left_or_was_never_seen() -> None:
    index = new_index()
    save(index, prompt(1, 2, 3, 4), now_s=10.0, to_disk=2)
    with index.acquire(ROOT, prompt(1), now_s=20.0):
        index.evict(HOST)
        index.evict(DISK, 1)
    assert index.explain(ROOT, prompt(1, 2, 3, 4, 5, 6) + b"tail") == [
        Known(0, 1, (HOST, DISK)),
        Known(1, 2, (), (Fate(DISK, 20.0, "lfu"), Fate(HOST, 20.0, "lru"))),
        Known(2, 4, (), (Fate(HOST, 20.0, "lru"),)),
        Known(4, 6, known=False),
    ]
    assert index.roots() == [ROOT]
    assert index.explain(OTHER, prompt(1)) == [Known(0, 1, known=False)]
    assert index.explain(ROOT, b"tail") == []


def test_range_goes_on_from_strand_to_strand() -> None:
    index = new_index()
    save(index, prompt(1, 2), now_s=1.0)
    save(index, prompt(1, 3, 4), now_s=2.0)
    assert index.explain(ROOT, prompt(1, 3, 4)) == [Known(0, 3, (HOST,))]


def test_reason_is_what_the_caller_says() -> None:
    index = new_index()
    save(index, prompt(1, 2, 3), now_s=1.0, to_disk=1)
    with index.acquire(ROOT, prompt(1, 2, 3), now_s=2.0) as lease:
        copy = index.begin_copy(lease, DISK, 1, 3)
        assert copy
        index.commit_copy(copy, [True, False], reason=Miss.LATE)
        index.drop(DISK, lease, [0], reason=Miss.CORRUPT)
        index.drop(HOST, lease, [1])
    assert index.explain(ROOT, prompt(1, 2, 3)) == [
        Known(0, 1, (HOST,), (Fate(DISK, 2.0, "corrupt"),)),
        Known(1, 2, (DISK,), (Fate(HOST, 2.0, "absent"),)),
        Known(2, 3, (HOST,), (Fate(DISK, 2.0, "late"),)),
    ]


def test_fate_is_forgotten_with_the_block() -> None:
    index = new_index(history_blocks=1)
    save(index, prompt(1, 2), now_s=1.0)
    index.evict(HOST)
    assert index.explain(ROOT, prompt(1, 2)) == [Known(0, 1, (), (Fate(HOST, 1.0, "lru"),)), Known(1, 2, known=False)]
    save(index, prompt(1, 2), now_s=2.0)
    assert index.explain(ROOT, prompt(1, 2)) == [Known(0, 2, (HOST,))]
    index.check([])


@pytest.mark.parametrize("times", [3, 20])
def test_a_strand_remembers_few_ranges_the_latest_exactly(times: int) -> None:
    index = new_index()
    blocks = range(times)
    save(index, prompt(*blocks), now_s=0.0)
    for second in range(1, times + 1):
        index.acquire(OTHER, b"", now_s=float(second)).release()
        index.evict(HOST, 1)
    known = index.explain(ROOT, prompt(*blocks))
    assert len(known) == min(times, fates.MAX_FATES)
    assert [(part.lo, part.hi) for part in known[:3]] == [(0, 1), (1, 2), (2, 3)]
    assert known[-1].hi == times
    left = [part.fates[0].at_s for part in known]
    assert left[:3] == [times, times - 1, times - 2] and left == sorted(left, reverse=True)
    index.check([])


def test_ranges_that_do_not_meet_are_not_made_one() -> None:
    index = new_index()
    blocks = range(20)
    save(index, prompt(*blocks), now_s=0.0, to_disk=20)
    with index.acquire(ROOT, prompt(*blocks)) as lease:
        for at in range(0, 20, 2):
            index.drop(DISK, lease, [at])
    left = [part.lo for part in index.explain(ROOT, prompt(*blocks)) if part.fates]
    assert left == [12, 14, 16, 18]
    assert index.explain(ROOT, prompt(*blocks))[-2:] == [
        Known(18, 19, (HOST,), (Fate(DISK, 0.0, "absent"),)),
        Known(19, 20, (HOST, DISK)),
    ]
    index.check([])


def test_explaining_changes_nothing() -> None:
    index = new_index()
    save(index, prompt(1), now_s=1.0)
    save(index, prompt(2), now_s=2.0)
    index.explain(ROOT, prompt(1))
    index.explain(OTHER, prompt(1))
    assert index.roots() == [ROOT]
    index.evict(HOST, 1)
    assert index.match(ROOT, prompt(1)).num_blocks == 0
