"""What a request cost, and what the engine did with its time."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RequestStats:
    """Of one finished request. Seconds.

    sources: prompt tokens by where their KV came from, "computed" included; the sum is prompt_tokens.
    queue_s: until its first token was scheduled.  ttft_s: until its first output token, queueing included.
    tpot_s: mean time per output token after the first, of its first sample; None with one token.
    """

    prompt_tokens: int
    output_tokens: int
    sources: Mapping[str, int]
    queue_s: float
    ttft_s: float
    tpot_s: float | None
    preemptions: int


@dataclass(slots=True)
class EngineStats:
    """Since the engine started.

    step_s: time of steps that computed something.  model_s: the model's share of it; on a GPU as its own clock tells, a step
    or two late.  graph_steps: those of `steps` that were replayed from a CUDA graph.
    """

    steps: int = 0
    graph_steps: int = 0
    tokens: int = 0
    step_s: float = 0.0
    model_s: float = 0.0
    preemptions: int = 0
    blocks_loaded: int = 0
    blocks_saved: int = 0
    blocks_failed: int = 0
    sources: dict[str, int] = field(default_factory=dict)

    @property
    def other_share(self) -> float:
        """Part of a step spent outside the model and its attention."""
        return 1 - self.model_s / self.step_s if self.step_s else 0.0
