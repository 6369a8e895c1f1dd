"""The zarr v3 metadata of a disk folder: a group with an array of blocks and an array of the keys in its slots.

    zarr.json               group; attribute "tierkv" has the layout and its fingerprint
    blocks/zarr.json        [num_slots, *block], uncompressed, 64 slots a shard file: see disk_shards
    slot_keys/zarr.json     [num_slots, 32], written at checkpoints: a zarr reader tells live slots from stale ones by it

zarr-python makes it, so that it is what zarr readers expect; the bytes of blocks never pass through zarr.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tierkv.errors import ConfigError
from tierkv.layout import Layout
from tierkv.tiers.disk_files import Files, replace_file
from tierkv.tiers.disk_manifest import max_bytes
from tierkv.zarr_shards import ALIGNMENT, stride_of

SHARD_SLOTS: Final = 64
"""For the number of files; speed does not depend on it."""
_SHARD_EXTRA_BYTES: Final = 12 << 10
"""What the file system may keep for a shard file besides its data: a block of extents, its part of the folder."""
_FOLDER_BYTES: Final = 64 << 10
"""Folders, metadata files and their temporary copies, the lock: a block each."""
_ZARR_DTYPES: Final = {"bfloat16": "uint16", "float8_e4m3": "uint8"}
"""What zarr has no name for is stored as bits of the same size; an attribute tells the dtype."""


def num_slots_for(capacity_bytes: int, layout: Layout) -> int:
    """Most slots with which a folder stays under its capacity whatever happens. Raises ConfigError when that is none."""
    low, high = 0, max(0, capacity_bytes // stride_of(layout.block_bytes))
    while low < high:
        middle = (low + high + 1) // 2
        if folder_bytes_for(middle, layout) <= capacity_bytes:
            low = middle
        else:
            high = middle - 1
    if low < 1:
        raise ConfigError(
            f"disk.capacity = {capacity_bytes} bytes is too small: one block is {layout.block_bytes} bytes and the records of "
            f"a folder take the rest; give at least {folder_bytes_for(1, layout)}"
        )
    return low


def folder_bytes_for(num_slots: int, layout: Layout) -> int:
    """Bytes of disk that a folder of that many slots takes at worst: shards, manifest with its log, metadata, folders."""
    shards = -(-num_slots // SHARD_SLOTS)
    keys = -(-32 * num_slots // ALIGNMENT) * ALIGNMENT
    return (
        num_slots * stride_of(layout.block_bytes)
        + shards * (_SHARD_EXTRA_BYTES + ALIGNMENT)
        + max_bytes(num_slots, layout.block_tokens)
        + 2 * keys  # the array of keys is replaced, not overwritten
        + _FOLDER_BYTES
    )


def make_metadata(folder: Path, layout: Layout, num_slots: int, files: Files) -> None:
    """Create the zarr group of a new folder, or bring that of an old one to `num_slots`.

    Raises ConfigError for a folder of another layout, or with files that are not ours.
    """
    if refuse_strange(folder):
        _create(folder, layout, num_slots, ("blocks", "slot_keys"))
    _check(folder, layout)
    for name in ("blocks", "slot_keys"):
        path = folder / name / "zarr.json"
        array = _json(path)
        if array is None or "shape" not in array:
            files.unlink(path)
            _create(folder, layout, num_slots, (name,))
        elif array["shape"][0] != num_slots:
            array["shape"][0] = num_slots
            if name == "slot_keys":
                array["chunk_grid"]["configuration"]["chunk_shape"][0] = num_slots
            replace_file(files, path, json.dumps(array, indent=2).encode())


def refuse_strange(folder: Path) -> bool:
    """Tell whether a folder is still to be made. Raises ConfigError when it has files that are not ours."""
    group = _json(folder / "zarr.json")
    if group is not None and group.get("attributes") != {}:
        return False
    ours = ("lock", "blocks", "slot_keys", "zarr.json")
    strange = sorted(path.name for path in folder.iterdir() if path.name not in ours)
    if strange:
        raise ConfigError(
            f"folder {folder} holds other files ({', '.join(strange[:3])}): give an empty or a new one (disk.path)"
        )
    return True


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _create(folder: Path, layout: Layout, num_slots: int, names: Sequence[str]) -> None:
    import zarr  # a quarter of a second, once in the life of a folder

    group = zarr.open_group(folder, mode="a")
    options: dict[str, Any] = {  # values of many types, as zarr takes them
        "compressors": None,
        "filters": None,
        "fill_value": 0,
        "chunk_key_encoding": {"name": "default", "separator": "."},  # all shards in one folder: one to sync
    }
    if "blocks" in names:
        group.create_array(
            "blocks",
            shape=(num_slots, *layout.shape),
            chunks=(1, *layout.shape),
            shards={"shape": (SHARD_SLOTS, *layout.shape), "index_location": "end"},  # type: ignore[arg-type]  # a TypedDict there
            dtype=_ZARR_DTYPES.get(layout.dtype, layout.dtype),
            attributes={"dtype": layout.dtype, "axes": ["slot", "layer", "part", "kv_head", "token", "dim"]},
            **options,
        )
    if "slot_keys" in names:
        group.create_array("slot_keys", shape=(num_slots, 32), chunks=(num_slots, 32), dtype="uint8", **options)
    # Last: a group without this is no folder of ours yet, and is begun again.
    group.attrs["tierkv"] = {
        "format": 1,
        "layout": layout_fields(layout),
        "block_bytes": layout.block_bytes,
        "fingerprint": layout.fingerprint.hex(),
    }


def layout_fields(layout: Layout) -> dict[str, str | int]:
    """The fields of a layout by name, for attributes that people read."""
    names = ("num_layers", "parts", "num_kv_heads", "block_tokens", "head_dim", "dtype")
    return {name: getattr(layout, name) for name in names}


def read_about(folder: Path) -> dict[str, Any]:
    """What a folder says of itself. Raises ConfigError when it is no disk folder of tierkv."""
    try:
        about = (_json(folder / "zarr.json") or {})["attributes"]["tierkv"]
        return {name: about[name] for name in ("format", "layout", "block_bytes", "fingerprint")}
    except (KeyError, TypeError):
        raise ConfigError(
            f"folder {folder} is no disk folder of tierkv: give the folder of a disk tier (disk.path), or a new one"
        ) from None


def _check(folder: Path, layout: Layout) -> None:
    about = read_about(folder)
    if about["fingerprint"] != layout.fingerprint.hex():
        theirs = about["layout"]
        ours = layout_fields(layout)
        differ = [f"{name} {theirs.get(name)} not {ours[name]}" for name in ours if theirs.get(name) != ours[name]]
        raise ConfigError(
            f"disk folder {folder} holds blocks of another layout ({', '.join(differ) or 'another version'}): "
            "give another folder (disk.path), or delete this one"
        )
