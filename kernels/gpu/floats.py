"""Number formats inside kernels: e4m3 bytes, rounding, magnitudes. Functions that kernels call, nothing else.

Every one gives the same bits on every architecture, in Triton's interpreter and in torch, as long as the launch passes
`**EXACT`. fp8 travels as uint8: sm_80 knows no such type, and the interpreter's cast to it is wrong (triton 3.7.1).
"""

from typing import Final

import triton
import triton.language as tl

EXACT: Final = {"enable_fp_fusion": False}
"""Launch options of a kernel that rounds: a multiplication fused into `round_half_even`'s sum would be rounded once less."""

E4M3_MAX = tl.constexpr(448.0)
_E4M3_NAN = tl.constexpr(0x7F)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2**23: at this size the last bit of a float32 is worth one


@triton.jit
def round_half_even(x):
    """The nearest integer, ties to even, as float32; |x| < 2**22."""
    return (x + _ROUNDING) - _ROUNDING


@triton.jit
def magnitude_bits(x):
    """Bits of |x| as int32: they order as |x| does, infinity and then NaN above every number, so their maximum hides neither."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def is_finite_bits(bits):
    """Whether `magnitude_bits` are those of a number."""
    return bits < _INFINITY_BITS


@triton.jit
def e4m3_encode(x, HARDWARE: tl.constexpr):
    """float32 -> e4m3 byte, nearest, ties to even; beyond ±448 saturates, NaN stays NaN."""
    if HARDWARE:
        # `clamp` keeps NaN only when asked to.
        x = tl.clamp(x, -E4M3_MAX, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
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
