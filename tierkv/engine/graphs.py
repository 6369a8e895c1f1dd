"""Decode steps recorded once and replayed: the host then makes one launch for a step instead of hundreds.

A graph reads fixed memory and does a fixed number of things. So there is one per *bucket*, a number of sequences: rows past
those that decode have no tokens, a length of zero, and slots that nothing is written to. What changes from step to step is
rewritten before each replay: tokens, positions, slots, lengths, bounds, block tables, and the plans of the attention.
"""

from collections.abc import Callable
from collections.abc import Sequence as List
from typing import Any, Final, NamedTuple, Protocol

import torch

from tierkv.engine.packing import Inputs, Packer, batch_of, columns, fields
from tierkv.engine.scheduler import Work
from tierkv.engine.staging import Array, Field, Link, Staging, aligned
from tierkv.kernels.batch import PagedBatch, Span

_STEP: Final = 8
_WORD: Final = 4

Tensor = torch.Tensor
Forward = Callable[[Inputs[Tensor], PagedBatch, Tensor], Tensor]
MakePlan = Callable[[list[Span]], Array]


class Graph(Protocol):
    """One recorded step."""

    def record(self, run: Callable[[], object]) -> None:
        """Run a step for the record. Raises RuntimeError where it cannot be recorded."""

    def replay(self) -> None:
        """Do it again, with what now lies in the memory that it reads."""


GraphFactory = Callable[[], Graph]
"""Makes graphs that may share their memory: no two are replayed at a time."""


class CudaGraphs:
    """Makes graphs of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self) -> "CudaGraph":
        """Make one."""
        return CudaGraph(self._device, self._pool)


class CudaGraph:
    """`torch.cuda.CUDAGraph`."""

    def __init__(self, device: torch.device, pool: Any) -> None:  # Any: torch's handle has no public type
        self._device, self._pool = device, pool
        self._graph = torch.cuda.CUDAGraph()

    def record(self, run: Callable[[], object]) -> None:
        """Run a step for the record, on a stream of torch's."""
        with torch.cuda.device(self._device):
            self._try(run)
            # thread_local: the mover's threads pin memory and copy meanwhile, which is nothing to the record.
            with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
                run()

    @staticmethod
    def _try(run: Callable[[], object]) -> None:
        """Raise RuntimeError for a step that waits for the device.

        In a record that would fail too, but then torch's allocator believes for ever that a record is under way.
        """
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def replay(self) -> None:
        """Queue it on torch's current stream."""
        self._graph.replay()


class RecordedPlans:
    """What the attention's launches of one graph read: made on the host from the lengths, before each replay.

    spans: of the step that is recorded.  memory: int32, where the plans shall lie; None, a first time, to see how much it is.
    """

    def __init__(self, spans: list[Span], memory: Tensor | None) -> None:
        self._spans, self._memory = spans, memory
        self._made: list[tuple[MakePlan, int, int]] = []
        self.num_words = 0

    def place(self, make: MakePlan, device: torch.device) -> Tensor:
        """Memory for a plan; what lies in it comes with `fill`."""
        words = make(self._spans)
        first, self.num_words = self.num_words, self.num_words + aligned(len(words) * _WORD) // _WORD
        self._made.append((make, first, len(words)))
        if self._memory is None:
            return torch.from_numpy(words).to(device, non_blocking=True)
        return self._memory[first : first + len(words)]

    def fill(self, spans: list[Span], into: Array) -> None:
        """Write the plans of these sequences to the host's twin of `memory`."""
        for make, first, count in self._made:
            into[first : first + count] = make(spans)


def buckets(most: int) -> list[int]:
    """Numbers of sequences that have a graph: 1, 2, 4, 8, then every eighth, and `most` itself."""
    return [size for size in (1, 2, 4, *range(_STEP, most, _STEP)) if size < most] + [most]


class _Recorded(NamedTuple):
    """The graph of a bucket; spans: of the step at hand, for a graph whose host computes it."""

    graph: Graph
    plans: RecordedPlans
    spans: list[Span]


