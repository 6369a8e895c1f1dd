"""What a store holds of some tokens, as one request has it: being looked for, pinned, being loaded, extended."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from tierkv.ahead import Found
from tierkv.arrival import Arrival
from tierkv.index import Lease
from tierkv.keys import Key
from tierkv.load import Load
from tierkv.lookups import Lookup
from tierkv.policies.base import Use
from tierkv.transfers import DEVICE, Below


@dataclass(slots=True)
class Visit:
    """A request from its first match to its end, whatever is pinned of it meanwhile.

    use: what the index made of it.  lookup: what is noted of it; None for one that was forked from another.
    """

    use: Use | None = None
    lookup: Lookup | None = None


@dataclass(slots=True)
class Match:
    """What the store holds of some tokens, pinned until `Store.release` or `Store.end`.

    shared: leading blocks that lie on the device.  remote: keys of blocks after the lease's last, present in `source`.
    head_tokens: tokens of the block after these that a known block begins with (reuse finer than a block).
    head_place: a host place that holds that head and belongs to the caller (a request that was suspended).
    dirty: blocks from here on were not offered to the tiers below yet.  lent: blocks that came out of a tier's own memory,
    which need not be offered.  prompt: whole blocks of the tokens that were looked for.
    arrival: layers of its load that come after the first; None: all layers come together.
    load: the last one, until its outcome is noted.
    """

    lease: Lease
    shared: int
    head_tokens: int
    source: Below | None = None
    remote: Sequence[Key] = ()
    remote_tokens: bytes = b""
    head_place: int | None = None
    dirty: int = 0
    lent: range = range(0)
    prompt: int = 0
    arrival: Arrival | None = None
    load: Load | None = None
    visit: Visit = field(default_factory=Visit)

    @property
    def num_blocks(self) -> int:
        """Whole blocks that can be had."""
        return self.lease.num_blocks + len(self.remote)


@dataclass(slots=True)
class Search:
    """A look-up under way: `store.take` it once `ready`."""

    tokens: bytes
    base: int = 0
    probe: "Future[Found | None] | None" = None

    @property
    def ready(self) -> bool:
        """Have the shared tiers answered?"""
        return self.probe is None or self.probe.done()


def leading(lease: Lease) -> int:
    """Blocks of the lease, from the first, that lie on the device."""
    sources = lease.sources()
    return sources[0][2] if sources and sources[0][0] == DEVICE else 0
