"""What is to be simulated: which policies, at which capacities or in which hierarchy. As tasks that may run anywhere."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Final

from tierkv.config import HostConfig
from tierkv.cost import CostModel
from tierkv.errors import ConfigError
from tierkv.policies import NAMES
from tierkv.simulate.capacity import Capacity
from tierkv.simulate.cells import BELADY, UNBOUNDED, Cell
from tierkv.simulate.hierarchy import EnginePlan, TierPlan, TimedRun
from tierkv.simulate.oracle import Oracle
from tierkv.simulate.replay import known, replay
from tierkv.simulate.report import BOUNDS, Report
from tierkv.simulate.request import Trace
from tierkv.simulate.timed import run_timed

DEFAULT: Final = "default"
ALL: Final = "all"

Task = Callable[[], Cell | TimedRun]


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """The same for every trace. policies: by name, bounds among them.

    token_bytes: KV of one token; block_bytes: of one block, if that is known instead.  capacities: of one tier; may be none.
    plans: a hierarchy to run in time, under each of the load factors; None: none.  hints: what is told of the requests,
    as `known` reads it.  objective: as in `replay`.
    """

    policies: tuple[str, ...]
    capacities: tuple[Capacity, ...]
    token_bytes: int
    block_bytes: int | None = None
    plans: tuple[TierPlan, ...] | None = None
    engine: EnginePlan = EnginePlan()
    load_factors: tuple[float, ...] = (1.0,)
    seed: int = 0
    objective: str = "hits"
    hints: str = "none"

    def tasks(self, trace: Trace) -> tuple[Report, list[Task]]:
        """An empty report on a trace, and what fills it. Raises ConfigError for a capacity that holds no block."""
        block_bytes = self.block_bytes or self.token_bytes * trace.block_tokens
        cost = CostModel(block_tokens=trace.block_tokens, block_bytes=block_bytes)
        oracle = Oracle(trace, cost=cost)
        unique = oracle.num_unique
        for plan in self.plans or ():  # better refused now than in the run
            plan.capacity.blocks(unique_blocks=unique, block_bytes=block_bytes)
        sizes = [capacity.blocks(unique_blocks=unique, block_bytes=block_bytes) for capacity in self.capacities]
        tasks = list(self._cells(trace, oracle, list(dict.fromkeys(sizes)), cost))
        tasks += self._runs(trace, unique, block_bytes)
        requests = refs = 0
        for request in trace:
            requests += bool(request.num_blocks)
            refs += request.num_blocks
        report = Report(
            trace=trace.name,
            block_tokens=trace.block_tokens,
            requests=requests,
            block_refs=refs,
            unique_blocks=unique,
            default=default_policy(),
            objective=self.objective,
            hints=self.hints,
        )
        return report, tasks

    def _cells(self, trace: Trace, oracle: Oracle, sizes: list[int], cost: CostModel) -> Iterator[Task]:
        for policy in self.policies if sizes else ():
            if policy == UNBOUNDED:
                yield oracle.unbounded
            elif policy == BELADY:
                yield from (partial(oracle.belady, blocks) for blocks in sizes)
            else:
                unique, hints = oracle.num_unique, known(self.hints)
                once = partial(
                    replay,
                    trace,
                    policy=policy,
                    unique_blocks=unique,
                    cost=cost,
                    objective=self.objective,
                    hints=hints,
                )
                yield from (partial(once, capacity_blocks=blocks) for blocks in sizes)

    def _runs(self, trace: Trace, unique: int, block_bytes: int) -> Iterator[Task]:
        if self.plans is None:
            return
        for load_factor, policy in product(self.load_factors, self.policies):
            if policy not in BOUNDS:
                yield partial(
                    run_timed,
                    trace,
                    plans=self.plans,
                    policy=policy,
                    unique_blocks=unique,
                    block_bytes=block_bytes,
                    engine=self.engine,
                    load_factor=load_factor,
                    seed=self.seed,
                    objective=self.objective,
                    hints=known(self.hints),
                )


def default_policy() -> str:
    """What a store uses when its configuration names no policy."""
    return HostConfig().policy


def parse_policies(text: str) -> tuple[str, ...]:
    """Read `lru,cost,belady`, where `default` and `all` stand for what they say. Raises ConfigError."""
    known = (*NAMES, *BOUNDS)
    names: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        if name == ALL:
            names += known
        elif name == DEFAULT:
            names.append(default_policy())
        elif name in known:
            names.append(name)
        else:
            raise ConfigError(
                f"--policy {name!r}: expected names of {', '.join((DEFAULT, ALL, *known))}, separated by commas"
            )
    return tuple(dict.fromkeys(names))


def collect(report: Report, result: Cell | TimedRun) -> None:
    """Put a task's result where it belongs."""
    if isinstance(result, Cell):
        report.cells.append(result)
    else:
        report.timed.append(result)


def arrange(report: Report, policies: Sequence[str]) -> None:
    """Bring results into one order, in whichever they came."""
    order = {name: number for number, name in enumerate(policies)}
    report.cells.sort(key=lambda cell: (order.get(cell.policy, len(order)), cell.capacity_blocks))
    report.timed.sort(key=lambda run: (run.load_factor, order.get(run.policy, len(order))))
