"""Lines of a trace: from a file, a folder or standard input, plain, gzip or zstandard. Streams, and numbers them for errors."""

import gzip
import sys
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from importlib import import_module
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, Final, NoReturn, cast

from tierkv.errors import TraceError

STDIN: Final = "-"
GZIP: Final = b"\x1f\x8b"
ZSTD: Final = b"\x28\xb5\x2f\xfd"
NAMES: Final = (".json", ".jsonl")
MAX_LINE_BYTES: Final = 1 << 28
"""A line, or a document without lines, must fit in memory; one that does not is no trace."""


Files = Generator[tuple[str, IO[bytes]], None, None]
"""Names and contents, each open until the next."""


class Lines:
    """Numbered lines of one or more files.

    name: of the file of the line given last; number: the line's, from 1; whole: whether it had an end of line.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self.name, self._file = next(files)
        self.number = 0
        self.whole = True
        self._again: list[bytes] = []

    def __iter__(self) -> Iterator[bytes]:
        """Lines that are not empty, without the ends of lines."""
        while True:
            while line := self._next():
                self.whole = line.endswith(b"\n")
                if line := line.strip():
                    yield line
            following = next(self._files, None)
            if following is None:
                return
            self.name, self._file = following
            self.number = 0

    def give_back(self, line: bytes) -> None:
        """Let `line`, the one given last, come once more."""
        self._again.append(line + b"\n")
        self.number -= 1

    def rest(self, line: bytes) -> bytes:
        """The document that begins with `line`, the one given last, to the end of its file."""
        parts, size, number = [line], len(line), self.number
        while more := self._next():
            parts.append(more)
            size += len(more)
            if size > MAX_LINE_BYTES:
                self.fail(
                    f"more than {MAX_LINE_BYTES >> 20} MiB without a line of JSON",
                    "one JSON object per line is expected",
                )
        self.number = number
        return b"\n".join(parts)

    def fail(self, what: str, expected: str) -> NoReturn:
        """Refuse the trace because of the line given last."""
        message = f"{self.name}:{max(self.number, 1)}: {what}; {expected}"
        raise TraceError("".join(each if each.isprintable() else "?" for each in message))

    def _next(self) -> bytes:
        """One more line of this file; none: empty."""
        self.number += 1
        if self._again:
            return self._again.pop()
        try:
            line = self._file.readline(MAX_LINE_BYTES)
        except (EOFError, OSError, zlib.error, _zstd_error()) as error:
            self.fail(f"cannot be read on: {error}", "the file is damaged or was cut off: fetch it again")
        if len(line) == MAX_LINE_BYTES:
            self.fail(f"a line of {MAX_LINE_BYTES >> 20} MiB or more", "one JSON object per line is expected")
        return line


@contextmanager
def open_lines(path: Path | str) -> Iterator[Lines]:
    """Open a trace to be read once; "-" is standard input. Tells compression by content, not by name.

    Raises TraceError for what cannot be opened or decompressed, there or as the lines come.
    """
    with closing(_stdin() if str(path) == STDIN else _opened(Path(path))) as files:
        yield Lines(files)


def _stdin() -> Files:
    yield "stdin", _decompressed(cast(BufferedReader, sys.stdin.buffer), "stdin")


def _opened(path: Path) -> Files:
    paths = [path]
    if path.is_dir():
        paths = sorted(
            each for each in path.iterdir() if each.name.removesuffix(".gz").removesuffix(".zst").endswith(NAMES)
        )
        if not paths:
            raise TraceError(f"{path}: no trace in this folder; files that end in {' or '.join(NAMES)} are expected")
    for each in paths:
        try:
            file = each.open("rb")
        except OSError as error:
            raise TraceError(
                f"{each}: {error.strerror or error}; give a trace file, or {STDIN} for standard input"
            ) from None
        with file:
            yield str(each), _decompressed(file, str(each))


def _decompressed(file: BufferedReader, name: str) -> IO[bytes]:
    start = file.peek(4)[:4]
    if start.startswith(GZIP):
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if start == ZSTD:
        return _zstd(file, name)
    return file


def _zstd(file: BufferedReader, name: str) -> IO[bytes]:
    module: Any  # one of two packages, neither of which need be there
    if sys.version_info >= (3, 14):
        module = import_module("compression.zstd")
        return cast(IO[bytes], module.ZstdFile(file))
    try:
        module = import_module("zstandard")
    except ImportError:
        raise TraceError(
            f"{name}: is compressed with zstandard; pip install 'tierkv[simulate]' to read it, or decompress it"
        ) from None
    return BufferedReader(module.ZstdDecompressor().stream_reader(file, read_across_frames=True))


def _zstd_error() -> type[Exception]:
    """What the package in use raises for damaged data."""
    for name in ("compression.zstd", "zstandard"):
        if name in sys.modules:
            return cast(type[Exception], sys.modules[name].ZstdError)
    return EOFError
