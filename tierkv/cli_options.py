"""What the commands share: option types, the configuration of a command, and how results are printed."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tierkv.config import Loaded, load
from tierkv.errors import ConfigError

_SPANS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
PLAIN_WIDTH: Final = 160  # columns of a table that goes to a file or a pipe

ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="PATH", help="Configuration file instead of ./tierkv.toml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="SECTION.KEY=VALUE", help="Set one option, such as host.capacity=2GiB. Repeatable."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def read_config(config: Path | None, overrides: Sequence[str] | None) -> Loaded:
    """The configuration of this command."""
    return load(config, overrides=overrides or ())


def console() -> Console:
    """Where results go; as wide as the terminal, or wide enough for whole lines elsewhere."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


def print_json(value: object) -> None:
    """Write one JSON document to stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Write names and values, aligned."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows:
        table.add_row(text(name, "bold"), text(value))
    console().print(table)


def text(given: str, style: str = "") -> Text:
    """Text as it is: brackets in a path are not markup."""
    return Text(given, style=style)


def show_bytes(size: float) -> str:
    """A size for reading, rounded: `1.50 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:,.2f} TiB"


def span(text: str, *, zero: bool = False) -> float:
    """Seconds of a time such as 30s, 5m, 2h or 7d. Raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip().lower())
    seconds = float(found[1]) * _SPANS[found[2] or "s"] if found else -1.0
    if seconds < 0 or (seconds == 0 and not zero):
        raise ConfigError(f"{text}: not a time; give a number and s, m, h or d, such as 30s or 2h")
    return seconds
