"""What a GPU has left for pages: the arithmetic, and what is said when it does not work out."""

from dataclasses import replace

import pytest

from tierkv.engine.memory import Usage, left_for_pages
from tierkv.errors import ConfigError

GIB = 1 << 30
ALONE = Usage(total=80 * GIB, free=64 * GIB, weights=15 * GIB, step=2 * GIB, graphs=GIB)


def test_pages_get_what_the_share_leaves() -> None:
    assert left_for_pages(ALONE, utilization=0.9, least=1) == 72 * GIB - 16 * GIB - 3 * GIB


def test_what_other_processes_use_counts_as_taken() -> None:
    assert left_for_pages(replace(ALONE, free=24 * GIB), utilization=0.9, least=1) == 13 * GIB


@pytest.mark.parametrize(("free", "told"), [(8, "-3.00 GiB"), (12, "1.00 GiB")])
def test_too_little_is_refused_with_the_sum(free: int, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        left_for_pages(replace(ALONE, free=free * GIB), utilization=0.9, least=2 * GIB)
    message = str(refused.value)
    assert "72.00 GiB (gpu_memory_utilization = 0.9 of 80.00 GiB)" in message
    assert "15.00 GiB of weights" in message
    assert f"{80 - free - 15}.00 GiB of other engines, other processes and CUDA itself" in message
    assert "2.00 GiB for a step and 1.00 GiB for CUDA graphs" in message
    assert f"leaves {told}, and 2.00 GiB is the least" in message
    assert "raise gpu_memory_utilization" in message
    assert "\n" not in message


class Card:
    """80 GiB, of which engines take their weights and pages one after the other, and each a GiB of CUDA's own."""

    def __init__(self) -> None:
        self.free = 80 * GIB

    def start(self, *, weights: int, utilization: float) -> int:
        """Bytes of pages of one more engine."""
        self.free -= (weights + 1) * GIB
        usage = Usage(total=80 * GIB, free=self.free, weights=weights * GIB, step=GIB, graphs=0)
        pages = left_for_pages(usage, utilization=utilization, least=GIB)
        self.free -= pages
        return pages


def test_a_second_engine_gets_what_its_share_is_above_what_the_first_uses() -> None:
    card = Card()
    assert card.start(weights=15, utilization=0.5) == (40 - 15 - 1 - 1) * GIB
    assert card.start(weights=15, utilization=0.9) == (72 - 39 - 15 - 1 - 1) * GIB
    assert card.free == (80 - 72 + 1) * GIB  # what is above the share, and what its step will take


def test_a_second_engine_of_the_same_share_is_told_who_has_it() -> None:
    card = Card()
    card.start(weights=15, utilization=0.9)
    with pytest.raises(ConfigError) as refused:
        card.start(weights=15, utilization=0.9)
    message = str(refused.value)
    assert (
        "72.00 GiB (gpu_memory_utilization = 0.9 of 80.00 GiB) less 15.00 GiB of weights, 72.00 GiB of other" in message
    )
    assert "leaves -16.00 GiB, and 1.00 GiB is the least" in message
    assert "which counts what all of them use" in message
