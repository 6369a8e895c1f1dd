"""The disk tier: blocks in the slots of a zarr v3 array, found through a dict, remembered by a manifest.

    write   reserve slots ▶ pwritev ▶ fdatasync ▶ rows added (commit) ▶ found
    delete  found no more ▶ rows gone (commit) ▶ slots free, once their readers are done
    read    hold slots ▶ preadv ▶ checksum ▶ True

So a slot is overwritten only when no row names it, and a row names only what is on the device: a crash at any point leaves
blocks that are whole or absent. The checksum, seeded with the key, is the net under that, not the protocol. Its parts are the
`disk_*` files: slots and extents in memory, shards and files on disk, the manifest; this one puts them in order.
"""

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final

from tierkv.errors import LayoutError, TierError
from tierkv.keys import Key, Namespace
from tierkv.layout import TOKEN_BYTES, Layout
from tierkv.metrics import Metrics
from tierkv.tiers.base import Miss, Run, Tier
from tierkv.tiers.disk_array import SHARD_SLOTS, make_metadata, num_slots_for, refuse_strange
from tierkv.tiers.disk_files import Files, FolderLock, replace_file
from tierkv.tiers.disk_history import read_history
from tierkv.tiers.disk_inspect import DiskReport, inspect_folder
from tierkv.tiers.disk_manifest import BATCH, NAME, Manifest, Row, read_rows
from tierkv.tiers.disk_scan import runs_of
from tierkv.tiers.disk_shards import Shards
from tierkv.tiers.disk_slots import Place, Slots
from tierkv.tiers.disk_transfer import Transfer

EVICTED: Final = "evicted"
"""Why blocks left the folder that somebody deleted: for room."""
FULL_PAUSE_S: Final = 10.0
"""How long no new shard file is tried after the disk was found full."""

log = logging.getLogger("tierkv")


