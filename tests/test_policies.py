"""Policies: the contract for each, what tells them apart, and the costs they go by."""

from collections.abc import Sequence
from random import Random

import pytest

from tierkv.cost import CostModel
from tierkv.errors import ConfigError
from tierkv.policies import NAMES, make
from tierkv.policies.base import Policy
from tierkv.policies.heap import HeapPolicy
from tierkv.testing import PolicyContract

COST = CostModel(block_tokens=512, block_bytes=512 * 131072)


class TestLru(PolicyContract):
    def make(self, tier: int) -> Policy:
        return make("lru", tier=tier)

    @pytest.mark.parametrize("capacity", [10, 40])
    def test_is_leaf_lru_to_the_block(self, capacity: int) -> None:
        """Against the definition: of the leaves outside the request, the one used longest ago goes."""
        random = Random(capacity)
        index = self.fill([], capacity=capacity)
        used: dict[tuple[int, ...], int] = {}
        for now in range(400):
            prompt = [random.randrange(3) for _ in range(random.randrange(1, 9))]
            path = [tuple(prompt[: at + 1]) for at in range(len(prompt))]
            found = next((at for at, block in enumerate(path) if block not in used), len(path))
            assert self.holds(index, prompt) == found
            for block in path[:found]:
                used[block] = now
            for block in path[found:]:
                if len(used) == capacity:
                    parents = {each[:-1] for each in used}
                    leaves = [each for each in used if each not in parents and used[each] < now]
                    if not leaves:
                        break
                    del used[min(leaves, key=used.__getitem__)]
                used[block] = now
            self.save(index, prompt)
            assert index.stats().tiers[0].held == len(used)


class TestLfu(PolicyContract):
    def make(self, tier: int) -> Policy:
        return make("lfu", tier=tier)

    def test_often_used_outlives_lately_used(self) -> None:
        index = self.fill([[1, 2]] * 3 + [[1, 3], [4]])
        index.evict(0, 2)
        assert self.holds(index, [1, 2]) == 2 and self.holds(index, [1, 3]) == 1 and self.holds(index, [4]) == 0

    def test_uses_of_a_branch_are_uses_of_its_prefix(self) -> None:
        index = self.fill([[1, 2], [1, 3], [1, 4], [5], [5]])
        index.evict(0, 3)
        assert self.holds(index, [1]) == 1 and self.holds(index, [5]) == 1
        index.evict(0, 1)
        assert self.holds(index, [1]) == 1 and self.holds(index, [5]) == 0

    def test_what_was_popular_long_ago_goes(self) -> None:
        index = self.fill([[1, 2]] * 8 + [[9, at] for at in range(200)], capacity=10)
        assert self.holds(index, [1, 2]) == 0

    def test_popular_tail_goes_before_its_more_popular_beginning(self) -> None:
        index = self.fill([[1, 2, 3, 4]] * 2 + [[1, 2]] * 3 + [[7]] * 4)
        index.evict(0, 2)
        assert self.holds(index, [1, 2, 3, 4]) == 2 and self.holds(index, [7]) == 1


class TestCost(PolicyContract):
    def make(self, tier: int) -> Policy:
        return make("cost", tier=tier, cost=COST, next_tier=1)

    def test_deep_block_outlives_a_shallow_one_of_the_same_use(self) -> None:
        deep: Sequence[int] = range(10, 60)
        index = self.fill([deep, [1, 2]])
        index.evict(0, 2)
        assert self.holds(index, deep) == 50 and self.holds(index, [1, 2]) == 0

    def test_use_counts_by_the_seconds_that_it_saves(self) -> None:
        """Twice a shallow block is less than once a block that costs more than twice as much to recompute."""
        deep: Sequence[int] = range(1000, 1150)
        assert COST.recompute_s(149) - COST.fetch_s(1) > 2 * (COST.recompute_s(1) - COST.fetch_s(1))
        index = self.fill([[1, 2], [1, 2], deep])
        index.evict(0, 2)
        assert self.holds(index, deep) == 150 and self.holds(index, [1, 2]) == 0


