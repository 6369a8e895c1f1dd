"""The host tier: one slab of page-aligned memory, touched and, for a GPU, pinned piece by piece while it is in use already.

One mapping, cut into places of a fixed stride: no allocator, no fragmentation, and every block can be the source or target
of O_DIRECT and of DMA. Hundreds of gigabytes take minutes to become present and pinned, so nobody waits for that: a place works
from the start, it is only slower. What the machine cannot give is refused at start, not under load.

    mapped ──populate──▶ present ──register──▶ pinned ──unregister (close, exit)──▶ given back
    └───────────────── usable all the time ─────────────────────────┘

A copy of 2 MiB into a place that was never touched takes 0.37 ms instead of 0.22 ms, 0.85 ms where there are no huge pages
(bench/bench_host.py, busy 2-core Intel Xeon VM, 2026-11-22).
"""

import logging
import math
import mmap
import os
import resource
import weakref
from collections.abc import Callable, Generator, Sequence
from threading import Lock
from typing import Final

import numpy as np
import numpy.typing as npt

from tierkv.errors import ConfigError, TierError
from tierkv.keys import Key
from tierkv.tiers.base import Slab
from tierkv.tiers.host_memory import available_memory, populate
from tierkv.tiers.host_numa import memory_nodes, prefer_node

ALIGNMENT: Final = 4096
PIECE_BYTES: Final = 1 << 30
"""Registered in one go: few enough calls, and little lost when one is refused."""
STEP_BYTES: Final = 64 << 20
"""Touched in one go: what `close` may have to wait for, up to 0.25 s in a VM that gets its memory on demand."""
_REFUSED = (TierError, RuntimeError, OSError)  # RuntimeError: CuPy's CUDARuntimeError is one

Register = Callable[[int, int], object]
Unregister = Callable[[int], object]
log = logging.getLogger("tierkv")


