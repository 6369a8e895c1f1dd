"""The torch reference of paged attention against dense attention in float64, for every mix a step can hold."""

from typing import Any

import pytest
import torch

from tests.attention_cases import MIXES, OPTIONS, AttentionCase
from tierkv.kernels.attention import latent_attention, paged_attention
from tierkv.kernels.batch import PagedBatch


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("mix", MIXES.values(), ids=list(MIXES))
def test_pages_give_what_dense_attention_gives(mix: tuple[list[int], list[int]], options: dict[str, Any]) -> None:
    case = AttentionCase(*mix, **options)
    torch.testing.assert_close(case.run(paged_attention).double(), case.dense(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("num_heads", "kv_heads"), [(4, 4), (4, 1), (8, 2)], ids=["MHA", "MQA", "GQA"])
def test_any_number_of_heads_per_group(num_heads: int, kv_heads: int) -> None:
    case = AttentionCase([0, 17, 3], [5, 1, 6], num_heads=num_heads, kv_heads=kv_heads)
    torch.testing.assert_close(case.run(paged_attention).double(), case.dense(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(dtype: torch.dtype) -> None:
    case = AttentionCase([0, 17, 3], [5, 1, 6], dtype=dtype)
    torch.testing.assert_close(case.run(paged_attention).double(), case.dense(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
def test_codes_are_worth_their_scale(codes: torch.dtype, options: dict[str, Any]) -> None:
    case = AttentionCase(*MIXES["all at once"], codes=codes, **options)
    torch.testing.assert_close(case.run(paged_attention).double(), case.dense(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("codes", [None, torch.int8, torch.float8_e4m3fn], ids=["plain", "int8", "fp8"])
def test_latents_are_key_and_value_at_once(codes: torch.dtype | None, options: dict[str, Any]) -> None:
    case = AttentionCase(*MIXES["all at once"], kv_heads=1, head_dim=12, value_dim=8, codes=codes, **options)
    torch.testing.assert_close(case.run(latent_attention).double(), case.dense(), atol=2e-6, rtol=1e-5)


def test_layers_share_a_batch_and_its_scratch() -> None:
    case = AttentionCase([9, 0], [1, 6])
    batch, outs = case.batch(), []
    key, value = case.fresh_states(0), case.fresh_states(1)
    for layer in range(case.pool.shape[1]):
        case.pool[:, layer] = case.pages
        outs.append(paged_attention(case.query, key, value, case.pool[:, layer], batch, **case.options))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "head_dim": ({"query": torch.ones(6, 5, 7)}, r"query \[6, 5, 7\]: expected \[a multiple of 2 heads, tokens, 8\]"),
    "heads": ({"query": torch.ones(5, 5, 8)}, r"query \[5, 5, 8\]: expected \[a multiple of 2 heads"),
    "parts": ({"pages": torch.ones(9, 1, 2, 4, 8)}, r"pages \[9, 1, 2, 4, 8\]: expected parts=2"),
    "tiles": ({"pages": torch.ones(9, 2, 2, 8, 4).transpose(3, 4)}, "contiguous .block_tokens, head_dim. tiles"),
    "int8 without scales": ({"pages": torch.ones(9, 2, 2, 4, 8, dtype=torch.int8)}, "pages of int8 need scales"),
    "scales": ({"scales": torch.ones(9, 2, 2)}, r"scales \[9, 2, 2\]: expected"),
    "sinks": ({"sinks": torch.ones(2)}, r"sinks \[2\]: expected one per head, \[6\]"),
    "window": ({"window": 0}, "window=0: a query sees at least itself"),
    "softcap": ({"softcap": 0.0}, "softcap=0.0: must be above 0"),
    "query dtype": (
        {"query": torch.ones(6, 5, 8, dtype=torch.float64)},
        "query of torch.float64: expected torch.float32",
    ),
    "query strides": ({"query": torch.ones(6, 5, 16)[..., ::2]}, "queries contiguous rows"),
    "query tokens": ({"query": torch.ones(6, 4, 8)}, "query of 4 tokens.*the batch has 5 tokens"),
    "scales dtype": ({"scales": torch.ones(9, 2, 2, 4, dtype=torch.float64)}, "scales of torch.float64: expected"),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=list(WRONG))
def test_what_does_not_fit_is_refused(given: dict[str, Any], message: str) -> None:
    case = AttentionCase([0], [5])
    given = {"query": case.query, "pages": torch.ones(9, 2, 2, 4, 8), "scale": 1.0} | given
    batch, keys = case.batch(), (case.fresh_states(0), case.fresh_states(1))
    # A layer before it that fits, of the same batch: every layer is looked at, not the first alone.
    paged_attention(case.query, *keys, torch.ones(9, 2, 2, 4, 8), batch, scale=1.0)
    with pytest.raises(ValueError, match=message):
        paged_attention(given.pop("query"), *keys, given.pop("pages"), batch, **given)


def test_a_table_too_narrow_for_its_sequence_is_refused() -> None:
    case = AttentionCase([9], [1])
    batch = case.batch()
    batch.tables = batch.tables[:, :2]
    with pytest.raises(ValueError, match="tables of 2 pages of 4 tokens: the batch has 1 tokens, and a sequence of 10"):
        paged_attention(case.query, case.fresh_states(0), case.fresh_states(1), case.pages, batch, scale=1.0)


@pytest.mark.parametrize("name", ["slots", "tables", "lengths", "cu_seqlens"])
def test_a_batch_whose_numbers_are_not_adjacent_or_of_another_dtype_is_refused(name: str) -> None:
    good = AttentionCase([9, 4, 2], [1, 1, 1]).batch()
    numbers = {key: getattr(good, key) for key in ("slots", "tables", "lengths", "cu_seqlens")}
    wide = torch.stack((numbers[name], numbers[name]), dim=-1)[..., 0]
    for wrong in (wide, numbers[name].double()):
        with pytest.raises(ValueError, match=f"{name}: .*expected torch.int"):
            PagedBatch(**(numbers | {name: wrong}))


def test_layers_of_a_batch_may_differ_in_strides() -> None:
    case = AttentionCase([9, 0], [1, 6])
    batch, keys = case.batch(), (case.fresh_states(0), case.fresh_states(1))
    for pages in (case.pages.contiguous(), case.pages):
        out = paged_attention(case.query, *keys, pages, batch, **case.options)
        torch.testing.assert_close(out.double(), case.dense(), atol=2e-6, rtol=1e-5)


def test_latents_of_several_heads_are_refused() -> None:
    case = AttentionCase([0], [5])
    with pytest.raises(ValueError, match="expected parts=1, one KV head"):
        latent_attention(case.query, torch.ones(9, 1, 2, 4, 8), case.batch(), value_dim=4, scale=1.0)


def test_latents_without_a_tail_are_refused() -> None:
    case = AttentionCase([0], [5], kv_heads=1, value_dim=8)
    with pytest.raises(ValueError, match="value_dim=8: must be at least 1 and less than"):
        latent_attention(case.query, case.pages, case.batch(), value_dim=8, scale=1.0)
