"""Quantised tiles: fp8 per head, int8 per token and head, int4 in groups. Torch reference here; knows nothing of pages.

Tiles are `[..., block_tokens, head_dim]`, contiguous, float32, float16 or bfloat16; whatever leads (blocks, layers, K and V,
heads) is kept. Values are computed in float32, every step rounded to nearest with ties to even, and the same bits come
from the reference and from the GPU; of a NaN only that it is one. In every format

- a group (what shares a scale) with a value that is not finite has the scale NaN and zeros for codes: all of it decodes to NaN;
- a group of zeros decodes to zeros;
- a scale is at least 2**-126, so that groups of subnormals have one too.

`e` below is what float32 itself rounds, 2**-16 of the bound at most; then the result is rounded to the dtype asked for.
"""

from typing import Final

import torch

Tensor = torch.Tensor

_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
_E4M3_MAX: Final = 448.0
_INT8_MAX: Final = 127.0
_SMALLEST: Final = 2.0**-126
_INT4_LIMIT: Final = 2.0**126


def encode_fp8(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Encode as e4m3, one scale per tile, which takes its greatest magnitude to 448.

    Returns the payload, float8_e4m3fn of the tiles' shape, and the scale, float32 `[...]`; value = code * scale.
    |x - decoded| <= max(|x| / 16, scale / 1024) * (1 + e).  Raises ValueError for other tiles than the module speaks of.
    """
    _check_tiles(tiles)
    if tiles.is_cuda:
        from .gpu import quant as gpu

        with torch.cuda.device(tiles.device):
            return gpu.encode_fp8(tiles)
    values = tiles.float()
    scale = _scale(_amax(values.flatten(-2)), _E4M3_MAX)
    codes = values * scale.reciprocal()[..., None, None]
    codes = codes.masked_fill_(scale.isnan()[..., None, None], 0.0)
    return codes.clamp_(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn), scale


def decode_fp8(payload: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Decode what `encode_fp8` made. Raises ValueError if payload and scale are not such."""
    _check_payload(payload, torch.float8_e4m3fn, dtype)
    _check_parameter("scale", scale, payload, payload.shape[:-2], torch.float32)
    if payload.is_cuda:
        from .gpu import quant as gpu

        with torch.cuda.device(payload.device):
            return gpu.decode_fp8(payload, scale, dtype=dtype)
    return (payload.float() * scale[..., None, None]).to(dtype)


def encode_int8(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Encode as int8, symmetric, one scale per token and head, which takes its greatest magnitude to 127.

    Returns the payload, int8 of the tiles' shape, -127 … 127, and the scale, float32 `[..., block_tokens]`; value = code * scale.
    |x - decoded| <= max(amax / 254, 2**-127) * (1 + e).  Raises ValueError for other tiles than the module speaks of.
    """
    _check_tiles(tiles)
    if tiles.is_cuda:
        from .gpu import quant as gpu

        with torch.cuda.device(tiles.device):
            return gpu.encode_int8(tiles)
    values = tiles.float()
    scale = _scale(_amax(values), _INT8_MAX)
    codes = (values * scale.reciprocal()[..., None]).round_()
    return codes.masked_fill_(scale.isnan()[..., None], 0.0).to(torch.int8), scale


def decode_int8(payload: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Decode what `encode_int8` made. Raises ValueError if payload and scale are not such."""
    _check_payload(payload, torch.int8, dtype)
    _check_parameter("scale", scale, payload, payload.shape[:-1], torch.float32)
    if payload.is_cuda:
        from .gpu import quant as gpu

        with torch.cuda.device(payload.device):
            return gpu.decode_int8(payload, scale, dtype=dtype)
    return (payload.float() * scale[..., None]).to(dtype)


def encode_int4(tiles: Tensor, *, group: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Encode in 16 steps from the minimum to the maximum of each group of `group` = (tokens, channels).

    Keys per channel, (block_tokens, 1), and values per token, (1, 32): KIVI (Liu et al., 2024, arXiv 2402.02750).
    Returns the payload, uint8 `[..., block_tokens, head_dim / 2]`, channel d in the low nibble and d + head_dim / 2 in the
    high one; scale and minimum, bfloat16 `[..., block_tokens / tokens, head_dim / channels]`; value = code * scale + minimum.
    The minimum is rounded down and the scale up to bfloat16, so that no value is cut off:
    |x - decoded| <= scale / 2 * (1 + e) + |x| * 2**-23, where
    scale <= max((max - min + |min| / 128) / 15 * (1 + 1/128), 2**-126).
    A value beyond ±2**126 counts as not finite.  Raises ValueError for other tiles than the module speaks of, and unless
    tokens divide block_tokens and channels half of head_dim.
    """
    _check_tiles(tiles)
    shape = _group_shape(tiles.shape, group)
    if tiles.is_cuda:
        from .gpu import quant as gpu

        with torch.cuda.device(tiles.device):
            return gpu.encode_int4(tiles, group=group)
    values = _grouped(tiles.float(), group)
    least, most = values.amin((-3, -1)), values.amax((-3, -1))
    sound = (least >= -_INT4_LIMIT) & (most <= _INT4_LIMIT)  # not so of NaN
    minimum = torch.where(sound, _bf16_below(least), torch.nan)
    scale = torch.where(sound, _bf16_above(((most - minimum) / 15.0).clamp_min(_SMALLEST)), torch.nan)
    codes = (values - minimum[..., None, :, None]) * scale.reciprocal()[..., None, :, None]
    codes = codes.round_().masked_fill_(~sound[..., None, :, None], 0.0).to(torch.uint8).view(tiles.shape)
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4), _bf16(scale).view(shape), _bf16(minimum).view(shape)


def decode_int4(
    payload: Tensor, scale: Tensor, minimum: Tensor, *, group: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Decode what `encode_int4` made with the same `group`; float16 saturates.

    Steps may end a little above the greatest value, and the largest numbers of float16 must not become infinite by that.
    Raises ValueError if payload, scale and minimum are not such.
    """
    _check_payload(payload, torch.uint8, dtype)
    shape = _group_shape((*payload.shape[:-1], 2 * payload.shape[-1]), group)
    _check_parameter("scale", scale, payload, shape, torch.bfloat16)
    _check_parameter("minimum", minimum, payload, shape, torch.bfloat16)
    if payload.is_cuda:
        from .gpu import quant as gpu

        with torch.cuda.device(payload.device):
            return gpu.decode_int4(payload, scale, minimum, group=group, dtype=dtype)
    codes = torch.cat((payload & 15, payload >> 4), dim=-1)
    scale, minimum = (each.float().view(-1, 1, shape[-1], 1) for each in (scale, minimum))
    values = _grouped(codes.float(), group) * scale + minimum
    if dtype == torch.float16:
        values = values.clamp_(-65504.0, 65504.0)
    return values.to(dtype).view(codes.shape)


def _amax(values: Tensor) -> Tensor:
    """Greatest magnitude along the last dimension, float32; NaN counts as more than infinity."""
    bits = values.view(torch.int32) & 0x7FFFFFFF
    return bits.amax(-1).view(torch.float32)


def _scale(amax: Tensor, largest: float) -> Tensor:
    # Of the largest number, and of no other, 127 * (x / 127) rounds to infinity: take the one below.
    below = torch.tensor(0x7F7FFFFE, dtype=torch.int32).view(torch.float32)
    scale = (amax.minimum(below) / largest).clamp_min(_SMALLEST)
    return torch.where(amax.isfinite(), scale, torch.nan)


def _bf16_below(x: Tensor) -> Tensor:
    """The greatest number of bfloat16 that is not above x, as float32; never -0."""
    bits = x.view(torch.int32) + (x < 0).int() * 0xFFFF
    return (bits & -0x10000).view(torch.float32) + 0.0


def _bf16_above(x: Tensor) -> Tensor:
    """The least number of bfloat16 that is not below x >= 0, as float32."""
    return ((x.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def _bf16(x: Tensor) -> Tensor:
    """Of float32 that bfloat16 holds: a cast would change the bits of NaN, from one processor to the next."""
    return (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def _grouped(tiles: Tensor, group: tuple[int, int]) -> Tensor:
    """`[groups of tokens, tokens, groups of channels, channels]`; in each, leading dimensions are part of the first."""
    tokens, channels = group
    return tiles.view(-1, tokens, tiles.shape[-1] // channels, channels)


def _check_tiles(tiles: Tensor) -> None:
    if tiles.dtype not in _DTYPES:
        raise ValueError(f"tiles of {tiles.dtype}: float32, float16 or bfloat16 can be quantised")
    if tiles.dim() < 2 or not tiles.is_contiguous() or 0 in tiles.shape[-2:]:
        raise ValueError(
            f"tiles of shape {list(tiles.shape)}, strides {tiles.stride()}: [..., block_tokens, head_dim], "
            "contiguous, is expected; call .contiguous() on a view"
        )


def _check_payload(payload: Tensor, expected: torch.dtype, dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype}: float32, float16 or bfloat16 can be asked for")
    if payload.dtype != expected or payload.dim() < 2 or not payload.is_contiguous() or 0 in payload.shape[-2:]:
        raise ValueError(
            f"payload of {payload.dtype}, shape {list(payload.shape)}, strides {payload.stride()}: {expected}, "
            "[..., block_tokens, head_dim], contiguous, is expected, as the encoder returns it"
        )


def _check_parameter(name: str, given: Tensor, payload: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if given.shape != torch.Size(shape) or given.dtype != dtype or given.device != payload.device:
        raise ValueError(
            f"{name} of {given.dtype}, shape {list(given.shape)}, on {given.device}: {dtype}, {list(shape)}, "
            f"on {payload.device} is expected, as the encoder returns it"
        )
    if not given.is_contiguous():
        raise ValueError(f"{name} of strides {given.stride()}: contiguous is expected; call .contiguous()")


def _group_shape(tiles: tuple[int, ...], group: tuple[int, int]) -> tuple[int, ...]:
    """Shape of a group's parameters, one per group."""
    *leading, block_tokens, head_dim = tiles
    tokens, channels = group
    if tokens < 1 or channels < 1 or block_tokens % tokens or head_dim % (2 * channels):
        raise ValueError(
            f"group={group} in tiles of {block_tokens} x {head_dim}: tokens that divide {block_tokens} and channels "
            f"that divide half of {head_dim} are expected, because a byte holds channels of both halves"
        )
    return (*leading, block_tokens // tokens, head_dim // channels)
