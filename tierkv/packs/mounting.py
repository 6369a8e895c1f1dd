"""Adds a pack to a configuration file, without touching a byte of what a person wrote there."""

import json
from pathlib import Path

from tierkv.config import load
from tierkv.errors import ConfigError
from tierkv.packs.archive import replace


def add_to_config(file: Path, place: str) -> None:
    """Add `[[tiers]] kind = "pack"` for a pack; nothing is done where it is there already. Raises ConfigError."""
    try:
        before = file.read_text(encoding="utf-8") if file.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}; give a configuration file that can be read") from None
    if file.exists():
        mounted = load(file, {}).config.pack.paths or ()  # and a file that is none of ours is found out
        if place in map(str, mounted):
            return
    gap = "" if not before or before.endswith("\n\n") else "\n" if before.endswith("\n") else "\n\n"
    entry = f'{gap}[[tiers]]\nkind = "pack"\npath = {json.dumps(place, ensure_ascii=False)}\n'
    try:
        with replace(file.absolute()) as out:
            out.write((before + entry).encode())
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; give a configuration file that can be written") from None
