"""The disk tier against bare pwritev and preadv on one fallocated file, with the same flags, buffers and syncs.

Both sides move one run of 64 blocks between the same page-aligned memory and a file; the limit moves 8 MiB a call
and ends a write with fdatasync. What the tier adds: the dict, the checksums, the rows of the manifest.
"""

import os
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.testing import make_run
from tierkv.tiers.disk import DiskTier
from tierkv.tiers.disk_array import folder_bytes_for
from tierkv.tiers.disk_manifest import NAME
from tierkv.tiers.host import HostSlab

BLOCKS = 64
CALL_BYTES = 8 << 20  # bare O_DIRECT is as fast as it gets from 1 MiB a call on
LAYOUTS = {
    "360 KiB": Layout(num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16"),
    "2 MiB": Layout(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16"),
}


class OneFile:
    """The limit: one file, as large as the run."""

    def __init__(self, path: Path, views: list[memoryview], *, direct: bool) -> None:
        size = views[0].nbytes
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_DIRECT if direct else 0))
        os.posix_fallocate(self.fd, 0, size * len(views))
        most = max(1, CALL_BYTES // size)
        self.pieces = [(at * size, views[at : at + most]) for at in range(0, len(views), most)]

    def write(self) -> None:
        for offset, views in self.pieces:
            assert os.pwritev(self.fd, views, offset) == views[0].nbytes * len(views)
        os.fdatasync(self.fd)

    def read(self) -> None:
        for offset, views in self.pieces:
            assert os.preadv(self.fd, views, offset) == views[0].nbytes * len(views)


class Rig:
    """A tier and one file beside each other, and the memory both use."""

    def __init__(self, path: Path, size: str, **options: Any) -> None:  # as DiskTier takes them
        layout = LAYOUTS[size]
        self.slab = HostSlab(num_places=BLOCKS, block_bytes=layout.block_bytes)
        self.views = [self.slab.view(place) for place in range(BLOCKS)]
        random = np.random.default_rng(0)
        for view in self.views:
            view[:] = random.bytes(layout.block_bytes)
        self.run = make_run(BLOCKS, seed=1, layout=layout)
        capacity = folder_bytes_for(2 * BLOCKS, layout)
        self.tier = DiskTier(path / "disk", layout=layout, capacity_bytes=capacity, metrics=Metrics(), **options)
        self.file = OneFile(path / "file", self.views, direct=options.get("direct", True))
        self.gigabytes = BLOCKS * layout.block_bytes / 1e9
        self.write()
        self.file.write()

    def write(self) -> None:
        assert all(self.tier.write(self.run, self.views))

    def read(self) -> None:
        assert all(self.tier.read(self.run.keys, self.views))

    def forget(self) -> None:
        self.tier.delete(self.run.keys)

    def drop_caches(self) -> None:
        for path in (self.tier.path.parent / "file", *(self.tier.path / "blocks").glob("c.*")):
            fd = os.open(path, os.O_RDONLY)
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    def close(self) -> None:
        self.tier.close()
        os.close(self.file.fd)
        self.views.clear()


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


HOW = ["", ", checksums beside the transfer", ", unverified"]


def options(how: str, executor: ThreadPoolExecutor) -> dict[str, Any]:
    return {"": {}, ", unverified": {"verify": False}}.get(how, {"executor": executor})


@pytest.mark.parametrize("how", HOW[:2], ids=["inline", "beside"])
@pytest.mark.parametrize("size", LAYOUTS)
def test_write(versus: Any, tmp_path: Path, size: str, how: str, executor: ThreadPoolExecutor) -> None:
    rig = Rig(tmp_path, size, **options(how, executor))
    versus(
        f"disk write, 64 x {size}, O_DIRECT{how}",
        rig.write,
        "pwritev of one file",
        rig.file.write,
        unit="GB/s",
        amount=rig.gigabytes,
        rounds=25,
        before=rig.forget,
    )
    rig.close()


@pytest.mark.parametrize("how", HOW, ids=["inline", "beside", "unverified"])
@pytest.mark.parametrize("size", LAYOUTS)
def test_read_past_the_page_cache(
    versus: Any, tmp_path: Path, size: str, how: str, executor: ThreadPoolExecutor
) -> None:
    rig = Rig(tmp_path, size, **options(how, executor))
    versus(
        f"disk read, 64 x {size}, O_DIRECT{how}",
        rig.read,
        "preadv of one file",
        rig.file.read,
        unit="GB/s",
        amount=rig.gigabytes,
        rounds=25,
    )
    rig.close()


@pytest.mark.parametrize("how", HOW, ids=["inline", "beside", "unverified"])
@pytest.mark.parametrize("cache", ["cold", "warm"])
@pytest.mark.parametrize("size", LAYOUTS)
def test_read_through_the_page_cache(
    versus: Any, tmp_path: Path, size: str, cache: str, how: str, executor: ThreadPoolExecutor
) -> None:
    rig = Rig(tmp_path, size, direct=False, **options(how, executor))
    versus(
        f"disk read, 64 x {size}, {cache} page cache{how}",
        rig.read,
        "preadv of one file",
        rig.file.read,
        unit="GB/s",
        amount=rig.gigabytes,
        rounds=25,
        before=rig.drop_caches if cache == "cold" else None,
    )
    rig.close()


def test_open_many_blocks(versus: Any, tmp_path: Path) -> None:
    layout = Layout(num_layers=1, num_kv_heads=1, head_dim=64, dtype="bfloat16")
    count, step = 102_400, 4096
    capacity = folder_bytes_for(count, layout)

    def opened() -> DiskTier:
        return DiskTier(tmp_path / "disk", layout=layout, capacity_bytes=capacity, metrics=Metrics())

    tier = opened()
    block = memoryview(bytes(layout.block_bytes))
    for seed in range(count // step):
        assert all(tier.write(make_run(step, seed=seed, layout=layout), [block] * step))
    tier.close()

    def rows() -> None:
        connection = sqlite3.connect(tmp_path / "disk" / NAME)
        assert len(connection.execute("SELECT slot, key, checksum FROM blocks ORDER BY slot").fetchall()) == count
        connection.close()

    opening: list[DiskTier] = []
    versus(
        f"disk folder of {count:,} blocks opened",
        lambda: opening.append(opened()),
        "the rows read",
        rows,
        unit="ms",
        amount=1,
        rounds=7,
        before=lambda: opening and opening.pop().close(),
    )
    opening.pop().close()
