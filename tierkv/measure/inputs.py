"""Inputs of the attention benchmarks: one layer's worth of KV per call, in a pool of as many layers as the card has room for."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

from tierkv.kernels.batch import PagedBatch
from tierkv.measure.lab import Lab, Tensor

PAGE: Final = 16


@dataclass(frozen=True)
class Model:
    """heads, kv_heads, head_dim of attention; value_dim where K and V are one latent."""

    heads: int
    kv_heads: int
    dim: int
    value_dim: int | None = None

    @property
    def parts(self) -> int:
        """K and V, or one latent."""
        return 1 if self.value_dim else 2

    @property
    def scale(self) -> float:
        """Of query times key."""
        return math.sqrt(1 / (192 if self.value_dim else self.dim))

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Of KV in one layer, with the scales that int8 has."""
        rows = self.parts * self.kv_heads
        return rows * self.dim * dtype.itemsize + (rows * 4 if dtype == torch.int8 else 0)


LLAMA: Final = Model(heads=32, kv_heads=8, dim=128)  # Llama 3 8B
MLA: Final = Model(heads=128, kv_heads=1, dim=576, value_dim=512)  # DeepSeek V3
TINY: Final = Model(heads=4, kv_heads=2, dim=64)
TINY_MLA: Final = Model(heads=4, kv_heads=1, dim=48, value_dim=32)


class Paged:
    """A filled pool, its pages dealt at random to sequences of `lengths`, and one step of `queries` tokens of each."""

    def __init__(
        self,
        lab: Lab,
        model: Model,
        lengths: Sequence[int],
        *,
        queries: Sequence[int] | None = None,
        dtype: torch.dtype,
        layers: int = 32,
    ) -> None:
        self.model, self.dtype = model, dtype
        self.queries = list(queries or [1] * len(lengths))
        counts = [-(-length // PAGE) for length in lengths]
        num_pages = sum(counts)
        self.layers = lab.pick(_room(lab, layers, num_pages * PAGE * model.token_bytes(dtype)), 2)
        shape = (num_pages, self.layers, model.parts, model.kv_heads, PAGE, model.dim)
        self.pool, self.scales = _filled(shape, dtype, lab.device)
        order = torch.randperm(num_pages, device=lab.device, dtype=torch.int32)
        tables = torch.zeros((len(lengths), max(counts)), dtype=torch.int32, device=lab.device)
        for row, pages in zip(tables, torch.split(order, counts), strict=True):
            row[: len(pages)] = pages
        self.batch = _batch(tables, lengths, self.queries)
        tokens = sum(self.queries)
        self.query = [
            torch.randn((tokens, model.heads, model.dim), device=lab.device).to(torch.bfloat16).transpose(0, 1)
            for _ in range(min(4, self.layers))
        ]

    def layer(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Pages of a layer and their scales."""
        number %= self.layers
        return self.pool[:, number], None if self.scales is None else self.scales[:, number]

    def calls(self, lab: Lab, count: int = 8) -> list[Callable[[], Tensor]]:
        """Attention of the step, in up to `count` layers, each with its own pages."""
        return [self._call(lab, number) for number in range(min(count, self.layers))]

    def _call(self, lab: Lab, number: int) -> Callable[[], Tensor]:
        pages, scales = self.layer(number)
        query = self.query[number % len(self.query)]
        if self.model.value_dim:
            run = partial(lab.kernel("attention", "latent_attention"), query, pages, self.batch)
            return partial(run, value_dim=self.model.value_dim, scale=self.model.scale, scales=scales)
        page, offset = self.batch.slots // PAGE, self.batch.slots % PAGE
        new = _at(pages, page, slice(None), slice(None), offset).float()
        if scales is not None:
            new *= scales[page, :, :, offset][..., None]
        key, value = new.to(query.dtype).permute(1, 2, 0, 3)
        run = partial(lab.kernel("attention", "paged_attention"), query, key, value, pages, self.batch)
        return partial(run, scale=self.model.scale, scales=scales)

    @property
    def kv_bytes(self) -> int:
        """That one call has to read: every token of every sequence once."""
        return sum(length for _, _, length in self.batch.spans) * self.model.token_bytes(self.dtype)

    def contiguous(self, number: int, sequence: int) -> Tensor:
        """[parts, kv_heads, length, dim] float64: what the pages of a sequence hold."""
        pages, scales = self.layer(number)
        length = self.batch.spans[sequence][2]
        rows = self.batch.tables[sequence, : -(-length // PAGE)].long()
        values = _at(pages, rows).double()
        if scales is not None:
            values *= scales[rows].double()[..., None]
        return values.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]

    def reference(self, number: int) -> Tensor:
        """[tokens, heads, value_dim] in float64, one sequence after the other."""
        query = self.query[number % len(self.query)].double()
        outs = []
        for sequence, (first, last, _) in enumerate(self.batch.spans):
            states = self.contiguous(number, sequence)
            key, value = states[0], states[-1][..., : self.model.value_dim]
            outs.append(attention(query[:, first:last], key, value, scale=self.model.scale))
        return torch.cat(outs)


def attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Causal, the last query sees the last key. query: [heads, q, dim]; key, value: [kv_heads, n, dim] -> [q, heads, dim]."""
    group = query.shape[0] // key.shape[0]
    length, count = key.shape[1], query.shape[1]
    places = torch.arange(length - count, length, device=query.device)
    hidden = torch.arange(length, device=query.device)[None, :] > places[:, None]
    out = query.new_empty(count, query.shape[0], value.shape[2])
    for head in range(query.shape[0]):  # one at a time: 1k x 32k scores in float64 take 256 MiB
        scores = query[head] @ key[head // group].T * scale
        weights = torch.softmax(scores.masked_fill_(hidden, float("-inf")), dim=-1)
        out[:, head] = weights @ value[head // group]
    return out


def _at(pages: Tensor, *index: Tensor | slice) -> Tensor:
    """pages[index]; by bytes for fp8, which not every operation of torch takes."""
    return (pages.view(torch.uint8)[index] if pages.dtype == torch.float8_e4m3fn else pages[index]).view(pages.dtype)


def _room(lab: Lab, layers: int, layer_bytes: int) -> int:
    """As many layers as the engine's pool would have, where they fit in half of the free memory."""
    if lab.rehearsing:
        return layers
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(layers, free // 2 // layer_bytes))


def _filled(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Random pages, and the scales they need to be worth about N(0, 1)."""
    if dtype == torch.int8:
        pool = torch.randint(-127, 128, shape, dtype=dtype, device=device)
        return pool, torch.rand(shape[:-1], device=device) * 0.02 + 0.005
    if dtype == torch.float8_e4m3fn:
        codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        codes &= 0xBF  # |value| < 2, and so no NaN
        per_head = torch.rand(shape[1:4], device=device) + 0.5
        return codes.view(dtype), per_head[None, ..., None].expand(shape[:-1])
    return torch.empty(shape, dtype=dtype, device=device).normal_(), None


def _batch(tables: Tensor, lengths: Sequence[int], queries: Sequence[int]) -> PagedBatch:
    bounds = [0]
    for count in queries:
        bounds.append(bounds[-1] + count)
    slots = []
    for row, length, count in zip(tables, lengths, queries, strict=True):
        at = torch.arange(length - count, length, device=tables.device)
        slots.append(row[at // PAGE].long() * PAGE + at % PAGE)
    return PagedBatch(
        slots=torch.cat(slots),
        tables=tables,
        lengths=torch.tensor(lengths, dtype=torch.int32, device=tables.device),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=tables.device),
        spans=list(zip(bounds[:-1], bounds[1:], lengths, strict=True)),
    )
