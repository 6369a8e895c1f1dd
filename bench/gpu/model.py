"""A Llama 3 8B with random weights: its decode step against what memory allows and against others, and a long prefix that
comes back from a tier against computing it again.
"""

import statistics
import tempfile
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch

from tierkv.engine import Engine, SamplingParams
from tierkv.measure.lab import Lab
from tierkv.store import Store
from tierkv.transfers import HOST

from .serving import (
    LLAMA_8B,
    TINY,
    Prompts,
    Shape,
    decoding,
    llama,
    llama_config,
    plain,
    prompts,
    seconds_per_step,
    stop,
    stored,
)

GOAL_STEP: Final = 0.6  # of the time that reading weights and KV takes; batch 64 is reported
GOAL_TRANSFORMERS: Final = 2.0
GOAL_HOST: Final = 8.0  # times the speed of computing it
GOAL_DISK: Final = 3.0
WARM: Final = 8  # steps of a batch that are not counted
ROUNDS: Final = 4
OF: Final = "Llama 3 8B"
Rates = dict[int, float]  # tokens a second, by batch


def run(lab: Lab) -> None:
    """What counts most comes first: time may run out."""
    shape = lab.pick(LLAMA_8B, TINY)
    context, batches = lab.pick((2048, (1, 64)), (24, (1, 3)))
    model = llama(lab, shape, torch.bfloat16)
    rates: Rates = {}
    with lab.attempt(f"{OF}, decode"):
        decode(lab, model, shape, batches, context, rates)
    with lab.attempt(f"{OF}, a prefix from the host"):
        prefix(lab, model, shape, None)
    if find_spec("zarr"):
        with lab.attempt(f"{OF}, a prefix from disk"), tempfile.TemporaryDirectory(prefix="tierkv-") as folder:
            prefix(lab, model, shape, Path(folder) / "kv")
    else:
        lab.absent(f"{OF}, a prefix from disk", "zarr is not installed")
    del model
    for how, options in (("eager", {"disable_compile": True}), ("compiled", {})):
        for batch in batches[-1:] if how == "compiled" else batches:
            with lab.attempt(f"{OF}, decode {batch} x {context} against transformers, {how}"):
                theirs = transformers_rate(lab, shape, prompts(lab, shape, batch, context), **options)
                against(lab, batch, context, rates, f"transformers, static cache, sdpa, {how}", theirs, batches[-1])
    if find_spec("vllm"):
        for batch in batches:
            with lab.attempt(f"{OF}, decode {batch} x {context} against vLLM"):
                theirs = vllm_rate(shape, prompts(lab, shape, batch, context))
                against(lab, batch, context, rates, "vLLM", theirs, None)
    else:
        lab.absent(f"{OF}, decode against vLLM", "vllm is not installed")


