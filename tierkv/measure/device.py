"""What `tierkv bench device` measures: transfers, kernels, and an engine with its store, each against its limit."""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch

from tierkv.errors import ConfigError, TierError
from tierkv.measure import attention, moves, reuse, steps, transfers
from tierkv.measure.lab import Lab
from tierkv.measure.serving import LLAMA_1B, LLAMA_8B, TINY, Shape, llama
from tierkv.tiers.device_cuda import open_cuda


class Part(NamedTuple):
    """What can be asked for by name. about: for people.  run: adds rows; the shape is that of an engine's model."""

    about: str
    run: Callable[[Lab, Shape], object]


def _plain(run: Callable[[Lab], object]) -> Callable[[Lab, Shape], object]:
    return lambda lab, shape: run(lab)


def _with_model(run: Callable[[Lab, Any, Shape], object]) -> Callable[[Lab, Shape], object]:
    # Any: a transformers model, untyped here. It lives as long as its part.
    return lambda lab, shape: run(lab, llama(lab, shape, torch.bfloat16), shape)


PARTS: Final[dict[str, Part]] = {
    "transfers": Part("transfers between host and device", _plain(transfers.run)),
    "attention": Part("attention", _plain(attention.run)),
    "moves": Part("pages, blocks and codes", _plain(moves.run)),
    "decode": Part("decode steps", _with_model(steps.run_decode)),
    "prefix": Part("a prefix from host and disk", _with_model(reuse.run_prefixes)),
    "store": Part("what a store costs an engine", _with_model(steps.run_beside)),
    "identity": Part("what comes back from the tiers", _plain(reuse.run_identity)),
}
SMALL: Final = LLAMA_1B
FULL: Final = LLAMA_8B


def chosen(names: str | None) -> list[str]:
    """Parts of a list such as "transfers,decode", in the order in which they are measured; all when None. Raises ConfigError."""
    if names is None:
        return list(PARTS)
    asked = [name.strip() for name in names.split(",")]
    unknown = [name for name in asked if name not in PARTS]
    if unknown:
        raise ConfigError(f"--parts {names}: there is no part {unknown[0]!r}; give some of {','.join(PARTS)}")
    return [name for name in PARTS if name in asked]


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


def run(lab: Lab, names: Sequence[str], shape: Shape, begin: Callable[[str], None]) -> None:
    """Measure parts of these names; `begin` is told of each. shape: of the model that engines run."""
    begin("copies on the card")
    lab.add("copy on the card, read and written", lab.copy_gbps(), "GB/s")
    shape = lab.pick(shape, TINY)
    for part in (PARTS[name] for name in names):
        begin(part.about)
        with lab.attempt(part.about):
            part.run(lab, shape)
