"""Requests that wait: their blocks are forgotten last, and come to host memory while no load is held up by it."""

import pytest

from tests.store_parts import PIECE, STEP, Parts, at_rest, content, held, prompt
from tierkv import policies
from tierkv.connectors.base import Hit
from tierkv.connectors.engine import EngineConnector
from tierkv.keys import token_bytes
from tierkv.tiers.base import Miss
from tierkv.transfers import HOST, copy_up

OTHER = "another request"


def taken(parts: Parts, connector: EngineConnector, request: str, tokens: bytes) -> Hit:
    hit = connector.match(request, tokens)
    if hit is None:
        parts.steps.run_all()
        hit = connector.match(request, tokens)
    assert hit is not None
    return hit


# -- forgotten last ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", policies.NAMES)
@pytest.mark.parametrize("waits", [False, True])
def test_blocks_of_a_waiting_request_are_forgotten_after_all_others(policy: str, waits: bool) -> None:
    parts = Parts(pages=12, policy=policy, edges=("second_use", "second_use", "second_use"))
    connector, old = EngineConnector(parts.store), prompt(1)
    parts.serve(old)
    for number in (2, 3):
        parts.serve(prompt(number))
        parts.serve(prompt(number))  # twice: whatever the policy, the old one is worth less
    parts.steps.run_all()
    if waits:
        connector.expect(OTHER, old)
    parts.store.free(parts.store.allocate(4) or [])
    assert held(parts, old, 0) == (4 if waits else 0)
    connector.release(OTHER)


def test_a_waiting_request_never_costs_another_its_pages() -> None:
    parts = Parts(pages=4)
    connector = EngineConnector(parts.store)
    parts.serve(prompt(1))
    parts.steps.run_all()
    connector.expect("waits", prompt(1))
    pages = parts.store.allocate(4)
    assert pages is not None and len(pages) == 4
    parts.store.free(pages)


def test_a_request_that_is_gone_protects_nothing_any_more() -> None:
    parts = Parts(pages=8, edges=("second_use", "second_use", "second_use"))
    connector = EngineConnector(parts.store)
    parts.serve(prompt(1))
    parts.serve(prompt(2))
    parts.steps.run_all()
    connector.expect("waits", prompt(1))
    connector.release("waits")
    connector.release("waits")
    parts.store.free(parts.store.allocate(4) or [])
    assert held(parts, prompt(1), 0) == 0 and held(parts, prompt(2), 0) == 4


def test_a_match_that_waits_again_lets_go_of_its_pins() -> None:
    parts = Parts(pages=4)
    connector, tokens = EngineConnector(parts.store), prompt(1)
    parts.serve(tokens)
    parts.steps.run_all()
    assert taken(parts, connector, "r", tokens).num_tokens == 8
    assert parts.store.allocate(1) is None
    connector.expect("r", tokens)
    assert parts.store.allocate(1) is not None
    connector.release("r")
    parts.steps.run_all()
    assert parts.store.index.stats().num_leases == 0


# -- brought up -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_what_lies_at_rest_comes_from_the_host_when_the_request_is_taken_up(shared: bool) -> None:
    tokens = prompt(1)
    parts = at_rest(tokens, shared=shared)
    connector = EngineConnector(parts.store)
    connector.expect("r", tokens)
    parts.steps.run_all()
    hit = taken(parts, connector, "r", tokens)
    assert hit.sources == {"host": 8}
    usable = connector.load("r", parts.store.allocate(4) or [])
    parts.steps.run_all()
    assert usable.result() == 8
    assert parts.metrics.blocks_prefetched.value("shared" if shared else "memory") == 4
    assert parts.metrics.blocks_loaded.value("host") == 4
    assert parts.metrics.blocks_loaded.value() == 4


def test_without_a_word_ahead_it_comes_from_the_tier_at_rest() -> None:
    parts = at_rest(prompt(1))
    assert taken(parts, EngineConnector(parts.store), "r", prompt(1)).sources == {"memory": 8}


def test_no_piece_is_begun_while_a_load_is_queued() -> None:
    parts = Parts()
    connector, tokens, others = EngineConnector(parts.store), prompt(1), [prompt(2), prompt(3)]
    for known in (tokens, *others):
        parts.serve(known)
        parts.steps.run_all()
    parts.store.evict_device()
    parts.store.index.evict(HOST)
    for number, other in enumerate(others):
        assert taken(parts, connector, str(number), other).num_tokens == 8
    connector.load("0", parts.store.allocate(4) or [])
    connector.expect("waits", tokens)
    parts.store.poll()
    assert len(parts.steps.queue) == 1, "a piece is queued beside the load"
    parts.steps.step()
    parts.store.poll()
    assert len(parts.steps.queue) == 1 and held(parts, tokens, HOST) == 0
    connector.load("1", parts.store.allocate(4) or [])
    parts.steps.step(0)  # the piece that was queued before the load
    assert held(parts, tokens, HOST) == PIECE
    assert len(parts.steps.queue) == 1, "another piece is queued beside the load"
    parts.steps.step()
    parts.store.poll()
    parts.steps.run_all()
    assert held(parts, tokens, HOST) == 4


