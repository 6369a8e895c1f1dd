"""The memory that a daemon and the clients on its machine share: one anonymous file per pool, handed over by descriptor.

    ┌ generations: u64 per place, padded to pages ┬ place 0 ┬ place 1 ┬ … (stride: whole pages)
    └ written by the daemon alone                 └ written by whoever reserved the place

A place's generation rises whenever the daemon gives the place to another block. Whoever copies out of a place looks at the
generation before and after, and at the block's checksum, seeded with its key: so a lease that was taken away, a stray writer and
torn bytes are all a miss. The file is sealed against shrinking: no client can take pages from under another.
"""

import fcntl
import mmap
import os
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

from tierkv.errors import TierError
from tierkv.tiers.host_memory import populate

PAGE: Final = 4096
STEP_BYTES: Final = 1 << 20
"""Copied before it is hashed, while it still is in a cache. Page-aligned memory comes at the same speed in pieces of any size,
other memory at half of it in pieces under 1 MiB (`rep movsb` on 4 KiB pages; 2-core AMD EPYC VM, 2026-11-30)."""

Bytes = npt.NDArray[np.uint8]


class Region:
    """A mapping of one pool's memory.

    generations: [num_places] uint64.  rows: [num_places, stride] uint8; a block is the first `block_bytes` of a row.
    """

    def __init__(self, fd: int, *, num_places: int, block_bytes: int, writable: bool) -> None:
        self.num_places, self.block_bytes = num_places, block_bytes
        self.stride = _round(block_bytes)
        self._ahead = _round(8 * num_places)
        size = self.size_of(num_places, block_bytes)
        try:
            if os.fstat(fd).st_size < size:
                raise TierError(f"shared memory of {os.fstat(fd).st_size} bytes: {num_places} places take {size}")
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            self.mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=protection)
        except OSError as error:
            raise TierError(f"shared memory of {size} bytes cannot be mapped: {error.strerror}") from None
        self.generations: npt.NDArray[np.uint64] = np.frombuffer(self.mapping, np.uint64, num_places)
        self.rows: Bytes = np.frombuffer(self.mapping, np.uint8, num_places * self.stride, self._ahead).reshape(
            num_places, self.stride
        )

    @staticmethod
    def size_of(num_places: int, block_bytes: int) -> int:
        """Bytes of the file."""
        return _round(8 * num_places) + num_places * _round(block_bytes)

    @property
    def places(self) -> memoryview:
        """The places, without what is before them."""
        return memoryview(self.mapping)[self._ahead :]

    def touch(self, most_bytes: int) -> None:
        """Map the pages of the first places now, all in one go: 0.24 s per GiB, where the first copy into or out of a place that
        was not touched takes two to four times as long as the next (2-core AMD EPYC VM, 2026-11-30).
        """
        populate(self.rows.ctypes.data, min(most_bytes, self.rows.nbytes))

    def close(self) -> None:
        """Let go of the arrays; the mapping goes with the last view of it."""
        self.generations, self.rows = np.empty(0, np.uint64), np.empty((0, self.stride), np.uint8)


def create(name: str, size: int) -> int:
    """A descriptor of new memory of `size` bytes, none of it present yet, that nobody can make smaller or larger."""
    fd = os.memfd_create(f"tierkv-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        os.fchmod(fd, 0o400)  # else whoever was given `reader_of` opens it for writing by way of /proc
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as error:
        os.close(fd)
        raise TierError(f"shared memory of {size} bytes refused: {error.strerror}; lower host.capacity") from None
    return fd


def reader_of(fd: int) -> int:
    """Another descriptor of the same memory, through which nothing can be written."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def digest(block: memoryview, key: bytes) -> int:
    """What guards a block from the writer's memory to the reader's: xxh3-64, seeded with its key.

    The same bytes under another key do not pass: a place that holds another whole block is caught as well as a torn one.
    """
    return xxhash.xxh3_64_intdigest(block, seed=_seed(key))


def copy_in(source: Bytes, place: Bytes, key: bytes) -> int:
    """Copy a block, hashing what was read; the digest of the source."""
    state = xxhash.xxh3_64(seed=_seed(key))
    for at in range(0, len(source), STEP_BYTES):
        part = source[at : at + STEP_BYTES]
        np.copyto(place[at : at + STEP_BYTES], part)
        state.update(part.data)
    return state.intdigest()


def copy_out(place: Bytes, target: Bytes, key: bytes) -> int:
    """Copy a block into private memory; the digest of what came, which nobody else can change any more."""
    state = xxhash.xxh3_64(seed=_seed(key))
    for at in range(0, len(target), STEP_BYTES):
        part = target[at : at + STEP_BYTES]
        np.copyto(part, place[at : at + STEP_BYTES])
        state.update(part.data)
    return state.intdigest()


def bytes_of(views: Sequence[memoryview]) -> list[Bytes]:
    """Views as arrays, whose copies run without the interpreter lock."""
    return [np.frombuffer(view, np.uint8) for view in views]


def _seed(key: bytes) -> int:
    return int.from_bytes(key[:8], "little")


def _round(size: int) -> int:
    return -(-size // PAGE) * PAGE
