"""The device tier: the pages that attention reads, one tensor `[num_pages, *block]`, and the copies to and from the host.

The only tier that knows a device. A page is one contiguous block of all layers, so a page moves as one copy, and a range of
its layers (a `span` of its bytes) as one copy too. On the CPU these are plain memory copies. On CUDA:

    engine's thread      mark ───────────────────────────┐ an event on torch's stream
    a mover thread            wait for the mark ─ copies ─ event ─ sleep until the event      on a stream of its own

Both directions have the same two rules. A copy waits, on the device, for the work that was queued when its `mark` was taken:
its source is written by then, its target not in use any more. And a call returns when its own event has passed, so whoever
called may announce the bytes and give page and place to others. The compute stream waits for nobody, and nobody's thread for it.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any, Final

import numpy as np
import torch

from tierkv.errors import ConfigError, TierError
from tierkv.layout import Layout
from tierkv.tiers.base import Slab, Staging
from tierkv.tiers.device_calibration import choose_batches
from tierkv.tiers.device_cuda import Copy, Cuda, Event, Priority, open_cuda

DTYPES: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
}
PACED_BYTES: Final = 8 << 20
"""Copied between two pauses: several times what a copy costs to begin, and little for a load to wait behind."""
MAX_PAUSE_S: Final = 10.0
"""Between two pieces at most, however small the share: `close` waits for the pause."""

Span = tuple[int, int]


class PagePool(Slab):
    """`num_pages` pages on the CPU. `pool` is what an engine attends to."""

    def __init__(self, *, layout: Layout, num_pages: int, device: torch.device) -> None:
        self.layout, self.device = layout, device
        self.num_places, self.block_bytes = num_pages, layout.block_bytes
        try:
            self.pool = torch.zeros((num_pages, *layout.shape), dtype=DTYPES[layout.dtype], device=device)
        except RuntimeError as error:
            raise ConfigError(self._refused(error)) from error
        self._rows = self._byte_rows()

    def _refused(self, error: RuntimeError) -> str:
        size = self.num_places * self.block_bytes / 2**30
        return f"device.capacity: {size:.2f} GiB on {self.device} refused ({error}); lower it"

    def _byte_rows(self) -> Any:
        """[num_pages, block_bytes] uint8 over the pool; a numpy array, whose copies run without the interpreter lock."""
        return self.pool.view(torch.uint8).view(self.num_places, self.block_bytes).numpy()

    def view(self, place: int) -> memoryview:
        """The bytes of a page."""
        return memoryview(self._rows[place])

    def mark(self) -> object:
        """A point in the work queued on the device so far; on the CPU all of it is done."""
        return None

    def copy_out(
        self,
        pages: Sequence[int],
        host: Staging,
        places: Sequence[int],
        *,
        after: object,
        span: Span | None = None,
        share: float = 1.0,
    ) -> None:
        """Copy pages to places of the host, once what was queued at `after` (a `mark`) is done. Returns when they are there.

        span: bytes [lo, hi) of every block; all of it when None.
        share: part of the time, above 0, that these copies may keep the link busy; the rest of it this thread sleeps.
        Raises TierError when a copy fails; none of the call's copies is under way then.
        """
        lo, hi = span or (0, self.block_bytes)
        for page, place in zip(pages, places, strict=True):
            np.copyto(host.rows[place, lo:hi], self._rows[page, lo:hi])

    def copy_in(
        self, host: Staging, places: Sequence[int], pages: Sequence[int], *, after: object, span: Span | None = None
    ) -> None:
        """Copy places of the host to pages: `copy_out` the other way."""
        lo, hi = span or (0, self.block_bytes)
        for place, page in zip(places, pages, strict=True):
            np.copyto(self._rows[page, lo:hi], host.rows[place, lo:hi])

    def copy_within(self, sources: Sequence[int], pages: Sequence[int], *, after: object) -> None:
        """Copy pages to other pages; no page is both."""
        for source, page in zip(sources, pages, strict=True):
            np.copyto(self._rows[page], self._rows[source])

    def close(self) -> None:
        """Let go of the pages; an engine's own reference keeps them alive while it needs them.

        A closed store may be garbage that waits for the collector of cycles, which most of a GPU must not wait for with it.
        """
        self._rows = np.empty((0, self.block_bytes), np.uint8)
        self.pool = self.pool.new_empty((0, *self.layout.shape))


class CudaPagePool(PagePool):
    """Pages in HBM. Copies run on streams of their own; the calling mover thread sleeps until they are done.

    A call has its stream to itself: one that waits for a mark far behind holds up no other, and both directions run together.
    Streams are kept for the next call, so there are as many as threads have called at once; those of loads go before others.

    lead: copies that go one by one before a batch, for the device to work on while the others are prepared.
    calibration: the file where the way of copying is remembered; measured at every start when None.
    clock, wait: of the pauses that `share` asks for, and of the measurement.
    """

    lead = 4

    def __init__(
        self,
        *,
        layout: Layout,
        num_pages: int,
        device: torch.device,
        cuda: Cuda,
        calibration: Path | None = None,
        clock: Callable[[], float] = time.perf_counter,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self.cuda = cuda
        super().__init__(layout=layout, num_pages=num_pages, device=device)
        self._streams: dict[Priority, SimpleQueue[Any]] = {priority: SimpleQueue() for priority in Priority}
        self._pace = _Pace(clock, wait)
        self.batches = choose_batches(
            cuda,
            pool=self.pool.data_ptr(),
            num_pages=num_pages,
            block_bytes=self.block_bytes,
            clock=clock,
            path=calibration,
        )

    def _refused(self, error: RuntimeError) -> str:
        size, free = self.num_places * self.block_bytes / 2**30, self.cuda.free_memory() / 2**30
        return (
            f"device.capacity: {size:.2f} GiB for {self.num_places} pages asked for, {free:.2f} GiB are free on "
            f"{self.device}: set device.capacity or device.gpu_memory_utilization lower, or stop what else uses the card "
            f"({str(error).splitlines()[0]})"
        )

    def _byte_rows(self) -> Any:
        return None

    def view(self, place: int) -> memoryview:
        """Not possible: device memory has no view."""
        raise TierError("a page in HBM has no view; copy it out")

    def mark(self) -> Event:
        """An event on torch's current stream."""
        return self.cuda.mark()

    def copy_out(
        self,
        pages: Sequence[int],
        host: Staging,
        places: Sequence[int],
        *,
        after: object,
        span: Span | None = None,
        share: float = 1.0,
    ) -> None:
        """Copy pages to places of the host."""
        if share <= 0:
            raise ValueError(f"share={share}: must be above 0, or the copy would never end")
        if not pages:
            return
        copies, batch = self._between(pages, host, places, span, out=True), self.batches and host.pinned
        if share >= 1:
            self._move(copies, after, batch=batch, priority=Priority.LOW)
            return
        _event(after).wait()  # asleep: what the step takes is not the link's time
        for some in _pieces(copies, PACED_BYTES):
            self._pace.run(partial(self._move, some, after, batch=batch, priority=Priority.LOW), share=share)

    def copy_in(
        self, host: Staging, places: Sequence[int], pages: Sequence[int], *, after: object, span: Span | None = None
    ) -> None:
        """Copy places of the host to pages."""
        if not pages:
            return
        # Memory that is not pinned yet is copied the old way, which CUDA stages by itself: a batch gains nothing there.
        batch = self.batches and host.pinned
        self._move(self._between(pages, host, places, span, out=False), after, batch=batch, priority=Priority.HIGH)

    def copy_within(self, sources: Sequence[int], pages: Sequence[int], *, after: object) -> None:
        """Copy pages to other pages."""
        if not pages:
            return
        pool, size = self.pool.data_ptr(), self.block_bytes
        runs = _runs(sources, pages, piece=self.num_places)
        copies = [Copy(pool + page * size, pool + source * size, n * size) for source, page, n in runs]
        self._move(copies, after, batch=False, priority=Priority.HIGH)  # these few need no batch; a load waits for them

    def close(self) -> None:
        """As `PagePool.close`, and let go of the streams; no copy may be under way."""
        super().close()
        self._streams = {priority: SimpleQueue() for priority in Priority}

    def _between(
        self, pages: Sequence[int], host: Staging, places: Sequence[int], span: Span | None, *, out: bool
    ) -> Iterator[Copy]:
        """The copies for these pages and places: one for each stretch that is contiguous on both sides."""
        block, stride = self.block_bytes, host.stride
        lo, hi = span or (0, block)
        width, whole = hi - lo, hi - lo == block == stride
        pool, slab = self.pool.data_ptr() + lo, host.rows.ctypes.data + lo
        for page, place, count in _runs(pages, places, piece=host.piece_places if whole else 1):
            on_device, on_host = pool + page * block, slab + place * stride
            yield Copy(on_host, on_device, count * width) if out else Copy(on_device, on_host, count * width)

    def _move(self, copies: Iterable[Copy], after: object, *, batch: bool, priority: Priority) -> None:
        """Queue the copies behind a mark, and wait until they are done."""
        with self._stream(priority) as stream:
            try:
                self.cuda.wait(stream, _event(after))
                if batch:
                    rest = iter(copies)
                    self.cuda.copy(stream, islice(rest, self.lead))
                    copies = list(rest)
                    if len(copies) > 1:
                        self.cuda.copy_batch(stream, copies)
                        return
                self.cuda.copy(stream, copies)
            finally:
                # Also after a copy was refused: those before it are under way, to memory that others are given next.
                self.cuda.record(stream).wait()

    @contextmanager
    def _stream(self, priority: Priority) -> Iterator[Any]:
        """A stream that nobody else uses meanwhile."""
        free = self._streams[priority]
        try:
            stream = free.get_nowait()
        except Empty:
            stream = self.cuda.new_stream(priority)
        try:
            yield stream
        finally:
            free.put(stream)


