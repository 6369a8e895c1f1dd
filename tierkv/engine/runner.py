"""One step of a model: the work of a step becomes index arithmetic, a forward pass, and one row of logits per sequence.

The model is transformers' own. All sequences are packed as one row of tokens with explicit positions; transformers
calls `_attend` in every layer, which writes K and V into pages and attends to pages.
"""

from collections.abc import Sequence as List
from typing import Any, Final

import numpy as np
import torch

from tierkv.engine.scheduler import Work
from tierkv.errors import ModelError
from tierkv.kernels.attention import paged_attention
from tierkv.kernels.batch import PagedBatch
from tierkv.kernels.pages import write_kv

ATTENTION: Final = "tierkv_paged"

# What models pass to an attention function besides the tensors, and that changes nothing here or is obeyed.
_KNOWN: Final = frozenset(
    {
        "attention_mask",
        "cache_position",
        "deterministic",
        "dropout",
        "is_causal",
        "logits_to_keep",
        "past_key_values",
        "position_ids",
        "use_cache",
    }
)


class Step:
    """What `_attend` needs of a step; travels through the model as the keyword `paged`.

    layers: one strided view of the pool per layer, `[num_pages, 2, num_kv_heads, block_tokens, head_dim]`.
    is_first: look at what the model passes; it passes the same ever after.
    """

    __slots__ = ("batch", "calls", "is_first", "layers")

    def __init__(self, layers: List[torch.Tensor], batch: PagedBatch, *, is_first: bool) -> None:
        self.layers, self.batch, self.is_first = layers, batch, is_first
        self.calls = 0


class Runner:
    """A model on a page pool. pool: `[num_pages, num_layers, 2, num_kv_heads, block_tokens, head_dim]`."""

    def __init__(self, model: Any, pool: torch.Tensor) -> None:  # Any: transformers is untyped here
        self._model, self._pool = model, pool
        self._layers = list(pool.unbind(1))
        self._is_first = True
        self._block_tokens = pool.shape[4]
        self._scratch: list[torch.Tensor] = []

    @torch.inference_mode()
    def run(self, work: List[Work]) -> torch.Tensor:
        """Compute the KV of the work's tokens; returns logits after the last token of each, [len(work), vocabulary]."""
        tokens, positions, batch, last = self._pack(work)
        step = Step(self._layers, batch, is_first=self._is_first)
        output = self._model(input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=last, paged=step)
        if step.calls != len(self._layers):
            raise ModelError(
                f"{type(self._model).__name__} made {step.calls} calls of the attention function for "
                f"{len(self._layers)} layers: its layers do not all keep their state as KV"
            )
        self._is_first = False
        logits: torch.Tensor = output.logits[0]
        return logits

    def _pack(self, work: List[Work]) -> tuple[torch.Tensor, torch.Tensor, PagedBatch, torch.Tensor]:
        counts = np.fromiter((item.num_tokens for item in work), np.int64, len(work))
        starts = np.fromiter((item.sequence.num_computed for item in work), np.int64, len(work))
        bounds = np.zeros(len(work) + 1, np.int32)
        np.cumsum(counts, out=bounds[1:])
        lengths = starts + counts
        tables = np.zeros((len(work), -(-int(lengths.max()) // self._block_tokens)), np.int32)
        tokens = np.empty(int(bounds[-1]), np.int64)
        for row, item in enumerate(work):
            sequence, begin = item.sequence, item.sequence.num_computed
            tokens[bounds[row] : bounds[row + 1]] = sequence.tokens[begin : begin + item.num_tokens]
            used = -(-int(lengths[row]) // self._block_tokens)
            tables[row, :used] = sequence.pages[:used]
        owner = np.repeat(np.arange(len(work)), counts)
        positions = np.arange(len(tokens)) + (starts - bounds[:-1])[owner]
        slots = tables[owner, positions // self._block_tokens].astype(np.int64) * self._block_tokens
        slots += positions % self._block_tokens
        batch = PagedBatch(
            self._send(slots),
            self._send(tables),
            self._send(lengths.astype(np.int32)),
            self._send(bounds),
            spans=list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), lengths.tolist(), strict=True)),
            scratch=self._scratch,
        )
        return self._send(tokens)[None], self._send(positions)[None], batch, self._send(bounds[1:].astype(np.int64) - 1)

    def _send(self, values: "np.ndarray[Any, Any]") -> torch.Tensor:
        return torch.from_numpy(values).to(self._pool.device, non_blocking=True)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    paged: Step | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,  # whatever transformers passes on; what is not known here is refused below
) -> tuple[torch.Tensor, None]:
    """The attention function transformers calls: query [1, num_heads, tokens, head_dim], key and value alike."""
    if paged is None:
        raise ModelError(f"{type(module).__name__} does not pass keyword arguments on to its attention")
    if paged.is_first:
        _check_call(module, key, value, others)
    paged.calls += 1
    pages = paged.layers[module.layer_idx]  # type: ignore[call-overload]  # an int on every attention module
    k, v = key[0], value[0]
    write_kv(k, v, pages, paged.batch)
    out = paged_attention(
        query[0],
        k,
        v,
        pages,
        paged.batch,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None], None


def _check_call(module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor, others: dict[str, Any]) -> None:
    unknown = [
        name
        for name, given in others.items()
        if given is not None and name not in _KNOWN and not name.startswith("output_")
    ]
    if unknown:
        raise ModelError(f"{type(module).__name__} asks its attention for {', '.join(unknown)}: not supported on pages")
    if others.get("is_causal") is False:
        raise ModelError(f"{type(module).__name__} attends in both directions: its KV is not that of a prefix")
    if key.shape != value.shape:
        raise ModelError(
            f"{type(module).__name__} has K of {tuple(key.shape)} and V of {tuple(value.shape)}: not supported on pages"
        )


def register() -> None:
    """Make the attention function known to transformers; again is fine."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)
