"""What lies where a pack should be: sizes, links, archives and trees that are not what they say."""

import os
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pack_parts import (
    SHARD,
    TINY,
    Files,
    files_of,
    make_pack,
    prompt,
    put,
    seal,
    set_manifest,
)
from tierkv.errors import PackError
from tierkv.packs.archive import in_order
from tierkv.packs.manifest import MAX_ROOT_BYTES, ROOT
from tierkv.packs.pack import open_pack


@pytest.fixture(scope="module", autouse=True)
def plain(tmp_path_factory: pytest.TempPathFactory) -> None:
    PLAIN.update(
        files_of(make_pack(tmp_path_factory.mktemp("plain") / "pack", {"one": prompt(1, 3), "two": prompt(2, 2)}))
    )


PLAIN: Files = {}


def put_at(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        at: Any = manifest
        *steps, last = [int(step) if step.isdigit() else step for step in path.split("|")]
        for step in steps:
            at = at[step]
        at[last] = value

    return change


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
