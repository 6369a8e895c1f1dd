"""What blocks are called: keys, hashed when they are first asked for; and blocks found by key, where an index is asked so.

Which of several strands a key names, and where in it. No tier is asked for anything but what it holds. Not thread-safe:
index.py locks; `keys` takes that lock itself, since it hashes outside.
"""

from collections.abc import Iterator
from itertools import chain as joined
from itertools import compress, count, repeat
from struct import Struct
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tierkv.keys import KEY_BYTES, Key, chain
from tierkv.strands import MAX_TIERS, Strand, agree

if TYPE_CHECKING:
    from tierkv.tree import Tree

_KEY = Struct(f"{KEY_BYTES}s")
_AROUND = 32 * KEY_BYTES
_MARKS = tuple(bytes((tier + 1,)) for tier in range(MAX_TIERS))


class Listener(Protocol):
    """Hears what tiers hold of the blocks whose keys are known, as it changes: a run of consecutive blocks at a time.

    A block whose key becomes known only while a tier holds it is told then. Called under the index's lock, in order: it must
    be quick, must not raise, and must not call the index.
    """

    def stored(self, tier: int, parent: Key, depth: int, keys: bytes, tokens: bytes) -> None:
        """The tier holds these blocks now. parent: the key before the first; depth: blocks before it on its path."""

    def removed(self, tier: int, keys: bytes) -> None:
        """The tier holds these blocks no more."""


class Stretch(NamedTuple):
    """Consecutive blocks of one path, [lo, strand.depth + end), whose keys stand in a query from `position` on.

    tiers: those that are the fastest to hold some of them, as bits.
    """

    position: int
    lo: int
    strand: Strand
    end: int
    tiers: int


