"""Builds a store from a configuration: which tiers there are, how large, and how they hang together."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from tierkv.config import CPU_PAGES, Config, cache_folder
from tierkv.errors import ConfigError
from tierkv.keys import Key, Namespace
from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.values import hide_password

if TYPE_CHECKING:
    import torch

    from tierkv.cost import CostModel
    from tierkv.engine import Engine
    from tierkv.index import Index
    from tierkv.lookups import Lookups
    from tierkv.mover import Clock, Mover
    from tierkv.store import Store
    from tierkv.tiers.disk import DiskTier
    from tierkv.tiers.redis import RedisTier
    from tierkv.transfers import Below

PIECE_BYTES = 32 << 20
"""Moved at a time: enough for full bandwidth from disk and network, little enough that a late load is answered soon."""
MAX_PIECE_BLOCKS = 64
TOUCHED_FIRST_BYTES = 2 << 30
"""A slab up to this size is made present before anything is served: seconds at worst, and the first load from disk into memory
that is only being touched took 1.3-2.1 s instead of 0.2 s for 160 MiB (`make demo`, 2-core Intel Xeon VM, 2026-11-22)."""
PIECE_THREADS = 2
"""One piece is verified while the next is read: 0.8 of the disk's speed becomes 0.9 (bench/bench_disk.py)."""
NODE_THREADS = 4
"""Nodes of a cluster that are talked to at once."""


