"""Adds a pack to a configuration file, without touching a byte of what a person wrote there."""

import json
from pathlib import Path

from tierkv.config import load
from tierkv.errors import ConfigError
from tierkv.packs.write import kept


def add_to_config(file: Path, place: str, *, endpoint: str | None = None) -> None:
    """Add `[[tiers]] kind = "pack"` for a pack; nothing is done where it is there already. Raises ConfigError.

    endpoint: where its server is, if the file does not say so. The file has the new content, and can be loaded, or stays.
    """
    path = file.resolve()
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}; give a configuration file that can be read") from None
    known = load(path, {}).config.pack if path.exists() else None
    if known and place in map(str, known.paths or ()):
        return
    gap = "" if not before or before.endswith("\n\n") else "\n" if before.endswith("\n") else "\n\n"
    entry = f'{gap}[[tiers]]\nkind = "pack"\npath = {json.dumps(place, ensure_ascii=False)}\n'
    if endpoint and not (known and known.endpoint == endpoint):
        entry += f"endpoint = {json.dumps(endpoint, ensure_ascii=False)}\n"
    trial = path.with_name(f".{path.name}.trial")
    try:
        trial.write_bytes((before + entry).encode())
        load(trial, {})
        with kept(path) as out:
            out.write((before + entry).encode())
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; give a configuration file that can be written") from None
    except ConfigError as error:
        why = str(error).replace(str(trial), str(file))
        raise ConfigError(f"the pack cannot be added: {why}") from None
    finally:
        trial.unlink(missing_ok=True)
