"""Documents that are the same on every machine: the demo's text, cut and mixed."""

from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any


def text() -> str:
    return files("tierkv").joinpath("data/demo_document.md").read_text(encoding="utf-8")


def folder(where: Path, *, count: int, paragraphs: int, shared: bool = True) -> Path:
    """Files of some paragraphs in an order of their own; with `shared`, all begin with the same one."""
    parts = [part for part in text().split("\n\n") if len(part) > 200]
    random = Random(7)
    where.mkdir()
    for number in range(count):
        body = random.sample(parts, min(paragraphs, len(parts)))
        head = parts[0] if shared else f"Copy {number}."
        (where / f"{number:02}.md").write_text("\n\n".join([head, *body]))
    return where


def handbook(tokenizer: Any, num_tokens: int) -> str:
    """The first tokens of the text, as text that is tokenised to as many."""
    whole = text()
    ids = tokenizer(whole, return_offsets_mapping=True, verbose=False)
    return whole[: ids.offset_mapping[num_tokens - 1][1]]
