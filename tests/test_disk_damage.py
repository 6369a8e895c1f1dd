"""Whatever happens to the folder or to a system call, the disk tier forgets; it never lies and never raises."""

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import zarr

from tests.test_disk import SMALL, capacity, flip, open_tier, shard_path, slot_of
from tierkv.errors import TierError
from tierkv.keys import Key
from tierkv.metrics import Metrics
from tierkv.testing import block_of, blocks_of, make_run, read_blocks
from tierkv.tiers.base import Miss
from tierkv.tiers.disk import FULL_PAUSE_S, DiskTier
from tierkv.tiers.disk_files import Files
from tierkv.tiers.disk_inspect import folder_bytes
from tierkv.tiers.disk_manifest import NAME, guard_of
from tierkv.zarr_shards import stride_of

RUN = make_run(150, seed=1)  # three shards


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def tier(tmp_path: Path, metrics: Metrics) -> Iterator[DiskTier]:
    tier = open_tier(tmp_path, metrics=metrics)
    assert all(tier.write(RUN, blocks_of(RUN)))
    yield tier
    tier.close()


def found(tier: DiskTier, keys: Sequence[Key] = RUN.keys) -> int:
    """Read everything; what comes must be right. Returns how much came."""
    blocks = read_blocks(tier, keys)
    assert all(block is None or block == block_of(key) for key, block in zip(keys, blocks, strict=True))
    return sum(block is not None for block in blocks)


def usable(tier: DiskTier) -> None:
    """What was lost can be saved again."""
    assert all(tier.write(RUN, blocks_of(RUN)))
    assert found(tier) == len(RUN.keys)


# --- damage under an open tier ----------------------------------------------------------------------------------------


def test_deleted_shard_under_an_open_tier_is_a_miss(tier: DiskTier, metrics: Metrics) -> None:
    shard_path(tier.path, 0).unlink()
    assert found(tier) == 150 - 64
    assert metrics.misses.value("disk", Miss.CORRUPT) == metrics.corrupt_blocks.value("disk") == 64
    usable(tier)


def test_truncated_shard_under_an_open_tier_is_a_miss(tier: DiskTier, metrics: Metrics) -> None:
    os.truncate(shard_path(tier.path, 0), 10 * stride_of(SMALL.block_bytes) + 100)
    assert found(tier) == 150 - 54
    assert metrics.misses.value("disk", Miss.CORRUPT) == metrics.corrupt_blocks.value("disk") == 54
    usable(tier)


def test_shard_replaced_by_another_zarr_writer_is_a_miss(tier: DiskTier, metrics: Metrics) -> None:
    zarr.open_array(tier.path / "blocks", mode="r+")[5] = 7
    assert found(tier) == 150 - 64
    assert metrics.corrupt_blocks.value("disk") == 64
    usable(tier)
    tier.close()
    assert read_blocks(tier, RUN.keys[:1]) == [None]


