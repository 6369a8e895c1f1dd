"""An attention launch that is recorded once: what it reads is rewritten, and it serves other sequences of other lengths."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.attention_cases import LAYER, AttentionCase
from tests.kernel_cases import kernel, on_each_device
from tierkv.engine.graphs import RecordedPlans
from tierkv.kernels.batch import PagedBatch
from tierkv.kernels.gpu import plan
from tierkv.kernels.gpu.tiles import Tiles, forced

TILES = Tiles(rows=16, keys=16, warps=4, stages=2, programs=1)


# Items of nobody divide zero by zero, and store nothing.
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
@on_each_device
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 21, "softcap": 1.5, "has_sinks": True}, {"num_heads": 20, "kv_heads": 1}],
    ids=["plain", "window, softcap, sinks", "more heads than a tile has rows"],
)
def test_a_recorded_launch_serves_other_lengths(
    options: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_MIN_TURNS", 1)
    pasts = [37, 0, 90, 5]
    case = AttentionCase(pasts, [1] * 4, **options)
    expected, step = case.dense(), case.batch()
    attend = kernel("attention", "paged_attention", device)
    pages, query = case.pool.to(device)[:, LAYER], torch.empty_like(case.query).to(device)
    how = case.options | {"sinks": None if case.sinks is None else case.sinks.to(device)}

    recorded = [(row, row + 1, 1) for row in range(4)]
    memory = torch.zeros(1 << 14, dtype=torch.int32).to(device)
    plans = RecordedPlans(recorded, memory)
    tables = torch.zeros((5, step.tables.shape[1]), dtype=torch.int32).to(device)
    lengths, bounds = (torch.zeros(size, dtype=torch.int32).to(device) for size in (5, 6))
    batch = PagedBatch(step.slots.to(device), tables, lengths, bounds, spans=recorded, plans=plans)
    with forced(TILES):
        attend(query, query, query, pages, batch, **how)  # nobody has a token
        for chosen in ([0, 1, 2, 3], [2], [3, 0], [1, 3, 2]):
            count, each = len(chosen), torch.tensor(chosen)
            own = [pasts[number] + 1 for number in chosen]
            lengths.copy_(torch.tensor(own + [0] * (5 - count)))
            bounds.copy_(torch.arange(6).clamp(max=count))
            tables[:count] = step.tables[each].to(device)
            query[:, :count] = case.query[:, each].to(device)
            words = np.zeros(plans.num_words, np.int32)
            plans.fill([(row, row + 1, length) for row, length in enumerate(own)], words)
            memory[: len(words)] = torch.from_numpy(words).to(device)
            out = attend(query, query, query, pages, batch, **how)[:count].cpu()
            error = (out.double() - expected[each]).norm() / expected[each].norm()  # NaN fails too
            assert error < 3e-6, (chosen, error)


@pytest.mark.parametrize("count", [1, 7, 64, 500])
@pytest.mark.parametrize("window", [None, 300])
def test_a_plan_stays_within_the_items_it_is_given(count: int, window: int | None) -> None:
    lengths = np.random.default_rng(count).integers(1, 20_000, count).tolist()
    spans = [(row, row + 1, length) for row, length in enumerate(lengths)]
    most = plan.most_items(count, kv_heads=8, resident=396)
    cut = plan.plan(
        spans, np.arange(count), group=4, kv_heads=8, window=window, tiles=TILES, resident=396, most_items=most
    )
    assert count <= len(cut.items) <= most
    assert len(cut.merges) <= count
    assert cut.most_slots <= min(plan.MAX_SPLITS, most)
    words = plan.padded(cut, sequence=count, num_items=most, num_merges=count)
    items, merges = words[: most * 5].reshape(-1, 5), words[most * 5 :].reshape(-1, 4)
    assert (items[: len(cut.items)] == cut.items).all()
    assert (items[len(cut.items) :] == [count, 0, 0, 0, -1]).all()
    assert (merges[len(cut.merges) :] == [count, 0, 0, 0]).all()
