"""One engine with its store in virtual time: requests come, wait for pages, load, are computed, answer, and are saved.

    arrive -> place (acquire, reserve) -> load -> start (extend) -> compute -> answer (extend, save) -> finish (end, release)

The same steps as tierkv/store.py and an engine's scheduler make, on the real index, with durations instead of bytes.
"""

from array import array
from collections import deque
from dataclasses import dataclass, field
from functools import partial

from tierkv.cost import CostModel
from tierkv.hints import NO_HINTS
from tierkv.index import Index, Lease, Want
from tierkv.simulate.events import Server, Timeline
from tierkv.simulate.hierarchy import EnginePlan, TierFigures, TierPlan, TimedRun
from tierkv.simulate.moves import DEVICE, HOST, Moves
from tierkv.simulate.replay import ROOT, Known, told
from tierkv.simulate.request import ID_BYTES, Request

AHEAD_SHARE = 0.25
"""Part of the host tier that may hold what was brought for requests that wait."""


@dataclass(eq=False, slots=True)
class Visit:
    """One request on its way through. pages: of the prompt and the answer.  places: its own, not the index's.

    shared: leading blocks that lie on the device.  came: of the blocks that are loaded, which have arrived.
    want, brought: while it waits, its claim on its blocks, and how many were brought to the host for it.
    """

    request: Request
    came_s: float
    pages: int
    lease: Lease | None = None
    want: Want | None = None
    brought: int = 0
    sources: list[tuple[int, int, int]] = field(default_factory=list)
    shared: int = 0
    places: list[int] = field(default_factory=list)
    came: bytearray = field(default_factory=bytearray)
    placed_s: float = 0.0
    started: bool = False
    ready_s: float = 0.0
    compute_s: float = 0.0

    @property
    def held(self) -> Lease:
        """Its lease, which it has from its placing on."""
        assert self.lease is not None
        return self.lease


