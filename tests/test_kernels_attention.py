"""The Triton attention kernels against the torch reference and dense attention in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.attention_cases import LAYER, MIXES, OPTIONS, AttentionCase
from tests.kernel_cases import kernel, on_each_device
from tierkv.kernels.gpu import plan
from tierkv.kernels.gpu.tiles import Tiles, forced

TILES = Tiles(rows=16, keys=16, warps=4, stages=2, programs=1)
CODES = {"plain": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def check(case: AttentionCase, device: str, *, tolerance: float = 3e-6, tiles: Tiles = TILES) -> None:
    name = "paged_attention" if case.value_dim is None else "latent_attention"
    with forced(tiles):
        out = case.run(kernel("attention", name, device), device)
    expected = case.dense()
    assert out.dtype == case.dtype
    error = (out.double() - expected).norm() / expected.norm()  # NaN fails too
    assert error < tolerance, error


def codes_tolerance(device: str, codes: torch.dtype | None) -> float:
    """On a GPU codes are multiplied in float16: 11 bits of query and weights."""
    return 1e-3 if device == "cuda" and codes is not None else 3e-6


@on_each_device
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("mix", [name for name in MIXES if name != "a chunk of many queries"])
def test_kernel_gives_what_dense_attention_gives(mix: str, options: dict[str, Any], device: str) -> None:
    check(AttentionCase(*MIXES[mix], **options), device)


@on_each_device
@pytest.mark.parametrize("codes", ["int8", "fp8"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_codes_are_worth_their_scale(options: dict[str, Any], codes: str, device: str) -> None:
    case = AttentionCase([0, 37, 3], [5, 1, 6], codes=CODES[codes], **options)
    check(case, device, tolerance=codes_tolerance(device, case.codes))


@on_each_device
def test_fp8_pages_may_do_without_scales(device: str) -> None:
    case = AttentionCase([20], [1], codes=torch.float8_e4m3fn)
    assert case.scales is not None
    case.states = [states / case.scales[0, :, :, :1, None] for states in case.states]
    case.scales = None
    check(case, device, tolerance=codes_tolerance(device, case.codes))


@on_each_device
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_latents_are_key_and_value_at_once(options: dict[str, Any], codes: str, device: str) -> None:
    case = AttentionCase(
        [0, 37, 3], [3, 1, 2], num_heads=20, kv_heads=1, head_dim=24, value_dim=16, codes=CODES[codes], **options
    )
    check(case, device, tolerance=codes_tolerance(device, case.codes))


@on_each_device
@pytest.mark.parametrize("group", range(1, 9))
def test_any_number_of_heads_per_group(group: int, device: str) -> None:
    check(AttentionCase([0, 17, 33], [5, 1, 6], num_heads=2 * group, kv_heads=2), device)


@on_each_device
def test_a_group_larger_than_a_tile(device: str) -> None:
    check(AttentionCase([0, 37], [3, 1], num_heads=20, kv_heads=1), device)


@on_each_device
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_any_head_dim(head_dim: int, device: str) -> None:
    check(AttentionCase([19], [2], num_heads=4, kv_heads=2, head_dim=head_dim), device)


@on_each_device
@pytest.mark.parametrize("block_tokens", [1, 3, 8, 16, 32])
def test_any_block_size(block_tokens: int, device: str) -> None:
    check(AttentionCase([0, 37], [5, 1], block_tokens=block_tokens, window=9), device)


@on_each_device
@pytest.mark.parametrize("length", [1, 3, 4, 5, 15, 16, 17, 31, 32, 33])
def test_lengths_about_the_edges_of_pages_and_tiles(length: int, device: str) -> None:
    check(AttentionCase([length - 1], [1]), device)


@on_each_device
def test_a_query_of_any_strides(device: str) -> None:
    case = AttentionCase([17], [4], head_dim=16)
    case.query = case.query.transpose(0, 1).contiguous().transpose(0, 1)  # as a model's projection leaves it
    check(case, device)


@on_each_device
def test_sequences_that_share_pages(device: str) -> None:
    check(AttentionCase([17, 21, 30], [1, 1, 2], shared_pages=4), device)


@on_each_device
def test_a_sequence_without_a_token_in_the_step(device: str) -> None:
    check(AttentionCase([17, 9, 30], [1, 0, 2]), device)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("codes", CODES)
def test_half_precision_stays_near(dtype: torch.dtype, codes: str, device: str) -> None:
    case = AttentionCase([0, 37, 3], [5, 1, 6], dtype=dtype, codes=CODES[codes])
    check(case, device, tolerance=6e-3 if dtype == torch.bfloat16 else 1e-3)


@on_each_device
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize(
    ("pasts", "freshs", "latents"),
    [([300], [1], False), ([130, 5, 260], [1, 1, 1], False), ([180, 3], [4, 2], False), ([300], [1], True)],
    ids=["one", "ragged", "chunks", "latents"],
)
def test_split_keys_are_merged(
    pasts: list[int],
    freshs: list[int],
    latents: bool,
    options: dict[str, Any],
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "_MIN_TURNS", 1)
    shape = {"num_heads": 20, "kv_heads": 1, "head_dim": 24, "value_dim": 16} if latents else {"num_heads": 4}
    case = AttentionCase(pasts, freshs, **shape, **options)
    cuts = recorded(monkeypatch)
    check(case, device)
    if case.window is None:
        assert sum(cut.num_slots for cut in cuts) > 1


@on_each_device
def test_a_plan_for_longer_sequences_serves_shorter_ones(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that is recorded once and replayed has the plan of the longest it may meet; lengths are read when it runs."""
    real = plan.plan
    from tierkv.kernels.gpu import attention

    def longer(spans: Any, sequences: Any, **options: Any) -> plan.Plan:
        return real([(first, last, length + 90) for first, last, length in spans], sequences, **options)

    monkeypatch.setattr(plan, "_MIN_TURNS", 1)
    monkeypatch.setattr(attention, "plan", longer)
    check(AttentionCase([70, 3], [1, 1]), device)


