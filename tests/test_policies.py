"""Policies: the contract for each, what tells them apart, and the costs they go by."""

from collections.abc import Collection, Container, Sequence
from random import Random

import numpy as np
import pytest

from tierkv.cost import CostModel
from tierkv.errors import ConfigError
from tierkv.index import Index, TierSpec
from tierkv.policies import NAMES, make
from tierkv.policies.arc import ArcPolicy
from tierkv.policies.base import Policy
from tierkv.policies.fifo import FifoPolicy
from tierkv.policies.gdsf import GdsfPolicy
from tierkv.policies.slru import SlruPolicy
from tierkv.testing import PolicyContract
from tierkv.testing.contracts import PROMPTS

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


class TestGdsf(PolicyContract):
    def make(self, tier: int) -> Policy:
        return GdsfPolicy(tier=tier, cost=COST, next_tier=1)

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


class _AboveASlowTier(PolicyContract):
    def make(self, tier: int) -> Policy:
        slow = CostModel(block_tokens=512, block_bytes=1)
        slow.observe_fetch(1, 1, 60.0)
        return GdsfPolicy(tier=tier, cost=slow, next_tier=1)


def test_only_use_counts_where_everything_is_quicker_recomputed_than_reloaded() -> None:
    deep: Sequence[int] = range(1000, 1150)
    suite = _AboveASlowTier()
    index = suite.fill([[1, 2], [1, 2], deep])
    index.evict(0, 2)
    assert suite.holds(index, deep) == 148 and suite.holds(index, [1, 2]) == 2


class TestFifo(PolicyContract):
    def make(self, tier: int) -> Policy:
        return FifoPolicy(tier=tier)

    @pytest.mark.parametrize("capacity", [10, 40])
    def test_is_leaf_fifo_to_the_block(self, capacity: int) -> None:
        """Against the definition: of the leaves outside the request, the one that came first goes, the deepest of equals."""
        random = Random(capacity)
        index = self.fill([], capacity=capacity)
        came: dict[tuple[int, ...], int] = {}
        for now in range(400):
            prompt, path, found = request(random, came)
            assert self.holds(index, prompt) == found
            for block in path[found:]:
                if len(came) == capacity:
                    leaves = [leaf for leaf in leaves_of(came) if leaf not in path]
                    if not leaves:
                        break
                    del came[min(leaves, key=lambda leaf: (came[leaf], -len(leaf)))]
                came[block] = now
            self.save(index, prompt)
            assert index.stats().tiers[0].held == len(came)

    def test_what_was_lost_and_comes_back_is_new(self) -> None:
        index = self.fill([[1, 2, 3]])
        lose(index, [1, 2, 3], [2])
        self.save(index, [8])
        self.save(index, [1, 2, 3])
        index.evict(0, 1)
        assert self.holds(index, [1, 2, 3]) == 3 and self.holds(index, [8]) == 0

    def test_hits_keep_nothing(self) -> None:
        index = self.fill([[1, 2], [3, 4], [1, 2], [1, 2, 5]])
        index.evict(0, 1)
        assert self.holds(index, [3, 4]) == 1
        index.evict(0, 1)
        assert self.holds(index, [3, 4]) == 0 and self.holds(index, [1, 2, 5]) == 3

    def test_later_part_of_a_strand_goes_first_and_alone(self) -> None:
        index = self.fill([[1, 2], [1, 2, 3, 4], [8], [1, 2, 3, 4, 5]])
        index.evict(0, 1)
        assert self.holds(index, [8]) == 0
        index.evict(0, 1)
        assert self.holds(index, [1, 2, 3, 4, 5]) == 4
        assert [blocks for _, blocks in self.victims(self.policy(index))] == [2]


