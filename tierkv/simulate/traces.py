"""Open a trace: find out its format, and parse it once into a spool that can be replayed any number of times."""

from collections.abc import Callable
from pathlib import Path

from tierkv.errors import TraceError
from tierkv.simulate.files import open_lines
from tierkv.simulate.formats import READERS, Options, detect
from tierkv.simulate.rows import Rows
from tierkv.simulate.spool import Spool

PROGRESS_REQUESTS = 1024


def open_trace(
    path: Path | str,
    *,
    format: str | None = None,
    block_tokens: int | None = None,
    tokenizer: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Spool:
    """Read a trace from a file, or from standard input for "-".

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
        row = rows.first()
        found = format or detect(row)
        if found is None:
            rows.fail(
                f"a row with {', '.join(row) or 'nothing'}, which is of no format known",
                f"name the format: one of {', '.join(READERS)}",
            )
        source = READERS[found](rows, Options(block_tokens, tokenizer))
        name = "stdin" if str(path) == "-" else Path(path).name.split(".")[0]
        spool = Spool(name=name, block_tokens=source.block_tokens)
        try:
            for number, request in enumerate(source.requests, 1):
                spool.add(request)
                if progress and not number % PROGRESS_REQUESTS:
                    progress(number)
        except BaseException:
            spool.close()
            raise
    return spool
