"""What a pack is on the disk: zarr that any reader opens, the same bytes each time, and nothing else is taken for one."""

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.storage import ZipStore

from tests.pack_parts import (
    CHARACTERS,
    TINY,
    WIDE,
    blocks_in,
    files_of,
    group_of,
    keys_of,
    kv,
    make_pack,
    prompt,
)
from tierkv.errors import PackError
from tierkv.layout import Layout
from tierkv.packs.manifest import ATTRIBUTE, ROOT, own_digest, shard_blocks
from tierkv.packs.pack import open_pack
from tierkv.testing import SMALL
from tierkv.zarr_shards import ALIGNMENT, stride_of

FORMS = ("pack", "pack.zip")


@pytest.fixture(params=FORMS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


def opened(place: Path) -> Any:  # Any: a zarr group
    return zarr.open_group(ZipStore(place, mode="r") if place.suffix == ".zip" else place, mode="r")


# -- read by others ---------------------------------------------------------------------------------------------------------


def test_zarr_opens_a_pack_and_finds_every_array_as_it_was_meant(place: Path) -> None:
    one, two = prompt(1, 2) + prompt(2, 2), prompt(1, 5)
    make_pack(place, {"one": one, "two": two})
    group = opened(place)
    assert dict(group.attrs)[ATTRIBUTE]["num_blocks"] == 7
    shapes = {name: (array.shape, str(array.dtype)) for name, array in group.arrays()}
    assert shapes == {
        "blocks": ((7, *TINY.shape), "float32"),
        "checksums": ((7,), "uint64"),
        "digests": ((7, 32), "uint8"),
        "keys": ((7, 32), "uint8"),
        "parents": ((7,), "int32"),
        "spans": ((7, 3), "int64"),
        "tokens": ((7, 2), "int32"),
    }
    assert all(array.attrs["about"] for name, array in group.arrays() if name != "blocks")
    assert group["blocks"].attrs["axes"] == ["row", "layer", "part", "kv_head", "token", "dim"]
    assert group["parents"][:].tolist() == [-1, 0, 1, 2, 1, 4, 5]
    assert group["keys"][:].tobytes() == b"".join([*keys_of(one), *keys_of(two)[2:]])
    assert group["tokens"][:].tobytes() == one + two[16:]
    assert group["spans"][:].tolist() == [
        [int(row > 3), at * 2 * CHARACTERS, (at + 1) * 2 * CHARACTERS] for row, at in enumerate([0, 1, 2, 3, 2, 3, 4])
    ]
    for row, digest in enumerate(group["digests"][:]):
        assert hashlib.sha256(np.ascontiguousarray(group["blocks"][row]).tobytes()).digest() == digest.tobytes()


@pytest.mark.parametrize("layout", [TINY, SMALL, WIDE, Layout(1, 1, 24, "float8_e4m3", block_tokens=171)])
@pytest.mark.parametrize("more", [-63, -1, 0, 1])
def test_blocks_are_what_was_written_at_every_edge_of_a_shard(tmp_path: Path, layout: Layout, more: int) -> None:
    count = shard_blocks(layout) + more
    tokens = prompt(1, count, layout=layout, extra=1)
    place = make_pack(tmp_path / "pack", {"one": tokens}, layout=layout)
    rows = sorted({0, count // 2, count - 2, count - 1} & set(range(count)))
    expected = [kv(tokens, row, layout) for row in rows]
    assert blocks_in(place, rows) == expected
    with open_pack(place) as pack:
        outs = [bytearray(layout.block_bytes) for _ in range(count)]
        assert pack.read(range(count), [memoryview(out) for out in outs]) == [None] * count
    assert [bytes(outs[row]) for row in rows] == expected
    shards = sorted((place / "blocks").glob("c.*"))
    assert len(shards) == (2 if more > 0 else 1)
    last = count % shard_blocks(layout) or shard_blocks(layout)
    assert shards[-1].stat().st_size == last * stride_of(layout.block_bytes) + 16 * shard_blocks(layout) + 4


def test_dtypes_that_zarr_lacks_are_bits_of_their_size(place: Path) -> None:
    make_pack(place, {"one": prompt(1, 3, layout=WIDE)}, layout=WIDE)
    blocks = opened(place)["blocks"]
    assert blocks.dtype == np.uint16 and blocks.attrs["dtype"] == "bfloat16"
    assert np.ascontiguousarray(blocks[1]).tobytes() == kv(prompt(1, 3, layout=WIDE), 1, WIDE)


def test_shards_of_a_zip_begin_where_disks_like_it(tmp_path: Path) -> None:
    place = make_pack(tmp_path / "pack.zip", {"one": prompt(1, 66)})
    from tierkv.packs.files import ZipFiles, open_files

    with open_files(place) as files:
        assert isinstance(files, ZipFiles)
        offsets = [member.offset for name, member in files.members.items() if name.startswith("blocks/c.")]
    assert len(offsets) == 2 and all(offset % ALIGNMENT == 0 for offset in offsets)
    with zipfile.ZipFile(place) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_a_document_without_a_whole_block_or_text_is_listed_all_the_same(place: Path) -> None:
    make_pack(place, {"short": prompt(1, 0, extra=1), "one": prompt(2, 2)}, text=False)
    with open_pack(place) as pack:
        short, one = pack.manifest.documents
        assert (short.num_blocks, short.last, short.num_tokens) == (0, None, 1)
        assert (one.num_blocks, one.last, one.num_characters) == (2, 1, None)
        assert pack.manifest.runs[0].characters is None
        assert pack.array("spans").tolist() == [[1, -1, -1], [1, -1, -1]]


# -- the same bytes ---------------------------------------------------------------------------------------------------------


def test_two_writes_are_the_same_bytes(place: Path) -> None:
    documents = {"one": prompt(1, 70), "two": prompt(1, 3) + prompt(2, 1)}
    first = make_pack(place.with_name(f"first-{place.name}"), documents)
    second = make_pack(place, documents)
    assert files_of(first) == files_of(second)
    if place.suffix:
        assert first.read_bytes() == second.read_bytes()


def test_in_another_order_only_what_tells_of_documents_differs(place: Path) -> None:
    """Rows follow the tree, not the list: blocks keep their places, and documents keep the order in which they were given."""
    documents = {"one": prompt(1, 70), "two": prompt(1, 3) + prompt(2, 1), "three": prompt(3, 4)}
    first = files_of(make_pack(place.with_name(f"first-{place.name}"), documents))
    second = files_of(make_pack(place, dict(reversed(documents.items()))))
    assert {name for name in first if first[name] != second[name]} == {"zarr.json", "spans/c.0.0"}
    names = [
        [one["name"] for one in group_of(files)["attributes"][ATTRIBUTE]["documents"]] for files in (first, second)
    ]
    assert names[0] == list(documents) == names[1][::-1]


def test_the_format_is_the_one_that_was_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other digests here are another format: packs that are out there would not be read, or not be the same bytes."""
    monkeypatch.setattr("tierkv.packs.write.__version__", "golden")
    documents = {"one": prompt(1, 5), "two": prompt(1, 2, extra=1), "three": prompt(1, 3) + prompt(2, 63)}
    files = files_of(make_pack(tmp_path / "pack", documents))
    manifest = group_of(files)["attributes"][ATTRIBUTE]
    for name in list(manifest["files"]):
        if name.endswith("zarr.json"):  # zarr-python's words
            del manifest["files"][name]
    digests = {
        name: hashlib.sha256(data).hexdigest()[:16] for name, data in files.items() if not name.endswith(".json")
    }
    assert digests | {ROOT: own_digest(manifest)[:16]} == GOLDEN


GOLDEN = {
    "digests/c.0.0": "3474f08042e41d37",
    "parents/c.0": "fbb2ac032fc745ae",
    "spans/c.0.0": "a4f4bff39688a1ed",
    "blocks/c.0.0.0.0.0.0": "df7c97ccd39640b6",
    "blocks/c.1.0.0.0.0.0": "cb255c7d86335f1b",
    "keys/c.0.0": "a891b05626c31638",
    "tokens/c.0.0": "b489b1ac29dcf116",
    "checksums/c.0": "4d567a36931c1ea1",
    "zarr.json": "2c2db7a70f326c5c",
}


# -- what is not written ------------------------------------------------------------------------------------------------------


def test_what_would_not_be_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"documents\[0\]\.name"):
        make_pack(tmp_path / "pack", {"x" * 5000: prompt(1, 1)})
    huge = Layout(num_layers=1 << 14, num_kv_heads=1 << 10, head_dim=1 << 10, dtype="float32")
    with pytest.raises(PackError, match="bytes a block"):
        make_pack(tmp_path / "pack", {"one": prompt(1, 1, layout=huge)}, layout=huge)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FORMS)
def test_a_write_that_breaks_off_leaves_nothing(tmp_path: Path, name: str) -> None:
    def content(tokens: bytes, block: int, layout: Layout) -> bytes:
        if block == 65:
            raise PackError("a block that cannot be had")
        return kv(tokens, block, layout)

    with pytest.raises(PackError, match="cannot be had"):
        make_pack(tmp_path / name, {"one": prompt(1, 70)}, content=content)
    assert list(tmp_path.iterdir()) == []
