"""Inputs of `tierkv warm` and `tierkv pack build`: from arguments to items. Files are read here and nowhere else of warming.

Needs no model. A file that a person named and that cannot be used is an error; one that was only found is skipped and told of.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Final, Literal

from tierkv.errors import InputError
from tierkv.warm.folders import has_pattern, matching, split_depth, walk
from tierkv.warm.items import Inputs, Item, Names, Skipped, Text, printable
from tierkv.warm.lines import begins_with_object, parse_lines

STDIN: Final = "-"
JSON_LINES: Final = (".jsonl", ".ndjson")
_PIECE_BYTES: Final = 1 << 20


def read_inputs(
    inputs: Sequence[str],
    *,
    max_bytes: int,
    glob: str = "**/*",
    stdin: BinaryIO | None = None,
    stdin_format: Literal["text", "jsonl"] | None = None,
) -> Inputs:
    """Read files, folders, patterns the shell left alone, and standard input for "-", all of it, in this order.

    max_bytes: of each file, and of standard input.  glob: which files of folders, see `folders.walk`.
    stdin: None where there is none to read.  stdin_format: None: lines of JSON if the first line is a JSON object, else text.
    Files that end in .jsonl or .ndjson are lines of JSON (`lines`), all others UTF-8 text. Ends of lines become "\n", as where
    `tierkv generate --file` reads the same file; a byte order mark is dropped.
    Names: a file's path as given, within its folder for files of folders, `path:line` for lines without a name of their own.
    Raises InputError for what was named and cannot be used, for a bad line of JSON anywhere, and if nothing is left.
    """
    if list(inputs).count(STDIN) > 1:
        raise InputError(f"{STDIN} given more than once: standard input can be read once; give it once")
    reader = _Reader(max_bytes, glob)
    for given in inputs:
        if given == STDIN:
            reader.stdin(stdin, stdin_format)
        else:
            reader.path(given)
    if not reader.items:
        raise InputError(_nothing(inputs, glob, reader.skipped))
    names = Names()
    return Inputs(tuple(replace(item, name=names.take(item.name)) for item in reader.items), tuple(reader.skipped))


class _Reader:
    """Collects what arguments mean."""

    def __init__(self, max_bytes: int, glob: str) -> None:
        self._max_bytes, self._glob = max_bytes, glob
        self.items: list[Item] = []
        self.skipped: list[Skipped] = []

    def path(self, given: str) -> None:
        path = Path(given)
        try:
            mode = path.stat().st_mode
        except (OSError, ValueError) as error:
            if has_pattern(given):
                self._pattern(given)
                return
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise InputError(
                printable(f"{given}: {reason}; give a file, a folder, or {STDIN} for standard input")
            ) from None
        if stat.S_ISDIR(mode):
            self._folder(path, self._glob, prefix="")
        else:
            self._named_file(path, given)

    def stdin(self, stdin: BinaryIO | None, format: str | None) -> None:
        if stdin is None:
            raise InputError(f"{STDIN}: there is no standard input to read; give files or folders")
        try:
            data = _piped(stdin, self._max_bytes)
            if format is None:
                format = "jsonl" if begins_with_object(data) else "text"
            items = list(_items(data, STDIN, STDIN)) if format == "jsonl" else [Text(STDIN, _text(data), STDIN)]
        except _Unusable as error:
            raise InputError(f"{STDIN}: standard input is {error.reason}; {self._expected()}") from None
        self.items += items

    def _pattern(self, given: str) -> None:
        deep = split_depth(given)
        if deep is not None:
            folder, glob = deep
            if not folder.is_dir():
                raise InputError(printable(f"{given}: {folder} is not a folder; give a pattern within one"))
            self._folder(folder, glob, prefix="" if folder == Path() else f"{folder.as_posix().rstrip('/')}/")
            return
        for path in matching(given):
            if Path(path).is_dir():
                self._folder(Path(path), self._glob, prefix="")
            else:
                self._found_file(Path(path), path)

    def _folder(self, folder: Path, glob: str, *, prefix: str) -> None:
        for found in walk(folder, glob=glob):
            name = prefix + found.relative
            if found.reason is None:
                self._found_file(folder / found.relative, name)
            else:
                self.skipped.append(Skipped(printable(name), found.reason))

    def _found_file(self, path: Path, name: str) -> None:
        try:
            self.items += self._read(path, name)
        except _Unusable as error:
            self.skipped.append(Skipped(printable(name), error.reason))

    def _named_file(self, path: Path, name: str) -> None:
        try:
            self.items += self._read(path, name)
        except _Unusable as error:
            raise InputError(printable(f"{name}: {error.reason}; {self._expected()}")) from None

    def _read(self, path: Path, name: str) -> list[Item]:
        data = _content(path, self._max_bytes)
        if path.suffix.lower() in JSON_LINES:
            return list(_items(data, str(path), name))
        return [Text(name, _text(data), str(path))]

    def _expected(self) -> str:
        return f"UTF-8 text or lines of JSON of at most {self._max_bytes:,} bytes is expected"


class _Unusable(Exception):
    """A file that is no input, and the reason; whether that is an error is for whoever knows how it was found."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _content(path: Path, max_bytes: int) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise _Unusable("not a regular file")  # before it is opened, which can be an act: a tape rewinds
        # What is a pipe by now must not be waited for.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise _Unusable("not a regular file")
            if status.st_size > max_bytes:
                raise _Unusable(f"too large ({status.st_size:,} bytes, the limit is {max_bytes:,})")
            return file.read(status.st_size)  # not more: it may be growing
    except OSError as error:
        raise _Unusable(f"not readable ({error.strerror})") from None


def _piped(stdin: BinaryIO, max_bytes: int) -> bytes:
    data = bytearray()
    try:
        while piece := stdin.read(_PIECE_BYTES):  # a read of the whole limit would take that much memory at once
            data += piece
            if len(data) > max_bytes:
                raise _Unusable(f"too large (more than {max_bytes:,} bytes, the limit)")
    except OSError as error:
        raise _Unusable(f"not readable ({error.strerror})") from None
    return bytes(data)


def _items(data: bytes, where: str, name: str) -> Iterator[Item]:
    num_items = 0
    for item in parse_lines(data, where=where, name=name):
        num_items += 1
        yield item
    if not num_items:
        raise _Unusable("empty")


def _text(data: bytes) -> str:
    if (zero := data.find(b"\0")) >= 0:
        raise _Unusable(f"not text (a zero byte at position {zero:,})")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Unusable(
            f"not UTF-8 text (byte 0x{error.object[error.start]:02x} at position {error.start:,})"
        ) from None
    if not text.strip():
        raise _Unusable("empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _nothing(inputs: Sequence[str], glob: str, skipped: Sequence[Skipped]) -> str:
    if not inputs:
        return f"no input given: give files, folders, or {STDIN} for standard input"
    given = ", ".join(inputs[:5]) + (", …" if len(inputs) > 5 else "")
    looked = f"files that match {glob} and are UTF-8 text, or lines of JSON in {' or '.join(JSON_LINES)}"
    if not skipped:
        return printable(f"{given}: no file found; looked for {looked}, hidden ones left out")
    told = ", ".join(f"{each.name} ({each.reason})" for each in skipped[:3]) + (", …" if len(skipped) > 3 else "")
    return printable(f"{given}: nothing that can be used; looked for {looked}; left out: {told}")