class TestSlru(PolicyContract):
    def make(self, tier: int) -> Policy:
        return SlruPolicy(tier=tier)

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
    def test_is_leaf_slru_to_the_block(self, share: float) -> None:
        """Against the definition, of a block that was demoted as if used then."""
        random = Random(3)
        policy = SlruPolicy(tier=0, protected_share=share)
        index = Index(block_tokens=1, tiers=[TierSpec("host", 40, True, policy)])
        used: dict[tuple[int, ...], int] = {}
        demoted: dict[tuple[int, ...], int] = {}
        protected: set[tuple[int, ...]] = set()
        demotions = 0
        for now in range(600):
            prompt, path, found = request(random, used)
            assert self.holds(index, prompt) == found
            protected.update(path[:found])
            used.update(dict.fromkeys(path[:found], now))
            while len(protected) > int(share * len(used)):
                last = min(protected, key=lambda block: (used[block], -len(block)))
                protected.remove(last)
                demoted[last] = now
                demotions += 1
            for block in path[found:]:
                if len(used) == 40:
                    leaves = [leaf for leaf in leaves_of(used) if leaf not in path]
                    if not leaves:
                        break
                    gone = min(
                        leaves, key=lambda leaf: (leaf in protected, max(used[leaf], demoted.get(leaf, 0)), used[leaf])
                    )
                    del used[gone]
                    demoted.pop(gone, None)
                    protected.discard(gone)
                used[block] = now
            self.save(index, prompt)
            assert policy.num_held == len(used) and policy.num_protected == len(protected)
        assert (demotions > 20) == (share < 1)

    def test_what_is_lost_is_not_counted(self) -> None:
        index = self.fill([[9], [7, 8], [1, 2], [1, 2, 3, 4], [5, 6]])
        policy = self.policy(index)
        assert isinstance(policy, SlruPolicy)
        lose(index, [1, 2, 3, 4], [3])
        assert (policy.num_held, policy.num_protected) == (8, 2)
        lose(index, [1, 2, 3], [1, 2])
        assert (policy.num_held, policy.num_protected) == (6, 1)
        lose(index, [1], [0])
        lose(index, [5, 6], [0, 1])
        assert (policy.num_held, policy.num_protected) == (3, 0)
        self.save(index, [5, 6])
        assert policy.num_held == 5
        assert index.evict(0).evicted == 5 and not policy._protected.pop()

    def test_used_again_outlives_a_scan_of_what_is_used_once(self) -> None:
        index = self.fill(
            [*([9, at] for at in range(20)), [1, 2], [1, 2], *([9, at] for at in range(100))], capacity=10
        )
        assert self.holds(index, [1, 2]) == 2

    def test_protected_long_ago_goes_once_others_are_used_again(self) -> None:
        index = self.fill([[1, 2], [1, 2]] + [[at, at] for at in range(5, 40) for _ in "ab"], capacity=10)
        assert self.holds(index, [1, 2]) == 0


