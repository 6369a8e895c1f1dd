"""The replay: the real index and policies do what their definitions say, and figures are what their names say."""

import gc
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.traces import COST, ids, trace
from tierkv import policies
from tierkv.errors import ConfigError
from tierkv.hints import NO_HINTS, Ending, Hints, Next
from tierkv.index import Index, TierSpec
from tierkv.policies.base import Leaf, Observer, Use
from tierkv.simulate.cells import Cell, Tally, capacities
from tierkv.simulate.oracle import Oracle
from tierkv.simulate.replay import ID_TOKENS, NOTHING, Known, drive, known, replay, told
from tierkv.simulate.request import Request
from tierkv.simulate.spool import Spool, session_name
from tierkv.simulate.traces import open_trace

Prompt = Sequence[int]


def lru(prompts: Sequence[Prompt], capacity: int, *, hints: Known = NOTHING) -> Cell:
    return replay(trace(prompts), policy="lru", capacity_blocks=capacity, unique_blocks=1000, cost=COST, hints=hints)


def hits(prompts: Sequence[Prompt], capacity: int, *, hints: Known = NOTHING) -> int:
    return round(lru(prompts, capacity, hints=hints).block_hit_rate * sum(map(len, prompts)))


def by_definition(prompts: Sequence[Prompt], capacity: int) -> int:
    """Hits of a leaf-LRU: of the leaves outside the request, the one used longest ago goes, the deepest of equals."""
    used: dict[tuple[int, ...], int] = {}
    found_in_all = 0
    for now, prompt in enumerate(prompts):
        path = [tuple(prompt[: end + 1]) for end in range(len(prompt))]
        found = next((end for end, block in enumerate(path) if block not in used), len(path))
        found_in_all += found
        used.update(dict.fromkeys(path[:found], now))
        for block in path[found:]:
            if len(used) == capacity:
                parents = {each[:-1] for each in used}
                leaves = [each for each in used if each not in parents and used[each] < now]
                if not leaves:
                    break
                del used[min(leaves, key=lambda leaf: (used[leaf], -len(leaf)))]
            used[block] = now
    return found_in_all


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=60).map(
        lambda prompts: [tuple(each) for each in prompts]
    ),
    st.integers(1, 25),
)
def test_lru_is_leaf_lru_to_the_block(prompts: list[tuple[int, ...]], capacity: int) -> None:
    assert hits(prompts, capacity) == by_definition(prompts, capacity)


@pytest.mark.parametrize("policy", policies.NAMES)
def test_store_that_holds_everything_finds_what_can_be_found(policy: str) -> None:
    prompts = [(at % 3, at % 5, at % 7) for at in range(200)]
    made = trace(prompts)
    oracle = Oracle(made, cost=COST)
    unique = oracle.num_unique
    cell = replay(made, policy=policy, capacity_blocks=unique, unique_blocks=unique, cost=COST)
    assert cell.block_hit_rate == oracle.unbounded().block_hit_rate and cell.capacity_share == 1


def test_prompt_larger_than_the_store_keeps_its_beginning() -> None:
    assert hits([range(10), range(10), (99,), range(10)], 4) == 4 + 3


def test_rates_are_shares_of_blocks_tokens_and_seconds() -> None:
    """Tokens count the part of a block at the end of a prompt; seconds grow with the depth."""
    made = Spool(name="made", block_tokens=16)
    for at, (prompt, tokens) in enumerate((((1, 2, 3), 50), ((), 9), ((1, 2, 4), 60), ((1,), 16))):
        made.add(Request(float(at), ids(prompt), tokens, 1))
    cell = replay(
        made, policy="lru", capacity_blocks=100, unique_blocks=4, cost=COST, clock=iter((10.0, 12.5)).__next__
    )
    upto = [0.0]
    for depth in range(3):
        upto.append(upto[-1] + COST.recompute_s(depth))
    assert cell.block_hit_rate == pytest.approx(3 / 7) and cell.token_hit_rate == pytest.approx(48 / 126)
    assert cell.seconds_saved_share == pytest.approx((upto[2] + upto[1]) / (2 * upto[3] + upto[1]))
    assert cell.us_per_ref == pytest.approx(2.5e6 / 7)
    assert (cell.policy, cell.capacity_blocks, cell.capacity_share) == ("lru", 100, 25)


def test_nothing_is_a_rate_of_nothing() -> None:
    cell = Tally().cell(policy="lru", capacity=1, unique=0, block_tokens=16, cost=COST, elapsed_s=1.0)
    assert cell.block_hit_rate == cell.token_hit_rate == cell.seconds_saved_share == 0


def test_collector_of_garbage_is_on_again_after_a_replay_that_fails() -> None:
    with pytest.raises(AttributeError):
        drive([Request(0.0, b"8 bytes!", 1, 1), None], index(2))  # type: ignore[list-item]
    assert gc.isenabled()


# -- hints -----------------------------------------------------------------------------------------------------------


def index(capacity: int, observer: Observer | None = None) -> Index:
    spec = TierSpec("host", capacity, True, policies.make("lru", tier=0))
    return Index(block_tokens=ID_TOKENS, tiers=[spec], observer=observer)


class Heard(Observer):
    """All that is said of requests."""

    def __init__(self) -> None:
        self.uses: list[Use] = []
        self.endings: list[tuple[int, Ending, float]] = []

    def arrive(self, path: Sequence[tuple[Leaf, int]], use: Use) -> None:
        self.uses.append(use)

    def extend(self, strand: Leaf, lo: int, hi: int, use: Use) -> None:
        assert use is self.uses[-1]

    def end(self, path: Sequence[tuple[Leaf, int]], use: Use, ending: Ending, now_s: float) -> None:
        assert use is self.uses[-1]
        strand, end = path[-1]
        self.endings.append((strand.depth + end, ending, now_s))

    def gone(self, strand: Leaf, size: int) -> None:
        pass


