"""Policies that learn: they name what is worth least, whatever has happened since, and follow LRU while that knows better."""

from collections.abc import Collection, Sequence
from math import inf, nextafter
from random import Random

import numpy as np
import pytest

from tierkv.cost import CostModel
from tierkv.hints import NO_HINTS, Ending, Hints, Next
from tierkv.index import Index
from tierkv.keys import chain
from tierkv.policies import build
from tierkv.policies.adaptive import PROBATION, STALE, AdaptivePolicy
from tierkv.policies.base import Leaf, Observer, Policy
from tierkv.policies.hazard import EDGES_S, age_of
from tierkv.policies.reuse import WEIGHT, ReuseModel
from tierkv.testing import PolicyContract
from tierkv.testing.contracts import PROMPTS
from tierkv.tiers.base import Run

COST = CostModel(block_tokens=512, block_bytes=512 * 131072)
Rank = tuple[float, int, int]
"""Score, request of the last use and depth of a candidate: what goes first is the least."""


class TestAdaptive(PolicyContract):
    def build(self, capacities: Sequence[int]) -> tuple[list[Policy], Observer | None]:
        return build(["adaptive"] * len(capacities), capacities=capacities)


class TestSeconds(PolicyContract):
    def build(self, capacities: Sequence[int]) -> tuple[list[Policy], Observer | None]:
        return build(["adaptive"] * len(capacities), capacities=capacities, cost=COST, objective="seconds")


def tokens(blocks: Sequence[int]) -> bytes:
    return np.array(blocks, "<i4").tobytes()


def parts(index: Index, tier: int = 0) -> tuple[AdaptivePolicy, ReuseModel]:
    policy, model = index._tree.rooms[tier].policy, index._tree.observer
    assert isinstance(policy, AdaptivePolicy) and isinstance(model, ReuseModel)
    return policy, model


def save(
    index: Index,
    blocks: Sequence[int],
    *,
    now_s: float,
    hints: Hints = NO_HINTS,
    ending: Ending | None = None,
    below: bool = False,
) -> int:
    """Use a prompt and save what is missing; below: in the second tier, too. Returns how many blocks were held."""
    with index.acquire(PROMPTS, tokens(blocks), now_s=now_s, hints=hints) as lease:
        found = lease.num_blocks
        room = index.reserve(0, len(blocks) - found, at_least=0)
        assert room
        index.extend(lease, tokens(blocks[found : found + room.count]), tier=0, places=room.places)
        if below and (copy := index.begin_copy(lease, 1, 0, lease.num_blocks)):
            index.commit_copy(copy, [True] * len(copy.blocks))
        if ending:
            index.end(lease, ending, now_s=now_s)
    return found


def restore(index: Index, blocks: Sequence[int]) -> None:
    """Let the slowest tier hold what it held before a start; it has no places in this test."""
    room = index._tree.rooms[-1]
    room.placed = False
    keys = tuple(chain(PROMPTS, tokens(blocks), block_tokens=1))
    assert not index.restore(len(index._tree.rooms) - 1, [Run(PROMPTS, PROMPTS, 0, keys, tokens(blocks))])


def ranks(index: Index, tier: int = 0, *, named: Collection[Leaf] = ()) -> dict[Leaf, Rank]:
    """The definition: of every kind the strand whose tail was used longest ago, with what it is worth; all others after."""
    policy, model = parts(index, tier)
    queues: dict[tuple[int, float], list[tuple[int, int, Leaf]]] = {}
    for strand in index._tree.strands():
        lo, hi = strand.span(tier)
        if lo < hi and strand not in named:
            run = model.run(strand, hi - 1)
            kind = (0, 0.0) if policy._followed_until or not run else (run.kind, run.weight)
            queues.setdefault(kind if run else (-1, 0.0), []).append(
                (run.serial if run else -1, -strand.depth - hi, strand)
            )
    found = {}
    for queue in queues.values():
        first = min(queue, key=lambda each: each[:2])
        for serial, depth, strand in queue:
            run, block = model.run(strand, strand.span(tier)[1] - 1), -depth - strand.depth - 1
            score = -inf
            if run and not policy._followed_until:
                score = model.hazards.worth[run.kind][age_of(model.now_s - run.last_s)] * run.weight
                score *= policy.value(strand, block)
            if (serial, depth) == first[:2]:  # of a kind, and alike
                found[strand] = (score, serial, depth)
    return found


