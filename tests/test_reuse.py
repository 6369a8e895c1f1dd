"""What learning policies know of every block, against a dict per block; and the shadow, against an LRU of whole requests."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, nan
from random import Random
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tierkv.hints import Ending, Hints, Next
from tierkv.index import Index, Lease, TierSpec
from tierkv.keys import Key, chain
from tierkv.policies import make
from tierkv.policies.reuse import (
    ANSWERS,
    BRANCHES,
    FRESH,
    KEPT_USES,
    LEARN_AFTER,
    LEARN_AT_LEAST,
    NEXTS,
    PAUSES,
    REPLACED,
    TURNS,
    WEIGHT,
    ReuseModel,
    _pause,
)
from tierkv.strands import Strand
from tierkv.tiers.base import Run as StoredRun

ROOT = Key(b"reuse..." * 4)
Path = tuple[int, ...]
"""A block, by all blocks up to it; a block is one token here."""


def tokens(blocks: Sequence[int]) -> bytes:
    return np.array(blocks, "<i4").tobytes()


def new_index(model: ReuseModel, *, history_blocks: int, capacity: int = 30) -> Index:
    specs = [
        TierSpec("host", capacity, True, make("lru", tier=0)),
        TierSpec("disk", 100, False, make("lru", tier=1)),
    ]
    return Index(block_tokens=1, tiers=specs, observer=model, history_blocks=history_blocks)


def known(index: Index) -> dict[Path, tuple[Strand, int]]:
    """Every block that the index knows, and where it stands."""
    found = {}
    for strand in index._tree.strands():
        path, above, at = [*np.frombuffer(bytes(strand.tok), "<i4").tolist()], strand.parent, strand.at
        while above and above.parent:
            path[:0] = np.frombuffer(bytes(above.tok[: 4 * at]), "<i4").tolist()
            above, at = above.parent, above.at
        for block in range(strand.size):
            found[tuple(path[: strand.depth + block + 1])] = (strand, block)
    return found


def save(index: Index, blocks: Sequence[int], *, now_s: float, ending: Ending | None = None, **hints: Any) -> None:
    """Use a prompt and save it; there is room."""
    with index.acquire(ROOT, tokens(blocks), now_s=now_s, hints=Hints(**hints)) as lease:
        lo = lease.num_blocks
        room = index.reserve(0, len(blocks) - lo)
        assert room
        index.extend(lease, tokens(blocks[lo:]), tier=0, places=room.places)
        if ending:
            index.end(lease, ending, now_s=now_s)


def look(index: Index, model: ReuseModel, blocks: Sequence[int]) -> Any:
    """The run of the last block."""
    run = model.run(*known(index)[tuple(blocks)])
    assert run
    return run


@dataclass
class Seen:
    """What is known of one block."""

    first_s: float
    last_s: float
    serial: int
    uses: int
    parts: tuple[int, ...]
    weight: float


@dataclass
class Open:
    """A request that goes on: its lease, its prompt, and what its new blocks are."""

    lease: Lease
    blocks: Path
    serial: int
    parts: tuple[int, ...]
    weight: float


class Machine(RuleBasedStateMachine):
    """A real index under a model, beside a dict of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Path, Seen] = {}
        self.where: dict[Path, tuple[Strand, int]] = {}
        self.open: list[Open] = []
        self.now_s, self.serial = 0.0, 0

    @initialize(history_blocks=st.sampled_from((0, 4, 1000)), capacity=st.sampled_from((6, 30)))
    def begin(self, history_blocks: int, capacity: int) -> None:
        self.model = ReuseModel()
        self.index = new_index(self.model, history_blocks=history_blocks, capacity=capacity)

    @rule(paths=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=3))
    @precondition(lambda self: not self.serial)
    def restore(self, paths: list[list[int]]) -> None:
        for path in paths:
            keys = tuple(chain(ROOT, tokens(path), block_tokens=1))
            self.index.restore(1, [StoredRun(ROOT, ROOT, 0, keys, tokens(path))])
        self.look()

    def look(self) -> None:
        """See where blocks stand, and forget of those that the index does not know any more."""
        self.where = known(self.index)
        for path in self.seen.keys() - self.where.keys():
            del self.seen[path]

    @rule(
        blocks=st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple),
        more=st.lists(st.integers(0, 3), max_size=12).map(tuple),
        pause_s=st.sampled_from((0.0, 0.5, 3.0, 40.0, 1000.0)),
        priority=st.sampled_from((0, 0, 1, -9)),
    )
    def arrive(self, blocks: Path, more: Path, pause_s: float, priority: int) -> None:
        blocks = blocks + more
        self.now_s += pause_s
        self.serial += 1
        before = dict(self.where)
        lease = self.index.acquire(ROOT, tokens(blocks), now_s=self.now_s, hints=Hints(priority=priority))
        paths = [blocks[: at + 1] for at in range(len(blocks))]
        num_known = next((at for at, path in enumerate(paths) if path not in before), len(paths))
        turn, last = 0, paths[num_known - 1] if num_known else ()
        children: dict[Path, list[Path]] = {}
        for path in before:
            children.setdefault(path[:-1], []).append(path)
        if last in self.seen and len(children.get(last, ())) < BRANCHES:
            turn = min(TURNS - 1, self.seen[last].parts[0] + 1)
            at, serial = last, self.seen[last].serial
            while num_known < len(blocks) and len(children.get(at, ())) == 1:
                (at,) = children[at]
                if at not in self.seen or self.seen[at].serial != serial:
                    break
                self.seen[at].parts = (*self.seen[at].parts[:-1], REPLACED)
        new = len(blocks) - num_known
        fresh = sum(new > most for most in FRESH)
        weight = WEIGHT ** max(-4, min(4, priority))
        before_it: Seen | None = None
        for path in paths[:num_known]:
            seen = self.seen.get(path)
            if before[path][1] == 0:
                before_it = None  # strands share nothing
            if seen is None:
                self.seen[path] = Seen(self.now_s, self.now_s, self.serial, 0, (turn, fresh, 0, 0, 0), weight)
                continue
            seen.uses += 1
            seen.last_s, seen.serial, seen.weight = self.now_s, self.serial, weight
            seen.parts = (turn, fresh, _pause((self.now_s - seen.first_s) / seen.uses), 0, 0)
            alike = before_it and before_it.parts == seen.parts
            if before_it and alike and (before_it.uses == seen.uses or seen.uses > KEPT_USES):
                seen.first_s, seen.uses = before_it.first_s, before_it.uses  # one run from now on
            before_it = seen
        self.open.append(Open(lease, blocks, self.serial, (turn, fresh, 0, 0, 0), weight))
        assert (self.model.serial, self.model.num_asked) == (self.serial, len(blocks))
        self.look()

    @rule(data=st.data(), how_many=st.integers(1, 20))
    @precondition(lambda self: self.open)
    def extend(self, data: st.DataObject, how_many: int) -> None:
        one = data.draw(st.sampled_from(self.open))
        lo = one.lease.num_blocks
        fresh = one.blocks[lo : lo + how_many]
        room = self.index.reserve(0, len(fresh), at_least=0)
        assert room
        self.look()
        new = [path for at in range(lo, lo + len(fresh)) if (path := one.blocks[: at + 1]) not in self.where]
        if room.count < len(fresh):
            self.index.free(0, room.places)
            self.index.extend(one.lease, tokens(fresh))
        else:
            taken = self.index.extend(one.lease, tokens(fresh), tier=0, places=room.places)
            self.index.free(0, [place for place, good in zip(room.places, taken, strict=True) if not good])
        self.look()
        for path in new:
            now_s, before = self.model.now_s, self.seen.get(path[:-1]) if self.where[path][1] else None
            seen = self.seen[path] = Seen(now_s, now_s, one.serial, 0, one.parts, one.weight)
            if before and (before.serial, before.uses, before.parts) == (one.serial, 0, one.parts):
                seen.first_s, seen.last_s = before.first_s, before.last_s  # it came when its request did

    @rule(
        data=st.data(),
        ending=st.builds(
            Ending,
            next=st.sampled_from(Next),
            within_s=st.sampled_from((None, None, 3.0, 1e9)),
            output_tokens=st.sampled_from((None, 0, 16, 399, 400)),
        ),
        later_s=st.sampled_from((0.0, 5.0)),
    )
    @precondition(lambda self: self.open)
    def end(self, data: st.DataObject, ending: Ending, later_s: float) -> None:
        one = data.draw(st.sampled_from(self.open))
        self.now_s += later_s
        self.index.end(one.lease, ending, now_s=self.now_s)
        answer = 0 if ending.output_tokens is None else 1 + sum(ending.output_tokens >= each for each in ANSWERS)
        following = NEXTS[ending.next]
        if answer or following or ending.within_s is not None:
            # Blocks of its last strand that lie beyond its path are judged along with those before them.
            strands = {self.where[one.blocks[: at + 1]][0] for at in range(one.lease.num_blocks)}
            for path, seen in self.seen.items():
                if seen.serial == one.serial and self.where[path][0] in strands:
                    pause = seen.parts[2] if ending.within_s is None else _pause(ending.within_s)
                    seen.parts = (*seen.parts[:2], pause, answer, following)

    @rule(data=st.data())
    @precondition(lambda self: self.open)
    def release(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.open))
        self.open.remove(one)
        one.lease.release()
        self.look()

    @rule(tier=st.integers(0, 1), num_blocks=st.sampled_from((1, 3, 100)))
    def forget(self, tier: int, num_blocks: int) -> None:
        self.index.evict(tier, num_blocks)
        self.look()

    @invariant()
    def every_block_is_known_as_it_was_used(self) -> None:
        for path, (strand, block) in self.where.items():
            run, seen = self.model.run(strand, block), self.seen.get(path)
            assert (run is None) == (seen is None), path
            if run and seen:
                found = Seen(run.first_s, run.last_s, run.serial, run.uses, run.parts, run.weight)
                assert found == seen, path
                assert self.model.hazards.number(run.parts) == run.kind

    @invariant()
    def model_keeps_what_can_be_reached_and_nothing_else(self) -> None:
        runs = []
        for strand in {strand for strand, _ in self.where.values()}:
            end = 0
            for run in strand.notes or ():
                assert run.blocks > 0 and run.end - run.blocks == end
                end = run.end
                runs.append(run)
            assert end <= strand.size
        model = getattr(self, "model", None)
        if model:
            assert set(runs) == set(model._runs) and len(runs) == len(set(runs))
            counts: dict[int, int] = {}
            for run in runs:
                counts[run.serial] = counts.get(run.serial, 0) + run.blocks
            assert model._last_used == counts


