"""Whoever changes a pack is found out: by accident, with knowledge of the format, and with a key of his own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pack_parts import (
    SHARD,
    Files,
    changed,
    files_of,
    flip,
    group_of,
    keys_of,
    make_keys,
    make_pack,
    prompt,
    put,
    seal,
    set_manifest,
    signed,
    swapped,
)
from tierkv.errors import PackError
from tierkv.packs.manifest import ROOT
from tierkv.packs.pack import checksum, open_pack
from tierkv.packs.verify import MOST_FINDINGS, Verified, verify
from tierkv.zarr_shards import ALIGNMENT, shard_index

SECOND = SHARD.replace("c.0", "c.1", 1)
DOCUMENTS = {"one": prompt(1, 66), "two": prompt(1, 3) + prompt(2, 2)}
ROWS = 68
Change = Callable[[Files], None]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return files_of(make_pack(tmp_path_factory.mktemp("verify") / "pack", DOCUMENTS))


@pytest.fixture(params=["pack", "pack.zip"])
def place(request: pytest.FixtureRequest, tmp_path: Path, pack: Files) -> Path:
    return put(tmp_path / str(request.param), pack)


def found(place: Path, **options: Any) -> dict[str, str]:
    """Findings by where they are; each must be told once, and so must be a row."""
    result = verify(place, **options)
    told = [one.where if one.where.startswith("row ") else one for one in result.findings]
    assert len(set(told)) == len(told)
    return {one.where: one.what for one in reversed(result.findings)}


def edit(name: str, change: Callable[[bytes], bytes]) -> Change:
    return lambda files: files.update({name: change(files[name])})


def test_a_sound_pack_has_nothing_to_be_found_and_every_byte_is_looked_at(place: Path) -> None:
    seen: list[int] = []
    result: Verified = verify(place, progress=seen.append)
    assert result.findings == () and result.signers == ()
    assert (result.num_blocks, result.num_bytes) == (ROWS, sum(seen))
    assert result.num_bytes == sum(len(data) for name, data in files_of(place).items() if name != ROOT)


# -- by accident ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 17, 63, 64, 67])
def test_a_flipped_byte_names_its_row(place: Path, row: int) -> None:
    name, at = (SHARD, row) if row < 64 else (SECOND, row - 64)
    changed(place, edit(name, lambda data: flip(data, at * ALIGNMENT + 63)))
    assert found(place) == {
        name: "other bytes than those of the manifest (SHA-256)",
        f"row {row}": "other bytes than its digest says",
    }


def test_blocks_that_changed_places_are_both_named(place: Path) -> None:
    changed(place, edit(SHARD, lambda data: swapped(data, 3 * ALIGNMENT, 5 * ALIGNMENT, 64)))
    names = found(place)
    assert names["row 3"] == "the block of row 5: they changed places"
    assert names["row 5"] == "the block of row 3: they changed places"
    assert len(names) == 3


def test_blocks_that_changed_places_between_shards_are_both_named(place: Path) -> None:
    def change(files: Files) -> None:
        one, other = files[SHARD][:64], files[SECOND][:64]
        files[SHARD], files[SECOND] = other + files[SHARD][64:], one + files[SECOND][64:]

    changed(place, change)
    names = found(place)
    assert names["row 0"] == "the block of row 64: they changed places"
    assert names["row 64"] == "the block of row 0: they changed places"


@pytest.mark.parametrize("array", ["keys", "parents", "tokens", "spans", "checksums", "digests"])
def test_a_flipped_byte_in_any_array_names_the_array(place: Path, array: str) -> None:
    name = next(name for name in files_of(place) if name.startswith(f"{array}/c."))
    changed(place, edit(name, lambda data: flip(data, len(data) // 2)))
    names = found(place)
    assert names[name] == "other bytes than those of the manifest (SHA-256)"
    assert not any(where.startswith("row ") for where in names)  # blocks are not blamed for it


def test_a_flipped_byte_in_what_zarr_reads_names_the_file(place: Path) -> None:
    for name in [name for name in files_of(place) if name.endswith("/zarr.json")]:
        before = files_of(place)[name]
        changed(place, edit(name, lambda data: data.replace(b"64", b"65") if b"64" in data else data + b" "))
        if files_of(place)[name] != before:
            assert name in found(place)
        changed(place, lambda files, name=name, before=before: files.update({name: before}))  # type: ignore[misc]
    assert found(place) == {}


@pytest.mark.parametrize("at", [64, ALIGNMENT - 1, 64 * ALIGNMENT, -1])
def test_padding_and_index_are_looked_at_too(place: Path, at: int) -> None:
    changed(place, edit(SHARD, lambda data: flip(data, at % len(data))))
    names = found(place)
    assert SHARD in names and not any(where.startswith("row ") for where in names)
    with open_pack(place) as pack:  # none of it is what blocks are read by
        assert pack.read([0, 1, 63], [memoryview(bytearray(64)) for _ in range(3)]) == [None] * 3


@pytest.mark.parametrize("name", [SHARD, SECOND, "keys/c.0.0", "digests/c.0.0", "spans/c.0.0", "blocks/zarr.json"])
@pytest.mark.parametrize("how", ["gone", "empty", "shorter", "longer"])
def test_files_that_are_gone_cut_or_grown_are_named(tmp_path: Path, pack: Files, name: str, how: str) -> None:
    files = dict(pack)
    if how == "gone":
        del files[name]
    else:
        files[name] = {"empty": b"", "shorter": files[name][:-1], "longer": files[name] + b"\0"}[how]
    for place in (tmp_path / "pack", tmp_path / "pack.zip"):
        names = found(put(place, files))
        assert name in names or any(name in what for what in names.values())


def test_files_that_nobody_listed_are_named(place: Path) -> None:
    changed(place, lambda files: files.update({"blocks/c.2.0.0.0.0.0": b"more", "readme": b"text"}))
    assert found(place).keys() == {"blocks/c.2.0.0.0.0.0", "readme"}


def test_of_a_pack_that_is_all_wrong_a_hundred_findings_are_told(tmp_path: Path) -> None:
    place = make_pack(tmp_path / "pack", {"one": prompt(1, 150)})
    files = files_of(place)
    for name in [name for name in files if name.startswith("blocks/c.")]:
        files[name] = bytes(len(files[name]))
    assert len(verify(put(place, files)).findings) == MOST_FINDINGS


@pytest.mark.parametrize("form", ["space", "order", "node_type", "more"])
def test_a_root_that_says_more_than_its_manifest_is_found(place: Path, form: str) -> None:
    """Such a pack opens, since all that is believed is sealed; other readers may believe more."""

    def change(files: Files) -> None:
        files[ROOT] = {
            "space": files[ROOT] + b" ",
            "order": files[ROOT].replace(b'"zarr_format": 3', b'"zarr_format":  3'),
            "node_type": files[ROOT].replace(b'"node_type": "group"', b'"node_type": "array"'),
            "more": files[ROOT].replace(b'"attributes": {', b'"attributes": {"more": 1, '),
        }[form]

    changed(place, change)
    open_pack(place).close()
    assert found(place).keys() == {ROOT}


def test_where_there_is_no_manifest_nothing_can_be_said(place: Path, tmp_path: Path) -> None:
    changed(place, lambda files: set_manifest(files, lambda given: given.update(tool="me"), sealed=False))
    with pytest.raises(PackError, match="its manifest was changed"):
        verify(place)
    with pytest.raises(PackError, match="no pack at"):
        verify(tmp_path / "absent")


# -- with knowledge of the format, without a key ---------------------------------------------------------------------------


def swap_consistently(files: Files) -> None:
    """Two blocks change places together with everything that is said of them."""
    files[SHARD] = swapped(files[SHARD], 3 * ALIGNMENT, 5 * ALIGNMENT, 64)
    files["digests/c.0.0"] = swapped(files["digests/c.0.0"], 3 * 32, 5 * 32, 32)
    keys = files["keys/c.0.0"]
    sums = np.frombuffer(files["checksums/c.0"], "<u8").copy()
    for row in (3, 5):
        block = files[SHARD][row * ALIGNMENT :][:64]
        sums[row] = checksum(block, keys[row * 32 : (row + 1) * 32])
    files["checksums/c.0"] = sums.tobytes()
    seal(files)


def test_only_a_signature_or_the_model_finds_blocks_that_lie_consistently(place: Path, tmp_path: Path) -> None:
    """What the right KV of some tokens is, the model alone knows: without it, somebody has to vouch for the pack."""
    key, public = make_keys(tmp_path)
    signed(place, key)
    changed(place, swap_consistently)
    assert "not over this manifest" in found(place)["signature"] and len(found(place)) == 1
    with pytest.raises(PackError, match="not over this manifest"):
        open_pack(place)
    changed(place, lambda files: files.update({ROOT: without_signatures(files)}))
    assert found(place) == {}  # nobody vouched, and nobody is found out
    assert "not signed; this configuration demands" in found(place, trusted=[public])["signature"]


def without_signatures(files: Files) -> bytes:
    group = group_of(files)
    group["attributes"]["signatures"] = []
    return (json.dumps(group, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def test_digests_that_were_swapped_alone_are_found_by_the_blocks(place: Path) -> None:
    def change(files: Files) -> None:
        files["digests/c.0.0"] = swapped(files["digests/c.0.0"], 3 * 32, 5 * 32, 32)
        seal(files)

    changed(place, change)
    assert found(place).keys() == {"row 3", "row 5"}


def test_a_checksum_that_is_not_its_blocks_is_found_though_the_digest_is_right(place: Path) -> None:
    def change(files: Files) -> None:
        files["checksums/c.0"] = flip(files["checksums/c.0"], 8 * 7)
        seal(files)

    changed(place, change)
    assert found(place) == {"row 7": "a checksum that is not its block's, though the digest is"}


def test_tokens_are_found_by_their_keys(place: Path) -> None:
    changed(place, lambda files: (files.update({"tokens/c.0.0": flip(files["tokens/c.0.0"], 40)}), seal(files)))  # type: ignore[func-returns-value]
    assert found(place)["manifest"].endswith(
        "row 5 has a key that is not that of its tokens: it was changed; fetch the pack again"
    )


def test_tokens_changed_with_their_keys_are_found_by_the_signature_alone(place: Path, tmp_path: Path) -> None:
    """Seals and keys are made anew, also the checksums, which are seeded with them: then this is another, unsigned pack."""
    key, _ = make_keys(tmp_path)
    signed(place, key)

    def change(files: Files) -> None:
        row = ROWS - 1
        tokens = flip(files["tokens/c.0.0"], row * 8)
        path, parents = [row], np.frombuffer(files["parents/c.0"], "<i4")
        assert row not in parents  # no other key hangs on it
        while parents[path[0]] >= 0:
            path.insert(0, int(parents[path[0]]))
        whole = b"".join(tokens[at * 8 : at * 8 + 8] for at in path)
        name = keys_of(whole)[-1]
        files["tokens/c.0.0"] = tokens
        files["keys/c.0.0"] = files["keys/c.0.0"][: row * 32] + name + files["keys/c.0.0"][(row + 1) * 32 :]
        sums = np.frombuffer(files["checksums/c.0"], "<u8").copy()
        sums[row] = checksum(files[SECOND][(row - 64) * ALIGNMENT :][:64], name)
        files["checksums/c.0"] = sums.tobytes()

    changed(place, change)
    assert {"keys/c.0.0", "tokens/c.0.0", "checksums/c.0"} <= found(place).keys()
    changed(place, seal)
    names = found(place)
    assert "not over this manifest" in names["signature"] and len(names) == 1


def test_an_index_for_zarr_readers_that_points_elsewhere_is_found_even_sealed(place: Path) -> None:
    def change(files: Files) -> None:
        index = shard_index(4, 64, 64)
        assert files[SECOND].endswith(index)
        files[SECOND] = files[SECOND][: -len(index)] + shard_index(3, 64, 64)
        seal(files)

    changed(place, change)
    assert found(place) == {SECOND: "an index for zarr readers that is not that of its blocks"}


def test_arrays_in_the_words_of_another_zarr_are_sound(place: Path) -> None:
    """A pack outlives versions: spaces, the order of names and what is new in them are not what it is judged by."""

    def change(files: Files) -> None:
        for name in [name for name in files if name.endswith("/zarr.json")]:
            told = json.loads(files[name])
            told.pop("storage_transformers", None)
            files[name] = json.dumps(dict(reversed(told.items())) | {"consolidated_metadata": None}).encode()
        seal(files)

    changed(place, change)
    assert found(place) == {}


def test_arrays_told_to_zarr_otherwise_are_found_even_sealed(place: Path) -> None:
    for name, old, new in (
        ("tokens/zarr.json", b'"int32"', b'"uint32"'),
        ("blocks/zarr.json", b'"little"', b'"big"'),
        ("blocks/zarr.json", b"68", b"69"),
        ("blocks/zarr.json", b'"kv_head"', b'"head"'),
        ("keys/zarr.json", b'"fill_value": 0', b'"fill_value": 1'),
        ("parents/zarr.json", b"{", b"["),
        ("spans/zarr.json", b'"."', b'"/"'),
    ):
        before = files_of(place)
        assert before[name].replace(old, new) != before[name]

        def change(files: Files, name: str = name, old: bytes = old, new: bytes = new) -> None:
            files[name] = files[name].replace(old, new)
            seal(files)

        changed(place, change)
        assert found(place).keys() == {name}
        put(place, before)


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ("documents[0]", lambda given: given["documents"][0].update(last=0)),
        ("documents[0]", lambda given: given["documents"][0].update(num_blocks=3)),
        ("documents[1]", lambda given: given["documents"][1].update(num_tokens=1)),
        ("runs[1]", lambda given: given["runs"][1].update(parent=0)),
        ("runs[1]", lambda given: given["runs"][1].update(parent=None)),
        ("runs[1]", lambda given: given["runs"][1].update(depth=1)),
    ],
)
def test_documents_and_runs_that_are_not_the_trees_are_found_even_sealed(place: Path, where: str, change: Any) -> None:
    changed(place, lambda files: set_manifest(files, change))
    assert where in found(place)


def test_a_span_of_no_document_is_found_even_sealed(place: Path) -> None:
    def change(files: Files) -> None:
        spans = np.frombuffer(files["spans/c.0.0"], "<i8").copy()
        spans[0] = 2
        files["spans/c.0.0"] = spans.tobytes()
        seal(files)

    changed(place, change)
    assert found(place).keys() == {"spans"}


@pytest.mark.parametrize("name", ["documents|0|num_characters", "tool", "model|weights_sha256", "built|device"])
def test_any_edit_of_a_signed_manifest_is_found_even_sealed(place: Path, tmp_path: Path, name: str) -> None:
    key, public = make_keys(tmp_path)
    signed(place, key)
    assert found(place, trusted=[public]) == {}

    def edit_field(given: Any) -> None:
        *steps, last = [int(step) if step.isdigit() else step for step in name.split("|")]
        for step in steps:
            given = given[step]
        given[last] = 5 if last == "num_characters" else "4" * 64

    changed(place, lambda files: set_manifest(files, edit_field))
    assert "not over this manifest" in found(place)["signature"]
