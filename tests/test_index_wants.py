"""Blocks that queued requests want are forgotten last, and of those what was queued last first."""

import numpy as np
import pytest

from tierkv.index import Index, TierSpec
from tierkv.keys import Key, chain
from tierkv.policies import make
from tierkv.tiers.base import Run

ROOT, OTHER = Key(b"a" * 32), Key(b"b" * 32)
BLOCK_TOKENS = 4
BLOCK_BYTES = 4 * BLOCK_TOKENS
HOST, DISK = range(2)


def new_index(policy: str = "lru", *, host: int = 16) -> Index:
    specs = [
        TierSpec("host", host, True, make(policy, tier=HOST)),
        TierSpec("disk", 16, False, make(policy, tier=DISK)),
    ]
    return Index(block_tokens=BLOCK_TOKENS, tiers=specs)


def prompt(*blocks: int) -> bytes:
    return np.array([[1, 2, 3, block] for block in blocks], dtype="<i4").tobytes()


def save(index: Index, *blocks: int) -> None:
    tokens = prompt(*blocks)
    with index.acquire(ROOT, tokens) as lease:
        rest = tokens[lease.num_blocks * BLOCK_BYTES :]
        room = index.reserve(HOST, len(rest) // BLOCK_BYTES)
        assert room
        index.extend(lease, rest, tier=HOST, places=room.places)


def held(index: Index, *blocks: int) -> int:
    return index.match(ROOT, prompt(*blocks)).num_blocks


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_wanted_blocks_outlive_younger_ones(policy: str) -> None:
    index = new_index(policy)
    save(index, 1, 2, 3)
    index.want(ROOT, prompt(1, 2))
    save(index, 4, 5)
    assert index.evict(HOST, 3).evicted == 3
    assert (held(index, 1, 2, 3), held(index, 4)) == (2, 0)
    index.check([])


def test_want_fails_no_allocation() -> None:
    index = new_index(host=4)
    save(index, 1, 2)
    save(index, 3, 4)
    for first in (1, 3):
        index.want(ROOT, prompt(first, first + 1))
    assert index.reserve(HOST, 4)
    assert index.stats().tiers[HOST].held == 0
    index.check([])


def test_last_queued_goes_first() -> None:
    index = new_index()
    for first in (1, 3, 5):
        save(index, first, first + 1)
    wants = [index.want(ROOT, prompt(first, first + 1)) for first in (3, 5, 1)]
    order = []
    for _ in range(6):
        index.evict(HOST, 1)
        order.append(tuple(held(index, first, first + 1) for first in (1, 3, 5)))
    assert order == [(1, 2, 2), (0, 2, 2), (0, 2, 1), (0, 2, 0), (0, 1, 0), (0, 0, 0)]
    for want in wants:
        want.release()
    assert index.stats().num_blocks == 0
    index.check([])


def test_block_belongs_to_the_first_request_that_wants_it() -> None:
    index = new_index()
    save(index, 1, 2)
    save(index, 3)
    index.want(ROOT, prompt(1))
    index.want(ROOT, prompt(3))
    index.want(ROOT, prompt(1, 2))
    for left in ((1, 1), (1, 0), (0, 0)):
        index.evict(HOST, 1)
        assert (held(index, 1, 2), held(index, 3)) == left


def test_released_want_gives_the_order_back() -> None:
    index = new_index()
    save(index, 1)
    want = index.want(ROOT, prompt(1))
    save(index, 2)
    save(index, 3)
    index.evict(HOST, 1)  # 1 was named and is parked now; 2 went
    assert (held(index, 1), held(index, 2), held(index, 3)) == (1, 0, 1)
    want.release()
    want.release()
    index.evict(HOST, 1)
    assert (held(index, 1), held(index, 3)) == (0, 1)
    index.check([])


def test_earlier_request_that_goes_leaves_the_place_of_the_later() -> None:
    index = new_index()
    save(index, 1)
    save(index, 2)
    first = index.want(ROOT, prompt(1))
    index.want(ROOT, prompt(2))
    index.want(ROOT, prompt(1))
    assert index.evict(HOST, 0).evicted == 0 and not index.spill(HOST, DISK, 0)
    for lease in index.spill(HOST, None, 9):
        lease.release()
    first.release()
    index.evict(HOST, 1)
    assert (held(index, 1), held(index, 2)) == (0, 1)
    index.check([])


def test_blocks_that_come_later_are_wanted_too() -> None:
    index = new_index()
    want = index.want(ROOT, prompt(1, 2, 3, 4))
    save(index, 1, 2)
    save(index, 1, 2, 3, 9)
    save(index, 7)
    index.evict(HOST, 2)
    assert (held(index, 1, 2, 3, 9), held(index, 7)) == (3, 0)
    want.release()
    index.evict(HOST)
    assert index.stats().num_blocks == 0
    index.check([])


def test_blocks_that_come_from_disk_are_wanted_too() -> None:
    index = new_index()
    index.want(ROOT, prompt(1, 2))
    tokens = prompt(1, 2)
    assert not index.restore(DISK, [Run(ROOT, ROOT, 0, tuple(chain(ROOT, tokens, block_tokens=BLOCK_TOKENS)), tokens)])
    tokens = prompt(3)
    assert not index.restore(DISK, [Run(ROOT, ROOT, 0, tuple(chain(ROOT, tokens, block_tokens=BLOCK_TOKENS)), tokens)])
    index.evict(DISK, 1)
    assert (held(index, 1, 2), held(index, 3)) == (2, 0)
    index.check([])


def test_want_keeps_nothing_of_a_namespace_behind() -> None:
    index = new_index()
    before = index.memory_bytes()
    for number in range(100):
        index.want(Key(bytes([number]) * 32), prompt(1)).release()
    assert index.memory_bytes() < before + 1000
    index.check([])


def test_same_tokens_in_another_namespace_are_not_wanted() -> None:
    index = new_index()
    save(index, 1)
    index.want(OTHER, prompt(1))
    save(index, 2)
    index.evict(HOST, 1)
    assert (held(index, 1), held(index, 2)) == (0, 1)


def test_many_evictions_ask_a_policy_for_a_wanted_tail_once(monkeypatch: pytest.MonkeyPatch) -> None:
    index = new_index(host=300)
    for number in range(100):
        save(index, number)
    for number in range(100):
        index.want(ROOT, prompt(number))
    for number in range(100, 200):
        save(index, number)
    policy = index._tree.rooms[HOST].policy
    pops, pop = [], policy.pop
    monkeypatch.setattr(policy, "pop", lambda *below: (pops.append(1), pop(*below))[1])
    for _ in range(100):
        assert index.evict(HOST, 1).evicted == 1
    assert len(pops) == 200
    assert all(held(index, number) for number in range(100))