def test_runs_are_what_a_dict_of_blocks_says() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]  # hypothesis gives it no types
        Machine, settings=settings(max_examples=250, stateful_step_count=30, deadline=None, derandomize=True)
    )


# -- the shadow ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [1, 10, 40, 1000])
@pytest.mark.parametrize("history_blocks", [60, 10_000])
def test_shadow_hits_what_an_lru_of_whole_requests_hits(capacity: int, history_blocks: int) -> None:
    """Of blocks that the index has forgotten nobody can tell."""
    random, model = Random(capacity), ReuseModel()
    index = new_index(model, history_blocks=history_blocks)
    shadow = model.shadow(capacity)
    lru: OrderedDict[Path, int] = OrderedDict()
    hits = 0
    for serial in range(1, 400):
        blocks = [random.randrange(3) for _ in range(random.randrange(1, 9))]
        if random.random() < 0.2:
            blocks[0] = random.randrange(100)
        for path in lru.keys() - known(index).keys():
            del lru[path]
        for path in (tuple(blocks[: at + 1]) for at in range(len(blocks))):
            hits += path in lru
            lru[path] = serial
            lru.move_to_end(path)
        save(index, blocks, now_s=float(serial))
        assert shadow.hits == hits
        while len(lru) > capacity:
            oldest = next(iter(lru.values()))
            for path in [path for path, used in lru.items() if used == oldest]:
                del lru[path]
    assert hits > (0 if capacity == 1 else 100)


