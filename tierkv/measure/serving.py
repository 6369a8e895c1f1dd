"""Llamas with random weights, built on the device from a config, and engines over them: nothing is downloaded."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from tierkv.assembly import open_store
from tierkv.config import Config, DeviceConfig, DiskConfig, HostConfig, TransferConfig
from tierkv.connectors.engine import EngineConnector
from tierkv.engine import Engine, EngineConfig, SamplingParams
from tierkv.measure.lab import Lab
from tierkv.store import Store

Prompts = list[list[int]]
PIN_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama. name: what it is the size of."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def kv_token_bytes(self) -> int:
        """In bf16."""
        return self.layers * 2 * self.kv_heads * (self.hidden // self.heads) * 2


LLAMA_8B: Final = Shape("Llama 3 8B", 4096, 14336, 32, 32, 8, 128256)
LLAMA_1B: Final = Shape("Llama 3.2 1B", 2048, 8192, 16, 32, 8, 128256)
SMALL: Final = Shape("small", 1024, 2816, 8, 16, 4, 32000)
TINY: Final = Shape("tiny", 32, 48, 2, 4, 2, 96)


def llama_config(shape: Shape) -> Any:  # Any: transformers is untyped here
    """No token ends a text."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def llama(lab: Lab, shape: Shape, dtype: torch.dtype, *, seed: int = 0) -> Any:
    """A causal LM on the lab's device."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(lab.device):
        model = AutoModelForCausalLM.from_config(llama_config(shape), dtype=dtype)  # type: ignore[no-untyped-call]  # transformers'
    return model.eval().requires_grad_(False)


def prompts(shape: Shape, count: int, length: int) -> Prompts:
    """Random tokens, others at every call: nothing is found by chance."""
    return np.random.default_rng().integers(2, shape.vocabulary, (count, length)).tolist()  # type: ignore[no-any-return]


@contextmanager
def plain(lab: Lab, model: Any, *, pool_bytes: int, **options: Any) -> Iterator[Engine]:
    """An engine that keeps nothing between requests. options: of EngineConfig."""
    with Engine(model, None, EngineConfig(device=lab.device.type, pool_bytes=pool_bytes, **options)) as engine:
        yield engine


@contextmanager
def stored(
    lab: Lab,
    model: Any,
    *,
    device_bytes: int,
    host_bytes: int,
    disk: Path | None = None,
    copy_down: str = "save",
    layer_groups: int = 1,
    **options: Any,
) -> Iterator[tuple[Engine, Store]]:
    """An engine over a store with a device and a host tier, and one on disk; host memory is pinned when it begins."""
    config = Config(
        device=DeviceConfig(capacity=device_bytes),
        host=HostConfig(capacity=host_bytes, copy_down=copy_down),
        disk=DiskConfig(path=disk, capacity=2 * host_bytes + (64 << 20)),
        transfer=TransferConfig(layer_groups=layer_groups),
    )
    stores: list[Store] = []
    with ExitStack() as opened:

        def connect(layout: Any, device: torch.device, identity: str) -> EngineConnector:
            stores.append(open_store(config, layout=layout, model=identity, device=device))
            opened.callback(stores[0].close)
            return EngineConnector(stores[0])

        engine = Engine(model, None, EngineConfig(device=lab.device.type, **options), connector=connect)
        opened.enter_context(engine)
        if not lab.rehearsing:
            wait_pinned(stores[0])
        yield engine, stores[0]


def wait_pinned(store: Store) -> None:
    """What is pinned in the background would disturb what is measured, and what is not would be slow."""
    end = time.monotonic() + PIN_TIMEOUT_S
    while not store.places.host.pinned:
        if time.monotonic() > end:
            raise RuntimeError(f"the host slab was not pinned within {PIN_TIMEOUT_S:.0f} s: see the warnings above")
        time.sleep(0.02)


def decoding(engine: Engine, batch: Prompts, *, steps: int) -> list[str]:
    """Requests that all decode by now, and will for `steps` steps more."""
    prefill = sum(map(len, batch)) // engine.config.max_batch_tokens + len(batch)
    params = SamplingParams(max_tokens=steps + prefill + 8, ignore_eos=True)
    requests = [engine.add(prompt, params) for prompt in batch]
    waiting = set(requests)
    while waiting:
        waiting -= {output.request for output in engine.step()}
    return requests


def seconds_per_step(engine: Engine, steps: int) -> list[float]:
    """Of each step, from its beginning until the host has its tokens."""
    taken = []
    for _ in range(steps):
        start = time.perf_counter()
        engine.step()
        taken.append(time.perf_counter() - start)
    return taken


def stop(engine: Engine, requests: Sequence[str]) -> None:
    """Give up requests that still decode."""
    for request in requests:
        engine.abort(request)
