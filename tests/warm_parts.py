"""A tiny model on disk, folders of documents, what a store holds, and commands that end themselves in the middle."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from tests.engine_models import byte_model, byte_tokenizer
from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.tiers.disk import DiskTier
from tierkv.tiers.disk_array import read_about
from tierkv.tiers.disk_manifest import read_rows

ROOT = Path(__file__).parent.parent
TEXT = "the lamp is lit at dusk and the keeper writes wind weather and every ship that passes into a book"

_ENDING = """
import os, sys
import tierkv.cli_progress as progress
limit, number = int(sys.argv[1]), int(sys.argv[2])
add = progress.Meter.add

def ending(meter, amount):
    add(meter, amount)
    if meter._done >= limit > 0:
        os.write(2, f"computed {meter._done}\\n".encode())
        os.kill(os.getpid(), number)
        add(meter, 0)  # where a signal that was taken note of takes effect

progress.Meter.add = ending
from tierkv.cli import main
sys.exit(main(sys.argv[3:]))
"""


def save_tiny(folder: Path, *, seed: int = 0, template: bool = True) -> Path:
    """A model of one token per byte, with 256 tokens of context."""
    byte_model(seed=seed).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    if not template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


def write_documents(folder: Path, *, count: int, words: int, seed: int = 0, shared: str = "") -> Path:
    """Text files that begin alike, and go on differently."""
    random = Random(seed)
    folder.mkdir()
    for number in range(count):
        body = " ".join(random.choices(TEXT.split(), k=words))
        (folder / f"{number:02}.txt").write_text(f"{shared}Document {number}. {body}\n")
    return folder


def contents(folder: Path) -> dict[bytes, bytes]:
    """Every block of a disk tier, by key."""
    about = read_about(folder)
    layout = Layout(**about["layout"])
    rows, damaged = read_rows(folder)
    assert not damaged
    keys = [row.key for row in rows]
    tier = DiskTier(folder, layout=layout, capacity_bytes=1 << 34, metrics=Metrics())
    try:
        blocks = [bytearray(layout.block_bytes) for _ in keys]
        assert all(tier.read(keys, [memoryview(block) for block in blocks]))
    finally:
        tier.close()
    return {bytes(key): bytes(block) for key, block in zip(keys, blocks, strict=True)}


def ended(
    arguments: Sequence[str],
    *,
    after: int = 0,
    by: int = 0,
    cwd: Path | None = None,
    most_file_bytes: int | None = None,
) -> "subprocess.CompletedProcess[str]":
    """Run a command in a process that sends itself a signal once so many tokens are computed; 0: it runs to its end.

    most_file_bytes: no file may grow beyond it, as if the disk were full.
    """
    command = [sys.executable, "-c", _ENDING, str(after), str(by), *arguments]
    if most_file_bytes is not None:
        command = ["prlimit", f"--fsize={most_file_bytes}", *command]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd or ROOT)


def result(run: "subprocess.CompletedProcess[str]") -> Any:
    """What --json printed."""
    return json.loads(run.stdout)
