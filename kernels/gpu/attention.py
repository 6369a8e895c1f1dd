"""Paged attention in Triton: one kernel for decode, chunked prefill and latents, one that merges partial results.

Online softmax (Milakov and Gimelshein, 2018) over stretches of keys as in FlashAttention-2 (Dao, 2023), in powers of two.
Only the first and the last turns of a stretch are masked; what lies between is read as it is. A masked key is never
loaded, for what it would read may be NaN, and zero times NaN is NaN.
"""

import math
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from ..attention import Scoring
from ..batch import PagedBatch, Plans, Span
from .floats import SMALLEST, e4m3_decode, narrow
from .launch import INTERPRETED, has_e4m3, num_processors
from .plan import MAX_SPLITS, Plan, most_items, padded, plan
from .tiles import Case, Tiles, tiles_for

Tensor = torch.Tensor

_LOG2E = tl.constexpr(math.log2(math.e))
_CODES: Final = {torch.float8_e4m3fn: "e4m3", torch.int8: "int8"}
_COMPUTE: Final = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _half_of_int8(code):
    """int8 -> float16, exact: added to the bits of 1152 it counts in ones, and 1152 is taken off again."""
    return (code.to(tl.int16) + 0x6480).to(tl.float16, bitcast=True) - 1152.0


@triton.jit
def _tile(
    base, at, columns, seen, COLUMNS: tl.constexpr, CODES: tl.constexpr, HARDWARE: tl.constexpr, COMPUTE: tl.constexpr
):
    """Rows `at` of `COLUMNS` elements as [rows, columns]; zero where not `seen` (None: all are) and past COLUMNS."""
    pointers = base + at[:, None] + columns[None, :]
    if seen is None:
        if columns.shape[0] == COLUMNS:
            raw = tl.load(pointers)
        else:
            raw = tl.load(pointers, mask=columns[None, :] < COLUMNS, other=0)
    else:
        raw = tl.load(pointers, mask=seen[:, None] & (columns[None, :] < COLUMNS), other=0)
    if CODES == "e4m3":
        raw = e4m3_decode(raw, HARDWARE)
    elif CODES == "int8":
        raw = _half_of_int8(raw)
    return raw.to(COMPUTE)


@triton.jit
def _tanh(x):
    """Through a power of two, and near zero, where that cancels, through its series; 4e-7 relative."""
    square = x * x
    series = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(square < 0.0625, series, 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * _LOG2E))))


@triton.jit
def _per_key(pointers, seen):
    """Values where `seen` (None: everywhere), else zero."""
    if seen is None:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=seen, other=0)
    return values


