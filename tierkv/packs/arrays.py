"""The arrays of a pack as zarr sees them, and the bytes of those that describe rows. zarr-python makes the metadata."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tierkv.layout import Layout
from tierkv.packs.manifest import shard_blocks

ZARR_DTYPES: Final = {"bfloat16": "uint16", "float8_e4m3": "uint8"}
"""What zarr has no name for is stored as bits of the same size; an attribute tells the dtype."""
_TITLES: Final = {
    "keys": "name of each block: the chained digest of its tokens and of all before",
    "parents": "row of the block before; -1 at the start of a prompt",
    "tokens": "token ids of each block",
    "spans": "document, first and end character of each block's text; -1 where there is none",
    "checksums": "xxh3-64 of each block, seeded with the first 8 bytes of its key",
    "digests": "SHA-256 of each block",
}
DTYPES: Final = {"keys": "|u1", "parents": "<i4", "tokens": "<i4", "spans": "<i8", "checksums": "<u8", "digests": "|u1"}


def widths(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Shape of a row, by array."""
    return {
        "keys": (32,),
        "parents": (),
        "tokens": (layout.block_tokens,),
        "spans": (3,),
        "checksums": (),
        "digests": (32,),
    }


def metadata(layout: Layout, num_blocks: int) -> dict[str, bytes]:
    """The zarr.json of every array, the same bytes each time."""
    import zarr  # a quarter of a second
    from zarr.storage import MemoryStore

    group = zarr.open_group(MemoryStore(), mode="w")
    options: dict[str, Any] = {  # values of many types, as zarr takes them
        "compressors": None,
        "filters": None,
        "fill_value": 0,
        "chunk_key_encoding": {"name": "default", "separator": "."},
    }
    arrays = {
        "blocks": group.create_array(
            "blocks",
            shape=(num_blocks, *layout.shape),
            chunks=(1, *layout.shape),
            shards={"shape": (shard_blocks(layout), *layout.shape), "index_location": "end"},  # type: ignore[arg-type]  # a TypedDict there
            dtype=ZARR_DTYPES.get(layout.dtype, layout.dtype),
            attributes={"dtype": layout.dtype, "axes": ["row", "layer", "part", "kv_head", "token", "dim"]},
            **options,
        )
    }
    for name, shape in widths(layout).items():
        arrays[name] = group.create_array(
            name,
            shape=(num_blocks, *shape),
            chunks=(num_blocks, *shape),
            dtype=np.dtype(DTYPES[name]),
            attributes={"about": _TITLES[name]},
            **options,
        )
    return {
        f"{name}/zarr.json": (
            json.dumps(array.metadata.to_dict(), sort_keys=True, indent=1, default=str) + "\n"
        ).encode()
        for name, array in arrays.items()
    }


def rows_of(name: str, data: bytes, layout: Layout) -> npt.NDArray[Any]:  # Any: of several dtypes
    """The rows of an array from its chunk."""
    return np.frombuffer(data, np.dtype(DTYPES[name])).reshape(-1, *widths(layout)[name])


def chunks_of(
    rows: Mapping[str, Sequence[Any] | npt.NDArray[Any]], layout: Layout
) -> dict[str, bytes]:  # Any: as above
    """The chunk of every array from its rows."""
    return {
        name: np.ascontiguousarray(rows[name], dtype=np.dtype(DTYPES[name])).reshape(-1, *shape).tobytes()
        for name, shape in widths(layout).items()
    }
