"""`tierkv bench device`: what the card at hand does, with what it could do beside it."""

import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tierkv.cli_options import AsJson, console, print_json, show_bytes, text

bench = typer.Typer(
    help="Measure this machine against its own limits.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Row = dict[str, Any]  # Any: as in tierkv.measure.lab


@bench.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        sys.stdout.write(f"{context.get_help()}\n")


@bench.command()
def device(
    as_json: AsJson = False,
    goals: Annotated[bool, typer.Option("--goals", help="Also show the ratio that is aimed at.")] = False,
    parts: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME",
            help="Some of transfers, attention, moves, decode, prefix, store, identity; all when not given.",
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Engines run a model of the size of Llama 3 8B, not of Llama 3.2 1B.")
    ] = False,
) -> None:
    """Measure the first CUDA device: transfers between host and device, kernels, and an engine with its store.

    Every value stands beside its limit, measured in the same run: one plain copy of as many bytes from pinned memory, the card's
    own copy bandwidth (bytes read and written), or the engine without what is measured. Models have random weights: nothing is
    downloaded. Takes some minutes, some 6 GiB of host memory, some 10 GiB of the card (--full: 40) and some GiB of the folder for
    temporary files (TMPDIR), which is the disk that is measured; stop what else uses the card first.
    """
    from tierkv.measure import device as measured
    from tierkv.measure.lab import Lab

    names = measured.chosen(parts)
    facts = measured.card()
    lab = Lab(rehearsing=False)
    with Console(stderr=True).status("", spinner="line") as status:
        shape = measured.FULL if full else measured.SMALL
        measured.run(lab, names, shape, lambda part: status.update(f"measuring {part}"))
    if as_json:
        print_json({"machine": facts, "rows": lab.rows})
    else:
        _print(facts, lab.rows, goals=goals)
    if any(row.get("wrong") for row in lab.rows):
        raise typer.Exit(1)


def _print(facts: dict[str, Any], rows: list[Row], *, goals: bool) -> None:
    screen = console()
    screen.print(
        text(
            f"{facts['gpu']}, {show_bytes(facts['gpu_bytes'])}, compute capability {facts['compute_capability']}, "
            f"torch {facts['torch']}, CUDA {facts['cuda']}"
        )
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("what", "measured", "limit", "of the limit", "which is"):
        table.add_column(name, justify="right" if name in ("measured", "limit", "of the limit") else "left")
    if goals:
        table.add_column("goal", justify="right")
    for row in rows:
        table.add_row(*_cells(row, goals=goals))
    screen.print(table)


def _cells(row: Row, *, goals: bool) -> list[Any]:
    name = text(row["name"])
    if "absent" in row:
        return [name, text("not here", "dim"), "", "", text(row["absent"], "dim")]
    if "failure" in row:
        return [name, text("failed", "bold red"), "", "", text(row["failure"], "red")]
    measured = text(f"{row['value']:,.4g} {row['unit']}", "bold")
    if row["ratio"] is None:
        return [name, measured]
    goal = row["goal"]
    style = "" if goal is None else "green" if row["ratio"] >= goal else "yellow"
    cells = [name, measured, f"{row['limit']:,.4g}", text(f"{row['ratio']:.2f}", style), text(row["limit_name"], "dim")]
    return [*cells, "" if goal is None else f"{goal:g}"] if goals else cells
