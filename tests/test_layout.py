"""Shape, size and fingerprint of a block."""

import itertools
from dataclasses import replace

import pytest

from tierkv.errors import LayoutError
from tierkv.layout import DTYPE_BYTES, Layout

SMOLLM2 = Layout(num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16")


def test_sizes_of_a_known_model() -> None:
    assert SMOLLM2.shape == (30, 2, 3, 16, 64)
    assert SMOLLM2.token_bytes == 23_040
    assert SMOLLM2.block_bytes == 16 * 23_040 == 360 * 1024


def test_latent_layout_has_one_part() -> None:
    layout = Layout(num_layers=61, num_kv_heads=1, head_dim=576, dtype="bfloat16", parts=1)
    assert layout.token_bytes == 70_272


def test_fingerprint_is_golden() -> None:
    assert replace(SMOLLM2, dtype="float32").fingerprint.hex() == "c340db3db7450ec5778b965cb8a8933f"
    latent = Layout(num_layers=61, num_kv_heads=1, head_dim=576, dtype="bfloat16", parts=1, block_tokens=64)
    assert latent.fingerprint.hex() == "9b2c6ad95c2b63698dd621720c28a453"


def test_every_field_changes_the_fingerprint() -> None:
    others = [
        replace(SMOLLM2, num_layers=31),
        replace(SMOLLM2, num_kv_heads=4),
        replace(SMOLLM2, head_dim=32),
        replace(SMOLLM2, dtype="float16"),
        replace(SMOLLM2, block_tokens=32),
        replace(SMOLLM2, parts=1),
    ]
    prints = {layout.fingerprint for layout in [SMOLLM2, *others]}
    assert len(prints) == 7
    assert all(len(one) == 16 for one in prints)


def test_layouts_of_equal_size_but_other_shape_differ() -> None:
    shapes = [(3, 64), (6, 32), (64, 3)]
    layouts = [replace(SMOLLM2, num_kv_heads=heads, head_dim=dim) for heads, dim in shapes]
    for one, two in itertools.combinations(layouts, 2):
        assert one.block_bytes == two.block_bytes
        assert one.fingerprint != two.fingerprint


@pytest.mark.parametrize(("dtype", "size"), DTYPE_BYTES.items())
def test_size_follows_the_dtype(dtype: str, size: int) -> None:
    assert replace(SMOLLM2, dtype=dtype).block_bytes == 30 * 2 * 3 * 16 * 64 * size


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"num_layers": 0}, "num_layers=0"),
        ({"num_kv_heads": -1}, "num_kv_heads=-1"),
        ({"head_dim": 1.5}, "head_dim=1.5"),
        ({"block_tokens": "16"}, "block_tokens='16'"),
        ({"parts": 3}, "parts=3"),
        ({"dtype": "float64"}, "float64.*must be one of float32"),
    ],
)
def test_impossible_layout_is_refused(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(LayoutError, match=told):
        replace(SMOLLM2, **wrong)  # type: ignore[arg-type]  # wrong on purpose
