"""A Llama 3 8B with random weights: its decode step against what memory allows and against others, and a long prefix that
comes back from a tier against computing it again. What needs no peer is `tierkv bench device --full`, too.
"""

import statistics
import tempfile
import time
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

import torch

from tierkv.measure.lab import Lab
from tierkv.measure.reuse import run_prefixes
from tierkv.measure.serving import LLAMA_8B, TINY, Prompts, Shape, llama, llama_config, prompts
from tierkv.measure.steps import WARM, Rates, run_decode, sizes

GOAL_TRANSFORMERS: Final = 2.0


def run(lab: Lab) -> None:
    """What counts most comes first: time may run out."""
    shape = lab.pick(LLAMA_8B, TINY)
    batches, context = sizes(lab)
    model = llama(lab, shape, torch.bfloat16)
    rates = run_decode(lab, model, shape)
    run_prefixes(lab, model, shape)
    del model
    for how, options in (("eager", {"disable_compile": True}), ("compiled", {})):
        for batch in batches[-1:] if how == "compiled" else batches:
            name = f"{shape.name}, decode {batch} x {context} against transformers, static cache, sdpa, {how}"
            with lab.attempt(name):
                theirs = transformers_rate(lab, shape, prompts(shape, batch, context), **options)
                against(lab, name, batch, rates, theirs, GOAL_TRANSFORMERS if batch == batches[-1] else None)
    if find_spec("vllm"):
        for batch in batches:
            name = f"{shape.name}, decode {batch} x {context} against vLLM"
            with lab.attempt(name):
                against(lab, name, batch, rates, vllm_rate(shape, prompts(shape, batch, context)), None)
    else:
        lab.absent(f"{shape.name}, decode against vLLM", "vllm is not installed")


def against(lab: Lab, name: str, batch: int, rates: Rates, theirs: float, goal: float | None) -> None:
    """The row of a peer. Where ours has no figure, theirs stands alone."""
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
