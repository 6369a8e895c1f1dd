"""Moves batches of blocks between callers' buffers and slots: pieces, alignment, checksums, deadlines; no manifest."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Final, NamedTuple, TypeVar

from tierkv.keys import Key
from tierkv.layout import Layout
from tierkv.tiers.base import Miss
from tierkv.tiers.disk_array import SHARD_SLOTS
from tierkv.tiers.disk_buffers import Buffers, aligned
from tierkv.tiers.disk_files import FULL
from tierkv.tiers.disk_manifest import digest
from tierkv.tiers.disk_shards import ShardLost, Shards
from tierkv.tiers.disk_slots import Place
from tierkv.zarr_shards import ALIGNMENT

_MAX_VIEWS: Final = 512
"""Blocks in one call: the system takes 1,024 buffers, and there may be padding between blocks."""
PIECE_BYTES: Final = 32 << 20
"""Most that one call moves: few calls, since the device is idle between them, and some 10 ms of deadline at most."""
AHEAD_BYTES: Final = 8 << 20
"""The same where pieces move on an executor while earlier ones are verified."""
AHEAD_PIECES: Final = 2
"""How many of them are given to the executor beyond the one that is looked at: it never waits for us."""
BOUNCE_BYTES: Final = 4 << 20
"""The same for buffers that O_DIRECT does not take: each call under way holds one such buffer, or a few."""

Piece = list[Place]
T = TypeVar("T")


@dataclass(slots=True)
class Loaded:
    """Places whose blocks have arrived, and the others by reason.  lost: shards that are not there any more."""

    good: list[Place] = field(default_factory=list)
    missed: dict[Miss, list[Place]] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)
    error: OSError | None = None

    def miss(self, reason: Miss, places: Sequence[Place]) -> None:
        """Add places that did not arrive."""
        if places:
            self.missed.setdefault(reason, []).extend(places)


@dataclass(slots=True)
class Stored:
    """Places whose blocks are on the device, with checksums, and how many are not, by reason.

    full: first shard there was no room for.  lost: as in `Loaded`.
    """

    written: list[Place] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    full: int | None = None
    lost: set[int] = field(default_factory=set)
    error: OSError | None = None

    def drop(self, reason: str, count: int) -> None:
        """Add blocks that were not stored."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count


class _Fetched(NamedTuple):
    views: list[memoryview]
    buffer: memoryview | None
    whole: int
    error: OSError | None


