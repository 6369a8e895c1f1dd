"""Builds a store from a configuration: which tiers there are, how large, and how they hang together."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from tierkv.building import (
    below_of,
    make_index,
    make_mover,
    mount,
    observe,
    open_daemon,
    open_disk,
    open_packs,
    open_redis,
    piece_blocks,
)
from tierkv.config import CPU_PAGES, Config, cache_folder
from tierkv.errors import ConfigError
from tierkv.facts import ModelFacts
from tierkv.keys import Key, Namespace
from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.values import hide_password

if TYPE_CHECKING:
    import torch

    from tierkv.engine import Engine, EngineConfig
    from tierkv.index import Index
    from tierkv.lookups import Lookups
    from tierkv.mover import Clock, Mover
    from tierkv.store import Store
    from tierkv.tiers.disk import DiskTier
    from tierkv.transfers import Below

TOUCHED_FIRST_BYTES = 2 << 30
"""A slab up to this size is made present before anything is served: seconds at worst, and the first load from disk into memory
that is only being touched took 1.3-2.1 s instead of 0.2 s for 160 MiB (`make demo`, 2-core Intel Xeon VM, 2026-11-22)."""


def open_store(
    config: Config,
    *,
    layout: Layout,
    model: str,
    device: "torch.device | str" = "cpu",
    metrics: Metrics | None = None,
    clock: "Clock" = time.monotonic,
    pool_bytes: int | None = None,
    facts: ModelFacts | None = None,
    fills: bool = False,
) -> "Store":
    """Open all tiers that `config` names, for blocks of one model.

    model: the identity of the weights, part of every key.  metrics: where to count; its own when None.
    pool_bytes: of pages, where device.capacity is off; a GPU needs one of the two, for what is free there is the engine's to say.
    facts: of the model, so that a pack that was made for another can be told what differs.  fills: it is there to fill the
    tiers below it, and serves nobody: a daemon need not be larger than its pages.
    Raises ConfigError, TierError or PackError; nothing stays open then.
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
    piece = piece_blocks(layout)
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
        mover = make_mover(config, metrics)
        opened.callback(mover.close)
        if host.num_places * host.stride <= TOUCHED_FIRST_BYTES:
            deque(host.touch(), maxlen=0)
        mover.background("pin", host.pin(cuda.host_register, cuda.host_unregister) if cuda else host.touch())
        metrics.host_pinned_bytes.read_from(lambda: float(host.pinned_bytes))
        below = []
        disk = open_disk(config, layout, metrics, mover)
        if disk:
            opened.callback(disk.close)
            below.append(below_of(config, metrics, clock, disk, place=str(disk.path), number=2))
        redis = open_redis(config, layout, metrics, mover, clock)
        if redis:
            opened.callback(redis.close)
            below.append(
                below_of(config, metrics, clock, redis, place=hide_password(config.redis.url or ""), number=None)
            )
        namespace = Namespace(model, layout, tenant=config.store.tenant)
        root = namespace.root(config.secret())
        device_bytes = 0 if fills else num_pages * layout.block_bytes
        daemon = open_daemon(config, metrics, clock, namespace, root, device_bytes=device_bytes)
        if daemon:
            opened.callback(daemon.close)
            below.append(below_of(config, metrics, clock, daemon, place=daemon.url, number=None))
        sizes = {"device": num_pages, "host": num_host} | ({"disk": disk.num_slots} if disk else {})
        packs = open_packs(config, layout, metrics, mover, clock, facts=facts)
        if packs:
            opened.callback(packs.close)
            mount(packs, root, namespace)
            below.append(below_of(config, metrics, clock, packs, place=packs.place, number=None))
        index = make_index(config, layout, cost, sizes)
        observe(metrics, index)
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


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model and its tokenizer as `load_model` brings them, and the options that it was loaded with."""

    name: str
    weights: Any
    tokenizer: Any
    config: "EngineConfig"


def load_model(name: "str | Path", config: Config) -> LoadedModel:
    """Load a model as `config` wants it, without a store. Raises ModelError or ConfigError."""
    import torch

    from tierkv.engine import EngineConfig, loading

    options, kind = config.engine, config.device.kind
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    engine_config = EngineConfig(
        dtype=options.dtype,
        device=kind,
        block_tokens=config.store.block_tokens,
        max_batch_tokens=options.max_batch_tokens,
        chunk_tokens=options.chunk_tokens,
        max_sequences=options.max_sequences,
        max_context=options.max_context,
        seed=options.seed,
        num_threads=options.num_threads,
        gpu_memory_utilization=config.device.gpu_memory_utilization,
        cuda_graphs=options.cuda_graphs,
    )
    loading.check_device(engine_config)
    weights, tokenizer = loading.load(name, engine_config)
    return LoadedModel(str(name), weights, tokenizer, engine_config)


@contextmanager
def open_engine(
    model: "str | Path | LoadedModel", config: Config | None = None, *, fills: bool = False
) -> "Iterator[tuple[Engine, Store]]":
    """Load a model into the bundled engine, over a store with all tiers that `config` names.

    model: "smollm2", a .gguf file, a transformers folder, a name in the local hub cache, or one that is loaded.  fills: as in
    `open_store`.
    At the end what was computed is copied down, and all is closed. Raises ModelError, ConfigError, TierError or PackError.
    """
    from tierkv.connectors.engine import EngineConnector
    from tierkv.engine import Engine, memory
    from tierkv.engine.facts import facts_of

    config, metrics = config or Config(), Metrics()
    loaded = model if isinstance(model, LoadedModel) else load_model(model, config)
    weights, tokenizer, engine_config = loaded.weights, loaded.tokenizer, loaded.config
    with ExitStack() as opened:
        stores: list[Store] = []

        def connect(layout: Layout, device: "torch.device", identity: str) -> EngineConnector:
            left = None
            if device.type == "cuda" and config.device.capacity is None:
                left = memory.pool_bytes(weights, layout, device, engine_config)
            store = open_store(
                config,
                layout=layout,
                model=identity,
                device=device,
                metrics=metrics,
                pool_bytes=left,
                facts=facts_of(weights, tokenizer, identity=identity),
                fills=fills,
            )
            opened.callback(store.close)
            stores.append(store)
            return EngineConnector(store)

        engine = Engine(weights, tokenizer, engine_config, connector=connect, metrics=metrics)
        opened.enter_context(engine)
        yield engine, stores[0]


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
