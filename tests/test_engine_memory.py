"""What a GPU has left for pages: the arithmetic, and what is said when it does not work out."""

from dataclasses import replace

import pytest

from tierkv.engine.memory import Usage, left_for_pages
from tierkv.errors import ConfigError

GIB = 1 << 30
ALONE = Usage(total=80 * GIB, free=64 * GIB, own=15 * GIB, step=2 * GIB, graphs=GIB)


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
    assert f"{80 - free - 15}.00 GiB of other processes" in message
    assert "2.00 GiB for a step and 1.00 GiB for CUDA graphs" in message
    assert f"leaves {told}, and 2.00 GiB is the least" in message
    assert "raise gpu_memory_utilization" in message
    assert "\n" not in message