class _Pace:
    """Copies that may use a share of the time: each is followed by the pause that makes it so, and no two run together."""

    def __init__(self, clock: Callable[[], float], wait: Callable[[float], None]) -> None:
        self._clock, self._wait = clock, wait
        self._lock, self._rest_until = Lock(), float("-inf")

    def run(self, copy: Callable[[], None], *, share: float) -> None:
        """Run a copy when the pause after the last one is over."""
        with self._lock:
            pause = self._rest_until - self._clock()
            if pause > 0:
                self._wait(pause)
            start = self._clock()
            try:
                copy()
            finally:
                end = self._clock()
                self._rest_until = end + min((end - start) * (1 / share - 1), MAX_PAUSE_S)


def _event(after: object) -> Event:
    if after is None or not hasattr(after, "wait"):
        raise TypeError(f"after={after!r}: a copy waits for what `mark` returned")
    return after


def _runs(pages: Sequence[int], places: Sequence[int], *, piece: int) -> Iterator[tuple[int, int, int]]:
    """(page, place, length) of stretches that are consecutive on both sides and cross no multiple of `piece` places."""
    if len(pages) != len(places):
        raise ValueError(f"{len(pages)} pages for {len(places)} places: one for each")
    if not pages:
        return
    first_page, first_place, length = pages[0], places[0], 0
    for page, place in zip(pages, places, strict=True):
        if page == first_page + length and place == first_place + length and (place % piece or not length):
            length += 1
        else:
            yield first_page, first_place, length
            first_page, first_place, length = page, place, 1
    yield first_page, first_place, length


def _pieces(copies: Iterable[Copy], size: int) -> Iterator[Sequence[Copy]]:
    """The copies in order, some at a time, `size` bytes each but for the last; a copy that is larger is cut."""
    piece, room = list[Copy](), size
    for target, source, left in copies:
        done = 0
        while done < left:
            part = min(room, left - done)
            piece.append(Copy(target + done, source + done, part))
            done, room = done + part, room - part
            if not room:
                yield piece
                piece, room = [], size
    if piece:
        yield piece


def page_pool(
    *,
    layout: Layout,
    num_pages: int,
    device: torch.device,
    cuda: Cuda | None = None,
    calibration: Path | None = None,
) -> PagePool:
    """The pool for a torch device. cuda: the device opened before; opened here when None. Raises ConfigError."""
    if device.type != "cuda":
        return PagePool(layout=layout, num_pages=num_pages, device=device)
    cuda = cuda or open_cuda(device.index or 0)
    return CudaPagePool(layout=layout, num_pages=num_pages, device=device, cuda=cuda, calibration=calibration)
