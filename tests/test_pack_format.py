"""What a pack is on the disk: zarr that any reader opens, the same bytes each time, and nothing else is taken for one."""

import contextlib
import hashlib
import json
import os
import resource
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.storage import ZipStore

from tests.pack_parts import (
    CHARACTERS,
    FACTS,
    SHARD,
    TINY,
    WIDE,
    Files,
    blocks_in,
    files_of,
    group_of,
    keys_of,
    kv,
    make_pack,
    prompt,
    put,
    seal,
    set_manifest,
)
from tierkv.errors import PackError
from tierkv.layout import Layout
from tierkv.packs.archive import in_order
from tierkv.packs.manifest import ATTRIBUTE, MAX_ROOT_BYTES, OWN_DIGEST, ROOT, own_digest, read_root, shard_blocks
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


# -- not a pack -------------------------------------------------------------------------------------------------------------


def root_of(change: Callable[[dict[str, Any]], None]) -> bytes:
    """The root of a small pack, changed and sealed again."""
    files = dict(PLAIN)
    set_manifest(files, change)
    return files[ROOT]


@pytest.fixture(scope="module", autouse=True)
def plain(tmp_path_factory: pytest.TempPathFactory) -> None:
    PLAIN.update(
        files_of(make_pack(tmp_path_factory.mktemp("plain") / "pack", {"one": prompt(1, 3), "two": prompt(2, 2)}))
    )


PLAIN: Files = {}


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "no pack"),
        (b"\xff\xfe\x00", "no pack"),
        (b"[]", "no pack"),
        (b'"text"', "no pack"),
        (b"{}", "no pack"),
        (b'{"attributes": []}', "no pack"),
        (b'{"attributes": {"tierkv_pack": []}}', "no object"),
        (b'{"attributes": {"tierkv_pack": "text"}}', "no object"),
        (b'{"attributes": {"tierkv_pack": {"format": 1}}}', "was changed"),
        (b'{"attributes": {"tierkv_pack": {"format": 2}}}', "pack of format 2, this version reads format 1"),
        (b'{"attributes": {"tierkv_pack": {"format": true}}}', "pack of format True"),
        (b'{"attributes": {"tierkv_pack": {"format": "' + b"9" * 100_000 + b'"}}}', "pack of format '9"),
        (b'{"attributes": {"tierkv_pack": {"a": [' + b"{}," * 3_000_000 + b'0]}}}', "more than 4,194,304 values"),
        (b'{"attributes": {"tierkv_pack": {"a": NaN}}}', "no pack"),
        (b'{"attributes": {"tierkv_pack": {"a": 1e999}}}', "no pack"),
        (b'{"attributes": {"tierkv_pack": {"a": "\\ud800"}}}', "no pack"),
        (b'{"attributes": {"tierkv_pack": {"a": ' + b"1" * 100_000 + b"}}}", "no pack"),
        (b'{"attributes": {"tierkv_pack": ' + b"[" * 500_000 + b"]" * 500_000 + b"}}", "no pack"),
        (b'{"attributes": {"tierkv_pack": {"format": 1}, "tierkv_pack": {"format": 1}}}', "twice"),
        (b'{"attributes": {"tierkv_pack": {"format": 1, "format": 1}}}', "twice"),
    ],
)
def test_what_is_no_root_of_a_pack_is_refused_in_a_few_words(data: bytes, match: str) -> None:
    with pytest.raises(PackError, match=match) as raised:
        read_root(data, place="here")
    assert str(raised.value).startswith("here: ") and len(str(raised.value)) < 300


