"""Contract suites that every implementation inherits, and the small things their tests share.

A suite is a class of pytest tests with hooks: subclass it in a test file, name the subclass `Test…`, fill in the hooks.
Shipped, so that tiers, policies and codecs of others can be held to it. What is particular to one implementation stays in
that one's tests. A CUDA device without one is in `tierkv.testing.cuda`, which alone needs torch.
"""

from tierkv.testing.contracts import CodecContract, PolicyContract, floats
from tierkv.testing.doubles import FakeClock, FaultyTier, MemoryTier, SharedMemoryTier, StepExecutor
from tierkv.testing.tiers import SMALL, TierContract, block_of, blocks_of, make_run, read_blocks

__all__ = [
    "SMALL",
    "CodecContract",
    "FakeClock",
    "FaultyTier",
    "MemoryTier",
    "PolicyContract",
    "SharedMemoryTier",
    "StepExecutor",
    "TierContract",
    "block_of",
    "blocks_of",
    "floats",
    "make_run",
    "read_blocks",
]
