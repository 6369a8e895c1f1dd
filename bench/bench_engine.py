"""The engine against transformers' own generate (sdpa, DynamicCache), SmolLM2, one thread, in turn."""

import copy
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tierkv.engine import Engine, EngineConfig, SamplingParams, loading

LICENSE = Path(__file__).parents[1] / "LICENSE"
STEPS, TURN = 32, 8


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[str, Engine, Any]]:
    """Dtype, engine without a store, and the same model as transformers runs it."""
    config = EngineConfig(dtype=request.param, max_batch_tokens=512, max_sequences=8, pool_bytes=1 << 30)
    model, tokenizer = loading.load("smollm2", config)
    theirs = copy.deepcopy(model)
    theirs.set_attn_implementation("sdpa")
    with Engine(model, tokenizer, config) as engine:
        yield request.param, engine, theirs


def prompts_of(engine: Engine, lengths: list[int]) -> list[list[int]]:
    tokens = engine.tokenizer(LICENSE.read_text()).input_ids
    return [(tokens * 2)[31 * number : 31 * number + length] for number, length in enumerate(lengths)]


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Left-padded, as transformers wants a batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def generate_theirs(model: Any, prompts: list[list[int]], num_tokens: int, **options: Any) -> None:
    with torch.inference_mode():
        model.generate(
            **padded(prompts),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )


def decode_in_turn(engine: Engine, model: Any, prompts: list[list[int]]) -> tuple[list[float], list[float]]:
    """Seconds per decode step, ours and theirs: eight steps of ours after every eight of theirs."""
    params = SamplingParams(max_tokens=2 * STEPS, ignore_eos=True)
    requests = [engine.add(prompt, params) for prompt in prompts]
    waiting = set(requests)
    while waiting:  # prefill, until all decode
        waiting -= {output.request for output in engine.step()}
    ours: list[float] = []
    theirs: list[float] = []
    last_s = 0.0

    def between(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        nonlocal last_s
        theirs.append(time.perf_counter() - last_s)
        for _ in range(TURN if len(theirs) % TURN == 0 else 0):
            start_s = time.perf_counter()
            engine.step()
            ours.append(time.perf_counter() - start_s)
        last_s = time.perf_counter()
        return torch.zeros(len(ids), dtype=torch.bool)

    generate_theirs(model, prompts, STEPS, stopping_criteria=[between])
    for request in requests:
        engine.abort(request)
    return ours, theirs[1:]  # the first of theirs is a prefill


def test_prefill(versus: Any, pair: tuple[str, Engine, Any]) -> None:
    dtype, engine, model = pair
    prompts = prompts_of(engine, [1024])
    versus(
        f"prefill, {dtype}, 1,024 tokens",
        lambda: engine.generate(prompts, SamplingParams(max_tokens=1)),
        "transformers generate",
        lambda: generate_theirs(model, prompts, 1),
        unit="tok/s",
        amount=1024,
        rounds=9,
    )


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("batch 1, 1,024 of context", [1024]),
        ("batch 8, 200-2,000 of context", [200, 350, 500, 700, 900, 1200, 1600, 2000]),
    ],
    ids=["one", "eight"],
)
def test_decode(benchmark: Any, versus: Any, pair: tuple[str, Engine, Any], name: str, lengths: list[int]) -> None:
    dtype, engine, model = pair
    before = (engine.stats.model_s, engine.stats.step_s)
    ours, theirs = benchmark.pedantic(
        decode_in_turn, (engine, model, prompts_of(engine, lengths)), rounds=1, iterations=1
    )
    rates = [len(lengths) / statistics.median(times) for times in (ours, theirs)]
    versus.add(f"decode, {dtype}, {name}", rates[0], "tok/s", "transformers generate", rates[1], len(ours))
    model_s, step_s = (
        now - then for now, then in zip((engine.stats.model_s, engine.stats.step_s), before, strict=True)
    )
    versus.add(
        f"  outside model and attention, {name}, {dtype}", 1 - model_s / step_s, "share", "goal", 0.05, len(ours)
    )


def test_decode_overhead(benchmark: Any, versus: Any, pair: tuple[str, Engine, Any]) -> None:
    """Of decode steps alone, where the model's share is smallest."""
    dtype, engine, _ = pair
    prompts = prompts_of(engine, [64] * 8)
    params = SamplingParams(max_tokens=48, ignore_eos=True, stop="never seen")
    waiting = {engine.add(prompt, params) for prompt in prompts}
    while waiting:
        waiting -= {output.request for output in engine.step()}
    before = (engine.stats.model_s, engine.stats.step_s)

    def run() -> None:
        while engine.has_work:
            engine.step()

    benchmark.pedantic(run, rounds=1, iterations=1)
    model_s, step_s = (
        now - then for now, then in zip((engine.stats.model_s, engine.stats.step_s), before, strict=True)
    )
    versus.add(
        f"outside model and attention, {dtype}, batch 8, stop string", 1 - model_s / step_s, "share", "goal", 0.05, 40
    )
