"""What is done with whole pools: forgetting on request, writing everything down, verifying, telling how it stands."""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tierkv import __version__
from tierkv.daemon.pool import DISK, Pool
from tierkv.errors import TierKVError
from tierkv.index import Lease
from tierkv.keys import Key, Namespace
from tierkv.layout import Layout
from tierkv.metrics import Histogram, Metrics
from tierkv.mover import Clock
from tierkv.reuse_distance import ReuseDistances, what_if
from tierkv.tiers.base import Miss
from tierkv.tiers.disk_array import read_about
from tierkv.transfers import HOST, write_down
from tierkv.values import hide_password

if TYPE_CHECKING:
    from tierkv.daemon.service import Service

VERIFY_BLOCKS: Final = 64
"""Checked before others may use the tier, and before progress is told."""
TOP_PREFIXES: Final = 20
_FOLDER_CHARACTERS: Final = 32
"""Of a layout's fingerprint in hex, which names the folder of its blocks."""
log = logging.getLogger("tierkv")


def observe(metrics: Metrics, pools: Sequence[Pool]) -> None:
    """Let the metrics of the tiers read all pools."""

    def total(number: int, field: str) -> float:
        found = [pool.index.stats().tiers for pool in pools]
        return float(sum(getattr(tiers[number], field) for tiers in found if number < len(tiers)))

    for number, tier in ((HOST, "host"), (DISK, "disk")):
        if any(number < len(pool.index.stats().tiers) for pool in pools):
            metrics.blocks_used.read_from(partial(total, number, "used"), tier)
            metrics.blocks_capacity.read_from(partial(total, number, "capacity"), tier)
            metrics.blocks_evicted.read_from(partial(total, number, "evicted"), tier)
            metrics.blocks_lost.read_from(partial(total, number, "lost"), tier)


def kept_layouts(folder: Path | None) -> list[Layout]:
    """The layouts whose blocks an earlier daemon left under a disk folder."""
    found = []
    for path in sorted(folder.iterdir()) if folder and folder.is_dir() else ():
        try:
            if len(path.name) == _FOLDER_CHARACTERS and path.is_dir():
                found.append(Layout(**read_about(path)["layout"]))
        except (TierKVError, TypeError) as error:
            log.warning("%s is no folder of blocks: %s", path, error)
    return found


def what_if_larger(metrics: Metrics, pool: Pool) -> ReuseDistances:
    """Follow what is asked of a pool, and let the metrics tell what larger tiers of it would have found."""
    tiers = pool.index.stats().tiers[HOST:]
    capacities = {tier.name: tier.capacity for tier in tiers}
    distances = ReuseDistances(max_blocks=4 * max(capacities.values()))

    def share(tier: str, times: float) -> float:
        return what_if(distances, capacities)[tier, times]

    for tier, times in what_if(distances, capacities):
        metrics.capacity_hit_share.read_from(partial(share, tier, times), tier, f"{times:g}")
    return distances


def forget(pool: Pool, *, model: str | None, tenant: str | None, until: float) -> dict[str, int]:
    """Forget what is of this model and tenant (None: of any) and was not used after `until`; blocks by tier.

    What is of nobody that is known goes as well: it may be theirs.
    """

    def wanted(namespace: Namespace | None) -> bool:
        if namespace is None:
            return True
        return model in (None, namespace.model) and tenant in (None, namespace.tenant)

    every = model is None and tenant is None
    with pool.capture() as gone:
        purged = pool.index.purge(roots=None if every else pool.roots_of(wanted), until=until)
    counts = dict(zip(("device", "host", "disk"), purged.evicted, strict=False))
    del counts["device"]
    for below in pool.below:
        if below.copy_down == "never":
            continue  # a pack stays what it is: who wants it gone unmounts it
        keys = purged.victims if below.number is not None else sorted(gone)
        for at in range(0, len(keys), VERIFY_BLOCKS):
            below.forget(keys[at : at + VERIFY_BLOCKS])
        if below.number is None:
            counts[below.name] = len(keys)
    return counts


def write_all(pool: Pool, clock: Clock, end: float) -> int:
    """Write down what the slab holds and the tiers below it do not, until the clock says `end`; how many blocks went."""
    before = pool.metrics.blocks_spilled.value("host")
    for below in pool.below:
        if below.copy_down == "never" or (below.number is None and below.copy_down == "save"):
            continue  # nothing remembers what a shared tier was given, and all of it was
        for lease in _kept(pool, HOST, below.number):
            for lo, hi in _not_in_packs(pool, lease):
                if clock() < end and not below.breaker.open:
                    write_down(pool.places, below, lease, lo, hi)
    return int(pool.metrics.blocks_spilled.value("host") - before)


def _not_in_packs(pool: Pool, lease: Lease) -> Iterator[tuple[int, int]]:
    """Ranges of a lease's blocks that no pack of this machine has: those need not be written down."""
    if pool.packs is None or not pool.packs.lasting:
        yield lease.lo, lease.num_blocks
        return
    packed = pool.packs.contains(lease.keys(lease.lo, lease.num_blocks))
    at = lease.lo
    for has, group in groupby(packed):
        count = sum(1 for _ in group)
        if not has:
            yield at, at + count
        at += count