def put_at(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        at: Any = manifest
        *steps, last = [int(step) if step.isdigit() else step for step in path.split("|")]
        for step in steps:
            at = at[step]
        at[last] = value

    return change


BAD_FIELDS = [
    ("tool", 5), ("tool", "x" * 5000), ("model", []), ("model|name", None), ("model|identity", {}), ("model|adapter", None),
    ("model|architecture", 1), ("model|config", []), ("model|weights_sha256", "3" * 63), ("model|weights_sha256", "G" * 64),
    ("rope", None), ("tokenizer_sha256", "x"), ("chat_template_sha256", 5), ("layout", None), ("layout|dtype", "complex"),
    ("layout|num_layers", 0), ("layout|num_layers", 1.0), ("layout|num_layers", True), ("layout|parts", 3),
    ("layout|head_dim", 1 << 30), ("layout|block_tokens", -1), ("fingerprint", "0" * 32), ("fingerprint", None),
    ("codec", "lz4"), ("num_blocks", 0), ("num_blocks", 4), ("num_blocks", 6), ("num_blocks", 10**9), ("num_blocks", 1 << 28),
    ("num_blocks", -1), ("num_blocks", 5.0), ("num_blocks", "5"), ("num_blocks", 10**300), ("shard_blocks", 63),
    ("shard_blocks", 64.0), ("documents", {}), ("documents", [1]), ("documents", []), ("documents|0|name", 1),
    ("documents|0|name", "x" * 5000), ("documents|0|sha256", ""), ("documents|0|num_tokens", -1),
    ("documents|0|num_tokens", 1 << 40), ("documents|0|num_characters", "9"), ("documents|0|num_blocks", 6),
    ("documents|0|last", 5), ("documents|0|last", -1), ("runs", None), ("runs", []), ("runs|0|first", 1),
    ("runs|0|num_blocks", 0), ("runs|0|num_blocks", 1), ("runs|1|parent", 3), ("runs|1|parent", 4), ("runs|1|depth", -1),
    ("runs|1|document", 2), ("runs|0|characters", [1]), ("runs|0|characters", [-1, 2]), ("runs|0|characters", ["a", "b"]),
    ("runs|0|characters", [9, 3]), ("files", []), ("files", {}), ("files|keys/c.0.0", []), ("files|keys/c.0.0|bytes", 159),
    ("files|keys/c.0.0|bytes", 161), ("files|keys/c.0.0|sha256", "x"), ("files|keys/zarr.json|bytes", 1 << 30),
    ("files|../secret", {"bytes": 1, "sha256": "0" * 64}), ("files|/etc/passwd", {"bytes": 1, "sha256": "0" * 64}),
    ("files|zarr.json", {"bytes": 1, "sha256": "0" * 64}), (f"files|{SHARD}|bytes", 5 * ALIGNMENT),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), BAD_FIELDS, ids=[f"{path}={str(value)[:12]}" for path, value in BAD_FIELDS])
def test_a_wrong_field_is_named_even_by_who_seals_the_manifest_again(path: str, value: object) -> None:
    with pytest.raises(PackError) as raised:
        read_root(root_of(put_at(path, value)), place="here")
    assert path.partition("|")[0].removesuffix("s") in str(raised.value) or path.startswith("num_blocks")
    assert len(str(raised.value)) < 400


def test_a_field_that_is_missing_is_named() -> None:
    manifest = group_of(PLAIN)["attributes"][ATTRIBUTE]
    for name in manifest.keys() - {"built", "tokenizer_sha256", "chat_template_sha256"}:
        with pytest.raises(PackError, match=name if name != "format" else "format None"):
            read_root(root_of(lambda given, name=name: given.pop(name)), place="here")  # type: ignore[misc]


def test_an_edit_without_its_digest_is_found_in_every_field() -> None:
    manifest = group_of(PLAIN)["attributes"][ATTRIBUTE]
    for name in manifest.keys() - {"format"}:
        files = dict(PLAIN)
        set_manifest(files, lambda given, name=name: given.update({name: "edited"}), sealed=False)  # type: ignore[misc]
        with pytest.raises(PackError, match=f"not what {OWN_DIGEST} says"):
            read_root(files[ROOT], place="here")


@pytest.mark.parametrize(
    "signatures",
    [
        None, {}, "text", [1], [{}], [{"algorithm": "rsa", "public_key": "0" * 64, "signature": "0" * 128}],
        [{"algorithm": "ed25519", "public_key": "0" * 63, "signature": "0" * 128}],
        [{"algorithm": "ed25519", "public_key": "0" * 64, "signature": "\ud800" * 128}],
        [{"algorithm": "ed25519", "public_key": "0" * 64, "signature": 5}],
        [{"algorithm": "ed25519", "public_key": "0" * 64, "signature": "0" * 128}] * 17,
    ],
)  # fmt: skip
def test_signatures_of_another_form_are_refused(signatures: object) -> None:
    group = group_of(PLAIN)
    group["attributes"]["signatures"] = signatures
    with pytest.raises(PackError, match="signatures"):
        read_root(json.dumps(group).encode(), place="here")


