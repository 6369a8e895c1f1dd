"""Loads straight out of the daemon's memory: one copy, verified, nothing of what was taken back is shown."""

import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from tests.daemon_parts import PATIENCE_S, RunningDaemon, running, until
from tests.device_parts import bytes_of, cuda_pool, put_under
from tests.engine_models import random_prompts
from tests.handoff_parts import LAYERED, NAMESPACE, compute, content, found, in_host, opened_store, prompt, serving
from tierkv.daemon.blocks import Blocks
from tierkv.hints import NO_ENDING
from tierkv.keys import chain
from tierkv.match import Match
from tierkv.store import Store
from tierkv.testing import FakeClock, blocks_of, make_run
from tierkv.testing.cuda import FakeCuda
from tierkv.tiers.base import Miss, Run
from tierkv.tiers.device import PagePool
from tierkv.tiers.host import HostSlab
from tierkv.transfers import HOST

BLOCKS = 20
TOKENS = prompt(BLOCKS)
ROOT = NAMESPACE.root()
RUN = Run(ROOT, ROOT, 0, tuple(chain(ROOT, TOKENS, block_tokens=LAYERED.block_tokens)), TOKENS)
GROUPS = [1, 2, LAYERED.num_layers]
(LONG, OTHER) = random_prompts([61, 70])


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    with running(tmp_path, capacity="1MiB") as daemon:
        yield daemon
        daemon.until(daemon.at_rest, "all that was lent has come back")


@contextmanager
def loaded(store: Store, tokens: bytes = TOKENS) -> Iterator[tuple[Match, list[int], int]]:
    """A match of a prompt, fresh pages, and how many blocks have been loaded into them, to the last layer."""
    match = found(store, tokens)
    pages = store.allocate(match.num_blocks - match.shared)
    assert pages is not None
    blocks, _ = store.load(match, pages).result(PATIENCE_S)
    if match.arrival:
        match.arrival.finished.result(PATIENCE_S)
    store.settle(match)
    try:
        yield match, pages, blocks
    finally:
        store.free(pages)
        store.release(match)


def look(store: Store, tokens: bytes, pages: Sequence[int], blocks: int) -> None:
    for block, page in enumerate(pages[:blocks]):
        assert bytes(store.places.device.view(page)) == content(tokens, block).tobytes(), "a load brought other KV"


def leave(daemon: RunningDaemon, tokens: bytes = TOKENS) -> None:
    """Another engine has computed a prompt."""
    with opened_store(daemon.urls[0]) as store:
        compute(store, tokens)
        assert store.flush(PATIENCE_S)
    assert daemon.pool.index.stats().tiers[HOST].held >= len(tokens) // 16


# -- what comes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", GROUPS)
def test_blocks_come_out_of_the_daemons_memory_without_the_host_tier(daemon: RunningDaemon, groups: int) -> None:
    leave(daemon)
    with opened_store(daemon.urls[0], layer_groups=groups) as store:
        with loaded(store) as (match, pages, blocks):
            assert blocks == BLOCKS
            assert (match.arrival is not None) == (groups > 1)
            look(store, TOKENS, pages, blocks)
        assert store.flush(PATIENCE_S)
        assert store.index.stats().tiers[HOST].used == 0
        assert store.metrics.blocks_loaded.value("daemon") == store.metrics.blocks_loaded.value() == BLOCKS


def test_what_was_lent_is_not_saved_again_and_what_is_computed_after_it_is(daemon: RunningDaemon) -> None:
    leave(daemon)
    with opened_store(daemon.urls[0]) as store:
        tokens = prompt(BLOCKS + 3)
        match = found(store, tokens)
        pages = store.allocate(BLOCKS + 3)
        assert pages is not None and match.num_blocks == BLOCKS
        assert store.load(match, pages[:BLOCKS]).result(PATIENCE_S) == (BLOCKS, 0)
        store.settle(match)
        for block in range(BLOCKS, BLOCKS + 3):
            store.places.device.view(pages[block])[:] = content(tokens, block).data
        assert all(store.save(match, tokens, pages))
        store.end(match, NO_ENDING)
        assert store.flush(PATIENCE_S)
        assert store.index.stats().tiers[HOST].held == store.metrics.blocks_spilled.value("host", "daemon") == 3