def test_shadows_of_several_tiers_follow_their_own_sizes() -> None:
    model = ReuseModel()
    index = new_index(model, history_blocks=100)
    small, large = model.shadow(2), model.shadow(20)
    for blocks in ([1, 2], [3, 4], [1, 2], [1, 2]):
        save(index, blocks, now_s=0.0)
    assert (small.hits, large.hits) == (2, 4)


# -- what tells kinds apart ---------------------------------------------------------------------------------------------


def test_conversation_that_goes_on_is_of_a_later_turn() -> None:
    model = ReuseModel()
    index = new_index(model, history_blocks=0)
    turns = []
    for end in range(1, TURNS + 3):
        save(index, range(end), now_s=0.0)
        turns.append(look(index, model, range(end)).parts[0])
    assert turns == [*range(TURNS), TURNS - 1, TURNS - 1]


def test_what_follows_a_common_beginning_is_a_first_turn() -> None:
    model = ReuseModel()
    index = new_index(model, history_blocks=0)
    for branch in range(BRANCHES + 1):
        save(index, [9, branch], now_s=0.0)
    assert [look(index, model, [9, branch]).parts[0] for branch in range(BRANCHES + 1)] == [0, 1, 2, 0]


def test_what_the_conversation_went_on_without_is_of_a_kind_of_its_own() -> None:
    model = ReuseModel()
    index = new_index(model, history_blocks=0)
    save(index, [1, 2, 3, 4], now_s=0.0)
    told: list[Any] = []
    model.watchers.append(told.append)
    save(index, [1, 2, 7], now_s=1.0)
    assert look(index, model, [1, 2, 3, 4]).parts[-1] == look(index, model, [1, 2, 3]).parts[-1] == REPLACED
    assert look(index, model, [1, 2]).parts[-1] == look(index, model, [1, 2, 7]).parts[-1] == 0
    assert told
    replaced = look(index, model, [1, 2, 3, 4]).kind
    events = np.array(model.hazards._events).reshape(len(model.hazards), -1).sum(1)
    assert events[replaced] == 0 and events.sum() == 2  # what was used again was not of that kind


