"""The two kinds of place a block can be in.

A *slab* (device, host) is memory cut into equal places; the index knows which block is in which place, so nothing is
hashed on its account. A *tier at rest* (disk, redis, object, daemon) is asked by key and verifies what it returns.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Protocol

from tierkv.keys import Key


class Miss(StrEnum):
    """Why a block that was expected did not come: the label of a counter."""

    ABSENT = "absent"
    CORRUPT = "corrupt"
    LAYOUT = "layout"
    LATE = "late"
    FAILED = "failed"
    DOWN = "down"
    BUSY = "busy"


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive blocks of one path: the unit of batched I/O and of disk extents.

    root: the namespace.  parent: key of the block before the first, `root` at depth 0.  depth: number of blocks before
    the first.  keys: one per block.  tokens: int32-LE ids of all blocks, or empty where a tier does not keep them.
    """

    root: Key
    parent: Key
    depth: int
    keys: tuple[Key, ...]
    tokens: bytes = b""


@dataclass(frozen=True, slots=True)
class Lending:
    """Blocks in memory of a tier, to be copied from there: one place per key, None where there is no whole block.

    rows: [num_places, stride] uint8, numpy, from a multiple of the page size on; a block is the first `block_bytes` of a row.
    The same object as long as it is the same memory.
    intact: whether nothing was taken back so far; to be asked after a copy, which is believed only then.
    """

    rows: Any
    places: Sequence[int | None]
    intact: Callable[[], bool]


class Tier(ABC):
    """Blocks at rest, by key. Blocking, thread-safe, batched: lists in, a list of the same length and order out.

    A key is whole or absent. Whatever goes wrong with one block (absent, torn, corrupt, late) is False for that block
    and a count in `metrics`, never an exception; a copy found bad is removed. `TierError` is for what ends the tier.
    """

    name: ClassVar[str]
    shared: ClassVar[bool] = False
    """Others write too: presence is asked for, not remembered."""
    waits: ClassVar[bool] = False
    """`wait` hears of what others write."""

    @property
    def lasting(self) -> bool:
        """Does it hold near by what it holds for good? What is read from it is not copied to other tiers then."""
        return False

    @property
    def num_blocks(self) -> int | None:
        """Blocks that it holds, where it knows and nobody else counts them."""
        return None

    @abstractmethod
    def contains(self, keys: Sequence[Key]) -> list[bool]:
        """Tell which keys a `read` would probably find. No payload moves."""

    def seek(self, run: Run) -> int:
        """Tell how many leading blocks of `run`, which a request wants, a `read` would probably find.

        A tier that learns from use counts one here.
        """
        present = self.contains(run.keys)
        return present.index(False) if False in present else len(present)

    def wait(self, keys: Sequence[Key], *, known: int, deadline_s: float) -> int:
        """Tell how many leading keys are there, once they are more than `known` or the time is up.

        At once where it never `waits`.
        """
        present = self.contains(keys)
        return present.index(False) if False in present else len(present)

    @property
    def lends(self) -> bool:
        """Does `lend` give places, as far as is known now?"""
        return False

    def lend(self, keys: Sequence[Key], *, deadline_s: float) -> AbstractContextManager[Lending | None]:
        """Whole blocks in memory, verified, kept there until the end of the `with`; None: nothing is lent, `read` them.

        deadline_s: seconds from now for what has to be brought into that memory first. What is missing is counted as by `read`.
        """
        return nullcontext()

    @abstractmethod
    def read(self, keys: Sequence[Key], outs: Sequence[memoryview], *, deadline_s: float | None = None) -> list[bool]:
        """Fill `outs[i]` (writable, block_bytes long) with the block of `keys[i]`, verified; False leaves it undefined.

        deadline_s: seconds from now after which whatever has not arrived is False.
        """

    @abstractmethod
    def write(self, run: Run, blocks: Sequence[memoryview], *, deadline_s: float | None = None) -> list[bool]:
        """Keep the blocks of `run`; True: a later `read`, in another process too, finds the whole block.

        The caller leaves `blocks` unchanged until this returns. Writing a key that is present is True and may do nothing.
        """

    @abstractmethod
    def delete(self, keys: Sequence[Key]) -> None:
        """Forget the keys; absent ones are fine."""

    def renew(self, keys: Sequence[Key]) -> None:  # noqa: B027 -- most tiers keep what they have
        """What the tier forgets after a time begins that time anew; nothing where it does not."""

    @abstractmethod
    def scan(self) -> Iterator[Run]:
        """What survived the last stop, parents before children where known; shared tiers may yield nothing."""

    @abstractmethod
    def close(self) -> None:
        """Finish writes under way and let go of files and connections; the tier is unusable after. Idempotent."""


class Slab(ABC):
    """Equal places of memory, numbered from 0; who may use which place is the index's business, not the slab's."""

    num_places: int
    block_bytes: int

    @abstractmethod
    def view(self, place: int) -> memoryview:
        """The bytes of a place, writable; valid until `close`."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back. Views must be gone."""


class Staging(Protocol):
    """Host memory that a device copies to and from: all that a device knows of the host tier."""

    rows: Any
    """[num_places, stride] uint8, numpy; a block is the first `block_bytes` of a row."""
    stride: int
    piece_places: int
    """Places that are registered with CUDA together, from each multiple of it on; one copy must not cross a multiple."""

    @property
    def pinned(self) -> bool:
        """Is all of it registered by now?"""
