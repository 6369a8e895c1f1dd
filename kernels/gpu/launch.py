"""What a launch depends on besides its arguments: the architecture, and whether Triton interprets."""

import functools
from typing import Final

import torch
import triton
from triton.runtime import driver

INTERPRETED: Final[bool] = bool(triton.knobs.runtime.interpret)
"""TRITON_INTERPRET=1: kernels run as Python on CPU tensors. Fixed when a kernel's module is first imported."""


def architecture() -> int:
    """Of the current device: 90 for compute capability 9.0; 0 where Triton interprets or the card is not NVIDIA's."""
    return 0 if INTERPRETED else _architecture(driver.active.get_current_device())


@functools.cache
def _architecture(device: int) -> int:
    arch = driver.active.get_current_target().arch
    return arch if isinstance(arch, int) else 0


def has_e4m3() -> bool:
    """Whether the hardware converts e4m3 (Ada and newer)."""
    return architecture() >= 89


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; 132 (H100, H200) where there is none to ask."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 132
