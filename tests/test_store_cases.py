"""Cases that a reader, or a state machine, once found broken: each stays as it was found."""

from typing import Any

import numpy as np
import pytest

from tests.engine_models import FAMILIES, make_model, random_prompts
from tests.store_parts import STEP, TINY, Parts, content
from tests.test_end_to_end import GREEDY, opened
from tierkv.connectors.engine import EngineConnector
from tierkv.engine import SamplingParams, core
from tierkv.errors import RequestError, TierError
from tierkv.keys import chain, token_bytes
from tierkv.tiers.base import Run
from tierkv.transfers import DEVICE, HOST


def test_a_suspended_tail_is_not_put_behind_blocks_that_others_have_saved_meanwhile() -> None:
    parts = Parts()
    connector, tokens = EngineConnector(parts.store), token_bytes(range(10, 25))
    assert connector.match("r", tokens) is None
    parts.steps.run_all()
    hit = connector.match("r", tokens)
    assert hit is not None and hit.num_tokens == 0
    pages = connector.allocate(7)
    assert pages is not None
    parts.page(pages[0])[:] = content(tokens, 0)
    parts.page(pages[1])[:] = 77  # one token of block 1
    connector.save("r", tokens[: 3 * 4], pages[:1])
    moved = connector.suspend("r", tail=pages[1], num_tokens=3)
    parts.steps.run_all()
    assert moved.done()
    connector.free(pages[1:])
    keys = chain(parts.store.root, tokens[: 5 * STEP], block_tokens=TINY.block_tokens)
    blocks = [memoryview(content(tokens, block).tobytes()) for block in range(5)]
    parts.shared.write(Run(parts.store.root, parts.store.root, 0, tuple(keys), tokens[: 5 * STEP]), blocks)
    connector.match("r", tokens)
    parts.steps.run_all()
    hit = connector.match("r", tokens)
    assert hit is not None and hit.num_tokens == 10
    fresh = connector.allocate(sum(page is None for page in hit.pages)) or []
    usable = connector.load("r", fresh)
    parts.steps.run_all()
    assert usable.result() == 10
    own = iter(fresh)
    table = [next(own) if page is None else page for page in hit.pages]
    assert all((parts.page(page) == content(tokens, block)).all() for block, page in enumerate(table))
    connector.free(fresh)
    connector.release("r")
    parts.steps.run_all()
    assert parts.store.index.stats().num_leases == 0
    assert parts.store.index.stats().tiers[HOST].used == parts.store.index.stats().tiers[HOST].held


def test_a_request_goes_on_in_the_middle_of_a_suspended_page() -> None:
    parts = Parts()
    connector, tokens = EngineConnector(parts.store), token_bytes(range(10, 16))
    connector.match("r", tokens)
    parts.steps.run_all()
    assert connector.match("r", tokens) is not None
    pages = connector.allocate(3) or []
    parts.page(pages[0])[:], parts.page(pages[1])[:] = content(tokens, 0), 77
    connector.save("r", tokens[: 3 * 4], pages[:1])
    connector.suspend("r", tail=pages[1], num_tokens=3)
    parts.steps.run_all()
    connector.free(pages[1:])
    parts.store.evict_device()
    connector.match("r", tokens)
    parts.steps.run_all()
    hit = connector.match("r", tokens)
    assert hit is not None and hit.num_tokens == 3 and len(hit.pages) == 2
    fresh = connector.allocate(2) or []
    usable = connector.load("r", fresh)
    parts.steps.run_all()
    assert usable.result() == 3
    assert (parts.page(fresh[0]) == content(tokens, 0)).all() and (parts.page(fresh[1]) == 77).all()


def test_a_suspend_that_fails_keeps_nothing_and_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts()
    connector, tokens = EngineConnector(parts.store), token_bytes(range(10, 16))
    connector.match("r", tokens)
    parts.steps.run_all()
    assert connector.match("r", tokens) is not None
    pages = connector.allocate(2) or []

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("the copy failed")

    monkeypatch.setattr(parts.store.places.device, "copy_out", fails)
    moved = connector.suspend("r", tail=pages[0], num_tokens=1)
    parts.steps.run_all()
    assert moved.done()
    connector.match("r", tokens)
    parts.steps.run_all()
    assert connector.match("r", tokens) is not None
    assert parts.store.index.stats().tiers[HOST].used == 0