class Names:
    """Strands by the keys of their blocks, as far as those are known; where in the strand is found there.

    A path that is in the tree twice, under a root and under the key of one of its blocks, has a name once: the strand that
    got it last has it, and the one before gets it back.
    """

    __slots__ = ("_earlier", "_strands")

    def __init__(self) -> None:
        self._strands: dict[bytes, Strand] = {}
        self._earlier: dict[bytes, list[Strand]] = {}  # of keys that several strands have: all but the last

    def add(self, strand: Strand, keys: bytes) -> None:
        """The strand's next blocks have these keys."""
        split = list(_split(keys))
        if not self._strands.keys().isdisjoint(split):
            for key in split:
                if other := self._strands.get(key):
                    self._earlier.setdefault(key, []).append(other)
        self._strands.update(zip(split, repeat(strand)))

    def remove(self, strand: Strand, lo: int) -> None:
        """The strand's blocks from `lo` on go."""
        for key in _split(strand.keys[lo * KEY_BYTES :]):
            earlier = self._earlier.get(key) if self._earlier else None
            if not earlier:
                self._strands.pop(key, None)
                continue
            if self._strands[key] is strand:
                self._strands[key] = earlier.pop()
            else:
                earlier.remove(strand)
            if not earlier:
                del self._earlier[key]

    def presence(self, keys: bytes) -> bytearray:
        """A byte per key: 1 + the fastest tier that holds its block, or 0."""
        found = bytearray(len(keys) // KEY_BYTES)
        for at, strand, lo, hi in self._runs(keys):
            _mark(found, at, strand, lo, hi)
        return found

    def stretches(self, keys: bytes) -> list[Stretch]:
        """The known blocks of a query, in as few stretches as there are."""
        found: list[Stretch] = []
        presence = bytearray(len(keys) // KEY_BYTES)
        last = 0
        for at, strand, lo, hi in self._runs(keys):
            _mark(presence, at, strand, lo, hi)
            before = found[-1] if found else None
            if before and last == at and lo == 0 and (strand.parent, strand.at) == before[2:4]:
                found[-1] = Stretch(before.position, before.lo, strand, hi, 0)
            else:
                found.append(Stretch(at, strand.depth + lo, strand, hi, 0))
            last = at + hi - lo
        return [part._replace(tiers=_tiers(presence, part)) for part in found]

    def twins(self, keys: bytes) -> list[Stretch]:
        """The blocks of a query on paths that other strands have the names of, one by one."""
        if not self._earlier:
            return []
        found = []
        for position, key in enumerate(_split(keys)):
            for strand in self._earlier.get(key, ()):
                block = _find(strand.keys, key, 0)
                presence = bytearray(1)
                _mark(presence, 0, strand, block, block + 1)
                tiers = 1 << presence[0] - 1 if presence[0] else 0
                found.append(Stretch(position, strand.depth + block, strand, block + 1, tiers))
        return found

    def items(self) -> Iterator[tuple[bytes, list[Strand]]]:
        """Every key with all strands that have it, the one that it names last."""
        return ((key, [*self._earlier.get(key, ()), strand]) for key, strand in self._strands.items())

    def _runs(self, keys: bytes) -> Iterator[tuple[int, Strand, int, int]]:
        """The known blocks of a query, by strand: position of the first, the strand, which of its blocks."""
        strands, end = self._strands, len(keys)
        at = near = 0
        last = None
        while at < end:
            key = keys[at : at + KEY_BYTES]
            strand = strands.get(key)
            if strand is None:
                at = self._next(keys, at + KEY_BYTES)
                continue
            own = strand.keys
            if keys.startswith(own, at):  # the usual case: all of it
                lo, hi = 0, len(own) // KEY_BYTES
            else:
                lo = _find(own, key, near if strand is last else 0)
                hi, start = lo + 1, lo * KEY_BYTES
                if own.startswith(keys[at + KEY_BYTES : at + 2 * KEY_BYTES], start + KEY_BYTES):
                    hi = lo + agree(own, start, keys, at, KEY_BYTES)
            yield at // KEY_BYTES, strand, lo, hi
            last, near = strand, hi
            at += (hi - lo) * KEY_BYTES

    def _next(self, keys: bytes, at: int) -> int:
        """Where the next known key of a query begins, from `at` on; the end if there is none."""
        known = map(self._strands.__contains__, _split(memoryview(keys)[at:]))
        return next(compress(count(at, KEY_BYTES), known), len(keys))


def keys(tree: "Tree", segments: list[tuple[Strand, int, int]], start: int, lock: Lock) -> list[Key]:
    """Keys of the path that `segments` cover from its first block on, without the first `start`."""
    size = tree.block_bytes
    work = []
    with lock:
        for strand, _, end in segments:
            known = strand.num_keys
            if known < end:
                work.append((strand, known, strand.key(known - 1), bytes(strand.tok[known * size : end * size])))
    if work:
        hashed: list[tuple[Strand, int, bytes, list[Key]]] = []
        for strand, known, parent, tokens in work:
            # A key that is not known yet is the last one hashed: it ends the strand part above.
            new = chain(parent or hashed[-1][3][-1], tokens, block_tokens=tree.block_tokens)
            hashed.append((strand, known, tokens, new))
        with lock:
            for strand, known, tokens, new in hashed:
                # Another thread may have been here, or the lease was released: never keep keys of other tokens.
                if known <= strand.num_keys < known + len(new) and strand.tok.startswith(tokens, known * size):
                    tree.name(strand, b"".join(new[strand.num_keys - known :]))
    found: list[Key] = []
    with lock:
        for strand, _, end in segments:
            if strand.num_keys < end:
                raise LookupError("keys of a lease that was released meanwhile")
            found += [strand.key(block) for block in range(max(start - strand.depth, 0), end)]
    return found


def _split(keys: bytes | bytearray | memoryview) -> Iterator[bytes]:
    return joined.from_iterable(_KEY.iter_unpack(keys))


def _find(own: bytearray, key: bytes, near: int) -> int:
    """The block of a strand that has this key: looked for around block `near` first, since whoever skips mostly goes on."""
    start = near * KEY_BYTES
    for lo, hi in ((max(start - _AROUND, 0), start + _AROUND), (0, len(own))):
        at = own.find(key, lo, hi)
        while at % KEY_BYTES and at >= 0:
            at = own.find(key, at + 1, hi)
        if at >= 0:
            return at // KEY_BYTES
    raise AssertionError("a name that its strand does not know")


def _mark(found: bytearray, at: int, strand: Strand, lo: int, hi: int) -> None:
    """Write into `found`, from `at` on, which tier is the fastest to hold each of blocks [lo, hi)."""
    holdings = strand.holdings
    for tier, holding in enumerate(holdings):
        if holding:
            if holding.run(lo, hi) < hi:
                break
            found[at : at + hi - lo] = _MARKS[tier] * (hi - lo)  # the usual case: nothing else to ask
            return
    for tier in range(len(holdings) - 1, -1, -1):
        holding = holdings[tier]
        for a, b in holding.runs(lo, hi) if holding else ():
            found[at + a - lo : at + b - lo] = _MARKS[tier] * (b - a)


def _tiers(presence: bytearray, part: Stretch) -> int:
    """The tiers that a stretch's presence names, as bits."""
    end = part.position + part.strand.depth + part.end - part.lo
    num_tiers = len(part.strand.holdings)
    return sum(1 << tier for tier in range(num_tiers) if presence.find(tier + 1, part.position, end) >= 0)
