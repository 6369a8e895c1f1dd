"""compute-sanitizer's memcheck over some of the kernel tests and over an engine with a store; slow, and run on demand.

`python -m bench.gpu.sanitize` is that engine: a tiny model, on the first device. torch's allocator is told to keep nothing, or
what lies beyond a tensor would belong to the next one and be no error.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import torch

from tierkv.engine import SamplingParams
from tierkv.measure.lab import Lab
from tierkv.measure.reuse import leave_only
from tierkv.measure.serving import Shape, llama, prompts, stored

MODEL: Final = Shape("tiny", 256, 512, 2, 4, 2, 512)
FOUND: Final = 77  # the exit code that says so
ROOT: Final = Path(__file__).parent.parent.parent
KERNELS: Final = (
    "edges_of_pages_and_tiles or split_keys or copied_and_others_untouched or gathered_and_scattered or nowhere_else"
    " or latents_are_key or bits_of_the_reference_for_awkward"
)
TESTS: Final = tuple(str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("test_kernels_*.py")))
CHECKS: Final = {
    "kernels": ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "gpu", "-k", KERNELS, *TESTS),
    "an engine with a store": ("-m", "bench.gpu.sanitize"),
}


def run(lab: Lab) -> None:
    if lab.rehearsing:
        engine(lab)
        return
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        lab.absent("compute-sanitizer", "it is not on PATH")
        return
    command = (tool, "--tool", "memcheck", "--target-processes", "all", "--error-exitcode", str(FOUND), sys.executable)
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for name, arguments in CHECKS.items():
        with lab.attempt(f"compute-sanitizer, {name}"):
            done = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, check=False)
            if done.returncode == FOUND:
                raise ArithmeticError("wrong: memcheck found errors, printed above")
            if done.returncode:
                raise RuntimeError(f"exit code {done.returncode}, see above")
            lab.add(f"compute-sanitizer, {name}", 0, "errors")


def engine(lab: Lab) -> None:
    """Prompts computed, saved, forgotten, loaded again; answers that fork."""
    model = llama(lab, MODEL, torch.float32 if lab.rehearsing else torch.bfloat16)
    room = 4096 * MODEL.kv_token_bytes
    with stored(
        lab, model, device_bytes=room, host_bytes=room, max_batch_tokens=64, max_sequences=8, cuda_graphs="off"
    ) as (engine, store):
        given = prompts(MODEL, 3, 70)
        for _ in range(2):
            engine.generate(given, SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.8, n=2))
            leave_only(store, "host")


if __name__ == "__main__":
    engine(Lab(rehearsing=False))
