"""The system calls of the disk tier, in one object so that tests can make the n-th of them fail; and the folder's lock.

What must not live here: anything that knows what a block is.
"""

import contextlib
import errno
import fcntl
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tierkv.errors import TierBusy, TierError

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors that mean "no room", which a smaller folder or a deletion cures."""


class Files:
    """Plain calls of the operating system. Raises OSError, and sqlite3.Error from `commit`."""

    def open(self, path: Path, flags: int) -> int:
        """Open a file; not inherited by child processes."""
        return os.open(path, flags | os.O_CLOEXEC, 0o644)

    def close(self, fd: int) -> None:
        """Let go of a descriptor."""
        os.close(fd)

    def allocate(self, fd: int, size: int) -> None:
        """Take the room of the first `size` bytes now, so that later writes cannot run out of it."""
        os.posix_fallocate(fd, 0, size)

    def truncate(self, fd: int, size: int) -> None:
        """Cut a file."""
        os.ftruncate(fd, size)

    def preadv(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        """Read once; may be short."""
        return os.preadv(fd, views, offset)

    def pwritev(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        """Write once; may be short."""
        return os.pwritev(fd, views, offset)

    def sync(self, fd: int) -> None:
        """Return when the data is on the device."""
        os.fdatasync(fd)

    def stat(self, fd: int) -> os.stat_result:
        """Size, inode and number of names of an open file."""
        return os.fstat(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Replace `target` at once."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        """Remove a file; fine when it is not there."""
        path.unlink(missing_ok=True)

    def commit(self, connection: sqlite3.Connection) -> None:
        """End a transaction of the manifest."""
        connection.execute("COMMIT")


def replace_file(files: Files, path: Path, data: bytes) -> None:
    """Give `path` new content, whole or not at all: temporary file, sync, rename, sync of the folder."""
    temporary = path.with_name(path.name + ".tmp")
    fd = files.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        write_all(files, fd, [memoryview(data)], 0)
        files.sync(fd)
    finally:
        files.close(fd)
    files.rename(temporary, path)
    sync_folder(files, path.parent)


def sync_folder(files: Files, folder: Path) -> None:
    """Make renames and removals in a folder last."""
    fd = files.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        files.sync(fd)
    finally:
        files.close(fd)


def write_all(files: Files, fd: int, views: Sequence[memoryview], offset: int) -> None:
    """Write every byte, however short the single writes are."""
    left = list(views)
    while left:
        done = files.pwritev(fd, left, offset)
        if done <= 0:
            raise OSError(errno.EIO, "nothing was written")
        offset += done
        left = advance(left, done)


def advance(views: Sequence[memoryview], done: int) -> list[memoryview]:
    """Return what is left of `views` after their first `done` bytes."""
    for number, view in enumerate(views):
        if done < view.nbytes:
            return [view[done:], *views[number + 1 :]]
        done -= view.nbytes
    return []


class FolderLock:
    """One owner per folder, by flock: freed by the kernel when its process ends, however it ends.

    Raises TierBusy when there is an owner already, in this process or another.
    """

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = _pid(self._fd)
            os.close(self._fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise TierError(
                    f"disk folder {folder} cannot be locked ({error.strerror}): put it on a local file system"
                ) from None
            raise TierBusy(
                f"disk folder {folder} is in use by process {owner}: stop that process, or give another folder (disk.path)"
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let the next owner in."""
        os.close(self._fd)


def owner_of(folder: Path) -> int | None:
    """Return the process that owns a folder, or None. Takes no lock that the owner would notice."""
    try:
        fd = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return _pid(fd)
    finally:
        os.close(fd)
    return None


def _pid(fd: int) -> int:
    with contextlib.suppress(ValueError, OSError):
        return int(os.pread(fd, 32, 0))
    return 0
