"""Tile sizes of the attention kernel: a measured table per architecture (`tiles.json`), and a rule where nothing was measured.

`bench/gpu.sh --tune` measures `candidates` and writes the table. Nothing is tuned while an engine runs.
"""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from .launch import INTERPRETED, architecture

TABLE: Final = Path(__file__).with_name("tiles.json")


class Tiles(NamedTuple):
    """How one program works.

    rows: query rows, each one head of one token; the smallest tensor-core tile has 16.  keys: per turn of the loop.
    stages: turns whose loads are in flight.  programs: resident on one processor, as the plan assumes.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    programs: int


class Case(NamedTuple):
    """What tile sizes depend on. few: rows of a sequence fit 16 (decode); else prefill.  element_bytes: of the pages."""

    few: bool
    head_dim: int
    element_bytes: int

    @property
    def name(self) -> str:
        """As in the table: `decode 128 x 2 bytes`."""
        return f"{'decode' if self.few else 'prefill'} {self.head_dim} x {self.element_bytes} bytes"


_forced: list[Tiles] = []


def tiles_for(case: Case) -> Tiles:
    """The measured tiles of this card's architecture, or those of the rule."""
    if _forced:
        return _forced[-1]
    return _measured(architecture()).get(case.name) or rule(case)


def rule(case: Case) -> Tiles:
    """Tiles that fit any card since sm_80 without spilling; not measured."""
    if INTERPRETED:
        return Tiles(rows=16, keys=16, warps=1, stages=1, programs=1)
    wide = case.head_dim > 128
    if case.head_dim > 256:  # latents
        return Tiles(rows=16 if case.few else 32, keys=32, warps=8, stages=2, programs=1)
    if case.few:
        return Tiles(rows=16, keys=32 if wide else 64, warps=4, stages=3, programs=2)
    if case.element_bytes == 4:
        return Tiles(rows=32, keys=32, warps=4, stages=1, programs=1)
    return Tiles(rows=64 if wide else 128, keys=32 if wide else 64, warps=8, stages=2, programs=1)


def candidates(case: Case) -> list[Tiles]:
    """What is worth measuring for a case."""
    rows = (16,) if case.few else (64, 128)
    keys = (32, 64, 128) if case.head_dim <= 128 else (16, 32, 64)
    warps = (2, 4, 8) if case.few else (4, 8)
    stages = (2, 3, 4) if case.few else (2, 3)
    programs = (1, 2, 3, 4) if case.few else (1,)
    return [Tiles(r, k, w, s, p) for r in rows for k in keys for w in warps for s in stages for p in programs]


@contextmanager
def forced(tiles: Tiles) -> Iterator[None]:
    """Use these tiles inside, whatever the case; for tuning and tests, on one thread."""
    _forced.append(tiles)
    try:
        yield
    finally:
        _forced.pop()


@functools.cache
def _measured(arch: int) -> dict[str, Tiles]:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    return {name: Tiles(**sizes) for name, sizes in table.get(f"sm_{arch}", {}).items()}
