"""One realistic document of a daemon's figures, and a real HTTP server for it, shared by tests of page, HTTP and `top`."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

from tierkv.daemon.http import HttpServer

STARTED = 1764492000.0
MIB, GIB = 1 << 20, 1 << 30
BLOCK = 368_640


def latency(count: int, p50: float | None, p99: float | None) -> dict[str, Any]:
    return {"count": count, "p50": p50, "p99": p99}


def tier(name: str, place: str, blocks: int, capacity: int | None, **rest: Any) -> dict[str, Any]:
    plain = {
        "tier": name, "place": place, "down": False, "shared": False, "blocks": blocks, "capacity_blocks": capacity,
        "bytes": blocks * BLOCK, "capacity_bytes": None if capacity is None else capacity * BLOCK, "pinned_blocks": 0,
        "evicted_blocks": 0, "lost_blocks": 0, "hit_blocks": 0, "read_bytes": 0, "written_bytes": 0,
        "load_s": latency(0, None, None), "save_s": latency(0, None, None),
    }  # fmt: skip
    return plain | rest


def document() -> dict[str, Any]:
    """Two days of a machine with three engines."""
    now = STARTED + 187_512.25
    return {
        "version": "0.1.0", "pid": 4242, "started": STARTED, "uptime_s": 187_512.25, "state": "ready", "name": "gpu-node-07",
        "listen": ["unix:///run/tierkv/tierkv.sock", "tcp://127.0.0.1:7411"], "http": "127.0.0.1:9419",
        "tiers": [
            tier("host", "memory", 141_206, 186_413, pinned_blocks=11_875, evicted_blocks=902_114, lost_blocks=12_008,
                 hit_blocks=4_810_233, read_bytes=1_773_244_293_120, written_bytes=384_610_344_960,
                 load_s=latency(61_220, 0.00041, 0.0038), save_s=latency(33_870, 0.00052, 0.0061)),
            tier("disk", "/var/lib/tierkv/kv", 1_490_880, 1_553_445, evicted_blocks=41_902, lost_blocks=40_115,
                 hit_blocks=1_204_418, read_bytes=443_996_651_520, written_bytes=565_047_590_400,
                 load_s=latency(9_411, 0.0112, 0.094), save_s=latency(12_660, 0.0087, 0.131)),
            tier("redis", "rediss+cluster://cache.internal:6379", 88_120, None, shared=True, down=True,
                 hit_blocks=96_004, read_bytes=35_390_914_560, written_bytes=32_484_556_800,
                 load_s=latency(1_204, 0.0231, 0.412), save_s=latency(1_822, 0.0307, 1.72)),
        ],
        "lookups": {"count": 71_904, "blocks": 8_120_440, "hit_blocks": 6_110_655},
        "misses": {"never_seen": 1_790_211, "evicted": 188_040, "partial_tail": 31_402, "late": 120, "corrupt": 2, "down": 10},
        "requests": [
            {"op": "lookup", "count": 71_904, "failed": 0, "p50_s": 0.000061, "p99_s": 0.00048},
            {"op": "read", "count": 64_118, "failed": 12, "p50_s": 0.00071, "p99_s": 0.0184},
            {"op": "write", "count": 39_020, "failed": 3, "p50_s": 0.00088, "p99_s": 0.0241},
            {"op": "pin", "count": 14, "failed": 0, "p50_s": None, "p99_s": None},
        ],
        "clients": [
            {"id": "3f2a91c0d4e8", "name": "engine-0", "pid": 4711, "address": "unix", "since": now - 181_340, "connections": 2,
             "leases": 14, "leased_bytes": 4_377_804_800, "writes_open": 3, "read_blocks": 2_904_112, "written_blocks": 611_204,
             "device_bytes": 24 * GIB},
            {"id": "77b1e2a05c9d", "name": "engine-1", "pid": 4712, "address": "unix", "since": now - 181_338, "connections": 2,
             "leases": 9, "leased_bytes": 0, "writes_open": 0, "read_blocks": 2_610_998, "written_blocks": 540_007,
             "device_bytes": 24 * GIB},
            {"id": "c0ffee12ab34", "name": "", "pid": None, "address": "127.0.0.1:50162", "since": now - 41, "connections": 1,
             "leases": 0, "leased_bytes": 0, "writes_open": 0, "read_blocks": 0, "written_blocks": 96, "device_bytes": 512 * MIB},
        ],
        "prefixes": [
            {"key": "9f31c2a47be05d18", "model": "smollm2", "tenant": "", "tokens": 3_600, "blocks": 225, "bytes": 225 * BLOCK,
             "uses": 20_418, "used": now - 1.5},
            {"key": "04d1ee90aa7b3c2f", "model": "meta-llama/Llama-3.1-8B-Instruct", "tenant": "harbour", "tokens": 120_400,
             "blocks": 7_525, "bytes": 7_525 * BLOCK, "uses": 61, "used": now - 340},
            {"key": "e7780b61fd2299ac", "model": "meta-llama/Llama-3.1-8B-Instruct", "tenant": "archive", "tokens": 48_016,
             "blocks": 3_001, "bytes": 3_001 * BLOCK, "uses": 7, "used": now - 90_000},
        ],
        "namespaces": [
            {"model": "smollm2", "adapter": "", "tenant": "", "dtype": "bfloat16", "block_bytes": BLOCK, "blocks": 902_114,
             "bytes": 902_114 * BLOCK},
            {"model": "meta-llama/Llama-3.1-8B-Instruct", "adapter": "support-v3", "tenant": "harbour", "dtype": "bfloat16",
             "block_bytes": 2 * MIB, "blocks": 41_003, "bytes": 41_003 * 2 * MIB},
        ],
        "what_if": [
            {"tier": name, "times": times, "hit_share": share}
            for name, shares in (("host", (0.48, 0.592, 0.668, 0.715)), ("disk", (0.69, 0.741, 0.766, 0.774)))
            for times, share in zip((0.5, 1.0, 2.0, 4.0), shares, strict=True)
        ],
        "pins": [{"key": "9f31c2a47be05d18", "blocks": 225, "bytes": 225 * BLOCK, "expires": now + 412.0}],
        "leases": 23, "leased_bytes": 4_377_804_800,
        "queues": [{"queue": "load", "blocks": 12}, {"queue": "save", "blocks": 384}, {"queue": "record", "blocks": 0}],
        "saves_dropped": {"full": 118, "down": 4_096}, "corrupt_blocks": 2,
    }  # fmt: skip


def empty_document() -> dict[str, Any]:
    """A daemon that has just started: nothing has happened yet."""
    return document() | {
        "uptime_s": 0.5, "tiers": [tier("host", "memory", 0, 100)], "lookups": {"count": 0, "blocks": 0, "hit_blocks": 0},
        "misses": {}, "requests": [], "clients": [], "prefixes": [], "namespaces": [], "what_if": [], "pins": [], "leases": 0,
        "leased_bytes": 0, "queues": [], "saves_dropped": {}, "corrupt_blocks": 0,
    }  # fmt: skip


def later(stats: dict[str, Any], *, seconds: float, **host: int) -> dict[str, Any]:
    """The same daemon some seconds on; host: figures of its first tier that have risen by so much."""
    first, *rest = stats["tiers"]
    first = first | {name: first[name] + by for name, by in host.items()}
    return stats | {"uptime_s": stats["uptime_s"] + seconds, "tiers": [first, *rest]}


def figures(stats: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a document, by the name of the figure: exactly these values."""
    shown: dict[str, Any] = {
        "uptime_s": stats["uptime_s"],
        "clients": len(stats["clients"]),
        "saves_dropped": sum(stats["saves_dropped"].values()),
        "connections": sum(client["connections"] for client in stats["clients"]),
        "requests.count": sum(row["count"] for row in stats["requests"]),
        "requests.failed": sum(row["failed"] for row in stats["requests"]),
    }
    shown |= {name: stats[name] for name in ("leases", "leased_bytes", "corrupt_blocks")}
    shown |= {f"lookups.{name}": value for name, value in stats["lookups"].items()}
    for row in stats["tiers"]:
        plain = ("blocks", "bytes", "evicted_blocks", "lost_blocks", "hit_blocks", "read_bytes", "written_bytes")
        limited = ("capacity_blocks", "capacity_bytes", "pinned_blocks")
        names = plain + (limited if row["capacity_blocks"] else ())
        shown |= {f"tier.{row['tier']}.{name}": row[name] for name in names}
        for kind in ("load_s", "save_s"):
            shown |= {f"tier.{row['tier']}.{kind}.{part}": row[kind][part] for part in ("p50", "p99")}
    shown |= {f"misses.{reason}": blocks for reason, blocks in stats["misses"].items()}
    for row in stats["requests"]:
        shown |= {f"request.{row['op']}.{name}": row[name] for name in ("count", "failed", "p50_s", "p99_s")}
    for row in stats["clients"]:
        counts = (
            "pid",
            "connections",
            "leases",
            "leased_bytes",
            "writes_open",
            "read_blocks",
            "written_blocks",
            "device_bytes",
        )
        shown |= {f"client.{row['id']}.{name}": row[name] for name in counts}
    for row in stats["prefixes"]:
        shown |= {f"prefix.{row['key']}.{name}": row[name] for name in ("tokens", "blocks", "bytes", "uses")}
    for number, row in enumerate(stats["namespaces"]):
        shown |= {f"namespace.{number}.{name}": row[name] for name in ("blocks", "bytes")}
    shown |= {f"what_if.{row['tier']}.{row['times']:g}": row["hit_share"] for row in stats["what_if"]}
    shown |= {f"pin.{row['key']}.{name}": row[name] for row in stats["pins"] for name in ("blocks", "bytes")}
    shown |= {f"queue.{row['queue']}.blocks": row["blocks"] for row in stats["queues"]}
    return shown | {f"saves_dropped.{reason}": blocks for reason, blocks in stats["saves_dropped"].items()}


@contextmanager
def serving(
    stats: Callable[[], dict[str, Any]] = document,
    *,
    metrics: Callable[[], str] = lambda: "",
    ready: Callable[[], str | None] = lambda: None,
    host: str = "127.0.0.1",
    port: int = 0,
) -> Iterator[int]:
    """A real server on a loop of its own, for as long as the block runs; gives its port."""
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever)
    thread.start()
    try:
        server = HttpServer(stats=stats, metrics=metrics, ready=ready)
        yield asyncio.run_coroutine_threadsafe(server.start(host, port), loop).result(30)
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
