"""Results of a simulation as people and programs read them: tables, and one JSON document. Pictures: plots.py, page.py."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from rich.table import Table
from rich.text import Text

from tierkv.simulate.cells import BELADY, UNBOUNDED, Cell, aggregate
from tierkv.simulate.hierarchy import DiskFigures, TimedRun

Json = dict[str, Any]  # what json.dump takes
BOUNDS: Final = (BELADY, UNBOUNDED)
TTFT_SHARES: Final = (0.5, 0.95, 0.99)


@dataclass(slots=True)
class Report:
    """What is known of one trace. Cells and runs may be of any number: an interrupted simulation has fewer.

    default: the policy that a store uses when its configuration names none.  objective, hints: what policies
    were to keep most of, and were told of the requests.
    """

    trace: str
    block_tokens: int
    requests: int
    block_refs: int
    unique_blocks: int
    default: str
    objective: str = "hits"
    hints: str = "none"
    cells: list[Cell] = field(default_factory=list)
    timed: list[TimedRun] = field(default_factory=list)

    @property
    def policies(self) -> list[str]:
        """Policies with cells, the worst first by their mean hit rate, bounds last."""
        rates: dict[str, list[float]] = {}
        for cell in self.cells:
            rates.setdefault(cell.policy, []).append(cell.block_hit_rate)
        order = sorted(rates, key=lambda name: sum(rates[name]) / len(rates[name]))
        return [name for name in order if name not in BOUNDS] + [name for name in BOUNDS if name in rates]

    @property
    def capacities(self) -> list[int]:
        """Capacities with cells, in blocks, smallest first; the unbounded store has none."""
        return sorted({cell.capacity_blocks for cell in self.cells if cell.policy != UNBOUNDED})

    def rate(self, policy: str, capacity: int, *, of: str) -> float | None:
        """One figure of one cell; None: there is no such cell. The unbounded store is the same at each capacity."""
        for cell in self.cells:
            if cell.policy == policy and (cell.capacity_blocks == capacity or policy == UNBOUNDED):
                return float(getattr(cell, of))
        return None

    def share(self, capacity: int) -> float:
        """A capacity as a share of the unique blocks."""
        return capacity / max(self.unique_blocks, 1)


def as_json(reports: Sequence[Report], *, finished: bool = True) -> Json:
    """One document: that of the only trace, or {"traces": [...]} for several."""
    documents = [_document(report) for report in reports]
    document = documents[0] if len(documents) == 1 else {"traces": documents}
    return document if finished else document | {"interrupted": True}


def _document(report: Report) -> Json:
    document: Json = {
        "trace": report.trace,
        "requests": report.requests,
        "block_refs": report.block_refs,
        "unique_blocks": report.unique_blocks,
        "block_tokens": report.block_tokens,
        "default_policy": report.default,
        "objective": report.objective,
        "hints": report.hints,
        "cells": [asdict(cell) for cell in report.cells],
    }
    if gaps := aggregate(report.cells):
        document["gap_closed"] = gaps
    if report.timed:
        document["timed"] = [_timed(run) for run in report.timed]
    return document


def _timed(run: TimedRun) -> Json:
    of_run = {name: getattr(run, name) for name in run.__slots__ if name not in ("tiers", "edges", "disk", "ttft_s")}
    return {
        **of_run,
        "block_hit_rate": run.block_hit_rate,
        "ttft_s": {f"p{share * 100:g}": run.ttft(share) for share in TTFT_SHARES} | {"mean": mean_ttft(run)},
        "tiers": [asdict(tier) for tier in run.tiers],
        "edges": [asdict(edge) for edge in run.edges],
        "disk": _disk(run.disk) if run.disk else None,
    }


def _disk(disk: DiskFigures) -> Json:
    figures = ("write_amplification", "reads_per_write", "drive_writes_per_day")
    return asdict(disk) | {name: getattr(disk, name) for name in figures}


def mean_ttft(run: TimedRun) -> float:
    """Mean time to first token."""
    return run.wait_s + run.load_s + run.compute_s


# -- tables ---------------------------------------------------------------------------------------------------------


def tables(report: Report) -> Iterator[Table | Text]:
    """All that is to be shown of one trace, in order."""
    yield Text.assemble(
        (report.trace, "bold"),
        f": {report.requests:,} requests, {report.block_refs:,} block references, {report.unique_blocks:,} unique blocks "
        f"of {report.block_tokens} tokens",
        f"; objective: {report.objective}" if report.objective != "hits" else "",
        f"; hints: {report.hints}" if report.hints != "none" else "",
    )
    if report.cells:
        yield _rates(report, "block hits", "block_hit_rate")
        yield _rates(report, "prefill seconds saved", "seconds_saved_share")
    if report.timed:
        yield _latencies(report)
        yield _traffic(report)


def _table(title: str, *columns: str) -> Table:
    table = Table(
        box=None, pad_edge=False, header_style="bold", title=title, title_justify="left", title_style="bold dim"
    )
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if number else "left", no_wrap=True)
    return table


def _rates(report: Report, title: str, of: str) -> Table:
    """One row per policy, one column per capacity; the best that can be built is green, what is under lru red."""
    capacities = report.capacities
    gaps = aggregate(report.cells, over=of)
    columns = [show_share(report.share(capacity)) for capacity in capacities]
    table = _table(title, "policy", *columns, *(("gap closed",) if gaps else ()), "us/ref")
    real = [name for name in report.policies if name not in BOUNDS]
    best = {at: max((report.rate(name, at, of=of) or 0 for name in real), default=0) for at in capacities}
    for policy in report.policies:
        cells: list[Text] = []
        for capacity in capacities:
            rate, low = report.rate(policy, capacity, of=of), report.rate("lru", capacity, of=of)
            style = "dim" if policy in BOUNDS else "green" if rate == best[capacity] and len(real) > 1 else ""
            if rate is not None and low is not None and rate < low - 0.001 and policy not in BOUNDS:
                style = "red"
            cells.append(Text("-" if rate is None else f"{rate:.2%}", style=style))
        if gaps:
            cells.append(Text(f"{gaps[policy]:+.1%}" if policy in gaps else "-"))
        table.add_row(_name(report, policy), *cells, Text(f"{_us(report, policy):.2f}", style="dim"))
    return table


def _name(report: Report, policy: str) -> Text:
    return Text(f"{policy} (default)" if policy == report.default else policy, style="dim" if policy in BOUNDS else "")


def _us(report: Report, policy: str) -> float:
    times = [cell.us_per_ref for cell in report.cells if cell.policy == policy]
    return sum(times) / len(times)


def _latencies(report: Report) -> Table:
    tiers = [tier.name for tier in report.timed[0].tiers]
    hits = [f"from {name}" for name in tiers]
    table = _table(
        "time to first token", "policy", "load", "p50", "p95", "p99", "mean", "waiting", "loading", "computing",
        *hits, "computed", "engine busy",
    )  # fmt: skip
    for run in report.timed:
        refs = max(run.block_refs, 1)
        table.add_row(
            _name(report, run.policy),
            f"x{run.load_factor:g}",
            *(show_seconds(run.ttft(share)) for share in TTFT_SHARES),
            *(show_seconds(value) for value in (mean_ttft(run), run.wait_s, run.load_s, run.compute_s)),
            *(f"{tier.hit_blocks / refs:.1%}" for tier in run.tiers),
            f"{run.computed_blocks / refs:.1%}",
            f"{run.computing_share:.0%}",
        )
    return table


def _traffic(report: Report) -> Table:
    edges = [f"{edge.source} to {edge.target}" for edge in report.timed[0].edges]
    disk = ("write amplification", "read per write", "drive writes/day") if report.timed[0].disk else ()
    table = _table("moved, and how busy the link was", "policy", "load", *edges, *disk, "not saved", "late")
    for run in report.timed:
        of_disk = (
            (
                f"{run.disk.write_amplification:.2f}",
                f"{run.disk.reads_per_write:.2f}",
                f"{run.disk.drive_writes_per_day:.2f}",
            )
            if run.disk
            else ()
        )
        table.add_row(
            _name(report, run.policy),
            f"x{run.load_factor:g}",
            *(f"{show_size(edge.bytes)} {edge.busy_share:.0%}" for edge in run.edges),
            *of_disk,
            f"{run.unsaved_blocks:,}",
            f"{run.late_blocks:,}",
        )
    return table


def show_share(share: float) -> str:
    """A share as a percentage, no longer than needed: `5%`, `0.25%`; shares of whole blocks are seldom round."""
    value = share * 100
    short = float(f"{value:.2g}")
    return f"{short if abs(short - value) <= 0.005 * value else value:.3g}%"


def show_seconds(seconds: float) -> str:
    """A duration: `812 ms`, `3.41 s`."""
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s" if seconds < 100 else f"{seconds:,.0f} s"


def show_size(size: float) -> str:
    """A size in decimal units: `1.26 TB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.2f} TB"