def drain(index: Index, tier: int = 0) -> list[Rank]:
    """Let a policy name all, in its order, and offer it back; each must be what is worth least then."""
    policy, _ = parts(index, tier)
    named: list[Leaf] = []
    found = []
    while victim := policy.pop():
        candidates = ranks(index, tier, named=named)
        assert victim.strand in candidates, "named before its kind's turn"
        found.append(candidates[victim.strand])
        assert found[-1][:2] == min(candidates.values())[:2]
        named.append(victim.strand)
    assert not ranks(index, tier, named=named)
    for strand in named:
        policy.offer(strand)
    return found


ENDINGS = (None, None, Ending(next=Next.ENDED), Ending(next=Next.TOOL, within_s=2.0), Ending(output_tokens=500))


@pytest.mark.parametrize("suite", [TestAdaptive(), TestSeconds()], ids=["hits", "seconds"])
@pytest.mark.parametrize("seed", range(5))
def test_names_what_is_worth_least_whatever_has_happened(suite: PolicyContract, seed: int) -> None:
    random = Random(seed)
    index = suite.index(60, 90, history_blocks=random.choice((0, 200)))
    _, model = parts(index)
    for at in range(6):
        restore(index, [at, *range(random.randrange(6))])
    now_s, compared, prompts = 0.0, 0, [[1]]
    for _ in range(250):
        match random.randrange(12):
            case 0:
                now_s += random.choice((0.3, 5.0, 300.0, 1e5))
            case 1:
                index.evict(random.randrange(2), random.randrange(4))
            case 2:
                model._learn()
            case 3:
                policy, _ = parts(index, random.randrange(2))
                for strand in random.sample(list(policy._live), len(policy._live) // 4):
                    policy.withdraw(strand)
                    policy.offer(strand)
            case 4 | 5:
                tier = random.randrange(2)
                compared += len(drain(index, tier))
            case _:
                now_s += random.uniform(0, 3)
                old = random.choice(prompts[-20:])
                new = [random.randrange(9) for _ in range(random.choice((0, 1, 3, 9)))]
                prompts.append([*old[: random.randrange(1, len(old) + 1)], *new][:20])
                if random.random() < 0.2:
                    prompts.append([random.randrange(100), 7])
                hints = Hints(priority=random.choice((0, 0, 0, 1, -1)))
                save(index, prompts[-1], now_s=now_s, hints=hints, ending=random.choice(ENDINGS), below=True)
    assert compared > 100
    index.check([])


def test_age_alone_changes_the_order() -> None:
    """Nothing has happened to any block but that time went by."""
    index = TestAdaptive().index(500, history_blocks=10_000)
    _, model = parts(index)
    for at in range(400):  # those of one block return after a minute; those of three within seconds, or never
        now_s = 200.0 * at
        save(index, [1000 + at], now_s=now_s)
        save(index, [5000 + at, 1, 2], now_s=now_s + 1)
        if at % 2:
            save(index, [5000 + at, 1, 2], now_s=now_s + 4)
        save(index, [1000 + at], now_s=now_s + 60)
    index.evict(0)
    save(index, [1], now_s=90_000.0)
    save(index, [2, 3, 4], now_s=90_000.0)
    model._learn()
    for later_s, order in ((3, [-1, -3]), (40, [-3, -1])):
        index.acquire(PROMPTS, tokens([99]), now_s=90_000.0 + later_s).release()
        assert [depth for _, _, depth in drain(index)] == order


def test_age_that_rounding_puts_on_both_sides_of_an_edge_is_looked_at_once() -> None:
    """Where last use + edge is now, and now - last use is less than the edge."""
    random = Random(1)
    last_s, edge = next(
        (last_s, edge)
        for last_s, edge in ((random.uniform(1e9, 2e9), random.choice(EDGES_S[2:20])) for _ in range(10_000))
        if (last_s + edge) - last_s < edge
    )
    index = TestAdaptive().index(10)
    policy, _ = parts(index)
    save(index, [1], now_s=last_s)
    strand = policy.pop()
    assert strand
    policy.offer(strand.strand)
    index.acquire(PROMPTS, tokens([9]), now_s=last_s + edge).release()
    assert policy.pop() == strand


@pytest.mark.parametrize("suite", [TestAdaptive(), TestSeconds()], ids=["hits", "seconds"])
def test_refuses_to_forget_just_what_is_worth_no_less(suite: PolicyContract) -> None:
    index = suite.index(100)
    policy, model = parts(index)
    for at in range(60):
        save(index, [at % 7, at % 5, at], now_s=float(at), hints=Hints(priority=at % 3 - 1))
        if at % 10 == 0:
            model._learn()
    while found := ranks(index):
        score = min(found.values())[0]
        assert policy.pop(score) is None and policy.pop(nextafter(score, -inf)) is None
        victim = policy.pop(nextafter(score, inf))
        assert victim and found[victim.strand][0] == score
        policy.offer(victim.strand)
        assert index.evict(0, 1).evicted == 1


def test_new_block_is_worth_what_its_kind_is_when_just_used() -> None:
    index = TestAdaptive().index(100)
    policy, model = parts(index)
    for at in range(60):
        save(index, [at % 7, at % 5, at], now_s=float(at), hints=Hints(priority=1))
    model._learn()
    strand = next(strand for strand in index._tree.strands() if model.run(strand, 0))
    run = model.run(strand, 0)
    assert run and policy.worth(strand, 0) == model.hazards.worth[run.kind][0] * WEIGHT


def first_to_go(index: Index, tier: int, *prompts: Sequence[int]) -> Sequence[int]:
    """Which of some prompts the tier forgets a block of first."""
    before = [held(index, tier, prompt) for prompt in prompts]
    index.evict(tier, 1)
    (gone,) = (prompt for prompt, was in zip(prompts, before, strict=True) if held(index, tier, prompt) < was)
    return gone


def held(index: Index, tier: int, prompt: Sequence[int]) -> int:
    return sum(each.hi - each.lo for each in index.explain(PROMPTS, tokens(prompt)) if tier in each.tiers)


@pytest.mark.parametrize("tier", [0, 1])
def test_higher_priority_outlives_what_is_alike(tier: int) -> None:
    index = TestAdaptive().index(50, 50)
    save(index, [1, 2], now_s=0.0, hints=Hints(priority=1), below=True)
    save(index, [3, 4], now_s=1.0, below=True)
    save(index, [5, 6], now_s=2.0, hints=Hints(priority=-1), below=True)
    order = [first_to_go(index, tier, [1, 2], [3, 4], [5, 6]) for _ in range(6)]
    assert order[::2] == order[1::2] == [[5, 6], [3, 4], [1, 2]]


def endings(tier: int, *told: Ending) -> tuple[Index, list[list[int]]]:
    """An index that has seen how requests of these endings went on, and holds one of each, the first used first."""
    index = TestAdaptive().index(2000, 2000, history_blocks=10_000)
    _, model = parts(index, tier)
    for at in range(400):
        for number, ending in enumerate(told):
            prompt, now_s = [at, number, 1, 2, 3], 100.0 * at
            save(index, prompt, now_s=now_s, ending=ending)
            if ending.next is Next.TOOL:
                save(index, [*prompt, 4], now_s=now_s + 3, ending=Ending(next=Next.ENDED))
            elif ending.next is Next.TURN and at % 4 == 0:
                save(index, [*prompt, 4], now_s=now_s + 50, ending=Ending(next=Next.ENDED))
    index.evict(0)
    index.evict(1)
    now_s, prompts = 50_000.0, [[7000, number, 1, 2, 3] for number in range(len(told))]
    leases = []
    for prompt in prompts:  # ended in turn, when all are held
        lease = index.acquire(PROMPTS, tokens(prompt), now_s=now_s)
        room = index.reserve(0, 5 - lease.num_blocks)
        assert room
        index.extend(lease, tokens(prompt[lease.num_blocks :]), tier=0, places=room.places)
        copy = index.begin_copy(lease, 1, 0, 5)
        assert copy
        index.commit_copy(copy, [True] * len(copy.blocks))
        leases.append(lease)
    model._learn()
    for lease, ending in zip(leases, told, strict=True):
        index.end(lease, ending, now_s=now_s)
    for lease in leases:
        lease.release()
    return index, prompts


@pytest.mark.parametrize("tier", [0, 1])
def test_session_that_is_over_goes_first_and_one_that_waits_for_a_tool_last(tier: int) -> None:
    """Though used last; in tiers that no lease pinned when that was told, too."""
    index, (tool, turn, ended) = endings(tier, Ending(Next.TOOL), Ending(Next.TURN), Ending(Next.ENDED))
    order = [first_to_go(index, tier, tool, turn, ended) for _ in range(12)]
    assert [each for at, each in enumerate(order) if each not in order[:at]] == [ended, turn, tool]


def test_what_was_restored_and_not_used_since_goes_first_and_the_deepest_of_it() -> None:
    index = TestAdaptive().index(50, 50)
    restore(index, [1, 2, 3])
    restore(index, [4, 5])
    save(index, [8, 9], now_s=0.0, below=True)
    save(index, [4, 5], now_s=1.0)
    gone = [first_to_go(index, 1, [1, 2, 3], [4, 5], [8, 9]) for _ in range(4)]
    assert gone[:3] == [[1, 2, 3]] * 3 and gone[3] != [1, 2, 3]


# -- following LRU ------------------------------------------------------------------------------------------------------


def test_follows_lru_while_that_hits_more_and_tries_again_afterwards() -> None:
    """What was never used again for long is all that is, from one moment on."""
    index = TestAdaptive().index(40, history_blocks=10_000)
    policy, _ = parts(index)
    followed, now_s = [], 0.0

    def use(prompt: Sequence[int]) -> None:
        nonlocal now_s
        now_s += 1.0
        save(index, prompt, now_s=now_s)
        followed.append(bool(policy._followed_until))

    for at in range(1500):  # short ones come back after a minute, long ones never
        use([at % 30 + 100])
        use([1000 + at, 1, 2])
    learned = len(followed)
    assert not any(followed[learned // 2 :])
    for at in range(2000):  # the other way round: short ones never, long ones after twenty seconds
        use([20_000 + at])
        use([5000 + at % 10 + at // 200 * 10, 1, 2])
    start = followed.index(True, learned)
    end = followed.index(False, start)
    assert end - start == PROBATION


def test_while_lru_is_followed_all_is_let_in_and_goes_by_its_last_use() -> None:
    index = TestAdaptive().index(100)
    policy, model = parts(index)
    for at in range(40):
        save(index, [at % 7, at % 5, at], now_s=float(at), hints=Hints(priority=at % 3))
    order = drain(index)
    policy._followed_until = model.serial + 5
    policy._requeue()
    assert {policy.worth(strand, 0) for strand in index._tree.strands()} == {inf}
    followed = drain(index)
    assert [serial for _, serial, _ in followed] == sorted(serial for _, serial, _ in order)
    for at in range(5):
        save(index, [50 + at], now_s=50.0)
    assert not policy._followed_until
    assert len(drain(index)) >= len(order)


# -- seconds ------------------------------------------------------------------------------------------------------------


def test_deep_block_outlives_a_shallow_one_of_the_same_kind_of_use() -> None:
    """Though used before it, in another kind of the same hazard."""
    index = TestSeconds().index(500)
    save(index, range(60), now_s=0.0)
    save(index, [1000], now_s=0.0)
    assert first_to_go(index, 0, range(60), [1000]) == [1000]


def test_block_that_a_slow_tier_must_bring_back_outlives_one_that_a_quick_tier_would() -> None:
    slow = CostModel(block_tokens=512, block_bytes=1)
    slow.observe_fetch(1, 1, slow.recompute_s(20))
    made, _ = build(["cost", "cost"], capacities=[9, 9], cost=slow)
    index = TestSeconds().index(500)
    save(index, range(60), now_s=0.0)
    (strand,) = index._tree.strands()
    above, last = made
    assert isinstance(above, AdaptivePolicy) and isinstance(last, AdaptivePolicy)
    assert above.value(strand, 59) < last.value(strand, 59)
    assert 0 < above.value(strand, 3) == above.value(strand, 30) < above.value(strand, 59)


# -- memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", [TestAdaptive(), TestSeconds()], ids=["hits", "seconds"])
def test_queues_are_bounded_where_nothing_is_ever_forgotten(suite: PolicyContract) -> None:
    random, index = Random(1), suite.index(100)
    policy, _ = parts(index)
    for at in range(3000):
        save(index, [random.randrange(3), random.randrange(3)], now_s=float(at), ending=random.choice(ENDINGS))
        num_queued = sum(map(len, policy._queues.values()))
        assert num_queued == policy._queued <= 2 * len(policy._live) + STALE + 1
        assert len(policy._board) <= 8 * (len(policy._queues) + STALE) + 1
        assert len(policy._ageing) <= 1000 and len(policy._live) < 20


def test_board_is_bounded_between_two_rounds_of_learning() -> None:
    index = TestAdaptive().index(50)
    policy, _ = parts(index)
    for at in range(3000):
        save(index, [at % 3, at], now_s=at / 100)
        assert len(policy._board) + len(policy._ageing) < 20 * (len(policy._queues) + STALE)
