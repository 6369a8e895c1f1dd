"""Packs as a tier: blocks that were computed, checked and shipped beforehand, read where they lie. Nothing is ever written.

A pack names its blocks as a store without tenant and secret would. Under any other namespace of the same model they have other
names, which are computed when a namespace is introduced: so a pack serves every tenant, and tells nobody a secret.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from math import inf
from typing import ClassVar, Final

import numpy as np

from tierkv.errors import LayoutError, PackError, TierError
from tierkv.facts import ModelFacts, differing
from tierkv.keys import Key, Namespace
from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.packs.pack import Pack, Wrong
from tierkv.tiers.base import Miss, Run, Tier

MAX_NAMES: Final = 1 << 23
"""Keys that are remembered, of all namespaces: about a GiB."""
_BAD_LOGGED: Final = 3
_FAILURES: Final = 3
_FIRST_S: Final = 1.0
_LONGEST_S: Final = 60.0
"""After so many reads in a row of which nothing came, a pack has nothing for a second, and twice that each time up to this.

A breaker around the tier would not open: asking what is there costs no read, and goes well however far the files are away.
"""
log = logging.getLogger("tierkv")


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of the KV heads this store keeps: that of one of `size` tensor-parallel ranks."""

    rank: int = 0
    size: int = 1

    def heads(self, num_kv_heads: int) -> slice:
        """The heads of this rank; with more ranks than heads, several have the same. Raises LayoutError."""
        if num_kv_heads % self.size == 0:
            each = num_kv_heads // self.size
            return slice(self.rank * each, (self.rank + 1) * each)
        if self.size % num_kv_heads == 0:
            head = self.rank // (self.size // num_kv_heads)
            return slice(head, head + 1)
        raise LayoutError(f"{num_kv_heads} KV heads cannot be shared out to {self.size} tensor-parallel ranks")

    def misfit(self, theirs: Layout, ours: Layout) -> str | None:
        """In what a pack's layout differs from that of this rank, for people; None where it fits."""
        try:
            heads = self.heads(theirs.num_kv_heads)
        except LayoutError as error:
            return str(error)
        have, want = asdict(replace(theirs, num_kv_heads=heads.stop - heads.start)), asdict(ours)
        return ", ".join(f"{name} {have[name]}, here {want[name]}" for name in want if have[name] != want[name]) or None


