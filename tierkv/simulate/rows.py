"""Rows of a trace, one JSON object per line, with fields that are what they must be or end in one clear line."""

import json
from collections.abc import Iterator
from typing import Any, Final

from tierkv.simulate.blocks import Ids, numbers
from tierkv.simulate.files import Lines

Row = dict[str, Any]  # as JSON gives it

COUNTS: Final = 2**31
LATEST: Final = 1e18
"""No time is later, in whatever unit."""
EXPECTED: Final = "one JSON object per line is expected"


class Rows:
    """The rows of a trace, in order. Every problem raises TraceError and names file and line.

    may_end_early: a last line that is cut off is no problem.
    """

    def __init__(self, lines: Lines) -> None:
        self.lines = lines
        self.fail = lines.fail
        self.may_end_early = False
        self._first: float | None = None  # times, in the trace's unit
        self._last = 0.0

    def __iter__(self) -> Iterator[Row]:
        for line in self.lines:
            if self.may_end_early and not self.lines.whole and not _is_json(line):
                return
            yield self._parse(self._document(line))

    def first(self) -> Row:
        """The first row; it comes again."""
        for line in self.lines:
            line = self._document(line)
            row = self._parse(line)
            self.lines.give_back(line)
            return row
        return self.fail("no requests", EXPECTED)

    def _document(self, line: bytes) -> bytes:
        """A row; one that is spread over lines as a whole, if it is all that is in its file."""
        return self.lines.rest(line) if line.endswith((b"{", b"[", b",")) and not _is_json(line) else line

    def _parse(self, line: bytes) -> Row:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            self.fail(f"not JSON ({reason}): {_short(line)}", EXPECTED)
        if type(row) is not dict:
            self.fail(f"not a JSON object: {_short(line)}", EXPECTED)
        return row

    def time(self, row: Row, field: str, *, unit_s: float = 1.0) -> float:
        """Arrival in seconds from the first row's; rows must be in order."""
        given = self.seconds(row, field)
        if self._first is None:
            self._first = self._last = given
        if given < self._last:
            self.fail(
                f"{field} is {row[field]}, after {self._last:.15g} of an earlier request",
                "sort the trace by the time of arrival",
            )
        self._last = given
        return (given - self._first) * unit_s

    def seconds(self, row: Row, field: str, *, default: float | None = None) -> float:
        """A time, not negative; absent: the default, if there is one."""
        given = self.field(row, field, "a number") if default is None else row.get(field, default)
        if type(given) not in (int, float) or not -LATEST <= given <= LATEST:  # nor NaN
            self.fail(f"{field} is {_short(given)}", "a number is expected")
        if given < 0:
            self.fail(f"{field} is {given}, which is negative", "shift all times so that the trace begins at 0")
        return float(given)

    def count(self, row: Row, field: str, *, default: int | None = None) -> int:
        """A whole number of something."""
        given = self.whole(row, field, default=default)
        if not 0 <= given < COUNTS:
            self.fail(f"{field} is {given}", f"a whole number from 0 to {COUNTS - 1} is expected")
        return given

    def whole(self, row: Row, field: str, *, default: int | None = None) -> int:
        """A whole number; absent or null: the default, if there is one."""
        given = row.get(field)
        if given is None and default is not None:
            return default
        given = self.field(row, field, "a whole number")
        if type(given) is float and given.is_integer():
            given = int(given)
        if type(given) is not int:
            self.fail(f"{field} is {_short(given)}", "a whole number is expected")
        return given

    def ids(self, row: Row, field: str) -> Ids:
        """Ids of blocks."""
        given = self.field(row, field, "a list of block ids")
        if type(given) is not list:
            self.fail(f"{field} is {_short(given)}", "a list of block ids is expected")
        try:
            return numbers(given)
        except TypeError as error:
            self.fail(
                f"{field} has {_short(error.args[0])} at position {error.args[1]}",
                "whole numbers or texts are expected",
            )

    def field(self, row: Row, field: str, expected: str) -> Any:
        """A field that must be there."""
        if field not in row:
            names = ", ".join(row) if row else "nothing"
            self.fail(f"no {field} (there is {_cut(names)})", f"{expected} is expected")
        return row[field]


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _short(given: object) -> str:
    return _cut(given[:240].decode(errors="replace") if isinstance(given, bytes) else json.dumps(given))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
