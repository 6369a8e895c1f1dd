"""Tokens per second of warming, against the engine's own prefill of the same prompts."""

import statistics
import time
from pathlib import Path
from typing import Any

from bench.warm.documents import folder
from tierkv.assembly import load_model, open_engine
from tierkv.cli_warm import only
from tierkv.config import Config, load
from tierkv.engine import Engine, SamplingParams
from tierkv.warm.inputs import read_inputs
from tierkv.warm.plan import make_plan
from tierkv.warm.rendering import render
from tierkv.warm.run import CHUNK_TOKENS, Warmer, tokens_of

ONE = SamplingParams(max_tokens=1, ignore_eos=True)


def run(where: Path, *, rounds: int, threads: int) -> list[dict[str, Any]]:
    own = load(environ={}, overrides=[f"engine.num_threads={threads}"]).config
    loaded = load_model("smollm2", own)
    for_warm = load_model("smollm2", _settings(where / "none", threads))
    rows = []
    for name, count, paragraphs in (("30 documents", 30, 2), ("4 long documents", 4, 16)):
        docs = folder(where / name.replace(" ", "-"), count=count, paragraphs=paragraphs, shared=False)
        items = read_inputs([str(docs)], max_bytes=1 << 20).items
        rendered = render(items, loaded.tokenizer, max_tokens=8191, vocab_size=1 << 20).documents
        plan = make_plan([one.tokens for one in rendered], block_tokens=16)
        prompts = [tokens_of(path) for path in plan.paths]
        total = sum(len(prompt) for prompt in prompts)
        bare, warm = [], []
        for number in range(rounds + 1):  # the first is not counted
            with Engine(loaded.weights, loaded.tokenizer, loaded.config) as engine:
                began = time.perf_counter()
                engine.generate(prompts, ONE)
                bare.append(total / (time.perf_counter() - began))
            config = _settings(where / f"{count}-{number}", threads)
            with open_engine(for_warm, config, fills=True) as (engine, store):
                began = time.perf_counter()
                done = Warmer(engine, store, plan, into=store.below).run()  # until all of it is on disk
                warm.append(done.computed_tokens / (time.perf_counter() - began))
                assert done.kept == {"disk": plan.num_blocks}
        pairs = [one / other for one, other in zip(warm[1:], bare[1:], strict=True)]
        rows.append(
            {
                "name": f"warm into disk, {name}, {plan.unique_tokens:,} tokens",
                "value": statistics.median(warm[1:]),
                "unit": "tok/s",
                "limit_name": "the engine's own prefill",
                "limit": statistics.median(bare[1:]),
                "ratio": statistics.median(pairs),
                "rounds": rounds,
            }
        )
    return rows


def _settings(folder: Path, threads: int) -> Config:
    """What `tierkv warm --set disk.path=…` runs with."""
    overrides = [f"disk.path={folder}", "disk.capacity=4GiB", f"engine.num_threads={threads}"]
    return only(load(environ={}, overrides=overrides).config, ["disk"], tenant=None, ttl_s=None, chunk=CHUNK_TOKENS)
