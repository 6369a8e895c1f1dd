"""From logits to a token: greedy, temperature, top-k, top-p, min-p, and log-probabilities.

Random numbers are counted, not drawn from a stream: token number `position` of sample `index` under `seed` always meets
the same one. So a request's tokens do not depend on what else is in the batch, on pre-emption, or on who forked whom.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from tierkv.errors import RequestError

MAX_LOGPROBS: Final = 1000
_FIRST_TOP: Final = 1024  # candidates tried before a whole vocabulary is sorted: 20x cheaper where they suffice


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled; applied in the order temperature, top_k, top_p, min_p. The default is greedy.

    max_tokens: output tokens; the end of the context may come first.  n: samples of the same prompt, computed once.
    seed: None takes one from the engine's.  stop: strings that end the output and are not part of its text.
    stop_token_ids: tokens that do, besides the model's own; ignore_eos: the model's own do not.
    logprobs: report the sampled token and this many likeliest, from the unmodified distribution.
    Raises RequestError on values that cannot be.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    stop_strings: tuple[str, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, 1)
        _check_int("n", self.n, 1)
        if self.top_k is not None:
            _check_int("top_k", self.top_k, 1)
        if self.seed is not None:
            _check_int("seed", self.seed, 0)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0)
            if self.logprobs > MAX_LOGPROBS:
                raise RequestError(f"logprobs={self.logprobs}: give at most {MAX_LOGPROBS}")
        _check_range("temperature", self.temperature, 0.0, math.inf, "a finite number of at least 0 (0 is greedy)")
        _check_range("top_p", self.top_p, 0.0, 1.0, "above 0 and at most 1")
        if self.top_p == 0:
            raise RequestError("top_p=0: must be above 0 and at most 1; for the likeliest token set temperature=0")
        _check_range("min_p", self.min_p, 0.0, 1.0, "between 0 and 1")
        if self.n > 1 and self.temperature == 0:
            raise RequestError(f"n={self.n} with temperature=0: all samples would be the same; set a temperature")
        strings = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(text, str) and text for text in strings):
            raise RequestError(f"stop={self.stop!r}: must be non-empty strings")
        object.__setattr__(self, "stop_strings", strings)
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, 0)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one output position: of the sampled token, and of the likeliest, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Draw:
    """Whose next token: how it is sampled, and which random number it meets."""

    params: SamplingParams
    seed: int
    index: int
    position: int


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[tuple[int, TokenLogprobs | None]]:
    """Choose one token per row. logits: [len(draws), vocabulary], any float dtype."""
    logits = logits.float()
    tokens = logits.argmax(dim=-1).tolist()
    for row, draw in enumerate(draws):
        if draw.params.temperature > 0:
            tokens[row] = _sample_row(logits[row], draw)
    return [
        (token, None if draw.params.logprobs is None else _logprobs(logits[row], token, draw.params.logprobs))
        for row, (token, draw) in enumerate(zip(tokens, draws, strict=True))
    ]


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1), the same for the same three numbers on every machine."""
    digest = hashlib.blake2b(f"{seed},{index},{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def derived_seed(seed: int, name: str) -> int:
    """A seed for somebody called `name` who was given none."""
    return int.from_bytes(hashlib.blake2b(f"{seed},{name}".encode(), digest_size=8).digest(), "little")


def _sample_row(logits: torch.Tensor, draw: Draw) -> int:
    params = draw.params
    if params.top_k is None and params.top_p == 1 and params.min_p == 0:
        probabilities = torch.softmax(logits.double() / params.temperature, dim=-1)
        return _invert(probabilities, None, draw)
    scaled = logits.double() / params.temperature
    probabilities, tokens = _leading(scaled, params)
    if params.top_p < 1:
        before = probabilities.cumsum(0) - probabilities
        probabilities = probabilities[before < params.top_p]
    if params.min_p > 0:
        probabilities = probabilities[probabilities >= params.min_p * probabilities[0]]
    return _invert(probabilities, tokens, draw)


def _leading(scaled: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and tokens, likeliest first, as far as top_k, top_p and min_p can reach."""
    size = scaled.shape[0]
    if params.top_k is not None:
        values, tokens = torch.topk(scaled, min(params.top_k, size))
        return torch.softmax(values, dim=-1), tokens
    total = torch.logsumexp(scaled, dim=-1)
    values, tokens = torch.topk(scaled, min(_FIRST_TOP, size))
    probabilities = torch.exp(values - total)
    reached = float(probabilities.sum()) >= params.top_p if params.top_p < 1 else False
    reached = reached or bool(probabilities[-1] < params.min_p * probabilities[0])
    if not reached:
        values, tokens = torch.sort(scaled, descending=True)
        probabilities = torch.exp(values - total)
    return probabilities, tokens


def _invert(probabilities: torch.Tensor, tokens: torch.Tensor | None, draw: Draw) -> int:
    """The token at which the cumulated probability passes the draw's random number."""
    cumulated = probabilities.cumsum(0)
    target = uniform(draw.seed, draw.index, draw.position) * float(cumulated[-1])
    place = int(
        torch.searchsorted(cumulated, torch.tensor(target, dtype=cumulated.dtype, device=cumulated.device), right=True)
    )
    place = min(place, cumulated.shape[0] - 1)
    return place if tokens is None else int(tokens[place])


def _logprobs(logits: torch.Tensor, token: int, count: int) -> TokenLogprobs:
    total = torch.logsumexp(logits, dim=-1)
    chosen = float(logits[token] - total)
    if count == 0:
        return TokenLogprobs(token, chosen)
    values, tokens = torch.topk(logits, min(count, logits.shape[0]))
    return TokenLogprobs(token, chosen, tuple(zip(tokens.tolist(), (values - total).tolist(), strict=True)))


def _check_int(name: str, value: Any, least: int) -> None:  # Any: the caller's input, checked here
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RequestError(f"{name}={value!r}: must be an integer of at least {least}")


def _check_range(name: str, value: Any, least: float, most: float, said: str) -> None:  # Any: as above
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not least <= value <= most:
        raise RequestError(f"{name}={value!r}: must be {said}")