def test_shard_lost_during_a_save_fails_those_blocks_only(tmp_path: Path, metrics: Metrics) -> None:
    class Loses(Files):
        """The file vanishes between the last write and the sync."""

        armed: Path | None = None

        def pwritev(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
            done = super().pwritev(fd, views, offset)
            if self.armed:
                self.armed.unlink(missing_ok=True)
            return done

    files = Loses()
    tier = open_tier(tmp_path, metrics=metrics, files=files)
    first, second = make_run(10, seed=2), make_run(10, seed=3)
    tier.write(first, blocks_of(first))
    files.armed = shard_path(tier.path, 0)
    assert tier.write(second, blocks_of(second)) == [False] * 10
    files.armed = None
    assert metrics.saves_dropped.value("disk", "failed") == 10
    assert tier.contains(first.keys + second.keys) == [False] * 20
    usable(tier)
    tier.close()


# --- damage while nobody looked ---------------------------------------------------------------------------------------


def test_missing_shard_at_start_is_counted_and_forgotten(tmp_path: Path, tier: DiskTier) -> None:
    tier.close()
    shard_path(tier.path, 64).unlink()
    metrics = Metrics()
    again = open_tier(tmp_path, metrics=metrics)
    assert metrics.misses.value("disk", Miss.CORRUPT) == metrics.corrupt_blocks.value("disk") == 64
    assert found(again) == 150 - 64 and sum(len(run.keys) for run in again.scan()) == 150 - 64
    usable(again)
    again.close()


def test_truncated_shard_at_start_is_counted_and_mended(tmp_path: Path, tier: DiskTier) -> None:
    tier.close()
    os.truncate(shard_path(tier.path, 0), 3 * stride_of(SMALL.block_bytes) - 1)
    metrics = Metrics()
    again = open_tier(tmp_path, metrics=metrics)
    assert metrics.corrupt_blocks.value("disk") == 62 and found(again) == 150 - 62
    usable(again)
    again.close()
    assert zarr.open_array(again.path / "blocks", mode="r")[63].any()


def test_shard_of_garbage_is_found_block_by_block(tmp_path: Path, tier: DiskTier, metrics: Metrics) -> None:
    tier.close()
    path = shard_path(tier.path, 0)
    path.write_bytes(os.urandom(path.stat().st_size))
    again = open_tier(tmp_path, metrics=metrics)
    assert found(again) == 150 - 64 and metrics.corrupt_blocks.value("disk") == 64
    again.close()


def test_two_blocks_that_changed_places_are_both_refused(tmp_path: Path, tier: DiskTier, metrics: Metrics) -> None:
    """Each is whole: only a checksum that knows the key can tell."""
    tier.close()
    path, stride = shard_path(tier.path, 0), stride_of(SMALL.block_bytes)
    data = bytearray(path.read_bytes())
    data[:stride], data[stride : 2 * stride] = data[stride : 2 * stride], data[:stride]
    path.write_bytes(data)
    again = open_tier(tmp_path, metrics=metrics)
    assert found(again) == 148 and metrics.corrupt_blocks.value("disk") == 2
    again.close()


def test_every_flipped_block_of_a_batch_is_found(tmp_path: Path, tier: DiskTier, metrics: Metrics) -> None:
    for key in RUN.keys[::3]:
        flip(tier.path, key)
    assert found(tier) == 100 and metrics.misses.value("disk", Miss.CORRUPT) == 50
    usable(tier)


def test_unverified_tier_gives_what_the_disk_gives(tmp_path: Path) -> None:
    """What `verify=False` means: the risk is the caller's."""
    tier = open_tier(tmp_path, verify=False)
    tier.write(RUN, blocks_of(RUN))
    flip(tier.path, RUN.keys[0])
    blocks = read_blocks(tier, RUN.keys[:2])
    assert blocks[0] not in (None, block_of(RUN.keys[0])) and blocks[1] == block_of(RUN.keys[1])
    tier.close()


# --- the manifest -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["garbage", "first page", "middle", "other tables", "huge"])
def test_damaged_manifest_is_moved_aside_and_the_tier_starts_empty(
    tmp_path: Path, tier: DiskTier, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    tier.close()
    path = tier.path / NAME
    if damage == "garbage":
        path.write_bytes(os.urandom(30000))
    elif damage == "huge":
        path.write_bytes(os.urandom(1000) * 4000)
    elif damage == "other tables":
        path.unlink()
        other = sqlite3.connect(path)
        other.execute("CREATE TABLE blocks (slot INTEGER PRIMARY KEY, name TEXT)")
        other.close()
    else:
        data = bytearray(path.read_bytes())
        start = 100 if damage == "first page" else 4096
        data[start : start + 12000] = os.urandom(12000)
        path.write_bytes(data)
    metrics = Metrics()
    again = open_tier(tmp_path, metrics=metrics)
    assert "is damaged" in caplog.text and "starts empty" in caplog.text
    assert metrics.corrupt_blocks.value("disk") == 1 and found(again) == 0
    assert (again.path / "manifest.damaged").exists() == (damage != "huge")
    assert folder_bytes(again.path) <= capacity(256)
    usable(again)
    again.close()


def edit(tier: DiskTier, statement: str, *values: object) -> None:
    connection = sqlite3.connect(tier.path / NAME)
    with connection:
        connection.execute(statement, values)
    connection.close()


ROW = "slot = (SELECT slot FROM blocks WHERE depth = 7)"


@pytest.mark.parametrize(
    ("change", "values"),
    [
        (f"UPDATE blocks SET key = ? WHERE {ROW}", (RUN.keys[8],)),  # twice the same key
        (f"UPDATE blocks SET key = 'text' WHERE {ROW}", ()),
        (f"UPDATE blocks SET key = x'00' WHERE {ROW}", ()),
        (f"UPDATE blocks SET checksum = 'text' WHERE {ROW}", ()),
        (f"UPDATE blocks SET slot = 9999 WHERE {ROW}", ()),
        (f"UPDATE blocks SET slot = -1 WHERE {ROW}", ()),
        (f"UPDATE blocks SET slot = 200 WHERE {ROW}", ()),  # a shard that was never made
        (f"UPDATE blocks SET checksum = checksum + 1 WHERE {ROW}", ()),
        (f"UPDATE blocks SET key = ? WHERE {ROW}", (b"k" * 32,)),
    ],
)
def test_rows_that_cannot_be_right_are_misses(
    tmp_path: Path, tier: DiskTier, change: str, values: tuple[object]
) -> None:
    tier.close()
    edit(tier, change, *values)
    again = open_tier(tmp_path)
    assert read_blocks(again, [Key(b"k" * 32)]) == [None]
    assert 148 <= found(again) <= 149
    usable(again)
    again.close()


@pytest.mark.parametrize(
    "change",
    [
        "tokens = x'00'",
        "parent = x'00'",
        "parent = root",
        "depth = -1",
        "depth = depth + 1",
        "depth = 1.5",
        "root = 99",
    ],
)
def test_scan_leaves_out_rows_whose_tokens_or_path_were_changed(
    tmp_path: Path, tier: DiskTier, change: str, metrics: Metrics
) -> None:
    """Wrong tokens under a right key would be a wrong hit in the index: the one lie a checksum of payloads cannot see."""
    tier.close()
    edit(tier, f"UPDATE blocks SET {change} WHERE {ROW}")
    again = open_tier(tmp_path, metrics=metrics)
    first, rest = again.scan()
    assert (first.keys, first.tokens) == (RUN.keys[:7], RUN.tokens[: 7 * 64])
    assert (rest.keys, rest.tokens, rest.parent, rest.depth) == (RUN.keys[8:], RUN.tokens[8 * 64 :], RUN.keys[7], 8)
    assert metrics.corrupt_blocks.value("disk") == 1 and not again.contains([RUN.keys[7]])[0]
    usable(again)
    again.close()


def test_guard_covers_every_field() -> None:
    fields = (b"k" * 32, b"r" * 32, b"p" * 32, 3, b"t" * 64)
    guards = {guard_of(*fields)}
    for place, other in enumerate([b"x" * 32, b"x" * 32, b"x" * 32, 4, b"x" * 64]):
        guards.add(guard_of(*fields[:place], other, *fields[place + 1 :]))  # type: ignore[arg-type]
    assert len(guards) == 6


# --- the n-th system call fails ---------------------------------------------------------------------------------------


class FaultyFiles(Files):
    """Fails the n-th call with a given error; or, for errno 0, cuts every n-th transfer short."""

    def __init__(self, at: int, code: int) -> None:
        self.at, self.code, self.calls = at, code, 0

    def _count(self) -> bool:
        self.calls += 1
        return self.calls == self.at


def _failing(name: str) -> Callable[..., object]:
    def call(self: FaultyFiles, *args: object) -> object:
        if self._count() and self.code:
            if name == "commit":
                raise sqlite3.OperationalError("disk I/O error")
            raise OSError(self.code, os.strerror(self.code))
        return getattr(Files, name)(self, *args)

    return call


for _name in ("open", "allocate", "truncate", "preadv", "pwritev", "sync", "stat", "rename", "unlink", "commit"):
    setattr(FaultyFiles, _name, _failing(_name))


def life(path: Path, files: Files, metrics: Metrics) -> None:
    """A tier's life in short: grown, written, read, deleted, written again, scanned, closed."""
    tier = open_tier(path, 100, files=files, metrics=metrics)
    try:
        head, tail = make_run(70, seed=1), make_run(30, seed=2)
        found(tier, head.keys)
        tier.write(head, blocks_of(head))
        found(tier, head.keys)
        tier.delete(head.keys[40:])
        tier.write(tail, blocks_of(tail))
        found(tier, head.keys + tail.keys)
        for run in tier.scan():
            assert set(run.keys) <= set(head.keys + tail.keys)
    finally:
        tier.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EINVAL])
