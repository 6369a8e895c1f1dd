"""Whatever happens around a request, its greedy tokens are those it would get alone, and no page is lost."""

from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine_models import generate, random_prompts, tiny_model
from tests.engine_store import Manners, MemoryConnector, connect
from tierkv.engine import Engine, EngineConfig, PrivatePages, SamplingParams
from tierkv.engine.scheduler import Work

BLOCK, NUM_PAGES, NUM_TOKENS = 4, 13, 9
BASE, *TAILS = random_prompts([24, 1, 2, 7, 11])
MODEL = tiny_model()
REFERENCE = tiny_model()
CONFIG = EngineConfig(block_tokens=BLOCK, num_pages=NUM_PAGES, max_batch_tokens=10, max_sequences=5)
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 24), st.integers(0, 3)),
        st.tuples(st.just("fork"), st.integers(0, 100), st.just(0)),
        st.tuples(st.just("abort"), st.integers(0, 100), st.just(0)),
        st.tuples(st.just("step"), st.integers(1, 8), st.just(0)),
    ),
    max_size=30,
)
MANNERS = st.builds(
    Manners,
    asks=st.sampled_from([0.0, 0.5]),
    late=st.sampled_from([0.0, 0.6]),
    short=st.sampled_from([0.0, 0.3]),
    refuses=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 1000),
)
STEADY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@cache
def alone(shared: int, tail: int) -> tuple[int, ...]:
    return tuple(generate(REFERENCE, prompt_of(shared, tail), num_tokens=NUM_TOKENS))


def prompt_of(shared: int, tail: int) -> list[int]:
    return BASE[:shared] + TAILS[tail]