class TestCostAboveASlowTier(PolicyContract):
    """Everything is quicker recomputed than reloaded: worth little, but still the more the oftener it is used."""

    def make(self, tier: int) -> Policy:
        slow = CostModel(block_tokens=512, block_bytes=1)
        slow.observe_fetch(1, 1, 60.0)
        return make("cost", tier=tier, cost=slow, next_tier=1)

    def test_only_use_counts(self) -> None:
        deep: Sequence[int] = range(1000, 1150)
        index = self.fill([[1, 2], [1, 2], deep])
        index.evict(0, 2)
        assert self.holds(index, deep) == 148 and self.holds(index, [1, 2]) == 2


@pytest.mark.parametrize("name", NAMES)
def test_heap_does_not_grow_with_what_was_forgotten(name: str) -> None:
    policy = make(name, tier=0, cost=COST)
    assert isinstance(policy, HeapPolicy)

    class Suite(PolicyContract):
        def make(self, tier: int) -> Policy:
            return policy

    suite = Suite()
    index = suite.fill([[at % 5, at, at % 3] for at in range(3000)], capacity=50)
    assert len(policy._heap) <= 2 * 50 + 64 and len(policy._live) <= 50
    assert len(getattr(policy, "_uses", {})) <= 50
    index.evict(0)
    assert not policy._live


def test_unknown_policy_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="'mru': must be one of lru, lfu, cost"):
        make("mru", tier=0)
    with pytest.raises(ConfigError, match="needs a cost model"):
        make("cost", tier=0)


def test_recomputing_costs_more_the_deeper_the_block() -> None:
    costs = [COST.recompute_s(depth) for depth in (0, 1, 10, 100)]
    assert costs == sorted(costs) and costs[0] > 0 and costs[3] > 2 * costs[0]


def test_cost_model_finds_the_coefficients_behind_its_samples() -> None:
    model = CostModel(block_tokens=16, block_bytes=1)
    random = Random(1)
    for _ in range(300):
        tokens, context = random.randrange(1, 2000), random.randrange(0, 30000)
        noise = random.uniform(0.95, 1.05)
        model.observe_prefill(tokens, context, noise * (tokens * 1e-3 + tokens * (context + tokens / 2) * 2e-8))
    for depth in (0, 50, 1500):
        expected = 16 * 1e-3 + 16 * (16 * depth + 8) * 2e-8
        assert model.recompute_s(depth) == pytest.approx(expected, rel=0.05)


def test_cost_model_follows_a_machine_that_gets_slower() -> None:
    model = CostModel(block_tokens=16, block_bytes=1)
    for seconds in [1e-3] * 1000 + [3e-3] * 1500:
        model.observe_prefill(100, 0, 100 * seconds)
    assert model.recompute_s(0) == pytest.approx(16 * 3e-3, rel=0.02)


def test_samples_of_one_kind_leave_costs_sane() -> None:
    model = CostModel(block_tokens=16, block_bytes=1)
    for _ in range(100):
        model.observe_prefill(512, 0, 1.0)
    model.observe_prefill(0, 0, 1.0)
    model.observe_prefill(5, 0, 0.0)
    assert model.recompute_s(0) == pytest.approx(16 / 512, rel=0.2)
    assert 0 < model.recompute_s(1000) < 100


def test_fetch_time_is_a_moving_average_that_starts_at_the_first_sample() -> None:
    model = CostModel(block_tokens=16, block_bytes=2 << 20)
    assert 0 == model.fetch_s(0) < model.fetch_s(1) < model.fetch_s(2) < model.fetch_s(3)
    model.observe_fetch(2, 4, 0.4)
    assert model.fetch_s(2) == pytest.approx(0.1)
    model.observe_fetch(2, 1, 0.2)
    model.observe_fetch(2, 0, 9.9)
    assert model.fetch_s(2) == pytest.approx(0.11)
