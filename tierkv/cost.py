"""Seconds to recompute a block at its depth, seconds to fetch it from a tier: measured as the store runs. Pure."""

from collections.abc import Sequence
from typing import Final

DEFAULT_TOKEN_S: Final = 1 / 25_000
"""Prefill of one token without context, before anything is measured."""
DEFAULT_CONTEXT_TOKENS: Final = 30_500
"""Context at which attention doubles the cost of a token, before anything is measured."""
DEFAULT_BYTES_PER_S: Final = (float("inf"), 20e9, 2e9, 1e9)
"""Read rate of a tier by position, before anything is measured: device, host, disk, network."""

MEMORY: Final = 0.995
"""Weight that a prefill sample keeps at the next one: a few hundred samples count."""
SMOOTHING: Final = 0.1
"""Weight of the newest fetch."""


class CostModel:
    """Prefill time a x tokens + b x (sum of their contexts), and an average time per block and tier.

    Reads are lock-free and may be from any thread; observations must come from one thread at a time each.
    Where samples say nothing about a or b (all of one context, say), it stays near its default.
    """

    def __init__(self, *, block_tokens: int, block_bytes: int, num_tiers: int = 4) -> None:
        self._block_tokens = block_tokens
        self._token_s = DEFAULT_TOKEN_S
        self._context_s = DEFAULT_TOKEN_S / DEFAULT_CONTEXT_TOKENS
        rates = [*DEFAULT_BYTES_PER_S, *[DEFAULT_BYTES_PER_S[-1]] * num_tiers][:num_tiers]
        self._fetch_s = [block_bytes / rate for rate in rates]
        self._observed = [False] * num_tiers
        # Normal equations of relative errors; the prior is one sample's worth of evidence for each default.
        self._sums = [1e-4, 0.0, 1e-4, 1e-4, 1e-4]

    def recompute_s(self, depth_blocks: int) -> float:
        """Seconds to compute one block that has `depth_blocks` blocks before it."""
        tokens = self._block_tokens
        return tokens * (self._token_s + self._context_s * tokens * (depth_blocks + 0.5))

    def fetch_s(self, tier: int) -> float:
        """Seconds to read one block from a tier."""
        return self._fetch_s[tier]

    def observe_prefill(self, tokens: int, context: int, seconds: float) -> None:
        """Learn from a prefill of `tokens` tokens after `context` others that took `seconds`."""
        if tokens <= 0 or seconds <= 0:
            return
        # In units of the defaults, so that both unknowns are near 1; divided by the time, so that short samples count.
        a = tokens * DEFAULT_TOKEN_S / seconds
        b = tokens * (context + tokens / 2) * DEFAULT_TOKEN_S / DEFAULT_CONTEXT_TOKENS / seconds
        self._sums = [MEMORY * old + new for old, new in zip(self._sums, (a * a, a * b, b * b, a, b), strict=True)]
        token, context_ = _solve(self._sums)
        self._token_s = token * DEFAULT_TOKEN_S
        self._context_s = context_ * DEFAULT_TOKEN_S / DEFAULT_CONTEXT_TOKENS

    def observe_fetch(self, tier: int, blocks: int, seconds: float) -> None:
        """Learn from a read of `blocks` blocks from a tier that took `seconds`."""
        if blocks <= 0:
            return
        each = seconds / blocks
        old = self._fetch_s[tier]
        self._fetch_s[tier] = old + SMOOTHING * (each - old) if self._observed[tier] else each
        self._observed[tier] = True


def _solve(sums: Sequence[float]) -> tuple[float, float]:
    """Both unknowns of the normal equations, none below zero."""
    aa, ab, bb, a, b = sums
    determinant = aa * bb - ab * ab
    if determinant > 1e-9 * aa * bb:
        token, context = (bb * a - ab * b) / determinant, (aa * b - ab * a) / determinant
        if token >= 0 and context >= 0:
            return token, context
    by_token, by_context = a / aa, b / bb
    # One of them alone: the one that leaves less unexplained.
    return (by_token, 0.0) if a * by_token >= b * by_context else (0.0, by_context)
