"""Quantised tiles in Triton: one pass over memory each, codes are made while the values are in registers.

Tiles are contiguous, so all leading dimensions are one: fp8 and int8 see rows that share a scale, int4 sees spans of as
many tokens as a group has, next to each other.
"""

from typing import Final

import torch
import triton
import triton.language as tl

from .floats import (
    E4M3_MAX,
    EXACT,
    INT8_MAX,
    SMALLEST,
    e4m3_decode,
    e4m3_encode,
    int8_decode,
    int8_encode,
    inverse,
    kept,
    magnitude_bits,
    narrow,
    rounded_bits,
    scale_of,
    widen,
)
from .launch import has_e4m3

Tensor = torch.Tensor

# Per program. With 128 threads, each has four 16-byte loads of 16-bit values in flight.
_ELEMENTS: Final = 4096
# What a value in int4 may reach: beyond, steps or their sums could pass the largest float32.
_INT4_LIMIT = tl.constexpr(2.0**126)


@triton.jit
def _encode(
    tiles, payload, scales, num_rows,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr, E4M3: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, column = tl.arange(0, ROWS), tl.arange(0, PADDED)
    at = first * WIDTH + row[:, None] * WIDTH + column[None, :]
    if MASKED:
        whole = first + row < num_rows
        inside = whole[:, None] & (column < WIDTH)[None, :]
        values = widen(tl.load(tiles + at, mask=inside, other=0.0))
    else:
        values = widen(tl.load(tiles + at))
    amax_bits = tl.max(magnitude_bits(values), axis=1)
    if E4M3:
        scale = scale_of(amax_bits, E4M3_MAX)
        values = tl.where((scale == scale)[:, None], values * inverse(scale)[:, None], 0.0)
        codes = e4m3_encode(values, HARDWARE)
    else:
        scale = scale_of(amax_bits, INT8_MAX)
        codes = int8_encode(values, scale[:, None])
    if MASKED:
        tl.store(payload + at, codes, mask=inside)
        tl.store(scales + first + row, scale, mask=whole)
    else:
        tl.store(payload + at, codes)
        tl.store(scales + first + row, scale)


@triton.jit
def _decode(
    payload, scales, tiles, num_rows,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, SHARING: tl.constexpr,
    MASKED: tl.constexpr, E4M3: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Rows of which SHARING have one scale."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, column = tl.arange(0, ROWS), tl.arange(0, PADDED)
    at = first * WIDTH + row[:, None] * WIDTH + column[None, :]
    # A thread reads at once what makes the 16 bytes that it writes at once: then no value changes threads.
    codes_at = tl.max_contiguous(at, [1, 128 // tiles.dtype.element_ty.primitive_bitwidth])
    if MASKED:
        whole = first + row < num_rows
        inside = whole[:, None] & (column < WIDTH)[None, :]
        codes = tl.load(payload + codes_at, mask=inside, other=0)
        scale = tl.load(scales + (first + row) // SHARING, mask=whole, other=0.0)
    else:
        codes = tl.load(payload + codes_at)
        scale = tl.load(scales + (first + row) // SHARING)
    if E4M3:
        values = e4m3_decode(codes, HARDWARE).to(tl.float32)
    else:
        values = int8_decode(codes)
    values = narrow(values * scale[:, None], tiles.dtype.element_ty)
    if MASKED:
        tl.store(tiles + at, values, mask=inside)
    else:
        tl.store(tiles + at, values)


@triton.jit
def _bf16_below(x):
    """The greatest number of bfloat16 that is not above x, as float32; never -0."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + tl.where(x < 0, 0xFFFF, 0)) & -0x10000).to(tl.float32, bitcast=True) + 0.0


@triton.jit
def _bf16_above(x):
    """The least number of bfloat16 that is not below x >= 0, as float32."""
    return ((x.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _bf16_bits(x):
    """Of a float32 that bfloat16 holds, as int16: a cast would change the bits of NaN."""
    return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16)


@triton.jit
def _extremes(values, inside, MASKED: tl.constexpr):
    """Least and greatest value of each group; NaN, or the infinity, where there is one."""
    bits = values.to(tl.uint32, bitcast=True)
    # Negative numbers are above all others as unsigned integers, and the further from zero the higher; below all others as
    # signed ones. NaN is further from zero than any number. So three maxima say all, with nothing to do per value.
    if MASKED:
        smallest = tl.where(inside, bits, 0xFFFFFFFF)
        signed = tl.where(inside, bits.to(tl.int32, bitcast=True), -0x80000000)
    else:
        smallest, signed = bits, bits.to(tl.int32, bitcast=True)
    nearest = tl.min(tl.min(smallest, axis=2), axis=0).to(tl.int32, bitcast=True)
    lowest = tl.max(tl.max(bits, axis=2), axis=0).to(tl.int32, bitcast=True)
    highest = tl.max(tl.max(signed, axis=2), axis=0)
    least = tl.where(lowest < 0, lowest, nearest)
    most = tl.where(highest < 0, nearest, highest)
    return least.to(tl.float32, bitcast=True), most.to(tl.float32, bitcast=True)


@triton.jit
def _encode_groups(values, inside, MASKED: tl.constexpr):
    """int32 [tokens, groups, channels] that end in the code, or in anything if the scale is NaN; scale and minimum, float32."""
    least, most = _extremes(values, inside, MASKED)
    sound = (least >= -_INT4_LIMIT) & (most <= _INT4_LIMIT)  # not so of NaN
    minimum = tl.where(sound, _bf16_below(least), float("nan"))
    scale = _bf16_above(tl.maximum(tl.math.div_rn(most - minimum, 15.0), SMALLEST))
    scale = tl.where(sound, scale, float("nan"))
    steps = (values - minimum[None, :, None]) * inverse(scale)[None, :, None]
    return rounded_bits(steps), scale, minimum


@triton.jit
def _places(
    num_groups, HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr, TOKENS_PADDED: tl.constexpr,
    CHANNELS: tl.constexpr, CHANNELS_PADDED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Tokens and channels [tokens, groups, channels], whether they are there; places of parameters, whether they are there.

    Of the groups of low nibbles: their partners lie half of HEAD_DIM further, in parameters as many as lie beside each other.
    """
    beside: tl.constexpr = HEAD_DIM // 2 // CHANNELS
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    token, channel = tl.arange(0, TOKENS_PADDED)[:, None, None], tl.arange(0, CHANNELS_PADDED)[None, None, :]
    exists = group < num_groups
    inside = exists[None, :, None] & (token < TOKENS) & (channel < CHANNELS)
    token = (group // beside * TOKENS)[None, :, None] + token
    channel = (group % beside * CHANNELS)[None, :, None] + channel
    parameter = group // beside * (2 * beside) + group % beside
    return token, channel, inside, parameter, exists


@triton.jit
def _encode_int4(
    tiles, payload, scales, minimums, num_groups,
    HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr, TOKENS_PADDED: tl.constexpr,
    CHANNELS: tl.constexpr, CHANNELS_PADDED: tl.constexpr, GROUPS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = HEAD_DIM // 2
    token, channel, inside, parameter, exists = _places(
        num_groups, HEAD_DIM, TOKENS, TOKENS_PADDED, CHANNELS, CHANNELS_PADDED, GROUPS
    )
    at, packed_at = token * HEAD_DIM + channel, token * half + channel
    if CHANNELS == 1:
        # Told of no more than pairs, the compiler gives a thread all tokens of two channels, and nothing is exchanged.
        at, packed_at = tl.max_contiguous(at, [1, 2, 1]), tl.max_contiguous(packed_at, [1, 2, 1])
    if MASKED:
        low = widen(tl.load(tiles + at, mask=inside, other=0.0))
        high = widen(tl.load(tiles + at + half, mask=inside, other=0.0))
    else:
        inside, exists = None, None
        low = widen(tl.load(tiles + at))
        high = widen(tl.load(tiles + at + half))
    low, low_scale, low_minimum = _encode_groups(low, inside, MASKED)
    high, high_scale, high_minimum = _encode_groups(high, inside, MASKED)
    low, high = low & (kept(low_scale) & 0x0F)[None, :, None], high & (kept(high_scale) & 0x0F)[None, :, None]
    tl.store(payload + packed_at, (low | (high << 4)).to(tl.uint8), mask=inside)
    partner = parameter + half // CHANNELS
    tl.store(scales + parameter, _bf16_bits(low_scale), mask=exists)
    tl.store(scales + partner, _bf16_bits(high_scale), mask=exists)
    tl.store(minimums + parameter, _bf16_bits(low_minimum), mask=exists)
    tl.store(minimums + partner, _bf16_bits(high_minimum), mask=exists)


@triton.jit
def _decode_int4(
    payload, scales, minimums, tiles, num_groups,
    HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr, TOKENS_PADDED: tl.constexpr,
    CHANNELS: tl.constexpr, CHANNELS_PADDED: tl.constexpr, GROUPS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = HEAD_DIM // 2
    token, channel, inside, parameter, exists = _places(
        num_groups, HEAD_DIM, TOKENS, TOKENS_PADDED, CHANNELS, CHANNELS_PADDED, GROUPS
    )
    at, packed_at = token * HEAD_DIM + channel, token * half + channel
    if not MASKED:
        inside, exists = None, None
    # A thread reads at once what makes the 16 bytes that it writes at once: then no value changes threads.
    vector: tl.constexpr = 128 // tiles.dtype.element_ty.primitive_bitwidth
    packed_at = tl.max_contiguous(packed_at, [1, vector, 1] if CHANNELS == 1 else [1, 1, vector])
    codes = tl.load(payload + packed_at, mask=inside).to(tl.int32)
    for nibble in tl.static_range(2):
        own = parameter + nibble * (half // CHANNELS)
        scale = widen(tl.load(scales + own, mask=exists))
        minimum = widen(tl.load(minimums + own, mask=exists))
        # As the last bits of 2**23 + code. code * scale is exact, so the sum alone rounds.
        step = (((codes >> (4 * nibble)) & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
        values = step * scale[None, :, None] + minimum[None, :, None]
        if tiles.dtype.element_ty == tl.float16:
            values = tl.clamp(values, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(tiles + at + nibble * half, narrow(values, tiles.dtype.element_ty), mask=inside)


def encode_fp8(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """As `kernels.quant`."""
    payload = torch.empty_like(tiles, dtype=torch.uint8)
    scale = tiles.new_empty(tiles.shape[:-2], dtype=torch.float32)
    _launch_encode(tiles, payload, scale)
    return payload.view(torch.float8_e4m3fn), scale


def decode_fp8(payload: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """As `kernels.quant`."""
    tiles = torch.empty_like(payload, dtype=dtype)
    _launch_decode(payload.view(torch.uint8), scale, tiles)
    return tiles


def encode_int8(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """As `kernels.quant`."""
    payload = torch.empty_like(tiles, dtype=torch.int8)
    scale = tiles.new_empty(tiles.shape[:-1], dtype=torch.float32)
    _launch_encode(tiles, payload, scale)
    return payload, scale


def decode_int8(payload: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """As `kernels.quant`."""
    tiles = torch.empty_like(payload, dtype=dtype)
    _launch_decode(payload, scale, tiles)
    return tiles


def encode_int4(tiles: Tensor, *, group: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.quant`."""
    *leading, block_tokens, head_dim = tiles.shape
    payload = tiles.new_empty((*leading, block_tokens, head_dim // 2), dtype=torch.uint8)
    shape = (*leading, block_tokens // group[0], head_dim // group[1])
    scale, minimum = tiles.new_empty(shape, dtype=torch.bfloat16), tiles.new_empty(shape, dtype=torch.bfloat16)
    if scale.numel():
        grid, sizes = _int4_sizes(scale.numel() // 2, head_dim, group)
        bits = scale.view(torch.int16), minimum.view(torch.int16)
        _encode_int4[grid](tiles, payload, *bits, scale.numel() // 2, **sizes, **EXACT)
    return payload, scale, minimum


def decode_int4(
    payload: Tensor, scale: Tensor, minimum: Tensor, *, group: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """As `kernels.quant`."""
    tiles = payload.new_empty((*payload.shape[:-1], 2 * payload.shape[-1]), dtype=dtype)
    if scale.numel():
        grid, sizes = _int4_sizes(scale.numel() // 2, tiles.shape[-1], group)
        _decode_int4[grid](payload, scale, minimum, tiles, scale.numel() // 2, **sizes, **EXACT)
    return tiles


def _launch_encode(tiles: Tensor, payload: Tensor, scale: Tensor) -> None:
    if scale.numel():
        grid, sizes = _sizes(scale.numel(), tiles.numel() // scale.numel())
        _encode[grid](tiles, payload, scale, scale.numel(), **sizes, **_format(payload), **EXACT)


def _launch_decode(payload: Tensor, scale: Tensor, tiles: Tensor) -> None:
    if scale.numel():
        num_rows = payload.numel() // payload.shape[-1]
        grid, sizes = _sizes(num_rows, payload.shape[-1])
        sharing = num_rows // scale.numel()
        _decode[grid](payload, scale, tiles, num_rows, SHARING=sharing, **sizes, **_format(payload), **EXACT)


def _format(payload: Tensor) -> dict[str, bool]:
    return {"E4M3": payload.dtype == torch.uint8, "HARDWARE": has_e4m3()}


def _sizes(num_rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    padded = triton.next_power_of_2(width)
    rows = max(1, _ELEMENTS // padded)
    masked = padded != width or num_rows % rows != 0
    warps = min(16, max(4, rows * padded // 2048))
    return (triton.cdiv(num_rows, rows),), {
        "WIDTH": width,
        "PADDED": padded,
        "ROWS": rows,
        "MASKED": masked,
        "num_warps": warps,
    }


def _int4_sizes(num_groups: int, head_dim: int, group: tuple[int, int]) -> tuple[tuple[int], dict[str, int]]:
    tokens, channels = map(triton.next_power_of_2, group)
    # Per channel: 64 channels wide, so that a warp reads 128 bytes of 16-bit values at a time.
    groups = max(1, 2048 // (tokens * channels)) if channels > 1 else max(64, 1024 // tokens)
    elements = 2 * groups * tokens * channels
    warps = min(16, max(1, elements // (1024 if channels > 1 else 2048)))
    masked = (tokens, channels) != group or num_groups % groups != 0
    return (triton.cdiv(num_groups, groups),), {
        "HEAD_DIM": head_dim,
        "TOKENS": group[0],
        "TOKENS_PADDED": tokens,
        "CHANNELS": group[1],
        "CHANNELS_PADDED": channels,
        "GROUPS": groups,
        "MASKED": masked,
        "num_warps": warps,
    }
