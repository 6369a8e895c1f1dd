"""Number formats inside kernels: widths, rounding, magnitudes, codes of int8 and e4m3. Functions that kernels call, nothing else.

Every one gives the same bits on every architecture, in Triton's interpreter and in torch, as long as the launch passes
`**EXACT`; of a NaN it promises that it is one, not its bits. fp8 travels as uint8: sm_80 knows no such type, and the
interpreter's cast to it is wrong, as are its casts of bfloat16: subnormals in, all that is rounded out (triton 3.7.1).
"""

from typing import Final

import triton
import triton.language as tl

from .launch import INTERPRETED

EXACT: Final = {"enable_fp_fusion": False}
"""Launch options of a kernel that rounds: a multiplication fused into `rounded_bits`' sum would be rounded once less."""

E4M3_MAX = tl.constexpr(448.0)
INT8_MAX = tl.constexpr(127.0)
SMALLEST = tl.constexpr(2.0**-126)
"""Least scale there is: the smallest float32 of full precision, whose inverse is still a number."""

_INTERPRETED = tl.constexpr(INTERPRETED)
_E4M3_NAN = tl.constexpr(0x7F)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2**23: at this size the last bit of a float32 is worth one


@triton.jit
def widen(x):
    """Anything a pool holds unquantised -> float32, exact."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 -> DTYPE, nearest, ties to even; beyond the largest number, infinity."""
    if _INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        upper = tl.where(is_finite_bits(magnitude_bits(x)), upper, (bits >> 16) | tl.where(x == x, 0, 0x40))
        return upper.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def rounded_bits(x):
    """int32 whose low bits are those of the nearest integer, ties to even, in two's complement; |x| < 2**22."""
    return (x + _ROUNDING).to(tl.int32, bitcast=True)


@triton.jit
def magnitude_bits(x):
    """Bits of |x| as int32: they order as |x| does, infinity and then NaN above every number, so their maximum hides neither."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def is_finite_bits(bits):
    """Whether `magnitude_bits` are those of a number."""
    return bits < _INFINITY_BITS


@triton.jit
def scale_of(amax_bits, LARGEST: tl.constexpr):
    """float32 scale that takes a group with such a greatest magnitude to ±LARGEST; NaN where that is not finite."""
    # Of the largest number, and of no other, 127 * (x / 127) rounds to infinity: take the one below.
    amax = tl.minimum(amax_bits, 0x7F7FFFFE).to(tl.float32, bitcast=True)
    scale = tl.maximum(tl.math.div_rn(amax, LARGEST), SMALLEST)
    return tl.where(is_finite_bits(amax_bits), scale, float("nan"))


@triton.jit
def inverse(scale):
    """1 / scale, rounded once: kernels and reference multiply by it, so that each group divides once."""
    return tl.math.div_rn(1.0, scale)


@triton.jit
def kept(scale):
    """int32 of all bits where scale > 0 is a number, of none where it is NaN: codes are masked with it, for NaN has any."""
    return (scale.to(tl.int32, bitcast=True) - _INFINITY_BITS) >> 31


@triton.jit
def int8_encode(x, scale):
    """Codes of x / scale, nearest, ties to even; zero where scale is NaN. |x / scale| <= 127, as `scale_of` sees to."""
    return (rounded_bits(x * inverse(scale)) & kept(scale)).to(tl.int8)


@triton.jit
def int8_decode(code):
    """int8 -> float32, exact."""
    # As the last byte of 2**23 + (code + 128): casts from integers run at a fraction of the rate of additions.
    return ((code.to(tl.int32) & 0xFF) ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def e4m3_encode(x, HARDWARE: tl.constexpr):
    """float32 -> e4m3 byte, nearest, ties to even; beyond ±448 saturates, NaN stays NaN, of either sign."""
    if HARDWARE:
        # The instruction saturates by itself: it knows no other way.
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # From 2**-6 on: rebase the exponent from 127 to 7 and drop 20 bits of mantissa, rounded; a carry lands in the exponent.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below it the format counts in steps of 2**-9, and 2**14 + x rounds to such steps: its last bit is worth 2**-9.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, small, normal)
    code = tl.where(size > 0x43E00000, 0x7E, code)
    code = tl.where(size > _INFINITY_BITS, _E4M3_NAN, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def e4m3_decode(byte, HARDWARE: tl.constexpr):
    """e4m3 byte -> float16, exact."""
    if HARDWARE:
        return byte.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    code = byte.to(tl.int16)
    # Its exponent and mantissa, read as a float16's, are worth 2**8 less: 15 - 7. That holds for subnormals too.
    value = (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return tl.where((code & 0x7F) == _E4M3_NAN, float("nan"), value.to(tl.float32)).to(tl.float16)
