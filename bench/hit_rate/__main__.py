"""`python -m bench.hit_rate TRACE…`: simulate all policies on some traces, and write the tables and pictures of this folder.

    results.json    every cell and run          table.md    the tables of the README
    hit_rate.png    curves                      page.html   all of it, for a browser

Full blocks only, cold start, capacities as shares of the unique blocks; one tier, then a hierarchy in time. Some minutes
per trace and policy: most of an hour for the three traces the tables are made of, less with --jobs.
"""

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tierkv.simulate.capacity import parse_capacity
from tierkv.simulate.cells import BELADY, aggregate
from tierkv.simulate.hierarchy import EnginePlan, parse_tiers
from tierkv.simulate.page import render
from tierkv.simulate.plots import plot
from tierkv.simulate.report import BOUNDS, Report, as_json, mean_ttft, show_seconds, show_share
from tierkv.simulate.spool import Spool
from tierkv.simulate.study import Study, arrange, collect, default_policy, parse_policies
from tierkv.simulate.traces import open_trace
from tierkv.simulate.workers import Workers

HERE = Path(__file__).parent
SHARES = ("1%", "2%", "5%", "10%", "20%", "50%")
HINTS = ("tool", "queue", "all")
"""Sessions are left out: none of the traces has any."""
TIERS = "device=160GiB,host=1TiB,disk=4TiB:read=6GB/s:write=3GB/s"
"""128 KiB a token: 1.3, 8.6 and 34 million tokens."""
ENGINE = EnginePlan(tokens_per_s=100_000)
LOADS = (1.0, 2.0)


def studies() -> dict[str, Study]:
    """What is simulated, by the hints that are given."""
    capacities = tuple(parse_capacity(share, place="SHARES") for share in SHARES)
    base = Study(policies=parse_policies("all"), capacities=capacities, token_bytes=131_072, engine=ENGINE)
    hinted = replace(base, policies=tuple(dict.fromkeys(("lru", default_policy()))))
    return {
        "none": replace(base, plans=parse_tiers(TIERS), load_factors=LOADS),
        **{hints: replace(hinted, hints=hints) for hints in HINTS[:-1]},
        "all": replace(base, hints="all"),
    }


def run(spool: Spool, *, jobs: int) -> dict[str, Report]:
    """Do all studies of one trace."""
    planned = {hints: study.tasks(spool) for hints, study in studies().items()}
    owners = [report for report, tasks in planned.values() for _ in tasks]
    with Workers([task for _, tasks in planned.values() for task in tasks], jobs=jobs) as workers:
        for done, (number, result) in enumerate(workers.results(), 1):
            collect(owners[number], result)  # type: ignore[arg-type]  # results of a study's tasks
            if done == len(owners) or not done % 20:
                sys.stderr.write(f"{spool.name}: {done} of {len(owners)}\n")
    for report, _ in planned.values():
        arrange(report, parse_policies("all"))
    return {hints: report for hints, (report, _) in planned.items()}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def cells(report: Report, of: str) -> Iterator[str]:
    """One figure by policy and capacity; the best that can be built in bold."""
    real = [name for name in report.policies if name not in BOUNDS]
    best = {at: max(report.rate(name, at, of=of) or 0 for name in real) for at in report.capacities}
    gaps = aggregate(report.cells, over=of)
    rows = []
    for policy in report.policies:
        rates = [(at, report.rate(policy, at, of=of) or 0) for at in report.capacities]
        shown = [f"**{rate:.4f}**" if rate == best[at] and policy in real else f"{rate:.4f}" for at, rate in rates]
        rows.append([policy, *shown, f"{gaps[policy]:+.1%}" if policy in gaps else ""])
    yield from table(["policy", *(show_share(report.share(at)) for at in report.capacities), "gap closed"], rows)


