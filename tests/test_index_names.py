"""Blocks found by key, what a listener hears, and forgetting on request."""

import hashlib
from array import array
from collections.abc import Callable, Sequence
from math import inf
from threading import Lock

import pytest

from tierkv import names, walks
from tierkv.index import Index, Lease, TierSpec
from tierkv.keys import KEY_BYTES, Key, chain
from tierkv.policies import make
from tierkv.tiers.base import Run

ROOT, OTHER = Key(b"a" * 32), Key(b"b" * 32)
BLOCK_TOKENS = 4
BLOCK_BYTES = 4 * BLOCK_TOKENS
HOST, DISK = 0, 1
STRANGER = hashlib.sha256(b"a block that nobody has").digest()


class Ear:
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[object, ...]] = []

    def stored(self, tier: int, parent: Key, depth: int, keys: bytes, tokens: bytes) -> None:
        self.heard.append(("stored", tier, parent, depth, keys, tokens))

    def removed(self, tier: int, keys: bytes) -> None:
        self.heard.append(("removed", tier, keys))


class Turns:
    """The lock of an index, with calls that others make just before it is taken for the nth time."""

    def __init__(self, before: dict[int, Callable[[], object]]) -> None:
        self.before = before
        self.num_taken = 0
        self._lock = Lock()

    def __enter__(self) -> None:
        self.num_taken += 1
        if call := self.before.pop(self.num_taken, None):
            call()
        assert self._lock.acquire(blocking=False), "it was kept while others had their turn"

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def take_turns(
    index: Index, monkeypatch: pytest.MonkeyPatch, before: dict[int, Callable[[], object]], *, batch: int = 1
) -> Turns:
    """Let calls come between the batches of the next call: the first time it lists, the second it takes a batch."""
    turns = Turns(before)
    monkeypatch.setattr(walks, "BATCH", batch)
    monkeypatch.setattr(index, "_lock", turns)
    return turns


def new_index(
    *, history_blocks: int = 0, named: bool = True, listener: Ear | None = None, capacity: int = 64, policy: str = "lru"
) -> Index:
    tiers = [
        TierSpec("host", capacity, True, make(policy, tier=HOST, capacity_blocks=capacity)),
        TierSpec("disk", capacity, False, make(policy, tier=DISK, capacity_blocks=capacity)),
    ]
    return Index(block_tokens=BLOCK_TOKENS, tiers=tiers, history_blocks=history_blocks, named=named, listener=listener)


def prompt(*blocks: int) -> bytes:
    return array("i", [token for block in blocks for token in (1, 2, 3, block)]).tobytes()


def keys_of(*blocks: int, root: Key = ROOT) -> list[bytes]:
    return list(chain(root, prompt(*blocks), block_tokens=BLOCK_TOKENS))