def verify(
    pool: Pool, told: Callable[[dict[str, Any]], object], stopped: Callable[[], bool]
) -> dict[str, dict[str, int]]:
    """Compare all blocks of memory and disk with their checksums; the bad ones are forgotten.

    told: hears of progress, {tier, checked, blocks, bad}.  stopped: ends it early; a daemon that is to end cannot wait for it.
    """
    found: dict[str, dict[str, int]] = {}
    tiers = [(HOST, "host", partial(_verify_host, pool))]
    tiers += [
        (below.number, below.name, partial(_verify_disk, pool)) for below in pool.below if below.number is not None
    ]
    for number, name, check in tiers:
        keys = [key for lease in _kept(pool, number, None) for key in lease.keys(lease.lo, lease.num_blocks)]
        counts = found[name] = {"checked": 0, "bad": 0}
        for at in range(0, len(keys), VERIFY_BLOCKS):
            if stopped():
                return found
            checked, bad = check(keys[at : at + VERIFY_BLOCKS])
            counts["checked"] += checked
            counts["bad"] += bad
            told({"tier": name, "blocks": len(keys), **counts})
    return found


def _kept(pool: Pool, tier: int, below: int | None) -> Iterator[Lease]:
    """The leases of `Index.keep_all`, each released when the next one is asked for."""
    with ExitStack() as kept:
        for lease in [kept.enter_context(lease) for lease in pool.index.keep_all(tier, below)]:
            yield lease
            lease.release()


def _verify_host(pool: Pool, keys: Sequence[Key]) -> tuple[int, int]:
    lent = pool.lend(b"".join(keys))
    try:
        return lent.num_blocks, pool.report(b"".join(keys))
    finally:
        pool.give_back(lent)


def _verify_disk(pool: Pool, keys: Sequence[Key]) -> tuple[int, int]:
    disk = next(below for below in pool.below if below.number == DISK)
    room = bytearray(len(keys) * pool.layout.block_bytes)
    size = pool.layout.block_bytes
    outs = [memoryview(room)[at * size : (at + 1) * size] for at in range(len(keys))]
    there = disk.tier.contains(
        keys
    )  # a path that is known twice, and a block evicted since: the index says more than is true
    came = disk.tier.read(keys, outs)
    bad = 0
    for key, was, ok in zip(keys, there, came, strict=True):
        for _, lease in () if ok else pool.index.trace_all(key):
            with lease:
                held = [block for lo, hi in lease.held(DISK, lease.lo, lease.num_blocks) for block in range(lo, hi)]
                pool.index.drop(DISK, lease, held, reason=Miss.CORRUPT if was else Miss.ABSENT)
                bad += was and bool(held)
    return sum(there), bad


# -- how it stands ----------------------------------------------------------------------------------------------------------


def stats(service: "Service") -> dict[str, Any]:
    """The document of `Service.stats`."""
    config, metrics, pools = service.config, service.metrics, list(service.pools.values())
    return {
        "version": __version__,
        "pid": os.getpid(),
        "started": service.started,
        "uptime_s": service.clock() - service.began_s,
        "state": "draining" if service.draining else "ready",
        "name": socket.gethostname(),
        "listen": list(service.listening),
        "http": service.http or "",
        "tiers": _tiers(service, pools),
        "lookups": {
            "count": int(metrics.daemon_lookups.value()),
            "hit_blocks": int(metrics.daemon_lookup_blocks.value()),
            "blocks": int(metrics.daemon_lookup_blocks.value() + metrics.missed_blocks.value()),
        },
        "misses": {labels[0][1]: int(value) for _, labels, value in metrics.missed_blocks.samples()},
        "requests": _requests(metrics),
        "clients": [
            {
                "id": client.id.hex()[:12],
                "name": client.name,
                "pid": client.pid,
                "address": client.address,
                "since": client.since,
                "connections": len(client.sessions),
                "leases": sum(len(session.held) for session in client.sessions),
                "leased_bytes": service.leased_bytes(client),
                "writes_open": sum(session.num_writes for session in client.sessions),
                "read_blocks": client.read_blocks,
                "written_blocks": client.written_blocks,
                "device_bytes": sum(client.device.values()),
            }
            for client in service.clients.values()
        ],
        "prefixes": [
            {
                "key": prefix.key.hex()[:16],
                **_named(prefix.pool.namespace_of(prefix.root)),
                "tokens": prefix.tokens,
                "blocks": prefix.blocks,
                "bytes": prefix.bytes,
                "uses": prefix.uses,
                "used": prefix.used,
            }
            for prefix in service.popular.top(TOP_PREFIXES)
        ],
        "namespaces": [
            {
                **_named(namespace),
                "adapter": namespace.adapter,
                "dtype": pool.layout.dtype,
                "block_bytes": pool.layout.block_bytes,
                "blocks": (blocks := pool.held_of(root)),
                "bytes": blocks * pool.layout.block_bytes,
            }
            for pool in pools
            for root, namespace in list(pool.namespaces.items())
        ],
        "what_if": [
            {"tier": labels[0][1], "times": float(labels[1][1]), "hit_share": value}
            for _, labels, value in metrics.capacity_hit_share.samples()
        ],
        "pins": [
            {
                "name": name,
                "key": pin.key.hex()[:16],
                "blocks": pin.lent.num_blocks,
                "bytes": pin.lent.num_blocks * pin.pool.layout.block_bytes,
                "expires": time.time() + pin.expires_s - service.clock(),
            }
            for name, pin in service.pins.items()
        ],
        "leases": int(metrics.daemon_leases.value()),
        "leased_bytes": int(metrics.daemon_leased_bytes.value()),
        "quarantined_blocks": service.quarantined,
        "queues": [{"queue": labels[0][1], "blocks": int(value)} for _, labels, value in metrics.queue_depth.samples()],
        "saves_dropped": _by(metrics.saves_dropped, 1),
        "corrupt_blocks": int(metrics.corrupt_blocks.value()),
        "limits": {"host_bytes": config.host.capacity, "layouts": config.server.layouts},
    }


