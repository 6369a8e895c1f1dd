"""Rows of a trace, one JSON object per line, with fields that are what they must be or end in one clear line."""

import json
import math
from collections.abc import Iterator
from typing import Any

from tierkv.simulate.blocks import Ids, numbers
from tierkv.simulate.files import Lines

Row = dict[str, Any]  # as JSON gives it


class Rows:
    """The rows of a trace, in order. Every problem raises TraceError and names file and line."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines
        self.fail = lines.fail
        self._first_s: float | None = None
        self._last_s = 0.0

    def __iter__(self) -> Iterator[Row]:
        for line in self.lines:
            yield self.parse(line)

    def first(self) -> Row:
        """The first row; it comes again. A document of several lines is one row."""
        for line in self.lines:
            try:
                json.loads(line)
            except ValueError:
                if line.startswith((b"{", b"[")) and len(line) < 3:
                    line = self.lines.rest(line)
            row = self.parse(line)
            self.lines.give_back(line)
            return row
        return self.fail("no requests", "one JSON object per line is expected")

    def parse(self, line: bytes) -> Row:
        """Read one line."""
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            self.fail(f"not JSON ({reason}): {_short(line)}", "one JSON object per line is expected")
        if not isinstance(row, dict):
            self.fail(f"not a JSON object: {_short(line)}", "one JSON object per line is expected")
        return row

    def time(self, row: Row, field: str, *, unit_s: float = 1.0) -> float:
        """Arrival in seconds from the first row's."""
        given = self.field(row, field, "a number")
        if type(given) not in (int, float) or not math.isfinite(given):
            self.fail(f"{field} is {_short(given)}", "a number is expected")
        if given < 0:
            self.fail(f"{field} is {given}, which is negative", "times count from the start of the trace: shift them")
        now_s = given * unit_s
        if self._first_s is None:
            self._first_s = now_s
        if now_s - self._first_s < self._last_s:
            self.fail(f"{field} is {given}, before that of an earlier request", "sort the trace by the time of arrival")
        self._last_s = now_s - self._first_s
        return self._last_s

    def count(self, row: Row, field: str, *, default: int | None = None) -> int:
        """A whole number, not negative."""
        given = row.get(field, default) if default is not None else self.field(row, field, "a whole number")
        if type(given) is float and given.is_integer():
            given = int(given)
        if type(given) is not int or not 0 <= given < 2**31:
            self.fail(f"{field} is {_short(given)}", "a whole number from 0 to 2147483647 is expected")
        return given

    def ids(self, row: Row, field: str) -> Ids:
        """Ids of blocks."""
        given = self.field(row, field, "a list of block ids")
        if type(given) is not list:
            self.fail(f"{field} is {_short(given)}", "a list of block ids is expected")
        try:
            return numbers(given)
        except TypeError as error:
            self.fail(f"{field} has {error}", "whole numbers or texts are expected")

    def field(self, row: Row, field: str, expected: str) -> Any:
        """A field that must be there."""
        if field not in row:
            self.fail(f"no {field}, only {', '.join(row) or 'an empty object'}", f"{field}, {expected}, is expected")
        return row[field]


def _short(given: object) -> str:
    shown = given.decode(errors="replace") if isinstance(given, bytes) else json.dumps(given)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