def test_only_a_part_of_the_host_is_filled_ahead() -> None:
    parts = Parts(host=20, slots=40)
    connector = EngineConnector(parts.store)
    for number in range(4):
        parts.serve(prompt(number))
        parts.steps.run_all()
    parts.store.evict_device()
    parts.store.index.evict(HOST)
    for number in range(4):
        connector.expect(str(number), prompt(number))
    parts.steps.run_all()
    assert [held(parts, prompt(number), HOST) for number in range(4)] == [4, 1, 0, 0], (
        "a quarter of 20, the first first"
    )
    connector.release("0")
    parts.store.poll()
    parts.steps.run_all()
    assert [held(parts, prompt(number), HOST) for number in range(4)] == [4, 4, 1, 0]


def test_a_request_that_has_been_matched_leaves_its_part_of_the_host_to_others() -> None:
    parts = Parts(host=20, slots=40)
    connector = EngineConnector(parts.store)
    for number in range(2):
        parts.serve(prompt(number))
        parts.steps.run_all()
    parts.store.evict_device()
    parts.store.index.evict(HOST)
    for number in range(2):
        connector.expect(str(number), prompt(number))
    parts.steps.run_all()
    assert held(parts, prompt(1), HOST) == 1
    assert taken(parts, connector, "0", prompt(0)).sources == {"host": 8}
    parts.store.poll()
    parts.steps.run_all()
    assert held(parts, prompt(1), HOST) == 4


def test_blocks_that_are_on_their_way_already_are_not_read_twice() -> None:
    tokens = prompt(1)
    parts = at_rest(tokens)
    index = parts.store.index
    with index.keep(parts.store.root, tokens) as lease:
        under_way = index.begin_copy(lease, HOST, 1, 2)
        assert under_way is not None
        below = parts.store.below[0]
        assert copy_up(parts.store.places, below, lease, 0, 4, deadline=9.0) == 3
        index.abort(under_way)
        for lo, hi in ((0, 1), (2, 4)):
            assert lease.held(HOST, lo, hi) == [(lo, hi)]
            for block, place in zip(range(lo, hi), lease.places(HOST, lo, hi), strict=True):
                assert (parts.row(place) == content(tokens, block)).all()


def test_a_request_that_is_gone_brings_nothing_more() -> None:
    tokens = prompt(1, num_blocks=8)
    parts = at_rest(tokens)
    connector = EngineConnector(parts.store)
    connector.expect("r", tokens)
    parts.steps.step()
    connector.release("r")
    parts.steps.run_all()
    assert parts.metrics.blocks_prefetched.value() == PIECE
    parts.store.poll()
    assert not parts.steps.queue


def test_a_tier_that_fails_is_not_asked_again_for_the_same_request() -> None:
    parts = at_rest(prompt(1))
    parts.faulty[0].fail_after = 0
    connector = EngineConnector(parts.store)
    connector.expect("r", prompt(1))
    parts.steps.run_all()
    parts.store.poll()
    assert not parts.steps.queue
    assert parts.metrics.blocks_prefetched.value() == 0
    assert parts.metrics.misses.value("memory", Miss.FAILED) == PIECE
    assert taken(parts, connector, "r", prompt(1)).sources == {"memory": 8}


def test_a_damaged_block_is_forgotten_when_it_is_brought_up() -> None:
    parts = at_rest(prompt(1))
    key = list(parts.own.stored)[2]
    parts.own.stored[key] = bytes([parts.own.stored[key][0] ^ 1]) + parts.own.stored[key][1:]
    parts.shared.delete(list(parts.shared.stored))
    connector = EngineConnector(parts.store)
    connector.expect("r", prompt(1))
    parts.steps.run_all()
    assert held(parts, prompt(1), HOST) == 2
    assert taken(parts, connector, "r", prompt(1)).num_tokens == 4
    assert parts.metrics.corrupt_blocks.value() == 1


def test_a_store_that_closes_with_requests_waiting_keeps_no_lease() -> None:
    parts = at_rest(prompt(1))
    connector = EngineConnector(parts.store)
    connector.expect("r", prompt(1))
    parts.steps.run_all()
    parts.store.close()
    assert parts.store.index.stats().num_leases == 0


def test_the_tail_of_a_suspended_request_outlives_its_wait() -> None:
    parts = Parts()
    connector, tokens = EngineConnector(parts.store), token_bytes(range(10, 16))
    taken(parts, connector, "r", tokens)
    pages = connector.allocate(3) or []
    connector.save("r", tokens[: STEP + 4], pages[:1])
    connector.suspend("r", tail=pages[1], num_tokens=3)
    parts.steps.run_all()
    connector.free(pages[1:])
    connector.expect("r", tokens)
    assert taken(parts, connector, "r", tokens).num_tokens == 3
    connector.expect("r", tokens)
    assert taken(parts, connector, "r", tokens).num_tokens == 3
    connector.release("r")
    parts.steps.run_all()
    assert parts.store.index.stats().tiers[HOST].used == parts.store.index.stats().tiers[HOST].held
