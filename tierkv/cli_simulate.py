"""`tierkv simulate`: what a store would have held of a trace, by policy and capacity, and what that does to latency."""

import contextlib
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tierkv import __version__
from tierkv.cli_options import AsJson, ConfigFile, Overrides, console, print_json, read_config
from tierkv.config import OBJECTIVES, Config, Loaded
from tierkv.errors import ConfigError
from tierkv.values import parse_size

if TYPE_CHECKING:
    from tierkv.simulate.capacity import Capacity
    from tierkv.simulate.hierarchy import EnginePlan, TierPlan
    from tierkv.simulate.report import Report
    from tierkv.simulate.spool import Spool
    from tierkv.simulate.study import Study

CAPACITIES: Final = "1%,2%,5%,10%,20%,50%"
TOKEN_BYTES: Final = 131_072
"""KV of a token where no model is named: 32 layers of 8 KV heads of 128, bfloat16."""
MAX_JOBS: Final = 256
INTERRUPTED: Final = 130


def simulate(
    traces: Annotated[
        list[str],
        typer.Argument(metavar="TRACE…", help="Request traces, plain, gzip or zstandard; - is standard input."),
    ],
    policy: Annotated[
        str,
        typer.Option(
            "--policy", "-p", metavar="NAMES", help="Policies by name, [bold]default[/bold], [bold]all[/bold]."
        ),
    ] = "lru,default,belady,unbounded",
    capacity: Annotated[
        str | None,
        typer.Option(
            "--capacity", metavar="SIZES", help=f"Shares of the unique blocks, sizes, or blocks. Default: {CAPACITIES}"
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective", metavar="WHAT", help="What is kept most of, hits or seconds. Default: store.objective."
        ),
    ] = None,
    hints: Annotated[
        str,
        typer.Option("--hints", metavar="NAMES", help="What the engine tells: none, all, or of session, tool, queue."),
    ] = "none",
    tiers: Annotated[
        str | None,
        typer.Option(
            "--tiers",
            metavar="TIERS",
            help="Run several tiers in time: device=40GiB,host=1TiB,disk=4TiB:copy_down=spill:read=6GB/s:write=3GB/s"
            ":latency=100us, or [bold]config[/bold].",
        ),
    ] = None,
    load_factor: Annotated[
        str, typer.Option("--load-factor", metavar="X", help="With --tiers: let requests come so many times as fast.")
    ] = "1",
    prefill_rate: Annotated[
        float | None,
        typer.Option("--prefill-rate", metavar="TOKENS/S", help="With --tiers: of a prompt without context."),
    ] = None,
    token_time: Annotated[
        str | None,
        typer.Option("--token-time", metavar="TIME", help="With --tiers: of a token of an answer. Default: 20ms"),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="Whose KV is held, as in [bold]tierkv size[/bold].")
    ] = None,
    block_bytes: Annotated[
        str | None,
        typer.Option("--block-bytes", metavar="SIZE", help="KV of one block of the trace, instead of --model."),
    ] = None,
    trace_format: Annotated[
        str | None, typer.Option("--format", metavar="NAME", help="Of the traces, where it is not found out.")
    ] = None,
    block_tokens: Annotated[
        int | None, typer.Option("--block-tokens", min=1, help="Tokens of a block, where the trace does not say.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", metavar="MODEL", help="Whose tokenizer reads prompts that are text.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what is random: arrivals inside a tick.")] = 0,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, max=MAX_JOBS, help="Processes to work with.")] = 1,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="PATH", help="Write a picture: png, svg, pdf.")] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="PATH", help="Write a page that needs nothing else.")
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Replay request traces through the real index and policies, without bytes: hit rates, beside what no policy can beat.

    Capacities are those of one tier, empty at first. Only full blocks count; a hit is a leading block that is held. belady is
    the best that can be done with the future known, unbounded with no limit. With --tiers, a whole hierarchy is run in time
    instead, or with --capacity as well: hits by tier, bytes moved, time to first token.
    """
    from tierkv.simulate.plots import check_matplotlib

    if plot:
        check_matplotlib()
    for path in (plot, html):
        if path and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {path.absolute().parent}; make it first")
    loaded = read_config(config, overrides)
    study = _study(
        loaded,
        policy=policy,
        capacity=capacity,
        objective=objective,
        hints=hints,
        tiers=tiers,
        load_factor=load_factor,
        prefill_rate=prefill_rate,
        token_time=token_time,
        model=model,
        block_bytes=block_bytes,
        seed=seed,
    )
    with contextlib.ExitStack() as stack:
        opened = [
            stack.enter_context(contextlib.closing(spool))
            for spool in _read(traces, format=trace_format, block_tokens=block_tokens, tokenizer=tokenizer)
        ]
        reports, finished = _run(study, opened, jobs=jobs)
    _show(reports, as_json=as_json, finished=finished)
    if plot:
        from tierkv.simulate.plots import plot as draw

        draw(reports, plot)
    if html:
        given = {
            "policy": policy,
            "capacity": capacity,
            "objective": objective,
            "hints": hints,
            "tiers": tiers,
            "load-factor": load_factor,
        }
        _write_page(html, reports, command=_command(traces, given))
    if not finished:
        raise typer.Exit(INTERRUPTED)


# -- what is asked for ----------------------------------------------------------------------------------------------


def _study(
    loaded: Loaded,
    *,
    policy: str,
    capacity: str | None,
    objective: str | None,
    hints: str,
    tiers: str | None,
    load_factor: str,
    prefill_rate: float | None,
    token_time: str | None,
    model: str | None,
    block_bytes: str | None,
    seed: int,
) -> "Study":
    from tierkv.simulate.hierarchy import parse_tiers
    from tierkv.simulate.replay import known
    from tierkv.simulate.study import Study, parse_policies

    known(hints)
    if objective is not None and objective not in OBJECTIVES:
        raise ConfigError(f"--objective {objective!r}: expected one of {', '.join(OBJECTIVES)}")
    if model and block_bytes:
        raise ConfigError("--model and --block-bytes both say how large a block is: give one of them")
    if tiers is None and (load_factor != "1" or prefill_rate is not None or token_time is not None):
        raise ConfigError("--load-factor, --prefill-rate and --token-time are of a run in time: give --tiers as well")
    plans = None if tiers is None else _configured(loaded) if tiers == "config" else parse_tiers(tiers)
    asked = capacity or (None if plans else CAPACITIES)
    return Study(
        policies=parse_policies(policy),
        capacities=_capacities(asked) if asked else (),
        token_bytes=_token_bytes(model),
        block_bytes=_size("--block-bytes", block_bytes) if block_bytes else None,
        plans=plans,
        engine=_engine(loaded, prefill_rate=prefill_rate, token_time=token_time),
        load_factors=_factors(load_factor),
        seed=seed,
        objective=objective or loaded.config.store.objective,
        hints=hints,
    )


def _capacities(text: str) -> "tuple[Capacity, ...]":
    from tierkv.simulate.capacity import parse_capacity

    return tuple(parse_capacity(part, place="--capacity") for part in text.split(","))


def _factors(text: str) -> tuple[float, ...]:
    try:
        factors = tuple(float(part) for part in text.split(","))
    except ValueError:
        factors = ()
    if not factors or not all(1e-3 <= factor <= 1e3 for factor in factors):
        raise ConfigError(f"--load-factor {text!r}: expected numbers from 0.001 to 1000, separated by commas")
    return tuple(dict.fromkeys(factors))


def _size(option: str, text: str) -> int:
    try:
        return parse_size(text if not text.isdecimal() else int(text))
    except ValueError:
        raise ConfigError(f"{option} {text!r}: expected a size, such as 2MiB or 2097152") from None


def _token_bytes(model: str | None) -> int:
    if model is None:
        return TOKEN_BYTES
    from tierkv.model_files import model_config
    from tierkv.sizes import kv_size

    return kv_size(model_config(model)).token_bytes


def _configured(loaded: Loaded) -> "tuple[TierPlan, ...]":
    """The hierarchy of the configuration."""
    from dataclasses import replace

    from tierkv.simulate.capacity import Capacity
    from tierkv.simulate.hierarchy import plan_tier

    given = loaded.config
    if given.device.capacity is None:
        raise ConfigError("--tiers config: device.capacity is off; set it, for example by --set device.capacity=40GiB")
    sizes = {"device": given.device.capacity, "host": given.host.capacity}
    if given.disk.path is not None:
        sizes["disk"] = given.disk.capacity
    plans = [plan_tier(name, Capacity(f"{size} bytes", size_bytes=size)) for name, size in sizes.items()]
    if given.redis.url is not None:  # others' memory: as much as the trace needs
        plans.append(plan_tier("redis", Capacity("100%", share=1.0)))
    planned = []
    for plan in plans:
        section = getattr(given, plan.name)
        own = loaded.origins.get(f"{plan.name}.policy", "default") != "default"
        planned.append(
            replace(
                plan,
                copy_down=getattr(section, "copy_down", plan.copy_down),
                policy=section.policy if own else None,
            )
        )
    return tuple(planned)


def _engine(loaded: Loaded, *, prefill_rate: float | None, token_time: str | None) -> "EnginePlan":
    from tierkv.simulate.capacity import parse_seconds
    from tierkv.simulate.hierarchy import EnginePlan

    if prefill_rate is not None and not 0 < prefill_rate < float("inf"):
        raise ConfigError(f"--prefill-rate {prefill_rate}: expected tokens per second, more than 0")
    given: Config = loaded.config
    usual = EnginePlan()
    own = loaded.origins["engine.max_sequences"] != "default"
    return EnginePlan(
        tokens_per_s=usual.tokens_per_s if prefill_rate is None else prefill_rate,
        decode_token_s=usual.decode_token_s if token_time is None else parse_seconds(token_time, place="--token-time"),
        max_sequences=given.engine.max_sequences if own else usual.max_sequences,
        load_deadline_s=given.transfer.load_deadline_s,
        save_queue_tokens=given.transfer.save_queue_blocks * given.store.block_tokens,
        spill_watermark=given.transfer.spill_watermark,
    )


# -- doing it -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _bar(what: str) -> Iterator[tuple[Progress, TaskID]]:
    """One bar on stderr, where that is a terminal: stdout is for the result."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[done]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True, highlight=False),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with progress:
        yield progress, progress.add_task(what, total=None, done="")


