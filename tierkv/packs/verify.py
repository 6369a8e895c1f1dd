"""Looks at every byte of a pack: is it what its manifest says, and does that hold together?

    signature ▶ size and SHA-256 of every file ▶ keys from tokens ▶ each block against its own digests ▶ what zarr is told

Each step finds what the one before cannot: a manifest that was changed with its digests fails at the signature, one that was
signed by mistake fails at the keys. Whether the KV is that of the model is for `recompute` to tell.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from tierkv.errors import PackError
from tierkv.packs.arrays import metadata
from tierkv.packs.files import PackFiles, RemoteOptions, open_files
from tierkv.packs.manifest import DIGEST_BYTES, MAX_ROOT_BYTES, ROOT, Manifest, array_name, root_json, shard_name
from tierkv.packs.pack import Pack, checksum, read_manifest
from tierkv.packs.signing import check
from tierkv.zarr_shards import shard_index, stride_of

PIECE_BYTES: Final = 8 << 20
MOST_FINDINGS: Final = 100
_ZARR_FIELDS: Final = (
    "attributes",
    "chunk_grid",
    "chunk_key_encoding",
    "codecs",
    "data_type",
    "fill_value",
    "node_type",
    "shape",
    "storage_transformers",
    "zarr_format",
)
"""Of an array: all that zarr's specification has, but names of dimensions."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be. where: a file, a row, or the manifest."""

    where: str
    what: str


@dataclass(frozen=True, slots=True)
class Verified:
    """What was looked at, and what was found; sound when nothing was. signers: public keys of right signatures."""

    manifest: Manifest
    signers: tuple[str, ...]
    num_blocks: int
    num_bytes: int
    findings: tuple[Finding, ...]


def verify(
    place: str | Path,
    *,
    trusted: Sequence[str] | None = None,
    remote: RemoteOptions | None = None,
    progress: Callable[[int], None] = lambda read: None,
) -> Verified:
    """Look at all of a pack. progress: told of bytes.

    trusted: as in `open_pack`. Raises PackError where there is no manifest to hold the rest against.
    """
    with open_files(place, options=remote) as files:
        manifest = read_manifest(files)
        findings: list[Finding] = []
        signers: list[str] = []
        try:
            signers = check(manifest, trusted=trusted, place=files.place)
        except PackError as error:
            findings.append(Finding("signature", str(error)))
        rows: set[str] = set()
        for step in (_strangers, _files, _rows, _metadata, _documents):
            try:
                for finding in step(files, manifest, progress):
                    if finding.where in rows:
                        continue  # of a block, the first step that finds something knows most
                    if finding.where.startswith("row "):
                        rows.add(finding.where)
                    findings.append(finding)
                    if len(findings) >= MOST_FINDINGS:
                        break
            except (PackError, OSError) as error:
                findings.append(Finding("manifest" if step is _rows else "files", str(error)))
        return Verified(
            manifest, tuple(signers), manifest.num_blocks, manifest.num_bytes, tuple(findings[:MOST_FINDINGS])
        )


Progress = Callable[[int], None]


def _strangers(files: PackFiles, manifest: Manifest, progress: Progress) -> Iterator[Finding]:
    sizes = files.sizes()
    for name in sorted((sizes or {}).keys() - manifest.files.keys() - {ROOT}):
        yield Finding(name, "a file that the manifest does not list: nobody vouches for it")


def _files(files: PackFiles, manifest: Manifest, progress: Progress) -> Iterator[Finding]:
    """Every file against size and SHA-256; of shards, each block against its own digests in passing."""
    sums = _sums(files, manifest)
    rows = {digest: row for row, digest in enumerate(sums or ())}
    sizes = files.sizes()
    buffer = memoryview(bytearray(PIECE_BYTES))
    for name, entry in manifest.files.items():
        digest, at = hashlib.sha256(), 0
        try:
            while at < entry.bytes:
                part = buffer[: min(PIECE_BYTES, entry.bytes - at)]
                came = files.read_into(name, at, [part])
                digest.update(part[:came])
                progress(came)
                at += came
                if came < len(part):
                    break
            more = (
                sizes is not None and sizes.get(name, 0) > entry.bytes
            )  # a web server lists none; nobody reads beyond
        except PackError as error:
            yield Finding(name, str(error))
            continue
        if at < entry.bytes or more:
            yield Finding(name, f"{at:,} bytes, {'more' if more else 'fewer'} than the {entry.bytes:,} of the manifest")
        elif digest.hexdigest() != entry.sha256:
            yield Finding(name, "other bytes than those of the manifest (SHA-256)")
            if name.startswith("blocks/c.") and sums is not None:
                yield from _blocks(files, manifest, int(name.split(".")[1]), sums, rows)


