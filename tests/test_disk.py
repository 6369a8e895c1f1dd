"""The disk tier keeps its promises; a folder of it is an ordinary zarr store."""

import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import zarr

from tierkv.errors import ConfigError, LayoutError, TierBusy, TierError
from tierkv.keys import Key
from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.testing import SMALL, TierContract, block_of, blocks_of, make_run, read_blocks
from tierkv.tiers.base import Miss, Run, Tier
from tierkv.tiers.disk import DiskTier
from tierkv.tiers.disk_array import SHARD_SLOTS, folder_bytes_for
from tierkv.tiers.disk_files import Files
from tierkv.tiers.disk_inspect import folder_bytes, inspect_folder
from tierkv.tiers.disk_manifest import NAME, read_rows
from tierkv.zarr_shards import ALIGNMENT, crc32c, stride_of

EVEN = Layout(num_layers=2, num_kv_heads=2, head_dim=32, dtype="float32")  # 16 KiB: no padding, no bounce buffer


def capacity(num_slots: int, layout: Layout = SMALL) -> int:
    return folder_bytes_for(num_slots, layout)


def open_tier(path: Path, num_slots: int = 256, layout: Layout = SMALL, **options: object) -> DiskTier:
    metrics = options.pop("metrics", None) or Metrics()
    return DiskTier(
        path / "disk", layout=layout, capacity_bytes=capacity(num_slots, layout), metrics=metrics, **options
    )  # type: ignore[arg-type]


def slot_of(folder: Path, key: Key) -> int:
    return next(row.slot for row in read_rows(folder)[0] if row.key == key)


def shard_path(folder: Path, slot: int) -> Path:
    return folder / "blocks" / f"c.{slot // SHARD_SLOTS}.0.0.0.0.0"


def flip(folder: Path, key: Key, layout: Layout = SMALL) -> None:
    slot = slot_of(folder, key)
    with shard_path(folder, slot).open("r+b") as file:
        at = slot % SHARD_SLOTS * stride_of(layout.block_bytes) + layout.block_bytes // 2
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


class TestDiskTier(TierContract):
    options: ClassVar[dict[str, object]] = {}

    def make(self, tmp_path: Path, metrics: Metrics) -> Tier:
        return open_tier(tmp_path, metrics=metrics, **self.options)

    def corrupt(self, tier: Tier, key: Key) -> None:
        assert isinstance(tier, DiskTier)
        flip(tier.path, key)


class TestDiskTierThroughThePageCache(TestDiskTier):
    options: ClassVar[dict[str, object]] = {"direct": False}


class NoDirect(Files):
    """A file system without O_DIRECT."""

    def open(self, path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return super().open(path, flags)


class TestDiskTierWithoutDirectIO(TestDiskTier):
    options: ClassVar[dict[str, object]] = {"files": NoDirect()}


class TestDiskTierWithAnExecutor(TestDiskTier):
    options: ClassVar[dict[str, object]] = {"executor": ThreadPoolExecutor(2)}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def tier(tmp_path: Path, metrics: Metrics) -> Iterator[DiskTier]:
    tier = open_tier(tmp_path, metrics=metrics)
    yield tier
    tier.close()


# --- a zarr store -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8", "float8_e4m3"])
@pytest.mark.parametrize("head_dim", [20, 32])
def test_zarr_opens_the_folder_and_finds_the_same_values(tmp_path: Path, dtype: str, head_dim: int) -> None:
    layout = Layout(num_layers=2, num_kv_heads=2, head_dim=head_dim, dtype=dtype)
    tier = open_tier(tmp_path, 100, layout)
    run = make_run(80, seed=1, layout=layout)
    assert all(tier.write(run, blocks_of(run, layout)))
    tier.delete(run.keys[70:])
    tier.close()
    group = zarr.open_group(tier.path, mode="r")
    blocks, keys = group["blocks"], group["slot_keys"]
    assert isinstance(blocks, zarr.Array) and isinstance(keys, zarr.Array)
    assert blocks.shape == (100, *layout.shape) and blocks.attrs["dtype"] == dtype
    live = {bytes(key): slot for slot, key in enumerate(np.asarray(keys[:])) if key.any()}
    assert live.keys() == set(run.keys[:70])
    for key, slot in live.items():
        assert np.asarray(blocks[slot]).tobytes() == block_of(Key(key), layout)
    assert group.attrs["tierkv"]["fingerprint"] == layout.fingerprint.hex()


def test_zarr_reads_slots_while_the_tier_is_open(tier: DiskTier) -> None:
    run = make_run(3, seed=1)
    tier.write(run, blocks_of(run))
    array = zarr.open_array(tier.path / "blocks", mode="r")
    for key in run.keys:
        assert np.asarray(array[slot_of(tier.path, key)]).tobytes() == block_of(key)
    assert not np.asarray(array[255]).any()  # never written
    assert not np.asarray(zarr.open_array(tier.path / "slot_keys", mode="r")[:]).any()  # no stale answer meanwhile


def test_our_shard_index_is_the_one_zarr_writes(tmp_path: Path, tier: DiskTier) -> None:
    layout = Layout(num_layers=2, num_kv_heads=2, head_dim=32, dtype="float32")
    ours = open_tier(tmp_path / "ours", 64, layout)
    run = make_run(64, seed=1, layout=layout)
    ours.write(run, blocks_of(run, layout))
    ours.close()
    meta = json.loads((ours.path / "blocks" / "zarr.json").read_text())
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "zarr.json").write_text(json.dumps(meta))
    zarr.open_array(theirs, mode="r+")[:] = np.asarray(zarr.open_array(ours.path / "blocks", mode="r")[:])
    assert (theirs / "c.0.0.0.0.0.0").read_bytes() == shard_path(ours.path, 0).read_bytes()


