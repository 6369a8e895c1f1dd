"""From logits to a token: greedy, temperature, top-k, top-p, min-p, and log-probabilities.

Random numbers are counted, not drawn from a stream: token number `position` of sample `index` under `seed` always meets
the same one. So a request's tokens do not depend on what else is in the batch, on pre-emption, or on who forked whom.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

import torch

from tierkv.errors import RequestError

Tensor = torch.Tensor

MAX_LOGPROBS: Final = 1000
_FIRST_TOP: Final = 1024  # candidates tried first: a whole vocabulary costs 20x as much to sort
_MORE: Final = 16  # times as many where they were too few
_CACHED: Final = 1 << 16  # logits worked on at a time on a CPU


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


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[tuple[int, TokenLogprobs | None]]:
    """Choose one token per row, with one transfer to the host. logits: [len(draws), vocabulary], any float dtype.

    Tokens of equal logits rank by their ids, so that a row's token depends neither on its neighbours nor on the device.
    """
    return _sample(logits, draws, _FIRST_TOP)


def _sample(logits: Tensor, draws: Sequence[Draw], num_candidates: int) -> list[tuple[int, TokenLogprobs | None]]:
    params = [draw.params for draw in draws]
    greedy = [row for row, own in enumerate(params) if own.temperature == 0]
    if len(greedy) == len(params) and all(own.logprobs is None for own in params):
        return [(token, None) for token in _likeliest(logits).tolist()]
    whole = [row for row, own in enumerate(params) if own.temperature > 0 and not _cuts(own)]
    cut = [row for row, own in enumerate(params) if own.temperature > 0 and _cuts(own)]
    tokens = _likeliest(logits) if greedy else logits.new_empty(len(params), dtype=torch.int64)
    if whole:
        _put(tokens, whole, _draw_whole(_rows(logits, whole), [draws[row] for row in whole]))
    parts = [tokens.double()]
    if cut:
        drawn, is_short = _draw_cut(_rows(logits, cut), [draws[row] for row in cut], num_candidates)
        _put(tokens, cut, drawn)
        parts = [tokens.double(), is_short.double()]
    told = [row for row, own in enumerate(params) if own.logprobs is not None]
    most = max((own.logprobs or 0 for own in params), default=0)
    if told:
        parts.append(_logprobs(_rows(logits, told), _rows(tokens, told), most).view(-1))
    values = iter(torch.cat(parts).tolist())  # the one wait for the device in a step
    chosen = [int(next(values)) for _ in params]
    short = [row for row in cut if next(values)]
    reported: list[TokenLogprobs | None] = [None] * len(params)
    for row in told:
        reported[row] = _reported(chosen[row], values, params[row].logprobs or 0, min(most, logits.shape[1]))
    results = list(zip(chosen, reported, strict=True))
    if short:
        again = _sample(_rows(logits, short), [draws[row] for row in short], num_candidates * _MORE)
        for row, result in zip(short, again, strict=True):
            results[row] = result
    return results


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1), the same for the same three numbers on every machine."""
    digest = hashlib.blake2b(f"{seed},{index},{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def derived_seed(seed: int, name: str) -> int:
    """A seed for somebody called `name` who was given none."""
    return int.from_bytes(hashlib.blake2b(f"{seed},{name}".encode(), digest_size=8).digest(), "little")


def _cuts(params: SamplingParams) -> bool:
    """Whether some tokens are left out before one is drawn."""
    return params.top_k is not None or params.top_p < 1 or params.min_p > 0


def _likeliest(logits: Tensor) -> Tensor:
    # On a CPU the argmax of bfloat16 takes twice the time of a float32 copy and its argmax (2-core VM, 2026-11-22).
    return (logits if logits.is_cuda else logits.float()).argmax(dim=-1)


def _rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    return tensor if len(rows) == len(tensor) else tensor.index_select(0, _sent(rows, tensor, torch.int64))


def _put(tokens: Tensor, rows: Sequence[int], drawn: Tensor) -> None:
    if len(rows) == len(tokens):
        tokens.copy_(drawn)
    else:
        tokens.index_copy_(0, _sent(rows, tokens, torch.int64), drawn)


def _sent(values: Any, like: Tensor, dtype: torch.dtype) -> Tensor:  # Any: nested lists of numbers
    """Numbers on the device of `like`, without waiting for it."""
    return torch.tensor(values, dtype=dtype).to(like.device, non_blocking=True)


def _slices(logits: Tensor, columns: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and their columns: on a GPU all at once, on a CPU as many as its caches hold."""
    size = len(logits) if logits.is_cuda else max(1, _CACHED // logits.shape[1])
    return zip(torch.split(logits, size), torch.split(columns, size, dim=1), strict=True)


def _draw_whole(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """From all tokens, in the order of their ids."""
    numbers = [[draw.params.temperature for draw in draws], [_uniform(draw) for draw in draws]]
    drawn = []
    for rows, own in _slices(logits, _sent(numbers, logits, torch.float64)):
        temperature, number = own.unsqueeze(2)
        scaled = rows.double() / temperature
        cumulated = (scaled - scaled.amax(dim=1, keepdim=True)).exp_().cumsum(dim=1)
        place = torch.searchsorted(cumulated, number * cumulated[:, -1:], right=True)
        drawn.append(place.clamp_(max=rows.shape[1] - 1).view(-1))
    return torch.cat(drawn)


def _draw_cut(logits: Tensor, draws: Sequence[Draw], num_candidates: int) -> tuple[Tensor, Tensor]:
    """From the likeliest tokens, likeliest first; True where more candidates than these would have been drawn from.

    Probabilities are all relative to the likeliest token's: its own is 1.
    """
    size = logits.shape[1]
    every = [draw.params for draw in draws]
    numbers = [
        [own.temperature for own in every],
        [_uniform(draw) for draw in draws],
        [min(own.top_k or size, size) for own in every],
        [own.top_p for own in every],
        [own.min_p for own in every],
    ]
    limits = [min(own.top_k, size) if own.top_k else min(num_candidates, size) for own in every]
    has_total = any(own.top_k is None and own.top_p < 1 for own in every)
    drawn, is_short, first = [], [], 0
    for rows, own in _slices(logits, _sent(numbers, logits, torch.float64)):
        temperature, number, top_k, top_p, min_p = own.unsqueeze(2)
        candidates = max(limits[first : first + len(rows)])
        first += len(rows)
        tokens = _leading(rows, candidates)
        scaled = rows.gather(1, tokens).double() / temperature
        weights = (scaled - scaled[:, :1]).exp_()
        cumulated = weights.cumsum(dim=1)
        count = top_k.clamp(max=candidates)
        total = cumulated.gather(1, count.long() - 1)
        if has_total:
            everything = torch.exp(torch.logsumexp(rows.double() / temperature, 1, keepdim=True) - scaled[:, :1])
            total = torch.where(top_k < size, total, everything)
        inside = torch.where(top_p < 1, cumulated - weights < top_p * total, True) & (weights >= min_p)
        kept = torch.minimum(inside.sum(dim=1, keepdim=True), count.long())
        place = (cumulated <= number * cumulated.gather(1, kept - 1)).sum(dim=1, keepdim=True)
        drawn.append(tokens.gather(1, torch.minimum(place, kept - 1)).view(-1))
        is_short.append((inside[:, -1:] & (top_k > candidates)).view(-1))
    return torch.cat(drawn), torch.cat(is_short)


def _leading(logits: Tensor, count: int) -> Tensor:
    """The likeliest tokens of each row, best first; of equals the one with the lower id."""
    bits = logits.float().view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()  # as integers, floats compare as they do
    ordered <<= 32
    ordered |= torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    return logits.shape[1] - 1 - (torch.topk(ordered, count).values & 0xFFFFFFFF)


def _uniform(draw: Draw) -> float:
    return uniform(draw.seed, draw.index, draw.position)


def _logprobs(logits: Tensor, tokens: Tensor, count: int) -> Tensor:
    """Per row the token's log-probability, then those of the `count` likeliest, then these."""
    logits = logits.float()
    total = torch.logsumexp(logits, dim=1, keepdim=True)
    parts = [logits.gather(1, tokens.view(-1, 1)) - total]
    if count:
        top = torch.topk(logits, min(count, logits.shape[1]))
        parts += [top.values - total, top.indices]
    return torch.cat([part.double() for part in parts], dim=1)


def _reported(token: int, values: Iterator[float], count: int, most: int) -> TokenLogprobs:
    """Read what `_logprobs` says of one row."""
    chosen, top, tokens = next(values), list(islice(values, most)), list(islice(values, most))
    return TokenLogprobs(
        token, chosen, tuple((int(token), value) for token, value in zip(tokens, top, strict=True))[:count]
    )


def _check_int(name: str, value: Any, least: int) -> None:  # Any: the caller's input, checked here
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RequestError(f"{name}={value!r}: must be an integer of at least {least}")


def _check_range(name: str, value: Any, least: float, most: float, said: str) -> None:  # Any: as above
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not least <= value <= most:
        raise RequestError(f"{name}={value!r}: must be {said}")
