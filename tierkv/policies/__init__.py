"""What a tier forgets and what it lets in. Pure: no clock, lock, I/O or torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from tierkv.cost import CostModel
from tierkv.errors import ConfigError
from tierkv.policies.base import Observer, Policy

if TYPE_CHECKING:
    from tierkv.policies.reuse import ReuseModel

NAMES: Final = ("fifo", "lru", "lfu", "slru", "arc", "gdsf", "cost", "adaptive")
DEFAULT: Final = "adaptive"
LEARNING: Final = ("cost", "adaptive")
"""Those that need an observer."""
REMEMBERING: Final = (*LEARNING, "arc")
"""Those that are at their best with an index that knows forgotten blocks (see `history_blocks`)."""
SECONDS: Final = ("gdsf", "cost")
"""Those that need a cost model."""
LEAST_HISTORY: Final = 1 << 18
"""Forgotten blocks that are remembered at least: 28 MB of index for long prompts (107 bytes a block, 16 tokens each), 94 MB for
branches of four blocks (357 bytes; measured with tests' prompts, 2026-11-22)."""


def build(
    names: Sequence[str], *, capacities: Sequence[int], cost: CostModel | None = None, objective: str = "hits"
) -> tuple[list[Policy], Observer | None]:
    """Make the policies of all tiers of an index, fastest first, and the observer that they share, if any needs one.

    capacities: blocks of each tier.  objective: what `adaptive` keeps most of, `hits` or `seconds`; the others know but one.
    Raises ConfigError as `make` does.
    """
    model = None
    if any(name in LEARNING for name in names):
        from tierkv.policies.reuse import ReuseModel

        model = ReuseModel()
    made = [
        make(
            "cost" if name == "adaptive" and objective == "seconds" else name,
            tier=tier,
            cost=cost,
            next_tier=tier + 1 if tier + 1 < len(names) else None,
            capacity_blocks=capacity,
            model=model,
        )
        for tier, (name, capacity) in enumerate(zip(names, capacities, strict=True))
    ]
    return made, model


def history_blocks(capacities: Sequence[int]) -> int:
    """How many forgotten blocks an index should know: twice what its tiers hold, where that is more than LEAST_HISTORY."""
    return max(LEAST_HISTORY, 2 * sum(capacities))


def make(
    name: str,
    *,
    tier: int,
    cost: CostModel | None = None,
    next_tier: int | None = None,
    capacity_blocks: int | None = None,
    model: "ReuseModel | None" = None,
) -> Policy:
    """Make the policy of one tier, by its name in the configuration.

    tier: its number in the index.  cost, next_tier: for those in SECONDS.  model: the index's observer, for those in LEARNING.
    capacity_blocks: of the tier; arc needs it. What a policy does not need is ignored.
    Raises ConfigError for an unknown name, and for what it needs and was not given.
    """
    if name not in NAMES:
        raise ConfigError(f"policy {name!r}: must be one of {', '.join(NAMES)}")
    if name in SECONDS and cost is None:
        raise ConfigError(f"policy {name!r}: needs a cost model")
    if name in LEARNING and model is None:
        raise ConfigError(f"policy {name!r}: needs an observer of its index; policies.build makes both")
    match name:
        case "lru":
            from tierkv.policies.lru import LruPolicy

            return LruPolicy(tier=tier)
        case "lfu":
            from tierkv.policies.lfu import LfuPolicy

            return LfuPolicy(tier=tier)
        case "fifo":
            from tierkv.policies.fifo import FifoPolicy

            return FifoPolicy(tier=tier)
        case "slru":
            from tierkv.policies.slru import SlruPolicy

            return SlruPolicy(tier=tier)
        case "arc":
            from tierkv.policies.arc import ArcPolicy

            if capacity_blocks is None:
                raise ConfigError("policy 'arc': needs the capacity of its tier")
            return ArcPolicy(tier=tier, capacity_blocks=capacity_blocks)
        case "gdsf":
            from tierkv.policies.gdsf import GdsfPolicy

            assert cost
            return GdsfPolicy(tier=tier, cost=cost, next_tier=next_tier)
        case "cost":
            from tierkv.policies.cost import CostPolicy

            assert cost and model
            return CostPolicy(tier=tier, model=model, cost=cost, next_tier=next_tier)
    from tierkv.policies.adaptive import AdaptivePolicy

    assert model
    return AdaptivePolicy(tier=tier, model=model, capacity_blocks=capacity_blocks)