def test_a_huge_layout_or_number_of_blocks_costs_no_memory_and_no_time() -> None:
    """A manifest of a kilobyte must not ask for names of 268 million files, or for a buffer of a block of 2^60 bytes."""

    def many(manifest: dict[str, Any]) -> None:
        manifest["num_blocks"] = 1 << 28
        manifest["runs"] = [{"first": 0, "num_blocks": 1 << 28, "parent": None, "depth": 0, "document": 0}]

    def large(manifest: dict[str, Any]) -> None:
        sizes = {
            "num_layers": 1 << 20,
            "num_kv_heads": 1 << 20,
            "head_dim": 1 << 20,
            "block_tokens": 1 << 20,
            "parts": 2,
        }
        layout = Layout(dtype="float32", **sizes)
        manifest["layout"] = {**sizes, "dtype": "float32"}
        manifest["fingerprint"], manifest["shard_blocks"] = layout.fingerprint.hex(), shard_blocks(layout)

    for change in (many, large):
        data = root_of(change)
        began = time.monotonic()
        tracemalloc.start()
        try:
            with pytest.raises(PackError):
                read_root(data, place="here")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 4 << 20 and time.monotonic() - began < 5


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**18)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../x", "/etc/passwd", "\ud800", "0" * 64, "keys/c.0.0", 1 << 28, 10**9, -1, 0, 5, True]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
TRIED = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def reads_or_refuses(data: bytes) -> None:
    try:
        manifest = read_root(data, place="here")
    except PackError as error:
        assert len(str(error)) < 1000
        str(error).encode()  # whatever is shown can be printed
    else:
        assert manifest.num_blocks > 0 and manifest.files


@TRIED
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(PackError):
        read_root(data, place="here")


@TRIED
@given(st.data())
def test_a_root_with_bytes_changed_is_read_or_refused(data: st.DataObject) -> None:
    root = bytearray(PLAIN[ROOT])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(root)))
        root[at : at + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
    reads_or_refuses(bytes(root))


def paths_in(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield before
    for name, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from paths_in(inner, (*before, name))


@TRIED
@given(st.data())
def test_a_manifest_with_any_value_anywhere_is_read_or_refused(data: st.DataObject) -> None:
    group = group_of(PLAIN)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(paths_in(group))))
        at = group
        for step in path[:-1]:
            at = at[step]
        if path:
            at[path[-1]] = data.draw(JSON)
    manifest = group.get("attributes", {}).get(ATTRIBUTE) if isinstance(group.get("attributes"), dict) else None
    if isinstance(manifest, dict):
        with contextlib.suppress(ValueError):  # that has no form that could be signed
            group["attributes"][OWN_DIGEST] = own_digest(manifest)
    reads_or_refuses(json.dumps(group).encode())


# -- opening ----------------------------------------------------------------------------------------------------------------


def test_a_root_of_a_terabyte_is_refused_before_it_is_read(tmp_path: Path) -> None:
    place = put(tmp_path / "pack", PLAIN)
    with (place / ROOT).open("wb") as file:
        file.truncate(1 << 40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PackError, match=f"at most {MAX_ROOT_BYTES}"):
        open_pack(place)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10


def test_an_array_of_a_terabyte_is_refused_before_it_is_read(tmp_path: Path) -> None:
    place = put(tmp_path / "pack", PLAIN)
    with (place / "tokens/c.0.0").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(PackError, match=r"tokens/c\.0\.0 has 1099511627776 bytes"):
        open_pack(place)


@pytest.mark.parametrize("name", ["zarr.json", "keys/c.0.0", "tokens/c.0.0", "checksums/c.0"])
@pytest.mark.parametrize("kind", ["link", "folder link", "pipe", "folder", "gone"])
def test_what_is_no_file_of_the_pack_itself_is_not_followed(tmp_path: Path, name: str, kind: str) -> None:
    place = put(tmp_path / "pack", PLAIN)
    outside = tmp_path / "outside"
    put(outside, PLAIN)
    (place / name).unlink()
    if kind == "link":
        (place / name).symlink_to(outside / name)
    elif kind == "folder link" and "/" in name:
        (place / name).parent.rename(tmp_path / "aside")
        (place / name).parent.symlink_to(outside / Path(name).parent)
    elif kind == "pipe":
        os.mkfifo(place / name)
    elif kind == "folder":
        (place / name).mkdir()
    with pytest.raises(PackError):
        open_pack(place)


