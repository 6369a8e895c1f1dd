"""Moving KV in device memory: a step's tokens into pages, pages to pages, blocks from and to other engines' pools.

The torch reference, and the way to the Triton kernels; attention reads what is written here. Nothing here waits for the
device, and nothing is written but the tokens named: every other byte of a page stays as it is.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch

from .batch import PagedBatch
from .layers import LayerPools
from .quant import encode_int8

Tensor = torch.Tensor

_E4M3: Final = torch.float8_e4m3fn
_E4M3_MAX: Final = 448.0
_BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)


def write_kv(key: Tensor, value: Tensor, pages: Tensor, batch: PagedBatch, *, scales: Tensor | None = None) -> None:
    """Put K and V of the step's tokens into their slots; a token whose slot is negative is padding and goes nowhere.

    key, value: [num_kv_heads, tokens, head_dim], float32, float16 or bfloat16, any strides; no slot twice.
    pages: one layer, `[num_pages, 2, num_kv_heads, block_tokens, head_dim]` with contiguous tiles.  Its dtype says how:
    that of key: as they are, bit for bit.  int8: as `encode_int8` does, and scales are written with the codes.
    float8_e4m3fn: times 1 / scale, of scales that are given, none below 2**-126 (None: 1); saturates at ±448, NaN stays NaN.
    scales: [num_pages, 2, num_kv_heads, block_tokens] float32, any strides.
    Raises ValueError on shapes and dtypes that do not fit; a slot past the last page is undefined, check before.
    """
    places = _places((key, value), pages, batch, scales)
    if pages.is_cuda:
        from .gpu import pages as gpu

        with torch.cuda.device(pages.device):
            gpu.write_kv(key, value, pages, batch, scales=scales)
    else:
        _write((key, value), pages, places, scales)


def write_latents(latents: Tensor, pages: Tensor, batch: PagedBatch, *, scales: Tensor | None = None) -> None:
    """Put latents of the step's tokens into their slots: `write_kv` of one part.

    latents: [1, tokens, head_dim].  pages: `[num_pages, 1, 1, block_tokens, head_dim]`.  scales: their first four sizes.
    """
    places = _places((latents,), pages, batch, scales)
    if pages.is_cuda:
        from .gpu import pages as gpu

        with torch.cuda.device(pages.device):
            gpu.write_latents(latents, pages, batch, scales=scales)
    else:
        _write((latents,), pages, places, scales)


def copy_pages(
    pool: Tensor, sources: Sequence[int], targets: Sequence[int], *, tokens: Sequence[int] | None = None
) -> None:
    """Copy pages to pages of the same pool; with `tokens`, only the first tokens[i] tokens of every tile of a page.

    pool: contiguous, [num_pages, num_layers, parts, num_kv_heads, block_tokens, ...]: axis 4 counts a block's tokens, what
    follows belongs to a token. So a pool of pages and its pool of scales are copied by one call each; whole pages may have
    any shape.  No page is a target twice, or source and target.  Raises ValueError on pages that are not so.
    """
    _check_copy(pool, sources, targets, tokens)
    if pool.is_cuda:
        from .gpu import pages as gpu

        with torch.cuda.device(pool.device):
            gpu.copy_pages(pool, sources, targets, tokens=tokens)
    elif tokens is None:
        # Page by page: each is one contiguous memcpy, 23 us for 360 KiB, and needs no gathered copy in between
        # (2-core AMD EPYC VM, 2026-11).
        for source, target in zip(sources, targets, strict=True):
            pool[target].copy_(pool[source])
    else:
        for source, target, count in zip(sources, targets, tokens, strict=True):
            pool[target, :, :, :, :count].copy_(pool[source, :, :, :, :count])


def gather_blocks(layers: LayerPools, slots: Tensor, blocks: Tensor) -> None:
    """Copy tokens of another engine's pools into blocks, bit for bit.

    slots: [n, block_tokens] int64, where each token lies in `layers`; a negative one is not there: its bytes in `blocks`
    stay as they are.  blocks: [n, num_layers, parts, num_kv_heads, block_tokens, head_dim], contiguous; its dtype has the
    width of the engine's and is otherwise not looked at.  Raises ValueError on shapes that do not fit; a slot past the
    last is undefined, check before.
    """
    _check_blocks(layers, slots, blocks)
    if blocks.is_cuda:
        from .gpu import pages as gpu

        with torch.cuda.device(blocks.device):
            gpu.gather_blocks(layers, slots, blocks)
        return
    ours, present, place = _moved(layers, slots, blocks)
    for number, layer in enumerate(layers.views):
        for part, view in enumerate(layer):
            ours[:, number, part].transpose(1, 2)[present] = _bits(view).transpose(1, 2)[place]


def scatter_blocks(blocks: Tensor, layers: LayerPools, slots: Tensor) -> None:
    """Copy blocks into another engine's pools: `gather_blocks` the other way. A token whose slot is negative is skipped.

    No slot twice.
    """
    _check_blocks(layers, slots, blocks)
    if blocks.is_cuda:
        from .gpu import pages as gpu

        with torch.cuda.device(blocks.device):
            gpu.scatter_blocks(blocks, layers, slots)
        return
    ours, present, place = _moved(layers, slots, blocks)
    for number, layer in enumerate(layers.views):
        for part, view in enumerate(layer):
            _bits(view).transpose(1, 2)[place] = ours[:, number, part].transpose(1, 2)[present]


class _Places(NamedTuple):
    """Where a step's tokens go, for the reference.

    num_rows: of head_dim elements, from a layer's first tile to its last: one index serves all layers, each with its own
    start.  rows: per part, heads before tokens.  tokens: those that have a slot; None: all.
    """

    num_rows: int
    rows: Sequence[Tensor]
    tokens: Tensor | None
    page: Tensor
    offset: Tensor


def _write(states: Sequence[Tensor], pages: Tensor, places: _Places, scales: Tensor | None) -> None:
    if not places.page.numel():
        return
    dim = pages.shape[4]
    rows = pages.as_strided((places.num_rows, dim), (dim, 1))
    if pages.dtype == _E4M3:
        rows = rows.view(torch.uint8)
    for part, given in enumerate(states):
        tile = given if places.tokens is None else given[:, places.tokens]
        if pages.dtype != given.dtype:
            tile = _encoded(tile, pages, places, None if scales is None else scales[:, part])
        rows.index_copy_(0, places.rows[part], tile.reshape(-1, dim))


def _encoded(states: Tensor, pages: Tensor, places: _Places, scales: Tensor | None) -> Tensor:
    if pages.dtype == torch.int8:
        assert scales is not None
        codes, written = encode_int8(states.contiguous())
        scales[places.page, :, places.offset] = written.t()
        return codes
    values = states.float()
    if scales is not None:
        values = values * scales[places.page, :, places.offset].t().reciprocal()[..., None]
    return values.clamp(-_E4M3_MAX, _E4M3_MAX).to(_E4M3).view(torch.uint8)


def _places(states: Sequence[Tensor], pages: Tensor, batch: PagedBatch, scales: Tensor | None) -> _Places:
    """Checked and made by the first of the layers that are alike."""
    if batch.alike:
        return batch.once("write", lambda: _derive(states, pages, batch.slots, scales))
    given = [*states, pages, *(() if scales is None else (scales,))]
    key = ("write", *((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in given))
    return batch.once(key, lambda: _derive(states, pages, batch.slots, scales))


def _derive(states: Sequence[Tensor], pages: Tensor, slots: Tensor, scales: Tensor | None) -> _Places:
    _check(states, pages, slots, scales)
    num_pages, parts, heads, block_tokens, dim = pages.shape
    page_rows, part_rows, head_rows = (stride // dim for stride in pages.stride()[:3])
    num_rows = (num_pages - 1) * page_rows + (parts - 1) * part_rows + (heads - 1) * head_rows + block_tokens
    if slots.is_cuda:  # the kernel takes slots as they are, and nothing may wait for the device
        return _Places(num_rows, [], None, slots, slots)
    present = slots >= 0
    tokens = None if bool(present.all()) else present.nonzero().view(-1)
    if tokens is not None:
        slots = slots[tokens]
    page, offset = slots // block_tokens, slots % block_tokens
    tiles = torch.arange(parts).view(-1, 1, 1) * part_rows + torch.arange(heads).view(-1, 1) * head_rows
    rows = [rows.reshape(-1) for rows in tiles + (page * page_rows + offset)]
    return _Places(num_rows, rows, tokens, page, offset)


def _moved(layers: LayerPools, slots: Tensor, blocks: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The blocks as bits; block and token in it, page and offset in the engine's, of all tokens that are there."""
    present = (slots >= 0).nonzero(as_tuple=True)
    there, page_tokens = slots[present], layers.like.shape[2]
    return _bits(blocks), present, (there // page_tokens, there % page_tokens)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_BITS[tensor.element_size()])


def _check(states: Sequence[Tensor], pages: Tensor, slots: Tensor, scales: Tensor | None) -> None:
    """Once per batch and shape; a mistake here would write over the KV of others."""
    _, parts, heads, _, dim = pages.shape
    expected, given = [heads, slots.shape[0], dim], states[0]
    if parts != len(states) or any(list(state.shape) != expected for state in states):
        raise ValueError(
            f"{' and '.join(str(list(state.shape)) for state in states)} into pages {list(pages.shape)}: "
            f"expected one tensor of {expected} for each of the {parts} parts"
        )
    if pages.stride()[3:] != (dim, 1) or any(stride % dim for stride in pages.stride()[:3]):
        raise ValueError(f"pages of strides {list(pages.stride())}: tiles must be contiguous, as in pool[:, layer]")
    if any(state.dtype != given.dtype or state.device != pages.device for state in states):
        raise ValueError(
            f"{[(state.dtype, str(state.device)) for state in states]} into pages on {pages.device}: must agree"
        )
    if given.dtype not in _FLOATS or pages.dtype not in (given.dtype, torch.int8, _E4M3):
        raise ValueError(
            f"{given.dtype} into pages of {pages.dtype}: give pages of the same float dtype, int8 or {_E4M3}"
        )
    if (scales is None and pages.dtype == torch.int8) or (scales is not None and pages.dtype == given.dtype):
        raise ValueError(
            f"scales {'missing' if scales is None else 'given'} for pages of {pages.dtype}: "
            f"int8 needs them, {_E4M3} may have them, nothing else has"
        )
    if scales is not None and (scales.dtype != torch.float32 or scales.shape != pages.shape[:4]):
        raise ValueError(f"scales {scales.dtype} {list(scales.shape)}: expected float32 {list(pages.shape[:4])}")


def _check_copy(pool: Tensor, sources: Sequence[int], targets: Sequence[int], tokens: Sequence[int] | None) -> None:
    if len(sources) != len(targets) or (tokens is not None and len(tokens) != len(targets)):
        counts = "" if tokens is None else f", {len(tokens)} token counts"
        raise ValueError(f"{len(sources)} sources, {len(targets)} targets{counts}: must be equally many")
    if not pool.is_contiguous():
        raise ValueError(f"pool of strides {list(pool.stride())}: must be contiguous")
    distinct = set(targets)
    if len(distinct) != len(targets) or not distinct.isdisjoint(sources):
        raise ValueError(f"targets {list(targets)} of sources {list(sources)}: one is named twice, or is a source too")
    bad = [page for page in (*sources, *targets) if not 0 <= page < len(pool)]
    if bad:
        raise ValueError(f"pages {bad}: the pool has pages 0 to {len(pool) - 1}")
    if tokens is not None and (pool.ndim < 5 or any(not 0 <= count <= pool.shape[4] for count in tokens)):
        raise ValueError(f"tokens {list(tokens)} of a pool {list(pool.shape)}: axis 4 counts the tokens of a block")


def _check_blocks(layers: LayerPools, slots: Tensor, blocks: Tensor) -> None:
    like = layers.like
    shape = [slots.shape[0], *layers.addresses.shape, like.shape[1], slots.shape[-1], like.shape[3]]
    if slots.ndim != 2 or list(blocks.shape) != shape or blocks.element_size() != like.element_size():
        raise ValueError(
            f"{blocks.dtype} blocks {list(blocks.shape)} for slots {list(slots.shape)}: expected {shape} (slots: n, "
            f"block_tokens) of {like.element_size()} bytes each, as the pools of {like.dtype} have"
        )
    if slots.dtype != torch.int64 or not slots.is_contiguous() or not blocks.is_contiguous():
        raise ValueError(f"slots {slots.dtype} and blocks: expected int64 and any dtype, both contiguous")
    if not like.device == slots.device == blocks.device:
        raise ValueError(
            f"pools on {like.device}, slots on {slots.device}, blocks on {blocks.device}: must be one device"
        )
