"""A whole store over tiers in memory, whose jobs run when the test says so, and KV that is a function of its tokens."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from tierkv import policies
from tierkv.cost import CostModel
from tierkv.index import Index, TierSpec
from tierkv.keys import Key, Namespace, token_bytes
from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.mover import Breaker, LaneSpec, Mover
from tierkv.policies.base import Observer
from tierkv.store import Store
from tierkv.testing import FakeClock, FaultyTier, MemoryTier, SharedMemoryTier, StepExecutor
from tierkv.tiers.base import Lending
from tierkv.tiers.device import PagePool
from tierkv.tiers.host import HostSlab
from tierkv.transfers import HOST, Below, Places

TINY = Layout(num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32", block_tokens=2)
STEP = TINY.block_tokens * 4
DEADLINE_S = 10.0
PIECE = 2
LANES = ("load", "save", "probe", "suspend", "ahead", "memory", "shared")


def content(tokens: bytes, block: int) -> np.ndarray[Any, Any]:
    """What a page of this block must hold: a function of all tokens up to its end, as KV is."""
    seed = list(tokens[: (block + 1) * STEP])
    return np.frombuffer(np.random.default_rng(seed).bytes(TINY.block_bytes), np.uint8)


class LendingTier(SharedMemoryTier):
    """A shared tier whose blocks can be copied from memory. takes_back: the next loan's memory goes to others before the copy."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.rows = np.zeros((64, 4096), np.uint8)
        self.takes_back = False
        self.num_loans = 0

    @property
    def lends(self) -> bool:
        return True

    @contextmanager
    def lend(self, keys: Sequence[Key], *, deadline_s: float) -> Iterator[Lending | None]:
        came = [self._read(key, self.rows[place].data) for place, key in enumerate(keys)]
        taken, self.takes_back = self.takes_back, False
        if taken:
            self.rows[:] = 0xA5
        self.num_loans += 1
        yield Lending(self.rows, [place if ok else None for place, ok in enumerate(came)], lambda: self.intact(taken))

    def intact(self, taken: bool) -> bool:
        return not taken


class FaultyLender(FaultyTier):
    """A seeded fault in front of a LendingTier."""

    @property
    def lends(self) -> bool:
        return self._tier.lends

    def lend(self, keys: Sequence[Key], *, deadline_s: float) -> AbstractContextManager[Lending | None]:
        loan: AbstractContextManager[Lending | None] = self._call(lambda: self._tier.lend(keys, deadline_s=deadline_s))
        return loan


class Parts:
    """The store, and what a test steps, damages and looks at. edges: `copy_down` of host, memory and shared.

    lends: the shared tier does.
    """

    def __init__(
        self,
        *,
        pages: int = 14,
        host: int = 20,
        slots: int = 40,
        edges: tuple[str, str, str] = ("save", "save", "save"),
        policy: str = "lru",
        observer: Observer | None = None,
        history: int = 0,
        lends: bool = False,
    ) -> None:
        self.clock, self.metrics, self.steps = FakeClock(), Metrics(), StepExecutor()
        cost = CostModel(block_tokens=TINY.block_tokens, block_bytes=TINY.block_bytes)
        sizes = {"device": pages, "host": host, "memory": slots}
        made, model = policies.build([policy] * 3, capacities=list(sizes.values()), cost=cost)
        specs = [
            TierSpec(name, size, number <= HOST, own)
            for number, ((name, size), own) in enumerate(zip(sizes.items(), made, strict=True))
        ]
        index = Index(block_tokens=TINY.block_tokens, tiers=specs, observer=observer or model, history_blocks=history)
        pool = PagePool(layout=TINY, num_pages=pages, device=torch.device("cpu"))
        slab = HostSlab(num_places=host + PIECE, block_bytes=TINY.block_bytes)
        spares: SimpleQueue[list[int]] = SimpleQueue()
        spares.put(list(range(host, host + PIECE)))
        self.own = MemoryTier(metrics=self.metrics, capacity_blocks=slots)
        self.shared = LendingTier(metrics=self.metrics) if lends else SharedMemoryTier(metrics=self.metrics)
        self.faulty = [FaultyTier(self.own), FaultyLender(self.shared)]
        below = [
            Below(tier, "here", number, edge, Breaker(tier.name, metrics=self.metrics, clock=self.clock))
            for tier, number, edge in zip(self.faulty, (2, None), edges[1:], strict=True)
        ]
        self.store = Store(
            root=Namespace("test", TINY).root(),
            layout=TINY,
            places=Places(index, pool, slab, spares, self.metrics, cost, self.clock),
            below=below,
            mover=Mover(
                {name: LaneSpec(1, 12) for name in LANES}, metrics=self.metrics, executor=lambda name, spec: self.steps
            ),
            host_copy_down=edges[0],
            load_deadline_s=DEADLINE_S,
            spill_watermark=0.3,
            piece=PIECE,
        )

    def page(self, number: int) -> np.ndarray[Any, Any]:
        """The bytes of a device page."""
        return np.frombuffer(self.store.places.device.view(number), np.uint8)

    def row(self, place: int) -> np.ndarray[Any, Any]:
        """The bytes of a host place."""
        return np.frombuffer(self.store.places.host.view(place), np.uint8)

    def serve(self, tokens: bytes) -> None:
        """Compute a prompt whole and let it go; jobs stay queued."""
        search = self.store.search(tokens)
        self.steps.run_all()
        match = self.store.take(search)
        pages = self.store.allocate(len(tokens) // STEP - match.shared)
        assert pages is not None
        table = [*match.lease.places(0, 0, match.shared), *pages]
        self.store.settle(match)
        for block in range(match.shared, len(table)):
            self.page(table[block])[:] = content(tokens, block)
        taken = self.store.save(match, tokens, table)
        self.store.free([page for page, ok in zip(reversed(table), reversed(taken), strict=False) if not ok])
        self.store.release(match)


def prompt(number: int, *, num_blocks: int = 4) -> bytes:
    return token_bytes(range(100 * number, 100 * number + 2 * num_blocks))


def held(parts: Parts, tokens: bytes, tier: int) -> int:
    """Blocks of the prompt that a tier holds."""
    with parts.store.index.keep(parts.store.root, tokens) as lease:
        return sum(hi - lo for lo, hi in lease.held(tier, 0, lease.num_blocks))


def at_rest(tokens: bytes, *, shared: bool = False, **sizes: int) -> Parts:
    """A store that has a prompt in a tier at rest and nowhere else."""
    parts = Parts(**sizes)
    parts.serve(tokens)
    parts.steps.run_all()
    parts.store.evict_device()
    parts.store.index.evict(HOST)
    if shared:
        parts.own.delete(list(parts.own.stored))
        parts.store.index.evict(2)
    return parts