def test_over_tcp_they_pass_through_the_host_tier(daemon: RunningDaemon) -> None:
    leave(daemon)
    with opened_store(daemon.urls[1], layer_groups=3) as store, loaded(store) as (match, pages, blocks):
        assert blocks == BLOCKS and match.arrival is None
        look(store, TOKENS, pages, blocks)
        assert in_host(store, TOKENS) == BLOCKS


@pytest.mark.parametrize("groups", GROUPS)
def test_a_path_that_begins_in_the_host_goes_on_in_the_daemons_memory(daemon: RunningDaemon, groups: int) -> None:
    leave(daemon)
    with opened_store(daemon.urls[0], layer_groups=groups) as store:
        compute(store, TOKENS[: len(TOKENS) // 2])
        assert store.flush(PATIENCE_S)
        store.evict_device()
        with loaded(store) as (match, pages, blocks):
            assert blocks == BLOCKS and len(match.lent) == BLOCKS // 2
            assert (match.arrival is not None) == (groups > 1)
            look(store, TOKENS, pages, blocks)


@pytest.mark.parametrize("groups", GROUPS)
def test_tokens_are_those_of_a_cold_run(daemon: RunningDaemon, groups: int) -> None:
    with serving(daemon.urls[0]) as one:
        one.ask(LONG)
        assert one.store.flush(PATIENCE_S)
    with serving(daemon.urls[0], layer_groups=groups) as other:
        sources = other.ask(LONG)
        assert sources["computed"] == 1
        assert sources.get("daemon", 0) + sources.get("host", 0) == 60, "some may have come to the host while it waited"
        assert other.ask(LONG)["device"] == 60


def test_more_than_a_client_may_have_on_lease_is_read_instead(tmp_path: Path) -> None:
    with running(tmp_path, capacity=100 * LAYERED.block_bytes, lease_share=0.1) as daemon:
        leave(daemon)
        with opened_store(daemon.urls[0], pages=30, layer_groups=3) as store, loaded(store) as (_, pages, blocks):
            assert blocks == BLOCKS
            look(store, TOKENS, pages, blocks)
            assert in_host(store, TOKENS) == BLOCKS


# -- what does not ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", GROUPS)
def test_a_block_that_was_overwritten_ends_the_load_before_it(daemon: RunningDaemon, groups: int) -> None:
    leave(daemon)
    ((_, lease),) = daemon.pool.index.trace(b"".join(RUN.keys[:12]))
    with lease:
        daemon.pool.slab.view(lease.places(HOST, 11, 12)[0])[100] ^= 1
    with opened_store(daemon.urls[0], layer_groups=groups) as store, loaded(store) as (_, pages, blocks):
        assert blocks == 11
        look(store, TOKENS, pages, blocks)
        assert store.metrics.misses.value("daemon") == 1
    daemon.until(lambda: daemon.pool.leading(b"".join(RUN.keys[:12])) == 11, "the daemon forgets it")


class TakenBack:
    """A daemon that takes its leases back at the first copy for which `when` holds, and gives the memory to other blocks."""

    def __init__(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: Callable[[tuple[int, int] | None], bool]
    ) -> None:
        self.clock = FakeClock()
        self._daemon = running(tmp_path, clock=self.clock, capacity=100 * LAYERED.block_bytes)
        self._when, self._copy_in, self.done = when, PagePool.copy_in, False
        self._monkeypatch = monkeypatch

    def __enter__(self) -> RunningDaemon:
        self.daemon = self._daemon.__enter__()
        owner = self

        def copy(pool: PagePool, host: HostSlab, places: Sequence[int], pages: Sequence[int], **how: Any) -> None:
            if owner._when(how.get("span")) and not owner.done:
                owner.done = True
                owner._take_back()
            owner._copy_in(pool, host, places, pages, **how)

        self._monkeypatch.setattr(PagePool, "copy_in", copy)
        return self.daemon

    def _take_back(self) -> None:
        self.clock.advance(61)
        self.daemon.until(lambda: not any(s.held for s in self.daemon.service._sessions()), "its leases are taken back")
        run = make_run(100, seed=9, layout=LAYERED)
        client = self.daemon.client()
        blocks = Blocks(client, namespace=NAMESPACE, root=run.root)
        assert not any(blocks.write(run, blocks_of(run, LAYERED)))
        blocks.close()
        client.close()

    def __exit__(self, *how: Any) -> None:
        self._daemon.__exit__(*how)


@pytest.mark.parametrize("groups", GROUPS)
def test_memory_that_is_taken_back_while_it_is_copied_is_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: int
) -> None:
    with TakenBack(tmp_path, monkeypatch, lambda span: True) as daemon:
        leave(daemon)
        with opened_store(daemon.urls[0], pages=30, layer_groups=groups) as store, loaded(store) as (match, _, blocks):
            assert blocks == 0 and not match.lent
            assert store.metrics.misses.value("daemon", Miss.LATE) == BLOCKS


def test_memory_that_is_taken_back_before_the_last_layers_are_copied_shows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TakenBack(tmp_path, monkeypatch, lambda span: bool(span and span[0])) as daemon:
        leave(daemon)
        with opened_store(daemon.urls[0], pages=30, layer_groups=3) as store, loaded(store) as (match, _, blocks):
            assert blocks == BLOCKS
            assert match.arrival is not None and not match.arrival.is_whole and not match.arrival.settle()


def test_an_engine_computes_what_was_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the step that attends to it."""
    clock, copy_in = FakeClock(), PagePool.copy_in
    with running(tmp_path, clock=clock, capacity="1MiB") as daemon:
        with serving(daemon.urls[0]) as one:
            one.ask(LONG)
            assert one.store.flush(PATIENCE_S)

        def copy(pool: PagePool, host: HostSlab, places: Sequence[int], pages: Sequence[int], **how: Any) -> None:
            copy_in(pool, host, places, pages, **how)
            if how.get("span") and how["span"][0]:
                clock.advance(61)
                daemon.until(lambda: not any(s.held for s in daemon.service._sessions()), "its leases are taken back")
                daemon.do(lambda: daemon.pool.slab.renew(places))

        with serving(daemon.urls[0], layer_groups=3) as other:
            monkeypatch.setattr(PagePool, "copy_in", copy)
            other.ask(LONG)
            monkeypatch.undo()
            other.ask(OTHER)


# -- how long ---------------------------------------------------------------------------------------------------------


def test_a_loan_is_kept_until_the_last_layers_have_been_copied(
    daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(daemon)
    begun, go_on, copy_in = threading.Event(), threading.Event(), PagePool.copy_in

    def copy(pool: PagePool, host: HostSlab, places: Sequence[int], pages: Sequence[int], **how: Any) -> None:
        if how.get("span") and how["span"][0] > 0:
            begun.set()
            assert go_on.wait(PATIENCE_S)
        copy_in(pool, host, places, pages, **how)

    monkeypatch.setattr(PagePool, "copy_in", copy)
    with opened_store(daemon.urls[0], layer_groups=3) as store:
        match = found(store, TOKENS)
        pages = store.allocate(BLOCKS)
        assert pages is not None
        done = store.load(match, pages)
        try:
            assert begun.wait(PATIENCE_S) and done.result(PATIENCE_S) == (BLOCKS, 0)
            store.settle(match)
            assert daemon.do(lambda: daemon.service.leased_bytes()) == BLOCKS * LAYERED.block_bytes
            assert daemon.do(lambda: daemon.pool.index.evict(HOST).evicted) == 0, "what is lent was forgotten"
        finally:
            go_on.set()
        assert match.arrival is not None and match.arrival.finished.result(PATIENCE_S) is None
        look(store, TOKENS, pages, BLOCKS)
        store.free(pages)
        store.release(match)


def test_a_daemon_that_ends_while_it_lends_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_in = PagePool.copy_in
    with running(tmp_path, capacity="1MiB") as daemon:
        leave(daemon)

        def copy(pool: PagePool, host: HostSlab, places: Sequence[int], pages: Sequence[int], **how: Any) -> None:
            daemon.stop()
            copy_in(pool, host, places, pages, **how)

        monkeypatch.setattr(PagePool, "copy_in", copy)
        with opened_store(daemon.urls[0]) as store, loaded(store) as (_, pages, blocks):
            assert blocks == BLOCKS
            look(store, TOKENS, pages, blocks)


# -- on a GPU ---------------------------------------------------------------------------------------------------------


class CountingCuda(FakeCuda):
    """Notes each registration."""

    def __init__(self, choose: Callable[[int], int]) -> None:
        super().__init__(choose)
        self.registered: list[int] = []

    def host_register(self, address: int, size: int) -> None:
        super().host_register(address, size)
        self.registered.append(address)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("groups", [1, 3])
def test_each_mapping_is_pinned_once_and_let_go_when_another_takes_its_place(
    tmp_path: Path, groups: int, seed: int
) -> None:
    cuda = CountingCuda(Random(seed).randrange)
    with running(tmp_path, capacity="1MiB") as daemon:
        leave(daemon)
        with opened_store(daemon.urls[0], layer_groups=groups) as store:
            pool = cuda_pool(cuda, layout=LAYERED, num_pages=64)
            put_under(store, pool)
            cuda.registered.clear()  # what was tried out

            def serve() -> set[int]:
                with loaded(store) as (_, pages, blocks):
                    assert blocks == BLOCKS
                    for block, page in enumerate(pages):
                        assert (bytes_of(pool)[page] == content(TOKENS, block)).all()
                until(lambda: len(cuda.pinned) == 1, "it is pinned")
                return set(cuda.pinned)

            first = serve()
            assert serve() == first and cuda.registered == list(first), "registered once"
            daemon.stop()
            with running(tmp_path, capacity="1MiB") as again:
                leave(again)
                until(lambda: store.below[0].tier.seek(RUN) == BLOCKS, "the store finds the new daemon")
                assert serve() != first
                until(lambda: not first & set(cuda.pinned), "the old mapping is let go")
            assert cuda.pinned
        assert not cuda.pinned


def test_a_mapping_that_is_copied_from_is_let_go_after_the_last_copy() -> None:
    cuda = CountingCuda(Random(0).randrange)
    old, new = (np.frombuffer(mmap.mmap(-1, 8 << 12), np.uint8).reshape(8, -1) for _ in range(2))
    with opened_store(None) as store:
        put_under(store, cuda_pool(cuda, layout=LAYERED))
        memory = store._memory
        with memory.staging("daemon", old):
            until(lambda: old.ctypes.data in cuda.pinned, "it is pinned")
            with memory.staging("daemon", new):
                until(lambda: new.ctypes.data in cuda.pinned, "the other is pinned")
                assert old.ctypes.data in cuda.pinned, "unpinned under a copy"
            assert old.ctypes.data in cuda.pinned
        assert set(cuda.pinned) == {new.ctypes.data}
    assert not cuda.pinned


# -- ahead of a load ----------------------------------------------------------------------------------------------------


def test_what_waits_is_lifted_in_the_daemon_and_not_copied_here(tmp_path: Path) -> None:
    with running(tmp_path, capacity="1MiB", disk="4MiB") as daemon:
        leave(daemon)
        daemon.pool.index.evict(HOST)  # only its disk has them
        with opened_store(daemon.urls[0]) as store:
            expected = store.expect(TOKENS)
            assert store.flush(PATIENCE_S)
            assert daemon.pool.index.stats().tiers[HOST].held == BLOCKS
            assert store.index.stats().tiers[HOST].used == 0 == store.metrics.blocks_prefetched.value()
            store.cancel(expected)
            with loaded(store) as (_, pages, blocks):
                assert blocks == BLOCKS
                look(store, TOKENS, pages, blocks)
        daemon.until(daemon.at_rest, "all that was lent has come back")
