"""What a pack says of itself is believed when it holds together; a stranger who writes it can cost nobody time or memory."""

import contextlib
import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.pack_parts import (
    SHARD,
    Files,
    files_of,
    group_of,
    make_pack,
    prompt,
    set_manifest,
)
from tierkv.errors import PackError
from tierkv.layout import Layout
from tierkv.packs.manifest import ATTRIBUTE, OWN_DIGEST, ROOT, own_digest, read_root, shard_blocks
from tierkv.zarr_shards import ALIGNMENT


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
        (b'{"attributes": {"tierkv_pack": {"a": [' + b"{}," * 3_000_000 + b"0]}}}", "more than 4,194,304 values"),
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


def test_a_run_of_no_rows_is_refused() -> None:
    empty = {"first": 0, "num_blocks": 0, "parent": None, "depth": 0, "document": 0, "characters": None}
    with pytest.raises(PackError, match=r"runs\[0\]"):
        read_root(root_of(lambda manifest: manifest["runs"].insert(0, empty)), place="here")


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