def _read(traces: list[str], **options: Any) -> Iterator["Spool"]:  # Any: as open_trace takes them
    from tierkv.simulate.traces import open_trace

    for path in traces:
        with _bar(f"reading {path}") as (bar, task):
            yield open_trace(path, **options, progress=lambda count: bar.update(task, done=f"{count:,} requests"))


def _run(study: "Study", spools: list["Spool"], *, jobs: int) -> tuple[list["Report"], bool]:
    """Do it all; False with what is done so far when it is interrupted."""
    from tierkv.simulate.cells import Cell
    from tierkv.simulate.hierarchy import TimedRun
    from tierkv.simulate.study import arrange, collect
    from tierkv.simulate.workers import Workers

    planned = [study.tasks(spool) for spool in spools]
    reports = [report for report, _ in planned]
    owners = [report for report, tasks in planned for _ in tasks]
    tasks = [task for _, tasks in planned for task in tasks]
    finished = True
    try:
        # Children first: a bar has a thread, and a fork should find none.
        with Workers(tasks, jobs=jobs) as workers, _bar("simulating") as (bar, shown):
            bar.update(shown, total=len(tasks), done=f"0 of {len(tasks)}")
            for done, (number, result) in enumerate(workers.results(), 1):
                collect(owners[number], cast(Cell | TimedRun, result))
                bar.update(shown, completed=done, done=f"{done} of {len(tasks)}")
    except KeyboardInterrupt:
        finished = False
    for report in reports:
        arrange(report, study.policies)
    return reports, finished


# -- what came of it ------------------------------------------------------------------------------------------------


def _show(reports: list["Report"], *, as_json: bool, finished: bool) -> None:
    from tierkv.simulate import report as shown

    if as_json:
        print_json(shown.as_json(reports, finished=finished))
        return
    screen = console()
    for report in reports:
        for table in shown.tables(report):
            screen.print(table)
            screen.print()


def _command(traces: list[str], given: dict[str, str | None]) -> str:
    """How to get the figures again; without folders, which say more than a page should."""
    usual = {"hints": "none", "load-factor": "1"}
    options = [f"--{name}={value}" for name, value in given.items() if value is not None and value != usual.get(name)]
    return shlex.join(["tierkv", "simulate", *(Path(trace).name for trace in traces), *options])


def _write_page(path: Path, reports: list["Report"], *, command: str) -> None:
    from tierkv.simulate.page import render

    made = f"tierkv {__version__}, {time.strftime('%Y-%m-%d')}"
    try:
        path.write_text(render(reports, command=command, made=made), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {path}: {error.strerror}; give a path that can be written") from None
