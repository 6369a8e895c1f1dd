"""What the store costs an engine that gains nothing from it, and whether what comes back is what was there.

A Llama 3.2 1B with random weights; the last part, where tokens are compared one by one, a smaller one in float32.
"""

import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch

from tierkv.engine import Engine, SamplingParams
from tierkv.keys import token_bytes
from tierkv.measure.lab import Lab, Tensor
from tierkv.measure.moves import exact
from tierkv.measure.transfers import PAGES, Ground, ground
from tierkv.measure.transfers import TINY as TINY_PAGE
from tierkv.store import Store
from tierkv.transfers import DEVICE

from .model import leave_only
from .serving import (
    LLAMA_1B,
    SMALL,
    TINY,
    Shape,
    decoding,
    llama,
    plain,
    prompts,
    seconds_per_step,
    stop,
    stored,
)

GOAL_SPILLING: Final = 0.97
GOAL_NO_REUSE: Final = 0.98
ROUNDS: Final = 4
OF: Final = "Llama 3.2 1B"


def run(lab: Lab) -> None:
    shape = lab.pick(LLAMA_1B, TINY)
    model = llama(lab, shape, torch.bfloat16)
    with lab.attempt(f"{OF}, the store without reuse"):
        no_reuse(lab, model, shape)
    with lab.attempt(f"{OF}, decode while spilling"):
        spilling(lab, model, shape)
    del model
    for groups in (1, 2):
        with lab.attempt(f"the same bytes and tokens from the host, layer groups: {groups}"):
            identity(lab, None, layer_groups=groups)
    if find_spec("zarr"):
        with (
            lab.attempt("the same bytes and tokens from disk"),
            tempfile.TemporaryDirectory(prefix="tierkv-") as folder,
        ):
            identity(lab, Path(folder) / "kv")
    else:
        lab.absent("the same bytes and tokens from disk", "zarr is not installed")


def no_reuse(lab: Lab, model: Any, shape: Shape) -> None:
    """Prompts that nobody has seen, on an engine with a store and on one without, in turn."""
    batch, length, answer = lab.pick((32, 512, 128), (2, 20, 3))
    room = lab.pick(2 << 30, 1 << 17)  # full after some rounds: from then on, every page is one that was forgotten
    options = {"max_batch_tokens": lab.pick(8192, 32), "max_sequences": batch}
    params = SamplingParams(max_tokens=answer, ignore_eos=True)
    with (
        plain(lab, model, pool_bytes=room, **options) as off,
        stored(lab, model, device_bytes=room, host_bytes=2 * room, **options) as (on, store),
    ):
        taken: dict[Engine, list[float]] = {off: [], on: []}
        for number in range(1 + lab.pick(ROUNDS, 1)):
            for engine, times in taken.items():
                given = prompts(lab, shape, batch, length)
                start = time.perf_counter()
                engine.generate(given, params)
                if number:
                    times.append(time.perf_counter() - start)
        if set(on.stats.sources) != {"computed"}:
            raise RuntimeError(f"prompts should have been computed, and came from {on.stats.sources}")
        saved = store.metrics.blocks_spilled.value("device", "host")
    tokens = batch * (length + answer)
    with_store, without = (tokens / statistics.median(taken[engine]) for engine in (on, off))
    lab.add(
        f"{OF}, {batch} x ({length} + {answer}) tokens, never reused",
        with_store,
        "tok/s",
        limit_name="store off",
        limit=without,
        goal=GOAL_NO_REUSE,
        rounds=len(taken[on]),
        blocks_saved=saved,
    )


