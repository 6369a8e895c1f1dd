"""`tierkv top`: what a cache daemon holds and does, in a terminal, from the same document as its page.

Names in the document are a stranger's words: nothing in them may reach the terminal as a control sequence.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tierkv.cli_options import AsJson, console, print_json, show_bytes, text
from tierkv.errors import ConfigError, TierError
from tierkv.explain import ago
from tierkv.values import hide_password

TIMEOUT_S: Final = 5.0
MAX_BYTES: Final = 64 << 20
BAR: Final = 24
"""Characters of a bar."""
SHOWN_PREFIXES: Final = 8
NONE: Final = "–"

PARTS: Final = (
    "version", "pid", "started", "uptime_s", "state", "name", "listen", "tiers", "lookups", "misses", "requests", "clients",
    "prefixes", "leases", "leased_bytes", "queues", "saves_dropped", "corrupt_blocks",
)  # fmt: skip
"""What a document must have to be shown."""

Stats = Mapping[str, Any]
"""Any: values of a JSON document."""


def top(
    url: Annotated[
        str, typer.Option("--url", metavar="URL", help="The daemon's HTTP address.")
    ] = "http://127.0.0.1:9419",
    every: Annotated[
        float, typer.Option("--every", metavar="SECONDS", min=0.1, max=3600, help="How often to ask again.")
    ] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print once and leave, as when the output is no terminal.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what the cache daemon holds and does: tiers, hits, misses, requests, clients. Ctrl-C ends it.

    The page at the same address shows more, and remembers some minutes.
    """
    stats = read_stats(url)
    if as_json:
        print_json(stats)
    elif once or not sys.stdout.isatty():
        console().print(render(stats))
    else:
        _watch(stats, url, every_s=every)


