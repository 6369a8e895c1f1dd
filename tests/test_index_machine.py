"""The index against a model of dicts, driven by Hypothesis; and planted faults, which the same machine must catch."""

from array import array
from collections.abc import Callable, Iterator, Sequence
from math import inf
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tierkv import fates, names, purge, recovery, rooms, strands, tree, wants
from tierkv import index as index_module
from tierkv import lease as lease_module
from tierkv.cost import CostModel
from tierkv.fates import Fate
from tierkv.hints import Ending, Hints, Next
from tierkv.index import Copy, Index, Lease, Reservation, TierSpec, Want
from tierkv.keys import KEY_BYTES, Key, chain
from tierkv.policies import NAMES, build
from tierkv.policies.base import Leaf, Observer, Policy, Use
from tierkv.policies.lru import LruPolicy
from tierkv.tiers.base import Run

BLOCK_TOKENS = 3
BLOCK_BYTES = 4 * BLOCK_TOKENS
CAPACITY = (6, 5, 7)
PLACED = (True, True, False)
TIERS = range(3)
ROOTS = [Key(b"a" * 32), Key(b"b" * 32)]

A, B, C = (0, 0, 0), (0, 0, 1), (0, 1, 0)
SHAPES: list[list[list[tuple[int, ...]]]] = [
    [],
    [[A, A], [A, B, B], [A, B, A, A]],  # a branch of a branch
    [[A, A, A], [B, B], [C]],
    [[A, A, A, A], [A, A, B]],
    [[A, A, A, A], [C], [A, A]],  # a tail that is older than another path, and a beginning that is not
]

Path = tuple[Any, ...]  # root, then the bytes of each block

blocks_of = st.lists(st.sampled_from([A, B, C]), max_size=6)
tails = st.sampled_from([(), (), (0,), (1,), (0, 0), (0, 1)])
chance = st.integers(0, 5)
any_of = st.integers(0, 4)


def tokens_of(blocks: Any, tail: Any = ()) -> bytes:
    return array("i", [token for block in blocks for token in block] + list(tail)).tobytes()


def path_of(root: Key, tokens: bytes) -> Path:
    return (root, *(tokens[at : at + BLOCK_BYTES] for at in range(0, len(tokens) - BLOCK_BYTES + 1, BLOCK_BYTES)))


def key_of(path: Path) -> Key:
    return chain(path[0], b"".join(path[1:]), block_tokens=BLOCK_TOKENS)[-1]


def above(path: Path) -> Iterator[Path]:
    return (path[:size] for size in range(2, len(path) + 1))


def strands_of(index: Index) -> Iterator[tuple[strands.Strand, list[Path]]]:
    """Every strand with the path of each of its blocks, by a walk that shares no code with the index."""
    stack: list[tuple[strands.Strand, Path]] = []
    for key, root in index._tree.roots.items():
        stack += [(child, (key,)) for child in root.offspring()]
    while stack:
        strand, prefix = stack.pop()
        own = path_of(prefix[0], bytes(strand.tok))[1:]
        yield strand, [prefix + own[: at + 1] for at in range(strand.size)]
        stack += [(child, prefix + own[: child.at]) for child in strand.offspring()]


def held_by(index: Index) -> list[dict[Path, int | None]]:
    """What each tier holds."""
    found: list[dict[Path, int | None]] = [{} for _ in TIERS]
    for strand, paths in strands_of(index):
        for tier, holding in enumerate(strand.holdings):
            for at, state in enumerate(holding.state if holding else b""):
                if state == strands.HELD and holding:
                    assert paths[at] not in found[tier], "a path exists twice"
                    found[tier][paths[at]] = holding.places[at] if holding.places is not None else None
    return found