def decode(lab: Lab, model: Any, shape: Shape, batches: tuple[int, ...], context: int, rates: Rates) -> None:
    """A step with its sampling, until the tokens are on the host."""
    steps = lab.pick(48, 2)
    # The rows of the embedding that a step looks up are nothing beside the rest, all of which it reads.
    weights = sum(parameter.nbytes for parameter in model.parameters()) - model.get_input_embeddings().weight.nbytes
    room = max(batches) * (context + steps + WARM + 128)
    with plain(
        lab,
        model,
        pool_bytes=room * shape.kv_token_bytes,
        max_batch_tokens=lab.pick(8192, 32),
        max_sequences=max(batches),
    ) as engine:
        for batch in batches:
            requests = decoding(engine, prompts(lab, shape, batch, context), steps=steps + WARM)
            seconds_per_step(engine, WARM)
            step_s = statistics.median(seconds_per_step(engine, steps))
            stop(engine, requests)
            rates[batch] = batch / step_s
            kv = batch * (context + WARM + steps // 2) * shape.kv_token_bytes
            lab.add(
                f"{OF}, decode {batch} x {context}",
                rates[batch],
                "tok/s",
                limit_name="weights + KV at copy bandwidth",
                limit=batch * lab.copy_gbps() * 1e9 / (weights + kv),
                goal=GOAL_STEP if batch == 1 else None,
                rounds=steps,
                step_ms=step_s * 1e3,
                graph=engine.stats.graph_steps > 0,
            )


def against(lab: Lab, batch: int, context: int, rates: Rates, peer: str, theirs: float, goal_at: int | None) -> None:
    """The row of a peer. Where ours has no figure, theirs stands alone."""
    goal = GOAL_TRANSFORMERS if batch == goal_at else None
    name = f"{OF}, decode {batch} x {context} against {peer}"
    if batch in rates:
        lab.add(name, rates[batch], "tok/s", limit_name="theirs", limit=theirs, goal=goal)
    else:
        lab.add(f"{name}: theirs", theirs, "tok/s")


def transformers_rate(lab: Lab, shape: Shape, batch: Prompts, **options: Any) -> float:
    """Tokens a second of transformers' own generate, compiled unless told not to; prefill and first steps left out."""
    model = llama(lab, shape, torch.bfloat16)
    model.set_attn_implementation("sdpa")
    steps = lab.pick(32, 2)
    moments: list[float] = []

    def between(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if not lab.rehearsing:
            torch.cuda.synchronize()
        moments.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    with torch.inference_mode():
        model.generate(
            torch.tensor(batch, device=lab.device),
            attention_mask=torch.ones((len(batch), len(batch[0])), dtype=torch.int64, device=lab.device),
            max_new_tokens=WARM + steps,
            min_new_tokens=WARM + steps,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static",
            stopping_criteria=[between],
            **options,
        )
    taken = [after - before for before, after in zip(moments[WARM:], moments[WARM + 1 :], strict=False)]
    return len(batch) / statistics.median(taken)


def vllm_rate(shape: Shape, batch: Prompts) -> float:
    """Tokens a second of vLLM's, with weights of its own making: a long answer's time less a short one's."""
    vllm = import_module("vllm")

    steps = 64
    with tempfile.TemporaryDirectory(prefix="tierkv-") as folder:
        llama_config(shape).save_pretrained(folder)
        engine = vllm.LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", gpu_memory_utilization=0.6,
            max_model_len=len(batch[0]) + 4 * steps, max_num_seqs=len(batch),
        )  # fmt: skip
        given = [{"prompt_token_ids": prompt} for prompt in batch]

        def seconds(num_tokens: int) -> float:
            params = vllm.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
            start = time.perf_counter()
            engine.generate(given, params, use_tqdm=False)
            return time.perf_counter() - start

        seconds(2)
        return len(batch) * steps / (seconds(2 + steps) - seconds(2))  # the second time, the prefix is cached


def prefix(lab: Lab, model: Any, shape: Shape, disk: Path | None) -> None:
    """Time to the first token of a prompt that was served before, all but its last token found in one tier."""
    length, tier = lab.pick(8192, 48), "disk" if disk else "host"
    room = 3 * (length + 64) * shape.kv_token_bytes
    computed_s, found_s = [], []
    with stored(
        lab,
        model,
        device_bytes=room,
        host_bytes=room,
        disk=disk,
        max_batch_tokens=length + 64,
        max_sequences=4,
    ) as (engine, store):
        for number in range(1 + lab.pick(ROUNDS, 1)):
            (prompt,) = prompts(lab, shape, 1, length + 1)
            taken = [first_token(engine, prompt, "computed", length)]
            leave_only(store, tier)
            taken.append(first_token(engine, prompt, tier, length))
            if number:  # the first round compiles
                computed_s.append(taken[0])
                found_s.append(taken[1])
    found = statistics.median(found_s)
    lab.add(
        f"{OF}, first token after {length} tokens from {tier}",
        length / found,
        "tok/s",
        limit_name="computing them",
        limit=length / statistics.median(computed_s),
        goal=GOAL_DISK if disk else GOAL_HOST,
        rounds=len(found_s),
        ttft_ms=found * 1e3,
    )


def first_token(engine: Engine, prompt: list[int], source: str, length: int) -> float:
    """Seconds until a prompt's first token. Raises RuntimeError unless its prefix came from `source`."""
    (output,) = engine.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True))
    if output.stats.sources.get(source, 0) < length:
        raise RuntimeError(
            f"{length} tokens should have come from {source}, and came from {dict(output.stats.sources)}"
        )
    return output.stats.ttft_s


def leave_only(store: Store, tier: str) -> None:
    """Copy all down, then forget what lies above a tier."""
    store.flush()
    store.evict_device()
    if tier == "disk":
        store.index.evict(HOST)
