"""The Triton attention kernels against the torch reference and dense attention in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.attention_cases import LAYER, MIXES, OPTIONS, AttentionCase
from tests.kernel_cases import kernel, on_each_device
from tierkv.kernels.batch import PagedBatch
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
@pytest.mark.parametrize("window", [16, 31, 32, 33, 48])
@pytest.mark.parametrize("past", [30, 31, 32, 47, 63, 64, 65])
def test_window_edges_about_the_edges_of_tiles(past: int, window: int, device: str) -> None:
    check(AttentionCase([past], [3], num_heads=2, window=window), device)


@on_each_device
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_sinks_far_above_all_scores(split: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most that is taken off before the power has to see the sink too, or that overflows."""
    monkeypatch.setattr(plan, "_MIN_TURNS", 1 if split else 1000)
    case = AttentionCase([200], [1], has_sinks=True)
    assert case.sinks is not None
    case.sinks = torch.tensor([200.0, 120.0, 3.0, 0.0, -100.0, 90.0])
    check(case, device)


@on_each_device
def test_large_softcaps_do_not_lose_digits(device: str) -> None:
    check(AttentionCase([40], [2], softcap=1e5), device)


@on_each_device
def test_a_turn_of_zeros_does_not_make_the_rest_nan(device: str) -> None:
    case = AttentionCase([40], [1], codes=torch.int8)
    assert case.scales is not None
    first = case.tables[0][:4]  # 16 tokens: all of a turn
    case.scales[first] = 0.0
    case.states = [states.clone() for states in case.states]
    case.states[0][:, :, :16] = 0.0
    check(case, device, tolerance=codes_tolerance(device, case.codes))


@on_each_device
@pytest.mark.parametrize("codes", ["int8", "fp8"])
def test_queries_beyond_float16_meet_codes(codes: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in float16, as on a GPU: the query, its tail too, is brought where float16 is precise."""
    if device == "cpu":
        import triton.language as tl

        from tierkv.kernels.gpu import attention

        monkeypatch.setattr(attention, "_compute", lambda query, codes: tl.float16)
    for size in (1e-9, 1e6):
        case = AttentionCase([0, 37], [3, 1], num_heads=4, kv_heads=1, head_dim=24, value_dim=16, codes=CODES[codes])
        case.query[..., :16] *= 1e-3
        case.query *= size  # the tail decides how the rest is scaled
        case.query /= max(1.0, size)
        case.query[..., 16:] *= max(1.0, size)
        check(case, device, tolerance=2e-3)


@on_each_device
def test_layers_of_other_windows_and_shapes_in_one_batch(device: str) -> None:
    case, batch = AttentionCase([37, 0], [1, 9]), None
    attention = kernel("attention", "paged_attention", device)
    batch = case.batch(device)
    pages = case.pool.to(device)[:, LAYER]
    for window, heads in ((7, 6), (None, 6), (None, 2), (20, 4)):
        query = case.query[:heads].contiguous()
        part = AttentionCase([37, 0], [1, 9])
        part.query, part.num_heads, part.window = query, heads, window
        options = part.options
        out = (
            attention(query.to(device), None, None, pages, batch, **options)
            if device == "cpu"
            else attention(query.to(device), query.to(device), query.to(device), pages, batch, **options)
        )
        expected = part.dense()
        assert (out.cpu().double() - expected).norm() / expected.norm() < 3e-6


@on_each_device
def test_nothing_to_do_is_done(device: str) -> None:
    empty = PagedBatch(
        torch.zeros(0, dtype=torch.int64, device=device),
        torch.zeros((0, 1), dtype=torch.int32, device=device),
        torch.zeros(0, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
    )
    nothing = torch.zeros((6, 0, 8), device=device)
    out = kernel("attention", "paged_attention", device)(
        nothing, nothing, nothing, torch.zeros((3, 2, 2, 4, 8), device=device), empty, scale=1.0
    )
    assert out.shape == (0, 6, 8)


@on_each_device
def test_pages_beyond_two_to_the_31st_element(device: str, tmp_path: Path) -> None:
    """In a sparse file, for memory that is never touched; on a GPU in a pool that large."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("less than 12 GiB of device memory are free")
    num_pages, shape = (1 << 31) // (2 * 2 * 4 * 16) + 8, (2, 2, 4, 16)
    if device == "cpu":
        with (tmp_path / "pool").open("wb") as file:
            file.truncate(num_pages * 256 * 2)
        flat = torch.from_file(str(tmp_path / "pool"), shared=True, size=num_pages * 256, dtype=torch.float16)
        pages = flat.view(num_pages, *shape)
    else:
        pages = torch.zeros((num_pages, *shape), dtype=torch.float16, device=device)
    case = AttentionCase([9], [1], num_heads=4, head_dim=16, dtype=torch.float16)
    far = [num_pages - 1, 3, num_pages - 2]
    for page, old in zip(far, case.tables[0], strict=True):
        pages[page] = case.pages[old].nan_to_num().to(device)
    batch = case.batch(device)
    batch.tables = torch.tensor([far], dtype=torch.int32, device=device)
    query = case.query.to(device)
    out = kernel("attention", "paged_attention", device)(query, query, query, pages, batch, **case.options)
    expected = case.dense()
    assert (out.cpu().double() - expected).norm() / expected.norm() < 1e-3


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
