"""Why blocks missed, what was recorded and what-if, through a whole store with real threads and a real folder."""

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.store_parts import DEADLINE_S, Parts
from tests.store_parts import TINY as STEPPED
from tests.test_disk import capacity
from tierkv import open_store
from tierkv.config import load
from tierkv.connectors.engine import EngineConnector
from tierkv.hints import NO_ENDING, NO_HINTS, Ending, Hints, Next
from tierkv.keys import Namespace, token_bytes
from tierkv.layout import Layout
from tierkv.lookups import Lookup, Lookups, Sources
from tierkv.simulate.traces import open_trace
from tierkv.store import Store
from tierkv.testing import FakeClock
from tierkv.tiers.disk_history import read_history
from tierkv.tiers.disk_manifest import NAME

TINY = Layout(num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32", block_tokens=2)


class Served:
    """A store, and requests through its connector as an engine makes them."""

    def __init__(
        self, folder: Path, *, pages: int = 16, host: int = 16, slots: int | None = None, **options: str
    ) -> None:
        sizes = {"device.capacity": pages * TINY.block_bytes, "host.capacity": host * TINY.block_bytes}
        tiers = {"disk.path": folder / "kv", "disk.capacity": capacity(slots, TINY)} if slots else {}
        policies = dict.fromkeys(("device.policy", "host.policy", "disk.policy"), "lru")
        given = {"store.block_tokens": TINY.block_tokens, **policies, **sizes, **tiers, **options}
        config = load("/dev/null", {}, [f"{name}={value}" for name, value in given.items()]).config
        self.clock = FakeClock(100.0)
        self.store: Store = open_store(config, layout=TINY, model="m", clock=self.clock)
        self._connector = EngineConnector(self.store)
        self._count = 0

    def serve(self, tokens: bytes, *, hints: Hints = NO_HINTS, ending: Ending = NO_ENDING) -> Lookup:
        """One request, its loads and saves done."""
        self._count += 1
        name, connector, step = f"r{self._count}", self._connector, TINY.block_tokens * 4
        hit = connector.match(name, tokens, hints=hints)
        assert hit is not None, "no shared tier is asked here"
        match = connector._requests[name].match
        assert match and match.visit.lookup
        whole = len(tokens) // step
        shared = [page for page in hit.pages if page is not None]
        fresh = connector.allocate(whole - len(shared))
        assert fresh is not None
        usable = connector.load(name, fresh[: len(hit.pages) - len(shared)]).result()
        table = [*shared, *fresh]
        for page in table[usable // TINY.block_tokens :]:
            np.frombuffer(self.store.places.device.view(page), np.uint8)[:] = 7
        taken = connector.save(name, tokens, table)
        connector.free([page for page, ok in zip(reversed(table), reversed(taken), strict=False) if not ok])
        connector.release(name, ending=ending)
        self.store.flush()
        return match.visit.lookup

    def missed(self) -> dict[str, float]:
        return {labels[0][1]: value for _, labels, value in self.store.metrics.missed_blocks.samples()}

    def said(self, lookup: Lookup) -> list[str]:
        return [one.say(block_tokens=2, now_s=self.clock()) for one in lookup.missing]


class Stores:
    """Stores over one folder, one after another."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._made = folder, list[Served]()

    def __call__(self, **options: Any) -> Served:
        self._made.append(Served(self._folder, **options))
        return self._made[-1]

    def close(self) -> None:
        for one in self._made:
            one.store.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Stores]:
    stores = Stores(tmp_path)
    yield stores
    stores.close()


def prompt(blocks: int, seed: int, *, extra: int = 0) -> bytes:
    return token_bytes(np.random.default_rng(seed).integers(1, 50_000, blocks * 2 + extra).tolist())


def test_new_prompts_were_never_seen_and_known_ones_are_not_missed(served: Stores) -> None:
    live = served()
    first = live.serve(prompt(5, 1, extra=1))
    assert live.said(first) == [
        "blocks 0-4 (tokens 0-9): never seen",
        "block 5 (tokens 10-11): part of a block, which no tier keeps",
    ]
    assert live.serve(prompt(5, 1)).missing == []
    assert live.missed() == {"never_seen": 5, "partial_tail": 1}


def test_what_was_evicted_says_from_where_when_and_by_whom(served: Stores) -> None:
    live = served(pages=8, host=8)
    live.serve(prompt(6, 1))
    live.clock.advance(30)
    live.serve(prompt(6, 2))  # room for it is made of the first one's tail
    live.clock.advance(60)
    lookup = live.serve(prompt(6, 1))
    missed = live.missed()["evicted"]
    assert missed == sum(one.hi - one.lo for one in lookup.missing) > 0
    assert all("by lru" in line and "ago" in line for line in live.said(lookup))
    assert {one.tier for one in lookup.missing} <= {"device", "host"}
    assert live.missed() == {"never_seen": 12, "evicted": missed}


def test_without_a_history_what_was_forgotten_was_never_seen(served: Stores) -> None:
    live = served(pages=8, host=8, **{"store.history_blocks": "0"})
    for seed in (1, 2, 1):
        live.serve(prompt(6, seed))
    assert set(live.missed()) <= {"never_seen", "evicted"}
    assert live.missed()["never_seen"] > 12


def flip_all(folder: Path) -> None:
    for shard in (folder / "blocks").glob("c.*"):
        data = bytearray(shard.read_bytes())
        for slot in range(16):
            data[slot * 4096 + 5] ^= 1
        shard.write_bytes(data)


def test_corrupt_blocks_count_when_they_do_not_come_and_say_so_afterwards(served: Stores, tmp_path: Path) -> None:
    tokens = prompt(6, 1)
    served(slots=16).serve(tokens)
    served.close()  # now only the disk has it
    flip_all(tmp_path / "kv")
    live = served(slots=16, **{"host.copy_down": "spill", "disk.copy_down": "spill"})
    lookup = live.serve(tokens)
    assert live.missed()["corrupt"] == 6
    assert live.said(lookup)[0] == "blocks 0-5 (tokens 0-11): found corrupt in disk, and removed"
    departed = read_history(tmp_path / "kv" / NAME).departed
    assert {why for _, why in departed.values()} == {"corrupt"}
    live.store.evict_device()
    live.clock.advance(3)
    again = live.serve(tokens)
    assert live.said(again) == ["blocks 0-5 (tokens 0-11): evicted from device by lru, 3 s ago"], "the last that left"


def test_requests_are_recorded_and_the_simulator_reads_them(served: Stores, tmp_path: Path) -> None:
    live = served(**{"record.path": str(tmp_path / "log")})
    shared = prompt(4, 1)
    for turn in range(3):
        ending = Ending(Next.TOOL, output_tokens=turn)
        live.serve(shared + prompt(turn, 2), hints=Hints("chat"), ending=ending)
    live.store.close()
    assert live.store.metrics.requests_recorded.value() == 3
    text = (tmp_path / "log").read_text()
    assert "chat" not in text
    trace = open_trace(tmp_path / "log")
    requests = list(trace)
    trace.close()
    assert [request.num_blocks for request in requests] == [4, 5, 6]
    assert requests[2].blocks.startswith(requests[0].blocks)
    assert [request.output_tokens for request in requests] == [0, 1, 2]
    assert requests[0].ending.next is Next.TOOL


def test_what_if_agrees_with_what_the_store_found(served: Stores, tmp_path: Path) -> None:
    """Twelve blocks over and over, in a host of eight: at twice the size all of them stay."""
    live = served(pages=12, host=8, slots=16)
    for _ in range(20):
        live.serve(prompt(12, 1))
    share = live.store.metrics.capacity_hit_share
    assert share.value("host", "1") == share.value("device", "1") == pytest.approx(19 / 20)
    assert share.value("device", "0.5") == pytest.approx(19 / 20 * 6 / 12)
    live.store.close()
    note = json.loads(read_history(tmp_path / "kv" / NAME).notes["stats"])
    assert note["refs"] == 240
    assert note["missed"] == {"never_seen": 12}


def test_an_answer_is_known_to_the_distances_when_it_is_asked_for_again(served: Stores) -> None:
    live = served()
    question, answer = prompt(3, 1), prompt(4, 2)
    connector, store = live._connector, live.store
    assert connector.match("r", question) is not None
    pages = connector.allocate(7)
    connector.load("r", []).result()
    connector.save("r", question + answer, pages)
    connector.release("r", ending=NO_ENDING)
    store.flush()
    live.serve(question + answer)
    assert store.metrics.capacity_hit_share.value("disk" if store.below else "host", "1") == pytest.approx(7 / 10)
    assert live.missed() == {"never_seen": 3}


def noted(parts: Parts) -> Lookups:
    """Let a store of parts that the test steps note its lookups."""
    store, steps = parts.store, parts.steps
    down = [tier for tier in store.below if tier.number is None]
    sources = Sources(
        explain=store.index.explain,
        roots=store.index.roots,
        tier_names=("device", "host", "memory"),
        fields=Namespace("test", STEPPED).fields(),
        down=lambda: next((tier.name for tier in down if tier.breaker.open), None),
    )
    lookups = Lookups(
        root=store.root, block_tokens=2, sources=sources, capacities={"device": 14, "host": 20}, metrics=parts.metrics,
        submit=lambda job: steps.submit(job) is not None, now=parts.clock,
    )  # fmt: skip
    store._lookups = lookups
    return lookups


def loaded_late(parts: Parts, tokens: bytes) -> Lookup:
    """A lookup whose load is still queued when its time is up."""
    store = parts.store
    search = store.search(tokens)
    parts.steps.run_all()
    match = store.take(search)
    pages = store.allocate(match.num_blocks - match.shared)
    assert pages and match.visit.lookup
    future = store.load(match, pages)
    parts.clock.advance(DEADLINE_S + 1)
    store.poll()
    assert future.done()
    store.settle(match)
    lookup = match.visit.lookup
    store.free(pages)
    store.end(match, NO_ENDING)
    parts.steps.run_all()
    return lookup


def test_a_load_that_is_late_says_so() -> None:
    parts, tokens = Parts(edges=("save", "save", "second_use")), prompt(4, 1)
    noted(parts)
    parts.serve(tokens)
    parts.steps.run_all()
    parts.store.evict_device()
    lookup = loaded_late(parts, tokens)
    assert parts.metrics.missed_blocks.value("late") == 4
    assert lookup.missing[0].say(block_tokens=2) == "blocks 0-3 (tokens 0-7): did not come in time from a tier"


def test_a_shared_tier_that_is_left_alone_may_have_had_it() -> None:
    parts = Parts()
    lookups = noted(parts)
    parts.serve(prompt(3, 1))
    parts.steps.run_all()
    for _ in range(3):
        parts.store.below[1].breaker.failure(OSError("a fault"))
    parts.serve(prompt(3, 2))
    parts.clock.advance(100)
    parts.serve(prompt(3, 3))
    parts.steps.run_all()
    missed = parts.metrics.missed_blocks
    assert (missed.value("never_seen"), missed.value("down")) == (6, 3)
    assert lookups.distances.num_refs == 9


def test_tokens_as_an_array_are_looked_up_alike(served: Stores) -> None:
    live = served()
    live.serve(prompt(3, 1))
    assert live.serve(token_bytes(array("i", prompt(3, 1)))).missing == []