def read_stats(url: str) -> Stats:
    """The document of the daemon at this address. Raises ConfigError for what is no address, TierError when none answers."""
    import http.client
    import urllib.error
    import urllib.request

    asked = f"{url.rstrip('/')}/stats"
    shown = _plain(hide_password(asked))
    try:
        parts = urlsplit(asked)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url {shown.removesuffix('/stats')}: not an address; give one like http://127.0.0.1:9419")
    # No proxy: the daemon is on this machine or beside it, and its figures are nobody else's.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(asked, timeout=TIMEOUT_S) as answer:
            body = answer.read(MAX_BYTES)
    except urllib.error.HTTPError as error:
        with error:
            raise TierError(
                f"{shown}: it answers {error.code} {_plain(error.reason)}; is that a tierkv daemon?"
            ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = _plain(str(getattr(error, "reason", None) or error))
        raise TierError(f"no daemon at {shown}: {why}; start one with `tierkv daemon`, or give its --url") from None
    try:
        stats = json.loads(body)
    except ValueError:
        stats = None
    if not isinstance(stats, dict) or "tiers" not in stats:
        raise TierError(f"{shown}: what answers is not a tierkv daemon; give the daemon's --url")
    if absent := [part for part in PARTS if part not in stats]:
        raise TierError(
            f"{shown}: it says nothing of {', '.join(absent)}; take the tierkv top of the daemon's own version"
        )
    return stats


def _watch(stats: Stats, url: str, *, every_s: float) -> None:
    """Ask again and again. A daemon that stops answering leaves its last figures, and their age."""
    before, answered_at = None, time.monotonic()
    try:
        with Live(render(stats), auto_refresh=False, screen=True) as live:
            while True:
                time.sleep(every_s)
                try:
                    before, stats, trouble = stats, read_stats(url), None
                    answered_at = time.monotonic()
                except TierError as error:
                    trouble = f"{error} (these figures are {ago(time.monotonic() - answered_at)} old)"
                live.update(render(stats, before=before, trouble=trouble), refresh=True)
    except KeyboardInterrupt:
        return


# -- what is shown -----------------------------------------------------------------------------------------------------


def render(stats: Stats, *, before: Stats | None = None, trouble: str | None = None) -> RenderableType:
    """The whole screen. before: the document before this one, for rates."""
    lines: list[RenderableType] = [_title(stats)]
    if trouble:
        lines.append(text(_plain(trouble), "bold red"))
    lines += [
        _summary(stats),
        Text(),
        _tiers(stats, before),
        Text(),
        _side_by_side(_misses(stats), _requests(stats, before)),
    ]
    lines += [Text(), _clients(stats)]
    if stats["prefixes"]:
        lines += [Text(), _prefixes(stats)]
    return Group(*lines)


def _title(stats: Stats) -> Text:
    state = text(_plain(stats["state"]), "bold green" if stats["state"] == "ready" else "bold yellow")
    where = ", ".join(_plain(url) for url in stats["listen"])
    return Text.assemble(
        ("tierkv ", "bold"), (f"{_plain(stats['name'])}  ", ""), state,
        f"  up {ago(stats['uptime_s'])}  version {_plain(stats['version'])}  process {stats['pid']}  {where}",
    )  # fmt: skip


def _summary(stats: Stats) -> Text:
    asked, found = stats["lookups"]["blocks"], stats["lookups"]["hit_blocks"]
    waiting = (
        ", ".join(f"{_plain(row['queue'])} {row['blocks']:,}" for row in stats["queues"] if row["blocks"]) or "none"
    )
    line = Text.assemble(
        "hit rate ", (f"{100 * found / asked:.1f} %" if asked else NONE, "bold"),
        f" of {asked:,} blocks in {stats['lookups']['count']:,} lookups   leases {stats['leases']:,}"
        f" ({show_bytes(stats['leased_bytes'])})   waiting: {waiting}",
    )  # fmt: skip
    dropped = sum(stats["saves_dropped"].values())
    if stats["corrupt_blocks"] or dropped:
        line.append(f"   {stats['corrupt_blocks']:,} corrupt, {dropped:,} saves dropped", "yellow")
    return line


def _tiers(stats: Stats, before: Stats | None) -> Table:
    table = _table(
        "tier", "filled", "", "blocks", "of", "bytes", "pinned", "in/s", "out/s", "hits", "load p50", "p99", ""
    )
    for tier in stats["tiers"]:
        came, left = _flow(tier, stats, before)
        capacity = tier["capacity_blocks"]
        share = None if not capacity else tier["blocks"] / capacity
        table.add_row(
            text(_plain(tier["tier"]), "bold"), text(_bar(share), "cyan"), NONE if share is None else f"{100 * share:.0f} %",
            f"{tier['blocks']:,}", NONE if capacity is None else f"{capacity:,}", show_bytes(tier["bytes"]),
            f"{tier['pinned_blocks']:,}", came, left, f"{tier['hit_blocks']:,}", show_latency(tier["load_s"]["p50"]),
            show_latency(tier["load_s"]["p99"]), text("out of use", "bold red") if tier["down"] else "",
        )  # fmt: skip
    return table


def _flow(tier: Mapping[str, Any], stats: Stats, before: Stats | None) -> tuple[str, str]:  # Any: as in Stats
    """Blocks per second into the tier and out of it. What leaves without being counted shows as out, too."""
    was = next((one for one in before["tiers"] if one["tier"] == tier["tier"]), None) if before else None
    seconds = stats["uptime_s"] - before["uptime_s"] if before and before["started"] == stats["started"] else 0
    if was is None or seconds <= 0:
        return NONE, NONE
    net = tier["blocks"] - was["blocks"]
    came = max(0, net + max(0, tier["evicted_blocks"] - was["evicted_blocks"]))
    return f"{came / seconds:,.1f}", f"{(came - net) / seconds:,.1f}"


def _misses(stats: Stats) -> Table:
    table = _table("why blocks were missing", "blocks")
    for reason, blocks in sorted(stats["misses"].items(), key=lambda entry: -entry[1]):
        table.add_row(text(_plain(reason).replace("_", " ")), f"{blocks:,.0f}")
    if not stats["misses"]:
        table.add_row("nothing was missing", "")
    return table


def _requests(stats: Stats, before: Stats | None) -> Table:
    table = _table("requests", "count", "a second", "failed", "p50", "p99")
    seconds = stats["uptime_s"] - before["uptime_s"] if before and before["started"] == stats["started"] else 0
    was = {row["op"]: row["count"] for row in before["requests"]} if before else {}
    for row in stats["requests"]:
        rate = f"{(row['count'] - was.get(row['op'], 0)) / seconds:,.1f}" if seconds > 0 else NONE
        table.add_row(
            text(_plain(row["op"])), f"{row['count']:,}", rate, f"{row['failed']:,}", show_latency(row["p50_s"]),
            show_latency(row["p99_s"]),
        )  # fmt: skip
    if not stats["requests"]:
        table.add_row("none yet", *[""] * 5)
    return table


def _clients(stats: Stats) -> RenderableType:
    if not stats["clients"]:
        url = _plain(stats["listen"][0]) if stats["listen"] else "unix:///run/tierkv/tierkv.sock"
        return text(f'no client is connected; in an engine\'s tierkv.toml: [daemon] url = "{url}"', "dim")
    names = ("clients", "pid", "address", "connected", "leases", "leased", "read", "written", "device pool")
    table = _table(*names, words={2})
    now = stats["started"] + stats["uptime_s"]
    for client in stats["clients"]:
        table.add_row(
            text(_plain(client["name"]) or "no name"), NONE if client["pid"] is None else str(client["pid"]),
            text(_plain(client["address"])), ago(now - client["since"]), f"{client['leases']:,}",
            show_bytes(client["leased_bytes"]), f"{client['read_blocks']:,}", f"{client['written_blocks']:,}",
            show_bytes(client["device_bytes"]),
        )  # fmt: skip
    return table


def _prefixes(stats: Stats) -> Table:
    table = _table("top prefixes", "model", "tenant", "tokens", "bytes", "uses", "last use", words={1, 2})
    now = stats["started"] + stats["uptime_s"]
    for row in stats["prefixes"][:SHOWN_PREFIXES]:
        table.add_row(
            text(_plain(row["key"])), text(_plain(row["model"])), text(_plain(row["tenant"]) or NONE), f"{row['tokens']:,}",
            show_bytes(row["bytes"]), f"{row['uses']:,}", f"{ago(now - row['used'])} ago",
        )  # fmt: skip
    return table


def _table(*columns: str, words: Sequence[int] | set[int] = ()) -> Table:
    """Numbers to the right; the first column and `words` to the left."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 or number in words else "right", no_wrap=True)
    return table


def _side_by_side(left: Table, right: Table) -> Table:
    grid = Table.grid(padding=(0, 4))
    grid.add_row(left, right)
    return grid


def _bar(share: float | None) -> str:
    if share is None:
        return ""
    full = round(BAR * min(1.0, share))
    return "█" * full + "░" * (BAR - full)


def show_latency(seconds: float | None) -> str:
    """A duration for reading, in three digits: `18.4 ms`."""
    if seconds is None:
        return NONE
    if seconds < 0.001:
        return f"{1e6 * seconds:.0f} µs"
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _plain(given: str) -> str:
    """Without what a terminal obeys or what turns its text around."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in given.strip())
