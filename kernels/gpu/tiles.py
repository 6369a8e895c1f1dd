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


def tiles_for(case: Case, *, group: int) -> Tiles:
    """The measured tiles of this card's architecture, or those of the rule. group: query heads per KV head."""
    if _forced:
        return _forced[-1]
    tiles = _measured(architecture()).get(case.name) or rule(case)
    if case.few and tiles.rows < group and case.head_dim <= 256:
        return tiles._replace(rows=32, warps=8)  # one load of K for twice the heads
    return tiles


def rule(case: Case) -> Tiles:
    """Tiles that spill no register on sm_80, sm_90 and sm_100 in what the tests compile, but for one case named there.

    How fast they are was not measured.
    """
    if INTERPRETED:
        return Tiles(rows=16, keys=16, warps=1, stages=1, programs=1)
    wide, size, has_wgmma = case.head_dim > 128, case.element_bytes, architecture() >= 90
    if case.head_dim > 256:  # latents: half the registers of a processor hold the result of 32 rows
        return Tiles(rows=16 if size == 4 else 32, keys=32, warps=8, stages=1 if size == 4 else 2, programs=1)
    if case.few and wide:
        return Tiles(rows=16, keys=32, warps=8, stages=3, programs=2)
    if case.few:  # what decodes e4m3 in integers, before wgmma, needs registers
        return Tiles(
            rows=16, keys=64, warps=8 if size == 1 and not has_wgmma else 4, stages=3, programs=3 if size == 2 else 2
        )
    if size == 4:
        return Tiles(rows=16 if wide else 32, keys=32, warps=8, stages=1, programs=1)
    if wide and size == 1:
        return Tiles(rows=32, keys=32, warps=8, stages=2, programs=1)
    if wide:
        return Tiles(rows=64, keys=64 if has_wgmma else 16, warps=8, stages=2, programs=1)
    if has_wgmma and (size == 2 or architecture() < 100):
        return Tiles(rows=128, keys=64, warps=8, stages=2, programs=1)
    return Tiles(
        rows=64, keys=64 if has_wgmma or case.head_dim > 64 or size == 2 else 32, warps=8, stages=2, programs=1
    )


def candidates(case: Case) -> list[Tiles]:
    """What is worth measuring for a case; some do not fit a card, and are refused when they are launched."""
    if case.head_dim > 256:
        return [Tiles(r, k, 8, s, 1) for r in (16, 32, 64) for k in (16, 32, 64) for s in (2, 3)]
    rows = (16,) if case.few else (64, 128)
    keys = (32, 64, 128) if case.head_dim <= 128 else (16, 32, 64)
    warps = (2, 4, 8) if case.few else (4, 8)
    programs = (2, 3, 4) if case.few else (1,)
    return [Tiles(r, k, w, s, p) for r in rows for k in keys for w in warps for s in (2, 3, 4) for p in programs]


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
