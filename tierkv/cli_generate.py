"""`tierkv generate`: one prompt, one model, the configured tiers."""

import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from tierkv.cli_options import AsJson, ConfigFile, Overrides, print_json, read_config
from tierkv.config import Config
from tierkv.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from tierkv.engine import Engine, SamplingParams


def generate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] PROMPT",
            help="MODEL is a folder, a GGUF file or smollm2; with engine.model set, leave it out.",
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="PATH", help="Text before PROMPT; - is standard input.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw", help="A message in the model's chat template (if it has one), or bare text to go on with."
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-m", min=1, help="Tokens of the answer at most.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Sample from this many likeliest tokens.")] = None,
    top_p: Annotated[float, typer.Option("--top-p", help="Sample from the likeliest tokens of this mass.")] = 1.0,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Same seed, same answer. Default: from engine.seed.")
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Answers; the prompt is computed once.")] = 1,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="Ends the answer. Repeatable.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No figures after the answer.")] = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Answer PROMPT with a model whose KV is kept in the configured tiers. The answer appears as it is made.

    A later prompt with the same beginning finds its KV where it was kept:

    tierkv generate smollm2 "Who keeps the light?" --file handbook.md --set disk.path=kv
    """
    settings = read_config(config, overrides).config
    model, question = _model_and_prompt(words or [], settings, has_file=file is not None)
    prompt = "\n\n".join(filter(None, (read_text(file), question)))
    if not prompt.strip():
        raise RequestError("the prompt is empty: give at least one word")
    from tierkv.engine import SamplingParams

    try:
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            n=n,
            stop=tuple(stop or ()),
        )
    except RequestError as error:  # its names are the flags'
        raise ConfigError(str(error)) from None
    report = _answer(model, prompt, params, settings, chat=chat, stream=not as_json)
    if as_json:
        print_json(report)
    elif not quiet:
        sys.stdout.flush()
        sys.stderr.write(_figures(report["stats"]))


def _model_and_prompt(words: list[str], config: Config, *, has_file: bool) -> tuple[str, str]:
    default = config.engine.model
    if len(words) == 2:
        return words[0], words[1]
    if len(words) == 1 and default is not None:
        return default, words[0]
    if len(words) == 1 and has_file:
        return words[0], ""
    if not words and default is not None and has_file:
        return default, ""
    if len(words) == 1:
        raise ConfigError("a model and no prompt, or the reverse: give both, or set engine.model, or give --file")
    raise ConfigError(f"{len(words)} words given: give MODEL and PROMPT, the prompt in quotes")


def read_text(file: Path | None) -> str:
    """Text of a file, of standard input for -, or none. Raises RequestError."""
    if file is None:
        return ""
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"--file {file}: {error.strerror}; give a text file, or - for standard input") from None
    except UnicodeDecodeError:
        raise RequestError(f"--file {file}: not UTF-8 text; give a text file") from None


def _answer(
    model: str, prompt: str, params: "SamplingParams", config: Config, *, chat: bool | None, stream: bool
) -> dict[str, Any]:
    """Run one request; with `stream`, its first sample appears on stdout as it is made, the others after it."""
    from tierkv import open_engine

    texts = [""] * params.n
    tokens: list[list[int]] = [[] for _ in texts]
    ends: list[tuple[str | None, str | int | None]] = [(None, None)] * params.n
    stats = None
    with Console(stderr=True).status(f"loading {model}", spinner="line") as status, ExitStack() as opened:
        if not (stream and sys.stderr.isatty()):
            status.stop()
        engine, _ = opened.enter_context(open_engine(model, config))
        status.update("reading the prompt")
        for piece in engine.stream(_prompt(engine, prompt, chat), params):
            status.stop()
            texts[piece.index] += piece.text
            tokens[piece.index] += piece.token_ids
            if piece.finish_reason is not None:
                ends[piece.index] = piece.finish_reason, piece.stop_reason
            stats = piece.stats or stats
            if stream and piece.index == 0:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
    if stream:
        for number, text in enumerate(texts[1:], 2):
            sys.stdout.write(f"\n\n[{number}] {text}")
        sys.stdout.write("\n")
    samples = [
        {"text": text, "token_ids": ids, "finish_reason": reason, "stop_reason": stop}
        for text, ids, (reason, stop) in zip(texts, tokens, ends, strict=True)
    ]
    return {"model": model, "samples": samples, "stats": asdict(stats) if stats else None}


def _prompt(engine: "Engine", prompt: str, chat: bool | None) -> "str | list[int]":
    has_template = bool(getattr(engine.tokenizer, "chat_template", None))
    if chat and not has_template:
        raise RequestError("--chat: this model has no chat template; leave it out, or give --raw")
    if chat is False or not has_template:
        return prompt
    return engine.chat_prompt([{"role": "user", "content": prompt}])


def _figures(stats: dict[str, Any]) -> str:  # Any: fields of RequestStats
    sources = [f"{count:,} {'from ' if tier != 'computed' else ''}{tier}" for tier, count in stats["sources"].items()]
    figures = [
        f"{stats['prompt_tokens']:,} prompt tokens: {', '.join(sources)}",
        f"first token after {stats['ttft_s']:.3f} s",
        f"{stats['output_tokens']:,} tokens",
    ]
    if stats["tpot_s"] is not None:
        figures.append(f"{stats['tpot_s'] * 1000:.1f} ms each")
    return f"[{' · '.join(figures)}]\n"
