"""`tierkv warm`: compute the KV of prompts that are known in advance, before the first user asks."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any, Final, cast

import typer
from rich.table import Table

from tierkv import cli_inputs
from tierkv.cli_inputs import AsMessage, Given, Glob, MaxFileSize, Model, SystemOnly
from tierkv.cli_options import (
    AsJson,
    ConfigFile,
    Overrides,
    console,
    print_json,
    print_rows,
    read_config,
    show_bytes,
    span,
    text,
)
from tierkv.cli_progress import Meter, stopping
from tierkv.config import Config, DaemonConfig, DiskConfig, PackConfig, RecordConfig, RedisConfig, default_socket
from tierkv.errors import ConfigError, TierError

if TYPE_CHECKING:
    from tierkv.assembly import LoadedModel
    from tierkv.store import Store
    from tierkv.tiers.daemon import DaemonTier
    from tierkv.warm.items import Skipped
    from tierkv.warm.plan import Plan
    from tierkv.warm.rendering import Document

TIERS: Final = ("disk", "redis", "daemon")
INTERRUPTED: Final = 130
GPU_STEP_TOKENS: Final = 8192
STEP_CHUNKS: Final = 4
"""Chunks of a step: short prompts do not fill it otherwise, since a chunk goes into a step whole. 30 prompts of 180 tokens: 0.98
of the engine's own speed with two, 1.0 with four, on a CPU (2-core AMD EPYC VM, 2026-11-30)."""


