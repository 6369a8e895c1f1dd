"""What a pool hands out: blocks that somebody reads in place, places that somebody fills, and what a request counted as."""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from tierkv.daemon.protocol import State
from tierkv.index import Copy, Lease
from tierkv.keys import Key
from tierkv.policies.base import Use

MAX_USES: Final = 256
"""Requests of one client whose use is remembered until its blocks are written."""

Table = npt.NDArray[np.void]


class Uses(OrderedDict[bytes, Use]):
    """What the latest requests of one client counted as, by the last key they know: its writes go on with that."""

    def note(self, key: bytes, use: Use) -> None:
        """A request's path ends at this key now."""
        self[key] = use
        if len(self) > MAX_USES:
            self.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Sought:
    """What a look-up found: leading blocks, of those after the first `before` of the path of tokens under `root`."""

    found: int
    root: Key
    path: bytes
    before: int


@dataclass(slots=True, eq=False)
class Lent:
    """Blocks that somebody may read in place until they are given back. table: rows of LOANS, one per key.

    lacking: stretches (position, lease, lo, hi) that are known and not in the slab.
    """

    leases: list[Lease]
    table: Table
    lacking: list[tuple[int, Lease, int, int]] = field(default_factory=list)

    @property
    def num_blocks(self) -> int:
        """Blocks that are lent."""
        return int(np.count_nonzero(self.table["state"] == State.HERE))


@dataclass(slots=True, eq=False)
class Writing:
    """Places that somebody fills. table: rows of LOANS; HERE: fill it.  first: position on the path of its first row."""

    lease: Lease
    copy: Copy | None
    keys: list[Key]
    first: int
    table: Table

    @property
    def places(self) -> list[int]:
        """The places to fill, in order."""
        return self.copy.places if self.copy else []

    @property
    def filled_keys(self) -> list[Key]:
        """The keys of these places."""
        return [self.keys[block - self.first] for block in self.copy.blocks] if self.copy else []