class DecodeGraphs:
    """Replays steps in which every sequence has one token: at most `max_sequences` of at most `max_context` tokens."""

    def __init__(
        self,
        forward: Forward,
        packer: Packer,
        pool: Tensor,
        make_graph: GraphFactory,
        *,
        max_sequences: int,
        max_context: int,
        link: Link | None = None,
    ) -> None:
        self._forward, self._packer, self._device, self._make_graph = forward, packer, pool.device, make_graph
        self._link = link
        self._sizes, self._width = buckets(max_sequences), columns(max_context, pool.shape[4])
        self._tables = torch.zeros((max_sequences + 1, self._width), dtype=torch.int32, device=pool.device)
        self._last = torch.arange(max_sequences, device=pool.device)
        self._scratch: list[Tensor] = []
        self._recorded: dict[int, _Recorded] = {}

    def record(self) -> None:
        """Record every bucket, the largest first: its memory is room for all others. Raises RuntimeError."""
        largest, num_words, num_bytes = self._sizes[-1], {}, 1
        for size in reversed(self._sizes):  # what is compiled or allocated at first use must not be in a record
            plans = RecordedPlans(_one_token_each(size), None)
            inputs, _ = self._lay(Staging(self._device, link=self._link), size, 0)
            logits = self._compute(size, inputs, _one_token_each(size), plans)
            if size == largest:
                self._logits = torch.empty_like(logits)
            num_words[size] = plans.num_words
            worst = self._fields(size, plans.num_words, rows=size, width=self._width)
            num_bytes = max(num_bytes, Staging.num_bytes(worst))
        self._staging = Staging(
            self._device, num_bytes=num_bytes, link=self._link
        )  # never outgrown: graphs know its address
        for size in reversed(self._sizes):
            self._record(size, num_words[size])

    def _record(self, size: int, num_words: int) -> None:
        spans = _one_token_each(size)
        inputs, memory = self._lay(self._staging, size, num_words)
        plans, graph = RecordedPlans(list(spans), memory), self._make_graph()
        graph.record(lambda: self._logits[:size].copy_(self._compute(size, inputs, spans, plans)))
        self._recorded[size] = _Recorded(graph, plans, spans)

    def _compute(self, size: int, inputs: Inputs[Tensor], spans: list[Span], plans: RecordedPlans) -> Tensor:
        return self._forward(inputs, batch_of(inputs, spans, scratch=self._scratch, plans=plans), self._last[:size])

    def takes(self, work: List[Work]) -> bool:
        """Whether a step is one of those that were recorded."""
        return len(work) <= self._sizes[-1] and all(item.num_tokens == 1 for item in work)

    def run(self, work: List[Work]) -> Tensor:
        """Compute such a step; logits [len(work), vocabulary], good until the next call."""
        count = len(work)
        size = next(size for size in self._sizes if size >= count)
        graph, plans, held = self._recorded[size]
        laid = self._staging.lay(self._fields(size, plans.num_words, rows=count, width=self._packer.width(work)))
        *arrays, words, tables = laid.host
        inputs: Inputs[Array] = Inputs._make([*arrays, tables])
        held[:] = self._packer.fill(work, inputs)
        _idle(inputs, count)
        plans.fill(held, words)
        self._staging.send()
        fresh = laid.device[-1]
        self._staging.copy(self._tables[:count, : fresh.shape[1]], fresh)
        graph.replay()
        return self._logits[:count]

    def _lay(self, staging: Staging, size: int, num_words: int) -> tuple[Inputs[Tensor], Tensor]:
        """What a graph reads, and the memory of its plans; now it says that every sequence has one token, kept nowhere."""
        laid = staging.lay(self._fields(size, num_words, rows=0, width=0))
        inputs: Inputs[Array] = Inputs._make([*laid.host[:5], laid.host[6]])
        _idle(inputs, 0)
        inputs.lengths[:size] = 1
        inputs.bounds[:-1] = range(size + 1)
        inputs.bounds[-1] = size
        staging.send()
        return Inputs._make([*laid.device[:5], self._tables[: size + 1]]), laid.device[5]

    def _fields(self, size: int, num_words: int, *, rows: int, width: int) -> list[Field]:
        """Tables last, for only as much as is used is sent, and copied to where the graph reads it."""
        *each, _ = fields(num_sequences=size + 1, num_tokens=size, width=0)
        return [*each, ("int32", (num_words,)), ("int32", (rows, width))]


def _one_token_each(count: int) -> list[Span]:
    return [(row, row + 1, 1) for row in range(count)]


def _idle(inputs: Inputs[Array], count: int) -> None:
    """Let the rows past `count` sequences do nothing."""
    inputs.tokens[count:] = 0
    inputs.positions[count:] = 0
    inputs.slots[count:] = -1
    inputs.lengths[count:] = 0
    inputs.bounds[count:] = count
