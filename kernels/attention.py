"""Attention of a step's tokens over KV that lies in pages: the torch reference, and the way to the Triton kernel.

A layer's pages are a strided view `[num_pages, parts, num_kv_heads, block_tokens, head_dim]` of the page pool, whose every
`[block_tokens, head_dim]` tile is contiguous (`pool[:, layer]` of DESIGN §4). parts: 2 (K, then V) or 1 (latents of MLA).
Pages of fp8 (e4m3) or int8 hold codes; an element is its code times a scale.
"""

from typing import Final, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from .batch import PagedBatch

Tensor = torch.Tensor

# 12 % less attention time than a chunk of 512 at once, fp32, 512 tokens before it (2-core Intel Xeon VM, 2026-11-22).
_QUERIES: Final = 256
_FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)


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
    scales: Tensor | None = None,
) -> Tensor:
    """Attend causally, every sequence to its own pages. `write_kv` of this layer comes first.

    query: [num_heads, tokens, head_dim]; heads of a KV group are neighbours.  key, value: of this step, as for
    `write_kv`, so that a first chunk gathers nothing.  window: keys a query sees, itself included.  softcap: scores are
    squashed to ±softcap.  sinks: [num_heads], a logit each head may attend to instead of a key.  scales: as for `write_kv`.
    Returns [tokens, num_heads, head_dim], contiguous.  Raises ValueError on shapes that do not fit.
    What a query sees of quantised pages is what lies in them, its own key too: reused or computed, the result is the same.
    On a GPU codes are multiplied with queries and weights in float16.
    """
    how = Scoring(scale, window, softcap, sinks, scales)
    _checked(query, pages, batch, how, parts=2, value_dim=query.shape[2])
    if query.is_cuda:
        from .gpu import attention as gpu

        with torch.cuda.device(query.device):
            return gpu.paged_attention(
                query, key, value, pages, batch, scale=scale, window=window, softcap=softcap, sinks=sinks, scales=scales
            )
    if pages.dtype != query.dtype or scales is not None:
        return _attend_to_codes(query, pages, batch, how, value_dim=query.shape[2])
    num_heads, num_tokens, dim = query.shape
    kv_heads = key.shape[0]
    query = query.view(kv_heads, num_heads // kv_heads, num_tokens, dim)
    form = None if batch.alike else _form(pages)
    reaches = batch.once(("reaches", window, form), lambda: list(_plan(query, pages, batch, window)))
    if len(batch.spans) == 1:
        return _attend(query, key, value, pages, reaches[0], how).reshape(num_tokens, num_heads, dim)
    out = query.new_empty(num_tokens, kv_heads, num_heads // kv_heads, dim)
    for (first, last, _), reach in zip(batch.spans, reaches, strict=True):
        own = query[:, :, first:last]
        out[first:last] = _attend(own, key[:, first:last], value[:, first:last], pages, reach, how)
    return out.view(num_tokens, num_heads, dim)


def latent_attention(
    query: Tensor,
    pages: Tensor,
    batch: PagedBatch,
    *,
    value_dim: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """Attend causally to latents: multi-head latent attention in its absorbed form (DeepSeek-V2, 2024, section 2.1).

    query: [num_heads, tokens, head_dim], already multiplied with the up-projection of K.  pages: parts = 1, one KV head; the
    first value_dim elements of a latent are key and value at once, the rest (its position) is key alone.  Others as above.
    Returns [tokens, num_heads, value_dim], to be multiplied with the up-projection of V.
    Raises ValueError on shapes that do not fit.
    """
    how = Scoring(scale, window, softcap, sinks, scales)
    _checked(query, pages, batch, how, parts=1, value_dim=value_dim)
    if query.is_cuda:
        from .gpu import attention as gpu

        with torch.cuda.device(query.device):
            return gpu.latent_attention(
                query, pages, batch,
                value_dim=value_dim, scale=scale, window=window, softcap=softcap, sinks=sinks, scales=scales,
            )  # fmt: skip
    return _attend_to_codes(query, pages, batch, how, value_dim=value_dim)


class Scoring(NamedTuple):
    """How a key is scored, as `paged_attention` says it."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    scales: Tensor | None


def _checked(query: Tensor, pages: Tensor, batch: PagedBatch, how: Scoring, *, parts: int, value_dim: int) -> None:
    """Once per batch for layers that are alike in all that is looked at."""
    if batch.alike:
        return
    form = (_form(query), _form(pages), _form(how.scales), _form(how.sinks))
    key = ("attention", form, how.window, how.softcap, parts, value_dim)
    batch.once(key, lambda: _check(query, pages, batch, how, parts=parts, value_dim=value_dim))


def _form(tensor: Tensor | None) -> object:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)


def _check(query: Tensor, pages: Tensor, batch: PagedBatch, how: Scoring, *, parts: int, value_dim: int) -> None:
    """A mistake here would read memory that is not KV."""
    _, has_parts, kv_heads, block_tokens, head_dim = pages.shape
    if query.dtype not in _FLOATS:
        raise ValueError(f"query of {query.dtype}: expected {', '.join(map(str, _FLOATS))}")
    num_tokens, longest = (
        max((last for _, last, _ in batch.spans), default=0),
        max((n for _, _, n in batch.spans), default=0),
    )
    if query.shape[1] < num_tokens or batch.tables.shape[1] * block_tokens < longest:
        raise ValueError(
            f"query of {query.shape[1]} tokens, tables of {batch.tables.shape[1]} pages of {block_tokens} tokens: the batch has "
            f"{num_tokens} tokens, and a sequence of {longest}"
        )
    if not 0 < value_dim <= head_dim - (parts == 1):
        raise ValueError(f"value_dim={value_dim}: must be at least 1 and less than the latents' {head_dim} elements")
    if has_parts != parts or (parts == 1 and kv_heads != 1):
        raise ValueError(f"pages {list(pages.shape)}: expected parts={parts}" + ", one KV head" * (parts == 1))
    if query.shape[2] != head_dim or query.shape[0] % kv_heads:
        raise ValueError(
            f"query {list(query.shape)}: expected [a multiple of {kv_heads} heads, tokens, {head_dim}] for these pages"
        )
    if pages.stride()[3:] != (head_dim, 1) or query.stride(2) != 1:
        raise ValueError(
            "pages need contiguous [block_tokens, head_dim] tiles, and queries contiguous rows: copy them first"
        )
    if pages.dtype == torch.int8 and how.scales is None:
        raise ValueError("pages of int8 need scales: one per page, part, KV head and token")
    if how.scales is not None and how.scales.shape != pages.shape[:-1]:
        raise ValueError(
            f"scales {list(how.scales.shape)}: expected {list(pages.shape[:-1])}, expanded where they repeat"
        )
    if how.scales is not None and how.scales.dtype != torch.float32:
        raise ValueError(f"scales of {how.scales.dtype}: expected torch.float32")
    if how.sinks is not None and how.sinks.shape != query.shape[:1]:
        raise ValueError(f"sinks {list(how.sinks.shape)}: expected one per head, [{query.shape[0]}]")
    if how.window is not None and how.window < 1:
        raise ValueError(f"window={how.window}: a query sees at least itself; None for all keys")
    if how.softcap is not None and not how.softcap > 0:
        raise ValueError(f"softcap={how.softcap}: must be above 0; None for none")


class _Reach(NamedTuple):
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


def _attend(q: Tensor, k: Tensor, v: Tensor, pages: Tensor, reach: _Reach, how: Scoring) -> Tensor:
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


def _attend_to_codes(query: Tensor, pages: Tensor, batch: PagedBatch, how: Scoring, *, value_dim: int) -> Tensor:
    """Attention over whatever the pages hold, decoded sequence by sequence: plain, and never the engine's path on a CPU."""
    num_heads, num_tokens, dim = query.shape
    _, parts, kv_heads, block_tokens, _ = pages.shape
    out = query.new_empty(num_tokens, num_heads, value_dim)
    for number, (first, last, length) in enumerate(batch.spans):
        num_queries, past = last - first, length - (last - first)
        start = max(0, past + 1 - how.window) if how.window is not None else 0
        low = start // block_tokens
        table = batch.tables[number, low : -(-length // block_tokens)].long()
        states = pages[table].to(query.dtype)
        if how.scales is not None:
            states = (states.float() * how.scales[table].unsqueeze(-1)).to(query.dtype)
        states = states.permute(1, 2, 0, 3, 4).reshape(parts, kv_heads, 1, -1, dim)
        states = states[..., start - low * block_tokens : length - low * block_tokens, :]
        key, value = states[0], states[parts - 1][..., :value_dim]
        own = query[:, first:last].view(kv_heads, num_heads // kv_heads, num_queries, dim)
        mask = _mask(own, first=past, start=start, stop=length, window=how.window)
        out[first:last] = _explicit(own, key, value, mask, how).permute(2, 0, 1, 3).reshape(num_queries, num_heads, -1)
    return out


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, how: Scoring) -> Tensor:
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


def _plan(query: Tensor, pages: Tensor, batch: PagedBatch, window: int | None) -> list[_Reach]:
    _, parts, heads, block_tokens, dim = pages.shape
    order = torch.arange(parts * heads, device=pages.device).view(parts * heads, 1)
    starts = batch.tables.long() * (pages.stride(0) // (block_tokens * dim))
    plan = []
    for number, (first, last, length) in enumerate(batch.spans):
        num_queries = last - first
        past = length - num_queries
        start = max(0, past + 1 - window) if window is not None else 0
        masked = num_queries > 1 and (past > 0 or (window is not None and length > window))
        mask = _mask(query, first=past, start=start, stop=length, window=window) if masked else None
        if past == 0:
            plan.append(_Reach(None, None, None, None, mask))
            continue
        low = start // block_tokens
        rows = (starts[number, low : -(-length // block_tokens)] + order).view(-1)
        tiles = _scratch(pages, batch, rows.numel() * block_tokens * dim).view(-1, block_tokens * dim)
        both = tiles.view(parts, heads, 1, -1, dim)[..., start - low * block_tokens : length - low * block_tokens, :]
        plan.append(_Reach(rows, tiles, both[0], both[1], mask))
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
