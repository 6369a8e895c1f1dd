"""Steps that are recorded and replayed give what steps that run as they come give; here the record is a Python function."""

from array import array
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch

from tests.engine_models import FAMILIES, make_model, random_prompts, reference, tiny_model
from tierkv.arrival import Arrival
from tierkv.engine import Engine, EngineConfig
from tierkv.engine.graphs import RecordedPlans, buckets
from tierkv.engine.loading import layout_of
from tierkv.engine.probe import attach
from tierkv.engine.runner import Runner
from tierkv.engine.sampling import SamplingParams
from tierkv.engine.scheduler import Work
from tierkv.engine.sequence import Request, Sequence
from tierkv.engine.staging import Staging
from tierkv.engine.text import TextStream

BLOCK, NUM_PAGES, MAX_SEQUENCES, MAX_CONTEXT = 4, 60, 11, 40
CPU = torch.device("cpu")


class Repeated:
    """A graph whose replay calls what was recorded once more: the same function, over the same memory."""

    def record(self, run: Callable[[], object]) -> None:
        self._run = run
        run()

    def replay(self) -> None:
        self._run()


def sequences(lengths: list[int], *, seed: int, num_pages: int = NUM_PAGES) -> list[Sequence]:
    """Sequences with pages, of which none is in order and none is shared."""
    pages = list(range(num_pages))
    Random(seed).shuffle(pages)
    made = []
    for number, (length, prompt) in enumerate(zip(lengths, random_prompts(lengths, seed=seed), strict=True)):
        request = Request(str(number), SamplingParams(), length, 0, MAX_CONTEXT, 0.0)
        text = TextStream(None, (), skip_special_tokens=True)
        own, pages = pages[: -(-length // BLOCK)], pages[-(-length // BLOCK) :]
        made.append(Sequence(str(number), request, 0, number, array("i", prompt), text, pages=own))
    return made


def pool_of(model: Any) -> torch.Tensor:
    layout = layout_of(model, block_tokens=BLOCK)
    attach(model, layout, CPU)
    return torch.zeros((NUM_PAGES, *layout.shape), dtype=torch.float32)


@pytest.mark.parametrize("family", [next(iter(FAMILIES)), "gemma2, softcap, alternating window", "mixtral, experts"])
def test_replayed_steps_compute_the_same_logits_and_kv(family: str) -> None:
    model = make_model(*FAMILIES[family])
    pools = [pool_of(model) for _ in range(2)]
    eager, replayed = (Runner(model, pool) for pool in pools)
    replayed.use_graphs(Repeated, max_sequences=MAX_SEQUENCES, max_context=MAX_CONTEXT)
    random = Random(1)
    lengths = [random.randint(9, 20) for _ in range(MAX_SEQUENCES)]
    known = sequences(lengths, seed=2)
    for runner in (eager, replayed):
        runner.run([Work(sequence, len(sequence.tokens) - 8) for sequence in known])
    for sequence in known:
        sequence.num_computed = len(sequence.tokens) - 8
    replays = 0
    while live := [sequence for sequence in known if sequence.num_missing]:
        chosen = random.sample(live, random.randint(1, len(live)))  # fewer of them, and in another order
        work = [Work(sequence, 1) for sequence in chosen]
        replays += 1
        torch.testing.assert_close(replayed.run(work), eager.run(work), rtol=1e-4, atol=1e-4)
        for sequence in chosen:
            sequence.num_computed += 1
    assert replays > 8
    torch.testing.assert_close(*pools, rtol=1e-4, atol=1e-4)  # nothing but the tokens' own slots was written


def test_steps_with_more_than_a_token_each_run_as_they_come() -> None:
    model = make_model(*FAMILIES[next(iter(FAMILIES))])
    runner = Runner(model, pool_of(model))
    runner.use_graphs(Repeated, max_sequences=2, max_context=MAX_CONTEXT)
    assert runner.graphs is not None
    one, two, three = sequences([9, 9, 9], seed=0)
    assert runner.graphs.takes([Work(one, 1), Work(two, 1)])
    assert not runner.graphs.takes([Work(one, 1), Work(two, 2)])
    assert not runner.graphs.takes([Work(one, 1), Work(two, 1), Work(three, 1)])


GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


def test_an_engine_that_replays_gives_the_tokens_that_transformers_gives() -> None:
    config = EngineConfig(block_tokens=BLOCK, num_pages=80, max_batch_tokens=24, max_sequences=5)
    prompts = random_prompts([3, 30, 9, 17, 5, 22, 8, 11])
    expected = reference(tiny_model(), prompts, num_tokens=12)
    engine = Engine(tiny_model(), None, config, graphs=Repeated)
    assert [list(output.token_ids) for output in engine.generate(prompts, GREEDY)] == expected
    assert 10 < engine.stats.graph_steps < engine.stats.steps
    (output,) = engine.generate([prompts[0]], replace(GREEDY, temperature=1.0, n=3, seed=1))
    off = Engine(tiny_model(), None, replace(config, cuda_graphs="off"), graphs=Repeated)
    (same,) = off.generate([prompts[0]], replace(GREEDY, temperature=1.0, n=3, seed=1))
    assert [sample.token_ids for sample in output.samples] == [sample.token_ids for sample in same.samples]
    assert off.stats.graph_steps == 0
    engine.close()
    assert engine._core._runner.graphs is None  # its memory is not left to the collector of cycles


def test_a_model_that_cannot_be_recorded_runs_as_it_comes(caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(Repeated):
        def record(self, run: Callable[[], object]) -> None:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    config = EngineConfig(block_tokens=BLOCK, num_pages=20, max_sequences=3)
    engine = Engine(tiny_model(), None, config, graphs=Refusing)
    assert [record.getMessage() for record in caplog.records] == [
        "decode steps run without CUDA graphs: operation not permitted when stream is capturing"
    ]
    (prompt,) = random_prompts([9])
    (output,) = engine.generate([prompt], GREEDY)
    assert [list(output.token_ids)] == reference(tiny_model(), [prompt], num_tokens=12)
    assert engine.stats.graph_steps == 0


def test_layers_that_are_on_their_way_are_waited_for_one_by_one() -> None:
    """A replay cannot wait in the middle: such a step runs as it comes."""
    model = make_model(*FAMILIES[next(iter(FAMILIES))])
    runner = Runner(model, pool_of(model))
    runner.use_graphs(Repeated, max_sequences=2, max_context=MAX_CONTEXT)
    waited: list[int] = []

    class Told(Arrival):
        def wait(self, layer: int) -> None:
            waited.append(layer)

    one, two = sequences([9, 9], seed=0)
    one.num_computed = two.num_computed = 8
    one.rest = Told([0, 3])
    runner.run([Work(one, 1), Work(two, 1)])
    assert waited == [0, 1, 2]
    assert runner.num_replays == 0


def test_staged_arrays_keep_their_places_and_grow() -> None:
    staging = Staging(CPU, num_bytes=64)
    fields = [("int64", (3,)), ("int32", (5,)), ("int32", (2, 4))]
    laid = staging.lay(fields)
    for number, own in enumerate(laid.host):
        own[:] = number + 1
    staging.send()
    assert [set(tensor.flatten().tolist()) for tensor in laid.device] == [{1}, {2}, {3}]
    again = staging.lay([*fields[:2], ("int32", (7, 16))])
    assert [tensor.data_ptr() % 16 for tensor in again.device] == [laid.device[0].data_ptr() % 16] * 3
    again.host[2][:] = 9
    steady = staging.lay(fields)
    assert [tensor.data_ptr() for tensor in steady.device] == [tensor.data_ptr() for tensor in again.device]
    assert staging.lay(fields) is steady  # views are made once


@pytest.mark.parametrize(
    ("most", "expected"),
    [(1, [1]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9]), (32, [1, 2, 4, 8, 16, 24, 32])],
)
def test_buckets_end_with_all_sequences(most: int, expected: list[int]) -> None:
    assert buckets(most) == expected


def test_plans_lie_where_the_record_says_and_follow_the_spans() -> None:
    def lengths(spans: list[tuple[int, int, int]]) -> Any:
        return torch.tensor([length for _, _, length in spans] + [0] * (5 - len(spans)), dtype=torch.int32).numpy()

    first = RecordedPlans([(0, 1, 7)], None)
    assert [first.place(lengths, CPU).tolist() for _ in range(2)] == [[7, 0, 0, 0, 0]] * 2
    memory = torch.zeros(first.num_words, dtype=torch.int32)
    plans = RecordedPlans([(0, 1, 7)], memory)
    placed = [plans.place(lengths, CPU) for _ in range(2)]
    assert plans.num_words == first.num_words
    plans.fill([(0, 1, 3), (1, 2, 9)], memory.numpy())
    assert [at.tolist() for at in placed] == [[3, 9, 0, 0, 0]] * 2
    assert all(at.data_ptr() % 16 == memory.data_ptr() % 16 for at in placed)
