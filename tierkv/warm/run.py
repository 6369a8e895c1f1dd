"""Computes what a plan lists and sees it into tiers at rest. It may end at any moment: what is there is not computed again.

    ask the tiers ─▶ pieces that lack blocks ─▶ requests of one token ─▶ saves, as chunks are computed ─▶ ask the tiers again

Chunks end at fixed places of a path (`EngineConfig.chunk_tokens`), and a piece that was broken off goes on from such a place. So
it does not matter where a run was interrupted: the blocks are those of an uninterrupted one, to the last bit wherever rows of a
matrix product do not depend on how many there are. That is so on the CPUs it was tried on (README, "Warming").
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Final

from tierkv.errors import TierError
from tierkv.keys import Key
from tierkv.tiers.base import Miss
from tierkv.transfers import reason
from tierkv.warm.plan import Plan

if TYPE_CHECKING:
    from tierkv.engine import Engine
    from tierkv.store import Store
    from tierkv.transfers import Below

CHUNK_TOKENS: Final = 256
"""A multiple of every usual block; as fast as chunks of 512 on a CPU (2-core AMD EPYC VM, 2026-11-30)."""
ASKED_AT_ONCE: Final = 512
"""Keys: as many as a Redis tier answers exactly (`RedisTier.contains`)."""
ROUNDS: Final = 3
"""How often pieces are computed whose blocks did not come to rest: a queue was full, a tier away for a while."""
STEPS_AHEAD: Final = 3
"""Requests are given to the engine for so many full steps: enough to fill each, and little is lost at an interruption."""
MOST_FAILED: Final = 256
"""Blocks that may get lost on their way to a tier before it is given up; they are computed again."""
_PAUSE_S: Final = 0.05


@dataclass(slots=True)
class Warmed:
    """What became of a plan. held_tokens: were there already.  computed_tokens: by the model, whatever became of them.

    seconds: of computing and saving.  kept: blocks of the plan at rest in the end, by tier.
    """

    held_tokens: int = 0
    computed_tokens: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    kept: dict[str, int] = field(default_factory=dict)


class Presence:
    """Which blocks of a plan lie in which tier at rest."""

    def __init__(self, plan: Plan, tiers: "Sequence[Below]", store: "Store") -> None:
        self._plan, self._tiers, self._store = plan, tiers, store
        self.held: dict[str, set[Key]] = {}
        self._keys = plan.keys(store.root)
        self._wanted = [key for keys in self._keys for key in keys]

    def ask(self) -> None:
        """Look again. Raises TierError when a tier does not answer."""
        for below in self._tiers:
            held: set[Key] = set()
            for at in range(0, len(self._wanted), ASKED_AT_ONCE):
                keys = self._wanted[at : at + ASKED_AT_ONCE]
                call = partial(below.tier.contains, keys)
                with self._store.metrics.misses.tally() as counted:
                    there = below.attempt(call, count=len(keys), failures=self._store.metrics.misses)
                if there is None or reason(counted) not in (None, Miss.ABSENT):
                    raise TierError(f"{below.name} ({below.place}) does not answer: see that it runs, and start again")
                held.update(key for key, is_there in zip(keys, there, strict=True) if is_there)
            self.held[below.name] = held

    def keys_of(self, numbers: Sequence[int]) -> list[Key]:
        """Keys of the blocks of some pieces."""
        return [key for number in numbers for key in self._keys[number]]

    def lacks(self, number: int) -> bool:
        """Whether some tier lacks a block of a piece."""
        return not all(held.issuperset(self._keys[number]) for held in self.held.values())

    def leading(self, number: int) -> int:
        """Up to which token of its path the blocks of a piece lie in some tier, from its first one on."""
        keys = self._keys[number]
        absent = (at for at, key in enumerate(keys) if not any(key in held for held in self.held.values()))
        return (self._plan.blocks(self._plan.pieces[number]).start + next(absent, len(keys))) * self._plan.block_tokens


class Warmer:
    """One run over a plan. into: the tiers at rest that shall have all of it.

    progress: told of tokens as they are computed; it may raise KeyboardInterrupt, between two steps.  skipped: of those that
    are there already.  clock: seconds.
    """

    def __init__(
        self,
        engine: "Engine",
        store: "Store",
        plan: Plan,
        *,
        into: "Sequence[Below]",
        progress: Callable[[int], None] = lambda tokens: None,
        skipped: Callable[[int], None] = lambda tokens: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._engine, self._store, self._plan, self._progress, self._clock = engine, store, plan, progress, clock
        self._presence = Presence(plan, into, store)
        self._skipped, self._into = skipped, into
        self._chunk = engine.config.chunk_tokens or CHUNK_TOKENS
        # What is queued to be saved pins its pages and its places in the host: leave most of both to what computes.
        rooms = [store.index.room(tier)[1] for tier in range(2)]
        self._most_queued = max(1, min(*rooms, store.mover.room("save")) // 4)

    def run(self) -> Warmed:
        """Compute what is lacking, and wait until it is at rest. KeyboardInterrupt ends it early, and in good order.

        Raises TierError when a tier does not answer, or does not keep what it is given.
        """
        done = Warmed()
        self._presence.ask()
        pieces = range(len(self._plan.pieces))
        lacking = [number for number in pieces if self._presence.lacks(number)]
        done.held_tokens = sum(self._plan.pieces[number].num_tokens for number in set(pieces) - set(lacking))
        done.held_tokens += sum(self._reusable(number) - self._plan.pieces[number].start for number in lacking)
        self._skipped(done.held_tokens)
        self._use(sorted(set(pieces) - set(lacking)))
        before, began = self._engine.stats.tokens, self._clock()
        try:
            for attempt in range(ROUNDS):
                self._compute(lacking, again=attempt > 0)
                self._settle()
                self._presence.ask()
                left = [number for number in lacking if self._presence.lacks(number)]
                if not left or (attempt and len(left) == len(lacking)):
                    break
                lacking = left
                self._store.evict_device()  # what lies there is not offered to the tiers below a second time
        except KeyboardInterrupt:
            done.interrupted = True
            self._settle()
            self._presence.ask()
        done.computed_tokens = self._engine.stats.tokens - before
        done.seconds = self._clock() - began
        done.kept = {name: len(held) for name, held in self._presence.held.items()}
        return done

    def _use(self, held: Sequence[int]) -> None:
        """Pieces that are there are used now: they are not what is forgotten first for the rest, and what expires begins anew."""
        for number in held:
            path = self._plan.path(self._plan.pieces[number])
            with self._store.index.acquire(self._store.root, path, now_s=time.monotonic()):
                pass
        keys = self._presence.keys_of(held)
        for below in self._into:
            below.attempt(partial(below.tier.renew, keys), count=len(keys), failures=self._store.metrics.misses)

    def _compute(self, lacking: Sequence[int], *, again: bool) -> None:
        """Run pieces, each once the one that it waits for has run. again: whatever is known of them may be reused."""
        from tierkv.engine import SamplingParams

        one = SamplingParams(max_tokens=1, ignore_eos=True)
        waiting: dict[int, list[int]] = {}
        ready: list[int] = []
        wanted = set(lacking)
        for number in lacking:
            after = self._plan.pieces[number].after
            if after in wanted:
                waiting.setdefault(after, []).append(number)
            else:
                heappush(ready, number)
        running: dict[str, int] = {}
        try:
            while ready or running:
                ahead = sum(self._plan.pieces[number].num_tokens for number in running.values())
                while ready and ahead < STEPS_AHEAD * self._engine.config.max_batch_tokens:
                    number = heappop(ready)
                    piece = self._plan.pieces[number]
                    reuse = None if again else self._reusable(number)
                    tokens = self._plan.path(piece)
                    running[self._engine.add(tokens_of(tokens), one, reuse_tokens=reuse)] = number
                    ahead += piece.num_tokens
                before = self._engine.stats.tokens
                outputs = self._engine.step()
                self._progress(0 if again else self._engine.stats.tokens - before)
                for output in outputs:
                    if output.stats is not None:
                        for follower in waiting.pop(running.pop(output.request), ()):
                            heappush(ready, follower)
                while self._store.mover.num_queued > self._most_queued:
                    self._store.flush(_PAUSE_S)
                self._refuse_losses()
        finally:
            for request in running:
                self._engine.abort(request)

    def _refuse_losses(self) -> None:
        """Stop when a tier does not take what it is given: hours of computing for nothing otherwise."""
        dropped = self._store.metrics.saves_dropped
        for below in self._into:
            full = dropped.value("disk", "full") if below.name == "disk" else 0
            failed = sum(dropped.value(below.name, reason) for reason in (Miss.FAILED, Miss.DOWN, "full", "down"))
            if full or failed > MOST_FAILED:
                what = "has no room on its disk" if full else "fails"
                raise TierError(
                    f"{below.name} ({below.place}) {what}: {int(failed)} blocks were not kept (see the warnings above); "
                    "mend that and start again: it goes on from here"
                )

    def _reusable(self, number: int) -> int:
        """Tokens that a piece takes from the store: up to where it begins, or to the last fixed place that was reached.

        So up to a chunk may be computed again of what kill -9 cut short, or another plan left; the bytes are then the same.
        """
        piece = self._plan.pieces[number]
        leading = self._presence.leading(number)
        if leading >= piece.end:
            return piece.end - 1  # one tier has all of it, another not: only the last token is computed
        return max(piece.start, leading // self._chunk * self._chunk)

    def _settle(self) -> None:
        """Wait until what was computed is at rest."""
        while not self._store.flush(_PAUSE_S):
            pass


def chunk_tokens(block_tokens: int) -> int:
    """Tokens of a chunk, for blocks of this size: a multiple of it."""
    return max(CHUNK_TOKENS, block_tokens)  # both are powers of two


def tokens_of(path: bytes) -> memoryview:
    """A path as the engine takes it: int32."""
    return memoryview(path).cast("i")
