"""The parts of a store, and of a daemon, from a configuration: tiers at rest, the index and its policies, the mover."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tierkv.config import Config
from tierkv.errors import ConfigError, PackAway, PackError
from tierkv.facts import ModelFacts
from tierkv.keys import Key, Namespace
from tierkv.layout import Layout
from tierkv.metrics import Metrics

if TYPE_CHECKING:
    from tierkv.cost import CostModel
    from tierkv.index import Index
    from tierkv.mover import Clock, Mover
    from tierkv.names import Listener
    from tierkv.packs.files import RemoteOptions
    from tierkv.packs.pack import Pack
    from tierkv.tiers.base import Tier
    from tierkv.tiers.daemon import DaemonTier
    from tierkv.tiers.disk import DiskTier
    from tierkv.tiers.pack import PackTier, Shard
    from tierkv.tiers.redis import RedisTier
    from tierkv.transfers import Below

log = logging.getLogger("tierkv")
PIECE_BYTES = 32 << 20
"""Moved at a time: enough for full bandwidth from disk and network, little enough that a late load is answered soon."""
MAX_PIECE_BLOCKS = 64
PIECE_THREADS = 2
"""One piece is verified while the next is read: 0.8 of the disk's speed becomes 0.9 (bench/bench_disk.py)."""
MOUNT_S = 30.0
"""For one request to the server of a mounted pack: its arrays come whole, and some come slowly."""
REMOTE_THREADS = 8
"""Ranges of a pack on a server that are asked for at once."""
NODE_THREADS = 4
"""Nodes of a cluster that are talked to at once."""


