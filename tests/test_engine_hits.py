"""An engine over a connector that remembers: what is reused, what is copied, and what happens when it does not come."""

from dataclasses import replace
from typing import Any

import pytest

from tests.engine_models import generate, random_prompts, tiny_model
from tests.engine_store import Manners, MemoryConnector, connect
from tierkv.engine import Engine, EngineConfig, RequestOutput, SamplingParams

BLOCK, NUM_PAGES = 4, 40
MODEL, REFERENCE = tiny_model(), tiny_model()
CONFIG = EngineConfig(block_tokens=BLOCK, num_pages=NUM_PAGES, max_batch_tokens=16, max_sequences=4)
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
(PROMPT, OTHER) = random_prompts([30, 21])


def make(
    *, manners: Manners | None = None, num_pages: int = NUM_PAGES, config: EngineConfig = CONFIG
) -> tuple[Engine, MemoryConnector]:
    made: list[MemoryConnector] = []
    engine = Engine(MODEL, None, config, connector=connect(made, num_pages=num_pages, manners=manners))
    return engine, made[0]


def alone(prompt: list[int]) -> list[int]:
    return generate(REFERENCE, prompt, num_tokens=8)


def ask(engine: Engine, prompt: list[int]) -> dict[str, int]:
    """Generate, check the tokens, and return where the prompt came from."""
    (output,) = engine.generate([prompt], GREEDY)
    assert list(output.token_ids) == alone(prompt)
    assert sum(output.stats.sources.values()) == len(prompt)
    return dict(output.stats.sources)


def test_a_prompt_seen_before_is_not_computed_again() -> None:
    engine, store = make()
    assert ask(engine, PROMPT) == {"computed": 30}
    # 28 tokens in seven blocks on the device, one of the eighth from the host; the last must be computed.
    assert ask(engine, PROMPT) == {"device": 28, "host": 1, "computed": 1}
    store.flush()
    assert ask(engine, PROMPT) == {"host": 29, "computed": 1}
    assert engine.stats.sources == {"device": 28, "host": 30, "computed": 32}
    assert store.num_private == store.num_pinned == 0


def test_a_conversation_reuses_its_own_output() -> None:
    engine, _ = make()
    (first,) = engine.generate([PROMPT], GREEDY)
    turn = PROMPT + list(first.token_ids)
    assert ask(engine, [*turn, 5, 6, 7])["computed"] <= 3 + BLOCK


@pytest.mark.parametrize("shared", range(1, 30, 3))
def test_prompts_that_part_anywhere_share_what_they_can(shared: int) -> None:
    engine, _ = make()
    ask(engine, PROMPT)
    fresh = next(token for token in range(2, 90) if token != PROMPT[shared])
    sources = ask(engine, [*PROMPT[:shared], fresh, 3, 4])
    assert sources["computed"] == 3  # to the token, not to the block


def test_shared_pages_are_never_written() -> None:
    engine, store = make()
    ask(engine, PROMPT)
    before = {key: store.pool[page].clone() for key, page in store.device.items()}
    for end in range(20, 30):
        ask(engine, [*PROMPT[:end], 2, 3, 4, 5])
    for key, block in before.items():
        assert key not in store.device or store.pool[store.device[key]].equal(block)


def test_requests_at_the_same_time_share_pages() -> None:
    engine, _ = make(num_pages=24)
    ask(engine, PROMPT)
    outputs = engine.generate(
        [[*PROMPT[:28], token] for token in (5, 6, 7, 8)], GREEDY
    )  # 4 times 10 pages without sharing
    assert [output.stats.sources["device"] for output in outputs] == [28] * 4
    assert [output.stats.preemptions for output in outputs] == [0] * 4
    assert [list(output.token_ids) for output in outputs] == [alone([*PROMPT[:28], token]) for token in (5, 6, 7, 8)]


def test_a_request_that_waits_for_its_load_lets_others_run() -> None:
    engine, store = make(manners=Manners())
    ask(engine, PROMPT)
    store.flush()
    store._manners.late = 1.0
    slow = engine.add(PROMPT, GREEDY)
    fast = engine.add(OTHER, replace(GREEDY, max_tokens=2))
    outputs: list[RequestOutput] = []
    while engine.has_work:
        outputs += engine.step()
    assert outputs[0].request == fast
    assert [token for output in outputs if output.request == slow for token in output.token_ids] == alone(PROMPT)


@pytest.mark.parametrize("seed", range(6))
def test_what_a_load_does_not_bring_is_computed(seed: int) -> None:
    engine, store = make(manners=Manners(seed=seed))
    ask(engine, PROMPT)
    for held in (1, 3, 6):
        for key in sorted(store.device, key=len)[held:]:
            store._free.append(store.device.pop(key))
        store._manners.short = 1.0
        assert ask(engine, PROMPT)["computed"] > 1
        store._manners.short = 0.0
    assert store.num_private == 0


def test_a_connector_that_asks_for_time_gets_it() -> None:
    engine, _ = make(manners=Manners(asks=0.9, seed=1))
    ask(engine, PROMPT)
    assert ask(engine, PROMPT)["computed"] == 1


def test_a_pre_empted_request_comes_back_without_computing_again() -> None:
    engine, store = make(num_pages=13, manners=Manners(late=0.5))
    outputs = engine.generate([PROMPT[:20], OTHER[:17]], replace(GREEDY, max_tokens=16))
    assert [list(output.token_ids) for output in outputs] == [
        generate(REFERENCE, prompt, num_tokens=16) for prompt in (PROMPT[:20], OTHER[:17])
    ]
    assert sum(output.stats.preemptions for output in outputs) == 1
    assert "suspend" in store.log
    # Every prompt token and every output token but the last was computed once: nothing twice.
    assert engine.stats.tokens == 20 + 17 + 2 * 15
    assert outputs[1].stats.sources == {"computed": 17}


def test_aborts_wait_for_loads_before_pages_go_back() -> None:
    engine, store = make()
    ask(engine, PROMPT)
    store.flush()
    store._manners.late = 1.0
    request = engine.add(PROMPT, GREEDY)
    engine.step()
    held = store.num_private
    assert held > 0
    engine.abort(request)
    assert store.num_private == held
    engine.close()
    assert store.num_private == 0


def test_samples_of_a_known_prompt_share_its_pages() -> None:
    engine, store = make(num_pages=20)
    ask(engine, PROMPT)
    params = SamplingParams(max_tokens=8, ignore_eos=True, n=4, temperature=1.2, seed=5)
    (output,) = engine.generate([PROMPT], params)
    (again,) = Engine(MODEL, None, CONFIG).generate([PROMPT], params)
    assert [sample.token_ids for sample in output.samples] == [sample.token_ids for sample in again.samples]
    assert output.stats.sources["computed"] == 1
    assert store.num_private == store.num_pinned == 0


def test_a_load_that_breaks_its_promise_is_a_miss() -> None:
    class Broken(MemoryConnector):
        def load(self, request: str, pages: Any) -> Any:
            future = super().load(request, pages)
            failed = type(future)()
            failed.set_exception(OSError("gone"))
            return failed

    engine = Engine(
        MODEL, None, CONFIG, connector=lambda layout, device, model: Broken(layout, device, num_pages=NUM_PAGES)
    )
    ask(engine, PROMPT)
    assert ask(engine, PROMPT)["computed"] == 30
