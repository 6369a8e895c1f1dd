"""Commands that only look: `config`, `size`, `inspect`."""

import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from tierkv.cli_options import (
    AsJson,
    ConfigFile,
    Overrides,
    console,
    print_json,
    print_rows,
    read_config,
    show_bytes,
    text,
)
from tierkv.config import OPTIONS, Loaded
from tierkv.errors import ConfigError

if TYPE_CHECKING:
    from tierkv.sizes import KVSize


def config(config: ConfigFile = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print every option: its value, where the value comes from, and what it means.

    Later sources win: default, configuration file, environment variable (TIERKV_HOST_CAPACITY for host.capacity), --set.
    """
    loaded = read_config(config, overrides)
    if as_json:
        print_json({name: _option(loaded, name) for name in OPTIONS})
        return
    table = Table("option", "value", "from", "meaning", box=None, pad_edge=False, header_style="bold")
    section = ""
    for name, option in OPTIONS.items():
        if section not in ("", name.split(".")[0]):
            table.add_row()
        section = name.split(".")[0]
        shown, origin = loaded.show(name), loaded.origins[name]
        value = "off" if shown is None else '""' if shown == "" else str(shown)
        style = "" if origin == "default" else "bold green"
        table.add_row(name, text(value, style), text(origin, style), text(option.help, "dim"))
    console().print(table)


def _option(loaded: Loaded, name: str) -> dict[str, object]:
    option = OPTIONS[name]
    section, key = name.split(".")
    return {
        "value": loaded.show(name)
        if key in ("url", "endpoint", "paths")
        else getattr(getattr(loaded.config, section), key),
        "from": loaded.origins[name],
        "default": option.default,
        "variable": option.variable,
        "expected": option.kind.expected,
        "meaning": option.help,
    }


def size(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, config.json, GGUF file, or smollm2.")],
    context: Annotated[int, typer.Option("--context", "-n", min=1, help="Tokens of one sequence.")] = 8192,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Sequences at a time.")] = 1,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", metavar="DTYPE", help="Of the KV: float32, float16, bfloat16, fp8, int8. Default: the model's."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell how much memory a model's KV takes, from its config alone.

    Knows MHA, GQA, MQA, MLA, sliding and chunked windows, and layers that keep no KV.
    """
    from tierkv.model_files import model_config
    from tierkv.sizes import kv_size

    kv = kv_size(model_config(model), dtype=dtype)
    if as_json:
        print_json({"model": model, **_size(kv, context, batch)})
        return
    kept, whole = kv.sequence_bytes(context) * batch, kv.token_bytes * context * batch
    windows = "".join(f"; {g.num_layers} of them keep {g.window:,} tokens" for g in kv.groups if g.window)
    rows = [
        ("model", f"{model} ({kv.model_type})"),
        ("attention", f"{kv.attention}, {kv.num_layers} layers with KV{windows}"),
        ("dtype", f"{kv.dtype}{' (assumed: the config names none; see --dtype)' if kv.dtype_assumed else ''}"),
        ("per token", f"{kv.token_bytes:,} bytes"),
        (f"{context:,} tokens x {batch:,}", f"{kept:,} bytes = {show_bytes(kept)}"),
    ]
    if kept != whole:
        rows.append(("kept in full", f"{whole:,} bytes = {show_bytes(whole)} (every token of every layer, as stored)"))
    if kv.state_layers:
        rows.append(("not counted", f"{kv.state_layers} layers without attention: any state they keep does not grow"))
    print_rows(rows)


def _size(kv: "KVSize", context: int, batch: int) -> dict[str, object]:
    return {
        "model_type": kv.model_type,
        "attention": kv.attention,
        "dtype": kv.dtype,
        "dtype_assumed": kv.dtype_assumed,
        "layers": [asdict(group) for group in kv.groups],
        "state_layers": kv.state_layers,
        "token_bytes": kv.token_bytes,
        "context": context,
        "batch": batch,
        "total_bytes": kv.sequence_bytes(context) * batch,
        "whole_bytes": kv.token_bytes * context * batch,
    }


def inspect(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Folder of a disk tier, or URL of a Redis server.")],
    prefix: Annotated[str, typer.Option("--prefix", help="First part of the Redis keys.")] = "tierkv",
    as_json: AsJson = False,
) -> None:
    """Tell what a disk folder or a Redis server holds: runs, tokens, bytes, age, codec. Changes nothing."""
    report = _report(target, prefix)
    if as_json:
        print_json(report)
    else:
        print_rows([(name.removesuffix("_s").replace("_", " "), _shown(name, value)) for name, value in report.items()])


def _report(target: str, prefix: str) -> dict[str, Any]:  # Any: values of a report of either tier
    if "://" in target:
        from tierkv.tiers.redis_inspect import inspect_server

        return asdict(inspect_server(target, prefix=prefix))
    from tierkv.tiers.disk_inspect import inspect_folder

    if zipfile.is_zipfile(target) or (Path(target) / "keys").is_dir():
        raise ConfigError(f"{target} looks like a pack: see `tierkv pack inspect`")
    if not Path(target).is_dir():
        raise ConfigError(f"{target} is no folder and no URL: give the folder of a disk tier, or redis://host:6379")
    return asdict(inspect_folder(target))


def _shown(name: str, value: Any) -> str:  # Any: as above
    if value is None:
        return {"owner": "no process"}.get(name, "-")
    if name.endswith("bytes"):
        return f"{value:,} bytes = {show_bytes(value)}" if value >= 1024 else f"{value} bytes"
    if name.endswith("_s"):
        return f"{value:,.0f} s"
    if name in ("oldest", "newest", "used"):
        return f"{_ago(time.time() - value)} ago ({time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(value))})"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(key, of)}" for key, of in value.items()) or "-"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value)) or "-"
    return f"{value:,}" if isinstance(value, int) and name != "owner" else str(value)


def _ago(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
