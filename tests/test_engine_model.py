"""SmolLM2 itself: the same greedy tokens as transformers' own generate, whatever the batch, the chunks and the cache."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine_models import generate
from tests.engine_store import MemoryConnector, connect
from tierkv.engine import Engine, EngineConfig, SamplingParams, loading

pytestmark = pytest.mark.model

LENGTHS = [5, 6, 9, 15, 16, 17, 24, 31, 32, 33, 47, 64, 90, 128, 150, 200, 256, 257, 333, 512, 700, 1100, 2000]
NUM_TOKENS = 12
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
LICENSE = Path(__file__).parents[1] / "LICENSE"


@pytest.fixture(scope="module")
def loaded() -> Iterator[tuple[Any, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield loading.load("smollm2", EngineConfig(dtype="float32"))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def prompts(loaded: tuple[Any, Any]) -> list[list[int]]:
    tokens = loaded[1](LICENSE.read_text()).input_ids
    starts = [(137 * number) % (len(tokens) - length) for number, length in enumerate(LENGTHS)]
    return [tokens[start : start + length] for start, length in zip(starts, LENGTHS, strict=True)]


@pytest.fixture(scope="module")
def expected(loaded: tuple[Any, Any], prompts: list[list[int]]) -> list[list[int]]:
    model = copy.deepcopy(loaded[0])
    model.set_attn_implementation("sdpa")
    return [generate(model, prompt, num_tokens=NUM_TOKENS, eos=False) for prompt in prompts]


def run(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    return [list(output.token_ids) for output in engine.generate(prompts, GREEDY)]


def make(loaded: tuple[Any, Any], *, chunk: int, connector: Any = None, max_sequences: int = 8) -> Engine:
    config = EngineConfig(max_batch_tokens=chunk, max_sequences=max_sequences, num_pages=600)
    return Engine(*loaded, config, connector=connector)


def test_one_at_a_time_in_chunks(loaded: Any, prompts: list[list[int]], expected: list[list[int]]) -> None:
    with make(loaded, chunk=256) as engine:
        assert [run(engine, [prompt])[0] for prompt in prompts] == expected


def test_eight_at_a_time_in_chunks(loaded: Any, prompts: list[list[int]], expected: list[list[int]]) -> None:
    with make(loaded, chunk=192) as engine:
        assert run(engine, prompts[::-1]) == expected[::-1]


def test_eight_at_a_time_whole(loaded: Any, prompts: list[list[int]], expected: list[list[int]]) -> None:
    with make(loaded, chunk=4096) as engine:
        assert run(engine, prompts) == expected


def test_one_at_a_time_whole(loaded: Any, prompts: list[list[int]], expected: list[list[int]]) -> None:
    # Up to 256 tokens this is what test_one_at_a_time_in_chunks has run.
    with make(loaded, chunk=4096) as engine:
        for prompt, tokens in zip(prompts, expected, strict=True):
            if len(prompt) > 256:
                assert run(engine, [prompt]) == [tokens]


def test_hits_of_whole_and_part_blocks_change_nothing(
    loaded: Any, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    made: list[MemoryConnector] = []
    with make(loaded, chunk=256, connector=connect(made, num_pages=600)) as engine:
        chosen = [number for number, prompt in enumerate(prompts) if 33 <= len(prompt) <= 700]
        for flush in (False, False, True):
            if flush:
                made[0].flush()
            outputs = engine.generate([prompts[number] for number in chosen], GREEDY)
            assert [list(output.token_ids) for output in outputs] == [expected[number] for number in chosen]
        reused = [output.stats.sources for output in outputs]
        assert all(sources["computed"] <= 1 + 16 for sources in reused)
        longest = prompts[LENGTHS.index(700)]
        cut = engine.generate([longest[:603] + prompts[0]], GREEDY)[0]  # 37 blocks and 11 tokens are known
        assert cut.stats.sources["computed"] == len(prompts[0])
        assert list(cut.token_ids) == run_cold(loaded, longest[:603] + prompts[0])


def run_cold(loaded: Any, prompt: list[int]) -> list[int]:
    with make(loaded, chunk=256) as engine:
        return run(engine, [prompt])[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 3e-2)])
def test_kv_in_pages_is_what_transformers_caches(
    loaded: Any, prompts: list[list[int]], dtype: str, tolerance: float
) -> None:
    model = copy.deepcopy(loaded[0]).to(getattr(torch, dtype))
    model.set_attn_implementation("sdpa")
    prompt = prompts[LENGTHS.index(333)]
    with torch.inference_mode():
        cache = model(torch.tensor([prompt]), use_cache=True).past_key_values
    made: list[MemoryConnector] = []
    config = EngineConfig(max_batch_tokens=100, max_sequences=1)
    with Engine(model, None, config, connector=connect(made, num_pages=30)) as engine:
        engine.generate([prompt], SamplingParams(max_tokens=1))
    data = bytes(memoryview(torch.tensor(prompt, dtype=torch.int32).numpy()).cast("B"))
    blocks = torch.stack([made[0].host[data[: 64 * count]] for count in range(1, 333 // 16 + 1)])
    for number, layer in enumerate(cache.layers):
        for part, states in enumerate((layer.keys[0], layer.values[0])):
            got = blocks[:, number, part].transpose(0, 1).flatten(1, 2)  # [heads, tokens, head_dim]
            want = states[:, : got.shape[1]]
            assert (got.float() - want.float()).norm() <= tolerance * want.float().norm()


def test_the_name_loads_weights_and_tokenizer_as_transformers_does(loaded: Any) -> None:
    import transformers

    model, tokenizer = loaded
    path = loading.smollm2()
    other = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert ids == other(text).input_ids
        assert tokenizer.decode(ids) == other.decode(ids)
        assert tokenizer.decode(ids, skip_special_tokens=True) == other.decode(ids, skip_special_tokens=True)
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    assert tokenizer.apply_chat_template(talk, **options) == other.apply_chat_template(talk, **options)
    with loading._quiet():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
    assert theirs.state_dict().keys() == model.state_dict().keys()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    ours, others = model.config.to_dict(), theirs.config.to_dict()
    for name in (
        "rope_parameters",
        "rms_norm_eps",
        "head_dim",
        "max_position_embeddings",
        "eos_token_id",
        "hidden_act",
    ):
        assert ours[name] == others[name]


TEXTS = [
    "Hello world 123 <|im_start|> été 1234567 \n\n  x",
    "  leading and trailing  ",
    "日本語 テスト 🙂👩‍👩‍👧 x",
    "a\tb\r\nc\x00\x01",
    "it's we'LL I'm",
    "<|im_end|>\n<|endoftext|>",
    "price: $12.50, 50% ﬁ Å Å",
    " def f(x):\n    return x**2  # c\n\n\n",
]


def test_a_chat_is_answered(loaded: Any) -> None:
    with make(loaded, chunk=256) as engine:
        answer = engine.chat(
            [{"role": "user", "content": "What is the capital of France? One word."}], SamplingParams(max_tokens=24)
        )
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
    assert "<|im_end|>" not in answer.text
