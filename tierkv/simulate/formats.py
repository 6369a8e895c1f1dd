"""Formats of traces: what their rows say, as requests. Blocks are chained here, whatever they were.

Only full blocks count, as in an engine: a prompt's ids are cut to its length // block_tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from tierkv.hints import NO_HINTS, Ending, Next
from tierkv.simulate.blocks import chained
from tierkv.simulate.request import Request
from tierkv.simulate.rows import Row, Rows

MOONCAKE_TOKENS: Final = 512
BAILIAN_TOKENS: Final = 16


@dataclass(frozen=True, slots=True)
class Options:
    """What the caller knows better than the trace. block_tokens: tokens that an id stands for, or to cut tokens into."""

    block_tokens: int | None = None
    tokenizer: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Requests of a trace, in the order of its rows."""

    block_tokens: int
    requests: Iterator[Request]


Reader = Callable[[Rows, Options], Source]


def mooncake(rows: Rows, options: Options) -> Source:
    """Mooncake's release with FAST'25: milliseconds, `hash_ids` of 512 tokens."""
    block_tokens = options.block_tokens or MOONCAKE_TOKENS

    def requests() -> Iterator[Request]:
        for row in rows:
            time_s = rows.time(row, "timestamp", unit_s=1e-3)
            inputs, blocks = _blocks(rows, row, block_tokens)
            outputs = rows.count(row, "output_length", default=0)
            yield Request(time_s, blocks, inputs, outputs, NO_HINTS, Ending(_next(row.get("tool_use")), None, outputs))

    return Source(block_tokens, requests())


def _next(tool: object) -> Next:
    return Next.TOOL if tool is True else Next.TURN if tool is False else Next.UNKNOWN


def _blocks(rows: Rows, row: Row, block_tokens: int) -> tuple[int, bytes]:
    """Length of a prompt, and its full blocks."""
    inputs, ids = rows.count(row, "input_length"), rows.ids(row, "hash_ids")
    check_size(rows, len(ids), inputs, block_tokens)
    return inputs, chained(ids[: inputs // block_tokens])


def check_size(rows: Rows, count: int, inputs: int, block_tokens: int) -> None:
    """Refuse ids that cannot be those of blocks of this size; a part of a block, or a little padding, may be there or not."""
    blocks = inputs / block_tokens
    if abs(count - blocks) > 1 + 0.02 * blocks:
        each = round(inputs / count) if count else 0
        rows.fail(
            f"{count} hash_ids for {inputs} tokens, about {each} each, in a trace of {block_tokens}-token blocks",
            "one size of block for all requests is expected; pass it as block_tokens",
        )


READERS: Final[dict[str, Reader]] = {"mooncake": mooncake}


def detect(row: Row) -> str | None:
    """The format that a row is of."""
    if "hash_ids" in row and "timestamp" in row:
        return "bailian" if "chat_id" in row else "mooncake"
    return None
