"""Number formats inside kernels against numbers worked out in float64, over all codes and all places where rounding turns."""

import pytest
import torch
import triton
import triton.language as tl

from tests.kernel_cases import on_each_device, same_bits
from tierkv.kernels.gpu.floats import (
    EXACT,
    e4m3_decode,
    e4m3_encode,
    int8_decode,
    int8_encode,
    magnitude_bits,
    narrow,
    scale_of,
    widen,
)
from tierkv.kernels.gpu.launch import has_e4m3

Tensor = torch.Tensor

BLOCK = 4096
E4M3 = torch.float8_e4m3fn
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
INFINITY = float("inf")

# The interpreter computes with numpy, which speaks up where a number leaves float16's range or a NaN is a signalling one.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in (add|cast|multiply):RuntimeWarning"),
]


@triton.jit
def _each(x, out, BLOCK: tl.constexpr, STEP: tl.constexpr, HARDWARE: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at)
    if STEP == "widen":
        value = widen(value)
    elif STEP == "narrow":
        value = narrow(value, out.dtype.element_ty)
    elif STEP == "e4m3_encode":
        value = e4m3_encode(value, HARDWARE)
    elif STEP == "e4m3_decode":
        value = e4m3_decode(value, HARDWARE)
    elif STEP == "int8_decode":
        value = int8_decode(value)
    else:
        value = int8_encode(value, scale_of(magnitude_bits(value), 127.0))
    tl.store(out + at, value)


