"""Cheapest to lose first: seconds of recomputing that a block saves, by how often it did (GreedyDual-Size-Frequency)."""

from typing import ClassVar

from tierkv.cost import CostModel
from tierkv.policies.base import Leaf
from tierkv.policies.lfu import LfuPolicy

FLOOR_S = 1e-6
"""Least worth of a use: a block that is quicker recomputed than reloaded is still worth more used than unused."""


class GdsfPolicy(LfuPolicy):
    """Worth: uses x (seconds to recompute at that depth - seconds to reload from the next tier), with ageing.

    Blocks of a store have one size, so worth per byte orders them as worth does. Cao & Irani, "Cost-Aware WWW Proxy
    Caching Algorithms", 1997; Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency", 1998.
    next_tier: where a block can be had again once it is forgotten here; None: nowhere.
    """

    name: ClassVar[str] = "gdsf"

    def __init__(self, *, tier: int, cost: CostModel, next_tier: int | None = None) -> None:
        super().__init__(tier=tier)
        self._cost = cost
        self._next_tier = next_tier

    def value(self, strand: Leaf, block: int) -> float:
        """Seconds that one use of a block saves."""
        reload_s = self._cost.fetch_s(self._next_tier) if self._next_tier is not None else 0.0
        return max(FLOOR_S, self._cost.recompute_s(strand.depth + block) - reload_s)
