"""Policies on real traces, through the real index: hit rates beside another simulator's, and the price per block.

Folder of the traces: TIERKV_TRACES (Mooncake's FAST'25 release and an overlay of coding agents, as .jsonl.gz). Full blocks
only, cold start, capacity as a share of the unique blocks. The limits of `lru` and `belady` are figures of a C++ simulator that
was checked against libcachesim; the others' is lru in the same run. `bench/hit_rate/` has all cells and their plots.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tierkv.cost import CostModel
from tierkv.policies import NAMES
from tierkv.simulate.cells import BELADY, Cell, aggregate, capacities
from tierkv.simulate.oracle import Oracle
from tierkv.simulate.replay import replay
from tierkv.simulate.spool import Spool
from tierkv.simulate.traces import open_trace

pytestmark = pytest.mark.filterwarnings("ignore::pytest_benchmark.logger.PytestBenchmarkWarning")  # rows timed here

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
TRACES = ("mooncake_conversation", "mooncake_synthetic", "claude_code_a")
KNOWN = {  # leaf-LRU and Belady at SHARES
    "mooncake_conversation": ((0.0544, 0.0801, 0.2022, 0.2882, 0.3585), (0.2501, 0.3206, 0.3819, 0.3819, 0.3819)),
    "mooncake_synthetic": ((0.0370, 0.0775, 0.1550, 0.2574, 0.3952), (0.1820, 0.2589, 0.3925, 0.5098, 0.6148)),
}
COST = CostModel(block_tokens=512, block_bytes=512 * 128 * 1024)
TARGET_US = {"lru": 2.0}  # 500,000 blocks a second; the others 100,000
OTHERS_US = 10.0


@cache
def opened(name: str) -> tuple[Spool, Oracle]:
    folder = os.environ.get("TIERKV_TRACES")
    if not folder:
        pytest.skip("TIERKV_TRACES is not set: the folder of the .jsonl.gz traces")
    trace = open_trace(Path(folder) / f"{name}.jsonl.gz")
    return trace, Oracle(trace, cost=COST)


@cache
def cells(name: str, policy: str) -> list[Cell]:
    trace, oracle = opened(name)
    sizes = capacities(SHARES, oracle.num_unique)
    if policy == BELADY:
        return [oracle.belady(size) for size in sizes]
    return [
        replay(trace, policy=policy, capacity_blocks=size, unique_blocks=oracle.num_unique, cost=COST) for size in sizes
    ]


@pytest.mark.parametrize("name", TRACES)
@pytest.mark.parametrize("policy", [*NAMES, BELADY])
def test_replay(versus: Any, name: str, policy: str) -> None:
    lru, found = cells(name, "lru"), cells(name, policy)
    for at, (cell, base) in enumerate(zip(found, lru, strict=True)):
        title = f"{policy}, {name} at {SHARES[at]:.0%}"
        limit_name, limit = "lru", base.block_hit_rate
        if policy in ("lru", BELADY) and name in KNOWN:
            limit_name, limit = "another simulator", KNOWN[name][policy == BELADY][at]
        versus.add(f"{title}: block hit rate", cell.block_hit_rate, "share", limit_name, limit)
        versus.add(
            f"{title}: prefill seconds saved", cell.seconds_saved_share, "share", "lru", base.seconds_saved_share
        )
    each_us = sum(cell.us_per_ref for cell in found) / len(found)
    versus.add(f"{policy}, {name}: per block", each_us, "us", "target", TARGET_US.get(policy, OTHERS_US))


@pytest.mark.parametrize("policy", NAMES)
def test_gap_closed(versus: Any, policy: str) -> None:
    for over in ("block_hit_rate", "seconds_saved_share"):
        closed = [
            aggregate([*cells(name, "lru"), *cells(name, BELADY), *cells(name, policy)], over=over)[policy]
            for name in TRACES
        ]
        mean = sum(closed) / len(closed)
        versus.add(f"{policy}: gap between lru and belady closed, {over}", mean, "share", "all of it", 1.0)


@pytest.mark.parametrize("name", TRACES)
def test_reading(versus: Any, name: str) -> None:
    """A trace is parsed once, and read from the spool for every cell."""
    path = Path(os.environ.get("TIERKV_TRACES") or "") / f"{name}.jsonl.gz"
    trace, _ = opened(name)

    def read() -> None:
        assert sum(request.num_blocks for request in trace) == trace.totals.block_refs

    refs = trace.totals.block_refs
    versus(f"read {name} again", read, "parse it", lambda: open_trace(path).close(), unit="us", amount=refs, rounds=3)
