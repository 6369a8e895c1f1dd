"""Full walks over an index: every invariant, every byte. For tests, `Index.check` and `Index.memory_bytes`; slow."""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable

from tierkv import fates
from tierkv.keys import KEY_BYTES
from tierkv.lease import BITS, Copy, Lease
from tierkv.names import Names
from tierkv.strands import HELD, HISTORY, PENDING, Fork, Holding, Steps, Strand
from tierkv.tree import Tree
from tierkv.wants import claim, wanted


def check(tree: Tree, leases: list[Lease] | None, copies: list[Copy]) -> None:
    """Raise AssertionError unless all that the tree counts and caches is what a full walk finds."""
    strands = list(tree.strands())
    assert tree.num_strands == len(strands) == len(set(strands))
    assert tree.num_blocks == sum(strand.size for strand in strands)
    assert tree.num_past == sum(strand.past for strand in strands) <= tree.history_blocks
    for key, root in tree.roots.items():
        assert bytes(root.keys) == key and root.size == root.past == 0 and (root.children or root.holds)
        _check_forks(tree, root)
        assert not any(root.holdings)
    digests: dict[Strand, list[bytes]] = {root: [bytes(root.keys)] for root in tree.roots.values()}
    for strand in strands:
        _check_strand(tree, strand)
        _check_keys(tree, strand, digests)
        for tier, holding in enumerate(strand.holdings):
            _check_holding(tree, strand, tier, holding)
    for tier, room in enumerate(tree.rooms):
        holdings = [holding for strand in strands if (holding := strand.holdings[tier])]
        assert room.held == sum(holding.count for holding in holdings)
        assert room.taken >= sum(holding.num_pending for holding in holdings)
        room.check([place for holding in holdings for place in _places(holding)])
        for strand, first in room.parked.items():
            lo, hi = strand.span(tier)
            assert lo == hi or (wanted(strand) >= hi and claim(strand, hi)[0] == first), "parked without a want"
    _check_names(tree, strands)
    _check_wants(tree, strands)
    if leases is not None:
        _check_leases(tree, strands, [lease for lease in leases if not lease.released], copies)


def _check_strand(tree: Tree, strand: Strand) -> None:
    size, parent, children = tree.block_bytes, strand.parent, strand.children or {}
    assert parent and strand.size > 0 and len(strand.tok) == strand.size * size
    assert strand.at <= parent.size and strand.depth == parent.depth + strand.at
    assert (strand.at == 0) == (parent.parent is None), "only roots have children at 0"
    first = bytes(strand.tok[:size])
    assert parent.child(strand.at, first) is strand
    assert strand.at == parent.size or parent.tok[strand.at * size : (strand.at + 1) * size] != first, "a path twice"
    assert strand.stamps.check() == strand.size and strand.stamp(0) <= tree.clock
    assert parent.parent is None or parent.stamp(strand.at - 1) >= strand.stamp(0), "a stamp rises"
    assert 0 <= strand.again <= strand.size
    assert strand.fates is None or (strand.fates and all(0 <= lo < hi <= strand.size for lo, hi, _ in strand.fates))
    assert max(Counter(fate.tier for _, _, fate in strand.fates or ()).values(), default=0) <= fates.MAX_FATES
    assert all(0 < at <= strand.size for at in children)
    _check_forks(tree, strand)
    tops = [len(holding.state) for holding in strand.holdings if holding]
    needed = [child.at for child in strand.offspring() if child.needed]
    assert strand.size - strand.past == max([*tops, *(strand.holds or ()), *needed, 0]), (
        "history is not what nothing needs"
    )
    lo, hi = strand.span(HISTORY)
    assert lo == hi or strand in tree.history._live, "history that never goes"


def _check_forks(tree: Tree, strand: Strand) -> None:
    for at, found in (strand.children or {}).items():
        if isinstance(found, Fork):
            assert found.order == sorted(found.by_first) and found.by_first
            assert found.needed == sum(child.needed for child in found.by_first.values())
            for first, child in found.by_first.items():
                assert child.at == at and bytes(child.tok[: tree.block_bytes]) == first


def _check_keys(tree: Tree, strand: Strand, digests: dict[Strand, list[bytes]]) -> None:
    """Verify the keys that are known; digests: of every strand so far, the root's key first."""
    assert len(strand.keys) % KEY_BYTES == 0 and strand.num_keys <= strand.size
    assert strand.parent
    digest, own = digests[strand.parent][strand.at - bool(strand.parent.parent)], []
    for at in range(0, len(strand.tok), tree.block_bytes):
        digest = hashlib.sha256(digest + strand.tok[at : at + tree.block_bytes]).digest()
        own.append(digest)
    digests[strand] = own
    assert b"".join(own).startswith(strand.keys), "a wrong key"
    assert not strand.keys or strand.key(-1), "a key without the one before"


