"""Where a pack lies: its files, to be read and never written, in a folder or in one zip file.

What must not live here: what the files mean, and how a server is asked (remote.py).
"""

import contextlib
import os
import stat
import threading
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, Self
from urllib.parse import unquote, urlsplit

from tierkv.errors import PackError
from tierkv.packs.archive import MAX_MEMBERS, NAME_RULE, Member, is_plain, read_directory

IOV_MAX: Final = os.sysconf("SC_IOV_MAX")
OPEN_FILES: Final = 64
"""Descriptors that one folder keeps open: a prompt's blocks lie in few shards."""
_SCHEMES: Final = ("s3", "http", "https")
_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """How a server is asked. Credentials are those of the environment, as obstore finds them (AWS_ACCESS_KEY_ID ...).

    endpoint: URL of a server that speaks S3; http:// is allowed when it is given here. anonymous: requests are not signed.
    timeout_s: one request, with its body of up to 8 MiB. retries: of one request.
    """

    endpoint: str | None = None
    region: str | None = None
    anonymous: bool = False
    timeout_s: float = 60.0
    retries: int = 5


class RangedFile(Protocol):
    """One file that is read by ranges. Thread-safe. Raises PackError, and OSError of a local disk."""

    place: str
    size: int
    tag: str | None
    """What changes with the content, as far as the place can tell."""

    def read_into(self, offset: int, views: Sequence[memoryview]) -> int:
        """Fill views with the bytes from `offset` on; return how many came: fewer only at the end of the file."""

    def read_ranges(self, ranges: Sequence[tuple[int, memoryview]]) -> None:
        """Fill every view with the bytes from its offset on. Raises PackError when one of them is past the end."""

    def close(self) -> None:
        """Let go of what it holds; reads under way may end first."""


class PackFiles(ABC):
    """The files of one pack, read-only. Thread-safe.

    Names are plain (archive.is_plain): others raise PackError, as does a file that is not there, or cannot be had. A local
    disk that fails raises OSError in the middle of reading.
    """

    place: str
    """For people: passwords and what may be secret in a URL are hidden."""

    @abstractmethod
    def sizes(self) -> Mapping[str, int] | None:
        """Bytes of every file by name; None where they cannot be listed."""

    @abstractmethod
    def read(self, name: str, *, most: int) -> bytes:
        """Return a whole file. Raises PackError when it has more than `most` bytes."""

    @abstractmethod
    def read_into(self, name: str, offset: int, views: Sequence[memoryview]) -> int:
        """Fill views with the bytes from `offset` on; return how many came: fewer only at the end of the file."""

    @abstractmethod
    def read_ranges(self, name: str, ranges: Sequence[tuple[int, memoryview]]) -> None:
        """Fill every view with the bytes from its offset on, however the place does it best.

        Raises PackError when one of them is past the end.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of what it holds; reads under way may end first, later ones raise PackError."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def open_files(place: str | Path, *, options: RemoteOptions | None = None) -> PackFiles:
    """Open what lies at a place: a folder, a zip file, file://, or a prefix or a .zip object at s3://, http:// or https://.

    Nothing but the directory of a zip is read. Raises PackError for what does not exist, or is neither.
    """
    scheme = place.partition("://")[0].lower() if isinstance(place, str) and "://" in place else ""
    if scheme in _SCHEMES:
        from tierkv.packs.remote import open_remote

        return open_remote(str(place), options=options)
    if scheme == "file":
        place = unquote(urlsplit(str(place)).path)
    elif scheme:
        raise PackError(f"{scheme}:// is no place of packs: give a path, or a URL of {', '.join(_SCHEMES)} or file")
    path = Path(place).expanduser()
    try:
        found = path.stat()
    except OSError as error:
        raise PackError(f"no pack at {path}: {error.strerror}") from None
    if stat.S_ISDIR(found.st_mode):
        return FolderFiles(path)
    return ZipFiles(LocalFile.at(path))


class LocalFile:
    """A regular file of a local disk. The descriptor closes when the last reader has let go of it."""

    tag: str | None

    def __init__(self, fd: int, place: str) -> None:
        self.place = place
        self._fd = fd
        self._closing = weakref.finalize(self, os.close, fd)
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            self._closing()
            raise PackError(f"{place} is no regular file")
        self.size = found.st_size
        self.tag = f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}"

    @classmethod
    def at(cls, path: Path) -> "LocalFile":
        """Open the file of a path that a person gave: links are followed."""
        try:
            # A FIFO must not hang; what is none of a file's is refused after.
            return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), str(path))
        except OSError as error:
            raise PackError(f"{path} cannot be read: {error.strerror}") from None

    def read_into(self, offset: int, views: Sequence[memoryview]) -> int:
        """Read until all views are full, or the file ends."""
        came = 0
        left = [view for view in views if view.nbytes]
        while left:
            done = os.preadv(self._fd, left[:IOV_MAX], offset + came)
            if done <= 0:
                break
            came += done
            left = _after(left, done)
        return came

    def read_ranges(self, ranges: Sequence[tuple[int, memoryview]]) -> None:
        """Read one after another: the kernel has read ahead, and a queue of these is somebody else's."""
        for offset, view in ranges:
            if self.read_into(offset, [view]) != view.nbytes:
                raise past_end(self.place, offset, view.nbytes)

    def close(self) -> None:
        """Nothing to do: a descriptor that another thread reads must not become another file's."""


