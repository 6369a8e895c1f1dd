"""Decode: one new token of every sequence. The limit is reading the KV once."""

from collections.abc import Mapping
from typing import Final

import torch

from tierkv.measure import attention
from tierkv.measure.inputs import LLAMA, MLA, TINY, TINY_MLA, Model, Paged
from tierkv.measure.lab import Lab

from . import peers

GOAL: Final = 0.85  # of the copy bandwidth
GOAL_QUANTISED: Final = 1.7  # times bf16's tokens a second
Peers = Mapping[str, peers.Prepare]
NAMES: Final = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8", torch.int8: "int8"}


def run(lab: Lab) -> None:
    present = peers.present(lab)
    llama, mla = lab.pick((LLAMA, MLA), (TINY, TINY_MLA))
    for label, lengths, goal in (
        ("64 x 8k", lab.pick([8192] * 64, [40] * 2), GOAL),
        ("1 x 128k", lab.pick([131072], [70]), GOAL),
        ("1 x 64k + 63 x 512", lab.pick([65536] + [512] * 63, [70, 9, 16]), None),
    ):
        measure(lab, f"decode {label}", llama, lengths, goal, present)
    measure(lab, "decode MLA 64 x 8k", mla, lab.pick([8192] * 64, [20]), None, {})


def measure(lab: Lab, name: str, model: Model, lengths: list[int], goal: float | None, against: Peers) -> None:
    tokens_per_s: dict[str, float] = {}
    for dtype, short in NAMES.items():
        with lab.attempt(f"{name} {short}"):
            paged = Paged(lab, model, lengths, dtype=dtype)
            done = attention.decode(lab, f"{name} {short}", paged, goal if dtype == torch.bfloat16 else None)
            tokens_per_s[short] = len(lengths) / done.timing.seconds
            if dtype == torch.bfloat16:
                for peer, prepare in against.items():
                    with lab.attempt(f"{name} against {peer}"):
                        measure_peer(lab, name, paged, peer, prepare(lab, paged), done.reference, tokens_per_s[short])
    for short in ("fp8", "int8"):
        if {short, "bf16"} <= tokens_per_s.keys():
            goal_here = GOAL_QUANTISED if goal and short == "fp8" else None
            lab.add(
                f"{name} {short}, tokens",
                tokens_per_s[short],
                "tok/s",
                limit_name="bf16 pages",
                limit=tokens_per_s["bf16"],
                goal=goal_here,
            )


def measure_peer(
    lab: Lab, name: str, paged: Paged, peer: str, calls: peers.Calls, reference: torch.Tensor, tokens_per_s: float
) -> None:
    if not calls:  # it takes no sequences of different lengths
        return
    error = lab.checked(calls[0], reference, fault=RuntimeError)
    timing = lab.time(calls)
    lab.add(
        f"{name} against {peer}",
        tokens_per_s,
        "tok/s",
        limit_name=peer,
        limit=len(paged.batch.spans) / timing.seconds,
        goal=1.0,
        rounds=timing.rounds,
        error=error,
        graph=timing.graph,
    )
