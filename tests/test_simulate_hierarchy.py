"""The run in time: durations that can be worked out by hand, figures that agree with the untimed replay, and no lost blocks."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.traces import COST, ids
from tierkv.errors import ConfigError
from tierkv.hints import NO_HINTS
from tierkv.policies import NAMES
from tierkv.simulate.capacity import parse_capacity
from tierkv.simulate.events import Server, Timeline
from tierkv.simulate.hierarchy import EnginePlan, TierPlan, TimedRun, arrivals, parse_tiers, piece_blocks
from tierkv.simulate.moves import Distinct
from tierkv.simulate.replay import NOTHING, Known, replay
from tierkv.simulate.request import Request
from tierkv.simulate.serving import Serving
from tierkv.simulate.timed import prepare, run_timed

BLOCK_TOKENS = 16
MIB = 1 << 20
ENGINE = EnginePlan(tokens_per_s=1600, context_tokens=1e12, decode_token_s=0.01, load_deadline_s=1e6)
"""A block takes 10 ms wherever it is; nothing is late."""
TIERS = (
    "device={}blocks,host={}blocks:read=100MiB/s:write=100MiB/s:latency=1ms,"
    "disk={}blocks:read=10MiB/s:write=10MiB/s:latency=2ms"
)
HINTS = {"none": NOTHING, "queue": Known(queue_s=1.0)}
HOST_S, DISK_S = 0.011, 0.102
"""A batch of one block of 1 MiB: to or from the host, and the disk."""


class Listed:
    """A trace in a list."""

    name = "listed"
    block_tokens = BLOCK_TOKENS

    def __init__(self, requests: Iterable[Request]) -> None:
        self._requests = list(requests)

    def __iter__(self) -> Iterable[Request]:  # type: ignore[override]  # a list's iterator
        return iter(self._requests)


def request(time_s: float, prompt: Sequence[int], *, output: int = 0, tail: int = 0) -> Request:
    return Request(time_s, ids(prompt), len(prompt) * BLOCK_TOKENS + tail, output)


def run(
    requests: Iterable[Request], tiers: str, *, policy: str = "lru", engine: EnginePlan = ENGINE, **options: object
) -> TimedRun:
    trace = Listed(requests)
    plans = parse_tiers(tiers)
    return run_timed(
        trace,
        plans=plans,
        policy=policy,
        unique_blocks=100,
        block_bytes=MIB,
        engine=engine,
        **options,  # type: ignore[arg-type]
    )


def found(result: TimedRun) -> dict[str, int]:
    return {tier.name: tier.hit_blocks for tier in result.tiers}


def moved(result: TimedRun) -> dict[str, int]:
    return {f"{edge.source} {edge.target}": edge.bytes // MIB for edge in result.edges if edge.bytes}


def tiers(device: int, host: int, disk: int = 1000, *, host_down: str = "save", disk_down: str = "save") -> str:
    text = TIERS.format(device, host, disk).replace("MiB/s:latency=1ms", f"MiB/s:latency=1ms:copy_down={host_down}")
    return text + f":copy_down={disk_down}"


# -- durations by hand


def test_a_cold_prompt_takes_its_prefill() -> None:
    result = run([request(0, [1, 2, 3], tail=8)], tiers(10, 10))
    assert list(result.ttft_s) == pytest.approx([(3 * 16 + 8) / 1600])
    assert (result.computed_blocks, result.block_refs, result.block_hit_rate) == (3, 3, 0)


def test_context_makes_prefill_slower() -> None:
    engine = replace(ENGINE, context_tokens=100)
    assert engine.prefill_s(50, 100) == pytest.approx(50 / 1600 * (1 + 125 / 100))
    assert engine.prefill_s(30, 0) + engine.prefill_s(70, 30) == pytest.approx(engine.prefill_s(100, 0))


def test_a_hit_on_the_device_costs_the_last_token_only() -> None:
    result = run([request(0, [1, 2, 3]), request(10, [1, 2, 3])], tiers(10, 10))
    assert result.ttft_s[0] == pytest.approx(1 / 1600)
    assert found(result) == {"device": 3, "host": 0, "disk": 0}


def test_a_hit_in_the_host_costs_its_link() -> None:
    # Room for one prompt on the device: the second drives the first out.
    result = run([request(0, [1, 2]), request(10, [3, 4, 5]), request(20, [1, 2], tail=4)], tiers(3, 10))
    assert found(result) == {"device": 0, "host": 2, "disk": 0}
    piece = piece_blocks(MIB)
    assert piece >= 2  # both blocks in one batch
    assert list(result.ttft_s) == pytest.approx([0.02, 0.001 + 2 * 0.01 + 4 / 1600, 0.03])
    assert moved(result)["host device"] == 2


def test_a_hit_on_disk_passes_the_host_and_stays_there() -> None:
    first = [request(0, [1]), request(10, [2]), request(20, [3])]
    result = run([*first, request(30, [1], tail=4)], tiers(2, 1))
    assert found(result) == {"device": 0, "host": 0, "disk": 1}
    assert max(result.ttft_s) == pytest.approx(DISK_S + HOST_S + 4 / 1600)
    assert moved(result)["disk host"] == 1
    warm = [request(at * 10, [at]) for at in range(1, 6)]
    again = [request(60, [1]), request(70, [6, 7]), request(80, [1])]
    assert found(run([*warm, *again], tiers(2, 4))) == {"device": 0, "host": 1, "disk": 1}


def test_prompts_wait_for_the_engine_in_the_order_they_are_ready() -> None:
    result = run([request(0, [1]), request(0.001, [2]), request(0.002, [3])], tiers(10, 10))
    assert list(result.ttft_s) == pytest.approx([0.01, 0.019, 0.028])
    assert result.wait_s == pytest.approx((0.009 + 0.018) / 3)
    assert result.compute_s == pytest.approx(0.01)


def test_loads_share_their_link() -> None:
    warm = [request(0, [1]), request(10, [2]), request(20, [3]), request(30, [4, 5, 6, 7])]
    both = [request(40, [1]), request(40.0001, [2])]
    result = run([*warm, *both], tiers(4, 10), engine=replace(ENGINE, tokens_per_s=1e9))
    assert found(result) == {"device": 0, "host": 2, "disk": 0}
    assert list(result.ttft_s[-2:]) == pytest.approx([HOST_S, 2 * HOST_S - 0.0001], abs=1e-6)


def test_a_request_waits_until_there_are_pages() -> None:
    requests = [request(0, [1, 2], output=16), request(0.001, [3])]
    assert run(requests, "device=4blocks").ttft_s[-1] == pytest.approx(0.02 + 0.01 - 0.001)
    result = run(requests, "device=3blocks")  # the first holds its three pages while it answers
    assert result.ttft_s[-1] == pytest.approx(0.02 + 16 * 0.01 + 0.01 - 0.001)
    assert result.wait_s == pytest.approx((0.02 + 0.16 - 0.001) / 2)


def test_a_request_larger_than_the_device_is_refused_and_the_others_are_served() -> None:
    result = run([request(0, [1, 2, 3, 4]), request(1, [1, 2])], tiers(3, 10))
    assert (result.requests, result.refused, len(result.ttft_s)) == (2, 1, 1)


def test_max_sequences_bounds_those_under_way() -> None:
    requests = [request(0, [1], output=16), request(0.0001, [2], output=16)]
    assert run(requests, tiers(10, 10)).ttft_s[-1] < 0.05
    one = run(requests, tiers(10, 10), engine=replace(ENGINE, max_sequences=1))
    assert one.ttft_s[-1] == pytest.approx(0.01 + 0.16 + 0.01 - 0.0001)


def test_a_late_load_is_recomputed_and_counted() -> None:
    requests = [request(0, [1, 2]), request(10, [3, 4, 5]), request(20, [1, 2])]
    result = run(requests, tiers(3, 10), engine=replace(ENGINE, load_deadline_s=0.005))
    assert result.late_blocks == 2
    assert found(result)["host"] == 0
    assert list(result.ttft_s) == pytest.approx([0.02, 0.005 + 0.02, 0.03])


def test_blocks_that_came_before_the_deadline_are_used() -> None:
    big = 48 * MIB  # pieces of one block
    trace = Listed([request(0, [1, 2, 3]), request(100, [4, 5, 6]), request(200, [1, 2, 3])])
    plans = parse_tiers(tiers(3, 10))
    engine = replace(ENGINE, load_deadline_s=1.0)  # a block takes 0.481 s
    result = run_timed(trace, plans=plans, policy="lru", unique_blocks=1, block_bytes=big, engine=engine)
    assert (found(result)["host"], result.late_blocks) == (2, 1)


def test_the_mean_is_that_of_its_parts() -> None:
    requests = [request(at / 50, [at % 7, at % 3, at % 5], output=3) for at in range(100)]
    result = run(requests, tiers(8, 12))
    assert result.wait_s + result.load_s + result.compute_s == pytest.approx(sum(result.ttft_s) / 100)
    assert result.load_s > 0 and result.wait_s > 0


def test_percentiles_are_those_of_the_sorted_times() -> None:
    result = run([request(at, [at]) for at in range(5)], tiers(10, 10))
    result.ttft_s[:] = type(result.ttft_s)("d", [1, 2, 3, 4, 5])
    assert [result.ttft(share) for share in (0.01, 0.2, 0.21, 0.5, 0.99, 1.0)] == [1, 1, 2, 3, 5, 5]


def test_waiting_is_that_of_queueing_theory() -> None:
    """M/D/1: rho / (2 (1 - rho)) services."""
    draw = random.Random(7)
    times = accumulate(draw.expovariate(70) for _ in range(20_000))  # a service takes 10 ms
    result = run((request(at, [number]) for number, at in enumerate(times)), "device=400blocks")
    assert result.wait_s == pytest.approx(0.01 * 0.7 / (2 * 0.3), rel=0.1)
    assert result.computing_share == pytest.approx(0.7, rel=0.03)


# -- arrivals


def test_requests_of_one_tick_are_spread_over_it() -> None:
    trace = Listed(request(at, [1]) for at in (0, 0, 0, 0, 3, 3, 6, 9, 60, 60))
    came = [time_s for time_s, _ in arrivals(trace, seed=1)]
    assert came == sorted(came) and len(set(came)) == 10
    assert 0 < came[0] < came[3] < 3 <= came[4] < came[5] < 6
    assert came[6:8] == [6, 9]  # alone in their ticks
    assert 60 <= came[8] < came[9] < 63  # a tick that nothing ends is as long as usual
    assert came == [time_s for time_s, _ in arrivals(trace, seed=1)]
    assert came != [time_s for time_s, _ in arrivals(trace, seed=2)]


def test_a_pause_does_not_make_a_tick_longer() -> None:
    trace = Listed(request(at, [1]) for at in (0, 0, 0, 500, 501, 502, 503))
    assert max(time_s for time_s, _ in list(arrivals(trace))[:3]) < 1


def test_a_load_factor_compresses_time() -> None:
    trace = Listed(request(at, [1]) for at in (0, 2, 5))
    assert [time_s for time_s, _ in arrivals(trace, load_factor=2)] == [0, 1, 2.5]
    requests = [request(at * 0.02, [at]) for at in range(50)]
    assert run(requests, "device=60blocks").wait_s == pytest.approx(0)
    assert run(requests, "device=60blocks", load_factor=4).wait_s == pytest.approx(49 / 2 * 0.005)


# -- copying down


def test_save_copies_each_new_block_once_to_every_tier() -> None:
    requests = [request(0, [1, 2, 3]), request(10, [1, 2, 4]), request(20, [1, 2, 3])]
    assert moved(run(requests, tiers(10, 10))) == {"device host": 4, "host disk": 4}


def test_second_use_copies_what_is_used_again() -> None:
    requests = [request(0, [1, 2, 3]), request(10, [1, 2, 4]), request(20, [9])]
    result = run(requests, tiers(10, 10, host_down="second_use"))
    assert moved(result)["device host"] == 2
    below = run([*requests, request(30, [1, 2, 5]), request(40, [9])], tiers(10, 10, disk_down="second_use"))
    assert moved(below) == {"device host": 6, "host disk": 2}


def test_spill_copies_ahead_of_eviction_only() -> None:
    requests = [request(at * 10, [at, 100 + at]) for at in range(8)]
    roomy = run(requests, tiers(100, 100, host_down="spill"))
    assert moved(roomy) == {}
    short = run(requests, tiers(6, 100, host_down="spill"))
    assert 8 <= moved(short)["device host"] <= 16
    device = short.tiers[0]
    assert device.evicted_blocks >= 10 and device.lost_blocks <= 2  # at most the first, before anything was spilled


def test_a_full_queue_drops_saves_and_counts_them() -> None:
    requests = [request(at * 0.001, [at]) for at in range(10)]
    engine = replace(ENGINE, tokens_per_s=1e9, save_queue_tokens=2 * BLOCK_TOKENS)
    result = run(requests, tiers(100, 100), engine=engine)
    assert result.unsaved_blocks > 0
    assert moved(result).get("device host", 0) < 10


def test_writing_again_what_was_forgotten_is_amplification() -> None:
    requests = [request(at * 10, [at % 3]) for at in range(12)]
    result = run(requests, tiers(1, 1, 2))
    disk = result.disk
    assert disk is not None
    assert disk.distinct_bytes == 3 * MIB
    assert disk.written_bytes > 3 * MIB
    assert disk.write_amplification == disk.written_bytes / disk.distinct_bytes
    assert disk.drive_writes_per_day == pytest.approx(disk.written_bytes / (2 * MIB) / result.duration_s * 86_400)
    large = run(requests, tiers(1, 1, 10)).disk
    assert large is not None and large.write_amplification == 1 and large.reads_per_write > 0


def test_distinct_ids_are_counted_over_many_batches() -> None:
    distinct = Distinct()
    for start in range(0, 300_000, 1000):
        distinct.add(b"".join(number.to_bytes(8, "little") for number in range(start, start + 2000)))
    assert distinct.count() == 301_000


# -- hints


def test_a_queued_request_is_brought_up_while_it_waits() -> None:
    # [1] lies on disk alone when it comes again, behind a request that fills the device while it answers.
    requests = [
        *(request(at * 10, [at]) for at in range(1, 8)),
        request(100, [9], output=32),
        request(100.001, [10]),  # what is next is matched, and waits with what it found
        request(100.002, [1], tail=4),
    ]
    blind, told = (run(requests, tiers(3, 4), hints=hints) for hints in HINTS.values())
    assert (found(blind)["disk"], found(blind)["host"]) == (1, 0)
    assert (found(told)["disk"], found(told)["host"]) == (0, 1)
    assert sum(told.ttft_s) == pytest.approx(sum(blind.ttft_s) - DISK_S)


def test_blocks_of_a_queued_request_survive_others() -> None:
    # [4, 5] comes before [1] does, and takes a page of what was used longest ago: [1], or what nobody waits for.
    requests = [
        request(0, [1]),
        request(10, [2]),
        request(20, [3], output=16),
        request(20.01, [4, 5]),
        request(20.02, [1]),
    ]
    engine = replace(ENGINE, max_sequences=1)
    blind, told = (run(requests, "device=4blocks", engine=engine, hints=hints) for hints in HINTS.values())
    assert (found(blind), found(told)) == ({"device": 0}, {"device": 1})


# -- against the replay, and for all


prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(prompts, st.integers(6, 30), st.sampled_from(sorted(set(NAMES) & {"lru", "lfu"})))
def test_with_time_to_spare_one_tier_hits_what_the_replay_hits(
    given_: list[list[int]], capacity: int, policy: str
) -> None:
    trace = Listed(request(at * 100, prompt) for at, prompt in enumerate(given_))
    plans = parse_tiers(f"device={capacity}blocks")
    timed = run_timed(trace, plans=plans, policy=policy, unique_blocks=1, block_bytes=MIB, engine=ENGINE)
    cell = replay(trace, policy=policy, capacity_blocks=capacity, unique_blocks=1, cost=COST)
    assert timed.block_hit_rate == pytest.approx(cell.block_hit_rate)


DOWN = st.sampled_from(["save", "second_use", "spill"])


@settings(max_examples=120, deadline=None)
@given(
    prompts,
    st.integers(2, 12),
    st.integers(1, 12),
    st.integers(1, 12),
    st.tuples(DOWN, DOWN, DOWN),
    st.sampled_from([0.001, 0.02, 1.0]),
    st.sampled_from([0.01, 1e6]),
    st.sampled_from([NOTHING, Known(session=True, tool=True, queue_s=5.0)]),
)
@example(  # the last one waits while a block that it found in the host comes to the device, for another
    [[1, 1, 0], [0], [0], [0, 0, 0], [1, 1, 0], [1, 1, 0, 0, 0, 0]], 8, 3, 1, ("save",) * 3, 0.001, 0.01, NOTHING
)
def test_every_request_is_answered_and_every_place_given_back(
    given_: list[list[int]],
    device: int,
    host: int,
    disk: int,
    down: tuple[str, str, str],
    gap_s: float,
    deadline_s: float,
    hints: Known,
) -> None:
    plans = parse_tiers(
        f"{tiers(device, host, disk, host_down=down[0], disk_down=down[1])},redis=20blocks:copy_down={down[2]}"
    )
    engine = replace(ENGINE, load_deadline_s=deadline_s, save_queue_tokens=4 * BLOCK_TOKENS, max_sequences=3)
    serving = prepare(
        plans=plans,
        policy="lru",
        unique_blocks=1,
        block_tokens=BLOCK_TOKENS,
        block_bytes=MIB,
        engine=engine,
        hints=hints,
    )
    for at, prompt in enumerate(given_):
        serving.timeline.run(at * gap_s)
        serving.arrive(request(at * gap_s, prompt, output=at % 40, tail=at % 16))
    while serving.timeline.step():
        pass
    _check(serving, len(given_))


def _check(serving: Serving, num_requests: int) -> None:
    assert not serving.is_busy
    result = serving.figures(policy="lru", load_factor=1)
    assert result.requests == num_requests
    assert len(result.ttft_s) == num_requests - result.refused
    assert sum(found(result).values()) + result.computed_blocks == result.block_refs
    assert all(0 <= edge.busy_share <= 1.0001 for edge in result.edges)
    assert all(a <= b for a, b in pairwise(result.ttft_s))
    serving.index.check([], [])
    for tier in serving.index.stats().tiers:
        assert tier.used == tier.held <= tier.capacity  # nothing is reserved any more
    assert serving.index.stats().num_leases == 0
    for number in range(len(result.tiers)):
        serving.index.evict(number)
    assert serving.index.stats().num_blocks == 0  # nobody wants or keeps any of them


# -- time itself


def test_what_is_due_is_called_in_order_of_time_then_of_asking() -> None:
    timeline, called = Timeline(), []
    for name, at in (("c", 3.0), ("a", 1.0), ("b", 1.0), ("d", 9.0)):
        timeline.at(at, lambda name=name: called.append((name, timeline.now_s)))  # type: ignore[misc]
    timeline.run(5.0)
    assert called == [("a", 1.0), ("b", 1.0), ("c", 3.0)]
    assert timeline.now_s == 5.0
    assert timeline.step() and timeline.now_s == 9.0 and not timeline.step()


def test_a_server_refuses_beyond_its_queue_but_takes_what_is_too_large_when_empty() -> None:
    timeline = Timeline()
    server = Server(timeline, max_waiting=3)
    assert server.submit(lambda: 1.0, lambda: None, weight=9)
    assert not server.submit(lambda: 1.0, lambda: None, weight=1)
    timeline.run(1.0)
    assert server.submit(lambda: 1.0, lambda: None, weight=2) and server.submit(lambda: 1.0, lambda: None, weight=1)
    assert not server.submit(lambda: 1.0, lambda: None, weight=1)
    timeline.run(10.0)
    assert server.busy_s == 3.0


def test_a_job_without_duration_ends_before_the_next_begins() -> None:
    timeline, order = Timeline(), []
    server = Server(timeline)

    def end() -> None:
        order.append("end")
        if len(order) < 4:
            server.submit(lambda: order.append("begin") or 0.0, end)  # type: ignore[func-returns-value]

    server.submit(lambda: 0.0, end)
    assert order == ["end", "begin", "end", "begin", "end"]


# -- words


def test_tiers_are_read_with_their_options() -> None:
    device, host, disk = parse_tiers(
        "device=40GiB:policy=lru, host=5%,disk=100blocks:copy_down=spill:read=6GB/s:write=3GB/s:latency=100us"
    )
    assert (device.capacity.size_bytes, device.policy) == (40 << 30, "lru")
    assert (host.capacity.share, host.copy_down, host.read_bytes_per_s) == (0.05, "save", 20e9)
    assert disk == TierPlan(
        name="disk",
        capacity=parse_capacity("100blocks", place=""),
        copy_down="spill",
        read_bytes_per_s=6e9,
        write_bytes_per_s=3e9,
        latency_s=1e-4,
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected TIER=CAPACITY"),
        ("device", "expected TIER=CAPACITY"),
        ("tape=1GiB", "device, host, disk, redis"),
        ("device=1GiB,disk=1GiB", "host above disk"),
        ("host=1GiB", "device always"),
        ("host=1GiB,device=1GiB", "fastest first"),
        ("device=1GiB,host=1GiB,host=2GiB", "each tier once"),
        ("device=1GiB:read=1GB/s", "option 'read=1GB/s'"),
        ("device=1GiB,host=1GiB:speed=1", "option 'speed=1'"),
        ("device=1GiB,host=1GiB:read", "option 'read'"),
        ("device=1GiB,host=1GiB:read=1GB/s:read=2GB/s", "each once"),
        ("device=1GiB,host=1GiB:copy_down=never", "save, second_use, spill"),
        ("device=1GiB,host=1GiB:policy=psychic", "expected one of "),
        ("device=1GiB,host=1GiB:read=fast", "such as 6GB/s"),
        ("device=1GiB,host=1GiB:latency=5", "such as 100us"),
        ("device=0%", "5%"),
        ("device=120%", "5%"),
        ("device=1000", "1000blocks"),
        ("device=0blocks", "1000blocks"),
        ("device=x%", "40GiB"),
    ],
)
def test_what_is_no_hierarchy_is_one_clear_line(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match="--tiers") as error:
        parse_tiers(text)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_capacities_become_blocks() -> None:
    def blocks(text: str) -> int:
        return parse_capacity(text, place="--capacity").blocks(unique_blocks=1000, block_bytes=MIB)

    assert [blocks(text) for text in ("5%", "0.01%", "100%", "7blocks", "1 block", "3.5MiB")] == [50, 1, 1000, 7, 1, 3]
    with pytest.raises(ConfigError, match="less than one block"):
        blocks("1000kB")


def test_no_hints_are_none() -> None:
    assert Known() == NOTHING and NO_HINTS.session is None