def test_engine_that_asks_for_the_beginning_only_replaces_nothing() -> None:
    model = ReuseModel()
    index = new_index(model, history_blocks=0)
    save(index, [1, 2, 3, 4], now_s=0.0)
    save(index, [1, 2], now_s=1.0)
    assert look(index, model, [1, 2, 3, 4]).parts[-1] == 0


@pytest.mark.parametrize("within_s", [inf, 1e300, nan, -inf, -1.0, 0.0])
def test_no_pause_that_an_engine_tells_is_too_much(within_s: float) -> None:
    model = ReuseModel()
    index = new_index(model, history_blocks=0)
    save(index, [1, 2], now_s=1.0, ending=Ending(within_s=within_s), priority=10**6)
    run = look(index, model, [1, 2])
    assert run.parts[2] == (PAUSES - 1 if within_s > 1 else 1) and run.weight == WEIGHT**4


def test_pauses_are_told_apart_by_octaves() -> None:
    assert [_pause(seconds) for seconds in (0, 1.9, 2, 5.9, 6, 510, 1e9)] == [1, 1, 2, 2, 3, 9, 9]


def test_what_an_ended_request_used_before_it_is_told_of_once() -> None:
    """A later request that used some of it knows better."""
    model = ReuseModel()
    index = new_index(model, history_blocks=0)
    first = index.acquire(ROOT, tokens([1, 2, 3]), now_s=0.0)
    room = index.reserve(0, 3)
    assert room
    index.extend(first, tokens([1, 2, 3]), tier=0, places=room.places)
    save(index, [1, 2], now_s=1.0)
    index.end(first, Ending(next=Next.ENDED), now_s=2.0)
    ended = NEXTS[Next.ENDED]
    assert [look(index, model, [1, 2, 3][:at]).parts[-1] for at in (1, 2, 3)] == [0, 0, ended]
    first.release()


# -- memory and learning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history_blocks", [0, 50])
def test_memory_is_bounded_by_what_the_index_knows(history_blocks: int) -> None:
    random, model = Random(1), ReuseModel()
    model.shadow(10)
    index = new_index(model, history_blocks=history_blocks)
    for at in range(2000):
        save(index, [random.randrange(100), at, at + 1], now_s=float(at))
        assert len(model._last_used) <= len(model._runs) <= 30 + history_blocks
    index.evict(0)
    assert sum(run.blocks for run in model._runs) == index.stats().num_blocks == history_blocks


def test_nothing_is_left_of_an_index_that_forgot_all() -> None:
    model = ReuseModel()
    shadow = model.shadow(1000)
    index = new_index(model, history_blocks=0)
    for at in range(50):
        save(index, [at % 3, at % 5, at % 7, at], now_s=float(at))
    num_blocks = index.stats().num_blocks
    lost = sum(model.hazards._ended) - sum(model.hazards._events)
    index.evict(0)
    assert not model._runs and not model._last_used and shadow.held == 0
    assert sum(model.hazards._ended) - sum(model.hazards._events) == lost + num_blocks  # lost from sight, without a use


def test_learns_every_hundred_requests_then_ever_less_often() -> None:
    model = ReuseModel()
    index = new_index(model, history_blocks=0)
    rounds = []
    for at in range(50_000):
        index.acquire(ROOT, tokens([1]), now_s=float(at)).release()
        rounds.append(model.rounds)
    due = [at + 1 for at in range(1, 50_000) if rounds[at] > rounds[at - 1]]
    apart = [after - before for before, after in pairwise(due)]
    assert rounds[0] == 1 and apart[0] == LEARN_AFTER and apart[-1] == LEARN_AT_LEAST and apart == sorted(apart)


def test_blocks_that_come_back_sooner_are_worth_more() -> None:
    """Over a whole index: what goes on within seconds, and what never does."""
    model = ReuseModel()
    index = new_index(model, history_blocks=10_000)
    for at in range(0, 1500, 2):
        save(index, [at, *range(20)], now_s=float(at))
        save(index, [at, *range(21)], now_s=at + 0.5)
    _, first = look(index, model, [1496, 0]), look(index, model, [1498, 0])
    save(index, [5000, *range(20)], now_s=1500.0)
    model._learn()
    new, gone_on = look(index, model, [5000, 0]), first
    worth = model.hazards.worth
    assert worth[new.kind][0] > 20 * worth[gone_on.kind][0]
