"""What a pack says of itself: the attributes of its root zarr.json, read with suspicion and written the same way each time.

    attributes.tierkv_pack            the manifest: model, layout, documents, runs, size and SHA-256 of every other file
    attributes.tierkv_pack_sha256     of the manifest: whoever edits it by hand, or by accident, is found out without a signature
    attributes.signatures             Ed25519 over the manifest (`signing`)

Which files a pack of a layout and a number of blocks has, and how long each is, follows from those two: a manifest that
lists others is none. So no name or size that a stranger made up is ever used.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from tierkv.errors import LayoutError, PackError
from tierkv.facts import ModelFacts
from tierkv.keys import KEY_BYTES, Key, Namespace
from tierkv.layout import TOKEN_BYTES, Layout
from tierkv.zarr_shards import index_bytes, stride_of

FORMAT: Final = 1
ROOT: Final = "zarr.json"
ATTRIBUTE: Final = "tierkv_pack"
OWN_DIGEST: Final = "tierkv_pack_sha256"
CODEC: Final = "raw"
MAX_ROOT_BYTES: Final = 64 << 20
"""Of a root zarr.json: documents and runs of some hundred thousand prompts. More is refused before it is read."""
MAX_ROOT_VALUES: Final = MAX_ROOT_BYTES // 16
"""In it: an honest one has a third of that. A list of empty objects takes 30 times its size in memory."""
MAX_METADATA_BYTES: Final = 64 << 10
"""Of an array's zarr.json."""
MAX_BLOCKS: Final = 1 << 28
MAX_CHARACTERS: Final = 1 << 40
"""Of a document."""
MAX_SIGNATURES: Final = 16
SHARD_BYTES: Final = 64 << 20
"""Of a shard file at most: the unit that is shipped and checked as a whole."""
MAX_SHARD_BLOCKS: Final = 64
MAX_BLOCK_BYTES: Final = 1 << 30
"""A hundred times what models of today have: whoever reads one makes room for it."""
DIGEST_BYTES: Final = 32
NO_PARENT: Final = -1
ARRAYS: Final[Mapping[str, Callable[[int], int]]] = {  # bytes of a row, given tokens of a block
    "checksums": lambda block_tokens: 8,
    "digests": lambda block_tokens: DIGEST_BYTES,
    "keys": lambda block_tokens: KEY_BYTES,
    "parents": lambda block_tokens: 4,
    "spans": lambda block_tokens: 24,
    "tokens": lambda block_tokens: TOKEN_BYTES * block_tokens,
}
_HEX: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size and SHA-256 (hex) of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Document:
    """One input. sha256: of its text, or of its tokens where there is none.  last: the row of its last whole block."""

    name: str
    sha256: str
    num_tokens: int
    num_characters: int | None
    num_blocks: int
    last: int | None


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive rows that are consecutive blocks of one path.

    parent: row of the block before, None at the start of a prompt.  depth: number of blocks before.
    document, characters: whose text it is, and which part of that; None where the input had none.
    """

    first: int
    num_blocks: int
    parent: int | None
    depth: int
    document: int
    characters: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Signature:
    """Hex."""

    public_key: str
    signature: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest that holds together. raw: as it stands in the file, which is what is signed."""

    raw: Mapping[str, Any]  # Any: JSON
    tool: str
    model_name: str
    weights_sha256: str
    facts: ModelFacts
    adapter: str
    layout: Layout
    num_blocks: int
    documents: tuple[Document, ...]
    runs: tuple[Stretch, ...]
    files: Mapping[str, FileEntry]
    signatures: tuple[Signature, ...] = ()

    @property
    def shard_blocks(self) -> int:
        """Blocks of a shard file."""
        return shard_blocks(self.layout)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files but the root zarr.json."""
        return sum(entry.bytes for entry in self.files.values())

    def root(self) -> Key:
        """What the keys in a pack hang on: its model's namespace, of no tenant and with no secret."""
        return Namespace(self.facts.identity, self.layout, adapter=self.adapter).root()