def test_a_link_for_a_shard_is_a_block_that_cannot_be_read(tmp_path: Path) -> None:
    place, outside = put(tmp_path / "pack", PLAIN), tmp_path / "shard"
    (place / SHARD).rename(outside)
    (place / SHARD).symlink_to(outside)
    with open_pack(place) as pack:
        (wrong,) = pack.read([0], [memoryview(bytearray(TINY.block_bytes))])
        assert wrong and not wrong.broken and "links are not followed" in wrong.why


def zipped(
    path: Path, files: Files, *, compression: int = zipfile.ZIP_STORED, extra: tuple[str, bytes] | None = None
) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in in_order(files):
            archive.writestr(name, files[name])
        if extra:
            archive.writestr(*extra)
    return path


def test_a_zip_that_others_stored_is_a_pack_too(tmp_path: Path) -> None:
    place = zipped(tmp_path / "pack.zip", PLAIN)
    with open_pack(place) as pack:
        assert pack.read([4], [memoryview(bytearray(TINY.block_bytes))]) == [None]


def test_archives_that_unpack_to_more_than_they_are_are_refused(tmp_path: Path) -> None:
    bomb = PLAIN | {"tokens/c.0.0": bytes(100 << 20)}
    place = zipped(tmp_path / "pack.zip", bomb, compression=zipfile.ZIP_DEFLATED)
    assert place.stat().st_size < 1 << 20
    with pytest.raises(PackError, match="is compressed"):
        open_pack(place)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "Keys/c.0.0", "keys\\c", "a/b/c/d", "ü"])
def test_archives_with_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(PackError, match="member"):
        open_pack(zipped(tmp_path / "pack.zip", PLAIN, extra=(name, b"x")))
    assert not (tmp_path / "outside").exists()


def test_members_that_lie_over_each_other_are_refused(tmp_path: Path) -> None:
    place = zipped(tmp_path / "pack.zip", PLAIN)
    data = bytearray(place.read_bytes())
    with zipfile.ZipFile(place) as archive:
        first, second = archive.infolist()[1:3]
    start = data.find(b"PK\1\2")
    at = data.find(second.filename.encode(), start) - 46
    assert data[at : at + 4] == b"PK\1\2"
    data[at + 42 : at + 46] = first.header_offset.to_bytes(4, "little")
    place.write_bytes(data)
    with pytest.raises(PackError):
        open_pack(place)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_archives_that_are_cut_short_are_refused(tmp_path: Path, share: float) -> None:
    place = zipped(tmp_path / "pack.zip", PLAIN)
    os.truncate(place, int(place.stat().st_size * share))
    with pytest.raises(PackError):
        open_pack(place)


def test_a_parent_that_comes_after_its_child_or_is_itself_is_refused(tmp_path: Path) -> None:
    for number, parents in enumerate(([0, 0, 1, -1, 3], [1, 0, 1, -1, 3], [-1, 0, 1, -1, 5], [-2, 0, 1, -1, 3])):
        files = PLAIN | {"parents/c.0": np.array(parents, "<i4").tobytes()}
        seal(files)
        with pytest.raises(PackError, match="comes before its parent"):
            open_pack(put(tmp_path / f"pack{number}", files))


@pytest.mark.parametrize("name", ["keys/c.0.0", "tokens/c.0.0"])
def test_a_key_that_is_not_that_of_its_tokens_is_refused_even_sealed(tmp_path: Path, name: str) -> None:
    files = dict(PLAIN)
    files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
    with pytest.raises(PackError, match=r"not what the manifest says \(SHA-256\)"):
        open_pack(put(tmp_path / "changed", files))
    seal(files)
    with pytest.raises(PackError, match="row 4 has a key that is not that of its tokens"):
        open_pack(put(tmp_path / "sealed", files))


def test_another_models_name_is_refused_even_sealed(tmp_path: Path) -> None:
    """The model is part of every key: a pack cannot be passed off as another model's by editing its manifest."""
    for path, value in (("model|identity", "another"), ("model|adapter", "lora")):
        files = dict(PLAIN)
        set_manifest(files, put_at(path, value))
        with pytest.raises(PackError, match="row 0 has a key that is not that of its tokens"):
            open_pack(put(tmp_path / value, files))


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
    assert FACTS.identity == "test"
