"""Traces made in a test: prompts as lists of small numbers, a block each."""

from collections.abc import Iterable, Sequence

import numpy as np

from tierkv.cost import CostModel
from tierkv.simulate.blocks import chained
from tierkv.simulate.request import Request
from tierkv.simulate.spool import Spool

COST = CostModel(block_tokens=16, block_bytes=1 << 20)


def ids(prompt: Sequence[int]) -> bytes:
    return chained(np.array(prompt, dtype=np.uint64))


def trace(prompts: Iterable[Sequence[int]], *, block_tokens: int = 16) -> Spool:
    """Requests a second apart, of full blocks alone."""
    spool = Spool(name="made", block_tokens=block_tokens)
    for at, prompt in enumerate(prompts):
        spool.add(Request(float(at), ids(prompt), len(prompt) * block_tokens, 10))
    return spool
