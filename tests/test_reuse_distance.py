"""Reuse distances beside what the real index does, replayed with its leaf-first LRU."""

import tracemalloc
from array import array
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierkv.index import Index, TierSpec
from tierkv.keys import Key
from tierkv.policies.lru import LruPolicy
from tierkv.reuse_distance import BYTES_PER_SAMPLE, Namer, Names, ReuseDistances, mixed

ROOT = Key(b"r" * 32)


def conversations(*, requests: int, seed: int) -> list[list[int]]:
    """Prompts as chained ids: one system prompt of a few, then turns that grow it; some sessions return much later."""
    rng = np.random.default_rng(seed)
    systems = [list(range(at * 100, at * 100 + size)) for at, size in enumerate((3, 12, 30))]
    sessions: list[list[int]] = []
    fresh, prompts = 1000, []
    for _ in range(requests):
        if not sessions or rng.random() < 0.25:
            sessions.append(list(systems[rng.choice(3, p=(0.6, 0.3, 0.1))]))
            at = len(sessions) - 1
        else:
            at = max(0, len(sessions) - 1 - int(rng.exponential(60)))
        more = int(rng.integers(1, 12))
        sessions[at] = [*sessions[at], *range(fresh, fresh + more)]
        fresh += more
        prompts.append(sessions[at])
    return prompts


def names_of(prompt: list[int], *, seed: int = 0) -> Names:
    return mixed(np.array(prompt, np.uint64) + np.uint64(seed << 32))


def replayed(prompts: list[list[int]], capacity: int) -> float:
    """The hit rate of the real index with one tier."""
    index = Index(block_tokens=1, tiers=[TierSpec("host", capacity, True, LruPolicy(tier=0))])
    hits = refs = 0
    for prompt in prompts:
        tokens = array("i", prompt).tobytes()
        with index.acquire(ROOT, tokens) as lease:
            found = lease.num_blocks
            hits, refs = hits + found, refs + len(prompt)
            room = index.reserve(0, len(prompt) - found, at_least=0)
            assert room
            index.extend(lease, tokens[found * 4 : (found + room.count) * 4], tier=0, places=room.places)
    return hits / refs


def estimated(prompts: list[list[int]], capacities: list[int], *, samples: int, seed: int = 0) -> list[float]:
    distances = ReuseDistances(max_blocks=1 << 30, samples=samples)
    for prompt in prompts:
        distances.refer(names_of(prompt, seed=seed))
    return distances.hit_shares(capacities)


def test_unsampled_distances_are_what_the_real_index_hits() -> None:
    prompts = conversations(requests=600, seed=1)
    # Capacities at which classes begin, so that nothing is interpolated.
    capacities = [*range(1, 20), 31, 63, 127, 255, 319, 511, 1023, 2047]
    exact = [replayed(prompts, capacity) for capacity in capacities]
    assert len(set(exact)) > 20, "the capacities must differ in what they hit"
    assert max(map(len, prompts)) > 15, "a prompt larger than a tier is part of it"
    assert estimated(prompts, capacities, samples=1 << 20) == pytest.approx(exact, abs=1e-12)


@cache
def simulated() -> tuple[list[list[int]], list[int], list[float]]:
    """Prompts, capacities, and what the index hits at each."""
    prompts = conversations(requests=3000, seed=2)
    unique = len({block for prompt in prompts for block in prompt})
    capacities = [unique * percent // 100 for percent in (1, 2, 5, 10, 20, 50)]
    return prompts, capacities, [replayed(prompts, capacity) for capacity in capacities]


@pytest.mark.parametrize("seed", range(4))
def test_sampled_distances_are_within_a_point(seed: int) -> None:
    prompts, capacities, exact = simulated()
    found = estimated(prompts, capacities, samples=capacities[-1] // 2, seed=seed)
    assert found == pytest.approx(exact, abs=0.01)


paths = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(0, 2)), min_size=1, max_size=30)


