"""A request and its sequences: what is known of each, and where in its life it is.

waiting ─match─▶ loading ─▶ running ─▶ finished
   ▲                           │
   └──────── suspended ◀───────┘  pre-empted: its KV moves to the host
"""

from array import array
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum, auto

from tierkv.arrival import Arrival
from tierkv.connectors.base import Hit
from tierkv.engine.sampling import Draw, SamplingParams, TokenLogprobs
from tierkv.engine.stats import RequestStats
from tierkv.engine.text import TextStream
from tierkv.hints import NO_ENDING, NO_HINTS, Ending, Hints


class State(Enum):
    """Where a sequence is; which queue of the scheduler holds it."""

    WAITING = auto()
    LOADING = auto()
    RUNNING = auto()
    SUSPENDED = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Request:
    """What was asked for, and what all its samples share."""

    id: str
    params: SamplingParams
    prompt_tokens: int
    seed: int
    token_limit: int
    added_s: float
    hints: Hints = NO_HINTS
    sequences: "list[Sequence]" = field(default_factory=list)
    started_s: float | None = None
    first_token_s: float | None = None
    sources: Mapping[str, int] | None = None
    preemptions: int = 0

    @property
    def is_finished(self) -> bool:
        """All samples are."""
        return all(sequence.state is State.FINISHED for sequence in self.sequences)

    def stats(self, now_s: float) -> RequestStats:
        """What it cost; `now_s` stands in for what has not come to pass."""
        first = self.sequences[0]
        first_token_s = now_s if self.first_token_s is None else self.first_token_s
        tokens = len(first.tokens) - self.prompt_tokens
        ended_s = now_s if first.finished_s is None else first.finished_s
        return RequestStats(
            prompt_tokens=self.prompt_tokens,
            output_tokens=sum(len(sequence.tokens) - self.prompt_tokens for sequence in self.sequences),
            sources=self.sources or {},
            queue_s=(now_s if self.started_s is None else self.started_s) - self.added_s,
            ttft_s=first_token_s - self.added_s,
            tpot_s=(ended_s - first_token_s) / (tokens - 1) if tokens > 1 else None,
            preemptions=self.preemptions,
        )


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of a request.

    id: what connectors know it by; unique.  arrival: its rank; the youngest is pre-empted first.  tokens: prompt and output.
    num_computed: tokens whose KV is in `pages`; the last token has none while it is decoding.  num_offered: full blocks
    the store has seen.  reuse: tokens whose KV the store may give; None: all.  hit, load: of the match under way.  rest: layers
    of the load that come while it runs.
    """

    id: str
    request: Request
    index: int
    arrival: int
    tokens: "array[int]"
    text: TextStream
    state: State = State.WAITING
    num_computed: int = 0
    num_offered: int = 0
    reuse: int | None = None
    pages: list[int] = field(default_factory=list)
    hit: Hit | None = None
    load: "Future[int] | None" = None
    rest: Arrival | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    finished_s: float | None = None
    num_delivered: int = 0

    @property
    def num_missing(self) -> int:
        """Tokens whose KV is still to be computed: 1 while decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def output(self) -> "array[int]":
        """Tokens after the prompt."""
        return self.tokens[self.request.prompt_tokens :]

    @property
    def ending(self) -> Ending:
        """What a store may know of its end: nothing of one that was aborted."""
        done = self.finish_reason in ("stop", "length")
        return Ending(output_tokens=len(self.tokens) - self.request.prompt_tokens) if done else NO_ENDING

    def draw(self) -> Draw:
        """How its next token is sampled."""
        return Draw(self.request.params, self.request.seed, self.index, len(self.tokens) - self.request.prompt_tokens)

    def append(self, token: int, eos: frozenset[int]) -> None:
        """Take the next token and see whether it is the last."""
        self.tokens.append(token)
        params = self.request.params
        if token in params.stop_token_ids or (token in eos and not params.ignore_eos):
            self._end("stop", token)  # its own text is not part of the sample's
        elif self.text.feed(token):
            self._end("stop", self.text.stopped_by)
        elif len(self.tokens) >= self.request.token_limit:
            self._end("length", None)

    def _end(self, reason: str, stop: str | int | None) -> None:
        self.finish_reason, self.stop_reason = reason, stop
        if self.text.flush() and self.text.stopped_by is not None:
            self.finish_reason, self.stop_reason = "stop", self.text.stopped_by
