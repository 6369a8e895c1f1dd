"""What comes back from a tier: how long a first token takes after a long prefix, and whether it is what was there."""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch

from tierkv.engine import Engine, SamplingParams
from tierkv.keys import token_bytes
from tierkv.measure.lab import Lab, Tensor
from tierkv.measure.moves import exact
from tierkv.measure.serving import SMALL, TINY, Shape, llama, prompts, stored
from tierkv.store import Store
from tierkv.transfers import DEVICE, HOST

GOAL_HOST: Final = 8.0  # times the speed of computing it
GOAL_DISK: Final = 3.0
ROUNDS: Final = 4
VIA: Final = {"host": ("host",), "disk": ("disk", "host")}
"""Where blocks are found that lay in a tier alone: on their way up, which begins while a request waits."""


def run_prefixes(lab: Lab, model: Any, shape: Shape) -> None:  # Any: a transformers model
    """A prefix of 8k tokens from the host and from disk."""
    with lab.attempt(f"{shape.name}, a prefix from the host"):
        prefix(lab, model, shape, None)
    on_disk(lab, f"{shape.name}, a prefix from disk", partial(prefix, lab, model, shape))


def run_identity(lab: Lab) -> None:
    """KV and tokens after each way there is; a smaller model in float32, where tokens are compared one by one."""
    for groups in (1, 2):
        with lab.attempt(f"the same bytes and tokens from the host, layer groups: {groups}"):
            identity(lab, None, layer_groups=groups)
    on_disk(lab, "the same bytes and tokens from disk", partial(identity, lab))


def on_disk(lab: Lab, name: str, measure: Callable[[Path], None]) -> None:
    """Measure with a folder for a disk tier, under the system's folder for temporary files; a row where zarr is missing."""
    if not find_spec("zarr"):
        lab.absent(name, "zarr is not installed")
        return
    with lab.attempt(name), tempfile.TemporaryDirectory(prefix="tierkv-") as folder:
        measure(Path(folder) / "kv")


def prefix(lab: Lab, model: Any, shape: Shape, disk: Path | None) -> None:  # Any: as above
    """Time to the first token of a prompt that was served before, all but its last token found in one tier."""
    length, tier = lab.pick(8192, 48), "disk" if disk else "host"
    room = 3 * (length + 64) * shape.kv_token_bytes
    computed_s, found_s = [], []
    with stored(
        lab,
        model,
        device_bytes=room,
        host_bytes=room,
        disk=disk,
        max_batch_tokens=length + 64,
        max_sequences=4,
    ) as (engine, store):
        for number in range(1 + lab.pick(ROUNDS, 1)):
            (prompt,) = prompts(shape, 1, length + 1)
            taken = [first_token(engine, prompt, ("computed",), length)]
            leave_only(store, tier)
            taken.append(first_token(engine, prompt, VIA[tier], length))
            if number:  # the first round compiles
                computed_s.append(taken[0])
                found_s.append(taken[1])
    found = statistics.median(found_s)
    lab.add(
        f"{shape.name}, first token after {length} tokens from {tier}",
        length / found,
        "tok/s",
        limit_name="computing them",
        limit=length / statistics.median(computed_s),
        goal=GOAL_DISK if disk else GOAL_HOST,
        rounds=len(found_s),
        ttft_ms=found * 1e3,
    )


def first_token(engine: Engine, prompt: list[int], sources: Sequence[str], length: int) -> float:
    """Seconds until a prompt's first token. Raises RuntimeError unless its prefix, but for a block, came from `sources`."""
    (output,) = engine.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True))
    least = length - engine.config.block_tokens  # some tokens are the same as another prompt's by chance
    if sum(output.stats.sources.get(source, 0) for source in sources) < least:
        raise RuntimeError(
            f"{length} tokens should have come from {sources[0]}, and came from {dict(output.stats.sources)}"
        )
    return output.stats.ttft_s


def leave_only(store: Store, tier: str) -> None:
    """Copy all down, then forget what lies above a tier. Raises RuntimeError where something stays."""
    store.flush()
    store.evict_device()
    if tier == "disk":
        store.index.evict(HOST)
    for above in store.index.stats().tiers[: HOST + (tier == "disk")]:
        if above.held:
            raise RuntimeError(f"{above.held} blocks stay in {above.name}, which was to forget all")


def identity(lab: Lab, disk: Path | None, *, layer_groups: int = 1) -> None:
    """KV after device -> host (-> disk -> host) -> device, byte for byte, and the tokens of greedy answers."""
    shape, tier = lab.pick(SMALL, TINY), "disk" if disk else "host"
    batch, length, answer = lab.pick((6, 1500, 32), (2, 40, 4))
    room = 4 * batch * (length + answer + 32) * shape.kv_token_bytes  # in float32, and to spare
    model = llama(lab, shape, torch.float32)
    with stored(
        lab,
        model,
        device_bytes=room,
        host_bytes=room,
        disk=disk,
        layer_groups=layer_groups,
        dtype="float32",
        max_batch_tokens=lab.pick(2048, 32),
        max_sequences=batch,
    ) as (engine, store):
        serve = partial(engine.generate, params=SamplingParams(max_tokens=answer, ignore_eos=True))
        given = prompts(shape, batch, length)
        cold = [output.token_ids for output in serve(given)]
        before = [pages_of(store, prompt) for prompt in given]
        leave_only(store, tier)
        store.places.device.pool.fill_(float("nan"))  # of which nothing is known any more
        if disk:
            store.places.host.rows.fill(0xA5)
        outputs = serve(given)
        least = length - 2 * store.layout.block_tokens
        if any(sum(output.stats.sources.get(name, 0) for name in VIA[tier]) < least for output in outputs):
            raise RuntimeError(f"prompts should have come from {tier}: {[dict(o.stats.sources) for o in outputs]}")
        for prompt, pages in zip(given, before, strict=True):
            exact(pages_of(store, prompt)[: len(pages)], pages)
    num_blocks = sum(map(len, before))
    source = tier if layer_groups == 1 else f"{tier} in {layer_groups} layer groups"
    lab.add(f"KV back from {source}", num_blocks, "blocks", limit_name="equal bytes", limit=num_blocks, goal=1.0)
    same = sum(
        a == b for one, other in zip(cold, outputs, strict=True) for a, b in zip(one, other.token_ids, strict=True)
    )
    lab.add(
        f"greedy tokens after KV from {source}",
        same,
        "tokens",
        limit_name="the cold run's",
        limit=batch * answer,
        goal=1.0,
    )
    if same < batch * answer:
        raise ArithmeticError(
            f"wrong: {batch * answer - same} of {batch * answer} greedy tokens differ from the cold run's"
        )


def pages_of(store: Store, prompt: list[int]) -> Tensor:
    """A copy of the device pages that hold a prompt's full blocks."""
    match = store.take(store.search(token_bytes(prompt)))
    pages = match.lease.places(DEVICE, 0, match.shared)
    copy = store.places.device.pool[list(pages)].clone()
    store.release(match)
    if len(pages) < len(prompt) // store.layout.block_tokens:
        raise RuntimeError(f"{len(pages)} blocks of a prompt of {len(prompt)} tokens lie on the device")
    return copy
