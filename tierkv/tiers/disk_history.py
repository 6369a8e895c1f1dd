"""What a disk folder remembers besides its blocks: whose they are, what left and why, and notes for whoever looks at it later.

Tables of the manifest, written within its transactions. All of it is bounded, none of it is needed to serve a block.
"""

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tierkv.errors import TierError
from tierkv.keys import Key

PREFIX_BYTES: Final = 8
"""Of a key that left: enough to find it again by."""
ROW_BYTES: Final = 40
"""Of a block that left, in its table."""
MAX_NAMESPACES: Final = 16
MAX_NOTE_BYTES: Final = 4096
PAGES: Final = 24
"""For namespaces and notes at worst."""

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS namespaces (id INTEGER PRIMARY KEY, root BLOB NOT NULL, fields TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS departed (id INTEGER PRIMARY KEY, key BLOB NOT NULL, at REAL NOT NULL, why TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, text TEXT NOT NULL);
"""
"""A folder of an older version gets them when it is opened, empty."""

Execute = Callable[..., sqlite3.Cursor]
Fields = Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class History:
    """What a folder remembers. departed: by the first bytes of a key, when it left for the last time and why."""

    namespaces: dict[Key, dict[str, Any]] = field(default_factory=dict)  # Any: text and numbers
    departed: dict[bytes, tuple[float, str]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def remember_departed(execute: Execute, slots: Sequence[int], *, why: str, now: float, most: int) -> None:
    """Write down that the blocks in these slots leave, before their rows go; the oldest beyond `most` are forgotten."""
    for slot in slots:
        execute(
            "INSERT INTO departed (key, at, why) SELECT substr(key, 1, ?), ?, ? FROM blocks WHERE slot = ?",
            (PREFIX_BYTES, now, why, slot),
        )
    forget_departed(execute, most=most)


def forget_departed(execute: Execute, *, most: int) -> None:
    """Keep the newest `most` departures."""
    execute("DELETE FROM departed WHERE id <= (SELECT max(id) FROM departed) - ?", (most,))


def remember_namespace(execute: Execute, root: Key, fields: Fields) -> None:
    """Write down what a root stands for; the longest unused one beyond MAX_NAMESPACES is forgotten."""
    execute("DELETE FROM namespaces WHERE root = ?", (root,))
    execute("INSERT INTO namespaces (root, fields) VALUES (?, ?)", (root, json.dumps(dict(fields))[:MAX_NOTE_BYTES]))
    execute(
        "DELETE FROM namespaces WHERE id NOT IN (SELECT id FROM namespaces ORDER BY id DESC LIMIT ?)", (MAX_NAMESPACES,)
    )


def remember_note(execute: Execute, name: str, text: str) -> None:
    """Keep a text under a name. Raises ValueError for one past MAX_NOTE_BYTES."""
    if len(text.encode()) > MAX_NOTE_BYTES:
        raise ValueError(f"a note of {len(text.encode())} bytes: at most {MAX_NOTE_BYTES} are kept")
    execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, text))


def read_history(manifest: Path) -> History:
    """What a folder remembers, read beside whoever owns it. Raises TierError when it cannot be read."""
    try:
        connection = sqlite3.connect(f"{manifest.absolute().as_uri()}?mode=ro", uri=True, timeout=2.0)
        try:
            return _history(connection)
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise TierError(
            f"manifest of {manifest.parent} cannot be read ({error}): the next start sets it aside"
        ) from None


def _history(connection: sqlite3.Connection) -> History:
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if "departed" not in tables:  # a folder that an older version wrote
        return History()
    namespaces = {}
    for root, fields in connection.execute("SELECT root, fields FROM namespaces ORDER BY id"):
        try:
            known = json.loads(fields)
        except ValueError:
            continue  # damaged: its root is then one that nothing is known of
        if isinstance(known, dict):
            namespaces[Key(bytes(root))] = known
    departed = {
        bytes(key): (float(at), str(why))
        for key, at, why in connection.execute("SELECT key, at, why FROM departed ORDER BY id")
    }
    notes = {str(name): str(text) for name, text in connection.execute("SELECT name, text FROM notes")}
    return History(namespaces, departed, notes)
