"""What a tier forgets and what it lets in. Pure: no clock, lock, I/O or torch."""

from tierkv.cost import CostModel
from tierkv.errors import ConfigError
from tierkv.policies.base import Policy

NAMES = ("lru", "lfu", "cost")


def make(name: str, *, tier: int, cost: CostModel | None = None, next_tier: int | None = None) -> Policy:
    """Make the policy of one tier, by its name in the configuration.

    tier: its number in the index.  cost, next_tier: for `cost` (see CostPolicy); the others ignore them.
    Raises ConfigError for an unknown name, and for `cost` without a cost model.
    """
    if name == "lru":
        from tierkv.policies.lru import LruPolicy

        return LruPolicy(tier=tier)
    if name == "lfu":
        from tierkv.policies.lfu import LfuPolicy

        return LfuPolicy(tier=tier)
    if name != "cost":
        raise ConfigError(f"policy {name!r}: must be one of {', '.join(NAMES)}")
    if cost is None:
        raise ConfigError("policy 'cost': needs a cost model")
    from tierkv.policies.cost import CostPolicy

    return CostPolicy(tier=tier, cost=cost, next_tier=next_tier)
