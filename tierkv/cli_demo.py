"""`tierkv demo`: progress while it works, then what came back from where, and whether it was the same."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from tierkv.cli_options import AsJson, console, print_json, show_bytes, text

if TYPE_CHECKING:
    from tierkv.demo import Outcome
    from tierkv.demo import Progress as Report


def demo(as_json: AsJson = False) -> None:
    """Chat with a real model over a long document, and see its KV come back from every tier, token for token the same.

    Starts a private Valkey server, keeps everything in a temporary folder, and removes both. A few minutes on two cores.
    """
    from tierkv import demo

    with _bars() as report:
        outcome = demo.run(progress=report)
    if as_json:
        print_json(demo.as_json(outcome))
    else:
        _print(outcome)
    if not all(row.identical for row in outcome.rows):
        raise typer.Exit(1)


@contextlib.contextmanager
def _bars() -> Iterator["Report"]:
    """One bar per stage, on stderr: stdout is for the result."""
    from tierkv.demo import STAGES

    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        TextColumn("{task.fields[tokens]}"),
        TextColumn("{task.elapsed:.0f} s"),
        console=Console(stderr=True, highlight=False),
    )
    tasks: dict[str, TaskID] = {}

    def finish() -> None:
        for task in bars.tasks:
            if not task.finished:
                bars.update(task.id, completed=task.total or 1, total=task.total or 1)
                bars.stop_task(task.id)

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            finish()
            tasks[stage] = bars.add_task(STAGES[stage], total=None, tokens="loading the model")
        if total:  # known once the model is there; what came from a tier is not computed, and shortens the stage
            bars.update(tasks[stage], completed=done, total=total, tokens=f"computed {done:,} of {total:,}")

    with bars:
        yield report
        finish()


def _print(outcome: "Outcome") -> None:
    screen = console()
    cold = outcome.rows[0]
    screen.print()
    screen.print(text("Asked about a long document, the model answered:", "dim"))
    screen.print(text(outcome.text.strip(), "italic"))
    screen.print()
    table = Table("source", box=None, pad_edge=False, header_style="bold")
    for name in ("prompt tokens", "reused", "first token", "speed-up", "identical tokens"):
        table.add_column(name, justify="right")
    for row in outcome.rows:
        table.add_row(
            row.source,
            f"{row.prompt_tokens:,}",
            f"{row.reused_tokens:,}",
            f"{row.ttft_s:.3f} s",
            f"{cold.ttft_s / row.ttft_s:.1f} x",
            text("yes", "green") if row.identical else text("NO", "bold red"),
        )
    screen.print(table)
    screen.print()
    screen.print(
        "Compared token by token with the cold run, in float32: in bfloat16 low bits change with every boundary of a "
        "chunk of prefill, with or without a cache."
    )
    screen.print()
    held = Table(box=None, pad_edge=False, header_style="bold")
    for name in outcome.holdings[0] if outcome.holdings else ():
        held.add_column(name)
    for holding in outcome.holdings:
        held.add_row(*(text(_cell(name, value)) for name, value in holding.items()))
    screen.print(held)


def _cell(name: str, value: Any) -> str:  # Any: names and figures
    if value is None:
        return "-"
    if name.endswith("bytes"):
        return show_bytes(value)
    return f"{value:,}" if isinstance(value, int) else str(value)
