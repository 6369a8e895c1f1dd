"""Measure the tile sizes of the attention kernel on this card, and write its architecture's entries of tiles.json.

What is not right, spills, or does not fit the card is left out. Kernels are compiled by a pool of processes beforehand: the
disk cache then has them, and measuring is all that is left to do one after the other.
"""

import itertools
import json
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import replace
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import torch

from tierkv.kernels.batch import PagedBatch
from tierkv.kernels.gpu.launch import architecture
from tierkv.kernels.gpu.tiles import Case, Tiles, candidates, forced, rule
from tierkv.measure.inputs import LLAMA, MLA, TINY, Model, Paged
from tierkv.measure.lab import Lab, Tensor

# The most used first: time may run out.
CASES: Final = [
    Case(few, dim, size)
    for dim, size in ((128, 2), (128, 1), (576, 2), (64, 2), (256, 2), (576, 1), (64, 1), (256, 1), (96, 2))
    for few in (True, False)
]
DTYPES: Final = {1: torch.float8_e4m3fn, 2: torch.bfloat16}
MARGIN: Final = 0.02  # a gain over the rule that is smaller is noise
WORST: Final = 0.02  # relative error, against the rule's result


def run(lab: Lab, *, table: Path, out: Path, seconds: float) -> None:
    """Tune as many cases as there is time for; the table is written after each."""
    until = time.monotonic() + seconds
    cases, workers = lab.pick((CASES, max(1, min(12, (os.cpu_count() or 2) - 1))), (CASES[:2], 1))
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        compiling = {case: compiled(lab, pool, case, workers) for case in cases}
        for case in cases:
            wait(compiling[case], timeout=max(1.0, until - time.monotonic()))
            if time.monotonic() > until:
                print(f"tune: no time was left for {case.name} and what follows")
                break
            best = fastest(lab, case, worth(lab, case), until)
            if best:
                write(case, best, table, out)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def worth(lab: Lab, case: Case) -> list[Tiles]:
    return candidates(case)[: lab.pick(None, 2)]


def compiled(lab: Lab, pool: ProcessPoolExecutor, case: Case, workers: int) -> list[Future[None]]:
    """The promise that Triton's cache on disk has all candidates of a case."""
    distinct = list(dict.fromkeys(as_compiled(tiles) for tiles in worth(lab, case)))
    return [pool.submit(compile_some, lab.rehearsing, case, distinct[first::workers]) for first in range(workers)]


def as_compiled(tiles: Tiles) -> Tiles:
    """Equal for tiles that share one compiled kernel: only the plan knows how many programs are resident."""
    return tiles._replace(programs=1)


def compile_some(rehearsing: bool, case: Case, some: Iterable[Tiles]) -> None:
    """In a process of the pool."""
    lab = Lab(rehearsing=rehearsing)
    queries = [1 if case.few else lab.pick(64, 20)]
    paged = Paged(lab, _model(lab, case), [100], queries=queries, dtype=DTYPES[case.element_bytes], layers=1)
    for tiles in some:
        with lab.attempt(case.name):  # some do not fit the card
            _first(lab, paged, tiles)


def fastest(lab: Lab, case: Case, wanted: Iterable[Tiles], until: float) -> Tiles | None:
    """The tiles that take least over all workloads, or None where they gain nothing over the rule."""
    loads = _loads(lab, case)
    expected = [_first(lab, load, rule(case)) for load in loads]
    usual = _seconds(lab, loads, rule(case), expected)
    scores: dict[Tiles, float] = {}
    spilling: set[Tiles] = set()
    for tiles in wanted:
        before = _spills()
        taken = _seconds(lab, loads, tiles, expected)
        if _spills() > before:
            spilling.add(as_compiled(tiles))
        if taken and as_compiled(tiles) not in spilling:
            scores[tiles] = taken
        if time.monotonic() > until:
            break
    if not scores or not usual:
        print(f"tune {case.name}: nothing ran")
        return None
    best = min(scores, key=lambda tiles: scores[tiles])
    print(f"tune {case.name}: {best} {scores[best] * 1e6:.1f} us, rule {usual * 1e6:.1f} us, {len(scores)} ran")
    return best if scores[best] < usual * (1 - MARGIN) else None


def _loads(lab: Lab, case: Case) -> list[Paged]:
    dtype, model = DTYPES[case.element_bytes], _model(lab, case)
    if case.few:
        shapes = lab.pick(([8192] * 64, [131072], [65536] + [512] * 63), ([40], [9, 20]))
        return [Paged(lab, model, lengths, dtype=dtype, layers=4) for lengths in shapes]
    prompts = lab.pick(((4096, 4096), (512, 16384)), ((20, 20),))
    return [Paged(lab, model, [length], queries=[count], dtype=dtype, layers=4) for count, length in prompts]


def _seconds(lab: Lab, loads: Sequence[Paged], tiles: Tiles, expected: Sequence[Tensor]) -> float | None:
    """Geometric mean over the workloads; None where the tiles do not compile or are wrong."""
    taken = []
    for load, truth in zip(loads, expected, strict=True):
        try:
            error = (_first(lab, load, tiles).double() - truth.double()).norm() / truth.double().norm()
            if not error < WORST:
                return None
            taken.append(lab.time(load.calls(lab, count=4), rounds=7).seconds)
        except Exception:  # noqa: BLE001 - a candidate may ask for more than the card has, and fail in many ways
            return None
    return statistics.geometric_mean(taken)


def _first(lab: Lab, load: Paged, tiles: Tiles) -> Tensor:
    """The result of one call that plans anew, with these tiles; later calls of the batch keep them."""
    load.batch = PagedBatch(
        *(getattr(load.batch, name) for name in ("slots", "tables", "lengths", "cu_seqlens", "spans"))
    )
    with forced(tiles):
        return load.calls(lab, count=1)[0]()


def _spills() -> int:
    """How many kernels that this process has loaded spill."""
    caches = (
        cache[0]
        for function in vars(import_module("tierkv.kernels.gpu.attention")).values()
        for cache in getattr(function, "device_caches", {}).values()
    )
    kernels = itertools.chain.from_iterable(cache.values() for cache in caches)
    return sum(bool(getattr(kernel, "n_spills", 0)) for kernel in kernels)


def _model(lab: Lab, case: Case) -> Model:
    return lab.pick(MLA if case.head_dim == MLA.dim else replace(LLAMA, dim=case.head_dim), TINY)


def write(case: Case, tiles: Tiles, table: Path, out: Path) -> None:
    """Into the table, where other entries stay, and a copy beside the results."""
    entries = json.loads(table.read_text(encoding="utf-8"))
    entries.setdefault(f"sm_{architecture()}", {})[case.name] = tiles._asdict()
    text = json.dumps(entries, indent=1) + "\n"
    table.write_text(text, encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    (out / table.name).write_text(text, encoding="utf-8")