def shard_blocks(layout: Layout) -> int:
    """Blocks of a shard file."""
    return max(1, min(MAX_SHARD_BLOCKS, SHARD_BYTES // stride_of(layout.block_bytes)))


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"blocks/c.{number}.0.0.0.0.0"


def array_name(name: str) -> str:
    """The one chunk of an array that describes rows."""
    return f"{name}/c.0.0" if name in ("keys", "tokens", "spans", "digests") else f"{name}/c.0"


def expected_files(layout: Layout, num_blocks: int) -> dict[str, int | None]:
    """Every file of such a pack but the root zarr.json, and its bytes; None: metadata, whose length is not fixed."""
    per_shard, stride = shard_blocks(layout), stride_of(layout.block_bytes)
    files: dict[str, int | None] = {"blocks/zarr.json": None}
    for number in range(-(-num_blocks // per_shard)):
        used = min(per_shard, num_blocks - number * per_shard)
        files[shard_name(number)] = used * stride + index_bytes(per_shard)
    for name, row_bytes in ARRAYS.items():
        files[f"{name}/zarr.json"] = None
        files[array_name(name)] = num_blocks * row_bytes(layout.block_tokens)
    return files


def canonical(value: object) -> bytes:
    """JSON in the one form that is signed. Raises ValueError for what has none: NaN, half a surrogate pair."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def own_digest(manifest: Mapping[str, Any]) -> str:  # Any: JSON
    """SHA-256 of a manifest."""
    return hashlib.sha256(canonical(manifest)).hexdigest()


def root_json(manifest: Mapping[str, Any], signatures: Sequence[Signature]) -> bytes:
    """The root zarr.json of a pack."""
    signed = [{"algorithm": "ed25519", "public_key": one.public_key, "signature": one.signature} for one in signatures]
    group = {
        "attributes": {"signatures": signed, ATTRIBUTE: manifest, OWN_DIGEST: own_digest(manifest)},
        "node_type": "group",
        "zarr_format": 3,
    }
    return (json.dumps(group, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def read_root(data: bytes, *, place: str) -> Manifest:
    """Read a root zarr.json. place: for errors. Raises PackError for whatever `build` does not write."""
    if len(data) > MAX_ROOT_BYTES:
        raise PackError(f"{place}: manifest of {len(data):,} bytes: at most {MAX_ROOT_BYTES:,} are read")
    if sum(map(data.count, (b",", b"{", b"["))) > MAX_ROOT_VALUES:
        raise PackError(f"{place}: manifest of more than {MAX_ROOT_VALUES:,} values; fetch or build the pack again")
    try:
        group = json.loads(data, object_pairs_hook=partial(_object, place))
        attributes = group["attributes"]
        raw = attributes[ATTRIBUTE]
        digest = own_digest(raw)  # what has no such form (NaN, half a surrogate pair, endless nesting) is not ours
    except (ValueError, RecursionError, KeyError, TypeError):
        raise PackError(
            f"{place}: no pack: its zarr.json has no attribute {ATTRIBUTE}; give what `tierkv pack build` made"
        ) from None
    if not isinstance(raw, dict):
        raise PackError(f"{place}: no pack: attribute {ATTRIBUTE} is no object; give what `tierkv pack build` made")
    if type(raw.get("format")) is not int or raw["format"] != FORMAT:
        raise PackError(
            f"{place}: pack of format {repr(raw.get('format'))[:40]}, this version reads format {FORMAT}: "
            "take the tierkv that it was built with, or build it again"
        )
    if attributes.get(OWN_DIGEST) != digest:
        raise PackError(
            f"{place}: its manifest was changed: it is not what {OWN_DIGEST} says; fetch or build the pack again"
        )
    return _Reader(place).manifest(raw, attributes.get("signatures", []))


def _object(place: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:  # Any: JSON
    """One name, one value: of two, each reader would take the one it likes."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise PackError(f"{place}: its zarr.json has a name twice in one object; fetch or build the pack again")
    return found


class _Reader:
    """Takes JSON apart; every mistake is a PackError that names the field."""

    def __init__(self, place: str) -> None:
        self._place = place

    def wrong(self, field: str, expected: str) -> PackError:
        return PackError(f"{self._place}: manifest field {field}: expected {expected}; fetch or build the pack again")

    def text(self, given: Mapping[str, Any], name: str, *, field: str = "") -> str:
        value = given.get(name)
        if not isinstance(value, str) or len(value) > 4096 or not value.isprintable():  # it is shown on terminals
            raise self.wrong(f"{field}{name}", "text that can be printed")
        return value

    def number(self, given: Mapping[str, Any], name: str, *, most: int, least: int = 0, field: str = "") -> int:
        value = given.get(name)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(f"{field}{name}", f"an integer from {least} to {most}")
        return value

    def optional(self, given: Mapping[str, Any], name: str, *, most: int, field: str = "") -> int | None:
        return None if given.get(name) is None else self.number(given, name, most=most, field=field)

    def digest(self, given: Mapping[str, Any], name: str, *, field: str = "") -> str:
        value = self.text(given, name, field=field)
        if not _HEX.fullmatch(value):
            raise self.wrong(f"{field}{name}", "a SHA-256 in hex")
        return value

    def table(self, given: Mapping[str, Any], name: str, *, field: str = "") -> Mapping[str, Any]:
        value = given.get(name)
        if not isinstance(value, dict):
            raise self.wrong(f"{field}{name}", "an object")
        return value

    def rows(self, given: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
        value = given.get(name)
        if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
            raise self.wrong(name, "a list of objects")
        return value

    def manifest(self, raw: Mapping[str, Any], signatures: object) -> Manifest:
        layout = self.layout(self.table(raw, "layout"))
        if raw.get("fingerprint") != layout.fingerprint.hex():
            raise self.wrong("fingerprint", f"that of the layout, {layout.fingerprint.hex()}")
        if raw.get("codec") != CODEC:
            raise self.wrong("codec", f"{CODEC!r}")
        num_blocks = self.number(raw, "num_blocks", least=1, most=MAX_BLOCKS)
        self.number(raw, "shard_blocks", least=shard_blocks(layout), most=shard_blocks(layout))
        model = self.table(raw, "model")
        rope = self.table(raw, "rope")
        tokenizer, template = (
            self.digest(raw, name) if raw.get(name) is not None else None
            for name in ("tokenizer_sha256", "chat_template_sha256")
        )
        documents = tuple(
            self.document(row, f"documents[{at}].", num_blocks) for at, row in enumerate(self.rows(raw, "documents"))
        )
        return Manifest(
            raw=raw,
            tool=self.text(raw, "tool"),
            model_name=self.text(model, "name", field="model."),
            weights_sha256=self.digest(model, "weights_sha256", field="model."),
            facts=ModelFacts(
                identity=self.text(model, "identity", field="model."),
                architecture=self.text(model, "architecture", field="model."),
                rope=rope,
                config=self.table(model, "config", field="model."),
                tokenizer_sha256=tokenizer,
                chat_template_sha256=template,
            ),
            adapter=self.text(model, "adapter", field="model."),
            layout=layout,
            num_blocks=num_blocks,
            documents=documents,
            runs=self.runs(self.rows(raw, "runs"), num_blocks, len(documents)),
            files=self.files(self.table(raw, "files"), layout, num_blocks),
            signatures=self.signatures(signatures),
        )

    def layout(self, given: Mapping[str, Any]) -> Layout:
        names = ("num_layers", "num_kv_heads", "head_dim", "block_tokens", "parts")
        sizes = {name: self.number(given, name, most=1 << 20, field="layout.") for name in names}
        try:
            layout = Layout(dtype=self.text(given, "dtype", field="layout."), **sizes)
        except LayoutError as error:
            raise self.wrong("layout", f"one that holds KV ({str(error)[:200]})") from None
        if layout.block_bytes > MAX_BLOCK_BYTES:
            raise self.wrong("layout", f"one of at most {MAX_BLOCK_BYTES:,} bytes a block")
        return layout

    def document(self, row: Mapping[str, Any], field: str, num_blocks: int) -> Document:
        return Document(
            name=self.text(row, "name", field=field),
            sha256=self.digest(row, "sha256", field=field),
            num_tokens=self.number(row, "num_tokens", most=1 << 31, field=field),
            num_characters=self.optional(row, "num_characters", most=MAX_CHARACTERS, field=field),
            num_blocks=self.number(row, "num_blocks", most=num_blocks, field=field),
            last=self.optional(row, "last", most=num_blocks - 1, field=field),
        )

    def runs(self, rows: Sequence[Mapping[str, Any]], num_blocks: int, num_documents: int) -> tuple[Stretch, ...]:
        runs, at = [], 0
        for number, row in enumerate(rows):
            field = f"runs[{number}]."
            run = Stretch(
                first=self.number(row, "first", most=num_blocks, field=field),
                num_blocks=self.number(row, "num_blocks", most=num_blocks, field=field),
                parent=self.optional(row, "parent", most=num_blocks, field=field),
                depth=self.number(row, "depth", most=num_blocks, field=field),
                document=self.number(row, "document", most=num_documents - 1, field=field),
                characters=self.characters(row.get("characters"), field),
            )
            if run.first != at or not run.num_blocks or (run.parent is not None and run.parent >= at):
                raise self.wrong(
                    field.removesuffix("."), "the rows after those of the run before, under a row before them"
                )
            at += run.num_blocks
            runs.append(run)
        if at != num_blocks:
            raise self.wrong("runs", f"{num_blocks} rows in all")
        return tuple(runs)

    def characters(self, given: object, field: str) -> tuple[int, int] | None:
        if given is None:
            return None
        if not isinstance(given, list) or len(given) != 2 or not all(type(at) is int for at in given):
            raise self.wrong(f"{field}characters", "two positions in a text, or null")
        if not 0 <= given[0] <= given[1] <= MAX_CHARACTERS:
            raise self.wrong(f"{field}characters", "two positions in a text, the first of them before the second")
        return given[0], given[1]

    def files(self, given: Mapping[str, Any], layout: Layout, num_blocks: int) -> dict[str, FileEntry]:
        if len(given) != (many := 1 + 2 * len(ARRAYS) - (-num_blocks // shard_blocks(layout))):  # before names are made
            raise self.wrong("files", f"those of {num_blocks} blocks of this layout: {many}, not {len(given)}")
        expected = expected_files(layout, num_blocks)
        if given.keys() != expected.keys():
            strange = sorted(given.keys() ^ expected.keys())[0]
            raise self.wrong("files", f"those of {num_blocks} blocks of this layout (see {strange[:80]!r})")
        entries = {}
        for name, size in expected.items():
            row = given[name]
            if not isinstance(row, dict):
                raise self.wrong(f"files[{name}]", "an object")
            most = MAX_METADATA_BYTES if size is None else size
            entry = FileEntry(
                self.number(row, "bytes", most=most, field=f"files[{name}]."),
                self.digest(row, "sha256", field=f"files[{name}]."),
            )
            if size is not None and entry.bytes != size:
                raise self.wrong(f"files[{name}].bytes", f"{size}")
            entries[name] = entry
        return entries

    def signatures(self, given: object) -> tuple[Signature, ...]:
        if not isinstance(given, list) or len(given) > MAX_SIGNATURES:
            raise self.wrong("signatures", f"a list of at most {MAX_SIGNATURES}")
        found = []
        for row in given:
            if not isinstance(row, dict) or row.get("algorithm") != "ed25519":
                raise self.wrong("signatures", "objects of algorithm ed25519")
            key, signature = (self.text(row, name, field="signatures[].") for name in ("public_key", "signature"))
            if not re.fullmatch(r"[0-9a-f]{64}", key) or not re.fullmatch(r"[0-9a-f]{128}", signature):
                raise self.wrong("signatures", "keys of 32 bytes and signatures of 64, in hex")
            found.append(Signature(key, signature))
        return tuple(found)
