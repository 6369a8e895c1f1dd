"""Attention of a step's tokens over KV that lies in pages. Torch reference here; knows nothing of engines or stores.

A layer's pages are a strided view `[num_pages, 2, num_kv_heads, block_tokens, head_dim]` of the page pool, whose every
`[block_tokens, head_dim]` tile is contiguous (`pool[:, layer]` of DESIGN §4). Sequences of a step are packed along one
token axis and may mix first prefill, chunked prefill and decode:

    cu_seqlens  0        5   6   7            12        tokens of this step, per sequence
                |aaaaa   |b  |c  |ddddd        |
    lengths     a: 5     b: 40  c: 1001  d: 69          tokens in pages, those of this step included
"""

from dataclasses import dataclass, field
from typing import Final, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

Tensor = torch.Tensor

# 12 % less attention time than a chunk of 512 at once, fp32, 512 tokens before it (2-core Intel Xeon VM, 2026-11-22).
_QUERIES: Final = 256


class Reach(NamedTuple):
    """What one sequence looks at in layers of one kind.

    rows: [2 * num_kv_heads * pages] rows of `[block_tokens, head_dim]` tiles to gather into `tiles`, of which `key` and
    `value`, [num_kv_heads, 1, keys, head_dim], are views; all None where the keys of this step are all there is.
    mask: additive, [queries, keys], or None where every query sees every key (decode) or plain causal order rules.
    """

    rows: Tensor | None
    tiles: Tensor | None
    key: Tensor | None
    value: Tensor | None
    mask: Tensor | None


@dataclass(slots=True)
class PagedBatch:
    """The sequences of one step: built once, shared by all layers.

    slots: [tokens] int64, page * block_tokens + offset, where each token's KV goes.  tables: [num_seqs, max_pages] int32.
    lengths: [num_seqs] int32.  cu_seqlens: [num_seqs + 1] int32.  All on the pool's device.
    scratch: reused between steps, grown on demand: a fresh gather target costs its page faults every time.
    """

    slots: Tensor
    tables: Tensor
    lengths: Tensor
    cu_seqlens: Tensor
    scratch: list[Tensor] = field(default_factory=list)
    _reaches: dict[int | None, list[Reach]] = field(default_factory=dict)
    _spans: list[tuple[int, int, int]] = field(default_factory=list)
    _write_rows: list[Tensor] = field(default_factory=list)

    def spans(self) -> list[tuple[int, int, int]]:
        """First token, token past the last, and length of every sequence, on the host."""
        if not self._spans:
            bounds = self.cu_seqlens.tolist()
            self._spans = list(zip(bounds[:-1], bounds[1:], self.lengths.tolist(), strict=True))
        return self._spans


def write_kv(key: Tensor, value: Tensor, pages: Tensor, batch: PagedBatch) -> None:
    """Put K and V of the step's tokens into their slots.

    key, value: [num_kv_heads, tokens, head_dim], any strides.  pages: one layer, as in the module's docstring.
    """
    heads, _, dim = key.shape
    if not batch._write_rows:
        batch._write_rows.extend(_write_rows(pages, batch))
    rows = _flat(pages, dim)
    for part, states in enumerate((key, value)):
        rows.index_copy_(0, batch._write_rows[part], states.reshape(heads * states.shape[1], dim))


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend causally, every sequence to its own pages. `write_kv` of this layer comes first.

    query: [num_heads, tokens, head_dim]; heads of a KV group are neighbours.  key, value: of this step, as for
    `write_kv`, so that a first chunk gathers nothing.  window: keys a query sees, itself included.  softcap: scores are
    squashed to ±softcap.  sinks: [num_heads], a logit each head may attend to instead of a key.
    Returns [tokens, num_heads, head_dim], contiguous.
    """
    num_heads, num_tokens, dim = query.shape
    kv_heads = key.shape[0]
    query = query.view(kv_heads, num_heads // kv_heads, num_tokens, dim)
    reaches, spans = _reaches(query, pages, batch, window), batch.spans()
    how = _How(scale, softcap, sinks)
    if len(spans) == 1:
        return _attend(query, key, value, pages, reaches[0], how).reshape(num_tokens, num_heads, dim)
    out = query.new_empty(num_tokens, kv_heads, num_heads // kv_heads, dim)
    for (first, last, _), reach in zip(spans, reaches, strict=True):
        own = query[:, :, first:last]
        out[first:last] = _attend(own, key[:, first:last], value[:, first:last], pages, reach, how)
    return out.view(num_tokens, num_heads, dim)


class _How(NamedTuple):
    scale: float
    softcap: float | None
    sinks: Tensor | None


def _attend(q: Tensor, k: Tensor, v: Tensor, pages: Tensor, reach: Reach, how: _How) -> Tensor:
    """One sequence: q [kv_heads, group, queries, head_dim], k and v of this step; returns [queries, kv_heads, group, head_dim].

    Few operations on purpose: each costs 4-6 us while weights stream through the caches, in 30 layers (2-core Intel Xeon
    VM, 2026-11-22).
    """
    if reach.rows is not None:
        assert reach.tiles is not None and reach.key is not None and reach.value is not None
        torch.index_select(_flat(pages, reach.tiles.shape[1]), 0, reach.rows, out=reach.tiles)
        k, v = reach.key, reach.value
    else:
        k, v = k.unsqueeze(1), v.unsqueeze(1)
    if how.softcap is not None or how.sinks is not None:
        return _explicit(q, k, v, reach.mask, how).permute(2, 0, 1, 3)
    if q.shape[2] == 1:
        # The query heads of a group become query rows: 4-5x faster than enable_gqa in bf16 (2-core AMD EPYC VM, 2026-11).
        return scaled_dot_product_attention(q.transpose(1, 2), k, v, scale=how.scale).transpose(0, 1)
    k, v = k.expand(-1, q.shape[1], -1, -1), v.expand(-1, q.shape[1], -1, -1)
    if reach.mask is None:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=how.scale).permute(2, 0, 1, 3)
    # A mask hides keys but does not skip them, so queries go in parts that leave out the keys after their last.
    out, past = q.new_empty(q.shape[2], *q.shape[:2], q.shape[3]), k.shape[2] - q.shape[2]
    for first in range(0, q.shape[2], _QUERIES):
        last = min(first + _QUERIES, q.shape[2])
        seen = slice(0, past + last)
        mask = reach.mask[first:last, seen]
        part = scaled_dot_product_attention(
            q[:, :, first:last], k[:, :, seen], v[:, :, seen], attn_mask=mask, scale=how.scale
        )
        out[first:last] = part.permute(2, 0, 1, 3)
    return out


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, how: _How) -> Tensor:
    scores = q @ k.transpose(-1, -2) * how.scale
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    if mask is not None:
        scores = scores + mask
    elif q.shape[2] > 1:
        scores = scores + _mask(q, first=0, start=0, stop=k.shape[2], window=None)
    if how.sinks is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
    sink = how.sinks.to(scores.dtype).view(q.shape[0], q.shape[1], 1, 1).expand(-1, -1, q.shape[2], 1)
    probabilities = torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1, dtype=torch.float32)[..., :-1]
    return probabilities.to(q.dtype) @ v


def _flat(pages: Tensor, width: int) -> Tensor:
    """Everything from this layer's first tile on, as rows: one index serves all layers, each with its own start."""
    num_pages, parts, heads, block_tokens, dim = pages.shape
    rows = ((num_pages - 1) * pages.stride(0) + parts * heads * block_tokens * dim) // width
    return pages.as_strided((rows, width), (width, 1))


