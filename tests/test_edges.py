"""What is copied ahead of eviction: how far that goes on after somebody asked for room, and where it ends."""

import pytest

from tests.store_parts import PIECE, Parts, held, prompt
from tierkv.transfers import DEVICE, HOST


def filled(*, host: int = 40, policy: str = "lru") -> Parts:
    """A store with 20 pages, of which three prompts take four each, the first used first; nothing is copied yet."""
    parts = Parts(pages=20, host=host, edges=("spill", "second_use", "second_use"), policy=policy)
    for number in range(3):
        parts.serve(prompt(number))
    assert not parts.steps.queue, "there is room"
    return parts


def take(parts: Parts, num_pages: int) -> None:
    """Somebody asks for room, and keeps it."""
    assert parts.store.allocate(num_pages) is not None


def copied(parts: Parts) -> list[int]:
    """Blocks of each prompt in the host."""
    return [held(parts, prompt(number), HOST) for number in range(3)]


def lost(parts: Parts) -> int:
    """Blocks that were forgotten before they were below."""
    return parts.store.index.stats().tiers[DEVICE].lost


def test_spill_goes_on_until_what_the_watermark_asks_for_is_below() -> None:
    parts = filled()
    take(parts, 6)  # two are left, of six that are to be free or below
    assert len(parts.steps.queue) == 1, "one piece at a time"
    parts.steps.run_all()
    assert copied(parts) == [4, 0, 0]
    take(parts, 6)
    assert lost(parts) == 0
    parts.store.index.check()


def test_spill_goes_as_far_as_the_last_prompt_was_long() -> None:
    parts = filled()
    take(parts, 12)  # of which nothing told before
    assert lost(parts) == 4
    parts.steps.run_all()
    assert copied(parts) == [0, 4, 4]
    take(parts, 8)
    assert lost(parts) == 4


def test_a_page_asked_for_meanwhile_does_not_end_what_a_prompt_began() -> None:
    parts = filled()
    take(parts, 12)
    take(parts, 1)  # takes the last block: those before it are being copied
    parts.steps.run_all()
    assert copied(parts) == [0, 4, 3]


def test_spill_copies_a_piece_at_a_time_and_not_a_block_for_every_page() -> None:
    parts = filled()
    take(parts, 6)
    parts.steps.run_all()
    take(parts, 1)
    parts.steps.run_all()
    assert copied(parts) == [4, PIECE, 0]
    take(parts, 1)
    assert not parts.steps.queue
    take(parts, 1)
    parts.steps.run_all()
    assert copied(parts) == [4, 2 * PIECE, 0]
    assert lost(parts) == 0


@pytest.mark.parametrize("host", [1, 2, 3, 5, 8])
def test_spill_into_a_small_host_ends(host: int) -> None:
    """Where the host keeps what it got, and where others have left it one place, so that every copy pushes out the last."""
    for num_taken in {0, host - 1}:
        parts = filled(host=host)
        assert parts.store.index.reserve(HOST, num_taken)
        take(parts, 8)
        for _ in range(6):
            before = parts.metrics.blocks_spilled.value("device", "host")
            take(parts, 1)
            for _ in range(10):
                if parts.steps.queue:
                    parts.steps.step()
            assert not parts.steps.queue, "it goes round and round"
            assert parts.metrics.blocks_spilled.value("device", "host") - before <= 8 + PIECE


def test_spill_ends_where_the_host_takes_nothing() -> None:
    parts = filled(host=4)
    room = parts.store.index.reserve(HOST, 4)
    assert room
    take(parts, 8)
    parts.steps.step()
    assert not parts.steps.queue
    parts.store.index.free(HOST, room.places)
    take(parts, 1)
    parts.steps.run_all()
    assert copied(parts)[0] == 2


def test_what_was_used_since_is_left_to_who_asks_next() -> None:
    """Only the engine's thread can tell what is being written to its pages: others go on with what was written before."""
    parts = filled(policy="fifo")
    take(parts, 8)
    with parts.store.index.acquire(parts.store.root, prompt(1)):
        pass
    parts.steps.run_all()
    assert copied(parts) == [4, 0, 0]
    take(parts, 1)
    parts.steps.run_all()
    assert copied(parts) == [4, 4, 0]
