"""The tier that tests of the store stand on keeps the contract that the real ones keep."""

from pathlib import Path

from tierkv.keys import Key
from tierkv.metrics import Metrics
from tierkv.testing import MemoryTier, TierContract
from tierkv.tiers.base import Tier


class TestMemoryTier(TierContract):
    durable = False

    def make(self, tmp_path: Path, metrics: Metrics) -> Tier:
        return MemoryTier(metrics=metrics)

    def corrupt(self, tier: Tier, key: Key) -> None:
        assert isinstance(tier, MemoryTier)
        tier.stored[key] = bytes([tier.stored[key][0] ^ 1]) + tier.stored[key][1:]
