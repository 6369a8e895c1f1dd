"""Stores and engines that share one daemon, in one process: one computes, another takes what it finds."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.daemon_parts import PATIENCE_S, until
from tests.engine_models import generate, tiny_model
from tierkv.assembly import open_store
from tierkv.config import Config, DaemonConfig, DeviceConfig, HostConfig, TransferConfig
from tierkv.connectors.engine import EngineConnector
from tierkv.engine import Engine, EngineConfig, SamplingParams
from tierkv.keys import Namespace, token_bytes
from tierkv.layout import Layout
from tierkv.match import Match
from tierkv.store import Store
from tierkv.transfers import HOST

LAYERED = Layout(num_layers=3, num_kv_heads=1, head_dim=8, dtype="float32", block_tokens=4)
STEP = LAYERED.block_tokens * 4
NAMESPACE = Namespace("test", LAYERED)
CHUNK = 16
NUM_TOKENS = 6
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
REFERENCE = tiny_model()


def prompt(num_blocks: int, *, number: int = 0) -> bytes:
    return token_bytes(range(1000 * number, 1000 * number + 4 * num_blocks))


def content(tokens: bytes, block: int) -> np.ndarray[Any, Any]:
    """What this block holds: a function of all tokens up to its end, as KV is."""
    seed = list(tokens[: (block + 1) * STEP])
    return np.frombuffer(np.random.default_rng(seed).bytes(LAYERED.block_bytes), np.uint8)


def config_with(url: str | None, layout: Layout, *, pages: int, host: int, **transfer: Any) -> Config:
    """Failures take the daemon out of use for a moment only."""
    return Config(
        device=DeviceConfig(capacity=pages * layout.block_bytes),
        host=HostConfig(capacity=host * layout.block_bytes),
        daemon=DaemonConfig(url=url, connect_s=PATIENCE_S, deadline_s=PATIENCE_S),
        transfer=TransferConfig(**({"down_s": 0.01, "load_deadline_s": PATIENCE_S} | transfer)),
    )


@contextmanager
def opened_store(url: str | None, *, pages: int = 64, host: int = 200, **transfer: Any) -> Iterator[Store]:
    store = open_store(config_with(url, LAYERED, pages=pages, host=host, **transfer), layout=LAYERED, model="test")
    try:
        yield store
    finally:
        store.close()


def found(store: Store, tokens: bytes) -> Match:
    search = store.search(tokens)
    until(lambda: search.ready, "the daemon answers")
    return store.take(search)


def compute(store: Store, tokens: bytes) -> None:
    """Serve a prompt whole and let it go; what is saved of it is on its way down."""
    match = found(store, tokens)
    match.remote = ()
    store.settle(match)
    fresh = store.allocate(len(tokens) // STEP - match.shared)
    assert fresh is not None
    table = [*match.lease.places(0, 0, match.shared), *fresh]
    for block in range(match.shared, len(table)):
        store.places.device.view(table[block])[:] = content(tokens, block).data
    taken = store.save(match, tokens, table)
    store.free([page for page, ok in zip(reversed(table), reversed(taken), strict=False) if not ok])
    store.release(match)


def in_host(store: Store, tokens: bytes) -> int:
    """Leading blocks of a prompt that the host holds, all of them as they should be."""
    with store.index.keep(store.root, tokens) as lease:
        held = lease.held(HOST, 0, lease.num_blocks)
        end = held[0][1] if held and held[0][0] == 0 else 0
        for block, place in enumerate(lease.places(HOST, 0, end)):
            assert bytes(store.places.host.view(place)) == content(tokens, block).tobytes(), "the host tier lies"
        return end


@dataclass
class Serving:
    """An engine over a store."""

    engine: Engine
    store: Store

    def ask(self, prompt: Sequence[int], **how: Any) -> dict[str, int]:
        """Serve a prompt, look at the tokens, and say where its KV came from."""
        name = self.engine.add(list(prompt), GREEDY, **how)
        return self.finish({name: prompt})[name]

    def finish(self, prompts: dict[str, Sequence[int]]) -> dict[str, dict[str, int]]:
        """Run until these requests have ended."""
        tokens: dict[str, list[int]] = {name: [] for name in prompts}
        sources: dict[str, dict[str, int]] = {}
        while len(sources) < len(prompts):
            for output in self.engine.step():
                tokens[output.request] += output.token_ids
                if output.stats:
                    sources[output.request] = dict(output.stats.sources)
        for name, prompt in prompts.items():
            assert tokens[name] == generate(REFERENCE, prompt, num_tokens=NUM_TOKENS)
        return sources


@contextmanager
def serving(url: str | None, *, pages: int = 60, host: int = 200, **transfer: Any) -> Iterator[Serving]:
    """An engine that computes sixteen tokens at a time."""
    stores: list[Store] = []

    def connect(layout: Layout, device: torch.device, model: str) -> EngineConnector:
        config = config_with(url, layout, pages=pages, host=host, **transfer)
        stores.append(open_store(config, layout=layout, model=model, device=device))
        return EngineConnector(stores[0])

    config = EngineConfig(block_tokens=LAYERED.block_tokens, max_batch_tokens=CHUNK, max_sequences=4)
    engine = Engine(tiny_model(), None, config, connector=connect)
    try:
        yield Serving(engine, stores[0])
    finally:
        engine.close()
        stores[0].close()
