"""Two packs beside each other, and put together."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.pack_parts import (
    CHARACTERS,
    FACTS,
    SHARD,
    TINY,
    Files,
    changed,
    files_of,
    flip,
    keys_of,
    kv,
    make_pack,
    other_facts,
    prompt,
    set_manifest,
)
from tierkv.errors import PackError
from tierkv.layout import Layout
from tierkv.packs.combine import Difference, diff, merge
from tierkv.packs.pack import Pack, open_pack
from tierkv.packs.verify import verify
from tierkv.zarr_shards import ALIGNMENT

TRUNK = prompt(1, 4)
ONE, TWO, THREE = TRUNK + prompt(2, 3), TRUNK + prompt(3, 70), prompt(4, 2, extra=1)


@pytest.fixture
def opened() -> Any:
    packs: list[Pack] = []

    def open_(*places: Path, **options: Any) -> list[Pack]:
        packs.extend(new := [open_pack(place, **options) for place in places])
        return new

    yield open_
    for pack in packs:
        pack.close()


def blocks_of(pack: Pack, tokens: bytes) -> list[bytes]:
    """What a pack has for a prompt."""
    rows = {key.tobytes(): row for row, key in enumerate(pack.keys)}
    wanted = [rows[key] for key in keys_of(tokens)]
    outs = [bytearray(TINY.block_bytes) for _ in wanted]
    assert pack.read(wanted, [memoryview(out) for out in outs]) == [None] * len(wanted)
    return [bytes(out) for out in outs]


def expected(tokens: bytes) -> list[bytes]:
    return [kv(tokens, block) for block in range(len(tokens) // 8)]


def other_kv(tokens: bytes, block: int, layout: Layout) -> bytes:
    """Of the same tokens, on another machine."""
    return bytes(byte ^ 1 for byte in kv(tokens, block, layout))


# -- differences ------------------------------------------------------------------------------------------------------------


def test_a_pack_differs_from_itself_in_nothing(tmp_path: Path, opened: Any) -> None:
    folder = make_pack(tmp_path / "pack", {"one": ONE, "three": THREE})
    archive = make_pack(tmp_path / "pack.zip", {"three": THREE, "one": ONE})
    told = diff(*opened(folder, archive))
    assert told == Difference((), (), (), (), shared=9, left=0, right=0, unequal=0) and told.none


def test_documents_and_blocks_that_came_went_and_changed_are_told(tmp_path: Path, opened: Any) -> None:
    left = make_pack(tmp_path / "left", {"one": ONE, "gone": THREE, "kept": TRUNK})
    right = make_pack(tmp_path / "right", {"one": TWO, "new": prompt(6, 1), "kept": TRUNK})
    told = diff(*opened(left, right))
    assert (told.added, told.removed, told.changed, told.model) == (("new",), ("gone",), ("one",), ())
    assert (told.shared, told.left, told.right, told.unequal) == (4, 3 + 2, 70 + 1, 0)
    assert not told.none
    back = diff(*opened(right, left))
    assert (back.added, back.removed, back.left, back.right) == (("gone",), ("new",), 71, 5)


def test_blocks_of_the_same_tokens_with_other_bytes_are_counted_without_reading_one(
    tmp_path: Path, opened: Any
) -> None:
    left = make_pack(tmp_path / "left", {"one": ONE})
    right = make_pack(tmp_path / "right", {"one": ONE}, content=other_kv)
    packs = opened(left, right)
    for place in (left, right):
        (place / SHARD).unlink()
    told = diff(*packs)
    assert told.unequal == told.shared == 7 and not told.none and not told.changed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"facts": other_facts(rope={"rope_theta": 5e5})}, ["rope rope_theta 10000.0, the other 500000.0"]),
        ({"facts": other_facts()}, ["weights (model identity test, the other other)"]),
        ({"facts": replace(FACTS, tokenizer_sha256=None)}, ["tokenizer 111111111111, the other none"]),
        ({"adapter": "lora"}, ["adapter none, the other lora"]),
        ({"layout": replace(TINY, head_dim=8)}, ["head_dim 4, the other 8"]),
        (
            {"layout": replace(TINY, dtype="float16", block_tokens=4)},
            ["block_tokens 2, the other 4", "dtype float32, the other float16"],
        ),
    ],
)
def test_packs_of_other_models_are_told_apart_and_not_merged(
    tmp_path: Path, opened: Any, options: dict[str, Any], said: Sequence[str]
) -> None:
    packs = opened(make_pack(tmp_path / "left", {"one": ONE}), make_pack(tmp_path / "right", {"one": ONE}, **options))
    told = diff(*packs)
    assert list(told.model) == said and not told.none
    with pytest.raises(PackError) as raised:
        merge(packs, tmp_path / "both")
    assert str(raised.value) == f"{tmp_path}/right cannot be merged with {tmp_path}/left: {', '.join(said)}"
    assert not (tmp_path / "both").exists()


# -- merging ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["both", "both.zip"])
def test_packs_with_a_common_prefix_are_one_with_each_block_once(tmp_path: Path, opened: Any, name: str) -> None:
    packs = opened(
        make_pack(tmp_path / "a", {"one": ONE}),
        make_pack(tmp_path / "b.zip", {"two": TWO, "three": THREE}),
        make_pack(tmp_path / "c", {"short": prompt(9, 0, extra=1), "four": TRUNK}),
    )
    seen: list[int] = []
    assert merge(packs, tmp_path / name, progress=seen.append) == 4 + 3 + 70 + 2 == sum(seen)
    assert verify(tmp_path / name).findings == ()
    (both,) = opened(tmp_path / name, strict=True)
    assert len({key.tobytes() for key in both.keys}) == both.num_blocks == 79
    for tokens in (ONE, TWO, THREE, TRUNK):
        assert blocks_of(both, tokens) == expected(tokens)
    documents = {one.name: one for one in both.manifest.documents}
    assert list(documents) == ["one", "two", "three", "short", "four"]
    before = {one.name: one for pack in packs for one in pack.manifest.documents}
    for told in documents.values():
        assert replace(told, last=None) == replace(before[told.name], last=None)
        assert (told.last is None) == (before[told.name].last is None)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b.zip", "c", name}


def test_spans_are_kept_and_tell_whose_text_a_block_is(tmp_path: Path, opened: Any) -> None:
    packs = opened(make_pack(tmp_path / "a", {"one": ONE}), make_pack(tmp_path / "b", {"two": TWO}))
    merge(packs, tmp_path / "both")
    (both,) = opened(tmp_path / "both")
    spans, names = both.array("spans"), [one.name for one in both.manifest.documents]
    for row in range(both.num_blocks):
        document, start, end = spans[row].tolist()
        depth = len(both.path(row)) - 1
        assert (start, end) == (depth * 2 * CHARACTERS, (depth + 1) * 2 * CHARACTERS)
        tokens = {"one": ONE, "two": TWO}[names[document]]
        assert both.tokens[row].tobytes() == tokens[depth * 8 : (depth + 1) * 8]
    assert all(run.characters for run in both.manifest.runs)


def test_a_merge_is_the_pack_that_would_have_been_built_of_all(tmp_path: Path, opened: Any) -> None:
    packs = opened(make_pack(tmp_path / "a", {"one": ONE}), make_pack(tmp_path / "b", {"two": TWO, "three": THREE}))
    merge(packs, tmp_path / "both")
    built = make_pack(tmp_path / "built", {"one": ONE, "two": TWO, "three": THREE})
    files, whole = files_of(tmp_path / "both"), files_of(built)
    assert {name for name in whole if files[name] != whole[name]} == {"zarr.json"}  # which says how it was made
    assert diff(*opened(tmp_path / "both", built)).none


@pytest.mark.parametrize("name", ["both", "both.zip"])
def test_merging_twice_is_the_same_bytes_and_nothing_is_written_over(tmp_path: Path, opened: Any, name: str) -> None:
    packs = opened(make_pack(tmp_path / "a", {"one": ONE}), make_pack(tmp_path / "b", {"two": TWO}))
    first, second = tmp_path / f"1{name}", tmp_path / f"2{name}"
    merge(packs, first)
    merge(packs, second)
    assert files_of(first) == files_of(second)
    if first.is_file():
        assert first.read_bytes() == second.read_bytes()
    with pytest.raises(PackError, match="exists already: give another name, or remove it"):
        merge(packs, first)
    assert files_of(first) == files_of(second)


def test_of_a_block_of_both_the_first_packs_counts(tmp_path: Path, opened: Any) -> None:
    first = make_pack(tmp_path / "a", {"one": ONE})
    second = make_pack(tmp_path / "b", {"one": ONE, "two": TWO}, content=other_kv)
    merge(opened(first, second), tmp_path / "both")
    (both,) = opened(tmp_path / "both")
    assert blocks_of(both, ONE) == expected(ONE)
    assert blocks_of(both, TWO)[4:] == [other_kv(TWO, block, TINY) for block in range(4, 74)]
    assert [one.name for one in both.manifest.documents] == ["one", "two"]


def test_documents_of_one_name_with_other_content_are_refused(tmp_path: Path, opened: Any) -> None:
    packs = opened(make_pack(tmp_path / "a", {"one": ONE}), make_pack(tmp_path / "b", {"one": TWO}))
    with pytest.raises(PackError, match=r"b: document one is another than the one of that name before; rename one"):
        merge(packs, tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_documents_that_say_they_are_equal_and_are_not_are_refused(tmp_path: Path, opened: Any) -> None:
    """One of the two says of itself what is not so: its blocks would be left out, and nobody would be told."""

    def lie(files: Files) -> None:
        def change(manifest: dict[str, Any]) -> None:
            manifest["documents"][0].update(sha256=hashlib.sha256(ONE).hexdigest(), num_tokens=14)

        set_manifest(files, change)

    other = make_pack(tmp_path / "b", {"one": prompt(8, 7)})
    packs = opened(make_pack(tmp_path / "a", {"one": ONE}), changed(other, lie))
    assert diff(*packs).changed == ("one",)
    with pytest.raises(PackError, match="document one is another"):
        merge(packs, tmp_path / "both")


@pytest.mark.parametrize("name", ["both", "both.zip"])
@pytest.mark.parametrize("strict", [False, True])
def test_a_damaged_block_ends_a_merge_and_leaves_nothing(tmp_path: Path, opened: Any, name: str, strict: bool) -> None:
    first, second = make_pack(tmp_path / "a", {"one": ONE}), make_pack(tmp_path / "b.zip", {"two": TWO})
    changed(second, lambda files: files.update({SHARD: flip(files[SHARD], 60 * ALIGNMENT)}))
    with pytest.raises(PackError, match=r"b\.zip: row 60: row 60 is not what its digest says: fetch that pack again"):
        merge(opened(first, second, strict=strict), tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b.zip"}


def test_a_missing_file_ends_a_merge_and_leaves_nothing(tmp_path: Path, opened: Any) -> None:
    first, second = make_pack(tmp_path / "a", {"one": ONE}), make_pack(tmp_path / "b", {"two": TWO})
    packs = opened(first, second)
    (second / SHARD).unlink()
    with pytest.raises(PackError, match="cannot be read: No such file"):
        merge(packs, tmp_path / "both")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize("name", ["both", "both.zip"])
def test_a_full_disk_ends_a_merge_and_leaves_nothing(
    tmp_path: Path, opened: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs = opened(make_pack(tmp_path / "a", {"one": ONE}), make_pack(tmp_path / "b", {"two": TWO}))

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(PackError, match=r"both.* cannot be written: No space left on device"):
        merge(packs, tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_one_pack_alone_is_merged_to_itself(tmp_path: Path, opened: Any) -> None:
    (pack,) = opened(make_pack(tmp_path / "a", {"one": ONE, "three": THREE}, text=False))
    assert merge([pack], tmp_path / "again") == 9
    assert diff(pack, *opened(tmp_path / "again")).none