class HostSlab(Slab):
    """`num_places` places of `block_bytes`, each aligned to 4,096 bytes.

    node: the NUMA node that memory should come from; None: where the kernel likes.
    buffer: a mapping to adopt instead of making one: not ours to bind or unmap, page-aligned and at least as large.
    piece_bytes: about what `pin` takes at a time.
    Raises ConfigError when this process cannot have that much memory, ValueError for a buffer that is too small.
    """

    piece_places: int
    """Places that are pinned together, from every multiple of this number on: one DMA must not go past it."""

    def __init__(
        self,
        *,
        num_places: int,
        block_bytes: int,
        node: int | None = None,
        buffer: mmap.mmap | memoryview | None = None,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self.num_places, self.block_bytes = num_places, block_bytes
        self.stride = -(-block_bytes // ALIGNMENT) * ALIGNMENT
        # Registrations must not share a memory page, which is 64 KiB on some machines: so many places end on one.
        whole = mmap.PAGESIZE // math.gcd(self.stride, mmap.PAGESIZE)
        self.piece_places = min(num_places, max(1, piece_bytes // self.stride // whole) * whole)
        size = num_places * self.stride
        memory = self._map(size) if buffer is None else buffer
        if len(memory) < size:
            raise ValueError(f"buffer: {len(memory)} bytes given, {num_places} places take {size}; map that much")
        self.rows: npt.NDArray[np.uint8] = np.frombuffer(memory, np.uint8, size).reshape(num_places, self.stride)
        self._address = self.rows.ctypes.data
        self._view = memoryview(memory)
        self._pins = _Pins(memory)
        self._at_end = weakref.finalize(self, self._pins.release)  # also when nobody closes: at exit at the latest
        if buffer is None and node is not None:
            prefer_node(self._address, size, node=node, nodes=memory_nodes())

    @staticmethod
    def _map(size: int) -> mmap.mmap:
        available, source = available_memory()
        if size > available:
            raise ConfigError(
                f"host.capacity: {_gib(size)} asked for, {_gib(available)} of memory are free ({source}); lower it"
            )
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            log.debug("no transparent huge pages for the host slab")
        return memory

    def touch(self) -> Generator[int, None, None]:
        """Make the slab present from its first place to its last; yields the bytes done so far, after each step.

        To be run once, on any thread, while the slab is in use; ends early when the slab is closed.
        """
        size, piece, populates = self.num_places * self.stride, self.piece_places * self.stride, True
        for start in range(0, size, piece):
            end = min(size, start + piece)
            for at in range(start, end, STEP_BYTES):
                if self._pins.released:
                    return
                step = min(STEP_BYTES, end - at)
                populates = populates and populate(self._address + at, step)
                yield at + step

    def pin(self, register: Register, unregister: Unregister) -> Generator[int, None, None]:
        """Touch the slab, and register each piece of `piece_places` once it is present; otherwise as `touch`.

        register: of an address and a size: whole places, page-aligned.  unregister: of an address; called once for each at
        `close`. Both may raise TierError, RuntimeError or OSError. After the first refusal what is left stays pageable, with one
        warning.
        """
        size, piece, refused = self.num_places * self.stride, self.piece_places * self.stride, False
        start = 0
        for done in self.touch():
            if not refused and done == min(size, start + piece):
                try:
                    self._pins.add(self._address + start, done - start, register, unregister)
                except _REFUSED as error:
                    refused = True
                    self._warn(done - start, error)
                start = done
            yield done

    def _warn(self, piece: int, error: Exception) -> None:
        limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if limit == resource.RLIM_INFINITY:
            remedy = "locked memory is not limited here (ulimit -l), so lower host.capacity to what the driver grants"
        else:
            remedy = (
                f"locked memory is limited to {limit >> 10} KiB: raise it (ulimit -l unlimited; of a container,"
                " --ulimit memlock=-1), or lower host.capacity"
            )
        log.warning(
            "%s of %s of host memory are pinned, transfers of the rest will be slower: %s more were refused (%s); %s",
            _gib(self.pinned_bytes),
            _gib(self.num_places * self.stride),
            _gib(piece),
            error,
            remedy,
        )

    @property
    def pinned_bytes(self) -> int:
        """Bytes that are registered now."""
        return self._pins.num_bytes

    @property
    def pinned(self) -> bool:
        """Is all of it registered?"""
        return self.pinned_bytes == self.num_places * self.stride

    def view(self, place: int) -> memoryview:
        """The bytes of a place."""
        at = place * self.stride
        return self._view[at : at + self.block_bytes]

    def sound(self, keys: Sequence[Key], places: Sequence[int]) -> list[bool]:
        """Tell which places hold the whole blocks of these keys; memory of this process alone is taken at its word."""
        return [True] * len(places)

    def close(self) -> None:
        """Unregister what was pinned, after the piece at hand, and give the memory back. No copy may be under way."""
        self._at_end()
        self.rows = np.empty((0, self.stride), np.uint8)
        self._view.release()
        # The mapping goes with its last view: an unmap under a reader would be a crash, a late unmap is only memory.


class _Pins:
    """What is registered of a mapping. Thread-safe; outlives the slab, so that a slab that nobody closed is unregistered too."""

    def __init__(self, memory: mmap.mmap | memoryview) -> None:
        self._memory: mmap.mmap | memoryview | None = memory  # not to be unmapped before it is unregistered
        self._lock = Lock()
        self._registered: list[tuple[int, Unregister]] = []
        self._process = os.getpid()
        self.num_bytes = 0
        self.released = False

    def add(self, address: int, size: int, register: Register, unregister: Unregister) -> None:
        """Register a piece, unless all is released already."""
        with self._lock:  # slow, and yet inside: `release` has to know how it ended
            if not self.released:
                register(address, size)
                self._registered.append((address, unregister))
                self.num_bytes += size

    def release(self) -> None:
        """Unregister every piece, each once. Idempotent."""
        self.released = True  # before the lock: the next piece is not begun
        if os.getpid() != self._process:
            return  # a forked child: neither the registrations nor, maybe, the lock are in order here
        with self._lock:
            while self._registered:
                address, unregister = self._registered.pop()
                try:
                    unregister(address)
                except _REFUSED as error:  # the driver is gone, and the registration with it
                    log.debug("unregistering host memory: %s", error)
            self.num_bytes, self._memory = 0, None


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
