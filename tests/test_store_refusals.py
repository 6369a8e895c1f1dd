"""A host that refuses what is worth little: who must not be refused, and that tiers below it do not starve."""

import pytest

from tests.store_parts import Parts, held, prompt
from tierkv.connectors.engine import EngineConnector
from tierkv.transfers import HOST

HOT = range(1, 6)
AT_REST = 2
POLICIES = ("lru", "adaptive", "cost")
NOT_THROUGH = ("save", "second_use", "second_use")


def serve(parts: Parts, *numbers: int, pause_s: float = 0.1) -> None:
    for number in numbers:
        parts.serve(prompt(number))
        parts.steps.run_all()
        parts.clock.advance(pause_s)


def busy(policy: str, edges: tuple[str, str, str] = NOT_THROUGH) -> Parts:
    """A store whose host is full of prompts that are used all the time."""
    parts = Parts(policy=policy, history=1000, pages=14, host=20, slots=4000, edges=edges)
    for _ in range(30):
        serve(parts, *HOT)
    assert parts.store.index.room(HOST)[0] == 0
    return parts


def test_what_is_worth_little_is_refused() -> None:
    """Or the tests below show nothing."""
    parts = busy("adaptive")
    serve(parts, 9)
    assert held(parts, prompt(9), HOST) == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_a_pin_is_not_refused(policy: str) -> None:
    parts = busy(policy)
    serve(parts, 9, pause_s=0)
    pin = parts.store.pin(prompt(9), ttl_s=60)
    parts.steps.run_all()
    assert pin.num_blocks == held(parts, prompt(9), HOST) == 4


@pytest.mark.parametrize("policy", POLICIES)
def test_a_suspended_request_is_not_refused(policy: str) -> None:
    parts = busy(policy)
    connector, tokens = EngineConnector(parts.store), prompt(9)
    connector.match("r", tokens)
    parts.steps.run_all()
    connector.match("r", tokens)
    pages = connector.allocate(4)
    assert pages
    connector.save("r", tokens, pages)
    parts.steps.run_all()
    connector.suspend("r", tail=None, num_tokens=8)
    parts.steps.run_all()
    assert held(parts, tokens, HOST) == 4


@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_queued_request_wants_is_brought(policy: str) -> None:
    parts = Parts(policy=policy, history=1000, pages=14, host=20, slots=4000)
    serve(parts, 9)
    parts.store.evict_device()
    parts.store.index.evict(HOST)
    for _ in range(30):
        serve(parts, *HOT)
    parts.store.evict_device()
    assert held(parts, prompt(9), HOST) == 0 and held(parts, prompt(9), AT_REST) == 4
    parts.store.expect(prompt(9))
    parts.steps.run_all()
    parts.store.poll()
    parts.steps.run_all()
    assert held(parts, prompt(9), HOST) == 4


@pytest.mark.parametrize("policy", POLICIES)
def test_what_the_host_thinks_little_of_still_comes_to_rest(policy: str) -> None:
    """A disk with room for all, of which the host sees each prompt once: it must not depend on what the host likes."""
    parts = busy(policy, edges=("save", "save", "save"))
    for number in range(100, 160):
        serve(parts, number, *HOT)
    assert all(held(parts, prompt(number), AT_REST) == 4 for number in range(100, 160))
