"""The engine: prompts in, text out. Takes requests, hands out what they produce; `Core` does the steps between."""

import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as List
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Final

import torch

from tierkv.connectors.base import PagedConnector
from tierkv.engine import loading, memory
from tierkv.engine.config import EngineConfig
from tierkv.engine.core import Core
from tierkv.engine.graphs import CudaGraphs, GraphFactory
from tierkv.engine.output import Output, RequestOutput, piece_of, sample_of
from tierkv.engine.pages import PrivatePages
from tierkv.engine.probe import attach
from tierkv.engine.rows import use_rows
from tierkv.engine.sampling import SamplingParams, derived_seed
from tierkv.engine.sequence import Request, Sequence, State
from tierkv.engine.stats import EngineStats, RequestStats
from tierkv.engine.text import TextStream
from tierkv.errors import ConfigError, RequestError, TokensError
from tierkv.hints import NO_HINTS, Ending, Hints, Next
from tierkv.keys import token_bytes
from tierkv.layout import Layout
from tierkv.metrics import Metrics

Prompt = str | List[int]
Message = Mapping[str, str]
ConnectorFactory = Callable[[Layout, torch.device, str], PagedConnector]

_DEFAULT_POOL_BYTES: Final = 1 << 30


class Engine:
    """A causal language model on paged attention, with continuous batching. One thread.

    model: a transformers causal LM, which from now on runs on pages only.  tokenizer: None when prompts are token ids.
    connector: makes what owns the pages, given layout, device and model identity; None keeps nothing between requests.
    metrics: where times to tokens and computed tokens are counted.  clock: seconds, for statistics only.
    graphs: what records decode steps, unless the configuration says off; None: CUDA graphs on a GPU, nothing on a CPU.
    Raises ModelError for models that cannot run on pages, ConfigError for a configuration that cannot work.
    """

    def __init__(
        self,
        model: loading.Model,
        tokenizer: loading.Tokenizer | None = None,
        config: EngineConfig | None = None,
        *,
        connector: ConnectorFactory | None = None,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.perf_counter,
        graphs: GraphFactory | None = None,
    ) -> None:
        self.config = config = config or EngineConfig()
        self.tokenizer, self.metrics, self._clock = tokenizer, metrics or Metrics(), clock
        self.device = loading.check_device(config)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.layout = loading.layout_of(model, block_tokens=config.block_tokens)
        self._limit_context(loading.max_context(model))
        attach(model, self.layout, self.device)
        use_rows(model)
        if connector is None:
            self.connector: PagedConnector = PrivatePages(self.layout, self.device, num_pages=self._num_pages(model))
        else:
            self.connector = connector(self.layout, self.device, loading.identity(model))
        self._pool_tokens = self.connector.pool.shape[0] * self.layout.block_tokens
        self._vocabulary: int = model.config.get_text_config().vocab_size
        if config.cuda_graphs == "off":
            graphs = None
        elif graphs is None and self.device.type == "cuda":
            graphs = CudaGraphs(self.device)
        eos = loading.eos_tokens(model, tokenizer)
        self._core = Core(model, self.connector, config, eos, clock, max_context=self.max_context, graphs=graphs)
        self._requests: dict[str, Request] = {}
        self._outputs: dict[str, list[RequestOutput]] = {}
        self._claimed: set[str] = set()  # by generate and stream: their outputs are not step's to hand out
        self._numbers = count()
        self._is_closed = False

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        config: EngineConfig | None = None,
        *,
        connector: ConnectorFactory | None = None,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> "Engine":
        """Load "smollm2", a .gguf file, a transformers folder or a name from the local hub cache."""
        config = config or EngineConfig()
        loading.check_device(config)
        model, tokenizer = loading.load(name, config)
        return cls(model, tokenizer, config, connector=connector, metrics=metrics, clock=clock)

    @property
    def stats(self) -> EngineStats:
        """Of all steps so far."""
        return self._core.stats

    def _num_pages(self, model: loading.Model) -> int:
        if self.config.num_pages is not None:
            return self.config.num_pages
        pool_bytes = self.config.pool_bytes or _DEFAULT_POOL_BYTES
        if self.config.pool_bytes is None and self.device.type == "cuda":
            pool_bytes = memory.pool_bytes(model, self.layout, self.device, self.config)
        if pool_bytes < self.layout.block_bytes:
            raise ConfigError(
                f"engine pool_bytes={pool_bytes:,}: less than one page of this model; give at least {self.layout.block_bytes:,}"
            )
        return pool_bytes // self.layout.block_bytes

    def _limit_context(self, own: int | None) -> None:
        given = self.config.max_context
        if given is not None and own is not None and given > own:
            raise ConfigError(f"engine max_context={given}: this model was made for {own} tokens; give at most that")
        limit = given or own
        if limit is None:
            raise ConfigError("engine max_context: this model names no limit of its own; give one")
        self.max_context: int = limit

    # -- requests -----------------------------------------------------------------------------------------------------

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        hints: Hints = NO_HINTS,
        await_prefix_s: float | None = None,
        reuse_tokens: int | None = None,
    ) -> str:
        """Queue a prompt, text or token ids; `step` brings its output. Raises RequestError if it can never be served.

        hints: what the caller knows of it that its tokens do not show; they change what is forgotten first, no token.
        await_prefix_s: another engine is computing this prompt: its KV is waited for so many seconds at most. What has not come
        by then is computed here.
        reuse_tokens: of what is held of this prompt, take so many leading tokens at most and compute the rest anew; None: all.
        """
        params = params or SamplingParams()
        tokens = self._tokens(prompt)
        name = self._name(request_id, "request")
        self._check(tokens, params)
        seed = derived_seed(self.config.seed, name) if params.seed is None else params.seed
        limit = min(len(tokens) + params.max_tokens, self.max_context, self._pool_tokens)
        request = self._requests[name] = Request(name, params, len(tokens), seed, limit, self._clock(), hints)
        text = TextStream(self.tokenizer, params.stop_strings, skip_special_tokens=params.skip_special_tokens)
        sequence = Sequence(name, request, 0, 0, tokens, text, reuse=reuse_tokens)
        self._core.start(request, sequence)
        if await_prefix_s is not None:
            self.connector.await_prefix(sequence.id, tokens[:-1].tobytes(), deadline_s=await_prefix_s)
        return name

    def fork(self, request_id: str, params: SamplingParams | None = None, *, child_id: str | None = None) -> str:
        """Let a second request go on from where an unfinished one is (its first sample), sharing its pages.

        params: of the child; the same as the parent's when None. Its random numbers differ unless params name a seed.
        """
        parent = self._requests.get(request_id)
        if parent is None or parent.sequences[0].state is State.FINISHED:
            raise RequestError(f"request {request_id!r} is unknown or finished: fork one that is under way")
        first = parent.sequences[0]
        name = self._name(child_id, f"{request_id}-fork")
        own = replace(params or parent.params, n=1)
        seed = derived_seed(parent.seed, name) if params is None or params.seed is None else params.seed
        limit = min(parent.prompt_tokens + own.max_tokens, parent.token_limit if params is None else self.max_context)
        limit = max(limit, len(first.tokens) + 1)
        request = Request(name, own, parent.prompt_tokens, seed, limit, self._clock(), parent.hints)
        request.sources, request.started_s = parent.sources, parent.started_s
        child = Sequence(name, request, 0, 0, first.tokens[:], first.text.copy(), logprobs=list(first.logprobs))
        child.num_delivered = len(first.output)
        self._requests[name] = request
        self._core.branch(first, child)
        return name

    def abort(self, request_id: str) -> None:
        """End a request without further output; unknown and finished ones are fine."""
        request = self._requests.pop(request_id, None)
        self._outputs.pop(request_id, None)
        for sequence in request.sequences if request else ():
            self._core.abort(sequence)

    def follow(self, session: str, ending: Ending) -> None:
        """Say what comes after the last finished request of a session (`Hints.session`): a tool's result, a person's turn.

        It changes what is forgotten first; for sessions that nobody knows, or knows any more, nothing.
        """
        self.connector.follow(session, ending)

    def end_session(self, session: str) -> None:
        """Say that nothing more comes of a session."""
        self.follow(session, Ending(Next.ENDED))

    # -- output -------------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Compute one step, or wait a moment for transfers; returns what has become known, oldest request first."""
        self._advance()
        ready = [request for request in self._outputs if request not in self._claimed]
        return [output for request in ready for output in self._outputs.pop(request)]

    @property
    def has_work(self) -> bool:
        """Some request is unfinished, or has output nobody took."""
        return bool(self._requests) or any(request not in self._claimed for request in self._outputs)

    def generate(
        self,
        prompts: Prompt | List[Prompt],
        params: SamplingParams | List[SamplingParams] | None = None,
        *,
        hints: Hints | List[Hints] = NO_HINTS,
    ) -> list[Output]:
        """Run a batch of prompts to their ends; outputs in the same order. One prompt is a batch of one.

        params, hints: of all, or one for each.

        An exception, Ctrl-C too, aborts these requests and no others.
        """
        batch: list[Prompt] = [prompts] if _is_prompt(prompts) else list(prompts)  # type: ignore[arg-type, list-item]  # told apart there
        each = list(params) if isinstance(params, List) else [params or SamplingParams()] * len(batch)
        told = list(hints) if isinstance(hints, List) else [hints] * len(batch)
        for what, given in (("sampling parameters", each), ("hints", told)):
            if len(given) != len(batch):
                raise RequestError(f"{len(given)} {what} for {len(batch)} prompts: give one for all, or one for each")
        ids: list[str] = []
        try:
            for prompt, own, hint in zip(batch, each, told, strict=True):
                ids.append(self.add(prompt, own, hints=hint))
                self._claimed.add(ids[-1])
            requests = [self._requests[request] for request in ids]
            while not all(request.is_finished for request in requests):
                self._advance()
            return [self._output(request) for request in requests]
        finally:
            self._disclaim(ids)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, hints: Hints = NO_HINTS
    ) -> Iterator[RequestOutput]:
        """Yield output as it comes, the last piece with `stats`. Leaving the loop early aborts the request."""
        params = params or SamplingParams()
        tokens = self._tokens(prompt)
        self._check(tokens, params)  # now, not at the first piece
        return self._stream(tokens, params, hints)

    def _stream(self, tokens: "array[int]", params: SamplingParams, hints: Hints) -> Iterator[RequestOutput]:
        request = self.add(
            tokens, params, hints=hints
        )  # only now: a stream that nobody reads must leave nothing behind
        self._claimed.add(request)
        try:
            finished = False
            while not finished:
                for output in self._outputs.pop(request, ()):
                    finished = finished or output.stats is not None
                    yield output
                if not finished and request not in self._outputs:
                    if request not in self._requests:
                        return  # aborted by its id
                    self._advance()
        finally:
            self._disclaim([request])

    def chat(
        self, messages: List[Mapping[str, str]], params: SamplingParams | None = None, *, hints: Hints = NO_HINTS
    ) -> Output:
        """Answer a conversation of {"role", "content"} messages."""
        return self.generate([self.chat_prompt(messages)], params, hints=hints)[0]

    def chat_prompt(self, messages: List[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation, by the model's chat template: for `add`, `stream` and `generate`."""
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise RequestError(
                "this model has no chat template: render the conversation yourself and give it as a prompt"
            )
        text = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        for sequence in self._core.advance():
            request = sequence.request
            stats = request.stats(self._clock()) if request.is_finished else None
            self._outputs.setdefault(request.id, []).append(piece_of(sequence, stats))
            if stats is not None:
                self._requests.pop(request.id, None)
                self._count(stats)

    def _count(self, stats: RequestStats) -> None:
        self.metrics.ttft_seconds.observe(stats.ttft_s)
        if stats.tpot_s is not None:
            self.metrics.tpot_seconds.observe(stats.tpot_s)
        self.stats.preemptions += stats.preemptions
        for source, num_tokens in stats.sources.items():
            if source == "computed":
                self.metrics.tokens_missed.add(num_tokens)
            else:
                self.metrics.tokens_hit.add(num_tokens, source)
            self.stats.sources[source] = self.stats.sources.get(source, 0) + num_tokens

    def _output(self, request: Request) -> Output:
        samples = tuple(sample_of(sequence) for sequence in request.sequences)
        return Output(request.id, request.prompt_tokens, samples, request.stats(self._clock()))

    def _disclaim(self, requests: List[str]) -> None:
        for request in requests:
            self.abort(request)
            self._claimed.discard(request)

    def _name(self, given: str | None, stem: str) -> str:
        if self._is_closed:
            raise RequestError("the engine is closed: make another")
        if given in self._requests or given in self._outputs:
            raise RequestError(f"request id {given!r} is in use: give another, or none")
        return given or next(name for number in self._numbers if (name := f"{stem}-{number}") not in self._requests)

    def _tokens(self, prompt: Prompt) -> "array[int]":
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("this model has no tokenizer: give the prompt as token ids")
            prompt = self.tokenizer(prompt, verbose=False).input_ids  # too long is ours to say, in one line
        try:
            return array("i", token_bytes(prompt))
        except TokensError as error:
            raise RequestError(f"prompt: {error}") from error

    def _check(self, tokens: "array[int]", params: SamplingParams) -> None:
        if not tokens:
            raise RequestError("empty prompt: give at least one token, such as the model's first-of-text token")
        if not 0 <= min(tokens) <= max(tokens) < self._vocabulary:
            raise RequestError(f"prompt: token ids must be from 0 to {self._vocabulary - 1}, the model's vocabulary")
        if len(tokens) >= self.max_context:
            raise RequestError(
                f"prompt of {len(tokens)} tokens: the context holds {self.max_context}, output included; shorten the prompt"
            )
        if len(tokens) >= self._pool_tokens:
            raise RequestError(
                f"prompt of {len(tokens)} tokens: the page pool holds {self._pool_tokens}; shorten the prompt or enlarge the pool"
            )
        if params.n > self.config.max_sequences:
            raise RequestError(
                f"n={params.n}: the engine runs {self.config.max_sequences} sequences at a time; ask for fewer"
            )
        if params.stop_strings and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this model has none: give stop_token_ids")

    # -- end ----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Abort what is under way and wait for its transfers. The connector stays its owner's to close. Idempotent."""
        self._is_closed = True
        for request in list(self._requests):
            self.abort(request)
        self._outputs.clear()
        self._core.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_prompt(prompts: Prompt | List[Prompt]) -> bool:
    """One prompt, not several: text, or a flat row of ids. An empty list is a batch of none."""
    return isinstance(prompts, str) or (
        len(prompts) > 0 and not isinstance(prompts[0], str | List) and not hasattr(prompts[0], "shape")
    )