def spilling(lab: Lab, model: Any, shape: Shape) -> None:
    """Decode steps, beside a thread that copies scattered pages to the host as fast as it can, and without it, in turn."""
    batch, context, steps = lab.pick((32, 1024, 40), (2, 20, 2))
    room = batch * (context + 4 * 2 * steps + 256) * shape.kv_token_bytes
    quiet: list[float] = []
    busy: list[float] = []
    with (
        plain(lab, model, pool_bytes=room, max_batch_tokens=lab.pick(8192, 32), max_sequences=batch) as engine,
        ground(lab, lab.pick(PAGES["2 MiB"], TINY_PAGE)) as on,
    ):
        turns = lab.pick(4, 1)
        requests = decoding(engine, prompts(lab, shape, batch, context), steps=(2 * turns + 1) * steps)
        seconds_per_step(engine, steps)
        copied, spilled_s = 0, 0.0
        for _ in range(turns):
            quiet += seconds_per_step(engine, steps)
            with spill(on, lab.pick(64, 5)) as progress:
                start = time.perf_counter()
                busy += seconds_per_step(engine, steps)
                spilled_s += time.perf_counter() - start
            copied += progress[0]
        stop(engine, requests)
    lab.add(
        f"{OF}, decode {batch} x {context} while spilling at {copied / spilled_s / 1e9:.1f} GB/s",
        batch / statistics.median(busy),
        "tok/s",
        limit_name="without spilling",
        limit=batch / statistics.median(quiet),
        goal=GOAL_SPILLING,
        rounds=len(busy),
    )


@contextmanager
def spill(on: Ground, count: int) -> Iterator[list[int]]:
    """A thread that copies to the host, as one of the mover's does; yields the bytes it has copied."""
    copied, ended = [0], threading.Event()
    sets = on.scattered(count)

    def copy() -> None:
        while not ended.is_set():
            for some in sets:
                on.save(some)  # its mark is old: none of the copies waits for a step
                copied[0] += count * on.block_bytes

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        yield copied
    finally:
        ended.set()
        thread.join()


def identity(lab: Lab, disk: Path | None, *, layer_groups: int = 1) -> None:
    """KV after device -> host (-> disk -> host) -> device, byte for byte, and the tokens of greedy answers."""
    shape, tier = lab.pick(SMALL, TINY), "disk" if disk else "host"
    batch, length, answer = lab.pick((6, 1500, 32), (2, 40, 4))
    room = 4 * batch * (length + answer + 32) * shape.kv_token_bytes  # in float32, and to spare
    model = llama(lab, shape, torch.float32)
    with stored(
        lab,
        model,
        device_bytes=room,
        host_bytes=room,
        disk=disk,
        layer_groups=layer_groups,
        dtype="float32",
        max_batch_tokens=lab.pick(2048, 32),
        max_sequences=batch,
    ) as (engine, store):
        serve = partial(engine.generate, params=SamplingParams(max_tokens=answer, ignore_eos=True))
        given = prompts(lab, shape, batch, length)
        cold = [output.token_ids for output in serve(given)]
        before = [pages_of(store, prompt) for prompt in given]
        leave_only(store, tier)
        store.places.device.pool.fill_(float("nan"))  # of which nothing is known any more
        if disk:
            store.places.host.rows.fill(0xA5)
        outputs = serve(given)
        if any(output.stats.sources.get(tier, 0) < length - 2 * store.layout.block_tokens for output in outputs):
            raise RuntimeError(f"prompts should have come from {tier}: {[dict(o.stats.sources) for o in outputs]}")
        for prompt, pages in zip(given, before, strict=True):
            exact(pages_of(store, prompt)[: len(pages)], pages)
    num_blocks = sum(map(len, before))
    source = tier if layer_groups == 1 else f"{tier} in {layer_groups} layer groups"
    lab.add(f"KV back from {source}", num_blocks, "blocks", limit_name="equal bytes", limit=num_blocks, goal=1.0)
    same = sum(
        a == b for one, other in zip(cold, outputs, strict=True) for a, b in zip(one, other.token_ids, strict=True)
    )
    lab.add(
        f"greedy tokens after KV from {source}",
        same,
        "tokens",
        limit_name="the cold run's",
        limit=batch * answer,
        goal=1.0,
    )
    if same < batch * answer:
        raise ArithmeticError(
            f"wrong: {batch * answer - same} of {batch * answer} greedy tokens differ from the cold run's"
        )


def pages_of(store: Store, prompt: list[int]) -> Tensor:
    """A copy of the device pages that hold a prompt's full blocks."""
    match = store.take(store.search(token_bytes(prompt)))
    pages = match.lease.places(DEVICE, 0, match.shared)
    copy = store.places.device.pool[list(pages)].clone()
    store.release(match)
    if len(pages) < len(prompt) // store.layout.block_tokens:
        raise RuntimeError(f"{len(pages)} blocks of a prompt of {len(prompt)} tokens lie on the device")
    return copy
