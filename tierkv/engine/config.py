"""What an engine is told at start. Wrong values are a ConfigError here, never a surprise later."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tierkv.errors import ConfigError

DTYPES: Final = ("auto", "float32", "bfloat16", "float16")
GRAPHS: Final = ("auto", "off")
MAX_THREADS: Final = 1024


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Options of one engine.

    dtype: of weights, activations and KV; "auto" is the model's own.  device: "cpu", "cuda" or "cuda:N".
    num_pages, pool_bytes: size of the page pool when the engine owns it, in either unit. When neither is given: 1 GiB on a CPU,
    on a GPU what is left of gpu_memory_utilization, a part of the card that all its processes may use together.
    max_batch_tokens: tokens computed per step, prefill chunks included.  max_sequences: sequences running at a time.
    max_context: prompt and output of one request; the model's own limit when None.  seed: of requests that name none.
    chunk_tokens: a prompt is computed in chunks that end at multiples of so many tokens, each whole or not at all in a step, so
    that its KV does not depend on what else the step computes; None: as much as fits.
    num_threads: of torch, for the whole process; None leaves it.  cuda_graphs: "auto" records decode steps on a GPU, "off" never.
    """

    dtype: str = "auto"
    device: str = "cpu"
    num_pages: int | None = None
    pool_bytes: int | None = None
    block_tokens: int = 16
    max_batch_tokens: int = 512
    chunk_tokens: int | None = None
    max_sequences: int = 64
    max_context: int | None = None
    seed: int = 0
    num_threads: int | None = None
    gpu_memory_utilization: float = 0.9
    cuda_graphs: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"engine dtype={self.dtype!r}: must be one of {', '.join(DTYPES)}")
        kind, _, number = str(self.device).partition(":")
        if kind not in ("cpu", "cuda") or (number and not (kind == "cuda" and number.isdecimal())):
            raise ConfigError(f"engine device={self.device!r}: must be cpu, cuda or cuda:N")
        if self.num_pages is not None and self.pool_bytes is not None:
            raise ConfigError("engine num_pages and pool_bytes are both given: they size the same pool, give one")
        for name in ("block_tokens", "max_batch_tokens", "max_sequences"):
            _require(name, getattr(self, name), _at_least_one)
        for name in ("num_pages", "pool_bytes", "max_context", "num_threads", "chunk_tokens"):
            if getattr(self, name) is not None:
                _require(name, getattr(self, name), _at_least_one)
        if self.num_threads is not None and self.num_threads > MAX_THREADS:
            raise ConfigError(
                f"engine num_threads={self.num_threads}: give at most {MAX_THREADS}, the cores you may use"
            )
        if self.cuda_graphs not in GRAPHS:
            raise ConfigError(f"engine cuda_graphs={self.cuda_graphs!r}: must be one of {', '.join(GRAPHS)}")
        share = self.gpu_memory_utilization
        if not isinstance(share, float) or not 0 < share < 1:
            raise ConfigError(f"engine gpu_memory_utilization={share!r}: must be a number above 0 and below 1")
        if not _is_int(self.seed) or not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"engine seed={self.seed!r}: must be an integer from 0 to 2**64 - 1")
        if self.max_batch_tokens < self.max_sequences:
            raise ConfigError(
                f"engine max_batch_tokens={self.max_batch_tokens}: must be at least max_sequences={self.max_sequences}, "
                "since every running sequence decodes one token per step"
            )
        self._check_chunks()

    def _check_chunks(self) -> None:
        if self.chunk_tokens is None:
            return
        if self.chunk_tokens % self.block_tokens:
            raise ConfigError(
                f"engine chunk_tokens={self.chunk_tokens}: must be a multiple of block_tokens={self.block_tokens}"
            )
        if self.chunk_tokens + self.max_sequences - 1 > self.max_batch_tokens:
            raise ConfigError(
                f"engine chunk_tokens={self.chunk_tokens}: a step of max_batch_tokens={self.max_batch_tokens} must have room "
                f"for a chunk while max_sequences={self.max_sequences} less one decode; lower it, or raise max_batch_tokens"
            )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _at_least_one(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _require(name: str, value: object, holds: Callable[[object], bool]) -> None:
    if not holds(value):
        raise ConfigError(f"engine {name}={value!r}: must be an integer of at least 1")
