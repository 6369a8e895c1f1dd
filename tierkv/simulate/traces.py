"""Open a trace: find out its format, and parse it once into a spool that can be replayed any number of times."""

from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np

from tierkv.errors import TraceError
from tierkv.hints import Next
from tierkv.simulate.files import NAMES, STDIN, open_lines
from tierkv.simulate.formats import Options, Reader, bailian, log, mooncake, sessions
from tierkv.simulate.prompts import TEXTS, TOKENS, prompts
from tierkv.simulate.request import Request
from tierkv.simulate.rows import Rows
from tierkv.simulate.spool import Spool

READERS: Final[dict[str, Reader]] = {
    "mooncake": mooncake,
    "bailian": bailian,
    "sessions": sessions,
    "prompts": prompts,
    "tierkv": log,
}
PROGRESS_REQUESTS: Final = 1024


def open_trace(
    path: Path | str,
    *,
    format: str | None = None,
    block_tokens: int | None = None,
    tokenizer: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Spool:
    """Read a trace from a file, from standard input for "-", or from all .json and .jsonl files of a folder as one trace.

    format: one of READERS; None: told by the first row.  block_tokens: tokens that an id of the trace stands for, where that
    is not the format's usual number; for prompts given as tokens or text, how many make a block.  tokenizer: name or folder of
    a model whose tokenizer reads text.  progress: called with the number of requests so far, now and then.
    Raises TraceError, in one line with file and line number, for whatever cannot be read.
    """
    if format is not None and format not in READERS:
        raise TraceError(f"format {format!r}: must be one of {', '.join(READERS)}")
    if block_tokens is not None and block_tokens < 1:
        raise TraceError(f"block_tokens {block_tokens}: must be at least 1")
    with open_lines(path) as lines:
        rows = Rows(lines)
        reader = READERS[format or _detect(rows)]
        source = reader(rows, Options(block_tokens, tokenizer))
        spool = Spool(name=_name(path), block_tokens=source.block_tokens)
        _fill(spool, source.requests, arrange=not source.in_order, progress=progress)
        totals = spool.totals
        if not totals.num_requests:
            raise TraceError(
                f"{lines.name}: none of {totals.num_short} requests has a full block of {source.block_tokens} tokens; "
                f"a trace of longer prompts is expected, or smaller blocks"
            )
    return spool


def _fill(spool: Spool, requests: Iterator[Request], *, arrange: bool, progress: Callable[[int], None] | None) -> None:
    """Write all requests; the last one of each session is marked as such.

    Memory: 16 bytes per request that has a session, and 16 more where they are to be put in order.
    """
    times, all_starts = array("d"), array("q")
    sessions, starts = array("Q"), array("q")
    for number, request in enumerate(requests, 1):
        start = spool.add(request)
        if arrange:
            times.append(request.time_s)
            all_starts.append(start)
        if request.hints.session is not None:
            sessions.append(int(request.hints.session, 16))
            starts.append(start)
        if progress and not number % PROGRESS_REQUESTS:
            progress(number)
    if arrange:
        spool.arrange([all_starts[at] for at in np.argsort(np.array(times), kind="stable")])
    _, from_end = np.unique(np.array(sessions)[::-1], return_index=True)
    for back in from_end.tolist():
        spool.mark(starts[-1 - back], Next.ENDED)
    spool.seal()


def _detect(rows: Rows) -> str:
    """The format that the first row is of."""
    row = rows.first()
    if "tierkv_log" in row:
        return "tierkv"
    if "hash_ids" in row:
        return "bailian" if "chat_id" in row else "mooncake"
    if "requests" in row:
        return "sessions"
    if any(field in row for field in (*TOKENS, *TEXTS)):
        return "prompts"
    rows.fail(
        f"a row with {', '.join(row) or 'nothing'}, of no format known", f"say which by --format: {', '.join(READERS)}"
    )


def _name(path: Path | str) -> str:
    """What a trace is called in tables: its file's name without what says how it is written."""
    name = "stdin" if str(path) == STDIN else Path(path).resolve().name
    for ending in (".gz", ".zst", *NAMES):
        name = name.removesuffix(ending)
    return name
