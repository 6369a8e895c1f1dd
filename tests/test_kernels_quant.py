"""Quantised tiles: kernels give the bits of the reference, and the reference keeps to the bounds it promises."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernel_cases import kernel, on_each_device, reference, same_bits
from tierkv.kernels.quant import decode_fp8, decode_int4, decode_int8, encode_fp8, encode_int4, encode_int8

Tensor = torch.Tensor

E4M3 = torch.float8_e4m3fn
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SLACK = 1 + 2.0**-16  # what the docstrings call e

# The interpreter computes with numpy, which speaks up where a number leaves float16's range or a NaN is a signalling one.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in (add|subtract|cast|multiply):RuntimeWarning"),
    # Lanes beyond a group hold zeros, which may be very many of its steps away; what they come to is not stored.
    pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning"),
]


@dataclass(frozen=True)
class Format:
    """One of the formats by the names of its functions; `group` is for int4 alone."""

    name: str
    group: tuple[int, int] | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {} if self.group is None else {"group": self.group}

    def encode(self, tiles: Tensor, device: str = "") -> tuple[Tensor, ...]:
        coded: tuple[Tensor, ...] = self._call("encode", device)(at(device, tiles), **self.options)
        return coded

    def decode(self, coded: tuple[Tensor, ...], dtype: torch.dtype, device: str = "") -> Tensor:
        tiles: Tensor = self._call("decode", device)(*(at(device, each) for each in coded), dtype=dtype, **self.options)
        return tiles

    def _call(self, verb: str, device: str) -> Callable[..., Any]:
        name = f"{verb}_{self.name}"
        return kernel("quant", name, device) if device else reference("quant", name)

    def grouped(self, tiles: Tensor) -> Tensor:
        """`[groups, values]`: what shares a scale in one row."""
        block_tokens, head_dim = tiles.shape[-2:]
        tokens, channels = self.group or ((block_tokens, head_dim) if self.name == "fp8" else (1, head_dim))
        parts = tiles.reshape(-1, tokens, head_dim // channels, channels)
        return parts.transpose(1, 2).reshape(-1, tokens * channels)


def at(device: str, tensor: Tensor) -> Tensor:
    return tensor.to("cuda") if device == "cuda" else tensor


def formats(block_tokens: int, head_dim: int) -> list[Format]:
    half = head_dim // 2
    channels = 32 if half % 32 == 0 else max(1, half // 2)
    # Quarters of odd halves are no groups.
    channels = channels if half % channels == 0 else half
    groups = {(block_tokens, 1), (1, channels), (1, half), (block_tokens, channels)}
    return [Format("fp8"), Format("int8"), *(Format("int4", group) for group in sorted(groups))]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def within_limit(tiles: Tensor) -> Tensor:
    """Of what int4 takes."""
    return tiles.float().clamp(-(2.0**126), 2.0**126).to(tiles.dtype)


def any_bits(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def finite_bits(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    tiles = any_bits(*shape, dtype=dtype, seed=seed)
    return torch.where(tiles.isfinite(), tiles, 1.0)


@st.composite
def finite_tiles(draw: st.DrawFn) -> Tensor:
    """Tiles of awkward sizes and awkward finite values."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 20)), 2 * draw(st.integers(1, 60)))
    dtype, seed = draw(st.sampled_from(FLOATS)), draw(st.integers(0, 1 << 20))
    tiles, largest = normal(*shape, seed=seed), torch.finfo(dtype).max
    kind = draw(st.sampled_from(["normal", "huge", "tiny", "mixed", "constant", "outlier", "offset", "zeros"]))
    if kind == "huge":
        tiles = (tiles.clamp(-1, 1).double() * largest).float()
    elif kind == "tiny":
        tiles = tiles * 2.0 ** draw(st.integers(-149, -100))
    elif kind == "mixed":
        return finite_bits(*shape, dtype=dtype, seed=seed)
    elif kind == "constant":
        tiles = tiles[:, :1, :1].expand(shape) * 2.0 ** draw(st.integers(-14, 15))
    elif kind == "outlier":
        tiles.view(-1)[seed % tiles.numel()] = draw(st.sampled_from([largest, -largest, 1e4, -1e-4]))
    elif kind == "offset":
        tiles = tiles + draw(st.sampled_from([1000.0, -30000.0]))
    elif kind == "zeros":
        tiles = tiles * 0.0
    return tiles.clamp(-largest, largest).to(dtype).contiguous()


