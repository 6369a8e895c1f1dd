"""Moving KV in Triton: many programs of 8 to 16 KiB, which load all they move before they store any of it.

What moves is rows, one token of one head. Heads of a token are neighbours in what a layer computes and in token-major pools,
tokens of a head are in our pages; either way a row is contiguous, and neighbours are so on one side. Where nothing is
quantised, elements travel as integers of their width: NaN keeps its bits, and one compiled kernel serves dtypes alike.
"""

from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl

from ..batch import PagedBatch
from ..layers import LayerPools
from .floats import EXACT, INT8_MAX, e4m3_encode, int8_encode, inverse, magnitude_bits, scale_of, widen
from .launch import has_e4m3

Tensor = torch.Tensor

_BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# What a program of 128 threads moves: four 16-byte loads of each are in flight, eight where K and V are or in `_move`.
_WRITE_BYTES: Final = 8 << 10  # of each of K and V
_COPY_BYTES: Final = 8 << 10
_MOVE_BYTES: Final = 16 << 10


@triton.jit
def _put(
    states, pages, scales, rows, scale_rows, columns, seen, inside,
    E4M3: tl.constexpr, INT8: tl.constexpr, SCALED: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Store rows of one part, in the format of the pages."""
    if INT8:
        values = widen(states)
        scale = scale_of(tl.max(magnitude_bits(values), axis=1), INT8_MAX)
        tl.store(scales + scale_rows, scale, mask=seen)
        codes = int8_encode(values, scale[:, None])
    elif E4M3:
        values = widen(states)
        if SCALED:
            values *= inverse(tl.load(scales + scale_rows, mask=seen, other=1.0))[:, None]
        codes = e4m3_encode(values, HARDWARE)
    else:
        codes = states
    tl.store(pages + rows[:, None] + columns[None, :], codes, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _write(
    key, value, pages, scales, slots, num_rows,
    key_head_stride, key_token_stride, value_head_stride, value_token_stride,
    page_stride, part_stride, head_stride,
    scale_page_stride, scale_part_stride, scale_head_stride, scale_token_stride,
    PARTS: tl.constexpr, HEADS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, DIM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    E4M3: tl.constexpr, INT8: tl.constexpr, SCALED: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Rows ROWS at a time, the heads of a token next to each other, as a layer computes them."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = row // HEADS, (row % HEADS).to(tl.int64)
    slot = tl.load(slots + token, mask=row < num_rows, other=-1)
    seen = slot >= 0
    page, offset, token = slot // BLOCK_TOKENS, slot % BLOCK_TOKENS, token.to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = seen[:, None]
    if COLUMNS != DIM:
        inside = inside & (columns < DIM)[None, :]
    rows = page * page_stride + head * head_stride + offset * DIM
    scale_rows = rows
    if SCALED:
        scale_rows = page * scale_page_stride + head * scale_head_stride + offset * scale_token_stride
    # Both are asked for before either is stored.
    key_rows = token * key_token_stride + head * key_head_stride
    k = tl.load(key + key_rows[:, None] + columns[None, :], mask=inside, other=0)
    if PARTS == 2:
        value_rows = token * value_token_stride + head * value_head_stride
        v = tl.load(value + value_rows[:, None] + columns[None, :], mask=inside, other=0)
    _put(k, pages, scales, rows, scale_rows, columns, seen, inside, E4M3, INT8, SCALED, HARDWARE)
    if PARTS == 2:
        pages += part_stride
        if SCALED:
            scales += scale_part_stride
        _put(v, pages, scales, rows, scale_rows, columns, seen, inside, E4M3, INT8, SCALED, HARDWARE)


@triton.jit
def _copy(
    pool, pairs,
    PAGE_WORDS: tl.constexpr, TILE_WORDS: tl.constexpr, TOKEN_WORDS: tl.constexpr, WORDS: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    """WORDS words of one pair of pages. pairs: [n, 3] int64: source, target, tokens."""
    programs: tl.constexpr = tl.cdiv(PAGE_WORDS, WORDS)
    pair = pairs + (tl.program_id(0) // programs) * 3
    source, target = tl.load(pair), tl.load(pair + 1)
    at = (tl.program_id(0) % programs) * WORDS + tl.arange(0, WORDS)
    old, new = pool + source * PAGE_WORDS + at, pool + target * PAGE_WORDS + at
    if PARTIAL:
        inside = (at < PAGE_WORDS) & (at % TILE_WORDS < tl.load(pair + 2) * TOKEN_WORDS)
        tl.store(new, tl.load(old, mask=inside), mask=inside)
    elif PAGE_WORDS % WORDS != 0:
        tl.store(new, tl.load(old, mask=at < PAGE_WORDS), mask=at < PAGE_WORDS)
    else:
        tl.store(new, tl.load(old))


@triton.jit
def _move(
    blocks, addresses, slots, num_planes, page_stride, head_stride, token_stride,
    HEADS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, PAGE_TOKENS: tl.constexpr, DIM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a plane, which is one layer and part of one block: whole tiles in ours, runs of heads in a token of theirs."""
    PLANE: tl.constexpr = HEADS * BLOCK_TOKENS
    programs: tl.constexpr = tl.cdiv(PLANE, ROWS)
    plane = tl.program_id(0) // programs
    row = (tl.program_id(0) % programs) * ROWS + tl.arange(0, ROWS)
    head, token = (row // BLOCK_TOKENS).to(tl.int64), row % BLOCK_TOKENS
    slot = tl.load(slots + (plane // num_planes).to(tl.int64) * BLOCK_TOKENS + token, mask=row < PLANE, other=-1)
    columns = tl.arange(0, COLUMNS)
    inside = (slot >= 0)[:, None]
    if COLUMNS != DIM:
        inside = inside & (columns < DIM)[None, :]
    pool = tl.load(addresses + plane % num_planes).to(tl.pointer_type(blocks.dtype.element_ty))
    if ALIGNED:  # an address read from memory says nothing of itself
        pool = tl.multiple_of(pool, 16)
    theirs = (slot // PAGE_TOKENS) * page_stride + head * head_stride + (slot % PAGE_TOKENS) * token_stride
    there = pool + theirs[:, None] + columns[None, :]
    here = blocks + plane.to(tl.int64) * PLANE * DIM + (row * DIM)[:, None] + columns[None, :]
    if GATHER:
        tl.store(here, tl.load(there, mask=inside), mask=inside)
    else:
        tl.store(there, tl.load(here, mask=inside), mask=inside)


def write_kv(key: Tensor, value: Tensor, pages: Tensor, batch: PagedBatch, *, scales: Tensor | None = None) -> None:
    """Put K and V of the step's tokens into their slots."""
    _launch_write(key, value, pages, batch.slots, scales)


def write_latents(latents: Tensor, pages: Tensor, batch: PagedBatch, *, scales: Tensor | None = None) -> None:
    """Put latents of the step's tokens into their slots."""
    _launch_write(latents, latents, pages, batch.slots, scales)


def copy_pages(
    pool: Tensor, sources: Sequence[int], targets: Sequence[int], *, tokens: Sequence[int] | None = None
) -> None:
    """Copy pages, or the first tokens of their tiles, in one launch."""
    if not sources:
        return
    counts = tokens or [0] * len(sources)
    rows = torch.tensor(list(zip(sources, targets, counts, strict=True)), dtype=torch.int64)
    pairs = rows.to(pool.device, non_blocking=True)
    page_bytes = pool[0].numel() * pool.element_size()
    tile_bytes = token_bytes = page_bytes
    if tokens is not None:
        token_bytes = pool[0, 0, 0, 0, 0].numel() * pool.element_size()
        tile_bytes = token_bytes * pool.shape[4]
    word = next(size for size in (8, 4, 2, 1) if token_bytes % size == 0 and pool.data_ptr() % size == 0)
    words = _COPY_BYTES // word
    bits = pool.view(-1).view(_BITS[word])
    _copy[(len(sources) * triton.cdiv(page_bytes // word, words),)](
        bits, pairs, page_bytes // word, tile_bytes // word, token_bytes // word, words, PARTIAL=tokens is not None
    )


def gather_blocks(layers: LayerPools, slots: Tensor, blocks: Tensor) -> None:
    """Copy tokens of another engine's pools into blocks."""
    _launch_move(layers, slots, blocks, gather=True)


def scatter_blocks(blocks: Tensor, layers: LayerPools, slots: Tensor) -> None:
    """Copy blocks into another engine's pools."""
    _launch_move(layers, slots, blocks, gather=False)


def _launch_write(key: Tensor, value: Tensor, pages: Tensor, slots: Tensor, scales: Tensor | None) -> None:
    _, parts, heads, block_tokens, dim = pages.shape
    e4m3, int8 = pages.dtype == torch.float8_e4m3fn, pages.dtype == torch.int8
    key, value = (states if states.stride(2) == 1 else states.contiguous() for states in (key, value))
    if not (e4m3 or int8):
        key, value, pages = _bits(key), _bits(value), _bits(pages)
    num_rows, columns = slots.shape[0] * heads, triton.next_power_of_2(dim)
    rows = _rows(_WRITE_BYTES, columns * key.element_size())
    if not num_rows:
        return
    _write[(triton.cdiv(num_rows, rows),)](
        key, value, _bits(pages) if e4m3 else pages, pages if scales is None else scales, slots, num_rows,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), *pages.stride()[:3],
        *((0, 0, 0, 0) if scales is None else scales.stride()),
        parts, heads, block_tokens, dim, rows, columns,
        E4M3=e4m3, INT8=int8, SCALED=scales is not None, HARDWARE=has_e4m3(), **EXACT,
    )  # fmt: skip


def _launch_move(layers: LayerPools, slots: Tensor, blocks: Tensor, *, gather: bool) -> None:
    num_blocks, num_layers, parts, heads, block_tokens, dim = blocks.shape
    bits, like, columns = _bits(blocks), layers.like, triton.next_power_of_2(dim)
    rows = min(_rows(_MOVE_BYTES, columns * bits.element_size()), triton.next_power_of_2(heads * block_tokens))
    planes = num_layers * parts
    if not num_blocks:
        return
    _move[(num_blocks * planes * triton.cdiv(heads * block_tokens, rows),)](
        bits, layers.addresses, slots, planes, *like.stride()[:3],
        heads, block_tokens, like.shape[2], dim, rows, columns, ALIGNED=layers.is_aligned, GATHER=gather,
    )  # fmt: skip


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_BITS[tensor.element_size()])


def _rows(budget: int, row_bytes: int) -> int:
    """Rows of a program: a power of two."""
    return max(1, budget // row_bytes)