def open_store(
    config: Config,
    *,
    layout: Layout,
    model: str,
    device: "torch.device | str" = "cpu",
    metrics: Metrics | None = None,
    clock: "Clock" = time.monotonic,
    pool_bytes: int | None = None,
) -> "Store":
    """Open all tiers that `config` names, for blocks of one model.

    model: the identity of the weights, part of every key.  metrics: where to count; its own when None.
    pool_bytes: of pages, where device.capacity is off; a GPU needs one of the two, for what is free there is the engine's to say.
    Raises ConfigError or TierError; nothing stays open then.
    """
    import torch

    from tierkv.cost import CostModel
    from tierkv.store import Store
    from tierkv.tiers.device import page_pool
    from tierkv.tiers.device_cuda import open_cuda
    from tierkv.tiers.host import HostSlab
    from tierkv.transfers import Places

    metrics, transfer, on = metrics or Metrics(), config.transfer, torch.device(device)
    cost = CostModel(block_tokens=layout.block_tokens, block_bytes=layout.block_bytes)
    config.check_layout(layout)
    capacity = config.device.capacity or pool_bytes or (CPU_PAGES if on.type == "cpu" else None)
    if capacity is None:
        raise ConfigError("device.capacity is off: set it, since nothing here knows what else this GPU is to hold")
    cuda = open_cuda(on.index or 0) if on.type == "cuda" else None
    num_pages, num_host = capacity // layout.block_bytes, config.host.capacity // layout.block_bytes
    piece = max(1, min(MAX_PIECE_BLOCKS, PIECE_BYTES // layout.block_bytes))
    spares: SimpleQueue[list[int]] = SimpleQueue()
    for at in range(transfer.load_threads):
        spares.put(list(range(num_host + at * piece, num_host + (at + 1) * piece)))
    with ExitStack() as opened:  # closes what is open already when a later part refuses
        num_places = num_host + transfer.load_threads * piece
        node = cuda.numa_node() if cuda else None
        host = HostSlab(num_places=num_places, block_bytes=layout.block_bytes, node=node)
        opened.callback(host.close)
        calibration = folder / "copies.json" if (folder := cache_folder()) else None
        pool = page_pool(layout=layout, num_pages=num_pages, device=on, cuda=cuda, calibration=calibration)
        opened.callback(pool.close)
        mover = _mover(config, metrics)
        opened.callback(mover.close)
        if host.num_places * host.stride <= TOUCHED_FIRST_BYTES:
            deque(host.touch(), maxlen=0)
        mover.background("pin", host.pin(cuda.host_register, cuda.host_unregister) if cuda else host.touch())
        metrics.host_pinned_bytes.read_from(lambda: float(host.pinned_bytes))
        below = []
        disk = _disk(config, layout, metrics, mover)
        if disk:
            opened.callback(disk.close)
            below.append(_below(config, metrics, clock, disk, place=str(disk.path), number=2))
        redis = _redis(config, layout, metrics, mover, clock)
        if redis:
            opened.callback(redis.close)
            below.append(
                _below(config, metrics, clock, redis, place=hide_password(config.redis.url or ""), number=None)
            )
        sizes = {"device": num_pages, "host": num_host} | ({"disk": disk.num_slots} if disk else {})
        index = _index(config, layout, cost, sizes)
        _observe(metrics, index)
        namespace = Namespace(model, layout, tenant=config.store.tenant)
        root = namespace.root(config.secret())
        if disk:
            disk.introduce(root, namespace)
        if redis:
            redis.introduce(root, namespace)
        lookups = _lookups(config, namespace, root, index, below, sizes, mover, metrics, disk)
        opened.callback(lookups.close)
        store = Store(
            root=root,
            layout=layout,
            places=Places(index, pool, host, spares, metrics, cost, clock),
            below=below,
            mover=mover,
            host_copy_down=config.host.copy_down,
            load_deadline_s=transfer.load_deadline_s,
            spill_watermark=transfer.spill_watermark,
            piece=piece,
            layer_groups=transfer.layer_groups,
            spill_share=transfer.spill_share,
            ahead_share=transfer.ahead_share,
            pin_share=transfer.pin_share,
            lookups=lookups,
        )
        store.recover()
        opened.pop_all()
    return store


@contextmanager
def open_engine(name: "str | Path", config: Config | None = None) -> "Iterator[tuple[Engine, Store]]":
    """Load a model into the bundled engine, over a store with all tiers that `config` names.

    name: "smollm2", a .gguf file, a transformers folder, or a name in the local hub cache.
    At the end what was computed is copied down, and all is closed. Raises ModelError, ConfigError or TierError.
    """
    import torch

    from tierkv.connectors.engine import EngineConnector
    from tierkv.engine import Engine, EngineConfig, loading, memory

    config = config or Config()
    options, kind, metrics = config.engine, config.device.kind, Metrics()
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    with ExitStack() as opened:
        stores: list[Store] = []

        def connect(layout: Layout, device: "torch.device", model: str) -> EngineConnector:
            left = None
            if device.type == "cuda" and config.device.capacity is None:
                left = memory.pool_bytes(weights, layout, device, engine_config)
            store = open_store(config, layout=layout, model=model, device=device, metrics=metrics, pool_bytes=left)
            opened.callback(store.close)
            stores.append(store)
            return EngineConnector(store)

        engine_config = EngineConfig(
            dtype=options.dtype,
            device=kind,
            block_tokens=config.store.block_tokens,
            max_batch_tokens=options.max_batch_tokens,
            max_sequences=options.max_sequences,
            max_context=options.max_context,
            seed=options.seed,
            num_threads=options.num_threads,
            gpu_memory_utilization=config.device.gpu_memory_utilization,
            cuda_graphs=options.cuda_graphs,
        )
        loading.check_device(engine_config)
        weights, tokenizer = loading.load(name, engine_config)
        engine = Engine(weights, tokenizer, engine_config, connector=connect, metrics=metrics)
        opened.enter_context(engine)
        yield engine, stores[0]


def _disk(config: Config, layout: Layout, metrics: Metrics, mover: "Mover") -> "DiskTier | None":
    if config.disk.path is None:
        return None
    from tierkv.tiers.disk import DiskTier

    return DiskTier(
        config.disk.path,
        layout=layout,
        capacity_bytes=config.disk.capacity,
        metrics=metrics,
        executor=mover.helpers("disk-pieces", threads=PIECE_THREADS),
    )


def _redis(config: Config, layout: Layout, metrics: Metrics, mover: "Mover", clock: "Clock") -> "RedisTier | None":
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


def _below(
    config: Config, metrics: Metrics, clock: "Clock", tier: "DiskTier | RedisTier", *, place: str, number: int | None
) -> "Below":
    from tierkv.mover import Breaker
    from tierkv.transfers import Below

    transfer = config.transfer
    breaker = Breaker(tier.name, metrics=metrics, clock=clock, failures=transfer.down_after, first_s=transfer.down_s)
    return Below(tier, place, number, getattr(config, tier.name).copy_down, breaker)


def _index(config: Config, layout: Layout, cost: "CostModel", sizes: dict[str, int]) -> "Index":
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
    return Index(block_tokens=layout.block_tokens, tiers=specs, observer=observer, history_blocks=history)


def _lookups(
    config: Config,
    namespace: Namespace,
    root: Key,
    index: "Index",
    below: "Sequence[Below]",
    sizes: dict[str, int],
    mover: "Mover",
    metrics: Metrics,
    disk: "DiskTier | None",
) -> "Lookups":
    from tierkv.lookups import RECORD_LANE, Lookups, Sources
    from tierkv.record import Recorder

    recorder = None
    if config.record.path:
        recorder = Recorder(
            config.record.path,
            root=root,
            layout=namespace.layout,
            max_bytes=config.record.max_bytes,
            metrics=metrics,
            secret=config.secret(),
            now=time.time,
        )
    shared = [tier for tier in below if tier.number is None]
    sources = Sources(
        explain=index.explain,
        roots=index.roots,
        tier_names=tuple(sizes),
        fields=namespace.fields(),
        namespaces=disk.namespaces() if disk else {},
        down=lambda: next((tier.name for tier in shared if tier.breaker.open), None),
    )
    return Lookups(
        root=root,
        block_tokens=namespace.layout.block_tokens,
        sources=sources,
        capacities=sizes,
        metrics=metrics,
        submit=lambda job: mover.submit(RECORD_LANE, job, blocks=1) is not None,
        recorder=recorder,
        note=disk.note if disk else None,
    )


def _mover(config: Config, metrics: Metrics) -> "Mover":
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
    for tier in ("disk", "redis"):  # a lane without work costs nothing: its threads start with its first job
        lanes[tier] = LaneSpec(transfer.save_threads, transfer.save_queue_blocks)
    return Mover(lanes, metrics=metrics)


def _observe(metrics: Metrics, index: "Index") -> None:
    """Let the metrics of the tiers read the index."""

    def read(number: int, field: str) -> Callable[[], float]:
        return lambda: float(getattr(index.stats().tiers[number], field))

    for number, tier in enumerate(index.stats().tiers):
        metrics.blocks_used.read_from(read(number, "used"), tier.name)
        metrics.blocks_capacity.read_from(read(number, "capacity"), tier.name)
        metrics.blocks_evicted.read_from(read(number, "evicted"), tier.name)
        metrics.blocks_lost.read_from(read(number, "lost"), tier.name)
