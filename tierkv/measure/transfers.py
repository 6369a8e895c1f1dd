"""Blocks between device and host as the mover moves them, against one cudaMemcpyAsync of as many bytes from pinned memory.

Both are timed by the host's clock, from the call until the bytes may be used: the limit by a thread that spins for its stream,
ours by one that sleeps.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import cycle
from typing import Final, NamedTuple

import torch

from tierkv.layout import Layout
from tierkv.measure.lab import Call, Lab, Tensor
from tierkv.measure.moves import exact
from tierkv.metrics import Metrics
from tierkv.mover import LaneSpec, Mover
from tierkv.tiers.device import CudaPagePool, PagePool, page_pool
from tierkv.tiers.device_cuda import open_cuda
from tierkv.tiers.host import HostSlab

GOAL: Final = 0.95  # of the one copy
GOAL_BOTH: Final = 0.9  # of both directions' one copy, added
PAGES: Final = {
    "2 MiB": Layout(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16", block_tokens=16),  # Llama 3 8B
    "360 KiB": Layout(num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16", block_tokens=16),  # SmolLM2 135M
}
TINY: Final = Layout(num_layers=3, num_kv_heads=1, head_dim=8, dtype="bfloat16", block_tokens=2)
POOL_BYTES: Final = 1 << 30  # no cache holds it
SETS: Final = 8  # of scattered pages and places, in turn
ROUNDS: Final = 24


class Scattered(NamedTuple):
    """Pages and places of one call, nowhere adjacent but by chance."""

    pages: list[int]
    places: list[int]


class Ground:
    """A pool and a pinned slab of as many places, full of random bytes."""

    def __init__(self, lab: Lab, layout: Layout, pool: PagePool, host: HostSlab) -> None:
        self.lab, self.pool, self.host = lab, pool, host
        self.block_bytes = layout.block_bytes
        self.bytes = pool.pool.view(torch.uint8).view(pool.num_places, layout.block_bytes)
        self.bytes.random_(0, 256)
        every = range(pool.num_places)
        pool.copy_out(every, host, every, after=pool.mark())
        self.bytes.random_(0, 256)  # the host's are others
        self.mark = pool.mark()  # taken before a transfer is queued, as the store does

    def scattered(self, count: int) -> list[Scattered]:
        """Some sets of pages and places."""
        draw = partial(torch.randperm, self.pool.num_places)
        return [Scattered(draw()[:count].tolist(), draw()[:count].tolist()) for _ in range(SETS)]

    def load(self, some: Scattered) -> None:
        """From the host to the device."""
        self.pool.copy_in(self.host, some.places, some.pages, after=self.mark)

    def save(self, some: Scattered) -> None:
        """From the device to the host."""
        self.pool.copy_out(some.pages, self.host, some.places, after=self.mark)


@contextmanager
def ground(lab: Lab, layout: Layout) -> Iterator[Ground]:
    """Open pool and slab, pin the slab, and give all of it back."""
    num_pages = lab.pick(POOL_BYTES // layout.block_bytes, 24)
    cuda = None if lab.rehearsing else open_cuda(0)
    with ExitStack() as opened:
        host = HostSlab(
            num_places=num_pages, block_bytes=layout.block_bytes, node=None if cuda is None else cuda.numa_node()
        )
        opened.callback(host.close)
        for _ in host.touch() if cuda is None else host.pin(cuda.host_register, cuda.host_unregister):
            pass
        if cuda is not None and not host.pinned:
            raise RuntimeError("host memory was not pinned, so there is nothing to measure (see the warning above)")
        pool = page_pool(layout=layout, num_pages=num_pages, device=lab.device, cuda=cuda)
        opened.callback(pool.close)
        yield Ground(lab, layout, pool, host)


def run(lab: Lab) -> None:
    """Measure all of them."""
    for size, layout in PAGES.items():
        with lab.attempt(f"transfers of {size} pages"), ground(lab, lab.pick(layout, TINY)) as on:
            there_and_back(on, size)
            for count in lab.pick((16, 64), (3, 5)):
                one_way(on, size, count)
            both_ways(on, size, lab.pick(64, 5))


def there_and_back(on: Ground, size: str) -> None:
    """Device to host to other pages, whole and by spans: the same bytes, or no figure."""
    num_pages = on.pool.num_places
    order = torch.randperm(num_pages).tolist()
    sources, targets = order[: num_pages // 2], order[num_pages // 2 : num_pages // 2 * 2]
    third = on.block_bytes // 3
    for spans in ([None], [(0, third), (third, on.block_bytes)]):
        places = torch.randperm(num_pages)[: len(sources)].tolist()
        on.bytes[targets] = 0x5A
        torch.from_numpy(on.host.rows).fill_(0xA5)
        for span in spans:
            on.pool.copy_out(sources, on.host, places, after=on.pool.mark(), span=span)
            on.pool.copy_in(on.host, places, targets, after=on.pool.mark(), span=span)
        exact(on.bytes[targets], on.bytes[sources])
    on.lab.add(
        f"device to host to device, pages of {size}",
        len(sources),
        "pages",
        limit_name="equal bytes",
        limit=len(sources),
        goal=1.0,
    )


def one_way(on: Ground, size: str, count: int) -> None:
    """Each direction alone, in turn with its limit."""
    num_bytes, sets = count * on.block_bytes, on.scattered(count)
    for name, ours, peer in (
        ("H2D", on.load, one_copy(on.lab, num_bytes, out=False)),
        ("D2H", on.save, one_copy(on.lab, num_bytes, out=True)),
    ):
        ours_s, peer_s = in_turn(on.lab, [partial(ours, some) for some in sets], peer)
        on.lab.add(
            f"{name}, {count} pages of {size}",
            num_bytes / ours_s / 1e9,
            "GB/s",
            limit_name="one copy",
            limit=num_bytes / peer_s / 1e9,
            goal=GOAL,
            rounds=ROUNDS,
            batched=isinstance(on.pool, CudaPagePool) and on.pool.batches,
        )


def both_ways(on: Ground, size: str, count: int) -> None:
    """Both directions at once, from two lanes of a mover, against the sum of what each one copy reaches alone."""
    lab, num_bytes = on.lab, count * on.block_bytes
    seconds = lab.pick(0.7, 0.0)
    alone = [rate_of(one_copy(lab, num_bytes, out=out), num_bytes, seconds) for out in (False, True)]
    with lanes() as mover:
        jobs = [
            mover.submit(
                lane,
                partial(rate_of, [partial(call, s) for s in on.scattered(count)], num_bytes, seconds),
                blocks=count,
            )
            for lane, call in (("load", on.load), ("save", on.save))
        ]
        rates = [job.result() for job in jobs if job is not None]
        copies = [
            mover.submit(lane, partial(rate_of, one_copy(lab, num_bytes, out=out), num_bytes, seconds), blocks=count)
            for lane, out in (("load", False), ("save", True))
        ]
        theirs = [job.result() for job in copies if job is not None]
    add = partial(lab.add, unit="GB/s", limit_name="sum of one copies alone", limit=sum(alone))
    add(f"both ways at once, {count} pages of {size}", sum(rates), goal=GOAL_BOTH)
    add(f"both ways at once, one copy each of {count} x {size}", sum(theirs))


@contextmanager
def lanes() -> Iterator[Mover]:
    """A mover with a thread for each direction."""
    mover = Mover({"load": LaneSpec(1, 1 << 20), "save": LaneSpec(1, 1 << 20)}, metrics=Metrics())
    try:
        yield mover
    finally:
        mover.close()


def one_copy(lab: Lab, num_bytes: int, *, out: bool) -> list[Call]:
    """The limit: one contiguous copy, on a stream of its own, waited for; some sets of memory in turn."""
    if lab.rehearsing:
        target, source = torch.empty((2, num_bytes), dtype=torch.uint8)
        return [partial(target.copy_, source)]
    import cupy

    stream, runtime = cupy.cuda.Stream(non_blocking=True), cupy.cuda.runtime
    calls: list[Call] = []
    for _ in range(4):
        on_device = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=lab.device)
        on_host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        on_host.copy_(on_device)
        target, source = (on_host, on_device) if out else (on_device, on_host)

        def call(target: Tensor = target, source: Tensor = source) -> None:
            runtime.memcpyAsync(target.data_ptr(), source.data_ptr(), num_bytes, runtime.memcpyDefault, stream.ptr)
            stream.synchronize()

        calls.append(call)
    torch.cuda.synchronize()
    return calls


def in_turn(lab: Lab, ours: Sequence[Call], theirs: Sequence[Call]) -> tuple[float, float]:
    """Median seconds of each side, one call of each after the other: what the machine does meanwhile hits both."""
    taken: tuple[list[float], list[float]] = ([], [])
    for number, calls in enumerate(zip(cycle(ours), cycle(theirs), strict=False)):
        if number >= lab.pick(ROUNDS + len(ours), 1):
            break
        for call, times in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    warm = lab.pick(len(ours), 0)
    return statistics.median(taken[0][warm:]), statistics.median(taken[1][warm:])


def rate_of(calls: Sequence[Callable[[], object]], num_bytes: int, seconds: float) -> float:
    """GB/s of calls one after the other, for that many seconds."""
    calls[0]()
    start, done = time.perf_counter(), 0
    for call in cycle(calls):
        call()
        done += num_bytes
        taken = time.perf_counter() - start
        if taken >= seconds:
            break
    return done / taken / 1e9
