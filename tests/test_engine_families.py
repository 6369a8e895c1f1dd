"""Models of other families, tiny and random: the same greedy tokens as transformers' own generate, or a refusal."""

import copy
from typing import Any

import pytest
import torch

from tests.engine_models import FAMILIES, REFUSED, generate, make_model, random_prompts, reference
from tierkv.engine import Engine, EngineConfig, SamplingParams
from tierkv.errors import ModelError

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_generates_what_transformers_generates(family: str) -> None:
    model = make_model(*FAMILIES[family])
    prompts = random_prompts([1, 5, 23, 40, 16])
    expected = reference(model, prompts, num_tokens=12)
    assert len({token for tokens in expected for token in tokens}) > 4, "a model that says one thing proves nothing"
    config = EngineConfig(block_tokens=4, num_pages=80, max_batch_tokens=17, max_sequences=8)
    with Engine(model, None, config) as engine:
        together = [list(output.token_ids) for output in engine.generate(prompts, GREEDY)]
        alone = [list(engine.generate([prompt], GREEDY)[0].token_ids) for prompt in prompts]
    assert together == expected
    assert alone == expected


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_without_plain_kv_is_refused_with_the_reason(family: str) -> None:
    kind, options, reason = REFUSED[family]
    with pytest.raises(ModelError, match=reason) as refused:
        Engine(make_model(kind, options), None, EngineConfig(num_pages=8, max_context=64))
    assert "\n" not in str(refused.value)


def test_a_model_that_keeps_something_besides_kv_is_found_out() -> None:
    model = make_model(*FAMILIES["llama, GQA, tied"])
    kept = torch.zeros(32)

    def remember(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        result = output + kept
        kept.add_(output.sum(dim=(0, 1)))
        return result

    model.model.layers[0].mlp.register_forward_hook(remember)
    with pytest.raises(ModelError, match="logits on pages differ"):
        Engine(model, None, EngineConfig(num_pages=8))


def test_a_refused_model_still_works_as_before() -> None:
    model = make_model(*FAMILIES["llama, GQA, tied"])
    (prompt,) = random_prompts([6])
    expected = generate(model, prompt, num_tokens=4)
    handle = model.model.norm.register_forward_hook(lambda module, args, out: out * 0.5 if out.shape[1] < 6 else out)
    with pytest.raises(ModelError):
        Engine(model, None, EngineConfig(num_pages=8))
    handle.remove()
    assert generate(model, prompt, num_tokens=4) == expected


@pytest.mark.parametrize("family", ["llama, GQA, tied", "gpt-neox, partial rotary"])
def test_one_row_in_bf16_gives_what_many_rows_give(family: str) -> None:
    model = make_model(*FAMILIES[family]).to(torch.bfloat16)
    plain = copy.deepcopy(model)
    Engine(model, None, EngineConfig(num_pages=8))
    pairs = [
        (ours, theirs)
        for ours, theirs in zip(model.modules(), plain.modules(), strict=True)
        if type(theirs) is torch.nn.Linear
    ]
    assert pairs
    generator = torch.Generator().manual_seed(0)
    for ours, theirs in pairs:
        for shape in ((1, 1, ours.in_features), (1, 3, ours.in_features)):
            rows = torch.randn(shape, generator=generator).to(torch.bfloat16)
            got, want = ours(rows), theirs(rows)
            assert got.shape == want.shape
            torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
