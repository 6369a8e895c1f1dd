"""What a party of the daemon benchmark is: the one interface that limits, rivals and tierkv answer to.

A party is the *user's* side of a cache: it lives in a process of its own (`user.py`) and has its owner, which holds the
blocks, in another. Nothing but numpy and the standard library may be imported here: some users run in another virtualenv.
"""

import hashlib
import mmap
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

SIZES: Final = {"2 MiB": 2 << 20, "360 KiB": 360 << 10}
"""Bytes of a block, by name: a block of a large model, and one of SmolLM2."""
AREA_BYTES: Final = 128 << 20
"""What one sweep moves at most, for each size: four times the largest cache of the machine this was written on."""
MAX_BATCH: Final = 32
NUM_PROBED: Final = 8192
"""Keys in one `contains`: a prompt of 128k tokens."""
KEY_BYTES: Final = 32
PROBED_BYTES: Final = 4096
"""Bytes of a block that exists only to be asked for, where a party may choose."""
DEADLINE_S: Final = 60.0

Bytes = NDArray[np.uint8]


class NotInstalled(Exception):
    """A party cannot run here; the message says how to install it."""


class Refused(Exception):
    """A party did not do what it was asked for: a write that was not kept, a read that did not come."""


@dataclass(frozen=True)
class Batch:
    """The blocks of one call, in every form that a party may want them in.

    numbers: their places in the sweep.  names: the keys in hex.  blocks, outs: what is written and where reads go,
    uint8[block_bytes] each, private to the user and touched before.  *_views, *_at: the same as memoryviews and addresses.
    """

    block_bytes: int
    numbers: range
    keys: tuple[bytes, ...]
    names: list[str]
    blocks: list[Bytes]
    outs: list[Bytes]
    block_views: list[memoryview]
    out_views: list[memoryview]
    block_at: list[int]
    out_at: list[int]


class Party(ABC):
    """A cache, or a limit on one, as its user sees it. The constructor starts the owner.

    Raises NotInstalled from the constructor; Refused when a block was not kept or did not come.
    """

    does: ClassVar[tuple[str, ...]] = ("write", "read", "contains", "ping")
    """What makes sense to ask it for."""

    def allocate(self, num_bytes: int) -> Bytes:
        """Return memory for the user's blocks or outs: private, unless the party accepts no such memory."""
        return private(num_bytes)

    def prepare(self, blocks: Bytes, outs: Bytes) -> None:  # noqa: B027  most have nothing to prepare
        """Learn, before any call, where the user's memory is."""

    @abstractmethod
    def write(self, batch: Batch) -> None:
        """Have the owner keep the blocks; they were forgotten before."""

    @abstractmethod
    def read(self, batch: Batch) -> None:
        """Fill the outs."""

    def forget(self, batch: Batch) -> None:  # noqa: B027  limits overwrite
        """Make the next `write` a first one. Not timed."""

    def hold(self, keys: Sequence[bytes]) -> None:  # noqa: B027  limits hold no keys
        """Have the owner keep a block of any size under each key. Not timed."""

    def contains(self, keys: Sequence[bytes]) -> Sequence[object]:
        """Ask for keys that are all held; true values, one per key."""
        raise NotImplementedError  # of a party that does not list it in `does`, and is not asked

    def ping(self) -> None:
        """Do the smallest round trip there is between user and owner."""
        raise NotImplementedError  # of a party that does not list it in `does`, and is not asked

    @abstractmethod
    def close(self) -> None:
        """End the owner. Idempotent."""


def private(num_bytes: int) -> Bytes:
    """Return page-aligned private memory, all of it touched, in huge pages where the system gives them."""
    area = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    rows = np.frombuffer(area, np.uint8)
    rows.fill(1)
    return rows


def key_of(text: str) -> bytes:
    """Return a key as long as tierkv's."""
    return hashlib.sha256(text.encode()).digest()


def num_blocks(block_bytes: int) -> int:
    """Blocks in a sweep: whole batches of the largest kind."""
    return AREA_BYTES // block_bytes // MAX_BATCH * MAX_BATCH


def slots(area: Bytes, block_bytes: int) -> Bytes:
    """Return the part of an owner's area for blocks of a size, one row per block.

    area: len(SIZES) * AREA_BYTES; each size has its own part, so what one size wrote never answers for another.
    """
    start, count = list(SIZES.values()).index(block_bytes) * AREA_BYTES, num_blocks(block_bytes)
    return area[start : start + count * block_bytes].reshape(count, block_bytes)


def cut(blocks: Bytes, outs: Bytes, *, block_bytes: int, length: int) -> list[Batch]:
    """Cut a sweep over the user's memory into batches of `length`."""
    return [
        _batch(blocks, outs, block_bytes, range(at, at + length)) for at in range(0, num_blocks(block_bytes), length)
    ]


def _batch(blocks: Bytes, outs: Bytes, block_bytes: int, numbers: range) -> Batch:
    keys = tuple(key_of(f"{block_bytes} {number}") for number in numbers)
    ours, theirs = ([area[n * block_bytes : (n + 1) * block_bytes] for n in numbers] for area in (blocks, outs))
    return Batch(
        block_bytes=block_bytes,
        numbers=numbers,
        keys=keys,
        names=[key.hex() for key in keys],
        blocks=ours,
        outs=theirs,
        block_views=[row.data for row in ours],
        out_views=[row.data for row in theirs],
        block_at=[row.ctypes.data for row in ours],
        out_at=[row.ctypes.data for row in theirs],
    )


class Owner:
    """A fresh process that runs `serve(sock, *arguments)` and ends when the user's end of the socket is closed."""

    def __init__(self, serve: Callable[..., None], *arguments: Any) -> None:  # Any: whatever `serve` takes
        self.sock, theirs = socket.socketpair()
        # No timeout on the socket: Python would poll before each call, and the harness ends a user that does not answer.
        # Not forked: a copy of the address space would share its pages, and have them copied when written to.
        self._process = get_context("spawn").Process(target=serve, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def close(self) -> None:
        """Let it end."""
        self.sock.close()
        self._process.join(DEADLINE_S)
