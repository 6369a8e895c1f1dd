"""Several engines on one card: each has pages, streams and pinned memory of its own, and one that ends takes nothing else along.

The card is a fake one, which counts what is registered and what streams and events are held; engines, stores and the mover's
threads are real. What kernels do is done at once, copies are late.
"""

import gc
import logging
import resource
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from tests.device_parts import cuda_pool, put_under
from tests.engine_models import random_prompts, reference, tiny_model
from tierkv.assembly import open_store
from tierkv.config import Config, HostConfig, TransferConfig
from tierkv.connectors.engine import EngineConnector
from tierkv.engine import Engine, EngineConfig, SamplingParams
from tierkv.layout import Layout
from tierkv.store import Store
from tierkv.testing.cuda import FakeCuda
from tierkv.transfers import DEVICE

BLOCK, PAGES, NUM_TOKENS = 4, 24, 8
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
MINE, YOURS, OTHERS = random_prompts([41, 30]), random_prompts([45, 26], seed=1), random_prompts([70], seed=2)


@dataclass
class Tenant:
    """One of the engines on the card."""

    model: Any
    engine: Engine
    store: Store

    def serve(self, prompts: Sequence[list[int]]) -> dict[str, int]:
        """Ask, look at the tokens, and say where prompts came from."""
        before = dict(self.engine.stats.sources)
        outputs = self.engine.generate(list(prompts), GREEDY)
        assert [list(output.token_ids) for output in outputs] == truth(prompts)
        self.store.mover.drain()
        return {name: count - before.get(name, 0) for name, count in self.engine.stats.sources.items()}

    def close(self) -> None:
        self.engine.close()
        self.store.close()

    def addresses(self) -> range:
        """Of its host memory."""
        rows = self.store.places.host.rows
        return range(rows.ctypes.data, rows.ctypes.data + rows.nbytes)


def truth(prompts: Sequence[list[int]]) -> list[list[int]]:
    return [list(tokens_of(tuple(prompt))) for prompt in prompts]


@cache
def tokens_of(prompt: tuple[int, ...]) -> tuple[int, ...]:
    (tokens,) = reference(tiny_model(), [prompt], num_tokens=NUM_TOKENS)
    return tuple(tokens)


def tenant(cuda: FakeCuda, *, groups: int = 1) -> Tenant:
    """An engine over a store whose pages are on the card."""
    stores: list[Store] = []

    def connect(layout: Layout, device: torch.device, identity: str) -> EngineConnector:
        config = Config(
            host=HostConfig(capacity=200 * layout.block_bytes), transfer=TransferConfig(layer_groups=groups)
        )
        store = open_store(config, layout=layout, model=identity, device=device, pool_bytes=PAGES * layout.block_bytes)
        put_under(store, cuda_pool(cuda, layout=layout, num_pages=PAGES))
        for _ in store.places.host.pin(cuda.host_register, cuda.host_unregister):
            pass
        stores.append(store)
        return EngineConnector(store)

    model = tiny_model()
    config = EngineConfig(block_tokens=BLOCK, max_batch_tokens=16, max_sequences=4)
    return Tenant(model, Engine(model, None, config, connector=connect), stores[0])


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    """A card on which nothing is left when the test has ended."""
    cuda = FakeCuda(Random(0).randrange)
    yield cuda
    gc.collect()
    cuda.run_all()
    assert cuda.pinned == {}, "host memory is left registered"
    assert len(cuda.streams) == 1, "streams other than torch's own are left"
    assert cuda.num_events == 0, "events are left"


@contextmanager
def two(cuda: FakeCuda, *, groups: int = 1) -> Iterator[tuple[Tenant, Tenant]]:
    one, other = tenant(cuda, groups=groups), tenant(cuda, groups=groups)
    try:
        yield one, other
    finally:
        one.close()
        other.close()


@pytest.mark.parametrize("groups", [1, 3])
def test_engines_in_turn_serve_each_their_own(cuda: FakeCuda, groups: int) -> None:
    with two(cuda, groups=groups) as (one, other):
        tokens: dict[str, list[int]] = {}
        asked = [(one, MINE), (other, YOURS), (one, OTHERS), (other, OTHERS), (one, MINE), (other, YOURS)]
        for number, (who, prompts) in enumerate(asked):
            names = [who.engine.add(prompt, GREEDY, request_id=f"{number}-{i}") for i, prompt in enumerate(prompts)]
            tokens |= {name: [] for name in names}
            if number % 2:  # both have work: a step of one, a step of the other
                while one.engine.has_work or other.engine.has_work:
                    for engine in (one.engine, other.engine):
                        for output in engine.step() if engine.has_work else ():
                            tokens[output.request] += output.token_ids
        for number, (_, prompts) in enumerate(asked):
            assert [tokens[f"{number}-{i}"] for i in range(len(prompts))] == truth(prompts)
        for who in (one, other):
            assert who.engine.stats.sources["host"] >= 40, "nothing has moved"


