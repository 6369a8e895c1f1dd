"""The whole store under a random schedule: whatever is held anywhere is what its tokens say, whatever fails.

Jobs run when the machine says so and in the order it says, tiers fail at its whim, copies at rest get damaged. KV is
replaced by a function of the tokens, so that a single block in a wrong place is seen.
"""

from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.store_parts import DEADLINE_S, STEP, LendingTier, Parts, content
from tierkv import edges, pins, policies, transfers
from tierkv.ahead import Ahead, Expected
from tierkv.errors import PinError
from tierkv.index import Lease
from tierkv.keys import token_bytes
from tierkv.load import Load
from tierkv.match import Match, Search
from tierkv.mover import Gate
from tierkv.pins import Pin, Pins
from tierkv.store import Store
from tierkv.tiers.device import PagePool
from tierkv.tiers.host import HostSlab
from tierkv.transfers import DEVICE, HOST, Below, Places

TAILS = st.lists(st.integers(0, 1), min_size=2, max_size=12)
PIECE = 2


class Request:
    def __init__(self, tokens: bytes, search: Search) -> None:
        self.tokens, self.search = tokens, search
        self.match: Match | None = None
        self.pages: list[int] = []
        self.own: set[int] = set()
        self.load: Any = None
        self.done = 0  # blocks whose content is in the pages
        self.num_blocks = len(tokens) // STEP


