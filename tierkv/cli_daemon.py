"""`tierkv daemon`: run the cache daemon, and tell a running one what to do."""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from tierkv.cli_options import AsJson, ConfigFile, Overrides, console, print_json, print_rows, read_config, span
from tierkv.config import Config, Loaded, default_socket
from tierkv.errors import ConfigError, TierError

if TYPE_CHECKING:
    from tierkv.daemon.client import DaemonClient

HOST_SHARE: Final = 0.25
"""Of the memory that is free, where no configuration says how large the host tier is to be."""

daemon = typer.Typer()

Url = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="Where the daemon listens; default: daemon.url, or this user's socket."),
]


@daemon.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    config: ConfigFile = None,
    overrides: Overrides = None,
    listen: Annotated[
        list[str] | None,
        typer.Option("--listen", metavar="URL", help="unix:///path, tcp://host:port or tls://host:port. Repeatable."),
    ] = None,
    http: Annotated[
        str | None, typer.Option("--http", metavar="HOST:PORT", help="Metrics, health and the dashboard; off: none.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Serve engines whose device pools are larger than the host tier.")
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen to other machines without tokens or certificates.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log clients as they come and go.")] = False,
) -> None:
    """Run one pool of KV for all engines of this machine, or tell a running daemon what to do.

    It runs in the foreground until SIGTERM or Ctrl-C; then all is written down and it ends. It owns the sections host, disk and
    redis of its configuration; without one it takes a quarter of the free memory and listens on a socket of this user. Engines
    find it by daemon.url. SIGHUP reads tokens, certificates and leases anew.

    tierkv daemon --set disk.path=/var/lib/tierkv --set disk.capacity=200GiB
    """
    if context.invoked_subcommand is not None:
        return
    from tierkv.daemon.server import Server

    extra = list(overrides or ())
    if listen:
        extra.append(f"server.listen={','.join(listen)}")
    if http is not None:
        extra.append(f"server.http={http}")

    first = _sized(read_config(config, extra))

    def read() -> Config:
        loaded = read_config(config, extra)
        if loaded.origins["host.capacity"] != "default":
            return loaded.config
        return replace(loaded.config, host=replace(loaded.config.host, capacity=first.host.capacity))

    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    server = Server(first, force=force, insecure=insecure, told=_say, reload=read)
    server.serve()


def _say(line: str) -> None:
    sys.stdout.write(f"tierkv daemon: {line}\n")
    sys.stdout.flush()


def _sized(loaded: Loaded) -> Config:
    """The configuration, with a host tier that fits the machine where nobody said how large."""
    if loaded.origins["host.capacity"] != "default":
        return loaded.config
    from tierkv.tiers.host_memory import available_memory

    available, _ = available_memory()
    capacity = max(loaded.config.host.capacity, int(available * HOST_SHARE) >> 20 << 20)
    return replace(loaded.config, host=replace(loaded.config.host, capacity=capacity))


@contextmanager
def _client(url: str | None, config: Path | None, overrides: list[str] | None) -> "Iterator[DaemonClient]":
    from tierkv.daemon.client import DaemonClient

    settings = read_config(config, overrides).config
    options = settings.daemon
    client = DaemonClient(
        url or options.url or default_socket(),
        name="tierkv daemon",
        token=settings.daemon_token(),
        tls=options.tls(),
        connect_s=options.connect_s,
    )
    try:
        yield client
    finally:
        client.close()