def _check_names(tree: Tree, strands: list[Strand]) -> None:
    """Verify that every known key names a strand that has it, and nothing else does."""
    if tree.names:
        keys = [(strand.key(block), id(strand)) for strand in strands for block in range(strand.num_keys)]
        found = [(key, id(strand)) for key, named in tree.names.items() for strand in named]
        assert sorted(found) == sorted(keys), "names are not the keys that are known"


def _check_holding(tree: Tree, strand: Strand, tier: int, holding: Holding | None) -> None:
    hang = Counter(child.at for child in strand.offspring() if (below := child.holdings[tier]) and below.alive)
    if holding is None:
        assert not hang
        return
    state = holding.state
    assert holding.alive and len(state) <= strand.size and (not state or state[-1])
    assert holding.count == state.count(HELD) and holding.num_pending == state.count(PENDING)
    assert len(state) == holding.count + holding.num_pending + state.count(0)
    assert (holding.hang or {}) == hang and holding.floor == max(hang, default=0)
    assert holding.pins is None or (
        holding.pins and min(holding.pins.values()) > 0 and max(holding.pins) <= strand.size
    )
    assert (holding.places is not None) == tree.rooms[tier].placed
    assert holding.places is None or len(holding.places) == len(state)
    assert tree.rooms[tier].placed or state.rfind(HELD) < strand.num_keys, "a key that cannot be deleted"
    lo, hi = strand.span(tier)
    assert state[lo:hi] == bytes((HELD,)) * (hi - lo)
    assert lo == hi or lo >= max([*(holding.pins or ()), *hang, 0])


def _check_wants(tree: Tree, strands: list[Strand]) -> None:
    marks = {
        (id(part), serial): hi
        for serial, want in tree.wants.items()
        for part, _, hi in tree.segments(want.strand, want.end, 0, want.strand.depth + want.end)
    }
    assert marks == {(id(strand), serial): hi for strand in strands for serial, hi in (strand.wants or {}).items()}
    assert Counter(want for wants in tree.waiting.values() for want in wants) == Counter(
        want for want in tree.wants.values() if want.awaits(tree.block_bytes)
    )
    for want in tree.wants.values():
        if at := want.awaits(tree.block_bytes):
            assert want in tree.waiting[at] and tree.follow(at[0], at[1], at[2]) == [at[:2]], "a known block waits"


def _check_leases(tree: Tree, strands: list[Strand], leases: Iterable[Lease], copies: Iterable[Copy]) -> None:
    holds: Counter[tuple[int, int]] = Counter()
    pins: Counter[tuple[int, int, int]] = Counter()
    pinned: Counter[int] = Counter()
    for want in tree.wants.values():
        holds[id(want.strand), want.end] += 1
    for lease in leases:
        ends = [(lease._strand, lease._end, tier) for tier in BITS[lease._tiers]]
        holds[id(lease._strand), lease._end] += 1
        assert lease.num_blocks == lease._strand.depth + lease._end
        if lease.head:
            ends.append((lease.head.strand, lease.head.block + 1, lease._head_tier))
            holds[id(lease.head.strand), lease.head.block + 1] += 1
        for strand, end, tier in ends:
            pinned[tier] += strand.depth + end
            pins[id(strand), end, tier] += bool(strand.parent)
    for copy in copies:
        if not copy.done:
            strand, _, end = copy.segments[-1]
            holds[id(strand), end] += 1
            pins[id(strand), end, copy.tier] += 1
            pinned[copy.tier] += strand.depth + end
            for part, lo, hi in copy.segments:
                holding = part.holdings[copy.tier]
                assert holding and holding.state[lo:hi] == bytes((PENDING,)) * (hi - lo)
    everyone = [*strands, *tree.roots.values()]
    found = {(id(strand), end): count for strand in everyone for end, count in (strand.holds or {}).items()}
    assert found == dict(holds), "grips are not what leases and copies keep"
    kept = {
        (id(strand), end, tier): count
        for strand in strands
        for tier, holding in enumerate(strand.holdings)
        for end, count in ((holding and holding.pins) or {}).items()
    }
    assert kept == dict(+pins), "pins are not what leases and copies need"
    assert all(room.pinned == pinned[tier] for tier, room in enumerate(tree.rooms))


def _places(holding: Holding) -> list[int]:
    if holding.places is None:
        return []
    return [place for place, state in zip(holding.places, holding.state, strict=True) if state == HELD]


def memory_bytes(tree: Tree) -> int:
    """Bytes of all strands, of what hangs on them, of the order of history and of names: objects, numbers, dict tables."""
    seen: set[int] = set()
    total = 0
    stack: list[object] = [tree.roots, tree.history._heap, tree.history._live, tree.names]
    while stack:
        thing = stack.pop()
        if id(thing) in seen or thing is None:
            continue
        seen.add(id(thing))
        total += sys.getsizeof(thing)
        if isinstance(thing, dict):
            stack += [*thing.keys(), *thing.values()]
        elif isinstance(thing, list | tuple):
            stack += thing
        elif isinstance(thing, Strand | Holding | Fork | Steps | Names):
            stack += [getattr(thing, name) for name in thing.__slots__]
    return total
