"""The durable record of which slot holds which block: SQLite in WAL mode, written in batches, read at start and by `scan`.

The live index is a dict in the tier; nothing here is asked per key. Rows are numbered by slot, so the table cannot outgrow the
array, a slot cannot have two rows, and no second index is kept. The tier's order (rows gone, slots overwritten, rows added) is
what makes a crash harmless; this file only promises that a commit is whole.
"""

import logging
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import xxhash

from tierkv.errors import ConfigError, TierError
from tierkv.keys import KEY_BYTES, Key
from tierkv.tiers import disk_history as history
from tierkv.tiers.disk_files import Files

NAME: Final = "manifest.sqlite"
VERSION: Final = 1
PAGE_BYTES: Final = 4096
WAL_BYTES: Final = 1 << 20
BATCH: Final = 256
_FIXED_PAGES: Final = 16 + history.PAGES
_BUSY_S: Final = 0.25
"""How long a reader of the manifest, such as an inspection, may hold up a checkpoint."""
_DAMAGED: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_MISMATCH)

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS roots (id INTEGER PRIMARY KEY, root BLOB NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS blocks (
    slot INTEGER PRIMARY KEY, key BLOB NOT NULL, checksum INTEGER NOT NULL, root INTEGER NOT NULL, parent BLOB NOT NULL,
    depth INTEGER NOT NULL, tokens BLOB NOT NULL, guard INTEGER NOT NULL, created REAL NOT NULL, used REAL NOT NULL
);
"""

_INSERT: Final = "INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"

log = logging.getLogger("tierkv")


class Row(NamedTuple):
    """A block as the manifest knows it.

    checksum: see `digest`.  guard: see `guard_of`.  created, used: seconds since the epoch.
    """

    slot: int
    key: Key
    checksum: int
    root: Key
    parent: Key
    depth: int
    tokens: bytes
    created: float
    used: float


def digest(block: memoryview, key: Key) -> int:
    """The checksum of a block under its key, signed as SQLite wants it.

    Seeded with the key: a row that points to another whole block is caught as well as a torn one.
    """
    return _signed(xxhash.xxh3_64_intdigest(block, seed=int.from_bytes(key[:8], "little")))


def guard_of(key: bytes, root: bytes, parent: bytes, depth: int, tokens: bytes) -> int:
    """The checksum of what a row says of its block: wrong tokens here would become a wrong hit in the index."""
    return _signed(xxhash.xxh3_64_intdigest(b"".join((key, root, parent, depth.to_bytes(8, "little"), tokens))))


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def max_pages(num_slots: int, block_tokens: int) -> int:
    """Pages that a manifest of that many rows may need at worst; SQLite holds itself to it."""
    row = 160 + 4 * block_tokens
    # SQLite splits pages at a third full in the worst case; a row past a quarter page spills into pages of its own.
    worst = 3 * row if row < PAGE_BYTES // 4 else 3 * (row + PAGE_BYTES)
    return _FIXED_PAGES + -(-num_slots * (worst + 3 * history.ROW_BYTES) // PAGE_BYTES)


def max_bytes(num_slots: int, block_tokens: int) -> int:
    """Bytes that a manifest with its log may take at worst, and a damaged one moved aside."""
    pages = max_pages(num_slots, block_tokens)
    transaction = min(pages, 3 * BATCH) * (PAGE_BYTES + 24)
    return 2 * pages * PAGE_BYTES + WAL_BYTES + transaction + (128 << 10)  # the last: shared memory of the log


class Manifest:
    """Rows by slot. One caller at a time: the tier holds its writer lock.

    Raises sqlite3.Error from `insert`, `delete` and `touch`, which then have changed nothing of the batch that failed.
    """

    def __init__(self, folder: Path, *, num_slots: int, block_tokens: int, files: Files) -> None:
        self._path, self._files = folder / NAME, files
        self._num_slots, self._max_pages = num_slots, max_pages(num_slots, block_tokens)
        self.was_damaged = False
        try:
            self._connection = self._open()
        except sqlite3.DatabaseError as error:
            if not damaged(error):
                raise TierError(f"manifest {self._path} cannot be opened: {error}") from None
            self.set_aside(error)
        self._roots: dict[Key, int] = {}

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=_BUSY_S)
        try:
            connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            connection.execute("PRAGMA journal_mode = WAL")
            for pragma in ("synchronous = NORMAL", "temp_store = MEMORY", "wal_autocheckpoint = 0"):
                connection.execute(f"PRAGMA {pragma}")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION):
                raise ConfigError(
                    f"disk folder {self._path.parent} has a manifest of version {version}, this is {VERSION}: "
                    "delete the folder, or give another one (disk.path)"
                )
            connection.executescript(_SCHEMA + history.SCHEMA)
            connection.execute(f"PRAGMA user_version = {VERSION}")
        except BaseException:
            connection.close()
            raise
        return connection

    def set_aside(self, error: sqlite3.Error) -> None:
        """Start afresh with an empty manifest; the damaged one is kept beside it, if it is not too large."""
        if hasattr(self, "_connection"):
            self._connection.close()
        aside = self._path.with_suffix(".damaged")
        log.warning(
            "manifest %s is damaged (%s): moved aside to %s, the disk tier starts empty", self._path, error, aside.name
        )
        self.was_damaged = True
        self._files.unlink(aside)
        if self._path.stat().st_size <= self._max_pages * PAGE_BYTES:
            self._files.rename(self._path, aside)
        for suffix in ("", "-wal", "-shm"):
            self._files.unlink(Path(f"{self._path}{suffix}"))
        self._roots = {}
        self._connection = self._open()

    def load(self) -> list[tuple[int, Key | None, int]]:
        """Slot, key and checksum of every row, by slot; key None for a row that no version of tierkv writes.

        A manifest found damaged is set aside, and has no rows.
        """
        try:
            rows = self._connection.execute("SELECT slot, key, checksum FROM blocks ORDER BY slot").fetchall()
            self._roots = dict(self._connection.execute("SELECT root, id FROM roots"))
        except sqlite3.DatabaseError as error:
            if not damaged(error):
                raise TierError(f"manifest {self._path} cannot be read: {error}") from None
            self.set_aside(error)
            return []
        return [row if _named(row[1]) and type(row[2]) is int else (row[0], None, 0) for row in rows]

    def limit(self) -> None:
        """Hold the file to its size from now on. Call once the rows that do not fit the array any more are gone."""
        self._connection.execute("DELETE FROM roots WHERE id NOT IN (SELECT DISTINCT root FROM blocks)")
        self._roots = dict(self._connection.execute("SELECT root, id FROM roots"))
        history.forget_departed(self._connection.execute, most=self._num_slots)
        pages = self._connection.execute("PRAGMA page_count").fetchone()[0]
        if pages > self._max_pages:
            self._connection.execute("VACUUM")
        self._checkpoint()
        self._connection.execute(f"PRAGMA max_page_count = {self._max_pages}")

    def insert(self, rows: Sequence[Row]) -> None:
        """Add at most BATCH rows; they replace those of the same slots."""
        roots = dict(self._roots)
        with self._transaction() as execute:
            for root in {row.root for row in rows} - roots.keys():
                roots[root] = cast(int, execute("INSERT INTO roots (root) VALUES (?)", (root,)).lastrowid)
            for row in rows:
                about = (row.parent, row.depth, row.tokens)
                guard = guard_of(row.key, row.root, *about)
                execute(
                    _INSERT, (row.slot, row.key, row.checksum, roots[row.root], *about, guard, row.created, row.used)
                )
        self._roots = roots

    def delete(self, slots: Sequence[int], *, why: str, now: float) -> None:
        """Remove the rows of at most BATCH slots, and remember that their blocks left."""
        with self._transaction() as execute:
            history.remember_departed(execute, slots, why=why, now=now, most=self._num_slots)
            for slot in slots:
                execute("DELETE FROM blocks WHERE slot = ?", (slot,))

    def introduce(self, root: Key, fields: history.Fields) -> None:
        """Remember what a root stands for."""
        with self._transaction() as execute:
            history.remember_namespace(execute, root, fields)

    def note(self, name: str, text: str) -> None:
        """Keep a text under a name, for whoever looks at the folder."""
        with self._transaction() as execute:
            history.remember_note(execute, name, text)

    def touch(self, used: Sequence[tuple[float, int]]) -> None:
        """Write down when at most BATCH slots were last used."""
        with self._transaction() as execute:
            for one in used:
                execute("UPDATE blocks SET used = ? WHERE slot = ?", one)

    def keys_by_slot(self) -> list[tuple[int, bytes]]:
        """Slot and key of every row."""
        return self._connection.execute("SELECT slot, key FROM blocks").fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[Callable[..., sqlite3.Cursor]]:
        if self._log_bytes() > WAL_BYTES:
            self._checkpoint()
            if self._log_bytes() > WAL_BYTES:
                # The folder's cap is hard; whoever reads the manifest for so long costs saves, not space.
                raise sqlite3.OperationalError("another process holds a long read of the manifest")
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection.execute
            self._files.commit(self._connection)
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _log_bytes(self) -> int:
        try:
            return Path(f"{self._path}-wal").stat().st_size
        except FileNotFoundError:
            return 0

    def _checkpoint(self) -> None:
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def abandon(self) -> None:
        """Close as a crash would."""
        self._connection.close()

    def close(self) -> None:
        """Bring the log into the file and close it."""
        try:
            self._checkpoint()
        finally:
            self._connection.close()


def damaged(error: sqlite3.Error) -> bool:
    """Is the file itself bad, rather than its disk, its permissions or another process?"""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    return (code & 0xFF) in _DAMAGED


def read_rows(folder: Path) -> tuple[list[Row], int]:
    """Every row whose guard is right, parents before children, and the number of the others.

    Reads a snapshot beside whoever owns the folder. Raises sqlite3.Error.
    """
    connection = sqlite3.connect(f"{(folder / NAME).absolute().as_uri()}?mode=ro", uri=True, timeout=2.0)
    try:
        found = connection.execute(
            "SELECT slot, key, checksum, roots.root, parent, depth, tokens, created, used, guard "
            "FROM blocks JOIN roots ON roots.id = blocks.root ORDER BY depth, slot"
        ).fetchall()
        total = connection.execute("SELECT count(*) FROM blocks").fetchone()[0]
    finally:
        connection.close()
    rows = [Row(*values) for *values, guard in found if _sound(values, guard)]
    return rows, total - len(rows)


def read_keys(folder: Path) -> set[Key]:
    """The key of every row, unchecked: what is probably held. Reads beside whoever owns the folder. Raises sqlite3.Error."""
    connection = sqlite3.connect(f"{(folder / NAME).absolute().as_uri()}?mode=ro", uri=True, timeout=2.0)
    try:
        return {Key(key) for (key,) in connection.execute("SELECT key FROM blocks") if _named(key)}
    finally:
        connection.close()


def _named(key: object) -> bool:
    return type(key) is bytes and len(key) == KEY_BYTES


def _sound(values: list[Any], guard: object) -> bool:
    _, key, _, root, parent, depth, tokens, created, used = values
    return (
        all(map(_named, (key, root, parent)))
        and type(depth) is int
        and depth >= 0
        and type(tokens) is bytes
        and type(created) is type(used) is float
        and guard_of(key, root, parent, depth, tokens) == guard
    )