def test_the_pages_of_a_closed_engine_go_without_the_collector_of_cycles(cuda: FakeCuda) -> None:
    """Or the next engine finds the card full."""
    who = tenant(cuda)
    who.serve(MINE)
    pages = weakref.ref(who.store.places.device.pool)
    gc.disable()
    try:
        who.close()
        store = who.store  # somebody looks at its metrics still
        del who
        assert pages() is None
        assert store.metrics.blocks_spilled.value("device", "host") > 0
    finally:
        gc.enable()


def step_that_raises(who: Tenant, cuda: FakeCuda) -> None:
    """In the middle of a step, between two layers, with other requests loading and saving."""

    def fault(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    who.engine.add(OTHERS[0], GREEDY)
    who.engine.step()
    who.engine.add(MINE[0], GREEDY)
    who.model.model.layers[1].register_forward_pre_hook(fault)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        while who.engine.has_work:
            who.engine.step()


def mover_that_dies_saving(who: Tenant, cuda: FakeCuda) -> None:
    """A copy to the host raises what nobody expects, in the middle of a call."""
    cuda.fault, cuda.fail_after = MemoryError, 1
    who.serve(OTHERS)


def mover_that_dies_loading(who: Tenant, cuda: FakeCuda) -> None:
    """A copy from the host does: what it was to bring is computed."""
    who.serve(OTHERS)
    cuda.fault, cuda.fail_after = MemoryError, 1
    who.serve(MINE)


def work_that_is_left(who: Tenant, cuda: FakeCuda) -> None:
    """Nothing goes wrong: it is closed while it computes, loads and saves."""
    who.engine.add(OTHERS[0], GREEDY)
    who.engine.step()
    who.engine.add(MINE[0], GREEDY)
    who.engine.step()


DEATHS = [step_that_raises, mover_that_dies_saving, mover_that_dies_loading, work_that_is_left]


@pytest.mark.parametrize("die", DEATHS)
def test_an_engine_that_dies_leaves_nothing_and_the_other_goes_on(
    die: Callable[[Tenant, FakeCuda], None], cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("tierkv"), "propagate", False)  # pytest keeps records, and with them frames
    with two(cuda) as (one, other):
        one.serve(MINE)
        other.serve(YOURS)
        streams = {stream.number for stream in cuda.streams}
        die(one, cuda)
        assert cuda.failed == ("mover" in die.__name__), "the fault was not met"
        theirs = other.addresses()
        one.engine.close()
        if die is not work_that_is_left:  # its transfers go on while it is closed
            one.store.mover.drain()
            one.store.index.check()
            one.store.evict_device()
            assert one.store.index.room(DEVICE)[0] == PAGES, "pages are lost"
        one.store.close()
        gc.collect()
        assert cuda.pinned and all(address in theirs for address in cuda.pinned), "the other's alone are left"
        assert {stream.number for stream in cuda.streams} < streams, "it leaves streams"
        other.serve(OTHERS)  # pushes its own prompts out of the device
        found = other.serve(YOURS)
        assert found["host"] >= 40
        other.store.index.check()


# -- a process that is killed --------------------------------------------------------------------------------------------

LOCKED = 6 << 20  # what most machines let anybody lock
VICTIM = """
import ctypes, sys
from tierkv.tiers.host import HostSlab

libc = ctypes.CDLL(None, use_errno=True)

def register(address, size):
    if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)):
        raise OSError(ctypes.get_errno(), "mlock")

slab = HostSlab(num_places=int(sys.argv[1]) >> 20, block_bytes=1 << 20, piece_bytes=2 << 20)
for _ in slab.pin(register, lambda address: None):
    pass
print(slab.pinned_bytes, flush=True)
sys.stdin.read()
"""


def locked_memory() -> int:
    """Bytes that nobody may page out, of the whole machine."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Mlocked:"))


@pytest.mark.skipif(
    0 <= resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] < LOCKED, reason="less memory may be locked here: ulimit -l"
)
def test_memory_that_a_killed_process_had_locked_comes_back() -> None:
    """`mlock` stands in for cudaHostRegister: both hold pages for a process, and nobody in it runs at kill -9."""
    before = locked_memory()
    command = [sys.executable, "-c", VICTIM, str(LOCKED)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as victim:
        try:
            assert victim.stdout is not None and int(victim.stdout.readline()) == LOCKED
            assert locked_memory() - before > LOCKED * 0.9
        finally:
            victim.kill()
    assert victim.returncode == -9
    assert locked_memory() - before < LOCKED * 0.1