def past_end(place: str, offset: int, length: int) -> PackError:
    """The error of a range that a file does not have."""
    return PackError(f"{place} is cut short: it does not have the {length} bytes at {offset}")


def _after(views: list[memoryview], done: int) -> list[memoryview]:
    for number, view in enumerate(views):
        if done < view.nbytes:
            return [view[done:], *views[number + 1 :]]
        done -= view.nbytes
    return []


class FolderFiles(PackFiles):
    """A pack as a folder. No link in it is followed, so that none of its names leads out of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.place = str(path)
        self._lock = threading.Lock()
        self._open: OrderedDict[str, LocalFile] = OrderedDict()
        try:
            # The folder itself may be a link: it is what the person gave.
            self._root: int | None = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise PackError(f"{path} cannot be read: {error.strerror}") from None

    def sizes(self) -> Mapping[str, int]:
        """Regular files with plain names; nothing else is there for a pack."""
        return dict(_walk(self.path, "", 3, [0]))

    def read(self, name: str, *, most: int) -> bytes:
        """Read by its size, and a byte more would have been seen."""
        return read_whole(self._file(name), most)

    def read_into(self, name: str, offset: int, views: Sequence[memoryview]) -> int:
        """Read through the file's own descriptor."""
        return self._file(name).read_into(offset, views)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, memoryview]]) -> None:
        """Read one after another."""
        self._file(name).read_ranges(ranges)

    def close(self) -> None:
        """Close the folder now, and its files when their last reader has let go of them."""
        with self._lock:
            root, self._root = self._root, None
            self._open.clear()
        if root is not None:
            os.close(root)

    def _file(self, name: str) -> LocalFile:
        check_name(name, self.place)
        with self._lock:
            if (file := self._open.get(name)) is not None:
                self._open.move_to_end(name)
                return file
            if self._root is None:
                raise PackError(f"{self.place} is closed")
            root = os.dup(self._root)
        try:
            file = LocalFile(_open_beneath(root, name), f"{self.place}/{name}")
        except OSError as error:
            raise PackError(f"{self.place}/{name} cannot be read: {error.strerror} (links are not followed)") from None
        finally:
            os.close(root)
        with self._lock:
            self._open[name] = file
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        return file


def check_name(name: str, place: str) -> None:
    """Raise PackError unless a pack may have a file of this name."""
    if not is_plain(name):
        raise PackError(f"{place}: {name[:200]!r} cannot be a file of a pack: {NAME_RULE}")


