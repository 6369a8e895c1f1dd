"""Results as a picture, by matplotlib: hit rates and seconds saved by capacity, time to first token; a row per trace."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierkv.errors import TierKVError
from tierkv.simulate.report import BOUNDS, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKS = "osD^vPX*"


def check_matplotlib() -> None:
    """Raise TierKVError when it is not installed: better told before hours of simulation than after."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise TierKVError(
            "--plot needs the package matplotlib: pip install 'tierkv[plot]', or use --html, which needs nothing"
        ) from None


def plot(reports: Sequence[Report], path: Path) -> None:
    """Write a picture; its ending says the format. Raises TierKVError when it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = any(run.ttft_s for report in reports for run in report.timed)
    columns = (2 if any(report.capacities for report in reports) else 0) + timed
    figure = Figure(figsize=(5.6 * max(columns, 1), 4.2 * len(reports)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(reports), max(columns, 1), squeeze=False)
    for report, row in zip(reports, grid, strict=True):
        axes = list(row)
        if columns > timed:
            _curves(axes.pop(0), report, "block hit rate", "block_hit_rate")
            _curves(axes.pop(0), report, "prefill seconds saved", "seconds_saved_share")
        if timed:
            _latency(axes.pop(0), report)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: an ending that matplotlib does not know
        raise TierKVError(f"--plot {path}: {error}; give a path ending in .png, .svg or .pdf") from None


def _curves(axes: "Axes", report: Report, title: str, of: str) -> None:
    for policy in report.policies:
        points = [
            (report.share(at) * 100, rate * 100)
            for at in report.capacities
            if (rate := report.rate(policy, at, of=of)) is not None
        ]
        axes.plot(*zip(*points, strict=True), label=policy, **_style(report, policy))
    axes.set_xscale("log")
    shares = [report.share(at) * 100 for at in report.capacities]
    axes.set_xticks(shares, [f"{share:.3g}" for share in shares])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("capacity, % of the unique blocks")
    axes.set_ylabel(f"{title}, %")
    axes.set_title(report.trace)
    axes.grid(alpha=0.3)
    if report.policies:
        axes.legend(fontsize="small")


def _style(report: Report, policy: str) -> dict[str, Any]:  # Any: as matplotlib takes it
    if policy in BOUNDS:
        return {"color": "grey", "linestyle": "--" if policy == BOUNDS[0] else ":"}
    names = sorted({*report.policies, *(run.policy for run in report.timed)} - set(BOUNDS))
    number = names.index(policy)
    wide = 2.6 if policy == report.default else 1.3
    return {"color": f"C{number % 10}", "marker": MARKS[number % len(MARKS)], "markersize": 4.5, "linewidth": wide}


def _latency(axes: "Axes", report: Report) -> None:
    loads = sorted({run.load_factor for run in report.timed})
    for run in report.timed:
        if run.ttft_s:
            shares = [number / 200 for number in range(1, 201)]
            style = _style(report, run.policy) | {"marker": None}
            style["linestyle"] = ("-", "--", "-.", ":")[loads.index(run.load_factor) % 4]
            label = f"{run.policy}, load x{run.load_factor:g}"
            axes.plot([run.ttft(share) for share in shares], [share * 100 for share in shares], label=label, **style)
    axes.set_xscale("log")
    axes.set_xlabel("time to first token, s")
    axes.set_ylabel("requests answered by then, %")
    axes.set_title(report.trace)
    axes.grid(alpha=0.3)
    if report.timed:
        axes.legend(fontsize="small")