def test_a_failing_system_call_costs_blocks_and_nothing_else(tmp_path: Path, code: int) -> None:
    """Fail the n-th call, n = 1 … until none fires; a folder that life left behind is then opened, checked and used."""
    keys = make_run(70, seed=1).keys + make_run(30, seed=2).keys
    open_tier(tmp_path / "new", 60).close()  # life grows it
    for at in range(1, 1000):
        path = tmp_path / str(at)
        shutil.copytree(tmp_path / "new", path)
        files, metrics = FaultyFiles(at, code), Metrics()
        refused = False
        try:
            life(path, files, metrics)
        except TierError:
            refused = True  # the fault hit the start
        again = open_tier(path, 100)
        here = found(again, keys)
        usable_run = make_run(100, seed=9)
        again.delete(keys)
        assert all(again.write(usable_run, blocks_of(usable_run)))
        assert found(again, usable_run.keys) == 100
        again.close()
        assert folder_bytes(path / "disk") <= capacity(100)
        shutil.rmtree(path)
        if files.calls < at:
            assert here == 70 and not refused
            break
        dropped = (
            metrics.saves_dropped.value("disk") + metrics.misses.value("disk") - metrics.misses.value("disk", "absent")
        )
        assert here == 70 or refused or dropped > 0, f"call {at}: blocks are missing and nobody counted"
    else:
        pytest.fail("the life of a tier takes too many calls")


