"""What a trace is to everything that replays one."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

from tierkv.hints import NO_ENDING, NO_HINTS, Ending, Hints

ID_BYTES: Final = 8
"""A block of a trace is 8 bytes, an int64-LE id: an index with two tokens to the block takes it for a block."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace.

    time_s: arrival, from the first one's.  blocks: ids of the prompt's full blocks, ID_BYTES each; an id names a block given
    the blocks before it.  input_tokens, output_tokens: lengths, with parts of blocks.  ending: known only when it ends.
    """

    time_s: float
    blocks: bytes
    input_tokens: int
    output_tokens: int
    hints: Hints = field(default=NO_HINTS)
    ending: Ending = field(default=NO_ENDING)

    @property
    def num_blocks(self) -> int:
        """Full blocks of the prompt."""
        return len(self.blocks) // ID_BYTES


class Trace(Protocol):
    """Requests in the order of their arrival; may be gone through any number of times, in bounded memory."""

    name: str
    block_tokens: int

    def __iter__(self) -> Iterator[Request]:
        """From the first."""
