"""Push and pull: only what is missing moves, and nothing is visible under its name before all of it was checked.

The root zarr.json names every other file with its size and SHA-256: that is the list of what to move. What must not live
here: what a manifest means else, how servers are asked, and threads: an executor is passed in.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from tierkv.errors import PackError
from tierkv.packs.archive import ROOT
from tierkv.packs.files import PackFiles, RemoteOptions, ZipFiles, open_files
from tierkv.packs.moves import (
    MAX_ROOT_BYTES,
    RANGE_BYTES,
    Entries,
    EntriesOf,
    Entry,
    Progress,
    Tally,
    check_members,
    file_pieces,
    pieces,
    read_entries,
    run_each,
    wrong_digest,
)
from tierkv.packs.pulling import Pull
from tierkv.packs.remote import Objects, is_archive, show_place
from tierkv.packs.staging import Staging


@dataclass(frozen=True, slots=True)
class Shipped:
    """What a push or a pull came to. Bytes are those of the files that the manifest names, or of the zip."""

    files: int
    bytes_moved: int
    bytes_there: int
    seconds: float


def push(
    source: PackFiles,
    destination: str,
    *,
    entries_of: EntriesOf,
    options: RemoteOptions | None = None,
    progress: Progress | None = None,
    executor: Executor | None = None,
    concurrency: int = 4,
    clock: Callable[[], float] = time.monotonic,
) -> Shipped:
    """Copy a pack to s3://bucket/prefix, file by file; or one in zip form to s3://bucket/name.zip, as one object.

    A file moves unless an object of its size is there that was written together with the same SHA-256 (its metadata): any
    other is written anew. Its bytes are checked while they go: a damaged file never becomes an object. The root goes last,
    so that no reader sees a manifest whose files are not there yet. Where it replaces another pack, the old root names
    files that are new already for a while: who reads then is refused by their digests. Objects that the new pack does not
    name are left. progress is called from any thread. Raises PackError.
    """
    began = clock()
    if destination.partition("://")[0].lower() != "s3":
        raise PackError(
            f"{show_place(destination)}: a pack is pushed to s3://bucket/prefix (any server that speaks S3: endpoint); "
            "for a copy on a disk, pull it there"
        )
    root = source.read(ROOT, most=MAX_ROOT_BYTES)
    entries = read_entries(root, entries_of, source.place)
    tally = Tally(progress)
    if is_archive(destination):
        _push_archive(source, destination, root, entries, tally, options)
        return Shipped(1, tally.moved, tally.there, clock() - began)
    objects = Objects(destination, options=options)

    def job(name: str, entry: Entry) -> Callable[[], None]:
        return lambda: _put(
            objects, name, entry.bytes, entry.sha256,
            lambda: file_pieces(source, name, entry.bytes), tally, f"{source.place}: {name}",
        )  # fmt: skip

    run_each((job(name, entry) for name, entry in entries.items()), executor=executor, most=concurrency)
    _put(objects, ROOT, len(root), hashlib.sha256(root).hexdigest(), lambda: [root], Tally(None), source.place)
    return Shipped(len(entries) + 1, tally.moved, tally.there, clock() - began)


def _push_archive(
    source: PackFiles, destination: str, root: bytes, entries: Entries, tally: Tally, options: RemoteOptions | None
) -> None:
    if not isinstance(source, ZipFiles):
        raise PackError(
            f"{source.place} is a folder, and {show_place(destination)} one object: give a prefix without .zip, "
            "or make the zip first (pull the pack to a path that ends with .zip)"
        )
    check_members(source, root, entries)
    file = source.file
    whole = hashlib.sha256()
    for piece in pieces(file.read_into, file.size, file.place):
        whole.update(piece)
    objects = Objects.of_object(destination, options=options)
    _put(
        objects, objects.single or "", file.size, whole.hexdigest(),
        lambda: pieces(file.read_into, file.size, file.place), tally, file.place,
    )  # fmt: skip


def _put(
    objects: Objects, name: str, size: int, sha256: str, read: Callable[[], Iterable[bytes]], tally: Tally, place: str
) -> None:
    found = objects.look(name)
    if found is not None and found.size == size and found.digest == sha256:
        tally.find(size)
        return
    objects.write(name, size, _checked(read(), sha256, place, tally), digest=sha256)


def _checked(read: Iterable[bytes], sha256: str, place: str, tally: Tally) -> Iterator[bytes]:
    """Pass pieces on; at their end, raise instead of ending when they are not what was promised."""
    seen = hashlib.sha256()
    for piece in read:
        seen.update(piece)
        yield piece
        tally.move(len(piece))
    if seen.hexdigest() != sha256:
        raise wrong_digest(place, seen.hexdigest(), sha256)


def pull(
    source: str | Path,
    destination: Path,
    *,
    entries_of: EntriesOf,
    options: RemoteOptions | None = None,
    accept: Callable[[bytes], None] | None = None,
    replace: bool = False,
    progress: Progress | None = None,
    executor: Executor | None = None,
    concurrency: int = 8,
    range_bytes: int = RANGE_BYTES,
    clock: Callable[[], float] = time.monotonic,
) -> Shipped:
    """Copy a pack from where it lies to a folder, or to one zip file where the destination ends with .zip.

    It comes by ranges into a folder beside the destination, which keeps what came, however this process ends: the same call
    goes on from there. Files of an earlier state of the source that are still wanted are kept. Every file has the SHA-256 of
    the manifest, and is on the disk, before the destination appears by one rename; a zip from a zip is the same bytes.

    A pack that is there already and sound moves nothing. Another one is replaced with `replace` only: files in common do not
    move, and a folder is renamed aside first (a kill between two renames is mended by the next pull). What is no pack is
    never replaced. accept is given the very root that is pulled, and may raise: a signature is checked there, since a source
    that is asked twice may answer with two. progress is called from any thread. Raises PackError.
    """
    began = clock()
    destination = Path(destination).expanduser().resolve()
    tally = Tally(progress)
    with open_files(source, options=options) as files:
        root = files.read(ROOT, most=MAX_ROOT_BYTES)
        entries = read_entries(root, entries_of, files.place)
        if accept is not None:
            accept(root)
        with Staging(destination) as staging:
            pulling = Pull(
                files, root, entries, staging,
                entries_of=entries_of, tally=tally, executor=executor, concurrency=concurrency, range_bytes=range_bytes,
            )  # fmt: skip
            num_files = pulling.run(replace=replace)
    return Shipped(num_files, tally.moved, tally.there, clock() - began)
