"""A request that waits alone is placed, whatever it has pinned of the device meanwhile. A real scheduler and store, no model."""

from array import array
from collections.abc import Sequence as List

import pytest

from tests.store_parts import Parts
from tierkv.connectors.engine import EngineConnector
from tierkv.engine import SamplingParams
from tierkv.engine.scheduler import Scheduler
from tierkv.engine.sequence import Request, Sequence, State
from tierkv.engine.text import TextStream
from tierkv.transfers import DEVICE, HOST

BLOCK, NUM_PAGES = 2, 8


class Play:
    """Steps of one engine whose sequences end with their first token."""

    def __init__(self) -> None:
        self.parts = Parts(pages=NUM_PAGES, host=40)
        self.connector = EngineConnector(self.parts.store)
        self.scheduler = Scheduler(
            self.connector,
            block_tokens=BLOCK,
            max_batch_tokens=64,
            max_sequences=4,
            copy_page=lambda source, target: None,
        )
        self._count = 0

    def add(self, tokens: List[int]) -> Sequence:
        self._count += 1
        request = Request(f"r{self._count}", SamplingParams(), len(tokens), 0, NUM_PAGES * BLOCK, 0.0)
        text = TextStream(None, (), skip_special_tokens=True)
        sequence = Sequence(request.id, request, 0, self._count, array("i", tokens), text)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> None:
        self.connector.poll()
        for item in self.scheduler.schedule():
            item.sequence.num_computed += item.num_tokens
            self.scheduler.seal(item.sequence)
            if item.sequence.num_missing == 0:
                self.scheduler.finish(item.sequence)
        self.parts.steps.run_all()

    def run(self, *sequences: Sequence) -> None:
        for _ in range(50):
            if all(sequence.state is State.FINISHED for sequence in sequences):
                return
            self.step()
        raise AssertionError(f"no end: {[sequence.state for sequence in sequences]}")

    def computed(self, sequence: Sequence) -> int:
        assert sequence.request.sources is not None
        return sequence.request.sources["computed"]


@pytest.fixture
def play() -> Play:
    return Play()


def test_a_block_found_in_the_host_that_comes_to_the_device_meanwhile(play: Play) -> None:
    base = [1, 2, 3, 4]
    play.run(play.add([*base, 5]))
    play.parts.store.index.evict(DEVICE, 1)  # of the second block, only the host's copy is left
    first, second = play.add([*base, *range(10, 20)]), play.add([*base, *range(30, 41)])
    play.step()  # asks
    play.step()
    assert first.state is not State.WAITING and second.hit is not None and len(second.hit.pages) == 2
    play.run(first, second)
    assert play.computed(second) == len(second.tokens) - len(base)


def test_a_page_that_a_prompt_agrees_with_in_part(play: Play) -> None:
    """Its copy needs a page of its own, and the page it comes from stays."""
    play.run(play.add(range(1, 16)))
    last = play.add([1, 2, 3, *range(30, 42)])
    play.run(last)
    assert play.computed(last) == len(last.tokens) - BLOCK


def test_a_page_that_somebody_else_has_is_waited_for(play: Play) -> None:
    play.run(play.add([1, 2, 3, 4, 5]))
    pages = play.parts.store.allocate(1)
    assert pages is not None
    last = play.add([1, 2, 3, 4, *range(30, 41)])
    for _ in range(5):
        play.step()
    assert last.state is State.WAITING
    play.parts.store.free(pages)
    play.run(last)
    assert play.computed(last) == len(last.tokens) - 4


def test_a_shared_tier_is_not_asked_for_ever(play: Play) -> None:
    play.run(play.add([1, 2, 3, 4, 5]))
    index, own = play.parts.store.index, play.parts.own
    for tier in range(3):
        index.evict(tier)
    own.delete(list(own.stored))
    assert index.reserve(HOST, 40), "nothing comes to the host ahead"
    pages = play.parts.store.allocate(1)
    assert pages is not None
    last = play.add([1, 2, 3, 4, *range(30, 41)])
    for _ in range(4):
        play.step()
    hit = last.hit
    assert hit is not None and hit.sources == {"shared": 4}
    for _ in range(4):
        play.step()
        assert last.hit is hit
    play.parts.store.free(pages)
    play.run(last)
    assert play.computed(last) == len(last.tokens) - 4