def test_crc32c_is_castagnoli() -> None:
    assert crc32c(b"123456789") == 0xE3069283


# --- start ------------------------------------------------------------------------------------------------------------


def test_capacity_under_one_block_is_refused_with_the_least_that_works(tmp_path: Path) -> None:
    least = capacity(1)
    for few in (0, 1, SMALL.block_bytes, least - 1):
        with pytest.raises(ConfigError, match=rf"disk.capacity = {few} .* at least {least}"):
            DiskTier(tmp_path / "disk", layout=SMALL, capacity_bytes=few, metrics=Metrics())
    tier = DiskTier(tmp_path / "disk", layout=SMALL, capacity_bytes=least, metrics=Metrics())
    run = make_run(2, seed=1)
    assert tier.num_slots == 1 and tier.write(run, blocks_of(run)) == [True, False]
    tier.close()


def test_second_owner_is_refused_and_told_who_owns_the_folder(tmp_path: Path, tier: DiskTier) -> None:
    with pytest.raises(TierBusy, match=rf"{tier.path} is in use by process {os.getpid()}: stop"):
        open_tier(tmp_path)
    tier.close()
    open_tier(tmp_path).close()


def test_folder_of_another_layout_is_refused_and_left_alone(tmp_path: Path) -> None:
    first = open_tier(tmp_path)
    run = make_run(3, seed=1)
    first.write(run, blocks_of(run))
    first.close()
    with pytest.raises(
        ConfigError, match=r"another layout \(head_dim 20 not 32, dtype bfloat16 not float32\): give another"
    ):
        open_tier(tmp_path, layout=EVEN)
    again = open_tier(tmp_path)
    assert read_blocks(again, run.keys) == [block_of(key) for key in run.keys]
    again.close()


def test_folder_with_strange_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    (folder / "thesis.tmp").write_text("years of work")
    with pytest.raises(ConfigError, match=r"holds other files \(thesis.tmp\)"):
        open_tier(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["thesis.tmp"]


def test_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "disk").write_text("")
    with pytest.raises(TierError, match="give a folder that can be written to"):
        open_tier(tmp_path)