class Serving:
    """An engine and its tiers. One thread; whoever lets requests arrive lets time pass in `timeline`, too.

    index: with the tiers of `plans`, all with places, and two tokens to a block.  cost: what its policies know; it learns here
    as it does in a store.
    """

    def __init__(
        self,
        *,
        index: Index,
        plans: tuple[TierPlan, ...],
        engine: EnginePlan,
        cost: CostModel,
        timeline: Timeline,
        block_tokens: int,
        block_bytes: int,
        hints: Known,
    ) -> None:
        self.index, self.timeline = index, timeline
        self._plans, self._engine, self._cost = plans, engine, cost
        self._block_tokens, self._hints = block_tokens, hints
        self._moves = Moves(
            index=index,
            plans=plans,
            engine=engine,
            cost=cost,
            timeline=timeline,
            block_tokens=block_tokens,
            block_bytes=block_bytes,
            copied=self._unpinned,
        )
        self._compute = Server(timeline)
        self._waiting: deque[Visit] = deque()
        self._num_placed = self._num_loading = 0
        self._unfinished: dict[Visit, None] = {}  # those that wait, for which something may be left to bring
        self._bringing = False
        self._brought = 0
        self._hits = [0] * len(plans)
        self._ttft_s = array("d")
        self._refused = self._block_refs = self._computed = self._late = 0
        self._wait_s = self._load_s = self._compute_s = self._whole_s = 0.0

    @property
    def is_busy(self) -> bool:
        """Some request is not over."""
        return bool(self._num_placed or self._waiting)

    # -- in ---------------------------------------------------------------------------------------------------------

    def arrive(self, request: Request) -> None:
        """A request comes now."""
        pages = -(-(request.input_tokens + request.output_tokens) // self._block_tokens)
        pages = max(pages, request.num_blocks)
        if pages > self.index.room(DEVICE)[1]:
            self._refused += 1
            return
        visit = Visit(request, self.timeline.now_s, pages)
        self._waiting.append(visit)
        self._admit()
        if self._hints.queue_s and visit.lease is None:  # others wait before it
            visit.want = self.index.want(ROOT, request.blocks)
            if len(self._plans) > HOST + 1:
                self._unfinished[visit] = None
                self._bring()

    def _admit(self) -> None:
        while self._waiting and self._num_placed < self._engine.max_sequences and self._place(self._waiting[0]):
            visit = self._waiting.popleft()
            self._num_placed += 1
            visit.placed_s = self.timeline.now_s
            self._load(visit)

    def _place(self, visit: Visit) -> bool:
        """Find what is held and get pages for the rest; False when there are too few now."""
        if visit.lease is None:
            self._expect_no_more(visit)
            hints = visit.request.hints if self._hints.session else NO_HINTS
            visit.lease = self.index.acquire(ROOT, visit.request.blocks, now_s=self.timeline.now_s, hints=hints)
            self._seek(visit)
            self._moves.copy_second_use(visit.lease)
        reservation = self.index.reserve(DEVICE, visit.pages - visit.shared)
        if reservation is None and not (self._num_placed or self._moves.num_copies or self._bringing):
            # Nobody will give pages back. Blocks that it found elsewhere have come to the device since, where its pin keeps
            # them and it does not know them as shared: it looks again.
            old, visit.lease = visit.lease, self.index.keep(ROOT, visit.request.blocks, use=visit.lease.use)
            old.release()
            self._seek(visit)
            reservation = self.index.reserve(DEVICE, visit.pages - visit.shared)
        if reservation is None:
            return False
        self._moves.copy_ahead(visit.pages)
        visit.places = list(reservation.places)
        return True

    def _seek(self, visit: Visit) -> None:
        visit.sources = visit.held.sources()
        visit.shared = next((hi for tier, _, hi in visit.sources[:1] if tier == DEVICE), 0)

    def _unpinned(self) -> None:
        """A copy keeps nothing any more: see who has room now. Not at once, for it may end inside of `_place`."""
        if self._waiting:
            self.timeline.at(self.timeline.now_s, self._admit)

    # -- ahead ------------------------------------------------------------------------------------------------------

    def _expect_no_more(self, visit: Visit) -> None:
        if visit.want:
            visit.want.release()
        self._unfinished.pop(visit, None)
        self._brought -= visit.brought

    def _bring(self) -> None:
        """Bring the next piece up to the host for who has waited longest, unless a load is under way."""
        visit = next(iter(self._unfinished), None)
        left = int(AHEAD_SHARE * self.index.room(HOST)[1]) - self._brought if len(self._plans) > HOST else 0
        if self._bringing or self._num_loading or visit is None or left <= 0:
            return
        lease = self.index.keep(ROOT, visit.request.blocks)
        for tier, lo, hi in lease.sources():
            if tier > HOST:
                self._bringing = True
                hi = min(hi, lo + min(left, self._moves.piece))
                then = partial(self._has_brought, visit, lease, hi - lo)
                self._moves.to_host(lease, tier, lo, hi, wanted=lambda: True, then=then)
                return
        lease.release()
        del self._unfinished[visit]
        self.timeline.at(self.timeline.now_s, self._bring)

    def _has_brought(self, visit: Visit, lease: Lease, blocks: int) -> None:
        lease.release()
        self._bringing = False
        if visit in self._unfinished:
            visit.brought += blocks
            self._brought += blocks
        self._unpinned()
        self._bring()

    # -- loading ----------------------------------------------------------------------------------------------------

    def _load(self, visit: Visit) -> None:
        visit.came = bytearray(visit.held.num_blocks - visit.shared)
        self._num_loading += 1
        for tier, lo, hi in visit.sources:
            for at in range(max(lo, visit.shared), hi, self._moves.piece):
                end = min(hi, at + self._moves.piece)
                if tier == DEVICE:
                    visit.came[at - visit.shared : end - visit.shared] = b"\1" * (end - at)
                elif tier == HOST:
                    self._to_device(visit, at, end)
                else:
                    then = partial(self._to_device, visit, at, end)
                    self._moves.to_host(visit.held, tier, at, end, wanted=partial(self._awaits, visit), then=then)
        if all(visit.came):
            self._start(visit)
        else:
            self.timeline.at(self.timeline.now_s + self._engine.load_deadline_s, partial(self._start, visit))

    @staticmethod
    def _awaits(visit: Visit) -> bool:
        return not visit.started

    def _to_device(self, visit: Visit, lo: int, hi: int) -> None:
        then = partial(self._arrived, visit, lo, hi)
        self._moves.to_device(hi - lo, wanted=partial(self._awaits, visit), then=then)

    def _arrived(self, visit: Visit, lo: int, hi: int) -> None:
        visit.came[lo - visit.shared : hi - visit.shared] = b"\1" * (hi - lo)
        if all(visit.came):
            self._start(visit)

    def _start(self, visit: Visit) -> None:
        """The load is over, or late: share what came, compute the rest."""
        if visit.started:
            return
        visit.started, visit.ready_s = True, self.timeline.now_s
        self._num_loading -= 1
        came = visit.came.find(0)
        usable = visit.shared + (len(visit.came) if came < 0 else came)
        self._late += visit.held.num_blocks - usable
        for tier, lo, hi in visit.sources:
            self._hits[tier] += max(0, min(hi, usable) - lo)
        self._block_refs += visit.request.num_blocks
        self._computed += visit.request.num_blocks - usable
        visit.held.shrink(visit.shared)  # and with the blocks go the pins of the tiers they came from
        self._extend(visit, usable)
        whole = max(1, visit.request.input_tokens)
        context = min(usable * self._block_tokens, whole - 1)  # the last token is always computed
        visit.compute_s = self._engine.prefill_s(whole - context, context)
        self._whole_s += self._engine.prefill_s(whole, 0)
        self._cost.observe_prefill(whole - context, context, visit.compute_s)
        self._compute.submit(lambda: visit.compute_s, partial(self._answer, visit))
        self._bring()

    def _extend(self, visit: Visit, end: int) -> None:
        """Let the device hold the request's blocks up to `end`; pages of blocks that it holds already stay the request's."""
        lo = visit.held.num_blocks
        places = [visit.places.pop() for _ in range(end - lo)]
        fresh = visit.request.blocks[lo * ID_BYTES : end * ID_BYTES]
        taken = self.index.extend(visit.held, fresh, tier=DEVICE, places=places)
        visit.places += [place for place, is_taken in zip(places, taken, strict=True) if not is_taken]

    # -- out --------------------------------------------------------------------------------------------------------

    def _answer(self, visit: Visit) -> None:
        """The prompt is computed, and the first token there."""
        now_s = self.timeline.now_s
        self._ttft_s.append(now_s - visit.came_s)
        self._load_s += visit.ready_s - visit.placed_s
        self._compute_s += visit.compute_s
        self._wait_s += now_s - visit.came_s - (visit.ready_s - visit.placed_s) - visit.compute_s
        self._extend(visit, visit.request.num_blocks)
        self._moves.copy_saved(visit.held, visit.shared, visit.held.num_blocks)
        decode_s = visit.request.output_tokens * self._engine.decode_token_s
        self.timeline.at(now_s + decode_s, partial(self._finish, visit))

    def _finish(self, visit: Visit) -> None:
        self.index.free(DEVICE, visit.places)
        self.index.end(visit.held, told(visit.request, self._hints), now_s=self.timeline.now_s)
        visit.held.release()
        self._num_placed -= 1
        self._admit()

    # -- figures ----------------------------------------------------------------------------------------------------

    def figures(self, *, policy: str, load_factor: float) -> TimedRun:
        """What happened until now, when no request is left."""
        duration_s = self.timeline.now_s
        answered = max(1, len(self._ttft_s))
        tiers = tuple(
            TierFigures(
                name=plan.name,
                capacity_blocks=tier.capacity,
                hit_blocks=hits,
                evicted_blocks=tier.evicted,
                lost_blocks=tier.lost,
            )
            for plan, tier, hits in zip(self._plans, self.index.stats().tiers, self._hits, strict=True)
        )
        return TimedRun(
            policy=policy,
            load_factor=load_factor,
            requests=len(self._ttft_s) + self._refused,
            refused=self._refused,
            block_refs=self._block_refs,
            computed_blocks=self._computed,
            late_blocks=self._late,
            unsaved_blocks=self._moves.unsaved,
            tiers=tiers,
            edges=tuple(self._moves.edges(duration_s)),
            disk=self._moves.disk(duration_s),
            ttft_s=array("d", sorted(self._ttft_s)),
            wait_s=self._wait_s / answered,
            load_s=self._load_s / answered,
            compute_s=self._compute_s / answered,
            computing_share=self._compute.busy_s / duration_s if duration_s else 0.0,
            seconds_saved_share=1 - self._compute_s / self._whole_s if self._whole_s else 0.0,
            duration_s=duration_s,
        )