def gaps(reports: Sequence[dict[str, Report]]) -> Iterator[str]:
    """The gap that each policy closes on each trace, with hints and without, from lru without; traces weigh the same."""
    names = [each["none"].trace for each in reports]
    rows = []
    for hints in ("none", *HINTS):
        closed = [_closed(each, hints) for each in reports]
        for policy in (name for name in parse_policies("all") if name not in BOUNDS):
            if all(policy in each for each in closed):
                of = [each[policy] for each in closed]
                rows.append([policy, hints, *(f"{value:+.1%}" for value in of), f"{sum(of) / len(of):+.1%}"])
    yield from table(["policy", "hints", *names, "mean"], rows)


def _closed(of_trace: dict[str, Report], hints: str) -> dict[str, float]:
    """By policy; under these hints, the gap between lru without any and belady that is closed."""
    ends = [cell for cell in of_trace["none"].cells if cell.policy in ("lru", BELADY)]
    hinted = [replace(cell, policy=f"{cell.policy} hinted") for cell in of_trace[hints].cells]
    closed = aggregate([*ends, *hinted])
    return {name.removesuffix(" hinted"): gap for name, gap in closed.items() if name.endswith(" hinted")}


def timed(report: Report) -> Iterator[str]:
    """Time to first token, and where blocks were found."""
    runs = report.timed
    head = [
        "policy",
        "load",
        "p50",
        "p95",
        "p99",
        "mean",
        *(tier.name for tier in runs[0].tiers),
        "computed",
        "disk writes",
    ]
    rows = [
        [
            run.policy,
            f"x{run.load_factor:g}",
            *(show_seconds(run.ttft(share)) for share in (0.5, 0.95, 0.99)),
            show_seconds(mean_ttft(run)),
            *(f"{tier.hit_blocks / run.block_refs:.1%}" for tier in run.tiers),
            f"{run.computed_blocks / run.block_refs:.1%}",
            f"{run.disk.written_bytes / 1e12:.2f} TB" if run.disk else "",
        ]
        for run in runs
    ]
    yield from table(head, rows)


def document(reports: Sequence[dict[str, Report]], made: str) -> Iterator[str]:
    """All tables."""
    yield f"# Hit rates by policy and capacity\n\n{made}. Bold: the best that can be built; losing cells are shown like others.\n"
    yield "## Gap closed\n"
    yield f"Σ(policy - lru) / Σ({BELADY} - lru) of block hits over the capacities from 1 to 20 %, lru without hints.\n"
    yield from gaps(reports)
    for each in reports:
        report = each["none"]
        yield (
            f"## {report.trace}\n\n{report.requests:,} requests, {report.block_refs:,} block references, "
            f"{report.unique_blocks:,} unique blocks of {report.block_tokens} tokens; no hints.\n\nBlock hits:\n"
        )
        yield from cells(report, "block_hit_rate")
        yield "Prefill seconds saved:\n"
        yield from cells(report, "seconds_saved_share")
        yield f"Time to first token in `{TIERS}`, prefill {ENGINE.tokens_per_s:,.0f} tokens/s; block hits by tier:\n"
        yield from timed(report)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.hit_rate", description="Write the tables of this folder.")
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args(arguments)
    reports = []
    for path in given.traces:
        spool = open_trace(path)
        reports.append(run(spool, jobs=given.jobs))
        spool.close()
    names = " ".join(path.name for path in given.traces)
    command = f"python -m bench.hit_rate {names}"
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    made = f"`{command}`, {machine}, {datetime.date.today().isoformat()}"
    plain = [each["none"] for each in reports]
    results = {"command": command, "machine": machine, "date": datetime.date.today().isoformat(), "tiers": TIERS} | {
        hints: as_json([each[hints] for each in reports]) for hints in ("none", *HINTS)
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (given.out / "table.md").write_text("\n".join(document(reports, made)))
    (given.out / "page.html").write_text(render(plain, command=command, made=made.replace("`", "")))
    plot(plain, given.out / "hit_rate.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
