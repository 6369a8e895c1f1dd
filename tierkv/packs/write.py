"""Writes a pack, in one pass and the same bytes each time: what `build` and `merge` share.

Blocks go first, shard by shard, and are hashed as they pass; then the arrays that describe them; the root, which vouches for
all, is last. A folder appears by one rename when all is on the disk, a zip file likewise.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from tierkv import __version__
from tierkv.errors import PackError
from tierkv.facts import ModelFacts
from tierkv.keys import Key
from tierkv.layout import TOKEN_BYTES, Layout
from tierkv.packs.archive import in_order, replace, sync_folder, write_zip
from tierkv.packs.arrays import chunks_of, metadata
from tierkv.packs.manifest import (
    CODEC,
    FORMAT,
    MAX_BLOCK_BYTES,
    MAX_ROOT_BYTES,
    NO_PARENT,
    ROOT,
    Document,
    Signature,
    Stretch,
    array_name,
    expected_files,
    read_root,
    root_json,
    shard_blocks,
)
from tierkv.packs.pack import checksum
from tierkv.warm.plan import Plan
from tierkv.zarr_shards import shard_index, stride_of

ZIP_SUFFIX: Final = ".zip"
Read = Callable[[Sequence[int], Sequence[memoryview]], None]
"""Fills buffers with the blocks of rows. Raises PackError when one cannot be had."""


@dataclass(frozen=True, slots=True)
class Model:
    """What a pack says of the model it was computed with."""

    name: str
    weights_sha256: str
    facts: ModelFacts
    layout: Layout
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """A document whose path is in the plan at the same position. span: characters of a block's text, None where unknown."""

    name: str
    sha256: str
    num_tokens: int
    num_characters: int | None
    span: Callable[[int], tuple[int, int] | None]


@dataclass(frozen=True, slots=True)
class Rows:
    """Blocks in the order of a plan, and where each document ends. paths: document and number of the block, by row."""

    keys: list[Key]
    parents: list[int]
    paths: list[tuple[int, int]]
    last: list[int | None]


def rows_of(plan: Plan, root: Key) -> Rows:
    """Number the blocks of a plan: parents before children, a document's own blocks in a row."""
    by_key: dict[Key, int] = {}
    rows = Rows([], [], [], [])
    by_key[root] = NO_PARENT
    document, path = -1, list[Key]()
    for piece, keys in zip(plan.pieces, plan.keys(root), strict=True):
        blocks = plan.blocks(piece)
        if piece.document != document:  # its pieces follow one another
            document, path = piece.document, plan.path_keys(piece.document, root)
        parent = path[blocks.start - 1] if blocks.start else root
        for number, key in zip(blocks, keys, strict=True):
            by_key[key] = len(rows.keys)
            rows.keys.append(key)
            rows.parents.append(by_key[parent])
            rows.paths.append((piece.document, number))
            parent = key
    ends = (plan.path_keys(number, root) for number in range(len(plan.paths)))
    rows.last.extend(by_key[path[-1]] if path else None for path in ends)
    return rows


def runs_of(rows: Rows, sources: Sequence[Source]) -> list[Stretch]:
    """Rows put together to stretches of one document."""
    runs, first = [], 0
    for row in range(1, len(rows.keys) + 1):
        if row < len(rows.keys) and rows.paths[row] == (rows.paths[row - 1][0], rows.paths[row - 1][1] + 1):
            continue
        document, depth = rows.paths[first]
        spans = [sources[document].span(rows.paths[at][1]) for at in (first, row - 1)]
        characters = (spans[0][0], spans[1][1]) if spans[0] and spans[1] else None
        parent = rows.parents[first]
        runs.append(Stretch(first, row - first, None if parent == NO_PARENT else parent, depth, document, characters))
        first = row
    return runs


