"""Host memory and pools for tests of the device tier, without a GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tierkv.layout import Layout
from tierkv.store import Store
from tierkv.testing import FakeClock
from tierkv.testing.cuda import FakeCuda
from tierkv.tiers.device import CudaPagePool

SMALL = Layout(num_layers=4, num_kv_heads=1, head_dim=2, dtype="float32", block_tokens=2)


class Slab:
    """Places of host memory, registered piece by piece; what lies between blocks is filled and must stay."""

    def __init__(self, cuda: FakeCuda, *, num_places: int, block_bytes: int, stride: int, piece_places: int) -> None:
        self.stride, self.piece_places, self.pinned = stride, piece_places, True
        self.rows: Any = np.full((num_places, stride), 0xEE, np.uint8)
        for first in range(0, num_places, piece_places):
            piece = self.rows[first : first + piece_places]
            cuda.host_register(piece.ctypes.data, piece.nbytes)


def cuda_pool(
    cuda: FakeCuda,
    *,
    layout: Layout = SMALL,
    num_pages: int = 8,
    clock: Callable[[], float] | None = None,
    wait: Callable[[float], None] = lambda seconds: None,
    calibration: Path | None = None,
) -> CudaPagePool:
    """A pool whose device memory is the CPU's, with its allocation known to the fake device."""
    pool = CudaPagePool(
        layout=layout,
        num_pages=num_pages,
        device=torch.device("cpu"),
        cuda=cuda,
        calibration=calibration,
        clock=clock or FakeClock(),
        wait=wait,
    )
    cuda.allocate(pool.pool.data_ptr(), pool.pool.nbytes)
    return pool


def put_under(store: Store, pool: CudaPagePool) -> None:
    """Give a store another device before its first request; all its parts share one `Places`."""
    object.__setattr__(store.places, "device", pool)


def bytes_of(pool: CudaPagePool) -> Any:
    """[num_pages, block_bytes] uint8: the pages as they are this moment, whatever is queued."""
    return pool.pool.view(torch.uint8).view(pool.num_places, pool.block_bytes).numpy()


def content(tag: int, size: int) -> Any:
    """Bytes that only this tag has, different at every offset."""
    return np.random.default_rng(tag).integers(0, 256, size, np.uint8)
