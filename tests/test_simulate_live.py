"""The simulator agrees with the live store: the same requests, the same policy, and they forget the same blocks."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.store_parts import TINY, Parts, held
from tests.traces import ids, trace
from tierkv import policies
from tierkv.cost import CostModel
from tierkv.index import Index, TierSpec
from tierkv.simulate.replay import ID_TOKENS, ROOT, drive
from tierkv.simulate.request import Request

CAPACITY = 14
DEVICE = 0
POLICIES = ("lru", "lfu", "slru", "fifo", "gdsf")
"""Those that know no more than the uses of one tier."""
BY_STRAND = ("lfu", "gdsf")
"""Those whose ages and victims are of parts of strands: where a strand ends depends on all that the index knows, lower tiers
included, so they are compared without any."""


class Both:
    """A live store whose tiers move bytes, and the simulator's index for its device alone."""

    def __init__(self, policy: str) -> None:
        assert TINY.block_tokens == ID_TOKENS  # so an id of the trace is the tokens of a live block
        below = 0 if policy in BY_STRAND else 20
        self.live = Parts(pages=CAPACITY, host=below, slots=2 * below, policy=policy)
        cost = CostModel(block_tokens=TINY.block_tokens, block_bytes=TINY.block_bytes)
        spec = TierSpec("device", CAPACITY, True, policies.make(policy, tier=DEVICE, cost=cost, next_tier=DEVICE + 1))
        self.simulated = Index(block_tokens=ID_TOKENS, tiers=[spec])

    def serve(self, request: Request) -> None:
        self.live.serve(request.blocks)
        self.live.steps.run_all()
        drive([request], self.simulated)

    def stays(self, blocks: bytes) -> tuple[int, int]:
        """Blocks of a prompt that are on the device, live and simulated."""
        with self.simulated.keep(ROOT, blocks) as lease:
            return held(self.live, blocks, DEVICE), sum(hi - lo for lo, hi in lease.held(0, 0, lease.num_blocks))


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=25, deadline=None)
@given(prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=40))
def test_simulator_and_store_forget_the_same_blocks(policy: str, prompts: list[list[int]]) -> None:
    both = Both(policy)
    for number, request in enumerate(trace(prompts)):
        both.serve(request)
        for other in prompts[: number + 1]:
            live, simulated = both.stays(ids(other))
            assert live == simulated, f"{other} after request {number}"
    tiers = both.live.store.index.stats().tiers[DEVICE], both.simulated.stats().tiers[0]
    assert tiers[0].evicted == tiers[1].evicted and tiers[0].held == tiers[1].held


@pytest.mark.parametrize("policy", POLICIES)
def test_they_agree_for_long(policy: str) -> None:
    """Conversations that grow, branch and are forgotten, a hundred times over what the device holds."""
    random, both = Random(1), Both(policy)
    chats: list[list[int]] = []
    for number in range(400):
        chat = random.choice(chats)[: random.randrange(1, 9)] if chats and random.random() < 0.7 else []
        chats.append([*chat, *(number * 10 + at for at in range(random.randrange(1, 4)))])
        (request,) = trace([chats[-1]])
        both.serve(request)
        for other in random.sample(chats, min(len(chats), 5)):
            live, simulated = both.stays(ids(other))
            assert live == simulated, f"{other} after request {number}"
    tiers = both.live.store.index.stats().tiers[DEVICE], both.simulated.stats().tiers[0]
    assert tiers[0].evicted == tiers[1].evicted > 500
