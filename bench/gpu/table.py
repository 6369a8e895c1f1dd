"""Rows as a table of a terminal's width."""

from collections.abc import Iterator, Sequence
from typing import Any


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One line per row: value, ratio to its limit, whether the goal was met, the error against float64."""
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        name = f"{row['name']:<{width}}"
        if "failure" in row:
            yield f"{name}  FAILED: {row['failure']}"
        elif "absent" in row:
            yield f"{name}  not here: {row['absent']}"
        else:
            yield f"{name}  {row['value']:>9.4g} {row['unit']:<8}{_against(row)}{_error(row)}"


def _against(row: dict[str, Any]) -> str:
    if row["ratio"] is None:
        return ""
    goal = row["goal"]
    verdict = "" if goal is None else f"  goal {goal:g} {'met' if row['ratio'] >= goal else 'NOT MET'}"
    return f"{row['ratio']:>6.2f} of {row['limit_name']} ({row['limit']:.4g}){verdict}"


def _error(row: dict[str, Any]) -> str:
    return f"  error {row['error']:.1e}" if row.get("error") is not None else ""


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether a result was not that of the reference."""
    return bool(row.get("wrong"))