class Writer:
    """Makes the files of one pack, in order. progress: told of blocks."""

    def __init__(
        self,
        model: Model,
        plan: Plan,
        rows: Rows,
        sources: Sequence[Source],
        read: Read,
        *,
        built: Mapping[str, Any],  # Any: JSON
        progress: Callable[[int], None] = lambda blocks: None,
    ) -> None:
        self._model, self._plan, self._rows, self._sources = model, plan, rows, sources
        self._read, self._built, self._progress = read, built, progress
        self._digests = bytearray()
        self._checksums: list[int] = []
        self.files: dict[str, dict[str, Any]] = {}  # Any: JSON

    @property
    def num_blocks(self) -> int:
        """Blocks of the pack."""
        return len(self._rows.keys)

    def members(self) -> Iterator[tuple[str, int, Iterable[bytes | memoryview]]]:
        """Name, bytes and content of every file; each content is to be taken before the next file."""
        layout = self._model.layout
        if layout.block_bytes > MAX_BLOCK_BYTES:
            raise PackError(
                f"{layout.block_bytes:,} bytes a block: at most {MAX_BLOCK_BYTES:,} are read of a pack; "
                "set store.block_tokens lower"
            )
        described = metadata(layout, self.num_blocks)
        sizes = expected_files(layout, self.num_blocks)
        chunks: dict[str, bytes] = {}
        for name in in_order(sizes):
            if name.startswith("blocks/c."):
                size = sizes[name]
                assert size is not None, "the size of a shard is fixed"
                yield name, size, self._noted(name, self._shard(int(name.split(".")[1])))
                continue
            if name in described:
                data = described[name]
            else:
                chunks = chunks or self._chunks()
                data = chunks[name]
            yield name, len(data), self._noted(name, [data])
        try:
            root = root_json(self.manifest(), ())
        except ValueError as error:
            raise PackError(f"a manifest that has no form as JSON: {str(error)[:200]}; rename that document") from None
        if len(root) > MAX_ROOT_BYTES:
            raise PackError(
                f"a manifest of {len(root):,} bytes for {len(self._sources):,} documents: at most {MAX_ROOT_BYTES:,} are read; "
                "build several packs, and mount them together"
            )
        read_root(root, place="the new pack")  # what would be refused later is not written
        yield ROOT, len(root), [root]

    def _noted(self, name: str, content: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        digest, size = hashlib.sha256(), 0
        for part in content:
            digest.update(part)
            size += len(part)
            yield part
        self.files[name] = {"bytes": size, "sha256": digest.hexdigest()}

    def _shard(self, number: int) -> Iterator[bytes | memoryview]:
        layout = self._model.layout
        per_shard, stride, size = shard_blocks(layout), stride_of(layout.block_bytes), layout.block_bytes
        rows = range(number * per_shard, min((number + 1) * per_shard, self.num_blocks))
        buffer = memoryview(bytearray(len(rows) * stride))
        views = [buffer[at * stride : at * stride + size] for at in range(len(rows))]
        self._read(rows, views)
        for row, view in zip(rows, views, strict=True):
            self._digests += hashlib.sha256(view).digest()
            self._checksums.append(checksum(view, self._rows.keys[row]))
            self._progress(1)
        yield buffer
        yield shard_index(len(rows), per_shard, size)

    def _chunks(self) -> dict[str, bytes]:
        layout, step = self._model.layout, self._plan.block_tokens * TOKEN_BYTES
        import numpy as np

        paths = self._plan.paths
        tokens = b"".join(paths[document][number * step : (number + 1) * step] for document, number in self._rows.paths)
        spans = [
            (document, *(self._sources[document].span(number) or (-1, -1))) for document, number in self._rows.paths
        ]
        rows: dict[str, Any] = {  # Any: of several dtypes
            "keys": np.frombuffer(b"".join(self._rows.keys), np.uint8),
            "parents": self._rows.parents,
            "tokens": np.frombuffer(tokens, "<i4"),
            "spans": spans,
            "checksums": np.array(self._checksums, np.uint64),
            "digests": np.frombuffer(bytes(self._digests), np.uint8),
        }
        return {array_name(name): data for name, data in chunks_of(rows, layout).items()}

    def manifest(self) -> dict[str, Any]:  # Any: JSON
        """The manifest, once all other files have been taken."""
        model, step = self._model, self._plan.block_tokens * TOKEN_BYTES
        documents = [
            Document(one.name, one.sha256, one.num_tokens, one.num_characters, len(path) // step, last)
            for one, path, last in zip(self._sources, self._plan.paths, self._rows.last, strict=True)
        ]
        return {
            "format": FORMAT,
            "tool": f"tierkv {__version__}",
            "built": dict(self._built),
            "model": {
                "name": model.name,
                "identity": model.facts.identity,
                "architecture": model.facts.architecture,
                "config": dict(model.facts.config),
                "weights_sha256": model.weights_sha256,
                "adapter": model.adapter,
            },
            "rope": dict(model.facts.rope),
            "tokenizer_sha256": model.facts.tokenizer_sha256,
            "chat_template_sha256": model.facts.chat_template_sha256,
            "layout": asdict(model.layout),
            "fingerprint": model.layout.fingerprint.hex(),
            "codec": CODEC,
            "num_blocks": self.num_blocks,
            "shard_blocks": shard_blocks(model.layout),
            "documents": [asdict(one) for one in documents],
            "runs": [asdict(run) for run in runs_of(self._rows, self._sources)],
            "files": self.files,
        }


def write(out: Path, writer: Writer) -> None:
    """Write a pack: a zip file where the name ends with .zip, else a folder. Raises PackError."""
    with _told(out):
        if out.suffix.lower() == ZIP_SUFFIX:
            write_zip(out, writer.members())
            return
        staging = out.with_name(f".{out.name}.writing")
        shutil.rmtree(staging, ignore_errors=True)
        try:
            for name, _, content in writer.members():
                path = staging / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb") as file:
                    for part in content:
                        file.write(part)
                    file.flush()
                    os.fsync(file.fileno())
            for folder in {path.parent for path in staging.rglob("*")}:
                sync_folder(folder)
            staging.rename(out)
            sync_folder(out.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def sign_in_place(place: Path, raw: Mapping[str, Any], signatures: Sequence[Signature]) -> None:  # Any: JSON
    """Give a pack other signatures; nothing else of it changes. Raises PackError."""
    root = root_json(raw, signatures)
    read_root(root, place=str(place))  # such as too many signatures: what would be refused later is not written
    with _told(place):
        if place.is_dir():
            with kept(place / ROOT) as file:
                file.write(root)
            return
        from tierkv.packs.files import ZipFiles, open_files

        with open_files(place) as files:
            assert isinstance(files, ZipFiles), "a pack that is no folder is a zip file"
            sizes = files.sizes()
            with kept(place) as file:
                write_zip(file, ((name, *_copied(files, name, sizes[name], root)) for name in in_order(sizes)))


@contextlib.contextmanager
def kept(path: Path) -> Iterator[BinaryIO]:
    """New content for a file whose permissions stay: what others might not read they may not read now. Links lead to it."""
    path = path.resolve()
    with replace(path) as file:
        if path.exists():
            os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
        yield file


def _copied(files: Any, name: str, size: int, root: bytes) -> tuple[int, Iterable[bytes | memoryview]]:  # Any: ZipFiles
    if name == ROOT:
        return len(root), [root]

    def parts() -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(size, 8 << 20)))
        for at in range(0, size, len(buffer) or 1):
            part = buffer[: min(len(buffer), size - at)]
            if files.read_into(name, at, [part]) < len(part):
                raise PackError(f"{files.place}: {name} ends early")
            yield part

    return size, parts()


@contextlib.contextmanager
def held_place(out: Path) -> Iterator[Path]:
    """The folder beside `out` where what is not finished lies, for one process at a time. Raises PackError."""
    work = out.with_name(f".{out.name}.building")
    with _told(out):
        work.mkdir(parents=True, exist_ok=True)
        fd = os.open(work / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PackError(f"{out} is being built by another process: wait for it, or give another name") from None
        yield work
    finally:
        os.close(fd)


@contextlib.contextmanager
def _told(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PackError(
            f"{out} cannot be written: {error.strerror or error}; free some space, or give another place"
        ) from error
