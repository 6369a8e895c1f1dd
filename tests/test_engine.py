"""What a user of the engine sees: requests in, text out, and clear refusals."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine_models import byte_model, byte_tokenizer, generate, random_prompts, tiny_model
from tierkv.engine import Engine, EngineConfig, PrivatePages, RequestOutput, SamplingParams
from tierkv.engine.text import TextStream
from tierkv.errors import ConfigError, ModelError, RequestError, TierKVError

CONFIG = EngineConfig(block_tokens=4, num_pages=120, max_batch_tokens=24, max_sequences=6)
TOKENIZER = byte_tokenizer()
ENGINE_MODEL, REFERENCE = byte_model(), byte_model()
LONG = SamplingParams(max_tokens=30, ignore_eos=True)
RANDOM = replace(LONG, temperature=1.5, seed=11)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(ENGINE_MODEL, TOKENIZER, CONFIG) as made:
        yield made
        assert num_free(made) == 120 or made.has_work
    assert num_free(made) == 120


def num_free(engine: Engine) -> int:
    assert isinstance(engine.connector, PrivatePages)
    return engine.connector.num_free


def run_all(engine: Engine) -> list[RequestOutput]:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


# -- output -----------------------------------------------------------------------------------------------------------


def test_outputs_come_in_the_order_of_their_prompts(engine: Engine) -> None:
    prompts = ["a", "a longer prompt than the others are", "bc"]
    together = engine.generate(prompts, LONG)
    assert [output.token_ids for output in together] == [
        engine.generate([prompt], LONG)[0].token_ids for prompt in prompts
    ]
    assert [output.prompt_tokens for output in together] == [1, 35, 2]


def test_one_prompt_is_a_batch_of_one(engine: Engine) -> None:
    by_text, by_ids = engine.generate("hi", LONG), engine.generate(TOKENIZER("hi").input_ids, LONG)
    assert len(by_text) == len(by_ids) == 1
    assert by_text[0].token_ids == by_ids[0].token_ids
    assert engine.generate([], LONG) == []


def test_every_prompt_may_have_its_own_parameters(engine: Engine) -> None:
    outputs = engine.generate(["x", "y"], [SamplingParams(max_tokens=1), SamplingParams(max_tokens=3, ignore_eos=True)])
    assert [len(output.token_ids) for output in outputs] == [1, 3]


def test_streamed_pieces_join_to_the_text_of_generate(engine: Engine) -> None:
    for seed in range(8):
        params = replace(RANDOM, seed=seed)
        pieces = list(engine.stream("stream", params))
        whole = engine.generate("stream", params)[0]
        assert "".join(piece.text for piece in pieces) == whole.text
        assert [token for piece in pieces for token in piece.token_ids] == list(whole.token_ids)
        assert whole.text == TOKENIZER.decode(whole.token_ids, skip_special_tokens=True)
        assert [piece.stats is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_characters_of_several_bytes_are_never_cut() -> None:
    text = "é日🙂👩‍👩‍👧 done"
    stream, pieces = TextStream(TOKENIZER, (), skip_special_tokens=True), []
    for token in TOKENIZER(text).input_ids:
        stream.feed(token)
        pieces.append(stream.take())
    assert "".join(pieces) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert {len(piece) for piece in pieces} == {0, 1}


def test_an_unfinished_character_comes_out_at_the_end() -> None:
    stream = TextStream(TOKENIZER, (), skip_special_tokens=True)
    tokens = TOKENIZER("a🙂").input_ids[:-1]
    for token in tokens:
        stream.feed(token)
    assert stream.take() == "a"
    stream.flush()
    assert "a" + stream.take() == TOKENIZER.decode(tokens)


def test_requests_of_others_lose_nothing_to_generate_and_stream(engine: Engine) -> None:
    mine = engine.add("mine", LONG)
    stream = engine.stream("streamed", LONG)
    first = next(stream)
    engine.generate(["theirs"], LONG)
    rest = list(stream)
    outputs = run_all(engine)
    assert {output.request for output in outputs} == {mine}
    assert [token for output in outputs for token in output.token_ids] == list(
        engine.generate("mine", LONG)[0].token_ids
    )
    assert [t for piece in [first, *rest] for t in piece.token_ids] == list(
        engine.generate("streamed", LONG)[0].token_ids
    )


def test_a_chat_is_rendered_by_the_template(engine: Engine) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert TOKENIZER.decode(engine.chat_prompt(messages)) == "<begin>user: hi\n"
    assert engine.chat(messages, LONG).token_ids == engine.generate([engine.chat_prompt(messages)], LONG)[0].token_ids


# -- ends -------------------------------------------------------------------------------------------------------------


def test_the_models_end_token_ends_a_request(engine: Engine) -> None:
    free = engine.generate("end", RANDOM)[0]
    stop = free.token_ids[5]
    ended = engine.generate("end", replace(RANDOM, stop_token_ids=[stop]))[0]
    assert ended.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert (ended.finish_reason, ended.samples[0].stop_reason) == ("stop", stop)
    assert ended.text == TOKENIZER.decode(ended.token_ids[:-1], skip_special_tokens=True)
    assert free.finish_reason == "length"


def test_greedy_output_stops_at_eos_as_transformers_does() -> None:
    model, reference = tiny_model(), tiny_model()
    (prompt,) = random_prompts([9])
    free = generate(reference, prompt, num_tokens=12)
    for config in (model.generation_config, reference.generation_config):
        config.eos_token_id = [free[6], 95]
    with Engine(model, None, CONFIG) as engine:
        assert list(engine.generate([prompt], SamplingParams(max_tokens=12))[0].token_ids) == generate(
            reference, prompt, num_tokens=12
        )
        assert len(engine.generate([prompt], SamplingParams(max_tokens=12, ignore_eos=True))[0].token_ids) == 12


def test_a_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    free = engine.generate("stop", RANDOM)[0]
    stop = free.text[9:12]
    ended = engine.generate("stop", replace(RANDOM, stop=[stop, "never to be seen"]))[0]
    assert ended.text == free.text[: free.text.index(stop)]
    assert (ended.finish_reason, ended.samples[0].stop_reason) == ("stop", stop)
    assert len(ended.token_ids) < len(free.token_ids)


def test_no_part_of_a_stop_string_is_streamed(engine: Engine) -> None:
    for seed in range(5):
        params = replace(RANDOM, seed=seed)
        text = engine.generate("leak", params)[0].text
        stop = text[8:13]
        shown = ""
        for piece in engine.stream("leak", replace(params, stop=stop)):
            shown += piece.text
            assert text[: text.index(stop)].startswith(shown)
        assert shown == text[: text.index(stop)]


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        ("END", "so "),
        ("so END", ""),
        ("o", "s"),
        ("ENDED", "so "),
        ("NDE", "so E"),
        ("D. ", "so ENDE"),
        ("x", "so ENDED. "),
    ],
)
def test_stop_strings_over_any_cut(stop: str, shown: str) -> None:
    stream = TextStream(TOKENIZER, [stop], skip_special_tokens=True)
    pieces = []
    for token in TOKENIZER("so ENDED. ").input_ids:
        ended = stream.feed(token)
        pieces.append(stream.take())
        if ended:
            break
    stream.flush()
    assert "".join(pieces) + stream.take() == shown


def test_the_first_of_two_stop_strings_wins() -> None:
    stream = TextStream(TOKENIZER, ["de", "bcd"], skip_special_tokens=True)
    assert [stream.feed(token) for token in TOKENIZER("abcd").input_ids] == [False, False, False, True]
    assert (stream.take(), stream.stopped_by) == ("a", "bcd")


def test_the_context_ends_a_request() -> None:
    with Engine(ENGINE_MODEL, TOKENIZER, replace(CONFIG, max_context=20)) as engine:
        output = engine.generate("ten tokens", LONG)[0]
        assert (len(output.token_ids), output.finish_reason) == (10, "length")


def test_the_pool_ends_a_request_that_is_alone() -> None:
    with Engine(ENGINE_MODEL, TOKENIZER, replace(CONFIG, num_pages=5)) as engine:
        output = engine.generate("ten tokens", LONG)[0]
        assert (len(output.token_ids), output.finish_reason) == (10, "length")


# -- samples, forks, aborts -------------------------------------------------------------------------------------------


def test_a_seeded_request_does_not_depend_on_its_company(engine: Engine) -> None:
    alone = engine.generate("same", RANDOM)[0].token_ids
    crowd = engine.generate(["other", "same", "more", "x" * 40], [LONG, RANDOM, replace(RANDOM, seed=3), LONG])
    assert crowd[1].token_ids == alone
    assert engine.generate("same", replace(RANDOM, seed=12))[0].token_ids != alone


def test_samples_share_the_prompt_and_differ_in_output(engine: Engine) -> None:
    output = engine.generate("eleven toks", replace(RANDOM, n=4))[0]
    assert len({sample.token_ids for sample in output.samples}) == 4
    assert output.stats.sources == {"computed": 11}
    assert output.stats.output_tokens == 4 * 30
    assert output.token_ids == engine.generate("eleven toks", RANDOM)[0].token_ids  # the first is what n=1 gives
    assert num_free(engine) == 120


def test_more_samples_than_places_wait_for_theirs(engine: Engine) -> None:
    params = replace(RANDOM, n=6)
    busy = engine.add("busy", LONG)
    crowded = engine.generate("samples", params)[0]
    engine.abort(busy)
    assert crowded.samples == engine.generate("samples", params)[0].samples


def test_samples_of_a_request_stream_by_index(engine: Engine) -> None:
    params = replace(RANDOM, n=3, max_tokens=8)
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for piece in engine.stream("indexed", params):
        tokens[piece.index] += piece.token_ids
    assert [tuple(tokens[i]) for i in range(3)] == [s.token_ids for s in engine.generate("indexed", params)[0].samples]


def test_a_fork_goes_on_from_its_parent(engine: Engine) -> None:
    parent = engine.add("a prompt to fork", LONG)
    before = [output for _ in range(7) for output in engine.step()]
    used = num_free(engine)
    child = engine.fork(parent)
    assert num_free(engine) == used  # pages are shared
    outputs = before + run_all(engine)
    tokens = {name: [t for o in outputs if o.request == name for t in o.token_ids] for name in (parent, child)}
    count = sum(len(output.token_ids) for output in before)
    assert 0 < count < 30
    assert tokens[child] == tokens[parent][count:]
    assert tuple(tokens[parent]) == engine.generate("a prompt to fork", LONG)[0].token_ids


def test_a_fork_may_be_sampled_otherwise(engine: Engine) -> None:
    parent = engine.add("fork me", RANDOM)
    engine.step(), engine.step()
    children = [engine.fork(parent), engine.fork(parent, replace(RANDOM, seed=99)), engine.fork(parent, LONG)]
    outputs = run_all(engine)
    tails = [[t for o in outputs if o.request == name for t in o.token_ids] for name in (parent, *children)]
    assert len({tuple(tail) for tail in tails}) == 4


def test_forks_of_what_is_not_under_way_are_refused(engine: Engine) -> None:
    request = engine.add("x", SamplingParams(max_tokens=1))
    run_all(engine)
    for name in (request, "never seen"):
        with pytest.raises(RequestError, match="unknown or finished"):
            engine.fork(name)


def test_an_abort_ends_output_and_frees_pages(engine: Engine) -> None:
    request = engine.add("abort me", LONG)
    engine.step(), engine.step()
    engine.abort(request)
    engine.abort(request)
    assert not engine.has_work
    assert num_free(engine) == 120


def test_leaving_a_stream_aborts_it(engine: Engine) -> None:
    for piece in engine.stream("left early", LONG):
        if piece.token_ids:
            break
    assert not engine.has_work
    assert num_free(engine) == 120


def test_ctrl_c_in_generate_aborts_its_own_requests_only(engine: Engine) -> None:
    engine.add("mine", LONG)
    batches: list[int] = []

    def interrupt(module: Any, args: Any, kwargs: Any) -> None:
        batches.append(len(kwargs["logits_to_keep"]))
        if len(batches) == 4:
            raise KeyboardInterrupt

    hook = ENGINE_MODEL.register_forward_pre_hook(interrupt, with_kwargs=True)
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.generate(["one", "two"], LONG)
    finally:
        hook.remove()
    assert batches[-1] == 3
    tokens = [token for output in run_all(engine) for token in output.token_ids]
    assert tuple(tokens) == engine.generate("mine", LONG)[0].token_ids


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_statistics_are_by_the_clock_given() -> None:
    ticks = iter(range(10_000))
    with Engine(ENGINE_MODEL, TOKENIZER, CONFIG, clock=lambda: float(next(ticks))) as engine:
        output = engine.generate("tick", SamplingParams(max_tokens=4, ignore_eos=True))[0]
        assert output.stats.queue_s > 0
        assert output.stats.ttft_s > output.stats.queue_s
        assert output.stats.tpot_s is not None and output.stats.tpot_s > 0
        assert (output.stats.prompt_tokens, output.stats.output_tokens, output.stats.preemptions) == (4, 4, 0)
        assert engine.stats.steps == 4
        assert engine.stats.tokens == 4 + 3
        assert 0 < engine.stats.other_share < 1
        assert engine.metrics.ttft_seconds.count() == engine.metrics.tpot_seconds.count() == 1
        assert engine.metrics.tokens_missed.value() == 4


def test_log_probabilities_come_with_every_token(engine: Engine) -> None:
    output = engine.generate("probable", SamplingParams(max_tokens=5, logprobs=3, ignore_eos=True))[0]
    assert [entry.token for entry in output.samples[0].logprobs] == list(output.token_ids)
    for entry in output.samples[0].logprobs:
        assert entry.top[0] == (entry.token, entry.logprob)  # greedy
        assert len(entry.top) == 3
    pieces = [
        entry
        for piece in engine.stream("probable", SamplingParams(max_tokens=5, logprobs=3, ignore_eos=True))
        for entry in piece.logprobs
    ]
    assert tuple(pieces) == output.samples[0].logprobs


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "says"),
    [
        ("", LONG, "empty prompt"),
        ([], LONG, "empty prompt"),
        ("x" * 256, LONG, "context holds 256"),
        ([0, 258], LONG, "vocabulary"),
        ([-1], LONG, "vocabulary"),
        ([1.5], LONG, "prompt"),
        ([2**40], LONG, "prompt"),
        ("x", replace(RANDOM, n=7), "n=7"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_in_one_line(
    engine: Engine, prompt: Any, params: SamplingParams, says: str
) -> None:
    with pytest.raises(RequestError, match=says) as refused:
        engine.add(prompt, params)
    assert "\n" not in str(refused.value)
    assert not engine.has_work


def test_a_prompt_larger_than_the_pool_is_refused() -> None:
    with Engine(ENGINE_MODEL, TOKENIZER, replace(CONFIG, num_pages=4)) as engine:
        with pytest.raises(RequestError, match="page pool holds 16"):
            engine.add("x" * 16)
        assert engine.generate("x" * 15, LONG)[0].finish_reason == "length"


def test_an_id_in_use_is_refused(engine: Engine) -> None:
    engine.add("x", LONG, request_id="mine")
    with pytest.raises(RequestError, match="in use"):
        engine.add("y", LONG, request_id="mine")
    engine.abort("mine")


def test_a_refused_prompt_in_a_batch_takes_the_batch_back(engine: Engine) -> None:
    with pytest.raises(RequestError):
        engine.generate(["fine", ""], LONG)
    assert not engine.has_work


def test_text_needs_a_tokenizer() -> None:
    with Engine(ENGINE_MODEL, None, CONFIG) as engine:
        for ask in (
            lambda: engine.add("text"),
            lambda: engine.add([1], SamplingParams(stop="x")),
            lambda: engine.chat([]),
        ):
            with pytest.raises(RequestError):
                ask()


def test_a_closed_engine_takes_no_requests(engine: Engine) -> None:
    engine.add("x", LONG)
    engine.close()
    engine.close()
    with pytest.raises(RequestError, match="closed"):
        engine.add("x")


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "int4"},
        {"device": "tpu"},
        {"device": "cpu:1"},
        {"num_pages": 0},
        {"num_pages": 5, "pool_bytes": 5},
        {"pool_bytes": "1GiB"},
        {"block_tokens": 0},
        {"max_batch_tokens": 4, "max_sequences": 8},
        {"max_context": 0},
        {"seed": -1},
        {"num_threads": 0},
        {"num_threads": 10**6},
        {"cuda_graphs": "on"},
        {"gpu_memory_utilization": 0.0},
        {"gpu_memory_utilization": 1},
    ],
    ids=str,
)
def test_a_wrong_configuration_is_refused_in_one_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))) as refused:
        EngineConfig(**wrong)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"max_context": 257}, "made for 256"),
        ({"num_pages": None, "pool_bytes": 100}, "one page"),
        ({"device": "cuda:63"}, "cuda"),
    ],
)
def test_a_configuration_that_does_not_fit_the_model_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Engine(ENGINE_MODEL, None, replace(CONFIG, **wrong))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder, "not a model folder"),
        (lambda folder: folder / "absent", "no such folder"),
        (lambda folder: folder / "absent.gguf", "no such file"),
        (lambda folder: "someone/never-downloaded", "hub cache"),
    ],
)
def test_what_is_no_model_is_refused_with_the_remedy(tmp_path: Path, make: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says) as refused:
        Engine.from_pretrained(make(tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 40, b"not a model at all"])
def test_a_damaged_gguf_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with pytest.raises(TierKVError):
        Engine.from_pretrained(path)


@pytest.mark.parametrize("config", ["{", '{"model_type": "no-such-kind"}', "{}"])
def test_a_damaged_model_folder_is_refused(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError) as refused:
        Engine.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_model_folder_is_loaded_with_its_tokenizer(tmp_path: Path) -> None:
    byte_model(seed=3).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with Engine.from_pretrained(tmp_path, CONFIG) as engine, Engine(byte_model(seed=3), TOKENIZER, CONFIG) as same:
        assert engine.generate("folder", LONG)[0].text == same.generate("folder", LONG)[0].text
        assert engine.layout.dtype == "float32"


def test_weights_and_what_decides_kv_are_the_identity(tmp_path: Path) -> None:
    from tierkv.engine.loading import identity

    first = identity(byte_model(seed=1))
    assert identity(byte_model(seed=1)) == first
    assert identity(byte_model(seed=2)) != first
    other = byte_model(seed=1)
    other.config.rms_norm_eps = 1e-4
    assert identity(other) != first
    renamed = byte_model(seed=1)
    renamed.config._name_or_path, renamed.config.use_cache = "elsewhere", False
    assert identity(renamed) == first
    byte_model(seed=1).save_pretrained(tmp_path)
    import transformers

    assert identity(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)) == first
