"""A hierarchy of tiers as somebody would build it, and what a trace does to it in time: the description and the figures.

The run itself is in serving.py. What is modelled, and what is not:
- Arrivals are the trace's, open loop: a slow hierarchy makes a queue, it does not slow the clients down. Requests of one
  tick (equal times) are spread over it at random, as a Poisson process would.
- Each direction between two tiers is a link that does one batch at a time, in order; loads never wait behind saves.
- Prefill is one server, first ready first served, a request at a time (chunks of several would share it, and take as long).
  Decode takes the same time per token at any batch size, and holds pages; nothing is suspended: a request is admitted when
  pages for its prompt and its answer are there.
- An answer's own blocks are not kept beyond the request: traces do not name them until they come back in a prompt.
"""

import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice, pairwise
from statistics import median_low
from typing import Final

from tierkv.cost import DEFAULT_BYTES_PER_S, DEFAULT_CONTEXT_TOKENS, DEFAULT_TOKEN_S
from tierkv.errors import ConfigError
from tierkv.policies import NAMES
from tierkv.simulate.capacity import Capacity, parse_capacity, parse_rate, parse_seconds
from tierkv.simulate.request import Request, Trace

TIERS: Final = ("device", "host", "disk", "redis")
COPY_DOWNS: Final = ("save", "second_use", "spill")
DEFAULT_RATES: Final = dict(zip(TIERS[1:], DEFAULT_BYTES_PER_S[1:], strict=True))
DEFAULT_LATENCY_S: Final = {"host": 20e-6, "disk": 100e-6, "redis": 500e-6}
PIECE_BYTES: Final = 32 << 20  # that a store moves at a time: tierkv/assembly.py
MAX_PIECE_BLOCKS: Final = 64
TICKS_LOOKED_AT: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TierPlan:
    """One tier. Rates and latency are of the link above it: a read brings blocks up, a write takes them down.

    copy_down: when blocks come here from the tier above: as in the configuration.  policy: its own; None: the run's.
    """

    name: str
    capacity: Capacity
    copy_down: str = "save"
    policy: str | None = None
    read_bytes_per_s: float = 0.0
    write_bytes_per_s: float = 0.0
    latency_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """What computes. tokens_per_s: prefill without context; context_tokens: context at which attention doubles the time."""

    tokens_per_s: float = 1 / DEFAULT_TOKEN_S
    context_tokens: float = DEFAULT_CONTEXT_TOKENS
    decode_token_s: float = 0.02
    max_sequences: int = 256
    load_deadline_s: float = 10.0
    save_queue_tokens: int = 1 << 16
    spill_watermark: float = 0.1

    def prefill_s(self, tokens: int, context: int) -> float:
        """Seconds to compute some tokens that follow others."""
        return tokens / self.tokens_per_s * (1 + (context + tokens / 2) / self.context_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class TierFigures:
    """What became of a tier. hit_blocks: found there first.  lost_blocks: evicted when nothing else held them."""

    name: str
    capacity_blocks: int
    hit_blocks: int
    evicted_blocks: int
    lost_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeFigures:
    """What moved from one tier to the next. busy_share: of the run's time, that the link moved something."""

    source: str
    target: str
    bytes: int
    busy_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFigures:
    """What a disk had to bear.

    write_amplification: bytes written per byte of distinct blocks, since what was forgotten is written again when it comes
    again. Blocks go to slots of their own size, so a file system or a drive has little to add.
    reads_per_write: bytes read back per byte written.  drive_writes_per_day: times its capacity is written in 24 h.
    """

    written_bytes: int
    distinct_bytes: int
    read_bytes: int
    capacity_bytes: int
    duration_s: float

    @property
    def write_amplification(self) -> float:
        """Written per distinct byte; 1 when nothing was written."""
        return self.written_bytes / self.distinct_bytes if self.distinct_bytes else 1.0

    @property
    def reads_per_write(self) -> float:
        """Read per written byte; 0 when nothing was written."""
        return self.read_bytes / self.written_bytes if self.written_bytes else 0.0

    @property
    def drive_writes_per_day(self) -> float:
        """At the rate of this run."""
        return self.written_bytes / self.capacity_bytes / self.duration_s * 86_400 if self.duration_s else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedRun:
    """Figures of one run of a trace. Seconds of time to first token are sorted; means are over all answered requests.

    refused: longer than the device can hold.  late_blocks: that a load did not bring before its deadline.
    unsaved_blocks: that a full queue refused.  wait_s, load_s, compute_s: parts of the mean time to first token; waiting is for
    pages before the load and for the engine after it.  computing_share: of the run's time, that the engine computed prompts.
    """

    policy: str
    load_factor: float
    requests: int
    refused: int
    block_refs: int
    computed_blocks: int
    late_blocks: int
    unsaved_blocks: int
    tiers: tuple[TierFigures, ...]
    edges: tuple[EdgeFigures, ...]
    disk: DiskFigures | None
    ttft_s: "array[float]" = field(repr=False)
    wait_s: float
    load_s: float
    compute_s: float
    computing_share: float
    seconds_saved_share: float
    duration_s: float

    @property
    def block_hit_rate(self) -> float:
        """Blocks that were not computed, of all."""
        return sum(tier.hit_blocks for tier in self.tiers) / self.block_refs if self.block_refs else 0.0

    def ttft(self, share: float) -> float:
        """Time to first token that this share of the requests does not exceed; 0 without requests."""
        if not self.ttft_s:
            return 0.0
        return self.ttft_s[max(0, -int(-share * len(self.ttft_s) // 1) - 1)]


def parse_tiers(text: str) -> tuple[TierPlan, ...]:
    """Read `device=40GiB,host=200GiB,disk=2TiB:copy_down=spill:read=6GB/s:write=3GB/s:latency=100us`.

    Raises ConfigError.
    """
    plans: list[TierPlan] = []
    for part in text.split(","):
        name, equals, rest = part.strip().partition("=")
        if not equals or name not in TIERS:
            raise ConfigError(f"--tiers {part.strip()!r}: expected TIER=CAPACITY with a tier of {', '.join(TIERS)}")
        capacity, *options = rest.split(":")
        plans.append(_tier(name, capacity, options))
    names = [plan.name for plan in plans]
    if names != sorted(set(names), key=TIERS.index) or names[:2] not in (["device"], ["device", "host"]):
        raise ConfigError(
            f"--tiers {', '.join(names)}: expected each tier once, fastest first, device always and host above disk and "
            f"redis (every transfer passes the host)"
        )
    return tuple(plans)


def _tier(name: str, capacity: str, options: Sequence[str]) -> TierPlan:
    given: dict[str, str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        known = ("policy",) if name == "device" else ("policy", "copy_down", "read", "write", "latency")
        if not equals or key not in known or key in given:
            raise ConfigError(
                f"--tiers {name}: option {option!r}: expected NAME=VALUE, each once, of {', '.join(known)}"
            )
        given[key] = value
    if given.get("copy_down", "save") not in COPY_DOWNS:
        raise ConfigError(f"--tiers {name}: copy_down={given['copy_down']}: expected one of {', '.join(COPY_DOWNS)}")
    if given.get("policy", NAMES[0]) not in NAMES:
        raise ConfigError(f"--tiers {name}: policy={given['policy']}: expected one of {', '.join(NAMES)}")
    place = f"--tiers {name}"
    plan = plan_tier(name, parse_capacity(capacity, place=place))
    return replace(
        plan,
        copy_down=given.get("copy_down", plan.copy_down),
        policy=given.get("policy"),
        read_bytes_per_s=parse_rate(given["read"], place=place) if "read" in given else plan.read_bytes_per_s,
        write_bytes_per_s=parse_rate(given["write"], place=place) if "write" in given else plan.write_bytes_per_s,
        latency_s=parse_seconds(given["latency"], place=place) if "latency" in given else plan.latency_s,
    )


def plan_tier(name: str, capacity: Capacity) -> TierPlan:
    """Plan a tier with the rates that a store assumes of it before it has measured them."""
    rate = DEFAULT_RATES.get(name, float("inf"))
    return TierPlan(
        name=name,
        capacity=capacity,
        read_bytes_per_s=rate,
        write_bytes_per_s=rate,
        latency_s=DEFAULT_LATENCY_S.get(name, 0.0),
    )


def arrivals(trace: Trace, *, load_factor: float = 1.0, seed: int = 0) -> Iterator[tuple[float, Request]]:
    """Requests of a trace with the times they come at, never falling: ticks spread, everything `load_factor` times as fast.

    A tick ends with the next one, or after the usual distance of two.
    """
    distinct = (time_s for time_s, _ in groupby(request.time_s for request in trace))
    gaps = [b - a for a, b in pairwise(islice(distinct, TICKS_LOOKED_AT))]
    usual_s = median_low(gaps) if gaps else 0.0
    draw = random.Random(seed)
    ticks = ((time_s, list(group)) for time_s, group in groupby(trace, key=lambda request: request.time_s))
    tick = next(ticks, None)
    while tick is not None:
        time_s, requests = tick
        tick = next(ticks, None)
        width_s = usual_s if tick is None else min(usual_s, tick[0] - time_s)
        late = sorted(draw.random() * width_s for _ in requests) if len(requests) > 1 else [0.0]
        for after_s, request in zip(late, requests, strict=True):
            yield (time_s + after_s) / load_factor, request


def piece_blocks(block_bytes: int) -> int:
    """Blocks that a store moves in one batch."""
    return max(1, min(MAX_PIECE_BLOCKS, PIECE_BYTES // block_bytes))