class StoreMachine(RuleBasedStateMachine):
    """Requests over a store with all kinds of tiers. lends: the shared one does."""

    lends = False

    @initialize(
        pages=st.integers(6, 14),
        host=st.integers(1, 10),
        slots=st.integers(1, 20),
        edges=st.tuples(*[st.sampled_from(["save", "second_use", "spill"])] * 3),
        policy=st.sampled_from(policies.NAMES),
        history=st.sampled_from([0, 6]),
    )
    def begin(self, pages: int, host: int, slots: int, edges: tuple[str, str, str], policy: str, history: int) -> None:
        self.parts = Parts(
            pages=pages, host=host, slots=slots, edges=edges, policy=policy, history=history, lends=self.lends
        )
        self.store, self.steps, self.clock = self.parts.store, self.parts.steps, self.parts.clock
        self.own, self.shared, self.faulty = self.parts.own, self.parts.shared, self.parts.faulty
        self.prompts: list[bytes] = []
        self.requests: list[Request] = []
        self.waiting: list[Expected] = []
        self.pins: list[tuple[bytes, Pin]] = []

    # -- requests ---------------------------------------------------------------------------------------------------

    @rule(tail=TAILS, keep=st.integers(0, 10), base=st.integers(0, 99))
    def arrive(self, tail: list[int], keep: int, base: int) -> None:
        old = self.prompts[base % len(self.prompts)] if self.prompts else b""
        tokens = old[: keep * 4] + token_bytes(tail)
        self.prompts = [*self.prompts[-7:], tokens]
        self.requests.append(Request(tokens, self.store.search(tokens)))

    @rule(tail=TAILS, keep=st.integers(0, 10), base=st.integers(0, 99), drain=st.booleans(), stay=st.booleans())
    def serve(self, tail: list[int], keep: int, base: int, drain: bool, stay: bool) -> None:
        """A whole request at once: what random single steps reach too seldom."""
        self.arrive(tail, keep, base)
        self.steps.run_all()
        last = len(self.requests) - 1
        request = self.requests[last]
        self.admit(last)
        if request.match is None:
            return
        if drain:
            self.steps.run_all()
        for _ in range(request.num_blocks + 1):
            self.compute(last)
        if not stay:
            self.leave(last)
        if drain:
            self.steps.run_all()

    @precondition(lambda self: self.requests)
    @rule(number=st.integers(0, 99))
    def admit(self, number: int) -> None:
        request = self.requests[number % len(self.requests)]
        if request.match is not None or not request.search.ready:
            return
        match = self.store.take(request.search)
        shared = match.lease.places(DEVICE, 0, match.shared)
        fresh = self.store.allocate(request.num_blocks - match.shared + bool(match.head_tokens))
        if fresh is None:
            self.store.release(match)
            self.requests.remove(request)
            return
        request.match, request.pages, request.own = match, [*shared, *fresh], set(fresh)
        request.done = match.shared
        wanted = match.num_blocks - match.shared + bool(match.head_tokens)
        if wanted:
            request.load = self.store.load(match, fresh[:wanted])

    @precondition(lambda self: self.requests)
    @rule(number=st.integers(0, 99))
    def compute(self, number: int) -> None:
        """Fill a block, or take up the load, and offer what is full."""
        request = self.requests[number % len(self.requests)]
        match = request.match
        if match is None or (request.load and not request.load.done()):
            return
        if request.load:
            blocks, head = request.load.result()
            assert match.shared <= blocks <= match.num_blocks
            self.look(request, blocks, head)
            request.load, request.done = None, blocks
            self.store.settle(match)
            return
        if request.done < request.num_blocks:
            page = request.pages[request.done]
            assert page in request.own, "a page of others would be overwritten"
            self.parts.page(page)[:] = content(request.tokens, request.done)
            request.done += 1
        taken = self.store.save(match, request.tokens[: request.done * STEP], request.pages[: request.done])
        for page, ok in zip(reversed(request.pages[: request.done]), reversed(taken), strict=False):
            if ok:
                request.own.discard(page)

    def look(self, request: Request, blocks: int, head: int) -> None:
        for block in range(blocks):
            assert (self.parts.page(request.pages[block]) == content(request.tokens, block)).all(), (
                "a load brought other KV"
            )

    @precondition(lambda self: self.requests)
    @rule(number=st.integers(0, 99))
    def leave(self, number: int) -> None:
        request = self.requests[number % len(self.requests)]
        if request.load and not request.load.done():
            return
        self.requests.remove(request)
        if request.match is not None:
            self.store.free(sorted(request.own))
            self.store.release(request.match)

    # -- ahead of need ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.prompts)
    @rule(base=st.integers(0, 99), tail=TAILS)
    def expect(self, base: int, tail: list[int]) -> None:
        """A request is queued, for a prompt that may be known in part."""
        self.waiting.append(self.store.expect(self.prompts[base % len(self.prompts)] + token_bytes(tail)))

    @precondition(lambda self: self.waiting)
    @rule(number=st.integers(0, 99), twice=st.booleans())
    def cancel(self, number: int, twice: bool) -> None:
        expected = self.waiting.pop(number % len(self.waiting))
        self.store.cancel(expected)
        if twice:
            self.store.cancel(expected)

    @precondition(lambda self: self.prompts)
    @rule(base=st.integers(0, 99), ttl_s=st.sampled_from([0.5, 60.0]), drain=st.booleans())
    def pin(self, base: int, ttl_s: float, drain: bool) -> None:
        tokens = self.prompts[base % len(self.prompts)]
        try:
            self.pins.append((tokens, self.store.pin(tokens, ttl_s=ttl_s)))
        except PinError:
            return
        if drain:
            self.steps.run_all()

    @precondition(lambda self: self.pins)
    @rule(number=st.integers(0, 99))
    def unpin(self, number: int) -> None:
        self.store.unpin(self.pins.pop(number % len(self.pins))[1])

    @precondition(lambda self: self.prompts)
    @rule(base=st.integers(0, 99), lost=st.booleans(), damaged=st.booleans())
    def wait_at_the_bottom(self, base: int, lost: bool, damaged: bool) -> None:
        """A prompt that is known goes to the bottom, and a request for it waits until all of it has been brought up."""
        self.flush_device()
        self.store.index.evict(HOST)
        if lost:
            self.lose(True, base)
        if damaged:
            self.damage(False, base)
        self.expect(base, [0, 1])
        self.steps.run_all()

    @rule()
    def flush_host(self) -> None:
        self.store.index.evict(HOST)

    # -- the world --------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.steps.queue)
    @rule(number=st.integers(0, 99))
    def work(self, number: int) -> None:
        self.steps.step(number % len(self.steps.queue))

    @precondition(lambda self: self.prompts)
    @rule(base=st.integers(0, 99), blow=st.sampled_from(["damage", "lose", "none"]), shared=st.booleans())
    def come_back(self, base: int, blow: str, shared: bool) -> None:
        """A prompt that is known goes to the bottom, something happens to it there, and it is asked for again."""
        self.flush_device()
        self.store.index.evict(HOST)
        for number in range(3):
            if blow == "damage":
                self.damage(shared, base + number)
            elif blow == "lose":
                self.lose(shared, base + number)
        self.serve([], 99, base, drain=True, stay=False)

    @rule(tier=st.integers(0, 1), after=st.integers(0, 3), late=st.booleans())
    def seed_fault(self, tier: int, after: int, late: bool) -> None:
        self.faulty[tier].fail_after, self.faulty[tier].late = after, late

    @precondition(lambda self: self.requests)
    @rule(shared=st.booleans(), number=st.integers(0, 99))
    def damage(self, shared: bool, number: int) -> None:
        stored = (self.shared if shared else self.own).stored
        if stored:
            key = sorted(stored)[number % len(stored)]
            stored[key] = bytes([stored[key][0] ^ 1]) + stored[key][1:]

    @precondition(lambda self: self.requests)
    @rule(shared=st.booleans(), number=st.integers(0, 99))
    def lose(self, shared: bool, number: int) -> None:
        tier = self.shared if shared else self.own
        if tier.stored:
            tier.delete([sorted(tier.stored)[number % len(tier.stored)]])

    @rule()
    def flush_device(self) -> None:
        self.store.evict_device()

    @rule(seconds=st.sampled_from([0.5, 11.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.store.poll()
        self.pins = [(tokens, pin) for tokens, pin in self.pins if pin.expires_s > self.clock()]
        assert not any(r.load and not r.load.done() for r in self.requests) or seconds < DEADLINE_S

    @invariant()
    def everything_held_is_what_its_tokens_say(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.index.check()
        for tokens in self.prompts:
            with self.store.index.keep(self.store.root, tokens) as lease:
                for tier, view in ((DEVICE, self.parts.page), (HOST, self.parts.row)):
                    for lo, hi in lease.held(tier, 0, lease.num_blocks):
                        for block, place in zip(range(lo, hi), lease.places(tier, lo, hi), strict=True):
                            assert (view(place) == content(tokens, block)).all(), "a tier lies"

    @invariant()
    def what_is_pinned_stays_in_the_host(self) -> None:
        for tokens, pin in self.pins if hasattr(self, "store") else ():
            if pin.kept.done() and pin.num_blocks:
                with self.store.index.keep(self.store.root, tokens[: pin.num_blocks * STEP]) as lease:
                    assert lease.held(HOST, 0, lease.num_blocks) == [(0, pin.num_blocks)], "a pin does not keep"

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        self.clock.advance(100)
        for expected in self.waiting:
            self.store.cancel(expected)
        self.store.poll()
        self.steps.run_all()
        while self.requests:
            self.leave(0)
        self.steps.run_all()
        self.store.evict_device()
        stats = self.store.index.stats()
        assert stats.tiers[DEVICE].used == 0, "a page has leaked"
        assert stats.num_leases == 0, "a lease has leaked"
        assert self.store.places.spares.qsize() == 1, "spare places have leaked"
        assert not self.store.index._tree.wants, "a want has leaked"
        self.store.index.check()
        self.store._memory.close()
        self.store.places.host.close()


StoreMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
test_store = StoreMachine.TestCase


class LendingMachine(StoreMachine):
    """The same, over a tier whose blocks are copied straight out of its memory."""

    lends = True

    @precondition(lambda self: self.prompts)
    @rule(base=st.integers(0, 99), taken=st.booleans())
    def come_back_from_memory(self, base: int, taken: bool) -> None:
        """A prompt that is known is left in the shared tier alone, which lends it, and is asked for again."""
        self.serve([], 99, base, drain=True, stay=False)
        self.flush_device()
        for tier in (HOST, 2):
            self.store.index.evict(tier)
        self.own.delete(list(self.own.stored))
        assert isinstance(self.shared, LendingTier)
        self.shared.takes_back = taken
        self.serve([], 99, base, drain=True, stay=False)
        self.shared.takes_back = False


LendingMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
test_store_that_is_lent_to = LendingMachine.TestCase


# -- the machine itself must be able to fail --------------------------------------------------------------------------


def _never_shuts(gate: Gate) -> bool:
    return True


def _believes_all(self: Load, below: Below, lo: int, hi: int, views: Any) -> list[bool]:
    below.tier.read(self.lease.keys(lo, hi), views)
    return [True] * (hi - lo)


def _copies_wrong_pages(self: PagePool, pages: Any, host: HostSlab, places: Any, **how: object) -> None:
    for page, place in zip(reversed(list(pages)), places, strict=True):
        host.rows[place, : self.block_bytes] = self._rows[page]


def _writes_unpinned(places: Places, below: Below, lease: Lease, lo: int, hi: int) -> None:
    lease.release()  # the job runs on, as if it still had its pins
    with places.index.acquire(lease.root, b"") as nothing:
        assert nothing.num_blocks == 0
    places.host.rows[:, :4] ^= 255


def _believes_all_ahead(
    places: Places, below: Below, lease: Lease, blocks: Sequence[int], views: Any, *, deadline: float
) -> tuple[list[bool], None]:
    below.tier.read([lease.keys(block, block + 1)[0] for block in blocks], views)
    return [True] * len(blocks), None


def _keeps_nothing(lease: Lease, real: Any = pins._kept_in_host) -> Lease:
    own: Lease = real(lease)
    own.release()
    return own


def _never_ends(self: Pins, now_s: float) -> None:
    pass


def _wants_on(self: Ahead, expected: Expected) -> None:
    self._waiting.pop(expected, None)


def _gives_back_too_much(self: Store, match: Match) -> None:
    pages = match.lease.places(DEVICE, 0, match.shared)
    match.lease.release()
    self.index.free(DEVICE, pages)


PLANTED = {
    "late jobs still copy": (Gate, "shut", _never_shuts),
    "a failed read is believed": (Load, "_read", _believes_all),
    "pages go to each other's places": (PagePool, "copy_out", _copies_wrong_pages),
    "host memory is written by others": (transfers, "write_down", _writes_unpinned),
    "shared pages are freed": (Store, "release", _gives_back_too_much),
    "a failed read ahead is believed": (transfers, "read_below", _believes_all_ahead),
    "a pin lets go when it is copied": (pins, "_kept_in_host", _keeps_nothing),
    "a pin has no end": (Pins, "expire", _never_ends),
    "who is gone is wanted for ever": (Ahead, "cancel", _wants_on),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, planted = PLANTED[fault]
    monkeypatch.setattr(where, name, planted)
    if name == "write_down":
        monkeypatch.setattr(edges, name, planted)
    quick = settings(max_examples=400, stateful_step_count=40, deadline=None, database=None, phases=[Phase.generate])
    with pytest.raises(Exception):  # noqa: B017  whatever breaks first: an assertion here or in the index, an error
        run_state_machine_as_test(StoreMachine, settings=quick)


def test_a_load_that_believes_memory_that_was_taken_back_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LendingTier, "intact", lambda self, taken: True)
    quick = settings(max_examples=400, stateful_step_count=40, deadline=None, database=None, phases=[Phase.generate])
    with pytest.raises(AssertionError, match="a load brought other KV"):
        run_state_machine_as_test(LendingMachine, settings=quick)
