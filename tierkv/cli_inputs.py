"""What `tierkv warm` and `tierkv pack build` share: the model, the inputs, and how they become documents."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console

from tierkv.config import Config
from tierkv.errors import ConfigError, InputError
from tierkv.values import parse_size

if TYPE_CHECKING:
    from tierkv.assembly import LoadedModel
    from tierkv.warm.items import Inputs, Skipped
    from tierkv.warm.rendering import Document

SHOWN_SKIPPED: Final = 10

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="MODEL", help="Folder, GGUF file or smollm2; default: engine.model."),
]
Given = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="INPUT…",
        help="Text files, folders, .jsonl files (prompt, messages or tokens in each line), patterns; - is standard input.",
    ),
]
Glob = Annotated[str, typer.Option("--glob", metavar="PATTERN", help="Which files of folders.")]
MaxFileSize = Annotated[str, typer.Option("--max-file-size", metavar="SIZE", help="Larger files are skipped.")]
SystemOnly = Annotated[
    bool, typer.Option("--system-only", help="Of conversations, only what precedes the first user turn.")
]


AsMessage = Annotated[
    bool,
    typer.Option("--chat", help="A text is what a user's first message begins with, in the model's chat template."),
]


def model_name(model: str | None, config: Config) -> str:
    """The model that was named. Raises ConfigError when none was."""
    name = model or config.engine.model
    if name is None:
        raise ConfigError("no model: give --model (a folder, a GGUF file, or smollm2), or set engine.model")
    return name


def read(given: Sequence[str] | None, *, glob: str, max_file_size: str) -> "Inputs":
    """Read the inputs; nothing is computed before all of them are known to be readable. Raises InputError."""
    from tierkv.warm.inputs import read_inputs

    if not given:
        raise InputError("no input: give text files, folders, .jsonl files, or - for standard input")
    try:
        most = parse_size(max_file_size)
    except ValueError:
        raise ConfigError(f"--max-file-size {max_file_size}: expected a size such as 16MiB") from None
    stdin = None if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer
    return read_inputs(given, max_bytes=most, glob=glob, stdin=stdin)


def load(name: str, config: Config) -> "LoadedModel":
    """Load the model, and say so on a terminal."""
    from tierkv.assembly import load_model

    with Console(stderr=True).status(f"loading {name}", spinner="line") as status:
        if not sys.stderr.isatty():
            status.stop()
        return load_model(name, config)


def documents_of(
    inputs: "Inputs", loaded: "LoadedModel", *, system_only: bool, as_message: bool
) -> "tuple[Sequence[Document], Sequence[Skipped]]":
    """Tokenise the inputs. Raises InputError when the model cannot take them, or none of them is left."""
    from tierkv.engine.loading import max_context
    from tierkv.warm.rendering import render

    context = loaded.config.max_context or max_context(loaded.weights)
    rendered = render(
        inputs.items,
        loaded.tokenizer,
        max_tokens=(context or 1 << 30) - 1,
        vocab_size=loaded.weights.config.get_text_config().vocab_size,
        system_only=system_only,
        as_message=as_message,
    )
    skipped = [*inputs.skipped, *rendered.skipped]
    if not rendered.documents:
        raise InputError(f"nothing to compute: every input was skipped ({skipped[0].name}: {skipped[0].reason})")
    return rendered.documents, skipped


def tell_skipped(skipped: "Sequence[Skipped]") -> None:
    """Say what is left out, on stderr."""
    for one in skipped[:SHOWN_SKIPPED]:
        sys.stderr.write(f"skipped {one.name}: {one.reason}\n")
    if len(skipped) > SHOWN_SKIPPED:
        sys.stderr.write(f"skipped {len(skipped) - SHOWN_SKIPPED:,} more\n")


def as_rows(skipped: "Sequence[Skipped]") -> list[dict[str, Any]]:  # Any: JSON
    """The same for --json."""
    return [{"name": one.name, "reason": one.reason} for one in skipped]
