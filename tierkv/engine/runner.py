"""One step of a model: the work of a step becomes index arithmetic, a forward pass, and one row of logits per sequence.

The model is transformers' own. All sequences are packed as one row of tokens with explicit positions; transformers
calls `_attend` in every layer, which writes K and V into pages and attends to pages.
"""

from collections.abc import Sequence as List
from typing import Any, Final

import numpy as np
import torch

from tierkv.arrival import Arrival
from tierkv.engine.graphs import DecodeGraphs, GraphFactory
from tierkv.engine.packing import Inputs, Packer, batch_of, fields
from tierkv.engine.scheduler import Work
from tierkv.engine.staging import Link, Staging
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
    rests: loads whose later layers are still coming; a layer waits for its own.
    """

    __slots__ = ("batch", "calls", "is_first", "layers", "rests")

    def __init__(
        self, layers: List[torch.Tensor], batch: PagedBatch, *, is_first: bool, rests: List[Arrival] = ()
    ) -> None:
        self.layers, self.batch, self.is_first, self.rests = layers, batch, is_first, rests
        self.calls = 0


class Runner:
    """A model on a page pool. pool: `[num_pages, num_layers, 2, num_kv_heads, block_tokens, head_dim]`.

    Nothing in a step waits for the device. graphs: made by `use_graphs`; None while every step runs as it comes.
    link: as of `Staging`.
    """

    def __init__(
        self, model: Any, pool: torch.Tensor, *, link: Link | None = None
    ) -> None:  # Any: transformers is untyped here
        self._model, self._pool = model, pool
        self._layers = list(pool.unbind(1))
        self._is_first = True
        self._packer = Packer(pool.shape[4])
        self._staging, self._link = Staging(pool.device, link=link), link
        self._scratch: list[torch.Tensor] = []
        self.graphs: DecodeGraphs | None = None
        self.num_replays = 0

    @torch.inference_mode()
    def use_graphs(self, make_graph: GraphFactory, *, max_sequences: int, max_context: int) -> None:
        """Record decode steps, to be replayed from now on. Raises RuntimeError where the model cannot be recorded."""
        graphs = DecodeGraphs(
            self._forward,
            self._packer,
            self._pool,
            make_graph,
            max_sequences=max_sequences,
            max_context=max_context,
            link=self._link,
        )
        graphs.record()
        self.graphs = graphs

    @torch.inference_mode()
    def run(self, work: List[Work]) -> torch.Tensor:
        """Compute the KV of the work's tokens; returns logits after the last token of each, [len(work), vocabulary].

        They are good until the next call.
        """
        arrivals = [item.sequence.rest for item in work if item.sequence.rest is not None]
        if self.graphs is not None and self.graphs.takes(work) and not arrivals:
            self.num_replays += 1
            return self.graphs.run(work)
        num_rows, num_tokens = len(work), sum(item.num_tokens for item in work)
        needed = fields(num_sequences=num_rows, num_tokens=num_tokens, width=self._packer.width(work))
        laid = self._staging.lay([("int64", (num_rows,)), *needed])
        arrays = Inputs(*laid.host[1:])
        spans = self._packer.fill(work, arrays)
        np.subtract(arrays.bounds[1:], 1, out=laid.host[0])
        self._staging.send()
        inputs = Inputs(*laid.device[1:])
        return self._forward(inputs, batch_of(inputs, spans, scratch=self._scratch), laid.device[0], arrivals)

    def _forward(
        self,
        inputs: Inputs[torch.Tensor],
        batch: PagedBatch,
        last: torch.Tensor,
        arrivals: List[Arrival] = (),
    ) -> torch.Tensor:
        """Logits of the tokens `last`, [len(last), vocabulary]."""
        batch.alike = not self._is_first
        step = Step(self._layers, batch, rests=arrivals, is_first=self._is_first)
        output = self._model(
            input_ids=inputs.tokens[None],
            position_ids=inputs.positions[None],
            use_cache=False,
            logits_to_keep=last,
            paged=step,
        )
        if step.calls != len(self._layers):
            raise ModelError(
                f"{type(self._model).__name__} made {step.calls} calls of the attention function for "
                f"{len(self._layers)} layers: its layers do not all keep their state as KV"
            )
        self._is_first = False
        logits: torch.Tensor = output.logits[0]
        return logits


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
    for rest in paged.rests:
        rest.wait(module.layer_idx)  # type: ignore[arg-type]  # an int on every attention module
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