@given(paths=paths, writes=st.sets(st.integers(0, 29)))
def test_distances_are_those_of_a_plain_stack(paths: list[tuple[int, int, int]], writes: set[int]) -> None:
    """A stack kept as a list, on small tries; some paths are written without a lookup."""
    stack: list[tuple[int, ...]] = []
    distances, hits, refs = ReuseDistances(max_blocks=1 << 20, samples=1 << 10), [0, 0, 0], 0
    for number, (fork, size, tail) in enumerate(paths):
        ids = [fork, *[9] * (size - 1), *[tail + 20] * (size // 2)]
        path = [tuple(ids[: end + 1]) for end in range(len(ids))]
        names = mixed(np.array([hash(block) & 0xFFFFFFFF for block in path], np.uint64))
        if number in writes:
            distances.touch(names)
        else:
            distances.refer(names)
            refs += len(path)
            for at, capacity in enumerate((1, 3, 7)):
                hits[at] += sum(block in stack[:capacity] for block in path)
        stack = path + [block for block in stack if block not in path]
    assert distances.hit_shares([1, 3, 7]) == pytest.approx([hit / refs if refs else 0.0 for hit in hits])


def test_samples_and_memory_stay_bounded_for_ever() -> None:
    samples = 1024
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    distances = ReuseDistances(max_blocks=1 << 30, samples=samples)
    most = 0
    for at in range(3000):
        distances.refer(names_of(list(range(at * 100, at * 100 + 100))))
        most = max(most, distances.num_samples)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most <= samples
    assert 0.75 * samples / 300_000 / 2 < distances.rate < 2 * samples / 300_000
    assert peak - before < samples * BYTES_PER_SAMPLE + (1 << 20)


def test_what_no_capacity_reaches_is_forgotten_so_that_the_rest_stays_well_sampled() -> None:
    distances = ReuseDistances(max_blocks=2000, samples=1024)
    for at in range(3000):
        distances.refer(names_of(list(range(at * 100, at * 100 + 100))))
    assert distances.rate > 0.2, "most of 300,000 blocks can never be hit"


def test_what_was_long_ago_weighs_less() -> None:
    distances = ReuseDistances(max_blocks=1 << 20, window_refs=1000)
    same = names_of(list(range(10)))
    for _ in range(200):
        distances.refer(same)
        distances.hit_shares([100])
    for at in range(1000):
        distances.refer(names_of(list(range(at * 10 + 1000, at * 10 + 1010))))
        distances.hit_shares([100])
    assert distances.hit_shares([100])[0] < 0.01


def test_without_references_there_is_nothing_to_hit() -> None:
    assert ReuseDistances(max_blocks=10).hit_shares([1, 10]) == [0.0, 0.0]


def test_a_prompt_that_names_a_block_twice_breaks_nothing() -> None:
    distances = ReuseDistances(max_blocks=1 << 20)
    for _ in range(5):
        distances.refer(names_of([1, 1, 2, 1, 2]))
        distances.touch(names_of([]))
    assert 0 <= distances.hit_shares([1])[0] <= distances.hit_shares([5])[0] <= 1


def prompts_of(step: int) -> Iterator[tuple[bytes, int]]:
    rng = np.random.default_rng(3)
    base = rng.integers(0, 50_000, 40 * step, dtype="<i4").tobytes()
    yield base, 40
    for block in (0, 1, 17, 39):
        changed = bytearray(base)
        changed[(block * step + step - 1) * 4] ^= 1
        yield bytes(changed), block


@pytest.mark.parametrize("block_tokens", [1, 2, 16])
def test_a_name_stands_for_its_block_and_all_before(block_tokens: int) -> None:
    namer = Namer(block_tokens=block_tokens)
    (base, _), *changed = prompts_of(block_tokens)
    names, _ = namer.names(base)
    assert len(set(names.tolist())) == 40
    for tokens, block in changed:
        others, _ = namer.names(tokens)
        assert (others == names).tolist() == [True] * block + [False] * (40 - block)


def test_equal_blocks_at_different_places_have_different_names() -> None:
    names, _ = Namer(block_tokens=2).names(array("i", [5, 6] * 1000).tobytes())
    assert len(set(names.tolist())) == 1000


def test_names_go_on_where_they_ended_and_a_part_of_a_block_has_none() -> None:
    namer = Namer(block_tokens=4, seed=7)
    tokens = array("i", range(41)).tobytes()
    names, _ = namer.names(tokens)
    head, after = namer.names(tokens[: 4 * 16])
    tail, _ = namer.names(tokens[4 * 16 :], after=after)
    assert [*head, *tail] == list(names)
    assert len(names) == 10
    assert list(Namer(block_tokens=4, seed=8).names(tokens)[0]) != list(names)


@pytest.mark.parametrize("block_tokens", [1, 2, 16])
def test_a_prompt_without_a_whole_block_has_no_names(block_tokens: int) -> None:
    namer = Namer(block_tokens=block_tokens)
    names, after = namer.names(b"\0" * 4 * (block_tokens - 1), after=(3, 4))
    assert len(names) == 0 and after == (3, 4)
    distances = ReuseDistances(max_blocks=10)
    distances.refer(names)
    distances.touch(names)
    assert distances.num_refs == 0


def test_names_are_spread_evenly() -> None:
    names, _ = Namer(block_tokens=1).names(array("i", range(1 << 16)).tobytes())
    for shift in (0, 32, 60):
        counts = np.bincount((names >> np.uint64(shift)).astype(np.int64) & 15, minlength=16)
        assert abs(counts - 4096).max() < 6 * 64  # six times the standard deviation
