"""What a pull has so far: a folder beside the destination that stands every way in which a process ends.

    .<name>.partial/lock               flock of the one pull that works here
                    <stem>             whole: its content was checked, and is on the disk
                    <stem>.part        under way
                    <stem>.<range>     one byte for each range of that many bytes of it; 1: it is written
                    replaced           what was at the destination, while the new one takes its place

Names in it are made here, of digests: nothing that came from a server is a path. What must not live here: where bytes come
from, and what they have to be.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from tierkv.errors import PackError
from tierkv.packs.archive import sync_folder

_LOCK: Final = "lock"
_REPLACED: Final = "replaced"


class Staging:
    """The folder of one pull. Raises PackError when another pull has it, in this process or another."""

    def __init__(self, destination: Path) -> None:
        if not destination.name:
            raise PackError(f"{destination}: no name for a pack: give a folder of its own, or a .zip file")
        self.destination = destination
        self.folder = destination.with_name(f".{destination.name}.partial")
        self._fd = self._locked()
        self._aside = self.folder / _REPLACED
        if os.path.lexists(self._aside):  # a pull that was killed while it replaced
            if os.path.lexists(destination):
                remove(self._aside)
            else:
                self._aside.rename(destination)

    def _locked(self) -> int:
        if self.folder.is_symlink():
            raise PackError(f"{self.folder} is a link: remove it, nothing is written through it")
        try:
            while True:
                self.folder.mkdir(parents=True, exist_ok=True)
                fd = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # A pull that ended removed what was opened: what this one locked has to be what the next one opens.
                    if os.fstat(fd).st_ino == (self.folder / _LOCK).stat().st_ino:
                        return fd
                except BlockingIOError:
                    os.close(fd)
                    raise PackError(
                        f"{self.destination} is being pulled by another process: wait for it, or give another place"
                    ) from None
                except FileNotFoundError:
                    pass
                os.close(fd)
        except OSError as error:
            raise PackError(f"{self.folder} cannot be written: {error.strerror}") from None

    def path(self, stem: str) -> Path:
        """Where the whole file of a stem is."""
        return self.folder / stem

    def partial(self, stem: str, size: int, range_bytes: int) -> "Partial":
        """The file of a stem while it comes."""
        return Partial(self.folder / f"{stem}.part", self.folder / f"{stem}.{range_bytes}", size, range_bytes)

    def keep(self, names: Collection[str]) -> None:
        """Remove whatever has none of these names."""
        for path in list(self.folder.iterdir()):
            if path.name not in names and path.name not in (_LOCK, _REPLACED):
                remove(path)

    def publish(self, made: Path) -> None:
        """Let what was made here take the place of the destination: a file at once, a folder with a moment without one.

        A process that is killed in that moment leaves the old one to the next pull, which puts it back.
        """
        try:
            if self.destination.exists() and (made.is_dir() or self.destination.is_dir()):
                self.destination.rename(self._aside)
            made.replace(self.destination)
        finally:
            if os.path.lexists(self._aside) and not os.path.lexists(self.destination):
                self._aside.rename(self.destination)
        sync_folder(self.destination.parent)
        shutil.rmtree(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        with contextlib.suppress(FileNotFoundError):  # published, or something came that the next pull goes on from
            if all(path.name == _LOCK for path in self.folder.iterdir()):
                shutil.rmtree(self.folder)
        os.close(self._fd)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Partial:
    """A file that comes by ranges, and notes of those that came. Ranges may be written from several threads.

    A note follows its bytes, so that it is true when a process is killed. After a loss of power it may not be: who takes
    ranges from before checks the whole.
    """

    data: Path
    notes: Path
    size: int
    range_bytes: int

    @property
    def num_ranges(self) -> int:
        """Ranges of the whole."""
        return -(-self.size // self.range_bytes)

    def begin(self) -> list[int]:
        """Return the ranges that are missing. What is not certain is thrown away."""
        notes = self.notes.read_bytes() if self.notes.exists() and self.data.exists() else b""
        if len(notes) != self.num_ranges:
            self.discard()
            notes = bytes(self.num_ranges)
            self.notes.write_bytes(notes)
        self.data.touch()
        return [index for index, note in enumerate(notes) if note != 1]

    def span(self, index: int) -> tuple[int, int]:
        """Offset and bytes of a range."""
        start = index * self.range_bytes
        return start, min(self.range_bytes, self.size - start)

    def write(self, index: int, data: bytes | bytearray) -> None:
        """Write a range, then its note."""
        _write_at(self.data, self.span(index)[0], data)
        _write_at(self.notes, index, b"\1")

    def finish(self, whole: Path) -> None:
        """Give it its name, once it is on the disk."""
        fd = os.open(self.data, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        self.data.rename(whole)
        self.notes.unlink(missing_ok=True)  # an empty file has none

    def discard(self) -> None:
        """Throw away what came."""
        self.data.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)


def _write_at(path: Path, offset: int, data: bytes | bytearray) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            done = os.pwrite(fd, view, offset)
            view, offset = view[done:], offset + done
    finally:
        os.close(fd)
