"""The bounds: Belady is the best there is, by trying everything, and follows the rule of a prefix cache."""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.traces import COST, trace
from tierkv.simulate import oracle
from tierkv.simulate.cells import Cell, aggregate, capacities
from tierkv.simulate.oracle import NEVER, Future, Oracle
from tierkv.simulate.replay import replay

Path = tuple[int, ...]


def best(prompts: Sequence[Path], capacity: int) -> int:
    """Most block hits that any prefix cache can have, by trying all that it may hold after each request."""

    @cache
    def rest(at: int, held: frozenset[Path]) -> int:
        if at == len(prompts):
            return 0
        path = [prompts[at][: end + 1] for end in range(len(prompts[at]))]
        found = next((end for end, block in enumerate(path) if block not in held), len(path))
        return found + max(rest(at + 1, kept) for kept in closed(held | set(path), capacity))

    return rest(0, frozenset())


def closed(blocks: frozenset[Path], capacity: int) -> Iterator[frozenset[Path]]:
    """Every set of at most `capacity` of the blocks in which none is without those before it."""
    for size in range(min(capacity, len(blocks)) + 1):
        for kept in combinations(blocks, size):
            if all(len(block) == 1 or block[:-1] in kept for block in kept):
                yield frozenset(kept)


PROMPTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=3).map(tuple), min_size=1, max_size=7)


@settings(max_examples=300, deadline=None)
@given(PROMPTS, st.integers(1, 4))
def test_belady_is_the_best_of_all_that_a_prefix_cache_can_do(prompts: list[Path], capacity: int) -> None:
    bounds = Oracle(trace(prompts), cost=COST)
    refs = sum(map(len, prompts))
    assert round(bounds.belady(capacity).block_hit_rate * refs) == best(prompts, capacity)


LONG = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None)
@given(LONG, st.integers(0, 30))
def test_what_belady_finds_is_the_beginning_of_every_prompt(prompts: list[Path], capacity: int) -> None:
    bounds = Oracle(trace(prompts), cost=COST)
    hits, at = bytes(bounds._kept(capacity)), 0
    for prompt in prompts:
        assert hits[at : at + len(prompt)].rstrip(b"\0").count(0) == 0
        at += len(prompt)


@settings(max_examples=100, deadline=None)
@given(LONG)
def test_bounds_are_in_order(prompts: list[Path]) -> None:
    bounds = Oracle(trace(prompts), cost=COST)
    blocks = {prompt[: end + 1] for prompt in prompts for end in range(len(prompt))}
    assert bounds.num_unique == len(blocks)
    rates = [bounds.belady(capacity).block_hit_rate for capacity in (0, 1, 3, 10, len(blocks))]
    assert rates == sorted(rates) and rates[0] == 0
    refs = sum(map(len, prompts))
    assert rates[-1] == bounds.unbounded().block_hit_rate == pytest.approx(1 - len(blocks) / refs)
    for capacity in (1, 3, 10, len(blocks)):
        lru = replay(trace(prompts), policy="lru", capacity_blocks=capacity, unique_blocks=len(blocks), cost=COST)
        assert lru.block_hit_rate <= bounds.belady(capacity).block_hit_rate


@settings(max_examples=100, deadline=None)
@given(LONG, st.integers(10, 100))
def test_future_is_the_same_however_much_of_it_is_sorted_at_a_time(prompts: list[Path], at_a_time: int) -> None:
    blocks = [prompt[: end + 1] for prompt in prompts for end in range(len(prompt))]
    later = [
        next((at for at in range(now + 1, len(blocks)) if blocks[at] == blocks[now]), NEVER)
        for now in range(len(blocks))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "BATCH_REFS", 5)
        future = Future(trace(prompts), at_a_time=at_a_time)
        assert [at for batch in future for at in batch.tolist()] == later and future.num_unique == len(set(blocks))


def test_what_is_kept_for_long_does_not_fill_memory_with_what_is_gone() -> None:
    """Many blocks that pass quickly under one that waits: past entries are swept from the heap, none that counts is lost."""
    prompts = [[7]] + [[1000 + at // 2] for at in range(8000)] + [[7]]
    assert Oracle(trace(prompts), cost=COST).belady(2).block_hit_rate * len(prompts) == pytest.approx(4001)


def cell(policy: str, share: float, rate: float) -> Cell:
    return Cell(policy, round(share * 1000), share, rate, rate, rate, 1.0)


def test_gap_closed_is_summed_over_scarce_capacities_only() -> None:
    cells = [cell("lru", share, 0.1) for share in (0.01, 0.2, 0.5)]
    cells += [cell("belady", 0.01, 0.5), cell("belady", 0.2, 0.3), cell("belady", 0.5, 0.9)]
    cells += [cell("best", 0.01, 0.2), cell("best", 0.2, 0.3), cell("best", 0.5, 0.0)]
    assert aggregate(cells) == pytest.approx({"lru": 0.0, "belady": 1.0, "best": 0.5})


def test_no_gap_is_claimed_without_both_ends_of_it() -> None:
    assert aggregate([cell("lru", 0.1, 0.2), cell("cost", 0.1, 0.3)]) == {}
    assert aggregate([cell("lru", 0.1, 0.2), cell("belady", 0.1, 0.2)]) == {}
    assert "lfu" not in aggregate([cell("lru", 0.1, 0.1), cell("belady", 0.1, 0.3), cell("lfu", 0.2, 0.2)])


def test_shares_become_whole_blocks_and_at_least_one() -> None:
    assert capacities([0.01, 0.5, 0.00001], 170899) == [1709, 85450, 2]
    assert capacities([0.01], 3) == [1]
