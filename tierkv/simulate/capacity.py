"""Capacities, rates and durations as people write them."""

import re
from dataclasses import dataclass

from tierkv.errors import ConfigError
from tierkv.values import parse_size

_PER_SECOND = {"us": 1e6, "ms": 1e3, "s": 1.0}


@dataclass(frozen=True, slots=True)
class Capacity:
    """A share of a trace's unique blocks, bytes, or blocks: one of them. given: as it was written."""

    given: str
    share: float | None = None
    size_bytes: int | None = None
    num_blocks: int | None = None

    def blocks(self, *, unique_blocks: int, block_bytes: int) -> int:
        """In blocks of a trace. Raises ConfigError when it is less than one."""
        if self.share is not None:
            return max(1, round(self.share * unique_blocks))
        if self.num_blocks is not None:
            return self.num_blocks
        assert self.size_bytes is not None
        if self.size_bytes < block_bytes:
            raise ConfigError(
                f"capacity {self.given}: less than one block ({block_bytes} bytes); give more, or name the model by --model "
                f"or --block-bytes"
            )
        return self.size_bytes // block_bytes


def parse_capacity(text: str, *, place: str) -> Capacity:
    """Read `5%`, `40GiB` or `1000blocks`. Raises ConfigError."""
    text = text.strip()
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            if 0 < share <= 1:
                return Capacity(text, share=share)
        elif match := re.fullmatch(r"(\d+) ?blocks?", text):
            if int(match[1]):
                return Capacity(text, num_blocks=int(match[1]))
        elif not text.isdecimal():  # a bare number says neither bytes nor blocks
            return Capacity(text, size_bytes=parse_size(text))
    except ValueError:
        pass
    raise ConfigError(
        f"{place}: capacity {text!r}: expected a share of the unique blocks (5%), a size (40GiB) or blocks (1000blocks)"
    )


def parse_rate(text: str, *, place: str) -> float:
    """Read `6GB/s` as bytes per second. Raises ConfigError."""
    try:
        if text.endswith("/s"):
            return float(parse_size(text.removesuffix("/s")))
    except ValueError:
        pass
    raise ConfigError(f"{place}: rate {text!r}: expected bytes per second, such as 6GB/s")


def parse_seconds(text: str, *, place: str) -> float:
    """Read `100us`, `2ms` or `0.5s`. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(us|ms|s)", text.strip())
    if not match:
        raise ConfigError(f"{place}: time {text!r}: expected a number of us, ms or s, such as 100us")
    return float(match[1]) / _PER_SECOND[match[2]]
