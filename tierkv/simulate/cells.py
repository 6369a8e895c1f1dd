"""Results: a cell is one policy at one capacity on one trace; `aggregate` says how far cells are between LRU and the bound."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from tierkv.cost import CostModel

UNBOUNDED: Final = "unbounded"
BELADY: Final = "belady"
SCARCE: Final = 0.2
"""The largest share of the unique blocks at which a policy matters; from there on all are near the bound."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One policy at one capacity. Rates are shares of all references, tokens or prefill seconds of requests with a full block.

    capacity_share: of the unique blocks.  us_per_ref: processor time of the replay, reading the trace included.
    """

    policy: str
    capacity_blocks: int
    capacity_share: float
    block_hit_rate: float
    token_hit_rate: float
    seconds_saved_share: float
    us_per_ref: float


class Tally:
    """Hits of one cell, request by request: 12 bytes each."""

    def __init__(self) -> None:
        self._found, self._asked, self._inputs = array("i"), array("i"), array("i")

    def add(self, found: int, blocks: int, input_tokens: int) -> None:
        """Count a request for `blocks` full blocks of which the leading `found` were held."""
        self._found.append(found)
        self._asked.append(blocks)
        self._inputs.append(input_tokens)

    def cell(
        self, *, policy: str, capacity: int, unique: int, block_tokens: int, cost: CostModel, elapsed_s: float
    ) -> Cell:
        """Sum it up."""
        found, asked = np.array(self._found, dtype=np.int64), np.array(self._asked, dtype=np.int64)
        inputs = np.array(self._inputs, dtype=np.int64)
        each_s = [cost.recompute_s(depth) for depth in range(int(asked.max(initial=0)))]
        upto_s = np.cumsum([0.0, *each_s])
        refs = int(asked.sum())
        return Cell(
            policy=policy,
            capacity_blocks=capacity,
            capacity_share=capacity / max(unique, 1),
            block_hit_rate=float(found.sum() / max(refs, 1)),
            token_hit_rate=float(np.minimum(found * block_tokens, inputs).sum() / max(inputs.sum(), 1)),
            seconds_saved_share=float(upto_s[found].sum() / upto_s[asked].sum()) if refs else 0.0,
            us_per_ref=elapsed_s / max(refs, 1) * 1e6,
        )


def aggregate(cells: Iterable[Cell], *, over: str = "block_hit_rate") -> dict[str, float]:
    """By policy, the share of the gap between lru and belady that it closes, summed over the capacities up to SCARCE.

    Policies without a cell at each of those capacities are left out; nothing without lru and belady, or without a gap.
    """
    by_policy: dict[str, dict[int, float]] = {}
    for cell in cells:
        if cell.capacity_share <= SCARCE * 1.001:  # capacities are whole blocks
            by_policy.setdefault(cell.policy, {})[cell.capacity_blocks] = getattr(cell, over)
    low, high = by_policy.get("lru", {}), by_policy.get(BELADY, {})
    gap = sum(high[capacity] - low[capacity] for capacity in low.keys() & high.keys())
    if low.keys() != high.keys() or not gap > 0:
        return {}
    return {
        policy: sum(rate - low[capacity] for capacity, rate in rates.items()) / gap
        for policy, rates in by_policy.items()
        if rates.keys() == low.keys()
    }


def capacities(shares: Sequence[float], unique: int) -> list[int]:
    """Shares of the unique blocks as blocks, at least one."""
    return [max(1, round(share * unique)) for share in shares]
