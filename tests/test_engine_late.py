"""Inputs of steps on a device that lags behind the host: each step reads what was laid for it, and the host goes on."""

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine_models import FAMILIES, make_model
from tests.test_engine_graphs import BLOCK, CPU, MAX_CONTEXT, MAX_SEQUENCES, pool_of, sequences
from tierkv.engine.graphs import DecodeGraphs
from tierkv.engine.packing import Inputs, Packer
from tierkv.engine.runner import Runner
from tierkv.engine.scheduler import Work
from tierkv.engine.sequence import Sequence as Tokens
from tierkv.engine.staging import CudaLink, Staging
from tierkv.kernels.batch import PagedBatch, Span
from tierkv.testing.cuda import FakeCuda
from tierkv.testing.late import LateGraph, LateLink

LONG = 400  # columns of a table go by 16: a quarter of this context has fewer
FIELDS = [("int64", (3,)), ("int32", (5,)), ("int32", (2, 4)), ("int32", (6, 16))]


@pytest.mark.parametrize("seed", range(8))
def test_each_step_reads_what_was_laid_for_it_however_late_it_is(seed: int) -> None:
    random = Random(seed)
    cuda = FakeCuda(random.randrange)
    staging, numbers = Staging(CPU, num_bytes=64, link=LateLink(cuda)), np.random.default_rng(seed)
    read: list[int] = []

    def reads(laid: Sequence[torch.Tensor], expected: list[Any], step: int) -> None:
        for own, truth in zip(laid, expected, strict=True):
            assert (own.numpy() == truth).all(), f"step {step} reads what was not laid for it"
        read.append(step)

    for step in range(60):
        laid = staging.lay(FIELDS[random.randrange(3) : random.randrange(3, 5)])
        for own in laid.host:
            own[:] = numbers.integers(1, 1 << 30, own.shape)
        expected = [own.copy() for own in laid.host]
        staging.send()
        cuda.compute(lambda laid=laid, expected=expected, step=step: reads(laid.device, expected, step))  # type: ignore[misc]  # defaults bind
        for _ in range(random.randrange(4)):
            if not cuda.idle:
                cuda.step()
    cuda.run_all()
    assert read == list(range(60))


def test_the_host_lays_three_steps_ahead_and_waits_for_the_first_of_them_alone() -> None:
    cuda = FakeCuda(lambda count: 0)
    link = LateLink(cuda)
    staging, done = Staging(CPU, link=link), list[int]()
    for step in range(3):
        staging.lay(FIELDS)
        staging.send()
        cuda.compute(lambda step=step: done.append(step))  # type: ignore[misc]  # the default binds
    assert link.waits == 0 and done == []
    staging.lay(FIELDS)
    assert link.waits == 1 and done == [], "the copy is waited for, not the step"


