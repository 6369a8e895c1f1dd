"""Tiny packs without a model, whose KV is a function of tokens; and the tools of whoever changes one afterwards."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tierkv.facts import ModelFacts
from tierkv.keys import Key, Namespace, chain, token_bytes
from tierkv.layout import Layout
from tierkv.packs.archive import in_order, write_zip
from tierkv.packs.files import open_files
from tierkv.packs.manifest import ATTRIBUTE, OWN_DIGEST, ROOT, own_digest
from tierkv.packs.signing import make_key, read_private, sign
from tierkv.packs.write import Model, Source, Writer, rows_of, write
from tierkv.warm.plan import make_plan

TINY = Layout(num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32", block_tokens=2)
"""64 bytes a block."""
WIDE = Layout(num_layers=2, num_kv_heads=4, head_dim=8, dtype="bfloat16", block_tokens=4)
"""1,024 bytes a block, four heads."""
FACTS = ModelFacts(
    identity="test",
    architecture="LlamaForCausalLM",
    rope={"rope_theta": 10000.0},
    config={"num_hidden_layers": 1, "hidden_size": 64},
    tokenizer_sha256="1" * 64,
    chat_template_sha256="2" * 64,
)
SHARD = "blocks/c.0.0.0.0.0.0"
CHARACTERS = 3
"""Of a token's text, in documents that have text."""
Files = dict[str, bytes]


def prompt(number: int, num_blocks: int, *, layout: Layout = TINY, extra: int = 0) -> bytes:
    """Tokens of a prompt that shares no block with one of another number."""
    first = 1000 * number
    return token_bytes(list(range(first, first + num_blocks * layout.block_tokens + extra)))


def kv(tokens: bytes, block: int, layout: Layout = TINY) -> bytes:
    """A block's bytes: a function of all tokens up to its end, as KV is."""
    end = (block + 1) * layout.block_tokens * 4
    return hashlib.shake_256(tokens[:end]).digest(layout.block_bytes)


def keys_of(
    tokens: bytes, *, layout: Layout = TINY, model: str = "test", tenant: str = "", secret: bytes = b""
) -> list[Key]:
    """Names of a prompt's blocks in a namespace."""
    return chain(Namespace(model, layout, tenant=tenant).root(secret), tokens, block_tokens=layout.block_tokens)


def writer_of(
    documents: Mapping[str, bytes],
    *,
    layout: Layout = TINY,
    facts: ModelFacts = FACTS,
    adapter: str = "",
    text: bool = True,
    content: Callable[[bytes, int, Layout], bytes] = kv,
) -> Writer:
    """What `build` does once the blocks are there. documents: tokens by name."""
    step = layout.block_tokens
    plan = make_plan(list(documents.values()), block_tokens=step)
    rows = rows_of(plan, Namespace(facts.identity, layout, adapter=adapter).root())

    def read(numbers: Sequence[int], views: Sequence[memoryview]) -> None:
        for row, view in zip(numbers, views, strict=True):
            document, number = rows.paths[row]
            view[:] = content(plan.paths[document], number, layout)

    def span(number: int) -> tuple[int, int] | None:
        return (number * step * CHARACTERS, (number + 1) * step * CHARACTERS) if text else None

    sources = [
        Source(
            name,
            hashlib.sha256(tokens).hexdigest(),
            len(tokens) // 4,
            len(tokens) // 4 * CHARACTERS if text else None,
            span,
        )
        for name, tokens in documents.items()
    ]
    model = Model("tiny", "3" * 64, facts, layout, adapter)
    return Writer(model, plan, rows, sources, read, built={"device": "cpu"})


def make_pack(out: Path, documents: Mapping[str, bytes], **options: Any) -> Path:
    """Write a pack; options as in `writer_of`."""
    write(out, writer_of(documents, **options))
    return out


def make_keys(folder: Path, name: str = "key") -> tuple[Path, str]:
    """A private key's file, and its public key."""
    path = folder / f"{name}.pem"
    return path, make_key(path)


# -- whoever changes a pack -------------------------------------------------------------------------------------------------


def files_of(place: Path) -> Files:
    """Every file of a pack."""
    with open_files(place) as files:
        sizes = files.sizes()
        assert sizes is not None
        return {name: files.read(name, most=size) for name, size in sizes.items()}


def put(place: Path, files: Files) -> Path:
    """Write files as they are: a zip where the name says so."""
    if place.suffix == ".zip":
        write_zip(place, [(name, len(files[name]), [files[name]]) for name in in_order(files)])
        return place
    for name, data in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    return place


def changed(place: Path, change: Callable[[Files], None]) -> Path:
    """Change the files of a pack where it lies."""
    files = files_of(place)
    change(files)
    return put(place, files)


def group_of(files: Files) -> dict[str, Any]:
    """The root zarr.json."""
    return dict(json.loads(files[ROOT]))


def set_manifest(files: Files, change: Callable[[dict[str, Any]], None], *, sealed: bool = True) -> None:
    """Change a manifest. sealed: its own digest with it, as whoever knows the format would."""
    group = group_of(files)
    manifest = group["attributes"][ATTRIBUTE]
    change(manifest)
    if sealed:
        group["attributes"][OWN_DIGEST] = own_digest(manifest)
    files[ROOT] = (json.dumps(group, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def seal(files: Files) -> None:
    """Let the manifest say what the other files are: all that can be done without a key."""

    def tell(manifest: dict[str, Any]) -> None:
        manifest["files"] = {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
            if name != ROOT
        }

    set_manifest(files, tell)


def flip(data: bytes, at: int) -> bytes:
    """One bit changed."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def swapped(data: bytes, one: int, other: int, size: int) -> bytes:
    """Two parts of `size` bytes, at places one and other, changed about."""
    parts = bytearray(data)
    parts[one : one + size], parts[other : other + size] = data[other : other + size], data[one : one + size]
    return bytes(parts)


def signed(place: Path, key: Path) -> Path:
    """Sign a pack with one more key."""
    from tierkv.packs.pack import read_manifest
    from tierkv.packs.write import sign_in_place

    with open_files(place) as files:
        manifest = read_manifest(files)
    sign_in_place(place, manifest.raw, [*manifest.signatures, sign(manifest.raw, read_private(key))])
    return place


def other_facts(**fields: Any) -> ModelFacts:
    """Another model, but for these."""
    return replace(FACTS, **({"identity": "other"} | fields))


def blocks_in(place: Path, rows: Sequence[int]) -> list[bytes]:
    """Blocks as zarr-python reads them."""
    import zarr
    from zarr.storage import ZipStore

    store = ZipStore(place, mode="r") if place.suffix == ".zip" else place
    blocks = zarr.open_group(store, mode="r")["blocks"]
    return [np.ascontiguousarray(blocks[row]).tobytes() for row in rows]