class DiskTier(Tier):
    """Blocks in a folder of a local disk, up to `capacity_bytes` for the folder in all; they survive restarts and crashes.

    verify: check every block against its checksum before it is given out.  direct: go past the page cache (O_DIRECT) where
    the file system lets us; blocks go without a copy when they are a multiple of 4,096 bytes and so aligned.
    executor: two threads of its own for this tier (not those that call it, which would wait for themselves): pieces move there
    while others are verified here. It takes both ways from 0.8 to 0.95 of bare I/O (bench/bench_disk.py, 2-core AMD EPYC VM,
    2026-11-22).  files: the system calls.  clock, now: seconds, monotonic and since the epoch.
    Raises ConfigError for a capacity under one block and for a folder of another layout or with strange files, TierBusy for
    one that is in use, TierError for one that cannot be used.
    """

    name: ClassVar[str] = "disk"

    def __init__(
        self,
        path: Path | str,
        *,
        layout: Layout,
        capacity_bytes: int,
        metrics: Metrics,
        verify: bool = True,
        direct: bool = True,
        executor: Executor | None = None,
        files: Files | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.path, self.layout = Path(path), layout
        self.num_slots = num_slots_for(capacity_bytes, layout)
        self._metrics, self._files = metrics, files or Files()
        self._clock, self._now = clock, now
        self._token_bytes = layout.block_tokens * TOKEN_BYTES
        self._writer = threading.Lock()  # of the manifest; the only lock under which there is I/O
        self._doomed: dict[
            int, str
        ] = {}  # forgotten slots whose rows could not be deleted yet, and why they were forgotten
        self._full_until, self._full_from = float("-inf"), self.num_slots
        self._idle = threading.Condition()
        self._active, self._closed = 0, False
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            refuse_strange(self.path)
            self._folder_lock = FolderLock(self.path)
        except OSError as error:
            raise TierError(
                f"disk folder {self.path}: {error.strerror}; give a folder that can be written to"
            ) from None
        try:
            self._start(direct)
        except BaseException as error:
            self._folder_lock.release()
            if isinstance(error, OSError | sqlite3.Error):
                raise TierError(f"disk folder {self.path} cannot be opened: {error}") from error
            raise
        self._transfer = Transfer(self._shards, layout=layout, verify=verify, executor=executor, clock=clock)
        metrics.blocks_used.read_from(lambda: float(len(self._slots)), self.name)
        metrics.blocks_capacity.read_from(lambda: float(self.num_slots), self.name)

    # --- start: what survived ----------------------------------------------------------------------------------------

    def _start(self, direct: bool) -> None:
        make_metadata(self.path, self.layout, self.num_slots, self._files)
        for folder in (self.path, self.path / "slot_keys"):
            for pattern in ("*.tmp", "*.partial", "c.*"):  # left by a crash; keys of slots hold only while we are away
                for path in folder.glob(pattern):
                    self._files.unlink(path)
        self._manifest = Manifest(
            self.path, num_slots=self.num_slots, block_tokens=self.layout.block_tokens, files=self._files
        )
        try:
            self._shards = Shards(self.path, self.layout, num_slots=self.num_slots, files=self._files, direct=direct)
            self._slots = Slots(self.num_slots, self._survivors())
            self._manifest.limit()
        except BaseException:
            self._manifest.abandon()
            raise

    def _survivors(self) -> dict[Key, tuple[int, int]]:
        """Keys of the rows that can be right, with slot and checksum; the other rows are deleted and counted."""
        rows = self._manifest.load()
        usable = self._shards.adopt()
        live: dict[Key, tuple[int, int]] = {}
        beyond, lost = [], []
        for slot, key, checksum in rows:
            if not 0 <= slot < self.num_slots:
                beyond.append(slot)
            elif slot % SHARD_SLOTS >= usable.get(slot // SHARD_SLOTS, 0) or key is None or key in live:
                lost.append(slot)
            else:
                live[key] = (slot, checksum)
        for slots, why in ((beyond, EVICTED), (lost, Miss.CORRUPT)):
            for at in range(0, len(slots), BATCH):
                self._manifest.delete(slots[at : at + BATCH], why=why, now=self._now())
        if beyond:
            log.warning("disk folder %s was made smaller: %d blocks forgotten", self.path, len(beyond))
            self._metrics.blocks_evicted.add(len(beyond), self.name)
        if lost:
            log.warning("disk folder %s: %d blocks are gone with their files", self.path, len(lost))
        bad = len(lost) + self._manifest.was_damaged
        if bad:
            self._metrics.corrupt_blocks.add(bad, self.name)
            self._metrics.misses.add(bad, self.name, Miss.CORRUPT)
        return live

    # --- the interface -----------------------------------------------------------------------------------------------

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        """From memory."""
        return [False] * len(keys) if self._closed else self._slots.contains(keys)

    def read(self, keys: Sequence[Key], outs: Sequence[memoryview], *, deadline_s: float | None = None) -> list[bool]:
        """Raises LayoutError when an `out` is not as long as a block."""
        self._check_sizes(keys, outs)
        found = [False] * len(keys)
        with self._operation() as going:
            if not going:
                self._metrics.misses.add(len(keys), self.name, Miss.DOWN)
                return found
            began = time.perf_counter()
            places = self._slots.hold(keys, self._now())
            try:
                loaded = self._transfer.read(places, keys, outs, end=self._end(deadline_s))
            finally:
                self._slots.release(places)
            for place in loaded.good:
                found[place.position] = True
            self._after("read", loaded.error, loaded.lost)
            for miss, missed in loaded.missed.items():
                self._metrics.misses.add(len(missed), self.name, miss)
            self._remove_corrupt(loaded.missed.get(Miss.CORRUPT, ()), keys)
            if len(places) < len(keys):
                self._metrics.misses.add(len(keys) - len(places), self.name, Miss.ABSENT)
            self._metrics.bytes_read.add(len(loaded.good) * self.layout.block_bytes, self.name)
            self._metrics.load_seconds.observe(time.perf_counter() - began, self.name)
        return found

    def write(self, run: Run, blocks: Sequence[memoryview], *, deadline_s: float | None = None) -> list[bool]:
        """Raises LayoutError when a block is not as long as it must be, or the tokens are not those of that many blocks."""
        self._check_sizes(run.keys, blocks)
        if run.tokens and len(run.tokens) != len(run.keys) * self._token_bytes:
            raise LayoutError(f"{len(run.tokens)} bytes of tokens for {len(run.keys)} blocks of {self._token_bytes}")
        saved = [False] * len(blocks)
        with self._operation() as going:
            if not going:
                self._metrics.saves_dropped.add(len(blocks), self.name, "down")
                return saved
            began = time.perf_counter()
            if self._doomed:
                self._drop((), EVICTED)
            below = self._full_from if self._clock() < self._full_until else self.num_slots
            reserved = self._slots.reserve(run.keys, below=below)
            for position in reserved.present:
                saved[position] = True
            kept: list[Place] = []
            try:
                stored = self._transfer.write(reserved.places, run.keys, blocks, end=self._end(deadline_s))
                for at in range(0, len(stored.written), BATCH):
                    kept += self._record(run, stored.written[at : at + BATCH])
            finally:
                slots = {place.slot for place in kept}
                given_up = [place for place in reserved.places if place.slot not in slots]
                if given_up:
                    self._drop(self._slots.abandon(given_up, run.keys), EVICTED)
            for place in kept:
                saved[place.position] = True
            stored.dropped |= {"busy": len(reserved.busy)}
            stored.drop("full", len(reserved.full))
            self._after("write", stored.error, stored.lost)
            if stored.full is not None:
                self._full_until = self._clock() + FULL_PAUSE_S
                self._full_from = stored.full * SHARD_SLOTS
            for reason, count in stored.dropped.items():
                if count:
                    self._metrics.saves_dropped.add(count, self.name, reason)
            self._metrics.bytes_written.add(len(kept) * self.layout.block_bytes, self.name)
            self._metrics.save_seconds.observe(time.perf_counter() - began, self.name)
        return saved

    def delete(self, keys: Sequence[Key]) -> None:
        """Rows go before slots are used again."""
        with self._operation() as going:
            if going and (slots := self._slots.forget(keys)):
                self._drop(slots, EVICTED)

    def scan(self) -> Iterator[Run]:
        """Runs of a snapshot, chains of parent and child as long as they go. What lost its parent comes last."""
        with self._operation() as going:
            try:
                rows, damaged = read_rows(self.path) if going else ([], 0)
            except sqlite3.Error as error:
                self._failed("scan", error)
                return
            if damaged:
                self._remove_unsound(rows)
            held = self._slots.contains([row.key for row in rows])
        yield from runs_of([row for row, here in zip(rows, held, strict=True) if here])

    def introduce(self, root: Key, namespace: Namespace) -> None:
        """Remember what a root stands for, so that `tierkv explain` can tell whose blocks are here."""
        self._remember(lambda: self._manifest.introduce(root, namespace.fields()))

    def namespaces(self) -> dict[Key, dict[str, Any]]:  # Any: text and numbers, of `Namespace.fields`
        """What the roots of this folder stand for, as far as their owners said."""
        return read_history(self.path / NAME).namespaces

    def note(self, name: str, text: str) -> None:
        """Keep a short text under a name, for whoever looks at the folder."""
        self._remember(lambda: self._manifest.note(name, text))

    def _remember(self, write: Callable[[], None]) -> None:
        with self._operation() as going, self._writer:
            try:
                if going:
                    write()
            except sqlite3.Error as error:
                self._failed("note", error)

    def describe(self) -> DiskReport:
        """What the folder holds, for people."""
        return inspect_folder(self.path)

    def close(self) -> None:
        """Wait for calls under way, write down what is only in memory, let the next owner in."""
        with self._idle:
            if self._closed:
                return
            self._closed = True
            self._idle.wait_for(lambda: not self._active)
        try:
            self._export_keys()
            used = self._slots.used()
            for at in range(0, len(used), BATCH):
                self._manifest.touch(used[at : at + BATCH])
        except (OSError, sqlite3.Error) as error:
            self._failed("checkpoint", error)
        try:
            self._manifest.close()
        except sqlite3.Error as error:
            self._failed("close", error)
        self._shards.close()
        self._folder_lock.release()

    # --- parts of them -----------------------------------------------------------------------------------------------

    @contextmanager
    def _operation(self) -> Iterator[bool]:
        """Keep `close` waiting while a call is under way; False once it was called."""
        with self._idle:
            going = not self._closed
            self._active += going
        try:
            yield going
        finally:
            with self._idle:
                self._active -= going
                if not self._active:
                    self._idle.notify_all()

    def _check_sizes(self, keys: Sequence[Key], views: Sequence[memoryview]) -> None:
        if len(keys) != len(views):
            raise LayoutError(f"{len(views)} buffers for {len(keys)} keys")
        size = self.layout.block_bytes
        for view in views:
            if view.nbytes != size:
                raise LayoutError(f"buffer of {view.nbytes} bytes: a block of this folder has {size}")

    def _end(self, deadline_s: float | None) -> float:
        return float("inf") if deadline_s is None else self._clock() + deadline_s

    def _record(self, run: Run, places: Sequence[Place]) -> Sequence[Place]:
        """Add rows for written places and let them be found; returns those for which it worked."""
        now, step = self._now(), self._token_bytes
        rows = [
            Row(
                place.slot,
                run.keys[place.position],
                place.checksum,
                run.root,
                run.keys[place.position - 1] if place.position else run.parent,
                run.depth + place.position,
                run.tokens[place.position * step : (place.position + 1) * step],
                now,
                now,
            )
            for place in places
        ]
        try:
            with self._writer:
                self._manifest.insert(rows)
        except sqlite3.Error as error:
            self._failed("write", error)
            full = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL
            self._metrics.saves_dropped.add(len(places), self.name, "full" if full else "failed")
            return ()
        self._slots.commit(places, run.keys)
        return places

    def _drop(self, slots: Sequence[int], why: str) -> None:
        """Delete the rows of forgotten slots, then free them; what cannot be deleted now is tried again the next time."""
        freed: list[int] = []
        with self._writer:
            self._doomed.update(dict.fromkeys(slots, why))
            try:
                for reason in sorted(set(self._doomed.values())):
                    doomed = sorted(slot for slot in self._doomed if self._doomed[slot] == reason)
                    for at in range(0, len(doomed), BATCH):
                        self._manifest.delete(doomed[at : at + BATCH], why=reason, now=self._now())
                        freed += doomed[at : at + BATCH]
            except sqlite3.Error as error:
                self._failed("delete", error)
            for slot in freed:
                del self._doomed[slot]
        self._slots.free(freed)

    def _remove_corrupt(self, places: Sequence[Place], keys: Sequence[Key]) -> None:
        slots = [slot for place in places for slot in self._slots.forget([keys[place.position]], only=place.slot)]
        if slots:
            log.warning("disk folder %s: %d blocks are not what was written; removed", self.path, len(slots))
            self._metrics.corrupt_blocks.add(len(slots), self.name)
            self._drop(slots, Miss.CORRUPT)

    def _remove_unsound(self, rows: Sequence[Row]) -> None:
        """Forget every key without a sound row: what its row says of tokens and parent cannot be believed."""
        sound = {row.key for row in rows}
        unsound = [key for key in self._slots.within(0, self.num_slots) if key not in sound]
        log.warning("disk folder %s: %d rows of the manifest are damaged; removed", self.path, len(unsound))
        self._metrics.corrupt_blocks.add(len(unsound), self.name)
        self._drop(self._slots.forget(unsound), Miss.CORRUPT)

    def _after(self, action: str, error: OSError | None, lost: set[int]) -> None:
        if error is not None:
            self._failed(action, error)
        for shard in lost:
            self._shards.lose(shard)
            first = shard * SHARD_SLOTS
            slots = self._slots.forget(self._slots.within(first, first + SHARD_SLOTS))
            self._metrics.corrupt_blocks.add(len(slots), self.name)
            self._drop(slots, Miss.CORRUPT)

    def _failed(self, action: str, error: Exception) -> None:
        log.warning("disk folder %s: %s failed: %s", self.path, action, error)

    def _export_keys(self) -> None:
        """Write the array slot -> key, so that zarr readers can tell live slots from stale ones."""
        keys = bytearray(32 * self.num_slots)
        for slot, key in self._manifest.keys_by_slot():
            keys[32 * slot : 32 * (slot + 1)] = key
        replace_file(self._files, self.path / "slot_keys" / "c.0.0", bytes(keys))
