"""How much of a GPU is left for pages: of its share, what the weights, the largest step and everybody else do not take."""

from array import array
from dataclasses import dataclass
from typing import Final

import torch

from tierkv.engine.config import EngineConfig
from tierkv.engine.loading import Model
from tierkv.engine.runner import Runner
from tierkv.engine.sampling import Draw, SamplingParams, sample
from tierkv.engine.scheduler import Work
from tierkv.engine.sequence import Request, Sequence
from tierkv.engine.text import TextStream
from tierkv.errors import ConfigError
from tierkv.layout import Layout

_HARDEST: Final = SamplingParams(temperature=1.0, top_p=0.9)


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of one GPU before there are pages.

    free: of the whole card, whoever uses the rest.  weights: of this engine's model, part of what is used.  step: taken besides
    by the largest step, and given back after it.  graphs: kept for recorded decode steps.
    """

    total: int
    free: int
    weights: int
    step: int
    graphs: int


def left_for_pages(usage: Usage, *, utilization: float, least: int) -> int:
    """Bytes of pages with which `utilization` of the card is in use. Raises ConfigError where that is less than `least`."""
    share, taken = int(usage.total * utilization), usage.total - usage.free
    left = share - taken - usage.step - usage.graphs
    if left < least:
        raise ConfigError(
            f"no room for pages on this GPU: {_gib(utilization * usage.total)} (gpu_memory_utilization = {utilization:g} of "
            f"{_gib(usage.total)}) less {_gib(usage.weights)} of weights, {_gib(taken - usage.weights)} of other engines, "
            f"other processes and CUDA itself, {_gib(usage.step)} for a step and {_gib(usage.graphs)} for CUDA graphs leaves "
            f"{_gib(left)}, and {_gib(least)} is the least; raise gpu_memory_utilization, which counts what all of them use, end "
            "others or give them less, lower max_batch_tokens or max_sequences, or take a smaller dtype or model"
        )
    return left


def pool_bytes(model: Model, layout: Layout, device: torch.device, config: EngineConfig) -> int:
    """Bytes of pages for a model that is attached, on a CUDA device; runs its largest step.

    At least the pages of one such step must fit. Raises ConfigError where they do not, or the step itself does not.
    """
    least = -(-config.max_batch_tokens // layout.block_tokens) * layout.block_bytes
    try:
        usage = _measure(model, layout, device, config)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a step of max_batch_tokens = {config.max_batch_tokens} does not fit this GPU beside the weights: "
            f"{str(error).splitlines()[0]}; lower it, end other processes, or take a smaller dtype or model"
        ) from error
    return left_for_pages(usage, utilization=config.gpu_memory_utilization, least=least)


def _measure(model: Model, layout: Layout, device: torch.device, config: EngineConfig) -> Usage:
    count, pool = (
        config.max_sequences,
        torch.zeros((1, *layout.shape), dtype=getattr(torch, layout.dtype), device=device),
    )
    each, more = divmod(config.max_batch_tokens, count)
    step = _peak(model, pool, [each + (number < more) for number in range(count)])
    graphs = 0 if config.cuda_graphs == "off" else _peak(model, pool, [1] * count)
    del pool
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return Usage(total, free, weights, step, graphs)


def _peak(model: Model, pool: torch.Tensor, counts: list[int]) -> int:
    """Bytes that a step of sequences with so many tokens takes at most. They all lie in one page: nobody reads what comes."""
    torch.cuda.synchronize(pool.device)
    torch.cuda.reset_peak_memory_stats(pool.device)
    before = torch.cuda.memory_allocated(pool.device)
    rows = [Work(_sequence(number, count, pool.shape[4]), count) for number, count in enumerate(counts)]
    sample(Runner(model, pool).run(rows), [Draw(_HARDEST, 0, 0, 0)] * len(rows))
    torch.cuda.synchronize(pool.device)
    return torch.cuda.max_memory_allocated(pool.device) - before


def _sequence(number: int, num_tokens: int, block_tokens: int) -> Sequence:
    name = f"measure-{number}"
    request = Request(name, _HARDEST, num_tokens, 0, num_tokens, 0.0)
    text = TextStream(None, (), skip_special_tokens=True)
    pages = [0] * -(-num_tokens // block_tokens)
    return Sequence(name, request, 0, number, array("i", [0] * num_tokens), text, pages=pages)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
