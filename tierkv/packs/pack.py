"""A pack that is open: its tree of rows, and its blocks, read in place and verified.

Opening one reads the manifest and the arrays that describe rows, checks them against their digests, and computes every key
anew from the tokens: a pack that names KV wrongly is refused before anything is read from it. Blocks are checked as they are
read.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, wait
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from tierkv.errors import PackError
from tierkv.keys import Key
from tierkv.layout import Layout
from tierkv.packs.arrays import rows_of
from tierkv.packs.files import PackFiles, RemoteOptions, open_files
from tierkv.packs.manifest import MAX_ROOT_BYTES, NO_PARENT, ROOT, Manifest, array_name, read_root, shard_name
from tierkv.packs.signing import check
from tierkv.zarr_shards import ALIGNMENT, stride_of

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

PIECE_BYTES: Final = 8 << 20
"""Read at a time: one piece is verified while others are read."""
_PADDING: Final = memoryview(bytearray(ALIGNMENT))
"""Takes what lies between blocks whose size is no multiple of ALIGNMENT; nobody looks at it."""


class Wrong(NamedTuple):
    """Why a block did not come. broken: what came is not the block; else it could not be read, or was late."""

    broken: bool
    late: bool
    why: str


def checksum(block: "ReadableBuffer", key: bytes) -> int:
    """xxh3-64, seeded with the key: two sound blocks that have changed places are found, too."""
    return xxhash.xxh3_64_intdigest(block, seed=int.from_bytes(key[:8], "little"))


class Pack:
    """An open pack. Thread-safe. strict: compare blocks with their SHA-256, which a signature covers, not with checksums.

    signers: public keys whose signatures are right. Use `open_pack`.
    """

    def __init__(self, files: PackFiles, manifest: Manifest, *, signers: Sequence[str], strict: bool) -> None:
        self.files, self.manifest, self.signers, self.strict = files, manifest, tuple(signers), strict
        self.layout: Layout = manifest.layout
        self.place = files.place
        self.local = "://" not in files.place
        self.keys = self.array("keys")
        self.parents = self.array("parents")
        self.tokens = self.array("tokens")
        self._sums = self.array("digests" if strict else "checksums")
        self._stride = stride_of(self.layout.block_bytes)
        self.check_tree()

    @property
    def num_blocks(self) -> int:
        """Blocks in it."""
        return self.manifest.num_blocks

    def array(self, name: str) -> npt.NDArray[Any]:  # Any: of several dtypes
        """The rows of an array, compared with its digest. Raises PackError."""
        file = array_name(name)
        return rows_of(name, self.part(file), self.layout)

    def part(self, name: str) -> bytes:
        """A small file, compared with its digest. Raises PackError."""
        entry = self.manifest.files[name]
        data = self.files.read(name, most=entry.bytes)
        if len(data) != entry.bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise PackError(f"{self.place}: {name} is not what the manifest says (SHA-256): fetch the pack again")
        return data

    def check_tree(self) -> None:
        """Raise PackError unless every key is that of its tokens, and every parent comes before its children."""
        numbers = np.arange(self.num_blocks)
        if np.any((self.parents < NO_PARENT) | (self.parents >= numbers)):
            row = int(np.argmax((self.parents < NO_PARENT) | (self.parents >= numbers)))
            raise PackError(
                f"{self.place}: row {row} comes before its parent: not what `tierkv pack build` makes; build it anew"
            )
        for row, key in enumerate(self.keys_under(self.manifest.root())):
            if key != self.keys[row].tobytes():
                raise PackError(
                    f"{self.place}: row {row} has a key that is not that of its tokens: it was changed; fetch the pack again"
                )

    def keys_under(self, root: Key) -> list[Key]:
        """The key of each row in a namespace: one of another tenant or secret has other keys for the same blocks."""
        sha256, data, step = hashlib.sha256, self.tokens.tobytes(), self.tokens.shape[1] * 4
        keys: list[Key] = []
        for row, parent in enumerate(self.parents.tolist()):
            before = root if parent < 0 else keys[parent]
            keys.append(Key(sha256(before + data[row * step : (row + 1) * step]).digest()))
        return keys

    def path(self, row: int) -> list[int]:
        """Rows from the first block of the prompt to `row`."""
        rows = [row]
        while (parent := int(self.parents[rows[-1]])) >= 0:
            rows.append(parent)
        return rows[::-1]

    def read(
        self,
        rows: Sequence[int],
        outs: Sequence[memoryview],
        *,
        executor: Executor | None = None,
        late: Callable[[], bool] = lambda: False,
    ) -> list[Wrong | None]:
        """Fill `outs[i]` (a block long) with the block of `rows[i]`, verified; what is wrong with it, or None.

        executor: pieces are read and verified there, side by side.  late: asked before each; True leaves it out.
        """
        answers: list[Wrong | None] = [None] * len(rows)
        pieces = list(self._pieces(rows))
        read = partial(self._read_piece, rows=rows, outs=outs, answers=answers, late=late)
        if executor is None or len(pieces) == 1:
            for piece in pieces:
                read(piece)
            return answers
        jobs = [executor.submit(read, piece) for piece in pieces]
        wait(jobs)  # the caller's buffers are in use until then
        for job in jobs:
            job.result()
        return answers

    def _pieces(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """Positions in `rows` of consecutive rows of one shard file."""
        per_shard, most = self.manifest.shard_blocks, max(1, PIECE_BYTES // self._stride)
        piece: list[int] = []
        for at in sorted(range(len(rows)), key=lambda at: rows[at]):
            row = rows[at]
            if piece and (row != rows[piece[-1]] + 1 or row % per_shard == 0 or len(piece) == most):
                yield piece
                piece = []
            piece.append(at)
        if piece:
            yield piece

    def _read_piece(
        self,
        piece: Sequence[int],
        *,
        rows: Sequence[int],
        outs: Sequence[memoryview],
        answers: list[Wrong | None],
        late: Callable[[], bool],
    ) -> None:
        if late():
            for at in piece:
                answers[at] = Wrong(broken=False, late=True, why="late")
            return
        shard, first = divmod(rows[piece[0]], self.manifest.shard_blocks)
        size = self.layout.block_bytes
        pad = self._stride - size
        views = [part for at in piece for part in ((outs[at], _PADDING[:pad]) if pad else (outs[at],))]
        try:
            came = self.files.read_into(shard_name(shard), first * self._stride, views)
        except (OSError, PackError) as error:
            for at in piece:
                answers[at] = Wrong(broken=False, late=False, why=str(error))
            return
        for number, at in enumerate(piece):
            if came < number * self._stride + size:
                answers[at] = Wrong(broken=True, late=False, why=f"{shard_name(shard)} ends early")
            elif not self._sound(rows[at], outs[at]):
                answers[at] = Wrong(broken=True, late=False, why=f"row {rows[at]} is not what its digest says")

    def _sound(self, row: int, block: memoryview) -> bool:
        if self.strict:
            return hashlib.sha256(block).digest() == bytes(self._sums[row])
        return checksum(block, self.keys[row].tobytes()) == int(self._sums[row])

    def close(self) -> None:
        """Let go of its files; no read may be under way. Idempotent."""
        self.files.close()

    def __enter__(self) -> "Pack":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_manifest(files: PackFiles) -> Manifest:
    """The manifest of a pack, and nothing else of it. Raises PackError."""
    return read_root(files.read(ROOT, most=MAX_ROOT_BYTES), place=files.place)


def open_pack(
    place: str | Path,
    *,
    trusted: Sequence[str] | None = None,
    strict: bool | None = None,
    remote: RemoteOptions | None = None,
) -> Pack:
    """Open a pack: a folder, a zip file, or the URL of either. Raises PackError.

    trusted: public keys in hex, one of which must have signed it; None: it need not be signed, but a signature that is there
    must be right.  strict: as in `Pack`; None: where signatures are demanded.
    """
    files = open_files(place, options=remote)
    try:
        manifest = read_manifest(files)
        signers = check(manifest, trusted=trusted, place=files.place)
        return Pack(files, manifest, signers=signers, strict=trusted is not None if strict is None else strict)
    except BaseException:
        files.close()
        raise
