"""One step after the other: schedule, run the model, sample, see who has finished. Tokens in, tokens out."""

import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import replace
from itertools import count
from typing import Final

import torch

from tierkv.connectors.base import PagedConnector
from tierkv.engine.config import EngineConfig
from tierkv.engine.loading import Model
from tierkv.engine.runner import Runner
from tierkv.engine.sampling import sample
from tierkv.engine.scheduler import Scheduler, Work
from tierkv.engine.sequence import Request, Sequence, State
from tierkv.engine.stats import EngineStats
from tierkv.kernels.pages import copy_pages

_PREFILL_TOKENS: Final = 16  # fewer say more of a step's fixed cost than of a token's
_WAIT_S: Final = 0.05  # between looks at a connector while transfers are under way
_ASK_AGAIN_S: Final = 0.001  # between asking a connector that had no answer yet


class Core:
    """The part of an engine that knows no text and nobody who waits for it."""

    def __init__(
        self,
        model: Model,
        connector: PagedConnector,
        config: EngineConfig,
        eos: frozenset[int],
        clock: Callable[[], float],
    ) -> None:
        self._connector, self._eos, self._clock = connector, eos, clock
        self._runner = Runner(model, connector.pool)
        self.scheduler = Scheduler(
            connector,
            block_tokens=config.block_tokens,
            max_batch_tokens=config.max_batch_tokens,
            max_sequences=config.max_sequences,
            copy_page=lambda source, target: copy_pages(connector.pool, [source], [target]),
        )
        self._arrivals = count()
        self._pause = threading.Event()  # never set: an interruptible wait
        self.stats = EngineStats()

    def start(self, request: Request, sequence: Sequence) -> None:
        """Queue the first sequence of a request."""
        request.sequences.append(sequence)
        self._number(sequence)
        self.scheduler.add(sequence)

    def branch(self, parent: Sequence, child: Sequence) -> None:
        """Queue or run a sequence that begins as a copy of `parent`."""
        child.request.sequences.append(child)
        self._number(child)
        self.scheduler.fork(parent, child)

    def _number(self, sequence: Sequence) -> None:
        """Give a sequence its rank, and a name to connectors that no other has, though requests may reuse theirs."""
        sequence.arrival = next(self._arrivals)
        sequence.id = f"{sequence.request.id}/{sequence.arrival}"

    def abort(self, sequence: Sequence) -> None:
        """Take a sequence out; its pages go back when nothing moves them any more."""
        if sequence.state is not State.FINISHED:
            sequence.finish_reason, sequence.finished_s = "abort", self._clock()
            self.scheduler.finish(sequence)

    def advance(self) -> list[Sequence]:
        """Run one step, or wait a moment if nothing can run; returns the sequences that have a new token."""
        started_s = self._clock()
        self._poll()
        work = self.scheduler.schedule()
        if not work:
            self._wait()
            return []
        for item in work:
            if item.sequence.request.started_s is None:
                item.sequence.request.started_s = started_s
        model_started_s = self._clock()
        logits = self._runner.run(work)
        model_s = self._clock() - model_started_s
        if len(work) == 1 and work[0].num_tokens >= _PREFILL_TOKENS:  # alone, so that the time is all its own
            self._connector.computed(
                num_tokens=work[0].num_tokens, context_tokens=work[0].sequence.num_computed, seconds=model_s
            )
        try:
            sequences = self._take(work, logits)
        except BaseException:
            for item in work:  # whoever got no token computes its last one again, or nobody would plan it any more
                item.sequence.num_computed = min(item.sequence.num_computed, len(item.sequence.tokens) - 1)
            raise
        self.stats.steps += 1
        self.stats.tokens += sum(item.num_tokens for item in work)
        self.stats.model_s += model_s
        self.stats.step_s += self._clock() - started_s
        return sequences

    def drain(self) -> None:
        """Wait until nothing moves."""
        while transfers := self.scheduler.transfers():
            wait(transfers, timeout=_WAIT_S)
            self._poll()
            self.scheduler.settle()

    def _poll(self) -> None:
        progress = self._connector.poll()
        self.stats.blocks_loaded += progress.loaded
        self.stats.blocks_saved += progress.saved
        self.stats.blocks_failed += progress.failed

    def _wait(self) -> None:
        transfers = self.scheduler.transfers()
        if transfers and not self.scheduler.is_asking:
            wait(transfers, timeout=_WAIT_S, return_when=FIRST_COMPLETED)
        elif not self.scheduler.is_idle:
            self._pause.wait(_ASK_AGAIN_S)

    def _take(self, work: List[Work], logits: torch.Tensor) -> list[Sequence]:
        """Book what a forward pass computed, and sample where a sequence has all its tokens computed."""
        for item in work:
            item.sequence.num_computed += item.num_tokens
            self.scheduler.seal(item.sequence)
        ready = [
            (row, sequence)
            for row, item in enumerate(work)
            if item.sequence.num_missing == 0
            for sequence in self._samples(item.sequence)
        ]
        if not ready:
            return []
        rows, sequences = [row for row, _ in ready], [sequence for _, sequence in ready]
        if rows != list(range(logits.shape[0])):
            logits = logits[rows]
        chosen = sample(logits, [sequence.draw() for sequence in sequences])
        now_s = self._clock()
        for sequence, (token, logprobs) in zip(sequences, chosen, strict=True):
            if logprobs is not None:
                sequence.logprobs.append(logprobs)
            if sequence.request.first_token_s is None:
                sequence.request.first_token_s = now_s
            sequence.append(token, self._eos)
            if sequence.finish_reason is not None:
                sequence.finished_s = now_s
                self.scheduler.finish(sequence)
        return sequences

    def _samples(self, sequence: Sequence) -> Iterator[Sequence]:
        """A sequence, and after its prompt all further samples of the same prompt."""
        yield sequence
        request = sequence.request
        for index in range(len(request.sequences), request.params.n):
            child = replace(
                sequence,
                index=index,
                tokens=sequence.tokens[:],
                text=sequence.text.copy(),
                state=State.WAITING,
                num_computed=0,
                num_offered=0,
                pages=[],
                logprobs=[],
            )
            self.branch(sequence, child)
            yield child