def warm(
    given: Given = None,
    model: Model = None,
    into: Annotated[
        str | None,
        typer.Option("--into", metavar="TIERS", help="disk, redis, daemon; default: all that are configured."),
    ] = None,
    glob: Glob = "**/*",
    max_file_size: MaxFileSize = "16MiB",
    system_only: SystemOnly = False,
    as_message: AsMessage = False,
    tenant: Annotated[
        str | None, typer.Option("--tenant", help="Whose prompts they are; default: store.tenant.")
    ] = None,
    ttl: Annotated[
        str | None, typer.Option("--ttl", metavar="SPAN", help="How long Redis keeps them, and pins last, such as 12h.")
    ] = None,
    pin: Annotated[
        bool, typer.Option("--pin", help="Keep them in the daemon's memory until --ttl, whatever else it needs.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what it would take, and change nothing.")] = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Compute the KV of prompts that are known in advance, and keep it in tiers at rest.

    What prompts share is computed once; what a tier has already is left out. Ctrl-C, or kill, at any moment: the same command
    goes on where it was.

    tierkv warm --model smollm2 docs/ --set disk.path=kv

    tierkv warm --model smollm2 prompts.jsonl --system-only --into daemon --pin --ttl 8h
    """
    from tierkv.warm.plan import make_plan
    from tierkv.warm.run import chunk_tokens

    settings = read_config(config, overrides).config
    name = cli_inputs.model_name(model, settings)
    seconds = None if ttl is None else span(ttl)
    tiers = _tiers(into, settings)
    if pin and ("daemon" not in tiers or seconds is None):
        raise ConfigError(
            "--pin keeps blocks in a daemon's memory for a time: give --into daemon and --ttl, such as 8h"
        )
    if seconds is not None and not pin and "redis" not in tiers:
        raise ConfigError(
            "--ttl is for Redis, and for --pin: with neither, what is kept stays until its room is needed"
        )
    chunk = settings.engine.chunk_tokens or chunk_tokens(settings.store.block_tokens)
    settings = only(settings, tiers, tenant=tenant, ttl_s=seconds, chunk=chunk)
    inputs = cli_inputs.read(given, glob=glob, max_file_size=max_file_size)
    loaded = _filling(cli_inputs.load(name, settings))
    documents, skipped = cli_inputs.documents_of(inputs, loaded, system_only=system_only, as_message=as_message)
    if not as_json:
        cli_inputs.tell_skipped(skipped)
    plan = make_plan([document.tokens for document in documents], block_tokens=settings.store.block_tokens)
    if dry_run:
        _estimate(loaded, settings, plan, documents, skipped, tiers, as_json=as_json)
        return
    _run(loaded, settings, plan, documents, skipped, pin_s=seconds if pin else None, as_json=as_json)


def _tiers(into: str | None, config: Config) -> list[str]:
    """The tiers to warm. Raises ConfigError for one that is none, or not configured."""
    there = {"disk": config.disk.path, "redis": config.redis.url, "daemon": config.daemon.url}
    if into is None:
        tiers = [tier for tier in TIERS if there[tier]]
        if not tiers:
            raise ConfigError(
                "no tier to warm: set disk.path, redis.url or daemon.url, such as --set disk.path=kv, or give --into daemon"
            )
        return tiers
    tiers = [tier.strip() for tier in into.split(",")]
    for tier in tiers:
        if tier not in TIERS:
            raise ConfigError(f"--into {into}: expected names of {', '.join(TIERS)}, with commas")
        if not there[tier] and tier != "daemon":
            raise ConfigError(f"--into {into}: {tier} is off: set {'disk.path' if tier == 'disk' else 'redis.url'}")
    return [tier for tier in TIERS if tier in tiers]


def only(config: Config, tiers: Sequence[str], *, tenant: str | None, ttl_s: float | None, chunk: int) -> Config:
    """The configuration with these tiers at rest, each written through, and no others.

    The disk's policy is one that lets everything in: what nobody has asked for yet, others would keep out.
    """
    disk, redis, daemon = config.disk, config.redis, config.daemon
    if "daemon" in tiers and daemon.url is None:
        daemon = replace(daemon, url=default_socket())
    if ttl_s is not None:
        redis = replace(redis, ttl_s=ttl_s)
    batch = max(config.engine.max_batch_tokens, STEP_CHUNKS * chunk, chunk + config.engine.max_sequences - 1)
    return replace(
        config,
        store=config.store if tenant is None else replace(config.store, tenant=tenant),
        host=replace(config.host, copy_down="save"),
        disk=replace(disk, copy_down="save", policy="lru") if "disk" in tiers else DiskConfig(),
        redis=replace(redis, copy_down="save") if "redis" in tiers else RedisConfig(),
        daemon=replace(daemon, copy_down="save") if "daemon" in tiers else DaemonConfig(),
        pack=PackConfig(),  # what a pack has would not be computed, and not be kept either
        record=RecordConfig(),  # nobody asked for these prompts
        engine=replace(config.engine, chunk_tokens=chunk, max_batch_tokens=batch),
    )


def _filling(loaded: "LoadedModel") -> "LoadedModel":
    """On a GPU, steps that are large enough to keep it busy: nobody waits for a token meanwhile."""
    if not loaded.config.device.startswith("cuda"):
        return loaded
    batch = max(loaded.config.max_batch_tokens, GPU_STEP_TOKENS)
    return replace(loaded, config=replace(loaded.config, max_batch_tokens=batch))


def _estimate(
    loaded: "LoadedModel",
    config: Config,
    plan: "Plan",
    documents: "Sequence[Document]",
    skipped: "Sequence[Skipped]",
    tiers: Sequence[str],
    *,
    as_json: bool,
) -> None:
    from tierkv.engine.loading import identity, layout_of
    from tierkv.keys import Namespace
    from tierkv.warm.estimate import measure_prefill, needs

    layout = layout_of(loaded.weights, block_tokens=plan.block_tokens)
    namespace = Namespace(identity(loaded.weights), layout, tenant=config.store.tenant)
    found = needs(config, layout, namespace, plan, tiers)
    lacking = max((need.lacking for need in found), default=0)
    share = lacking / plan.num_blocks if plan.num_blocks else 0.0
    per_s = measure_prefill(loaded, plan) if plan.pieces else 0.0
    seconds = plan.unique_tokens * share / per_s if per_s else 0.0
    totals = {
        "documents": len(documents),
        "tokens": sum(document.num_tokens for document in documents),
        "unique_tokens": plan.unique_tokens,
        "blocks": plan.num_blocks,
        "tokens_per_s": per_s,
        "seconds": seconds,
    }
    if as_json:
        rows = [asdict(need) | {"bytes": need.lacking * need.block_bytes, "fits": need.fits} for need in found]
        print_json({"dry_run": True, **totals, "tiers": rows, "skipped": cli_inputs.as_rows(skipped)})
        return
    print_rows(
        [
            ("documents", f"{len(documents):,}, {totals['tokens']:,} tokens, {plan.unique_tokens:,} of them different"),
            ("blocks", f"{plan.num_blocks:,} of {plan.block_tokens} tokens"),
            ("time", f"about {seconds:,.0f} s at {per_s:,.0f} tokens/s, measured on one prompt just now"),
        ]
    )
    table = Table("tier", "has", "would get", "bytes", "fits", "place", box=None, pad_edge=False, header_style="bold")
    for need in found:
        fits = {True: "yes", False: f"no: room for {need.capacity or 0:,} blocks", None: "not known"}[need.fits]
        table.add_row(
            need.tier,
            f"{need.held:,}",
            f"{need.lacking:,}",
            show_bytes(need.lacking * need.block_bytes),
            fits,
            text(need.place),
        )
    console().print(table)


def _run(
    loaded: "LoadedModel",
    config: Config,
    plan: "Plan",
    documents: "Sequence[Document]",
    skipped: "Sequence[Skipped]",
    *,
    pin_s: float | None,
    as_json: bool,
) -> None:
    from tierkv.assembly import open_engine
    from tierkv.warm.run import Warmer

    with (
        Meter("warming", plan.unique_tokens, unit="tokens") as meter,
        open_engine(loaded, config, fills=True) as (engine, store),
        stopping(meter),
    ):
        _refuse_too_large(store, plan)
        done = Warmer(engine, store, plan, into=store.below, progress=meter.add, skipped=meter.skip).run()
        pinned, unpinned = 0, None
        if pin_s is not None and not done.interrupted:
            try:
                pinned = _pin(store, plan, pin_s)
            except TierError as error:
                unpinned = error
        places = {below.name: below.place for below in store.below}
        size = store.layout.block_bytes
    rows = [
        {"tier": tier, "blocks": kept, "bytes": kept * size, "missing": plan.num_blocks - kept, "place": places[tier]}
        for tier, kept in done.kept.items()
    ]
    totals = {
        "documents": len(documents),
        "tokens": sum(document.num_tokens for document in documents),
        "unique_tokens": plan.unique_tokens,
        "held_tokens": done.held_tokens,
        "computed_tokens": done.computed_tokens,
        "seconds": done.seconds,
        "tokens_per_s": done.computed_tokens / done.seconds if done.seconds else 0.0,
        "blocks": plan.num_blocks,
        "pinned_blocks": pinned,
        "interrupted": done.interrupted,
    }
    if as_json:
        print_json({**totals, "tiers": rows, "skipped": cli_inputs.as_rows(skipped)})
    else:
        _print(totals, rows, skipped)
    if done.interrupted:
        raise typer.Exit(INTERRUPTED)
    if unpinned is not None:
        raise unpinned
    lost = [f"{row['tier']} lacks {row['missing']:,} of {plan.num_blocks:,} blocks" for row in rows if row["missing"]]
    if lost:
        raise TierError(
            f"{'; '.join(lost)}: it was full, or away (see the warnings above); start again, or give it more room"
        )


def _refuse_too_large(store: "Store", plan: "Plan") -> None:
    from tierkv.warm.estimate import daemon_room

    for below in store.below:
        room: int | None = None
        if below.number is not None:
            room = store.index.room(below.number)[1]
        elif below.name == "daemon":
            try:
                room = daemon_room(cast("DaemonTier", below.tier).stats(), store.layout)
            except TierError as error:
                raise TierError(f"the daemon does not answer ({error}): see that it runs, and start again") from None
        if room is not None and room < plan.num_blocks:
            where = (
                "host.capacity or disk.capacity of the daemon" if below.name == "daemon" else f"{below.name}.capacity"
            )
            raise ConfigError(
                f"{below.name} ({below.place}) has room for {room:,} blocks, and {plan.num_blocks:,} are to be kept: "
                f"raise {where} by {show_bytes((plan.num_blocks - room) * store.layout.block_bytes)}, "
                "or warm fewer prompts (see --dry-run)"
            )


def _pin(store: "Store", plan: "Plan", ttl_s: float) -> int:
    """Pin every path in the daemon; how many blocks, those that paths share counted for each. Raises TierError: none is then."""
    below = next(below for below in store.below if below.name == "daemon")
    tier = cast("DaemonTier", below.tier)
    paths = (plan.path_keys(number, store.root) for number in range(len(plan.paths)))
    ends = {path[-1]: path for path in paths if path}
    inner = {key for path in ends.values() for key in path[:-1]}
    made: list[tuple[str, int]] = []
    try:
        for end, path in ends.items():
            if end not in inner:  # whoever goes on from there keeps it
                made.append(tier.pin(path, ttl_s=ttl_s))
    except TierError as error:
        for name, _ in made:
            tier.unpin(name)
        raise TierError(f"all is warm, and nothing is pinned: {error}") from None
    return sum(count for _, count in made)


def _print(totals: dict[str, Any], rows: list[dict[str, Any]], skipped: "Sequence[Skipped]") -> None:  # Any: JSON
    ended = "interrupted: the same command goes on from here" if totals["interrupted"] else "done"
    if not totals["blocks"]:
        ended = "nothing to keep: no prompt is as long as a block"
    print_rows(
        [
            ("documents", f"{totals['documents']:,} ({len(skipped):,} skipped), {totals['tokens']:,} tokens"),
            ("different tokens", f"{totals['unique_tokens']:,}"),
            ("there already", f"{totals['held_tokens']:,}"),
            (
                "computed",
                f"{totals['computed_tokens']:,} in {totals['seconds']:,.1f} s, {totals['tokens_per_s']:,.0f} tokens/s",
            ),
            ("pinned", f"{totals['pinned_blocks']:,} blocks"),
            ("state", ended),
        ]
    )
    table = Table("tier", "blocks", "missing", "bytes", "place", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(
            row["tier"], f"{row['blocks']:,}", f"{row['missing']:,}", show_bytes(row["bytes"]), text(row["place"])
        )
    console().print(table)
    sys.stdout.flush()
