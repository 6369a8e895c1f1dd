"""Compile every kernel ahead of time, without a GPU: `python tests/compile_kernels.py 80|90|100`.

The real launchers run on small CPU tensors in the shapes of real models, in front of a stand-in for the driver: what gets
compiled is what would be launched, with the same constants and specialisations. Prints one JSON object per compiled kernel,
`{name, variant, arch, registers, spill_bytes, stack_bytes, shared_bytes, num_warps, seconds}`; exits 1 where one does not
compile. A process of its own, one per architecture: Triton must not interpret here, and it asks for the target once.
"""

import contextlib
import io
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tierkv.kernels.batch import PagedBatch

Launch = Callable[[], object]
Cases = Iterator[tuple[str, Launch]]

PAGE = 16
BF16, FP16, FP32, FP8, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8
_USED = re.compile(r"Used (\d+) registers")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


class Target:
    """What Triton asks a driver when it compiles."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Recorder:
    """Takes the place of JITFunction.run: compiles as for a launch, keeps the result, launches nothing."""

    def __init__(self) -> None:
        self._run = JITFunction.run
        self._seen: set[str] = set()
        self.rows: list[dict[str, Any]] = []

    def __call__(self, function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        started, log = time.perf_counter(), io.StringIO()
        with contextlib.redirect_stdout(log):  # where Triton prints what ptxas said
            kernel = self._run(function, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in self._seen:
            self._seen.add(kernel.hash)
            self.rows.append(self._row(kernel, log.getvalue(), time.perf_counter() - started))
        return kernel

    def _row(self, kernel: Any, log: str, seconds: float) -> dict[str, Any]:
        used, frame = _USED.search(log), _FRAME.search(log)
        if used is None or frame is None:
            raise RuntimeError(f"{kernel.name}: ptxas reported no registers: {log!r}")
        return {
            "name": kernel.name,
            "registers": int(used[1]),
            "spill_bytes": int(frame[2]) + int(frame[3]),
            "stack_bytes": int(frame[1]),
            "shared_bytes": kernel.metadata.shared,
            "num_warps": kernel.metadata.num_warps,
            "seconds": round(seconds, 3),
        }


def paged(dtype: torch.dtype, *, parts: int, heads: int, dim: int, layers: int = 32) -> torch.Tensor:
    """One layer of a pool of two pages."""
    return torch.empty((2, layers, parts, heads, PAGE, dim), dtype=dtype)[:, 1]


def scales(pages: torch.Tensor) -> torch.Tensor | None:
    """As a pool of this dtype has them: one per token and head, or one per head."""
    if pages.dtype == torch.int8:
        return torch.ones(pages.shape[:-1])
    return (
        torch.ones(pages.shape[1:3])[None, :, :, None].expand(pages.shape[:-1]) if pages.element_size() == 1 else None
    )


def step(queries: int, length: int) -> PagedBatch:
    """One sequence that has `queries` tokens in this step."""
    return PagedBatch(
        slots=torch.zeros(queries, dtype=torch.int64),
        tables=torch.zeros((1, -(-length // PAGE)), dtype=torch.int32),
        lengths=torch.tensor([length], dtype=torch.int32),
        cu_seqlens=torch.tensor([0, queries], dtype=torch.int32),
        spans=[(0, queries, length)],
    )


def short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP16: "fp16", FP32: "fp32", FP8: "fp8", INT8: "int8"}[dtype]


def attention(arch: int) -> Cases:
    from tierkv.kernels.gpu.attention import latent_attention, paged_attention

    def case(
        batch: PagedBatch, page: torch.dtype, *, dim: int = 128, dtype: torch.dtype = BF16, **options: Any
    ) -> Launch:
        tokens, pages = batch.spans[0][1], paged(page, parts=2, heads=8, dim=dim)
        query, key = (torch.empty((heads, tokens, dim), dtype=dtype) for heads in (32, 8))
        return lambda: paged_attention(query, key, key, pages, batch, scale=0.1, scales=scales(pages), **options)

    def latent(batch: PagedBatch, page: torch.dtype) -> Launch:
        pages = paged(page, parts=1, heads=1, dim=576)
        query = torch.empty((128, batch.spans[0][1], 576), dtype=BF16)
        return lambda: latent_attention(query, pages, batch, value_dim=512, scale=0.1, scales=scales(pages))

    every: dict[str, Any] = {"window": 1024, "softcap": 30.0, "sinks": torch.zeros(32)}
    for how, batch in (("decode", step(1, 40)), ("prefill", step(512, 1024))):
        for page in (BF16, FP8, INT8):
            yield f"{how} {short(page)}", case(batch, page)
        for dim in (64, 256):
            yield f"{how} bf16 head_dim {dim}", case(batch, BF16, dim=dim)
        yield f"{how} bf16 window softcap sinks", case(batch, BF16, **every)
        for page in (BF16, FP8):
            yield f"{how} latents {short(page)}", latent(batch, page)
        if arch == 90:  # the rest on one architecture, for time
            yield f"{how} int8 head_dim 256 window softcap sinks", case(batch, INT8, dim=256, **every)
            yield f"{how} fp16", case(batch, FP16, dtype=FP16)
            yield f"{how} fp16 head_dim 96", case(batch, FP16, dtype=FP16, dim=96)
            yield f"{how} fp32", case(batch, FP32, dtype=FP32)
    yield "split bf16", case(step(1, 60_000), BF16)
    yield "split latents bf16", latent(step(1, 60_000), BF16)


def pages(arch: int) -> Cases:
    from tierkv.kernels.gpu.pages import copy_pages, gather_blocks, scatter_blocks, write_kv, write_latents
    from tierkv.kernels.layers import LayerPools

    new = step(512, 1024)
    for dim in (128, 80) if arch == 90 else (128,):
        key = torch.empty((512, 8, dim), dtype=BF16).transpose(0, 1)
        for page in (BF16, FP8, INT8):
            target = paged(page, parts=2, heads=8, dim=dim)
            yield f"{short(page)} head_dim {dim}", partial(write_kv, key, key, target, new, scales=scales(target))
    for page in (BF16, FP8, INT8):
        target = paged(page, parts=1, heads=1, dim=576)
        states = torch.empty((1, 512, 576), dtype=BF16)
        yield f"latents {short(page)}", partial(write_latents, states, target, new, scales=scales(target))
    for dtype in (BF16, INT8):
        pool = torch.empty((4, 32, 2, 8, PAGE, 128), dtype=dtype)
        yield f"whole {short(dtype)}", partial(copy_pages, pool, [0, 2], [1, 3])
        yield f"part {short(dtype)}", partial(copy_pages, pool, [0, 2], [1, 3], tokens=[3, 9])
        slots = torch.zeros((1, PAGE), dtype=torch.int64)
        for engine, pools in (
            ("vLLM NHD", LayerPools.vllm([torch.empty((2, 3, PAGE, 8, 128), dtype=dtype)] * 32, head_dim=128)),
            ("vLLM HND", LayerPools.vllm([torch.empty((3, 8, PAGE, 256), dtype=dtype)] * 32, head_dim=128)),
            ("SGLang", LayerPools.sglang(*[[torch.empty((32, 8, 128), dtype=dtype)] * 32] * 2)),
        ):
            yield f"gather {engine} {short(dtype)}", partial(gather_blocks, pools, slots, pool[:1])
            yield f"scatter {engine} {short(dtype)}", partial(scatter_blocks, pool[:1], pools, slots)


def quant(arch: int) -> Cases:
    module = import_module("tierkv.kernels.gpu.quant")
    reference = import_module("tierkv.kernels.quant")
    for form, group in (("fp8", None), ("int8", None), ("int4", (PAGE, 1)), ("int4", (1, 32))):
        options: dict[str, Any] = {} if group is None else {"group": group}
        for dim in (128, 192) if arch == 90 else (128,):
            tiles = torch.zeros((512, PAGE, dim), dtype=BF16)
            payload = getattr(reference, f"encode_{form}")(tiles, **options)
            variant = f"{form} {group or ''} head_dim {dim}"
            yield f"encode {variant}", partial(getattr(module, f"encode_{form}"), tiles, **options)
            yield f"decode {variant}", partial(getattr(module, f"decode_{form}"), *payload, **options, dtype=BF16)


SUITES = (attention, pages, quant)


def main(arch: int) -> int:
    driver.set_active(Target(arch))
    triton.knobs.compilation.always_compile = True  # ptxas says nothing about a kernel from the cache
    triton.knobs.nvidia.dump_ptxas_log = True
    recorder = Recorder()
    JITFunction.run = lambda function, *args, **options: recorder(function, *args, **options)
    failed = False
    for suite in SUITES:
        for variant, launch in suite(arch):
            try:
                launch()
            except Exception as error:  # noqa: BLE001 - whatever a compiler raises; the other kernels are still reported
                failed = True
                print(f"sm_{arch} {variant}: {type(error).__name__}: {error}", file=sys.stderr)
            for row in recorder.rows:
                print(json.dumps({"variant": variant, "arch": arch} | row), flush=True)
            recorder.rows.clear()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
