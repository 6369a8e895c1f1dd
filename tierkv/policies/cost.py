"""The policy that saves seconds: the chance of a use soon, times the seconds of prefill that it saves."""

from typing import ClassVar, Final

from tierkv.cost import CostModel
from tierkv.policies.adaptive import AdaptivePolicy
from tierkv.policies.base import Leaf
from tierkv.policies.reuse import ReuseModel

FLOOR_S: Final = 1e-6
"""Least worth of a use: a block that is quicker recomputed than reloaded is still worth more used than unused."""
WEIGHT: Final = 0.4
"""Power of the seconds. A chance of reuse is an estimate, and the highest product is often the worst overestimate; with 1
more seconds are lost on wrong guesses than won on dear blocks (bench/hit_rate)."""


class CostPolicy(AdaptivePolicy):
    """Worth: chance of a use per second of keeping the block x (seconds to recompute it - seconds to reload it) ** WEIGHT.

    Seconds are those of a block in the middle of the path up to the one in question: to keep a dear tail, all that is before
    it must be kept, too.  next_tier: where a block can be had again once it is forgotten here; None: nowhere.
    """

    name: ClassVar[str] = "cost"

    def __init__(
        self,
        *,
        tier: int,
        model: ReuseModel,
        cost: CostModel,
        next_tier: int | None = None,
    ) -> None:
        super().__init__(tier=tier, model=model)  # an LRU's hits say nothing of its seconds
        self._cost = cost
        self._next_tier = next_tier

    def value(self, strand: Leaf, block: int) -> float:
        """Seconds that one use of a block saves, tempered."""
        reload_s = self._cost.fetch_s(self._next_tier) if self._next_tier is not None else 0.0
        saved_s = self._cost.recompute_s((strand.depth + block) // 2) - reload_s
        return float(max(FLOOR_S, saved_s) ** WEIGHT)
