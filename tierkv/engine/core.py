"""One step after the other: schedule, run the model, sample, see who has finished. Tokens in, tokens out."""

import logging
import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Final

import torch

from tierkv.connectors.base import PagedConnector
from tierkv.engine.config import EngineConfig
from tierkv.engine.graphs import GraphFactory
from tierkv.engine.loading import Model
from tierkv.engine.runner import Runner
from tierkv.engine.sampling import sample
from tierkv.engine.scheduler import Scheduler, Work
from tierkv.engine.sequence import Request, Sequence, State
from tierkv.engine.stats import EngineStats
from tierkv.engine.stopwatch import CudaStopwatch, HostStopwatch, Stopwatch
from tierkv.errors import TierError
from tierkv.kernels.pages import copy_pages

log = logging.getLogger("tierkv")

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
        *,
        max_context: int,
        graphs: GraphFactory | None = None,
    ) -> None:
        self._connector, self._eos, self._clock = connector, eos, clock
        self._runner = Runner(model, connector.pool)
        device: torch.device = connector.pool.device
        self._stopwatch: Stopwatch = CudaStopwatch(device) if device.type == "cuda" else HostStopwatch(clock)
        if graphs is not None:
            self._use_graphs(graphs, max_sequences=config.max_sequences, max_context=max_context)
        self.scheduler = Scheduler(
            connector,
            block_tokens=config.block_tokens,
            max_batch_tokens=config.max_batch_tokens,
            max_sequences=config.max_sequences,
            copy_page=lambda source, target: copy_pages(connector.pool, [source], [target]),
            chunk_tokens=config.chunk_tokens,
        )
        self._arrivals = count()
        self._pause = threading.Event()  # never set: an interruptible wait
        self.stats = EngineStats()

    def _use_graphs(self, graphs: GraphFactory, *, max_sequences: int, max_context: int) -> None:
        try:
            self._runner.use_graphs(graphs, max_sequences=max_sequences, max_context=max_context)
        except RuntimeError as error:  # a model that waits for the device, or allocates what is not torch's
            log.warning(
                "decode steps run without CUDA graphs: %s", (str(error).splitlines() or [type(error).__name__])[0]
            )

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
        self._stopwatch.tell()
        self._stopwatch.start()
        try:
            logits = self._runner.run(work)
        except TierError:  # layers of a load were lost on their way to the device
            if self.scheduler.restart(work):
                return []
            raise
        self._stopwatch.stop(partial(self._book, self._alone(work)))
        try:
            sequences = self._take(work, logits)
        except BaseException:
            for item in work:  # whoever got no token computes its last one again, or nobody would plan it any more
                item.sequence.num_computed = min(item.sequence.num_computed, len(item.sequence.tokens) - 1)
            raise
        self.stats.steps += 1
        self.stats.tokens += sum(item.num_tokens for item in work)
        self.stats.graph_steps = self._runner.num_replays
        self.stats.step_s += self._clock() - started_s
        return sequences

    @staticmethod
    def _alone(work: List[Work]) -> tuple[int, int] | None:
        """Tokens and context of a prompt that has a step to itself and waits for no layers: the time is all its own."""
        if len(work) > 1 or work[0].num_tokens < _PREFILL_TOKENS or work[0].sequence.rest is not None:
            return None
        return work[0].num_tokens, work[0].sequence.num_computed

    def _book(self, alone: tuple[int, int] | None, model_s: float) -> None:
        self.stats.model_s += model_s
        if alone:
            self._connector.computed(num_tokens=alone[0], context_tokens=alone[1], seconds=model_s)

    def drain(self) -> None:
        """Wait until nothing moves."""
        while transfers := self.scheduler.transfers():
            wait(transfers, timeout=_WAIT_S)
            self._poll()
            self.scheduler.settle()

    def close(self) -> None:
        """Wait until nothing moves, and give the memory of recorded steps back; no step follows."""
        self.drain()
        self._runner.graphs = None  # it refers to the runner, so that nobody else would let go of either

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
            item.sequence.rest = None  # every layer has waited for its part
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
            logits = logits.index_select(0, torch.tensor(rows).to(logits.device, non_blocking=True))
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
