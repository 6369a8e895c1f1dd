"""Paged attention against dense attention written out, for every mix a step can hold."""

import itertools
from dataclasses import dataclass

import pytest
import torch

from tierkv.kernels.attention import PagedBatch, paged_attention, write_kv
from tierkv.kernels.pages import copy_pages

BLOCK, LAYERS, DIM = 4, 3, 8


@dataclass
class Case:
    """Sequences with some KV written before, and tokens of a step, in pages that lie in random order."""

    past: list[int]
    fresh: list[int]
    num_heads: int = 6
    kv_heads: int = 2
    dtype: torch.dtype = torch.float32
    layer: int = 1

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(sum(self.past) + 31 * sum(self.fresh))

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        lengths = [past + fresh for past, fresh in zip(self.past, self.fresh, strict=True)]
        self.keys = [normal(self.kv_heads, length, DIM) for length in lengths]
        self.values = [normal(self.kv_heads, length, DIM) for length in lengths]
        self.query = normal(self.num_heads, sum(self.fresh), DIM)
        blocks = [-(-length // BLOCK) for length in lengths]
        pages = torch.randperm(sum(blocks) + 3, generator=generator).tolist()
        self.tables = [[pages.pop() for _ in range(count)] for count in blocks]
        # Whatever is not written is NaN: attention must not look at it, not even with weight zero.
        self.pool = torch.full((sum(blocks) + 3, LAYERS, 2, self.kv_heads, BLOCK, DIM), float("nan"), dtype=self.dtype)
        for table, key, value, past in zip(self.tables, self.keys, self.values, self.past, strict=True):
            for token in range(past):
                self.pool[table[token // BLOCK], self.layer, 0, :, token % BLOCK] = key[:, token]
                self.pool[table[token // BLOCK], self.layer, 1, :, token % BLOCK] = value[:, token]

    def batch(self) -> PagedBatch:
        width = max(map(len, self.tables))
        slots = [
            table[token // BLOCK] * BLOCK + token % BLOCK
            for table, past, fresh in zip(self.tables, self.past, self.fresh, strict=True)
            for token in range(past, past + fresh)
        ]
        return PagedBatch(
            torch.tensor(slots),
            torch.tensor([table + [0] * (width - len(table)) for table in self.tables], dtype=torch.int32),
            torch.tensor([sum(both) for both in zip(self.past, self.fresh, strict=True)], dtype=torch.int32),
            torch.tensor([0, *itertools.accumulate(self.fresh)], dtype=torch.int32),
        )

    def run(self, **options: object) -> torch.Tensor:
        pages, batch = self.pool[:, self.layer], self.batch()
        key = torch.cat([key[:, past:] for key, past in zip(self.keys, self.past, strict=True)], dim=1)
        value = torch.cat([value[:, past:] for value, past in zip(self.values, self.past, strict=True)], dim=1)
        write_kv(key, value, pages, batch)
        return paged_attention(self.query, key, value, pages, batch, scale=0.3, **options)

    def dense(
        self, *, window: int | None = None, softcap: float | None = None, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows, at = [], 0
        for key, value, past, fresh in zip(self.keys, self.values, self.past, self.fresh, strict=True):
            group = self.num_heads // self.kv_heads
            k, v = key.double().repeat_interleave(group, 0), value.double().repeat_interleave(group, 0)
            scores = self.query[:, at : at + fresh].double() @ k.transpose(1, 2) * 0.3
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            places, seen = torch.arange(past, past + fresh)[:, None], torch.arange(past + fresh)
            hidden = (seen > places) | (seen <= places - window if window is not None else False)
            scores = scores.masked_fill(hidden, float("-inf"))
            if sinks is not None:
                scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, fresh, 1)), -1)
            weights = torch.softmax(scores, -1)[..., : past + fresh]
            rows.append((weights @ v).transpose(0, 1))
            at += fresh
        return torch.cat(rows)


MIXES = {
    "decode": ([5, 11, 0], [1, 1, 1]),
    "first chunks": ([0, 0], [7, 4]),
    "later chunks": ([4, 9], [6, 3]),
    "a chunk of many queries": ([7, 2], [600, 1]),
    "all at once": ([0, 17, 3, 8, 0], [5, 1, 6, 4, 1]),
}
OPTIONS = {
    "plain": {},
    "window": {"window": 5},
    "window of one": {"window": 1},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.linspace(-1, 1, 6)},
    "everything": {"window": 6, "softcap": 2.0, "sinks": torch.linspace(-1, 1, 6)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("mix", MIXES.values(), ids=list(MIXES))
def test_pages_give_what_dense_attention_gives(mix: tuple[list[int], list[int]], options: dict[str, object]) -> None:
    case = Case(*mix)
    torch.testing.assert_close(case.run(**options).double(), case.dense(**options), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("num_heads", "kv_heads"), [(4, 4), (4, 1), (8, 2)], ids=["MHA", "MQA", "GQA"])
def test_any_number_of_heads_per_group(num_heads: int, kv_heads: int) -> None:
    case = Case([0, 17, 3], [5, 1, 6], num_heads=num_heads, kv_heads=kv_heads)
    torch.testing.assert_close(case.run().double(), case.dense(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(dtype: torch.dtype) -> None:
    case = Case([0, 17, 3], [5, 1, 6], dtype=dtype)
    torch.testing.assert_close(case.run().double(), case.dense(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_layer_writes_nothing_outside_itself(layer: int) -> None:
    case = Case([0, 3], [5, 4], layer=layer)
    before = case.pool.clone()
    case.run()
    others = [number for number in range(LAYERS) if number != layer]
    assert torch.equal(case.pool[:, others].isnan(), before[:, others].isnan())
    written = (~case.pool[:, layer, 0, 0, :, 0].isnan()).sum().item()
    assert written == 5 + 7


def test_written_tokens_lie_at_their_places() -> None:
    case = Case([2], [7])
    case.run()
    for token in range(9):
        page = case.pool[case.tables[0][token // BLOCK], case.layer]
        assert torch.equal(page[0, :, token % BLOCK], case.keys[0][:, token])
        assert torch.equal(page[1, :, token % BLOCK], case.values[0][:, token])


def test_layers_share_a_batch_and_its_scratch() -> None:
    case = Case([9, 0], [1, 6])
    batch, outs = case.batch(), []
    key = torch.cat([case.keys[0][:, 9:], case.keys[1]], dim=1)
    value = torch.cat([case.values[0][:, 9:], case.values[1]], dim=1)
    for layer in range(LAYERS):
        case.pool[:, layer] = case.pool[:, case.layer]
        pages = case.pool[:, layer]
        write_kv(key, value, pages, batch)
        outs.append(paged_attention(case.query, key, value, pages, batch, scale=0.3))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_copied_pages_are_equal_and_sources_untouched() -> None:
    pool = torch.randn(6, LAYERS, 2, 2, BLOCK, DIM)
    before = pool.clone()
    copy_pages(pool, [0, 3], [5, 1])
    assert torch.equal(pool[[5, 1]], before[[0, 3]])
    assert torch.equal(pool[[0, 2, 3, 4]], before[[0, 2, 3, 4]])