class ShortTransfers(Files):
    """Every transfer moves a page at most."""

    def preadv(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        return super().preadv(fd, [views[0][: min(4096, views[0].nbytes)]], offset)

    def pwritev(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        return super().pwritev(fd, [views[0][: min(4096, views[0].nbytes)]], offset)


@pytest.mark.parametrize("direct", [True, False])
def test_short_transfers_are_finished(tmp_path: Path, direct: bool) -> None:
    tier = open_tier(tmp_path, files=ShortTransfers(), direct=direct)
    usable(tier)
    tier.close()


# --- no room ----------------------------------------------------------------------------------------------------------


class FullDisk(Files):
    """Has no room for new shard files."""

    full = False

    def allocate(self, fd: int, size: int) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().allocate(fd, size)


def test_full_disk_drops_saves_and_tries_again_later(tmp_path: Path, metrics: Metrics) -> None:
    files, seconds = FullDisk(), [0.0]
    tier = open_tier(tmp_path, files=files, metrics=metrics, clock=lambda: seconds[0])
    first, small = make_run(50, seed=2), make_run(10, seed=3)
    assert all(tier.write(first, blocks_of(first)))
    files.full = True
    assert tier.write(RUN, blocks_of(RUN)) == [True] * 14 + [False] * 136  # the rest of the shard there is
    assert metrics.saves_dropped.value("disk", "full") == 136
    assert found(tier, first.keys) == 50
    tier.delete(first.keys[:10])
    assert all(tier.write(small, blocks_of(small)))  # what room there is can still be used
    files.full = False
    seconds[0] += FULL_PAUSE_S
    usable(tier)
    tier.close()


LIMITED = """
import resource, sys
from pathlib import Path
from tests.test_disk import open_tier
from tests.test_disk_damage import RUN, found
from tierkv.metrics import Metrics
from tierkv.testing import blocks_of
metrics = Metrics()
tier = open_tier(Path(sys.argv[1]), metrics=metrics)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
saved = tier.write(RUN, blocks_of(RUN))
assert found(tier) == sum(saved)
tier.close()
print(sum(saved), int(metrics.saves_dropped.value("disk", "full")))
"""


@pytest.mark.parametrize(("limit", "expected"), [(100_000, "0 150"), (64 << 20, "150 0")])
def test_file_size_limit_of_the_process_is_a_full_disk(tmp_path: Path, limit: int, expected: str) -> None:
    """A real refusal by the kernel, in a process of its own."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
    assert done.stdout.strip() == expected, done.stderr


def test_slot_numbers_of_a_run_are_consecutive(tier: DiskTier) -> None:
    slots = [slot_of(tier.path, key) for key in RUN.keys]
    assert slots == list(range(slots[0], slots[0] + 150))
