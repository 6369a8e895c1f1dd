"""Replay a trace through the real index and a real policy: what would have been held, without a byte of KV."""

import time
from collections.abc import Callable
from typing import Final

from tierkv.cost import CostModel
from tierkv.index import Index, TierSpec
from tierkv.keys import Key
from tierkv.policies import make
from tierkv.simulate.cells import Cell, Tally
from tierkv.simulate.request import ID_BYTES, Trace

ROOT: Final = Key(b"simulated namespace".ljust(32, b"\0"))
ID_TOKENS: Final = ID_BYTES // 4
"""An id of a trace is a block of so many tokens to the index."""


def replay(
    trace: Trace,
    *,
    policy: str,
    capacity_blocks: int,
    unique_blocks: int,
    cost: CostModel,
    clock: Callable[[], float] = time.perf_counter,
) -> Cell:
    """Run every request of a trace against one tier, empty at first.

    A request is over before the next one comes.
    """
    next_tier = 1 if policy == "cost" else None
    spec = TierSpec("simulated", capacity_blocks, True, make(policy, tier=0, cost=cost, next_tier=next_tier))
    index = Index(block_tokens=ID_TOKENS, tiers=[spec])
    tally, block_tokens = Tally(), trace.block_tokens
    start = clock()
    for request in trace:
        blocks = request.blocks
        if not blocks:
            continue
        lease = index.acquire(ROOT, blocks)
        found = lease.num_blocks
        missing = request.num_blocks - found
        if missing and (room := index.reserve(0, missing, at_least=0)):
            index.extend(lease, blocks[found * ID_BYTES :][: room.count * ID_BYTES], tier=0, places=room.places)
        lease.release()
        tally.add(request, found, block_tokens)
    elapsed_s = clock() - start
    return tally.cell(policy=policy, capacity=capacity_blocks, unique=unique_blocks, cost=cost, elapsed_s=elapsed_s)
