"""Prefill: many new tokens of one sequence. The peer is FlashAttention, as torch has it, on contiguous KV."""

from typing import Final

import torch
from torch.nn.attention import SDPBackend

from tierkv.measure.inputs import LLAMA, TINY, Paged
from tierkv.measure.lab import Lab

from . import peers

GOAL: Final = 0.8


def run(lab: Lab) -> None:
    for label, count, length in (
        ("8k", *lab.pick((8192, 8192), (24, 24))),
        ("1k on 31k", *lab.pick((1024, 32768), (12, 40))),
    ):
        with lab.attempt(f"prefill {label}"):
            measure(lab, f"prefill {label}", count, length)


def measure(lab: Lab, name: str, count: int, length: int) -> None:
    model = lab.pick(LLAMA, TINY)
    paged = Paged(lab, model, [length], queries=[count], dtype=torch.bfloat16)
    calls, reference = paged.calls(lab, count=4), paged.reference(0)
    error = lab.checked(calls[0], reference)
    timing = lab.time(calls)
    pairs = count * (length - count) + count * (count + 1) // 2
    tflop = 4 * model.heads * model.dim * pairs / 1e12
    for peer, backend, goal in (
        ("FlashAttention (torch sdpa)", SDPBackend.FLASH_ATTENTION, GOAL),
        ("cuDNN (torch sdpa)", SDPBackend.CUDNN_ATTENTION, None),
    ):
        with lab.attempt(f"{name} against {peer}"):
            theirs = fastest(lab, paged, reference, lab.pick(backend, SDPBackend.MATH))
            lab.add(
                f"{name} against {peer}",
                tflop / timing.seconds,
                "TFLOP/s",
                limit_name=peer,
                limit=tflop / theirs,
                goal=goal,
                rounds=timing.rounds,
                error=error,
                graph=timing.graph,
            )


def fastest(lab: Lab, paged: Paged, reference: torch.Tensor, backend: SDPBackend) -> float:
    """Seconds of the peer in its better form; which one a version of torch takes differs."""
    seconds, refusals = [], []
    for grouped in (True, False):
        try:
            calls = peers.prefill(lab, paged, backend, grouped=grouped)
            lab.checked(calls[0], reference, fault=RuntimeError)
            seconds.append(lab.time(calls).seconds)
        except RuntimeError as refusal:
            refusals.append(refusal)
    if not seconds:
        raise refusals[-1]
    return min(seconds)
