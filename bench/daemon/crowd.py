"""`python -m bench.daemon.crowd [--party NAME] [--clients N] [--seconds T]`: many client processes at one cache, all at once.

Each client reads, writes and asks for runs of one population, chosen at random, as fast as it is answered: whole runs, and
single blocks and keys, whose latencies tell how long a small request waits behind large ones. Told: latencies by client and
operation, and who starved: the slowest client's throughput as a share of the median client's. Every page of a block that was
read is checked to carry its key, outside of the latencies: a miss is counted, a lie ends the run.

Anything with the four calls of a tier can be given: `crowd(factory, plan)` calls `factory()` once in each process.
"""

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from bench.daemon.ours import Tierkv, TierkvTcp
from bench.daemon.party import DEADLINE_S, KEY_BYTES, SIZES, Bytes, private
from bench.daemon.rivals import LAYOUTS
from tierkv.daemon.client import DaemonClient
from tierkv.keys import Key, Namespace, chain
from tierkv.metrics import Metrics
from tierkv.tiers.base import Run
from tierkv.tiers.daemon import DaemonTier
from tierkv.tiers.redis import RedisTier
from tierkv.valkey import EmbeddedValkey

_PAGE_BYTES: Final = 4096
_SHARES: Final = (("p50", 50), ("p99", 99), ("max", 100))
OPERATIONS: Final = ("read", "write", "contains", "read one", "ask one")
"""The last one is the smallest round trip there is: whether one key is held."""


class Client(Protocol):
    """What a crowd asks for; every `Tier` is one."""

    def contains(self, keys: Sequence[Key], /) -> list[bool]: ...
    def read(self, keys: Sequence[Key], outs: Sequence[memoryview], /) -> list[bool]: ...
    def write(self, run: Run, blocks: Sequence[memoryview], /) -> list[bool]: ...
    def delete(self, keys: Sequence[Key], /) -> None: ...
    def close(self) -> None: ...


PARTIES: Final = {"tierkv": Tierkv, "tierkv-tcp": TierkvTcp}
Factory = Callable[[], Client]
"""Opens a client; it travels to another process, so a function of a module or a `partial` of one."""


class Lied(Exception):
    """A cache returned bytes that are not those of the key."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a crowd does. weights: of the operations, in the order of OPERATIONS; a write forgets its run first."""

    clients: int = 4
    seconds: float = 5.0
    block_bytes: int = SIZES["2 MiB"]
    run_blocks: int = 8
    num_runs: int = 32
    weights: tuple[float, ...] = (0.4, 0.2, 0.1, 0.15, 0.15)
    seed: int = 1


@dataclass
class Told:
    """What one client saw. latencies_s: of each operation.  missed, refused: blocks that were not there, or not kept."""

    latencies_s: dict[str, list[float]] = field(default_factory=lambda: {operation: [] for operation in OPERATIONS})
    seconds: float = 0.0
    missed: int = 0
    refused: int = 0

    @property
    def per_second(self) -> float:
        """Operations per second."""
        return sum(map(len, self.latencies_s.values())) / self.seconds


@dataclass(frozen=True)
class Outcome:
    """What all clients saw, and what became of those that did not come to the end."""

    clients: list[Told]
    failures: dict[int, str]

    @property
    def starvation(self) -> float:
        """The slowest client's throughput over the median client's: 1 is fair, 0 is starved."""
        rates = [told.per_second for told in self.clients]
        return min(rates) / statistics.median(rates)


