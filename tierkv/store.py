"""The façade: find a prefix, bring it to the device, keep what was computed. It alone, with its jobs, knows index and mover.

    (expect ->) search -> take -> load -> settle -> (save …) -> end

One thread (an engine's scheduler) makes these calls; none of them blocks on I/O. What moves, moves on the mover's threads.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from math import inf
from typing import Final

from tierkv.ahead import Ahead, Expected, Found
from tierkv.arrival import Arrival, layer_bounds
from tierkv.edges import Edges
from tierkv.errors import TierError
from tierkv.handoff import Handoffs
from tierkv.hints import NO_ENDING, NO_HINTS, Ending, Hints, Next
from tierkv.index import Index, Lease
from tierkv.keys import Key, chain
from tierkv.layout import TOKEN_BYTES, Layout
from tierkv.lending import LentMemory
from tierkv.load import Load
from tierkv.lookups import Lookups
from tierkv.match import Match, Search, Visit, leading
from tierkv.metrics import Metrics
from tierkv.mover import LOAD_LANE, PROBE_LANE, SUSPEND_LANE, Mover
from tierkv.pins import Pin, Pins
from tierkv.sessions import Sessions
from tierkv.tiers.base import Miss, Run
from tierkv.transfers import DEVICE, HOST, Below, Places

log = logging.getLogger("tierkv")

SAVE_BLOCKS: Final = 8
"""Blocks saved at a time while a sequence decodes: few enough that a crash costs little, enough for whole-run writes.

