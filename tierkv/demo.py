"""`tierkv demo`: one long chat, computed once, then answered from every tier, in this process and in others.

Each stage is a process of its own where that is the point (a restart, a second machine): this file is also what they run.
The parent compares the tokens that each stage generated with those of the cold run; nothing is claimed that was not.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tierkv.errors import TierKVError

if TYPE_CHECKING:
    from tierkv.engine import Engine
    from tierkv.store import Store

QUESTION: Final = "In one short paragraph: what does this text say must be done first, and why?"
OUTPUT_TOKENS: Final = 32
DEVICE: Final = "1GiB"
HOST: Final = "1GiB"
DISK: Final = "2GiB"
STAGES: Final = {
    "cold": "computing the prompt for the first time",
    "device": "the same prompt again: pages on the device",
    "host": "device pool flushed: from host memory",
    "disk": "after a restart: from disk",
    "redis": "another process with empty tiers: from Redis",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result."""

    source: str
    prompt_tokens: int
    reused_tokens: int
    ttft_s: float
    identical: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the demo showed. holdings: per tier, blocks, bytes and where they lie."""

    rows: list[Row]
    holdings: list[dict[str, Any]]
    text: str


Progress = Callable[[str, int, int], None]
"""Told of a stage, the prompt tokens done and all of them; (stage, 0, 0) when it starts."""


def run(*, model: str = "smollm2", progress: Progress) -> Outcome:
    """Run all stages. Raises TierKVError when a stage fails."""
    from tierkv.valkey import EmbeddedValkey

    with tempfile.TemporaryDirectory(prefix="tierkv-demo-") as folder, EmbeddedValkey(capacity_bytes=1 << 30) as valkey:
        disk, url = str(Path(folder) / "disk"), valkey.url
        reports = _stage(["cold", "device", "host"], model, {"disk.path": disk, "redis.url": url}, progress)
        reports += _stage(["disk"], model, {"disk.path": disk}, progress)
        reports += _stage(["redis"], model, {"disk.path": str(Path(folder) / "empty"), "redis.url": url}, progress)
    cold = reports[0]
    rows = [
        Row(
            source=report["stage"],
            prompt_tokens=report["prompt_tokens"],
            reused_tokens=report["sources"].get(report["stage"], 0),
            ttft_s=report["ttft_s"],
            identical=report["tokens"] == cold["tokens"],
        )
        for report in reports
    ]
    return Outcome(rows, reports[2]["holdings"], cold["text"])


def _stage(stages: Sequence[str], model: str, options: Mapping[str, str], progress: Progress) -> list[dict[str, Any]]:
    """Run stages in a new process, passing its progress on."""
    task = {"stages": stages, "model": model, "options": dict(options)}
    progress(stages[0], 0, 0)
    command = [sys.executable, "-m", "tierkv.demo", json.dumps(task)]
    reports = []
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,  # a pipe that nobody reads would fill up
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child,
        _killed_at_end(child),
    ):
        assert child.stdout is not None
        for line in child.stdout:
            event = json.loads(line)
            if "done" in event:
                progress(event["stage"], event["done"], event["total"])
            else:
                reports.append(event)
        if child.wait() != 0 or len(reports) != len(stages):
            errors.seek(0)
            said = errors.read().strip().splitlines()
            reason = said[-1] if said else f"exit code {child.returncode}"
            raise TierKVError(f"stage {stages[len(reports) % len(stages)]} of the demo failed: {reason}")
    return reports


@contextlib.contextmanager
def _killed_at_end(child: "subprocess.Popen[str]") -> Iterator[None]:
    try:
        yield
    finally:
        if child.poll() is None:
            child.kill()


# -- inside a stage's process -----------------------------------------------------------------------------------------


def _tell(**event: Any) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def _work(task: Mapping[str, Any]) -> None:
    from tierkv import open_engine
    from tierkv.config import load

    fixed = {"device.capacity": DEVICE, "host.capacity": HOST, "disk.capacity": DISK, "engine.dtype": "float32"}
    options = fixed | task["options"]
    overrides = [f"{key}={value}" for key, value in options.items()]
    config = load(Path(os.devnull), environ={}, overrides=overrides).config  # nobody's own options: the demo's alone
    document = (files("tierkv") / "data" / "demo_document.md").read_text(encoding="utf-8")
    with open_engine(task["model"], config) as (engine, store):
        prompt = engine.chat_prompt([{"role": "user", "content": f"{document}\n\n{QUESTION}"}])
        for stage in task["stages"]:
            if stage == "host":
                store.flush()
                store.evict_device()
            _tell(**_answer(engine, store, stage, prompt))


def _answer(engine: "Engine", store: "Store", stage: str, prompt: list[int]) -> dict[str, Any]:
    from tierkv.engine import SamplingParams

    tokens: list[int] = []
    before, text, stats = engine.stats.tokens, "", None
    for piece in engine.stream(prompt, SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True)):
        tokens += piece.token_ids
        text, stats = text + piece.text, piece.stats
        _tell(stage=stage, done=engine.stats.tokens - before, total=len(prompt) + OUTPUT_TOKENS)
    assert stats is not None, "the last piece has them"
    store.flush()
    return {
        "stage": stage,
        "prompt_tokens": len(prompt),
        "sources": dict(stats.sources),
        "ttft_s": stats.ttft_s,
        "tokens": tokens,
        "text": text,
        "holdings": store.holdings(),
    }


def main(arguments: Sequence[str]) -> int:
    """Run the stages of one process; the argument is their task as JSON."""
    try:
        _work(json.loads(arguments[0]))
    except TierKVError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The form of `tierkv demo --json`."""
    return {"rows": [asdict(row) for row in outcome.rows], "holdings": outcome.holdings, "text": outcome.text}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