def test_pinned_memory_that_is_refused_is_pageable_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    empty = torch.empty

    def refuse(*size: int, pin_memory: bool = False, **how: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nand more")
        return empty(*size, **how)

    monkeypatch.setattr(torch, "empty", refuse)
    memory = CudaLink(torch.device("cuda")).on_host(64)
    assert (memory.shape, memory.dtype, memory.device.type) == ((64,), torch.uint8, "cpu")
    assert [record.getMessage() for record in caplog.records] == [
        "no pinned memory for the inputs of steps (CUDA error: out of memory): each step waits for its copy"
    ]


class Digest:
    """Stands for a model: what a step reads of the device's memory, as the logits of its sequences; plans, too.

    seen: [rows, everything] of each call, those that do nothing included.
    """

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.seen: list[torch.Tensor] = []
        self._plans: dict[int, tuple[Any, torch.Tensor]] = {}

    def __call__(self, inputs: Inputs[torch.Tensor], batch: PagedBatch, last: torch.Tensor) -> torch.Tensor:
        self.cuda.catch_up()
        if id(batch.plans) not in self._plans:  # as a record does: once, and never in a replay
            assert batch.plans is not None
            self._plans[id(batch.plans)] = (batch.plans, batch.plans.place(words, CPU))
        plan = self._plans[id(batch.plans)][1].expand(len(last), -1)
        bounds = torch.stack([inputs.bounds[:-2], inputs.bounds[1:-1], inputs.bounds[-1].expand(len(last))])
        columns = [inputs.tokens, inputs.positions, inputs.slots, inputs.lengths[:-1], *bounds]
        rows = torch.cat([torch.stack(columns, dim=1), plan, inputs.tables[:-1]], dim=1)
        self.seen.append(rows.clone())
        return rows.double()


def words(spans: list[Span]) -> Any:
    """A plan: the lengths, longest first, as no other array has them."""
    lengths = sorted((length for _, _, length in spans), reverse=True)
    return np.array((lengths + [0] * MAX_SEQUENCES)[:MAX_SEQUENCES], np.int32)


def expected(row: int, order: Sequence[Tokens]) -> list[int]:
    """What row `row` of a step of these sequences has to read, up to its table."""
    count, lengths = len(order), sorted((sequence.num_computed + 1 for sequence in order), reverse=True)
    plan = lengths + [0] * (MAX_SEQUENCES - count)
    if row >= count:
        return [0, 0, -1, 0, count, count, count, *plan]
    sequence, at = order[row], order[row].num_computed
    slot = sequence.pages[at // BLOCK] * BLOCK + at % BLOCK
    pages = sequence.pages[: at // BLOCK + 1]
    return [sequence.tokens[at], at, slot, at + 1, row, row + 1, count, *plan, *pages]


@pytest.mark.parametrize("seed", range(4))
def test_a_replay_reads_the_inputs_plans_and_tables_of_its_own_step(seed: int) -> None:
    random = Random(seed)
    cuda = FakeCuda(random.randrange)
    link, digest = LateLink(cuda), Digest(cuda)
    graphs = DecodeGraphs(
        digest,
        Packer(BLOCK),
        torch.empty((1, 1, 1, 1, BLOCK, 1)),
        lambda: LateGraph(cuda),
        max_sequences=MAX_SEQUENCES,
        max_context=LONG,
        link=link,
    )
    graphs.record()
    cuda.run_all()
    digest.seen.clear()
    known = sequences([random.randint(30, LONG) for _ in range(MAX_SEQUENCES)], seed=seed, num_pages=2000)
    known[0] = sequences([LONG], seed=seed, num_pages=2000)[0]
    for sequence in known:
        sequence.num_computed = len(sequence.tokens) - 25
    truths: list[list[list[int]]] = []
    told: list[torch.Tensor] = []
    for _ in range(24):
        order = random.sample(known, random.randint(1, len(known)))
        truths.append([expected(row, order) for row in range(MAX_SEQUENCES)])
        logits = graphs.run([Work(sequence, 1) for sequence in order])
        cuda.compute(lambda logits=logits: told.append(logits.clone()))  # type: ignore[misc]  # the default binds
        for sequence in order:
            sequence.num_computed += 1
        for _ in range(random.randrange(6)):
            if not cuda.idle:
                cuda.step()
    cuda.run_all()
    assert len(digest.seen) == len(told) == len(truths)
    for rows, logits, truth in zip(digest.seen, told, truths, strict=True):
        assert [got[: len(own)] for got, own in zip(rows.tolist(), truth, strict=False)] == truth[: len(rows)]
        assert logits.tolist() == rows[: len(logits)].tolist()


@pytest.mark.parametrize("graphs", [True, False], ids=["replayed", "as they come"])
def test_a_model_on_a_late_device_computes_what_it_computes_on_the_host(graphs: bool) -> None:
    model = make_model(*FAMILIES[next(iter(FAMILIES))])
    pools = [pool_of(model) for _ in range(2)]
    cuda = FakeCuda(Random(0).randrange)

    def later(**given: Any) -> Any:
        cuda.catch_up()
        return model(**given)

    here, there = Runner(model, pools[0]), Runner(later, pools[1], link=LateLink(cuda))
    if graphs:
        there.use_graphs(lambda: LateGraph(cuda), max_sequences=3, max_context=MAX_CONTEXT)
    known = sequences([17, 9, 12], seed=1)
    for counts in ((9, 4, 5), (3, 1, 2), (1, 1, 1), (1, 1), (1,), (1, 1, 1)):
        work = [Work(sequence, count) for sequence, count in zip(known, counts, strict=False)]
        logits, truth = there.run(work), here.run(work)
        with torch.inference_mode():
            cuda.catch_up()
        torch.testing.assert_close(logits, truth, rtol=1e-4, atol=1e-4)
        for item in work:
            item.sequence.num_computed += item.num_tokens
    assert there.num_replays == (4 if graphs else 0)
    torch.testing.assert_close(*pools, rtol=1e-4, atol=1e-4)
