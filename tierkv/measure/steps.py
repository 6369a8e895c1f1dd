"""What a step of an engine takes: alone, against what memory allows; with a store that is of no use; beside copies to the host.

Models have random weights: speed does not depend on what they say.
"""

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from tierkv.engine import Engine, SamplingParams
from tierkv.measure.lab import Lab
from tierkv.measure.serving import Shape, decoding, plain, prompts, seconds_per_step, stop, stored
from tierkv.measure.transfers import PAGES, Ground, ground, lanes
from tierkv.measure.transfers import TINY as TINY_PAGE

GOAL_STEP: Final = 0.6  # of the time that reading weights and KV takes; larger batches are reported
GOAL_NO_REUSE: Final = 0.98
GOAL_SPILLING: Final = 0.97
WARM: Final = 8  # steps of a batch that are not counted
ROUNDS: Final = 4
Rates = dict[int, float]
"""Tokens a second, by batch."""


def sizes(lab: Lab) -> tuple[tuple[int, ...], int]:
    """Batches whose decode steps are measured, and the context of their sequences."""
    return lab.pick(((1, 64), 2048), ((1, 3), 24))


def run_decode(lab: Lab, model: Any, shape: Shape) -> Rates:  # Any: a transformers model
    """Decode steps of one sequence and of many."""
    rates: Rates = {}
    with lab.attempt(f"{shape.name}, decode"):
        decode(lab, model, shape, rates)
    return rates


def run_beside(lab: Lab, model: Any, shape: Shape) -> None:  # Any: as above
    """The store without reuse, and decode steps while pages are copied to the host."""
    with lab.attempt(f"{shape.name}, the store without reuse"):
        no_reuse(lab, model, shape)
    with lab.attempt(f"{shape.name}, decode while spilling"):
        spilling(lab, model, shape)


def decode(lab: Lab, model: Any, shape: Shape, rates: Rates) -> None:  # Any: as above
    """A step with its sampling, until the tokens are on the host; into `rates` as they are measured."""
    batches, context = sizes(lab)
    steps = lab.pick(48, 2)
    # The rows of the embedding that a step looks up are nothing beside the rest, all of which it reads.
    weights = sum(parameter.nbytes for parameter in model.parameters()) - model.get_input_embeddings().weight.nbytes
    room = max(batches) * (context + steps + WARM + 128)
    with plain(
        lab,
        model,
        pool_bytes=room * shape.kv_token_bytes,
        max_batch_tokens=lab.pick(8192, 32),
        max_sequences=max(batches),
    ) as engine:
        for batch in batches:
            requests = decoding(engine, prompts(shape, batch, context), steps=steps + WARM)
            seconds_per_step(engine, WARM)
            step_s = statistics.median(seconds_per_step(engine, steps))
            stop(engine, requests)
            rates[batch] = batch / step_s
            kv = batch * (context + WARM + steps // 2) * shape.kv_token_bytes
            lab.add(
                f"{shape.name}, decode {batch} x {context}",
                rates[batch],
                "tok/s",
                limit_name="weights + KV at copy bandwidth",
                limit=batch * lab.copy_gbps() * 1e9 / (weights + kv),
                goal=GOAL_STEP if batch == 1 else None,
                rounds=steps,
                step_ms=step_s * 1e3,
                graph=engine.stats.graph_steps > 0,
            )


def no_reuse(lab: Lab, model: Any, shape: Shape) -> None:  # Any: as above
    """Prompts that nobody has seen, on an engine with a store and on one without, in turn."""
    batch, length, answer = lab.pick((32, 512, 128), (2, 20, 3))
    room = lab.pick(2 << 30, 1 << 17)  # full after some rounds: from then on, every page is one that was forgotten
    options: dict[str, Any] = {"max_batch_tokens": lab.pick(8192, 32), "max_sequences": batch}
    params = SamplingParams(max_tokens=answer, ignore_eos=True)
    with (
        plain(lab, model, pool_bytes=room, **options) as off,
        stored(lab, model, device_bytes=room, host_bytes=2 * room, **options) as (on, store),
    ):
        taken: dict[Engine, list[float]] = {off: [], on: []}
        for number in range(1 + lab.pick(ROUNDS, 1)):
            for engine, times in taken.items():
                given = prompts(shape, batch, length)
                start = time.perf_counter()
                engine.generate(given, params)
                if number:
                    times.append(time.perf_counter() - start)
        asked = sum(on.stats.sources.values())
        found = asked - on.stats.sources.get("computed", 0)
        if found > max(asked // 100, store.layout.block_tokens):  # first tokens are the same by chance
            raise RuntimeError(f"prompts should have been computed, and came from {on.stats.sources}")
        saved = store.metrics.blocks_spilled.value("device", "host")
    tokens = batch * (length + answer)
    with_store, without = (tokens / statistics.median(taken[engine]) for engine in (on, off))
    lab.add(
        f"{shape.name}, {batch} x ({length} + {answer}) tokens, never reused",
        with_store,
        "tok/s",
        limit_name="store off",
        limit=without,
        goal=GOAL_NO_REUSE,
        rounds=len(taken[on]),
        blocks_saved=saved,
    )


def spilling(lab: Lab, model: Any, shape: Shape) -> None:  # Any: as above
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
        requests = decoding(engine, prompts(shape, batch, context), steps=(2 * turns + 1) * steps)
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
        f"{shape.name}, decode {batch} x {context} while spilling at {copied / spilled_s / 1e9:.1f} GB/s",
        batch / statistics.median(busy),
        "tok/s",
        limit_name="without spilling",
        limit=batch / statistics.median(quiet),
        goal=GOAL_SPILLING,
        rounds=len(busy),
    )


@contextmanager
def spill(on: Ground, count: int) -> Iterator[list[int]]:
    """A lane of a mover that copies to the host without a pause; yields the bytes it has copied."""
    copied, ended = [0], threading.Event()
    sets = on.scattered(count)

    def copy() -> None:
        while not ended.is_set():
            for some in sets:
                on.save(some)  # its mark is old: none of the copies waits for a step
                copied[0] += count * on.block_bytes

    with lanes() as mover:
        job = mover.submit("save", copy, blocks=count)
        assert job is not None  # the lane is empty
        try:
            yield copied
        finally:
            ended.set()
            job.result()