def named_in(index: Index) -> set[Path]:
    """Blocks whose keys are known."""
    return {path for strand, paths in strands_of(index) for path in paths[: len(strand.keys) // KEY_BYTES]}


def strand_path(strand: Any, end: int) -> Path:
    own = tuple(bytes(strand.tok[at : at + BLOCK_BYTES]) for at in range(0, end * BLOCK_BYTES, BLOCK_BYTES))
    if strand.parent is None:
        return (Key(bytes(strand.keys)),)
    return strand_path(strand.parent, strand.at) + own


class Recorder(Observer):
    """Writes down what it is told, and what it must take to be known."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.known: dict[Leaf, dict[int, Path]] = {}

    def arrive(self, path: Sequence[tuple[Leaf, int]], use: Use) -> None:
        for strand, end in path:
            self._see(strand, 0, end)
        self.told.append(("arrive", [strand_path(strand, end) for strand, end in path], use))

    def extend(self, strand: Leaf, lo: int, hi: int, use: Use) -> None:
        assert lo < hi == strand.size
        self._see(strand, lo, hi)
        self.told.append(("extend", [strand_path(strand, at + 1) for at in range(lo, hi)], use))

    def end(self, path: Sequence[tuple[Leaf, int]], use: Use, ending: Ending, now_s: float) -> None:
        self.told.append(("end", [strand_path(strand, end) for strand, end in path], use, ending, now_s))

    def gone(self, strand: Leaf, size: int) -> None:
        assert size == strand.size
        self.known[strand] = {at: path for at, path in self.known.get(strand, {}).items() if at < size}

    def _see(self, strand: Leaf, lo: int, hi: int) -> None:
        assert hi <= strand.size
        known = self.known.setdefault(strand, {})
        known.update({at: strand_path(strand, at + 1) for at in range(lo, hi) if at not in known})

    def take(self) -> list[Any]:
        told, self.told = self.told, []
        return told


class Both(Observer):
    """A recorder and the observer of a policy that learns, whose are the notes."""

    def __init__(self, recorder: Recorder, model: Observer) -> None:
        self.recorder, self.model = recorder, model

    def arrive(self, path: Sequence[tuple[Leaf, int]], use: Use) -> None:
        self.recorder.arrive(path, use)
        self.model.arrive(path, use)

    def extend(self, strand: Leaf, lo: int, hi: int, use: Use) -> None:
        self.recorder.extend(strand, lo, hi, use)
        self.model.extend(strand, lo, hi, use)

    def end(self, path: Sequence[tuple[Leaf, int]], use: Use, ending: Ending, now_s: float) -> None:
        self.recorder.end(path, use, ending, now_s)
        self.model.end(path, use, ending, now_s)

    def gone(self, strand: Leaf, size: int) -> None:
        self.recorder.gone(strand, size)
        self.model.gone(strand, size)


class View:
    """What tiers hold, to one who hears of changes only: per tier, by key, the key before, the depth and the tokens."""

    def __init__(self) -> None:
        self.held: list[dict[bytes, tuple[bytes, int, bytes]]] = [{} for _ in TIERS]

    def stored(self, tier: int, parent: Key, depth: int, keys: bytes, tokens: bytes) -> None:
        assert keys and len(keys) * BLOCK_BYTES == len(tokens) * KEY_BYTES, "keys of other blocks than the tokens"
        for at in range(len(keys) // KEY_BYTES):
            key = keys[at * KEY_BYTES : (at + 1) * KEY_BYTES]
            assert key not in self.held[tier], "told twice"
            self.held[tier][key] = (parent, depth + at, tokens[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES])
            parent = Key(key)

    def removed(self, tier: int, keys: bytes) -> None:
        assert keys
        for at in range(0, len(keys), KEY_BYTES):
            assert keys[at : at + KEY_BYTES] in self.held[tier], "told of blocks that never came"
            del self.held[tier][keys[at : at + KEY_BYTES]]


class Promise:
    """A live lease and what it was promised: these blocks stay in these places."""

    def __init__(self, lease: Lease, path: Path) -> None:
        self.lease, self.path = lease, path
        self.kept: dict[tuple[int, Path], int | None] = {}


class IndexMachine(RuleBasedStateMachine):
    exact = True  # the policy is leaf-LRU: the model knows who goes first

    def __init__(self) -> None:
        super().__init__()
        self.recorder = Recorder()
        self.view = View()
        self.index = self.new_index(0)
        self.history_blocks = 0
        self.now_s = 0.0
        self.seen: set[Path] = set()  # what the recorder was told of
        self.left: dict[tuple[int, Path], Fate] = {}  # how blocks left tiers, the latest last
        self.held: list[dict[Path, int | None]] = [{} for _ in TIERS]
        self.stamps: dict[Path, int] = {}
        self.uses: dict[Path, int] = {}
        self.leases: list[Promise] = []
        self.copies: list[tuple[Copy, Path]] = []
        self.wants: list[tuple[Want, Path]] = []  # in the order of their coming
        self.reserved: list[Reservation] = []
        self.past: list[Any] = []  # the last prompts: worth asking for again
        self.clock = 0
        self.times: list[tuple[float, float]] = []  # clocks of the index and of the model, at some of the last steps
        self.failed = True  # until an invariant has said otherwise

    def new_index(self, history_blocks: int) -> Index:
        return self.index_of([LruPolicy(tier=tier) for tier in TIERS], history_blocks, None)

    def index_of(self, policies: Sequence[Policy], history_blocks: int, model: Observer | None) -> Index:
        specs = [TierSpec(f"t{tier}", CAPACITY[tier], PLACED[tier], policies[tier]) for tier in TIERS]
        observer = Both(self.recorder, model) if model else self.recorder
        return Index(
            block_tokens=BLOCK_TOKENS,
            tiers=specs,
            observer=observer,
            history_blocks=history_blocks,
            named=True,
            listener=self.view,
        )

    # -- the model -------------------------------------------------------------------------------------------------

    def anywhere(self, path: Path) -> bool:
        return any(path in held for held in self.held)

    def hit(self, path: Path) -> Path:
        size = 1
        while size < len(path) and self.anywhere(path[: size + 1]):
            size += 1
        return path[:size]

    def head_tokens(self, path: Path, rest: bytes) -> int:
        best = 0
        for held in self.held:
            for other in held:
                if other[:-1] == path:
                    pairs = zip(array("i", other[-1]), array("i", rest[:BLOCK_BYTES]), strict=False)
                    same = 0
                    for one, two in pairs:
                        if one != two:
                            break
                        same += 1
                    best = max(best, same)
        return best

    def ends(self) -> list[tuple[Path, list[int]]]:
        """Every path that is kept, and the tiers that must not forget it."""
        ends = []
        for promise in self.leases:
            ends.append((promise.path, list(lease_module.BITS[promise.lease._tiers])))
            head = promise.lease.head
            if head:
                ends.append((strand_path(head.strand, head.block + 1), [promise.lease._head_tier]))
        for copy, path in self.copies:
            ends.append((path[: copy.blocks[-1] + 2], [copy.tier]))
        ends += [(self.known(path), []) for _, path in self.wants]
        return ends

    def pending(self, tier: int) -> set[Path]:
        return {path[: block + 2] for copy, path in self.copies if copy.tier == tier for block in copy.blocks}

    def touch(self, path: Path, start: int = 0, *, used: bool = True) -> None:
        self.clock += 1
        for part in above(path):
            self.stamps[part] = self.clock
            if used and len(part) - 2 >= start:
                self.uses[part] = self.uses.get(part, 0) + 1

    def evictable(self, tier: int) -> list[Path]:
        kept = {part for path, tiers in self.ends() if tier in tiers for part in above(path)}
        kept |= {part for path in self.held[tier] for part in above(path[:-1])}
        return [path for path in self.held[tier] if path not in kept]

    def claim(self, path: Path) -> float:
        """Which want covers the block first."""
        claims = (number for number, (_, want) in enumerate(self.wants) if want[: len(path)] == path)
        return next(claims, float("inf"))

    def first_to_go(self, tier: int) -> list[Path]:
        """What may be forgotten next: nothing that is wanted, if there is anything else; else what was wanted last."""
        candidates = self.evictable(tier)
        last = max(map(self.claim, candidates), default=0)
        return [path for path in candidates if self.claim(path) == last]

    def follow_eviction(self, tier: int, count: int) -> list[Path]:
        """Forget in the model what the index forgot: `count` blocks, each the first of leaf-LRU among the candidates."""
        now = held_by(self.index)[tier]
        gone = [path for path in self.held[tier] if path not in now]
        order = []
        for _ in range(count):
            candidates = self.first_to_go(tier)
            assert candidates, "forgot a block that something protects"
            oldest = min(self.stamps[path] for path in candidates)  # equal only on one path, and after a restore
            possible = [path for path in candidates if path in gone and (not self.exact or self.stamps[path] == oldest)]
            assert possible, "forgot another block than leaf-LRU"
            del self.held[tier][possible[0]]
            self.leave(tier, possible[0], self.index._tree.rooms[tier].policy.name)
            order.append(possible[0])
        assert len(order) == len(gone), "forgot another number of blocks than it says"
        self.settle()
        return order

    def settle(self) -> set[Path]:
        """Forget in the model the history that the index forgot: the oldest, none too many. Returns all that is known."""
        needed = self.needed()
        known = {path for _, paths in strands_of(self.index) for path in paths}
        assert needed <= known <= self.stamps.keys(), "what something needs is not known, or what was never used is"
        gone, past = self.stamps.keys() - known, known - needed
        assert len(past) <= self.history_blocks, "too much history"
        if gone and self.history_blocks:
            assert len(past) == self.history_blocks, "history went in spite of room"
            assert max(self.stamps[part] for part in gone) <= min(self.stamps[part] for part in past), (
                "newer history went"
            )
        self.lose(known)
        return known

    def needed(self) -> set[Path]:
        """What some lease, want, copy or tier needs."""
        needed = {part for path, _ in self.ends() for part in above(path)}
        return needed | {part for held in self.held for path in held for part in above(path)}

    def lose(self, known: set[Path]) -> None:
        """Know nothing else any more."""
        for part in self.stamps.keys() - known:
            del self.stamps[part], self.uses[part]
        self.seen &= known
        self.left = {(tier, part): fate for (tier, part), fate in self.left.items() if part in known}

    def leave(self, tier: int, path: Path, why: str) -> None:
        self.left.pop((tier, path), None)
        self.left[tier, path] = Fate(tier, self.now_s, why)

    def known(self, path: Path) -> Path:
        size = 1
        while size < len(path) and path[: size + 1] in self.stamps:
            size += 1
        return path[:size]

    def told(self, *events: Any) -> None:
        """The recorder was told this since it was last asked, and no more."""
        found = self.recorder.take()
        assert [event[0] for event in found] == [event[0] for event in events]
        for (kind, paths, *rest), (_, path, *expected) in zip(found, events, strict=True):
            assert rest == expected
            if kind == "extend":
                assert paths == path
            else:
                assert (paths[-1] if paths else path[:1]) == path and all(part == path[: len(part)] for part in paths)

    def after_evictions(self, tier: int, evicted: int, victims: list[Key]) -> None:
        gone = self.follow_eviction(tier, evicted)
        assert sorted(victims) == sorted(key_of(path) for path in gone if not PLACED[tier])

    def free_room(self, tier: int) -> int:
        reserved = sum(each.count for each in self.reserved if each.tier == tier)
        return CAPACITY[tier] - len(self.held[tier]) - reserved - len(self.pending(tier)) - len(self.limbo(tier))

    def limbo(self, tier: int) -> list[int]:
        room = self.index._tree.rooms[tier]
        return [place for _, of, places in self.index._limbo for place in places if of is room]

    def reserve(self, tier: int, n: int, at_least: int) -> Reservation | None:
        possible = self.free_room(tier)
        before = self.index._tree.rooms[tier].evicted
        available = self.index.stats().tiers[tier].available
        got = self.index.reserve(tier, n, at_least=at_least)
        self.after_evictions(
            tier, self.index._tree.rooms[tier].evicted - before, got.victims if got else self.keys_gone(tier)
        )
        if got is None:
            assert available < at_least, "less was available than promised"
            assert not self.evictable(tier) and self.free_room(tier) < at_least
            return None
        assert got.evicted == max(0, got.count - possible) and (got.count == n or not self.evictable(tier))
        assert len(got.places) == (got.count if PLACED[tier] else 0)
        self.reserved.append(got)
        return got

    def keys_gone(self, tier: int) -> list[Key]:
        now = held_by(self.index)[tier]
        return [key_of(path) for path in self.held[tier] if path not in now and not PLACED[tier]]

    def promise(self, lease: Lease, path: Path) -> Promise:
        promise = Promise(lease, path)
        self.leases.append(promise)
        return self.renew(promise)

    def renew(self, promise: Promise) -> Promise:
        """Ask the lease for its sources; from now on they are promised."""
        lease, path = promise.lease, promise.path
        assert lease.num_blocks == len(path) - 1 and lease.tokens(0, lease.num_blocks) == b"".join(path[1:])
        end = 0
        for tier, lo, hi in lease.sources():
            assert lo == end < hi
            end = hi
            if PLACED[tier]:
                assert lease.places(tier, lo, hi) == [self.held[tier][path[: at + 2]] for at in range(lo, hi)]
            for at in range(lo, hi):
                part = path[: at + 2]
                assert tier == min(each for each in TIERS if part in self.held[each])
                promise.kept[tier, part] = self.held[tier][part]
        assert end == lease.num_blocks or not self.anywhere(path[: end + 2])
        return promise

    def pick(self, which: int) -> Promise:
        """One of the leases, rather one that has blocks, rather a late one."""
        some = [promise for promise in self.leases if promise.lease.num_blocks] or self.leases
        return some[-1 - which % len(some)]

    # -- rules -----------------------------------------------------------------------------------------------------

    @initialize(
        shape=st.sampled_from(SHAPES),
        keep=st.booleans(),
        less=st.integers(0, 3),
        history=st.sampled_from([0, 2, 5]),
        queue=st.integers(-2, 3),
    )
    def begin(self, shape: list[list[tuple[int, ...]]], keep: bool, less: int, history: int, queue: int) -> None:
        """Start where chance alone seldom gets: branches of branches, paths of different age, some of them wanted."""
        self.history_blocks = history
        self.index = self.new_index(history)
        for blocks in shape:
            self.acquire_these(ROOTS[0], blocks, ())
            promise = self.leases[-1]
            self.save_after(promise, blocks[promise.lease.num_blocks :])
            if keep:
                promise.lease.keys(0, promise.lease.num_blocks)
            else:
                self.release_one(promise)
        if less == 3:  # before anything is wanted
            self.evict(0, less)
        for blocks in shape[: max(0, queue)]:
            self.want_these(ROOTS[0], tokens_of(blocks))
        if less < 3:
            self.evict(0, less)

    @rule(root=st.sampled_from(ROOTS), blocks=blocks_of, tail=tails, past=any_of)
    def match(self, root: Key, blocks: Any, tail: Any, past: int) -> None:
        if self.past and past:
            root, blocks = ROOTS[0], [*self.past[-past % len(self.past)], *blocks]
        tokens = tokens_of(blocks, tail)
        found = self.index.match(root, tokens)
        hit = self.hit(path_of(root, tokens))
        assert found.num_blocks == len(hit) - 1
        rest = tokens[found.num_blocks * BLOCK_BYTES :]
        assert found.num_tokens == found.num_blocks * BLOCK_TOKENS + self.head_tokens(hit, rest)
        self.explain(root, tokens)

    def explain(self, root: Key, tokens: bytes) -> None:
        path = path_of(root, tokens)
        known = len(self.known(path)) - 1
        at = 0
        for part in self.index.explain(root, tokens):
            assert part.lo == at < part.hi
            for block in range(at, part.hi):
                one = path[: block + 2]
                assert part.known == (block < known)
                assert part.tiers == tuple(tier for tier in TIERS if one in self.held[tier])
                left = [fate for (tier, other), fate in self.left.items() if other == one and tier not in part.tiers]
                assert part.fates == tuple(reversed(left))
            at = part.hi
        assert at == len(path) - 1
        assert set(self.index.roots()) >= {path[0] for path in self.stamps}

    @precondition(lambda self: len(self.leases) < 5)
    @rule(
        root=st.sampled_from(ROOTS), blocks=blocks_of, tail=tails, past=any_of, cut=st.integers(0, 7), only_look=chance
    )
    def acquire(self, root: Key, blocks: Any, tail: Any, past: int, cut: int, only_look: int) -> None:
        if self.past and past:
            root, blocks = ROOTS[0], self.past[-past % len(self.past)][:cut] + blocks[: max(0, cut - 4)]
        if only_look != 3:
            self.acquire_these(root, blocks, tail)
            return
        hit = self.hit(path_of(root, tokens_of(blocks, tail)))
        lease = self.index.keep(root, tokens_of(blocks, tail))
        assert lease.num_blocks == len(hit) - 1 and lease.use is None
        self.promise(lease, hit)

    @precondition(lambda self: len(self.wants) < 4)
    @rule(root=st.sampled_from(ROOTS), blocks=blocks_of, tail=tails, past=any_of, cut=st.integers(0, 7))
    def want(self, root: Key, blocks: Any, tail: Any, past: int, cut: int) -> None:
        """A request waits in a queue."""
        if self.past and past:
            root, blocks = ROOTS[0], (self.past[-past % len(self.past)] + blocks)[:cut]
        self.want_these(root, tokens_of(blocks, tail))

    def want_these(self, root: Key, tokens: bytes) -> None:
        self.wants.append((self.index.want(root, tokens), path_of(root, tokens)))

    @precondition(lambda self: self.wants)
    @rule(which=any_of)
    def want_no_more(self, which: int) -> None:
        want, _ = self.wants.pop(which % len(self.wants))
        want.release()
        want.release()

    def acquire_these(self, root: Key, blocks: Any, tail: Any) -> None:
        if root == ROOTS[0]:
            self.past = [*self.past[-4:], blocks]
        tokens = tokens_of(blocks, tail)
        path = path_of(root, tokens)
        hit, known = self.hit(path), self.known(path)
        hints = Hints(session="one", priority=len(blocks))
        lease = self.index.acquire(root, tokens, now_s=self.now_s, hints=hints)
        assert lease.use
        use = Use(self.now_s, len(path) - 1, len(known) - 1, len(hit) - 1, hints, lease.use.notes)
        self.told(("arrive", known, use))
        self.seen.update(above(known))
        self.touch(known, used=False)
        self.touch(hit)
        assert lease.num_blocks == len(hit) - 1
        shared = self.head_tokens(hit, tokens[lease.num_blocks * BLOCK_BYTES :])
        assert (lease.head.num_tokens if lease.head else 0) == shared
        self.promise(lease, hit)
        if lease.head:
            run = lease.head_run()
            path = (*hit, run.tokens)
            assert run.keys == (key_of(path),) and run.depth == lease.num_blocks
            assert run.parent == (key_of(hit) if len(hit) > 1 else root)
            source = lease.head_source()
            assert source and self.held[source[0]][path] == source[1]

    @precondition(lambda self: self.leases)
    @rule(which=any_of, blocks=blocks_of, same=chance)
    def save(self, which: int, blocks: Any, same: int) -> None:
        """An engine computed what follows: its pages become the index's."""
        promise = self.pick(which)
        self.save_after(promise, [B] * (same // 2) if same > 3 else blocks[:3])

    def save_after(self, promise: Promise, blocks: Any) -> None:
        lease = promise.lease
        got = self.reserve(0, len(blocks), at_least=0)
        assert got
        self.reserved.remove(got)
        tokens = tokens_of(blocks[: got.count])
        path = promise.path + path_of(promise.path[0], tokens)[1:]
        pending = self.pending(0)
        taken = self.index.extend(lease, tokens, tier=0, places=got.places)
        start = len(promise.path) - 1
        for at, (place, mine) in enumerate(zip(got.places, taken, strict=True)):
            part = path[: start + at + 2]
            assert mine == (part not in self.held[0] and part not in pending)
            if mine:
                self.held[0][part] = place
        self.index.free(0, [place for place, mine in zip(got.places, taken, strict=True) if not mine])
        self.extended(promise, path, start)
        self.renew(promise)

    def extended(self, promise: Promise, path: Path, start: int) -> None:
        """The observer hears of what is new of the path, which is used from block `start` on."""
        new = [part for part in above(path) if part not in self.stamps]
        self.told(*([("extend", new, promise.lease.use)] if new and promise.lease.use else ()))
        if promise.lease.use:
            self.seen.update(new)
        if len(path) - 1 > start:
            self.touch(path, start)
        promise.path = path

    @precondition(lambda self: self.leases)
    @rule(which=any_of, following=st.sampled_from(Next), passed_s=st.integers(-2, 5))
    def end(self, which: int, following: Next, passed_s: int) -> None:
        """A request is over; its blocks stay for now. A clock that goes back stands still."""
        promise = self.pick(which)
        ending = Ending(next=following)
        self.index.end(promise.lease, ending, now_s=self.now_s + passed_s)
        self.now_s += max(0, passed_s)
        use = promise.lease.use
        self.told(*([("end", promise.path, use, ending, self.now_s)] if use else ()))

    @precondition(lambda self: self.leases)
    @rule(which=any_of, blocks=blocks_of, known=st.booleans())
    def expect_from_elsewhere(self, which: int, blocks: Any, known: bool) -> None:
        """A shared tier has what follows: ghosts first, then a copy."""
        promise = self.pick(which)
        tokens = tokens_of(blocks[:3])
        path = promise.path + path_of(promise.path[0], tokens)[1:]
        keys = [key_of(path[: size + 1]) for size in range(len(promise.path), len(path))]
        assert not any(self.index.extend(promise.lease, tokens, keys=keys if known else None))
        self.extended(promise, path, len(promise.path) - 1)
        self.renew(promise)

    @precondition(lambda self: self.leases and len(self.copies) < 3)
    @rule(which=any_of, tier=st.sampled_from(TIERS), lo=st.integers(0, 3), size=st.integers(0, 6))
    def begin_copy(self, which: int, tier: int, lo: int, size: int) -> None:
        promise = self.pick(which)
        lo = min(lo, promise.lease.num_blocks)
        hi = min(lo + size, promise.lease.num_blocks)
        pending = self.pending(tier)
        wanted = [at for at in range(lo, hi) if promise.path[: at + 2] not in pending | self.held[tier].keys()]
        before = self.index._tree.rooms[tier].evicted
        copy = self.index.begin_copy(promise.lease, tier, lo, hi)
        evicted = self.index._tree.rooms[tier].evicted - before
        assert copy is not None or not evicted
        if copy is None:
            assert not wanted or self.free_room(tier) == 0
            return
        # What is above the blocks, in this tier, must not make the room.
        guard = Promise(promise.lease, promise.path[: wanted[-1] + 2])
        self.copies.append((copy, promise.path))
        kept = set(above(guard.path)) & self.held[tier].keys()
        self.copies.pop()
        self.after_evictions(tier, evicted, copy.victims)
        assert kept <= self.held[tier].keys(), "room was made above the copy"
        assert copy.blocks == wanted[: len(copy.blocks)]
        assert len(copy.places) == (len(copy.blocks) if PLACED[tier] else 0)
        self.copies.append((copy, promise.path))
        assert len(copy.blocks) == len(wanted) or self.free_room(tier) == 0

    @precondition(lambda self: self.copies)
    @rule(which=any_of, bad=chance)
    def commit_copy(self, which: int, bad: int) -> None:
        copy, path = self.copies.pop(which % len(self.copies))
        ok = [at != bad and bad != 1 for at in range(len(copy.blocks))]
        if any(ok):
            self.index.commit_copy(copy, ok, reason="corrupt")
        else:
            self.index.abort(copy, reason="corrupt")
        for at, (block, good) in enumerate(zip(copy.blocks, ok, strict=True)):
            if good:
                self.held[copy.tier][path[: block + 2]] = copy.places[at] if PLACED[copy.tier] else None
            else:
                self.leave(copy.tier, path[: block + 2], "corrupt")
        self.index.abort(copy)  # a second end changes nothing

    @precondition(lambda self: self.leases)
    @rule(which=any_of)
    def release(self, which: int) -> None:
        self.release_one(self.pick(which))

    def release_one(self, promise: Promise) -> None:
        self.leases.remove(promise)
        promise.lease.release()
        promise.lease.release()
        self.settle()

    @precondition(lambda self: self.leases and len(self.leases) < 5)
    @rule(which=any_of, tier=st.sampled_from(TIERS), part=st.booleans(), lo=any_of, less=st.integers(0, 2))
    def fork_or_share(self, which: int, tier: int, part: bool, lo: int, less: int) -> None:
        promise = self.pick(which)
        if not part:
            self.promise(promise.lease.fork(), promise.path)
            return
        hi = max(0, promise.lease.num_blocks - less)
        lo = min(lo, hi)
        other = promise.lease.share(lo, hi, tier)
        assert other.lo == lo and other.num_blocks == hi
        shared = Promise(other, promise.path[: hi + 1])
        self.leases.append(shared)
        parts = [promise.path[: at + 2] for at in range(lo, hi)]
        if all(each in self.held[tier] for each in parts):
            shared.kept = {(tier, each): self.held[tier][each] for each in parts}

    @precondition(lambda self: self.leases)
    @rule(which=any_of, less=st.integers(0, 4))
    def shrink(self, which: int, less: int) -> None:
        promise = self.pick(which)
        count = max(0, promise.lease.num_blocks - less)
        promise.lease.shrink(count)
        promise.path = promise.path[: count + 1]
        promise.kept = {}
        assert promise.lease.head is None
        self.settle()
        self.renew(promise)

    @precondition(lambda self: self.leases)
    @rule(which=any_of, tier=st.sampled_from(TIERS))
    def shorten_pins(self, which: int, tier: int) -> None:
        promise = self.pick(which)
        promise.lease.shorten_pins(tier)
        promise.kept = {(tier, part): self.held[tier][part] for part in above(promise.path) if part in self.held[tier]}

    @precondition(lambda self: self.leases)
    @rule(
        which=any_of, tiers=st.sampled_from([(0,), (1,), (2,), (0, 1, 2)]), bad=st.sets(st.integers(0, 6), max_size=3)
    )
    def drop(self, which: int, tiers: tuple[int, ...], bad: set[int]) -> None:
        for tier in tiers:
            self.drop_from(tier, self.pick(which), bad)

    def drop_from(self, tier: int, promise: Promise, bad: set[int]) -> None:
        head = promise.lease.head
        limit = promise.lease.num_blocks + (1 if head else 0)
        bad = {at for at in bad if at < limit}
        head_path = strand_path(head.strand, head.block + 1) if head else ()
        path = promise.path
        places = self.limbo(tier)
        self.index.drop(tier, promise.lease, sorted(bad), reason="late")
        gone = {path[: at + 2] for at in bad if at < len(path) - 1}
        if head and len(head_path) - 2 in bad and len(head_path) - 2 >= len(path) - 1:
            gone.add(head_path)
        gone &= self.held[tier].keys()
        places += [place for part in gone if (place := self.held[tier].pop(part)) is not None]
        assert sorted(self.limbo(tier)) == sorted(places)
        for part in sorted(gone):
            self.leave(tier, part, "late")
        for other in self.leases:
            for part in gone:
                other.kept.pop((tier, part), None)

    @rule(tier=st.sampled_from(TIERS), n=st.sampled_from([1, 2, 3, 4, 9, 0]))
    def evict(self, tier: int, n: int) -> None:
        possible = len(self.held[tier])
        got = self.index.evict(tier, None if n == 9 else n)
        self.after_evictions(tier, got.evicted, got.victims)
        assert got.count == 0 and not got.places
        assert got.evicted == (possible if n == 9 else n) or not self.evictable(tier)

    @rule(roots=st.sampled_from([None, ROOTS[:1], ROOTS[:1], ROOTS[1:]]), ago=st.sampled_from([0, 0, 0, 2, 3, 4, 6, 8]))
    def purge(self, roots: list[Key] | None, ago: int) -> None:
        """Somebody asks to forget: all that nothing protects, or what was not used for long."""
        until, then = self.times[-ago] if 0 < ago <= len(self.times) else (inf, inf)
        evicted = [room.evicted for room in self.index._tree.rooms]
        got = self.index.purge(roots=roots, until=until)
        victims: list[Key] = []
        for tier in TIERS:
            gone: list[Path] = []
            while some := [
                path
                for path in self.evictable(tier)
                if (roots is None or path[0] in roots) and self.stamps[path] <= then
            ]:
                for path in some:
                    del self.held[tier][path]
                    self.leave(tier, path, "forgotten")
                gone += some
            assert got.evicted[tier] == len(gone)
            victims += [key_of(path) for path in gone if not PLACED[tier]]
        assert sorted(got.victims) == sorted(victims)
        assert evicted == [room.evicted for room in self.index._tree.rooms], "that was not for room"
        if until < inf:
            self.settle()
            return
        known = {path for _, paths in strands_of(self.index) for path in paths}
        needed = self.needed()
        assert known == {
            path for path in self.stamps if path in needed or (roots is not None and path[0] not in roots)
        }, "something stayed known, or something else was forgotten"
        self.lose(known)

    @precondition(lambda self: len(self.reserved) < 2)
    @rule(tier=st.sampled_from(TIERS), n=st.integers(0, 4), slack=st.integers(0, 2))
    def keep_room(self, tier: int, n: int, slack: int) -> None:
        self.reserve(tier, n, at_least=max(0, n - slack))

    @precondition(lambda self: self.reserved)
    @rule()
    def free_room_again(self) -> None:
        got = self.reserved.pop()
        self.index.free(got.tier, got.places, count=got.count)

    @precondition(lambda self: len(self.leases) < 3)
    @rule(edge=st.sampled_from([(0, 1), (0, 2), (1, 2)]), n=st.integers(1, 5), keep=st.booleans())
    def spill(self, edge: tuple[int, int], n: int, keep: bool) -> None:
        tier, below = edge
        free_to_go = set(self.first_to_go(tier))
        taboo = self.pending(below) | self.held[below].keys()
        oldest = sorted(self.stamps[path] for path in free_to_go)[:2]
        first = {path for path in free_to_go if [self.stamps[path]] == oldest[:1]}
        leases = self.index.spill(tier, below, n)
        paths = []
        for lease in leases:
            path = strand_path(lease._strand, lease._end)
            paths += [path[: at + 2] for at in range(lease.lo, lease.num_blocks)]
            self.leases.append(Promise(lease, path))
            self.leases[-1].kept = {
                (tier, part): self.held[tier][part] for part in above(path) if part in self.held[tier]
            }
        assert len(paths) == len(set(paths)) <= n and not taboo & set(paths) and set(paths) <= self.held[tier].keys()
        if self.exact and len(set(oldest)) == len(oldest) and not first <= taboo:
            assert first <= set(paths), "the next victim was not offered"
        for lease in leases if not keep else ():
            lease.release()
        self.leases = [promise for promise in self.leases if not promise.lease.released]

    @rule(
        root=st.sampled_from(ROOTS),
        prompts=st.lists(blocks_of, min_size=1, max_size=3),
        torn=chance,
        order=st.randoms(),
    )
    def restore(self, root: Key, prompts: Any, torn: int, order: Any) -> None:
        """The disk tells what it still holds: runs of any cut, in any order."""
        paths = {part for blocks in prompts for part in above(path_of(root, tokens_of(blocks)))}
        runs = []
        for number, path in enumerate(sorted(paths)):
            if any(path[: size + 1] not in paths for size in range(1, len(path) - 1)):
                continue
            key = key_of(path)
            parent = key_of(path[:-1]) if len(path) > 2 else root
            tokens = path[-1] if torn != 3 or number else b"\1\0\0\0" * BLOCK_TOKENS
            runs.append(Run(root, parent, len(path) - 2, (key,), tokens))
        order.shuffle(runs)
        by_key = {key_of(path): path for path in paths}
        room = self.free_room(2)
        known = self.settle()
        orphans = {key for run in self.index.restore(2, runs) for key in run.keys}
        now = held_by(self.index)[2]
        for run in runs:
            path = by_key[run.keys[0]]
            if path in now and path not in self.held[2]:
                self.held[2][path] = None
                room -= 1
                assert run.tokens == path[-1], "took in tokens that are not the key's"
                if path not in known:
                    self.stamps[path], self.uses[path] = 0, 1  # on disk it was not for nothing
            assert (run.keys[0] in orphans) == (
                (path not in now and path not in self.pending(2)) or run.tokens != path[-1]
            )
        assert room >= 0
        for run in runs if room else ():
            path = by_key[run.keys[0]]
            if run.keys[0] in orphans and run.tokens == path[-1]:
                assert len(path) > 2 and path[:-1] not in now, "refused in spite of room and parent"

    @precondition(lambda self: self.leases)
    @rule(which=any_of, tier=st.sampled_from(TIERS), lo=st.integers(0, 3))
    def ask(self, which: int, tier: int, lo: int) -> None:
        promise = self.pick(which)
        lease, path = promise.lease, promise.path
        taken = self.pending(tier) | self.held[tier].keys()
        missing = [at for at in range(lease.num_blocks) if path[: at + 2] not in taken]
        assert [at for lo, hi in lease.missing(tier) for at in range(lo, hi)] == missing
        held = [at for at in range(lease.num_blocks) if path[: at + 2] in self.held[tier]]
        assert [at for lo, hi in lease.held(tier, 0, lease.num_blocks) for at in range(lo, hi)] == held
        assert self.index.room(tier) == (self.free_room(tier), CAPACITY[tier])
        again = [at for lo, hi in lease.second_use(tier) for at in range(lo, hi)]
        # Following a known block counts its whole path once more: a hint may be generous, not forgetful.
        assert {at for at in missing if self.uses[path[: at + 2]] > 1} <= set(again) <= set(missing)
        lo = min(lo, lease.num_blocks)
        run = lease.run(lo, lease.num_blocks)
        assert list(run.keys) == [key_of(path[: at + 2]) for at in range(lo, lease.num_blocks)]
        assert run.parent == (key_of(path[: lo + 1]) if lo else path[0]) and run.root == path[0]
        assert run.tokens == b"".join(path[lo + 1 :]) and run.depth == lo

    @rule(
        queries=st.lists(
            st.tuples(st.integers(0, 20), st.sampled_from([0, 0, 1, 2, None, None]), st.booleans()), max_size=3
        ),
        keep=any_of,
    )
    def ask_by_key(self, queries: Any, keep: int) -> None:
        """Somebody knows keys only: those of parts of paths, some as deep as the part before ends; others nobody knows."""
        named = named_in(self.index)
        paths = [*sorted(named), *sorted(self.stamps.keys() - named)[:3]] or [path_of(ROOTS[0], tokens_of([A]))]
        asked: list[Path] = []
        for which, lo, further in queries:
            path = paths[which % len(paths)]
            lo = len(asked[-1]) - 1 if asked and lo is None else lo
            asked += [*above(path)][lo:]
            if further:
                asked.append((*path, tokens_of([A])))
        keys = b"".join(map(key_of, asked))
        sources = [self.source(path) if path in named else None for path in asked]
        assert self.index.presence(keys) == bytes(0 if tier is None else tier + 1 for tier in sources)
        stretches: list[list[int]] = []
        for at, path in enumerate(asked):
            if path in named:
                if stretches and stretches[-1][-1] == at - 1 and path[:-1] == asked[at - 1]:
                    stretches[-1].append(at)
                else:
                    stretches.append([at])
        traced = self.index.trace(keys)
        assert [found.position for found in traced] == [stretch[0] for stretch in stretches]
        for (_, lease), stretch in zip(traced, stretches, strict=True):
            path = asked[stretch[-1]]
            assert lease.root == path[0] and (lease.lo, lease.num_blocks) == (len(asked[stretch[0]]) - 2, len(path) - 1)
            assert lease.tokens(0, lease.num_blocks) == b"".join(path[1:]) and lease.use is None
            promise = Promise(lease, path)
            self.leases.append(promise)
            for at in stretch:
                if (tier := sources[at]) is not None:
                    promise.kept[tier, asked[at]] = self.held[tier][asked[at]]
            assert lease._tiers == sum(1 << tier for tier in {tier for tier, _ in promise.kept})
        if keep and len(self.leases) < 8:
            return
        for _, lease in traced:
            lease.release()
        self.leases = [promise for promise in self.leases if not promise.lease.released]
        self.settle()

    def source(self, path: Path) -> int | None:
        """The fastest tier that holds a block."""
        return next((tier for tier in TIERS if path in self.held[tier]), None)

    # -- what always holds -----------------------------------------------------------------------------------------

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.failed = True
        assert held_by(self.index) == self.held
        self.index.check([promise.lease for promise in self.leases], [copy for copy, _ in self.copies])
        named = named_in(self.index)
        for held, heard in zip(self.held, self.view.held, strict=True):
            assert heard == {
                key_of(path): (key_of(path[:-1]) if len(path) > 2 else path[0], len(path) - 2, path[-1])
                for path in held
                if path in named
            }, "a listener was told otherwise"
        self.times = [*self.times[-7:], (self.index.clock, self.clock)]
        stats = self.index.stats()
        assert stats.num_blocks == len(self.settle())
        assert {path for paths in self.recorder.known.values() for path in paths.values()} == self.seen
        assert not self.recorder.take(), "told of a use that was none"
        if self.past:
            self.explain(ROOTS[0], tokens_of(self.past[self.clock % len(self.past)]))
        assert stats.num_leases == len(self.leases)
        for tier in TIERS:
            assert stats.tiers[tier].held == len(self.held[tier])
            assert stats.tiers[tier].used == CAPACITY[tier] - self.free_room(tier)

    @invariant()
    def promises_are_kept(self) -> None:
        for promise in self.leases:
            for (tier, part), place in promise.kept.items():
                assert self.held[tier].get(part, "gone") == place
        self.failed = False

    def teardown(self) -> None:
        if self.failed:
            return
        for copy, _ in self.copies:
            self.index.abort(copy)
        for promise in self.leases:
            promise.lease.release()
        for want, _ in self.wants:
            want.release()
        for got in self.reserved:
            self.index.free(got.tier, got.places, count=got.count)
        for tier in TIERS:
            self.index.evict(tier)
        self.index.check([])
        stats = self.index.stats()
        assert stats.num_blocks == stats.num_past == min(self.history_blocks, stats.num_blocks)
        assert self.history_blocks or (stats.num_strands == 0 and not self.index._tree.roots)
        assert all(tier.used == 0 for tier in stats.tiers)


@pytest.fixture(autouse=True)
def every_fate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model forgets none; what is forgotten for room is in test_index_fates.py."""
    monkeypatch.setattr(fates, "MAX_FATES", 99)


def run(machine: type[IndexMachine], examples: int, **options: Any) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            print_blob=True,
            report_multiple_bugs=False,
            **options,
        ),
    )


def test_index_agrees_with_a_model_of_dicts() -> None:
    run(IndexMachine, 800)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lru"])
def test_index_keeps_its_promises_under_other_policies(name: str) -> None:
    class Machine(IndexMachine):
        exact = False

        def new_index(self, history_blocks: int) -> Index:
            cost = CostModel(block_tokens=BLOCK_TOKENS, block_bytes=64)
            policies, model = build([name] * len(CAPACITY), capacities=CAPACITY, cost=cost)
            return self.index_of(policies, history_blocks, model)

    run(Machine, 60)


# -- planted faults: (what breaks, where, what is put there given what was there) ---------------------------------------


def _cover_all(old: Any) -> Any:
    return lambda self, end, value: old(self, max(end, -self._ends[0]), value)


def _trim_without_children(old: Any) -> Any:
    def trim(self: tree.Tree, strand: strands.Strand) -> None:
        children = strand.children
        strand.children = None if strand.parent else children
        old(self, strand)
        strand.children = children

    return trim


def _wake_without_floor(old: Any) -> Any:
    def wake(self: tree.Tree, strand: strands.Strand, tier: int) -> None:
        old(self, strand, tier)
        holding = strand.parent.holdings[tier] if strand.parent else None
        if holding:
            holding.floor = 0

    return wake


def _wake_the_parent_only(old: Any) -> Any:
    def wake(self: tree.Tree, strand: strands.Strand, tier: int) -> None:
        parent = strand.parent
        grandparent, parent.parent.parent = parent.parent.parent, None  # type: ignore[union-attr]
        old(self, strand, tier)
        parent.parent.parent = grandparent  # type: ignore[union-attr]

    return lambda self, strand, tier: (wake if strand.parent and strand.parent.parent else old)(self, strand, tier)


def _absent_counts_pending(old: Any) -> Any:
    def absent(self: strands.Holding, lo: int, hi: int) -> Any:
        plain = strands.Holding(placed=False)
        plain.state = self.state.replace(b"\2", b"\0")
        return old(plain, lo, hi)

    return absent


def _drop_frees_at_once(old: Any) -> Any:
    def drop(self: Index, tier: int, lease: Lease, blocks: Any, *, reason: str) -> None:
        old(self, tier, lease, blocks, reason=reason)
        for _, room, places in self._limbo:
            room.give_back(places, len(places))
        self._limbo = []

    return drop


def _clear_twice(old: Any) -> Any:
    def clear(self: rooms.Room, places: Any, count: int) -> None:
        old(self, places, count)
        if self.placed:
            self._free.extend(places[:1])

    return clear


def _grow_hangs_too_deep(old: Any) -> Any:
    def grow(self: tree.Tree, strand: strands.Strand, end: int, tokens: bytes) -> Any:
        return old(self, strand, strand.size if strand.parent else end, tokens)

    return grow


def _remember_too_much(old: Any) -> Any:
    def init(self: tree.Tree, *, history_blocks: int, **others: Any) -> None:
        old(self, history_blocks=history_blocks + bool(history_blocks), **others)

    return init


def _need_the_strand_only(old: Any) -> Any:
    def need(self: tree.Tree, strand: strands.Strand, end: int) -> None:
        parent, strand.parent = strand.parent, None
        before, self.num_past = strand.past, self.num_past - max(0, end - (strand.size - strand.past))
        strand.past = min(before, strand.size - end)
        strand.parent = parent

    return need


def _cut_in_silence(old: Any) -> Any:
    def cut(self: tree.Tree, strand: strands.Strand, size: int) -> None:
        observer, self.observer = self.observer, None
        old(self, strand, size)
        self.observer = observer

    return cut


def _first_queued_goes_first(old: Any) -> Any:
    def pop(self: wants.Parked) -> strands.Strand | None:
        if not self:
            return None
        strand, _ = min(self.items(), key=lambda item: item[1])
        self.take(strand)
        return strand

    return pop


def _join_what_is_asked_together(old: Any) -> Any:
    def stretches(self: names.Names, keys: bytes) -> list[names.Stretch]:
        found: list[names.Stretch] = []
        for part in old(self, keys):
            before = found[-1] if found else None
            size = before.strand.depth + before.end - before.lo if before else 0
            if before and before.position + size == part.position and part.lo == before.lo + size:
                part = part._replace(position=before.position, lo=before.lo, tiers=before.tiers | part.tiers)
                found.pop()
            found.append(part)
        return found

    return stretches


def _without(attribute: str, old: Any) -> Any:
    """The same, by a tree that lacks something meanwhile."""

    def call(self: Any, *arguments: Any) -> Any:
        of = getattr(self, "_tree", self)
        kept = getattr(of, attribute)
        setattr(of, attribute, None)
        try:
            return old(self, *arguments)
        finally:
            setattr(of, attribute, kept)

    return call


def _mark_the_slowest(old: Any) -> Any:
    def mark(found: bytearray, at: int, strand: strands.Strand, lo: int, hi: int) -> None:
        for tier, holding in enumerate(strand.holdings):
            for a, b in holding.runs(lo, hi) if holding else ():
                found[at + a - lo : at + b - lo] = bytes((tier + 1,)) * (b - a)

    return mark


def _purge_what_is_pinned(old: Any) -> Any:
    def forget(of: tree.Tree, strand: strands.Strand, tier: int, *others: Any) -> Any:
        holding = strand.holdings[tier]
        if not holding or not holding.pins or not holding.count:
            return old(of, strand, tier, *others)
        pins, holding.pins = holding.pins, None
        holding.count += 1  # it shall not sleep without them
        count = old(of, strand, tier, *others)
        holding.count -= 1
        holding.pins = pins
        return count

    return forget


FAULTS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "unpin leaves the pin": (tree.Tree, "unpin", lambda old: lambda *_: None),
    "a second pin is not counted": (
        tree.Tree,
        "pin",
        lambda old: (
            lambda self, strand, end, tier: (
                None if (h := strand.holdings[tier]) and end in (h.pins or ()) else old(self, strand, end, tier)
            )
        ),
    ),
    "a lease pins nothing": (Lease, "_pin", lambda old: lambda self, tiers, **_: None),
    "the floor is not raised": (tree.Tree, "_wake", _wake_without_floor),
    "only the parent hears of new blocks": (tree.Tree, "_wake", _wake_the_parent_only),
    "a parent is not offered when its child goes": (tree.Tree, "offer", lambda old: lambda *_: None),
    "a place is freed twice": (rooms.Room, "clear", _clear_twice),
    "a ghost is pruned although it has children": (tree.Tree, "trim", _trim_without_children),
    "nothing is ever pruned": (tree.Tree, "trim", lambda old: lambda *_: None),
    "a failed copy is committed": (
        Index,
        "commit_copy",
        lambda old: lambda self, copy, ok, *, reason: old(self, copy, [True] * len(ok), reason=reason),
    ),
    "a copy pins nothing above it": (
        Index,
        "begin_copy",
        lambda old: (
            lambda self, lease, tier, lo, hi: (
                lambda got: got and (self._tree.unpin(got.segments[-1][0], got.segments[-1][2], tier) or got)
            )(old(self, lease, tier, lo, hi))
        ),
    ),
    "a block is copied twice at once": (strands.Holding, "absent", _absent_counts_pending),
    "a use refreshes the tail that did not match": (strands.Steps, "cover", _cover_all),
    "all of a strand goes at once": (LruPolicy, "start", lambda old: lambda self, strand, block: 0),
    "most recently used goes first": (
        LruPolicy,
        "rank",
        lambda old: lambda self, strand, block: (-strand.stamp(block), 0),
    ),
    "a child's keys begin at the root": (
        strands.Strand,
        "key",
        lambda old: (
            lambda self, block: old(self, block) if block >= 0 or not self.parent or not self.at else Key(b"a" * 32)
        ),
    ),
    "ghosts match": (tree.Tree, "held", lambda old: lambda self, path: old(self, list(path))),
    "a faster tier is overlooked": (strands.Holding, "first", lambda old: lambda self, lo, hi: hi),
    "a dropped place is given out under a reader": (Index, "drop", _drop_frees_at_once),
    "a branch hangs at the end": (tree.Tree, "grow", _grow_hangs_too_deep),
    "the first neighbour is the nearest": (
        strands.Fork,
        "nearest",
        lambda old: lambda self, start: sorted(old(self, start), key=lambda found: found[0]),
    ),
    "history is forgotten newest first": (
        LruPolicy,
        "rank",
        lambda old: (
            lambda self, strand, block: old(self, strand, block) if self.tier >= 0 else (-strand.stamp(block), 0)
        ),
    ),
    "a block of history too many": (tree.Tree, "__init__", _remember_too_much),
    "history does not become needed again": (tree.Tree, "_need", lambda old: lambda *_: None),
    "what is above history stays history": (tree.Tree, "_need", _need_the_strand_only),
    "nobody hears that blocks have gone": (tree.Tree, "_cut", _cut_in_silence),
    "asking for history does not make it young": (tree.Tree, "use", lambda old: lambda *_: None),
    "to look is to use": (Index, "keep", lambda old: lambda self, root, tokens, use=None: self.acquire(root, tokens)),
    "a wanted block goes like others": (
        tree.Tree,
        "victim",
        lambda old: lambda self, tier, *, below=inf: self.rooms[tier].policy.pop(below),
    ),
    "the first queued goes first": (wants.Parked, "pop", _first_queued_goes_first),
    "a tail stays parked": (tree.Tree, "_reclaim", lambda old: lambda *_: None),
    "what comes later is not wanted": (tree.Tree, "arrived", lambda old: lambda *_: None),
    "a parked tail is never forgotten": (wants.Parked, "pop", lambda old: lambda self: None),
    "fates are told of blocks that are held again": (
        fates,
        "explain",
        lambda old: (
            lambda path, num_blocks: [
                part._replace(fates=tuple(fate for _, _, fate in path[0][0].fates or ()) or part.fates)
                for part in old(path, num_blocks)
            ]
        ),
    ),
    "the fate of blocks that went stays": (fates, "cut", lambda old: lambda strand: None),
    "a fate is that of the whole strand": (
        fates,
        "note",
        lambda old: lambda strand, lo, hi, fate: old(strand, 0, strand.size, fate),
    ),
    "names outlive their blocks": (names.Names, "remove", lambda old: lambda *_: None),
    "what a tier still holds has no names": (recovery.Recovery, "_adopt", lambda old: _without("names", old)),
    "a key that comes late names nothing": (tree.Tree, "name", lambda old: _without("names", old)),
    "a trace pins nothing": (names, "_tiers", lambda old: lambda presence, part: 0),
    "what is asked together is taken for one path": (names.Names, "stretches", _join_what_is_asked_together),
    "branches are taken for other paths": (
        names.Names,
        "stretches",
        lambda old: (
            lambda self, keys: [
                names.Stretch(at, strand.depth + lo, strand, hi, names._tiers(self.presence(keys), found))
                for at, strand, lo, hi in self._runs(keys)
                for found in [names.Stretch(at, strand.depth + lo, strand, hi, 0)]
            ]
        ),
    ),
    "the slowest tier is told": (names, "_mark", _mark_the_slowest),
    "a listener does not hear of evictions": (tree.Tree, "clear", lambda old: _without("listener", old)),
    "a listener does not hear of drops": (tree.Tree, "forget", lambda old: _without("listener", old)),
    "a listener does not hear of keys that come late": (tree.Tree, "name", lambda old: _without("listener", old)),
    "a listener does not hear of what comes": (tree.Tree, "hold", lambda old: _without("listener", old)),
    "a purge takes what is pinned": (purge, "_forget", _purge_what_is_pinned),
    "a purge takes what was used since": (
        purge,
        "_forget",
        lambda old: lambda of, strand, tier, until, victims: old(of, strand, tier, inf, victims),
    ),
    "a purge begins at the root": (
        tree.Tree,
        "strands",
        lambda old: lambda self, roots=None: old(self) if roots is None else reversed(list(old(self, roots))),
    ),
    "a purge leaves history": (tree.Tree, "cut_past", lambda old: lambda *_: None),
    "a purge is of all namespaces": (index_module, "purge", lambda old: lambda of, roots, until: old(of, None, until)),
    "peeking loses the victims": (
        Index,
        "spill",
        lambda old: (
            lambda self, tier, below, n: (
                [self._tree.rooms[tier].policy.pop() for _ in range(n)],
                old(self, tier, below, n),
            )[1]
        ),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, plant = FAULTS[fault]
    monkeypatch.setattr(where, name, plant(getattr(where, name)))
    with pytest.raises((AssertionError, LookupError, ValueError)):
        run(IndexMachine, 1200, phases=(Phase.generate,), derandomize=True)