@pytest.mark.parametrize("refused", ["copy_in", "copy_out"])
def test_a_copy_that_the_device_refuses_is_a_miss(
    refused: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parts = Parts(pages=4, edges=("save", "save", "save"))
    connector, tokens = EngineConnector(parts.store), token_bytes(range(10, 16))
    parts.serve(tokens)
    if refused == "copy_in":
        parts.steps.run_all()
        parts.serve(token_bytes(range(30, 38)))  # pushes it out of the device
    with monkeypatch.context() as broken:

        def refuse(*_: Any, **__: Any) -> None:
            raise TierError("cudaErrorInvalidValue")

        broken.setattr(parts.store.places.device, refused, refuse)
        parts.steps.run_all()
        if refused == "copy_in":
            hit = connector.match("r", tokens) or (parts.steps.run_all(), connector.match("r", tokens))[1]
            assert hit is not None and hit.num_tokens == 6
            usable = connector.load("r", connector.allocate(sum(page is None for page in hit.pages)) or [])
            parts.steps.run_all()
            assert usable.result() == 0
            assert parts.metrics.misses.value() == 3
        else:
            assert parts.metrics.saves_dropped.value() >= 3
            assert parts.store.index.stats().tiers[HOST].used == 0
    assert not caplog.records, "logged as a defect of ours"


def test_suspends_do_not_queue_behind_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, lanes = Parts(), list[str]()
    submit = parts.store.mover.submit
    monkeypatch.setattr(
        parts.store.mover, "submit", lambda lane, job, blocks: (lanes.append(lane), submit(lane, job, blocks=blocks))[1]
    )
    connector, tokens = EngineConnector(parts.store), token_bytes(range(10, 16))
    connector.match("r", tokens)
    parts.steps.run_all()
    assert connector.match("r", tokens) is not None
    connector.suspend("r", tail=None, num_tokens=0)
    assert lanes[-1] == "suspend"
    parts.steps.run_all()


def test_what_is_spilled_to_the_host_is_written_through_from_there() -> None:
    parts = Parts(pages=6, edges=("spill", "save", "save"))
    for seed in range(6):
        parts.serve(token_bytes(np.random.default_rng(seed).integers(0, 99, 8, dtype=np.int32)))
        parts.steps.run_all()
    assert len(parts.own.stored) > 4 and parts.own.stored.keys() == parts.shared.stored.keys()


def test_a_head_that_a_tier_has_lost_is_looked_for_once() -> None:
    parts = Parts(host=1, edges=("save", "save", "second_use"))
    tokens = token_bytes(range(4))
    parts.serve(tokens)
    parts.steps.run_all()
    parts.own.delete(list(parts.own.stored))
    parts.store.evict_device()
    parts.store.index.evict(HOST)
    heads = []
    for _ in range(3):
        search = parts.store.search(token_bytes([0, 99]))
        parts.steps.run_all()
        match = parts.store.take(search)
        heads.append(match.head_tokens)
        page = parts.store.allocate(1) or []
        loaded = parts.store.load(match, page if match.head_tokens else [])
        parts.steps.run_all()
        assert loaded.result() == (0, 0)
        parts.store.free(page)
        parts.store.release(match)
    assert heads == [1, 0, 0]


def test_a_load_that_is_queued_when_the_store_closes_is_answered() -> None:
    parts = Parts()
    tokens = token_bytes(range(8))
    parts.serve(tokens)
    parts.steps.run_all()
    parts.store.evict_device()
    match = parts.store.take(parts.store.search(tokens))
    pages = parts.store.allocate(4) or []
    loaded = parts.store.load(match, pages)
    parts.store.mover.drain = lambda timeout_s=None: False  # type: ignore[method-assign]  # nobody steps the jobs
    parts.store.close()
    assert loaded.result(0) == (0, 0)


def test_a_failed_write_is_a_dropped_save_and_no_miss() -> None:
    parts = Parts(edges=("save", "save", "second_use"))
    parts.faulty[0].fail_after = 0
    parts.serve(token_bytes(range(8)))
    parts.steps.run_all()
    assert parts.metrics.saves_dropped.value("memory") == 4
    assert parts.metrics.misses.value("memory") == 0


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(*FAMILIES["llama, GQA, tied"])


def test_an_interrupt_while_sampling_leaves_other_requests_running(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, calls = random_prompts((60, 70)), iter(range(100))
    real = core.sample

    def interrupted(*given: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(core, "sample", interrupted)
    with opened(model) as setup:
        setup.engine.add(prompts[0], GREEDY, request_id="other")
        with pytest.raises(KeyboardInterrupt):
            setup.run(prompts[1:])
        tokens = [token for _ in range(100) for piece in setup.engine.step() for token in piece.token_ids]
        assert not setup.engine.has_work
        assert len(tokens) == GREEDY.max_tokens
    with opened(model) as setup:
        assert setup.run(prompts[:1]) == [tokens]


def test_a_stream_that_nobody_reads_leaves_no_work(model: Any) -> None:
    with opened(model) as setup:
        setup.engine.stream(random_prompts((60,))[0], GREEDY)
        assert not setup.engine.has_work


def test_an_id_with_output_that_nobody_took_is_in_use(model: Any) -> None:
    prompts = random_prompts((20, 30))
    with opened(model) as setup:
        setup.engine.add(prompts[0], GREEDY, request_id="x")
        setup.run(prompts[1:], SamplingParams(max_tokens=20, ignore_eos=True))
        with pytest.raises(RequestError, match="in use"):
            setup.engine.add(prompts[1], GREEDY, request_id="x")


def test_names_that_look_like_samples_of_others_share_nothing(model: Any) -> None:
    prompts = random_prompts((60, 70))
    with opened(model) as setup:
        setup.engine.add(prompts[0], GREEDY, request_id="a/1")
        setup.engine.add(
            prompts[1], SamplingParams(max_tokens=8, n=2, temperature=1.0, ignore_eos=True), request_id="a"
        )
        while setup.engine.has_work:
            setup.engine.step()
        setup.store.flush()
        assert setup.store.index.stats().num_leases == 0
        assert setup.store.index.stats().tiers[DEVICE].used == setup.store.index.stats().tiers[DEVICE].held
