"""What a push and a pull have in common: what a root names, bytes in pieces and their digests, jobs and their counts.

What must not live here: where anything is written.
"""

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, field
from typing import Final, Protocol

from tierkv.errors import PackError
from tierkv.packs.archive import ROOT
from tierkv.packs.files import PackFiles, ZipFiles, check_name

MAX_ROOT_BYTES: Final = 64 << 20
RANGE_BYTES: Final = 8 << 20


class Entry(Protocol):
    """What a manifest says of a file: its size, and its SHA-256 in hex."""

    @property
    def bytes(self) -> int:
        """Its size."""

    @property
    def sha256(self) -> str:
        """Of all of it."""


Entries = Mapping[str, Entry]
EntriesOf = Callable[[bytes], Entries]
"""Reads a root zarr.json; raises PackError for one that is none of a pack's."""
Progress = Callable[[int], None]


@dataclass(slots=True)
class Tally:
    """Counts from several threads, and tells progress: bytes that are settled now, moved or there already."""

    progress: Progress | None
    moved: int = 0
    there: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def move(self, count: int) -> None:
        """Count bytes that came or went."""
        with self._lock:
            self.moved += count
        if self.progress:
            self.progress(count)

    def find(self, count: int) -> None:
        """Count bytes that need not move."""
        with self._lock:
            self.there += count
        if self.progress:
            self.progress(count)


def read_entries(root: bytes, entries_of: EntriesOf, place: str) -> Entries:
    """Read what a root names, and check the names: nothing else is ever asked for or written."""
    entries = entries_of(root)
    for name, entry in entries.items():
        check_name(name, place)
        if name == ROOT or entry.bytes < 0 or len(entry.sha256) != 64 or set(entry.sha256) - set("0123456789abcdef"):
            raise PackError(f"{place}: the manifest names {name!r} in a way that cannot be: build the pack anew")
    return entries


def wrong_digest(place: str, found: str, promised: str) -> PackError:
    """The error of bytes that are not what the manifest says."""
    return PackError(
        f"{place}: its SHA-256 is {found[:16]}..., and the manifest says {promised[:16]}...: it is damaged, or was changed"
    )


def file_pieces(files: PackFiles, name: str, size: int) -> Iterator[bytes]:
    """Read a file of a pack that has to have so many bytes."""
    return pieces(lambda offset, views: files.read_into(name, offset, views), size, f"{files.place}: {name}")


def pieces(read_into: Callable[[int, Sequence[memoryview]], int], size: int, place: str) -> Iterator[bytes]:
    """Read so many bytes, a piece at a time. Raises PackError when they are not there."""
    for offset in range(0, size, RANGE_BYTES):
        data = bytearray(min(RANGE_BYTES, size - offset))
        try:
            came = read_into(offset, [memoryview(data)])
        except OSError as error:
            raise PackError(f"{place} cannot be read: {error.strerror}") from None
        if came != len(data):
            raise PackError(f"{place} is cut short: {offset + came} bytes are there, {size} were promised")
        yield bytes(data)


def file_digest(files: PackFiles, name: str, size: int) -> str:
    """Return the SHA-256 of a file of a pack. Raises PackError when it has not so many bytes."""
    seen = hashlib.sha256()
    for piece in file_pieces(files, name, size):
        seen.update(piece)
    return seen.hexdigest()


def check_members(files: ZipFiles, root: bytes, entries: Entries) -> None:
    """Check that a zip has the files of its manifest, and nothing else, byte for byte."""
    check_sizes(files, entries)
    if files.read(ROOT, most=MAX_ROOT_BYTES) != root:
        raise PackError(f"{files.place} was changed while it was read: begin again")
    for name, entry in entries.items():
        if (found := file_digest(files, name, entry.bytes)) != entry.sha256:
            raise wrong_digest(f"{files.place}: {name}", found, entry.sha256)


def check_sizes(files: ZipFiles, entries: Entries) -> None:
    """Check the directory of a zip against its manifest, before any of it is moved."""
    sizes = {name: size for name, size in files.sizes().items() if name != ROOT}
    promised = {name: entry.bytes for name, entry in entries.items()}
    for name in sorted(sizes.keys() | promised.keys()):
        if sizes.get(name) != promised.get(name):
            raise PackError(
                f"{files.place}: {name} has {sizes.get(name, 'no')} bytes, and {promised.get(name, 'no')} in the manifest"
            )


def run_each(jobs: Iterable[Callable[[], None]], *, executor: Executor | None, most: int) -> None:
    """Run jobs, at most so many at once; the first that fails ends it, once those under way have ended."""
    if executor is None:
        for job in jobs:
            job()
        return
    running: set[Future[None]] = set()
    try:
        for job in jobs:
            running.add(executor.submit(job))
            if len(running) >= most:
                running = _some(running)
        while running:
            running = _some(running)
    finally:
        for each in running:
            each.cancel()
        wait(running)


def _some(running: set[Future[None]]) -> set[Future[None]]:
    done, left = wait(running, return_when=FIRST_COMPLETED)
    for each in done:
        each.result()
    return left