@on_each_device
def test_layers_share_the_plan_of_a_step(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = recorded(monkeypatch)
    case = AttentionCase([37, 0], [1, 9])
    batch, attention = case.batch(device), kernel("attention", "paged_attention", device)
    query, pages = case.query.to(device), case.pool.to(device)[:, LAYER]
    outs = [attention(query, query, query, pages, batch, **case.options) for _ in range(2)]
    assert torch.equal(*outs)
    assert len(cuts) == 2  # one for the sequence that decodes, one for the chunk


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[plan.Plan]:
    """Every plan made from here on."""
    from tierkv.kernels.gpu import attention

    made: list[plan.Plan] = []
    real: Callable[..., plan.Plan] = plan.plan

    def record(*args: Any, **options: Any) -> plan.Plan:
        made.append(real(*args, **options))
        return made[-1]

    monkeypatch.setattr(attention, "plan", record)
    return made


@st.composite
def cases(draw: st.DrawFn) -> AttentionCase:
    count = draw(st.integers(1, 3))
    pasts = draw(st.lists(st.integers(0, 60), min_size=count, max_size=count))
    freshs = draw(st.lists(st.integers(0, 6), min_size=count, max_size=count).filter(any))
    kv_heads = draw(st.integers(1, 2))
    value_dim = draw(st.sampled_from([None, None, 8])) if kv_heads == 1 else None
    return AttentionCase(
        pasts,
        freshs,
        num_heads=kv_heads * draw(st.integers(1, 5)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([16, 20])),
        block_tokens=draw(st.sampled_from([2, 4, 5, 16])),
        codes=draw(st.sampled_from(list(CODES.values()))),
        value_dim=value_dim,
        window=draw(st.none() | st.integers(1, 40)),
        softcap=draw(st.none() | st.just(3.0)),
        has_sinks=draw(st.booleans()),
        seed=draw(st.integers(0, 1 << 16)),
    )


@on_each_device
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), keys=st.sampled_from([16, 32]))
def test_kernel_and_dense_agree_on_whatever_a_step_may_hold(case: AttentionCase, keys: int, device: str) -> None:
    check(case, device, tolerance=codes_tolerance(device, case.codes), tiles=TILES._replace(keys=keys))
