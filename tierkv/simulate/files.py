"""Lines of a trace: from a file or standard input, plain, gzip or zstandard. Streams, and numbers the lines for errors."""

import gzip
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, Final, NoReturn, cast

from tierkv.errors import TraceError

GZIP: Final = b"\x1f\x8b"
ZSTD: Final = b"\x28\xb5\x2f\xfd"
MAX_LINE_BYTES: Final = 1 << 28
"""A line, or a document without lines, must fit in memory; one that does not is no trace."""


class Lines:
    """Numbered lines of a trace; `number` is the one given last, from 1."""

    def __init__(self, source: IO[bytes], name: str) -> None:
        self.name = name
        self.number = 0
        self._source = source
        self._again: list[bytes] = []

    def __iter__(self) -> Iterator[bytes]:
        """Lines that are not empty, without the ends of lines."""
        while line := self._next():
            if line := line.strip():
                yield line

    def give_back(self, line: bytes) -> None:
        """Let `line`, the one given last, come once more."""
        self._again.append(line)
        self.number -= 1

    def rest(self, line: bytes) -> bytes:
        """The document that begins with `line`, the one given last, to the end."""
        parts, size = [line], len(line)
        while more := self._next():
            parts.append(more)
            size += len(more)
            if size > MAX_LINE_BYTES:
                self.fail(
                    f"more than {MAX_LINE_BYTES >> 20} MiB without a line that is JSON", "one JSON object per line"
                )
        return b"".join(parts)

    def fail(self, what: str, expected: str) -> NoReturn:
        """Refuse the trace because of the line given last."""
        raise TraceError(f"{self.name}:{max(self.number, 1)}: {what}; {expected}")

    def _next(self) -> bytes:
        self.number += 1
        if self._again:
            return self._again.pop()
        try:
            line = self._source.readline(MAX_LINE_BYTES)
        except (EOFError, OSError, zlib.error, _zstd_error()) as error:
            self.fail(
                f"cannot be read on: {error}",
                "the file is damaged or was cut off: fetch it again, or decompress what is left",
            )
        if len(line) == MAX_LINE_BYTES:
            self.fail(f"a line of more than {MAX_LINE_BYTES >> 20} MiB", "one JSON object per line is expected")
        return line


@contextmanager
def open_lines(path: Path | str) -> Iterator[Lines]:
    """Open a trace for reading once; "-" is standard input. Tells compression by content, not by name.

    Raises TraceError for what cannot be opened or decompressed.
    """
    name = "stdin" if str(path) == "-" else str(path)
    try:
        file = cast(BufferedReader, sys.stdin.buffer) if str(path) == "-" else Path(path).open("rb")  # noqa: SIM115
    except OSError as error:
        raise TraceError(f"{name}: {error.strerror or error}; give a trace file, or - for standard input") from None
    try:
        yield Lines(_decompressed(file, name), name)
    finally:
        if str(path) != "-":
            file.close()


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
            f"{name}: is compressed with zstandard, which this Python cannot read; pip install zstandard, or decompress it first"
        ) from None
    return cast(IO[bytes], BufferedReader(module.ZstdDecompressor().stream_reader(file, read_across_frames=True)))


def _zstd_error() -> type[Exception]:
    """What the package in use raises for damaged data."""
    for name in ("compression.zstd", "zstandard"):
        if name in sys.modules:
            return cast(type[Exception], sys.modules[name].ZstdError)
    return EOFError