def piece_blocks(layout: Layout) -> int:
    """Blocks moved at a time."""
    return max(1, min(MAX_PIECE_BLOCKS, PIECE_BYTES // layout.block_bytes))


def open_disk(
    config: Config, layout: Layout, metrics: Metrics, mover: "Mover", *, folder: Path | None = None, parts: int = 1
) -> "DiskTier | None":
    """The disk tier, if there is one. folder: another one than disk.path.  parts: the capacity is one of so many parts."""
    if config.disk.path is None:
        return None
    from tierkv.tiers.disk import DiskTier

    return DiskTier(
        folder or config.disk.path,
        layout=layout,
        capacity_bytes=config.disk.capacity // parts,
        metrics=metrics,
        executor=mover.helpers("disk-pieces", threads=PIECE_THREADS),
    )


def open_redis(config: Config, layout: Layout, metrics: Metrics, mover: "Mover", clock: "Clock") -> "RedisTier | None":
    """The Redis tier, if there is one."""
    options = config.redis
    if options.url is None:
        return None
    from tierkv.tiers.redis import RedisTier

    return RedisTier(
        options.url,
        layout=layout,
        metrics=metrics,
        codec=options.codec,
        ttl_s=options.ttl_s,
        prefix=options.prefix,
        deadline_s=options.deadline_s,
        executor=mover.helpers("redis-nodes", threads=NODE_THREADS),
        down_after=config.transfer.down_after,
        down_s=config.transfer.down_s,
        clock=clock,
    )


def open_daemon(
    config: Config, metrics: Metrics, clock: "Clock", namespace: Namespace, root: Key, *, device_bytes: int
) -> "DaemonTier | None":
    """The daemon as a tier, if there is one. device_bytes: pages above it, which it wants to hear of."""
    options = config.daemon
    if options.url is None:
        return None
    from tierkv.daemon.client import DaemonClient
    from tierkv.tiers.daemon import DaemonTier

    client = DaemonClient(
        options.url,
        name=options.name,
        token=config.daemon_token(),
        tls=options.tls(),
        connect_s=options.connect_s,
        down_s=config.transfer.down_s,
        clock=clock,
    )
    return DaemonTier(
        client,
        namespace=namespace,
        root=root,
        metrics=metrics,
        deadline_s=options.deadline_s,
        device_bytes=device_bytes,
    )


def signers_of(config: Config) -> list[str] | None:
    """Public keys, in hex, one of which must have signed every pack; None: none must. Raises ConfigError."""
    if config.pack.signers is None:
        return None
    from tierkv.packs.signing import read_public

    try:
        return [read_public(given) for given in config.pack.signers]
    except PackError as error:
        raise ConfigError(f"pack.signers: {error}") from None


def remote_of(config: Config) -> "RemoteOptions":
    """How servers of packs are asked."""
    from tierkv.packs.files import RemoteOptions

    return RemoteOptions(endpoint=config.pack.endpoint, region=config.pack.region)


def open_packs(
    config: Config,
    layout: Layout,
    metrics: Metrics,
    mover: "Mover",
    clock: "Clock",
    *,
    facts: ModelFacts | None = None,
    fitting: bool = False,
) -> "PackTier | None":
    """The packs as one tier, if there are any. facts: of the model over them, where it is known.

    fitting: leave those of another layout out. Raises ConfigError, and PackError for a pack that is not sound, not signed as
    demanded, or of another layout.
    """
    from tierkv.tiers.pack import PackTier

    with ExitStack() as opened:
        packs = [opened.enter_context(pack) for pack in each_pack(config)]
        shard = shard_of(config)
        if fitting:
            others = [pack for pack in packs if shard.misfit(pack.layout, layout) is not None]
            packs = [pack for pack in packs if pack not in others]
            for pack in others:
                pack.close()
        if not packs:
            return None
        threads = PIECE_THREADS if all(pack.local for pack in packs) else REMOTE_THREADS
        tier = PackTier(
            packs,
            layout=layout,
            metrics=metrics,
            shard=shard,
            facts=facts,
            executor=mover.helpers("pack-pieces", threads=threads),
            clock=clock,
        )
        opened.pop_all()
    return tier


def shard_of(config: Config) -> "Shard":
    """Which tensor-parallel rank's heads are taken of packs."""
    from tierkv.tiers.pack import Shard

    return Shard(*map(int, config.pack.shard.split("/")))


def each_pack(config: Config) -> "Iterator[Pack]":
    """Open the packs that are configured, one after another. Raises ConfigError or PackError."""
    if config.pack.paths is None:
        return
    from tierkv.packs.pack import open_pack

    trusted = signers_of(config)
    # Who waits for a block waits for `load_deadline_s`, and then computes it; a request that hangs holds a thread for longer.
    remote = replace(remote_of(config), timeout_s=max(MOUNT_S, config.transfer.load_deadline_s), retries=1)
    for place in config.pack.paths:
        try:
            yield open_pack(place, trusted=trusted, remote=remote)
        except PackAway as error:
            log.warning("a pack is not mounted, its server is away: %s", error)


def mount(tier: "PackTier", root: Key, namespace: Namespace) -> None:
    """Let the packs answer for a store's namespace. Raises PackError, naming what differs, for one of another model."""
    tier.introduce(root, namespace)
    for pack in tier.packs:
        if differs := tier.mismatch(pack, namespace):
            raise PackError(
                f"{pack.place}: built for another model: {differs}; build a pack for this model, or leave it out of pack.paths"
            )


def below_of(
    config: Config, metrics: Metrics, clock: "Clock", tier: "Tier", *, place: str, number: int | None
) -> "Below":
    """A tier at rest, and the edge to it."""
    from tierkv.mover import Breaker
    from tierkv.transfers import Below

    transfer = config.transfer
    breaker = Breaker(tier.name, metrics=metrics, clock=clock, failures=transfer.down_after, first_s=transfer.down_s)
    copy_down = getattr(getattr(config, tier.name), "copy_down", "never")  # nothing is copied to a pack
    return Below(tier, place, number, copy_down, breaker)


def make_index(
    config: Config,
    layout: Layout,
    cost: "CostModel",
    sizes: dict[str, int],
    *,
    named: bool = False,
    listener: "Listener | None" = None,
) -> "Index":
    """The index of tiers of these sizes, in blocks, with their policies. named, listener: as in `Index`."""
    from tierkv import policies
    from tierkv.index import Index, TierSpec
    from tierkv.transfers import HOST

    names = [getattr(config, name).policy for name in sizes]
    made, observer = policies.build(names, capacities=list(sizes.values()), cost=cost, objective=config.store.objective)
    specs = [
        TierSpec(name=name, capacity_blocks=capacity, placed=number <= HOST, policy=policy)
        for number, ((name, capacity), policy) in enumerate(zip(sizes.items(), made, strict=True))
    ]
    history = config.store.history_blocks
    if history is None:
        history = policies.history_blocks(list(sizes.values()))
    return Index(
        block_tokens=layout.block_tokens,
        tiers=specs,
        observer=observer,
        history_blocks=history,
        named=named,
        listener=listener,
    )


@contextmanager
def threads(name: str, *, count: int) -> "Iterator[Executor]":
    """Threads for a command that has no store."""
    from tierkv.mover import Mover

    mover = Mover({}, metrics=Metrics())
    try:
        yield mover.helpers(name, threads=count)
    finally:
        mover.close()


def make_mover(config: Config, metrics: Metrics) -> "Mover":
    """The threads that move blocks."""
    from tierkv.lookups import MAX_WAITING, RECORD_LANE
    from tierkv.mover import AHEAD_LANE, LOAD_LANE, PROBE_LANE, SAVE_LANE, SUSPEND_LANE, LaneSpec, Mover
    from tierkv.store import MAX_LOAD_BLOCKS, MAX_PROBES

    transfer = config.transfer
    lanes = {
        LOAD_LANE: LaneSpec(transfer.load_threads, MAX_LOAD_BLOCKS),
        SAVE_LANE: LaneSpec(1, transfer.save_queue_blocks),
        PROBE_LANE: LaneSpec(1, MAX_PROBES),
        SUSPEND_LANE: LaneSpec(1, MAX_LOAD_BLOCKS),
        AHEAD_LANE: LaneSpec(1, MAX_LOAD_BLOCKS),
        RECORD_LANE: LaneSpec(1, MAX_WAITING),  # one thread: it keeps the order
    }
    for tier in (
        "disk",
        "redis",
        "daemon",
        "pack",
    ):  # a lane without work costs nothing: its threads start with its first job
        lanes[tier] = LaneSpec(transfer.save_threads, transfer.save_queue_blocks)
    return Mover(lanes, metrics=metrics)


def observe(metrics: Metrics, index: "Index") -> None:
    """Let the metrics of the tiers read the index."""

    def read(number: int, field: str) -> Callable[[], float]:
        return lambda: float(getattr(index.stats().tiers[number], field))

    for number, tier in enumerate(index.stats().tiers):
        metrics.blocks_used.read_from(read(number, "used"), tier.name)
        metrics.blocks_capacity.read_from(read(number, "capacity"), tier.name)
        metrics.blocks_evicted.read_from(read(number, "evicted"), tier.name)
        metrics.blocks_lost.read_from(read(number, "lost"), tier.name)
