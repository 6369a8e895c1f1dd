"""Results as one HTML page that needs nothing else: pictures in it, tables beside them, dark and light, wide and narrow."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Final

from rich.table import Table
from rich.text import Text

from tierkv.simulate.cells import BELADY, UNBOUNDED
from tierkv.simulate.hierarchy import TimedRun
from tierkv.simulate.report import BOUNDS, Report, show_share, tables
from tierkv.simulate.svg import MARKS, Axis, Line, chart, mark, steps

NUM_COLOURS: Final = 8
NUM_DASHES: Final = 4
TTFT_POINTS: Final = 120
_STYLE: Final = """
:root{--paper:#fff;--ink:#1b1f24;--soft:#5c6570;--rule:#d9dee4;--panel:#f6f8fa;
--c0:#1f6fd0;--c1:#c2410c;--c2:#0f8a5f;--c3:#9333a8;--c4:#a16207;--c5:#0e7490;--c6:#be185d;--c7:#4d5b99;--bound:#8a939e}
@media(prefers-color-scheme:dark){:root{--paper:#12161b;--ink:#e7eaee;--soft:#9aa5b1;--rule:#2f3740;--panel:#1a2027;
--c0:#6fb1ff;--c1:#ff9d66;--c2:#4fd6a0;--c3:#d596ea;--c4:#e8bd4c;--c5:#5bd0e6;--c6:#ff8fbd;--c7:#a9b8ff;--bound:#7e8894}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1200px;padding:16px;background:var(--paper);color:var(--ink);font:15px/1.45 system-ui,sans-serif}
h1{font-size:22px;margin:8px 0 4px}h2{font-size:18px;margin:28px 0 2px}h3{font-size:14px;margin:0 0 6px}
p{margin:4px 0 12px;color:var(--soft)}code{overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:16px}
figure{margin:0;padding:12px;background:var(--panel);border:1px solid var(--rule);border-radius:8px;min-width:0}
svg{display:block;width:100%;height:auto}svg text{fill:var(--soft);font-size:11px}
.grid{stroke:var(--rule)}.axis,.tick{stroke:var(--soft)}
polyline{fill:none;stroke-width:1.8;stroke:currentColor}circle,polygon{fill:currentColor}
.load1 polyline{stroke-dasharray:7 3}.load2 polyline{stroke-dasharray:2 3}.load3 polyline{stroke-dasharray:9 3 2 3}
.bound{color:var(--bound)}.bound polyline{stroke-dasharray:5 4}.main polyline{stroke-width:3.2}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;margin:8px 0 0;padding:0;list-style:none;font-size:13px}
.legend svg{display:inline-block;width:22px;height:10px;margin-right:5px;vertical-align:middle}
@media(max-width:520px){svg text{font-size:13.5px}}
.wide{overflow-x:auto;margin:14px 0}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:4px 0}
th,td{padding:3px 10px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}
th:first-child,td:first-child{text-align:left;padding-left:0}thead th{color:var(--soft);font-weight:500}
.green{color:var(--c2);font-weight:600}.red{color:var(--c1)}.dim{color:var(--soft)}
"""


def render(reports: Sequence[Report], *, command: str, made: str) -> str:
    """The whole page. command: how to get it again.  made: when and by what."""
    colours = "".join(f".k{number}{{color:var(--c{number})}}" for number in range(NUM_COLOURS))
    body = "".join(part for report in reports for part in _section(report))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>tierkv: hit rates</title><style>{_STYLE}{colours}</style></head><body>"
        f"<h1>What would have been held</h1><p><code>{escape(command)}</code><br>{escape(made)}</p>{body}</body></html>\n"
    )


def _section(report: Report) -> Iterator[str]:
    heading, *rest = tables(report)
    yield f"<section><h2>{escape(report.trace)}</h2><p>{escape(str(heading).partition(': ')[2])}</p>"
    figures = list(_figures(report))
    yield f'<div class="charts">{"".join(figures)}</div>' if figures else ""
    for table in rest:
        assert isinstance(table, Table)
        yield _table(table)
    yield "</section>"


def _figures(report: Report) -> Iterator[str]:
    if report.capacities:
        yield _figure(report, "Block hit rate", "block_hit_rate")
        yield _figure(report, "Prefill seconds saved", "seconds_saved_share")
    if any(run.ttft_s for run in report.timed):
        yield _latency(report)


def _styles(report: Report, names: Sequence[str]) -> dict[str, tuple[str, str | None]]:
    """Colour class and mark of each policy: bounds are grey and dashed, what a store uses is thick."""
    styles: dict[str, tuple[str, str | None]] = {BELADY: ("bound", MARKS[0]), UNBOUNDED: ("bound", None)}
    for number, name in enumerate(sorted(set(names) - set(BOUNDS), key=lambda name: (name != report.default, name))):
        css = f"k{number % NUM_COLOURS}" + (" main" if name == report.default else "")
        styles[name] = (css, MARKS[(number + number // NUM_COLOURS) % len(MARKS)])
    return styles


def _figure(report: Report, title: str, of: str) -> str:
    styles, capacities, lines = _styles(report, report.policies), report.capacities, []
    for policy in report.policies:
        found = [(at, rate) for at in capacities if (rate := report.rate(policy, at, of=of)) is not None]
        css, shape = styles[policy]
        points = [(report.share(at), rate) for at, rate in found]
        says = [f"{policy}, {show_share(share)}: {rate:.2%}" for share, rate in points]
        lines.append(Line(policy, points, css, shape, says))
    shares = [report.share(at) for at in capacities]
    low, high = min(shares), max(shares)
    rates = [rate for line in lines for _, rate in line.points]
    ticks = steps(0, max(rates, default=0.0) or 0.01, 5)
    x = Axis("capacity, share of the unique blocks", low, max(high, low * 1.01), shares, show_share, is_log=True)
    y = Axis(title, ticks[0], ticks[-1], ticks, show_share)
    return _framed(f"{title} by capacity", lines, chart(f"{title} by capacity", lines, x=x, y=y))


def _latency(report: Report) -> str:
    runs = [run for run in report.timed if run.ttft_s]
    styles = _styles(report, [run.policy for run in runs])
    loads = sorted({run.load_factor for run in runs})
    lines = [_distribution(run, styles[run.policy][0], loads) for run in runs]
    times = [seconds for line in lines for seconds, _ in line.points]
    low, high = max(min(times), 1e-3), max(times)
    ticks = [10.0**power for power in range(-3, 6) if low <= 10.0**power <= high] or [low]
    x = Axis("time to first token", low, max(high, low * 1.01), ticks, _show_tick, is_log=True)
    y = Axis("share of requests", 0, 1, (0, 0.25, 0.5, 0.75, 1), show_share)
    return _framed("Time to first token: share of requests answered by then", lines, chart("TTFT", lines, x=x, y=y))


def _distribution(run: TimedRun, css: str, loads: Sequence[float]) -> Line:
    shares = [number / TTFT_POINTS for number in range(1, TTFT_POINTS + 1)]
    points = [(run.ttft(share), share) for share in shares]
    if len(loads) == 1:
        return Line(run.policy, points, css)
    return Line(
        f"{run.policy}, load x{run.load_factor:g}", points, f"{css} load{loads.index(run.load_factor) % NUM_DASHES}"
    )


def _show_tick(seconds: float) -> str:
    return f"{seconds * 1e3:g} ms" if seconds < 1 else f"{seconds:g} s"


def _framed(title: str, lines: Sequence[Line], picture: str) -> str:
    keys = "".join(
        f'<li><svg class="{line.css}" viewBox="0 0 22 10"><polyline points="0,5 22,5"/>'
        f"{mark(line.mark, 11, 5) if line.mark else ''}</svg>{escape(line.name)}</li>"
        for line in reversed(lines)
    )
    return f'<figure><h3>{escape(title)}</h3>{picture}<ul class="legend">{keys}</ul></figure>'


def _table(table: Table) -> str:
    """A terminal's table as HTML: the same rows, so that the two cannot differ."""
    head = "".join(f"<th>{escape(str(column.header))}</th>" for column in table.columns)
    rows = zip(*(list(column.cells) for column in table.columns), strict=True)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    caption = f"<caption>{escape(str(table.title))}</caption>"
    return f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: object) -> str:
    style = str(cell.style) if isinstance(cell, Text) else ""
    return f'<td class="{style}">{escape(str(cell))}</td>' if style else f"<td>{escape(str(cell))}</td>"