Those of its prompt are saved as they are computed: another engine may wait for them.
"""
MAX_LOAD_BLOCKS: Final = 1 << 20
MAX_PROBES: Final = 1 << 10
CLOSE_TIMEOUT_S: Final = 30.0
AHEAD_SHARE: Final = 0.25
"""Part of the host tier that may hold what was brought for requests that wait."""
PIN_SHARE: Final = 0.5
"""Part of the host tier that pins may keep."""


class Store:
    """Blocks of one namespace in all tiers. Made by `tierkv.open_store`."""

    def __init__(
        self,
        *,
        root: Key,
        layout: Layout,
        places: Places,
        below: Sequence[Below],
        mover: Mover,
        host_copy_down: str,
        load_deadline_s: float,
        spill_watermark: float,
        piece: int,
        layer_groups: int = 1,
        spill_share: float = 1.0,
        ahead_share: float = AHEAD_SHARE,
        pin_share: float = PIN_SHARE,
        lookups: Lookups | None = None,
    ) -> None:
        self.root, self.layout, self.places, self.below, self.mover = root, layout, places, below, mover
        self._load_deadline_s, self._piece = load_deadline_s, piece
        self._numbered = {tier.number: tier for tier in below if tier.number is not None}
        self._shared = [tier for tier in below if tier.number is None]
        self._expiring: list[Load] = []
        self._block_bytes = layout.block_tokens * TOKEN_BYTES  # of token ids, not of KV
        self._memory = LentMemory(places, mover)
        self._edges = Edges(
            places=places,
            below=below,
            mover=mover,
            host_copy_down=host_copy_down,
            watermark=spill_watermark,
            share=spill_share,
            piece=piece,
        )
        self._bounds = layer_bounds(layout.num_layers, min(layer_groups, layout.num_layers))
        layer_bytes = layout.block_bytes // layout.num_layers
        self._spans = [(lo * layer_bytes, hi * layer_bytes) for lo, hi in pairwise(self._bounds)]
        self._by_groups = len(self._spans) > 1
        self._sessions, self._lookups = Sessions(), lookups
        self._ahead = Ahead(
            root=root,
            block_bytes=self._block_bytes,
            places=places,
            below=self._numbered,
            ask=partial(self._ask, Below.peek) if self._shared else None,
            mover=mover,
            share=ahead_share,
            piece=piece,
            deadline_s=load_deadline_s,
        )
        self._handoffs = Handoffs(
            root=root, block_tokens=layout.block_tokens, places=places, below=below, ahead=self._ahead, mover=mover
        )
        self._pins = Pins(
            root=root,
            places=places,
            below=self._numbered,
            mover=mover,
            share=pin_share,
            piece=piece,
            deadline_s=load_deadline_s,
        )
        places.metrics.blocks_pinned.read_from(lambda: float(self._pins.num_blocks))
        self._closed = False

    # -- ahead of need ----------------------------------------------------------------------------------------------

    def expect(self, tokens: bytes) -> Expected:
        """Take up a request that waits: what is held of it is forgotten last, and comes to the host until `cancel`."""
        return self._ahead.expect(tokens)

    def cancel(self, expected: Expected) -> None:
        """It does not wait any more. Idempotent."""
        self._ahead.cancel(expected)

    def await_prefix(self, tokens: bytes, *, deadline_s: float) -> "Future[int]":
        """Wait for a prompt that another engine is computing: its blocks come to the host as that saves them.

        Resolves to the leading whole blocks that are here: once these are all of them, or all that there is room for ahead of
        need, or the deadline is past, or nobody can be waited for. It may be cancelled; no thread of the caller waits.
        """
        return self._handoffs.wait(tokens, deadline_s=deadline_s)

    def pin(self, tokens: bytes, *, ttl_s: float) -> Pin:
        """Keep what is held of `tokens` in host memory for a time. Raises PinError, beyond the part that pins may keep."""
        return self._pins.pin(tokens, ttl_s=ttl_s)

    def unpin(self, pin: Pin) -> None:
        """End a pin before its time. Idempotent."""
        self._pins.unpin(pin)

    # -- finding ----------------------------------------------------------------------------------------------------

    def search(self, tokens: bytes) -> Search:
        """Start to look for the longest known prefix of `tokens` (int32-LE)."""
        search = Search(tokens)
        whole = len(tokens) // self._block_bytes
        if self._shared and self.index.match(self.root, tokens).num_blocks < whole:
            lease = self.index.keep(self.root, tokens)  # for the keys of what is known: the probe goes on from there
            search.base = lease.num_blocks
            search.probe = self.mover.submit(PROBE_LANE, partial(self._run_probe, lease, tokens), blocks=1)
            if search.probe is None:
                lease.release()
        return search

    def _run_probe(self, lease: Lease, tokens: bytes) -> Found | None:
        with lease:
            return self._ask(Below.seek, lease, tokens)

    def _ask(self, how: Callable[..., int], lease: Lease, tokens: bytes) -> Found | None:
        """Keys after the lease's blocks that a shared tier holds: the longest leading run of any of them.

        how: `Below.seek` for the request itself, `Below.peek` for what is done ahead of it.
        """
        known = lease.num_blocks
        parent = lease.keys(known - 1, known)[0] if known else self.root
        rest = tokens[known * self._block_bytes : len(tokens) // self._block_bytes * self._block_bytes]
        keys = tuple(chain(parent, rest, block_tokens=self.layout.block_tokens))
        best: Found | None = None
        for below in self._shared:
            if how is Below.peek and below.tier.lasting:
                continue  # ahead of need nothing is won
            found = how(below, Run(self.root, parent, known, keys, rest), failures=self.metrics.misses)
            if found and (best is None or found > len(best[1])):
                best = (below, list(keys[:found]))
        return best

    def take(self, search: Search, *, hints: Hints = NO_HINTS) -> Match:
        """Pin what was found; the search must be `ready`. What other requests computed meanwhile counts too."""
        lease = self.index.acquire(self.root, search.tokens, now_s=self.places.clock(), hints=hints)
        match = self._match(search, lease)
        match.visit.use = lease.use
        if self._lookups:
            match.visit.lookup = self._lookups.begin(search.tokens, num_loadable=match.num_blocks, hints=hints)
        return match

    def take_again(self, search: Search, visit: Visit) -> Match:
        """As `take`, for a request that was taken before and has been released meanwhile: it counts as used once."""
        match = self._match(search, self.index.keep(self.root, search.tokens, use=visit.use))
        match.visit = visit
        return match

    def _match(self, search: Search, lease: Lease) -> Match:
        match = Match(
            lease,
            leading(lease),
            lease.head.num_tokens if lease.head else 0,
            dirty=lease.num_blocks,
            prompt=len(search.tokens) // self._block_bytes,
        )
        found = search.probe.result() if search.probe and search.probe.exception() is None else None
        if found and search.base + len(found[1]) > lease.num_blocks >= search.base:
            match.source, keys = found
            match.remote = keys[lease.num_blocks - search.base :]
            end = (lease.num_blocks + len(match.remote)) * self._block_bytes
            match.remote_tokens = search.tokens[lease.num_blocks * self._block_bytes : end]
            match.head_tokens = 0
        self._edges.copy_second_use(lease)
        return match

    # -- bringing to the device -------------------------------------------------------------------------------------

    def allocate(self, num_pages: int) -> list[int] | None:
        """Private device pages; forgets what the policy says, or returns None when too much is pinned."""
        if num_pages == 0:
            return []
        reservation = self.index.reserve(DEVICE, num_pages)
        self._edges.copy_ahead(num_pages)
        return None if reservation is None else list(reservation.places)

    def free(self, pages: Sequence[int]) -> None:
        """Give private pages back."""
        self.index.free(DEVICE, pages)

    def load(self, match: Match, pages: Sequence[int]) -> "Future[tuple[int, int]]":
        """Fill pages with the blocks of the match that do not lie on the device, then with its head if it has one.

        Resolves to usable blocks (of all) and usable tokens of the head. The pages are the load's until then, and where the
        match has an arrival, until that is finished.
        """
        match.arrival = None
        if self._by_groups and self._in_memory(match):
            match.arrival = Arrival(self._bounds)
            match.arrival.finished.add_done_callback(partial(self._after_arrival, match.arrival))
        load = Load(
            places=self.places,
            lease=match.lease.fork(),
            first=match.shared,
            pages=pages,
            below=self._numbered,
            mark=self.places.device.mark(),
            deadline=self.places.clock() + self._load_deadline_s,
            piece=self._piece,
            memory=self._memory,
            head_tokens=match.head_tokens,
            head_place=match.head_place,
            source=match.source,
            remote=match.remote,
            remote_tokens=match.remote_tokens,
            arrival=match.arrival,
            spans=self._spans,
        )
        if self.mover.submit(LOAD_LANE, load.run, blocks=max(1, len(pages))) is None:
            load.refuse()
        else:
            self._expiring.append(load)
        match.load = load
        return load.done

    def _after_arrival(self, arrival: Arrival, _: "Future[None]") -> None:
        """A copy that fails in a whole load is a miss; in a later group it costs the step that has begun: once is enough."""
        if not arrival.is_whole and self._by_groups:
            self._by_groups = False
            log.warning("layers of a load were lost on their way to the device: loads come whole from now on")

    @staticmethod
    def _in_memory(match: Match) -> bool:
        """Whether nothing of a match waits for a tier at rest that may fail in the middle; what is lent is verified."""
        head = match.lease.head_source() if match.head_tokens and match.head_place is None else None
        tiers = [tier for tier, _, _ in match.lease.sources()] + ([head[0]] if head else [])
        lent = match.source is not None and match.source.tier.lends
        return (lent or not match.remote) and all(tier <= HOST for tier in tiers)

    def settle(self, match: Match) -> None:
        """After a load: keep only the pins of what lies on the device; the pages that were filled are saved like new ones."""
        match.lent = match.load.lent if match.load else range(0)
        self._note_load(match)
        match.lease.shrink(match.shared)
        match.lease.shorten_pins(DEVICE)
        match.remote, match.dirty = (), match.shared

    def _note_load(self, match: Match) -> None:
        load, match.load = match.load, None
        if load and load.done.done() and load.short and self._lookups and match.visit.lookup:
            usable = match.num_blocks - load.short
            why = load.why or Miss.FAILED
            self._lookups.short(match.visit.lookup, load.short, why, lo=usable, tier=load.why_tier)

    def poll(self) -> None:
        """Answer loads that are late, end pins whose time is over, go on for those that wait. Call it once per step."""
        now = self.places.clock()
        self._pins.expire(now)
        for load in self._expiring:
            load.expire(now)
        self._expiring = [load for load in self._expiring if not load.done.done()]
        self._ahead.go_on()

    # -- keeping ----------------------------------------------------------------------------------------------------

    def save(self, match: Match, tokens: bytes, pages: Sequence[int]) -> list[bool]:
        """Seal full pages under the tokens they hold: `pages[i]` is block i of `tokens`; those sealed before are skipped.

        True: the page is the store's from now on. False: the same block lies in another page already, and the page stays
        the caller's.
        """
        lo = match.lease.num_blocks
        fresh = tokens[lo * self._block_bytes : len(pages) * self._block_bytes]
        taken = self.index.extend(match.lease, fresh, tier=DEVICE, places=pages[lo:])
        if match.dirty < match.prompt or match.lease.num_blocks - match.dirty >= SAVE_BLOCKS:
            self.offer(match)
        return taken

    def offer(self, match: Match) -> None:
        """Queue copies of what was saved since the last offer, where `copy_down` is "save"."""
        lo, hi = match.dirty, match.lease.num_blocks
        match.dirty, lent = hi, match.lent or range(hi, hi)
        for first, last in ((lo, min(hi, lent.start)), (max(lo, lent.stop), hi)):
            if first < last:
                self._edges.copy_saved(match.lease, first, last)

    def suspend(self, match: Match, *, tail: int | None) -> "Future[int | None]":
        """Copy all of the match, and `tail`, a private page, to the host. Resolves to the tail's host place, or None."""
        lease, mark = match.lease.fork(), self.places.device.mark()
        future = self.mover.submit(
            SUSPEND_LANE, partial(self._run_suspend, lease, tail, mark), blocks=lease.num_blocks + 1
        )
        if future is None:
            lease.release()
            future = Future()
            future.set_result(None)
        return future

    def _run_suspend(self, lease: Lease, tail: int | None, mark: object) -> int | None:
        with lease:
            self._edges.to_host(lease, 0, lease.num_blocks, mark, worth=inf)  # it goes on for sure
        reservation = None if tail is None else self.index.reserve(HOST, 1)
        if tail is None or reservation is None:
            return None
        try:
            self.places.device.copy_out([tail], self.places.host, reservation.places, after=mark)
        except BaseException as error:
            self.index.free(HOST, reservation.places)
            if isinstance(error, TierError):  # the device refused: the tail is computed again
                self.metrics.saves_dropped.add(1, "host", Miss.FAILED)
                return None
            raise
        return reservation.places[0]

    def free_host(self, place: int) -> None:
        """Give the place of a suspended tail back."""
        self.index.free(HOST, [place])

    def release(self, match: Match) -> None:
        """Unpin; what was saved stays until it is forgotten for room. The request may be taken again."""
        self.offer(match)
        match.lease.release()

    def end(self, match: Match, ending: Ending) -> None:
        """The request is over: unpin, and say what is expected after it."""
        self._note_load(match)
        lease, use, lookup = match.lease, match.visit.use, match.visit.lookup
        self.index.end(lease, ending, now_s=self.places.clock())
        self._edges.copy_refused(lease, min(match.dirty, match.lent.start) if match.lent else match.dirty)
        if use and use.hints.session is not None:
            if ending.next is Next.ENDED:
                self._sessions.forget(use.hints.session)
            else:
                self._sessions.remember(use.hints.session, lease.tokens(0, lease.num_blocks), use)
        if self._lookups and lookup:
            whole = min(lookup.num_tokens // self.layout.block_tokens, lease.num_blocks)
            self._lookups.end(lookup, ending, written=lease.tokens(whole, lease.num_blocks))
        self.release(match)

    def give_up(self, visit: Visit) -> None:
        """A request is over of which nothing is pinned: it was to be matched again."""
        if self._lookups and visit.lookup:
            self._lookups.end(visit.lookup, NO_ENDING)

    def follow(self, session: str, ending: Ending) -> None:
        """Say what comes after a session's last request, once that has been ended; unknown sessions are fine."""
        last = self._sessions.last(session)
        if last is None:
            return
        tokens, use = last
        with self.index.keep(self.root, tokens, use=use) as lease:
            self.index.end(lease, ending, now_s=self.places.clock())
        if ending.next is Next.ENDED:
            self._sessions.forget(session)

    # -- whole tiers ------------------------------------------------------------------------------------------------

    @property
    def index(self) -> Index:
        """Who holds what."""
        return self.places.index

    @property
    def metrics(self) -> Metrics:
        """What is counted."""
        return self.places.metrics

    def recover(self) -> None:
        """Take in what the tiers at rest kept since the last stop; what fits nowhere is deleted there."""
        for number, below in self._numbered.items():
            orphans = self.index.restore(number, below.tier.scan())
            keys = [key for run in orphans for key in run.keys]
            if keys:
                below.tier.delete(keys)
                self.metrics.misses.add(len(keys), below.name, Miss.ABSENT)
                log.warning("%s: %d blocks have no path to them any more and were deleted", below.name, len(keys))

    def tier_name(self, number: int) -> str:
        """The name of a tier of the index."""
        return ("device", "host")[number] if number <= HOST else self._numbered[number].name

    def holdings(self) -> list[dict[str, object]]:
        """What lies where: tier, blocks, bytes, place. Of a shared tier that others write to, what this store has written."""
        places = {"device": str(self.places.device.device), "host": "pinned" if self.places.host.pinned else "memory"}
        tiers = {tier.name: tier.held for tier in self.index.stats().tiers}
        for below in self.below:
            places[below.name] = below.place
            own = int(self.metrics.blocks_spilled.value("host", below.name))
            tiers.setdefault(below.name, own if below.tier.num_blocks is None else below.tier.num_blocks)
        return [
            {"tier": name, "blocks": blocks, "bytes": blocks * self.layout.block_bytes, "place": places[name]}
            for name, blocks in tiers.items()
        ]

    def evict_device(self) -> int:
        """Forget all device pages that no request has pinned; how many. Copies below stay."""
        return self.index.evict(DEVICE).evicted

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything queued has been copied down. False: the time was up first."""
        return self.mover.drain(timeout_s)

    def close(self) -> None:
        """Copy down what is queued, then let go of all tiers; also when interrupted. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._handoffs.close()
        self._ahead.close()
        self._pins.close()
        with ExitStack() as last:  # each, whatever becomes of the others
            last.callback(self.places.host.close)
            last.callback(self.places.device.close)
            for below in self.below:
                last.callback(below.tier.close)
            last.callback(self._memory.close)
            if self._lookups:
                last.callback(self._lookups.close)
            last.callback(self._refuse_loads)
            last.callback(self.mover.close)
            if not self.flush(CLOSE_TIMEOUT_S):
                log.warning("closed with saves still queued after %.0f s: they are dropped", CLOSE_TIMEOUT_S)

    def _refuse_loads(self) -> None:
        """Answer loads that the mover will not begin any more."""
        for load in self._expiring:
            if not load.done.done():
                load.refuse()
