"""What the store costs an engine that gains nothing from it, and whether what comes back is what was there."""

import torch

from tierkv.measure.lab import Lab
from tierkv.measure.reuse import run_identity
from tierkv.measure.serving import LLAMA_1B, TINY, llama
from tierkv.measure.steps import run_beside


def run(lab: Lab) -> None:
    shape = lab.pick(LLAMA_1B, TINY)
    run_beside(lab, llama(lab, shape, torch.bfloat16), shape)
    run_identity(lab)
