"""The store: a block goes down to every tier and comes back from each, whatever breaks on the way."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tierkv.assembly import open_store
from tierkv.config import Config, DeviceConfig, DiskConfig, HostConfig
from tierkv.keys import token_bytes
from tierkv.match import Match
from tierkv.store import Store
from tierkv.testing import SMALL

BLOCK = SMALL.block_bytes
BT = SMALL.block_tokens


def config(
    tmp_path: Path | None = None,
    *,
    pages: int = 64,
    host: int = 64,
    disk: int = 256,
    to_host: str = "save",
    to_disk: str = "save",
) -> Config:
    return Config(
        device=DeviceConfig(capacity=pages * BLOCK),
        host=HostConfig(capacity=host * BLOCK, copy_down=to_host),
        disk=DiskConfig(
            path=tmp_path and tmp_path / "disk", capacity=(disk + 64) * 8192 + (1 << 20), copy_down=to_disk
        ),
    )


@pytest.fixture
def opened() -> Iterator[Callable[[Config], Store]]:
    stores: list[Store] = []

    def open_(options: Config) -> Store:
        store = open_store(options, layout=SMALL, model="test", device="cpu")
        stores.append(store)
        return store

    yield open_
    for store in stores:
        store.close()


def prompt(num_blocks: int, seed: int = 0, extra: int = 0) -> bytes:
    return token_bytes(np.random.default_rng(seed).integers(0, 1000, num_blocks * BT + extra, dtype=np.int32))


def content(tokens: bytes, block: int) -> bytes:
    """What the pages of a test hold: a function of all tokens up to the block's end, as KV is."""
    seed = list(tokens[: (block + 1) * BT * 4])
    return np.random.default_rng(seed).bytes(BLOCK)


def compute(store: Store, tokens: bytes) -> Match:
    """Do what an engine does: find, load, compute the rest, save. Checks every byte that was found."""
    search = store.search(tokens)
    if search.probe:
        search.probe.result(10)
    match = store.take(search)
    num_blocks = len(tokens) // (BT * 4)
    shared = match.lease.places(0, 0, match.shared)
    match.head_tokens = 0
    fresh = store.allocate(num_blocks - match.shared)
    assert fresh is not None
    pages = [*shared, *fresh]
    usable = match.shared
    if match.num_blocks > match.shared:
        usable, _ = store.load(match, fresh[: match.num_blocks - match.shared]).result(10)
    store.settle(match)
    for block in range(num_blocks):
        page = np.frombuffer(store.places.device.view(pages[block]), np.uint8)
        expected = np.frombuffer(content(tokens, block), np.uint8)
        if block < usable:
            assert (page == expected).all(), f"block {block} came back wrong"
        else:
            page[:] = expected
    taken = store.save(match, tokens, pages)
    assert len(taken) == num_blocks - match.shared
    store.free([page for page, ok in zip(pages[match.shared :], taken, strict=True) if not ok])
    reused[id(store)] = usable
    return match


reused: dict[int, int] = {}


def run(store: Store, tokens: bytes) -> int:
    """Compute a prompt and let it go; returns the blocks that were reused."""
    store.release(compute(store, tokens))
    return reused[id(store)]


def test_a_prompt_comes_back_from_the_device(opened: Any) -> None:
    store = opened(config())
    tokens = prompt(20)
    assert run(store, tokens) == 0
    assert run(store, tokens) == 20


def test_a_prompt_comes_back_from_the_host_after_the_device_forgot(opened: Any) -> None:
    store = opened(config())
    tokens = prompt(20)
    run(store, tokens)
    assert store.flush(10)
    assert store.evict_device() == 20
    assert run(store, tokens) == 20
    assert store.metrics.blocks_loaded.value("host") == 20


def test_a_prompt_comes_back_from_disk_after_a_restart(opened: Any, tmp_path: Path) -> None:
    tokens = prompt(20)
    store = opened(config(tmp_path))
    run(store, tokens)
    store.close()
    store = opened(config(tmp_path))
    assert run(store, tokens) == 20
    assert store.metrics.blocks_loaded.value("disk") == 20
    assert store.flush(10)
    store.evict_device()
    assert run(store, tokens) == 20, "what came from disk lies in the host tier too"
    assert store.metrics.blocks_loaded.value("host") == 20


def test_a_host_smaller_than_the_prompt_still_loads_it_from_disk(opened: Any, tmp_path: Path) -> None:
    tokens = prompt(40)
    store = opened(config(tmp_path))
    run(store, tokens)
    store.close()
    store = opened(config(tmp_path, host=3))
    assert run(store, tokens) == 40


def test_prompts_that_share_a_beginning_share_pages(opened: Any) -> None:
    store = opened(config(pages=30))
    first, second = prompt(20), prompt(20)[: 15 * BT * 4] + prompt(5, seed=9)
    one = compute(store, first)
    two = compute(store, second)
    assert reused[id(store)] == 15 and two.shared == 15
    store.release(one), store.release(two)


def test_allocation_is_refused_when_everything_is_pinned(opened: Any) -> None:
    store = opened(config(pages=20))
    match = compute(store, prompt(20))
    assert store.allocate(1) is None
    store.release(match)
    assert store.flush(10), "copies under way pin their source"
    pages = store.allocate(20)
    assert pages is not None and len(set(pages)) == 20
    store.free(pages)


@pytest.mark.parametrize("edge", ["save", "spill"])
def test_more_prompts_than_the_device_holds_are_found_below(opened: Any, edge: str) -> None:
    store = opened(config(pages=40, host=400, to_host=edge))
    prompts = [prompt(10, seed=seed) for seed in range(12)]
    for tokens in prompts:
        run(store, tokens)
        store.flush(10)
    found = sum(run(store, tokens) for tokens in prompts)
    assert found >= 100
    store.index.check()