def save(index: Index, *blocks: int, root: Key = ROOT, named: bool = True, tier: int = HOST) -> Lease:
    """Let a tier hold a prompt, from what is held of it on; returns a lease of it."""
    lease = index.acquire(root, prompt(*blocks))
    rest = prompt(*blocks[lease.num_blocks :])
    room = index.reserve(tier, len(rest) // BLOCK_BYTES)
    assert room
    keys = [Key(key) for key in keys_of(*blocks, root=root)[lease.num_blocks :]] if named else None
    index.extend(lease, rest, tier=tier, places=room.places, keys=keys)
    return lease


def copy_down(index: Index, lease: Lease) -> None:
    copy = index.begin_copy(lease, DISK, 0, lease.num_blocks)
    assert copy
    index.commit_copy(copy, [True] * len(copy.blocks))


def presence(index: Index, keys: Sequence[bytes]) -> list[int]:
    return list(index.presence(b"".join(keys)))


def traced(index: Index, keys: Sequence[bytes]) -> list[tuple[int, int, int]]:
    """Position, first block and end of every stretch."""
    found = []
    for position, lease in index.trace(b"".join(keys)):
        found.append((position, lease.lo, lease.num_blocks))
        lease.release()
    return found


# -- names -------------------------------------------------------------------------------------------------------------


def test_presence_is_one_more_than_the_fastest_tier() -> None:
    index = new_index()
    with save(index, 1, 2, 3, 4) as lease:
        copy_down(index, lease)
    index.evict(HOST, 2)
    assert presence(index, keys_of(1, 2, 3, 4)) == [1, 1, 2, 2]
    assert presence(index, [STRANGER, *keys_of(1, 2), STRANGER, *keys_of(1, 2, 3)[2:]]) == [0, 1, 1, 0, 2]
    assert index.presence(b"") == b""


def test_what_no_tier_holds_is_absent_although_it_is_known() -> None:
    index = new_index()
    with save(index, 1, 2, 3) as lease:
        index.drop(HOST, lease, [1])
        assert presence(index, keys_of(1, 2, 3)) == [1, 0, 1]
        assert traced(index, keys_of(1, 2, 3)) == [(0, 0, 3)]
        copy = index.begin_copy(lease, HOST, 1, 2)
        assert copy and presence(index, keys_of(1, 2, 3)) == [1, 0, 1]
        index.commit_copy(copy, [True])
        assert presence(index, keys_of(1, 2, 3)) == [1, 1, 1]


def test_blocks_are_named_once_their_keys_are_known() -> None:
    index = new_index()
    with save(index, 1, 2, 3, named=False) as lease:
        assert presence(index, keys_of(1, 2, 3)) == [0, 0, 0]
        lease.keys(1, 2)
        assert presence(index, keys_of(1, 2, 3)) == [1, 1, 0]
    index.check([])


def test_blocks_that_follow_known_ones_are_named_by_keys_that_begin_before_them() -> None:
    index = new_index()
    save(index, 1, 2).release()
    keys = [Key(key) for key in keys_of(1, 2, 3, 4)]
    with index.keep(ROOT, b"") as lease:
        index.extend(lease, prompt(1, 2, 3, 4), keys=keys)
        ((position, traced),) = index.trace(b"".join(keys))
        assert (position, traced.lo, traced.num_blocks) == (0, 0, 4)
        traced.release()


def test_what_comes_back_after_a_stop_is_named() -> None:
    index = new_index()
    keys = [Key(key) for key in keys_of(1, 2, 3)]
    runs = [Run(ROOT, keys[1], 2, (keys[2],), prompt(3)), Run(ROOT, ROOT, 0, (keys[0], keys[1]), prompt(1, 2))]
    assert index.restore(DISK, runs) == []
    assert presence(index, keys) == [2, 2, 2]
    index.check([])


def test_no_key_is_taken_without_the_one_before_it() -> None:
    index = new_index()
    with save(index, 1, 2, named=False) as lease:
        lease.shrink(1)
        key = Key(keys_of(1, 5)[1])
        index.extend(lease, prompt(5), keys=[key])
        assert traced(index, [key]) == []
        assert lease.keys(1, 2) == [key]
        assert traced(index, [key]) == [(0, 1, 2)]
        index.check([lease])


def test_names_go_with_their_blocks() -> None:
    index = new_index(history_blocks=1)
    save(index, 1, 2, 3).release()
    index.evict(HOST, 2)
    assert traced(index, keys_of(1, 2, 3)) == [(0, 0, 2)]  # the second is history, the third is not known any more
    index.evict(HOST)
    assert traced(index, keys_of(1, 2, 3)) == [(0, 0, 1)]
    index.check([])


def test_a_key_of_two_blocks_names_the_later_one_and_then_the_other_again() -> None:
    """A caller that knows no more than the key before it puts blocks under that, and the whole path comes later."""
    index = new_index()
    first = Key(keys_of(1)[0])
    keys = keys_of(1, 2, 3)
    save(index, 2, 3, root=first).release()
    later = save(index, 1, 2, 3)
    index.check([later])
    [(position, lease)] = index.trace(b"".join(keys))
    assert position == 0 and lease.root == ROOT and lease.num_blocks == 3
    lease.release()
    later.release()
    index.purge(roots=[ROOT])
    index.check([])
    [(position, lease)] = index.trace(b"".join(keys))
    assert position == 1 and lease.root == first and (lease.lo, lease.num_blocks) == (0, 2)
    lease.release()
    index.purge(roots=None)
    assert presence(index, keys) == [0, 0, 0] and traced(index, keys) == []


def test_the_earlier_of_two_blocks_of_one_key_may_go_first() -> None:
    index = new_index()
    first = Key(keys_of(1)[0])
    save(index, 2, 3, root=first).release()
    save(index, 1, 2, 3).release()
    index.purge(roots=[first])
    index.check([])
    assert presence(index, keys_of(1, 2, 3)) == [1, 1, 1]
    index.purge(roots=[ROOT])
    assert presence(index, keys_of(1, 2, 3)) == [0, 0, 0]


def test_a_strand_that_has_gone_is_not_named_by_who_still_hashes_it() -> None:
    index = new_index()
    lease = save(index, 1, 2, named=False)
    segments = lease._segments(0, 2)
    lease.release()
    index.evict(HOST)
    assert names.keys(index._tree, segments, 0, index._lock) == keys_of(1, 2)
    assert presence(index, keys_of(1, 2)) == [0, 0] and traced(index, keys_of(1, 2)) == []
    index.check([])


@pytest.mark.parametrize("ask", [Index.presence, Index.trace, Index.trace_all])
def test_keys_must_be_whole_and_the_index_named(ask: Callable[[Index, bytes], object]) -> None:
    with pytest.raises(ValueError, match="33 bytes of keys"):
        ask(new_index(), b"x" * 33)
    with pytest.raises(ValueError, match="named=True"):
        ask(new_index(named=False), b"")


def test_a_key_is_not_mistaken_for_what_lies_across_two_others() -> None:
    index = new_index()
    save(index, 1, 2, 3).release()
    keys = b"".join(keys_of(1, 2, 3))
    assert index.presence(keys[5 : 5 + 2 * KEY_BYTES]) == bytes(2)
    believed = [Key(b"v" * 16 + b"w" * 16), Key(b"x" * 16 + b"y" * 16), Key(b"w" * 16 + b"x" * 16)]
    with index.acquire(OTHER, b"") as lease:
        index.extend(lease, prompt(4, 5, 6), keys=believed)
        assert traced(index, believed[2:]) == [(0, 2, 3)]


def test_every_key_of_a_long_strand_is_found_in_any_order() -> None:
    index = new_index(capacity=400)
    blocks = range(300)
    save(index, *blocks).release()
    keys = keys_of(*blocks)
    mixed = [keys[at * 7 % 300] for at in blocks]
    for asked in (keys, keys[::-1], keys[::2], keys[150:], mixed):
        assert presence(index, asked) == [1] * len(asked)
    assert traced(index, keys[40:250]) == [(0, 40, 250)]
    assert traced(index, keys[3:1:-1]) == [(0, 3, 4), (1, 2, 3)]


# -- tracing -----------------------------------------------------------------------------------------------------------


def test_a_stretch_goes_on_in_a_branch_and_not_in_another() -> None:
    index = new_index()
    save(index, 1, 2, 3).release()
    save(index, 1, 2, 4, 5).release()
    save(index, 1, 6, 5).release()
    assert traced(index, keys_of(1, 2, 4, 5)) == [(0, 0, 4)]
    assert traced(index, [*keys_of(1, 2, 3), *keys_of(1, 2, 4, 5)[3:]]) == [(0, 0, 3), (3, 3, 4)]
    assert traced(index, [*keys_of(1, 2), *keys_of(1, 6, 5)[2:]]) == [(0, 0, 2), (2, 2, 3)]
    assert traced(index, [*keys_of(1), *keys_of(1, 2, 4, 5)[2:]]) == [(0, 0, 1), (1, 2, 4)]
    assert traced(index, [*keys_of(1, 6), *keys_of(1, 2, 4)[2:]]) == [(0, 0, 2), (2, 2, 3)]
    assert traced(index, [*keys_of(1), STRANGER, *keys_of(1, 6, 5)[1:]]) == [(0, 0, 1), (2, 1, 3)]


def test_a_stretch_is_pinned_where_it_is_read_from() -> None:
    index = new_index()
    with save(index, 1, 2, 3, 4) as lease:
        copy_down(index, lease)
    index.evict(HOST, 2)
    [(_, lease)] = index.trace(b"".join(keys_of(1, 2, 3, 4)[1:]))
    assert (lease.lo, lease.num_blocks, lease.root, lease.use) == (1, 4, ROOT, None)
    assert index.evict(HOST).evicted == index.evict(DISK).evicted == 0
    assert lease.sources() == [(HOST, 0, 2), (DISK, 2, 4)]
    lease.release()
    [(_, lease)] = index.trace(b"".join(keys_of(1, 2, 3, 4)[2:]))
    assert index.evict(HOST).evicted == 2, "nothing is read from there"
    assert index.evict(DISK).evicted == 0
    index.check([lease])
    lease.release()
    assert index.evict(DISK).evicted == 4


def test_a_stretch_with_a_hole_is_pinned_beyond_it() -> None:
    index = new_index()
    with save(index, 1, 2, 3) as lease:
        index.drop(HOST, lease, [0])
    [(_, lease)] = index.trace(b"".join(keys_of(1, 2, 3)))
    assert index.evict(HOST).evicted == 0
    lease.release()
    assert index.evict(HOST).evicted == 2


def test_tracing_all_leases_a_block_on_every_path_that_has_its_key() -> None:
    index = new_index()
    first = Key(keys_of(1)[0])
    save(index, 2, 3, root=first).release()
    save(index, 1, 2, 3).release()
    traced = index.trace_all(b"".join(keys_of(1, 2, 3)))
    found = [(position, lease.root, lease.lo, lease.num_blocks) for position, lease in traced]
    assert found == [(0, ROOT, 0, 3), (1, first, 0, 1), (2, first, 1, 2)]
    assert index.evict(HOST).evicted == 0, "every one of them is pinned"
    index.check([lease for _, lease in traced])
    for _, lease in traced:
        lease.release()
    assert index.evict(HOST).evicted == 5


def test_tracing_all_is_tracing_where_no_key_is_there_twice() -> None:
    index = new_index()
    save(index, 1, 2).release()
    [(position, lease)] = index.trace_all(b"".join([STRANGER, *keys_of(1, 2)]))
    assert (position, lease.lo, lease.num_blocks) == (1, 0, 2)
    lease.release()
    index.check([])


def test_tracing_is_no_use() -> None:
    index = new_index()
    save(index, 1).release()
    save(index, 2).release()
    clock = index.clock
    assert traced(index, keys_of(1)) == [(0, 0, 1)]
    assert index.clock == clock
    index.evict(HOST, 1)
    assert presence(index, [*keys_of(1), *keys_of(2)]) == [0, 1]


# -- listening ---------------------------------------------------------------------------------------------------------


def test_a_listener_hears_what_comes_and_goes() -> None:
    ear = Ear()
    index = new_index(listener=ear)
    one, two, three = keys_of(1, 2, 3)
    lease = save(index, 1, 2)
    assert ear.heard == [("stored", HOST, ROOT, 0, one + two, prompt(1, 2))]
    lease.release()
    ear.heard.clear()
    lease = save(index, 1, 2, 3)
    assert ear.heard == [("stored", HOST, two, 2, three, prompt(3))]
    ear.heard.clear()
    copy_down(index, lease)
    assert ear.heard == [("stored", DISK, ROOT, 0, one + two + three, prompt(1, 2, 3))]
    ear.heard.clear()
    index.drop(HOST, lease, [1])
    lease.release()
    index.evict(HOST, 1)
    index.purge(roots=[ROOT])
    assert ear.heard == [
        ("removed", HOST, two),
        ("removed", HOST, three),
        ("removed", HOST, one),
        ("removed", DISK, one + two + three),
    ]


def test_a_listener_hears_of_a_held_block_when_its_key_becomes_known() -> None:
    ear = Ear()
    index = new_index(listener=ear, named=False)
    one, two = keys_of(1, 2)
    with save(index, 1, 2, 3, named=False) as lease:
        assert ear.heard == []
        lease.keys(0, 2)
        assert ear.heard == [("stored", HOST, ROOT, 0, one + two, prompt(1, 2))]
    ear.heard.clear()
    index.evict(HOST)
    assert ear.heard == [("removed", HOST, one + two)]


def test_a_listener_hears_of_what_a_tier_still_holds_and_not_of_a_failed_copy() -> None:
    ear = Ear()
    index = new_index(listener=ear)
    [one] = keys_of(1)
    index.restore(DISK, [Run(ROOT, ROOT, 0, (Key(one),), prompt(1))])
    assert ear.heard == [("stored", DISK, ROOT, 0, one, prompt(1))]
    ear.heard.clear()
    with index.keep(ROOT, prompt(1)) as lease:
        copy = index.begin_copy(lease, HOST, 0, 1)
        assert copy
        index.abort(copy)
    assert ear.heard == []


# -- forgetting on request ---------------------------------------------------------------------------------------------


def test_a_purge_forgets_one_namespace_in_every_tier() -> None:
    index = new_index(history_blocks=9)
    for root in (ROOT, OTHER):
        with save(index, 1, 2, 3, root=root) as lease:
            copy_down(index, lease)
    index.evict(HOST, 2)
    purged = index.purge(roots=[ROOT])
    assert purged.evicted == (1, 3) and sorted(purged.victims) == sorted(keys_of(1, 2, 3))
    assert index.roots() == [OTHER], "nothing of it stays known"
    assert traced(index, keys_of(1, 2, 3)) == [] and index.match(OTHER, prompt(1, 2, 3)).num_blocks == 3
    stats = index.stats()
    assert [tier.held for tier in stats.tiers] == [3, 3] and [tier.evicted for tier in stats.tiers] == [2, 0]
    assert index.room(HOST)[0] == 61, "places are free at once"
    index.check([])


def test_a_purge_of_unknown_namespaces_or_of_none_does_nothing() -> None:
    index = new_index()
    save(index, 1, 2).release()
    assert index.purge(roots=[OTHER]).evicted == index.purge(roots=[]).evicted == (0, 0)
    assert index.roots() == [ROOT]


def test_a_purge_spares_what_is_pinned_and_all_above_it() -> None:
    index = new_index(history_blocks=9)
    save(index, 1, 2, 3, 4).release()
    save(index, 1, 2, 5).release()
    index.evict(HOST, 1)  # the fourth is history
    lease = index.keep(ROOT, prompt(1, 2))
    purged = index.purge(roots=None)
    assert purged == ((2, 0), [])
    assert presence(index, keys_of(1, 2, 3)) == [1, 1, 0]
    assert index.stats().num_blocks == 2 and index.stats().num_past == 0
    index.check([lease])
    lease.release()
    assert index.purge(roots=None).evicted == (2, 0)
    assert index.roots() == [] and index.stats().num_blocks == 0


def test_a_purge_until_a_time_spares_what_was_used_since() -> None:
    index = new_index(history_blocks=9)
    save(index, 1, 2, 3).release()
    save(index, 7, 8).release()
    then = index.clock
    index.acquire(ROOT, prompt(1, 2)).release()
    assert index.purge(roots=None, until=then).evicted == (3, 0)
    assert presence(index, [*keys_of(1, 2, 3), *keys_of(7, 8)]) == [1, 1, 0, 0, 0]
    assert index.stats().num_past == 3, "what is not of a whole namespace goes like others"
    index.check([])
    assert index.purge(roots=None, until=inf).evicted == (2, 0)
    assert index.stats().num_past == 0


def test_a_purge_leaves_the_history_of_others_alone() -> None:
    index = new_index(history_blocks=3)
    save(index, 1, 2, 3, root=OTHER).release()
    index.evict(HOST)
    save(index, 4, 5, 6, 7).release()
    assert index.purge(roots=[ROOT]).evicted == (4, 0)
    assert index.stats().num_past == 3 and index.roots() == [OTHER]


def test_it_is_told_that_blocks_were_forgotten_on_request() -> None:
    index = new_index(history_blocks=9)
    save(index, 1, 2).release()
    index.purge(roots=None, until=index.clock)
    [part] = index.explain(ROOT, prompt(1, 2))
    assert [fate.why for fate in part.fates] == ["forgotten"]


def test_wanted_blocks_are_purged_and_wanted_again_when_they_come_back() -> None:
    index = new_index()
    save(index, 1, 2).release()
    want = index.want(ROOT, prompt(1, 2))
    assert index.purge(roots=None).evicted == (2, 0)
    save(index, 1, 2).release()
    save(index, 3).release()
    index.acquire(ROOT, prompt(3)).release()
    index.evict(HOST, 1)
    assert presence(index, [*keys_of(1, 2), *keys_of(3)]) == [1, 1, 0]
    want.release()
    index.check([])


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "slru", "arc"])
def test_a_policy_goes_on_after_a_purge(policy: str) -> None:
    index = new_index(history_blocks=20, capacity=8, policy=policy)
    save(index, 1, 2, 3, 4).release()
    then = index.clock
    save(index, 1, 2, 5).release()
    assert index.purge(roots=None, until=then).evicted == (2, 0)
    index.check([])
    for blocks in ((1, 2, 6, 7), (8, 9, 10), (1, 2, 3, 4), (1, 2, 5, 11), (8, 9)):
        save(index, *blocks).release()
        index.check([])
    held = index.stats().tiers[HOST].held
    assert held == 8 == index.evict(HOST).evicted


