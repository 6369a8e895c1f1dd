"""Computes some blocks of a pack anew, with the model at hand, and tells how far they are from those in the pack.

KV is not the same to the last bit on another machine, nor in other chunks: it is compared within a tolerance, block by block.
The error of a block is |found - computed| / |computed|, Euclidean norms over all of its elements; the KV of other tokens, or of
another model, is about 1 away.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Final

import numpy as np

from tierkv.assembly import LoadedModel
from tierkv.engine import Engine, PrivatePages, SamplingParams
from tierkv.layout import TOKEN_BYTES
from tierkv.packs.pack import Pack
from tierkv.warm.run import tokens_of

TOLERANCE: Final = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""Chunks of another size move a block by 5e-7 in float32 and 9e-3 in bfloat16 (SmolLM2, 2-core AMD EPYC VM, 2026-11-30)."""
SAMPLE_BLOCKS: Final = 64
SAMPLE_PATHS: Final = 4


@dataclass(frozen=True, slots=True)
class Recomputed:
    """Rows that were computed anew, their largest error, and those beyond the tolerance."""

    rows: tuple[int, ...]
    error: float
    tolerance: float
    beyond: tuple[int, ...]


class _Kept(PrivatePages):
    """Pages whose blocks are copied aside as they become full."""

    def __init__(self, layout: Any, device: Any, *, num_pages: int) -> None:  # Any: as in PrivatePages
        super().__init__(layout, device, num_pages=num_pages)
        self.blocks: list[Any] = []  # Any: tensors

    def save(self, request: str, tokens: bytes, pages: Sequence[int]) -> list[bool]:
        """Copy the new ones."""
        self.blocks += [self.pool[page].float().cpu().numpy() for page in pages[len(self.blocks) :]]
        return super().save(request, tokens, pages)


def recompute(
    loaded: LoadedModel,
    pack: Pack,
    *,
    seed: int = 0,
    num_blocks: int = SAMPLE_BLOCKS,
    progress: Callable[[int], None] = lambda blocks: None,
) -> Recomputed:
    """Compute the paths of some random rows anew, and compare some random blocks of each. progress: told of blocks.

    loaded: with `build_config`, of the pack's model and layout. Blocks that the pack cannot give count as beyond every tolerance.
    """
    random = Random(seed)
    ends = random.sample(range(pack.num_blocks), min(SAMPLE_PATHS, pack.num_blocks))
    tolerance = TOLERANCE.get(pack.layout.dtype, max(TOLERANCE.values()))
    rows: dict[int, float] = {}
    for end in ends:
        path = pack.path(end)
        chosen = sorted(random.sample(range(len(path)), min(-(-num_blocks // len(ends)), len(path))))
        computed = _compute(loaded, pack, path)
        views = [memoryview(bytearray(pack.layout.block_bytes)) for _ in chosen]
        wrong = pack.read([path[at] for at in chosen], views)
        for at, view, why in zip(chosen, views, wrong, strict=True):
            error = float("inf") if why is not None else _error(_floats(view, pack), computed[at])
            rows[path[at]] = max(error, rows.get(path[at], 0.0))
        progress(len(chosen))
    beyond = tuple(sorted(row for row, error in rows.items() if not error <= tolerance))
    return Recomputed(tuple(sorted(rows)), max(rows.values(), default=0.0), tolerance, beyond)


def _compute(loaded: LoadedModel, pack: Pack, path: Sequence[int]) -> list[Any]:  # Any: arrays
    tokens = pack.tokens[list(path)].astype("<i4").tobytes()
    made: list[_Kept] = []

    def connect(layout: Any, device: Any, model: str) -> _Kept:  # Any: as in ConnectorFactory
        made.append(_Kept(layout, device, num_pages=len(path) + 2))
        return made[0]

    config = replace(loaded.config, num_pages=None, pool_bytes=None)
    with Engine(loaded.weights, None, config, connector=connect) as engine:
        engine.generate([tokens_of(tokens)], SamplingParams(max_tokens=1, ignore_eos=True))
    assert len(made[0].blocks) == len(tokens) // TOKEN_BYTES // pack.layout.block_tokens, "every whole block is offered"
    return made[0].blocks


def _floats(block: memoryview, pack: Pack) -> Any:  # Any: an array
    dtype, shape = pack.layout.dtype, pack.layout.shape
    if dtype == "bfloat16":  # the upper half of a float32
        return (np.frombuffer(block, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(block, np.dtype(dtype)).astype(np.float32).reshape(shape)


def _error(found: Any, computed: Any) -> float:  # Any: arrays
    scale = float(np.linalg.norm(computed))
    away = float(np.linalg.norm(found - computed))
    return away / scale if scale else away
