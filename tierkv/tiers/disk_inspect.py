"""What a disk folder holds, for people: read beside whoever owns it, without taking its lock."""

import sqlite3
from dataclasses import dataclass
from pathlib import Path

from tierkv.errors import TierError
from tierkv.layout import TOKEN_BYTES
from tierkv.tiers.disk_array import read_about
from tierkv.tiers.disk_files import owner_of
from tierkv.tiers.disk_manifest import NAME, read_rows
from tierkv.tiers.disk_scan import runs_of


@dataclass(frozen=True, slots=True)
class DiskReport:
    """A disk folder at one moment.

    layout: its fields by name.  namespaces: number of roots.  tokens: of all blocks, each counted once.  payload_bytes: of the
    blocks.  folder_bytes: what the folder takes of the disk.  oldest, newest, used: seconds since the epoch, None when empty.
    damaged: rows whose guard is wrong.  owner: process that has the folder open.
    """

    path: str
    layout: dict[str, str | int]
    fingerprint: str
    codec: str
    namespaces: int
    runs: int
    blocks: int
    tokens: int
    payload_bytes: int
    folder_bytes: int
    oldest: float | None
    newest: float | None
    used: float | None
    damaged: int
    owner: int | None


def inspect_folder(path: Path | str) -> DiskReport:
    """Look at a disk folder; works while a process owns it.

    Raises ConfigError for a folder that is none of ours, TierError when its manifest cannot be read.
    """
    folder = Path(path)
    about = read_about(folder)
    try:
        rows, damaged = read_rows(folder) if (folder / NAME).exists() else ([], 0)
    except sqlite3.Error as error:
        raise TierError(f"manifest of {folder} cannot be read ({error}): the next start sets it aside") from None
    layout = about["layout"]
    block_bytes = about["block_bytes"]
    return DiskReport(
        path=str(folder),
        layout=layout,
        fingerprint=about["fingerprint"],
        codec="raw",
        namespaces=len({row.root for row in rows}),
        runs=sum(1 for _ in runs_of(rows)),
        blocks=len(rows),
        tokens=sum(len(row.tokens) for row in rows) // TOKEN_BYTES,
        payload_bytes=len(rows) * block_bytes,
        folder_bytes=folder_bytes(folder),
        oldest=min((row.created for row in rows), default=None),
        newest=max((row.created for row in rows), default=None),
        used=max((row.used for row in rows), default=None),
        damaged=damaged,
        owner=owner_of(folder),
    )


def folder_bytes(folder: Path) -> int:
    """What a folder takes of the disk, itself included; files that vanish meanwhile take nothing."""
    total = 0
    for path in (folder, *folder.rglob("*")):
        try:
            total += path.lstat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total