def _write_rows(pages: Tensor, batch: PagedBatch) -> list[Tensor]:
    _, parts, heads, block_tokens, dim = pages.shape
    page, offset = batch.slots // block_tokens, batch.slots % block_tokens
    starts = page * (pages.stride(0) // dim) + offset
    tiles = torch.arange(parts * heads, device=pages.device).view(parts, heads, 1) * block_tokens
    return [rows.reshape(-1) for rows in tiles + starts]


def _reaches(query: Tensor, pages: Tensor, batch: PagedBatch, window: int | None) -> list[Reach]:
    """What each sequence attends to in layers of this window; made at the first such layer of a step."""
    if window not in batch._reaches:
        batch._reaches[window] = list(_plan(query, pages, batch, window))
    return batch._reaches[window]


def _plan(query: Tensor, pages: Tensor, batch: PagedBatch, window: int | None) -> list[Reach]:
    _, parts, heads, block_tokens, dim = pages.shape
    order = torch.arange(parts * heads, device=pages.device).view(parts * heads, 1)
    starts = batch.tables.long() * (pages.stride(0) // (block_tokens * dim))
    plan = []
    for number, (first, last, length) in enumerate(batch.spans()):
        num_queries = last - first
        past = length - num_queries
        start = max(0, past + 1 - window) if window is not None else 0
        masked = num_queries > 1 and (past > 0 or (window is not None and length > window))
        mask = _mask(query, first=past, start=start, stop=length, window=window) if masked else None
        if past == 0:
            plan.append(Reach(None, None, None, None, mask))
            continue
        low = start // block_tokens
        rows = (starts[number, low : -(-length // block_tokens)] + order).view(-1)
        tiles = _scratch(pages, batch, rows.numel() * block_tokens * dim).view(-1, block_tokens * dim)
        both = tiles.view(parts, heads, 1, -1, dim)[..., start - low * block_tokens : length - low * block_tokens, :]
        plan.append(Reach(rows, tiles, both[0], both[1], mask))
    return plan


def _scratch(pages: Tensor, batch: PagedBatch, numel: int) -> Tensor:
    """The same memory for every sequence and layer: what is gathered is used before the next is."""
    if not batch.scratch or batch.scratch[0].numel() < numel:
        batch.scratch[:] = [pages.new_empty(numel)]
    return batch.scratch[0][:numel]


def _mask(like: Tensor, *, first: int, start: int, stop: int, window: int | None) -> Tensor:
    """Additive [stop - first, stop - start], in the dtype and on the device of `like`."""
    queries = torch.arange(first, stop, device=like.device)[:, None]
    keys = torch.arange(start, stop, device=like.device)
    seen = keys <= queries
    if window is not None:
        seen &= keys > queries - window
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))
