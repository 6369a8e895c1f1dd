"""A store over packs: prompts hit them, nothing of them is written elsewhere, and what does not fit is refused by name."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.pack_parts import FACTS, SHARD, Files, changed, flip, make_keys, make_pack, signed
from tests.test_store import config, content, prompt, run
from tierkv.assembly import open_store
from tierkv.config import PackConfig
from tierkv.errors import ConfigError, PackError
from tierkv.keys import chain
from tierkv.layout import Layout
from tierkv.store import Store
from tierkv.testing import SMALL, FakeClock
from tierkv.tiers.base import Miss
from tierkv.zarr_shards import stride_of

STRIDE = stride_of(SMALL.block_bytes)
TOKENS = prompt(20, extra=3)
BT = SMALL.block_tokens * 4


def pack_of(out: Path, *documents: bytes) -> Path:
    """A pack with the KV that the stores of these tests compute."""

    def kv(tokens: bytes, block: int, layout: Layout) -> bytes:
        return content(tokens, block)

    return make_pack(out, {f"document {at}": each for at, each in enumerate(documents)}, layout=SMALL, content=kv)


@pytest.fixture(params=["pack", "pack.zip"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return pack_of(tmp_path / str(request.param), TOKENS)


@pytest.fixture
def opened() -> Iterator[Callable[..., Store]]:
    stores: list[Store] = []

    def open_(*places: Path, folder: Path | None = None, pack: Any = None, **options: Any) -> Store:
        given = replace(config(folder), pack=PackConfig(paths=places, **(pack or {})))
        stores.append(open_store(given, **({"layout": SMALL, "model": "test"} | options)))
        return stores[-1]

    yield open_
    for store in stores:
        store.close()
        store.index.check()


def num_fds() -> int:
    gc.collect()  # a file closes when its last reader has let go of it, and errors hold on to frames
    return len(list(Path("/proc/self/fd").iterdir()))


def loaded(store: Store) -> dict[str, float]:
    """Blocks that came to the device, by tier."""
    counter = store.metrics.blocks_loaded
    return {name: value for name in ("host", "disk", "pack") if (value := counter.value(name))}


def on_disk(store: Store, tokens: bytes) -> list[bool]:
    disk = next(below.tier for below in store.below if below.name == "disk")
    return disk.contains(chain(store.root, tokens, block_tokens=SMALL.block_tokens))


def test_a_prompt_of_a_pack_comes_from_it_whole_and_then_from_nearer(place: Path, opened: Any) -> None:
    store = opened(place)
    assert run(store, TOKENS) == 20 and loaded(store) == {"pack": 20}
    assert run(store, TOKENS) == 20 and loaded(store) == {"pack": 20}  # on the device now
    assert run(store, TOKENS[: 7 * BT] + prompt(3, seed=5)) == 7
    row = next(row for row in store.holdings() if row["tier"] == "pack")
    assert row == {"tier": "pack", "blocks": 20, "bytes": 20 * SMALL.block_bytes, "place": str(place)}


def test_a_prompt_that_goes_on_is_computed_from_where_the_pack_ends(place: Path, opened: Any, tmp_path: Path) -> None:
    store = opened(place, folder=tmp_path)
    longer = TOKENS[: 20 * BT] + prompt(6, seed=5)
    assert run(store, longer) == 20
    assert store.flush(10)
    assert on_disk(store, longer) == [False] * 20 + [True] * 6  # a copy of a pack would be room lost
    assert store.metrics.blocks_spilled.value("host", "disk") == 6


def test_a_disk_and_a_pack_each_give_their_part(place: Path, opened: Any, tmp_path: Path) -> None:
    first = open_store(config(tmp_path), layout=SMALL, model="test")
    run(first, TOKENS[: 8 * BT])
    first.close()
    store = opened(place, folder=tmp_path)
    assert run(store, TOKENS) == 20 and loaded(store) == {"disk": 8, "pack": 12}
    assert store.flush(10)
    assert on_disk(store, TOKENS) == [True] * 8 + [False] * 12


def test_a_corrupt_block_shortens_the_hit_and_the_rest_is_computed_and_kept(
    place: Path, opened: Any, tmp_path: Path
) -> None:
    def change(files: Files) -> None:
        files[SHARD] = flip(files[SHARD], 7 * STRIDE + 100)

    changed(place, change)
    store = opened(place, folder=tmp_path)
    assert run(store, TOKENS) == 7 and loaded(store) == {"pack": 7}  # every byte of these was compared
    assert store.metrics.misses.value("pack", Miss.CORRUPT) == 1
    assert store.flush(10)
    assert on_disk(store, TOKENS) == [False] * 7 + [True] * 13
    store.evict_device()
    assert run(store, TOKENS) == 20
    assert store.metrics.misses.value("pack", Miss.CORRUPT) == 1


def test_a_corrupt_block_is_not_promised_again(place: Path, opened: Any) -> None:
    changed(place, lambda files: files.update({SHARD: flip(files[SHARD], 7 * STRIDE)}))
    store = opened(place)
    run(store, TOKENS)
    branch = TOKENS[: 7 * BT] + prompt(1, seed=9)
    assert run(store, branch) == 7
    other = store.search(TOKENS[: 20 * BT])
    assert other.probe is None or other.probe.result(10) is None


def test_two_packs_are_one_tier_and_the_longer_answer_counts(tmp_path: Path, opened: Any) -> None:
    short = pack_of(tmp_path / "short", TOKENS[: 5 * BT])
    other = pack_of(tmp_path / "other.zip", prompt(4, seed=2), TOKENS)
    store = opened(short, other)
    assert run(store, prompt(4, seed=2)) == 4
    assert run(store, TOKENS) == 20
    assert loaded(store) == {"pack": 24}


def test_a_pack_whose_files_are_gone_is_left_alone_for_a_while(tmp_path: Path, opened: Any) -> None:
    place, clock = pack_of(tmp_path / "pack", TOKENS), FakeClock()
    store = opened(place, clock=clock)
    (place / SHARD).rename(tmp_path / "aside")
    for tried in (20, 40, 60, 60):
        assert run(store, TOKENS) == 0
        assert store.metrics.misses.value("pack", Miss.FAILED) == tried  # each once
        forget(store)
    assert store.metrics.tier_down.value("pack") == 1
    clock.advance(1.0)
    assert run(store, TOKENS) == 0 and store.metrics.misses.value("pack", Miss.FAILED) == 80
    forget(store)
    (tmp_path / "aside").rename(place / SHARD)
    clock.advance(1.0)
    assert run(store, TOKENS) == 0  # twice as long now
    forget(store)
    clock.advance(1.0)
    assert run(store, TOKENS) == 20


def forget(store: Store) -> None:
    """Nothing is nearer than the packs."""
    assert store.flush(10)
    store.evict_device()
    store.index.evict(1)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_two_gets_its_half_of_every_block(tmp_path: Path, opened: Any, rank: int) -> None:
    from tests.pack_parts import WIDE, kv

    tokens = prompt(4)
    place = make_pack(tmp_path / "pack", {"one": tokens}, layout=WIDE)
    own = replace(WIDE, num_kv_heads=2)
    store = opened(place, layout=own, pack={"shard": f"{rank}/2"})
    search = store.search(tokens)
    search.probe.result(10)
    match = store.take(search)
    pages = store.allocate(match.num_blocks)
    assert store.load(match, pages).result(10)[0] == len(tokens) // 16
    for block, page in enumerate(pages):
        whole = memoryview(kv(tokens, block, WIDE)).cast(
            "B", (4, WIDE.block_bytes // 4)
        )  # layer and part; heads within
        half = WIDE.block_bytes // 8
        parts = [whole.tobytes()[at * 2 * half + rank * half :][:half] for at in range(4)]
        assert bytes(store.places.device.view(page)) == b"".join(parts)
    store.settle(match)
    store.free(pages[match.shared :])
    store.release(match)


# -- what does not fit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "other"}, "built for another model: model identity test, here other"),
        (
            {"model": "other", "facts": replace(FACTS, identity="other", rope={"rope_theta": 5e5})},
            "built for another model: rope rope_theta 10000.0, here 500000.0",
        ),
        ({"model": "other", "facts": replace(FACTS, identity="other")}, "weights \\(model identity test, here other"),
        ({"facts": replace(FACTS, tokenizer_sha256=None)}, "tokenizer 111111111111, here none"),
        ({"layout": replace(SMALL, dtype="float16")}, "another layout: dtype bfloat16, here float16"),
        ({"layout": replace(SMALL, num_layers=3)}, "another layout: num_layers 2, here 3"),
        ({"layout": replace(SMALL, num_kv_heads=1)}, "another layout: num_kv_heads 2, here 1; .* or set pack.shard"),
        ({"pack": {"shard": "0/2"}}, "another layout: num_kv_heads 1, here 2"),
        ({"pack": {"shard": "0/3"}}, "2 KV heads cannot be shared out to 3"),
    ],
)
def test_a_pack_that_does_not_fit_is_refused_at_start_by_what_differs(
    place: Path, opened: Any, options: dict[str, Any], said: str
) -> None:
    before = num_fds()
    with pytest.raises(PackError, match=f"{place}: .*{said}"):
        opened(place, **options)
    assert num_fds() <= before


def test_a_pack_of_an_adapter_is_not_for_the_bare_model(tmp_path: Path, opened: Any) -> None:
    place = make_pack(tmp_path / "pack", {"one": TOKENS}, layout=SMALL, adapter="lora")
    with pytest.raises(PackError, match="built for another model: adapter lora, here none"):
        opened(place)


def test_block_tokens_of_another_size_are_refused(place: Path) -> None:
    from tierkv.config import StoreConfig

    given = replace(config(), store=StoreConfig(block_tokens=32), pack=PackConfig(paths=(place,)))
    with pytest.raises(PackError, match="block_tokens 16, here 32"):
        open_store(given, layout=replace(SMALL, block_tokens=32), model="test")


def test_where_signers_are_demanded_unsigned_foreign_and_bad_signatures_are_refused(
    place: Path, opened: Any, tmp_path: Path
) -> None:
    key, public = make_keys(tmp_path)
    stranger, theirs = make_keys(tmp_path, "stranger")
    demanded = {"signers": (public,)}
    with pytest.raises(PackError, match=rf"{place}: not signed; this configuration demands one of {public[:16]}"):
        opened(place, pack=demanded)
    signed(place, stranger)
    with pytest.raises(PackError, match=f"signed by {theirs[:16]}…; this configuration demands one of {public[:16]}"):
        opened(place, pack=demanded)
    assert run(opened(place), TOKENS) == 20  # nobody demands anything
    signed(place, key)
    store = opened(place, pack={"signers": (str(key),)})  # a file of the key does as well
    assert all(pack.strict for pack in store.below[0].tier.packs)
    assert run(store, TOKENS) == 20

    def spoil(files: Files) -> None:
        text = files["zarr.json"].decode()
        at = text.index('"signature": "') + 14
        files["zarr.json"] = (text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :]).encode()

    changed(place, spoil)
    for pack in (demanded, {}):
        with pytest.raises(PackError, match="is not over this manifest"):
            opened(place, pack=pack)


def test_signers_that_are_no_keys_are_a_mistake_of_the_configuration(place: Path, opened: Any, tmp_path: Path) -> None:
    for given in (str(tmp_path / "absent.pem"), "0" * 63, str(place)):
        with pytest.raises(ConfigError, match=r"^pack\.signers: "):
            opened(place, pack={"signers": (given,)})


def test_a_place_without_a_pack_is_refused_at_start(opened: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, said in ((tmp_path / "absent", "no pack at"), (tmp_path / "empty", "zarr.json cannot be read")):
        with pytest.raises(PackError, match=said):
            opened(path)


def test_one_bad_pack_of_two_leaves_nothing_open(place: Path, opened: Any, tmp_path: Path) -> None:
    before = num_fds()
    with pytest.raises(PackError, match="no pack at"):
        opened(place, tmp_path / "absent")
    assert num_fds() <= before
