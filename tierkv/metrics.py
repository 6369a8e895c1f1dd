"""Counters, gauges and latency histograms of one store, and their Prometheus text. One dataclass; nothing global.

A counter is a mapping from label values to a number; incrementing is safe from any thread and costs well under 1 µs.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from threading import Lock, get_ident
from typing import Any, Final

LATENCY_BOUNDS_S: Final = (
    0.00001,
    0.000025,
    0.00005,
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
)


class Counter:
    """A number per combination of label values; only ever rises."""

    kind = "counter"

    def __init__(self, help: str, *labels: str) -> None:
        self.help, self.labels = help, labels
        self._values: dict[tuple[str, ...], float] = {}
        self._reads: dict[tuple[str, ...], Callable[[], float]] = {}
        self._tallies: dict[int, dict[tuple[str, ...], float]] = {}
        self._lock = Lock()

    def add(self, amount: float, *values: str) -> None:
        """Add to the counter of these label values."""
        with self._lock:
            self._values[values] = self._values.get(values, 0) + amount
            if self._tallies and (tally := self._tallies.get(get_ident())) is not None:
                tally[values] = tally.get(values, 0) + amount

    @contextmanager
    def tally(self) -> Iterator[dict[tuple[str, ...], float]]:
        """Note apart what this thread adds meanwhile, by label values: how a call that counts its failures tells its caller."""
        mine: dict[tuple[str, ...], float] = {}
        with self._lock:
            before = self._tallies.get(get_ident())
            self._tallies[get_ident()] = mine
        try:
            yield mine
        finally:
            with self._lock:
                del self._tallies[get_ident()]
                if before is not None:
                    for values, amount in mine.items():
                        before[values] = before.get(values, 0) + amount
                    self._tallies[get_ident()] = before

    def read_from(self, read: Callable[[], float], *values: str) -> None:
        """Count also what `read` says: a part that its owner keeps count of. It must be thread-safe and cheap."""
        with self._lock:
            self._reads[values] = read

    def value(self, *values: str) -> float:
        """The counter of these label values; of all whose first labels these are, when some are left out."""
        return sum(number for key, number in self._now().items() if key[: len(values)] == values)

    def samples(self) -> Iterator[tuple[str, tuple[tuple[str, str], ...], float]]:
        """Suffix, labels and value of every series."""
        for key, number in sorted(self._now().items()):
            yield "", tuple(zip(self.labels, key, strict=True)), number

    def _now(self) -> dict[tuple[str, ...], float]:
        with self._lock:
            values, reads = dict(self._values), list(self._reads.items())
        for key, read in reads:
            values[key] = values.get(key, 0) + read()
        return values


class Gauge:
    """A number per combination of label values, read from its owner when asked."""

    kind = "gauge"

    def __init__(self, help: str, *labels: str) -> None:
        self.help, self.labels = help, labels
        self._reads: dict[tuple[str, ...], Callable[[], float]] = {}

    def read_from(self, read: Callable[[], float], *values: str) -> None:
        """Take the value of these labels from `read`, which must be thread-safe and cheap."""
        self._reads[values] = read

    def value(self, *values: str) -> float:
        """The value now."""
        return self._reads[values]()

    def samples(self) -> Iterator[tuple[str, tuple[tuple[str, str], ...], float]]:
        """Suffix, labels and value of every series."""
        for key, read in sorted(self._reads.items()):
            yield "", tuple(zip(self.labels, key, strict=True)), read()


class Histogram:
    """Seconds, in buckets of LATENCY_BOUNDS_S."""

    kind = "histogram"

    def __init__(self, help: str, *labels: str) -> None:
        self.help, self.labels = help, labels
        self._series: dict[tuple[str, ...], tuple[list[int], list[float]]] = {}
        self._lock = Lock()

    def observe(self, seconds: float, *values: str) -> None:
        """Count one duration."""
        with self._lock:
            counts, total = self._series.setdefault(values, ([0] * (len(LATENCY_BOUNDS_S) + 1), [0.0]))
            counts[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
            total[0] += seconds

    def count(self, *values: str) -> int:
        """Durations counted under these label values."""
        with self._lock:
            counts, _ = self._series.get(values, ([0], [0.0]))
            return sum(counts)

    def quantile(self, part: float, *values: str) -> float | None:
        """Seconds that this part of the durations did not exceed, as finely as the buckets tell; None before the first."""
        with self._lock:
            counts = list(self._series.get(values, ([],))[0])
        left = part * sum(counts)
        for at, count in enumerate(counts):
            if count and count >= left:
                if at == len(LATENCY_BOUNDS_S):
                    break
                low = LATENCY_BOUNDS_S[at - 1] if at else 0.0
                return low + (LATENCY_BOUNDS_S[at] - low) * left / count
            left -= count
        return float(LATENCY_BOUNDS_S[-1]) if sum(counts) else None

    def samples(self) -> Iterator[tuple[str, tuple[tuple[str, str], ...], float]]:
        """Suffix, labels and value of every series."""
        with self._lock:
            snapshot = [(key, list(counts), total[0]) for key, (counts, total) in sorted(self._series.items())]
        for key, counts, total in snapshot:
            labels = tuple(zip(self.labels, key, strict=True))
            running = 0
            for bound, count in zip((*map(str, LATENCY_BOUNDS_S), "+Inf"), counts, strict=True):
                running += count
                yield "_bucket", (*labels, ("le", bound)), running
            yield "_sum", labels, total
            yield "_count", labels, running


def _metric(kind: type[Any], help: str, *labels: str) -> Any:
    return field(default_factory=lambda: kind(help, *labels))


@dataclass(slots=True)
class Metrics:
    """Everything tierkv counts. A field's name is its Prometheus name, after `tierkv_`."""

    blocks_used: Gauge = _metric(Gauge, "Blocks a tier holds", "tier")
    blocks_capacity: Gauge = _metric(Gauge, "Blocks a tier can hold", "tier")
    host_pinned_bytes: Gauge = _metric(Gauge, "Pinned bytes of the host slab, its spare places included")
    blocks_pinned: Gauge = _metric(Gauge, "Host blocks that are kept for a time on somebody's word")
    queue_depth: Gauge = _metric(Gauge, "Transfers waiting", "queue")
    blocks_evicted: Counter = _metric(Counter, "Blocks forgotten for room", "tier")
    blocks_lost: Counter = _metric(Counter, "Evicted blocks that no other tier of this store holds", "tier")
    blocks_spilled: Counter = _metric(Counter, "Blocks copied down", "source", "target")
    blocks_loaded: Counter = _metric(Counter, "Blocks copied towards the device", "tier")
    blocks_prefetched: Counter = _metric(Counter, "Blocks copied to the host before they were asked for", "tier")
    bytes_read: Counter = _metric(Counter, "Payload bytes read", "tier")
    bytes_written: Counter = _metric(Counter, "Payload bytes written", "tier")
    tokens_hit: Counter = _metric(Counter, "Prompt tokens found", "tier")
    tokens_missed: Counter = _metric(Counter, "Prompt tokens that were computed")
    missed_blocks: Counter = _metric(Counter, "Blocks of prompts that had to be computed, by why", "reason")
    misses: Counter = _metric(Counter, "Blocks that were expected and did not come", "tier", "reason")
    saves_dropped: Counter = _metric(Counter, "Blocks not saved", "tier", "reason")
    corrupt_blocks: Counter = _metric(Counter, "Copies found bad and removed", "tier")
    tier_down: Counter = _metric(Counter, "Times a tier was taken out of use for a while", "tier")
    requests_recorded: Counter = _metric(Counter, "Requests written to the access log")
    records_dropped: Counter = _metric(Counter, "Requests not written to the access log", "reason")
    record_bytes: Gauge = _metric(Gauge, "Size of the access log")
    capacity_hit_share: Gauge = _metric(
        Gauge,
        "Part of all prompt blocks that a tier and those above it would hold, were it so many times as large",
        "tier",
        "times",
    )
    load_seconds: Histogram = _metric(Histogram, "Time of a batch read", "tier")
    save_seconds: Histogram = _metric(Histogram, "Time of a batch write", "tier")
    daemon_clients: Gauge = _metric(Gauge, "Clients of the daemon that are connected")
    daemon_leases: Gauge = _metric(Gauge, "Leases that clients of the daemon hold")
    daemon_leased_bytes: Gauge = _metric(Gauge, "Bytes that leases of clients keep from being forgotten")
    daemon_requests: Counter = _metric(Counter, "Requests of clients to the daemon", "op", "outcome")
    daemon_lookups: Counter = _metric(Counter, "Lookups of clients in the daemon")
    daemon_lookup_blocks: Counter = _metric(
        Counter, "Blocks that lookups found, by the fastest tier that had them", "tier"
    )
    daemon_request_seconds: Histogram = _metric(Histogram, "Time from a client's request to its answer", "op")
    ttft_seconds: Histogram = _metric(Histogram, "Time to first token, queueing included")
    tpot_seconds: Histogram = _metric(Histogram, "Mean time per output token after the first, per request")

    def prometheus(self) -> str:
        """All metrics in the Prometheus text exposition format, version 0.0.4."""
        lines = []
        for entry in fields(self):
            metric = getattr(self, entry.name)
            name = f"tierkv_{entry.name}" + ("_total" if metric.kind == "counter" else "")
            lines += [f"# HELP {name} {metric.help}", f"# TYPE {name} {metric.kind}"]
            for suffix, labels, value in metric.samples():
                text = ",".join(f'{label}="{_escape(of)}"' for label, of in labels)
                lines.append(
                    f"{name}{suffix}{{{text}}} {_number(value)}" if text else f"{name}{suffix} {_number(value)}"
                )
        return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    """All digits: a counter of bytes passes 2**53 late, but rounds to six digits at once with `g`."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