# -- in turns with others ----------------------------------------------------------------------------------------------


def branches(index: Index) -> None:
    """Blocks 1 to 3, on which 4 and 5 hang, as three strands."""
    save(index, 1, 2, 3).release()
    save(index, 1, 4).release()
    save(index, 1, 5).release()


@pytest.mark.parametrize(("batch", "taken"), [(1, 4), (2, 3), (3, 2)])
def test_a_purge_takes_the_lock_for_a_batch_at_a_time(batch: int, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    index = new_index()
    branches(index)
    turns = take_turns(index, monkeypatch, {}, batch=batch)
    assert index.purge(roots=None).evicted == (5, 0)
    assert turns.num_taken == taken
    assert index.roots() == []


@pytest.mark.parametrize("history_blocks", [0, 2, 9])
def test_all_is_in_order_between_two_batches_of_a_purge(history_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    index = new_index(history_blocks=history_blocks)
    branches(index)
    save(index, 1, 4, 6, root=OTHER).release()
    index.evict(HOST, 4)
    left: list[int] = []

    def look() -> None:
        index.check([])
        left.append(index.stats().tiers[HOST].held)

    take_turns(index, monkeypatch, {2: look, 5: look})  # what `look` does takes it twice
    index.purge(roots=None)
    assert left == sorted(left, reverse=True) and len(left) == 2
    index.check([])
    assert index.roots() == [] and index.stats().num_past == 0


def test_a_purge_until_a_time_bounds_history_in_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    index = new_index(history_blocks=1)
    branches(index)
    past: list[int] = []
    take_turns(index, monkeypatch, {4: lambda: past.append(index.stats().num_past)})
    assert index.purge(roots=None, until=index.clock).evicted == (5, 0)
    assert past == [1] and index.stats().num_past == 1
    index.check([])


def test_a_strand_that_goes_between_two_batches_is_not_purged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    index = new_index()
    branches(index)
    then = index.clock
    take_turns(index, monkeypatch, {2: lambda: index.evict(HOST)})
    assert index.purge(roots=None, until=then).evicted == index.purge(roots=None).evicted == (0, 0)
    index.check([])
    assert index.room(HOST)[0] == 64 and index.roots() == []


def test_a_block_that_hangs_on_a_purged_one_meanwhile_stays_with_all_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    index = new_index()
    branches(index)
    take_turns(index, monkeypatch, {2: lambda: save(index, 1, 7).release()})
    assert index.purge(roots=None).evicted == (4, 0)
    assert index.match(ROOT, prompt(1, 7)).num_blocks == 2
    index.check([])


def test_a_block_that_follows_a_purged_one_meanwhile_stays_with_all_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    index = new_index()
    branches(index)
    take_turns(index, monkeypatch, {2: lambda: save(index, 1, 2, 3, 8).release()})
    assert index.purge(roots=None).evicted == (2, 0)
    assert index.match(ROOT, prompt(1, 2, 3, 8)).num_blocks == 4
    index.check([])
    assert index.purge(roots=None).evicted == (4, 0)


def test_a_known_block_that_is_saved_again_before_its_turn_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    index = new_index(history_blocks=9)
    branches(index)
    index.evict(HOST)
    take_turns(index, monkeypatch, {2: lambda: save(index, 1, 2, 3).release()})
    assert index.purge(roots=None).evicted == (3, 0)
    assert index.roots() == [] and index.stats().num_blocks == 0


def test_a_purge_spares_what_is_pinned_between_two_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    index = new_index()
    branches(index)
    kept: list[Lease] = []
    take_turns(index, monkeypatch, {3: lambda: kept.append(index.keep(ROOT, prompt(1, 2)))})
    assert index.purge(roots=None).evicted == (3, 0)
    assert kept[0].num_blocks == 2
    index.check(kept)


def test_history_that_hangs_on_a_purged_strand_meanwhile_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    index = new_index(history_blocks=9)
    branches(index)

    def save_and_forget() -> None:
        save(index, 1, 7).release()
        index.evict(HOST)

    take_turns(index, monkeypatch, {2: save_and_forget})
    index.purge(roots=None)
    index.check([])
    assert index.match(ROOT, prompt(1, 7)).num_blocks == 0 and len(index.explain(ROOT, prompt(1, 7))) == 1
    index.purge(roots=None)
    assert index.stats().num_blocks == 0


def test_a_namespace_that_goes_and_comes_back_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    index = new_index()
    branches(index)

    def begin_anew() -> None:
        index.evict(HOST)
        save(index, 1, 9).release()

    take_turns(index, monkeypatch, {2: begin_anew})
    assert index.purge(roots=[ROOT]).evicted == (0, 0)
    assert index.roots() == [ROOT] and index.match(ROOT, prompt(1, 9)).num_blocks == 2
    index.check([])


def kept_by(leases: list[Lease]) -> list[tuple[Key, int, int]]:
    return [(lease.root, lease.lo, lease.num_blocks) for lease in leases]


def test_keeping_all_leases_what_a_tier_holds_and_the_one_below_does_not() -> None:
    index = new_index()
    branches(index)
    save(index, 1, 2, root=OTHER).release()
    with index.keep(ROOT, prompt(1, 2, 3)) as lease:
        copy = index.begin_copy(lease, DISK, 0, 2)
        assert copy
    leases = index.keep_all(HOST, DISK)
    assert sorted(kept_by(leases)) == sorted([(ROOT, 2, 3), (ROOT, 1, 2), (ROOT, 1, 2), (OTHER, 0, 2)])
    index.check(leases, [copy])
    assert index.evict(HOST).evicted == 0, "all of it is pinned"
    for lease in leases:
        lease.release()
    index.commit_copy(copy, [True, True])
    leases = index.keep_all(DISK, None)
    assert kept_by(leases) == [(ROOT, 0, 2)]
    assert index.evict(DISK).evicted == 0 and index.evict(HOST).evicted == 7
    leases[0].release()
    index.check([])


def test_keeping_all_takes_parents_first_in_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    index = new_index()
    branches(index)
    save(index, 1, 4, 6).release()
    save(index, 1, 4, 7).release()
    for batch, taken in ((1, 5), (3, 3), (4, 2)):
        turns = take_turns(index, monkeypatch, {}, batch=batch)
        leases = index.keep_all(HOST, None)
        assert turns.num_taken == taken
        known = {b""}
        for lease in leases:
            assert lease.tokens(0, lease.lo) in known, "what is above has a lease already"
            known |= {lease.tokens(0, end) for end in range(lease.lo + 1, lease.num_blocks + 1)}
        assert sum(lease.num_blocks - lease.lo for lease in leases) == 7
        for lease in leases:
            lease.release()


def test_keeping_all_leaves_out_what_goes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    index = new_index()
    branches(index)
    turns = take_turns(index, monkeypatch, {3: lambda: index.evict(HOST)})
    leases = index.keep_all(HOST, None)
    assert kept_by(leases) == [(ROOT, 0, 3)] and turns.num_taken == 5
    index.check(leases)


def test_what_is_held_is_counted_by_namespace_although_it_changes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    index = new_index()
    branches(index)
    assert index.held_by_root() == {ROOT: 5}

    def change() -> None:
        index.purge(roots=[ROOT])
        save(index, 1, root=OTHER).release()

    take_turns(index, monkeypatch, {2: change})
    assert index.held_by_root() == {OTHER: 0}, "its namespaces are those of the end"
