"""One pull: what is there already, what is fetched, and what becomes of it in the end.

Every step leaves a state that the next pull can go on from. What must not live here: how bytes are asked for (files.py), and
how the state lies on the disk (staging.py).
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tierkv.errors import PackError
from tierkv.packs.archive import ROOT, in_order, sync_folder, write_zip
from tierkv.packs.files import FolderFiles, LocalFile, PackFiles, RangedFile, ZipFiles, open_files
from tierkv.packs.moves import (
    MAX_ROOT_BYTES,
    Entries,
    EntriesOf,
    Tally,
    check_members,
    check_sizes,
    file_digest,
    file_pieces,
    read_entries,
    run_each,
    wrong_digest,
)
from tierkv.packs.remote import is_archive
from tierkv.packs.staging import Partial, Staging, remove
from tierkv.values import show_size

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_OBJECT: Final = "object"
_MAX_GAPS: Final = 16 << 20
_GAP: Final = 16 << 10
"""A zip may have so many bytes more than its members, and so many more for each: directory, headers, alignment."""


@dataclass(slots=True)
class _Part:
    """A file under way. resumed: some of it came by an earlier pull."""

    place: str
    partial: Partial
    read: Callable[[int, int], bytes | bytearray]
    check: Callable[[], PackError | None]
    whole: Path
    missing: list[int]
    resumed: bool
    left: int = 0


class Pull:
    """What a pull knows. Its jobs run in the executor's threads, and share counts only."""

    def __init__(
        self,
        files: PackFiles,
        root: bytes,
        entries: Entries,
        staging: Staging,
        *,
        entries_of: EntriesOf,
        tally: Tally,
        executor: Executor | None,
        concurrency: int,
        range_bytes: int,
    ) -> None:
        self._files, self._root, self._entries, self._staging = files, root, entries, staging
        self._entries_of, self._tally = entries_of, tally
        self._executor, self._concurrency, self._range_bytes = executor, concurrency, range_bytes
        self._lock = threading.Lock()
        self._names: dict[str, str] = {}  # digest -> one of the names that have it
        for name, entry in entries.items():
            other = self._names.setdefault(entry.sha256, name)
            if entries[other].bytes != entry.bytes:
                raise PackError(
                    f"{files.place}: {name} and {other} have one SHA-256 and two sizes: build the pack anew"
                )

    def run(self, *, replace: bool) -> int:
        """Pull; return how many files the pack has at its destination."""
        destination = self._staging.destination
        with _told(self._staging):
            old = self._existing()
            try:
                archive = is_archive(destination.name)
                if old is not None and self._same(old, archive=archive, replace=replace):
                    return 1 if archive else len(self._entries) + 1
                if archive and isinstance(self._files, ZipFiles):
                    made, count = self._object(self._files), 1
                else:
                    self._fetch_parts(old, room_for=self._total() if archive else 0)
                    made, count = (self._archive(), 1) if archive else (self._tree(), len(self._entries) + 1)
            finally:
                if old is not None:
                    old.close()
            self._staging.publish(made)
        return count

    def _total(self) -> int:
        return sum(entry.bytes for entry in self._entries.values()) + len(self._root)

    def _existing(self) -> PackFiles | None:
        """What is at the destination: a pack, or nothing. Anything else raises, so that it is never replaced."""
        path = self._staging.destination
        if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
            return None
        old = None
        try:
            old = open_files(path)
            entries = read_entries(old.read(ROOT, most=MAX_ROOT_BYTES), self._entries_of, str(path))
        except PackError as error:
            if old is not None:
                old.close()
            raise PackError(f"{path} is there and is no pack: give another place, or move it away ({error})") from None
        if isinstance(old, FolderFiles):
            foreign = _others(path, {ROOT, *entries})
            if foreign is not None:
                old.close()
                raise PackError(
                    f"{path} has {foreign}, which is no file of its pack: give another place, or move it away"
                )
        return old

    def _same(self, old: PackFiles, *, archive: bool, replace: bool) -> bool:
        """Whether the very pack is there, and sound."""
        path = self._staging.destination
        alike = isinstance(old, ZipFiles) == archive and old.read(ROOT, most=MAX_ROOT_BYTES) == self._root
        if alike:
            damaged = [name for name, sound in self._sound(old) if not sound]
            if not damaged:
                self._tally.find(self._total() - len(self._root))
                return True
        if not replace:
            what = f"{damaged[0]} in it is damaged" if alike else "it is another one"
            raise PackError(f"there is a pack at {path}, and {what}: give another place, or replace it (--replace)")
        return False

    def _sound(self, old: PackFiles) -> list[tuple[str, bool]]:
        found: list[tuple[str, bool]] = []

        def job(name: str) -> Callable[[], None]:
            return lambda: found.append((name, self._holds(old, name, name)))

        self._each(job(name) for name in self._entries)
        return sorted(found)

    def _holds(self, old: PackFiles, theirs: str, ours: str) -> bool:
        """Whether a file of what is there already has the content that is wanted under a name."""
        entry = self._entries[ours]
        try:
            return file_digest(old, theirs, entry.bytes) == entry.sha256
        except (PackError, OSError):  # absent, shorter, or not readable: it is fetched
            return False

    def _each(self, jobs: Iterator[Callable[[], None]]) -> None:
        run_each(jobs, executor=self._executor, most=self._concurrency)

    # Parts: a file per digest.

    def _fetch_parts(self, old: PackFiles | None, *, room_for: int) -> None:
        """Have every part in the staging folder, whole."""
        stems = [f"{digest}{tail}" for digest in self._names for tail in ("", ".part", f".{self._range_bytes}")]
        self._staging.keep(set(stems))
        theirs: dict[str, str] = {}
        if old is not None:
            entries = read_entries(old.read(ROOT, most=MAX_ROOT_BYTES), self._entries_of, old.place)
            theirs = {entry.sha256: name for name, entry in entries.items()}
        missing: list[str] = []

        def look(digest: str) -> Callable[[], None]:
            def job() -> None:
                if not self._kept(digest) and not (
                    digest in theirs and old and self._adopted(digest, old, theirs[digest])
                ):
                    missing.append(digest)
                else:
                    self._tally.find(self._entries[self._names[digest]].bytes)

            return job

        self._each(look(digest) for digest in self._names)
        self._fetch([self._part(digest) for digest in sorted(missing, key=self._names.__getitem__)], room_for)

    def _kept(self, digest: str) -> bool:
        """Whether an earlier pull had it whole; it is read again, since it was not this one that checked it."""
        path = self._staging.path(digest)
        if not path.exists():
            return False
        if _hash(path) == digest:
            return True
        path.unlink()
        return False

    def _adopted(self, digest: str, old: PackFiles, name: str) -> bool:
        """Take a part from the pack that is to be replaced: by a link where that can be, else by copying."""
        size = self._entries[self._names[digest]].bytes
        taken = self._staging.path(f"{digest}.old")
        if isinstance(old, FolderFiles):
            try:
                _link_or_copy(old.path / name, taken)
            except (FileNotFoundError, NotADirectoryError):
                return False
        else:
            with contextlib.suppress(PackError), taken.open("wb") as file:  # damaged: its digest says so
                file.writelines(file_pieces(old, name, size))
        if taken.is_symlink() or _hash(taken) != digest:
            taken.unlink()
            return False
        _sync(taken)
        taken.rename(self._staging.path(digest))
        return True

    def _part(self, digest: str) -> _Part:
        name = self._names[digest]
        size = self._entries[name].bytes
        partial = self._staging.partial(digest, size, self._range_bytes)
        place = f"{self._files.place}: {name}"

        def read(offset: int, length: int) -> bytes | bytearray:
            if length == size:  # by a request without a range, which every server answers
                return self._files.read(name, most=size)
            data = bytearray(length)
            came = self._files.read_into(name, offset, [memoryview(data)])
            return data[:came]

        def check() -> PackError | None:
            found = _hash(partial.data)
            return None if found == digest else wrong_digest(place, found, digest)

        return self._begun(place, partial, read, check, self._staging.path(digest))

    def _begun(
        self,
        place: str,
        partial: Partial,
        read: Callable[[int, int], bytes | bytearray],
        check: Callable[[], PackError | None],
        whole: Path,
    ) -> _Part:
        missing = partial.begin()
        return _Part(place, partial, read, check, whole, missing, len(missing) < partial.num_ranges, len(missing))

    def _fetch(self, parts: list[_Part], room_for: int) -> None:
        """Fetch the ranges that are missing, near the beginning first, and finish each part as it is complete."""
        wanted = room_for
        for part in parts:
            left = sum(part.partial.span(index)[1] for index in part.missing)
            wanted += left
            if left < part.partial.size:
                self._tally.find(part.partial.size - left)
        free = shutil.disk_usage(self._staging.folder).free
        if wanted > free:
            raise PackError(
                f"{self._staging.destination} needs {wanted:,} bytes more, and {free:,} are free there: make room, or give "
                "another place"
            )
        self._each(self._jobs(parts))

    def _jobs(self, parts: list[_Part]) -> Iterator[Callable[[], None]]:
        def range_of(part: _Part, index: int) -> Callable[[], None]:
            def job() -> None:
                self._fetch_range(part, index)
                self._tally.move(part.partial.span(index)[1])
                with self._lock:
                    part.left -= 1
                    last = not part.left
                if last:
                    self._finish(part)

            return job

        def whole(part: _Part) -> Callable[[], None]:
            return lambda: self._finish(part)

        for part in parts:
            if not part.missing:
                yield whole(part)
            for index in part.missing:
                yield range_of(part, index)

    def _fetch_range(self, part: _Part, index: int) -> None:
        offset, length = part.partial.span(index)
        data = part.read(offset, length)
        if len(data) != length:
            raise PackError(
                f"{part.place}: {len(data)} of {length} bytes came at {offset}: it is cut short at its source"
            )
        part.partial.write(index, data)

    def _finish(self, part: _Part) -> None:
        """Check a part that came, and give it its name."""
        problem = part.check()
        if problem is not None and part.resumed:
            # What an earlier pull left is not what it noted, or the source was changed since: once more, all of it.
            part.partial.discard()
            for index in part.partial.begin():
                self._fetch_range(part, index)
                self._tally.move(part.partial.span(index)[1])
            problem = part.check()
        if problem is not None:
            part.partial.discard()
            raise problem
        part.partial.finish(part.whole)

    # What the parts become.

    def _tree(self) -> Path:
        tree = self._staging.path("tree")
        remove(tree)
        tree.mkdir()
        for name, entry in self._entries.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(self._staging.path(entry.sha256), tree / name)
        (tree / ROOT).write_bytes(self._root)
        _sync(tree / ROOT)
        for folder in (tree, *(each for each in tree.rglob("*") if each.is_dir())):
            sync_folder(folder)
        return tree

    def _archive(self) -> Path:
        made = self._staging.path("made.zip")
        with FolderFiles(self._staging.folder) as parts:

            def pieces(name: str) -> tuple[str, int, Iterator[bytes]]:
                if name == ROOT:
                    return name, len(self._root), iter([self._root])
                entry = self._entries[name]
                return name, entry.bytes, file_pieces(parts, entry.sha256, entry.bytes)

            write_zip(made, (pieces(name) for name in in_order([*self._entries, ROOT])))
        return made

    def _object(self, files: ZipFiles) -> Path:
        """Copy a zip byte for byte."""
        file: RangedFile = files.file
        check_sizes(files, self._entries)
        if file.size > self._total() + _MAX_GAPS + _GAP * (len(self._entries) + 1):
            raise PackError(f"{files.place} has {show_size(file.size)}, far more than its files: it is no pack")
        note = f"{_OBJECT}.json"
        partial = self._staging.partial(_OBJECT, file.size, self._range_bytes)
        state = self._staging.path(note)
        known = json.dumps([file.size, file.tag]).encode()
        whole = self._staging.path(_OBJECT)
        self._staging.keep({note, _OBJECT, partial.data.name, partial.notes.name})
        if not state.exists() or state.read_bytes() != known or file.tag is None:
            partial.discard()  # of another object, or of one that cannot be told from another
            remove(whole)
            state.write_bytes(known)

        def read(offset: int, length: int) -> bytearray:
            data = bytearray(length)
            return data[: file.read_into(offset, [memoryview(data)])]

        def check(path: Path = partial.data) -> PackError | None:
            try:
                with ZipFiles(LocalFile.at(path)) as came:
                    check_members(came, self._root, self._entries)
            except PackError as error:
                return PackError(
                    f"what came of {files.place} is not that pack ({error}): it was changed, or is damaged"
                )
            return None

        if whole.exists() and check(whole) is None:
            self._tally.find(file.size)
        else:
            self._fetch([self._begun(files.place, partial, read, check, whole)], 0)
        return whole


class _told:
    """Say what is kept when a pull ends early, and what a full disk means."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            where = self._staging.folder
            if error.errno in _FULL:
                raise PackError(
                    f"no room is left in {where} ({error.strerror}): make room and run it again; what came is kept"
                ) from None
            raise PackError(f"{where} cannot be written, or the pack not be read: {error}") from None
        if isinstance(error, PackError) and any(self._staging.folder.glob("*.part")):
            raise PackError(f"{error}. What came is kept in {self._staging.folder}: run it again to go on") from None


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _link_or_copy(source: Path, target: Path) -> None:
    """Two names of one file cost no room; some file systems have no such thing."""
    try:
        os.link(source, target, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError:
        shutil.copyfile(source, target, follow_symlinks=False)
        _sync(target)


def _others(folder: Path, names: set[str]) -> str | None:
    """A file in a folder that is none of these."""
    for at, _, found in os.walk(folder):
        for each in found:
            name = (Path(at) / each).relative_to(folder).as_posix()
            if name not in names:
                return name
    return None
