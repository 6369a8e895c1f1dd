"""Pins: what they keep, where, for how long, and what is refused."""

import math

import pytest

from tests.store_parts import Parts, at_rest, held, prompt
from tierkv.errors import PinError
from tierkv.transfers import DEVICE, HOST


def forget_all(parts: Parts) -> None:
    parts.store.evict_device()
    parts.store.index.evict(HOST)


def test_pinned_blocks_stay_in_the_host_until_their_time_is_over() -> None:
    parts = Parts()
    parts.serve(prompt(1))
    pin = parts.store.pin(prompt(1), ttl_s=60.0)
    parts.steps.run_all()
    forget_all(parts)
    assert held(parts, prompt(1), HOST) == pin.num_blocks == 4
    assert parts.metrics.blocks_pinned.value() == 4
    parts.clock.advance(59.0)
    parts.store.poll()
    forget_all(parts)
    assert held(parts, prompt(1), HOST) == 4
    parts.clock.advance(1.0)
    parts.store.poll()
    forget_all(parts)
    assert held(parts, prompt(1), HOST) == 0
    assert parts.metrics.blocks_pinned.value() == 0
    parts.store.unpin(pin)


def test_a_pin_can_be_ended_before_its_time_and_twice() -> None:
    parts = Parts()
    parts.serve(prompt(1))
    pin = parts.store.pin(prompt(1), ttl_s=60.0)
    parts.steps.run_all()
    parts.store.unpin(pin)
    parts.store.unpin(pin)
    forget_all(parts)
    assert held(parts, prompt(1), HOST) == 0
    assert parts.store.index.stats().num_leases == 0


def test_a_pin_that_ends_before_it_was_copied_keeps_nothing() -> None:
    parts = Parts()
    parts.serve(prompt(1))
    parts.store.unpin(parts.store.pin(prompt(1), ttl_s=60.0))
    parts.steps.run_all()
    assert parts.store.index.stats().num_leases == 0


def test_a_pin_takes_no_page_from_the_engine() -> None:
    parts = Parts(pages=4)
    parts.serve(prompt(1))
    parts.store.pin(prompt(1), ttl_s=60.0)
    parts.steps.run_all()
    pages = parts.store.allocate(4)
    assert pages is not None and held(parts, prompt(1), HOST) == 4
    parts.store.free(pages)


def test_a_pin_is_copied_to_the_host_where_that_waits_for_a_second_use() -> None:
    parts = Parts(edges=("second_use", "second_use", "second_use"))
    parts.serve(prompt(1))
    parts.steps.run_all()
    assert held(parts, prompt(1), HOST) == 0
    parts.store.pin(prompt(1), ttl_s=60.0)
    parts.steps.run_all()
    assert held(parts, prompt(1), HOST) == 4


def test_a_pin_brings_up_what_lies_at_rest() -> None:
    parts = at_rest(prompt(1))
    pin = parts.store.pin(prompt(1), ttl_s=60.0)
    parts.steps.run_all()
    forget_all(parts)
    assert held(parts, prompt(1), HOST) == pin.num_blocks == 4


def test_a_pin_is_as_long_as_what_could_be_brought_up() -> None:
    parts = at_rest(prompt(1))
    parts.own.delete(list(parts.own.stored)[2:])
    pin = parts.store.pin(prompt(1), ttl_s=60.0)
    assert pin.num_blocks == 4
    parts.steps.run_all()
    assert pin.num_blocks == 2 == parts.metrics.blocks_pinned.value()


def test_a_pin_of_what_nobody_knows_keeps_nothing() -> None:
    parts = Parts()
    assert parts.store.pin(prompt(1), ttl_s=60.0).num_blocks == 0
    parts.steps.run_all()


def test_pins_beyond_their_part_of_the_host_are_refused_in_a_line_that_says_why() -> None:
    parts = Parts(host=10)
    for number in (1, 2):
        parts.serve(prompt(number))
        parts.steps.run_all()
    first = parts.store.pin(prompt(1), ttl_s=60.0)
    with pytest.raises(
        PinError, match=r"pin of 4 blocks: pins may keep 5 blocks of the host tier and keep 4 already; unpin"
    ):
        parts.store.pin(prompt(2), ttl_s=60.0)
    parts.steps.run_all()
    parts.store.unpin(first)
    parts.store.pin(prompt(2), ttl_s=60.0)
    parts.steps.run_all()
    assert held(parts, prompt(2), HOST) == 4


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, math.inf, math.nan])
def test_a_pin_without_an_end_or_a_beginning_is_refused(ttl_s: float) -> None:
    with pytest.raises(PinError, match="give a number of seconds above 0"):
        Parts().store.pin(prompt(1), ttl_s=ttl_s)


def test_a_pinned_block_whose_page_is_forgotten_is_loaded_from_the_host() -> None:
    parts = Parts(pages=4)
    parts.serve(prompt(1))
    parts.store.pin(prompt(1), ttl_s=60.0)
    parts.steps.run_all()
    forget_all(parts)
    match = parts.store.take(parts.store.search(prompt(1)))
    assert [(tier, lo, hi) for tier, lo, hi in match.lease.sources()] == [(HOST, 0, 4)] and DEVICE == 0
    parts.store.release(match)
