"""The host tier: one slab of page-aligned memory, pinned through CuPy when a GPU is there.

One mapping, cut into places of a fixed stride: no allocator, no fragmentation, and every block can be the source or target
of O_DIRECT and of DMA. The pages are touched at start: a read into never-touched memory runs at a third of the speed
(notes of the disk tier), and a capacity that the machine cannot give must fail at start, not under load.
"""

import logging
import mmap
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tierkv.errors import ConfigError
from tierkv.tiers.base import Slab

ALIGNMENT = 4096
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23  # Linux 5.14; madvise(2)
_PIECE_BYTES = 64 << 20

log = logging.getLogger("tierkv")


class HostSlab(Slab):
    """`num_places` places of `block_bytes`, each aligned to 4,096 bytes.

    Raises ConfigError when the machine has less memory than that.
    """

    def __init__(self, *, num_places: int, block_bytes: int, pinned: bool = False) -> None:
        self.num_places, self.block_bytes = num_places, block_bytes
        self.stride = -(-block_bytes // ALIGNMENT) * ALIGNMENT
        size = num_places * self.stride
        available = _available_bytes()
        if size > available:
            raise ConfigError(
                f"host.capacity: {size / 2**30:.2f} GiB asked for, {available / 2**30:.2f} GiB of memory are free; lower it"
            )
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._touch(size)
        self.rows: npt.NDArray[np.uint8] = np.frombuffer(self._memory, np.uint8).reshape(num_places, self.stride)
        self._view = memoryview(self._memory)
        self.pinned = pinned and self._pin()

    def _touch(self, size: int) -> None:
        try:
            self._memory.madvise(_MADV_HUGEPAGE)
        except OSError:
            log.debug("no transparent huge pages for the host slab")
        for at in range(0, size, _PIECE_BYTES):
            piece = min(_PIECE_BYTES, size - at)
            try:
                self._memory.madvise(_MADV_POPULATE_WRITE, at, piece)
            except OSError:  # an older kernel: one byte per page does the same
                np.frombuffer(self._memory, np.uint8, piece, at)[::ALIGNMENT] = 0

    def _pin(self) -> bool:
        """Register the slab with CUDA; False, with one warning, where that is refused: transfers are slower then."""
        try:
            import cupy
        except ImportError:
            log.warning(
                "host memory is not pinned, transfers will be slower: CuPy is missing (pip install 'tierkv[cuda13]')"
            )
            return False
        try:
            cupy.cuda.runtime.hostRegister(self.rows.ctypes.data, self.rows.nbytes, 0)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            log.warning("host memory is not pinned, transfers will be slower: %s", error)
            return False
        return True

    def view(self, place: int) -> memoryview:
        """The bytes of a place."""
        at = place * self.stride
        return self._view[at : at + self.block_bytes]

    def close(self) -> None:
        """Give the memory back."""
        if self.pinned:
            import cupy

            cupy.cuda.runtime.hostUnregister(self.rows.ctypes.data)
            self.pinned = False
        self.rows = np.empty((0, self.stride), np.uint8)
        self._view.release()
        # The mapping goes with its last view: an unmap under a reader would be a crash, a late unmap is only memory.


def _available_bytes() -> int:
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as info:
            for line in info:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        log.debug("/proc/meminfo is not readable; asking sysconf")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
