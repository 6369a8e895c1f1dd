"""What an engine hands out: pieces while a request runs, and all of it at the end."""

from dataclasses import dataclass

from tierkv.engine.sampling import TokenLogprobs
from tierkv.engine.sequence import Sequence
from tierkv.engine.stats import RequestStats


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What is new of one sample of a request.

    text: whole characters, and never a part of a stop string; may be empty for a while.  finish_reason: "stop" or
    "length", once.  stop_reason: the stop string or token id.  stats: on the last output of the request, None before.
    """

    request: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    stats: RequestStats | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished sample. token_ids holds all that was sampled, a final stop token too; text stops before it.

    finish_reason: "stop", "length", or "abort" when somebody aborted the request meanwhile.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """A finished request. The shortcuts are those of its first sample."""

    request: str
    prompt_tokens: int
    samples: tuple[Sample, ...]
    stats: RequestStats

    @property
    def text(self) -> str:
        """Text of the first sample."""
        return self.samples[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of the first sample."""
        return self.samples[0].token_ids

    @property
    def finish_reason(self) -> str:
        """Why the first sample ended."""
        return self.samples[0].finish_reason


def piece_of(sequence: Sequence, stats: RequestStats | None) -> RequestOutput:
    """What has not been handed out of a sequence yet; it is, after this."""
    output = sequence.output
    since, sequence.num_delivered = sequence.num_delivered, len(output)
    return RequestOutput(
        request=sequence.request.id,
        index=sequence.index,
        token_ids=tuple(output[since:]),
        text=sequence.text.take(),
        logprobs=tuple(sequence.logprobs[since:]),
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        stats=stats,
    )


def sample_of(sequence: Sequence) -> Sample:
    """All of a finished sequence."""
    return Sample(
        token_ids=tuple(sequence.output),
        text=sequence.text.text,
        finish_reason=sequence.finish_reason or "abort",
        stop_reason=sequence.stop_reason,
        logprobs=tuple(sequence.logprobs),
    )
