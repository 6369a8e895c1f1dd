"""Packs as a tier: what is found under which name, what is wrong with one block, and the heads of each rank."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.daemon_parts import until
from tests.pack_parts import (
    FACTS,
    SHARD,
    TINY,
    WIDE,
    changed,
    files_of,
    flip,
    keys_of,
    kv,
    make_pack,
    other_facts,
    prompt,
    put,
    seal,
    swapped,
)
from tierkv.errors import LayoutError, PackError, TierError
from tierkv.facts import ModelFacts
from tierkv.keys import Key, Namespace, chain
from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.packs.pack import checksum, open_pack
from tierkv.testing import FakeClock, StepExecutor
from tierkv.tiers.base import Miss, Run
from tierkv.tiers.pack import PackTier, Shard
from tierkv.zarr_shards import ALIGNMENT

TOKENS = prompt(1, 70)
KEYS = keys_of(TOKENS)
NAMESPACE = Namespace("test", TINY)
SIZE = TINY.block_bytes


@pytest.fixture(params=["pack", "pack.zip"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_pack(tmp_path / str(request.param), {"one": TOKENS})


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def mounted(metrics: Metrics) -> Iterator[Callable[..., PackTier]]:
    tiers: list[PackTier] = []

    def mount(*places: Path, strict: bool = False, namespace: Namespace = NAMESPACE, **options: Any) -> PackTier:
        packs = [open_pack(place, strict=strict) for place in places]
        tier = PackTier(packs, **({"layout": namespace.layout, "metrics": metrics} | options))
        tiers.append(tier)
        tier.introduce(namespace.root(), namespace)
        return tier

    yield mount
    for tier in tiers:
        tier.close()


def read(tier: PackTier, keys: Sequence[Key], **options: Any) -> list[bytes | None]:
    outs = [bytearray(tier.layout.block_bytes) for _ in keys]
    found = tier.read(keys, [memoryview(out) for out in outs], **options)
    return [bytes(out) if ok else None for out, ok in zip(outs, found, strict=True)]


def expected(tokens: bytes = TOKENS, layout: Layout = TINY) -> list[bytes]:
    return [kv(tokens, block, layout) for block in range(len(tokens) // 4 // layout.block_tokens)]


# -- names ------------------------------------------------------------------------------------------------------------------


def test_a_pack_answers_every_tenant_and_secret_of_its_model_under_their_own_names(place: Path, mounted: Any) -> None:
    tier = mounted(place)
    for tenant, secret in (("", b""), ("alice", b""), ("", b"secret"), ("alice", b"secret")):
        names = keys_of(TOKENS, tenant=tenant, secret=secret)
        space = Namespace("test", TINY, tenant=tenant)
        known = not tenant and not secret
        assert tier.contains(names) == [known] * 70
        assert tier.introduce(space.root(secret), space) and tier.introduce(space.root(secret), space)
        assert tier.contains(names) == [True] * 70
        assert read(tier, names) == expected()
    assert tier.contains(keys_of(TOKENS, tenant="bob")) == [False] * 70


def test_a_namespace_of_another_model_or_adapter_finds_nothing(place: Path, mounted: Any) -> None:
    tier = mounted(place)
    for space in (Namespace("other", TINY), Namespace("test", TINY, adapter="lora")):
        assert not tier.introduce(space.root(), space)
        assert not any(tier.contains(chain(space.root(), TOKENS, block_tokens=TINY.block_tokens)))


def test_namespaces_beyond_what_is_remembered_are_not_served_and_cost_nothing(
    place: Path, mounted: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tierkv.tiers.pack.MAX_NAMES", 150)
    tier = mounted(place)
    spaces = [Namespace("test", TINY, tenant=f"tenant {number}") for number in range(5)]
    assert [tier.introduce(space.root(), space) for space in spaces] == [True, False, False, False, False]
    assert [tier.contains(keys_of(TOKENS, tenant=space.tenant)[:1])[0] for space in spaces[:2]] == [True, False]
    assert tier.contains(KEYS) == [True] * 70 and len(caplog.records) == 1


def test_answers_follow_the_order_of_the_keys_with_those_that_come_twice(
    place: Path, mounted: Any, metrics: Metrics
) -> None:
    tier = mounted(place)
    unknown = keys_of(prompt(9, 3))
    names = [KEYS[69], unknown[0], KEYS[0], KEYS[64], KEYS[0], KEYS[63], unknown[2], KEYS[69], KEYS[1], unknown[0]]
    rows = [69, None, 0, 64, 0, 63, None, 69, 1, None]
    assert tier.contains(names) == [row is not None for row in rows]
    blocks = expected()
    assert read(tier, names) == [None if row is None else blocks[row] for row in rows]
    assert metrics.misses.value("pack", Miss.ABSENT) == metrics.misses.value("pack") == 3
    assert metrics.bytes_read.value("pack") == 7 * SIZE


def test_nothing_asked_is_nothing_read(place: Path, mounted: Any, metrics: Metrics) -> None:
    tier = mounted(place)
    assert tier.contains([]) == tier.read([], []) == []
    tier.delete([])
    assert tier.write(Run(NAMESPACE.root(), NAMESPACE.root(), 0, ()), []) == []
    assert metrics.misses.value() == metrics.bytes_read.value() == 0 and list(tier.scan()) == []


def test_of_two_packs_each_gives_what_it_has(tmp_path: Path, mounted: Any, metrics: Metrics) -> None:
    one, both = prompt(1, 3), prompt(1, 2) + prompt(2, 2)
    tier = mounted(make_pack(tmp_path / "a", {"one": one}), make_pack(tmp_path / "b.zip", {"both": both}))
    assert tier.num_blocks == 7 and metrics.blocks_used.value("pack") == 7
    assert read(tier, keys_of(one)) == expected(one) and read(tier, keys_of(both)) == expected(both)
    assert tier.place == f"{tmp_path}/a, {tmp_path}/b.zip"


def test_of_a_block_of_two_packs_the_first_packs_is_read(tmp_path: Path, mounted: Any) -> None:
    def other(tokens: bytes, block: int, layout: Layout) -> bytes:
        return bytes(byte ^ 1 for byte in kv(tokens, block, layout))

    one, same = (
        make_pack(tmp_path / "one", {"one": TOKENS}),
        make_pack(tmp_path / "same", {"one": TOKENS}, content=other),
    )
    assert read(mounted(one, same), KEYS[:3]) == expected()[:3]
    assert read(mounted(same, one), KEYS[:3]) == [other(TOKENS, block, TINY) for block in range(3)]


def test_buffers_of_another_size_or_number_are_refused(place: Path, mounted: Any) -> None:
    tier = mounted(place)
    for outs in ([], [memoryview(bytearray(SIZE - 1))], [memoryview(bytearray(SIZE))] * 2):
        with pytest.raises(LayoutError, match="one of 64 bytes for each"):
            tier.read(KEYS[:1], outs)


# -- what goes wrong --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("threads", [0, 3])
def test_a_corrupt_block_is_a_miss_and_from_then_on_absent(
    place: Path, mounted: Any, metrics: Metrics, strict: bool, threads: int, caplog: pytest.LogCaptureFixture
) -> None:
    changed(place, lambda files: files.update({SHARD: flip(files[SHARD], 5 * ALIGNMENT + 9)}))
    executor = ThreadPoolExecutor(threads) if threads else None
    tier = mounted(place, strict=strict, executor=executor)
    space = Namespace("test", TINY, tenant="alice")
    tier.introduce(space.root(), space)
    assert tier.contains(KEYS) == [True] * 70
    blocks: list[bytes | None] = list(expected())
    blocks[5] = None
    assert read(tier, KEYS) == blocks
    assert metrics.misses.value("pack", Miss.CORRUPT) == metrics.corrupt_blocks.value("pack") == 1
    assert metrics.bytes_read.value("pack") == 69 * SIZE
    assert [at for at, there in enumerate(tier.contains(KEYS)) if not there] == [5]
    assert not tier.contains(keys_of(TOKENS, tenant="alice"))[5]  # whoever asks: it is the same place
    assert read(tier, KEYS) == blocks
    assert metrics.misses.value("pack", Miss.CORRUPT) == 1 and metrics.misses.value("pack", Miss.ABSENT) == 1
    assert len(caplog.records) == 1 and "row 5 is not what its digest says; it is a miss from now on" in caplog.text
    if executor:
        executor.shutdown()


def test_what_a_checksum_cannot_find_a_strict_reader_does(place: Path, mounted: Any) -> None:
    """Checksums are against disks: whoever may change a pack can make them right. Digests are what a signature is over."""

    def change(files: dict[str, bytes]) -> None:
        files[SHARD] = flip(files[SHARD], 5 * ALIGNMENT)
        sums = np.frombuffer(files["checksums/c.0"], "<u8").copy()
        sums[5] = checksum(files[SHARD][5 * ALIGNMENT :][:SIZE], KEYS[5])
        files["checksums/c.0"] = sums.tobytes()
        seal(files)

    changed(place, change)
    assert read(mounted(place), KEYS[5:6]) == [flip(kv(TOKENS, 5), 0)]
    assert read(mounted(place, strict=True), KEYS[5:6]) == [None]


def test_sound_blocks_that_changed_places_are_found_by_both(place: Path, mounted: Any) -> None:
    changed(place, lambda files: files.update({SHARD: swapped(files[SHARD], 0, ALIGNMENT, SIZE)}))
    for strict in (False, True):
        assert read(mounted(place, strict=strict), KEYS[:3]) == [None, None, kv(TOKENS, 2)]


def test_a_deadline_that_is_past_is_a_counted_miss_and_nothing_is_broken(
    place: Path, mounted: Any, metrics: Metrics
) -> None:
    clock = FakeClock()
    tier = mounted(place, clock=clock)
    assert read(tier, KEYS, deadline_s=0.0) == [None] * 70
    assert metrics.misses.value("pack", Miss.LATE) == metrics.misses.value("pack") == 70
    assert tier.contains(KEYS) == [True] * 70 and read(tier, KEYS, deadline_s=1.0) == expected()


def test_what_came_before_the_deadline_counts(place: Path, mounted: Any, metrics: Metrics) -> None:
    """The clock is asked when the call begins, and before each of the two shards."""
    times = iter([0.0, 0.0, 0.0, 1.0, 2.0])  # of the call, of the reading, of each shard, and at the end
    tier = mounted(place, clock=lambda: next(times))
    assert read(tier, KEYS, deadline_s=1.0) == [*expected()[:64], *[None] * 6]
    assert metrics.misses.value("pack", Miss.LATE) == 6


def test_a_file_that_was_cut_while_it_is_mounted_is_a_miss_of_what_is_gone(
    tmp_path: Path, mounted: Any, metrics: Metrics
) -> None:
    place = make_pack(tmp_path / "pack", {"one": TOKENS})
    tier = mounted(place)
    assert read(tier, KEYS[:1]) == [kv(TOKENS, 0)]
    os.truncate(place / SHARD, 10 * ALIGNMENT + SIZE)
    blocks = expected()
    assert read(tier, KEYS) == [*blocks[:11], *[None] * 53, *blocks[64:]]
    assert metrics.misses.value("pack", Miss.CORRUPT) == 53
    os.truncate(place / SHARD, 0)
    assert read(tier, KEYS[:11]) == [None] * 11


def test_a_zip_that_was_cut_while_it_is_mounted_is_a_miss(tmp_path: Path, mounted: Any, metrics: Metrics) -> None:
    place = make_pack(tmp_path / "pack.zip", {"one": TOKENS})
    tier = mounted(place)
    assert read(tier, KEYS[:1]) == [kv(TOKENS, 0)]
    os.truncate(place, ALIGNMENT + 10)
    assert read(tier, KEYS) == [None] * 70
    assert metrics.misses.value("pack", Miss.CORRUPT) == 70


def test_a_pack_that_was_removed_while_it_is_mounted_is_read_or_fails_and_never_crashes(
    tmp_path: Path, mounted: Any, metrics: Metrics
) -> None:
    place = make_pack(tmp_path / "pack", {"one": TOKENS})
    tier = mounted(place)
    assert read(tier, KEYS[:1]) == [kv(TOKENS, 0)]
    shutil.rmtree(place)
    blocks = expected()
    assert read(tier, KEYS) == [*blocks[:64], *[None] * 6]  # the first shard was open
    assert metrics.misses.value("pack", Miss.FAILED) == metrics.misses.value("pack") == 6
    before = metrics.misses.value()
    with pytest.raises(TierError, match=r"c\.1\.0\.0\.0\.0\.0 cannot be read: No such file"):
        read(tier, KEYS[64:])
    assert metrics.misses.value() == before  # whoever hears of a TierError counts them
    assert tier.contains(KEYS[64:]) == [True] * 6  # a disk that is away may come back


def test_a_pack_that_is_written_anew_under_the_tier_is_never_mixed_up(tmp_path: Path, mounted: Any) -> None:
    place = make_pack(tmp_path / "pack", {"one": TOKENS})
    tier = mounted(place)
    other = make_pack(tmp_path / "other", {"one": prompt(5, 70)})
    put(place, files_of(other))
    assert read(tier, KEYS) == [None] * 70


def test_of_two_packs_the_one_that_is_away_is_left_alone_and_the_other_is_read(
    tmp_path: Path, mounted: Any, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    clock, other = FakeClock(), prompt(2, 3)
    away = make_pack(tmp_path / "away", {"one": prompt(1, 3)})
    tier = mounted(away, make_pack(tmp_path / "here", {"other": other}), clock=clock)
    (away / SHARD).unlink()
    both = [*KEYS[:3], *keys_of(other)]
    for there in (True, True, True, False):
        assert tier.contains(both) == [there] * 3 + [True] * 3
        assert read(tier, both if there else both[3:]) == [None] * 3 * there + expected(other)
    assert metrics.misses.value("pack", Miss.FAILED) == 9 and len(caplog.records) == 2  # the first failure, the pause
    assert "away is left alone for 1 s: " in caplog.text
    clock.advance(1.0)
    assert tier.contains(both) == [True] * 6


# -- what it does not do ----------------------------------------------------------------------------------------------------


def test_writing_keeps_nothing_and_says_what_is_there(place: Path, mounted: Any, metrics: Metrics) -> None:
    tier = mounted(place)
    before = files_of(place)
    more = prompt(3, 2)
    run = Run(NAMESPACE.root(), NAMESPACE.root(), 0, tuple(keys_of(more)), more)
    assert tier.write(run, [memoryview(bytes(SIZE))] * 2) == [False, False]
    known = Run(NAMESPACE.root(), NAMESPACE.root(), 0, tuple(KEYS[:2]), TOKENS[:16])
    assert tier.write(known, [memoryview(bytes(SIZE))] * 2) == [True, True]
    assert read(tier, [*keys_of(more), KEYS[0]]) == [None, None, kv(TOKENS, 0)]
    assert files_of(place) == before and metrics.bytes_written.value() == 0


def test_deleting_hides_a_name_and_leaves_the_pack_and_the_names_of_others(place: Path, mounted: Any) -> None:
    tier = mounted(place)
    space = Namespace("test", TINY, tenant="alice")
    tier.introduce(space.root(), space)
    before = files_of(place)
    tier.delete([*KEYS[60:], *keys_of(prompt(9, 1))])
    assert tier.contains(KEYS) == [True] * 60 + [False] * 10
    assert read(tier, KEYS[59:61]) == [kv(TOKENS, 59), None]
    assert tier.contains(keys_of(TOKENS, tenant="alice")) == [True] * 70
    assert files_of(place) == before


def test_closing_waits_for_readers_and_what_comes_later_is_a_miss(place: Path, mounted: Any, metrics: Metrics) -> None:
    steps = StepExecutor()
    tier = mounted(place, executor=steps)
    came: list[list[bytes | None]] = []
    reader = threading.Thread(target=lambda: came.append(read(tier, KEYS)))
    reader.start()
    until(lambda: len(steps.queue) == 2, "the reader has two shards to wait for")
    closer = threading.Thread(target=tier.close)
    closer.start()
    until(lambda: not tier.contains(KEYS[:1])[0], "the tier is closing")
    assert closer.is_alive() and reader.is_alive()
    steps.run_all()
    reader.join()
    closer.join()
    assert came == [expected()]
    tier.close()
    assert read(tier, KEYS) == [None] * 70 and metrics.misses.value("pack", Miss.DOWN) == 70
    tier.delete(KEYS)


def test_many_threads_read_whole_blocks(place: Path, mounted: Any) -> None:
    with ThreadPoolExecutor(3) as pieces, ThreadPoolExecutor(4) as readers:
        tier = mounted(place, executor=pieces)
        for answer in readers.map(lambda _: read(tier, KEYS), range(20)):
            assert answer == expected()


# -- ranks ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12])
def test_the_heads_of_all_ranks_together_are_the_whole_block(tmp_path: Path, mounted: Any, size: int) -> None:
    tokens = prompt(1, 3, layout=WIDE)
    place = make_pack(tmp_path / "pack", {"one": tokens}, layout=WIDE)
    own = replace(WIDE, num_kv_heads=max(1, 4 // size))
    whole = [np.frombuffer(block, "u2").reshape(WIDE.shape) for block in expected(tokens, WIDE)]
    parts: list[list[Any]] = [[], [], []]
    for rank in range(size):
        tier = mounted(place, namespace=Namespace("test", own), shard=Shard(rank, size), layout=own)
        names = keys_of(tokens, layout=own)
        for at, block in enumerate(read(tier, [names[2], names[0], names[1]])):
            assert block is not None
            parts[(2, 0, 1)[at]].append(np.frombuffer(block, "u2").reshape(own.shape))
    for block, slices in zip(whole, parts, strict=True):
        each = slices if size <= 4 else slices[:: size // 4]
        assert np.array_equal(np.concatenate(each, axis=2), block)
        for rank, part in enumerate(slices):  # ranks beyond the heads have the same as their neighbours
            head = rank * 4 // size if size > 4 else rank * own.num_kv_heads
            assert np.array_equal(part, block[:, :, head : head + own.num_kv_heads])


def test_a_rank_reads_what_is_sound_and_tells_what_is_not(tmp_path: Path, mounted: Any, metrics: Metrics) -> None:
    """Also when what is broken are the heads of another rank: a digest is of a whole block."""
    tokens = prompt(1, 3, layout=WIDE)
    place = make_pack(tmp_path / "pack", {"one": tokens}, layout=WIDE)
    changed(place, lambda files: files.update({SHARD: flip(files[SHARD], ALIGNMENT + WIDE.block_bytes - 1)}))
    own = replace(WIDE, num_kv_heads=1)
    tier = mounted(place, namespace=Namespace("test", own), shard=Shard(0, 4), layout=own)
    found = read(tier, keys_of(tokens, layout=own))
    assert [block is None for block in found] == [False, True, False]
    assert metrics.corrupt_blocks.value("pack") == 1 and metrics.bytes_read.value("pack") == 2 * own.block_bytes


@pytest.mark.parametrize("size", [3, 5, 6, 7, 9])
def test_heads_that_cannot_be_shared_out_are_told(tmp_path: Path, size: int, metrics: Metrics) -> None:
    place = make_pack(tmp_path / "pack", {"one": prompt(1, 1, layout=WIDE)}, layout=WIDE)
    with pytest.raises(LayoutError, match=f"4 KV heads cannot be shared out to {size} tensor-parallel ranks"):
        Shard(0, size).heads(4)
    with open_pack(place) as pack, pytest.raises(PackError, match=f"4 KV heads cannot be shared out to {size}"):
        PackTier([pack], layout=WIDE, metrics=metrics, shard=Shard(0, size))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("dtype", "float16", "dtype bfloat16, here float16"),
        ("block_tokens", 16, "block_tokens 4, here 16"),
        ("num_layers", 3, "num_layers 2, here 3"),
        ("num_kv_heads", 2, "num_kv_heads 4, here 2"),
        ("head_dim", 16, "head_dim 8, here 16"),
        ("parts", 1, "parts 2, here 1"),
    ],
)
def test_a_pack_of_another_layout_is_refused_by_the_field(
    tmp_path: Path, metrics: Metrics, field: str, value: Any, said: str
) -> None:
    place = make_pack(tmp_path / "pack", {"one": prompt(1, 1, layout=WIDE)}, layout=WIDE)
    with open_pack(place) as pack:
        with pytest.raises(PackError) as raised:
            PackTier([pack], layout=replace(WIDE, **{field: value}), metrics=metrics)
        assert f"{place}: made for another layout: {said}; build a pack" in str(raised.value)
        assert Shard().misfit(WIDE, WIDE) is None
        assert Shard(1, 2).misfit(WIDE, replace(WIDE, num_kv_heads=2)) is None
        assert Shard(1, 2).misfit(WIDE, WIDE) == "num_kv_heads 2, here 4"


# -- models -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        (FACTS, None),
        (other_facts(rope={"rope_theta": 5e5}), "rope rope_theta 10000.0, here 500000.0"),
        (other_facts(config={"num_hidden_layers": 1, "hidden_size": 65}), "hidden_size 64, here 65"),
        (other_facts(config={"num_hidden_layers": 1}), "hidden_size 64, here not set"),
        (other_facts(architecture="Qwen3ForCausalLM"), "architecture LlamaForCausalLM, here Qwen3ForCausalLM"),
        (other_facts(), "weights (model identity test, here other)"),
        (replace(FACTS, tokenizer_sha256="9" * 64), "tokenizer 111111111111, here 999999999999"),
        (replace(FACTS, chat_template_sha256=None), "chat template 222222222222, here none"),
    ],
)
def test_a_pack_of_another_model_is_told_by_what_differs(
    tmp_path: Path, mounted: Any, ours: ModelFacts, said: str | None
) -> None:
    place = make_pack(tmp_path / "pack", {"one": prompt(1, 1)})
    space = Namespace(ours.identity, TINY)
    tier = mounted(place, namespace=space, facts=ours)
    assert tier.mismatch(tier.packs[0], space) == said
    assert tier.contains(keys_of(prompt(1, 1), model=ours.identity)) == [said is None]


def test_without_facts_the_identity_is_what_is_told(tmp_path: Path, mounted: Any) -> None:
    tier = mounted(make_pack(tmp_path / "pack", {"one": prompt(1, 1)}))
    assert tier.mismatch(tier.packs[0], Namespace("other", TINY)) == "model identity test, here other"
    both = tier.mismatch(tier.packs[0], Namespace("other", TINY, adapter="lora"))
    assert both == "model identity test, here other, adapter none, here lora"


def test_a_pack_of_an_adapter_is_for_that_adapter(tmp_path: Path, mounted: Any) -> None:
    space = Namespace("test", TINY, adapter="lora")
    tier = mounted(make_pack(tmp_path / "pack", {"one": prompt(1, 1)}, adapter="lora"), namespace=space)
    assert tier.mismatch(tier.packs[0], space) is None
    assert tier.mismatch(tier.packs[0], NAMESPACE) == "adapter lora, here none"
