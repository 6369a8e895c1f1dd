"""What `tierkv bench device` measures: transfers between host and device, and the kernels, each against its limit."""

from collections.abc import Callable
from typing import Any, Final

import torch

from tierkv.errors import ConfigError, TierError
from tierkv.measure import attention, moves, transfers
from tierkv.measure.lab import Lab
from tierkv.tiers.device_cuda import open_cuda

PARTS: Final[dict[str, Callable[[Lab], None]]] = {
    "transfers between host and device": transfers.run,
    "attention": attention.run,
    "pages, blocks and codes": moves.run,
}


def card() -> dict[str, Any]:
    """Name and versions of the card that will be measured. Raises TierError, with the remedy, where there is none."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        remedy = (
            f"torch {torch.__version__} is built for CUDA {built}: check that nvidia-smi lists a card, and CUDA_VISIBLE_DEVICES"
            if built
            else f"torch {torch.__version__} is built without CUDA: install a build with it (https://pytorch.org)"
        )
        raise TierError(f"bench device: no CUDA device was found, so there is nothing to measure; {remedy}")
    try:
        open_cuda(0)
    except ConfigError as error:
        raise TierError(f"bench device: {error}") from error
    found = torch.cuda.get_device_properties(0)
    return {
        "gpu": found.name,
        "gpu_bytes": found.total_memory,
        "compute_capability": f"{found.major}.{found.minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def run(lab: Lab, begin: Callable[[str], None]) -> None:
    """Measure all parts; `begin` is told of each."""
    begin("copies on the card")
    lab.add("copy on the card, read and written", lab.copy_gbps(), "GB/s")
    for name, part in PARTS.items():
        begin(name)
        part(lab)