class Transfer:
    """Thread-safe; raises nothing that an operating system can cause."""

    def __init__(
        self,
        shards: Shards,
        *,
        layout: Layout,
        verify: bool,
        executor: Executor | None,
        clock: Callable[[], float],
    ) -> None:
        self._shards, self._verify, self._executor, self._clock = shards, verify, executor, clock
        self._block_bytes, self._stride = layout.block_bytes, shards.stride
        self._most = self._blocks(PIECE_BYTES if executor is None else AHEAD_BYTES)
        self._most_bounced = self._blocks(BOUNCE_BYTES)
        self._buffers = Buffers(self._most_bounced * self._stride)

    def read(self, places: Sequence[Place], keys: Sequence[Key], outs: Sequence[memoryview], *, end: float) -> Loaded:
        """Bring held places into `outs`, verified. places: by slot.  end: on the clock; what is not begun by then is late."""
        result = Loaded()
        fits = self._fits([outs[place.position] for place in places])
        pieces = list(self._pieces(places, self._most if fits else self._most_bounced))
        fetch = self._fetch if fits else self._fetch_bounced
        for piece, fetching in self._ahead(lambda piece: fetch(piece, outs), pieces, end):
            if fetching is None:
                result.miss(Miss.LATE, piece)
                continue
            fetched = fetching()
            if fetched.error is not None:
                lost = isinstance(fetched.error, ShardLost)
                if lost:
                    result.lost.add(piece[0].slot // SHARD_SLOTS)
                result.error = fetched.error
                result.miss(Miss.CORRUPT if lost else Miss.FAILED, piece)
                continue
            self._verified(piece, fetched, keys, outs, result)
        return result

    def _verified(
        self, piece: Piece, fetched: _Fetched, keys: Sequence[Key], outs: Sequence[memoryview], result: Loaded
    ) -> None:
        size, buffer = self._block_bytes, fetched.buffer
        for number, place in enumerate(piece):
            view = fetched.views[number][:size]
            if number >= fetched.whole or (self._verify and digest(view, keys[place.position]) != place.checksum):
                result.miss(Miss.CORRUPT, [place])
                continue
            if buffer is not None:
                outs[place.position][:] = view
            result.good.append(place)
        if buffer is not None:
            self._buffers.give(buffer)

    def _fetch(self, piece: Piece, outs: Sequence[memoryview]) -> _Fetched:
        views = [outs[place.position] for place in piece]
        try:
            return _Fetched(views, None, self._shards.read(piece[0].slot, views), None)
        except OSError as error:
            return _Fetched([], None, 0, error)

    def _fetch_bounced(self, piece: Piece, outs: Sequence[memoryview]) -> _Fetched:
        buffer = self._buffers.take()
        views = self._slices(buffer, len(piece))
        try:
            return _Fetched(views, buffer, self._shards.read(piece[0].slot, views), None)
        except OSError as error:
            self._buffers.give(buffer)
            return _Fetched([], None, 0, error)

    def write(
        self, places: Sequence[Place], keys: Sequence[Key], blocks: Sequence[memoryview], *, end: float
    ) -> Stored:
        """Put blocks into reserved places and sync them. places: by slot."""
        result = Stored()
        written: dict[int, list[Place]] = {}
        fits = self._fits([blocks[place.position] for place in places])
        store = self._store if fits else self._store_bounced
        pieces = list(self._pieces(places, self._most if fits else self._most_bounced))
        for piece, storing in self._ahead(lambda piece: store(piece, blocks), pieces, end):
            if storing is None:
                result.drop("late", len(piece))
                continue
            shard = piece[0].slot // SHARD_SLOTS
            try:
                sealed = [Place(slot, at, digest(blocks[at], keys[at])) for slot, at, _ in piece]
            finally:
                error = storing()
            if error is None:
                written.setdefault(shard, []).extend(sealed)
            else:
                self._not_stored(error, shard, len(piece), result)
        for shard, sealed in written.items():
            try:
                self._shards.sync(shard)
                result.written += sealed
            except OSError as error:
                self._not_stored(error, shard, len(sealed), result)
        return result

    def _store(self, piece: Piece, blocks: Sequence[memoryview]) -> OSError | None:
        try:
            self._shards.make(piece[0].slot // SHARD_SLOTS)
            self._shards.write(piece[0].slot, [blocks[place.position] for place in piece])
        except OSError as error:
            return error
        return None

    def _store_bounced(self, piece: Piece, blocks: Sequence[memoryview]) -> OSError | None:
        with self._buffers.lent() as buffer:
            slices = self._slices(buffer, len(piece))
            for place, part in zip(piece, slices, strict=True):
                part[: self._block_bytes] = blocks[place.position]
            try:
                self._shards.make(piece[0].slot // SHARD_SLOTS)
                self._shards.write(piece[0].slot, slices)
            except OSError as error:
                return error
        return None

    def _not_stored(self, error: OSError, shard: int, count: int, result: Stored) -> None:
        result.error = error
        full = error.errno in FULL
        if full and (result.full is None or shard < result.full):
            result.full = shard
        if isinstance(error, ShardLost):
            result.lost.add(shard)
        result.drop("full" if full else "failed", count)

    def _fits(self, views: Sequence[memoryview]) -> bool:
        """Can these buffers go to the file as they are?"""
        return not self._shards.direct or (self._block_bytes % ALIGNMENT == 0 and all(map(aligned, views)))

    def _blocks(self, size: int) -> int:
        return max(1, min(size // self._stride, _MAX_VIEWS))

    def _slices(self, buffer: memoryview, count: int) -> list[memoryview]:
        return [buffer[at * self._stride : (at + 1) * self._stride] for at in range(count)]

    def _pieces(self, places: Sequence[Place], most: int) -> Iterator[Piece]:
        piece: Piece = []
        for place in places:
            slot = place.slot
            if piece and (slot != piece[-1].slot + 1 or slot % SHARD_SLOTS == 0 or len(piece) == most):
                yield piece
                piece = []
            piece.append(place)
        if piece:
            yield piece

    def _ahead(
        self, move: Callable[[Piece], T], pieces: Sequence[Piece], end: float
    ) -> Iterator[tuple[Piece, Callable[[], T] | None]]:
        """Yield each piece with a call that gives the result of moving it; None for what would begin after `end`.

        With an executor, the next pieces move while the caller works on this one.
        """
        if self._executor is None:
            for piece in pieces:
                yield piece, None if self._clock() >= end else partial(move, piece)
            return
        waiting: deque[tuple[Piece, Future[T] | None]] = deque()
        try:
            for piece in pieces:
                waiting.append((piece, None if self._clock() >= end else self._executor.submit(move, piece)))
                if len(waiting) > AHEAD_PIECES:
                    yield _result(*waiting.popleft())
            while waiting:
                yield _result(*waiting.popleft())
        finally:
            wait([future for _, future in waiting if future])  # the caller's buffers are in use until then


def _result(piece: Piece, future: "Future[T] | None") -> tuple[Piece, Callable[[], T] | None]:
    return piece, None if future is None else future.result