@daemon.command()
def status(url: Url = None, config: ConfigFile = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show what the daemon holds and does, once. `tierkv top` keeps showing it."""
    with _client(url, config, overrides) as client:
        stats = client.stats()
    if as_json:
        print_json(stats)
        return
    from tierkv.cli_top import render

    console().print(render(stats))


@daemon.command()
def flush(
    within: Annotated[str, typer.Option("--within", metavar="SPAN", help="Time for it, such as 30s or 5m.")] = "30s",
    url: Url = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Write down what only memory holds. The daemon goes on."""
    with _client(url, config, overrides) as client:
        _flushed(client.flush(deadline_s=span(within)), within)


@daemon.command()
def drain(
    within: Annotated[str, typer.Option("--within", metavar="SPAN", help="Time for it, such as 30s or 5m.")] = "30s",
    url: Url = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Take no more blocks, and write down what there is: what to do before a stop. Reads are served on."""
    with _client(url, config, overrides) as client:
        _flushed(client.drain(deadline_s=span(within)), within)


def _flushed(done: dict[str, Any], within: str) -> None:  # Any: of the daemon
    print_rows([("written down", f"{done['written']:,} blocks")])
    if not done["complete"]:
        raise TierError(
            f"not all of it within {within}: what is left is still being written; ask again, with more time"
        )


@daemon.command()
def pin(
    prefix: Annotated[
        str, typer.Argument(metavar="KEY", help="Key of a prefix, or its beginning, as `status` shows it.")
    ],
    ttl: Annotated[str, typer.Option("--ttl", metavar="SPAN", help="How long, such as 10m, 2h or 1d.")] = "1h",
    url: Url = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Keep a prefix in memory for a time."""
    if not re.fullmatch(r"[0-9a-fA-F]{1,64}", prefix):
        raise ConfigError(
            f"{prefix}: not a key; `tierkv daemon status` lists the prefixes that were asked for, with their keys"
        )
    with _client(url, config, overrides) as client:
        done = client.pin(prefix, ttl_s=span(ttl))
    print_rows([("pinned", f"{done['blocks']:,} blocks for {ttl}"), ("name", str(done["pin"]))])


@daemon.command()
def unpin(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="Of the pin, as `pin` printed it; all of them without.")
    ] = "",
    url: Url = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """End a pin before its time, or all of them."""
    with _client(url, config, overrides) as client:
        ended = client.unpin(name)
    if name and not ended:
        raise TierError(f"there is no pin {name}; `tierkv daemon status --json` lists them")
    print_rows([("ended", f"{ended:,} pin{'' if ended == 1 else 's'}")])


@daemon.command()
def forget(
    model: Annotated[str | None, typer.Option("--model", metavar="ID", help="Blocks of this model.")] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", metavar="NAME", help="Blocks of this tenant.")] = None,
    older_than: Annotated[
        str | None,
        typer.Option("--older-than", metavar="SPAN", help="Not used for so long, such as 2h or 7d; 0s: all."),
    ] = None,
    url: Url = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Forget blocks in every tier of the daemon. What is pinned or being read stays; options narrow each other.

    Blocks of which the daemon does not know any more whose they are go with those of any model and tenant.
    """
    if model is None and tenant is None and older_than is None:
        raise ConfigError("forget what? give --model, --tenant or --older-than (0s: all)")
    with _client(url, config, overrides) as client:
        gone = client.forget(
            model=model, tenant=tenant, older_s=None if older_than is None else span(older_than, zero=True)
        )
    print_rows(
        [(tier, f"{blocks:,} blocks") for tier, blocks in gone.items()] or [("forgotten", "nothing: it holds nothing")]
    )
    if "redis" in gone:
        console().print("redis: copies that this daemon no longer knows stay until they expire there", style="dim")


@daemon.command()
def verify(url: Url = None, config: ConfigFile = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Compare every block in memory and on disk with its checksum; bad ones are forgotten. Exit code 1 if there were any."""
    bars: dict[str, Any] = {}  # Any: rich's task numbers
    shows = sys.stdout.isatty() and not as_json
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[bad]} bad"),
    )
    with _client(url, config, overrides) as client, Progress(*columns, transient=True, disable=not shows) as progress:

        def told(done: dict[str, Any]) -> None:
            tier = str(done["tier"])
            if tier not in bars:
                bars[tier] = progress.add_task(tier, total=done["blocks"], bad=0)
            progress.update(bars[tier], completed=done["checked"], bad=done["bad"])

        tiers = client.verify(told)
    if as_json:
        print_json(tiers)
    else:
        print_rows([(tier, f"{of['checked']:,} blocks checked, {of['bad']:,} bad") for tier, of in tiers.items()])
    if any(of["bad"] for of in tiers.values()):
        raise TierError("blocks were bad and have been forgotten: check memory and disk of this machine")
