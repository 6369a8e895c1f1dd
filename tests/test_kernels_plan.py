"""The plan of an attention launch: every visible key of every query row in exactly one item, and no card left idle."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierkv.kernels.gpu.plan import MAX_SPLITS, Plan, plan
from tierkv.kernels.gpu.tiles import Tiles

TILES = Tiles(rows=16, keys=16, warps=4, stages=3, programs=2)


def make(
    pasts: list[int], freshs: list[int], *, group: int = 4, window: int | None = None, resident: int = 264
) -> Plan:
    bounds = np.concatenate(([0], np.cumsum(freshs)))
    spans = [(int(a), int(b), past + int(b - a)) for a, b, past in zip(bounds[:-1], bounds[1:], pasts, strict=True)]
    sequences = np.flatnonzero(np.asarray(freshs) > 0)
    return plan(spans, sequences, group=group, kv_heads=2, window=window, tiles=TILES, resident=resident)


@given(
    sequences=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 40)), min_size=1, max_size=5),
    group=st.integers(1, 24),
    window=st.none() | st.integers(1, 200),
    resident=st.integers(1, 300),
)
def test_every_key_a_row_sees_is_in_one_item(
    sequences: list[tuple[int, int]], group: int, window: int | None, resident: int
) -> None:
    pasts, freshs = [past for past, _ in sequences], [fresh for _, fresh in sequences]
    if not any(freshs):
        return
    made = make(pasts, freshs, group=group, window=window, resident=resident)
    for number, (past, fresh) in enumerate(sequences):
        own = made.items[made.items[:, 0] == number]
        for row in range(fresh * group):
            place = past + row // group
            low = 0 if window is None else max(0, place + 1 - window)
            count = np.zeros(place + 1, int)
            for _, _, start, stop, _ in own[(own[:, 1] <= row) & (row < own[:, 1] + TILES.rows)]:
                assert start % TILES.keys == 0
                count[start : min(stop, place + 1)] += 1
            assert (count[low:] == 1).all(), (number, row)


@given(
    sequences=st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 3)), min_size=1, max_size=8),
    resident=st.integers(1, 300),
)
def test_slots_belong_to_one_item_each_and_merges_name_them_all(
    sequences: list[tuple[int, int]], resident: int
) -> None:
    made = make([past for past, _ in sequences], [fresh for _, fresh in sequences], resident=resident)
    slots = made.items[made.items[:, 4] >= 0][:, 4]
    assert sorted(slots) == list(range(made.num_slots))
    owner = {int(slot): (int(item[0]), int(item[1])) for item in made.items for slot in item[4:] if slot >= 0}
    for sequence, row, first, count in made.merges.tolist():
        assert 2 <= count <= MAX_SPLITS
        assert {owner[slot] for slot in range(first, first + count)} == {(sequence, row)}
    whole = {(int(item[0]), int(item[1])) for item in made.items if item[4] < 0}
    assert whole.isdisjoint(owner.values())


def test_longest_items_start_first() -> None:
    sizes = np.diff(make([50, 5000, 700], [1, 1, 1]).items[:, 2:4])[:, 0]
    assert (np.diff(sizes) <= 0).all()


@pytest.mark.parametrize(
    ("pasts", "least"),
    [
        pytest.param([131_071], 0.9, id="one long sequence"),
        pytest.param([8_191] * 64, 0.9, id="many alike"),
        pytest.param([8_191] * 48, 0.9, id="many alike that would fill one wave and a half"),
        pytest.param([65_535] + [511] * 63, 0.8, id="one long among short"),
    ],
)
def test_the_card_is_busy_to_the_end(pasts: list[int], least: float) -> None:
    """Work over time when 264 programs run at a time, longest first (list scheduling), 8 KV heads."""
    bounds = np.arange(len(pasts) + 1)
    spans = [(int(n), int(n) + 1, past + 1) for n, past in enumerate(pasts)]
    made = plan(spans, bounds[:-1], group=4, kv_heads=8, window=None, tiles=Tiles(16, 64, 4, 3, 2), resident=264)
    sizes = np.repeat(np.diff(made.items[:, 2:4])[:, 0] // 64, 8)
    ends = np.zeros(264)
    for size in sizes:
        ends[ends.argmin()] += size + 1
    assert sizes.sum() / 264 / ends.max() > least


def test_a_card_with_enough_to_do_splits_nothing() -> None:
    assert make([4_095] * 1_320, [1] * 1_320).num_slots == 0


def test_no_sequence_is_cut_into_more_than_one_merge_can_hold() -> None:
    made = make([4_000_000], [1], resident=10_000)
    assert made.most_slots == MAX_SPLITS