class TestArc(PolicyContract):
    def build(self, capacities: Sequence[int]) -> tuple[list[Policy], None]:
        return [ArcPolicy(tier=tier, capacity_blocks=capacity) for tier, capacity in enumerate(capacities)], None

    def arc(self, index: Index) -> ArcPolicy:
        policy = self.policy(index)
        assert isinstance(policy, ArcPolicy)
        return policy

    @pytest.mark.parametrize("history_blocks", [0, 15, 500])
    def test_lists_are_no_longer_than_the_original_says(self, history_blocks: int) -> None:
        random = Random(history_blocks)
        index = self.fill([], capacity=40, history_blocks=history_blocks)
        arc, targets = self.arc(index), set()
        for _ in range(1000):
            prompt = [random.randrange(3) for _ in range(random.randrange(1, 9))]
            if random.random() < 0.3:
                prompt[0] = random.randrange(50)
            self.save(index, prompt)
            once, again, held = arc.num_once, arc.num_again, index.stats().tiers[0].held
            assert min(once, again) >= 0 and once + again == held <= 40
            assert once + arc.once_gone.num_blocks <= 40
            assert held + arc.once_gone.num_blocks + arc.again_gone.num_blocks <= 80
            assert 0 <= arc.target <= 40
            targets.add(arc.target)
            for ghosts in (arc.once_gone, arc.again_gone):
                assert ghosts.num_blocks == sum(run.hi - run.lo for run in ghosts._order)
                assert len(ghosts._order) == sum(map(len, ghosts._runs.values()))
        assert len(targets) > 10 or not history_blocks

    def test_used_again_outlives_a_scan_of_what_is_used_once(self) -> None:
        index = self.fill([[1, 2], [1, 2], *([9, at] for at in range(100))], capacity=10, history_blocks=100)
        assert self.holds(index, [1, 2]) == 2

    def test_block_that_comes_back_was_used_twice_and_shifts_the_target_to_its_list(self) -> None:
        index = self.fill([[1], [1], *([at] for at in range(10, 14))], capacity=4, history_blocks=100)
        arc = self.arc(index)
        assert (arc.num_once, arc.num_again, arc.once_gone.num_blocks, arc.target) == (3, 1, 1, 0)
        self.save(index, [10])  # forgotten last, used once
        assert (arc.num_once, arc.num_again, arc.once_gone.num_blocks, arc.target) == (2, 2, 1, 1)
        self.save(index, [11])  # forgotten for that
        assert (arc.num_once, arc.num_again, arc.once_gone.num_blocks, arc.target) == (1, 3, 1, 2)
        self.save(index, [30])  # the list of those used once has room now: one of the others goes, the first
        assert self.holds(index, [1]) == 0 and arc.again_gone.num_blocks == 1
        self.save(index, [1])  # comes back to the other list
        assert arc.target == 1 and (arc.again_gone.num_blocks, arc.num_again + arc.num_once) == (1, 4)

    def test_what_the_index_does_not_know_any_more_is_not_remembered(self) -> None:
        index = self.fill([[at, at + 1] for at in range(100) for _ in "ab"], capacity=10, history_blocks=0)
        assert self.arc(index).again_gone.num_blocks <= 4
        index = self.fill([[at, at + 1] for at in range(100) for _ in "ab"], capacity=10, history_blocks=10)
        assert self.arc(index).again_gone.num_blocks == 10

    def test_list_gives_no_more_than_it_has_too_many(self) -> None:
        index = self.fill([[5, 6], [5, 6], [1, 2, 3, 4]], capacity=10)
        arc = self.arc(index)
        arc.target = 2.5
        assert index.evict(0, 3).evicted == 3
        assert self.holds(index, [1, 2, 3, 4]) == 2 and self.holds(index, [5, 6]) == 1

    def test_what_is_lost_is_not_counted(self) -> None:
        index = self.fill([[1, 2], [1, 2, 3, 4], [5, 6]])
        arc = self.arc(index)
        lose(index, [1, 2, 3, 4], [3])
        assert (arc.num_once, arc.num_again) == (3, 2)
        lose(index, [5, 6], [0, 1])
        assert (arc.num_once, arc.num_again) == (1, 2)
        assert not arc.once_gone.num_blocks

    def test_tail_used_once_goes_before_its_beginning_that_was_used_again(self) -> None:
        index = self.fill([[1, 2, 3, 4], [1, 2], [7], [7]])
        index.evict(0, 2)
        assert self.holds(index, [1, 2, 3, 4]) == 2 and self.holds(index, [7]) == 1


def request(random: Random, held: Container[tuple[int, ...]]) -> tuple[list[int], list[tuple[int, ...]], int]:
    """A prompt, its blocks as the paths to them, and how many of the leading ones are held."""
    prompt = [random.randrange(3) for _ in range(random.randrange(1, 9))]
    path = [tuple(prompt[: at + 1]) for at in range(len(prompt))]
    return prompt, path, next((at for at, block in enumerate(path) if block not in held), len(path))


def lose(index: Index, prompt: Sequence[int], blocks: Sequence[int]) -> None:
    """Let the tier forget some blocks of a prompt otherwise than by its policy."""
    with index.keep(PROMPTS, np.array(prompt, "<i4").tobytes()) as lease:
        index.drop(0, lease, blocks)


def leaves_of(held: Collection[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Blocks that no other one follows."""
    parents = {block[:-1] for block in held}
    return [block for block in held if block not in parents]


def test_unknown_policy_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=f"'mru': must be one of {', '.join(NAMES)}"):
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