@triton.jit
def _turn(
    state, query, tail, place, start, floor, limit, pages, table, scales, page_stride, part_stride,
    scale_page_stride, scale_part_stride, scale_token_stride, factor, cap, window,
    MASKED: tl.constexpr, KEYS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    COLUMNS: tl.constexpr, TAIL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    CODES: tl.constexpr, HARDWARE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Attend to the keys [start, start + KEYS); `state` is (top, total, acc) of the rows so far."""
    top, total, acc = state
    at = start + tl.arange(0, KEYS)
    if MASKED:
        seen = (at >= floor) & (at < limit)
    else:
        seen = None
    page = _per_key(table + at // BLOCK_TOKENS, seen).to(tl.int64)
    rows = page * page_stride + (at % BLOCK_TOKENS) * HEAD_DIM
    columns = tl.arange(0, COLUMNS)
    key = _tile(pages, rows, columns, seen, VALUE_DIM, CODES, HARDWARE, COMPUTE)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    if TAIL:  # latents: the first VALUE_DIM elements are key and value, the rest, its position, is key alone
        rest = _tile(pages + VALUE_DIM, rows, tl.arange(0, TAIL), seen, HEAD_DIM - VALUE_DIM, CODES, HARDWARE, COMPUTE)
        scores = tl.dot(tail, tl.trans(rest), scores, input_precision="ieee")
        value = key
    else:
        value = _tile(pages + part_stride, rows, columns, seen, VALUE_DIM, CODES, HARDWARE, COMPUTE)
    if scales is not None:
        scale_rows = page * scale_page_stride + (at % BLOCK_TOKENS) * scale_token_stride
        scores *= _per_key(scales + scale_rows, seen)[None, :]
    scores *= factor
    if CAP:  # cap * tanh(scores), and cap holds the change of base
        scores = cap * _tanh(scores)
    if MASKED:
        visible = seen[None, :] & (at[None, :] <= place[:, None])
        if WINDOW:
            visible = visible & (at[None, :] > place[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
    peak = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(peak == float("-inf"), 0.0, peak) if MASKED else peak  # a row may have seen no key yet
    weights = tl.exp2(scores - shift[:, None])
    shrink = tl.exp2(top - shift)
    total = total * shrink + tl.sum(weights, 1)
    if scales is not None:  # as parts of the largest: weights that are small already would leave float16 below
        rates = _per_key(scales + scale_part_stride + scale_rows, seen)
        largest = tl.maximum(tl.max(rates, 0), SMALLEST)
        part = tl.dot((weights * (rates / largest)[None, :]).to(COMPUTE), value, input_precision="ieee")
        acc = acc * shrink[:, None] + part * largest
    else:
        acc = tl.dot(weights.to(COMPUTE), value, acc * shrink[:, None], input_precision="ieee")
    return peak, total, acc


# Few builds: what differs from step to step, or from layer to layer, must not compile the kernel again.
@triton.jit(
    do_not_specialize=["table_stride", "window"],
    do_not_specialize_on_alignment=["items", "scales", "sinks", "partial", "stats"],
)
def _attend(
    query, out, pages, tables, lengths, cu_seqlens, items, partial, stats, scales, sinks,
    query_head_stride, query_token_stride, table_stride, page_stride, part_stride, head_stride,
    scale_page_stride, scale_part_stride, scale_head_stride, scale_token_stride, factor, cap, window,
    GROUP: tl.constexpr, NUM_HEADS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr,
    CODES: tl.constexpr, HARDWARE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Grid (items, kv_heads): the query rows of an item against its stretch of keys."""
    kv_head = tl.program_id(1)
    items += tl.program_id(0) * 5
    sequence, first_row, start, stop, slot = (
        tl.load(items), tl.load(items + 1), tl.load(items + 2), tl.load(items + 3), tl.load(items + 4),
    )  # fmt: skip
    begin = tl.load(cu_seqlens + sequence)
    num_tokens = tl.load(cu_seqlens + sequence + 1) - begin
    past = tl.load(lengths + sequence) - num_tokens

    row = first_row + tl.arange(0, ROWS)
    real = row < num_tokens * GROUP
    row = tl.minimum(row, num_tokens * GROUP - 1)  # rows past the last repeat it, and are not stored
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    place = past + token
    columns = tl.arange(0, COLUMNS)
    query_rows = head.to(tl.int64) * query_head_stride + (begin + token).to(tl.int64) * query_token_stride
    q = tl.load(
        query + query_rows[:, None] + columns[None, :], mask=real[:, None] & (columns[None, :] < VALUE_DIM), other=0
    )
    tail = q
    if TAIL:
        rest = tl.arange(0, TAIL)
        tail = tl.load(
            query + VALUE_DIM + query_rows[:, None] + rest[None, :],
            mask=real[:, None] & (rest[None, :] < HEAD_DIM - VALUE_DIM), other=0,
        )  # fmt: skip
    if CODES != "none":
        # Codes become float16 in one instruction, bfloat16 in several: so the query goes where float16 is precise.
        peak = tl.max(tl.abs(q.to(tl.float32)), 1)
        if TAIL:
            peak = tl.maximum(peak, tl.max(tl.abs(tail.to(tl.float32)), 1))
        rate = 1024.0 / tl.maximum(peak, 1e-30)
        q, tail = q.to(tl.float32) * rate[:, None], tail.to(tl.float32) * rate[:, None]
        factor = factor / rate[:, None]
    q, tail = q.to(COMPUTE), tail.to(COMPUTE)

    # Keys that some row sees, [floor, limit), and those that all rows see, [full_start, full_stop).
    early = past + first_row // GROUP
    late = past + (tl.minimum(first_row + ROWS, num_tokens * GROUP) - 1) // GROUP
    limit = tl.minimum(stop, late + 1)
    full_stop = tl.minimum(limit, early + 1)
    floor, full_start = 0, start
    if WINDOW:
        floor = tl.maximum(0, early + 1 - window)
        full_start = tl.maximum(start, start + (late + 1 - window - start + KEYS - 1) // KEYS * KEYS)
        full_start = tl.minimum(full_start, start + tl.maximum(limit - start, 0) // KEYS * KEYS)
    full_stop = start + tl.maximum(full_stop - start, 0) // KEYS * KEYS
    full_stop = tl.maximum(full_stop, full_start)

    pages += kv_head.to(tl.int64) * head_stride
    tables += sequence.to(tl.int64) * table_stride
    if scales is not None:
        scales += kv_head * scale_head_stride
    starts = (start, full_start, full_stop)
    stops = (full_start, full_stop, limit)
    state = (
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.zeros([ROWS, COLUMNS], tl.float32),
    )
    for part in tl.static_range(0 if WINDOW else 1, 3):
        for at in range(starts[part], stops[part], KEYS):
            state = _turn(
                state, q, tail, place, at, floor, limit, pages, tables, scales, page_stride, part_stride,
                scale_page_stride, scale_part_stride, scale_token_stride, factor, cap, window,
                part != 1, KEYS, BLOCK_TOKENS, HEAD_DIM, VALUE_DIM, COLUMNS, TAIL, WINDOW, CAP, CODES, HARDWARE, COMPUTE,
            )  # fmt: skip
    top, total, acc = state

    stored = real[:, None] & (columns[None, :] < VALUE_DIM)
    if slot >= 0:
        to = (slot.to(tl.int64) * tl.num_programs(1) + kv_head) * ROWS + tl.arange(0, ROWS)
        tl.store(partial + to[:, None] * VALUE_DIM + columns[None, :], acc, mask=stored)
        tl.store(stats + to * 2, top, mask=real)
        tl.store(stats + to * 2 + 1, total, mask=real)
    else:
        if sinks is not None:
            sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * _LOG2E
            peak = tl.maximum(top, sink)
            shrink = tl.exp2(top - peak)
            total = total * shrink + tl.exp2(sink - peak)
            acc *= shrink[:, None]
        out_row = (begin + token).to(tl.int64) * NUM_HEADS + head
        result = narrow(acc / total[:, None], out.dtype.element_ty)
        tl.store(out + out_row[:, None] * VALUE_DIM + columns[None, :], result, mask=stored)


@triton.jit(do_not_specialize_on_alignment=["merges", "sinks", "partial", "stats"])
def _merge(
    out, cu_seqlens, merges, partial, stats, sinks,
    GROUP: tl.constexpr, NUM_HEADS: tl.constexpr, ROWS: tl.constexpr, VALUE_DIM: tl.constexpr, COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid (merges * ROWS, kv_heads): one query row out of its partial results."""
    kv_head = tl.program_id(1)
    merges += tl.program_id(0) // ROWS * 4
    sequence, first_row, first_slot, num_slots = (
        tl.load(merges), tl.load(merges + 1), tl.load(merges + 2), tl.load(merges + 3),
    )  # fmt: skip
    begin = tl.load(cu_seqlens + sequence)
    num_tokens = tl.load(cu_seqlens + sequence + 1) - begin
    within = tl.program_id(0) % ROWS
    row = first_row + within
    if row >= num_tokens * GROUP:
        return
    head = kv_head * GROUP + row % GROUP
    base = (first_slot.to(tl.int64) * tl.num_programs(1) + kv_head) * ROWS + within
    stride = tl.num_programs(1) * ROWS

    slots = tl.arange(0, SLOTS)
    tops = tl.load(stats + (base + slots * stride) * 2, mask=slots < num_slots, other=float("-inf"))
    totals = tl.load(stats + (base + slots * stride) * 2 + 1, mask=slots < num_slots, other=0.0)
    peak = tl.max(tops, 0)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * _LOG2E
        peak = tl.maximum(peak, sink)
    total = tl.sum(totals * tl.exp2(tops - peak), 0)
    if sinks is not None:
        total += tl.exp2(sink - peak)

    columns = tl.arange(0, COLUMNS)
    acc = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, num_slots, STEP):
        some = first + tl.arange(0, STEP)
        rows = base + some * stride
        weights = tl.exp2(tl.load(stats + rows * 2, mask=some < num_slots, other=float("-inf")) - peak)
        mask = (some < num_slots)[:, None] & (columns[None, :] < VALUE_DIM)
        parts = tl.load(partial + rows[:, None] * VALUE_DIM + columns[None, :], mask=mask, other=0.0)
        acc += tl.sum(parts * weights[:, None], 0)
    to = (begin + row // GROUP).to(tl.int64) * NUM_HEADS + head
    result = narrow(acc / total, out.dtype.element_ty)
    tl.store(out + to * VALUE_DIM + columns, result, mask=columns < VALUE_DIM)


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
    """As the public function; key and value of this step are read from the pages like all others."""
    return _run(query, pages, batch, query.shape[2], Scoring(scale, window, softcap, sinks, scales))


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
    """As the public function."""
    return _run(query, pages, batch, value_dim, Scoring(scale, window, softcap, sinks, scales))


class _Work(NamedTuple):
    """One launch of `_attend`, and of `_merge` where results are partial; reused by every layer of a step."""

    tiles: Tiles
    items: Tensor
    merges: Tensor
    partial: Tensor
    stats: Tensor
    num_items: int
    num_merges: int
    most_slots: int


def _run(query: Tensor, pages: Tensor, batch: PagedBatch, value_dim: int, how: Scoring) -> Tensor:
    num_heads, num_tokens, head_dim = query.shape
    kv_heads, block_tokens = pages.shape[2:4]
    tail = head_dim - value_dim
    out = torch.empty((num_tokens, num_heads, value_dim), dtype=query.dtype, device=query.device)
    codes = _CODES.get(pages.dtype, "none")
    pages = pages.view(torch.uint8) if codes == "e4m3" else pages
    shape = {
        "GROUP": num_heads // kv_heads,
        "NUM_HEADS": num_heads,
        "VALUE_DIM": value_dim,
        "COLUMNS": _columns(value_dim),
    }
    key = ("work", query.shape, pages.shape, pages.dtype, value_dim, how.window)
    for work in batch.once(key, lambda: _works(query, pages, batch, value_dim, how.window)):
        rows = work.tiles.rows
        _attend[(work.num_items, kv_heads)](
            query, out, pages, batch.tables, batch.lengths, batch.cu_seqlens, work.items, work.partial, work.stats,
            how.scales, how.sinks,
            query.stride(0), query.stride(1), batch.tables.stride(0), *pages.stride()[:3],
            *_strides(how.scales),
            *_factors(how),
            how.window or 0,
            ROWS=rows, KEYS=work.tiles.keys, BLOCK_TOKENS=block_tokens, HEAD_DIM=head_dim,
            TAIL=_columns(tail) if tail else 0,
            WINDOW=how.window is not None, CAP=how.softcap is not None,
            CODES=codes, HARDWARE=has_e4m3(), COMPUTE=_compute(query, codes),
            **shape, num_warps=work.tiles.warps, num_stages=work.tiles.stages,
        )  # fmt: skip
        if work.num_merges:
            _merge[(work.num_merges * rows, kv_heads)](
                out, batch.cu_seqlens, work.merges, work.partial, work.stats, how.sinks,
                ROWS=rows, SLOTS=MAX_SPLITS, STEP=16, **shape, num_warps=4,
            )  # fmt: skip
    return out


def _factors(how: Scoring) -> tuple[float, float]:
    """What scores are multiplied with, and the cap; the softmax is in powers of two."""
    log2e = float(_LOG2E.value)
    if how.softcap is None:
        return how.scale * log2e, 0.0
    return how.scale / how.softcap, how.softcap * log2e


def _strides(scales: Tensor | None) -> tuple[int, ...]:
    if scales is None:
        return (0, 0, 0, 0)
    page, part, head, token = scales.stride()
    return (page, part if scales.shape[1] == 2 else 0, head, token)  # a latent is its own value


def _compute(query: Tensor, codes: str) -> object:
    """What the tensor cores multiply."""
    if INTERPRETED:  # whose dot multiplies the bit patterns of bfloat16 (triton 3.7.1)
        return tl.float32
    return tl.float16 if codes != "none" else _COMPUTE[query.dtype]


def _columns(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _works(query: Tensor, pages: Tensor, batch: PagedBatch, value_dim: int, window: int | None) -> list[_Work]:
    """Sequences with few query rows, and those with many, which want larger tiles."""
    kv_heads, head_dim, device = pages.shape[2], query.shape[2], query.device
    group = query.shape[0] // kv_heads
    if batch.plans is not None:
        return [_replayed(query, pages, batch, batch.plans, value_dim, window)]
    spans = np.asarray(batch.spans, np.int64).reshape(-1, 3)
    queries = spans[:, 1] - spans[:, 0]
    few = queries * group <= max(16, group)
    works = []
    for is_few in (True, False):
        sequences = np.flatnonzero((few == is_few) & (queries > 0))
        if not len(sequences):
            continue
        case = Case(is_few, head_dim, pages.element_size())
        tiles = tiles_for(case, group=group)
        cut = plan(
            batch.spans,
            sequences,
            group=group,
            kv_heads=kv_heads,
            window=window,
            tiles=tiles,
            resident=num_processors(device) * tiles.programs,
        )
        works.append(_sent(cut, tiles, kv_heads, value_dim, device))
    return works


def _replayed(
    query: Tensor, pages: Tensor, batch: PagedBatch, plans: Plans, value_dim: int, window: int | None
) -> _Work:
    """A launch of one size for whatever lengths come: its items are read anew at each replay. One token per sequence."""
    kv_heads, device, idle = pages.shape[2], query.device, batch.lengths.shape[0] - 1
    group = query.shape[0] // kv_heads
    tiles = tiles_for(Case(True, query.shape[2], pages.element_size()), group=group)
    num_tiles = idle * -(-group // tiles.rows)
    resident = num_processors(device) * tiles.programs
    num_items = most_items(num_tiles, kv_heads=kv_heads, resident=resident)

    def make(spans: list[Span]) -> np.ndarray[Any, Any]:
        cut = plan(
            spans, np.arange(len(spans)),
            group=group, kv_heads=kv_heads, window=window, tiles=tiles, resident=resident, most_items=num_items,
        )  # fmt: skip
        return padded(cut, sequence=idle, num_items=num_items, num_merges=num_tiles)

    both = plans.place(make, device)
    rows = num_items * kv_heads * tiles.rows
    return _Work(
        tiles,
        both[: num_items * 5],
        both[num_items * 5 :],
        torch.empty(rows * value_dim, dtype=torch.float32, device=device),
        torch.empty(rows * 2, dtype=torch.float32, device=device),
        num_items,
        num_tiles,
        min(MAX_SPLITS, num_items),
    )


def _sent(cut: Plan, tiles: Tiles, kv_heads: int, value_dim: int, device: torch.device) -> _Work:
    both = np.concatenate((cut.items.ravel(), cut.merges.ravel())).astype(np.int32)
    sent = torch.from_numpy(both).to(device, non_blocking=True)
    rows = max(1, cut.num_slots) * kv_heads * tiles.rows
    return _Work(
        tiles,
        sent[: cut.items.size],
        sent[cut.items.size :],
        torch.empty(rows * value_dim if cut.num_slots else 1, dtype=torch.float32, device=device),
        torch.empty(rows * 2, dtype=torch.float32, device=device),
        len(cut.items),
        len(cut.merges),
        cut.most_slots,
    )
