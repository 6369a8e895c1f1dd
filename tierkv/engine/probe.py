"""A model is tried before it is trusted: eight tokens through pages, in two steps, against its own attention.

Whatever a model keeps between tokens besides the K and V of its attention function, or does with positions and masks
that packing breaks, shows here as different logits, and is refused instead of answering wrongly later.
"""

from array import array
from typing import Final

import torch

from tierkv.engine.loading import Model
from tierkv.engine.runner import ATTENTION, Runner, register
from tierkv.engine.sampling import SamplingParams
from tierkv.engine.scheduler import Work
from tierkv.engine.sequence import Request, Sequence
from tierkv.engine.text import TextStream
from tierkv.errors import ModelError
from tierkv.layout import Layout

_TOLERANCE: Final = {"float32": 2e-3, "bfloat16": 0.1, "float16": 0.05}  # of the logits' norm


def attach(model: Model, layout: Layout, device: torch.device) -> None:
    """Put a model on paged attention. Raises ModelError, and leaves the model as it was, if that changes its logits."""
    kind = type(model).__name__
    before = model.config._attn_implementation
    tokens = [(7 * number + 3) % model.config.get_text_config().vocab_size for number in range(8)]
    register()
    try:
        model.set_attn_implementation("eager")
        with torch.inference_mode():
            ids = torch.tensor([tokens], device=device)
            expected = model(input_ids=ids, use_cache=False).logits[0, -1].float()
        model.set_attn_implementation(ATTENTION)
        got = _paged(model, layout, device, tokens)
        error = float((got - expected).norm() / expected.norm().clamp_min(1e-6))
        if not error <= _TOLERANCE[layout.dtype]:  # so that NaN is refused too
            raise ModelError(
                f"{kind}: its logits on pages differ from its own by {error:.2g} of their norm; not supported"
            )
    except ModelError:
        model.set_attn_implementation(before)
        raise
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        model.set_attn_implementation(before)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{kind}: cannot run on pages: {reason}") from error


def _paged(model: Model, layout: Layout, device: torch.device, tokens: list[int]) -> torch.Tensor:
    num_pages = -(-len(tokens) // layout.block_tokens)
    pool = torch.zeros((num_pages, *layout.shape), dtype=getattr(torch, layout.dtype), device=device)
    runner = Runner(model, pool)
    request = Request("probe", SamplingParams(), len(tokens), 0, len(tokens), 0.0)
    text = TextStream(None, (), skip_special_tokens=True)
    sequence = Sequence("probe", request, 0, 0, array("i", tokens), text, pages=list(range(num_pages)))
    runner.run([Work(sequence, 5)])
    sequence.num_computed = 5
    return runner.run([Work(sequence, 3)])[0].float()
