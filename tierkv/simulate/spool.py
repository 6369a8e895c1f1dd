"""A trace as the simulator keeps it: one record per request in an unnamed temporary file.

Parsing is the slow part and every cell replays the whole trace, so it is parsed once. The file has no name: nothing is left
behind however the process ends. Readers keep their own place, also those that a fork has made.

    record = head | session, UTF-8 | blocks, 8 bytes each
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

HEAD: Final = Struct("<dIIIBbHf")
"""Time, input and output tokens, blocks, what is next, priority, bytes of the session, seconds until what is next."""
NEXT: Final = tuple(Next)
CODES: Final = {what: code for code, what in enumerate(NEXT)}
PIECE_BYTES: Final = 1 << 20
UNKNOWN_S: Final = -1.0


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
        """Write a request; returns where it starts, for `arrange` and `mark`."""
        hints, ending = request.hints, request.ending
        session = (hints.session or "").encode()[:65535]
        within_s = UNKNOWN_S if ending.within_s is None else ending.within_s
        blocks = request.num_blocks
        head = HEAD.pack(
            request.time_s,
            request.input_tokens,
            request.output_tokens,
            blocks,
            CODES[ending.next],
            hints.priority,
            len(session),
            within_s,
        )
        start = self._size
        self._size += self._file.write(head + session + request.blocks)
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
        os.pwrite(self._file.fileno(), bytes((CODES[what],)), start + 20)

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
        return (next(self._in_order(start, PIECE_BYTES >> 8)) for start in self._starts)

    def _in_order(self, at: int = 0, piece: int = PIECE_BYTES) -> Iterator[Request]:
        descriptor, head = self._file.fileno(), HEAD.size
        need = piece
        while at < self._size:
            data = os.pread(descriptor, need, at)
            pos, need = 0, piece
            while pos + head <= len(data):
                time_s, inputs, outputs, blocks, code, priority, session, within_s = HEAD.unpack_from(data, pos)
                begin = pos + head + session
                end = begin + ID_BYTES * blocks
                if end > len(data):
                    need = max(piece, end - pos)
                    break
                hints = Hints(data[pos + head : begin].decode() or None, priority) if session or priority else NO_HINTS
                ending = Ending(NEXT[code], None if within_s < 0 else within_s, outputs)
                yield Request(time_s, data[begin:end], inputs, outputs, hints, ending)
                pos = end
            at += pos
