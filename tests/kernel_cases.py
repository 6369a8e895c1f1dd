"""Where a kernel's test runs it: on the CUDA device through the public function, or on the CPU in Triton's interpreter."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

on_each_device = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.interpreted), pytest.param("cuda", marks=pytest.mark.gpu)],
)
"""Runs a test, which takes `device: str`, in the interpreter and on a GPU: one of the two is skipped, with its reason."""


def kernel(module: str, function: str, device: str) -> Callable[..., Any]:
    """The Triton side of `tierkv.kernels.<module>.<function>` for tensors on `device`."""
    name = f"tierkv.kernels.gpu.{module}" if device == "cpu" else f"tierkv.kernels.{module}"
    return getattr(import_module(name), function)  # type: ignore[no-any-return]


def reference(module: str, function: str) -> Callable[..., Any]:
    """The torch reference beside it: the public function, for tensors on the CPU."""
    return getattr(import_module(f"tierkv.kernels.{module}"), function)  # type: ignore[no-any-return]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal bit for bit, NaN included; moves both to the CPU."""
    assert one.dtype == other.dtype, (one.dtype, other.dtype)
    return torch.equal(one.cpu().contiguous().view(torch.uint8), other.cpu().contiguous().view(torch.uint8))
