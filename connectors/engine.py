"""The bundled engine's connector: its pages are the store's device tier, so a device hit is a pin and a save is a seal."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from tierkv.ahead import Expected
from tierkv.arrival import Arrival
from tierkv.connectors.base import Hit, PagedConnector, Progress
from tierkv.hints import NO_ENDING, NO_HINTS, Ending, Hints
from tierkv.layout import TOKEN_BYTES
from tierkv.match import Match, Search, Visit
from tierkv.store import Store
from tierkv.transfers import DEVICE, HOST


@dataclass(slots=True)
class _Tail:
    """The last, partly filled page of a suspended request: the host place it was copied to, once it has been."""

    num_tokens: int
    place: "Future[int | None]"


@dataclass(slots=True)
class _Request:
    """expected: while it waits.  prefix: what it waits for of another engine.  visit: once it has been matched."""

    expected: Expected | None = None
    prefix: "Future[int] | None" = None
    visit: Visit | None = None
    search: Search | None = None
    match: Match | None = None
    loading: bool = False
    tail: _Tail | None = None


class EngineConnector(PagedConnector):
    """Requests of one engine over one store. The calls are the engine's scheduler thread's alone."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.pool = store.places.device.pool
        self._requests: dict[str, _Request] = {}
        self._counted = self._counts()

    # -- finding and loading ----------------------------------------------------------------------------------------

    def expect(self, request: str, tokens: bytes) -> None:
        """Let its blocks be forgotten last, and come to the host, until it is matched."""
        state = self._requests.setdefault(request, _Request())
        self._unpin(state)
        self._await(state, tokens)

    def _await(self, state: _Request, tokens: bytes) -> None:
        if state.expected is not None and state.expected.tokens != tokens:
            self._awaited(state)
        if state.expected is None:
            state.expected = self.store.expect(tokens)

    def _awaited(self, state: _Request) -> None:
        if state.expected is not None:
            self.store.cancel(state.expected)
            state.expected = None

    def await_prefix(self, request: str, tokens: bytes, *, deadline_s: float) -> None:
        """Let `match` wait for what another engine computes."""
        state = self._requests.setdefault(request, _Request())
        state.prefix = self.store.await_prefix(tokens, deadline_s=deadline_s)

    def match(self, request: str, tokens: bytes, *, hints: Hints = NO_HINTS) -> Hit | None:
        """Find and pin; None while a shared tier is being asked, or another engine computes the prompt."""
        state = self._requests.setdefault(request, _Request())
        self._unpin(state)
        if state.prefix is not None and not state.prefix.done():
            self._await(state, tokens)
            return None
        if state.search is None or state.search.tokens != tokens:
            state.search = self.store.search(tokens)
        if not state.search.ready:
            self._await(state, tokens)
            return None
        if state.visit:
            match = self.store.take_again(state.search, state.visit)
        else:
            match = self.store.take(state.search, hints=hints)
        state.match, state.visit, state.search = match, match.visit, None
        self._awaited(state)
        self._use_tail(state, match, tokens)
        return self._hit(match)

    def _use_tail(self, state: _Request, match: Match, tokens: bytes) -> None:
        """Let a suspended request go on in the middle of its last page, if that page is just what comes next."""
        if state.tail is None:
            return
        place = _kept(state.tail.place)
        whole, part = divmod(state.tail.num_tokens, self.store.layout.block_tokens)
        comes_next = match.lease.num_blocks == whole and not match.remote
        if place is not None and comes_next and len(tokens) >= state.tail.num_tokens * TOKEN_BYTES:
            match.head_tokens, match.head_place = part, place
        else:
            self._drop_tail(state)

    def _hit(self, match: Match) -> Hit:
        block_tokens = self.store.layout.block_tokens
        lease = match.lease
        sources: dict[str, int] = {}

        def add(tier: str, tokens: int) -> None:
            sources[tier] = sources.get(tier, 0) + tokens

        for tier, lo, hi in lease.sources():
            add(self.store.tier_name(tier), (hi - lo) * block_tokens)
        if match.source:
            add(match.source.name, len(match.remote) * block_tokens)
        head = (HOST, None) if match.head_place is not None else lease.head_source()
        if match.head_tokens and head:
            add(self.store.tier_name(head[0]), match.head_tokens)
        pages: list[int | None] = list(lease.places(DEVICE, 0, match.shared))
        pages += [None] * (match.num_blocks - match.shared + bool(match.head_tokens))
        return Hit(match.num_blocks * block_tokens + match.head_tokens, tuple(pages), sources)

    def load(self, request: str, pages: Sequence[int]) -> "Future[int]":
        """Fill the pages; resolves to usable tokens."""
        state = self._requests[request]
        match = state.match
        assert match is not None, "load follows match"
        usable: Future[int] = Future()
        block_tokens = self.store.layout.block_tokens
        state.loading = True
        if not pages:  # all of it lies on the device: no trip through a thread
            usable.set_result(match.shared * block_tokens)
            return usable

        def answer(done: "Future[tuple[int, int]]") -> None:
            blocks, head = done.result()
            usable.set_result(blocks * block_tokens + head)

        self.store.load(match, pages).add_done_callback(answer)
        return usable

    def arrival(self, request: str) -> Arrival | None:
        """Layers still on their way, or lost on it."""
        match = self._requests[request].match
        arrival = match.arrival if match else None
        return None if arrival is None or arrival.is_whole else arrival

    # -- keeping ----------------------------------------------------------------------------------------------------

    def save(self, request: str, tokens: bytes, pages: Sequence[int]) -> list[bool]:
        """Seal full pages."""
        state = self._requests[request]
        match = state.match
        assert match is not None, "save follows match"
        self._settle(state, match)
        return self.store.save(match, tokens, pages)

    def _settle(self, state: _Request, match: Match) -> None:
        if state.loading:
            self.store.settle(match)
            self._drop_tail(state)
            state.loading = False

    def fork(self, request: str, child: str) -> None:
        """Pin the same blocks for another request."""
        match = self._requests[request].match
        if match is not None:
            twin = Match(match.lease.fork(), match.shared, 0, dirty=match.lease.num_blocks)
            twin.visit.use = match.visit.use
            self._requests[child] = _Request(match=twin, visit=twin.visit)

    def suspend(self, request: str, *, tail: int | None, num_tokens: int) -> "Future[None]":
        """Move what the request has to the host."""
        state = self._requests[request]
        match, done = state.match, Future[None]()
        if match is None:
            done.set_result(None)
            return done
        self._settle(state, match)
        kept = self.store.suspend(match, tail=tail)
        if tail is not None:
            state.tail = _Tail(num_tokens, kept)
        self._unpin(state)  # the copy has pins of its own
        kept.add_done_callback(lambda _: done.set_result(None))
        return done

    def release(self, request: str, *, ending: Ending = NO_ENDING) -> None:
        """Unpin, and forget the request."""
        state = self._requests.pop(request, None)
        if state is None:
            return
        if state.match is not None:
            self.store.end(state.match, ending)
        elif state.visit:
            self.store.give_up(state.visit)
        self._awaited(state)
        if state.prefix is not None:
            state.prefix.cancel()
        self._drop_tail(state)

    def follow(self, session: str, ending: Ending) -> None:
        """Tell the store of the session's last request."""
        self.store.follow(session, ending)

    def _unpin(self, state: _Request) -> None:
        if state.match is not None:
            self.store.release(state.match)
            state.match = None
        state.loading = False

    def _drop_tail(self, state: _Request) -> None:
        if state.tail is not None:
            state.tail.place.add_done_callback(self._free_tail)
            state.tail = None

    def _free_tail(self, copied: "Future[int | None]") -> None:
        place = _kept(copied)
        if place is not None:
            self.store.free_host(place)

    # -- pages ------------------------------------------------------------------------------------------------------

    def allocate(self, num_pages: int) -> list[int] | None:
        """Private pages."""
        return self.store.allocate(num_pages)

    def free(self, pages: Sequence[int]) -> None:
        """Give private pages back."""
        self.store.free(pages)

    def computed(self, *, num_tokens: int, context_tokens: int, seconds: float) -> None:
        """Let the cost model learn what recomputing costs."""
        self.store.places.cost.observe_prefill(num_tokens, context_tokens, seconds)

    def poll(self) -> Progress:
        """Answer late loads, and count what has moved since the last call."""
        self.store.poll()
        before, now = self._counted, self._counts()
        self._counted = now
        return Progress(*(int(new - old) for new, old in zip(now, before, strict=True)))

    def _counts(self) -> tuple[float, float, float]:
        metrics = self.store.metrics
        return metrics.blocks_loaded.value(), metrics.blocks_spilled.value(), metrics.misses.value()


def _kept(copied: "Future[int | None]") -> int | None:
    """The place a tail was copied to; None while it is under way, and when it failed."""
    failed = not copied.done() or copied.cancelled() or copied.exception() is not None
    return None if failed else copied.result()
