"""Memory at addresses that O_DIRECT takes: for callers whose buffers are not."""

import ctypes
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from tierkv.zarr_shards import ALIGNMENT


def aligned(view: memoryview) -> bool:
    """Does a buffer start where O_DIRECT wants it?"""
    if view.readonly:
        address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    else:
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))  # five times as fast
    return address % ALIGNMENT == 0


class Buffers:
    """Buffers of one size, kept for the next who asks: touching fresh memory costs more than reading into it. Thread-safe."""

    def __init__(self, size: int) -> None:
        self.size = -(-size // ALIGNMENT) * ALIGNMENT
        self._lock = threading.Lock()
        self._idle: list[memoryview] = []

    def take(self) -> memoryview:
        """Lend a buffer; its content is anything."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return memoryview(mmap.mmap(-1, self.size))

    def give(self, buffer: memoryview) -> None:
        """Take a buffer back."""
        with self._lock:
            self._idle.append(buffer)

    @contextmanager
    def lent(self) -> Iterator[memoryview]:
        """Lend a buffer for a while."""
        buffer = self.take()
        try:
            yield buffer
        finally:
            self.give(buffer)