def each(step: str, x: Tensor, dtype: torch.dtype, device: str, *, hardware: bool | None = None) -> Tensor:
    """Of every element of x by itself: what `step` makes of it, on the CPU."""
    blocks = -(-x.numel() // BLOCK)
    padded = x.new_zeros(blocks * BLOCK)
    padded[: x.numel()] = x
    out = torch.empty(blocks * BLOCK, dtype=dtype, device=device)
    hardware = has_e4m3() if hardware is None else hardware
    _each[(blocks,)](padded.to(device), out, BLOCK=BLOCK, STEP=step, HARDWARE=hardware, **EXACT)
    return out[: x.numel()].cpu()


def any_floats(count: int, seed: int = 0) -> Tensor:
    """Any bits at all: every exponent, subnormals, infinities, NaN."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32, generator=generator).view(torch.float32)


def all_bits(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def e4m3_numbers() -> Tensor:
    """The 127 numbers of e4m3 from 0 to 448, in order of their codes, from the format's definition."""
    code = torch.arange(0x7F, dtype=torch.float64)
    exponent, mantissa = code // 8, code % 8
    return torch.where(exponent > 0, (1 + mantissa / 8) * 2 ** (exponent - 7), mantissa / 8 * 2.0**-6)


def e4m3_turns() -> Tensor:
    """Numbers of e4m3, what lies halfway between them, their neighbours in float32, and all that is special."""
    numbers = e4m3_numbers()
    middles = (numbers[1:] + numbers[:-1]) / 2
    edges = torch.cat(
        (numbers, middles, torch.tensor([464.0, 480.0, 65504.0, 2.0**-126, 2.0**-149], dtype=torch.float64))
    )
    edges = edges.float()
    up, down = torch.tensor(INFINITY), torch.tensor(-INFINITY)
    edges = torch.cat(
        (edges, edges.nextafter(up), edges.nextafter(down), torch.tensor([3.4e38, INFINITY, float("nan")]))
    )
    return torch.cat((edges, -edges))


def e4m3_codes(x: Tensor) -> Tensor:
    """Nearest codes, ties to the even one, saturating; by search among float64 numbers."""
    numbers = e4m3_numbers()
    middles = (numbers[1:] + numbers[:-1]) / 2
    size = x.double().abs()
    low, high = torch.searchsorted(middles, size), torch.searchsorted(middles, size, right=True)
    code = torch.where(low % 2 == 0, low, high)
    code = torch.where(x.isnan(), 0x7F, code)
    return (code + torch.where(x.signbit(), 0x80, 0)).to(torch.uint8)


def assert_same_codes(codes: Tensor, expected: Tensor) -> None:
    """A NaN may have either sign."""
    nan = expected & 0x7F == 0x7F
    assert torch.equal(codes[nan] & 0x7F, expected[nan] & 0x7F)
    assert torch.equal(codes[~nan], expected[~nan])


@pytest.mark.parametrize("x", [e4m3_turns(), any_floats(100_000)], ids=["turns", "any bits"])
@on_each_device
def test_e4m3_is_the_nearest_number(device: str, x: Tensor) -> None:
    assert_same_codes(each("e4m3_encode", x, torch.uint8, device), e4m3_codes(x))


def test_torch_rounds_to_e4m3_alike() -> None:
    x = torch.cat((e4m3_turns(), any_floats(100_000)))
    assert_same_codes(x.clamp(-448.0, 448.0).to(E4M3).view(torch.uint8), e4m3_codes(x))


@on_each_device
def test_every_e4m3_byte_decodes_exactly(device: str) -> None:
    byte = torch.arange(256, dtype=torch.uint8)
    values = each("e4m3_decode", byte, torch.float16, device)
    numbers = torch.cat((e4m3_numbers(), torch.tensor([float("nan")])))
    torch.testing.assert_close(values.double(), torch.cat((numbers, -numbers)), rtol=0, atol=0, equal_nan=True)
    assert values[0x80].signbit()
    torch.testing.assert_close(values.float(), byte.view(E4M3).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_the_instruction_for_e4m3_does_what_integers_do() -> None:
    if not has_e4m3():
        pytest.skip("this card converts e4m3 with integers only: it is older than sm_89")
    x, byte = torch.cat((e4m3_turns(), any_floats(1 << 20))), torch.arange(256, dtype=torch.uint8)
    by_hardware, by_integers = (each("e4m3_encode", x, torch.uint8, "cuda", hardware=on) for on in (True, False))
    assert_same_codes(by_hardware, by_integers)
    decoded = [each("e4m3_decode", byte, torch.float16, "cuda", hardware=on) for on in (True, False)]
    torch.testing.assert_close(*decoded, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@on_each_device
def test_every_number_of_16_bits_widens_exactly(device: str, dtype: torch.dtype) -> None:
    x = all_bits(dtype)
    wide, number = each("widen", x, torch.float32, device), ~x.isnan()
    assert same_bits(wide[number], x.float()[number])
    assert wide[~number].isnan().all()


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@on_each_device
def test_narrowing_takes_the_nearest_number_and_ties_go_to_even(device: str, dtype: torch.dtype) -> None:
    numbers = all_bits(torch.bfloat16 if dtype == torch.float32 else dtype).float()
    numbers = numbers[numbers.isfinite()].sort().values
    middles = ((numbers[1:].double() + numbers[:-1].double()) / 2).float()
    x = torch.cat((middles, middles.nextafter(torch.tensor(INFINITY)), any_floats(50_000), torch.tensor([INFINITY])))
    narrowed, expected = each("narrow", x, dtype, device), x.to(dtype)
    assert same_bits(narrowed[~x.isnan()], expected[~x.isnan()])
    assert narrowed[x.isnan()].isnan().all()


@on_each_device
def test_every_int8_decodes_exactly(device: str) -> None:
    codes = torch.arange(-128, 128).to(torch.int8)
    assert same_bits(each("int8_decode", codes, torch.float32, device), codes.float())


@on_each_device
def test_a_value_on_its_own_scale_is_127(device: str) -> None:
    x = any_floats(50_000)
    codes = each("int8_encode", x, torch.int8, device)
    whole = x.abs() >= 127 * 2.0**-126  # below, the scale stays at its least
    expected = torch.where(whole, 127 * x.sign(), torch.round(x * 2.0**126))
    assert torch.equal(codes, torch.where(x.isfinite(), expected, 0.0).to(torch.int8))
