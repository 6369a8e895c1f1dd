"""`tierkv explain`: where the blocks of a prompt are, and why not. `tierkv stats`: what larger tiers would hold."""

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.table import Table

from tierkv.cli_options import AsJson, ConfigFile, Overrides, console, print_json, read_config, text
from tierkv.config import Config
from tierkv.errors import ConfigError, RequestError, TierError
from tierkv.explain import Reason, Stretch, ago, from_stocks, partial_tail
from tierkv.keys import token_bytes
from tierkv.layout import TOKEN_BYTES

TIMES_SHOWN: Final = ("0.5", "2", "4")


def explain(
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="Text; needs a model for its tokenizer.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="PATH", help="Text before PROMPT; - is standard input.")
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option("--tokens", metavar="PATH", help="File of token ids instead of text; - is standard input."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="Whose tokenizer to take, if not engine.model's.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="A message in the model's chat template (if it has one), or bare text."),
    ] = None,
    identity: Annotated[
        str | None,
        typer.Option("--identity", metavar="HEX", help="Of the weights; default: the store's that was opened last."),
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Tell which blocks of a prompt the tiers at rest hold, and why they do not hold the others.

    Looks into disk.path and redis.url of the configuration, also while a store uses them, and changes nothing. What lies in
    device and host memory is known to the store's process only: its counters tierkv_missed_blocks_total say why it missed.

    tierkv explain "Who keeps the light?" --file handbook.md --model smollm2 --set disk.path=kv
    """
    from tierkv.stocks import namespace_of, open_stocks

    settings = read_config(config, overrides).config
    with open_stocks(settings) as stocks:
        if tokens is not None:
            if prompt is not None or file is not None:
                raise ConfigError("--tokens and text are both given: give one of them")
            ids, loaded = _read_tokens(tokens), None
        else:
            ids, loaded = _tokenized(_text(prompt, file), model or settings.engine.model, settings, chat=chat)
        root, fields = namespace_of(settings, stocks, model=identity, loaded=loaded)
        packed = token_bytes(ids)
        stretches = from_stocks(packed, root=root, fields=fields, stocks=stocks)
        down = {stock.name: stock.down for stock in stocks if stock.down}
    step = int(fields["block_tokens"])
    if tail := partial_tail(packed, block_tokens=step):
        whole = len(packed) // TOKEN_BYTES // step
        stretches.append(Stretch(whole, whole + 1, reason=Reason.PARTIAL_TAIL))
    usable = next((one.lo for one in stretches if one.reason is not None), stretches[-1].hi if stretches else 0)
    report = {
        "tokens": len(ids),
        "block_tokens": step,
        "usable_tokens": usable * step,
        "namespace": dict(fields),
        "down": down,
        "stretches": [_as_json(one, step, tail) for one in stretches],
    }
    if as_json:
        print_json(report)
    else:
        _print_explained(report, stretches)


def _as_json(stretch: Stretch, step: int, tail: int) -> dict[str, Any]:  # Any: values of a stretch
    end = stretch.hi * step
    if stretch.reason is Reason.PARTIAL_TAIL:
        end = stretch.lo * step + tail
    return asdict(stretch) | {
        "first_token": stretch.lo * step,
        "end_token": end,
        "said": stretch.why(now_s=time.time()),
    }


def _print_explained(report: Mapping[str, Any], stretches: Sequence[Stretch]) -> None:  # Any: as above
    table = Table("blocks", "tokens", "", box=None, pad_edge=False, header_style="bold")
    for stretch, row in zip(stretches, report["stretches"], strict=True):
        last = stretch.hi - 1
        blocks = f"{stretch.lo}-{last}" if last > stretch.lo else f"{stretch.lo}"
        style = "green" if stretch.reason is None else ""
        table.add_row(blocks, f"{row['first_token']}-{row['end_token'] - 1}", text(row["said"], style))
    screen = console()
    screen.print(table)
    for name, why in report["down"].items():
        screen.print(text(f"{name} could not be asked: {why}", "yellow"))
    fields = report["namespace"]
    screen.print(
        text(
            f"{report['usable_tokens']:,} of {report['tokens']:,} tokens can be had from tiers at rest, for model "
            f"{fields['model'][:12]}, tenant {fields['tenant']!r}, blocks of {report['block_tokens']} tokens"
        )
    )


def _text(prompt: str | None, file: Path | None) -> str:
    from tierkv.cli_generate import read_text

    given = "\n\n".join(filter(None, (read_text(file), prompt)))
    if not given.strip():
        raise ConfigError("there is no prompt: give text, --file or --tokens")
    return given


def _read_tokens(path: Path) -> list[int]:
    try:
        given = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"--tokens {path}: {error.strerror}; give a file of token ids") from None
    except UnicodeDecodeError:
        raise RequestError(
            f"--tokens {path}: not text; give token ids as a JSON list, or with spaces between"
        ) from None
    words = re.split(r"[\s,]+", given.strip().strip("[]").strip())
    try:
        ids = [int(word) for word in words if word]
    except ValueError as error:
        wrong = str(error).partition(": ")[2]
        raise RequestError(f"--tokens {path}: {wrong} is no token id; give whole numbers") from None
    if not ids:
        raise RequestError(f"--tokens {path}: no token ids in it")
    return ids


def _tokenized(given: str, model: str | None, config: Config, *, chat: bool | None) -> tuple[list[int], str | None]:
    """Token ids of a text, and the identity of the model where it had to be loaded for them."""
    if model is None:
        raise ConfigError("text needs a tokenizer: name a model (--model, or engine.model), or give --tokens")
    from tierkv.engine import EngineConfig, loading

    tokenizer, identity = loading.load_tokenizer(model), None
    if tokenizer is None:  # a GGUF file has it inside
        weights, tokenizer = loading.load(model, EngineConfig(dtype=config.engine.dtype, device="cpu"))
        identity = loading.identity(weights)
    if tokenizer is None:
        raise RequestError(f"{model}: it has no tokenizer; give --tokens")
    template = getattr(tokenizer, "chat_template", None)
    if chat and not template:
        raise RequestError("--chat: this model has no chat template; leave it out, or give --raw")
    if chat is False or not template:
        return list(tokenizer(given, verbose=False).input_ids), identity
    message = [{"role": "user", "content": given}]
    rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(rendered, add_special_tokens=False, verbose=False).input_ids), identity


# -- stats ----------------------------------------------------------------------------------------------------------------


def stats(
    log: Annotated[
        Path | None,
        typer.Option("--log", metavar="PATH", help="An access log to compute it from, instead of the store's own."),
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Tell what tiers of other sizes would hold: points of all prompt blocks found in a tier or a faster one.

    A store leaves its figures in its disk folder once a minute, and when it is closed. With --log, or without a disk tier, they
    are computed from an access log (record.path), for the configured tiers. They hold for forgetting the least recently used
    first, from an empty store on; `tierkv simulate` compares policies.
    """
    settings = read_config(config, overrides).config
    if log is None and settings.disk.path is not None:
        report = _left_by_the_store(settings.disk.path)
    else:
        report = _from_log(log or settings.record.path, settings)
    if as_json:
        print_json(report)
    else:
        _print_stats(report)


def _left_by_the_store(folder: Path) -> dict[str, Any]:  # Any: as JSON gives it
    from tierkv.lookups import NOTE
    from tierkv.tiers.disk_array import read_about
    from tierkv.tiers.disk_history import read_history
    from tierkv.tiers.disk_manifest import NAME

    read_about(folder)
    noted = read_history(folder / NAME).notes.get(NOTE) if (folder / NAME).exists() else None
    if noted is None:
        raise TierError(
            f"no store has left figures in {folder} yet: they come a minute after its start, and when it is closed"
        )
    return dict(json.loads(noted))


def _from_log(path: Path | None, config: Config) -> dict[str, Any]:  # Any: as above
    if path is None:
        raise ConfigError("there is nothing to read: set disk.path or record.path as the store has them, or give --log")
    import numpy as np

    from tierkv.record import read_header
    from tierkv.reuse_distance import ReuseDistances, as_rows, mixed
    from tierkv.simulate.traces import open_trace

    block_bytes = read_header(path)["block_bytes"]
    sizes = {"device": config.device.capacity, "host": config.host.capacity}
    if config.disk.path is not None:
        sizes["disk"] = config.disk.capacity
    capacities = {name: size // block_bytes for name, size in sizes.items() if size}
    trace = open_trace(path)
    distances = ReuseDistances(max_blocks=4 * max(capacities.values()))
    try:
        for request in trace:
            distances.refer(mixed(np.frombuffer(request.blocks, "<u8")))
    finally:
        trace.close()
    rows = as_rows(distances, capacities)
    return {"at": None, "block_tokens": trace.block_tokens, "refs": distances.num_refs, "tiers": rows, "missed": {}}


def _print_stats(report: Mapping[str, Any]) -> None:  # Any: as above
    screen = console()
    table = Table("tier", "blocks", "found here or faster", box=None, pad_edge=False, header_style="bold")
    for times in TIMES_SHOWN:
        table.add_column(f"x{times}", justify="right")
    for row in report["tiers"]:
        now = row["found"]["1"]
        changes = [_points(row["found"][times] - now) for times in TIMES_SHOWN]
        table.add_row(row["tier"], f"{row['blocks']:,}", f"{100 * now:.1f} %", *changes)
    screen.print(table)
    age = "" if report["at"] is None else f" from the store's start to {ago(time.time() - report['at'])} ago"
    screen.print(text(f"of {report['refs']:,} blocks of prompts{age}; sampled, as least recently used first would do"))
    if report["missed"]:
        table = Table("why blocks were computed", "blocks", box=None, pad_edge=False, header_style="bold")
        table.columns[1].justify = "right"
        for reason, blocks in sorted(report["missed"].items(), key=lambda entry: -entry[1]):
            table.add_row(reason.replace("_", " "), f"{blocks:,.0f}")
        screen.print()
        screen.print(table)


def _points(share: float) -> str:
    points = 100 * share
    return "same" if abs(points) < 0.05 else f"{points:+.1f} points"