def _sums(files: PackFiles, manifest: Manifest) -> list[bytes] | None:
    """SHA-256 of the rows, to say which blocks of a bad shard are bad; None where these are bad themselves."""
    entry = manifest.files[array_name("digests")]
    try:
        data = files.read(array_name("digests"), most=entry.bytes)
    except PackError:
        return None
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        return None
    return [data[at : at + DIGEST_BYTES] for at in range(0, len(data), DIGEST_BYTES)]


def _blocks(
    files: PackFiles, manifest: Manifest, shard: int, sums: Sequence[bytes], rows: Mapping[bytes, int]
) -> Iterator[Finding]:
    size, per_shard = manifest.layout.block_bytes, manifest.shard_blocks
    stride, block = stride_of(size), memoryview(bytearray(size))
    first = shard * per_shard
    sound = True
    for row in range(first, min(first + per_shard, manifest.num_blocks)):
        files.read_into(shard_name(shard), (row - first) * stride, [block])
        digest = hashlib.sha256(block).digest()
        if digest != sums[row]:
            sound = False
            other = rows.get(digest)
            what = (
                "other bytes than its digest says"
                if other is None
                else f"the block of row {other}: they changed places"
            )
            yield Finding(f"row {row}", what)
    if sound:
        yield Finding(
            shard_name(shard), "its blocks are right: the change is in the padding, or in the index for zarr readers"
        )


def _rows(files: PackFiles, manifest: Manifest, progress: Progress) -> Iterator[Finding]:
    """The tree, and blocks against both of their digests, as a mounted pack is read."""
    pack = Pack(files, manifest, signers=(), strict=True)  # raises where the keys are not those of the tokens
    checksums = pack.array("checksums")
    size = manifest.layout.block_bytes
    blocks = [memoryview(bytearray(size)) for _ in range(max(1, min(PIECE_BYTES // size, manifest.num_blocks)))]
    for first in range(0, manifest.num_blocks, len(blocks)):
        rows = range(first, min(first + len(blocks), manifest.num_blocks))
        for row, block, wrong in zip(rows, blocks, pack.read(rows, blocks[: len(rows)]), strict=False):
            if wrong is not None:
                yield Finding(f"row {row}", wrong.why)
            elif checksum(block, pack.keys[row].tobytes()) != int(checksums[row]):
                yield Finding(f"row {row}", "a checksum that is not its block's, though the digest is")
    for shard in range(-(-manifest.num_blocks // manifest.shard_blocks)):
        used = min(manifest.shard_blocks, manifest.num_blocks - shard * manifest.shard_blocks)
        index = shard_index(used, manifest.shard_blocks, size)
        found = memoryview(bytearray(len(index)))
        files.read_into(shard_name(shard), used * stride_of(size), [found])
        if found != index:
            yield Finding(shard_name(shard), "an index for zarr readers that is not that of its blocks")


def _metadata(files: PackFiles, manifest: Manifest, progress: Progress) -> Iterator[Finding]:
    if files.read(ROOT, most=MAX_ROOT_BYTES) != root_json(manifest.raw, manifest.signatures):
        yield Finding(ROOT, "says more than the manifest and its signatures, or says it in another form")
    for name, expected in metadata(manifest.layout, manifest.num_blocks).items():
        if _told(files.read(name, most=manifest.files[name].bytes)) != _told(expected):
            yield Finding(name, "tells zarr readers something else than the manifest")


def _told(data: bytes) -> dict[str, Any] | None:  # Any: JSON
    """What an array's zarr.json says, whatever version of zarr wrote it."""
    try:
        given = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return {name: given.get(name) or None for name in _ZARR_FIELDS} if isinstance(given, dict) else None


def _documents(files: PackFiles, manifest: Manifest, progress: Progress) -> Iterator[Finding]:
    """Documents, runs and spans against the tree."""
    pack = Pack(files, manifest, signers=(), strict=False)
    spans = pack.array("spans")
    if np.any((spans[:, 0] < 0) | (spans[:, 0] >= len(manifest.documents))):
        yield Finding("spans", "a document that is not in the manifest")
    depths: list[int] = []
    for parent in pack.parents.tolist():
        depths.append(0 if parent < 0 else depths[parent] + 1)
    for number, document in enumerate(manifest.documents):
        blocks = 0 if document.last is None else depths[document.last] + 1
        if blocks != document.num_blocks or document.num_tokens < blocks * manifest.layout.block_tokens:
            yield Finding(f"documents[{number}]", f"{document.num_blocks} blocks, and a path of {blocks} in the tree")
    for number, run in enumerate(manifest.runs):
        rows = range(run.first, run.first + run.num_blocks)
        parents = [-1 if run.parent is None else run.parent, *rows[:-1]]
        if pack.parents[run.first : run.first + run.num_blocks].tolist() != parents:
            yield Finding(f"runs[{number}]", "rows that are not one below the other")
        elif depths[run.first] != run.depth:
            yield Finding(f"runs[{number}]", f"depth {run.depth}, and {depths[run.first]} blocks above it")
