"""A load whose first layers are attended to before its last have come: the same tokens, and nobody sees half a page."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from tests.engine_models import generate, int32, random_prompts, tiny_model
from tests.test_engine_graphs import Repeated
from tierkv.arrival import Arrival
from tierkv.config import Config, DeviceConfig, HostConfig, TransferConfig
from tierkv.connectors.engine import EngineConnector
from tierkv.engine import Engine, EngineConfig, SamplingParams
from tierkv.engine.graphs import GraphFactory
from tierkv.errors import TierError
from tierkv.layout import Layout
from tierkv.store import Store
from tierkv.tiers.device import PagePool
from tierkv.tiers.host import HostSlab
from tierkv.transfers import HOST

BLOCK = 4
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)
(PROMPT, OTHER) = random_prompts([41, 50])
MODEL, REFERENCE = tiny_model(), tiny_model()


@pytest.fixture(autouse=True)
def an_end() -> Iterator[None]:
    """What waits for ever fails, and so does closing what still waits."""

    def fail(*_: object) -> None:
        raise TimeoutError("nothing moves any more")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, 20, 2)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@contextmanager
def opened(*, groups: int = 3, pages: int = 30, graphs: GraphFactory | None = None) -> Iterator[tuple[Engine, Store]]:
    """Pieces of three blocks, so that loads have several."""
    from tierkv import building
    from tierkv.assembly import open_store

    piece, building.MAX_PIECE_BLOCKS = building.MAX_PIECE_BLOCKS, 3

    stores: list[Store] = []

    def connect(layout: Layout, device: torch.device, model: str) -> EngineConnector:
        config = Config(
            device=DeviceConfig(capacity=pages * layout.block_bytes),
            host=HostConfig(capacity=200 * layout.block_bytes),
            transfer=TransferConfig(layer_groups=groups),
        )
        stores.append(open_store(config, layout=layout, model=model, device=device))
        building.MAX_PIECE_BLOCKS = piece
        return EngineConnector(stores[0])

    config = EngineConfig(block_tokens=BLOCK, max_batch_tokens=16, max_sequences=4)
    engine = Engine(MODEL, None, config, connector=connect, graphs=graphs)
    try:
        yield engine, stores[0]
    finally:
        engine.close()
        stores[0].close()


def leave_on_host(engine: Engine, store: Store) -> None:
    """Serve the prompt, and push it out of the device."""
    ask(engine, PROMPT)
    store.mover.drain()
    ask(engine, OTHER)
    store.mover.drain()


def ask(engine: Engine, prompt: Sequence[int]) -> dict[str, int]:
    (output,) = engine.generate([list(prompt)], GREEDY)
    assert list(output.token_ids) == generate(REFERENCE, list(prompt), num_tokens=6)
    return dict(output.stats.sources)


def test_tokens_are_those_of_a_whole_load() -> None:
    with opened(pages=16) as (engine, store):
        leave_on_host(engine, store)
        assert ask(engine, PROMPT).get("host", 0) >= 30


def test_groups_come_one_after_the_other_and_the_first_is_enough_to_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[int, int] | None] = []
    waited = [threading.Event() for _ in range(3)]
    copy_in, wait = PagePool.copy_in, Arrival.wait

    def copy(self: PagePool, host: HostSlab, places: Sequence[int], pages: Sequence[int], **how: Any) -> None:
        """As slow as can be: a group comes once the layer before it is there for the engine, or never."""
        span = how.get("span")
        if span is not None and span[0]:
            assert waited[span[0] * 3 // host.block_bytes - 1].wait(5), "the engine waits for all of a load"
        moved.append(span)
        copy_in(self, host, places, pages, **how)

    def watch(self: Arrival, layer: int) -> None:
        wait(self, layer)
        waited[layer].set()

    monkeypatch.setattr(PagePool, "copy_in", copy)
    monkeypatch.setattr(Arrival, "wait", watch)
    with opened(pages=16) as (engine, store):
        leave_on_host(engine, store)
        moved.clear()
        ask(engine, PROMPT)
        layer = store.layout.block_bytes // store.layout.num_layers
        spans = [span for span in moved if span]
        assert len(spans) > 6 and spans == sorted(spans)
        assert set(spans) == {(0, layer), (layer, 2 * layer), (2 * layer, 3 * layer)}
        assert all(event.is_set() for event in waited)


def test_a_request_that_ends_while_layers_come_keeps_its_pages_until_they_have_come() -> None:
    with opened(pages=16) as (engine, store):
        leave_on_host(engine, store)
        connector = engine.connector
        assert isinstance(connector, EngineConnector)
        late = Arrival([0, 1, 2, 3])
        real, connector.arrival = connector.arrival, lambda request: late  # type: ignore[method-assign]  # a load as slow as can be
        name = engine.add(PROMPT, GREEDY)
        scheduler = engine._core.scheduler
        while not scheduler._running:
            engine._core._poll()
            scheduler.schedule()
        connector.arrival = real  # type: ignore[method-assign]
        held = store.index.room(0)[0]
        engine.abort(name)
        scheduler.settle()
        assert store.index.room(0)[0] == held, "pages went back while they were being written"
        late.finish()
        scheduler.settle()
        assert store.index.room(0)[0] > held
        assert scheduler.is_idle


def hold_later(begun: threading.Event, go_on: threading.Event) -> Callable[..., None]:
    """A `copy_in` that says when it is asked for a later group, and makes it wait."""
    copy_in = PagePool.copy_in

    def copy(self: PagePool, host: HostSlab, places: Sequence[int], pages: Sequence[int], **how: Any) -> None:
        if how.get("span") and how["span"][0] > 0:
            begun.set()
            assert go_on.wait(10)
        copy_in(self, host, places, pages, **how)

    return copy


def test_host_places_belong_to_a_load_until_its_last_layers_have_been_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asked for the load has its answer, and keeps no more pins than what lies on the device."""
    begun, go_on = threading.Event(), threading.Event()
    with opened(pages=16) as (engine, store):
        leave_on_host(engine, store)
        store.evict_device()
        match = store.take(store.search(int32(PROMPT[:40])))
        assert (match.num_blocks, match.shared, match.head_tokens) == (10, 0, 0)
        kept = store.places.host.rows[match.lease.places(HOST, 0, match.num_blocks)]  # a copy
        pages = store.allocate(match.num_blocks)
        assert pages is not None
        monkeypatch.setattr(PagePool, "copy_in", hold_later(begun, go_on))
        done = store.load(match, pages)
        assert begun.wait(10) and done.result(10)[0] == match.num_blocks
        arrival = match.arrival
        try:
            store.settle(match)
            store.index.evict(HOST)
            free = store.index.reserve(HOST, store.index.room(HOST)[0])  # whatever anybody else can get now
            assert free is not None and len(free.places) > 100
            store.places.host.rows[list(free.places)] = 0xA5
        finally:
            go_on.set()
        assert arrival is not None and arrival.finished.result(10) is None
        pool = store.places.device.pool
        came = pool[pages].view(torch.uint8).view(len(pages), -1).numpy()
        assert (came == kept[:, : came.shape[1]]).all()
        store.index.free(HOST, free.places)
        store.free(pages)
        store.release(match)


