"""Sequences with KV in pages that lie in random order, and dense attention in float64 to compare with."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tierkv.kernels.batch import PagedBatch

SCALE = 0.3
LAYERS, LAYER = 3, 1
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass
class AttentionCase:
    """past: tokens of each sequence written before.  fresh: those of this step; 0 is a sequence that only waits.

    Whatever is not written is NaN, and so is the KV of other layers: attention must not look at it, not even with weight
    zero. Table entries that no query may follow are -1.
    value_dim: not None makes the pages hold latents (parts = 1), whose first elements are the value.
    codes: None, or the dtype of quantised pages.
    """

    past: list[int]
    fresh: list[int]
    num_heads: int = 6
    kv_heads: int = 2
    head_dim: int = 8
    block_tokens: int = 4
    dtype: torch.dtype = torch.float32
    codes: torch.dtype | None = None
    value_dim: int | None = None
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    shared_pages: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed + sum(self.past) + 31 * sum(self.fresh))
        lengths = [past + fresh for past, fresh in zip(self.past, self.fresh, strict=True)]
        self.lengths = lengths

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        self.parts = 2 if self.value_dim is None else 1
        self.sinks = normal(self.num_heads) if self.has_sinks else None
        blocks = [-(-length // self.block_tokens) for length in lengths]
        num_pages = sum(blocks) + 3
        order = torch.randperm(num_pages, generator=generator).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in blocks]
        for table in self.tables[1:]:  # a prefix that several sequences read from the same pages
            table[: self.shared_pages] = self.tables[0][: self.shared_pages]
        shape = (num_pages, LAYERS, self.parts, self.kv_heads, self.block_tokens, self.head_dim)
        states = normal(*shape)
        self.scales: torch.Tensor | None = None
        if self.codes is not None:
            # As the model would find them: its states are what the codes are worth.
            scales = torch.rand(shape[:-1], generator=generator) * 0.05 + 0.01
            if self.codes == torch.float8_e4m3fn:  # one per layer, part and head, for all pages and tokens
                scales = scales[:1, ..., :1].expand(shape[:-1])
            limit = 448 if self.codes == torch.float8_e4m3fn else 127
            codes = (states.float() / scales[..., None]).clamp(-limit, limit)
            codes = codes.round().to(torch.int8) if self.codes == torch.int8 else codes.to(self.codes)
            states = (codes.float() * scales[..., None]).to(self.dtype)
            self.scales = scales[:, LAYER]
            self.pool = codes
        else:
            self.pool = states.clone()
        self.pages = self.pool[:, LAYER]
        self.states = [
            self._states(states[:, LAYER], table, length) for table, length in zip(self.tables, lengths, strict=True)
        ]
        self._poison()
        self.query = normal(self.num_heads, sum(self.fresh), self.head_dim)

    def _states(self, pages: torch.Tensor, table: list[int], length: int) -> torch.Tensor:
        """[parts, kv_heads, length, head_dim] of a sequence, token by token."""
        rows = [pages[table[t // self.block_tokens], :, :, t % self.block_tokens] for t in range(length)]
        return torch.stack(rows, dim=2) if rows else pages.new_empty(self.parts, self.kv_heads, 0, self.head_dim)

    def _poison(self) -> None:
        """NaN wherever no sequence of the case has a token that a query may see; int8 has none: its scales take it."""
        seen = torch.zeros(self.pool.shape[0], self.block_tokens, dtype=torch.bool)
        for table, past, length in zip(self.tables, self.past, self.lengths, strict=True):
            first = 0 if self.window is None else max(0, past + 1 - self.window)
            for token in range(first if length > past else length, length):
                seen[table[token // self.block_tokens], token % self.block_tokens] = True
        hidden = ~seen[:, None, None, :].expand(self.pages.shape[:-1])
        others = [layer for layer in range(LAYERS) if layer != LAYER]
        if self.codes == torch.int8:
            assert self.scales is not None
            self.scales = self.scales.clone().masked_fill_(hidden, float("nan"))
        else:
            nan = torch.full((1,), float("nan")).to(self.pool.dtype).view(BITS[self.pool.element_size()])
            bits = self.pool.view(nan.dtype)
            bits[:, LAYER][hidden] = nan
            bits[:, others] = nan
        for number, past in enumerate(self.past):
            first = 0 if self.window is None else max(0, past + 1 - self.window)
            for index in range(min(first // self.block_tokens, len(self.tables[number]))):
                self.tables[number][index] = -1

    def batch(self, device: str = "cpu") -> PagedBatch:
        width = max(1, *map(len, self.tables))
        slots = [
            table[token // self.block_tokens] * self.block_tokens + token % self.block_tokens
            for table, past, length in zip(self.tables, self.past, self.lengths, strict=True)
            for token in range(past, length)
        ]
        tables = torch.full((len(self.tables), width), -1, dtype=torch.int32)
        for row, table in zip(tables, self.tables, strict=True):
            row[: len(table)] = torch.tensor(table, dtype=torch.int32)
        return PagedBatch(
            torch.tensor(slots).to(device),
            tables.to(device),
            torch.tensor(self.lengths, dtype=torch.int32).to(device),
            torch.tensor([0, *itertools.accumulate(self.fresh)], dtype=torch.int32).to(device),
        )

    def fresh_states(self, part: int) -> torch.Tensor:
        """[kv_heads, tokens, head_dim] of the step."""
        return torch.cat([state[part, :, past:] for state, past in zip(self.states, self.past, strict=True)], dim=1)

    @property
    def options(self) -> dict[str, Any]:
        return {"scale": SCALE, "window": self.window, "softcap": self.softcap}

    def run(self, attention: Callable[..., torch.Tensor], device: str = "cpu") -> torch.Tensor:
        """Through `paged_attention`, or `latent_attention` where the case has latents."""

        def there(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        pages = self.pool.to(device)[:, LAYER]  # strided as in an engine
        options = self.options | {"sinks": there(self.sinks), "scales": there(self.scales)}
        query, batch = self.query.to(device), self.batch(device)
        if self.value_dim is not None:
            return attention(query, pages, batch, value_dim=self.value_dim, **options).cpu()
        key, value = self.fresh_states(0).to(device), self.fresh_states(1).to(device)
        return attention(query, key, value, pages, batch, **options).cpu()

    def dense(self) -> torch.Tensor:
        """[tokens, num_heads, head_dim or value_dim] in float64."""
        rows, at = [], 0
        group = self.num_heads // self.kv_heads
        for states, past, fresh in zip(self.states, self.past, self.fresh, strict=True):
            key, value = states[0].double(), states[-1].double()[..., : self.value_dim]
            query = self.query[:, at : at + fresh].double()
            scores = query @ key.repeat_interleave(group, 0).transpose(1, 2) * SCALE
            if self.softcap is not None:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            places, seen = torch.arange(past, past + fresh)[:, None], torch.arange(past + fresh)
            hidden = seen > places
            if self.window is not None:
                hidden = hidden | (seen <= places - self.window)
            scores = scores.masked_fill(hidden, float("-inf"))
            if self.sinks is not None:
                scores = torch.cat((scores, self.sinks.double()[:, None, None].expand(-1, fresh, 1)), -1)
            weights = torch.softmax(scores, -1)[..., : past + fresh]
            rows.append((weights @ value.repeat_interleave(group, 0)).transpose(0, 1))
            at += fresh
        return torch.cat(rows)


MIXES: dict[str, tuple[list[int], list[int]]] = {
    "decode": ([5, 11, 0], [1, 1, 1]),
    "first chunks": ([0, 0], [7, 4]),
    "later chunks": ([4, 9], [6, 3]),
    "a chunk of many queries": ([7, 2], [600, 1]),
    "all at once": ([0, 17, 3, 8, 0], [5, 1, 6, 4, 1]),
}
"""past and fresh of an `AttentionCase`, by what a step holds."""

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 5},
    "window of one": {"window": 1},
    "softcap": {"softcap": 1.5},
    "sinks": {"has_sinks": True},
    "everything": {"window": 6, "softcap": 2.0, "has_sinks": True},
}
"""Further arguments of an `AttentionCase`."""