class Play:
    """One engine, and for each request under way the prompt whose tokens it must bring."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.live: dict[str, tuple[int, int]] = {}
        self.got: dict[str, list[int]] = {}

    def run(self, operations: list[tuple[str, int, int]]) -> None:
        for name, first, second in operations:
            if name == "add":
                request = self.engine.add(prompt_of(first, second), GREEDY)
                self.live[request], self.got[request] = (first, second), []
            elif name == "step":
                for _ in range(first):
                    self.step()
            elif self.live:
                request = sorted(self.live)[first % len(self.live)]
                if name == "fork":
                    child = self.engine.fork(request)
                    self.live[child], self.got[child] = self.live[request], list(self.got[request])
                else:
                    self.engine.abort(request)
                    del self.live[request]
        for _ in range(3000):
            if not self.live:
                return
            self.step()
        raise AssertionError(f"no end: {self.live}")

    def step(self) -> None:
        for output in self.engine.step():
            self.got[output.request] += output.token_ids
            if output.stats is not None:
                assert tuple(self.got[output.request]) == alone(*self.live.pop(output.request))


CHUNKED = replace(CONFIG, chunk_tokens=4)


@given(operations=OPERATIONS, manners=MANNERS)
@STEADY
def test_any_schedule_in_whole_chunks(operations: list[tuple[str, int, int]], manners: Manners) -> None:
    made: list[MemoryConnector] = []
    with Engine(MODEL, None, CHUNKED, connector=connect(made, num_pages=NUM_PAGES, manners=manners)) as engine:
        Play(engine).run(operations)
    assert (made[0].num_private, made[0].num_pinned, made[0].tails) == (0, 0, {})


def test_chunks_end_at_multiples_whatever_else_runs() -> None:
    prompts = [BASE + TAILS[3], BASE[:5], BASE[:9] + TAILS[2]]

    def chunks(*, alone: bool) -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []
        with Engine(MODEL, None, replace(CHUNKED, num_pages=40)) as engine:
            run = engine._core._runner.run

            def note(work: list[Work]) -> torch.Tensor:
                seen.extend(
                    (item.sequence.num_computed, item.num_tokens)
                    for item in work
                    if item.sequence.request.id == "first"
                )
                return run(work)

            engine._core._runner.run = note  # type: ignore[method-assign]
            engine.add(prompts[0], SamplingParams(max_tokens=1), request_id="first")
            for prompt in () if alone else prompts[1:]:
                engine.add(prompt, GREEDY)
            while engine.has_work:
                engine.step()
        return seen

    length = len(prompts[0])
    expected = [(at, min(4, length - at)) for at in range(0, length, 4)]
    assert chunks(alone=True) == chunks(alone=False) == expected


def test_a_request_reuses_no_more_than_it_is_allowed_to() -> None:
    made: list[MemoryConnector] = []
    with Engine(MODEL, None, CHUNKED, connector=connect(made, num_pages=NUM_PAGES)) as engine:
        engine.generate([BASE], SamplingParams(max_tokens=1))
        for allowed, reused in ((0, 0), (8, 8), (10, 10), (None, 23)):
            before = dict(engine.stats.sources)
            engine.add(BASE, SamplingParams(max_tokens=1), reuse_tokens=allowed)
            while engine.has_work:
                engine.step()
            assert engine.stats.sources["computed"] - before["computed"] == len(BASE) - reused


def test_a_request_that_may_reuse_little_goes_on_where_it_was_suspended() -> None:
    made: list[MemoryConnector] = []
    with Engine(MODEL, None, CHUNKED, connector=connect(made, num_pages=NUM_PAGES)) as engine:
        cases = [(shared, tail) for shared in (3, 9, 14) for tail in (0, 2)]
        names = {engine.add(prompt_of(*case), GREEDY, reuse_tokens=0): case for case in cases}
        got: dict[str, tuple[int, ...]] = dict.fromkeys(names, ())
        preempted = 0
        while engine.has_work:
            for output in engine.step():
                got[output.request] += output.token_ids
                preempted += output.stats.preemptions if output.stats else 0
        assert got == {name: alone(*case) for name, case in names.items()}
        assert preempted > 0


@given(operations=OPERATIONS)
@STEADY
def test_any_schedule_without_a_store(operations: list[tuple[str, int, int]]) -> None:
    with Engine(MODEL, None, CONFIG) as engine:
        Play(engine).run(operations)
    assert isinstance(engine.connector, PrivatePages)
    assert engine.connector.num_free == NUM_PAGES


@given(operations=OPERATIONS, manners=MANNERS)
@STEADY
def test_any_schedule_over_a_store(operations: list[tuple[str, int, int]], manners: Manners) -> None:
    made: list[MemoryConnector] = []
    with Engine(MODEL, None, CONFIG, connector=connect(made, num_pages=NUM_PAGES, manners=manners)) as engine:
        Play(engine).run(operations)
    assert made[0].num_private == 0
    assert made[0].num_pinned == 0
    assert made[0].tails == {}


@pytest.mark.parametrize("seed", range(40))
def test_long_random_schedules(seed: int) -> None:
    random = Random(seed)
    arguments = {"add": 25, "fork": 100, "abort": 100, "step": 9}
    kinds = random.choices(list(arguments), [4, 2, 1, 4], k=random.randrange(20, 50))
    operations = [(kind, random.randrange(1, arguments[kind]), random.randrange(4)) for kind in kinds]
    chances = {name: random.choice([0.0, 0.5]) for name in ("asks", "late", "short", "refuses")}
    made: list[MemoryConnector] = []
    connector = connect(made, num_pages=NUM_PAGES, manners=Manners(**chances, seed=seed))
    with Engine(MODEL, None, CONFIG, connector=connector) as engine:
        Play(engine).run(operations)
    assert (made[0].num_private, made[0].num_pinned, made[0].tails) == (0, 0, {})


@pytest.mark.parametrize("store", [False, True])
def test_a_full_pool_pre_empts_and_nothing_changes(store: bool) -> None:
    made: list[Any] = []
    connector = connect(made, num_pages=NUM_PAGES, manners=Manners(late=0.5)) if store else None
    with Engine(MODEL, None, CONFIG, connector=connector) as engine:
        cases = [(shared, tail) for shared in (3, 9, 14) for tail in (0, 2)]
        outputs = engine.generate([prompt_of(*case) for case in cases], GREEDY)
        assert [output.token_ids for output in outputs] == [alone(*case) for case in cases]
        assert sum(output.stats.preemptions for output in outputs) > 0
