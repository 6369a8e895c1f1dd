"""A folder that is warmed, killed twice in the middle, and resumed, against one that was left alone."""

import signal
from pathlib import Path
from typing import Any

import numpy as np

from bench.warm.documents import folder
from tests.warm_parts import contents, ended, result


def run(where: Path, *, rounds: int, threads: int) -> list[dict[str, Any]]:
    folder(where / "docs", count=36, paragraphs=7)
    command = [
        "warm",
        "--model",
        "smollm2",
        "docs",
        "--json",
        "--set",
        f"engine.num_threads={threads}",
        "--set",
        "disk.capacity=8GiB",
    ]
    whole = result(ended([*command, "--set", "disk.path=whole"], cwd=where))
    unique = whole["unique_tokens"]
    rows = [_row("tokens computed / different tokens, uninterrupted", whole["computed_tokens"] / unique, unique)]
    for name, number in (("SIGTERM", signal.SIGTERM), ("kill -9", signal.SIGKILL)):
        at = ["--set", f"disk.path=kv-{int(number)}"]
        computed = 0
        for part in (1, 2):
            ending = ended([*command, *at], after=part * unique // 5, by=number, cwd=where)
            told = [int(line.split()[1]) for line in ending.stderr.splitlines() if line.startswith("computed ")]
            computed += told[-1]
        last = result(ended([*command, *at], cwd=where))
        computed += last["computed_tokens"]
        rows.append(_row(f"the same, {name} twice and resumed", computed / unique, unique))
        ours, theirs = contents(where / f"kv-{int(number)}"), contents(where / "whole")
        assert ours.keys() == theirs.keys()
        equal = sum(ours[key] == block for key, block in theirs.items())
        rows.append(_row(f"blocks equal to the last bit, {name}", equal / len(theirs), len(theirs)))
        rows.append(
            _row(f"largest relative error of a block, {name}", max(_error(ours[key], theirs[key]) for key in theirs), 0)
        )
    return rows


def _error(found: bytes, expected: bytes) -> float:
    one, other = (np.frombuffer(data, np.float32) for data in (found, expected))
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def _row(name: str, value: float, of: int) -> dict[str, Any]:
    unit = f"of {of:,}" if of else ""
    return {"name": name, "value": value, "unit": unit, "limit_name": None, "limit": None, "ratio": None, "rounds": 1}
