"""A trace as the simulator keeps it: one record per request in an unnamed temporary file.

Parsing is the slow part and every cell replays the whole trace, so it is parsed once. The file has no name: nothing is left
behind however the process ends. Readers keep their own place, also those that a fork has made.

    record = head | blocks, 8 bytes each
"""

import os
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import IO, Final
from weakref import finalize

from tierkv.hints import NO_HINTS, Ending, Hints, Next
from tierkv.simulate.request import ID_BYTES, Request

HEAD: Final = Struct("<dQIIIfBbxx")
"""Time, session (0: none), input and output tokens, blocks, seconds until what is next, what is next, priority."""
NEXT_AT: Final = 32
NEXT: Final = tuple(Next)
CODES: Final = {what: code for code, what in enumerate(NEXT)}
PIECE_BYTES: Final = 1 << 20
UNKNOWN_S: Final = -1.0
PIECE_OF_ONE: Final = 1 << 12


@dataclass(frozen=True, slots=True)
class Totals:
    """Sizes of a trace. num_requests, input_tokens: of the requests with a full block; num_short: the others."""

    num_requests: int
    num_short: int
    block_refs: int
    input_tokens: int
    max_blocks: int
    span_s: float


class Spool:
    """Requests written once, read any number of times. Written from one thread; reading is safe from any, and after a fork."""

    def __init__(self, *, name: str, block_tokens: int) -> None:
        self.name = name
        self.block_tokens = block_tokens
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="tierkv-trace-")  # noqa: SIM115
        self.close: Callable[[], object] = finalize(self, self._file.close)
        """Gives the disk space back; so does forgetting the spool."""
        self._starts: array[int] = array("q")  # of the records, in the order of arrival; empty: as they were written
        self._size = 0
        self._num_requests = self._num_short = self._block_refs = self._input_tokens = self._max_blocks = 0
        self._last_s = 0.0

    def add(self, request: Request) -> int:
        """Write a request; returns where it starts, for `arrange` and `mark`. Its session is a `session_name`."""
        hints, ending = request.hints, request.ending
        blocks = request.num_blocks
        head = HEAD.pack(
            request.time_s,
            int(hints.session, 16) if hints.session else 0,
            request.input_tokens,
            request.output_tokens,
            blocks,
            UNKNOWN_S if ending.within_s is None else ending.within_s,
            CODES[ending.next],
            hints.priority,
        )
        start = self._size
        self._size += self._file.write(head + request.blocks)
        self._last_s = max(self._last_s, request.time_s)
        if blocks:
            self._num_requests += 1
            self._block_refs += blocks
            self._input_tokens += request.input_tokens
            self._max_blocks = max(self._max_blocks, blocks)
        else:
            self._num_short += 1
        return start

    def mark(self, start: int, what: Next) -> None:
        """Set what follows the request that was written at `start`."""
        self._file.flush()
        os.pwrite(self._file.fileno(), bytes((CODES[what],)), start + NEXT_AT)

    def seal(self) -> None:
        """All is written: from now on a fork has all of it, and nothing to write once more."""
        self._file.flush()

    def arrange(self, starts: Sequence[int]) -> None:
        """Read the records in this order from now on."""
        self._starts = array("q", starts)

    @property
    def totals(self) -> Totals:
        """Sizes of what was written so far."""
        return Totals(
            self._num_requests,
            self._num_short,
            self._block_refs,
            self._input_tokens,
            self._max_blocks,
            self._last_s,
        )

    def __iter__(self) -> Iterator[Request]:
        """From the first."""
        self._file.flush()
        if not self._starts:
            return self._in_order()
        return (next(self._in_order(start, PIECE_OF_ONE)) for start in self._starts)

    def _in_order(self, at: int = 0, piece: int = PIECE_BYTES) -> Iterator[Request]:
        descriptor, head = self._file.fileno(), HEAD.size
        need = piece
        while at < self._size:
            data = os.pread(descriptor, need, at)
            pos, need = 0, piece
            while pos + head <= len(data):
                time_s, session, inputs, outputs, blocks, within_s, code, priority = HEAD.unpack_from(data, pos)
                begin = pos + head
                end = begin + ID_BYTES * blocks
                if end > len(data):
                    need = max(piece, end - pos)
                    break
                hints = Hints(f"{session:x}" if session else None, priority) if session or priority else NO_HINTS
                ending = Ending(NEXT[code], None if within_s < 0 else within_s, outputs)
                yield Request(time_s, data[begin:end], inputs, outputs, hints, ending)
                pos = end
            at += pos


def session_name(number: int) -> str:
    """What a trace's session is called in hints: a 64-bit number."""
    return f"{number or 1:x}"
