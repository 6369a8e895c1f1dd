"""Results: a cell is one policy at one capacity on one trace; `aggregate` says how far cells are between LRU and the bound."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from tierkv.cost import CostModel
from tierkv.simulate.request import Request

UNBOUNDED: Final = "unbounded"
BELADY: Final = "belady"
SCARCE: Final = 0.2
"""The largest share of the unique blocks at which a policy matters; from there on all are near the bound."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One policy at one capacity. Rates are shares of all references, tokens or prefill seconds of requests with a full block.

    capacity_share: of the unique blocks.  us_per_ref: time of the replay, reading the trace included.
    """

    policy: str
    capacity_blocks: int
    capacity_share: float
    block_hit_rate: float
    token_hit_rate: float
    seconds_saved_share: float
    us_per_ref: float


class Tally:
    """Hits of one cell, request by request."""

    def __init__(self) -> None:
        self.hits = self.refs = self.hit_tokens = self.tokens = 0
        self._found: Counter[int] = Counter()
        self._asked: Counter[int] = Counter()

    def add(self, request: Request, found: int, block_tokens: int) -> None:
        """Count a request of which the leading `found` blocks were held."""
        blocks = request.num_blocks
        self.hits += found
        self.refs += blocks
        self.hit_tokens += min(found * block_tokens, request.input_tokens)
        self.tokens += request.input_tokens
        self._found[found] += 1
        self._asked[blocks] += 1

    def cell(self, *, policy: str, capacity: int, unique: int, cost: CostModel, elapsed_s: float) -> Cell:
        """Sum it up."""
        upto = [0.0]
        for depth in range(max(self._asked, default=0)):
            upto.append(upto[-1] + cost.recompute_s(depth))
        asked_s = sum(upto[blocks] * times for blocks, times in self._asked.items())
        saved_s = sum(upto[blocks] * times for blocks, times in self._found.items())
        return Cell(
            policy=policy,
            capacity_blocks=capacity,
            capacity_share=capacity / max(unique, 1),
            block_hit_rate=self.hits / max(self.refs, 1),
            token_hit_rate=self.hit_tokens / max(self.tokens, 1),
            seconds_saved_share=saved_s / asked_s if asked_s else 0.0,
            us_per_ref=elapsed_s / max(self.refs, 1) * 1e6,
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