def _named(namespace: Namespace | None) -> dict[str, str]:
    return {"model": namespace.model if namespace else "?", "tenant": namespace.tenant if namespace else "?"}


def _by(counter: Any, label: int) -> dict[str, int]:  # Any: a Counter
    found: dict[str, int] = {}
    for _, labels, value in counter.samples():
        found[labels[label][1]] = found.get(labels[label][1], 0) + int(value)
    return found


def _tiers(service: "Service", pools: Sequence[Pool]) -> list[dict[str, Any]]:
    config, metrics = service.config, service.metrics
    rows = [_tier(service, pools, HOST, "host", "shared memory")]
    if config.disk.path:
        rows.append(_tier(service, pools, DISK, "disk", str(config.disk.path)))
    if config.redis.url:
        blocks = int(metrics.blocks_spilled.value("host", "redis"))
        size = pools[0].layout.block_bytes if pools else 0
        rows.append(
            _tier(service, (), DISK, "redis", hide_password(config.redis.url))
            | {
                "shared": True,
                "blocks": blocks,
                "bytes": blocks * size,
                "capacity_blocks": None,
                "capacity_bytes": None,
            }
        )
    if config.pack.paths:
        packs = [pool.packs for pool in pools if pool.packs]
        size = sum(pack.num_blocks * pack.layout.block_bytes for tier in packs for pack in tier.packs)
        blocks = sum(tier.num_blocks for tier in packs)
        places = ", ".join(tier.place for tier in packs) or f"{len(config.pack.paths)} packs, not asked for yet"
        rows.append(
            _tier(service, (), DISK, "pack", places)
            | {"blocks": blocks, "bytes": size, "capacity_blocks": None, "capacity_bytes": None}
        )
    down = {below.name for pool in pools for below in pool.below if below.breaker.open}
    for row in rows:
        row["down"] = row["tier"] in down
    return rows


def _tier(service: "Service", pools: Sequence[Pool], number: int, name: str, place: str) -> dict[str, Any]:
    metrics, config = service.metrics, service.config
    found = [(pool, tiers[number]) for pool in pools if number < len(tiers := pool.index.stats().tiers)]
    pinned = sum(max(0, of.held - (of.available - (of.capacity - of.used))) for _, of in found)
    return {
        "tier": name,
        "place": place,
        "down": False,
        "shared": False,
        "blocks": sum(of.held for _, of in found),
        "capacity_blocks": sum(of.capacity for _, of in found),
        "bytes": sum(of.held * pool.layout.block_bytes for pool, of in found),
        "capacity_bytes": config.host.capacity if name == "host" else config.disk.capacity,
        "pinned_blocks": pinned,
        "evicted_blocks": sum(of.evicted for _, of in found),
        "lost_blocks": sum(of.lost for _, of in found),
        "hit_blocks": int(metrics.daemon_lookup_blocks.value(name)),
        "read_bytes": int(metrics.bytes_read.value(name)),
        "written_bytes": int(metrics.bytes_written.value(name)),
        "load_s": _quantiles(metrics.load_seconds, name),
        "save_s": _quantiles(metrics.save_seconds, name),
    }


def _quantiles(histogram: Histogram, *labels: str) -> dict[str, Any]:
    return {
        "count": histogram.count(*labels),
        "p50": histogram.quantile(0.5, *labels),
        "p99": histogram.quantile(0.99, *labels),
    }


def _requests(metrics: Metrics) -> list[dict[str, Any]]:
    counts: dict[str, dict[str, int]] = {}
    for _, labels, value in metrics.daemon_requests.samples():
        counts.setdefault(labels[0][1], {})[labels[1][1]] = int(value)
    return [
        {
            "op": op,
            "count": sum(of.values()),
            "failed": of.get("failed", 0),
            "p50_s": metrics.daemon_request_seconds.quantile(0.5, op),
            "p99_s": metrics.daemon_request_seconds.quantile(0.99, op),
        }
        for op, of in counts.items()
    ]
