"""What attention costs the host: with every layer of every step."""

import statistics
import time
from collections.abc import Callable

import torch

from tierkv.kernels.batch import PagedBatch
from tierkv.measure.inputs import LLAMA, TINY, Paged
from tierkv.measure.lab import Lab


def run(lab: Lab) -> None:
    with lab.attempt("host time of attention"):
        paged = Paged(lab, lab.pick(LLAMA, TINY), lab.pick([500] * 64, [20]), dtype=torch.bfloat16)
        attend, batch, times = lab.kernel("attention", "paged_attention"), paged.batch, lab.pick(200, 1)
        (pages, _), query = paged.layer(0), paged.query[0]
        key, value = (torch.randn_like(query[: paged.model.kv_heads]) for _ in range(2))

        def layer(step: PagedBatch) -> None:
            attend(query, key, value, pages, step, scale=paged.model.scale)

        def first_layer() -> None:  # plans: sorts the sequences, cuts the work, sends it
            layer(PagedBatch(batch.slots, batch.tables, batch.lengths, batch.cu_seqlens, batch.spans))

        of = f"of attention, {len(batch.spans)} sequences"
        lab.add(f"host time {of}, a layer", host_us(lab, lambda: layer(batch), times), "us", rounds=times)
        lab.add(f"host time {of}, the first layer of a step", host_us(lab, first_layer, times), "us", rounds=times)


def host_us(lab: Lab, call: Callable[[], None], times: int) -> float:
    """Median microseconds until a call returns, the device being idle."""
    call()
    taken = []
    for _ in range(times):
        if not lab.rehearsing:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1e6
