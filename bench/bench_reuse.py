"""What a store notes of its lookups: how well sampled reuse distances agree with full simulation, and what all of it costs.

Folder of the traces: TIERKV_TRACES, as in bench_policies.py. The error is the largest of all capacities and of four samples of
the blocks, in points of the hit rate, beside the one point that is allowed.
"""

import os
import time
from array import array
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tierkv.cost import CostModel
from tierkv.hints import NO_ENDING, NO_HINTS
from tierkv.index import Index, TierSpec
from tierkv.keys import Namespace
from tierkv.layout import Layout
from tierkv.lookups import Lookups, Sources
from tierkv.metrics import Metrics
from tierkv.policies.lru import LruPolicy
from tierkv.reuse_distance import SAMPLES, Namer, ReuseDistances, mixed
from tierkv.simulate.cells import capacities
from tierkv.simulate.oracle import Oracle
from tierkv.simulate.replay import replay
from tierkv.simulate.spool import Spool
from tierkv.simulate.traces import open_trace

pytestmark = pytest.mark.filterwarnings("ignore::pytest_benchmark.logger.PytestBenchmarkWarning")  # rows timed here

TRACES = ("mooncake_conversation", "mooncake_synthetic", "claude_code_a")
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
SEEDS = range(4)
LAYOUT = Layout(num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32", block_tokens=16)
NAMESPACE = Namespace("m", LAYOUT)


@cache
def simulated(name: str) -> tuple[Spool, list[int], list[float]]:
    """A trace, capacities, and what leaf-first LRU hits at each."""
    folder = os.environ.get("TIERKV_TRACES")
    if not folder:
        pytest.skip("TIERKV_TRACES is not set: the folder of the .jsonl.gz traces")
    trace, cost = open_trace(Path(folder) / f"{name}.jsonl.gz"), CostModel(block_tokens=512, block_bytes=1 << 26)
    unique = Oracle(trace, cost=cost).num_unique
    sizes = capacities(SHARES, unique)
    cells = [replay(trace, policy="lru", capacity_blocks=size, unique_blocks=unique, cost=cost) for size in sizes]
    return trace, sizes, [cell.block_hit_rate for cell in cells]


@pytest.mark.parametrize("name", TRACES)
@pytest.mark.parametrize("samples", [SAMPLES // 4, SAMPLES // 2, SAMPLES])
def test_error(versus: Any, name: str, samples: int) -> None:
    trace, sizes, exact = simulated(name)
    worst = 0.0
    for seed in SEEDS:
        distances = ReuseDistances(max_blocks=1 << 30, samples=samples, window_refs=1 << 40)
        for request in trace:
            distances.refer(mixed(np.frombuffer(request.blocks, "<u8") ^ np.uint64(seed << 40)))
        worst = max(worst, *np.abs(np.subtract(distances.hit_shares(sizes), exact)).tolist())
    versus.add(f"largest error, {name}, {samples:,} samples", 100 * worst, "points", "allowed", 1.0)


def prompts(count: int) -> Iterator[bytes]:
    """Conversations of 16-token blocks, 200 to 2,000 tokens a turn, that share a beginning."""
    rng = np.random.default_rng(0)
    system = rng.integers(0, 50_000, 1024, dtype="<i4").tobytes()
    chats = [system] * 50
    for _ in range(count):
        at = int(rng.integers(len(chats)))
        chats[at] += rng.integers(0, 50_000, int(rng.integers(200, 2000)), dtype="<i4").tobytes()
        yield chats[at]
        if len(chats[at]) > 4 * 16_000:
            chats[at] = system


def test_distances_per_block(versus: Any) -> None:
    given = list(prompts(2000))
    blocks = sum(len(tokens) // 64 for tokens in given)
    namer, best = Namer(block_tokens=16), float("inf")
    for _ in range(3):
        distances = ReuseDistances(max_blocks=1 << 20)
        start = time.process_time()
        for tokens in given:
            distances.refer(namer.names(tokens)[0])
        distances.hit_shares([1])
        best = min(best, time.process_time() - start)
    versus.add("names and distances, per 16-token block", best / blocks * 1e6, "us", "target", 0.3)


def test_begin_of_a_lookup(versus: Any) -> None:
    """On the scheduling thread: beside the index's own search, for prompts that are found in part."""
    index = Index(block_tokens=16, tiers=[TierSpec("host", 20_000, True, LruPolicy(tier=0))], history_blocks=20_000)
    root = NAMESPACE.root()
    lookups = Lookups(
        root=root,
        block_tokens=16,
        sources=Sources(index.explain, index.roots, ("host",), NAMESPACE.fields()),
        capacities={"host": 20_000},
        metrics=Metrics(),
        submit=lambda job: True,
    )
    begin_s, acquire_s, blocks = array("d"), array("d"), 0
    for tokens in prompts(2000):
        start = time.perf_counter()
        lease = index.acquire(root, tokens)
        acquire_s.append(time.perf_counter() - start)
        start = time.perf_counter()
        lookup = lookups.begin(tokens, num_loadable=lease.num_blocks, hints=NO_HINTS)
        lookups.end(lookup, NO_ENDING)
        begin_s.append(time.perf_counter() - start)
        count, found = len(tokens) // 64, lease.num_blocks
        room = index.reserve(0, count - found, at_least=0)
        assert room
        index.extend(lease, tokens[found * 64 : (found + room.count) * 64], tier=0, places=room.places)
        lease.release()
        blocks += count
    mean = blocks / len(begin_s)
    name = f"begin and end of a lookup, prompts of {mean:.0f} blocks"
    versus.add(name, float(np.median(begin_s)) * 1e6, "us", "index.acquire", float(np.median(acquire_s)) * 1e6)
