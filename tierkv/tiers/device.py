"""The device tier: the pages that attention reads, one tensor `[num_pages, *block]`, and the copies to and from the host.

The only file that knows a device. A page is one contiguous block of all layers, so a page moves as one copy. On CUDA
the copies run on two streams of their own, in and out; on the CPU they are plain memory copies on the mover's thread. Both
ways have the same two rules: a copy waits for the device's work that was queued when its `mark` was taken (its source is
written by then, its target not in use any more), and it returns when the bytes have arrived.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch

from tierkv.errors import ConfigError, TierError
from tierkv.layout import Layout
from tierkv.tiers.base import Slab, Staging

DTYPES: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
}


class PagePool(Slab):
    """`num_pages` pages on the CPU. `pool` is what an engine attends to."""

    def __init__(self, *, layout: Layout, num_pages: int, device: torch.device) -> None:
        self.layout, self.device = layout, device
        self.num_places, self.block_bytes = num_pages, layout.block_bytes
        try:
            self.pool = torch.zeros((num_pages, *layout.shape), dtype=DTYPES[layout.dtype], device=device)
        except RuntimeError as error:
            size = num_pages * layout.block_bytes / 2**30
            raise ConfigError(f"device.capacity: {size:.2f} GiB on {device} refused ({error}); lower it") from error
        self._rows = self._byte_rows()

    def _byte_rows(self) -> Any:
        """[num_pages, block_bytes] uint8 over the pool; a numpy array, whose copies run without the interpreter lock."""
        return self.pool.view(torch.uint8).view(self.num_places, self.block_bytes).numpy()

    def view(self, place: int) -> memoryview:
        """The bytes of a page."""
        return memoryview(self._rows[place])

    def mark(self) -> object:
        """A point in the work queued on the device so far; on the CPU all of it is done."""
        return None

    def copy_out(self, pages: Sequence[int], host: Staging, places: Sequence[int], *, after: object) -> None:
        """Copy pages to places of the host, once what was queued at `after` (a `mark`) is done."""
        for page, place in zip(pages, places, strict=True):
            np.copyto(host.rows[place, : self.block_bytes], self._rows[page])

    def copy_in(self, host: Staging, places: Sequence[int], pages: Sequence[int], *, after: object) -> None:
        """Copy places of the host to pages."""
        for place, page in zip(places, pages, strict=True):
            np.copyto(self._rows[page], host.rows[place, : self.block_bytes])

    def copy_within(self, sources: Sequence[int], pages: Sequence[int], *, after: object) -> None:
        """Copy pages to other pages."""
        for source, page in zip(sources, pages, strict=True):
            np.copyto(self._rows[page], self._rows[source])

    def close(self) -> None:
        """Let go of the pool; the engine's own reference keeps it alive while it needs it."""
        self._rows = np.empty((0, self.block_bytes), np.uint8)


class CudaPagePool(PagePool):
    """Pages in HBM. Copies are queued on CuPy streams; the calling mover thread waits for them, the compute stream never does."""

    def __init__(self, *, layout: Layout, num_pages: int, device: torch.device) -> None:
        try:
            import cupy
        except ImportError as error:
            raise TierError(
                "device.kind = cuda needs CuPy: pip install 'tierkv[cuda12]' or 'tierkv[cuda13]'"
            ) from error
        self._cupy = cupy
        super().__init__(layout=layout, num_pages=num_pages, device=device)
        with cupy.cuda.Device(self._ordinal):
            self._in, self._out = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)

    @property
    def _ordinal(self) -> int:
        return self.device.index or 0

    def _byte_rows(self) -> Any:
        return None

    def view(self, place: int) -> memoryview:
        """Not possible: device memory has no view."""
        raise TierError("a page in HBM has no view; copy it out")

    def mark(self) -> object:
        """An event on torch's current stream."""
        event = self._cupy.cuda.Event(block=False, disable_timing=True)
        event.record(self._cupy.cuda.ExternalStream(torch.cuda.current_stream(self.device).cuda_stream))
        return event

    def copy_out(self, pages: Sequence[int], host: Staging, places: Sequence[int], *, after: object) -> None:
        """Copy pages to places of the host."""
        self._out.wait_event(after)
        self._copy(self._out, pages, host, places, out=True)

    def copy_in(self, host: Staging, places: Sequence[int], pages: Sequence[int], *, after: object) -> None:
        """Copy places of the host to pages."""
        self._in.wait_event(after)
        self._copy(self._in, pages, host, places, out=False)

    def _copy(self, stream: Any, pages: Sequence[int], host: Staging, places: Sequence[int], *, out: bool) -> None:
        runtime = self._cupy.cuda.runtime
        pool, slab = self.pool.data_ptr(), host.rows.ctypes.data
        with self._cupy.cuda.Device(self._ordinal):
            for page, place, length in _runs(pages, places, adjacent=host.stride == self.block_bytes):
                on_device, on_host, size = (
                    pool + page * self.block_bytes,
                    slab + place * host.stride,
                    length * self.block_bytes,
                )
                if out:
                    runtime.memcpyAsync(on_host, on_device, size, runtime.memcpyDeviceToHost, stream.ptr)
                else:
                    runtime.memcpyAsync(on_device, on_host, size, runtime.memcpyHostToDevice, stream.ptr)
            stream.synchronize()

    def copy_within(self, sources: Sequence[int], pages: Sequence[int], *, after: object) -> None:
        """Copy pages to other pages, on the stream of loads."""
        runtime, pool = self._cupy.cuda.runtime, self.pool.data_ptr()
        self._in.wait_event(after)
        with self._cupy.cuda.Device(self._ordinal):
            for source, page in zip(sources, pages, strict=True):
                target, origin = pool + page * self.block_bytes, pool + source * self.block_bytes
                runtime.memcpyAsync(target, origin, self.block_bytes, runtime.memcpyDeviceToDevice, self._in.ptr)
            self._in.synchronize()


def _runs(pages: Sequence[int], places: Sequence[int], *, adjacent: bool) -> Iterator[tuple[int, int, int]]:
    """(page, place, length) of stretches that are consecutive on both sides, so that each is one copy."""
    start = 0
    for at in range(1, len(pages) + 1):
        if at < len(pages) and adjacent and pages[at] == pages[at - 1] + 1 and places[at] == places[at - 1] + 1:
            continue
        yield pages[start], places[start], at - start
        start = at


def page_pool(*, layout: Layout, num_pages: int, device: torch.device) -> PagePool:
    """The pool for a torch device."""
    kind = CudaPagePool if device.type == "cuda" else PagePool
    return kind(layout=layout, num_pages=num_pages, device=device)
