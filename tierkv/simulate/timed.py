"""Run a trace through a hierarchy in time: builds the index and its policies, and lets the requests come."""

from collections.abc import Sequence

from tierkv import policies
from tierkv.cost import CostModel
from tierkv.index import Index, TierSpec
from tierkv.simulate.events import Timeline
from tierkv.simulate.hierarchy import EnginePlan, TierPlan, TimedRun, arrivals
from tierkv.simulate.replay import ID_TOKENS, NOTHING, Known
from tierkv.simulate.request import Trace
from tierkv.simulate.serving import Serving


def run_timed(
    trace: Trace,
    *,
    plans: Sequence[TierPlan],
    policy: str,
    unique_blocks: int,
    block_bytes: int,
    engine: EnginePlan | None = None,
    load_factor: float = 1.0,
    seed: int = 0,
    objective: str = "hits",
    hints: Known = NOTHING,
) -> TimedRun:
    """Let every request of a trace come in its time, to tiers that are empty at first; ends when the last is answered.

    policy: of every tier that has none of its own.  unique_blocks: of the trace, for capacities that are shares of it.
    block_bytes: KV of one of the trace's blocks.  load_factor: arrivals come so many times as fast.
    seed: of what is random, the spread of arrivals inside a tick.  objective: as in `replay`.
    """
    serving = prepare(
        plans=plans,
        policy=policy,
        unique_blocks=unique_blocks,
        block_tokens=trace.block_tokens,
        block_bytes=block_bytes,
        engine=engine or EnginePlan(),
        objective=objective,
        hints=hints,
    )
    for time_s, request in arrivals(trace, load_factor=load_factor, seed=seed):
        serving.timeline.run(time_s)
        serving.arrive(request)
    while serving.is_busy and serving.timeline.step():
        pass
    assert not serving.is_busy, "requests that nothing will wake"
    return serving.figures(policy=policy, load_factor=load_factor)


def prepare(
    *,
    plans: Sequence[TierPlan],
    policy: str,
    unique_blocks: int,
    block_tokens: int,
    block_bytes: int,
    engine: EnginePlan,
    objective: str = "hits",
    hints: Known = NOTHING,
) -> Serving:
    """Build a hierarchy with nothing in it; as `run_timed`."""
    cost = CostModel(block_tokens=block_tokens, block_bytes=block_bytes, num_tiers=len(plans))
    capacities = [plan.capacity.blocks(unique_blocks=unique_blocks, block_bytes=block_bytes) for plan in plans]
    names = [plan.policy or policy for plan in plans]
    made, observer = policies.build(names, capacities=capacities, cost=cost, objective=objective)
    specs = [
        TierSpec(plan.name, capacity, True, one) for plan, capacity, one in zip(plans, capacities, made, strict=True)
    ]
    history = policies.history_blocks(capacities) if set(names) & set(policies.REMEMBERING) else 0
    return Serving(
        index=Index(block_tokens=ID_TOKENS, tiers=specs, observer=observer, history_blocks=history),
        plans=tuple(plans),
        engine=engine,
        cost=cost,
        timeline=Timeline(),
        block_tokens=block_tokens,
        block_bytes=block_bytes,
        hints=hints,
    )