class PackTier(Tier):
    """Blocks of `packs`, which it owns, in the layout of a store or of one of its tensor-parallel ranks.

    facts: of the model over it, where it is known. executor: threads of its own for this tier (not those that call it).
    clock: seconds, monotonic. Raises PackError for a pack of another layout.
    """

    name: ClassVar[str] = "pack"
    shared: ClassVar[bool] = True

    def __init__(
        self,
        packs: Sequence[Pack],
        *,
        layout: Layout,
        metrics: Metrics,
        shard: Shard | None = None,
        facts: ModelFacts | None = None,
        executor: Executor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.layout, self.packs, self._facts = layout, tuple(packs), facts
        self._shard, self._metrics, self._executor, self._clock = shard or Shard(), metrics, executor, clock
        self._found: dict[Key, tuple[int, int]] = {}  # key -> pack and row
        self._known: set[Key] = set()  # roots
        self._bad: set[tuple[int, int]] = set()
        self._failures = [0] * len(self.packs)  # in a row
        self._failing: set[int] = set()  # told of
        self._until = [-inf] * len(self.packs)
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._active, self._closed, self._logged, self._full = 0, False, 0, False
        for pack in self.packs:
            self._check_layout(pack)
        metrics.blocks_used.read_from(lambda: float(self.num_blocks), self.name)
        metrics.blocks_capacity.read_from(lambda: float(self.num_blocks), self.name)

    @property
    def lasting(self) -> bool:
        """Packs of this machine do; from a server, blocks are better kept where they are nearer."""
        return all(pack.local for pack in self.packs)

    @property
    def num_blocks(self) -> int:
        """Blocks of all packs together."""
        return sum(pack.num_blocks for pack in self.packs)

    @property
    def place(self) -> str:
        """Where they are, for people."""
        return ", ".join(pack.place for pack in self.packs)

    def _check_layout(self, pack: Pack) -> None:
        if wrong := self._shard.misfit(pack.layout, self.layout):
            raise PackError(
                f"{pack.place}: made for another layout: {wrong}; build a pack for this model, or set pack.shard for one "
                "rank of several"
            )

    def mismatch(self, pack: Pack, namespace: Namespace) -> str | None:
        """In what a pack's model differs from a namespace's, for people; None where it fits."""
        theirs = pack.manifest.facts
        if self._facts is not None and self._facts.identity == namespace.model:
            differ = differing(theirs, self._facts)
        else:
            differ = (
                [f"model identity {theirs.identity}, here {namespace.model}"]
                if theirs.identity != namespace.model
                else []
            )
        if pack.manifest.adapter != namespace.adapter:
            differ.append(f"adapter {pack.manifest.adapter or 'none'}, here {namespace.adapter or 'none'}")
        return ", ".join(differ) or None

    def knows(self, root: Key) -> bool:
        """Was this namespace introduced?"""
        return root in self._known

    def introduce(self, root: Key, namespace: Namespace) -> bool:
        """Find blocks under the names that they have in a namespace, too; False where no pack is for its model."""
        if root in self._known:
            return True
        fitting = [(number, pack) for number, pack in enumerate(self.packs) if self.mismatch(pack, namespace) is None]
        num_names = len(self._found) + sum(pack.num_blocks for _, pack in fitting)
        if not fitting or not self._have_room(num_names):  # before anything is hashed: strangers may ask for it, too
            return False
        found: dict[Key, tuple[int, int]] = {}
        for number, pack in fitting:
            for row, key in enumerate(pack.keys_under(root)):
                found.setdefault(key, (number, row))
        with self._lock:
            self._known.add(root)
            self._found |= found
        return True

    def _have_room(self, num_names: int) -> bool:
        if num_names <= MAX_NAMES:
            return True
        if not self._full:
            self._full = True
            log.warning("packs have %d names already: none in more namespaces (tenants)", len(self._found))
        return False

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        """From memory."""
        now = self._clock()
        with self._lock:
            if self._closed:
                return [False] * len(keys)
            away = [now < until for until in self._until]
            places = [self._found.get(key) for key in keys]
            return [place is not None and place not in self._bad and not away[place[0]] for place in places]

    def read(self, keys: Sequence[Key], outs: Sequence[memoryview], *, deadline_s: float | None = None) -> list[bool]:
        """Raises LayoutError when an `out` is not as long as a block, TierError when nothing at all could be read."""
        if len(keys) != len(outs) or any(out.nbytes != self.layout.block_bytes for out in outs):
            raise LayoutError(f"buffers for {len(keys)} keys: one of {self.layout.block_bytes} bytes for each")
        with self._lock:
            if self._closed:
                self._metrics.misses.add(len(keys), self.name, Miss.DOWN)
                return [False] * len(keys)
            self._active += 1
            places = [self._found.get(key) for key in keys]
            places = [None if place in self._bad else place for place in places]
        try:
            return self._read(places, outs, self._clock() + deadline_s if deadline_s is not None else None)
        finally:
            with self._idle:
                self._active -= 1
                self._idle.notify_all()

    def _read(
        self, places: Sequence[tuple[int, int] | None], outs: Sequence[memoryview], end: float | None
    ) -> list[bool]:
        began, found = self._clock(), [False] * len(places)
        wrong: list[Wrong] = []
        for number, pack in enumerate(self.packs):
            at = [i for i, place in enumerate(places) if place is not None and place[0] == number]
            if not at:
                continue
            rows = [place[1] for i in at if (place := places[i]) is not None]
            answers = self._read_pack(
                pack, rows, [outs[i] for i in at], late=lambda: end is not None and self._clock() >= end
            )
            for i, row, answer in zip(at, rows, answers, strict=True):
                found[i] = answer is None
                if answer is not None:
                    wrong.append(answer)
                    if answer.broken:
                        self._found_bad(number, row, answer.why)
            self._note_failure(number, answers)
        if wrong and len(wrong) == len(places) and not any(one.broken or one.late for one in wrong):
            raise TierError(f"pack {self.place}: {wrong[0].why}")  # who hears of it counts the misses
        self._count(wrong, absent=places.count(None), good=sum(found), seconds=self._clock() - began)
        return found

    def _read_pack(
        self, pack: Pack, rows: Sequence[int], outs: Sequence[memoryview], *, late: Callable[[], bool]
    ) -> list[Wrong | None]:
        heads = self._shard.heads(pack.layout.num_kv_heads)
        if heads == slice(0, pack.layout.num_kv_heads):
            return pack.read(rows, outs, executor=self._executor, late=late)
        answers: list[Wrong | None] = []
        most = max(1, (32 << 20) // pack.layout.block_bytes)
        layers, parts, kv_heads, *_ = pack.layout.shape
        for lo in range(0, len(rows), most):
            whole = [bytearray(pack.layout.block_bytes) for _ in rows[lo : lo + most]]
            part = pack.read(
                rows[lo : lo + most], [memoryview(one) for one in whole], executor=self._executor, late=late
            )
            for block, out, answer in zip(whole, outs[lo : lo + most], part, strict=True):
                if answer is None:
                    mine = np.frombuffer(block, np.uint8).reshape(layers, parts, kv_heads, -1)[:, :, heads]
                    np.frombuffer(out, np.uint8).reshape(mine.shape)[...] = mine
            answers += part
        return answers

    def _found_bad(self, number: int, row: int, why: str) -> None:
        with self._lock:
            self._bad.add((number, row))
            self._logged += 1
            tell = self._logged <= _BAD_LOGGED
        if tell:
            log.warning(
                "pack %s: %s; it is a miss from now on (see `tierkv pack verify`)", self.packs[number].place, why
            )

    def _note_failure(self, number: int, answers: Sequence[Wrong | None]) -> None:
        failed = [one.why for one in answers if one and not (one.broken or one.late)]
        if failed and number not in self._failing:
            log.warning("pack %s: %s", self.packs[number].place, failed[0])
        (self._failing.add if failed else self._failing.discard)(number)
        if len(failed) < len(answers):
            if None in answers:
                self._failures[number] = 0
            return
        with self._lock:
            self._failures[number] += 1
            beyond = self._failures[number] - _FAILURES
            if beyond < 0:
                return
            pause = min(_LONGEST_S, _FIRST_S * 2 ** min(beyond, 10))
            self._until[number] = self._clock() + pause
        self._metrics.tier_down.add(1, self.name)
        log.warning("pack %s is left alone for %.0f s: %s", self.packs[number].place, pause, failed[0])

    def _count(self, wrong: Sequence[Wrong], *, absent: int, good: int, seconds: float) -> None:
        reasons = {
            Miss.CORRUPT: sum(one.broken for one in wrong),
            Miss.LATE: sum(one.late for one in wrong),
            Miss.FAILED: sum(not (one.broken or one.late) for one in wrong),
            Miss.ABSENT: absent,
        }
        for reason, count in reasons.items():
            if count:
                self._metrics.misses.add(count, self.name, reason)
        if reasons[Miss.CORRUPT]:
            self._metrics.corrupt_blocks.add(reasons[Miss.CORRUPT], self.name)
        self._metrics.bytes_read.add(good * self.layout.block_bytes, self.name)
        self._metrics.load_seconds.observe(seconds, self.name)

    def write(self, run: Run, blocks: Sequence[memoryview], *, deadline_s: float | None = None) -> list[bool]:
        """Nothing is kept: a pack does not change. True for what it has already."""
        return self.contains(run.keys)

    def delete(self, keys: Sequence[Key]) -> None:
        """Offer these no more; the pack stays as it is, and so do its blocks under the names that others have for them."""
        with self._lock:
            for key in keys:
                self._found.pop(key, None)

    def scan(self) -> Iterator[Run]:
        """Nothing: it is asked, not remembered."""
        yield from ()

    def close(self) -> None:
        """Wait for reads under way."""
        with self._idle:
            if self._closed:
                return
            self._closed = True
            self._idle.wait_for(lambda: not self._active)
        for pack in self.packs:
            pack.close()
