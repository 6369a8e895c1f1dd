"""The device tier on a CUDA device: the same promises, kept by the real streams and events."""

import mmap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tierkv.errors import ConfigError, TierError
from tierkv.layout import Layout
from tierkv.tiers.device import CudaPagePool, page_pool
from tierkv.tiers.device_cuda import Cuda, open_cuda

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
LAYOUTS = [
    Layout(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16", block_tokens=16),  # 2 MiB
    Layout(num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16", block_tokens=16),  # 360 KiB
]
PLACES, PIECE = 24, 5


@pytest.fixture(scope="module")
def cuda() -> Cuda:
    return open_cuda(0)


def keep_busy() -> None:
    """Queue a kernel that does nothing for half a second or so."""
    torch.cuda._sleep(1_000_000_000)  # type: ignore[no-untyped-call]  # clock cycles; torch's own tests use it


class PinnedSlab:
    """Places of host memory, registered five at a time."""

    def __init__(self, cuda: Cuda, block_bytes: int) -> None:
        self.stride, self.piece_places, self.pinned = block_bytes, PIECE, True
        self.memory = mmap.mmap(-1, PLACES * block_bytes)
        self.rows: Any = np.frombuffer(self.memory, np.uint8).reshape(PLACES, block_bytes)
        self.pieces = [self.rows[first : first + PIECE] for first in range(0, PLACES, PIECE)]
        for piece in self.pieces:
            cuda.host_register(piece.ctypes.data, piece.nbytes)


@pytest.fixture
def slabs(cuda: Cuda) -> Iterator[Any]:
    made: list[PinnedSlab] = []

    def make(block_bytes: int) -> PinnedSlab:
        made.append(PinnedSlab(cuda, block_bytes))
        return made[-1]

    yield make
    for slab in made:
        for piece in slab.pieces:
            cuda.host_unregister(piece.ctypes.data)


def random_pool(cuda: Cuda, layout: Layout, *, num_pages: int = PLACES) -> CudaPagePool:
    pool = page_pool(layout=layout, num_pages=num_pages, device=DEVICE, cuda=cuda)
    assert isinstance(pool, CudaPagePool)
    bits(pool).random_()
    return pool


def bits(pool: CudaPagePool) -> torch.Tensor:
    return pool.pool.view(torch.uint8).view(pool.num_places, pool.block_bytes)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["2MiB", "360KiB"])
@pytest.mark.parametrize("batches", [False, True])
def test_pages_come_back_as_they_were(cuda: Cuda, slabs: Any, layout: Layout, batches: bool) -> None:
    if batches and not cuda.batches:
        pytest.skip("this driver, or its bindings, copies nothing in batches")
    pool, slab = random_pool(cuda, layout), slabs(layout.block_bytes)
    pool.batches = batches
    before = bits(pool).cpu().numpy()
    pages, places = [3, 4, 5, 6, 7, 8, 20, 18, 0], [2, 3, 4, 5, 6, 7, 0, 1, 23]
    pool.copy_out(pages, slab, places, after=pool.mark())
    assert (slab.rows[places] == before[pages]).all()
    half = layout.block_bytes // 2
    for span in ((0, half), (half, layout.block_bytes)):
        pool.copy_in(slab, places, pages[::-1], after=pool.mark(), span=span)
    assert (bits(pool).cpu().numpy()[pages[::-1]] == before[pages]).all()
    pool.copy_within([1, 2], [10, 11], after=pool.mark())
    assert (bits(pool).cpu().numpy()[[10, 11]] == before[[1, 2]]).all()


def test_a_copy_out_waits_for_the_kernel_that_writes_its_page(cuda: Cuda, slabs: Any) -> None:
    pool, slab = random_pool(cuda, LAYOUTS[0]), slabs(LAYOUTS[0].block_bytes)
    keep_busy()
    bits(pool)[3].fill_(77)
    pool.copy_out([3], slab, [0], after=pool.mark())
    assert (slab.rows[0] == 77).all()


def test_a_copy_in_waits_for_the_kernel_that_still_reads_its_page(cuda: Cuda, slabs: Any) -> None:
    pool, slab = random_pool(cuda, LAYOUTS[0]), slabs(LAYOUTS[0].block_bytes)
    before = bits(pool)[3].clone()
    slab.rows[0] = 78
    keep_busy()
    read = bits(pool)[3].clone()
    pool.copy_in(slab, [0], [3], after=pool.mark())
    assert torch.equal(read, before)
    assert bool((bits(pool)[3] == 78).all())


def test_no_copy_waits_for_what_was_queued_after_its_mark(cuda: Cuda, slabs: Any) -> None:
    pool, slab = random_pool(cuda, LAYOUTS[0]), slabs(LAYOUTS[0].block_bytes)
    torch.cuda.synchronize()
    after = pool.mark()
    keep_busy()
    pool.copy_out([1, 2, 9], slab, [1, 2, 9], after=after)
    pool.copy_in(slab, [1], [4], after=after)
    assert not torch.cuda.current_stream(DEVICE).query(), "the host has waited for the compute stream"
    torch.cuda.synchronize()


def test_a_waiting_thread_sleeps(cuda: Cuda, slabs: Any) -> None:
    pool, slab = random_pool(cuda, LAYOUTS[0]), slabs(LAYOUTS[0].block_bytes)
    pool.copy_out([1], slab, [1], after=pool.mark())
    keep_busy()
    wall, busy = time.perf_counter(), time.thread_time()
    pool.copy_out([1], slab, [1], after=pool.mark())
    assert time.thread_time() - busy < 0.2 * (time.perf_counter() - wall)


def test_threads_copy_in_both_directions_at_once(cuda: Cuda, slabs: Any) -> None:
    layout = LAYOUTS[1]
    pool, slab = random_pool(cuda, layout), slabs(layout.block_bytes)
    before = bits(pool).cpu().numpy()
    slab.rows[12:] = before[:12][::-1]
    after = pool.mark()

    def out(page: int) -> None:
        for _ in range(20):
            pool.copy_out([page, page + 1], slab, [page, page + 1], after=after)

    def back(page: int) -> None:
        for _ in range(20):
            pool.copy_in(slab, [12 + page, 13 + page], [12 + page, 13 + page], after=after)

    with ThreadPoolExecutor(8) as threads:
        done = [threads.submit(job, page) for page in range(0, 12, 2) for job in (out, back)]
        for future in done:
            future.result()
    assert (slab.rows[:12] == before[:12]).all()
    assert (bits(pool).cpu().numpy()[12:] == before[:12][::-1]).all()


def test_the_way_of_copying_is_measured_and_kept(cuda: Cuda, tmp_path: Path) -> None:
    file = tmp_path / "device.json"
    pools = [page_pool(layout=LAYOUTS[1], num_pages=32, device=DEVICE, cuda=cuda, calibration=file) for _ in range(2)]
    assert file.exists() == cuda.batches
    assert len({pool.batches for pool in pools if isinstance(pool, CudaPagePool)}) == 1


def test_a_pool_larger_than_the_card_is_refused(cuda: Cuda) -> None:
    num_pages = 2 * torch.cuda.get_device_properties(DEVICE).total_memory // LAYOUTS[0].block_bytes
    with pytest.raises(ConfigError, match="are free on cuda:0: set device"):
        page_pool(layout=LAYOUTS[0], num_pages=num_pages, device=DEVICE, cuda=cuda)


def test_what_cuda_refuses_is_a_tier_error(cuda: Cuda) -> None:
    with pytest.raises(TierError, match="cuda:0"):
        cuda.host_unregister(4096)


def test_the_device_says_what_it_is(cuda: Cuda) -> None:
    assert "CUDA" in cuda.name
    assert 0 < cuda.free_memory() <= torch.cuda.get_device_properties(DEVICE).total_memory
    assert cuda.numa_node() is None or cuda.numa_node() in range(64)