def test_steps_are_replayed_again_once_all_layers_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, wait = threading.Event(), threading.Event(), Arrival.wait

    def asked(self: Arrival, layer: int) -> None:
        """The step has begun, so that it runs as it comes."""
        go_on.set()
        wait(self, layer)

    monkeypatch.setattr(Arrival, "wait", asked)
    with opened(pages=16, graphs=Repeated) as (engine, store):
        leave_on_host(engine, store)
        monkeypatch.setattr(PagePool, "copy_in", hold_later(begun, go_on))
        before = engine.stats.graph_steps
        assert ask(engine, PROMPT).get("host", 0) >= 30
        assert begun.is_set() and engine.stats.graph_steps - before == 5, "all but the step that waits for layers"


def break_later(times: int) -> Callable[..., None]:
    """A `copy_in` that fails for later groups, so many times."""
    copy_in, left = PagePool.copy_in, [times]

    def copy(self: PagePool, host: HostSlab, places: Sequence[int], pages: Sequence[int], **how: Any) -> None:
        if how.get("span") and how["span"][0] > 0 and left[0]:
            left[0] -= 1
            raise TierError("the link is gone")
        copy_in(self, host, places, pages, **how)

    return copy


def test_a_layer_that_never_comes_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(pages=16) as (engine, store):
        leave_on_host(engine, store)
        monkeypatch.setattr(PagePool, "copy_in", break_later(1))
        ask(engine, PROMPT)  # the tokens are those of the cold run
        assert store.metrics.misses.value() > 0


