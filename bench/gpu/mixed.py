"""Many conversations at once on a store that is too small for them, for minutes: memory must not grow.

Prompts that repeat and that do not, answers of several samples, requests that are given up, pages that are spilled, forgotten,
loaded in layer groups and pre-empted: all at the same time. Peaks of the first third are compared with those of the whole run.
"""

import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from tierkv.engine import Engine, RequestOutput, SamplingParams
from tierkv.measure.lab import Lab
from tierkv.measure.serving import LLAMA_1B, TINY, Shape, llama, prompts, stored
from tierkv.store import Store

GOAL_MEMORY: Final = 0.99
LOOK_S: Final = 0.2
Peaks = dict[str, int]


def run(lab: Lab, *, seconds: float) -> None:
    """seconds: of serving, of which the first third may still allocate."""
    shape = lab.pick(LLAMA_1B, TINY)
    longest = lab.pick(4096, 96)
    room = lab.pick(16, 3) * longest * shape.kv_token_bytes
    with (
        lab.attempt("mixed run"),
        stored(
            lab,
            llama(lab, shape, torch.bfloat16),
            device_bytes=room,
            host_bytes=2 * room,
            copy_down="spill",
            layer_groups=2,
            max_batch_tokens=lab.pick(4096, 64),
            max_sequences=lab.pick(48, 6),
        ) as (engine, store),
    ):
        crowd = Crowd(lab, shape, engine, longest)
        early = serve(crowd, lambda: memory(lab, store), seconds / 3)
        late = serve(crowd, lambda: memory(lab, store), seconds * 2 / 3)
        report(lab, crowd, store, seconds, early, late)


class Crowd:
    """Conversations, each of which sends its next turn when the last is answered."""

    def __init__(self, lab: Lab, shape: Shape, engine: Engine, longest: int) -> None:
        self.engine, self.longest, self.answered = engine, longest, 0
        self._shape, self._random = shape, random.Random(0)
        self._said: dict[str, list[int]] = {}
        self._systems = prompts(shape, 4, longest // 8)  # what conversations begin with
        for _ in range(lab.pick(64, 8)):
            self._begin()

    def step(self) -> None:
        for output in self.engine.step():
            self._hear(output)
        if self._said and self._random.random() < 0.02:
            given_up = self._random.choice(list(self._said))
            self.engine.abort(given_up)
            del self._said[given_up]
            self._begin()

    def _hear(self, output: RequestOutput) -> None:
        said = self._said.get(output.request)
        if said is None:
            return
        if output.index == 0:
            said.extend(output.token_ids)
        if output.stats is not None:  # the last sample, too, is finished
            self.answered += 1
            del self._said[output.request]
            self._say(said)

    def _begin(self) -> None:
        self._say(list(self._random.choice(self._systems)))

    def _say(self, said: list[int]) -> None:
        (turn,) = prompts(self._shape, 1, self._random.randint(1, self.longest // 8))
        answer = self._random.randint(1, self.longest // 16)
        if len(said) + len(turn) + answer > self.longest:
            said = list(self._random.choice(self._systems))
        sampled = self._random.random() < 0.5
        params = SamplingParams(
            max_tokens=answer,
            ignore_eos=True,
            temperature=0.8 if sampled else 0.0,
            top_p=0.95,
            n=self._random.choice((1, 1, 3)) if sampled else 1,
        )
        prompt = said + turn
        self._said[self.engine.add(prompt, params)] = prompt


def serve(crowd: Crowd, look: Callable[[], Peaks], seconds: float) -> Peaks:
    """Serve for so long; the most memory that was seen meanwhile."""
    end, next_look, peaks = time.monotonic() + seconds, 0.0, look()
    while (now := time.monotonic()) < end:
        crowd.step()
        if now >= next_look:
            peaks = {name: max(size, peaks[name]) for name, size in look().items()}
            next_look = now + LOOK_S
    return peaks


def memory(lab: Lab, store: Store) -> Peaks:
    """Bytes: of the device by whoever uses it, pinned by the slab and by torch, of this process."""
    sizes = {"host memory of the process": resident_bytes()}
    if not lab.rehearsing:
        free, total = torch.cuda.mem_get_info()
        pinned_by_torch: dict[str, Any] = torch.cuda.host_memory_stats()
        sizes |= {
            "device memory": total - free,
            "pinned memory": store.places.host.pinned_bytes + int(pinned_by_torch.get("allocated_bytes.current", 0)),
        }
    return sizes


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * resource.getpagesize()


def report(lab: Lab, crowd: Crowd, store: Store, seconds: float, early: Peaks, late: Peaks) -> None:
    stats = crowd.engine.stats
    computed, found = stats.sources.get("computed", 0), sum(stats.sources.values())
    lab.add(f"mixed run of {seconds:.0f} s, {crowd.answered} turns", stats.tokens / seconds, "tok/s")
    if found:
        lab.add("mixed run, prompt tokens that were found", found - computed, "tokens", limit_name="all", limit=found)
    lab.add("mixed run, pre-emptions", stats.preemptions, "times")
    lab.add("mixed run, blocks that were expected and did not come", store.metrics.misses.value(), "blocks")
    for name, size in early.items():
        lab.add(
            f"mixed run, {name} at a third",
            size / 2**30,
            "GiB",
            limit_name="at its end",
            limit=max(size, late[name]) / 2**30,
            goal=None if name.startswith("host") else GOAL_MEMORY,
        )
