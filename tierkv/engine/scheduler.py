"""Which sequences compute how many tokens in the next step, and which pages they hold. No torch, no model, no text.

Every running sequence decodes one token per step; what is left of the token budget goes to prompts, oldest first, in
chunks. A prompt gets all its pages when it is admitted, so only decoding can run out of them: then the youngest
sequence is suspended, and nobody is admitted until somebody has finished, or two requests would evict each other forever.
"""

from bisect import insort
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from tierkv.connectors.base import Hit, PagedConnector
from tierkv.engine.pages import PageLedger
from tierkv.engine.sequence import Sequence, State


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens of a sequence to compute in this step, from `num_computed` on."""

    sequence: Sequence
    num_tokens: int


def _rank(sequence: Sequence) -> int:
    return sequence.arrival


class Scheduler:
    """Queues of one engine. One thread.

    copy_page: copies a page over another before anything else is written to either.  chunk_tokens: as in `EngineConfig`.
    """

    def __init__(
        self,
        connector: PagedConnector,
        *,
        block_tokens: int,
        max_batch_tokens: int,
        max_sequences: int,
        copy_page: Callable[[int, int], None],
        chunk_tokens: int | None = None,
    ) -> None:
        self._connector, self._copy_page, self._chunk_tokens = connector, copy_page, chunk_tokens
        self._block_tokens, self._max_batch_tokens, self._max_sequences = block_tokens, max_batch_tokens, max_sequences
        self.ledger = PageLedger(connector)
        self._waiting: list[Sequence] = []
        self._loading: list[Sequence] = []
        self._running: list[Sequence] = []
        self._moving: list[tuple[Future[Any], Sequence]] = []  # being suspended, or aborted while loading
        self._admits, self._asks = True, False
        self._cut: tuple[Sequence, bytes] | None = None  # whose hit was cut since somebody ran, to which tokens

    @property
    def is_idle(self) -> bool:
        """Nothing is queued, running or moving."""
        return not (self._waiting or self._loading or self._running or self._moving)

    @property
    def is_asking(self) -> bool:
        """Some sequence was not answered by the connector yet."""
        return self._asks

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; the connector hears of it unless the next step will take it up anyway."""
        if not self.is_idle:
            self._connector.expect(sequence.id, _reusable(sequence))
        sequence.state = State.WAITING
        insort(self._waiting, sequence, key=_rank)

    def schedule(self) -> list[Work]:
        """Work for one step; empty when nothing can run before a transfer ends."""
        self.settle()
        work: dict[Sequence, int] = {}
        for sequence in [known for known in self._running if known.num_missing == 1]:
            self._plan(sequence, work)
        self._admit(self._max_batch_tokens - len(work))
        for sequence in [known for known in self._running if known not in work]:
            self._plan(sequence, work)
        return [Work(sequence, num_tokens) for sequence, num_tokens in work.items()]

    def _plan(self, sequence: Sequence, work: dict[Sequence, int]) -> None:
        """Put as much of a sequence into `work` as budget and pages allow; may push out younger ones."""
        num_tokens, left = self._chunk(sequence), self._max_batch_tokens - sum(work.values())
        if num_tokens > left and self._chunk_tokens is not None:
            return
        num_tokens = min(num_tokens, left)
        if num_tokens > 0 and self._ensure(sequence, num_tokens, work):
            work[sequence] = num_tokens

    def _chunk(self, sequence: Sequence) -> int:
        """Tokens that a sequence computes next, given room."""
        if self._chunk_tokens is None:
            return sequence.num_missing
        return min(sequence.num_missing, self._chunk_tokens - sequence.num_computed % self._chunk_tokens)

    # -- pages ------------------------------------------------------------------------------------------------------

    def _ensure(self, sequence: Sequence, num_tokens: int, work: dict[Sequence, int]) -> bool:
        """Make the pages of the next tokens exist and be writable; suspend the youngest as long as there are too few."""
        while sequence.state is State.RUNNING:
            first, offset = divmod(sequence.num_computed, self._block_tokens)
            shared = first < len(sequence.pages) and not self.ledger.is_writable(sequence.pages[first])
            lacking = max(0, self._blocks(sequence.num_computed + num_tokens) - len(sequence.pages))
            pages = self.ledger.allocate(lacking + shared)
            if pages is not None:
                if shared:
                    target = pages.pop()
                    if offset:
                        self._copy_page(sequence.pages[first], target)
                    self.ledger.drop([sequence.pages[first]])
                    sequence.pages[first] = target
                sequence.pages.extend(pages)
                return True
            if not self._make_room(work):
                break
        return False

    def _make_room(self, work: dict[Sequence, int]) -> bool:
        """Let go of something; True if it is worth asking for pages again at once."""
        if self._unpin_waiting():
            return True
        if self._moving or (len(self._running) == 1 and self._loading):
            return False  # pages are on their way back, or will be once what loads can be suspended
        victim = self._running[-1]
        if len(self._running) == 1 and not victim.pages:
            return False
        work.pop(victim, None)
        self._suspend(victim)
        return not self._moving

    def _unpin_waiting(self, but: Sequence | None = None) -> bool:
        """Let go of hits whose sequences could not be placed; they are matched again. True if there were any."""
        pinning = [known for known in self._waiting if known.hit is not None and known is not but]
        for sequence in pinning:
            self._connector.expect(sequence.id, _reusable(sequence))
            sequence.hit = None
        return bool(pinning)

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens)

    def seal(self, sequence: Sequence) -> None:
        """Offer the blocks that have become full; a page the store takes is shared from now on."""
        full = sequence.num_computed // self._block_tokens
        if full <= sequence.num_offered:
            return
        pages = sequence.pages[:full]
        taken = self._connector.save(sequence.id, sequence.tokens[: sequence.num_computed].tobytes(), pages)
        for page, is_taken in zip(
            reversed(pages), reversed(taken), strict=False
        ):  # one answer per new block: the last ones
            if is_taken:
                self.ledger.give(page)
        sequence.num_offered = full

    def _settle_rest(self, sequence: Sequence) -> bool:
        """Wait for layers that are on their way, where no step has yet; False: they were lost, and it starts again."""
        rest = sequence.rest
        if rest is None or rest.settle():
            sequence.rest = None
            return True
        self._restart(sequence)
        return False

    def restart(self, work: list[Work]) -> bool:
        """After a step that failed: queue again whoever lost layers of a load; False when nobody did."""
        lost = [item.sequence for item in work if item.sequence.rest is not None and not item.sequence.rest.settle()]
        for sequence in lost:
            self._restart(sequence)
        return bool(lost)

    def _restart(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        sequence.request.sources = None
        self._let_go(sequence)
        self.add(sequence)

    # -- in -----------------------------------------------------------------------------------------------------------

    def _admit(self, budget: int) -> None:
        self._admits = self._admits or not (self._running or self._loading or self._moving)
        self._asks = False
        for sequence in list(self._waiting):
            if not self._admits or budget <= 0 or len(self._running) + len(self._loading) >= self._max_sequences:
                return
            if sequence.hit is None:
                self._match(sequence)
            if sequence.hit is None:
                self._asks = True
                continue  # a shared tier is being asked; whoever is behind may overtake
            if not self._place(sequence):
                # Or two that wait could keep each other waiting, or one itself.
                if not (self._running or self._loading or self._unpin_waiting(but=sequence) or self._moving):
                    self._cut_hit(sequence)
                return
            budget -= self._chunk(sequence) if sequence.state is State.RUNNING else 0

    def _match(self, sequence: Sequence) -> None:
        tokens = self._cut[1] if self._cut and self._cut[0] is sequence else _reusable(sequence)
        sequence.hit = self._connector.match(sequence.id, tokens, hints=sequence.request.hints)

    def _cut_hit(self, sequence: Sequence) -> None:
        """Match the whole blocks of a hit again, once as long as nobody runs.

        It may keep pages that it does not share: of a block that it found elsewhere and that has come to the device since; of
        the block that it agrees with in part. Then a prompt that needs the whole device would never be placed.
        """
        assert sequence.hit is not None
        if sequence.hit.pages and not (self._cut and self._cut[0] is sequence):
            whole = sequence.hit.num_tokens // self._block_tokens * self._block_tokens
            self._cut = sequence, sequence.tokens[:whole].tobytes()
            self._match(sequence)

    def _place(self, sequence: Sequence) -> bool:
        """Give a matched sequence its pages and start its load; False when there are too few pages now."""
        hit = sequence.hit
        assert hit is not None
        num_loaded = sum(page is None for page in hit.pages)
        fresh = self.ledger.allocate(num_loaded + self._blocks(len(sequence.tokens)) - len(hit.pages))
        if fresh is None:
            return False
        self._waiting.remove(sequence)
        sequence.pages = fresh  # its own, until `_start`: a hit's pages may be lost to others while it loads
        sequence.state = State.LOADING
        self._loading.append(sequence)
        sequence.load = self._connector.load(sequence.id, fresh[:num_loaded]) if hit.pages else None
        if sequence.load is None or sequence.load.done():
            self._start(sequence)
        return True

    def _start(self, sequence: Sequence) -> None:
        """The load is over: run with what it brought."""
        hit, load = sequence.hit, sequence.load
        assert hit is not None
        usable = min(_outcome(load), hit.num_tokens, len(sequence.tokens) - 1) if load else 0
        own = iter(sequence.pages)
        kept = self._blocks(usable)
        pages = [next(own) if page is None else page for page in hit.pages[:kept]]
        if all(page is None for page in hit.pages[kept:]):
            pages.extend(own)
        else:  # shared pages past what is usable are gone: the table ends here, and grows again as it is computed
            self.ledger.drop(own)
        sequence.pages = pages
        sequence.num_computed, sequence.num_offered = usable, 0
        sequence.hit = sequence.load = None
        sequence.rest = self._connector.arrival(sequence.id) if load else None
        if sequence.request.sources is None:
            sequence.request.sources = _sources(hit, usable, sequence.request.prompt_tokens)
        self._loading.remove(sequence)
        self._run(sequence)

    def _run(self, sequence: Sequence) -> None:
        sequence.state = State.RUNNING
        self._cut = None
        insort(self._running, sequence, key=_rank)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child`, a copy of `parent`'s tokens, go on from the parent's pages; queue it where that cannot be."""
        if parent.state is not State.RUNNING or len(self._running) + len(self._loading) >= self._max_sequences:
            self.add(child)
            return
        if not self._settle_rest(parent):
            self.add(child)
            return
        self.seal(parent)  # so that no page is offered while both hold it
        self._connector.fork(parent.id, child.id)
        child.pages = parent.pages[: self._blocks(parent.num_computed)]
        self.ledger.share(child.pages)
        child.num_computed, child.num_offered = parent.num_computed, parent.num_offered
        self._run(child)

    # -- out ----------------------------------------------------------------------------------------------------------

    def _suspend(self, sequence: Sequence) -> None:
        if not self._settle_rest(sequence):
            return
        self.seal(sequence)
        self._running.remove(sequence)
        self._admits = False
        sequence.request.preemptions += 1
        sequence.state = State.SUSPENDED
        if sequence.reuse is not None:
            sequence.reuse = max(sequence.reuse, sequence.num_computed)
        last, offset = divmod(sequence.num_computed, self._block_tokens)
        tail = sequence.pages[last] if offset and sequence.pages[last] in self.ledger else None
        # The store's pages may be somebody else's the moment it is told: keep only what is ours to drop.
        sequence.pages = [page for page in sequence.pages if page in self.ledger]
        moved = self._connector.suspend(sequence.id, tail=tail, num_tokens=sequence.num_computed)
        self._moving.append((moved, sequence))
        self.settle()

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out of whatever queue it is in; its pages go back, at once or when nothing moves them."""
        self._admits = True
        if sequence.state is State.LOADING and sequence.load is not None:
            self._loading.remove(sequence)
            self._moving.append((sequence.load, sequence))
        elif sequence.rest is not None:
            self._moving.append((sequence.rest.finished, sequence))
        for queue in (self._waiting, self._loading, self._running):
            if sequence in queue:
                queue.remove(sequence)
        sequence.state = State.FINISHED
        if not any(sequence is moving for _, moving in self._moving):
            self._let_go(sequence)
        self.settle()

    def _let_go(self, sequence: Sequence) -> None:
        self.ledger.drop(sequence.pages)
        sequence.pages = []
        sequence.num_computed = sequence.num_offered = 0
        sequence.hit = sequence.load = sequence.rest = None
        if sequence.state is State.FINISHED:
            self._connector.release(sequence.id, ending=sequence.ending)

    # -- transfers ----------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Take up the transfers that have ended."""
        if self._moving:
            ended = [sequence for future, sequence in self._moving if future.done()]
            self._moving = [(future, sequence) for future, sequence in self._moving if not future.done()]
            for sequence in ended:
                if self._still_written(sequence):
                    continue
                self._let_go(sequence)
                if sequence.state is State.SUSPENDED:
                    self.add(sequence)
        for sequence in [known for known in self._loading if known.load is not None and known.load.done()]:
            self._start(sequence)

    def _still_written(self, sequence: Sequence) -> bool:
        """Whether later layers of a load go on into the pages of a sequence that was ended while it loaded."""
        rest = self._connector.arrival(sequence.id) if sequence.load is not None else None
        if rest is None or rest.finished.done():
            return False
        self._moving.append((rest.finished, sequence))
        return True

    def transfers(self) -> list["Future[Any]"]:
        """What an engine without work waits for."""
        loads = [sequence.load for sequence in self._loading if sequence.load is not None]
        return [*loads, *(future for future, _ in self._moving)]


def _reusable(sequence: Sequence) -> bytes:
    """Tokens whose KV may be reused: never the last, which is computed to sample the next."""
    most = len(sequence.tokens) - 1
    return sequence.tokens[: most if sequence.reuse is None else min(most, sequence.reuse)].tobytes()


def _outcome(load: "Future[int]") -> int:
    """Tokens a load brought; a connector that breaks its promise never to raise brought none."""
    return 0 if load.cancelled() or load.exception() is not None else load.result()


def _sources(hit: Hit, usable: int, prompt_tokens: int) -> dict[str, int]:
    """Prompt tokens by source. What a load did not bring is taken off the last tiers of the hit: the far ones fail."""
    sources, left = {}, usable
    for tier, num_tokens in hit.sources.items():
        sources[tier] = min(num_tokens, left)
        left -= sources[tier]
    return {tier: count for tier, count in sources.items() if count} | {"computed": prompt_tokens - usable}
