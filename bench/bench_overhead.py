"""What the store costs an engine that never finds anything: the same work with the store on and off, in turn."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tierkv.assembly import open_store
from tierkv.config import Config, DeviceConfig, DiskConfig, HostConfig
from tierkv.connectors.engine import EngineConnector
from tierkv.engine import Engine, EngineConfig, SamplingParams, loading
from tierkv.store import Store

PROMPT_TOKENS, OUTPUT_TOKENS, BATCH = 384, 24, 4
CAPACITY = 512 << 20


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    torch.set_num_threads(1)
    yield loading.load("smollm2", EngineConfig(dtype="bfloat16"))[0]


def serve(engine: Engine, random: np.random.Generator) -> None:
    prompts = random.integers(2, 40000, (BATCH, PROMPT_TOKENS)).tolist()
    engine.generate(prompts, SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True))


@pytest.mark.parametrize("tiers", ["host", "host and disk"])
def test_no_reuse(versus: Any, model: Any, tiers: str, tmp_path: Path) -> None:
    stores: list[Store] = []
    disk = DiskConfig(path=tmp_path / "kv" if tiers != "host" else None, capacity=CAPACITY)
    config = Config(device=DeviceConfig(capacity=CAPACITY), host=HostConfig(capacity=CAPACITY), disk=disk)

    def connect(layout: Any, device: Any, identity: str) -> EngineConnector:
        stores.append(open_store(config, layout=layout, model=identity, device=device))
        return EngineConnector(stores[0])

    random = np.random.default_rng(0)
    options = EngineConfig(dtype="bfloat16", pool_bytes=CAPACITY, max_batch_tokens=512)
    with Engine(model, None, options) as off, Engine(model, None, options, connector=connect) as on:
        versus(
            f"{BATCH} x ({PROMPT_TOKENS} + {OUTPUT_TOKENS}) tokens, saving to {tiers}",
            lambda: serve(on, random),
            "store off",
            lambda: serve(off, random),
            unit="ms",
            amount=1,
            rounds=9,
        )
        assert stores[0].metrics.blocks_spilled.value("device", "host") > 0
        assert set(on.stats.sources) == {"computed"}
    stores[0].close()