def test_crash_while_the_folder_was_made_is_mended(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    zarr.create_group(folder)
    (folder / "blocks").mkdir()
    tier = open_tier(tmp_path)
    run = make_run(3, seed=1)
    assert all(tier.write(run, blocks_of(run)))
    tier.close()
    (folder / "blocks" / "zarr.json").write_text("{")
    (folder / "slot_keys" / "zarr.json").unlink()
    again = open_tier(tmp_path)
    assert read_blocks(again, run.keys) == [block_of(key) for key in run.keys]
    again.close()


def test_temporary_files_of_a_crash_are_swept(tmp_path: Path, tier: DiskTier) -> None:
    tier.close()
    left = [
        tier.path / "zarr.json.abc.partial",
        tier.path / "blocks" / "c.3.0.0.0.0.0.tmp",
        tier.path / "blocks" / "c.99.0.0.0.0.0",
        tier.path / "slot_keys" / "c.0.0.tmp",
    ]
    for path in left:
        path.write_bytes(bytes(10000))
    open_tier(tmp_path).close()
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize("more", [70, 128, 500])
def test_larger_capacity_keeps_everything(tmp_path: Path, more: int) -> None:
    small = open_tier(tmp_path, 50)
    run = make_run(50, seed=1)
    assert all(small.write(run, blocks_of(run)))
    small.close()
    large = open_tier(tmp_path, more)
    rest = make_run(more - 50, seed=2, after=run)
    assert all(large.write(rest, blocks_of(rest)))
    keys = run.keys + rest.keys
    assert read_blocks(large, keys) == [block_of(key) for key in keys]
    large.close()
    array = zarr.open_array(large.path / "blocks", mode="r")
    assert array.shape[0] == more
    assert np.asarray(array[slot_of(large.path, keys[-1])]).tobytes() == block_of(keys[-1])
    assert folder_bytes(large.path) <= capacity(more)


def test_smaller_capacity_drops_what_does_not_fit_and_counts_it(tmp_path: Path, metrics: Metrics) -> None:
    large = open_tier(tmp_path, 300)
    run = make_run(300, seed=1)
    assert all(large.write(run, blocks_of(run)))
    large.close()
    small = open_tier(tmp_path, 100, metrics=metrics)
    found = read_blocks(small, run.keys)
    assert found == [
        block_of(key) if here else None for key, here in zip(run.keys, small.contains(run.keys), strict=True)
    ]
    assert sum(block is not None for block in found) == 100 and metrics.blocks_evicted.value("disk") == 200
    assert folder_bytes(small.path) <= capacity(100)
    small.close()
    array = zarr.open_array(small.path / "blocks", mode="r")
    assert np.asarray(array[99]).tobytes() == found[slot_of_position(small.path, run, 99)]


def slot_of_position(folder: Path, run: Run, slot: int) -> int:
    return run.keys.index(next(row.key for row in read_rows(folder)[0] if row.slot == slot))


# --- room -------------------------------------------------------------------------------------------------------------


def test_full_tier_drops_saves_and_counts_them(tmp_path: Path, metrics: Metrics) -> None:
    tier = open_tier(tmp_path, 20, metrics=metrics)
    first, second = make_run(15, seed=1), make_run(10, seed=2)
    assert all(tier.write(first, blocks_of(first)))
    assert tier.write(second, blocks_of(second)) == [True] * 5 + [False] * 5
    assert metrics.saves_dropped.value("disk", "full") == 5
    tier.delete(first.keys[10:])
    assert all(tier.write(second, blocks_of(second)))
    assert read_blocks(tier, second.keys) == [block_of(key) for key in second.keys]
    assert metrics.blocks_used.value("disk") == metrics.blocks_capacity.value("disk") == 20
    tier.close()


def test_folder_never_outgrows_its_cap_under_churn(tmp_path: Path) -> None:
    """Small blocks make the records as large a part of the folder as they ever are."""
    layout = Layout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float16")
    tier = open_tier(tmp_path, 600, layout)
    random = np.random.default_rng(3)
    held: list[Key] = []
    most = 0
    for seed in range(120):
        run = make_run(int(random.integers(1, 120)), seed=seed, layout=layout)
        saved = tier.write(run, blocks_of(run, layout))
        held += [key for key, ok in zip(run.keys, saved, strict=True) if ok]
        most = max(most, folder_bytes(tier.path))
        if random.integers(3):
            random.shuffle(held)
            tier.delete(held[: len(held) // 3])
            del held[: len(held) // 3]
    assert set(held) == {key for run in tier.scan() for key in run.keys}
    tier.close()
    assert max(most, folder_bytes(tier.path)) <= capacity(600, layout)


def test_reader_of_the_manifest_cannot_make_its_log_outgrow_the_cap(tmp_path: Path, metrics: Metrics) -> None:
    layout = Layout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float16")
    tier = open_tier(tmp_path, 400, layout, metrics=metrics)
    reader = sqlite3.connect(tier.path / NAME, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM blocks").fetchone()
    run = make_run(400, seed=1, layout=layout)
    for _ in range(400):
        if not all(tier.write(run, blocks_of(run, layout))):
            break
        tier.delete(run.keys)
    assert metrics.saves_dropped.value("disk", "failed") > 0  # only the log's limit can have done it
    assert folder_bytes(tier.path) <= capacity(400, layout)
    reader.close()
    assert all(tier.write(run, blocks_of(run, layout)))
    tier.close()


# --- reading while things change --------------------------------------------------------------------------------------


class SlowReads(Files):
    """Stops a read in the middle until it is told to go on."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def preadv(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        self.reached.set()
        assert self.go_on.wait(20)
        return super().preadv(fd, views, offset)


def in_thread(call: object, *args: object) -> tuple[threading.Thread, list[object]]:
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(call(*args)))  # type: ignore[operator]
    thread.start()
    return thread, answers


def test_slots_under_a_slow_read_are_not_used_again(tmp_path: Path) -> None:
    files = SlowReads()
    tier = open_tier(tmp_path, 10, files=files)
    run, other = make_run(10, seed=1), make_run(10, seed=2)
    tier.write(run, blocks_of(run))
    thread, answers = in_thread(read_blocks, tier, run.keys)
    assert files.reached.wait(20)
    tier.delete(run.keys)
    assert tier.contains(run.keys) == [False] * 10
    assert tier.write(other, blocks_of(other)) == [False] * 10
    files.go_on.set()
    thread.join()
    assert answers == [[block_of(key) for key in run.keys]]
    assert all(tier.write(other, blocks_of(other)))
    assert read_blocks(tier, other.keys) == [block_of(key) for key in other.keys]
    tier.close()


def test_close_waits_for_a_read_under_way(tmp_path: Path) -> None:
    files = SlowReads()
    tier = open_tier(tmp_path, 10, files=files)
    run = make_run(10, seed=1)
    tier.write(run, blocks_of(run))
    reading, answers = in_thread(read_blocks, tier, run.keys)
    assert files.reached.wait(20)
    closing, _ = in_thread(tier.close)
    assert closing.is_alive()
    files.go_on.set()
    reading.join()
    closing.join()
    assert answers == [[block_of(key) for key in run.keys]]
    assert read_blocks(tier, run.keys) == [None] * 10


def test_one_key_twice_in_a_batch_fills_both_buffers(tier: DiskTier) -> None:
    run = make_run(2, seed=1)
    tier.write(run, blocks_of(run))
    keys = [run.keys[1], run.keys[0], run.keys[1]]
    assert read_blocks(tier, keys) == [block_of(key) for key in keys]
    twice = make_run(1, seed=2)
    twice = Run(twice.root, twice.parent, 0, twice.keys * 2, twice.tokens * 2)
    assert tier.write(twice, blocks_of(twice)) == [True, False]
    assert read_blocks(tier, twice.keys) == [block_of(twice.keys[0])] * 2


def test_aligned_buffers_are_read_and_written_in_place(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, 100, EVEN)
    run = make_run(100, seed=1, layout=EVEN)
    size = EVEN.block_bytes
    raw = np.zeros(100 * size + ALIGNMENT, np.uint8)
    skip = -raw.ctypes.data % ALIGNMENT
    slab = memoryview(raw)[skip : skip + 100 * size]
    views = [slab[at * size : (at + 1) * size] for at in range(100)]
    for view, key in zip(views, run.keys, strict=True):
        view[:] = block_of(key, EVEN)
    assert all(tier.write(run, views))
    slab[:] = bytes(len(slab))
    assert all(tier.read(run.keys, views))
    assert [bytes(view) for view in views] == [block_of(key, EVEN) for key in run.keys]
    tier.close()


def test_buffers_of_another_size_are_refused(tier: DiskTier) -> None:
    run = make_run(1, seed=1)
    for size in (0, SMALL.block_bytes - 1, SMALL.block_bytes + 1):
        with pytest.raises(LayoutError, match=f"buffer of {size} bytes"):
            tier.write(run, [memoryview(bytes(size))])
        with pytest.raises(LayoutError, match=f"buffer of {size} bytes"):
            tier.read(run.keys, [memoryview(bytearray(size))])
    with pytest.raises(LayoutError, match="tokens"):
        tier.write(Run(run.root, run.parent, 0, run.keys, b"1234"), blocks_of(run))


class Timed(Files):
    """Every transfer takes a second."""

    seconds = 0.0

    def preadv(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        self.seconds += 1
        return super().preadv(fd, views, offset)

    def pwritev(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        self.seconds += 1
        return super().pwritev(fd, views, offset)


def test_deadline_between_pieces_keeps_what_came_before_it(tmp_path: Path, metrics: Metrics) -> None:
    files = Timed()
    tier = open_tier(tmp_path, files=files, metrics=metrics, clock=lambda: files.seconds)
    run = make_run(200, seed=1)  # four shards, a transfer each
    assert all(tier.write(run, blocks_of(run)))
    outs = [memoryview(bytearray(SMALL.block_bytes)) for _ in run.keys]
    assert tier.read(run.keys, outs, deadline_s=1.5) == [True] * 128 + [False] * 72
    assert [bytes(out) for out in outs[:128]] == [block_of(key) for key in run.keys[:128]]
    assert metrics.misses.value("disk", Miss.LATE) == 72
    tier.delete(run.keys)
    assert tier.write(run, blocks_of(run), deadline_s=1.5) == [True] * 128 + [False] * 72
    assert metrics.saves_dropped.value("disk", "late") == 72
    assert read_blocks(tier, run.keys) == [block_of(key) for key in run.keys[:128]] + [None] * 72
    tier.close()


@pytest.mark.parametrize("layout", [SMALL, EVEN], ids=["padded", "even"])
def test_pieces_ahead_land_where_they_belong(tmp_path: Path, layout: Layout) -> None:
    with ThreadPoolExecutor(3) as executor:
        several_shards(tmp_path, layout, executor)


def several_shards(path: Path, layout: Layout, executor: Executor) -> None:
    tier = open_tier(path, 700, layout, executor=executor)
    run = make_run(700, seed=1, layout=layout)
    assert all(tier.write(run, blocks_of(run, layout)))
    flip(tier.path, run.keys[300], layout)
    expected = [None if at == 300 else block_of(key, layout) for at, key in enumerate(run.keys)]
    assert read_blocks(tier, run.keys, layout) == expected
    tier.close()


# --- what it tells ----------------------------------------------------------------------------------------------------


def test_scan_puts_pieces_of_a_path_together_and_orphans_last(tmp_path: Path, tier: DiskTier) -> None:
    head = make_run(5, seed=1)
    middle = make_run(4, seed=2, after=head)
    tail = make_run(3, seed=3, after=middle)
    lone = make_run(4, seed=4)
    for run in (tail, lone, head, middle):
        tier.write(run, blocks_of(run))
    whole = Run(
        head.root, head.parent, 0, head.keys + middle.keys + tail.keys, head.tokens + middle.tokens + tail.tokens
    )
    assert sorted(tier.scan(), key=lambda run: len(run.keys)) == [lone, whole]
    tier.delete(middle.keys[1:3])
    *roots, orphan = tier.scan()
    assert orphan.parent == middle.keys[2] and orphan.keys == middle.keys[3:] + tail.keys and orphan.depth == 8
    assert sorted(len(run.keys) for run in roots) == [4, 6]


def test_runs_without_tokens_are_kept_without_tokens(tmp_path: Path, tier: DiskTier) -> None:
    run = make_run(4, seed=1)
    bare = Run(run.root, run.parent, 0, run.keys)
    assert all(tier.write(bare, blocks_of(bare)))
    assert list(tier.scan()) == [bare]


def test_inspection_works_beside_the_owner_and_after(tmp_path: Path) -> None:
    clock = iter(range(1_000_000, 2_000_000))
    tier = open_tier(tmp_path, now=lambda: float(next(clock)))
    trunk, other = make_run(6, seed=1), make_run(2, seed=2)
    branch = make_run(3, seed=3, after=trunk)
    for run in (trunk, other, branch):
        tier.write(run, blocks_of(run))
    report = tier.describe()
    assert (report.runs, report.blocks, report.tokens, report.namespaces) == (2, 11, 11 * SMALL.block_tokens, 1)
    assert report.payload_bytes == 11 * SMALL.block_bytes < report.folder_bytes <= capacity(256)
    assert report.oldest is not None and report.newest is not None and 1_000_000 <= report.oldest < report.newest
    assert (report.codec, report.owner, report.damaged) == ("raw", os.getpid(), 0)
    assert report.layout == {
        "num_layers": 2,
        "parts": 2,
        "num_kv_heads": 2,
        "block_tokens": 16,
        "head_dim": 20,
        "dtype": "bfloat16",
    }
    read_blocks(tier, trunk.keys)
    tier.close()
    after = inspect_folder(tier.path)
    assert after.owner is None and after.blocks == 11
    assert after.used is not None and report.used is not None and after.used > report.used
    with pytest.raises(ConfigError, match="no disk folder of tierkv"):
        inspect_folder(tmp_path)