def assert_same_values(tiles: Tensor, expected: Tensor) -> None:
    """Bit for bit but for NaN, of which it is promised only that it is one."""
    nan = expected.isnan()
    assert torch.equal(tiles.cpu().isnan(), nan)
    assert same_bits(tiles.cpu()[~nan], expected[~nan])


def assert_same_as_reference(form: Format, tiles: Tensor, device: str) -> None:
    before = tiles.clone()
    expected, coded = form.encode(tiles), form.encode(tiles, device)
    assert same_bits(tiles, before)
    for one, other in zip(coded, expected, strict=True):
        assert one.shape == other.shape and same_bits(one.view(-1), other.view(-1)), form
    for dtype in FLOATS:
        assert_same_values(form.decode(expected, dtype, device), form.decode(expected, dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 64),  # one token
        (2, 3, 2, 16, 64),
        (7, 5, 80),  # no power of two
        (3, 48, 96),  # several programs, the last one not full
        (2, 16, 128),
        (5, 1, 192),
        (1, 128, 256),
        (1, 16, 576),
        (0, 16, 128),
    ],
    ids=str,
)
@on_each_device
def test_kernels_give_the_bits_of_the_reference(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tiles = normal(*shape, dtype=dtype)
    for form in formats(*shape[-2:]):
        assert_same_as_reference(form, tiles, device)


@on_each_device
@given(tiles=finite_tiles(), data=st.data())
@settings(max_examples=50, deadline=None)
def test_kernels_give_the_bits_of_the_reference_for_awkward_values(
    device: str, tiles: Tensor, data: st.DataObject
) -> None:
    assert_same_as_reference(data.draw(st.sampled_from(formats(*tiles.shape[-2:]))), tiles, device)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_each_device
def test_kernels_give_the_bits_of_the_reference_for_any_bits(device: str, dtype: torch.dtype) -> None:
    tiles = any_bits(9, 16, 64, dtype=dtype, seed=1)
    tiles[1::2] = finite_bits(4, 16, 64, dtype=dtype, seed=2)
    for form in formats(16, 64):
        assert_same_as_reference(form, tiles, device)


@given(tiles=finite_tiles())
@settings(max_examples=200, deadline=None)
def test_int8_is_within_its_bound(tiles: Tensor) -> None:
    form, x = Format("int8"), tiles.double()
    decoded = form.decode(form.encode(tiles), torch.float32).double()
    bound = (x.abs().amax(-1, keepdim=True) / 254).clamp_min(2.0**-127)
    assert ((x - decoded).abs() <= bound * SLACK).all()


@given(tiles=finite_tiles())
@settings(max_examples=200, deadline=None)
def test_fp8_is_within_its_bound(tiles: Tensor) -> None:
    form, x = Format("fp8"), tiles.double()
    payload, scale = form.encode(tiles)
    decoded = form.decode((payload, scale), torch.float32).double()
    amax = x.abs().amax((-2, -1))
    assert (scale.double() <= (amax / 448).clamp_min(2.0**-126) * SLACK).all()
    bound = (x.abs() / 16).maximum(scale.double()[..., None, None] / 1024)
    assert ((x - decoded).abs() <= bound * SLACK).all()


@given(tiles=finite_tiles(), data=st.data())
@settings(max_examples=300, deadline=None)
def test_int4_is_within_its_bound(tiles: Tensor, data: st.DataObject) -> None:
    tiles = within_limit(tiles)
    form = data.draw(st.sampled_from(formats(*tiles.shape[-2:])[2:]))
    payload, scale, minimum = form.encode(tiles)
    x, step = form.grouped(tiles.double()), scale.double().view(-1, 1)
    least, most = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    assert (minimum.double().view(-1, 1) <= least).all()
    assert (step <= ((most - least + least.abs() / 128) / 15 * (1 + 1 / 128)).clamp_min(2.0**-126) * SLACK).all()
    decoded = form.grouped(form.decode((payload, scale, minimum), torch.float32)).double()
    assert ((x - decoded).abs() <= step / 2 * SLACK + x.abs() * 2.0**-23).all()


@given(tiles=finite_tiles(), data=st.data())
@settings(max_examples=200, deadline=None)
def test_what_is_finite_stays_finite(tiles: Tensor, data: st.DataObject) -> None:
    tiles = within_limit(tiles)
    form = data.draw(st.sampled_from(formats(*tiles.shape[-2:])))
    assert form.decode(form.encode(tiles), tiles.dtype).isfinite().all(), form


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sign", [1, -1], ids=["largest", "lowest"])
@on_each_device
def test_the_largest_number_comes_back_finite(device: str, sign: int, dtype: torch.dtype) -> None:
    tiles = torch.linspace(-1, 1, 16 * 64).view(1, 16, 64)
    tiles[0, 3, 5] = sign * torch.finfo(dtype).max
    for form in (Format("fp8"), Format("int8"), *([Format("int4", (16, 1))] if dtype == torch.float16 else [])):
        decoded = form.decode(form.encode(tiles.to(dtype), device), dtype, device)
        assert decoded.isfinite().all()
        assert decoded[0, 3, 5].item() == pytest.approx(tiles[0, 3, 5].item(), rel=0.01)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@on_each_device
def test_a_value_that_is_not_finite_makes_its_whole_group_nan_and_no_other(device: str, poison: float) -> None:
    tiles = normal(2, 4, 64)
    tiles[0, 1, 6] = poison
    for form in formats(4, 64):
        coded = tuple(each.cpu() for each in form.encode(tiles, device))
        hit = form.grouped(~tiles.isfinite()).any(-1)
        assert hit.sum() == 1
        for parameter in coded[1:]:
            assert torch.equal(parameter.view(-1).isnan(), hit)
        decoded = form.grouped(form.decode(coded, torch.bfloat16, device).cpu())
        assert decoded[hit].isnan().all() and decoded[~hit].isfinite().all()
        codes = form.decode((coded[0], *(torch.ones_like(each) for each in coded[1:])), torch.float32)
        assert (form.grouped(codes)[hit] == (1 if form.group else 0)).all()  # code 0


@on_each_device
def test_beyond_its_limit_a_value_in_int4_counts_as_not_finite(device: str) -> None:
    tiles = torch.ones(1, 4, 64)
    tiles[0, 0, 0], tiles[0, 1, 1], tiles[0, 2, 2] = 2.0**126, -(2.0**126) * 1.01, 2.0**127
    decoded = Format("int4", (4, 1)).decode(Format("int4", (4, 1)).encode(tiles, device), torch.float32, device)
    assert torch.equal(decoded.cpu()[0].isnan().all(0).nonzero().view(-1), torch.tensor([1, 2]))
    assert decoded.cpu()[..., 0].isfinite().all()


@on_each_device
def test_zeros_and_what_lies_on_the_steps_comes_back_as_it_was(device: str) -> None:
    steps = {
        "fp8": torch.tensor([448.0, -448, 0, -0.0, 1, 0.5, 7, -13, 2.0**-9, 240, 416, 1.125, 3, -44, 120, 28]),
        "int8": torch.tensor([127.0, -127, 0, -0.0, 1, 2, 3, -45, 100, -99, 64, 7, 31, -1, 8, 126]),
        "int4": torch.arange(16.0) - 3,
    }
    for name, row in steps.items():
        form = Format(name, (1, 16) if name == "int4" else None)
        for tiles in (row.repeat(2, 3, 4), torch.zeros(2, 3, 64)):
            decoded = form.decode(form.encode(tiles, device), torch.float32, device)
            assert torch.equal(decoded.cpu(), tiles), form


def test_golden_codes() -> None:
    payload, scale = encode_int8(torch.tensor([[254.0, -254.0, 1.0, 3.0, 5.0, 0.0]]))
    assert payload.tolist() == [[127, -127, 0, 2, 2, 0]] and scale.tolist() == [2.0]
    payload, scale = encode_fp8(torch.tensor([[896.0, -2.0], [34.0, 0.0]]))
    assert payload.view(torch.uint8).tolist() == [[0x7E, 0xB8], [0x58, 0x00]] and scale.item() == 2.0
    payload, *parameters = encode_int4(torch.tensor([[0.0, 15.0, -2.0, 28.0], [3.0, 7.0, 10.0, 12.0]]), group=(1, 2))
    # Low nibbles: channels 0 and 1; high nibbles: 2 and 3. Scales are the bfloat16 above 4/15 and 2/15.
    assert payload.tolist() == [[0x00, 0xFF], [0x00, 0xFF]]
    assert parameters[0].tolist() == [[1.0, 2.0], [0.267578125, 0.1337890625]]
    assert parameters[1].tolist() == [[0.0, -2.0], [3.0, 10.0]]


def test_the_minimum_is_rounded_down_and_the_scale_up() -> None:
    x = torch.tensor([[1.00390625, 1.5, -1.00390625, -0.5]])  # 1 + 2**-8: halfway between two of bfloat16
    _, scale, minimum = encode_int4(x, group=(1, 2))
    assert minimum.tolist() == [[1.0, -1.0078125]]
    assert (scale.double() * 15 >= torch.tensor([[0.5, 0.5078125]], dtype=torch.float64)).all()


TILES = torch.zeros(2, 16, 64)
CODED = {name: Format(name, group).encode(TILES) for name, group in (("fp8", None), ("int8", None), ("int4", (16, 1)))}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode_fp8(TILES.double()), "tiles of torch.float64: float32, float16 or bfloat16"),
        (lambda: encode_int8(TILES.transpose(1, 2)), r"contiguous, is expected; call .contiguous\(\)"),
        (lambda: encode_fp8(torch.zeros(3)), r"tiles of shape \[3\]"),
        (lambda: encode_int8(torch.zeros(3, 0, 64)), r"tiles of shape \[3, 0, 64\]"),
        (lambda: encode_int4(TILES, group=(5, 1)), r"group=\(5, 1\) in tiles of 16 x 64: tokens that divide 16"),
        (lambda: encode_int4(TILES, group=(1, 64)), "channels that divide half of 64"),
        (lambda: encode_int4(TILES, group=(0, 1)), r"group=\(0, 1\)"),
        (lambda: encode_int4(torch.zeros(2, 4, 7), group=(4, 1)), "tiles of 4 x 7"),
        (lambda: decode_fp8(*CODED["int8"], dtype=torch.float32), "payload of torch.int8.*torch.float8_e4m3fn"),
        (lambda: decode_int8(*CODED["int8"], dtype=torch.int8), "dtype=torch.int8: float32, float16 or bfloat16"),
        (lambda: decode_int8(CODED["int8"][0], CODED["fp8"][1], dtype=torch.float32), r"scale .*\[2, 16\]"),
        (lambda: decode_fp8(CODED["fp8"][0], CODED["fp8"][1].half(), dtype=torch.float32), "scale of torch.float16"),
        (
            lambda: decode_int8(CODED["int8"][0], torch.ones(1).expand(2, 16), dtype=torch.float32),
            r"strides \(0, 0\): contiguous is expected",
        ),
        (lambda: decode_int4(*CODED["int4"], group=(1, 32), dtype=torch.float16), r"scale .*\[2, 16, 2\]"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