def read_whole(file: RangedFile, most: int) -> bytes:
    """Return all of a file. Raises PackError when it has more than `most` bytes."""
    if file.size > most:
        raise PackError(f"{file.place} has {file.size} bytes; at most {most} are read of it")
    data = bytearray(file.size)
    try:
        came = file.read_into(0, [memoryview(data)])
    except OSError as error:
        raise PackError(f"{file.place} cannot be read: {error.strerror}") from None
    if came != file.size:
        raise past_end(file.place, 0, file.size)
    return bytes(data)


def _open_beneath(root: int, name: str) -> int:
    """Open segment by segment: O_NOFOLLOW looks at the last one only."""
    *folders, last = name.split("/")
    with contextlib.ExitStack() as stack:
        for folder in folders:
            root = os.open(folder, _FLAGS | os.O_DIRECTORY, dir_fd=root)
            stack.callback(os.close, root)
        return os.open(last, _FLAGS | os.O_NONBLOCK, dir_fd=root)


def _walk(folder: Path, prefix: str, depth: int, seen: list[int]) -> Iterator[tuple[str, int]]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = prefix + entry.name
                seen[0] += 1
                if seen[0] > MAX_MEMBERS:
                    raise PackError(f"{folder} has more than {MAX_MEMBERS} files: that is no pack")
                if entry.is_dir(follow_symlinks=False) and depth > 1:
                    yield from _walk(folder / entry.name, name + "/", depth - 1, seen)
                elif entry.is_file(follow_symlinks=False) and is_plain(name):
                    yield name, entry.stat(follow_symlinks=False).st_size
    except OSError as error:
        raise PackError(f"{folder} cannot be listed: {error.strerror}") from None


class ZipFiles(PackFiles):
    """A pack as one zip file, on a disk or at a server: its members are ranges of it."""

    def __init__(self, file: RangedFile) -> None:
        self.file = file
        self.place = file.place
        self._closed = False
        try:
            self.members: Mapping[str, Member] = read_directory(self._at, file.size, read_many=self._at_many)
        except OSError as error:
            file.close()
            raise PackError(f"{self.place} cannot be read: {error.strerror}") from None
        except PackError as error:
            file.close()
            raise PackError(f"{self.place}: {error}") from None

    def sizes(self) -> Mapping[str, int]:
        """As the directory of the archive says."""
        return {name: member.size for name, member in self.members.items()}

    def read(self, name: str, *, most: int) -> bytes:
        """Read the member's range."""
        member = self._member(name)
        if member.size > most:
            raise PackError(f"{self.place}: {name} has {member.size} bytes; at most {most} are read of it")
        try:
            return self._at(member.offset, member.size)
        except OSError as error:
            raise PackError(f"{self.place}: {name} cannot be read: {error.strerror}") from None

    def read_into(self, name: str, offset: int, views: Sequence[memoryview]) -> int:
        """Read of the member's range what lies within it."""
        member = self._member(name)
        left = max(0, member.size - offset)
        within: list[memoryview] = []
        for view in views:
            within.append(view[: min(left, view.nbytes)])
            left -= within[-1].nbytes
        return self.file.read_into(member.offset + offset, within) if offset < member.size else 0

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, memoryview]]) -> None:
        """Read ranges of the member's range."""
        member = self._member(name)
        for offset, view in ranges:
            if offset + view.nbytes > member.size:
                raise past_end(f"{self.place}: {name}", offset, view.nbytes)
        self.file.read_ranges([(member.offset + offset, view) for offset, view in ranges])

    def close(self) -> None:
        """Let go of the file."""
        self.members, self._closed = {}, True
        self.file.close()

    def _member(self, name: str) -> Member:
        member = self.members.get(name)
        if member is None:
            check_name(name, self.place)
            if self._closed:
                raise PackError(f"{self.place} is closed")
            raise PackError(f"{self.place} has no {name}")
        return member

    def _at(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        if self.file.read_into(offset, [memoryview(data)]) != length:
            raise past_end(self.place, offset, length)
        return bytes(data)

    def _at_many(self, asked: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        data = [bytearray(length) for _, length in asked]
        self.file.read_ranges([(at, memoryview(each)) for (at, _), each in zip(asked, data, strict=True)])
        return [bytes(each) for each in data]
