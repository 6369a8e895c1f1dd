"""What the index promises, one promise at a time; all of them at once are in test_index_machine.py."""

import sys
from concurrent.futures import ThreadPoolExecutor
from random import Random

import numpy as np
import pytest

from tierkv.index import Index, Lease, TierSpec
from tierkv.keys import Key, chain
from tierkv.policies import make
from tierkv.tiers.base import Run

ROOT, OTHER = Key(b"a" * 32), Key(b"b" * 32)
BLOCK_TOKENS = 4
BLOCK_BYTES = 4 * BLOCK_TOKENS
DEVICE, HOST, DISK = range(3)


def new_index(device: int = 16, host: int = 16, disk: int = 16) -> Index:
    tiers = (("device", device, True), ("host", host, True), ("disk", disk, False))
    specs = [TierSpec(name, size, placed, make("lru", tier=at)) for at, (name, size, placed) in enumerate(tiers)]
    return Index(block_tokens=BLOCK_TOKENS, tiers=specs)


def prompt(*blocks: int) -> bytes:
    """A block per number, whose tokens are 1, 2, 3 and the number."""
    return np.array([[1, 2, 3, block] for block in blocks], dtype="<i4").tobytes()


def save(index: Index, tokens: bytes, *, root: Key = ROOT) -> Lease:
    """Save what is missing on the device; the lease stays."""
    lease = index.acquire(root, tokens)
    rest = tokens[lease.num_blocks * BLOCK_BYTES :]
    room = index.reserve(DEVICE, len(rest) // BLOCK_BYTES)
    assert room
    index.extend(lease, rest, tier=DEVICE, places=room.places)
    return lease


def copy(index: Index, lease: Lease, tier: int, lo: int = 0, hi: int | None = None) -> None:
    under_way = index.begin_copy(lease, tier, lo, lease.num_blocks if hi is None else hi)
    assert under_way
    index.commit_copy(under_way, [True] * len(under_way.blocks))


def runs_of(tokens: bytes, cut: int, *, root: Key = ROOT) -> list[Run]:
    """Runs of `cut` blocks each."""
    keys = chain(root, tokens, block_tokens=BLOCK_TOKENS)
    return [
        Run(
            root,
            keys[at - 1] if at else root,
            at,
            tuple(keys[at : at + cut]),
            tokens[at * BLOCK_BYTES :][: cut * BLOCK_BYTES],
        )
        for at in range(0, len(keys), cut)
    ]


def test_pinned_block_survives_eviction() -> None:
    index = new_index()
    kept = save(index, prompt(1, 2, 3))
    save(index, prompt(4, 5)).release()
    assert index.evict(DEVICE).evicted == 2
    assert kept.places(DEVICE, 0, 3) == [0, 1, 2]
    kept.release()
    assert index.evict(DEVICE).evicted == 3


def test_leaf_goes_before_its_prefix_and_the_oldest_leaf_first() -> None:
    index = new_index()
    save(index, prompt(1, 2, 3)).release()
    save(index, prompt(1, 2, 4)).release()
    save(index, prompt(5)).release()
    assert index.evict(DEVICE, 1).evicted == 1
    assert index.match(ROOT, prompt(1, 2, 3)).num_blocks == 2
    index.evict(DEVICE, 1)
    assert index.match(ROOT, prompt(1, 2, 4)).num_blocks == 2
    assert index.match(ROOT, prompt(5)).num_blocks == 1
    index.evict(DEVICE, 2)
    assert index.match(ROOT, prompt(1)).num_blocks == 0
    assert index.match(ROOT, prompt(5)).num_blocks == 1


def test_partial_use_does_not_keep_the_tail_that_was_not_used() -> None:
    index = new_index()
    save(index, prompt(1, 2, 3, 4)).release()
    save(index, prompt(5)).release()
    index.acquire(ROOT, prompt(1, 2)).release()
    index.evict(DEVICE, 3)
    assert index.match(ROOT, prompt(1, 2, 3)).num_blocks == 2
    assert index.match(ROOT, prompt(5)).num_blocks == 0


def test_a_lease_that_only_keeps_is_no_use() -> None:
    index = new_index()
    save(index, prompt(1, 2)).release()
    save(index, prompt(5)).release()
    kept = index.keep(ROOT, prompt(1, 2))
    assert kept.num_blocks == 2 and kept.second_use(None) == [] and kept.use is None
    index.evict(DEVICE)
    assert index.match(ROOT, prompt(1, 2)).num_blocks == 2
    kept.release()
    save(index, prompt(5)).release()
    index.keep(ROOT, prompt(1, 2)).release()
    index.evict(DEVICE, 1)
    assert index.match(ROOT, prompt(1, 2)).num_blocks == 1, (
        "what was kept has been forgotten first, as if nobody had looked"
    )


def test_same_tokens_in_two_namespaces_never_meet() -> None:
    index = new_index()
    save(index, prompt(1, 2)).release()
    assert index.match(OTHER, prompt(1, 2)).num_blocks == 0
    with save(index, prompt(1, 2), root=OTHER) as lease:
        assert lease.places(DEVICE, 0, 2) == [2, 3]
        assert lease.keys(0, 2) == chain(OTHER, prompt(1, 2), block_tokens=BLOCK_TOKENS)


def test_namespace_without_blocks_takes_no_memory() -> None:
    index = new_index()
    before = index.memory_bytes()
    for number in range(200):
        index.acquire(Key(bytes([number]) * 32), prompt(1)).release()
    assert index.memory_bytes() < before + 1000 and index.stats().num_strands == 0


def test_keys_of_a_branch_go_on_from_where_it_departs() -> None:
    index = new_index()
    save(index, prompt(1, 2, 3)).release()
    with save(index, prompt(1, 2, 4, 5)) as lease:
        assert lease.keys(2, 4) == chain(ROOT, prompt(1, 2, 4, 5), block_tokens=BLOCK_TOKENS)[2:]
        run = lease.run(3, 4)
        assert (run.depth, run.tokens, run.parent) == (3, prompt(5), lease.keys(2, 3)[0])


def test_head_is_the_held_block_that_agrees_longest() -> None:
    index = new_index()
    for tail in ([1, 9, 9, 9], [1, 2, 9, 9], [1, 2, 3, 9], [7, 7, 7, 7]):
        save(index, prompt(0) + np.array(tail, dtype="<i4").tobytes()).release()
    query = prompt(0) + np.array([1, 2, 3, 4], dtype="<i4").tobytes()
    with index.acquire(ROOT, query) as lease:
        assert lease.head and lease.head.num_tokens == 3 and lease.num_tokens == 7
        assert index.match(ROOT, query).num_tokens == 7
        assert lease.head_run().tokens == np.array([1, 2, 3, 9], dtype="<i4").tobytes()
        source = lease.head_source()
        index.evict(DEVICE)  # the others go; the head is pinned
        assert lease.head_source() == source and index.stats().tiers[DEVICE].held == 2
    assert index.match(ROOT, query[:-8]).num_tokens == 6


def test_sources_name_the_fastest_tier_of_each_block() -> None:
    index = new_index()
    with save(index, prompt(1, 2, 3, 4)) as lease:
        copy(index, lease, HOST, 0, 3)
        copy(index, lease, DISK)
    index.evict(DEVICE, 2)
    index.evict(HOST, 1)
    with index.acquire(ROOT, prompt(1, 2, 3, 4)) as lease:
        assert lease.sources() == [(DEVICE, 0, 2), (DISK, 2, 4)]
        for tier in (DEVICE, HOST, DISK):
            index.evict(tier)
        assert lease.sources() == [(DEVICE, 0, 2), (DISK, 2, 4)]
        assert lease.missing(HOST) == [(0, 4)]


def test_exception_between_begin_and_commit_leaves_a_miss() -> None:
    index = new_index()
    with save(index, prompt(1, 2)) as lease:
        under_way = index.begin_copy(lease, HOST, 0, 2)
        assert under_way and index.begin_copy(lease, HOST, 0, 2) is None
        index.abort(under_way)
        index.commit_copy(under_way, [True, True])  # too late: it has ended
        assert lease.missing(HOST) == [(0, 2)] and index.room(HOST) == (16, 16)


def test_copy_outlives_its_lease() -> None:
    index = new_index()
    lease = save(index, prompt(1, 2))
    under_way = index.begin_copy(lease, HOST, 0, 2)
    assert under_way
    lease.release()
    index.evict(DEVICE)
    index.commit_copy(under_way, [True, False])
    assert index.match(ROOT, prompt(1, 2)).num_blocks == 1
    index.check([])


def test_block_saved_again_finds_its_children() -> None:
    """Its copy on disk was bad and its others are gone, but what follows it is still there."""
    index = new_index()
    with save(index, prompt(1, 2, 3)) as lease:
        copy(index, lease, DISK)
        index.drop(DISK, lease, [0])
    index.evict(DEVICE)
    assert index.match(ROOT, prompt(1, 2, 3)).num_blocks == 0
    save(index, prompt(1)).release()
    with index.acquire(ROOT, prompt(1, 2, 3)) as lease:
        assert lease.sources() == [(DEVICE, 0, 1), (DISK, 1, 3)]


def test_dropped_place_is_not_given_out_while_an_older_lease_lives() -> None:
    index = new_index(device=2)
    reader, finder = save(index, prompt(1, 2)), index.acquire(ROOT, prompt(1, 2))
    index.drop(DEVICE, finder, [1])
    finder.release()
    assert index.reserve(DEVICE, 1) is None
    younger = index.acquire(ROOT, prompt(9))
    reader.release()
    room = index.reserve(DEVICE, 1)
    assert room and room.places == [1]
    younger.release()


def test_place_is_given_back_once() -> None:
    index = new_index()
    room = index.reserve(DEVICE, 2)
    assert room
    index.free(DEVICE, room.places)
    with pytest.raises(ValueError, match="not reserved"):
        index.free(DEVICE, room.places)
    room = index.reserve(DEVICE, 2)
    assert room
    for wrong in ([0, 0], [0, -1], [0, 16], [0, 5]):
        with pytest.raises(ValueError, match="not reserved"):
            index.free(DEVICE, wrong)
        with index.acquire(ROOT, b"") as lease, pytest.raises(ValueError, match="not reserved"):
            index.extend(lease, prompt(1, 2), tier=DEVICE, places=wrong)
        index.check([])
    index.free(DEVICE, room.places)
    with pytest.raises(ValueError, match="only 0"):
        index.free(DISK, count=1)


def test_reserve_gives_all_or_what_was_asked_at_least() -> None:
    index = new_index(device=4)
    lease = save(index, prompt(1, 2, 3))
    assert index.reserve(DEVICE, 2) is None
    room = index.reserve(DEVICE, 2, at_least=1)
    assert room and room.count == 1
    lease.release()
    assert index.stats().tiers[DEVICE].available == 3


def test_victims_of_a_tier_at_rest_are_named_by_key() -> None:
    index = new_index(disk=2)
    with save(index, prompt(1, 2)) as lease:
        copy(index, lease, DISK)
    with save(index, prompt(3)) as lease:
        under_way = index.begin_copy(lease, DISK, 0, 1)
        assert under_way and under_way.victims == chain(ROOT, prompt(1, 2), block_tokens=BLOCK_TOKENS)[1:]


def test_lost_counts_what_no_other_tier_holds() -> None:
    index = new_index()
    with save(index, prompt(1, 2)) as lease:
        copy(index, lease, HOST, 0, 1)
    index.evict(DEVICE)
    stats = index.stats().tiers[DEVICE]
    assert (stats.evicted, stats.lost) == (2, 1)


def test_second_use_names_what_was_used_twice() -> None:
    index = new_index()
    with save(index, prompt(1, 2)) as lease:
        assert lease.second_use(HOST) == []
    with save(index, prompt(1, 2, 3)) as lease:
        assert lease.second_use(HOST) == [(0, 2)]
        copy(index, lease, HOST, 0, 1)
        assert lease.second_use(HOST) == [(1, 2)]


def test_spill_offers_a_cold_path_through_all_its_strands() -> None:
    index = new_index()
    save(index, prompt(1, 2, 3)).release()
    save(index, prompt(1, 4, 5)).release()
    save(index, prompt(6)).release()
    index.acquire(ROOT, prompt(1, 2, 3)).release()
    index.evict(DEVICE, 2)  # 5 and 4
    leases = index.spill(DEVICE, HOST, 4)
    assert [(lease.lo, lease.num_blocks) for lease in leases] == [(0, 1), (0, 3)]
    for lease in leases:
        copy(index, lease, HOST, lease.lo)
        lease.release()
    assert not index.spill(DEVICE, HOST, 4)
    index.evict(DEVICE, 1)
    assert index.stats().tiers[DEVICE].lost == 2


def test_spill_crosses_from_a_branch_to_what_was_used_with_it() -> None:
    index = new_index()
    save(index, prompt(1, 2, 3)).release()
    index.acquire(ROOT, prompt(1)).release()
    save(index, prompt(1, 4)).release()
    index.evict(DEVICE, 2)  # 3 and 2: what is left is a path of two strands
    leases = index.spill(DEVICE, HOST, 2)
    assert sorted((lease.lo, lease.num_blocks) for lease in leases) == [(0, 1), (1, 2)]


def test_spill_looks_at_what_goes_next_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    index = new_index(device=200, host=200)
    for number in range(40):
        save(index, prompt(number, 100 + number)).release()
    for lease in index.spill(DEVICE, HOST, 40):
        copy(index, lease, HOST, lease.lo)
        lease.release()
    policy = index._tree.rooms[DEVICE].policy
    pops, pop = [], policy.pop
    monkeypatch.setattr(policy, "pop", lambda *below: (pops.append(1), pop(*below))[1])
    assert not index.spill(DEVICE, HOST, 40, within=10) and len(pops) == 5
    assert not index.spill(DEVICE, HOST, 40, within=40) and len(pops) == 5 + 20
    assert not index.spill(DEVICE, HOST, 40, within=0) and len(pops) == 5 + 20
    leases = index.spill(DEVICE, HOST, 3, within=41)
    assert len(pops) == 5 + 20 + 22
    assert [(lease.tokens(lease.lo, lease.num_blocks), lease.lo) for lease in leases] == [
        (prompt(20, 120), 0),
        (prompt(121), 1),
    ]
    for lease in leases:
        lease.release()
    index.evict(DEVICE, 41)
    assert index.stats().tiers[DEVICE].lost == 1, "the order has changed"
    index.check([])


def test_spill_counts_a_long_tail_by_its_blocks() -> None:
    index = new_index()
    save(index, prompt(*range(8))).release()
    (lease,) = index.spill(DEVICE, HOST, 2, within=1)
    assert (lease.lo, lease.num_blocks) == (6, 8)
    copy(index, lease, HOST, lease.lo)
    lease.release()
    assert not index.spill(DEVICE, HOST, 2, within=2)
    (lease,) = index.spill(DEVICE, HOST, 2, within=3)
    assert (lease.lo, lease.num_blocks) == (4, 6)
    lease.release()


def test_spill_leaves_out_what_was_used_since() -> None:
    index = new_index()
    save(index, prompt(1)).release()
    clock = index.clock
    save(index, prompt(2)).release()
    (lease,) = index.spill(DEVICE, HOST, 16, until=clock)
    assert lease.tokens(0, 1) == prompt(1)
    lease.release()
    save(index, prompt(1)).release()
    assert not index.spill(DEVICE, HOST, 16, until=clock)


def test_shared_lease_keeps_its_part_when_the_first_is_released() -> None:
    index = new_index()
    lease = save(index, prompt(1, 2, 3))
    job = lease.share(1, 2, DEVICE)
    lease.release()
    index.evict(DEVICE)
    assert job.places(DEVICE, 1, 2) == [1] and job.lo == 1 and index.stats().tiers[DEVICE].held == 2
    job.release()


def test_released_lease_answers_nothing() -> None:
    index = new_index()
    with save(index, prompt(1)) as lease:
        pass
    with pytest.raises(IndexError, match="released"):
        lease.tokens(0, 1)


@pytest.mark.parametrize("cut", [1, 3])
def test_restore_takes_runs_in_any_order(cut: int) -> None:
    index = new_index()
    runs = runs_of(prompt(1, 2, 3, 4, 5), cut) + runs_of(prompt(1, 2, 6, 7), cut) + runs_of(prompt(8), cut, root=OTHER)
    Random(cut).shuffle(runs)
    orphans = index.restore(DISK, runs)
    assert not [run for run in orphans if run.parent != ROOT]
    assert index.match(ROOT, prompt(1, 2, 3, 4, 5)).num_blocks == 5
    assert index.match(ROOT, prompt(1, 2, 6, 7)).num_blocks == 4
    assert index.match(OTHER, prompt(8)).num_blocks == 1
    index.check([])


def test_restore_refuses_keys_that_are_not_those_of_their_tokens() -> None:
    index = new_index()
    good, bad = runs_of(prompt(1, 2), 1), runs_of(prompt(3), 1)[0]
    lying = Run(ROOT, ROOT, 0, bad.keys, prompt(4))
    without_tokens = Run(ROOT, ROOT, 0, bad.keys)
    assert index.restore(DISK, [good[1], lying, without_tokens]) == [lying, without_tokens, good[1]]
    assert index.stats().num_blocks == 0
    index.check([])


def test_restore_keeps_to_the_capacity() -> None:
    index = new_index(disk=3)
    orphans = index.restore(DISK, runs_of(prompt(1, 2, 3, 4, 5), 5))
    assert [(run.depth, len(run.keys), run.tokens) for run in orphans] == [(3, 2, prompt(4, 5))]
    assert index.match(ROOT, prompt(1, 2, 3, 4)).num_blocks == 3
    assert orphans[0].parent == chain(ROOT, prompt(1, 2, 3), block_tokens=BLOCK_TOKENS)[-1]


def test_memory_is_given_back_when_blocks_go() -> None:
    index = new_index(device=4096)
    empty = index.memory_bytes()
    save(index, prompt(*range(4000))).release()
    full = index.memory_bytes()
    index.evict(DEVICE, 3900)
    assert index.memory_bytes() - empty < (full - empty) / 10
    index.evict(DEVICE)
    assert index.memory_bytes() < empty + 500  # the table of namespaces


def test_hit_ends_exactly_where_a_long_prompt_departs() -> None:
    index = new_index(device=6000)
    base = prompt(*range(4000))
    save(index, base).release()
    random = Random(7)
    for _ in range(60):
        at = random.randrange(4000)
        other = base[: at * BLOCK_BYTES] + prompt(5000 + random.randrange(9), *range(9))
        expected = index.match(ROOT, other).num_blocks
        assert expected >= at
        save(index, other).release()
        assert index.match(ROOT, other).num_blocks == len(other) // BLOCK_BYTES
        assert index.match(ROOT, base).num_blocks == 4000
    index.check([])


def test_leases_stay_good_whatever_other_threads_do() -> None:
    """Four threads share small tiers; every place that a lease names must hold the block that it says."""
    interval = sys.getswitchinterval()
    index = new_index(device=24, host=20, disk=30)
    memory: list[list[bytes | None]] = [[None] * 24, [None] * 20]

    def read(lease: Lease) -> None:
        for tier, lo, hi in lease.sources():
            if tier != DISK:
                try:
                    places = lease.places(tier, lo, hi)
                except LookupError:  # another thread has dropped one of them since
                    continue
                for block, place in zip(range(lo, hi), places, strict=True):
                    assert memory[tier][place] == lease.tokens(0, block + 1), "another block's bytes"

    def write(random: Random, lease: Lease) -> None:
        rest = prompt(*(random.randrange(3) for _ in range(random.randrange(1, 4))))
        room = index.reserve(DEVICE, len(rest) // BLOCK_BYTES)
        if room is None:
            return
        path = lease.tokens(0, lease.num_blocks)
        for at, place in enumerate(room.places):
            memory[DEVICE][place] = path + rest[: (at + 1) * BLOCK_BYTES]
        taken = index.extend(lease, rest, tier=DEVICE, places=room.places)
        mine = [place for place, good in zip(room.places, taken, strict=True) if not good]
        for place in mine:
            memory[DEVICE][place] = None
        index.free(DEVICE, mine)

    def move(random: Random, lease: Lease) -> None:
        tier = random.choice((HOST, DISK))
        with lease.share(0, lease.num_blocks, DEVICE) as job:
            under_way = index.begin_copy(job, tier, 0, job.num_blocks)
            if under_way is None:
                return
            for at, place in zip(under_way.blocks, under_way.places, strict=False):
                memory[HOST][place] = job.tokens(0, at + 1)
            index.commit_copy(under_way, [random.random() < 0.8 for _ in under_way.blocks])
            if random.random() < 0.2 and job.num_blocks:
                index.drop(tier, job, [random.randrange(job.num_blocks)])

    def work(seed: int) -> None:
        random = Random(seed)
        for _ in range(500):
            with index.acquire(ROOT, prompt(*(random.randrange(3) for _ in range(6)))) as lease:
                read(lease)
                sources = lease.sources()
                if not sources or sources[-1][2] < lease.num_blocks:
                    lease.shrink(sources[-1][2] if sources else 0)
                write(random, lease)
                if random.random() < 0.6:
                    move(random, lease)
                elif random.random() < 0.3:
                    for other in index.spill(DEVICE, HOST, 3):
                        read(other)
                        other.release()
                if random.random() < 0.1:
                    index.evict(random.choice((DEVICE, HOST, DISK)), 3)
                lease.keys(0, lease.num_blocks)
                read(lease)

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)
    index.check([])
    assert index.stats().num_leases == 0
