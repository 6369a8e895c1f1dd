"""Decode attention: one new token of every sequence. The limit is reading the KV once, at the bandwidth of a copy."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from tierkv.measure.inputs import LLAMA, TINY, Paged
from tierkv.measure.lab import Lab, Tensor, Timing


class Decoded(NamedTuple):
    """What was measured, for whoever compares it with others."""

    calls: list[Callable[[], Tensor]]
    reference: Tensor
    timing: Timing


def run(lab: Lab) -> None:
    """A full batch and one long sequence of a Llama 3 8B layer."""
    for label, lengths in (
        ("64 x 8k", lab.pick([8192] * 64, [40] * 2)),
        ("1 x 128k", lab.pick([131072], [70])),
    ):
        with lab.attempt(f"decode {label} bf16"):
            decode(lab, f"decode {label} bf16", Paged(lab, lab.pick(LLAMA, TINY), lengths, dtype=torch.bfloat16), None)


def decode(lab: Lab, name: str, paged: Paged, goal: float | None) -> Decoded:
    """Check a step's attention against the reference, time it, and add its row."""
    calls, reference = paged.calls(lab), paged.reference(0)
    error = lab.checked(calls[0], reference)
    timing = lab.time(calls)
    lab.add(
        name,
        paged.kv_bytes / timing.seconds / 1e9,
        "GB/s",
        limit_name="copy",
        limit=lab.copy_gbps(),
        goal=goal,
        rounds=timing.rounds,
        error=error,
        graph=timing.graph,
    )
    return Decoded(calls, reference, timing)
