"""Whatever bytes a pack has: it is refused, or its blocks are what they were, or they are missing. Nothing else, and soon."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.pack_parts import TINY, Files, files_of, group_of, kv, make_pack, prompt, put, seal, set_manifest
from tierkv.errors import PackError
from tierkv.packs.manifest import ATTRIBUTE, ROOT
from tierkv.packs.pack import open_pack
from tierkv.packs.verify import verify

DOCUMENTS = {"one": prompt(1, 5), "two": prompt(1, 3) + prompt(2, 2)}
BLOCKS = {kv(tokens, block) for tokens in DOCUMENTS.values() for block in range(5)}
TRIED = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return files_of(make_pack(tmp_path_factory.mktemp("fuzz") / "pack", DOCUMENTS))


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_pack(tmp_path_factory.mktemp("fuzz") / "pack.zip", DOCUMENTS).read_bytes()


def tells_the_truth(place: Path) -> None:
    for strict in (False, True):
        try:
            pack = open_pack(place, strict=strict)
        except PackError as error:
            assert len(str(error)) < 1000
            continue
        with pack:
            outs = [bytearray(TINY.block_bytes) for _ in range(pack.num_blocks)]
            answers = pack.read(range(pack.num_blocks), [memoryview(out) for out in outs])
        assert all(wrong or bytes(out) in BLOCKS for wrong, out in zip(answers, outs, strict=True))
    try:
        found = verify(place).findings
    except PackError:
        return
    assert all(len(one.where) < 300 and len(one.what) < 1000 for one in found)


def edits(data: st.DataObject, whole: bytes) -> bytes:
    """Some bytes changed, cut, or doubled."""
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at, end = sorted((data.draw(st.integers(0, len(changed))), data.draw(st.integers(0, len(changed)))))
        match data.draw(st.sampled_from(["write", "cut", "double", "end"])):
            case "write":
                new = data.draw(st.binary(min_size=1, max_size=8))
                changed[at : at + len(new)] = new
            case "cut":
                del changed[at : min(end, at + 50)]
            case "double":
                changed[at:at] = changed[at : min(end, at + 50)]
            case _:
                del changed[end:]
    return bytes(changed)


@TRIED
@given(data=st.data())
def test_a_zip_with_any_bytes_changed_tells_the_truth_or_nothing(
    data: st.DataObject, archive: bytes, tmp_path: Path
) -> None:
    place = tmp_path / "pack.zip"
    place.write_bytes(edits(data, archive))
    tells_the_truth(place)


@TRIED
@given(data=st.data())
def test_a_zip_whose_directory_was_changed_tells_the_truth_or_nothing(
    data: st.DataObject, archive: bytes, tmp_path: Path
) -> None:
    start = archive.rfind(b"PK\1\2", 0, len(archive) - 700)  # the last members and the end
    place = tmp_path / "pack.zip"
    place.write_bytes(archive[:start] + edits(data, archive[start:]))
    tells_the_truth(place)


@TRIED
@given(data=st.data(), sealed=st.booleans())
def test_a_folder_with_any_file_changed_tells_the_truth_or_nothing(
    data: st.DataObject, sealed: bool, sound: Files, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Sealed again by who has no key, it may say other things of text and documents; its blocks stay true to their digests."""
    files = dict(sound)
    name = data.draw(st.sampled_from(sorted(files)))
    if sealed and (name.startswith(("blocks/c", "checksums", "digests")) or name == ROOT):
        name = "tokens/c.0.0"
    files[name] = edits(data, files[name])
    if sealed:
        seal(files)
    place = tmp_path_factory.mktemp("folder", numbered=True) / "pack"
    tells_the_truth(put(place, files))


def leaves(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inner is None:
        yield before
    else:
        for name, one in inner:
            yield from leaves(one, (*before, name))


VALUES = st.one_of(
    st.integers(-2, 12),
    st.sampled_from(
        [1 << 20, 1 << 28, 1 << 31, 1 << 40, 10**30, None, True, 1.0, "", "0" * 64, "../x", [], {}, [1, 2]]
    ),
)


@TRIED
@given(data=st.data())
def test_a_manifest_that_was_changed_and_sealed_tells_the_truth_or_nothing(
    data: st.DataObject, sound: Files, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Here everything is consistent that a stranger can make so: documents, runs and sizes point wherever he likes."""
    files = dict(sound)
    paths = [
        path for path in leaves(group_of(files)["attributes"][ATTRIBUTE]) if path[0] not in ("built", "rope", "files")
    ]

    def change(manifest: dict[str, Any]) -> None:
        for _ in range(data.draw(st.integers(1, 2))):
            *steps, last = data.draw(st.sampled_from(paths))
            at: Any = manifest
            for step in steps:
                at = at[step] if isinstance(at, dict | list) else {}
            if isinstance(at, dict | list) and at:
                at[last] = data.draw(VALUES)

    set_manifest(files, change)
    place = tmp_path_factory.mktemp("sealed", numbered=True) / "pack"
    tells_the_truth(put(place, files))