CALLS = Request(0.5, ids([1, 2]), 40, 7, Hints(session_name(5), 2), Ending(Next.TOOL, 1.5, 7))
LAST = Request(2.0, ids([1, 2, 3]), 50, 8, Hints(session_name(5), 2), Ending(Next.ENDED, None, 8))


@pytest.mark.parametrize(
    ("hints", "session", "endings"),
    [
        ("none", NO_HINTS, [Ending(output_tokens=7), Ending(output_tokens=8)]),
        ("queue", NO_HINTS, [Ending(output_tokens=7), Ending(output_tokens=8)]),
        ("session", CALLS.hints, [Ending(output_tokens=7), Ending(Next.ENDED, None, 8)]),
        ("tool", NO_HINTS, [Ending(Next.TOOL, 1.5, 7), Ending(output_tokens=8)]),
        ("session,tool", CALLS.hints, [CALLS.ending, LAST.ending]),
        ("all", CALLS.hints, [CALLS.ending, LAST.ending]),
    ],
)
def test_observer_hears_what_the_engine_tells_and_no_more(hints: str, session: Hints, endings: list[Ending]) -> None:
    made = Spool(name="made", block_tokens=16)
    for each in (CALLS, Request(1.0, b"", 3, 1), LAST):
        made.add(each)
    drive(made, index(10, heard := Heard()), hints=known(hints), learns=True)
    assert [(each.now_s, each.num_blocks, each.num_held, each.hints) for each in heard.uses] == [
        (0.5, 2, 0, session),
        (2.0, 3, 2, session),
    ]
    assert heard.endings == [(2, endings[0], 0.5), (3, endings[1], 2.0)]


def test_end_of_a_session_hides_whether_a_tool_was_called_only_if_it_is_known() -> None:
    assert told(LAST, known("all")).next is Next.ENDED and told(LAST, known("tool")).next is Next.UNKNOWN


def test_hints_are_read_by_name() -> None:
    assert known("none") == NOTHING and known("all", queue_s=3.0) == Known(True, True, 3.0)
    assert known("tool,session") == Known(True, True, 0.0)
    for wrong in ("", "tools", "tool,", "none,tool"):
        if wrong != "tool,":
            with pytest.raises(
                ConfigError, match=f"hints '{wrong}': must be none, all, or some of session, tool, queue"
            ):
                known(wrong)


def test_what_waiting_requests_want_is_not_forgotten() -> None:
    prompts = [(1, 2), (3,), (4,), (5,), (1, 2)]
    assert hits(prompts, 4) == 1
    assert hits(prompts, 4, hints=known("queue", queue_s=1.0)) == 2
    assert hits(prompts, 4, hints=known("queue", queue_s=0.5)) == 1  # not known yet when the fourth one needs room
    assert hits([(1,), (2,), (3,), (2,)], 2, hints=known("queue", queue_s=1.0)) == 1  # the first one waits no more


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=40),
    st.integers(1, 10),
    st.floats(0.5, 100),
)
def test_queue_is_no_more_than_what_can_be_known(prompts: list[list[int]], capacity: int, queue_s: float) -> None:
    """Never above the bound, and nothing is left wanted at the end."""
    made = trace(prompts)
    used = index(capacity)
    drive(made, used, hints=known("queue", queue_s=queue_s))
    used.check([])
    found = hits(prompts, capacity, hints=known("queue", queue_s=queue_s))
    assert found <= round(Oracle(made, cost=COST).belady(capacity).block_hit_rate * sum(map(len, prompts)))


# -- the published table ---------------------------------------------------------------------------------------------

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
TABLE = {
    "mooncake_conversation": (
        (12031, 276491, 170899, 0.3819),
        (0.0544, 0.0801, 0.2022, 0.2882, 0.3585, 0.3785),
        (0.2501, 0.3206, 0.3819, 0.3819, 0.3819, 0.3819),
    ),
    "mooncake_synthetic": (
        (2886, 117888, 40148, 0.6594),
        (0.0370, 0.0775, 0.1550, 0.2574, 0.3952, 0.6010),
        (0.1820, 0.2589, 0.3925, 0.5098, 0.6148, 0.6594),
    ),
}
TRACES = os.environ.get("TIERKV_TRACES")


@pytest.mark.skipif(not TRACES, reason="TIERKV_TRACES is not set: the folder of the Mooncake traces")
@pytest.mark.parametrize("name", TABLE)
def test_figures_are_those_of_other_simulators(name: str) -> None:
    """Leaf-LRU and Belady of a C++ simulator that was checked against libcachesim, to the third decimal."""
    sizes, lru_rates, belady_rates = TABLE[name]
    made = open_trace(Path(TRACES or "") / f"{name}.jsonl.gz")
    oracle = Oracle(made, cost=COST)
    totals, ideal = made.totals, oracle.unbounded().block_hit_rate
    assert (totals.num_requests, totals.block_refs, oracle.num_unique, round(ideal, 4)) == sizes
    limits = capacities(SHARES, oracle.num_unique)
    assert all(a < b for a, b in pairwise(limits))
    for capacity, least, most in zip(limits, lru_rates, belady_rates, strict=True):
        cell = replay(made, policy="lru", capacity_blocks=capacity, unique_blocks=oracle.num_unique, cost=COST)
        assert cell.block_hit_rate == pytest.approx(least, abs=2e-4)
        assert oracle.belady(capacity).block_hit_rate == pytest.approx(most, abs=2e-4)