def crowd(factory: Factory, plan: Plan) -> Outcome:
    """Write the whole population with one client, then let all loose at the same time."""
    first = factory()
    try:
        area = private(plan.run_blocks * plan.block_bytes)
        for run in _runs(plan):
            first.write(run, _stamp(area, run, plan.block_bytes))
    finally:
        first.close()
    context = get_context("spawn")
    barrier = context.Barrier(plan.clients)
    pipes = []
    for number in range(plan.clients):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_be_client, args=(factory, plan, number, barrier, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append((ours, process))
    outcome = Outcome([], {})
    deadline = time.monotonic() + DEADLINE_S + plan.seconds
    for number, (pipe, process) in enumerate(pipes):
        told = _receive(pipe, deadline)
        if isinstance(told, Told):
            outcome.clients.append(told)
        else:
            outcome.failures[number] = told
            process.kill()
        process.join()
    return outcome


def _receive(pipe: Connection, deadline: float) -> Told | str:
    if not wait([pipe], timeout=max(0.0, deadline - time.monotonic())):
        return "did not come to its end in time"
    try:
        told: Told | str = pipe.recv()
    except EOFError:
        return "its process has ended"
    return told


def _be_client(factory: Factory, plan: Plan, number: int, barrier: Barrier, pipe: Connection) -> None:
    try:
        pipe.send(_work(factory, plan, number, barrier))
    except Exception as error:  # noqa: BLE001  it is told, and the crowd has failed
        traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {error}")


def _work(factory: Factory, plan: Plan, number: int, barrier: Barrier) -> Told:
    try:
        client = factory()
    except Exception:
        barrier.abort()  # whoever waits to start would wait for this one
        raise
    runs, told = _runs(plan), Told()
    choose = np.random.default_rng((plan.seed, number))
    weights = np.array(plan.weights) / sum(plan.weights)
    area = private(plan.run_blocks * plan.block_bytes)
    outs = _views(area, plan.block_bytes)
    every_key = [key for run in runs for key in run.keys]
    try:
        barrier.wait(DEADLINE_S)
        start = time.perf_counter()
        while (now := time.perf_counter()) < start + plan.seconds:
            operation = OPERATIONS[choose.choice(len(OPERATIONS), p=weights)]
            run = runs[choose.integers(len(runs))]
            if operation == "write":
                client.delete(run.keys)
                blocks = _stamp(area, run, plan.block_bytes)
                now = time.perf_counter()
                answers = client.write(run, blocks)
            elif operation in ("read", "read one"):
                keys = run.keys if operation == "read" else run.keys[:1]
                area.reshape(-1, _PAGE_BYTES)[:, :KEY_BYTES] = 0
                now = time.perf_counter()
                answers = client.read(keys, outs[: len(keys)])
            else:
                asked = every_key if operation == "contains" else run.keys[:1]
                now = time.perf_counter()
                answers = client.contains(asked)
            told.latencies_s[operation].append(time.perf_counter() - now)
            if operation in ("read", "read one"):
                told.missed += answers.count(False)
                _check(area, run, answers, plan.block_bytes)
            elif operation == "write":
                told.refused += answers.count(False)
        told.seconds = time.perf_counter() - start
    finally:
        client.close()
    return told


def _runs(plan: Plan) -> list[Run]:
    layout, root = LAYOUTS[plan.block_bytes], _namespace(plan.block_bytes).root()
    size = plan.run_blocks * layout.block_tokens
    runs = [(np.arange(size, dtype="<i4") + number * size).tobytes() for number in range(plan.num_runs)]
    return [Run(root, root, 0, tuple(chain(root, of, block_tokens=layout.block_tokens)), of) for of in runs]


def _namespace(block_bytes: int) -> Namespace:
    return Namespace("crowd", LAYOUTS[block_bytes])


def _views(area: Bytes, block_bytes: int) -> list[memoryview]:
    return [row.data for row in area.reshape(-1, block_bytes)]


def _stamp(area: Bytes, run: Run, block_bytes: int) -> list[memoryview]:
    """Make the blocks of a run in `area`: each page begins with the key."""
    for row, key in zip(area.reshape(-1, block_bytes), run.keys, strict=True):
        row.reshape(-1, _PAGE_BYTES)[:, :KEY_BYTES] = np.frombuffer(key, np.uint8)
    return _views(area, block_bytes)


def _check(area: Bytes, run: Run, answers: Sequence[bool], block_bytes: int) -> None:
    for row, key, came in zip(area.reshape(-1, block_bytes), run.keys, answers, strict=False):
        pages = row.reshape(-1, _PAGE_BYTES)[:, :KEY_BYTES]
        if came and not np.array_equal(pages, np.broadcast_to(np.frombuffer(key, np.uint8), pages.shape)):
            raise Lied(f"{key.hex()[:16]}…: was said to have been read, and other bytes are there")


def rows(name: str, plan: Plan, outcome: Outcome) -> list[dict[str, Any]]:
    """One row per client and figure, beside the median client's; then starvation, and what went wrong."""
    found: list[dict[str, Any]] = []
    of = f"{name}, crowd of {plan.clients}"
    figures: list[tuple[str, str, list[float]]] = [("operations", "1/s", [told.per_second for told in outcome.clients])]
    for operation in OPERATIONS:
        for share in (50, 99):
            took = [
                _percentile(told.latencies_s[operation], share)
                for told in outcome.clients
                if told.latencies_s[operation]
            ]
            figures.append((f"{operation} p{share}", "us", [seconds * 1e6 for seconds in took]))
    for figure, unit, values in figures:
        if len(values) < plan.clients:
            continue  # a run so short that somebody never did it
        median = statistics.median(values)
        for number, value in enumerate(values):
            row = {"name": f"{of}: client {number}, {figure}", "value": value, "unit": unit}
            found.append(row | {"limit_name": "median client", "limit": median, "ratio": value / median, "rounds": 1})
    if outcome.clients:
        starved = {"name": f"{of}: starvation", "value": outcome.starvation, "unit": "share", "limit_name": "fair"}
        found.append(starved | {"limit": 1.0, "ratio": outcome.starvation, "rounds": 1})
    found += [{"name": f"{of}: client {number}", "failure": why} for number, why in outcome.failures.items()]
    return found


def _percentile(took: Sequence[float], share: int) -> float:
    return float(np.percentile(took, share)) if took else float("nan")  # shown, never a row


def lines(outcome: Outcome) -> list[str]:
    """A line per client, and the verdict."""
    found = [f"{'client':>6}  {'per s':>6}  " + "  ".join(f"{f'{op} p50/p99 ms':>22}" for op in OPERATIONS)]
    for number, told in enumerate(outcome.clients):
        cells = [
            f"{_percentile(told.latencies_s[op], 50) * 1e3:.2f} / {_percentile(told.latencies_s[op], 99) * 1e3:.2f}"
            for op in OPERATIONS
        ]
        missed = f"  missed {told.missed}, refused {told.refused}" if told.missed or told.refused else ""
        found.append(f"{number:>6}  {told.per_second:>6.0f}  " + "  ".join(f"{cell:>22}" for cell in cells) + missed)
    if outcome.clients:
        for op in OPERATIONS:
            took = [seconds * 1e3 for told in outcome.clients for seconds in told.latencies_s[op]]
            shown = "  ".join(f"{name} {_percentile(took, share):.2f}" for name, share in _SHARES)
            found.append(f"all clients, {op}: {len(took)} calls, ms: {shown}")
        rates = [told.per_second for told in outcome.clients]
        found.append(f"operations per second: {sum(rates):.0f}; a client: median {statistics.median(rates):.1f}")
        found.append(f"starvation (slowest / median): {outcome.starvation:.2f}")
    return found + [f"client {number} FAILED: {why}" for number, why in outcome.failures.items()]


def open_redis(url: str, block_bytes: int) -> RedisTier:
    """Open a Redis tier; the factory of the crowd at Redis."""
    return RedisTier(url, layout=LAYOUTS[block_bytes], metrics=Metrics(), deadline_s=DEADLINE_S)


def open_daemon(url: str, block_bytes: int) -> DaemonTier:
    """Open the daemon's tier; the factory of the crowd at tierkv."""
    namespace = _namespace(block_bytes)
    return DaemonTier(
        DaemonClient(url, connect_s=DEADLINE_S),
        namespace=namespace,
        root=namespace.root(),
        metrics=Metrics(),
        deadline_s=DEADLINE_S,
    )


@contextmanager
def party(name: str, block_bytes: int) -> Iterator[Factory]:
    """Start a cache, for as long as the block runs; the factory of its clients."""
    if name == "redis":
        with EmbeddedValkey(capacity_bytes=2 << 30) as server:
            yield partial(open_redis, server.url, block_bytes)
        return
    daemon = PARTIES[name]()
    try:
        yield partial(open_daemon, daemon.url, block_bytes)
    finally:
        daemon.close()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.daemon.crowd", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--party", choices=["redis", *PARTIES], default="redis")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--size", choices=list(SIZES), default="2 MiB", help="of a block")
    parser.add_argument("--json", type=Path, help="write the rows to a file")
    options = parser.parse_args(arguments)
    if options.clients < 1 or options.seconds <= 0:
        parser.error(f"--clients {options.clients} --seconds {options.seconds:g}: at least one client, and some time")
    plan = Plan(clients=options.clients, seconds=options.seconds, block_bytes=SIZES[options.size])
    with party(options.party, plan.block_bytes) as factory:
        outcome = crowd(factory, plan)
    print("\n".join(lines(outcome)))
    if options.json:
        from bench.conftest import machine  # it needs pytest, which a run without --json does not

        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"machine": machine(), "rows": rows(options.party, plan, outcome)}, indent=1) + "\n"
        )
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