@pytest.mark.parametrize("whole", [False, True], ids=["later groups", "whole loads too"])
def test_a_link_that_stays_broken_costs_time_and_no_request(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(pages=20) as (engine, store):
        leave_on_host(engine, store)
        copy_in = PagePool.copy_in

        def broken(self: PagePool, host: HostSlab, places: Sequence[int], pages: Sequence[int], **how: Any) -> None:
            if whole or (how.get("span") and how["span"][0] > 0):
                raise TierError("the link is gone")
            copy_in(self, host, places, pages, **how)

        monkeypatch.setattr(PagePool, "copy_in", broken)
        innocent = list(range(1, 9))
        outputs = engine.generate([PROMPT, innocent], GREEDY)
        for prompt, output in zip((PROMPT, innocent), outputs, strict=True):
            assert list(output.token_ids) == generate(REFERENCE, prompt, num_tokens=6)
        assert sum(outputs[0].stats.sources.values()) == len(PROMPT)


def test_a_request_that_is_ended_while_it_loads_keeps_its_pages_until_all_layers_have_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The load has answered with its first layers, the engine has not taken that up yet: the pages are still being written."""
    planned, begun, go_on = threading.Event(), threading.Event(), threading.Event()
    copy_in = PagePool.copy_in

    def slow(self: PagePool, host: HostSlab, places: Sequence[int], pages: Sequence[int], **how: Any) -> None:
        assert planned.wait(20)
        if how.get("span") and how["span"][0] > 0:
            begun.set()
            assert go_on.wait(20)
        copy_in(self, host, places, pages, **how)

    with opened(pages=16) as (engine, store):
        leave_on_host(engine, store)
        monkeypatch.setattr(PagePool, "copy_in", slow)
        scheduler = engine._core.scheduler
        name = engine.add(PROMPT, GREEDY)
        scheduler.schedule()
        planned.set()
        assert begun.wait(20)
        assert scheduler._loading, "it has been taken up"
        held = store.index.room(0)[0]
        engine.abort(name)
        scheduler.settle()
        assert store.index.room(0)[0] == held, "pages went back while they were being written"
        go_on.set()
        store.mover.drain()
        scheduler.settle()
        assert store.index.room(0)[0] > held
        assert scheduler.is_idle
        monkeypatch.undo()
        ask(engine, PROMPT)


@pytest.mark.parametrize("what", ["suspend", "fork"])
def test_nobody_is_shown_pages_before_all_layers_have_come(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(pages=16) as (engine, store):
        leave_on_host(engine, store)
        late = Arrival([0, 1, 2, 3])
        monkeypatch.setattr(engine.connector, "arrival", lambda request: late)
        name = engine.add(PROMPT, GREEDY)
        scheduler = engine._core.scheduler
        while not scheduler._running:
            scheduler.schedule()
        monkeypatch.undo()
        act = partial(scheduler._suspend, scheduler._running[0]) if what == "suspend" else partial(engine.fork, name)
        thread = threading.Thread(target=act)
        thread.start()
        try:
            thread.join(0.05)
            assert thread.is_alive(), "it did not wait"
            assert scheduler._running[0].num_offered == 0
        finally:
            late.finish()
            thread.join(20)
        assert not thread.is_alive()
        while engine.has_work:
            engine.step()
