"""Policies on real traces, through the real index: hit rates beside a simulator's leaf-LRU, and the price per block.

Folder of the traces: TIERKV_TRACES (Mooncake's FAST'25 release and an overlay of coding agents, as .jsonl.gz; fields
`timestamp`, `input_length`, `hash_ids` of 512-token blocks, chained). Full blocks only, cold start, capacity as a share of
the unique blocks; block hit rate = leading blocks found / all block references. The limits are figures of a C++ simulator
that was checked against libcachesim; its leaf-LRU is also what `lru` must reproduce to the block.
"""

import gzip
import json
import os
import time
from array import array
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tierkv.cost import CostModel
from tierkv.index import Index, TierSpec
from tierkv.keys import Key
from tierkv.policies import make

pytestmark = pytest.mark.filterwarnings("ignore::pytest_benchmark.logger.PytestBenchmarkWarning")  # rows timed here

ROOT = Key(b"t" * 32)
TRACE_BLOCK_TOKENS = 512
TRACES = {"conversation": "mooncake_conversation.jsonl.gz", "synthetic": "mooncake_synthetic.jsonl.gz"}
LEAF_LRU = {
    ("conversation", 5): 0.2022,
    ("conversation", 10): 0.2882,
    ("synthetic", 5): 0.1550,
    ("synthetic", 10): 0.2574,
}
COST = CostModel(block_tokens=TRACE_BLOCK_TOKENS, block_bytes=TRACE_BLOCK_TOKENS * 128 * 1024)


@cache
def requests(trace: str) -> tuple[list[bytes], int]:
    """Prompts as bytes, a token per block of the trace, and the number of unique blocks."""
    folder = os.environ.get("TIERKV_TRACES")
    if not folder:
        pytest.skip("TIERKV_TRACES is not set: the folder of the .jsonl.gz traces")
    prompts, unique = [], set()
    with gzip.open(Path(folder) / TRACES[trace]) as lines:
        for line in lines:
            request = json.loads(line)
            ids = request["hash_ids"][: request["input_length"] // TRACE_BLOCK_TOKENS]
            if ids:
                unique.update(ids)
                prompts.append(array("i", ids).tobytes())
    return prompts, len(unique)


def replay(prompts: list[bytes], capacity: int, policy: str) -> tuple[float, float, float]:
    """Block hit rate, share of the prefill seconds saved, and microseconds per block reference."""
    next_tier = 1 if policy == "cost" else None
    specs = [TierSpec("host", capacity, True, make(policy, tier=0, cost=COST, next_tier=next_tier))]
    index = Index(block_tokens=1, tiers=specs)
    references = hits = 0
    saved: dict[int, int] = {}
    start = time.perf_counter()
    for prompt in prompts:
        with index.acquire(ROOT, prompt) as lease:
            found = lease.num_blocks
            count = len(prompt) // 4
            hits += found
            references += count
            saved[found] = saved.get(found, 0) + 1
            room = index.reserve(0, count - found, at_least=0)
            assert room
            index.extend(lease, prompt[found * 4 : (found + room.count) * 4], tier=0, places=room.places)
    elapsed = time.perf_counter() - start
    index.check([])
    upto = [0.0]
    for depth in range(max(len(prompt) // 4 for prompt in prompts)):
        upto.append(upto[-1] + COST.recompute_s(depth))
    all_s = sum(upto[len(prompt) // 4] for prompt in prompts)
    return (
        hits / references,
        sum(upto[found] * times for found, times in saved.items()) / all_s,
        elapsed / references * 1e6,
    )


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("percent", [5, 10])
def test_replay(versus: Any, trace: str, percent: int) -> None:
    prompts, unique = requests(trace)
    lru_saved = 0.0
    for policy in ("lru", "lfu", "cost"):
        rate, saved, each_us = replay(prompts, round(unique * percent / 100), policy)
        each_us = min(each_us, *(replay(prompts, round(unique * percent / 100), policy)[2] for _ in range(2)))
        lru_saved = lru_saved or saved
        name = f"{policy}, {trace} at {percent} %"
        versus.add(f"{name}: block hit rate", rate, "share", "leaf-LRU simulator", LEAF_LRU[trace, percent])
        versus.add(f"{name}: prefill seconds saved", saved, "share", "lru", lru_saved)
        versus.add(f"{name}: per block reference", each_us, "us", "target", 5)
